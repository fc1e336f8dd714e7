"""How long offers and their prices last, by the spans of our own polls. Pure.

    spans of an offer -> stays (there without a gap; at one price without a change) -> Curve (Kaplan-Meier)
    spans of a day -> how many machines left, in how many hours of being there -> the planner's hazard

A stay that was there when the looking began may have begun at any time before: it is in no curve, but it does
count in the rate. One that is still there is known to have lasted at least so long (censored).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median
from typing import NamedTuple

# Nine of ten such intervals hold what is looked for.
_Z = 1.6448536269514722


class AtPrice(NamedTuple):
    """An offer at one price."""

    offer_id: int
    usd_micros: int
    first_at: int  # seconds since 1970
    until_at: int | None  # exclusive; None = open


class Stay(NamedTuple):
    """An offer that was there, or was there at one price, without a gap."""

    first_at: int
    until_at: int | None  # None = it still is
    is_whole: bool  # its begin was seen


class Lasted(NamedTuple):
    """As far as it was watched."""

    seconds: int
    is_over: bool  # else it was still there when the looking ended


class Step(NamedTuple):
    """From this age on, until the next step."""

    age_s: int
    alive: float  # share of all that are older than this
    low: float  # the 90% interval by Greenwood's variance of log(-log)
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What share is still there at which age."""

    steps: Sequence[Step]
    number: int  # of stays
    ended: int
    followed_s: int  # the longest that one was watched; nothing is known beyond

    def alive_at(self, age_s: float) -> Step | None:
        """None where nothing was watched for so long."""
        if age_s > self.followed_s:
            return None
        at = bisect_right(self.steps, age_s, key=lambda step: step.age_s)
        return self.steps[at - 1] if at else Step(0, 1.0, 1.0, 1.0)

    def gone_after_s(self, share: float) -> tuple[int | None, int | None, int | None]:
        """The age at which this share is gone, and its 90% interval; None = later than was watched."""
        left = 1 - share + 1e-12
        return (
            next((step.age_s for step in self.steps if step.alive <= left), None),
            next((step.age_s for step in self.steps if step.low <= left), None),
            next((step.age_s for step in self.steps if step.high <= left), None),
        )


def kaplan_meier(lasted: Iterable[Lasted]) -> Curve:
    """The product-limit estimate (Kaplan and Meier 1958).

    Of what ends and what is cut off at the same age, the first ended before the second.
    """
    seen = sorted(lasted)
    steps = list[Step]()
    alive, variance, gone = 1.0, 0.0, 0
    for age_s, group in groupby(seen, key=lambda one: one.seconds):
        at_risk = len(seen) - gone
        same = list(group)
        ended = sum(one.is_over for one in same)
        gone += len(same)
        if ended:
            alive *= 1 - ended / at_risk
            variance += ended / (at_risk * (at_risk - ended)) if ended < at_risk else 0.0
            steps.append(Step(age_s, alive, *_interval(alive, variance)))
    over = sum(one.is_over for one in seen)
    return Curve(steps=steps, number=len(seen), ended=over, followed_s=seen[-1].seconds if seen else 0)


def _interval(alive: float, variance: float) -> tuple[float, float]:
    if not 0 < alive < 1:
        return 0.0, max(0.0, alive)
    spread = math.exp(_Z * math.sqrt(variance) / abs(math.log(alive)))
    return alive**spread, alive ** (1 / spread)


def stays(held: Iterable[AtPrice], looked_from: int, *, of_price: bool) -> Iterator[Stay]:
    """Of each offer, or of each of its prices. `looked_from`: when the first poll looked for such offers."""
    for mine in _by_offer(held):
        yield from _stays(mine, looked_from, of_price=of_price)


def _by_offer(held: Iterable[AtPrice]) -> Iterator[list[AtPrice]]:
    """Each offer's, in order of time."""
    found = sorted(held, key=lambda one: (one.offer_id, one.first_at))
    return (list(mine) for _, mine in groupby(found, key=lambda one: one.offer_id))


def _stays(mine: Sequence[AtPrice], looked_from: int, *, of_price: bool) -> Iterator[Stay]:
    begin = 0
    for at, one in enumerate(mine):
        after = mine[at + 1] if at + 1 < len(mine) else None
        goes_on = after is not None and after.first_at == one.until_at
        if not goes_on or (of_price and after is not None and after.usd_micros != one.usd_micros):
            first_at = mine[begin].first_at
            yield Stay(first_at, one.until_at, first_at > looked_from)
            begin = at + 1


def lasted(found: Iterable[Stay], begin: int, end: int) -> Iterator[Lasted]:
    """Those of [begin, end) whose begin was seen; watched until `end`."""
    for stay in found:
        if stay.is_whole and begin <= stay.first_at < end:
            is_over = stay.until_at is not None and stay.until_at < end
            until = stay.until_at if is_over and stay.until_at is not None else end
            yield Lasted(until - stay.first_at, is_over)


class Watched(NamedTuple):
    """So many ends in so many seconds of being there."""

    ends: int
    open_s: int

    @property
    def per_hour(self) -> float | None:
        """None = nothing was watched."""
        return self.ends / self.open_s * 3600 if self.open_s else None


def watched(found: Iterable[Stay], begin: int, end: int) -> Watched:
    """Within [begin, end), whenever a stay began."""
    ends = open_s = 0
    for stay in found:
        until = end if stay.until_at is None else min(stay.until_at, end)
        open_s += max(0, until - max(stay.first_at, begin))
        ends += stay.until_at is not None and begin <= stay.until_at < end
    return Watched(ends, open_s)


def typical_change(held: Iterable[AtPrice]) -> float | None:
    """The median share by which a price changed when it did, up or down; None = none did."""
    found = list[float]()
    for mine in _by_offer(held):
        for before, after in pairwise(mine):
            if before.until_at == after.first_at and 0 < before.usd_micros != after.usd_micros:
                found.append(abs(after.usd_micros / before.usd_micros - 1))
    return median(found) if found else None
