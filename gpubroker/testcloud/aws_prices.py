"""AWS's spot prices as a history of changes, the newest first, page by page.

aws_ec2.py -> history -> World's price series

A row is a change of price in one zone. Asked from a start on, AWS also gives the last change before it: the
price that was in force then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

from gpubroker.testcloud.world import Host, PriceSeries, World

OLDEST_S = 90 * 86400.0
PRODUCT = "Linux/UNIX"
_MOST_STEPS_BACK = 600  # how far the change in force at the start is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From then on spot costs this there."""

    at_s: float
    host: Host
    usd_per_hour: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a page ended: after so many rows of that moment."""

    at_s: float
    rows: int


def history(
    world: World, hosts: Iterable[Host], start_s: float, end_s: float, after: Place | None
) -> Iterator[Change]:
    """All changes from the end back to the start, and for each host the last one before it.

    It is lazy: 90 days of all hosts are millions of rows, and a page is a thousand.
    """
    # A page that goes on before the start begins at the start: what a host gave already is seen and dropped.
    from_s = end_s if after is None else min(end_s, max(after.at_s, start_s))
    streams = [_changes(world.series[host.vendor, host.id], host, start_s, from_s) for host in hosts]
    given = 0
    for change in heapq.merge(*streams, key=lambda one: (-one.at_s, one.host.id)):
        if after is not None and change.at_s > after.at_s:
            continue
        if after is not None and change.at_s == after.at_s and given < after.rows:
            given += 1
            continue
        yield change


def next_place(page: list[Change], after: Place | None) -> Place:
    """Where a page of at least one row ended."""
    last_s = page[-1].at_s
    rows = sum(change.at_s == last_s for change in page)
    return Place(at_s=last_s, rows=rows + (after.rows if after is not None and after.at_s == last_s else 0))


def _changes(series: PriceSeries, host: Host, start_s: float, end_s: float) -> Iterator[Change]:
    """Of one host, back from the end."""
    at_s = series.step_start_s(end_s)
    price = series.price_at(at_s)
    steps_back = 0
    while True:
        before_s = series.step_start_s(at_s - 0.5)
        before = series.price_at(before_s)
        steps_back += at_s <= start_s
        if before != price or steps_back > _MOST_STEPS_BACK:
            yield Change(at_s=at_s, host=host, usd_per_hour=price)
            if at_s <= start_s:
                return
        at_s, price = before_s, before
