"""Our own price history as spot traces: spans of the price store in, one trace a zone out. Pure.

What a price list cannot show is assumed: that a spot offer that stays listed can be held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from gpubroker.errors import ConfigError
from gpubroker.policy.traces import Trace

_Prices = list[float | None]  # by step, None where nothing could be held


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedSpan:
    """One offer at one price: from the look that found it until the one that found it gone or changed."""

    offer: int
    provider: str
    zone: str
    is_spot: bool  # else on demand
    usd_per_hour: float
    first_s: int
    until_s: int | None  # None: still there at the provider's last look


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    begin_s: int
    step_s: int
    count: int

    def up(self, at_s: int) -> int:
        """The first step that begins then or later."""
        return max(0, -((self.begin_s - at_s) // self.step_s))

    def down(self, at_s: int) -> int:
        """The steps before this one have ended by then."""
        return min(self.count, (at_s - self.begin_s) // self.step_s)


def traces_of(
    spans: Iterable[ListedSpan],
    looks_s: Mapping[str, Sequence[int]],
    *,
    name: str,
    step_s: int,
    most_gap_s: int,
) -> list[Trace]:
    """A trace for every zone that had spot offers, from the first look at any provider to the last.

    `looks_s` are each provider's moments, rising. A step is available where one offer was there for all of
    it; its price is the cheapest such offer's. Where nobody looked for longer than `most_gap_s`, nothing is
    taken for available. The on-demand price is the median over the steps of the cheapest offer anywhere.
    Raises ConfigError where there is too little.
    """
    seen = [moments for moments in looks_s.values() if moments]
    begin_s, end_s = min((m[0] for m in seen), default=0), max((m[-1] for m in seen), default=0)
    steps = _Steps(begin_s=begin_s, step_s=step_s, count=(end_s - begin_s) // step_s)
    if steps.count < 1:
        raise ConfigError(f"the history of {name} is shorter than one step of {step_s} s: poll for longer")
    places: dict[tuple[bool, str, str], dict[int, list[ListedSpan]]] = {}
    for span in spans:
        if looks_s.get(span.provider):
            place = places.setdefault((span.is_spot, span.provider, span.zone), {})
            place.setdefault(span.offer, []).append(span)
    spot: dict[str, _Prices] = {}
    on_demand: list[_Prices] = []
    for (is_spot, provider, zone), offers in sorted(places.items()):
        prices = _cheapest(offers.values(), looks_s[provider], steps, most_gap_s)
        if is_spot:
            spot[f"{provider} {zone}".strip()] = prices
        else:
            on_demand.append(prices)
    cheapest = [
        min(there) for row in zip(*on_demand, strict=True) if (there := [p for p in row if p is not None])
    ]
    if not cheapest or not spot:
        raise ConfigError(f"the history of {name} has no {'spot' if cheapest else 'on-demand'} offers")
    return [_trace(name, zone, step_s, median(cheapest), prices) for zone, prices in spot.items()]


def _cheapest(
    offers: Iterable[Sequence[ListedSpan]], looks_s: Sequence[int], steps: _Steps, most_gap_s: int
) -> _Prices:
    """By step: the least price, at its start, of an offer that was there for all of it."""
    cheapest: _Prices = [None] * steps.count
    for offer in offers:
        for stay in _stays(offer):
            last_s = stay[-1].until_s
            end = steps.down(looks_s[-1] if last_s is None else last_s)
            # A new price is a new span of the same node: its steps run on to the end of the stay.
            for span, following in zip(stay, [*stay[1:], None], strict=True):
                until = end if following is None else min(end, steps.up(following.first_s))
                for step in range(steps.up(span.first_s), until):
                    known = cheapest[step]
                    if known is None or span.usd_per_hour < known:
                        cheapest[step] = span.usd_per_hour
    for last_s, next_s in pairwise(looks_s):
        if next_s - last_s > most_gap_s:
            for step in range(max(0, steps.down(last_s)), min(steps.count, steps.up(next_s))):
                cheapest[step] = None
    return cheapest


def _stays(offer: Sequence[ListedSpan]) -> list[list[ListedSpan]]:
    """One offer's spans, in runs without a break between them."""
    stays: list[list[ListedSpan]] = []
    for span in sorted(offer, key=lambda span: span.first_s):
        if stays and stays[-1][-1].until_s == span.first_s:
            stays[-1].append(span)
        else:
            stays.append([span])
    return stays


def _trace(name: str, zone: str, step_s: int, on_demand: float, prices: _Prices) -> Trace:
    last = next((price for price in prices if price is not None), 0.0)
    shown = [last := last if price is None else price for price in prices]
    return Trace(
        name=f"{name} {zone}",
        group=name,
        zone=zone,
        step_s=step_s,
        on_demand_usd_per_hour=on_demand,
        available=tuple(price is not None for price in prices),
        spot_usd_per_hour=tuple(shown),
    )
