"""What a provider charges beside the GPU: transfer, storage and the seconds before the work starts. Pure.

The dated tables are data files (scripts/build_data.py); the user's own figures win over them. A fee that
nobody has stated is a charge of 0 that says so: unknown is not free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from typing import Literal

from gpubroker.errors import ConfigError
from gpubroker.gpus import read_table
from gpubroker.money import round_usd

Direction = Literal["egress", "ingress"]
StorageKind = Literal["storage_running", "storage_stopped", "network_volume", "bucket"]

# The first words that a row's status may have, the most trusted first.
TRUST = (
    "official",
    "vendor page",
    "third party",
    "agrees",
    "derived",
    "inferred",
    "recalled",
    "example",
    "assumed",
)
CONFLICT = "conflict"  # kept in the table so that a person can see it, never used
OWN_CONFIG = "your config"
UNKNOWN = "unknown"

# Items that may be set in the config for any provider, plugins included.
COMMON_ITEMS = frozenset(
    (
        "egress_usd_per_gb",
        "ingress_usd_per_gb",
        "storage_running_usd_per_gb_month",
        "storage_stopped_usd_per_gb_month",
        "network_volume_usd_per_gb_month",
        "billed_startup_s",
    )
)
_GB_IN_GIB = Decimal(10**9) / Decimal(2**30)
# Where a fee depends on the region, the one whose fee stands for regions that the table does not have.
_USUAL_REGION = {"aws": "us-east-1"}
_VOLUME = "network_volume_usd_per_gb_month"
# What a bucket is called where it is not the network volume.
_BUCKETS = {"aws": "s3_standard_usd_per_gb_month", "cloudflare-r2": "storage_usd_per_gb_month"}
# Vast bills GB * storage_cost / 30 / 24; the others bill by the year's average month.
_HOURS_PER_MONTH = {"vast": 720}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fee:
    """One row of the table: what a unit costs from `start` units on, up to where the next tier starts."""

    item: str
    value: Decimal
    unit: str
    start: Decimal
    region: str
    as_of: str  # an ISO date, perhaps without day or month; "" = undated
    source: str
    status: str

    @property
    def unit_name(self) -> str:
        """GB or GiB, or what else the fee is charged by."""
        return self.unit.partition("/")[2].partition("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What something costs, rounded once to the micro-dollar, how it was worked out and who says so."""

    usd: Decimal
    how: str
    source: str
    as_of: str
    status: str

    @property
    def source_text(self) -> str:
        """One line for people: how far to trust it, how old it is, where it is from."""
        if self.status in (OWN_CONFIG, UNKNOWN):
            return self.source
        return f"{self.status}, {self.as_of or 'undated'}: {self.source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """Seconds that are billed before useful work: what is billed of the boot, image pull, preflight."""

    billed_s: int
    source: str
    as_of: str
    status: str


class FeeTable:
    """The fees of all providers, with the user's overrides on top."""

    def __init__(
        self,
        fees: Iterable[Mapping[str, str]],
        startups: Iterable[Mapping[str, str]] = (),
        overrides: Mapping[tuple[str, str], Decimal] | None = None,
    ) -> None:
        self._fees: dict[tuple[str, str], list[Mapping[str, str]]] = {}
        for row in fees:
            self._fees.setdefault((row["provider"], row["item"]), []).append(row)
        self._startups = {(row["provider"], row["market"]): row for row in startups}
        self._overrides = dict(overrides or {})
        # What was looked up, kept: a quote asks the same of thousands of offers.
        self._known_tiers: dict[tuple[str, str, str], list[Fee]] = {}
        self._known_storage: dict[tuple[str, StorageKind], Charge] = {}
        self._known_startups: dict[tuple[str, str], Startup] = {}
        for provider, item in self._overrides:
            if item not in COMMON_ITEMS and (provider, item) not in self._fees:
                raise ConfigError(
                    f"fees.{provider}: there is no fee {item!r}; there are {', '.join(sorted(COMMON_ITEMS))}"
                )

    @classmethod
    def load(cls, overrides: Mapping[tuple[str, str], Decimal] | None = None) -> FeeTable:
        """The packaged tables. Raises ConfigError for an override of a fee that does not exist."""
        return cls(read_table("fees.csv"), read_table("startup.csv"), overrides)

    def transfer_usd(
        self,
        provider: str,
        direction: Direction,
        gb: Decimal,
        *,
        region: str = "",
        month_so_far_gb: Decimal = Decimal(0),
    ) -> Charge:
        """Moving `gb` (10^9 bytes) in or out, on top of what the account has moved this month."""
        item = f"{direction}_usd_per_gb"
        own = self._overrides.get((provider, item))
        if own is not None:
            return _own(round_usd(gb * own), f"{gb:f} GB x ${own:f}/GB")
        tiers = self._tiers(provider, item, region)
        if not tiers:
            return _unknown(f"no {direction} fee of {provider} is known")
        return self._charge(provider, item, region, _spread(tiers, gb, month_so_far_gb))

    def storage_usd_per_gb_month(self, provider: str, kind: StorageKind = "storage_running") -> Charge:
        """The rate for one GB (10^9 bytes) and month; of the first tier, where there are several."""
        if (provider, kind) not in self._known_storage:
            self._known_storage[provider, kind] = self._storage(provider, kind)
        return self._known_storage[provider, kind]

    def _storage(self, provider: str, kind: StorageKind) -> Charge:
        item = _storage_item(provider, kind)
        own = self._overrides.get((provider, item))
        if own is not None:
            return _own(round_usd(own), f"${own:f}/GB-month")
        tiers = self._tiers(provider, item, "")
        if not tiers:
            return _unknown(f"no {kind.replace('_', ' ')} fee of {provider} is known")
        return self._charge(provider, item, "", _spread(tiers[:1], Decimal(1), tiers[0].start))

    def held_usd(
        self, provider: str, gb: Decimal, hours: Decimal, *, kind: StorageKind = "network_volume"
    ) -> Charge:
        """Holding `gb` (10^9 bytes) for some hours, tier by tier, in a bucket or on a network volume."""
        item = _storage_item(provider, kind)
        month_h = self.hours_per_month(provider)
        lasting = f"x {hours:.4f} h / {month_h} h"
        own = self._overrides.get((provider, item))
        if own is not None:
            usd = round_usd(gb * own * hours / month_h)
            return _own(usd, f"{_short(gb)} GB x ${own:f}/GB-month {lasting}")
        tiers = self._tiers(provider, item, "")
        if not tiers:
            return _unknown(f"no {kind.replace('_', ' ')} fee of {provider} is known")
        charge = self._charge(provider, item, "", _spread(tiers, gb, Decimal(0)), share=hours / month_h)
        return replace(charge, how=f"({charge.how}) a month {lasting}")

    def has_volumes(self, provider: str) -> bool:
        """Whether a network volume of the provider's has a price."""
        return (provider, _VOLUME) in self._fees or (provider, _VOLUME) in self._overrides

    def stores(self) -> frozenset[str]:
        """Providers that can keep checkpoints and data: those with a fee for leaving and one for holding."""
        return frozenset(
            provider
            for provider, item in self._fees
            if item == "egress_usd_per_gb" and (provider, _BUCKETS.get(provider, _VOLUME)) in self._fees
        )

    def get(self, provider: str, item: str) -> Decimal | None:
        """One figure as the table has it, unrounded; None when nobody states it."""
        own = self._overrides.get((provider, item))
        if own is not None:
            return own
        tiers = self._tiers(provider, item, "")
        return tiers[0].value if tiers else None

    def source_of(self, provider: str, item: str) -> str:
        """Who says what `get` gives, in one line."""
        if (provider, item) in self._overrides:
            return OWN_CONFIG
        fee = self._tiers(provider, item, "")[0]
        return f"{fee.status}, {fee.as_of or 'undated'}: {fee.source}"

    def hours_per_month(self, provider: str) -> int:
        """How many hours the provider's storage month has."""
        return _HOURS_PER_MONTH.get(provider, 730)

    def startup(self, provider: str, market: str) -> Startup:
        """What is billed before the work starts; 0 and unknown for a provider nobody has measured."""
        if (provider, market) not in self._known_startups:
            self._known_startups[provider, market] = self._startup(provider, market)
        return self._known_startups[provider, market]

    def _startup(self, provider: str, market: str) -> Startup:
        own = self._overrides.get((provider, "billed_startup_s"))
        if own is not None:
            return Startup(billed_s=int(own), source=OWN_CONFIG, as_of="", status=OWN_CONFIG)
        row = self._startups.get((provider, market)) or self._startups.get((provider, ""))
        if row is None:
            return Startup(billed_s=0, source="no start-up time is known", as_of="", status=UNKNOWN)
        return Startup(
            billed_s=int(row["billed_startup_s"]),
            source=f"{row['status']}: {row['source']}",
            as_of=row["as_of"],
            status=row["status"],
        )

    def _tiers(self, provider: str, item: str, region: str) -> list[Fee]:
        """The tiers in force in a region, in order, each from its own most trusted, newest row."""
        key = (provider, item, region)
        if key not in self._known_tiers:
            self._known_tiers[key] = self._find_tiers(provider, item, region)
        return self._known_tiers[key]

    def _find_tiers(self, provider: str, item: str, region: str) -> list[Fee]:
        usual = _USUAL_REGION.get(provider, "")
        rows = self._fees.get((provider, item), ())
        here = _most_trusted(row for row in rows if row["region"] == region) if region else []
        anywhere = _most_trusted(row for row in rows if row["region"] in ("", usual))
        if not here:
            return anywhere
        # A region may have rows for its middle tiers only: below them the usual ones hold, above them its
        # own last rate does, because the usual region is the cheap one.
        below = [tier for tier in anywhere if tier.start < here[0].start]
        return below + here

    def _charge(
        self,
        provider: str,
        item: str,
        region: str,
        parts: Sequence[tuple[Decimal, Fee]],
        share: Decimal = Decimal(1),
    ) -> Charge:
        with localcontext(prec=60):
            usd = round_usd(share * sum((amount * fee.value for amount, fee in parts), Decimal(0)))
        how = " + ".join(
            f"{_short(amount)} {fee.unit_name} x ${fee.value:f}/{fee.unit_name}" for amount, fee in parts
        )
        elsewhere = {fee.region for _, fee in parts} - {"", region}
        if region and elsewhere:
            how += f" (the rate of {', '.join(sorted(elsewhere))})"
        disputed = any(row["status"] == CONFLICT for row in self._fees[provider, item])
        return Charge(
            usd=usd,
            how=how,
            source="; ".join(dict.fromkeys(fee.source for _, fee in parts)),
            as_of=min(fee.as_of for _, fee in parts),
            status=parts[0][1].status + (", disputed" if disputed else ""),
        )


def _storage_item(provider: str, kind: StorageKind) -> str:
    """A bucket at a provider that sells none by that name is its network volume."""
    return _BUCKETS.get(provider, _VOLUME) if kind == "bucket" else f"{kind}_usd_per_gb_month"


def _own(usd: Decimal, how: str) -> Charge:
    return Charge(usd=usd, how=how, source=OWN_CONFIG, as_of="", status=OWN_CONFIG)


def _unknown(text: str) -> Charge:
    return Charge(usd=Decimal(0), how=text, source=text, as_of="", status=UNKNOWN)


def trust(status: str) -> int | None:
    """How far a status is trusted, 0 best; None for one that must not be used."""
    return next((rank for rank, word in enumerate(TRUST) if status.startswith(word)), None)


def is_figure(text: str) -> bool:
    """Whether a row states one number, not a range and not nothing."""
    return text.replace(".", "", 1).isdigit()


def _most_trusted(rows: Iterable[Mapping[str, str]]) -> list[Fee]:
    """One fee a tier: of the rows with figures, the most trusted, and of those the newest."""
    usable = [
        (rank, row) for row in rows if (rank := trust(row["status"])) is not None and is_figure(row["value"])
    ]
    if not usable:
        return []
    best = min(rank for rank, _ in usable)
    newest: dict[Decimal, Mapping[str, str]] = {}
    for rank, row in usable:
        start = Decimal(row["tier_from"] or 0)
        if rank == best and (start not in newest or row["as_of"] > newest[start]["as_of"]):
            newest[start] = row
    return [
        Fee(
            item=row["item"],
            value=Decimal(row["value"]),
            unit=row["unit"],
            start=start,
            region=row["region"],
            as_of=row["as_of"],
            source=row["source"],
            status=row["status"],
        )
        for start, row in sorted(newest.items())
    ]


def _spread(tiers: Sequence[Fee], gb: Decimal, so_far_gb: Decimal) -> list[tuple[Decimal, Fee]]:
    """How much of the amount falls into each tier, in the tiers' own unit; at least one part, perhaps of 0.

    A tier ends where the next one starts; the last one has no end; below the first one nothing is charged.
    """
    with localcontext(prec=60):
        factor = _GB_IN_GIB if tiers[0].unit_name == "GiB" else Decimal(1)
        low, high = so_far_gb * factor, (so_far_gb + gb) * factor
        parts = []
        for tier, following in zip(tiers, [*tiers[1:], None], strict=True):
            end = high if following is None else min(high, following.start)
            amount = end - max(low, tier.start)
            if amount > 0:
                parts.append((amount, tier))
    return parts or [(Decimal(0), tiers[0])]


def _short(amount: Decimal) -> str:
    return f"{amount:.3f}".rstrip("0").rstrip(".") if "." in f"{amount:f}" else f"{amount:f}"
