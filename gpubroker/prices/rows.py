"""Between an Offer and what the database holds, in plain Python: store.py writes it, fastread.py only reads.

Money is integer micro-dollars and a moment integer seconds since 1970 (UTC). No SQLAlchemy here: importing
it costs more than a whole quote may.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

from gpubroker.model import Offer, OfferQuery, Skipped
from gpubroker.money import from_micros, to_micros

# The newest migration: a database that says something else is older or newer than this code.
REVISION = "0012"
HOUR_S, DAY_S = 3600, 86400

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
Key = tuple[
    int | Product, str
]  # product id (or the product, where the database does not know it), machine id
GPU = PRODUCT.index("gpu")
product_of: Callable[[Offer], Product] = attrgetter(*PRODUCT)
_rates_of = attrgetter(*RATES)
# A Decimal that a plugin left among the details is text to us.
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


class Rates(NamedTuple):
    """The priced terms but the price, once for all offers that share them."""

    digest: str  # equal terms, equal digest
    values: tuple[Any, ...]  # in the order of RATES


class Listed(NamedTuple):
    """An offer that a poll brought, with its priced terms as the database holds them."""

    usd_micros: int
    rates: Rates
    offer: Offer

    @property
    def product(self) -> Product:
        """Not a field: of 20,000 that a poll compares, only those that are new need it again."""
        return product_of(self.offer)


class Volatile(NamedTuple):
    """What may change without being a new price, by the names it has in an Offer."""

    host_id: str = ""
    listing_id: str = ""
    stock: str = ""
    reliability: Decimal | None = None
    disk_max_gb: int | None = None
    details: Mapping[str, str] = {}


# A NamedTuple's own constructor is Python code, and 20,000 are made at every poll.
_new_listed = tuple.__new__
NOTHING = Volatile()
_volatile_of = attrgetter(*Volatile._fields)


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


def listing(
    offers: Iterable[Offer], query: OfferQuery, product_ids: Mapping[Product, int]
) -> tuple[dict[Key, Listed], list[Skipped]]:
    """The offers within the query's scope, one each, and those left out, with the reason.

    Offers outside the scope are dropped without a skip: nobody asked for them. Of one offer that is listed
    more than once the cheapest is kept.
    """
    found: dict[Key, Listed] = {}
    skipped = []
    asked = list(filter(query.covers, offers))
    for offer, terms, product in zip(asked, map(_rates_of, asked), map(product_of, asked), strict=True):
        try:
            new = _new_listed(Listed, (_micros(offer.usd_per_hour), _rates(terms), offer))
        except (TypeError, ValueError) as error:
            skipped.append(Skipped(id=_label(offer), reason=str(error)))
            continue
        key = (product_ids.get(product, product), offer.machine_id)
        other = found.setdefault(key, new)
        if other is not new:
            cheap, dear = sorted((other, new), key=lambda row: row.usd_micros)
            found[key] = cheap
            skipped.append(Skipped(id=_label(dear.offer), reason="the same offer was listed cheaper"))
    return found, skipped


def _label(offer: Offer) -> str:
    return offer.listing_id or offer.machine_id or offer.sku


# Both are cached because prices repeat, and typed so that a float equal to a known Decimal is still refused.
@lru_cache(maxsize=65536, typed=True)
def _micros(amount: Decimal) -> int:
    return to_micros(amount)


@lru_cache(maxsize=65536, typed=True)
def _rates(terms: tuple[Any, ...]) -> Rates:
    increment_s, minimum_s, disk_gb, *amounts, verified = terms
    micros = (None if amount is None else to_micros(amount) for amount in amounts)
    values = (increment_s, minimum_s, disk_gb, *micros, verified)
    return Rates(",".join("" if value is None else str(int(value)) for value in values), values)


def listings_json(offers: Iterable[tuple[int, Offer | Volatile]]) -> str:
    """What is volatile of these (offer id, offer): in columns, a table for each set of detail names.

    20,000 offers at every poll: columns take half the room and time of an object an offer.
    """
    pairs = list(offers)
    names_of = [tuple(offer.details) for _, offer in pairs]
    kinds = dict.fromkeys(names_of)
    if len(kinds) == 1:  # the usual case, and the quick one
        return _encode([_columns(names_of[0], pairs)])
    alike: dict[tuple[str, ...], list[tuple[int, Offer | Volatile]]] = {names: [] for names in kinds}
    for names, pair in zip(names_of, pairs, strict=True):
        alike[names].append(pair)
    return _encode([_columns(names, pairs) for names, pairs in alike.items()])


def _columns(names: tuple[str, ...], pairs: Sequence[tuple[int, Offer | Volatile]]) -> dict[str, Any]:
    offer_ids, offers = zip(*pairs, strict=True)
    host_ids, listing_ids, stocks, shares, disks, details = zip(*map(_volatile_of, offers), strict=True)
    return {
        "offer_id": offer_ids,
        "host_id": host_ids,
        "listing_id": listing_ids,
        "stock": stocks,
        "reliability": [None if share is None else str(share) for share in shares],
        "disk_max_gb": disks,
        "names": names,
        "details": [*zip(*[said.values() for said in details], strict=True)],
    }


def listings_of(text: str) -> dict[int, Volatile]:
    """What listings_json wrote, by offer id."""
    found = {}
    for table in json.loads(text):
        names = table["names"]
        said = zip(*table["details"], strict=True) if names else repeat(())
        columns = (table[name] for name in ("host_id", "listing_id", "stock", "reliability", "disk_max_gb"))
        for offer_id, host_id, listing_id, stock, reliability, disk_gb, values in zip(
            table["offer_id"], *columns, said, strict=False
        ):
            found[offer_id] = Volatile(
                host_id,
                listing_id,
                stock,
                None if reliability is None else Decimal(reliability),
                disk_gb,
                dict(zip(names, values, strict=True)),
            )
    return found


@lru_cache(maxsize=65536)
def _usd(micros: int | None) -> Decimal | None:
    return None if micros is None else from_micros(micros)


def offer_of(
    product: Sequence[Any],
    machine_id: str,
    usd_micros: int,
    rates: Sequence[Any],
    volatile: Volatile = NOTHING,
) -> Offer:
    """An offer from its stored values."""
    provider, sku, gpu, form_factor, gpu_count, vram_gib, market, preemptible, region, zone, cloud = product
    increment_s, minimum_s, disk_gb, storage, egress, ingress, cpu, ram, verified = rates
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
        host_id=volatile.host_id,
        usd_per_hour=from_micros(usd_micros),
        billing_increment_s=increment_s,
        minimum_s=minimum_s,
        disk_included_gb=disk_gb,
        storage_usd_per_gb_month=_usd(storage),
        egress_usd_per_gb=_usd(egress),
        ingress_usd_per_gb=_usd(ingress),
        cpu_usd_per_core_hour=_usd(cpu),
        ram_usd_per_gib_hour=_usd(ram),
        verified=None if verified is None else bool(verified),
        listing_id=volatile.listing_id,
        stock=volatile.stock,
        reliability=volatile.reliability,
        disk_max_gb=volatile.disk_max_gb,
        details=volatile.details,
    )
