"""`gpubroker service`: the supervisor as a systemd service of the user, which comes back whatever ends it.

No key is copied: the service reads a file of NAME=value lines that the user writes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from gpubroker.cli.render import say
from gpubroker.errors import ConfigError

_NAME = "gpubroker.service"
_ENVIRONMENT = ".config/gpubroker/env"
_LIMIT_S = 60
_VENDORS = ("VAST_", "RUNPOD_", "LAMBDA_", "MODAL_", "AWS_", "GPUBROKER_")


@click.group()
def service() -> None:
    """The supervisor as a systemd service of yours: it runs jobs while nobody is logged in."""


@service.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker service install
  gpubroker service install --now""",
)
@click.option("--now", "is_now", is_flag=True, help="Start it, too, rather than only say how.")
def install(*, is_now: bool) -> None:
    """Write the unit. Twice is once.

    Put what your shell exports, such as VAST_API_KEY=..., as NAME=value lines into ~/.config/gpubroker/env,
    which only you may read: no key is copied there for you.
    """
    place, unit = unit_file(), unit_text(command())
    before = place.read_text(encoding="utf-8") if place.exists() else None
    if before != unit:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}")
        part.write_text(unit, encoding="utf-8")
        part.replace(place)
    say(f"{place} {'is there already' if before == unit else 'is written'}")
    _tell_environment()
    steps = [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", "--now", _NAME]]
    if before not in (None, unit):
        steps.append(["systemctl", "--user", "restart", _NAME])
    _do(steps, is_now=is_now)
    say("So that it runs while you are logged out, and after a restart: loginctl enable-linger")


@service.command(context_settings={"max_content_width": 100}, epilog="Example: gpubroker service remove")
def remove() -> None:
    """Stop it and delete the unit. Jobs stay: another supervisor goes on with them."""
    place = unit_file()
    if not place.exists():
        say(f"{place} is not there")
        return
    try:
        _do([["systemctl", "--user", "disable", "--now", _NAME]], is_now=True)
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
    """Where systemd looks for units of this user."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user" / _NAME


def command() -> list[str]:
    """The gpubroker that runs now, by its absolute path."""
    script = Path(sys.executable).with_name("gpubroker")
    return [str(script)] if script.exists() else [sys.executable, "-m", "gpubroker"]


def unit_text(words: list[str]) -> str:
    """Restarted for ever: a database or a vendor that is away now will be back."""
    return f"""\
[Unit]
Description=gpubroker: runs jobs on rented GPUs while nobody watches
StartLimitIntervalSec=0

[Service]
ExecStart={" ".join(_quoted(word) for word in (*words, "supervise"))}
EnvironmentFile=-%h/{_ENVIRONMENT}
Restart=always
RestartSec=10

[Install]
WantedBy=default.target
"""


def _quoted(word: str) -> str:
    """As systemd reads a word: its own specifiers and variables are none of ours."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(plain, escaped)
    return f'"{word}"'


def _tell_environment() -> None:
    """What is set here is not set there. Names only."""
    place = Path.home() / _ENVIRONMENT
    say(f"It knows only the variables in {place}, which is yours to write: NAME=value lines, chmod 600")
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
        is_open = bool(place.stat().st_mode & 0o077)
    except FileNotFoundError:
        lines, is_open = [], False
    known = {line.partition("=")[0].strip() for line in lines}
    missing = sorted(name for name in os.environ if name.startswith(_VENDORS) and name not in known)
    if missing:
        say(f"Set here and not there: {', '.join(missing)}")
    if is_open:
        say(f"Others may read {place}: chmod 600 {place}")


def _do(steps: list[list[str]], *, is_now: bool) -> None:
    """By systemctl where there is one. Raises ConfigError with what it said."""
    if not is_now or shutil.which("systemctl") is None:
        say("To do: " + " && ".join(" ".join(step) for step in steps))
        return
    for step in steps:
        try:
            ran = subprocess.run(  # noqa: S603
                step, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{' '.join(step)}: {error}") from None
        if ran.returncode:
            raise ConfigError(f"{' '.join(step)}: {ran.stderr.strip()[:300] or ran.returncode}")
