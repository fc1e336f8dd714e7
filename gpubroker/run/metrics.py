"""What a supervisor's database holds, for Prometheus: off unless an address is given.

    records, events, ticks -> snapshot -> families -> prometheus_client's own server

Counters are counted from the events, so that a restart does not set them back; of ticks alone the memory of
this process is all there is. No metric is by job but for jobs that are not over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, get_args

from gpubroker.errors import BrokerError, ConfigError
from gpubroker.run.events import Events, Kind
from gpubroker.run.records import Attempt, JobState, Records

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import Metric

Labels = str | tuple[str, ...]
Number = Decimal | float
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s/@]+)):(\d{1,5})")
# metric -> the kinds of events that it counts, and what they are
_COUNTED: Mapping[str, tuple[tuple[Kind, ...], str]] = {
    "preemptions": (("preempted",), "Nodes that their vendor took back"),
    "lost_nodes": (("lost",), "Nodes that are gone, and nobody says why"),
    "starts": (("started", "resumed"), "Starts of a job's command on a node"),
    "rejected_machines": (("rejected",), "Machines that failed their preflight or were never reached"),
    "leaked_nodes": (("leaked",), "Nodes that nobody wanted, found and ended"),
    "problems": (("problem",), "What went wrong and did not keep a job from going on"),
}


class Ticks:
    """How the loop of this process has fared. It writes, the thread of a scrape reads."""

    def __init__(self) -> None:
        self.count, self.total_s, self.last_s = 0, 0.0, 0.0
        self.listed_at: dict[str, datetime] = {}  # provider -> its last complete listing

    def took(self, seconds: float) -> None:
        """One more is over."""
        self.count, self.total_s, self.last_s = self.count + 1, self.total_s + seconds, seconds

    def listed(self, provider: str, now: datetime) -> None:
        """A vendor has told all of what we have there."""
        self.listed_at[provider] = now


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that is told, as of one moment."""

    jobs: Mapping[JobState, int]
    nodes: Mapping[tuple[str, str], int]  # (provider, market) -> open ones
    usd_per_hour: Decimal  # of what is open
    usd_today: Decimal
    usd_of_jobs: Mapping[str, Decimal]  # estimated so far; of jobs that are not over or may bill
    checkpoint_age_s: Mapping[str, float]  # of jobs that run; none = it has not saved itself
    events: Mapping[Kind, int]
    ticks: int
    ticks_s: float  # all of them together
    last_tick_s: float
    listing_age_s: Mapping[str, float]  # by provider


def snapshot(records: Records, events: Events, now: datetime, ticks: Ticks) -> Snapshot:
    """By a handful of queries, however many jobs there are. Raises StoreError."""
    opened = records.open_attempts()
    return Snapshot(
        jobs=records.count_by_state(),
        nodes=Counter((attempt.provider, attempt.market) for attempt in opened),
        usd_per_hour=sum((_usd_per_hour(attempt) for attempt in opened), Decimal(0)),
        usd_today=records.usd_today(now),
        usd_of_jobs={
            job_id: sum((attempt.usd_so_far(now) for attempt in attempts), Decimal(0))
            for job_id, attempts in records.attempts_of_unfinished().items()
        },
        checkpoint_age_s=_ages_s(records.newest_checkpoints(), now),
        events=events.counts(),
        ticks=ticks.count,
        ticks_s=ticks.total_s,
        last_tick_s=ticks.last_s,
        listing_age_s=_ages_s(dict(ticks.listed_at), now),
    )


def _usd_per_hour(attempt: Attempt) -> Decimal:
    """What it adds to the bill each hour: its disk alone while it does not run."""
    runs = attempt.running_at is not None and attempt.stopped_at is None
    return attempt.usd_per_hour if runs else attempt.held_usd_per_hour


def _ages_s(moments: Mapping[str, datetime], now: datetime) -> dict[str, float]:
    return {name: max(0.0, (now - moment).total_seconds()) for name, moment in moments.items()}


def families(found: Snapshot) -> Iterator[Metric]:
    """As Prometheus takes them. Pure."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

    def gauge(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Labels, Number]]) -> Metric:
        made = GaugeMetricFamily(f"gpubroker_{name}", text, labels=labels)
        for key, value in values:
            made.add_metric([key] if isinstance(key, str) else key, float(value))
        return made

    states = [(state, found.jobs.get(state, 0)) for state in get_args(JobState)]
    yield gauge("jobs", "Jobs by state", ["state"], states)
    yield gauge("open_nodes", "Nodes that may bill", ["provider", "market"], found.nodes.items())
    yield gauge("usd_per_hour", "What the open nodes cost an hour now", [], [((), found.usd_per_hour)])
    yield gauge("usd_today", "Spent since midnight UTC, as far as known", [], [((), found.usd_today)])
    yield gauge("job_usd", "Estimated so far, of jobs that are not over", ["job"], found.usd_of_jobs.items())
    text = "Since the newest checkpoint of a job that runs"
    yield gauge("checkpoint_age_seconds", text, ["job"], found.checkpoint_age_s.items())
    text = "Since a vendor last listed what we have there, to this process"
    yield gauge("listing_age_seconds", text, ["provider"], found.listing_age_s.items())
    for name, (kinds, text) in _COUNTED.items():
        total = sum(found.events.get(kind, 0) for kind in kinds)
        yield CounterMetricFamily(f"gpubroker_{name}", text, value=total)
    yield gauge("last_tick_seconds", "How long this process's last tick took", [], [((), found.last_tick_s)])
    text = "Ticks of this process, and how long they took"
    yield SummaryMetricFamily(
        "gpubroker_tick_seconds", text, count_value=found.ticks, sum_value=found.ticks_s
    )


class _Collector:
    """Takes a snapshot at each scrape."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def describe(self) -> Iterable[Metric]:
        """Nothing is read before the first scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Of a database that cannot be read, that alone."""
        from prometheus_client.core import GaugeMetricFamily

        text = "Whether the database could be read"
        try:
            found = self._take()
        except BrokerError:
            yield GaugeMetricFamily("gpubroker_up", text, value=0)
            return
        yield GaugeMetricFamily("gpubroker_up", text, value=1)
        yield from families(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server that answers from a thread of its own until it is closed."""

    address: str  # host:port
    server: WSGIServer

    def close(self) -> None:
        """It answers no more, and the port is free."""
        self.server.shutdown()
        self.server.server_close()


def serve(address: str, take: Callable[[], Snapshot]) -> Serving:
    """Answer scrapes there and nowhere else. `take` is called in the server's thread, once a scrape.

    Raises ConfigError for an address that is none, or is taken.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    host, port = _parted(address)
    registry = CollectorRegistry()
    registry.register(_Collector(take))
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"metrics: {address}: {error.strerror or error}") from error
    shown = f"[{host}]" if ":" in host else host
    return Serving(address=f"{shown}:{server.server_port}", server=server)


def _parted(address: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found[3]) > 65535:
        raise ConfigError(f"metrics: {address[:60]!r} is not host:port, such as 127.0.0.1:9464")
    return found[1] or found[2], int(found[3])
