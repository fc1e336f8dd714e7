"""Lambda Cloud: on-demand instances by region. Feeds prices/poll; lambda_nodes.py rents them.

One call lists every instance type with its price in cents for the whole instance and the regions that
have capacity now. There is no keyless feed, no spot market and no egress fee in the API. Shapes: the
vendor's OpenAPI document 1.8.3; regions and types grow, so both are read as open strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from gpubroker import gpus
from gpubroker.errors import ConfigError, MissingCredentials, PayloadChanged
from gpubroker.gpus import GpuMatch
from gpubroker.http import HttpClient
from gpubroker.model import Offer, OfferQuery, Parsed, Skipped
from gpubroker.provider import Access, ProviderContext
from gpubroker_providers._vendor import ask, kind, needed, plain_text, refuse_drift, usd, whole
from gpubroker_providers.lambda_nodes import ALL_REQUESTS, KEY_VARIABLE, NAME, LambdaNodes
from gpubroker_providers.lambda_volumes import LambdaVolumes

BASE_URL = "https://cloud.lambda.ai/api/v1"
_CENT = Decimal("0.01")
_LIST = "GET /instance-types"
# Outermost first, so that a drift is named where it begins.
_REQUIRED = (
    "instance_type",
    "instance_type.price_cents_per_hour",
    "instance_type.specs",
    "instance_type.specs.gpus",
    "instance_type.specs.storage_gib",
    "regions_with_capacity_available",
)
# "8x H100 (80 GB SXM5)": the only place where the API says how much memory a card has.
_DESCRIPTION = re.compile(r"(?:\d+x )?(?P<card>.+) \((?P<vram>\d+) Gi?B(?: (?P<form>\w+))?\)")
_VRAM_TOLERANCE = 0.10
# More than any machine has: a larger figure is a broken row.
_MOST_GPUS = 1024
_MOST_STORAGE_GIB = 1_000_000


def parse_instance_types(payload: object) -> Parsed:
    """Offers from the answer of /instance-types, an object keyed by type name.

    A type gives one offer for each region with capacity, or one without a region and with stock "none".
    Raises PayloadChanged when the answer is something else, holds no type at all (types are listed
    whether or not there is capacity), or lacks a required key in every row.
    """
    rows = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise PayloadChanged(NAME, _LIST, "data", "not an object keyed by instance type")
    refuse_drift(NAME, _LIST, list(rows.values()), "data", _REQUIRED)
    offers: list[Offer] = []
    skipped: list[Skipped] = []
    for name, row in rows.items():
        try:
            offers += _offers(name, row)
        except ValueError as error:
            skipped.append(Skipped(id=plain_text(name) or "(no name)", reason=str(error)))
    return Parsed(offers=tuple(offers), skipped=tuple(skipped), fetched=len(rows), source=_LIST)


def _offers(name: str, row: object) -> list[Offer]:
    """One row's offers. Raises ValueError naming the field that is wrong."""
    instance = _object(row, "instance_type")
    specs = _object(instance, "specs")
    gpu_count = whole(specs, "gpus", 0, _MOST_GPUS)
    if gpu_count == 0:
        raise ValueError("gpus: 0, a CPU instance is out of scope")
    disk_gb = whole(specs, "storage_gib", 0, _MOST_STORAGE_GIB) * 2**30 // 10**9
    card = _card(name, instance)
    nowhere = Offer(
        provider=NAME,
        sku=name,
        gpu=card.name,
        form_factor=card.form_factor,
        gpu_count=gpu_count,
        vram_gib=card.vram_gib,
        market="on_demand",
        preemptible=False,
        usd_per_hour=usd(instance, "price_cents_per_hour", times=_CENT),
        billing_increment_s=60,
        disk_included_gb=disk_gb,
        listing_id=name,
        stock="none",
        disk_max_gb=disk_gb,
        details={key: plain_text(specs[key]) for key in ("vcpus", "memory_gib") if specs.get(key)},
    )
    return [
        replace(nowhere, region=region, stock="available", details={**nowhere.details, **place})
        for region, place in _regions(row).items()
    ] or [nowhere]


def _object(row: object, key: str) -> dict[str, Any]:
    inner = needed(row, key) if isinstance(row, dict) else row
    if not isinstance(inner, dict):
        raise ValueError(f"{key}: {kind(inner)}, not an object")
    return inner


def _card(name: str, instance: dict[str, Any]) -> GpuMatch:
    """The card of a type: by its name where that is known, else by its description.

    A description that contradicts the name on memory is refused: a price must not go to the wrong card.
    The number of GPUs is never taken from here; the API states it.
    """
    text = str(instance.get("gpu_description") or instance.get("description"))
    said = _DESCRIPTION.fullmatch(text)
    card = gpus.resolve(NAME, name) or (said and _described(said["card"], int(said["vram"]), said["form"]))
    if not card:
        raise ValueError(f"gpu_description: unknown GPU {plain_text(text)!r}")
    if said and not _near(int(said["vram"]), card.vram_gib):
        raise ValueError(
            f"gpu_description: {plain_text(text)!r} contradicts {name}, which has {card.vram_gib} GiB"
        )
    return card


def _described(card: str, vram_gib: int, form: str | None) -> GpuMatch | None:
    """The one canonical card that fits the words; None when none or several do."""
    try:
        request = gpus.parse_request(f"{card} {form or ''}")
    except ConfigError:
        return None
    fits = [
        gpu
        for (name, made_as), gpu in gpus.catalogue().items()
        if request.matches(name, made_as) and _near(vram_gib, gpu.vram_gib)
    ]
    if len({gpu.name for gpu in fits}) != 1:
        return None
    return GpuMatch(
        name=fits[0].name,
        form_factor=fits[0].form_factor if len(fits) == 1 else "unstated",
        vram_gib=fits[0].vram_gib,
        gpu_count=None,
    )


def _near(said_gib: int, known_gib: int) -> bool:
    return abs(said_gib - known_gib) <= _VRAM_TOLERANCE * known_gib


def _regions(row: object) -> dict[str, dict[str, str]]:
    """Regions with capacity now, each with its place in words."""
    key = "regions_with_capacity_available"
    regions = row.get(key) if isinstance(row, dict) else None
    if not isinstance(regions, list):
        raise ValueError(f"{key}: {kind(regions)}, not a list")
    found = {}
    for region in regions:
        name = region.get("name") if isinstance(region, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{key}[].name: missing")
        place = region.get("description")
        found[name] = {"place": plain_text(place)} if place else {}
    return found


def base_url(env: Mapping[str, str]) -> str:
    """Where the API is: GPUBROKER_LAMBDA_URL as it is when it has a path, else with /api/v1 added."""
    override = env.get("GPUBROKER_LAMBDA_URL", "").rstrip("/")
    if not override:
        return BASE_URL
    return override if urlsplit(override).path else f"{override}/api/v1"


class LambdaCloud(LambdaNodes, LambdaVolumes):
    """The thin client: a key, the account's one request a second, and the parser above."""

    name = NAME

    def __init__(self, context: ProviderContext) -> None:
        self._context = context
        self._key = context.env.get(KEY_VARIABLE, "").strip()

    def access(self) -> Access:
        """Nothing is live without a key."""
        return Access(
            has_credentials=bool(self._key), missing="" if self._key else KEY_VARIABLE, without="price book"
        )

    def endpoint(self) -> str:
        """See base_url."""
        return base_url(self._context.env)

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """Every type in one call, whatever the query asks: the API has no filters."""
        return parse_instance_types(self._get("/instance-types", deadline_s))

    def check(self, deadline_s: float) -> str:
        """Lists the account's instances, which costs nothing."""
        payload = self._get("/instances", deadline_s)
        running = payload.get("data") if isinstance(payload, dict) else None
        if not isinstance(running, list):
            raise PayloadChanged(NAME, "GET /instances", "data", "not a list")
        return f"key accepted; instances now: {len(running)}"

    def _get(self, path: str, deadline_s: float) -> Any:
        if not self._key:
            raise MissingCredentials(NAME, KEY_VARIABLE)
        clock = self._context.clock
        client = HttpClient(NAME, self.endpoint(), clock, token=self._key)

        def send(left_s: float) -> Any:
            return client.json("GET", path, operation=f"GET {path}", deadline_s=left_s)

        slot = ALL_REQUESTS
        end_s = clock.monotonic_s() + deadline_s
        return ask(self._context, NAME, slot.endpoint, slot.interval_s, end_s, send)
