"""`gpu2vast train.py --epochs 3` and its kin: a script of this folder on one vendor, in a dozen words."""

from __future__ import annotations

from typing import Any

import click

from gpubroker.cli import main as gpubroker


def main(vendor: str, title: str) -> int:
    """The whole command for one vendor; the exit code is `gpubroker run`'s."""
    command = _command(vendor, title)
    try:
        found: Any = command.main(standalone_mode=False, prog_name=f"gpu2{vendor}")
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return int(found or 0)


def _command(vendor: str, title: str) -> click.Command:
    @click.command(
        context_settings={
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
            "help_option_names": ["-h", "--help"],
            "max_content_width": 100,
        },
        help=f"""Run SCRIPT of this folder on a GPU of {title}, and bring its files back.

        The folder is sent, the script runs there, an interrupted job goes on from its last checkpoint (with
        --store), what the script wrote comes back to gpubroker-out/, and nothing is left that bills. Unless
        told otherwise: any GPU of 16 GiB or more, an hour of work to plan by, and $10 at most. All options of
        `gpubroker run` may stand before SCRIPT; what follows it is the script's own.""",
        epilog=f"""\b
Examples:
  gpu2{vendor} train.py --epochs 3
  gpu2{vendor} --gpu 4090 --hours 2 --max-usd 5 train.py --epochs 3
  gpu2{vendor} --gpu h100 --hours 8 --store s3://bucket/job --artifact out train.py""",
    )
    @click.argument("words", metavar="SCRIPT [ARGS]...", nargs=-1, type=click.UNPROCESSED)
    def run(words: tuple[str, ...]) -> Any:
        options, script = _split(list(words))
        if not script:
            raise click.UsageError(f"which script? gpu2{vendor} train.py --epochs 3")
        return gpubroker(["run", "--provider", vendor, *_usual(options), *options, "--", *_run_by(script)])

    return run


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Options of `gpubroker run`, and the script with its own."""
    from gpubroker.cli.run import run

    takes_value = {
        name: not (isinstance(option, click.Option) and option.is_flag)
        for option in run.params
        for name in (*option.opts, *option.secondary_opts)
    }
    at = 0
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "--":
            return words[:at], words[at + 1 :]
        name, equals, _ = words[at].partition("=")
        if name not in takes_value:
            raise click.NoSuchOption(name)
        at += 1 if equals or not takes_value[name] else 2
    return words[:at], words[at:]


def _usual(options: list[str]) -> list[str]:
    """What `gpubroker run` must know and a newcomer does not say."""
    given = {option.partition("=")[0] for option in options}
    usual = []
    if not given & {"--gpu", "--min-vram", "--resume"}:
        usual += ["--min-vram", "16"]
    if not given & {"--hours", "--work", "--resume"}:
        usual += ["--hours", "1"]
    if not given & {"--max-usd", "--resume"}:
        usual += ["--max-usd", "10"]
    if "--artifact" not in given:
        usual += ["--artifact", "."]
    return usual


def _run_by(script: list[str]) -> list[str]:
    return ["python3", *script] if script[0].endswith(".py") else script
