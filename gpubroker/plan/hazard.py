"""How often a market takes a node away: a prior by its class, and what was seen of it. Pure, no numpy.

Bill: Hazards.of(offer) -> Hazard -> preempt.py and simulate.py. The hazard is a Gamma distribution of
preemptions per hour of exposure: `shape` preemptions in `hours` before anything was seen, to which our own
are added. A node that cannot be preempted still fails with its host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cache
from typing import NamedTuple

from gpubroker.gpus import read_table
from gpubroker.model import Offer

# What nodes in another region, or with another card, of the same market count here.
_OTHER_REGION_WEIGHT = 0.5
_OTHER_CARD_WEIGHT = 0.2
# And at most this much of it: thousands of hours elsewhere must not outweigh the first ones here.
_ELSEWHERE_MOST_H = 50.0
# Machines that leave the spot list are rented by others, outbid, or withheld: it tells of preemption, but not
# surely, and there are so many of them that they count no more than a day of our own.
_LISTED_MOST_H = 24.0
# How long a host is away when it is: with the share of time up that a listing states, this gives how often.
MEAN_OUTAGE_H = 6.0
_LEAST_RELIABILITY = 0.5  # a listing below it tells of a new or broken host, not of a rate
_AGES_UNTIL_H = (1.0, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """How a hazard changes with a node's age: factors[i] holds up to until_h[i], the last one for ever."""

    until_h: tuple[float, ...] = ()
    factors: tuple[float, ...] = (1.0,)

    def over(self, per_hour: float, horizon_h: float) -> float:
        """Preemptions per hour of nodes that are kept to an age of `horizon_h` at most.

        `per_hour` is the hazard before factors. Nodes come one after the other, so that it is the chance to
        lose one over the mean time that one is held.
        """
        alive, held_h, begin_h = 1.0, 0.0, 0.0
        for end_h, factor in zip((*self.until_h, math.inf), self.factors, strict=True):
            span_h = min(end_h, horizon_h) - begin_h
            if span_h <= 0:
                break
            rate = per_hour * factor
            lost = -math.expm1(-rate * span_h)
            held_h += alive * (lost / rate if rate else span_h)
            alive *= 1 - lost
            begin_h = end_h
        return (1 - alive) / held_h if held_h and math.isfinite(held_h) else per_hour * self.factors[0]


NO_AGES = Ages()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Preemptions per hour as a distribution: as if `shape` of them had been seen in `hours`."""

    shape: float
    hours: float

    @property
    def mean(self) -> float:
        """Per hour."""
        return self.shape / self.hours

    def quantile(self, share: float) -> float:
        """The rate per hour that the hazard stays below with this probability."""
        return gamma_quantile(self.shape, share) / self.hours

    def after(self, preemptions: float, hours: float) -> Gamma:
        """What is known once these were seen in so many hours."""
        return Gamma(shape=self.shape + preemptions, hours=self.hours + hours)

    def cut(self, most_h: float) -> Gamma:
        """The same rate from no more than so many hours."""
        share = min(1.0, most_h / self.hours) if self.hours else 0.0
        return Gamma(shape=share * self.shape, hours=share * self.hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What is believed of a market before anything was seen of it, and who says so."""

    gamma: Gamma
    ages: Ages
    source: str
    as_of: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Hours that nodes were held in a market, and how many of them were taken away.

    `is_listed`: of machines on the spot list of all polls, and of those that left it (prices/daily.py).
    """

    provider: str
    gpu: str
    region: str
    market: str
    preemptions: float
    hours: float
    is_listed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hazard:
    """Preemptions per hour of one offer. Offers that share one share the object, which is its own key."""

    gamma: Gamma
    ages: Ages
    prior: Prior
    own_preemptions: float  # of our nodes in this very market
    own_hours: float
    elsewhere_hours: float  # of other regions and cards, as much as they counted
    listed_hours: float  # of machines on the spot list, as much as they counted

    @property
    def per_hour(self) -> float:
        """The mean over nodes of all ages."""
        return self.gamma.mean

    def over(self, horizon_h: float) -> float:
        """Per hour for a job of that length, whose nodes are young more often than others."""
        return self.ages.over(self.per_hour, horizon_h)

    @property
    def text(self) -> str:
        """`0.12/h, 90% 0.03-0.31, from 41 h of our own and the prior`."""
        low, high = (figure(self.gamma.quantile(share)) for share in (0.05, 0.95))
        seen = []
        if self.own_hours:
            seen.append(f"{figure(self.own_hours)} h of our own")
        if self.elsewhere_hours:
            seen.append(f"{figure(self.elsewhere_hours)} h elsewhere")
        if self.listed_hours:
            seen.append(f"{figure(self.listed_hours)} h of the spot list")
        basis = f"{', '.join(seen)} and the prior" if seen else f"the prior alone ({self.prior.status})"
        return f"{figure(self.per_hour)}/h, 90% {low}-{high}, from {basis}"

    @property
    def source_text(self) -> str:
        """Who says what the prior is."""
        return f"{self.prior.status}, {self.prior.as_of}: {self.prior.source}"


class Hazards:
    """The hazard of every offer, from the priors and from what was seen so far."""

    def __init__(
        self, exposures: Iterable[Exposure] = (), priors: Iterable[Mapping[str, str]] | None = None
    ) -> None:
        self._priors = packaged_priors() if priors is None else parse_priors(priors)
        self._seen: dict[tuple[str, str], list[Exposure]] = {}
        self._listed: dict[tuple[str, str, str], list[Exposure]] = {}
        for one in exposures:
            if one.is_listed:
                self._listed.setdefault((one.provider, one.market, one.gpu), []).append(one)
            else:
                self._seen.setdefault((one.provider, one.market), []).append(one)
        self._known: dict[tuple[object, ...], Hazard] = {}

    def of(self, offer: Offer) -> Hazard:
        """Raises KeyError for a market that has no prior at all; the packaged table has one for each."""
        market = (offer.provider, offer.market)
        band = offer.details.get("interruption_band", "") if offer.market == "spot" else ""
        host = None if offer.reliability is None else host_failures_per_hour(offer.reliability)
        # Where nothing was seen, card and region make no difference: 20,000 offers have few hazards.
        is_seen = market in self._seen or (*market, offer.gpu) in self._listed
        where = (offer.gpu, offer.region) if is_seen else ()
        key = (*market, band, host, offer.preemptible, where)
        if key not in self._known:
            self._known[key] = self._hazard(offer, self._prior(offer, band, host))
        return self._known[key]

    def _hazard(self, offer: Offer, prior: Prior) -> Hazard:
        own, elsewhere = Gamma(shape=0, hours=0), Gamma(shape=0, hours=0)
        for seen in self._seen.get((offer.provider, offer.market), ()):
            if (seen.gpu, seen.region) == (offer.gpu, offer.region):
                own = own.after(seen.preemptions, seen.hours)
            else:
                weight = _OTHER_REGION_WEIGHT if seen.gpu == offer.gpu else _OTHER_CARD_WEIGHT
                elsewhere = elsewhere.after(weight * seen.preemptions, weight * seen.hours)
        listed = Gamma(shape=0, hours=0)
        for seen in self._listed.get((offer.provider, offer.market, offer.gpu), ()):
            weight = 1.0 if seen.region == offer.region else _OTHER_REGION_WEIGHT
            listed = listed.after(weight * seen.preemptions, weight * seen.hours)
        elsewhere, listed = elsewhere.cut(_ELSEWHERE_MOST_H), listed.cut(_LISTED_MOST_H)
        gamma = prior.gamma
        for known in (elsewhere, listed, own):
            gamma = gamma.after(known.shape, known.hours)
        return Hazard(
            gamma=gamma,
            ages=prior.ages,
            prior=prior,
            own_preemptions=own.shape,
            own_hours=own.hours,
            elsewhere_hours=elsewhere.hours,
            listed_hours=listed.hours,
        )

    def _prior(self, offer: Offer, band: str, host: float | None) -> Prior:
        for key in (
            (offer.provider, offer.market, band),
            (offer.provider, offer.market, ""),
            ("", offer.market, ""),
        ):
            if key in self._priors:
                break
        prior = self._priors[key]
        if host is None:
            return prior
        mean = prior.gamma.mean + host if offer.preemptible else host
        # As sure as before of the order of magnitude.
        gamma = Gamma(shape=prior.gamma.shape, hours=prior.gamma.shape / mean) if mean else prior.gamma
        return Prior(
            gamma=gamma,
            ages=prior.ages,
            source=f"{prior.source}; {figure(host)}/h by the reliability that its host is listed with",
            as_of=prior.as_of,
            status=prior.status,
        )


def host_failures_per_hour(reliability: Decimal) -> float:
    """What a listing's reliability says, read as the share of time up, with outages of MEAN_OUTAGE_H.

    To two digits, which is more than the reading is worth. Vast does not say what it measures.
    """
    up = min(1.0, max(_LEAST_RELIABILITY, float(reliability)))
    return float(f"{(1 - up) / up / MEAN_OUTAGE_H:.2g}")


def parse_priors(rows: Iterable[Mapping[str, str]]) -> Mapping[tuple[str, str, str], Prior]:
    """By provider ("" = any), market and Spot Advisor band ("" = none)."""
    return {(row["provider"], row["market"], row["band"]): _prior(row) for row in rows}


@cache
def packaged_priors() -> Mapping[tuple[str, str, str], Prior]:
    """gpubroker/data/hazard.csv."""
    return parse_priors(read_table("hazard.csv"))


def _prior(row: Mapping[str, str]) -> Prior:
    ages = NO_AGES
    if row["first_hour"]:
        factors = tuple(float(row[column]) for column in ("first_hour", "to_4_h", "later"))
        ages = Ages(until_h=_AGES_UNTIL_H, factors=factors)
    return Prior(
        gamma=Gamma(shape=float(row["shape"]), hours=float(row["hours"])),
        ages=ages,
        source=row["source"],
        as_of=row["as_of"],
        status=row["status"],
    )


class Span(NamedTuple):
    """An offer of one key at one price, as the history has it."""

    start: datetime
    end: datetime | None  # exclusive; None = still open
    usd_per_hour: Decimal


class Seen(NamedTuple):
    """What a history says: how often a node would have been lost in how many hours."""

    preemptions: int
    hours: float


def exposure_from_spans(spans: Iterable[Span], now: datetime, bid: Decimal | None = None) -> Seen:
    """What a node would have met that was held whenever the offer was there, at no more than `bid`.

    Spans that follow each other without a gap are one stay at changing prices; a stay that ends is a loss. A
    listing of a spot offer is more and less than a node: a vast machine leaves the list when it is rented out
    on demand, which ends a bid too, but also when its host withholds it; AWS lists prices of types that it
    could not give. None = at any price.
    """
    held = sorted(
        (span for span in spans if bid is None or span.usd_per_hour <= bid), key=lambda span: span.start
    )
    preemptions, hours = 0, 0.0
    for at, span in enumerate(held):
        end = now if span.end is None else span.end
        hours += (end - span.start).total_seconds() / 3600
        goes_on = at + 1 < len(held) and held[at + 1].start <= end
        if span.end is not None and not goes_on:
            preemptions += 1
    return Seen(preemptions, hours)


# --- Figures ----------------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Two significant digits without an exponent: 0.12, 0.00017, 41."""
    if not math.isfinite(value):
        return str(value)
    return f"{Decimal(f'{value:.2g}'):f}"


@cache
def gamma_quantile(shape: float, share: float) -> float:
    """The quantile of the Gamma distribution with scale 1, by bisection of its logarithm."""
    # P(a, x) <= x^a / Gamma(a + 1) gives a floor, which for a small shape is the quantile itself.
    low = (math.log(share) + math.lgamma(shape + 1)) / shape
    if low < -700:
        return 0.0
    high = max(low, math.log(shape + 1))
    while regularized_gamma(shape, math.exp(high)) < share:
        high += 1
    for _ in range(60):
        middle = (low + high) / 2
        if regularized_gamma(shape, math.exp(middle)) < share:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def regularized_gamma(a: float, x: float) -> float:
    """P(a, x), the chance that a Gamma of shape `a` and scale 1 is at most x.

    The power series below a + 1, Lentz's continued fraction of the complement above it.
    """
    if x <= 0:
        return 0.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        step = a
        while term > total * 1e-16:
            step += 1
            term *= x / step
            total += term
        return min(1.0, front * total)
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    fraction = d
    for n in range(1, 100_000):
        factor = -n * (n - a)
        b += 2
        d = 1 / (factor * d + b or tiny)
        c = b + factor / c or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return max(0.0, 1 - front * fraction)
