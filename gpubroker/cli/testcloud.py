"""`gpubroker testcloud`: the vendors' APIs on loopback, with real processes behind real SSH as the nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpubroker.cli.options import format_option
from gpubroker.errors import ConfigError

if TYPE_CHECKING:
    from gpubroker.testcloud.up import Cloud


@click.group(context_settings={"max_content_width": 100})
def testcloud() -> None:
    """A cloud on this machine that answers as the vendors do; nothing in it costs money."""


@testcloud.command(epilog="Example: gpubroker testcloud up --speed 60 --format json")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="The same seed, the same market.")
@click.option(
    "--trace",
    "traces",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A spot trace (CSV, may be gzipped) that prices and preemptions follow. Repeat: dealt to the hosts.",
)
@click.option("--faults", default="", metavar="SPEC", help="A fault script: JSON, or a file that holds it.")
@click.option(
    "--speed",
    type=click.FloatRange(0.001, 1_000_000),
    default=1.0,
    show_default=True,
    help="Simulated seconds in a real one.",
)
@click.option("--liars", is_flag=True, help="Also hosts that have something else than they list.")
@format_option("table", "json")
def up(*, seed: int, traces: tuple[Path, ...], faults: str, speed: float, liars: bool, output: str) -> None:
    """Start it and run until standard input closes or Ctrl-C.

    What to put into a client's environment is printed once all of it answers: as lines for a shell, or as one
    line of JSON with `env` and `control`.
    """
    try:
        from gpubroker.testcloud.up import Options, run
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'gpubroker[testcloud]'") from error

    def ready(cloud: Cloud) -> None:
        for reason in cloud.left_out:
            click.echo(f"gpubroker: left out: {reason}", err=True)
        if output == "json":
            click.echo(json.dumps({"env": dict(cloud.env), "control": cloud.control}))
            return
        for name, value in cloud.env.items():
            click.echo(f"export {name}={value}")
        click.echo(f"# control: {cloud.control}")
        click.echo("The test cloud is up; Ctrl-C ends it.", err=True)
        click.echo("What is polled from it stays in your store: set GPUBROKER_DB_URL, too.", err=True)

    run(Options(seed=seed, traces=traces, faults=faults, speed=speed, liars=liars), ready)
