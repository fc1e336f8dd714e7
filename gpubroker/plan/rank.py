"""Offers and what was asked -> bills in order, and what was left out with the reason. Pure.

Rows rank by what one would really pay: an offer with more GPUs than asked is priced whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from gpubroker.gpus import GpuRequest
from gpubroker.model import Market, Offer, Priced
from gpubroker.places import lies_in
from gpubroker.plan.bill import Bill, bill_for, checkpoint_fee_usd
from gpubroker.plan.course import NO_RISK, Course, Risk, course_of, interruptions
from gpubroker.plan.fees import FeeTable
from gpubroker.plan.preempt import Interruptions
from gpubroker.plan.work import Work

OWN = "local"
_FEW = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is wanted. Empty tuples and None mean: no restriction."""

    work: Work
    amount: str = ""  # work that is converted to each card, as it was asked for; "" = work.hours on any
    gpus: tuple[GpuRequest, ...] = ()
    gpu_count: int = 1
    markets: tuple[Market, ...] = ()
    providers: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    min_vram_gib: int | None = None  # per GPU
    verified_only: bool = True

    @property
    def work_text(self) -> str:
        """How much there is to do, for people."""
        return self.amount or f"{self.work.hours:f} h"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """What prices an offer beside its own terms: fees, how often nodes are lost, how fast the card is.

    `hours_on` converts the work to the offer's card: hours and how they were worked out, or the reason why
    they cannot be; None = the hours asked for are hours on any card.
    """

    fees: FeeTable
    risk_of: Callable[[Offer, Decimal], Risk] = lambda offer, hours: NO_RISK
    hours_on: Callable[[Offer], tuple[Decimal, str] | str] | None = None
    assumption: str = ""  # how hours_on converts, in one sentence

    def start_s(self, offer: Offer) -> Decimal:
        """Seconds that are billed before the work starts."""
        return Decimal(self.fees.startup(offer.provider, offer.market).billed_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """One offer with its bill."""

    priced: Priced
    bill: Bill
    work: Work  # with the hours that it takes on this card
    risk: Risk
    inputs: Interruptions  # what the bill's course was made from
    pace: str = ""  # how the hours on this card were worked out; "" = they are those asked for

    @property
    def offer(self) -> Offer:
        """The offer itself."""
        return self.priced.offer

    @property
    def has_stock(self) -> bool:
        """False only where the vendor says that there is none."""
        return self.offer.stock != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A row that does not appear in the quote, and why."""

    provider: str
    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The answer: bills in order, cheapest first; rows without stock come last."""

    quotes: tuple[Quote, ...]
    left_out: tuple[LeftOut, ...]


def rank(offers: Iterable[Priced], ask: Ask, pricing: Pricing) -> Ranking:
    """Price every offer of the cards asked for that fits, and sort by total.

    Other cards are not "left out": nobody asked for them.
    """
    quotes, left_out = [], []
    for priced in offers:
        offer = priced.offer
        if not is_asked_card(offer, ask):
            continue
        found = why_not(offer, ask) or quote_of(priced, ask.work, pricing)
        if isinstance(found, Quote):
            quotes.append(found)
        else:
            left_out.append(LeftOut(provider=offer.provider, id=row_id(offer), reason=found))
    quotes.sort(key=_order)
    return Ranking(quotes=tuple(quotes), left_out=tuple(left_out))


def quote_of(priced: Priced, work: Work, pricing: Pricing, *, risk: Risk | None = None) -> Quote | str:
    """One offer's bill, or the reason why it has none; `risk` stands in for the table's."""
    offer, pace = priced.offer, ""
    if work.volume_gb and not pricing.fees.has_volumes(offer.provider):
        return "no network volumes there"
    if pricing.hours_on is not None:
        converted = pricing.hours_on(offer)
        if isinstance(converted, str):
            return converted
        work, pace = replace(work, hours=converted[0]), converted[1]
    if risk is None:
        risk = pricing.risk_of(offer, work.hours)
    course = _course(offer, work, risk, pricing)
    if course is None:
        return f"would never finish: lost {risk.per_hour:.2g} times an hour"
    bill = bill_for(
        offer,
        work,
        pricing.fees,
        course[0],
        price_source=price_source(priced),
        risk_source=risk.text or risk.source,
    )
    return Quote(priced=priced, bill=bill, work=work, risk=risk, inputs=course[1], pace=pace)


def _course(offer: Offer, work: Work, risk: Risk, pricing: Pricing) -> tuple[Course, Interruptions] | None:
    """The course and what it was made from: checkpoints that are charged for leaving are worth fewer."""
    saves, start_s = work.checkpoints, pricing.start_s(offer)
    inputs = interruptions(offer.market, saves, start_s, risk.per_hour)
    course = course_of(work.hours, inputs)
    if course is None or saves.every_s is not None or not saves.leave(offer.provider):
        return None if course is None else (course, inputs)
    tried = {int(course.checkpoints): (_usd_with(offer, work, course, pricing), course, inputs)}

    def usd(count: int) -> Decimal:
        if count not in tried:
            other = replace(inputs, interval_h=float(work.hours) / (count + 1))
            found = course_of(work.hours, other)
            if found is None:
                return Decimal("Infinity")
            tried[count] = _usd_with(offer, work, found, pricing), found, other
        return tried[count][0]

    near = min(_fewer(int(course.checkpoints)), key=usd)
    best = min(_about(near), key=usd)
    return tried[best][1:]


def _usd_with(offer: Offer, work: Work, course: Course, pricing: Pricing) -> Decimal:
    """What an interval decides: the node's hours, and checkpoints leaving it."""
    leaving = checkpoint_fee_usd(offer, work, pricing.fees, course.checkpoints) * course.checkpoints
    return offer.usd_per_hour * course.run_h + leaving


def _fewer(count: int) -> Iterator[int]:
    """From this many checkpoints down to none at all, each about a third fewer."""
    yield count
    while count > 0:
        count = min(count - 1, count * 2 // 3)
        yield count


def _about(count: int) -> list[int]:
    """A few counts on either side, as far as the next that were looked at."""
    low, high = count * 2 // 3, count * 3 // 2 + 1
    return sorted({low + (high - low) * n // _FEW for n in range(_FEW + 1)} | {count})


def _order(quote: Quote) -> tuple[bool, Decimal, bool, bool, int, str, str, str]:
    """Ties go to what cannot be preempted, what is live, the smaller box, then the alphabet."""
    offer = quote.offer
    return (
        not quote.has_stock,
        quote.bill.total_usd,
        offer.preemptible,
        not quote.priced.live,
        offer.gpu_count,
        offer.provider,
        offer.sku,
        offer.region + offer.zone + offer.machine_id,
    )


def why_not(offer: Offer, ask: Ask) -> str | None:
    """The first reason why the offer does not fit, None when it does."""
    return next(_misfits(offer, ask), None)


def is_asked_card(offer: Offer, ask: Ask) -> bool:
    """Whether the card may be one that was asked for; one in an unstated form may be."""
    return not ask.gpus or any(
        offer.gpu in g.names and offer.form_factor in (g.form_factor or offer.form_factor, "unstated")
        for g in ask.gpus
    )


def _misfits(offer: Offer, ask: Ask) -> Iterator[str]:
    if ask.gpus and not any(g.matches(offer.gpu, offer.form_factor) for g in ask.gpus):
        yield "form factor not stated" if is_asked_card(offer, ask) else "another card"
    if offer.gpu_count < ask.gpu_count:
        yield f"too few GPUs: {offer.gpu_count} of {ask.gpu_count}"
    if ask.min_vram_gib is not None and offer.vram_gib < ask.min_vram_gib:
        yield f"too little memory: {offer.vram_gib} of {ask.min_vram_gib} GiB a GPU"
    if ask.markets and offer.market not in ask.markets:
        yield f"another market: {offer.market}"
    if ask.providers and offer.provider not in ask.providers:
        yield "provider not asked for"
    if ask.regions and not any(in_region(offer, region) for region in ask.regions):
        yield f"another region: {offer.zone or offer.region or 'not stated'}"
    if ask.verified_only and offer.verified is False:
        yield "host not verified (--any-host takes it)"
    if offer.disk_max_gb is not None and offer.disk_max_gb < ask.work.disk_gb:
        yield f"too little disk: {offer.disk_max_gb} of {ask.work.disk_gb:f} GB"


def in_region(offer: Offer, region: str) -> bool:
    """Whether the offer lies in a region or in a part of it."""
    return lies_in((offer.region, offer.zone, *offer.details.get("data_centers", "").split(",")), region)


def merge(
    live: Iterable[Priced], book: Iterable[Priced], covered: Mapping[tuple[str, str], datetime]
) -> tuple[list[Priced], list[LeftOut]]:
    """Live rows, and those of the price book that no newer poll speaks for.

    `covered` tells per (provider, market) when a poll last saw the whole of it, for the GPUs asked: what the
    book knows from before is then out of date, whether or not the poll found the same.
    """
    rows = list(live)
    newest: dict[tuple[str, str, str], datetime] = {}
    for priced in rows:
        key = (priced.offer.provider, priced.offer.market, priced.offer.gpu)
        if priced.as_of is not None:
            newest[key] = max(priced.as_of, newest.get(key, priced.as_of))
    left_out = []
    for priced in book:
        offer = priced.offer
        seen = [
            moment
            for moment in (
                newest.get((offer.provider, offer.market, offer.gpu)),
                covered.get((offer.provider, offer.market)),
            )
            if moment is not None
        ]
        if seen and (priced.as_of is None or max(seen) >= priced.as_of):
            reason = "list price older than the vendor's live answer"
            left_out.append(LeftOut(provider=offer.provider, id=row_id(offer), reason=reason))
        else:
            rows.append(priced)
    return rows, left_out


def best_of_each(quotes: Sequence[Quote], top: int) -> list[Quote]:
    """The rows for a table: the best of every vendor, then the next best up to `top`, in order."""
    distinct = list({_looks(quote): index for index, quote in reversed(list(enumerate(quotes)))}.values())
    distinct.sort()
    best = {quotes[index].offer.provider: index for index in reversed(distinct)}
    chosen = set(best.values())
    others = [index for index in distinct if index not in chosen]
    return [quotes[index] for index in sorted([*chosen, *others[: max(0, top - len(chosen))]])]


def _looks(quote: Quote) -> tuple[object, ...]:
    """What a person would see of the row: two that look the same are shown once."""
    offer = quote.offer
    return (
        offer.provider,
        offer.gpu,
        offer.form_factor,
        offer.gpu_count,
        offer.market,
        offer.zone or offer.region or offer.cloud,
        quote.bill.total_usd,
        quote.has_stock,
    )


def row_id(offer: Offer) -> str:
    """What names an offer to a person: the listing, or the sku with where it is."""
    if offer.listing_id:
        return offer.listing_id
    return " ".join(part for part in (offer.sku, offer.zone or offer.region, offer.cloud) if part)


def price_source(priced: Priced) -> str:
    """Where the price comes from, with its date when it is a listed one."""
    if priced.live:
        return priced.source
    return f"{list_price_text(priced)}: {priced.source}"


def list_price_text(priced: Priced) -> str:
    """`list price, DATE`, or undated."""
    return f"list price, {priced.as_of.date().isoformat() if priced.as_of else 'undated'}"
