"""`gpubroker schedule`: polls and exports by cron, or by timers of the user's systemd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpubroker import config
from gpubroker.cli import crontab, units
from gpubroker.cli.options import format_option
from gpubroker.cli.render import age, console, iso, print_json, say, table
from gpubroker.cli.units import ENVIRONMENT, quoted, systemctl
from gpubroker.cli.upkeep import Upkeep, upkeep_options
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError
from gpubroker.units import SECONDS, duration_text

if TYPE_CHECKING:
    from gpubroker.prices.store import Store

_COMMANDS = ("poll", "export")
# Two files of it are kept at most.
_MOST_LOG = 1_000_000
_DAY_S = SECONDS["d"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be run, how often."""

    name: str  # a gpubroker command
    words: list[str]  # with the command itself
    every_s: int
    option: str  # that said how often


@click.group(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker schedule install
  gpubroker schedule show
  gpubroker schedule remove""",
)
def schedule() -> None:
    """Polls and exports by themselves: lines in your crontab, or timers of your systemd.

    Those who run gpubroker supervise can have the same from it: gpubroker supervise --poll-every 5m.
    """


@schedule.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker schedule install
  gpubroker schedule install --poll-every 15m --dry-run
  gpubroker schedule install --export history/ --as parquet --export-every 1d
  gpubroker schedule install --systemd --export s3://bucket/prices/ --as csv.gz --cursor nightly""",
)
@upkeep_options(poll_every="5m")
@click.option("--cron", "is_cron", is_flag=True, help="In your crontab.  [default: where there is one]")
@click.option("--systemd", "is_systemd", is_flag=True, help="By timers of your systemd.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
def install(*, upkeep: Upkeep, is_cron: bool, is_systemd: bool, dry_run: bool) -> None:
    """Write the lines, or the units and start their timers. What was installed before is replaced.

    Put what your shell exports, such as VAST_API_KEY=..., as NAME=value lines into ~/.config/gpubroker/env,
    which only you may read: no key is copied for you. Where your config and your database are is kept.
    """
    if is_cron and is_systemd:
        raise click.UsageError("--cron or --systemd: one of them")
    config.load()
    by_cron = is_cron or (not is_systemd and _has_cron())
    tasks, known = _tasks(upkeep), units.variables()
    places = units.places(known)
    if by_cron:
        lines = [_line(task, places) for task in tasks]
        if dry_run:
            click.echo("\n".join((crontab.BEGIN, *lines, crontab.END)))
            return
        _install_cron(lines)
    else:
        files = {path: text for task in tasks for path, text in _units(task, places).items()}
        if dry_run:
            click.echo("\n".join(f"# {path}\n{text}" for path, text in files.items()), nl=False)
            return
        _install_systemd(files)
    units.tell_environment((*known, *places))
    say(f"Its words are in {log_file()}" if by_cron else units.LINGER)


def _has_cron() -> bool:
    """What is used where nothing is said. Raises ConfigError where there is neither."""
    if crontab.is_here():
        return True
    if shutil.which("systemctl"):
        return False
    raise ConfigError("there is neither crontab nor systemctl here: gpubroker poll --every 5m polls on")


def _tasks(upkeep: Upkeep) -> list[_Task]:
    tasks = []
    if upkeep.poll_every_s is not None:
        tasks.append(_Task(name="poll", words=["poll"], every_s=upkeep.poll_every_s, option="--poll-every"))
    if (export := upkeep.export) is not None:
        words = ["export", *export.words]
        tasks.append(_Task(name="export", words=words, every_s=export.every_s, option="--export-every"))
    return tasks


# cron


def _line(task: _Task, places: Mapping[str, str]) -> str:
    fields = crontab.times(task.every_s, task.option)
    return crontab.line(fields, places, [*units.command(), "schedule", "run", *task.words])


def _install_cron(lines: Sequence[str]) -> None:
    if not crontab.is_here():
        raise ConfigError("there is no crontab command here: gpubroker schedule install --systemd")
    before = crontab.read()
    after = crontab.changed(before, lines)
    if after != before:
        crontab.write(after)
    _remove_systemd()
    say("Your crontab has it already:" if after == before else "Your crontab has now:")
    for line in lines:
        say(f"  {line}")


def _remove_cron() -> bool:
    if not crontab.is_here():
        return False
    before = crontab.read()
    after = crontab.changed(before, [])
    if after == before:
        return False
    crontab.write(after)
    return True


@schedule.command(
    context_settings={
        "max_content_width": 100,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    },
    epilog="Example: gpubroker schedule run poll",
)
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="poll|export ...")
def run(*, words: tuple[str, ...]) -> None:
    """What a line in the crontab runs: gpubroker poll or export, as at the prompt.

    It knows what is in ~/.config/gpubroker/env, and its words go into a log: cron would mail them.
    """
    from gpubroker.cli import main

    if words[0] not in _COMMANDS:
        raise click.UsageError(f"{words[0][:40]!r} is neither poll nor export")
    os.environ.update(units.variables())
    log = log_file()
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _MOST_LOG:
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    say(f"{iso(SystemClock().now())} {' '.join(words)}")
    raise click.exceptions.Exit(int(main(list(words))))


def log_file() -> Path:
    """Of what cron runs."""
    from platformdirs import user_state_path

    return user_state_path("gpubroker") / "schedule.log"


# systemd


def _units(task: _Task, places: Mapping[str, str]) -> dict[Path, str]:
    """A service that ends, and its timer, by their paths. One that still runs is not started again."""
    folder, name = units.unit_folder(), f"gpubroker-{task.name}"
    service = f"""\
[Unit]
Description=gpubroker {task.name}

[Service]
Type=oneshot
ExecStart={quoted((*units.command(), *task.words))}
{units.assigned(places)}EnvironmentFile=-%h/{ENVIRONMENT}
SuccessExitStatus=4
"""
    timer = f"""\
[Unit]
Description=gpubroker {task.name} every {duration_text(task.every_s)}

[Timer]
{_when(task.every_s)}
[Install]
WantedBy=timers.target
"""
    return {folder / f"{name}.service": service, folder / f"{name}.timer": timer}


def _when(every_s: int) -> str:
    """Days by the calendar, so that a machine that sleeps makes up for what it missed."""
    if every_s in (_DAY_S, 7 * _DAY_S):
        day = "" if every_s == _DAY_S else "Sun "
        return f"OnCalendar={day}*-*-* 04:07:00\nPersistent=true\n"
    return f"OnActiveSec=10s\nOnUnitActiveSec={every_s}s\nAccuracySec={min(60, every_s // 10)}s\n"


def _install_systemd(files: Mapping[Path, str]) -> None:
    if crontab.is_here():
        _remove_cron()
    _remove_systemd(but=files)
    timers = [path.name for path in files if path.suffix == ".timer"]
    was_there = [path for path in files if path.exists()]
    new = [path for path, text in files.items() if units.write(path, text)]
    for path in files:
        say(f"{path} {'is written' if path in new else 'is there already'}")
    steps = [["daemon-reload"], ["enable", "--now", *timers]]
    if set(new) & set(was_there):
        steps.append(["restart", *timers])
    systemctl(steps)


def _installed_units() -> list[Path]:
    folder = units.unit_folder()
    found = [folder / f"gpubroker-{name}.{kind}" for name in _COMMANDS for kind in ("timer", "service")]
    return [path for path in found if path.exists()]


def _remove_systemd(but: Mapping[Path, str] | None = None) -> list[Path]:
    """Those that were there."""
    gone = [path for path in _installed_units() if path not in (but or {})]
    timers = [path.name for path in gone if path.suffix == ".timer"]
    if timers:
        try:
            systemctl([["disable", "--now", *timers]])
        except ConfigError as error:  # without a session there is nothing of it that runs
            say(str(error))
    for path in gone:
        path.unlink()
    return gone


@schedule.command(context_settings={"max_content_width": 100}, epilog="Example: gpubroker schedule remove")
def remove() -> None:
    """Delete what `schedule install` has written, and nothing else. The prices stay."""
    had_lines = _remove_cron()
    gone = _remove_systemd()
    if had_lines:
        say("The lines are gone from your crontab.")
    for path in gone:
        say(f"{path} is deleted")
    if not had_lines and not gone:
        say("Nothing is installed.")


# show


@schedule.command(
    context_settings={"max_content_width": 100},
    epilog="\b\nExamples:\n  gpubroker schedule show\n  gpubroker schedule show --format json",
)
@format_option("table", "json")
def show(*, output: str) -> None:
    """What is installed, when each provider was last polled, and how far exports have come."""
    settings, clock = config.load(), SystemClock()
    lines = crontab.ours(crontab.read()) if crontab.is_here() else []
    files = _installed_units()
    polls, exports = _last(settings, clock)
    if output == "json":
        print_json(
            {
                "crontab": lines,
                "units": [str(path) for path in files],
                "log": str(log_file()),
                "polls": [one | {"at": iso(one["at"])} for one in polls],
                "exports": [one | {"up_to": iso(one["up_to"])} for one in exports],
            }
        )
        return
    for line in lines:
        click.echo(line)
    for path in files:
        click.echo(str(path))
    if not lines and not files:
        say("Nothing is installed: gpubroker schedule install polls every five minutes.")
    elif lines:
        say(f"Their words are in {log_file()}")
    _print(polls, exports, clock.now())


def _last(settings: Settings, clock: Clock) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of each provider and of each cursor, by the database; nothing where there is none."""
    from gpubroker.prices.exports import standings
    from gpubroker.prices.store import Store

    with Store.open(settings.db_url, clock) as store:
        if store.revision() is None:
            return [], []
        store.migrate()
        exports = [
            {"cursor": one.name, "runs": one.runs, "up_to": one.up_to, "cut_off": one.is_cut_off}
            for one in standings(store.database)
        ]
        return list(_polls(store)), exports


def _polls(store: Store) -> Iterator[dict[str, Any]]:
    for name in store.provider_states():
        last = store.last_poll(name)
        if last is not None:
            state = "ok" if last.observed_at else "failed" if last.error else "not finished"
            yield {"provider": name, "at": last.started_at, "state": state, "reason": last.error or ""}


def _print(polls: Sequence[dict[str, Any]], exports: Sequence[dict[str, Any]], now: datetime) -> None:
    if polls:
        made = table("provider", "last poll", "state", "why")
        for one in polls:
            made.add_row(one["provider"], f"{age(one['at'], now)} ago", one["state"], one["reason"])
        console().print(made)
    else:
        say("Nobody was polled yet.")
    if exports:
        made = table("export", "runs", "up to", "", right=("runs",))
        for one in exports:
            up_to = f"{one['up_to']:%Y-%m-%d %H:%M} UTC" if one["up_to"] else "-"
            made.add_row(
                one["cursor"], str(one["runs"]), up_to, "cut off, or under way" if one["cut_off"] else ""
            )
        console().print(made)
