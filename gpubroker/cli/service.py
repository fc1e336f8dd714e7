"""`gpubroker service`: the supervisor as a systemd service of the user, which comes back whatever ends it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from gpubroker.cli import units
from gpubroker.cli.render import say
from gpubroker.cli.units import ENVIRONMENT, command, quoted, systemctl
from gpubroker.cli.upkeep import Upkeep, upkeep_options
from gpubroker.errors import ConfigError

_NAME = "gpubroker.service"


@click.group()
def service() -> None:
    """The supervisor as a systemd service of yours: it runs jobs while nobody is logged in."""


@service.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker service install
  gpubroker service install --now
  gpubroker service install --now --poll-every 5m""",
)
@upkeep_options()
@click.option("--now", "is_now", is_flag=True, help="Start it, too, rather than only say how.")
def install(*, upkeep: Upkeep, is_now: bool) -> None:
    """Write the unit. Twice is once.

    Put what your shell exports, such as VAST_API_KEY=..., as NAME=value lines into ~/.config/gpubroker/env,
    which only you may read: no key is copied there for you.
    """
    place = unit_file()
    was_there = place.exists()
    is_new = units.write(place, unit_text(command(), upkeep.words))
    say(f"{place} {'is written' if is_new else 'is there already'}")
    units.tell_environment(units.variables())
    steps = [["daemon-reload"], ["enable", "--now", _NAME]]
    if was_there and is_new:
        steps.append(["restart", _NAME])
    systemctl(steps, is_now=is_now)
    say(units.LINGER)


@service.command(context_settings={"max_content_width": 100}, epilog="Example: gpubroker service remove")
def remove() -> None:
    """Stop it and delete the unit. Jobs stay: another supervisor goes on with them."""
    place = unit_file()
    if not place.exists():
        say(f"{place} is not there")
        return
    try:
        systemctl([["disable", "--now", _NAME]])
    except ConfigError as error:  # without a session there is nothing of it that runs
        say(str(error))
    place.unlink()
    say(f"{place} is deleted")


@service.command(context_settings={"max_content_width": 100}, epilog="Example: gpubroker service show")
def show() -> None:
    """The unit as it is installed, or as it would be."""
    place = unit_file()
    is_there = place.exists()
    say(f"{place}{'' if is_there else ' is not there: gpubroker service install writes this'}")
    click.echo(place.read_text(encoding="utf-8") if is_there else unit_text(command()), nl=False)


def unit_file() -> Path:
    """Where the unit is, or would be."""
    return units.unit_folder() / _NAME


def unit_text(words: Sequence[str], options: Sequence[str] = ()) -> str:
    """Restarted for ever: a database or a vendor that is away now will be back."""
    return f"""\
[Unit]
Description=gpubroker: runs jobs on rented GPUs while nobody watches
StartLimitIntervalSec=0

[Service]
ExecStart={quoted((*words, "supervise", *options))}
EnvironmentFile=-%h/{ENVIRONMENT}
Restart=always
RestartSec=10

[Install]
WantedBy=default.target
"""
