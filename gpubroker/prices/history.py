"""What a GPU cost over time, by our own polls or by imported histories. Reads; decides nothing.

    daily.py (days) or spans (anything finer, and what goes by time) -> Bucket -> Point, one a time and group

Prices are for one GPU and one hour: an offer's price by its number of GPUs, to the nearest micro-dollar. Each
offer counts once a poll; an imported row counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

from gpubroker.prices import daily
from gpubroker.prices.daily import Product, Where
from gpubroker.prices.fastread import Run
from gpubroker.prices.rows import DAY_S, moment
from gpubroker.prices.seen import Kind
from gpubroker.prices.stats import Prices
from gpubroker.prices.steps import held, hours, product_of

Stat = Literal["min", "p10", "p50", "p90", "max", "mean", "twap", "available", "n"]
STATS: tuple[Stat, ...] = get_args(Stat)
Dimension = Literal["provider", "market", "region", "gpu_count", "gpu", "form_factor"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
# What needs the spans themselves, and not only how often they were seen.
_BY_TIME: frozenset[Stat] = frozenset({"twap", "available"})
_IMPORTED_SQL = """
SELECT s.provider, s.sku, s.gpu, s.form_factor, s.gpu_count, s.market, s.region, s.id,
       o.observed_at, o.usd_per_hour, o.available
FROM series s JOIN observations o ON o.series_id = s.id
WHERE o.observed_at >= ? AND o.observed_at < ? AND s.stat <> 'step'
"""


class Group(NamedTuple):
    """Whose line it is; "" and 0 = all of them."""

    provider: str = ""
    market: str = ""
    region: str = ""
    gpu_count: int = 0
    gpu: str = ""
    form_factor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is asked. `bucket_s` begins at midnight UTC; None = all of [begin, end) in one."""

    where: Where
    begin: int  # seconds since 1970; a midnight where only days are needed
    end: int
    bucket_s: int | None
    by: Collection[Dimension] = ("provider", "market")
    stats: Collection[Stat] = ("min", "p50", "max")

    @property
    def goes_by_days(self) -> bool:
        """Whether the days that are rolled say all of it."""
        is_whole = self.bucket_s is None or self.bucket_s % DAY_S == 0
        return is_whole and self.begin % DAY_S == 0 and not _BY_TIME & set(self.stats)

    def bucket(self, at: int) -> int:
        """When the bucket of this second begins."""
        return self.begin if self.bucket_s is None else at - (at % self.bucket_s)

    def group(self, product: Product) -> Group:
        """As far as it is asked for."""
        return Group(**{name: getattr(product, name) for name in self.by})


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One group in one bucket. A figure that nothing was seen for is not there."""

    group: Group
    begin: datetime
    figures: dict[Stat, int | Fraction]  # micro-dollars for one GPU-hour; available: a share; n: observations


@dataclass(slots=True)
class _Bucket:
    counted: list[tuple[int, int]] = field(default_factory=list)
    usd_s: int = 0  # micro-dollars times seconds
    open_s: int = 0
    looks: set[int] = field(default_factory=set)  # polls that looked there
    hits: set[int] = field(default_factory=set)  # and found one


_Buckets = defaultdict[tuple[int, Group], _Bucket]


def own(run: Run, query: Query) -> list[Point]:
    """By our own polls, in order of time and group."""
    known = daily.products(run, query.where)
    buckets: _Buckets = defaultdict(_Bucket)
    if query.goes_by_days:
        groups = {product_id: query.group(product) for product_id, product in known.items()}
        for one in daily.counts(run, query.where, query.begin, query.end):
            bucket = buckets[query.bucket(one.begin), groups[one.product_id]]
            count = known[one.product_id].gpu_count
            bucket.counted += [(for_one(usd, count), n) for usd, n in one.prices] if count > 1 else one.prices
    else:
        late = since(run, query)
        for provider in sorted({product.provider for product in known.values()}):
            begin = late.get(provider, query.begin)
            if begin < query.end:
                _from_spans(run, query, provider, known, begin, buckets)
    return list(_points(query, buckets))


def imported(run: Run, query: Query) -> list[Point]:
    """By other people's histories (`gpubroker import-history`), in order of time and group.

    A row counts once; a price of a vendor's own record (backfill.py), once for each whole hour that it held.
    """
    text, values = query.where.sql("s")
    buckets: _Buckets = defaultdict(_Bucket)
    rows = run(_IMPORTED_SQL + text, (query.begin, query.end, *values))
    series: dict[int, Product | None] = {}
    for *named, series_id, at, usd_micros, available in rows:
        if series_id not in series:
            one = product_of(series_id, *named)
            series[series_id] = one if query.where.wants is None or query.where.wants(one) else None
        if (product := series[series_id]) is None:
            continue
        bucket = buckets[query.bucket(at), query.group(product)]
        if usd_micros is not None:
            bucket.counted.append((for_one(usd_micros, product.gpu_count), 1))
        if available is not None:
            bucket.looks.add(at)
            if available:
                bucket.hits.add(at)
    for step in held(run, query.where, query.begin, query.end):
        group, usd = query.group(step.product), for_one(step.usd_micros, step.product.gpu_count)
        for begin, end in _parts(query, step.first_at, step.until_at):
            bucket, looks = buckets[query.bucket(begin), group], hours(begin, end)
            bucket.counted.append((usd, len(looks)))
            bucket.usd_s += usd * (end - begin)
            bucket.open_s += end - begin
            bucket.looks.update(looks)
            bucket.hits.update(looks)
    return list(_points(query, buckets))


def since(run: Run, query: Query) -> dict[str, int]:
    """By provider: from when on the question is answered, where that is later than it asks.

    What is thinned (compacting.py) has days alone: a bucket that needs more and begins there is left out, and
    where lines are of several providers it is left out for all of them.
    """
    found = {product.provider for product in daily.products(run, query.where).values()}
    gone = {provider: at for provider, at in daily.thinned(run).items() if provider in found}
    if query.goes_by_days:
        return {provider: at for provider, at in gone.items() if query.end < at and query.end % DAY_S}
    late = {provider: at for provider, at in gone.items() if at > query.begin}
    if late and "provider" not in query.by:
        late = dict.fromkeys(found, max(late.values()))
    step = query.bucket_s or 1
    return {provider: -(-at // step) * step for provider, at in late.items()}


def _from_spans(
    run: Run, query: Query, provider: str, known: dict[int, Product], begin: int, buckets: _Buckets
) -> None:
    seen = daily.seen_by(run, provider, begin, query.end)
    where = replace(query.where, providers={provider})
    for span, product in daily.spans_within(run, where, known, begin, query.end):
        kind = span.kind(product)
        group, usd = query.group(product), for_one(span.usd_micros, product.gpu_count)
        last = query.end if span.until_at is None else min(span.until_at, query.end)
        for first, end in _parts(query, max(span.first_at, begin), last):
            bucket = buckets[query.bucket(first), group]
            bucket.counted.append((usd, seen.count(span.offer_id, kind, first, end)))
            bucket.usd_s += usd * (end - first)
            bucket.open_s += end - first
            bucket.hits.update(seen.at(span.offer_id, kind, first, end))
    if "available" in query.stats:
        for product in known.values():
            if product.provider == provider:
                group = query.group(product)
                for at in seen.moments(Kind(product.gpu, product.market, None)):
                    buckets[query.bucket(at), group].looks.add(at)


def _parts(query: Query, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """A time, cut where buckets begin."""
    while begin < end:
        until = end if query.bucket_s is None else min(end, query.bucket(begin) + query.bucket_s)
        yield begin, until
        begin = until


def for_one(usd_micros: int, gpu_count: int) -> int:
    """Of the price of a node: for one of its GPUs, a half to the even micro-dollar."""
    whole, rest = divmod(usd_micros, gpu_count)
    return whole + (2 * rest > gpu_count or (2 * rest == gpu_count and whole % 2))


def _points(query: Query, buckets: _Buckets) -> Iterator[Point]:
    for (begin, group), bucket in sorted(buckets.items()):
        if not bucket.looks and not any(n for _, n in bucket.counted):
            continue  # nobody looked
        yield Point(group=group, begin=moment(begin), figures=dict(_figures(query.stats, bucket)))


def _figures(stats: Iterable[Stat], bucket: _Bucket) -> Iterator[tuple[Stat, int | Fraction]]:
    prices = Prices(bucket.counted)
    for stat in stats:
        if stat == "n":
            yield stat, prices.n
        elif stat == "available":
            if bucket.looks:
                yield stat, Fraction(len(bucket.hits & bucket.looks), len(bucket.looks))
        elif stat == "twap":
            if bucket.open_s:
                yield stat, round(Fraction(bucket.usd_s, bucket.open_s))
        elif prices.n:
            yield stat, _price(stat, prices)


def _price(stat: Stat, prices: Prices) -> int:
    if stat == "min":
        return prices.least
    if stat == "max":
        return prices.most
    return prices.mean if stat == "mean" else prices.quantile(Fraction(int(stat[1:]), 100))
