"""Polls and exports by the clock: the options that ask for them, and doing both beside a supervisor.

schedule install ──> crontab or systemd ──> gpubroker poll, gpubroker export --cursor
supervise --poll-every --export ──> a thread of APScheduler's, with connections of its own ──> the same
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from gpubroker.cli.options import Duration
from gpubroker.config import Settings
from gpubroker.doors import Clock
from gpubroker.errors import BrokerError, ConfigError
from gpubroker.model import OfferQuery
from gpubroker.prices.export import SUFFIXES
from gpubroker.units import duration_text

if TYPE_CHECKING:
    from apscheduler.schedulers.background import BackgroundScheduler

    from gpubroker.prices.store import Store

F = TypeVar("F", bound=Callable[..., Any])
Say = Callable[[str], None]
_LEAST_S = 30
_DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An export that goes on where its last one ended."""

    place: str  # folder/ or s3://bucket/prefix/
    kind: str  # as --as has it
    cursor: str
    every_s: int

    @property
    def words(self) -> list[str]:
        """For `gpubroker export`."""
        return ["--to", self.place, "--as", self.kind, "--cursor", self.cursor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What is to be done, and how often. None = not that."""

    poll_every_s: int | None = None
    export: Export | None = None

    @property
    def words(self) -> list[str]:
        """For `gpubroker supervise`."""
        polls = [] if self.poll_every_s is None else ["--poll-every", duration_text(self.poll_every_s)]
        if self.export is None:
            return polls
        _, place, *how = self.export.words
        return [*polls, "--export", place, *how, "--export-every", duration_text(self.export.every_s)]


def upkeep_options(poll_every: str | None = None) -> Callable[[F], F]:
    """The command is given `upkeep`. `poll_every`: what is meant where nothing is said."""

    def decorate(command: F) -> F:
        @click.option(
            "--poll-every",
            "poll_every_s",
            type=Duration(least_s=_LEAST_S),
            default=poll_every,
            show_default=poll_every is not None,
            help="Ask all providers for their prices so often: 5m, 1h.",
        )
        @click.option(
            "--export",
            "place",
            metavar="PLACE",
            help="Add what has ended to a folder/ or s3://bucket/prefix/, as gpubroker export does.",
        )
        @click.option(
            "--as", "kind", type=click.Choice([name[1:] for name in SUFFIXES]), help="With --export."
        )
        @click.option(
            "--cursor", metavar="NAME", default="scheduled", show_default=True, help="With --export."
        )
        @click.option(
            "--export-every", "export_every_s", type=Duration(least_s=60), default="1d", help="[default: 1d]"
        )
        @functools.wraps(command)
        def asked(
            *,
            poll_every_s: int | None,
            place: str | None,
            kind: str | None,
            cursor: str,
            export_every_s: int,
            **more: Any,
        ) -> Any:
            export = None
            if place is not None:
                kind, place = _kind_of(kind), _place_of(place)
                export = Export(place=place, kind=kind, cursor=cursor, every_s=export_every_s)
            elif kind is not None:
                raise click.UsageError("--as says how to export: --export says where to")
            return command(upkeep=Upkeep(poll_every_s=poll_every_s, export=export), **more)

        return cast(F, asked)

    return decorate


def _kind_of(kind: str | None) -> str:
    if kind is None:
        raise click.UsageError(f"--export needs --as {'|'.join(name[1:] for name in SUFFIXES)}")
    if kind == "parquet" and find_spec("pyarrow") is None:
        raise ConfigError("--as parquet: pip install 'gpubroker[parquet]' brings what writes it")
    return kind


def _place_of(place: str) -> str:
    """Whoever runs it later is in another folder."""
    if place.startswith("s3://"):
        return f"{place.rstrip('/')}/"
    if place == "-" or place.lower().endswith(tuple(SUFFIXES)):
        raise ConfigError(f"--export {place}: files are added, to a folder/ or s3://bucket/prefix/")
    return f"{Path(place).expanduser().absolute()}/"


def start(upkeep: Upkeep, settings: Settings, clock: Clock, say: Say) -> BackgroundScheduler | None:
    """Polls and exports from now on, one after the other in the scheduler's own thread, which ends with the
    process: what it was doing then is kept whole or not at all. None = there is nothing to do."""
    from apscheduler.executors.debug import DebugExecutor
    from apscheduler.schedulers.background import BackgroundScheduler

    export, every_s = upkeep.export, upkeep.poll_every_s
    due: list[tuple[int, str, Callable[[], None]]] = []
    if every_s is not None:
        due.append((every_s, "poll", functools.partial(_poll, settings, clock, every_s, say)))
    if export is not None:
        due.append((export.every_s, "export", functools.partial(_export, settings, clock, export, say)))
    if not due:
        return None
    # Its other executors have threads that the process waits for when it ends: minutes, where a vendor hangs.
    scheduler = BackgroundScheduler(
        timezone="UTC",
        executors={"default": DebugExecutor()},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
    )
    for seconds, name, work in due:
        safely = functools.partial(_safely, work, name, say)
        scheduler.add_job(safely, "interval", seconds=seconds, name=name, next_run_time=clock.now())
    scheduler.start()
    return scheduler


def _safely(work: Callable[[], None], name: str, say: Say) -> None:
    """One line, whatever it is: the supervisor goes on."""
    try:
        work()
    except BrokerError as error:
        say(f"{name}: {error}")
    except Exception as error:
        say(f"{name}: {type(error).__name__}: {error}")


def _poll(settings: Settings, clock: Clock, every_s: int, say: Say) -> None:
    """Whoever nobody else has asked lately: of several supervisors on one database one polls."""
    from gpubroker.cli import alerting
    from gpubroker.prices.market import open_context
    from gpubroker.prices.poll import FAILED, poll

    query = OfferQuery()
    with (
        open_context(settings, os.environ, clock) as (store, context),
        store.database.hold("scheduled polls") as is_ours,
    ):
        if not is_ours:
            return
        results = poll(
            store, context, due_for(store, settings, query, every_s, clock.now()), query, _DEADLINE_S
        )
        alerting.look(settings, store, clock, results, say)
    for result in results:
        if result.state in FAILED:
            say(f"poll: {result.provider}: {result.reason}")


def due_for(store: Store, settings: Settings, query: OfferQuery, every_s: int, now: datetime) -> list[str]:
    """Providers that nobody, cron or another supervisor, has asked for all of it within half an interval."""
    from gpubroker.prices.market import CLOCK_TOLERANCE
    from gpubroker.provider import names

    last = store.snapshot(()).coverage.freshness(query)
    lately = now - timedelta(seconds=every_s / 2)
    return [
        name
        for name in names()
        if name not in settings.disabled_providers
        and not ((at := last.get(name)) is not None and lately < at <= now + CLOCK_TOLERANCE)
    ]


def _export(settings: Settings, clock: Clock, export: Export, say: Say) -> None:
    from gpubroker.cli.export import added, sentence
    from gpubroker.prices.opening import polled

    with polled(settings.db_url, clock) as store:
        runs = added(store.database, export.cursor, export.place, f".{export.kind}")
    if runs:
        say(f"export: {sentence(runs, export.place)}")
