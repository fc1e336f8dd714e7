"""What AWS publishes: spot.json, the Spot Advisor, the offers files, and the Price List API (GetProducts).

aws.py -> Public.feed (no key needed), Public.price_list (AWSPriceListService) -> World's hosts and prices

Both price lists have the rows that make p5 look free: reserved capacity, at 0.00, beside what is sold.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gpubroker.testcloud.aws_query import Refused, make_token, open_token, whole
from gpubroker.testcloud.world import Host, World

VERSION = "20261101000000"
_OFFERS = "/offers/v1.0/aws"
_RANGES = (("<5%", 5), ("5-10%", 11), ("10-15%", 16), ("15-20%", 22), (">20%", 100))
_STATUSES = ("Used", "UnusedCapacityReservation", "AllocatedCapacityReservation")
_SYSTEMS = ("Linux", "Windows")
_SERVICES = {
    "AmazonEC2": (
        *("instanceType", "regionCode", "operatingSystem", "tenancy", "preInstalledSw", "capacitystatus"),
        *("licenseModel", "marketoption", "location", "servicecode", "productFamily"),
    )
}
_COLUMNS = (
    *("SKU", "OfferTermCode", "RateCode", "TermType", "PriceDescription", "EffectiveDate", "StartingRange"),
    *("EndingRange", "Unit", "PricePerUnit", "Currency", "Product Family", "serviceCode", "Location"),
    *("Instance Type", "Tenancy", "Operating System", "License Model", "CapacityStatus"),
    *("Pre Installed S/W", "Region Code"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One product of the price list."""

    host: Host
    system: str
    status: str

    @property
    def sku(self) -> str:
        """Sixteen letters and digits, the same for the same product."""
        text = f"{self.host.sku}/{self.host.region}/{self.system}/{self.status}"
        return hashlib.sha256(text.encode()).hexdigest()[:16].upper()

    @property
    def usd_per_hour(self) -> Decimal:
        """Allocated capacity has been paid for already, so it costs nothing; Windows costs more."""
        if self.status == "AllocatedCapacityReservation":
            return Decimal("0.0000000000")
        return self.host.usd_per_hour * (1 if self.system == "Linux" else Decimal("1.2"))


class Public:
    """Feeds and price lists of one world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def feed(self, path: str) -> tuple[str, str] | None:
        """(text, content type) of what is published there; None = nothing."""
        if path == "/spot.json":
            return json.dumps(self._spot()), "application/json"
        if path == "/spot-advisor-data.json":
            return json.dumps(self._advisor()), "application/json"
        if path == f"{_OFFERS}/index.json":
            return json.dumps(_offer_index()), "application/json"
        if path == f"{_OFFERS}/AmazonEC2/current/region_index.json":
            return json.dumps(self._region_index()), "application/json"
        for region in self._regions():
            for version in (VERSION, "current"):
                if path == f"{_OFFERS}/AmazonEC2/{version}/{region}/index.csv":
                    return self._offers_file(region), "text/csv"
        return None

    def _hosts(self) -> list[Host]:
        return [host for (vendor, _), host in self._world.hosts.items() if vendor == "aws"]

    def _regions(self) -> list[str]:
        return sorted({host.region for host in self._hosts()})

    def _spot(self) -> dict[str, Any]:
        """The lowest zone's price; "N/A*" where no zone has any."""
        lowest: dict[str, dict[str, Decimal | None]] = {}
        for host in self._hosts():
            if host.spot_usd_per_hour is None:
                continue
            sizes = lowest.setdefault(host.region, {})
            known = sizes.setdefault(host.sku, None)
            if self._world.spot_available(host):
                price = self._world.spot_price(host)
                sizes[host.sku] = price if known is None else min(known, price)
        regions = [
            {
                "region": region,
                "instanceTypes": [{"type": "gpu", "sizes": [_size(*s) for s in sizes.items()]}],
            }
            for region, sizes in sorted(lowest.items())
        ]
        config = {
            "rate": "perhr",
            "valueColumns": ["linux", "mswin"],
            "currencies": ["USD"],
            "regions": regions,
        }
        return {"vers": 0.01, "config": config}

    def _advisor(self) -> dict[str, Any]:
        types: dict[str, Any] = {}
        advice: dict[str, Any] = {}
        for host in self._hosts():
            if host.spot_usd_per_hour is None:
                continue
            types[host.sku] = {"emr": False, "cores": 8 * host.gpu_count, "ram_gb": 64 * host.gpu_count}
            saved = int((1 - host.spot_usd_per_hour / host.usd_per_hour) * 100)
            digest = hashlib.sha256(f"{self._world.seed}/{host.sku}/{host.region}".encode()).digest()
            row = {"s": max(0, saved), "r": digest[0] % len(_RANGES)}
            advice.setdefault(host.region, {"Linux": {}, "Windows": {}})["Linux"][host.sku] = row
        ranges = [
            {"index": at, "label": label, "dots": at, "max": most} for at, (label, most) in enumerate(_RANGES)
        ]
        return {"instance_types": types, "ranges": ranges, "spot_advisor": advice, "global_rate": "<10%"}

    def _region_index(self) -> dict[str, Any]:
        base = f"{_OFFERS}/AmazonEC2/{VERSION}"
        regions = {
            region: {"regionCode": region, "currentVersionUrl": f"{base}/{region}/index.json"}
            for region in self._regions()
        }
        return {"formatVersion": "v1.0", "publicationDate": "2026-11-01T00:00:00Z", "regions": regions}

    def _offers_file(self, region: str) -> str:
        """CSV with five lines before its header, as the real ones have."""
        file = io.StringIO()
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["FormatVersion", "v1.0"])
        writer.writerow(["Disclaimer", "Of the test cloud; nothing is sold at these prices."])
        writer.writerow(["Publication Date", "2026-11-01T00:00:00Z"])
        writer.writerow(["Version", VERSION])
        writer.writerow(["OfferCode", "AmazonEC2"])
        writer.writerow(_COLUMNS)
        for product in self._products():
            if product.host.region == region:
                row = _csv_row(product)
                writer.writerow([row.get(column, "") for column in _COLUMNS])
        return file.getvalue()

    def _products(self) -> Iterator[_Product]:
        sold = {(host.sku, host.region): host for host in self._hosts()}
        for host in sold.values():
            for system in _SYSTEMS:
                for status in _STATUSES:
                    yield _Product(host=host, system=system, status=status)

    # The Price List API

    def price_list(self, operation: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of AWSPriceListService. Raises Refused."""
        if operation == "GetProducts":
            return self._get_products(asked)
        if operation == "DescribeServices":
            rows = [{"ServiceCode": code, "AttributeNames": list(n)} for code, n in _SERVICES.items()]
            return {"FormatVersion": "aws_v1", "Services": rows}
        if operation == "GetAttributeValues":
            name = asked.get("AttributeName")
            _service(asked)
            found = {str(_attributes(product).get(str(name), "")) for product in self._products()} - {""}
            return {"AttributeValues": [{"Value": value} for value in sorted(found)]}
        raise Refused("UnknownOperationException", f"The test cloud has no {operation[:60]}")

    def _get_products(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        _service(asked)
        wanted = [_filter(one) for one in _list(asked.get("Filters", []), "Filters")]
        size = asked.get("MaxResults", 100)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 100:
            raise Refused("InvalidParameterException", "MaxResults is 1 to 100")
        start = _start(asked.get("NextToken"))
        found = [
            json.dumps(_document(product))
            for product in self._products()
            if all(_attributes(product).get(field, "").lower() == value for field, value in wanted)
        ]
        answer: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": found[start : start + size]}
        if start + size < len(found):
            answer["NextToken"] = make_token(at=start + size)
        return answer


def _start(token: Any) -> int:
    if token is None:
        return 0
    try:
        return whole(str(open_token(str(token)).get("at", 0)), "NextToken", 0, 10**9)
    except Refused as error:
        raise Refused("InvalidNextTokenException", error.message) from error


def _service(asked: Mapping[str, Any]) -> None:
    if str(asked.get("ServiceCode")) not in _SERVICES:
        raise Refused("InvalidParameterException", f"No service {str(asked.get('ServiceCode'))[:60]}")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused("InvalidParameterException", f"{name} is no list")
    return value


def _filter(one: Any) -> tuple[str, str]:
    if not isinstance(one, dict) or one.get("Type") not in ("TERM_MATCH", "EQUALS"):
        raise Refused("InvalidParameterException", "The test cloud's filters are TERM_MATCH and EQUALS")
    field, value = one.get("Field"), one.get("Value")
    if not isinstance(field, str) or not isinstance(value, str):
        raise Refused("InvalidParameterException", "A filter has a Field and a Value")
    return field, value.lower()


def _attributes(product: _Product) -> dict[str, str]:
    return {
        "servicecode": "AmazonEC2",
        "instanceType": product.host.sku,
        "regionCode": product.host.region,
        "location": product.host.region,
        "locationType": "AWS Region",
        "operatingSystem": product.system,
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "licenseModel": "No License required",
        "capacitystatus": product.status,
        "marketoption": "OnDemand",
        "gpu": str(product.host.gpu_count),
        "productFamily": "Compute Instance",
    }


def _document(product: _Product) -> dict[str, Any]:
    term, rate = f"{product.sku}.JRTCKXETXF", f"{product.sku}.JRTCKXETXF.6YS6EN2CT7"
    dimension = {
        "unit": "Hrs",
        "endRange": "Inf",
        "description": f"{product.system} {product.host.sku} instance hour",
        "appliesTo": [],
        "rateCode": rate,
        "beginRange": "0",
        "pricePerUnit": {"USD": f"{product.usd_per_hour:.10f}"},
    }
    offer = {
        "priceDimensions": {rate: dimension},
        "sku": product.sku,
        "effectiveDate": "2026-11-01T00:00:00Z",
        "offerTermCode": "JRTCKXETXF",
        "termAttributes": {},
    }
    return {
        "product": {
            "productFamily": "Compute Instance",
            "attributes": _attributes(product),
            "sku": product.sku,
        },
        "serviceCode": "AmazonEC2",
        "terms": {"OnDemand": {term: offer}},
        "version": VERSION,
        "publicationDate": "2026-11-01T00:00:00Z",
    }


def _csv_row(product: _Product) -> dict[str, str]:
    return {
        "SKU": product.sku,
        "OfferTermCode": "JRTCKXETXF",
        "RateCode": f"{product.sku}.JRTCKXETXF.6YS6EN2CT7",
        "TermType": "OnDemand",
        "PriceDescription": f"{product.system} {product.host.sku} instance hour",
        "EffectiveDate": "2026-11-01",
        "StartingRange": "0",
        "EndingRange": "Inf",
        "Unit": "Hrs",
        "PricePerUnit": f"{product.usd_per_hour:.10f}",
        "Currency": "USD",
        "Product Family": "Compute Instance",
        "serviceCode": "AmazonEC2",
        "Location": product.host.region,
        "Instance Type": product.host.sku,
        "Tenancy": "Shared",
        "Operating System": product.system,
        "License Model": "No License required",
        "CapacityStatus": product.status,
        "Pre Installed S/W": "NA",
        "Region Code": product.host.region,
    }


def _size(name: str, price: Decimal | None) -> dict[str, Any]:
    linux = "N/A*" if price is None else f"{price:.4f}"
    columns = [
        {"name": "linux", "prices": {"USD": linux}},
        {"name": "mswin", "prices": {"USD": "N/A*"}},
    ]
    return {"size": name, "valueColumns": columns}


def _offer_index() -> dict[str, Any]:
    current = f"{_OFFERS}/AmazonEC2/current"
    entry = {
        "offerCode": "AmazonEC2",
        "currentVersionUrl": f"{current}/index.json",
        "currentRegionIndexUrl": f"{current}/region_index.json",
    }
    return {"formatVersion": "v1.0", "offers": {"AmazonEC2": entry}}
