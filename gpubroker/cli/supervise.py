"""`gpubroker supervise`: the long-lived process that runs what was submitted. See gpubroker/run/fleet.py."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click

from gpubroker import config
from gpubroker.cli.asked import volume_of
from gpubroker.cli.options import Duration
from gpubroker.cli.plan import ask_of, known_of
from gpubroker.cli.renting import Market, caps_of, day_caps
from gpubroker.cli.upkeep import Upkeep, start, upkeep_options
from gpubroker.cli.watching import tell
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock, ThreadPool
from gpubroker.errors import ConfigError, SchemaTooNew, StoreError
from gpubroker.jobspec import JobSpec
from gpubroker.plan.fees import FeeTable
from gpubroker.prices.market import Shared, open_context
from gpubroker.provider import Compute, ProviderContext
from gpubroker.run import kept
from gpubroker.run.computes import computes
from gpubroker.run.contact import connector, keys_of
from gpubroker.run.events import Events
from gpubroker.run.fleet import Fleet
from gpubroker.run.launching import Job
from gpubroker.run.leases import Leases
from gpubroker.run.looks import job_folder
from gpubroker.run.metrics import Ticks, serve, snapshot
from gpubroker.run.notify import Notifier, channels_of, check, notifier_of
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Supervisor

# The usual soft limit of 1024 files is spent by as many jobs; no more than this is ever of use.
_MOST_FILES = 65536
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker supervise
  gpubroker supervise --metrics 127.0.0.1:9464
  gpubroker supervise --until-done
  gpubroker supervise --poll-every 5m --export history/ --as parquet
  gpubroker service install --now""",
)
@click.option(
    "--tick", "tick_s", type=Duration(least_s=1), default="5s", show_default=True, help="Between two rounds."
)
@click.option(
    "--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there, such as 127.0.0.1:9464."
)
@upkeep_options()
@click.option("--until-done", is_flag=True, help="Leave once every job is over.")
def supervise(*, tick_s: float, metrics: str | None, upkeep: Upkeep, until_done: bool) -> None:
    """Run what was submitted: rent, prove, watch, replace and bring back, for all jobs, as long as it lives.

    Ctrl-C and SIGTERM leave it, and the jobs go on where they run: start it again, here or on another machine
    with the same database and jobs_dir, and it finds them. Killed at any point it loses nothing. Several may
    run on one PostgreSQL: when one dies the others have its jobs within a minute. A node that no supervisor
    has looked at for the config's renew_within ends its job by itself. [notify] in the config says who is
    told of what happens. With --poll-every it keeps the price history, too, unless another one with the same
    database does; with --export it writes it out.
    """
    settings, clock = config.load(), SystemClock()
    allow_connections()
    with open_context(settings, os.environ, clock) as (store, context):
        leases = Leases(store.database, clock, host=socket.gethostname(), pid=os.getpid())
        records = Records(store.database, clock, leases.id)
        found, without = computes(context)
        if not found:
            raise ConfigError("no provider can rent: " + "; ".join(f"{n}: {r}" for n, r in without.items()))
        made, ticks = _Made(settings, context, records, found, clock, Shared(store, context)), Ticks()
        fleet = Fleet(
            leases=leases,
            records=records,
            renting=made.renting,
            computes=found,
            clock=clock,
            pool=ThreadPool(),
            make=made.supervisor,
            over=lambda job_id: kept.forget(job_folder(settings.jobs_dir, job_id)),
            listed=lambda provider: ticks.listed(provider, clock.now()),
            say=lambda text: _say(clock, text),
            caps=day_caps(settings),
            tick_s=tick_s,
        )
        with contextlib.ExitStack() as stack:
            check(channels_of(settings, os.environ))
            notifier = notifier_of(settings, os.environ, store.database, clock)
            if notifier is not None:
                notifier.meet()
            if metrics:
                events = Events(store.database, clock)
                found_now = functools.partial(snapshot, records, events)
                stack.enter_context(contextlib.closing(serve(metrics, lambda: found_now(clock.now(), ticks))))
            start(upkeep, settings, clock, lambda text: _say(clock, text))
            tell(f"{leases.id} supervises by {', '.join(found)}; the database is {store.database.where}")
            _until_told(fleet, notifier, ticks, clock, tick_s, until_done=until_done)


def allow_connections() -> None:
    """As many open files as the system lets us have: each job's node is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    with contextlib.suppress(OSError, ValueError):  # some systems have a limit of their own below it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _until_told(
    fleet: Fleet, notifier: Notifier | None, ticks: Ticks, clock: Clock, tick_s: float, *, until_done: bool
) -> None:
    """Tick until a signal comes, or every job is over. A database that is away for a while is waited for."""
    with _signals() as was_told, contextlib.closing(fleet):
        while not was_told():
            began_s = clock.monotonic_s()
            try:
                fleet.tick()
                ticks.took(clock.monotonic_s() - began_s)
                if notifier is not None:
                    notifier.tick()
            except SchemaTooNew:
                raise
            except StoreError as error:
                _say(clock, str(error))
            if until_done and fleet.is_idle:
                return
            while (left_s := tick_s - (clock.monotonic_s() - began_s)) > 0 and not was_told():
                clock.sleep(min(left_s, 0.5))


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether one has come. A second one does what it usually does."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)
        tell("leaving: what runs goes on")

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hear)
    yield lambda: bool(heard)


class _Made:
    """Builds each job's own supervisor from what is kept of the job."""

    def __init__(
        self,
        settings: Settings,
        context: ProviderContext,
        records: Records,
        computes: dict[str, Compute],
        clock: Clock,
        shared: Shared,
    ) -> None:
        self._settings, self._context, self._records, self._clock = settings, context, records, clock
        self._shared = shared
        self._computes, self._fees = computes, FeeTable.load(settings.fees)
        self.renting = Renting(records, computes, clock, context.limiter)

    def supervisor(self, job_id: str, spec: JobSpec) -> Supervisor:
        """Raises ConfigError where the job cannot be run here."""
        folder = job_folder(self._settings.jobs_dir, job_id)
        found, keys = kept.load(folder), keys_of(folder)
        ask = ask_of(spec, self._settings)
        volume = volume_of(spec, ask, self._context)
        if volume is not None:
            ask = replace(ask, providers=(volume.provider,))

        def say(text: str) -> None:
            _say(self._clock, f"{job_id}: {text}")

        market = Market(
            ask,
            known_of(spec),
            self._settings,
            self._clock,
            self._computes,
            volume=volume,
            deadline=spec.limits.deadline,
            attempts=lambda: self._records.attempts(job_id),
            tell=say,
            on_ask=lambda names: None,
            shared=self._shared,
        )
        return Supervisor(
            job=Job(
                id=job_id,
                spec=spec,
                folder=found.folder,
                out=found.out,
                secrets=found.secrets,
                store=found.store,
                private_key=keys.private,
                public_key=keys.public,
                caps=caps_of(self._settings, spec),
            ),
            records=self._records,
            renting=self.renting,
            computes=self._computes,
            candidates=market.candidates,
            connect=connector(keys),
            clock=self._clock,
            say=say,
            log=lambda attempt, data: _append(kept.log_file(folder, attempt.epoch), data),
            log_from=lambda attempt: _size(kept.log_file(folder, attempt.epoch)),
            renew_within_s=float(self._settings.renew_within_s),
            reach=self._settings.reach,
            fees=self._fees,
        )


def _append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("ab") as file:
        file.write(data)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _say(clock: Clock, text: str) -> None:
    tell(f"[{clock.now():%H:%M:%S}] {text}")
