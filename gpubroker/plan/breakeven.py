"""What would change the answer: the egress, hours and preemption rate at which another row wins. Pure.

Each is found by pricing the rows again: bills have steps (billing units) and bends (monthly tiers), so there
is no formula. The nearest value at which the first row is beaten is searched by stretches and then halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from gpubroker.plan.course import Risk
from gpubroker.plan.rank import Pricing, Quote, quote_of
from gpubroker.plan.work import Work

What = Literal["egress_gb", "hours", "preemptions_per_hour"]
# From, to, and the first stretch of the search.
_RANGE = {
    "egress_gb": (Decimal(0), Decimal(100_000), Decimal(1)),
    "hours": (Decimal("0.05"), Decimal(10_000), Decimal("0.01")),
    "preemptions_per_hour": (Decimal(0), Decimal(20), Decimal("0.001")),
}
_MOST_OF_A_MARKET = 4
_STRETCH = 2
_HALVINGS = 14
Price = Callable[[Quote, Decimal], Decimal | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """At `at`, seen from `now`, `winner` becomes cheaper than the first row."""

    what: What
    now: Decimal
    at: Decimal
    winner: Quote


def flips(quotes: Sequence[Quote], pricing: Pricing) -> list[Flip]:
    """The nearest change in each direction that topples the first of `quotes`, which are in order.

    Hours are those of the first row; the others' change in proportion. Tried against it are the best row of
    each (provider, market), and what is dearer but charges less for egress, as hosts of vast.ai may.
    """
    rows = _best_of_markets(quotes)
    if len(rows) < 2:
        return []
    first, pricing = rows[0], replace(pricing, hours_on=None)

    def at_egress(quote: Quote, gb: Decimal) -> Decimal | None:
        return _total(quote, replace(quote.work, egress_gb=gb), quote.risk, pricing)

    def at_hours(quote: Quote, hours: Decimal) -> Decimal | None:
        scaled = quote.work.hours * hours / first.work.hours
        return _total(quote, replace(quote.work, hours=scaled), _lasting(quote, scaled, pricing), pricing)

    found = [
        *_both_ways("egress_gb", first.work.egress_gb, rows, at_egress),
        *_both_ways("hours", first.work.hours, rows, at_hours),
    ]
    risky = next((q for q in rows if q.offer.preemptible), None)
    if risky is not None:

        def at_rate(quote: Quote, rate: Decimal) -> Decimal | None:
            if quote is not risky:
                return quote.bill.total_usd
            return _total(quote, quote.work, Risk(per_hour=float(rate), source=""), pricing)

        found += _both_ways("preemptions_per_hour", Decimal(repr(risky.risk.per_hour)), rows, at_rate)
    return found


def _best_of_markets(quotes: Sequence[Quote]) -> list[Quote]:
    """Those that can be had, the first of each provider and market."""
    chosen: list[Quote] = []
    least: dict[tuple[str, str], list[Decimal]] = {}
    for quote in quotes:
        rates = least.setdefault((quote.offer.provider, quote.offer.market), [])
        rate = quote.offer.egress_usd_per_gb
        is_better = rate is not None and rates and rate < rates[-1] and len(rates) < _MOST_OF_A_MARKET
        if quote.has_stock and (not rates or is_better):
            chosen.append(quote)
            rates.append(Decimal(0) if rate is None else rate)
    return chosen


def _lasting(quote: Quote, hours: Decimal, pricing: Pricing) -> Risk:
    """The hazard of a job of that length: young nodes are lost more often."""
    return pricing.risk_of(quote.offer, hours)


def _total(quote: Quote, work: Work, risk: Risk, pricing: Pricing) -> Decimal | None:
    """None where it would never finish."""
    found = quote_of(quote.priced, work, pricing, risk=risk)
    return found.bill.total_usd if isinstance(found, Quote) else None


def _both_ways(what: What, now: Decimal, rows: Sequence[Quote], price: Price) -> Iterator[Flip]:
    least, most, step = _RANGE[what]
    for values in (_stretches(now, most, step), _stretches(now, least, -step)):
        flip = _first_flip(what, now, rows, price, values)
        if flip is not None:
            yield flip


def _stretches(now: Decimal, end: Decimal, step: Decimal) -> Iterator[Decimal]:
    """From `now` to `end` in growing steps."""
    value = now
    while (value < end) if step > 0 else (value > end):
        value = min(value + step, end) if step > 0 else max(value + step, end)
        yield value
        step *= _STRETCH


def _first_flip(
    what: What, now: Decimal, rows: Sequence[Quote], price: Price, values: Iterator[Decimal]
) -> Flip | None:
    before = now
    for value in values:
        if _winner(rows, price, value) is not rows[0]:
            break
        before = value
    else:
        return None
    for _ in range(_HALVINGS):
        middle = (before + value) / 2
        if _winner(rows, price, middle) is rows[0]:
            before = middle
        else:
            value = middle
    return Flip(what=what, now=now, at=value, winner=_winner(rows, price, value))


def _winner(rows: Sequence[Quote], price: Price, value: Decimal) -> Quote:
    """The cheapest row; the first one while none is cheaper than it."""
    totals = [(price(quote, value), index) for index, quote in enumerate(rows)]
    finite = [(total, index) for total, index in totals if total is not None]
    return rows[min(finite)[1]] if finite else rows[0]
