"""Modal: GPU sandboxes at the workspace's own rates. Feeds prices/poll; sandboxes are run in modal_nodes.py.

Modal has no public price feed. `modal.Workspace.from_context().billing.rates()` (SDK 1.5.4 and later, token
needed) gives one flat mapping of name -> Decimal. Its comment in the SDK's protocol file: compute rates are
USD per unit and hour, storage is per GiB and month. The names say the unit again:

    gpu_hour_cost_h100, gpu_hour_cost_a100_80gb, gpu_hour_cost_a10g, gpu_hour_cost_rtx6000, ...
    cpu_hour_cost_sandbox, mem_gib_hour_cost_sandbox; without _sandbox: what functions pay
    volume_storage_gib_month_cost, egress_gib_cost

Jobs run in sandboxes: on a GPU those are preemptible, and their CPU (per physical core) and RAM cost about
three times what functions pay. Pinning a region makes GPU, CPU and RAM dearer; by how much is a dated fee,
not part of the rates. Counts go to 8, of A10 to 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from gpubroker import gpus
from gpubroker.errors import PayloadChanged
from gpubroker.model import Offer, OfferQuery, Parsed, Skipped
from gpubroker.money import SECONDS_PER_HOUR, parse_usd
from gpubroker.plan.fees import FeeTable
from gpubroker.provider import Access
from gpubroker_providers._vendor import plain_text
from gpubroker_providers.modal_nodes import ModalNodes
from gpubroker_providers.modal_sdk import NAME, classed
from gpubroker_providers.modal_volumes import ModalVolumes

_RATES = "billing.rates"
_GPU_RATE = re.compile(r"gpu_(?P<unit>hour|second)_cost_(?P<card>\w+)")
_PER_HOUR = {"hour": 1, "second": SECONDS_PER_HOUR}
_CPU, _RAM = "cpu_hour_cost_sandbox", "mem_gib_hour_cost_sandbox"
_FUNCTION_RATES = ("cpu_hour_cost", "mem_gib_hour_cost")
# Where the name of a rate is not the gpu= string in lower case.
_GPU_STRINGS = {"a10g": ("A10",), "rtx6000": ("RTX-PRO-6000",), "h100": ("H100", "H100!")}
_MOST_GPUS = {"A10": 4}
_UPGRADES = {"H100": 'may be an H200 at this price; "H100!" forbids it', "H100!": "an H100, never an H200"}
# Not part of an offer's price, kept beside it as the vendor said.
_BESIDE = {
    "volume_storage_gib_month_cost": "volume_usd_per_gib_month",
    "egress_gib_cost": "egress_usd_per_gib",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What every GPU of the workspace has in common. Multipliers are by region; "" is no region.

    Rates are as they came, so that they are rounded once, with the multiplier.
    """

    cpu_usd_per_core_hour: object
    ram_usd_per_gib_hour: object
    multipliers: Mapping[str, Decimal]
    details: Mapping[str, str]


def parse_rates(rates: object, fees: FeeTable) -> Parsed:
    """Offers from the workspace's rates: every GPU in every count and region.

    `fees` gives what the rates leave out: the region multipliers, and the CPU and RAM rates when they are
    missing or broken (a note says so). Raises PayloadChanged when this is no mapping or has no GPU rate.
    """
    if not isinstance(rates, Mapping):
        raise PayloadChanged(NAME, _RATES, "rates", f"a {type(rates).__name__}, not a mapping")
    if not any(_GPU_RATE.fullmatch(str(key)) for key in rates):
        raise PayloadChanged(NAME, _RATES, "rates.gpu_hour_cost_*", "no GPU has a rate")
    good: dict[str, object] = {}
    skipped: list[Skipped] = []
    for key in (_CPU, _RAM, *_BESIDE):
        try:
            if key in rates:
                parse_usd(rates[key], allow_zero=True)
                good[key] = rates[key]
        except ValueError as error:
            skipped.append(Skipped(id=key, reason=str(error)))
    shared = _Shared(
        cpu_usd_per_core_hour=good.get(_CPU, _listed(fees, "cpu_sandbox_usd_per_core_second")),
        ram_usd_per_gib_hour=good.get(_RAM, _listed(fees, "ram_sandbox_usd_per_gib_second")),
        multipliers=_multipliers(fees),
        details={name: plain_text(good[key]) for key, name in _BESIDE.items() if key in good},
    )
    offers: list[Offer] = []
    for key in [key for key in rates if key not in (_CPU, _RAM, *_BESIDE, *_FUNCTION_RATES)]:
        rate = _GPU_RATE.fullmatch(str(key))
        try:
            if rate is None:
                raise ValueError("not a rate that gpubroker knows")
            found = list(_offers(rate["card"], rates[key], _PER_HOUR[rate["unit"]], shared))
            if found[0].sku in {offer.sku for offer in offers}:
                raise ValueError(f"{found[0].sku} has a rate already")
            offers += found
        except ValueError as error:
            skipped.append(Skipped(id=plain_text(key), reason=str(error)))
    notes = [
        f"{key} is not among the rates: the list price stands in" for key in (_CPU, _RAM) if key not in good
    ]
    return Parsed(
        offers=tuple(offers),
        skipped=tuple(skipped),
        fetched=len(rates),
        source=_RATES,
        notes=tuple(notes),
    )


def _offers(card: str, value: object, per_hour: int, shared: _Shared) -> Iterator[Offer]:
    """One GPU rate as offers. Raises ValueError for an unknown GPU or a value that is no price."""
    for string in _GPU_STRINGS.get(card, (card.upper().replace("_", "-"),)):
        gpu = gpus.resolve(NAME, string)
        if gpu is None:
            raise ValueError(f"unknown GPU {string!r}")
        for count in range(1, _MOST_GPUS.get(string, 8) + 1):
            sku = string if count == 1 else f"{string}:{count}"
            for region, multiplier in shared.multipliers.items():
                yield Offer(
                    provider=NAME,
                    sku=sku,
                    gpu=gpu.name,
                    form_factor=gpu.form_factor,
                    gpu_count=count,
                    vram_gib=gpu.vram_gib,
                    market="serverless",
                    preemptible=True,
                    region=region,
                    usd_per_hour=parse_usd(value, per_hour_factor=per_hour * count * multiplier),
                    cpu_usd_per_core_hour=parse_usd(
                        shared.cpu_usd_per_core_hour, per_hour_factor=multiplier, allow_zero=True
                    ),
                    ram_usd_per_gib_hour=parse_usd(
                        shared.ram_usd_per_gib_hour, per_hour_factor=multiplier, allow_zero=True
                    ),
                    listing_id=sku,
                    details={**shared.details, **_said(string, region, multiplier)},
                )


def _said(string: str, region: str, multiplier: Decimal) -> dict[str, str]:
    upgrade = {"upgrade": _UPGRADES[string]} if string in _UPGRADES else {}
    return {**upgrade, "region_multiplier": f"{multiplier:f}"} if region else upgrade


def _multipliers(fees: FeeTable) -> dict[str, Decimal]:
    """By region. One whose multiplier nobody states is not offered: it would look cheaper than it is."""
    broad = fees.get(NAME, "region_multiplier_broad")
    narrow = fees.get(NAME, "region_multiplier_narrow")
    regions = {"": Decimal(1), "us": broad, "eu": broad, "us-east": narrow}
    return {region: multiplier for region, multiplier in regions.items() if multiplier is not None}


def _listed(fees: FeeTable, item: str) -> Decimal:
    return (fees.get(NAME, item) or Decimal(0)) * SECONDS_PER_HOUR


class Modal(ModalNodes, ModalVolumes):
    """The thin client around the SDK: the rates, and sandboxes as nodes."""

    name = NAME

    def access(self) -> Access:
        """The token is in two variables or in the file that `modal token` writes."""
        missing = self._sdk.missing()
        return Access(has_credentials=not missing, missing=missing, without="price book")

    def endpoint(self) -> str:
        """The first of the SDK's servers."""
        return self._context.env.get("MODAL_SERVER_URL", "").partition(",")[0] or "https://api.modal.com"

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """All rates in one call, whatever the query asks."""
        return parse_rates(self._rates(deadline_s), FeeTable.load(self._context.settings.fees))

    def check(self, deadline_s: float) -> str:
        """Reading the rates costs nothing and needs a good token."""
        return f"token accepted; the workspace has {len(self._rates(deadline_s))} rates"

    def _rates(self, deadline_s: float) -> dict[str, Decimal]:
        return self._sdk.ask(_ask, deadline_s, partial(classed, _RATES))


async def _ask() -> dict[str, Decimal]:
    import modal

    return dict(await modal.Workspace.from_context().billing.rates.aio())
