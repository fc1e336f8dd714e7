"""vast.ai: a marketplace of hosts. One search per market gives every offer with its machine.

poll -> Vast.offers -> POST /api/v0/bundles/ (on-demand, bid, reserved) -> parse_offers -> Parsed

Facts are from vast's OpenAPI description and public clients. The search works without a key, then
limited by address; with one it counts against the account's daily quota. The answer has no pages: one that
reaches the limit was cut, and is asked again in parts.

Nodes are rented by what it inherits (vast_nodes.py).

Prices are for the whole offer. `dph_total` includes the disk that the search names
(`allocated_storage`); `min_bid` does not. Storage is USD per GB and month, transfer USD per GB both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from functools import cache
from typing import Any

from gpubroker import gpus
from gpubroker.errors import MissingCredentials, PayloadChanged, ProviderError, Transient
from gpubroker.http import HttpClient, retry_after_s
from gpubroker.model import Market, Offer, OfferQuery, Parsed, Skipped, Slice
from gpubroker.provider import Access, ProviderContext
from gpubroker_providers._vendor import (
    ask,
    figure,
    needed,
    plain_text,
    refuse_drift,
    row_id,
    rows_at,
    usd,
    whole,
)
from gpubroker_providers.vast_nodes import KEY_VARIABLE, NAME, VastNodes
from gpubroker_providers.vast_usage import VastUsage

BASE_URL = "https://console.vast.ai"
SEARCH_PATH = "/api/v0/bundles/"
LIMIT = 1000
# A constant, the vendor's own default: stored prices must not change because somebody asked for more disk.
ALLOCATED_STORAGE_GB = 8
# The reserved search names no term. Prepaying discounts by the months covered, so one month is the least.
RESERVED_TERM_S = 30 * 86400

_SEARCH = "search offers"
_ENDPOINT = "bundles"
_INTERVAL_S = 1.0
_TYPES: Mapping[Market, str] = {"on_demand": "on-demand", "spot": "bid", "reserved": "reserved"}
# The first of these that a row has is its price.
_PRICE_KEYS: Mapping[Market, tuple[str, ...]] = {
    "on_demand": ("dph_total",),
    "spot": ("min_bid",),
    "reserved": ("discounted_dph_total", "dph_total"),
}
_REQUIRED = ("id", "machine_id", "gpu_name", "gpu_ram", "num_gpus", "verification")
_MOST_GPUS = 64
_USUAL_COUNTS = (1, 2, 4, 8)
# Ours -> vast's. The unit of inet_* is documented both as MB/s and as Mb/s: kept as it comes.
_DETAILS = {
    "duration_s": "duration",
    "dlperf": "dlperf",
    "inet_up": "inet_up",
    "inet_down": "inet_down",
    "cuda_max_good": "cuda_max_good",
    "driver_version": "driver_version",
    "cpu_cores_effective": "cpu_cores_effective",
    "geolocation": "geolocation",
    "hosting_type": "hosting_type",
    "verification": "verification",
}


def parse_offers(payload: object, market: Market) -> Parsed:
    """The answer of one search of this market, decoded with Decimals."""
    return parse_rows(rows_at(NAME, _SEARCH, payload, "offers"), market)


def parse_rows(rows: list[Any], market: Market) -> Parsed:
    """Rows of one market -> offers, one for each (machine, GPU count)."""
    *_, last_price_key = _PRICE_KEYS[market]
    has_price = any(isinstance(r, dict) and _price_key(r, market) in r for r in rows)
    refuse_drift(NAME, _SEARCH, rows, "$.offers", _REQUIRED if has_price else (*_REQUIRED, last_price_key))
    cheapest: dict[tuple[str, int], Offer] = {}
    skipped: list[Skipped] = []
    for index, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"not an object: {plain_text(row)!r}")
            offer = _offer(row, market)
        except ValueError as error:
            skipped.append(Skipped(id=row_id(row, index), reason=str(error)))
            continue
        key = (offer.machine_id, offer.gpu_count)
        kept, dearer = _cheaper_first(cheapest.get(key, offer), offer)
        cheapest[key] = kept
        if dearer is not kept:
            reason = f"machine_id {kept.machine_id}: listed again as {kept.listing_id}, which costs no more"
            skipped.append(Skipped(id=dearer.listing_id, reason=reason))
    return Parsed(
        offers=tuple(cheapest.values()),
        skipped=tuple(skipped),
        fetched=len(rows),
        source=f"POST {SEARCH_PATH}",
    )


def _cheaper_first(one: Offer, other: Offer) -> tuple[Offer, Offer]:
    return (one, other) if one.usd_per_hour <= other.usd_per_hour else (other, one)


def _offer(row: dict[str, Any], market: Market) -> Offer:
    """Raises ValueError naming the field that makes the row no offer."""
    if row.get("rentable") is False:
        raise ValueError("rentable: false")
    name = str(needed(row, "gpu_name"))
    card = _card(name, needed(row, "gpu_ram"))
    price_key = _price_key(row, market)
    if market == "spot" and row.get(price_key) is None:
        raise ValueError("no bid price: not offered as spot (min_bid)")
    details = _details(row)
    if market == "reserved":
        _check_term(row)
        details["term"] = "30 days, assumed: the search names none, and prepaying discounts by the month"
    return Offer(
        provider=NAME,
        sku=name,
        gpu=card.name,
        form_factor=card.form_factor,
        gpu_count=whole(row, "num_gpus", 1, _MOST_GPUS),
        vram_gib=card.vram_gib,
        market=market,
        preemptible=market == "spot",
        region=_country(row.get("geolocation")),
        machine_id=str(whole(row, "machine_id", 0, 10**17)),
        host_id=plain_text(row["host_id"]) if isinstance(row.get("host_id"), int | str) else "",
        usd_per_hour=usd(row, price_key),
        minimum_s=RESERVED_TERM_S if market == "reserved" else 0,
        disk_included_gb=0 if market == "spot" else ALLOCATED_STORAGE_GB,
        storage_usd_per_gb_month=_rate(row, "storage_cost"),
        egress_usd_per_gb=_rate(row, "inet_up_cost"),
        ingress_usd_per_gb=_rate(row, "inet_down_cost"),
        verified=needed(row, "verification") == "verified",
        listing_id=str(whole(row, "id", 0, 10**17)),
        reliability=_share(row.get("reliability2")) or _share(row.get("reliability")),
        disk_max_gb=_gigabytes(row.get("disk_space")),
        details=details,
    )


def _price_key(row: dict[str, Any], market: Market) -> str:
    keys = _PRICE_KEYS[market]
    return next((key for key in keys if row.get(key) is not None), keys[-1])


def _card(name: str, ram_mb: object) -> gpus.GpuMatch:
    """The card by name and memory: vast's "MB" are MiB, and differ a little from host to host."""
    if name not in _spellings():
        raise ValueError(f"gpu_name: {plain_text(name)!r} is not a card we know")
    memory = figure(ram_mb)
    if memory is None or memory <= 0:
        raise ValueError(f"gpu_ram: {plain_text(ram_mb)!r} is not a size in MB")
    card = gpus.resolve(NAME, name, memory_mib=float(memory))
    if card is None:
        raise ValueError(f"gpu_ram: {plain_text(ram_mb)} MB fits no {name}")
    return card


@cache
def _spellings() -> Mapping[str, frozenset[str]]:
    """Vast's GPU names and the cards each can mean, among them those with modified memory."""
    known = {name for name, _ in gpus.catalogue()}
    table = {}
    for spelling, meant in gpus.spellings(NAME).items():
        sizes = [re.compile(rf"{re.escape(name)}-\d+GB") for name in meant]
        table[spelling] = frozenset(meant) | {n for n in known if any(size.fullmatch(n) for size in sizes)}
    return table


def _check_term(row: dict[str, Any]) -> None:
    left_s = figure(row.get("duration"))
    if left_s is not None and left_s < RESERVED_TERM_S:
        raise ValueError(
            f"duration: the host leaves in {left_s / 86400:.1f} days, before a reserved month is over"
        )


def _rate(row: dict[str, Any], key: str) -> Decimal | None:
    """USD; None where the vendor says nothing. A broken rate breaks the row: it is part of the price."""
    return None if row.get(key) is None else usd(row, key, allow_zero=True)


def _share(value: object) -> Decimal | None:
    share = figure(value)
    return share if share is not None and 0 <= share <= 1 else None


def _gigabytes(value: object) -> int | None:
    size = figure(value)
    return int(size) if size is not None and size >= 0 else None


def _country(geolocation: object) -> str:
    """The two letters at the end of "Utah, US"."""
    found = re.search(r"(?:^|[\s,])([A-Z]{2})\s*$", geolocation) if isinstance(geolocation, str) else None
    return found[1] if found else ""


def _details(row: dict[str, Any]) -> dict[str, str]:
    details = {
        ours: plain_text(row[theirs])
        for ours, theirs in _DETAILS.items()
        if (isinstance(row.get(theirs), str) and row[theirs]) or figure(row.get(theirs)) is not None
    }
    # cpu_ram is the whole machine's; the renter gets it by his share of the cores.
    ram, cores, all_cores = (figure(row.get(k)) for k in ("cpu_ram", "cpu_cores_effective", "cpu_cores"))
    if ram and cores and all_cores:
        details["cpu_ram_share_mb"] = f"{ram * cores / all_cores:.0f}"
    return details


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One request's worth of offers, and how to ask for it in smaller parts."""

    market: Market
    verified_only: bool
    names: tuple[str, ...] | None = None  # vast's GPU names; None = every GPU
    counts: Mapping[str, Any] | None = None  # a filter on num_gpus; None = any

    def body(self) -> dict[str, Any]:
        """The filters. Without one on `verified` the server takes it for true: both values lift that."""
        body: dict[str, Any] = {
            "limit": LIMIT,
            "type": _TYPES[self.market],
            "allocated_storage": ALLOCATED_STORAGE_GB,
            "order": [["dph_total", "asc"]],
            "verified": {"eq": True} if self.verified_only else {"in": [True, False]},
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "external": {"eq": False},
        }
        if self.names is not None:
            body["gpu_name"] = {"in": list(self.names)}
        if self.counts is not None:
            body["num_gpus"] = dict(self.counts)
        return body

    def parts(self) -> list[Search]:
        """By GPU name, then by GPU count; [] when it cannot be made smaller."""
        if self.names is None or len(self.names) > 1:
            return [replace(self, names=(name,)) for name in self.names or _spellings()]
        if self.counts is None:
            others = replace(self, counts={"notin": list(_USUAL_COUNTS)})
            return [*(replace(self, counts={"eq": count}) for count in _USUAL_COUNTS), others]
        return []

    def unseen(self, reason: str) -> Slice:
        """This much of the market, as a part that could not be seen whole."""
        cards = None if self.names is None else frozenset(c for n in self.names for c in _spellings()[n])
        return Slice(reason=reason, gpus=cards, market=self.market)


class Vast(VastNodes, VastUsage):
    """The client: needs no account to list, and one to rent."""

    name = NAME

    def __init__(self, context: ProviderContext) -> None:
        self._context = context

    def access(self) -> Access:
        """See PriceSource."""
        if self._key():
            return Access(has_credentials=True, live_without=True)
        return Access(
            has_credentials=False, missing=KEY_VARIABLE, without="keyless search", live_without=True
        )

    def endpoint(self) -> str:
        """See PriceSource."""
        return self._context.env.get("GPUBROKER_VAST_URL") or BASE_URL

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """See PriceSource. Raises only when the first search fails; later gaps are in `incomplete`."""
        end_s = self._context.clock.monotonic_s() + deadline_s
        names = _names_for(query)
        parsed = Parsed(source=f"POST {SEARCH_PATH}", notes=self._notes(query, names))
        if names == ():
            return parsed
        http, answered = self._http(), False
        for market in _TYPES:
            if query.markets is not None and market not in query.markets:
                continue
            search = Search(market=market, verified_only=query.verified_only, names=names)
            if market == "reserved" and not query.whole:
                parsed += Parsed(incomplete=(search.unseen("reserved prices are read by a poll only"),))
                continue
            try:
                rows, cut = self._rows(http, search, end_s)
                parsed += replace(parse_rows(rows, market), incomplete=_merged(cut))
            except ProviderError as error:
                if not answered:
                    raise
                parsed += Parsed(incomplete=(search.unseen(f"{market}: {error.detail}"),))
            answered = True
        return replace(parsed, offers=tuple(o for o in parsed.offers if query.covers(o)))

    def check(self, deadline_s: float) -> str:
        """See PriceSource."""
        if not self._key():
            raise MissingCredentials(NAME, KEY_VARIABLE)
        user = self._http().json(
            "GET", "/api/v0/users/current/", operation="show user", deadline_s=deadline_s
        )
        if not isinstance(user, dict) or "id" not in user:
            raise PayloadChanged(NAME, "show user", "$.id", "missing")
        return f"{KEY_VARIABLE} is accepted: user {plain_text(user['id'])}"

    def _key(self) -> str:
        return self._context.env.get(KEY_VARIABLE, "").strip()

    def _http(self) -> HttpClient:
        return HttpClient(NAME, self.endpoint(), self._context.clock, token=self._key() or None)

    def _notes(self, query: OfferQuery, names: tuple[str, ...] | None) -> tuple[str, ...]:
        notes = [] if self._key() else [f"{KEY_VARIABLE} is not set: searched without a key"]
        if names == ():
            notes.append(f"vast.ai has no name for {', '.join(sorted(query.gpus or ()))}")
        return tuple(notes)

    def _rows(self, http: HttpClient, search: Search, end_s: float) -> tuple[list[Any], list[Slice]]:
        """The rows of a search, in parts when its answer was cut, and the parts that stayed unseen."""
        rows = self._ask(http, search, end_s)
        if len(rows) < LIMIT:
            return rows, []
        parts = search.parts()
        if not parts:
            return rows, [search.unseen(f"cut at {LIMIT} rows, however narrow the search")]
        # The cut answer stays: it has the cheapest, and GPUs that have no name with us yet.
        latest = dict(_by_id(rows))
        cut: list[Slice] = []
        for part in parts:
            try:
                more, unseen = self._rows(http, part, end_s)
            except ProviderError as error:
                cut.append(part.unseen(f"{part.market}: {error.detail}"))
            else:
                latest.update(_by_id(more))
                cut += unseen
        return list(latest.values()), cut

    def _ask(self, http: HttpClient, search: Search, end_s: float) -> list[Any]:
        def send(left_s: float) -> Any:
            try:
                return http.json(
                    "POST",
                    SEARCH_PATH,
                    operation=_SEARCH,
                    deadline_s=left_s,
                    body=search.body(),
                    classify=self._classify,
                )
            except _QuotaUsedUp as error:
                raise Transient(NAME, _SEARCH, error.detail, retry_after_s=error.seconds) from error

        return rows_at(NAME, _SEARCH, ask(self._context, NAME, _ENDPOINT, _INTERVAL_S, end_s, send), "offers")

    def _classify(self, status: int, headers: Mapping[str, str], text: str) -> ProviderError | None:
        """Vast says 429 for two things: too often (as plain text), and the day's quota is used up."""
        if status != 429:
            return None
        if "search_quota_exceeded" in text:
            return _QuotaUsedUp(self._quota_reset_s(headers.get("X-RateLimit-Reset", "")))
        threshold = re.search(r"threshold=(\d{1,3}(?:\.\d+)?)", text)
        wait_s = retry_after_s(headers) or (float(threshold[1]) if threshold else None)
        return Transient(NAME, _SEARCH, "HTTP 429: searched too often", retry_after_s=wait_s)

    def _quota_reset_s(self, reset: str) -> float:
        """Seconds until the quota is new: by the header's epoch, or at midnight UTC where that is no use."""
        now = self._context.clock.now()
        midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        until_midnight_s = (midnight - now).total_seconds()
        if not re.fullmatch(r"\d{1,12}(\.\d+)?", reset):
            return until_midnight_s
        seconds = float(reset) - now.timestamp()
        return seconds if 0 < seconds <= 2 * 86400 else until_midnight_s


class _QuotaUsedUp(ProviderError):
    """Not a Transient while inside the HTTP client, which would try it again today."""

    def __init__(self, seconds: float) -> None:
        super().__init__(NAME, _SEARCH, "the day's search quota is used up")
        self.seconds = seconds


def _names_for(query: OfferQuery) -> tuple[str, ...] | None:
    """Vast's names for the GPUs asked for; None = no filter, () = vast has none of them."""
    if query.gpus is None:
        return None
    return tuple(name for name, meant in _spellings().items() if meant & query.gpus)


def _by_id(rows: list[Any]) -> Iterator[tuple[object, Any]]:
    """Rows by what tells that two answers hold the same one; a row without an id is only itself."""
    for row in rows:
        number = row.get("id") if isinstance(row, dict) else None
        yield (number if isinstance(number, int) else f"object {id(row)}", row)


def _merged(cut: list[Slice]) -> tuple[Slice, ...]:
    """Unseen parts with one reason as one: fifty GPUs that all met the deadline are one fact."""
    together: dict[tuple[str, Market | None], Slice] = {}
    for part in cut:
        same = together.get((part.reason, part.market), part)
        cards = None if same.gpus is None or part.gpus is None else same.gpus | part.gpus
        together[part.reason, part.market] = replace(part, gpus=cards)
    return tuple(together.values())
