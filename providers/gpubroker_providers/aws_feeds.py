"""What AWS publishes for anybody: spot.json, the Spot Advisor and the offers files; used by aws.py.

Poll: feeds -> parse_* -> Parsed. The spot feed gives the lowest zone's price of a region, the advisor
the share of instances interrupted in a month, the offers files the on-demand list prices.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from gpubroker.errors import PayloadChanged, ProviderError, Transient
from gpubroker.http import HttpClient
from gpubroker.model import Offer, Parsed
from gpubroker.money import parse_usd
from gpubroker.provider import ProviderContext
from gpubroker_providers.aws_rows import GPU_FAMILY, Sieve, instance_offer, kind_of

T = TypeVar("T")
Advice = Mapping[tuple[str, str], Mapping[str, str]]  # (region, instance type) -> details of an offer

SPOT_URL = "https://website.spot.ec2.aws.a2z.com"
ADVISOR_URL = "https://spot-bid-advisor.s3.amazonaws.com"
OFFERS_URL = "https://pricing.us-east-1.amazonaws.com"
_INDEX_PATH = "/offers/v1.0/aws/AmazonEC2/current/region_index.json"
# Names that older copies of the spot feed still use.
_LEGACY_REGIONS = {
    "us-east": "us-east-1",
    "us-west": "us-west-1",
    "eu-ireland": "eu-west-1",
    "eu-frankfurt": "eu-central-1",
    "apac-sin": "ap-southeast-1",
    "apac-syd": "ap-southeast-2",
    "apac-tokyo": "ap-northeast-1",
}
# GPU_FAMILY in a line of CSV. It spares the costly parsing of a line to all but a few in a thousand.
_GPU_CELL = re.compile(rb'[",](?:p|gr?)\d[a-z]*(?:-[a-z0-9]+)?\.[a-z0-9-]+(?=[",]|$)')
_ON_DEMAND_ROW = {
    "TermType": "OnDemand",
    "Unit": "Hrs",
    "Tenancy": "Shared",
    "Operating System": "Linux",
    "Pre Installed S/W": "NA",
    "CapacityStatus": "Used",  # other rows price reserved capacity, some of them at 0.00
}
_OFFER_COLUMNS = (*_ON_DEMAND_ROW, "SKU", "Instance Type", "PricePerUnit", "Currency")
_METADATA_LINES = 5


def _at(payload: object, operation: str, path: str, kind: type[T]) -> T:
    """A value near the top of an answer. Raises PayloadChanged naming how far its path led."""
    value, gone = payload, "$"
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise PayloadChanged("aws", operation, path, f"{gone} has no {key}")
        value, gone = value[key], key
    if not isinstance(value, kind):
        raise PayloadChanged("aws", operation, path, f"is {kind_of(value)}, not {kind.__name__}")
    return value


def parse_advisor(payload: object) -> Advice:
    """Spot Advisor: how often Linux instances were interrupted last month, and what spot saves.

    `ranges` name the bands; `r` is an index into them and `s` a percentage of the on-demand price. Rows
    that are broken are left out: they are only details. Raises PayloadChanged.
    """
    operation = "spot-advisor-data.json"
    labels = {
        row["index"]: row.get("label")
        for row in _at(payload, operation, "ranges", list)
        if isinstance(row, Mapping) and isinstance(row.get("index"), int)
    }
    advice: dict[tuple[str, str], Mapping[str, str]] = {}
    for region, systems in _at(payload, operation, "spot_advisor", dict).items():
        linux = systems.get("Linux") if isinstance(systems, Mapping) else None
        for instance_type, row in linux.items() if isinstance(linux, Mapping) else ():
            details = _advice(row, labels) if GPU_FAMILY.fullmatch(instance_type) else {}
            if details:
                advice[region, instance_type] = details
    return advice


def _advice(row: object, labels: Mapping[int, object]) -> Mapping[str, str]:
    index, savings = (row.get("r"), row.get("s")) if isinstance(row, Mapping) else (None, None)
    label = labels.get(index) if isinstance(index, int) else None
    details = {"interruption_band": label} if isinstance(label, str) else {}
    if isinstance(savings, int) and 0 <= savings <= 100:
        details["savings"] = f"{savings}%"
    return details


def parse_spot_json(payload: object, regions: Collection[str] = ()) -> Parsed:
    """The feed behind the spot price page: the lowest zone's price by region (() = all), for Linux.

    Some types are listed twice, with the same price; "N/A*" means that there is none.
    """
    sieve = Sieve("spot.json")

    def offer(region: str, instance_type: str, row: object) -> Offer:
        price = parse_usd(_linux_price(row, sieve))
        return instance_offer(instance_type, "spot", price, region=region)

    for region, instance_type, row in _sizes(payload, sieve):
        if not regions or region in regions:
            sieve.keep(f"{region} {instance_type}", offer, region, instance_type, row)
    return sieve.parsed()


def advised(parsed: Parsed, advice: Advice) -> Parsed:
    """Spot offers with what the Spot Advisor says of their instance type and region."""
    return replace(
        parsed,
        offers=tuple(
            replace(offer, details={**offer.details, **advice[offer.region, offer.sku]})
            if offer.market == "spot" and (offer.region, offer.sku) in advice
            else offer
            for offer in parsed.offers
        ),
    )


_REGION = "config.regions[]"
_GROUP = f"{_REGION}.instanceTypes[]"
_SIZE = f"{_GROUP}.sizes[]"


def _sizes(payload: object, sieve: Sieve) -> Iterator[tuple[str, str, object]]:
    """(region, instance type, row) of every GPU instance type in the feed."""
    for at, region in enumerate(_at(payload, sieve.operation, "config.regions", list)):
        try:
            name = sieve.take(region, f"{_REGION}.region", str)
            groups = sieve.take(region, f"{_REGION}.instanceTypes", list)
        except ValueError as error:
            sieve.skip(f"regions[{at}]", str(error))
            continue
        for group_at, group in enumerate(groups):
            try:
                sizes = sieve.take(group, f"{_GROUP}.sizes", list)
            except ValueError as error:
                sieve.skip(f"{name} instanceTypes[{group_at}]", str(error))
                continue
            for size_at, row in enumerate(sizes):
                try:
                    instance_type = sieve.take(row, f"{_SIZE}.size", str)
                except ValueError as error:
                    sieve.skip(f"{name} instanceTypes[{group_at}].sizes[{size_at}]", str(error))
                    continue
                if GPU_FAMILY.fullmatch(instance_type):
                    yield _LEGACY_REGIONS.get(name, name), instance_type, row


def _linux_price(row: object, sieve: Sieve) -> object:
    columns = sieve.take(row, f"{_SIZE}.valueColumns", list)
    by_name = {c["name"]: c for c in columns if isinstance(c, Mapping) and isinstance(c.get("name"), str)}
    linux = sieve.take(by_name, f"{_SIZE}.valueColumns[].name", dict, key="linux")
    prices = sieve.take(linux, f"{_SIZE}.valueColumns[].prices", dict)
    price = sieve.take(prices, f"{_SIZE}.valueColumns[].prices.USD", object)
    if isinstance(price, str) and price.startswith("N/A"):
        raise ValueError(f"price is {price}: no spot capacity is sold there")
    return price


def parse_region_index(payload: object) -> dict[str, str]:
    """Region -> path of its offers file as CSV. The path holds a version, so that it can be cached by it."""
    sieve = Sieve("region_index.json")
    paths = {}
    for region, row in _at(payload, sieve.operation, "regions", dict).items():
        with suppress(ValueError):
            path = sieve.take(row, "regions.*.currentVersionUrl", str)
            if path.startswith("/") and path.endswith("/index.json"):
                paths[region] = path.removesuffix("json") + "csv"
    sieve.refuse_drift()
    if not paths:
        raise PayloadChanged("aws", sieve.operation, "regions.*.currentVersionUrl", "no region has a path")
    return paths


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferRow:
    """One on-demand row of an offers file, still as text: what the cache keeps.

    Types that are unknown today stay in, so that a newer alias table finds them.
    """

    sku: str
    instance_type: str
    price: str
    currency: str
    problem: str = ""  # why the line could not be read; "" = it could


def select_offer_rows(lines: Iterable[bytes]) -> list[OfferRow]:
    """On-demand rows of GPU instance types for plain Linux, out of an offers file of hundreds of MB.

    Raises PayloadChanged when a column is missing, or when GPU rows are there and none of them fits.
    """
    operation = "offers file"
    columns: list[str] = []
    rows: list[OfferRow] = []
    looked_at = 0
    for number, line in enumerate(lines):
        if not columns:
            columns = _header(number, line, operation)
            continue
        if b"OnDemand" not in line or not _GPU_CELL.search(line):
            continue
        looked_at += 1
        cells = next(csv.reader([line.decode("utf-8", "replace")]), [])
        row = dict(zip(columns, cells, strict=False))
        if len(cells) != len(columns):
            problem = f"line {number + 1} has {len(cells)} cells, not {len(columns)}"
            rows.append(OfferRow(sku=cells[0], instance_type="", price="", currency="", problem=problem))
        elif all(row[column] == value for column, value in _ON_DEMAND_ROW.items()):
            rows.append(
                OfferRow(
                    sku=row["SKU"],
                    instance_type=row["Instance Type"],
                    price=row["PricePerUnit"],
                    currency=row["Currency"],
                )
            )
    if not columns:
        raise PayloadChanged("aws", operation, "header", "the file ends before it")
    if looked_at and not any(not row.problem for row in rows):
        wanted = ", ".join(f"{column} {value}" for column, value in _ON_DEMAND_ROW.items())
        raise PayloadChanged("aws", operation, "rows", f"no GPU row has {wanted}")
    return rows


def _header(number: int, line: bytes, operation: str) -> list[str]:
    """The columns, once the metadata lines are over; [] before."""
    cells = next(csv.reader([line.decode("utf-8", "replace")]), [])
    if number < _METADATA_LINES and "SKU" not in cells:
        return []
    for column in _OFFER_COLUMNS:
        if column not in cells:
            raise PayloadChanged("aws", operation, f"header.{column}", "no such column")
    return cells


def parse_offer_rows(rows: Iterable[OfferRow], region: str) -> Parsed:
    """On-demand offers of one region."""
    sieve = Sieve("offers file")

    def offer(row: OfferRow) -> Offer:
        if row.problem:
            raise ValueError(row.problem)
        if row.currency != "USD":
            raise ValueError(f"Currency is {row.currency!r}, not USD")
        return instance_offer(row.instance_type, "on_demand", parse_usd(row.price), region=region)

    for row in rows:
        sieve.keep(f"{region} {row.instance_type or '?'} {row.sku}", offer, row)
    return sieve.parsed()


class PublicFeeds:
    """The feeds over HTTP. `base_url` replaces all three hosts (GPUBROKER_AWS_FEEDS_URL)."""

    def __init__(self, context: ProviderContext, base_url: str | None) -> None:
        self._clock = context.clock
        self._spot = HttpClient("aws", base_url or SPOT_URL, context.clock)
        self._advisor = HttpClient("aws", base_url or ADVISOR_URL, context.clock)
        self._offers = HttpClient("aws", base_url or OFFERS_URL, context.clock)
        self._cache = OffersCache(context.cache_dir / "aws-offers")

    def spot(self, regions: Collection[str], deadline_s: float) -> Parsed:
        """Spot offers, out of some 3 MB."""
        payload = self._spot.json("GET", "/spot.json", operation="spot.json", deadline_s=deadline_s)
        return parse_spot_json(payload, regions)

    def advice(self, deadline_s: float) -> Advice:
        """The Spot Advisor's bands."""
        operation = "spot-advisor-data.json"
        payload = self._advisor.json("GET", f"/{operation}", operation=operation, deadline_s=deadline_s)
        return parse_advisor(payload)

    def offers_paths(self, deadline_s: float) -> dict[str, str]:
        """Region -> the current version of its offers file."""
        payload = self._offers.json("GET", _INDEX_PATH, operation="region_index.json", deadline_s=deadline_s)
        return parse_region_index(payload)

    def has_cached_offers(self) -> bool:
        """Whether a poll has left anything to look up."""
        return self._cache.is_used()

    def cached_offers(self, region: str, path: str) -> Parsed | None:
        """What a poll has read from this very version; None = not yet."""
        rows = self._cache.read(region, path)
        return None if rows is None else parse_offer_rows(rows, region)

    def read_offers(self, region: str, path: str, deadline_s: float) -> Parsed:
        """The region's on-demand offers, downloaded only when this version was not read before."""
        cached = self.cached_offers(region, path)
        if cached is not None:
            return cached
        rows = select_offer_rows(self._lines(path, deadline_s))
        parsed = parse_offer_rows(rows, region)
        try:
            self._cache.write(region, path, rows)
        except OSError as error:
            note = f"the offers file cannot be cached, so each poll downloads it again: {error}"
            return parsed + Parsed(notes=(note,))
        return parsed

    def _lines(self, path: str, deadline_s: float) -> Iterator[bytes]:
        operation = "offers file"
        end_s = self._clock.monotonic_s() + deadline_s
        begun = b""
        with self._offers.stream(path, operation=operation, timeout_s=deadline_s) as response:
            for chunk in response.iter_content(1 << 16):
                # A timeout of requests is per read: hundreds of MB could take for ever.
                if self._clock.monotonic_s() > end_s:
                    raise Transient("aws", operation, f"{path} did not end before the deadline")
                *lines, begun = (begun + chunk).split(b"\n")
                yield from lines
        if begun:
            yield begun


class OffersCache:
    """On-demand rows by region and version: small JSON files, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_used(self) -> bool:
        """Whether any version was kept."""
        return any(self._folder.glob("*.json"))

    def read(self, region: str, path: str) -> list[OfferRow] | None:
        """The rows of this version. None when it is not there or not readable: then it is read again."""
        file = self._file(region, path)
        try:
            rows = json.loads(file.read_text(encoding="utf-8")) if file else None
            return None if rows is None else [OfferRow(**row) for row in rows]
        except (OSError, ValueError, TypeError):
            return None

    def write(self, region: str, path: str, rows: Iterable[OfferRow]) -> None:
        """Keep this version and forget the region's older ones. Raises OSError."""
        target = self._file(region, path)
        if target is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump([asdict(row) for row in rows], file)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        for old in self._folder.glob(f"{region}@*.json"):
            if old != target:
                old.unlink(missing_ok=True)

    def _file(self, region: str, path: str) -> Path | None:
        """None for a path without a version, which names other prices tomorrow.

        Raises ProviderError for names that could lead out of the folder: they come from outside.
        """
        version = path.rpartition(f"/{region}/")[0].rpartition("/")[2]
        name = f"{region}@{version}"
        if not re.fullmatch(r"[a-z0-9-]+@[A-Za-z0-9_-]+", name):
            raise ProviderError("aws", "region_index.json", f"strange region or version in {path!r}")
        return None if version == "current" else self._folder / f"{name}.json"
