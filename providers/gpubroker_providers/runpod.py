"""RunPod: list prices by GPU type, in a secure and a community cloud.

poll -> RunPod.offers -> with a key    GET /v2/catalog/gpus, once a cloud -> parse_catalog   -> Parsed
                         without one   POST /graphql gpuTypes, once       -> parse_gpu_types -> Parsed

Facts are from RunPod's REST v2 description and docs. Both answers give USD per hour for one GPU; a pod
with several costs that many times as much. GraphQL retires in early 2027; REST answers nobody without a
key.

Pods are rented and volumes kept by what it inherits (runpod_nodes.py, runpod_volumes.py).

There is never a spot offer here: spot pods ended in 2026, and the fields that are left of them
(`minimumBidPrice` in GraphQL) name no price that anyone can rent at. Term prices come from GraphQL only,
and serverless from neither in a form that names one card: for what an answer cannot hold, `incomplete`
says so, and the price book's dated list prices stay in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gpubroker import gpus
from gpubroker.errors import MissingCredentials, ProviderError
from gpubroker.http import HttpClient
from gpubroker.model import Market, Offer, OfferQuery, Parsed, Skipped, Slice
from gpubroker.provider import Access, ProviderContext
from gpubroker_providers._vendor import (
    ask,
    figure,
    kind,
    needed,
    plain_text,
    refuse_drift,
    row_id,
    rows_at,
    usd,
    whole,
)
from gpubroker_providers.runpod_nodes import KEY_VARIABLE, NAME, RunPodNodes
from gpubroker_providers.runpod_usage import RunPodUsage
from gpubroker_providers.runpod_volumes import RunPodVolumes

BASE_URL = "https://api.runpod.io"
CATALOG_PATH = "/v2/catalog/gpus"
GRAPHQL_PATH = "/graphql"
MOST_GPUS = 8  # a pod is on one machine; some types claim a ceiling of ten and more
Cloud = Literal["secure", "community"]
CLOUDS: tuple[Cloud, ...] = ("secure", "community")

GPU_TYPES_QUERY = """
query GpuTypes {
  gpuTypes {
    id displayName memoryInGb secureCloud communityCloud securePrice communityPrice
    maxGpuCount maxGpuCountSecureCloud maxGpuCountCommunityCloud
    oneWeekPrice oneMonthPrice threeMonthPrice sixMonthPrice
    lowestPrice(input: {gpuCount: 1}) { stockStatus }
  }
}
""".strip()

_CATALOG = "list GPU types"
_GPU_TYPES = "gpuTypes"
_INTERVAL_S = 0.2
_DAY_S = 86400
# GraphQL's field -> (what the sku is marked with, the term's whole length). A month is 30 days.
_TERMS: Mapping[str, tuple[str, int]] = {
    "oneWeekPrice": ("1wk", 7 * _DAY_S),
    "oneMonthPrice": ("1mo", 30 * _DAY_S),
    "threeMonthPrice": ("3mo", 90 * _DAY_S),
    "sixMonthPrice": ("6mo", 180 * _DAY_S),
}
_MARKETS: frozenset[Market] = frozenset(("on_demand", "reserved"))
_STOCK = ("none", "low", "medium", "high")


def parse_catalog(payload: object, cloud: Cloud) -> Parsed:
    """REST's GPU types, asked with this cloud's availability -> its on-demand offers."""
    rows = rows_at(NAME, _CATALOG, payload, "gpus")
    required = ("id", cloud, "price", f"price.{cloud}", "maxCount", f"maxCount.{cloud}")
    refuse_drift(NAME, _CATALOG, rows, "$.gpus", required)

    def read(row: dict[str, Any]) -> Iterator[_Listing]:
        yield _Listing(
            cloud=cloud,
            prices=_section(row, "price"),
            price_key=cloud,
            offered=row.get(cloud),
            most=_section(row, "maxCount").get(cloud),
            most_key=f"maxCount.{cloud}",
            stock=_stock(row.get("availability")),
            details=_data_centers(row),
        )

    return _parsed(rows, read, source=f"GET {CATALOG_PATH}")


def parse_gpu_types(payload: object) -> Parsed:
    """GraphQL's GPU types -> on-demand offers of both clouds, and the secure cloud's term prices.

    Raises ProviderError for GraphQL's errors, which come with HTTP 200. Stock is asked once for a type: it is
    the better of the two clouds'.
    """
    if isinstance(payload, dict) and payload.get("errors"):
        raise ProviderError(NAME, _GPU_TYPES, _first_message(payload["errors"]))
    rows = rows_at(NAME, _GPU_TYPES, payload, "data", "gpuTypes")
    refuse_drift(NAME, _GPU_TYPES, rows, "$.data.gpuTypes", ("id", "securePrice", "communityPrice"))

    def read(row: dict[str, Any]) -> Iterator[_Listing]:
        for cloud in CLOUDS:
            listing = _gpu_type_listing(row, cloud)
            yield listing
            if cloud == "secure" and listing.why_not() is None:
                # A term without a price is not sold for this type: that is no broken row.
                yield from (replace(listing, price_key=term, term=term) for term in _TERMS if row.get(term))

    return _parsed(rows, read, source=f"POST {GRAPHQL_PATH} gpuTypes")


def _gpu_type_listing(row: dict[str, Any], cloud: Cloud) -> _Listing:
    lowest = row.get("lowestPrice")
    most_key = f"maxGpuCount{cloud.capitalize()}Cloud"
    if row.get(most_key) is None:
        most_key = "maxGpuCount"
    return _Listing(
        cloud=cloud,
        prices=row,
        price_key=f"{cloud}Price",
        offered=row.get(f"{cloud}Cloud"),
        most=row.get(most_key),
        most_key=most_key,
        stock=_stock(lowest.get("stockStatus")) if isinstance(lowest, dict) else "",
        details={},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """One price of one GPU type in one cloud, as either API says it."""

    cloud: Cloud
    prices: dict[str, Any]
    price_key: str
    offered: object  # the vendor's flag; only false says no
    most: object  # GPUs in one pod
    most_key: str
    stock: str
    details: Mapping[str, str]
    term: str = ""  # a key of _TERMS; "" = billed by the second, without one

    def why_not(self) -> str | None:
        """Why there is nothing to rent: a community without hosts still shows a price, a placeholder."""
        if self.offered is False or figure(self.most) == 0:
            placeholder = "; its price is a placeholder" if self.cloud == "community" else ""
            return f"not offered as {self.cloud}{placeholder}"
        price = self.prices.get(self.price_key)
        if price is None or figure(price) == 0:
            return f"not offered as {self.cloud}: {self.price_key} is {'null' if price is None else 0}"
        return None

    def offers(self, gpu_id: str, card: gpus.GpuMatch) -> list[Offer]:
        """One for each GPU count. Raises ValueError naming the field that is broken."""
        reason = self.why_not()
        if reason is not None:
            raise ValueError(reason)
        most = min(whole({self.most_key: self.most}, self.most_key, 1, 1000), MOST_GPUS)
        return [self._offer(gpu_id, card, count) for count in range(1, most + 1)]

    def _offer(self, gpu_id: str, card: gpus.GpuMatch, count: int) -> Offer:
        mark, term_s = _TERMS.get(self.term, ("", 0))
        return Offer(
            provider=NAME,
            sku=f"{gpu_id}/{mark}" if mark else gpu_id,
            gpu=card.name,
            form_factor=card.form_factor,
            gpu_count=count,
            vram_gib=card.vram_gib,
            market="reserved" if self.term else "on_demand",
            preemptible=False,
            cloud=self.cloud,
            usd_per_hour=usd(self.prices, self.price_key, times=count),
            minimum_s=term_s,
            listing_id=gpu_id,
            # Stock was asked for one GPU: of more, only that there are none is certain.
            stock=self.stock if count == 1 or self.stock == "none" else "",
            details=self.details,
        )


def _parsed(rows: list[Any], read: Callable[[dict[str, Any]], Iterable[_Listing]], *, source: str) -> Parsed:
    """Every row's listings as offers; what cannot be one is skipped with its reason."""
    offers: list[Offer] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for index, row in enumerate(rows):
        name = row_id(row, index)
        try:
            gpu_id, card = _gpu(row)
            if gpu_id in seen:
                raise ValueError("id: listed twice")
            listings = list(read(row))
        except ValueError as error:
            skipped.append(Skipped(id=name, reason=str(error)))
            continue
        seen.add(gpu_id)
        for listing in listings:
            try:
                offers += listing.offers(gpu_id, card)
            except ValueError as error:
                skipped.append(Skipped(id=name, reason=str(error)))
    return Parsed(offers=tuple(offers), skipped=tuple(skipped), fetched=len(rows), source=source)


def _gpu(row: object) -> tuple[str, gpus.GpuMatch]:
    """The type's id exactly as it is (one real id has two spaces, and a create needs both), and its card."""
    if not isinstance(row, dict):
        raise ValueError(f"{kind(row)}, not an object")
    gpu_id = needed(row, "id")
    if not isinstance(gpu_id, str):
        raise ValueError(f"id: {kind(gpu_id)}, not text")
    card = gpus.resolve(NAME, gpu_id) or gpus.resolve(NAME, " ".join(gpu_id.split()))
    if card is None:
        raise ValueError(f"id: {plain_text(gpu_id)!r} is not a card we know")
    return gpu_id, card


def _section(row: dict[str, Any], key: str) -> dict[str, Any]:
    value = needed(row, key)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {kind(value)}, not an object")
    return value


def _stock(value: object) -> str:
    """In our words; "" for null and for a word that is new."""
    word = value.lower() if isinstance(value, str) else ""
    return word if word in _STOCK else ""


def _data_centers(row: dict[str, Any]) -> dict[str, str]:
    """Those that have the card, by name: the price is the same in all of them."""
    listed = row.get("dataCenters")
    centers = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    names = sorted(
        plain_text(c.get("id")) for c in centers if c.get("id") and _stock(c.get("availability")) != "none"
    )
    return {"data_centers": ",".join(names)} if names else {}


def _first_message(errors: object) -> str:
    first = errors[0] if isinstance(errors, list) and errors else errors
    return plain_text(first.get("message", first) if isinstance(first, dict) else first)


class RunPod(RunPodNodes, RunPodUsage, RunPodVolumes):
    """The client: REST with a key, GraphQL without one; pods need the key."""

    name = NAME

    def __init__(self, context: ProviderContext) -> None:
        self._context = context

    def access(self) -> Access:
        """See PriceSource."""
        if self._key():
            return Access(has_credentials=True, live_without=True)
        without = "keyless GraphQL until it retires in early 2027"
        return Access(has_credentials=False, missing=KEY_VARIABLE, without=without, live_without=True)

    def endpoint(self) -> str:
        """See PriceSource. Written with the REST API's /v2 or without: GraphQL lies beside it."""
        url = self._context.env.get("GPUBROKER_RUNPOD_URL") or BASE_URL
        return url.rstrip("/").removesuffix("/v2")

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """See PriceSource. Raises only when the first request fails; a later gap is in `incomplete`."""
        end_s = self._context.clock.monotonic_s() + deadline_s
        if query.markets is not None and not query.markets & _MARKETS:
            parsed = Parsed(source="nothing asked", incomplete=_unpriced("serverless"))
        else:
            parsed = self._from_catalog(end_s) if self._key() else self._from_graphql(end_s)
        wanted = tuple(cut for cut in parsed.incomplete if _asks_for(query, cut))
        return replace(parsed, offers=tuple(o for o in parsed.offers if query.covers(o)), incomplete=wanted)

    def check(self, deadline_s: float) -> str:
        """See PriceSource."""
        if not self._key():
            raise MissingCredentials(NAME, KEY_VARIABLE)
        listed = self._http().json("GET", CATALOG_PATH, operation=_CATALOG, deadline_s=deadline_s)
        types = rows_at(NAME, _CATALOG, listed, "gpus")
        return f"{KEY_VARIABLE} is accepted: the catalog lists {len(types)} GPU types"

    def _from_catalog(self, end_s: float) -> Parsed:
        http = self._http()
        parsed = Parsed(incomplete=_unpriced("reserved", "serverless"))
        for cloud in CLOUDS:
            try:
                parsed += parse_catalog(self._ask_catalog(http, cloud, end_s), cloud)
            except ProviderError as error:
                if cloud == CLOUDS[0]:
                    raise
                parsed += Parsed(incomplete=(Slice(reason=f"{cloud}: {error.detail}", cloud=cloud),))
        return parsed

    def _ask_catalog(self, http: HttpClient, cloud: Cloud, end_s: float) -> Any:
        params = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud.upper()}

        def send(left_s: float) -> Any:
            return http.json("GET", CATALOG_PATH, operation=_CATALOG, deadline_s=left_s, params=params)

        return ask(self._context, NAME, "catalog", _INTERVAL_S, end_s, send)

    def _from_graphql(self, end_s: float) -> Parsed:
        http, body = self._http(), {"query": GPU_TYPES_QUERY}

        def send(left_s: float) -> Any:
            return http.json("POST", GRAPHQL_PATH, operation=_GPU_TYPES, deadline_s=left_s, body=body)

        note = f"{KEY_VARIABLE} is not set: prices come from GraphQL, which retires in early 2027"
        parsed = parse_gpu_types(ask(self._context, NAME, "graphql", _INTERVAL_S, end_s, send))
        return replace(parsed, notes=(note,), incomplete=_unpriced("serverless"))

    def _key(self) -> str:
        return self._context.env.get(KEY_VARIABLE, "").strip()

    def _http(self) -> HttpClient:
        return HttpClient(NAME, self.endpoint(), self._context.clock, token=self._key() or None)


def _unpriced(*markets: Market) -> tuple[Slice, ...]:
    """Markets that an answer cannot hold: not being listed there says nothing."""
    return tuple(Slice(reason=f"{market} prices are not in the answer", market=market) for market in markets)


def _asks_for(query: OfferQuery, cut: Slice) -> bool:
    return query.markets is None or cut.market is None or cut.market in query.markets
