"""Imported prices that hold until the next one (backfill.py), read back as what they were: times at a price.

The last one of a series is known to have held until the newest change in its region, which is when the vendor
was last asked, but for the minutes since that change. Plain SQL, as daily.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from gpubroker.prices.daily import Product, Where
from gpubroker.prices.fastread import Run
from gpubroker.prices.rows import HOUR_S

# `stat` of a series whose rows are changes and not observations.
STEP = "step"
_STEPS_SQL = """
SELECT s.provider, s.sku, s.gpu, s.form_factor, s.gpu_count, s.market, s.region, s.id,
       o.observed_at, o.usd_per_hour
FROM series s JOIN observations o ON o.series_id = s.id
WHERE s.stat = 'step' AND o.observed_at < ? AND o.usd_per_hour IS NOT NULL
"""
_NEWEST_SQL = """
SELECT s.provider, s.region, max(o.observed_at) FROM series s JOIN observations o ON o.series_id = s.id
WHERE s.stat = 'step' GROUP BY s.provider, s.region
"""


class Held(NamedTuple):
    """A price that was in force for a time."""

    product: Product
    usd_micros: int
    first_at: int
    until_at: int  # exclusive


def product_of(
    series_id: int, provider: str, sku: str, gpu: str, form: str, count: int, market: str, place: str
) -> Product:
    """As far as an imported series says what it is. A place may be region/zone."""
    region, _, zone = place.partition("/")
    return Product(provider, sku, gpu, form, count, 0, market, False, region, zone, "", series_id)


def held(run: Run, where: Where, begin: int, end: int) -> Iterator[Held]:
    """What was in force within [begin, end)."""
    newest: dict[tuple[str, str], int] = {}
    for provider, place, at in run(_NEWEST_SQL, ()):
        key = (provider, place.partition("/")[0])
        newest[key] = max(newest.get(key, 0), int(at))
    text, values = where.sql("s")
    rows = run(f"{_STEPS_SQL}{text} ORDER BY s.id, o.observed_at, o.usd_per_hour", (end, *values))
    last: tuple[Product, int, int] | None = None
    for product, at, usd in _wanted(rows, where):
        if last is not None:
            until = at if last[0].id == product.id else _until(last[0], newest)
            yield from _within(*last, until, begin, end)
        last = (product, at, usd)
    if last is not None:
        yield from _within(*last, _until(last[0], newest), begin, end)


def hours(first_at: int, until_at: int) -> range:
    """The whole hours within it: a price that holds counts as if it had been looked at so often."""
    return range(-(-first_at // HOUR_S) * HOUR_S, until_at, HOUR_S)


def _wanted(rows: Any, where: Where) -> Iterator[tuple[Product, int, int]]:
    known: dict[int, Product | None] = {}
    for *named, series_id, at, usd_micros in rows:
        if series_id not in known:
            one = product_of(series_id, *named)
            known[series_id] = one if where.wants is None or where.wants(one) else None
        if (product := known[series_id]) is not None:
            yield product, int(at), int(usd_micros)


def _until(product: Product, newest: dict[tuple[str, str], int]) -> int:
    return newest[product.provider, product.region] + 1


def _within(product: Product, at: int, usd: int, until: int, begin: int, end: int) -> Iterator[Held]:
    first, last = max(at, begin), min(until, end)
    if first < last:
        yield Held(product, usd, first, last)
