"""The words every stage speaks. Frozen and keyword-only; the unit is the last word of a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal

from gpubroker.errors import ConfigError

Market = Literal["spot", "on_demand", "serverless", "reserved"]
FormFactor = Literal["SXM", "PCIe", "NVL", "unstated"]
MARKETS: tuple[Market, ...] = ("spot", "on_demand", "serverless", "reserved")


def market_of(text: str) -> Market:
    """spot, on-demand ... Raises ConfigError."""
    name = re.sub(r"[-\s]", "_", text.lower())
    if name not in MARKETS:
        raise ConfigError(f"{text!r} is not one of {', '.join(MARKETS)}")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One canonical card in one form factor. Figures are per card, dense, without sparsity.

    `None` means that no source states the figure.
    """

    name: str
    form_factor: FormFactor
    vram_gib: int
    architecture: str
    compute_capability: str
    memory_bandwidth_gb_s: Decimal | None
    bf16_dense_tflops: Decimal | None
    fp16_dense_tflops: Decimal | None
    tdp_w: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one vendor would rent to us at one price.

    Identity is (provider, sku, gpu, form_factor, gpu_count, vram_gib, market, region, zone, cloud,
    machine_id): it outlives one listing. Prices are for the whole offer, in USD, rounded once to the
    micro-dollar.
    """

    # identity
    provider: str
    sku: str  # what the vendor calls it
    gpu: str  # canonical name, gpus.csv
    form_factor: FormFactor
    gpu_count: int
    vram_gib: int  # per GPU
    market: Market
    preemptible: bool
    region: str = ""  # "" = the vendor does not say, or anywhere
    zone: str = ""  # finer than the region: an AWS availability zone id; "" = none
    cloud: str = ""  # the vendor's own tier, such as RunPod's secure and community; "" = one tier
    machine_id: str = ""  # the physical box, where the vendor names it
    host_id: str = ""  # its owner

    # priced terms: a change of any of these is a new price
    usd_per_hour: Decimal  # spot on vast: the lowest bid that runs
    billing_increment_s: int = 1
    minimum_s: int = 0  # billed at least this long; a reserved term's whole length
    disk_included_gb: int = 0  # already inside usd_per_hour
    # None in the next five = the provider's fee table decides; cpu and ram None = included in the price.
    storage_usd_per_gb_month: Decimal | None = None
    egress_usd_per_gb: Decimal | None = None
    ingress_usd_per_gb: Decimal | None = None
    cpu_usd_per_core_hour: Decimal | None = None
    ram_usd_per_gib_hour: Decimal | None = None
    verified: bool | None = None  # None = the vendor does not verify machines

    # volatile: the latest known, never a reason for a new price
    listing_id: str = ""  # what a create call names; may be gone in minutes
    stock: str = ""  # high, medium, low, none; "" = the vendor does not say
    reliability: Decimal | None = None  # share of time up, 0..1
    disk_max_gb: int | None = None
    details: Mapping[str, str] = field(default_factory=dict)  # other facts worth keeping, as the vendor said

    @property
    def usd_per_gpu_hour(self) -> Decimal:
        """Derived for comparing; the bill is for the whole offer."""
        return self.usd_per_hour / self.gpu_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """An offer with where its price comes from."""

    offer: Offer
    source: str  # an API operation, or the price book's own source
    as_of: datetime | None  # when the price was last confirmed; None = its source has no date
    live: bool  # polled from the vendor by us, not from the price book


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A row that was read and left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferQuery:
    """What a poll asks a provider for; also its recorded scope.

    A provider may return more than was asked (the rest is dropped by the caller, without a skip);
    it must say in `Parsed.incomplete` when it could not return all of it.
    """

    gpus: frozenset[str] | None = None  # canonical names; None = every GPU
    markets: frozenset[Market] | None = None  # None = every market
    verified_only: bool = True  # matters only to vendors that verify machines
    whole: bool = True  # False inside a quote: leave out what takes minutes, such as AWS's offers files

    def covers(self, offer: Offer) -> bool:
        """Whether this query would have listed the offer, had it been there."""
        return self.covers_all(offer.gpu, offer.market, offer.verified)

    def covers_all(self, gpu: str, market: str, verified: bool | None) -> bool:
        """The same for all offers of a kind: a scope looks at nothing else."""
        return (
            (self.gpus is None or gpu in self.gpus)
            and (self.markets is None or market in self.markets)
            and not (self.verified_only and verified is False)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a query's scope that a poll could not see whole; None = any."""

    reason: str
    gpus: frozenset[str] | None = None
    market: Market | None = None
    region: str | None = None
    cloud: str | None = None

    def covers(self, offer: Offer) -> bool:
        """Whether an offer that was not listed may still be there."""
        return (
            (self.gpus is None or offer.gpu in self.gpus)
            and (self.market is None or offer.market == self.market)
            and (self.region is None or offer.region == self.region)
            and (self.cloud is None or offer.cloud == self.cloud)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What a provider made of a vendor's answer: nothing is dropped silently.

    fetched counts the vendor's rows that were looked at; every one ends in offers or in skipped
    (one row may give several offers). `incomplete` lists the parts of the scope that were cut or
    failed: there, not being listed says nothing.
    """

    offers: tuple[Offer, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    fetched: int = 0
    incomplete: tuple[Slice, ...] = ()
    source: str = ""  # the operation, for people
    notes: tuple[str, ...] = ()  # what a person should know, such as a missing optional credential

    def __add__(self, other: Parsed) -> Parsed:
        """Both answers of one provider as one."""
        return Parsed(
            offers=self.offers + other.offers,
            skipped=self.skipped + other.skipped,
            fetched=self.fetched + other.fetched,
            incomplete=self.incomplete + other.incomplete,
            source=" + ".join(dict.fromkeys(s for s in (self.source, other.source) if s)),
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )
