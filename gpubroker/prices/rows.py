"""Between the words and what the database holds, in plain Python: store.py writes it, fastread.py only reads.

Money is integer micro-dollars, a moment integer seconds since 1970 (UTC), and what is volatile one JSON
text an offer. No SQLAlchemy here: importing it costs more than a whole quote may.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

from gpubroker.model import Offer, OfferQuery, Priced, Skipped, Slice
from gpubroker.money import from_micros, to_micros

# The newest migration: a database that says something else is older or newer than this code.
REVISION = "0001"

PRODUCT = (
    "provider",
    "sku",
    "gpu",
    "form_factor",
    "gpu_count",
    "vram_gib",
    "market",
    "preemptible",
    "region",
    "zone",
    "cloud",
)
RATES = (
    "billing_increment_s",
    "minimum_s",
    "disk_included_gb",
    "storage_usd_per_gb_month",
    "egress_usd_per_gb",
    "ingress_usd_per_gb",
    "cpu_usd_per_core_hour",
    "ram_usd_per_gib_hour",
    "verified",
)
Product = tuple[Any, ...]  # in the order of PRODUCT: the identity of an offer, but for its machine
Rates = tuple[Any, ...]  # in the order of RATES
product_of = attrgetter(*PRODUCT)
_rates_of = attrgetter(*RATES)
_quoted = json.encoder.encode_basestring_ascii
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Listed(NamedTuple):
    """An offer that a poll brought, as the database would hold it."""

    product: Product
    machine_id: str
    host_id: str
    usd_micros: int
    rates: Rates
    digest: str  # the rates as text: equal rates, equal digest
    volatile: str
    listing_id: str

    @property
    def label(self) -> str:
        """What names it among skipped rows."""
        return self.listing_id or self.machine_id or str(self.product[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The newest kept poll of one provider with one scope."""

    poll_id: int
    provider: str
    scope: OfferQuery
    observed_at: datetime
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderState:
    """What the last attempt to refresh a provider found out, for every process that comes after."""

    provider: str
    missing: str = ""  # the variable that would give more; "" = nothing is missing
    unreachable_until: datetime | None = None  # None = it answered, or was never asked
    reason: str = ""  # why the last attempt failed, in words
    tried_at: datetime | None = None  # None = never


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCount:
    """How many rows were left out for one reason, and a few of them by id."""

    count: int
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """One recorded poll.

    finished_at None: still running, or its process died. observed_at None: nothing was kept.
    """

    id: int
    provider: str
    scope: OfferQuery
    started_at: datetime
    finished_at: datetime | None = None
    observed_at: datetime | None = None
    fetched: int = 0
    kept: int = 0
    skipped: int = 0
    skips: Mapping[str, SkipCount] = field(default_factory=dict)  # reason -> rows
    incomplete: tuple[Slice, ...] = ()
    unknown_offers: frozenset[int] = frozenset()  # current offers it could not speak for
    error: str | None = None  # None = it did not fail
    source: str = ""
    notes: tuple[str, ...] = ()


def seconds(moment: datetime) -> int:
    """A moment as the database holds it, rounded down. Raises ValueError for a naive one."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment} has no time zone")
    return int(moment.timestamp() // 1)


def moment(at: int) -> datetime:
    """Aware UTC."""
    return datetime.fromtimestamp(at, UTC)


def maybe_moment(at: int | None) -> datetime | None:
    """As `moment`; None stays None."""
    return None if at is None else moment(at)


@lru_cache(maxsize=65536)
def usd(micros: int | None) -> Decimal | None:
    """USD of micro-dollars; None stays None. Cached: prices repeat."""
    return None if micros is None else from_micros(micros)


# Typed: a float that equals a cached Decimal is still refused.
@lru_cache(maxsize=65536, typed=True)
def _micros(amount: Decimal | None) -> int | None:
    return None if amount is None else to_micros(amount)


def listing(offers: Iterable[Offer], query: OfferQuery) -> tuple[list[Listed], list[Skipped]]:
    """The offers within the query's scope, and those that cannot be stored, with the reason.

    Offers outside the scope are dropped without a skip: nobody asked for them.
    """
    found, skipped = [], []
    for offer in offers:
        if not query.covers(offer):
            continue
        try:
            found.append(_listed(offer))
        except (TypeError, ValueError) as error:
            skipped.append(Skipped(id=offer.listing_id or offer.sku, reason=str(error)))
    return found, skipped


def _listed(offer: Offer) -> Listed:
    rates, digest = _rates(*_rates_of(offer))
    return Listed(
        product_of(offer),
        offer.machine_id,
        offer.host_id,
        to_micros(offer.usd_per_hour),
        rates,
        digest,
        _volatile(offer),
        offer.listing_id,
    )


@lru_cache(maxsize=65536, typed=True)
def _rates(*terms: Any) -> tuple[Rates, str]:
    """Priced terms in the order of RATES as the database holds them, and as one text."""
    increment_s, minimum_s, disk_gb, *amounts, verified = terms
    rates = (increment_s, minimum_s, disk_gb, *map(_micros, amounts), verified)
    return rates, ",".join("" if value is None else str(int(value)) for value in rates)


def _volatile(offer: Offer) -> str:
    """JSON: [listing_id, stock, reliability, disk_max_gb, details]. By hand: 20,000 a poll."""
    reliability = "null" if offer.reliability is None else f'"{offer.reliability}"'
    disk_gb = "null" if offer.disk_max_gb is None else offer.disk_max_gb
    details = ",".join([f"{_quoted(name)}:{_quoted(said)}" for name, said in offer.details.items()])
    return f"[{_quoted(offer.listing_id)},{_quoted(offer.stock)},{reliability},{disk_gb},{{{details}}}]"


def offer_of(
    product: Sequence[Any],
    machine_id: str,
    host_id: str,
    usd_micros: int,
    rates: Sequence[Any],
    volatile: str = '["","",null,null,{}]',
) -> Offer:
    """An offer from its stored values; by default without what is volatile."""
    provider, sku, gpu, form_factor, gpu_count, vram_gib, market, preemptible, region, zone, cloud = product
    increment_s, minimum_s, disk_gb, storage, egress, ingress, cpu, ram, verified = rates
    listing_id, stock, reliability, disk_max_gb, details = json.loads(volatile)
    return Offer(
        provider=provider,
        sku=sku,
        gpu=gpu,
        form_factor=form_factor,
        gpu_count=gpu_count,
        vram_gib=vram_gib,
        market=market,
        preemptible=bool(preemptible),
        region=region,
        zone=zone,
        cloud=cloud,
        machine_id=machine_id,
        host_id=host_id,
        usd_per_hour=from_micros(usd_micros),
        billing_increment_s=increment_s,
        minimum_s=minimum_s,
        disk_included_gb=disk_gb,
        storage_usd_per_gb_month=usd(storage),
        egress_usd_per_gb=usd(egress),
        ingress_usd_per_gb=usd(ingress),
        cpu_usd_per_core_hour=usd(cpu),
        ram_usd_per_gib_hour=usd(ram),
        verified=None if verified is None else bool(verified),
        listing_id=listing_id,
        stock=stock,
        reliability=None if reliability is None else Decimal(reliability),
        disk_max_gb=disk_max_gb,
        details=details,
    )


def scope_json(query: OfferQuery) -> str:
    """A query as canonical JSON: equal queries, equal text."""
    return _encode(
        {
            "gpus": None if query.gpus is None else sorted(query.gpus),
            "markets": None if query.markets is None else sorted(query.markets),
            "verified_only": query.verified_only,
            "whole": query.whole,
        }
    )


def scope_of(text: str) -> OfferQuery:
    """The query that was written by scope_json."""
    table = json.loads(text)
    return OfferQuery(
        gpus=None if table["gpus"] is None else frozenset(table["gpus"]),
        markets=None if table["markets"] is None else frozenset(table["markets"]),
        verified_only=table["verified_only"],
        whole=table["whole"],
    )


def incomplete_json(slices: Iterable[Slice]) -> str:
    """The parts that a poll could not see."""
    return _encode(
        [
            {
                "reason": s.reason,
                "gpus": None if s.gpus is None else sorted(s.gpus),
                "market": s.market,
                "region": s.region,
                "cloud": s.cloud,
            }
            for s in slices
        ]
    )


def incomplete_of(text: str) -> tuple[Slice, ...]:
    """The slices that were written by incomplete_json."""
    return tuple(
        Slice(**{**part, "gpus": None if part["gpus"] is None else frozenset(part["gpus"])})
        for part in json.loads(text)
    )


def skips_json(skipped: Iterable[Skipped]) -> str:
    """reason -> [how many, the ids of the first five]."""
    table: dict[str, tuple[int, list[str]]] = {}
    for skip in skipped:
        count, ids = table.get(skip.reason, (0, []))
        table[skip.reason] = (count + 1, [*ids, skip.id] if count < 5 else ids)
    return _encode(table)


def skips_of(text: str) -> dict[str, SkipCount]:
    """The counts that were written by skips_json."""
    return {
        reason: SkipCount(count=count, ids=tuple(ids)) for reason, (count, ids) in json.loads(text).items()
    }


def includes(scope: OfferQuery, query: OfferQuery) -> bool:
    """Whether a poll with this scope asked for everything that the query asks for."""
    return (
        (scope.gpus is None or (query.gpus is not None and query.gpus <= scope.gpus))
        and (scope.markets is None or (query.markets is not None and query.markets <= scope.markets))
        and (query.verified_only or not scope.verified_only)
        and (scope.whole or not query.whole)
    )


# What one provider's newest polls covered: one row a (provider, scope).
COVERAGE_SQL = """
SELECT c.poll_id, c.provider, c.scope, p.observed_at, p.source
FROM coverage c JOIN polls p ON p.id = c.poll_id
"""

# Current offers, bounded by what is current however long the history: products -> latest -> open span.
# CROSS JOIN keeps SQLite to that order (it would start from every span); PostgreSQL does not mind.
CURRENT_SQL = f"""
SELECT {", ".join(f"p.{c}" for c in PRODUCT)}, o.machine_id, o.host_id, s.usd_per_hour,
       {", ".join(f"r.{c}" for c in RATES)}, l.details, u.observed_at, u.source
FROM products p
CROSS JOIN latest l
CROSS JOIN offers o
CROSS JOIN spans s
CROSS JOIN rates r
LEFT JOIN polls u ON u.id = l.confirmed_by
WHERE l.product_id = p.id AND o.id = l.offer_id
  AND s.offer_id = l.offer_id AND s.until_at IS NULL AND r.id = s.rates_id
"""  # noqa: S608  only names of columns go in
CURRENT_ORDER = " ORDER BY l.offer_id"


STATES_SQL = """
SELECT provider, missing, unreachable_until, reason, tried_at FROM provider_state ORDER BY provider
"""


def where_gpus(gpus: Collection[str] | None) -> tuple[str, tuple[str, ...]]:
    """What to add to a WHERE over products p, with its values."""
    if gpus is None:
        return "", ()
    names = tuple(sorted(gpus))
    return f" AND p.gpu IN ({', '.join('?' * len(names)) or 'NULL'})", names


def kept_of(row: Sequence[Any]) -> Kept:
    """One row of COVERAGE_SQL."""
    poll_id, provider, scope, observed_at, source = row
    return Kept(
        poll_id=poll_id,
        provider=provider,
        scope=scope_of(scope),
        observed_at=moment(observed_at),
        source=source,
    )


class Coverage:
    """Which poll last looked where an offer is. Polls cover by GPU, market and verification alone."""

    def __init__(self, kept: Iterable[Kept]) -> None:
        self.newest_first = sorted(kept, key=lambda k: k.observed_at, reverse=True)
        self._found: dict[tuple[Any, ...], Kept | None] = {}

    def of(self, offer: Offer) -> Kept | None:
        """The newest kept poll whose scope covers the offer."""
        asked = (offer.provider, offer.gpu, offer.market, offer.verified)
        if asked not in self._found:
            covering = (
                k for k in self.newest_first if k.provider == offer.provider and k.scope.covers(offer)
            )
            self._found[asked] = next(covering, None)
        return self._found[asked]

    def freshness(self, query: OfferQuery) -> dict[str, datetime | None]:
        """When each provider was last asked for all that the query asks for; None = never."""
        found: dict[str, datetime | None] = {}
        for kept in self.newest_first:
            if includes(kept.scope, query) and found.get(kept.provider) is None:
                found[kept.provider] = kept.observed_at
            else:
                found.setdefault(kept.provider, None)
        return found

    def newest(self) -> dict[str, datetime]:
        """When each provider was last polled, whatever the scope."""
        return {k.provider: k.observed_at for k in reversed(self.newest_first)}


def priced(rows: Iterable[Sequence[Any]], coverage: Coverage) -> list[Priced]:
    """Rows of CURRENT_SQL as offers, each with the poll that last confirmed it.

    An offer that newer polls could not speak for keeps the poll that saw it (latest.confirmed_by).
    """
    found = []
    for row in rows:
        product, (machine_id, host_id, usd_micros) = row[:11], row[11:14]
        rates, (volatile, frozen_at, frozen_source) = row[14:23], row[23:26]
        offer = offer_of(product, machine_id, host_id, usd_micros, rates, volatile)
        confirming = coverage.of(offer)
        if frozen_at is not None:
            as_of, source = maybe_moment(frozen_at), frozen_source
        else:
            as_of, source = (confirming.observed_at, confirming.source) if confirming else (None, "")
        found.append(Priced(offer=offer, source=source, as_of=as_of, live=True))
    return found


def state_of(row: Sequence[Any]) -> ProviderState:
    """One row of provider_state, in the order of its columns."""
    provider, missing, unreachable_until, reason, tried_at = row
    return ProviderState(
        provider=provider,
        missing=missing,
        unreachable_until=maybe_moment(unreachable_until),
        reason=reason,
        tried_at=maybe_moment(tried_at),
    )
