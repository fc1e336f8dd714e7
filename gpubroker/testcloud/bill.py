"""What each vendor would charge for a rental, by its own rules, from its events alone.

Rental.events -> lines -> up.py and control.py (GET /bill), vast.py (its charges)

    vast    GPU by the second while running, at the rate then in force; the disk from creation to destroy in
            every state, dearer while nothing runs; bytes both ways at the host's prices; volumes by the
            second
    runpod  GPU and container disk by the second while running; the volume disk in every state, double when
            stopped; network volumes by the hour begun
    lambda  by the minute begun, from active to terminate; file systems by the hour begun, for what they hold
    aws     by the second from running, 60 s at least for each start; a spot instance that AWS takes back in
            its first hour is free; the volume by the second in every state; a public IPv4 address while
            running; what leaves AWS by the account's monthly tiers; S3 by the hour and the request
    modal   GPU, CPU and RAM by the second from start to end, times the region's factor; what leaves Modal by
            the workspace's monthly tiers

It is written after the vendors' rules and not after the planner: nothing of `gpubroker.plan` is imported, so
that agreement between the two means something. Amounts keep twelve digits; rounding to cents is
the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from gpubroker.testcloud.world import Event, Rental, State, Vendor

_HOUR_S = Decimal(3600)
_MONTH_H = Decimal(30 * 24)
_GB = Decimal(10**9)
_DIGITS = 12  # behind the point; far below what anybody is charged
# The vendor says "typically higher" and lets each host set it, without a field: a third more is assumed.
VAST_STOPPED_DISK = Decimal(4) / 3
# USD per GB and month.
_RUNPOD_CONTAINER, _RUNPOD_VOLUME, _RUNPOD_VOLUME_STOPPED = Decimal("0.10"), Decimal("0.10"), Decimal("0.20")
_RUNPOD_FIRST_GB, _RUNPOD_FIRST, _RUNPOD_BEYOND = 1000, Decimal("0.07"), Decimal("0.05")
_LAMBDA_FILES = Decimal("0.20")
_S3_STANDARD, _S3_PUT, _S3_GET = Decimal("0.023"), Decimal("0.000005"), Decimal("0.0000004")  # one request
_EBS_GP3 = Decimal("0.08")
# USD per second: a physical core, a GiB, of a sandbox.
MODAL_CORE, MODAL_GIB = Decimal("0.00003942"), Decimal("0.00000667")
_PUBLIC_IPV4 = Decimal("0.005")  # USD per hour
# What leaves the vendor in the account's calendar month, UTC: bytes of a unit, (from so many, USD for each).
_EGRESS: Mapping[Vendor, tuple[int, tuple[tuple[int, Decimal], ...]]] = {
    "aws": (
        10**9,
        (
            (100, Decimal("0.09")),
            (10_240, Decimal("0.085")),
            (51_200, Decimal("0.07")),
            (153_600, Decimal("0.05")),
        ),
    ),
    "modal": (2**30, ((1024, Decimal("0.04")),)),
}
_AWS_LEAST_S = 60
_AWS_FREE_S = 3600
RECLAIMED = "Server.SpotInstanceTermination"  # the reason of an end that is AWS's own doing


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One item of a bill."""

    item: str  # gpu, cpu, ram, disk, volume, public_ip, bytes_in, bytes_out
    usd: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time in which nothing changed."""

    start_s: Decimal
    end_s: Decimal
    state: State
    usd_per_hour: Decimal
    closed: bool  # False = it goes on
    ended_by: str = ""  # the reason of the event that closed it

    @property
    def seconds(self) -> Decimal:
        """How long."""
        return self.end_s - self.start_s

    @property
    def hours(self) -> Decimal:
        """How long."""
        return self.seconds / _HOUR_S


def lines(rental: Rental, now_s: float) -> list[Line]:
    """The bill of one rental until now, one line an item, without empty ones."""
    totals: dict[str, Decimal] = {}
    for line in _RULES[rental.vendor](rental, list(spans(rental.events, now_s))):
        totals[line.item] = totals.get(line.item, Decimal(0)) + line.usd
    return [Line(item=item, usd=usd) for item, sum_ in totals.items() if (usd := round(sum_, _DIGITS))]


def total(rental: Rental, now_s: float) -> Decimal:
    """USD until now."""
    return sum((line.usd for line in lines(rental, now_s)), Decimal(0))


def egress(rentals: Iterable[Rental]) -> dict[str, Decimal]:
    """USD by rental of what left vendors whose price goes by all that the account has sent in the month.

    Each transfer costs what it adds at its own moment: who sends first has the free part.
    """
    sent = [
        (event, rental)
        for rental in rentals
        if rental.vendor in _EGRESS
        for event in rental.events
        if event.kind == "transfer" and event.bytes_out
    ]
    so_far: dict[tuple[Vendor, str], int] = {}
    usd: dict[str, Decimal] = {}
    for event, rental in sorted(sent, key=lambda one: one[0].at_s):
        month = (rental.vendor, f"{datetime.fromtimestamp(event.at_s, UTC):%Y-%m}")
        before = so_far.get(month, 0)
        so_far[month] = before + event.bytes_out
        added = _tiered(rental.vendor, so_far[month]) - _tiered(rental.vendor, before)
        usd[rental.id] = usd.get(rental.id, Decimal(0)) + added
    return {rental_id: round(sum_, _DIGITS) for rental_id, sum_ in usd.items()}


def _tiered(vendor: Vendor, sent_bytes: int) -> Decimal:
    """What a month with so much costs."""
    unit, tiers = _EGRESS[vendor]
    units, usd = Decimal(sent_bytes) / unit, Decimal(0)
    for (start, price), end in zip(tiers, (*(start for start, _ in tiers[1:]), None), strict=True):
        usd += price * max(Decimal(0), (units if end is None else min(units, Decimal(end))) - start)
    return usd


def network_volume(sizes: Sequence[tuple[float, int]], now_s: float) -> Decimal:
    """A RunPod network volume, by (since when, GB), 0 = deleted: by the hour begun, cheaper beyond 1 TB.

    An hour costs what the volume had when the hour began.
    """
    if not sizes:
        return Decimal(0)
    began_s, usd = sizes[0][0], Decimal(0)
    gone_s = next((at_s for at_s, size_gb in sizes if size_gb == 0), now_s)
    for hour in range(math.ceil((min(gone_s, now_s) - began_s) / 3600)):
        size_gb = next(gb for at_s, gb in reversed(sizes) if at_s <= began_s + 3600 * hour)
        first_gb = min(size_gb, _RUNPOD_FIRST_GB)
        usd += (first_gb * _RUNPOD_FIRST + (size_gb - first_gb) * _RUNPOD_BEYOND) / _MONTH_H
    return round(usd, _DIGITS)


def vast_volume(size_gb: int, usd_per_gb_month: Decimal, seconds: float) -> Decimal:
    """A vast volume: by the second, at its machine's price for disks, used or not."""
    return round(size_gb * Decimal(usd_per_gb_month) / _MONTH_H * Decimal(str(seconds)) / _HOUR_S, _DIGITS)


def file_system(used: Sequence[tuple[float, int]], until_s: float) -> Decimal:
    """A Lambda file system, by (since when, bytes), at most one an hour: by the hour begun."""
    return round(_held_gb_hours(used, until_s) * _LAMBDA_FILES / _MONTH_H, _DIGITS)


def bucket(used: Sequence[tuple[float, int]], until_s: float, puts: int, gets: int) -> Decimal:
    """An S3 bucket of the Standard class, by (since when, bytes), at most one an hour, and its requests.

    puts: PUT, COPY, POST and LIST; gets: all others but DELETE, which is free.
    """
    stored = _held_gb_hours(used, until_s) * _S3_STANDARD / _MONTH_H
    return round(stored + puts * _S3_PUT + gets * _S3_GET, _DIGITS)


def _held_gb_hours(used: Sequence[tuple[float, int]], until_s: float) -> Decimal:
    """Each hour begun counts with what was there when it was first looked at."""
    began_s, total = used[0][0], 0
    for hour in range(math.ceil((until_s - began_s) / 3600)):
        total += next(size for at_s, size in reversed(used) if (at_s - began_s) // 3600 <= hour)
    return Decimal(total) / _GB


def spans(events: Iterable[Event], now_s: float) -> Iterator[Span]:
    """The history of a rental as stretches of one state and one rate; a transfer changes neither."""
    state: State = "pending"
    rate = Decimal(0)
    since: Decimal | None = None
    for event in events:
        if event.kind == "transfer":
            continue
        at = Decimal(str(event.at_s))
        if since is not None and at > since:
            yield Span(
                start_s=since, end_s=at, state=state, usd_per_hour=rate, closed=True, ended_by=event.reason
            )
        since = at
        rate = rate if event.usd_per_hour is None else event.usd_per_hour
        if event.kind in ("running", "stopped", "ended"):
            state = event.kind
    now = Decimal(str(now_s))
    if since is not None and state != "ended" and now > since:
        yield Span(start_s=since, end_s=now, state=state, usd_per_hour=rate, closed=False)


def _vast(rental: Rental, history: list[Span]) -> Iterator[Line]:
    facts = rental.host.facts
    disk = Decimal(rental.disk_gb) * Decimal(facts["storage_cost"]) / _MONTH_H
    for span in history:
        factor = VAST_STOPPED_DISK if span.state == "stopped" else 1
        yield Line(item="disk", usd=disk * span.hours * factor)
        if span.state == "running":
            yield Line(item="gpu", usd=span.usd_per_hour * span.hours)
    received, sent = _bytes(rental.events)
    yield Line(item="bytes_in", usd=received / _GB * Decimal(facts["inet_down_cost"]))
    yield Line(item="bytes_out", usd=sent / _GB * Decimal(facts["inet_up_cost"]))


def _runpod(rental: Rental, history: list[Span]) -> Iterator[Line]:
    mounts = rental.wish.get("mounts") or {}
    volume_gb = Decimal((mounts.get("persistent") or {}).get("size", 0))
    for span in history:
        if span.state == "running":
            yield Line(item="gpu", usd=span.usd_per_hour * span.hours)
            yield Line(item="disk", usd=rental.disk_gb * _RUNPOD_CONTAINER / _MONTH_H * span.hours)
        monthly = _RUNPOD_VOLUME_STOPPED if span.state == "stopped" else _RUNPOD_VOLUME
        yield Line(item="volume", usd=volume_gb * monthly / _MONTH_H * span.hours)


def _lambda(rental: Rental, history: list[Span]) -> Iterator[Line]:
    active = sum((span.seconds for span in history if span.state == "running"), Decimal(0))
    minutes = math.ceil(active / 60)
    yield Line(item="gpu", usd=rental.usd_per_hour * minutes / 60)


def _aws(rental: Rental, history: list[Span]) -> Iterator[Line]:
    for span in history:
        yield Line(item="volume", usd=rental.disk_gb * _EBS_GP3 / _MONTH_H * span.hours)
    for run in _runs(history):
        ran_s = sum((span.seconds for span in run), Decimal(0))
        taken_back = rental.market == "spot" and run[-1].ended_by == RECLAIMED
        if taken_back and run[0] is _first_run(history) and ran_s < _AWS_FREE_S:
            continue
        for span in run:
            yield Line(item="gpu", usd=span.usd_per_hour * span.hours)
            yield Line(item="public_ip", usd=_PUBLIC_IPV4 * span.hours)
        missing_s = max(Decimal(0), _AWS_LEAST_S - ran_s)
        if run[-1].closed:
            yield Line(item="gpu", usd=run[-1].usd_per_hour * missing_s / _HOUR_S)


def _modal(rental: Rental, history: list[Span]) -> Iterator[Line]:
    factor = Decimal(str(rental.wish.get("region_multiplier", 1)))
    cores = Decimal(str(rental.wish.get("cpu_cores", "0.125")))
    gib = Decimal(str(rental.wish.get("memory_mib", 128))) / 1024
    for span in history:
        if span.state == "running":
            yield Line(item="gpu", usd=span.usd_per_hour * span.hours * factor)
            yield Line(item="cpu", usd=cores * MODAL_CORE * span.seconds * factor)
            yield Line(item="ram", usd=gib * MODAL_GIB * span.seconds * factor)


def _runs(history: list[Span]) -> Iterator[list[Span]]:
    """Neighbouring running spans as one: a change of rate is no new start."""
    run: list[Span] = []
    for span in history:
        if span.state == "running":
            run.append(span)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _first_run(history: list[Span]) -> Span | None:
    return next((span for span in history if span.state == "running"), None)


def _bytes(events: Iterable[Event]) -> tuple[Decimal, Decimal]:
    """(received, sent) by the node, in any state."""
    moved = [event for event in events if event.kind == "transfer"]
    return Decimal(sum(e.bytes_in for e in moved)), Decimal(sum(e.bytes_out for e in moved))


_RULES: Mapping[Vendor, Callable[[Rental, list[Span]], Iterator[Line]]] = {
    "vast": _vast,
    "runpod": _runpod,
    "lambda": _lambda,
    "aws": _aws,
    "modal": _modal,
}
