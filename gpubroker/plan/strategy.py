"""Quotes, a deadline and a budget -> strategies in order, with the chance that each keeps both. Pure, numpy.

A strategy is where to begin and where to end: on demand, spot alone, spot that falls back to on demand when
time runs short, spot wherever of several markets there is some, serverless, one's own GPU. Each is drawn with
the same seed; those that keep the limits with the confidence asked for come first, the cheapest ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Literal

import numpy as np

from gpubroker.plan.bids import Bid, BidJob, best_bid
from gpubroker.plan.bill import keeps_disk
from gpubroker.plan.course import Risk
from gpubroker.plan.fallback import Fallback, Legs, draw
from gpubroker.plan.hazard import Gamma, Span
from gpubroker.plan.rank import OWN, Pricing, Quote, quote_of
from gpubroker.plan.sentence import name_of
from gpubroker.plan.simulate import DRAWS, Array, Quantiles, Rates, billing_units, quantiles, usd_of
from gpubroker.plan.spread import SEED, rates_of, runs_of

Kind = Literal["own GPU", "on demand", "serverless", "spot", "spot, then on demand", "mixed"]
# How many of the cheapest rows of a kind are turned into strategies.
_MOST_OF_A_KIND = 3
_MOST_MARKETS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the job must keep. None = no such limit."""

    deadline_h: float | None = None  # from now
    budget_usd: float | None = None
    confidence: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to run the job, drawn many times; USD are statistics."""

    kind: Kind
    first: Quote
    others: tuple[Quote, ...] = ()  # more spot markets, of a mixed one
    fallback: Quote | None = None
    bid: Bid | None = None  # on vast; None = the listed price
    switch_h: float | None = None  # hours before the deadline at which the fallback begins, nothing saved
    usd: Array = field(repr=False, compare=False)
    finish_h: Array = field(repr=False, compare=False)
    preemptions: float
    fallback_chance: float = 0.0

    @property
    def legs(self) -> tuple[Quote, ...]:
        """Every offer that it may rent."""
        return (self.first, *self.others, *([] if self.fallback is None else [self.fallback]))

    @property
    def usd_mean(self) -> float:
        """The expected bill."""
        return float(self.usd.mean())

    @property
    def usd_quantiles(self) -> Quantiles:
        """Of the bill."""
        return quantiles(self.usd)

    @property
    def finish_quantiles(self) -> Quantiles:
        """Hours from now."""
        return quantiles(self.finish_h)

    def chances(self, limits: Limits) -> tuple[float | None, float | None, float]:
        """To keep the deadline, the budget, and both; None for a limit that was not given."""
        in_time = self.finish_h <= (np.inf if limits.deadline_h is None else limits.deadline_h)
        in_budget = self.usd <= (np.inf if limits.budget_usd is None else limits.budget_usd)
        return (
            None if limits.deadline_h is None else float(in_time.mean()),
            None if limits.budget_usd is None else float(in_budget.mean()),
            float((in_time & in_budget).mean()),
        )

    def keeps(self, limits: Limits) -> bool:
        """Whether it keeps all limits with the confidence asked for."""
        return self.chances(limits)[2] >= limits.confidence


def strategies(
    quotes: Sequence[Quote], bids: dict[int, Bid], pricing: Pricing, limits: Limits
) -> list[Strategy]:
    """All that is worth telling of, the best first. `quotes` are in order; `bids` by id() of a spot quote."""
    found = list(_found([q for q in quotes if q.has_stock], bids, pricing, limits))
    return sorted(found, key=lambda s: (not s.keeps(limits), -_rounded(s, limits), s.usd_mean))


def _rounded(strategy: Strategy, limits: Limits) -> float:
    """The chance where it is too small, so that the nearest misses come first; 0 where it is enough."""
    return 0.0 if strategy.keeps(limits) else round(strategy.chances(limits)[2], 2)


def _found(
    quotes: Sequence[Quote], bids: dict[int, Bid], pricing: Pricing, limits: Limits
) -> Iterator[Strategy]:
    spot = _some([q for q in quotes if q.offer.market == "spot"])
    firm = _some(
        [q for q in quotes if q.offer.market in ("on_demand", "reserved") and q.offer.provider != OWN]
    )
    alone: tuple[tuple[Kind, Sequence[Quote]], ...] = (
        ("own GPU", [q for q in quotes if q.offer.provider == OWN][:1]),
        ("on demand", firm),
        ("serverless", _some([q for q in quotes if q.offer.market == "serverless"])),
        ("spot", spot),
    )
    for kind, rows in alone:
        for quote in rows:
            yield _alone(kind, quote, bids.get(id(quote)), pricing)
    if limits.deadline_h is not None:
        for quote in spot:
            fallback = _fallback_for(quote, firm)
            if fallback is not None:
                yield from _falling_back(quote, fallback, (), bids.get(id(quote)), pricing, limits.deadline_h)
    mixed = _apart([q for q in quotes if q.offer.market == "spot"])
    if len(mixed) > 1:
        yield from _mixed(mixed, firm, pricing, limits)


def at_best_bid(
    quote: Quote,
    history: Sequence[Span],
    most_usd: Decimal,
    pricing: Pricing,
    now: datetime,
    deadline_h: float | None,
) -> tuple[Quote, Bid] | None:
    """A spot quote of a market that takes bids, priced again at the bid that costs the job least.

    `most_usd` is what the same costs on demand. None where the job would never finish at that bid.
    """
    offer = quote.offer
    prior = quote.risk.uncertain or Gamma(shape=1.0, hours=1 / max(quote.risk.per_hour, 1e-6))
    job = BidJob(
        work_h=float(quote.work.hours),
        interruptions=quote.inputs,
        min_bid=offer.usd_per_hour,
        most=max(most_usd, offer.usd_per_hour),
        stopped_usd_per_hour=max(0.0, rates_of(quote, pricing).usd_per_wait_hour),
        deadline_h=deadline_h,
    )
    bid = best_bid(job, history, now, prior, quote.inputs.wait_h)
    priced = replace(quote.priced, offer=replace(offer, usd_per_hour=bid.usd_per_hour))
    risk = Risk(per_hour=bid.hazard.mean, source=f"{bid.basis}; {quote.risk.source}", uncertain=bid.hazard)
    found = quote_of(priced, quote.work, replace(pricing, hours_on=None), risk=risk)
    return (found, bid) if isinstance(found, Quote) else None


def _some(rows: Sequence[Quote]) -> list[Quote]:
    """The first of each provider, then the next, up to the number that is worth looking at.

    Rows that a person could not tell apart count once.
    """
    distinct = list({(name_of(quote), quote.bill.total_usd): quote for quote in reversed(rows)}.values())[
        ::-1
    ]
    best: dict[str, Quote] = {}
    for quote in distinct:
        best.setdefault(quote.offer.provider, quote)
    rest = [quote for quote in distinct if best[quote.offer.provider] is not quote]
    chosen = [*best.values(), *rest][: max(_MOST_OF_A_KIND, len(best))]
    return sorted(chosen, key=lambda q: q.bill.total_usd)


def _apart(rows: Sequence[Quote]) -> list[Quote]:
    """The cheapest spot markets of the first one's card that lie apart and can read its checkpoints."""
    chosen: list[Quote] = []
    for quote in rows:
        if not chosen or (
            _card(quote) == _card(chosen[0])
            and all(_place(quote) != _place(other) for other in chosen)
            and reaches(chosen[0], quote)
        ):
            chosen.append(quote)
        if len(chosen) == _MOST_MARKETS:
            break
    return chosen


def _card(quote: Quote) -> tuple[str, str, int]:
    return (quote.offer.gpu, quote.offer.form_factor, quote.offer.gpu_count)


def _place(quote: Quote) -> tuple[str, str, str, str]:
    offer = quote.offer
    return (offer.provider, offer.region, offer.zone, offer.machine_id)


def _fallback_for(spot: Quote, firm: Sequence[Quote]) -> Quote | None:
    """The cheapest by the hour that can go on from its checkpoints: a term would be paid whole."""
    return next((q for q in firm if q.offer.market == "on_demand" and reaches(spot, q)), None)


def reaches(source: Quote, target: Quote) -> bool:
    """Whether a node there can read what was saved here: in a store apart, or in the same provider's region.

    Checkpoints on a stopped node's own disk can be read on that machine alone.
    """
    if source.work.checkpoints.store:
        return True
    here, there = source.offer, target.offer
    if here.provider != there.provider:
        return False
    if keeps_disk(here):
        return bool(here.machine_id) and here.machine_id == there.machine_id
    return here.region == there.region


def _alone(kind: Kind, quote: Quote, bid: Bid | None, pricing: Pricing) -> Strategy:
    runs = runs_of(quote)
    return Strategy(
        kind=kind,
        first=quote,
        bid=bid,
        usd=usd_of(runs, rates_of(quote, pricing)),
        finish_h=runs.wall_h,
        preemptions=_mean(runs.preemptions),
    )


def _mixed(
    markets: Sequence[Quote], firm: Sequence[Quote], pricing: Pricing, limits: Limits
) -> Iterator[Strategy]:
    """The cheapest first; a lost node is followed by whichever market has one, so that waits are shorter."""
    first, others = markets[0], tuple(markets[1:])
    shared = replace(first, inputs=replace(first.inputs, wait_h=first.inputs.wait_h / len(markets)))
    fallback = _fallback_for(first, firm)
    if limits.deadline_h is not None and fallback is not None:
        yield from _falling_back(shared, fallback, others, None, pricing, limits.deadline_h)
        return
    runs = runs_of(shared)
    rates = _shared_rates(shared, others, pricing)
    yield Strategy(
        kind="mixed",
        first=first,
        others=others,
        usd=usd_of(runs, rates),
        finish_h=runs.wall_h,
        preemptions=_mean(runs.preemptions),
    )


def _shared_rates(first: Quote, others: Sequence[Quote], pricing: Pricing) -> Rates:
    """Nodes are taken from all of the markets alike."""
    all_of_them = [rates_of(quote, pricing) for quote in (first, *others)]
    return Rates(
        usd_per_hour=_mean(np.array([r.usd_per_hour for r in all_of_them])),
        usd_fixed=all_of_them[0].usd_fixed,
        usd_per_preemption=_mean(np.array([r.usd_per_preemption for r in all_of_them])),
    )


def _falling_back(
    spot: Quote,
    fallback: Quote,
    others: tuple[Quote, ...],
    bid: Bid | None,
    pricing: Pricing,
    deadline_h: float,
) -> Iterator[Strategy]:
    """Nothing where the deadline leaves no room to begin on spot at all."""
    saves = spot.work.checkpoints
    end = Fallback(
        work_h=float(fallback.work.hours),
        start_h=float(pricing.start_s(fallback.offer) + saves.reload_s) / 3600,
    )
    legs = draw(
        float(spot.work.hours),
        spot.inputs,
        end,
        deadline_h,
        seed=SEED,
        draws=DRAWS,
        ages=spot.risk.ages,
        uncertain=spot.risk.uncertain,
        bill=billing_units(spot.offer.billing_increment_s, spot.offer.minimum_s),
    )
    if not legs.spot_h.any():
        return
    rates = _shared_rates(spot, others, pricing) if others else rates_of(spot, pricing)
    yield Strategy(
        kind="mixed" if others else "spot, then on demand",
        first=spot,
        others=others,
        fallback=fallback,
        bid=bid,
        switch_h=end.work_h + end.start_h,
        usd=_usd_of_legs(legs, rates, spot, fallback, pricing),
        finish_h=legs.wall_h,
        preemptions=_mean(legs.preemptions),
        fallback_chance=float((legs.fallback_h > 0).mean()),
    )


def _usd_of_legs(legs: Legs, rates: Rates, spot: Quote, fallback: Quote, pricing: Pricing) -> Array:
    """Artifacts leave from where the job ends; a fallback pays for reading data and checkpoint."""
    end = rates_of(fallback, pricing)
    leaving_usd = _usd_leaving(spot, pricing)
    fell = legs.fallback_h > 0
    usd: Array = (
        rates.usd_fixed
        + legs.spot_h * rates.usd_per_hour
        + legs.preemptions * rates.usd_per_preemption
        + legs.wait_h * rates.usd_per_wait_hour
        + _billed_h(legs.fallback_h, fallback) * end.usd_per_hour
        + fell * (end.usd_fixed + end.usd_per_preemption - leaving_usd)
    )
    return usd


def _billed_h(hours: Array, quote: Quote) -> Array:
    """By the fallback's own billing units, where it was needed at all."""
    units = billing_units(quote.offer.billing_increment_s, quote.offer.minimum_s)
    return hours if units is None else np.where(hours > 0, units(hours), 0.0)


def _usd_leaving(quote: Quote, pricing: Pricing) -> float:
    without = replace(quote, work=replace(quote.work, egress_gb=Decimal(0)))
    return rates_of(quote, pricing).usd_fixed - rates_of(without, pricing).usd_fixed


def _mean(values: Array) -> float:
    return float(np.mean(values))
