"""Commands that take another's command after `--`, with a word before it that may be left out."""

from __future__ import annotations

import shlex

import click

_AFTER = "gpubroker.after"


class WithCommand(click.Command):
    """What follows the first `--` is kept apart: click itself would mix it with the words before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click."""
        at = args.index("--") if "--" in args else len(args)
        if sum(not word.startswith("-") for word in args[:at]) > 1:
            raise click.UsageError(f"put -- before the command: {ctx.command_path} NAME -- COMMAND", ctx)
        ctx.meta[_AFTER] = tuple(args[at + 1 :])
        return super().parse_args(ctx, args[:at])


def command_line(ctx: click.Context) -> str:
    """For the node's shell: one word is a line of it, several are one command. "" = none was given."""
    words: tuple[str, ...] = ctx.meta[_AFTER]
    return words[0] if len(words) == 1 else shlex.join(words)
