"""What each product cost on each day, and how often it was seen so: the short way to months of history.

    spans + polls ──roll, once a day is over──> daily (product, day -> each price with its observations)
                                              > stays (spot machines of a place, day -> ends, seconds)
    history of a GPU = daily for the days that are rolled + spans for those that are not

A day is a UTC day, by its number since 1970. A provider's day is rolled by the first of its polls that is
kept on a later one: then no poll of it can come any more. Nothing is lost by it: prices and counts are exact,
and so is every percentile. Plain SQL and no SQLAlchemy, so that a question takes a fraction of a second.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from gpubroker.prices.fastread import Run, where_in
from gpubroker.prices.polls import scope_of
from gpubroker.prices.rows import DAY_S, PRODUCT
from gpubroker.prices.seen import Kind, PollAt, Seen
from gpubroker.prices.survival import AtPrice, Watched, stays, watched

SPOT = "spot"
# A database from before it had days is caught up with by so many a poll.
_MOST_DAYS = 7
# The same SQL for each of many rows.
Many = Callable[[str, list[tuple[Any, ...]]], object]

_POLLS_SQL = """
SELECT observed_at, scope, unknown_offers FROM polls
WHERE provider = ? AND observed_at >= ? AND observed_at < ? ORDER BY observed_at
"""
_SPAN = "s.offer_id, o.product_id, o.machine_id, s.usd_per_hour, r.verified, s.first_at, s.until_at"
# CROSS JOIN keeps SQLite to this order. What has ended: by when it did; the index says whose it was, and of
# others the span is not read. What is open: by its product; + keeps SQLite off the index by first_at, which
# leads through all that an offer ever cost.
_ENDED_SQL = f"""
SELECT {_SPAN} FROM spans e CROSS JOIN offers o CROSS JOIN products p CROSS JOIN spans s CROSS JOIN rates r
WHERE o.id = e.offer_id AND p.id = o.product_id AND s.id = e.id AND r.id = s.rates_id
AND e.until_at > ? AND s.first_at < ?
"""  # noqa: S608  only names of columns go in
_OPEN_SQL = f"""
SELECT {_SPAN} FROM products p CROSS JOIN latest o CROSS JOIN spans s CROSS JOIN rates r
WHERE o.product_id = p.id AND s.offer_id = o.offer_id AND s.until_at IS NULL AND r.id = s.rates_id
AND +s.first_at < ?
"""  # noqa: S608
_ADD_SQL = "INSERT INTO daily (product_id, day, prices) VALUES (?, ?, ?)"
_ADD_STAYS_SQL = """
INSERT INTO stays (gpu, provider, market, region, day, ends, open_s) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_ROLLED_SQL = """
INSERT INTO rolled (provider, until_day) VALUES (?, ?)
ON CONFLICT (provider) DO UPDATE SET until_day = excluded.until_day
"""


class Product(NamedTuple):
    """What a product is, in the order of rows.PRODUCT, and its id."""

    provider: str
    sku: str
    gpu: str
    form_factor: str
    gpu_count: int
    vram_gib: int
    market: str
    preemptible: bool
    region: str
    zone: str
    cloud: str
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Whose prices. None = any."""

    gpus: Collection[str] | None = None
    providers: Collection[str] | None = None
    markets: Collection[str] | None = None
    wants: Callable[[Product], bool] | None = None  # what a column alone does not say

    def sql(self, table: str = "p") -> tuple[str, tuple[str, ...]]:
        """What to add to a WHERE over this table's columns, with its values."""
        wanted = {"gpu": self.gpus, "provider": self.providers, "market": self.markets}
        parts = [where_in(f"{table}.{column}", names) for column, names in wanted.items()]
        return "".join(text for text, _ in parts), tuple(name for _, names in parts for name in names)


class SpanRow(NamedTuple):
    """A span as it counts."""

    offer_id: int
    product_id: int
    machine_id: str  # "" = what is listed is a kind of machine, and no one of them
    usd_micros: int
    verified: bool | None
    first_at: int
    until_at: int | None  # exclusive; None = open

    def kind(self, product: Product) -> Kind:
        """What a scope looks at. SQLite says truth in numbers."""
        return Kind(product.gpu, product.market, None if self.verified is None else bool(self.verified))


class Counted(NamedTuple):
    """What a product cost in some time, and how often it was seen so."""

    product_id: int
    begin: int  # of that time, in seconds since 1970
    prices: Iterable[tuple[int, int]]  # (micro-dollars, observations), each price once


def roll(run: Run, many: Many, provider: str, now_s: int) -> None:
    """Write down the provider's days that are over, in the transaction of its poll of this second."""
    found = next(iter(run("SELECT until_day FROM rolled WHERE provider = ?", (provider,))), None)
    today = now_s // DAY_S
    if found is not None:
        first = int(found[0])
    else:
        sql = "SELECT min(observed_at) FROM polls WHERE provider = ?"
        (oldest,) = next(iter(run(sql, (provider,))))
        first = today if oldest is None else int(oldest) // DAY_S
    until = min(today, first + _MOST_DAYS)
    if found is not None and until == first:
        return
    where = Where(providers={provider})
    known = products(run, where)
    for day in range(first, until):
        begin, end = day * DAY_S, (day + 1) * DAY_S
        # What ended in the first second of the day ended on this day, too.
        spans = list(spans_within(run, where, known, begin - 1, end))
        counted = _counted(spans, seen_by(run, provider, begin, end))
        many(_ADD_SQL, [(product_id, day, packed(prices)) for product_id, prices in _by_product(counted)])
        found = sorted(spot_machines(spans, begin, end).items())
        many(_ADD_STAYS_SQL, [(gpu, provider, SPOT, region, day, *one) for (gpu, region), one in found])
    many(_ROLLED_SQL, [(provider, until)])


def spot_machines(
    spans: Iterable[tuple[SpanRow, Product]], begin: int, end: int
) -> dict[tuple[str, str], Watched]:
    """By GPU and region: how often single machines left the spot list in [begin, end), of how long on it.

    That a kind of machine is no longer listed takes no node away from anybody: it does not count.
    """
    held = defaultdict[tuple[str, str], list[AtPrice]](list)
    for span, product in spans:
        if product.market == SPOT and span.machine_id:
            one = AtPrice(span.offer_id, span.usd_micros, span.first_at, span.until_at)
            held[product.gpu, product.region].append(one)
    return {key: watched(stays(mine, begin, of_price=False), begin, end) for key, mine in held.items()}


def packed(prices: Iterable[tuple[int, int]]) -> bytes:
    """(price, observations) as daily.prices has them: all prices, then all counts, 64-bit little-endian.

    A row a price would take ten times as long to read: a GPU's month has 140,000 of 20,000 offers.
    """
    usd, counts = zip(*prices, strict=True)
    both = array("q", (*usd, *counts))
    if sys.byteorder == "big":
        both.byteswap()
    return both.tobytes()


def unpacked(prices: bytes) -> Iterator[tuple[int, int]]:
    """What packed was given."""
    both = array("q", prices)
    if sys.byteorder == "big":
        both.byteswap()
    half = len(both) // 2
    return zip(both[:half], both[half:], strict=True)


def rolled(run: Run) -> dict[str, int]:
    """By provider: the day, exclusive, up to which days are counted, in days since 1970."""
    sql = "SELECT provider, until_day FROM rolled ORDER BY provider"
    return {provider: int(day) for provider, day in run(sql, ())}


def thinned(run: Run) -> dict[str, int]:
    """By provider: the midnight before which nothing is kept but its days (compacting.py)."""
    sql = "SELECT provider, max(until_at) FROM compactions GROUP BY provider"
    return {provider: int(at) for provider, at in run(sql, ())}


def products(run: Run, where: Where) -> dict[int, Product]:
    """By id."""
    text, values = where.sql()
    columns = ", ".join(f"p.{name}" for name in PRODUCT)
    sql = f"SELECT {columns}, p.id FROM products p WHERE 1 = 1{text}"  # noqa: S608  only names go in
    found = (Product(*row) for row in run(sql, values))
    return {one.id: one for one in found if where.wants is None or where.wants(one)}


def spans_within(
    run: Run, where: Where, known: Mapping[int, Product], begin: int, end: int
) -> Iterator[tuple[SpanRow, Product]]:
    """Those of known products that were open in [begin, end), in seconds since 1970."""
    text, values = where.sql()
    for sql, moments in ((_ENDED_SQL, (begin, end)), (_OPEN_SQL, (end,))):
        for row in run(sql + text, (*moments, *values)):
            span = SpanRow._make(row)
            if (product := known.get(span.product_id)) is not None:
                yield span, product


def seen_by(run: Run, provider: str, begin: int, end: int) -> Seen:
    """The provider's kept polls of [begin, end)."""
    return Seen(
        PollAt(at, scope_of(scope), frozenset(json.loads(unknown)))
        for at, scope, unknown in run(_POLLS_SQL, (provider, begin, end))
    )


def counts(run: Run, where: Where, begin: int, end: int) -> Iterator[Counted]:
    """Observations in [begin, end), of which `begin` is a midnight: by day, from both sources.

    Of a day that is thinned all or nothing: one that `end` cuts is left out.
    """
    known, gone = products(run, where), thinned(run)
    counted_to = rolled(run)
    for provider in sorted({product.provider for product in known.values()}):
        mine = {key: one for key, one in known.items() if one.provider == provider}
        until_day = max(begin // DAY_S, min(counted_to.get(provider, 0), end // DAY_S))
        yield from _from_days(run, mine, begin // DAY_S, until_day)
        here = replace(where, providers={provider})
        for day in range(max(until_day, gone.get(provider, 0) // DAY_S), -(-end // DAY_S)):
            first, until = day * DAY_S, min(end, (day + 1) * DAY_S)
            spans = spans_within(run, here, mine, first, until)
            for product_id, prices in _by_product(_counted(spans, seen_by(run, provider, first, until))):
                yield Counted(product_id, first, prices)


def _from_days(run: Run, known: Collection[int], first: int, until: int) -> Iterator[Counted]:
    if first >= until or not known:
        return
    marks = ", ".join("?" * len(known))
    sql = (
        f"SELECT product_id, day, prices FROM daily WHERE product_id IN ({marks})"  # noqa: S608
        " AND day >= ? AND day < ?"
    )
    for product_id, day, prices in run(sql, (*known, first, until)):
        yield Counted(product_id, day * DAY_S, unpacked(prices))


def _by_product(counted: Counter[tuple[int, int]]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    for product_id, found in groupby(sorted(counted.items()), lambda item: item[0][0]):
        yield product_id, [(usd_micros, n) for (_, usd_micros), n in found]


def counted_within(
    run: Run, known: Mapping[int, Product], provider: str, begin: int, end: int
) -> Counter[tuple[int, int]]:
    """(product, price) -> observations in [begin, end) at a provider, by its spans and polls."""
    spans = spans_within(run, Where(providers={provider}), known, begin, end)
    return _counted(spans, seen_by(run, provider, begin, end))


def _counted(spans: Iterable[tuple[SpanRow, Product]], seen: Seen) -> Counter[tuple[int, int]]:
    """(product, price) -> observations by the provider's polls that were seen."""
    found = Counter[tuple[int, int]]()
    for span, product in spans:
        if n := seen.count(span.offer_id, span.kind(product), span.first_at, span.until_at):
            found[span.product_id, span.usd_micros] += n
    return found
