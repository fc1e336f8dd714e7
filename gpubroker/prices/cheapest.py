"""What the cheapest of many offers cost at each moment, and whether it is cheap now. Pure.

    spans -> steps (the least price from then on) -> Standing: how a price stands against its own past

A step lasts until the next one; None = there was no offer.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import heappop, heappush
from typing import NamedTuple

from gpubroker.prices.rows import DAY_S, HOUR_S

# Draws of days, to say how sure a share is.
_DRAWS = 400
_LOW, _HIGH = 0.05, 0.95


class Priced(NamedTuple):
    """An offer at a price for a time, in micro-dollars and seconds since 1970."""

    usd_micros: int
    first_at: int
    until_at: int  # exclusive


class Step(NamedTuple):
    """From then on, until the next one."""

    at: int
    usd_micros: int | None  # None = no offer


def steps(spans: Iterable[Priced], begin: int, end: int) -> list[Step]:
    """The least price over [begin, end); the first step is at `begin`."""
    due = sorted((max(one.first_at, begin), one.usd_micros, min(one.until_at, end)) for one in spans)
    due = [one for one in due if one[0] < one[2]]
    there: list[tuple[int, int]] = []  # (price, until), the cheapest first
    found, at, next_due = list[Step](), begin, 0
    while at < end:
        while next_due < len(due) and due[next_due][0] <= at:
            heappush(there, due[next_due][1:])
            next_due += 1
        while there and there[0][1] <= at:
            heappop(there)
        usd = there[0][0] if there else None
        if not found or found[-1].usd_micros != usd:
            found.append(Step(at, usd))
        ends = there[0][1] if there else end
        at = min(end, ends, due[next_due][0] if next_due < len(due) else end)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a price stands against those of some days before."""

    days: int  # that were asked for
    seen_days: int  # of them, with an offer at any time
    cheaper_share: float  # of the time with an offer: it cost less, and half of that in which it cost as much
    between: tuple[float, float]  # that share for nine of ten other such weeks, as days go
    median_usd_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """What hours and days of the week have cost: mean of the cheapest, over that of all time."""

    by_hour: tuple[float | None, ...]  # 24, UTC; None = there was no offer
    by_weekday: tuple[float | None, ...]  # 7, Monday first


def standing(found: Sequence[Step], usd_micros: int, days: int, end: int) -> Standing | None:
    """None = there was no offer in all of that time."""
    begin = end - days * DAY_S
    by_day: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # day -> (price, seconds)
    for at, until, usd in _pieces(found, begin, end, DAY_S):
        if usd is not None:
            by_day[at // DAY_S].append((usd, until - at))
    if not by_day:
        return None
    parts = [_cheaper(pieces, usd_micros) for pieces in by_day.values()]
    every = sorted(piece for pieces in by_day.values() for piece in pieces)
    return Standing(
        days=days,
        seen_days=len(by_day),
        cheaper_share=_share(parts),
        between=_spread(parts),
        median_usd_micros=_median(every),
    )


def rhythm(found: Sequence[Step], begin: int, end: int) -> Rhythm:
    """By the hour and by the day of the week, in UTC."""
    hours, weekdays = [[0, 0] for _ in range(24)], [[0, 0] for _ in range(7)]
    for at, until, usd in _pieces(found, begin, end, HOUR_S):
        if usd is not None:
            moment = datetime.fromtimestamp(at, UTC)
            for sums in (hours[moment.hour], weekdays[moment.weekday()]):
                sums[0] += usd * (until - at)
                sums[1] += until - at
    total = sum(sums[0] for sums in weekdays), sum(sums[1] for sums in weekdays)

    def over(sums: list[int]) -> float | None:
        return sums[0] / sums[1] / (total[0] / total[1]) if sums[1] else None

    return Rhythm(by_hour=tuple(map(over, hours)), by_weekday=tuple(map(over, weekdays)))


def _pieces(
    found: Sequence[Step], begin: int, end: int, every_s: int
) -> Iterable[tuple[int, int, int | None]]:
    """Steps within [begin, end), cut at each full day or hour: (from, until, price)."""
    for step, following in zip(found, [*found[1:], Step(end, None)], strict=True):
        at, until = max(step.at, begin), min(following.at, end)
        while at < until:
            cut = min(until, (at // every_s + 1) * every_s)
            yield at, cut, step.usd_micros
            at = cut


def _cheaper(pieces: Iterable[tuple[int, int]], usd_micros: int) -> tuple[float, int]:
    """(seconds below that price, and half of those at it; seconds)."""
    found = list(pieces)
    below = sum(s for usd, s in found if usd < usd_micros)
    return below + sum(s for usd, s in found if usd == usd_micros) / 2, sum(s for _, s in found)


def _share(parts: Sequence[tuple[float, int]]) -> float:
    return sum(cheaper for cheaper, _ in parts) / sum(seconds for _, seconds in parts)


def _spread(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """By days drawn with replacement: prices of one day are not independent, days nearly are."""
    chance = random.Random(0)
    shares = sorted(_share(chance.choices(parts, k=len(parts))) for _ in range(_DRAWS))
    return shares[int(_LOW * _DRAWS)], shares[int(_HIGH * _DRAWS)]


def _median(every: Sequence[tuple[int, int]]) -> int:
    """By time; `every` in order of price."""
    left = sum(seconds for _, seconds in every) / 2
    for usd, seconds in every:
        left -= seconds
        if left <= 0:
            return usd
    return every[-1][0]
