"""The one sentence below a quote: what to take and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal

from gpubroker.plan.rank import OWN, Ask, Quote

# A listed price older than this is named in the sentence: list prices moved six times a year.
_OLD_DAYS = 30
_DAY_S = 86_400


def advice(quotes: Sequence[Quote], ask: Ask, now: datetime) -> str:
    """What to take: your own GPU first when the job fits it, else the cheapest row that has stock."""
    available = [q for q in quotes if q.has_stock]
    if not available:
        return f"Nobody has one free right now; the cheapest once there is: {name_of(quotes[0])}."
    own = next((q for q in available if q.offer.provider == OWN), None)
    rented = [q for q in available if q.offer.provider != OWN]
    if own is not None:
        card = f"{own.offer.gpu_count}x {own.offer.gpu}"
        text = f"Your own {card} can do it for {_usd(own.bill.total_usd)} of electricity"
        if rented:
            text += f"; the cheapest to rent is {name_of(rented[0])} at {_usd(rented[0].bill.total_usd)}"
            if rented[0].bill.total_usd < own.bill.total_usd:
                text += ", which is less"
        return f"{text}.{caution([own], now)}"
    best = rented[0]
    text = f"Take {name_of(best)}: {_usd(best.bill.total_usd)} for {ask.work_text}, {_why(rented)}"
    if best.offer.minimum_s >= _DAY_S:
        text += f". That pays its whole term of {best.offer.minimum_s // _DAY_S} days"
    firm = next((q for q in rented if not q.offer.preemptible), None)
    if best.offer.preemptible:
        text += ". It can be taken away at any time"
        if firm is not None:
            text += f"; {name_of(firm)} cannot, for {_difference(firm, best)} more"
    return f"{text}.{caution([best], now)}"


def _why(rented: Sequence[Quote]) -> str:
    best = rented[0]
    other = next((q for q in rented if q.offer.provider != best.offer.provider), None)
    if other is None:
        return f"the cheapest of {len(rented)} offers" if len(rented) > 1 else "the only offer"
    less = f"{_difference(other, best)} less than the best of {other.offer.provider}"
    return f"the cheapest of {len(rented)} offers, {less}"


def _difference(dear: Quote, cheap: Quote) -> str:
    """Of the totals as they are shown, so that a person who subtracts finds the same."""
    cent = Decimal("0.01")
    return _usd(dear.bill.total_usd.quantize(cent) - cheap.bill.total_usd.quantize(cent))


def name_of(quote: Quote) -> str:
    """One row in words: vast 1x H100 SXM spot in US."""
    offer = quote.offer
    where = offer.zone or offer.region or offer.cloud
    form = "" if offer.form_factor == "unstated" else f" {offer.form_factor}"
    market = offer.market.replace("_", "-")
    text = f"{offer.provider} {offer.gpu_count}x {offer.gpu}{form} {market}"
    return f"{text} in {where}" if where else text


def caution(quotes: Iterable[Quote], now: datetime) -> str:
    """A price that nobody confirmed lately must say so where the advice is read; of several, the worst."""
    listed = [q.priced.as_of for q in quotes if not q.priced.live]
    dated = [as_of for as_of in listed if as_of is not None]
    if len(dated) < len(listed):
        return " That rests on a list price without a date: check it before you rely on it."
    days = max(((now - as_of).days for as_of in dated), default=0)
    if days < _OLD_DAYS:
        return ""
    return f" That rests on a list price from {days} days ago: check it before you rely on it."


def _usd(amount: Decimal) -> str:
    return f"${amount:,.2f}"
