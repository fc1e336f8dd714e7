"""What nodes have cost, summed up by job, day, provider or GPU. Pure: from Records' attempts to figures.

A node counts with its vendor's own figure where there is one, else with the estimate, as the caps have it.
What a node cost on a day, or since a moment, is what was estimated by the end of that time less what was by
its beginning; what the vendor's figure adds or takes away belongs to the node's last day. So the groups add
up to the total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from typing import Literal

from gpubroker.money import SECONDS_PER_HOUR
from gpubroker.run.records import Attempt

By = Literal["job", "day", "provider", "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """By a group of nodes."""

    nodes: int
    node_h: Decimal  # billed time
    usd: Decimal  # settled where it is known, else estimated
    usd_estimated: Decimal
    usd_settled: Decimal  # of those nodes that the vendor has settled

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            nodes=self.nodes + other.nodes,
            node_h=self.node_h + other.node_h,
            usd=self.usd + other.usd,
            usd_estimated=self.usd_estimated + other.usd_estimated,
            usd_settled=self.usd_settled + other.usd_settled,
        )


NOTHING = Spent(nodes=0, node_h=Decimal(0), usd=Decimal(0), usd_estimated=Decimal(0), usd_settled=Decimal(0))

_NAMES: Mapping[By, Callable[[Attempt], str]] = {
    "job": lambda attempt: attempt.job_id,
    "provider": lambda attempt: attempt.provider,
    "gpu": lambda attempt: f"{attempt.gpu_count}x {attempt.gpu}",
}


def spent(
    attempts: Iterable[Attempt], by: By, now: datetime, since: datetime | None = None
) -> dict[str, Spent]:
    """Each group with what it cost from `since` (None = from the beginning) until now.

    Days in their order, all others the dearest first.
    """
    found: dict[str, Spent] = {}
    for attempt in attempts:
        is_before = since is not None and attempt.ended_at is not None and attempt.ended_at <= since
        if attempt.node_id is None or is_before:
            continue
        parts = (
            _days(attempt, now, since) if by == "day" else [(_NAMES[by](attempt), _of(attempt, now, since))]
        )
        for name, part in parts:
            found[name] = found.get(name, NOTHING) + part
    if by == "day":
        return dict(sorted(found.items()))
    return dict(sorted(found.items(), key=lambda one: (-one[1].usd, one[0])))


def total(groups: Mapping[str, Spent], attempts: Iterable[Attempt]) -> Spent:
    """Of all groups. A node that ran on two days is one node."""
    added = sum(groups.values(), NOTHING)
    nodes = sum(attempt.node_id is not None for attempt in attempts)
    return Spent(
        nodes=nodes,
        node_h=added.node_h,
        usd=added.usd,
        usd_estimated=added.usd_estimated,
        usd_settled=added.usd_settled,
    )


def _of(attempt: Attempt, now: datetime, since: datetime | None) -> Spent:
    return _between(attempt, since or attempt.intended_at, None, now)


def _days(attempt: Attempt, now: datetime, since: datetime | None) -> Iterator[tuple[str, Spent]]:
    """(day in UTC, what it cost then)."""
    start, end = max(attempt.intended_at, since or attempt.intended_at), attempt.ended_at or now
    while True:
        midnight = datetime.combine(start.date() + timedelta(days=1), time(), UTC)
        is_last = midnight >= end
        yield f"{start:%Y-%m-%d}", _between(attempt, start, None if is_last else midnight, now)
        if is_last:
            return
        start = midnight


def _between(attempt: Attempt, start: datetime, until: datetime | None, now: datetime) -> Spent:
    """Until None: to its end, with what its vendor says."""
    before = attempt.usd_by(start)
    estimated = (attempt.usd_so_far(now) if until is None else attempt.usd_by(until)) - before
    known = attempt.usd_known(now) - before if until is None else estimated
    settled = Decimal(0) if attempt.usd_settled is None else known
    end = until or attempt.ended_at or now
    ran_s = 0.0
    if attempt.running_at is not None:
        ran_s = max(0.0, (end - max(start, attempt.running_at)).total_seconds())
    return Spent(
        nodes=1,
        node_h=Decimal(str(ran_s)) / SECONDS_PER_HOUR,
        usd=known,
        usd_estimated=estimated,
        usd_settled=settled,
    )
