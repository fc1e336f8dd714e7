"""The command line: one file a command group, found lazily so that `--help` imports nothing heavy."""

from __future__ import annotations

import importlib
from typing import Any

import click

from gpubroker import __version__
from gpubroker.errors import BrokerError

# command -> (module, attribute, one-line help). The help is here so that listing imports no module.
_COMMANDS = {
    "quote": ("gpubroker.cli.quote", "quote", "What a job would cost on every market, the bill first."),
    "size": ("gpubroker.cli.size", "size", "The GPU memory a model needs, and which cards hold it."),
    "calibrate": ("gpubroker.cli.calibrate", "calibrate", "Record how fast a finished run was on its GPUs."),
    "plan": ("gpubroker.cli.plan", "plan", "Strategies for a job: deadline and budget for the least money."),
    "backtest": ("gpubroker.cli.backtest", "backtest", "What policies would have cost on spot traces."),
    "run": ("gpubroker.cli.run", "run", "A job on rented nodes, through preemptions to its end."),
    "submit": ("gpubroker.cli.submit", "submit", "A job for the supervisor: it runs while nobody watches."),
    "supervise": ("gpubroker.cli.supervise", "supervise", "Run what was submitted, for as long as it lives."),
    "jobs": ("gpubroker.cli.jobs", "jobs", "Jobs: what each does, costs and has saved."),
    "watch": ("gpubroker.cli.watch", "watch", "A live view of jobs, nodes and money."),
    "logs": ("gpubroker.cli.logs", "logs", "A job's own output; -f follows it from node to node."),
    "events": ("gpubroker.cli.events", "events", "What happened and why, a line each."),
    "cancel": ("gpubroker.cli.cancel", "cancel", "A job saves itself and ends."),
    "cost": ("gpubroker.cli.cost", "cost", "What was spent, by job, day, provider or GPU."),
    "job": ("gpubroker.cli.job", "job", "What became of a job: its nodes, checkpoints and bill."),
    "volume": ("gpubroker.cli.volume", "volume", "Network volumes: create, list and delete them."),
    "up": ("gpubroker.cli.box", "up", "A node of your own for some hours: it ends itself."),
    "boxes": ("gpubroker.cli.box", "boxes_command", "Boxes that are up, their cost and their end."),
    "ssh": ("gpubroker.cli.reach", "ssh", "A shell on a box."),
    "exec": ("gpubroker.cli.reach", "exec_command", "Run a command on a box."),
    "cp": ("gpubroker.cli.reach", "cp", "Copy files to a box and from it."),
    "forward": ("gpubroker.cli.reach", "forward", "Ports of a box on this machine: a notebook."),
    "down": ("gpubroker.cli.box", "down", "End a box, and say what it cost."),
    "service": ("gpubroker.cli.service", "service", "The supervisor as a service of your system."),
    "preflight": ("gpubroker.cli.preflight", "preflight", "Whether this machine's GPUs can be trusted."),
    "offers": ("gpubroker.cli.offers", "offers", "Current offers and the GPUs that are known."),
    "poll": ("gpubroker.cli.poll", "poll_command", "Ask the providers for prices and store them."),
    "providers": ("gpubroker.cli.providers", "providers", "Providers, their state and what is missing."),
    "init": ("gpubroker.cli.init", "init", "Set up: try your keys, find your GPU, cap what a day may cost."),
    "doctor": ("gpubroker.cli.doctor", "doctor", "Check configuration, credentials, clock and database."),
    "sweep": ("gpubroker.cli.sweep", "sweep", "Nodes that bill and that nobody wants; --end ends them."),
    "stop-all": ("gpubroker.cli.sweep", "stop_all", "End everything that bills, now."),
    "notify": ("gpubroker.cli.notify", "notify", "Whether messages about your jobs arrive."),
    "history": ("gpubroker.cli.history", "history", "What a GPU cost over time: figures and pictures."),
    "now": ("gpubroker.cli.now", "now", "Is it cheap right now? Against its own past, by hour and weekday."),
    "survival": ("gpubroker.cli.survival", "survival", "How long offers and their prices last."),
    "alert": ("gpubroker.cli.alert", "alert", "Be told when a GPU comes below a price."),
    "export": ("gpubroker.cli.export", "export", "The price history as files: CSV, JSON Lines, Parquet."),
    "schedule": ("gpubroker.cli.schedule", "schedule", "Polls and exports by cron or systemd timers."),
    "backfill": ("gpubroker.cli.backfill", "backfill_command", "A vendor's own record of its past prices."),
    "import-history": ("gpubroker.cli.import_history", "import_history", "Import price history files."),
    "demo": ("gpubroker.cli.demo", "demo", "Watch it work, on a cloud on this machine: no account."),
    "testcloud": ("gpubroker.cli.testcloud", "testcloud", "A cloud on this machine for tests and tries."),
    "db": ("gpubroker.cli.db", "db", "The database: check, compact, copy, upgrade it."),
}


class LazyGroup(click.Group):
    """Imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the work, not of the alphabet."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None for a name nobody knows."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A mistyped command is told its near matches."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], _COMMANDS, n=2)
            if not near:
                raise
            text = f"No such command {args[0]!r}. Did you mean {' or '.join(near)}?"
            raise click.UsageError(text, ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table above, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: gpubroker quote --gpu h100 --hours 8",
)
@click.version_option(__version__, prog_name="gpubroker")
def cli() -> None:
    """What a GPU job will really cost on each market, and the cheapest node that still does it."""


def main(args: list[str] | None = None) -> Any:
    """Run the command line: one sentence and the right exit code for everything that can go wrong."""
    try:
        return cli.main(args=args, standalone_mode=False) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SystemExit:
        # click's only way out in this mode: the reader of a pipe (head, less) has gone. That is no error.
        return 0
    except (click.Abort, BrokerError, OSError) as error:
        code, text = _told(error)
        click.echo(f"gpubroker: {text}", err=True)
        return code


def _told(error: click.Abort | BrokerError | OSError) -> tuple[int, str]:
    """Exit code and sentence."""
    if isinstance(error, BrokerError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        return 1, f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror or error}"
    return 130, "interrupted"
