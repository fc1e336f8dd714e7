"""What EC2 says of its market: spot prices, placement scores, Capacity Blocks, regions and zones.

aws_ec2.py -> Market -> World's hosts and prices (aws_prices.py). Nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any

from gpubroker.testcloud import aws_prices
from gpubroker.testcloud.aws_query import (
    Ask,
    Refused,
    dry,
    filters,
    iso,
    make_token,
    open_token,
    page,
    passes,
    twice,
)
from gpubroker.testcloud.world import Host, World

Handler = Callable[[Ask], Coroutine[Any, Any, dict[str, Any]]]
# Those that an account has without opting in.
REGIONS = (
    *("us-east-1", "us-east-2", "us-west-1", "us-west-2", "ca-central-1", "sa-east-1", "eu-central-1"),
    *("eu-west-1", "eu-west-2", "eu-west-3", "eu-north-1", "ap-south-1", "ap-northeast-1"),
    *("ap-northeast-2", "ap-northeast-3", "ap-southeast-1", "ap-southeast-2"),
)
BLOCK_FAMILIES = ("p4d.", "p4de.", "p5.", "p5e.", "p5en.", "p6-")
_BLOCK_FACTOR = Decimal("0.72")  # of the on-demand price


class Market:
    """Everybody's view of one world."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """By action."""
        return {
            "DescribeSpotPriceHistory": self._price_history,
            "GetSpotPlacementScores": self._placement_scores,
            "DescribeCapacityBlockOfferings": self._capacity_blocks,
            "DescribeInstanceTypeOfferings": self._type_offerings,
            "DescribeRegions": self._describe_regions,
            "DescribeAvailabilityZones": self._describe_zones,
        }

    def hosts(self, region: str) -> list[Host]:
        """All that AWS rents out there."""
        return [h for (vendor, _), h in self.world.hosts.items() if vendor == "aws" and h.region == region]

    def zones(self, region: str) -> dict[str, str]:
        """Zone name -> id."""
        found = {h.zone: str(h.facts.get("az_id", h.zone)) for h in self.hosts(region)}
        return dict(sorted(found.items())) or {f"{region}{letter}": f"{region}-{letter}" for letter in "abc"}

    async def _price_history(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        now_s = self.world.clock.now_s()
        start_s = ask.moment_s("StartTime", now_s - aws_prices.OLDEST_S)
        end_s = min(now_s, ask.moment_s("EndTime", now_s))
        start_s = max(start_s, now_s - aws_prices.OLDEST_S)
        hosts = self._priced(ask)
        token = open_token(ask.text("NextToken"))
        after = _place(token)
        size = ask.number("MaxResults", 1000, 1, 1000)
        rows = list(islice(aws_prices.history(self.world, hosts, start_s, end_s, after), size + 1))
        given = rows[:size]
        more = ""
        if len(rows) > size:
            place = aws_prices.next_place(given, after)
            more = make_token(at_s=place.at_s, rows=place.rows)
        shown = [
            {
                "instanceType": change.host.sku,
                "productDescription": aws_prices.PRODUCT,
                "spotPrice": f"{change.usd_per_hour:.6f}",
                "timestamp": iso(change.at_s),
                "availabilityZone": change.host.zone,
                "availabilityZoneId": str(change.host.facts.get("az_id", change.host.zone)),
            }
            for change in given
        ]
        return {"spotPriceHistorySet": twice(ask, shown), "nextToken": more}

    def _priced(self, ask: Ask) -> list[Host]:
        """The hosts whose prices are asked for."""
        types = ask.texts("InstanceType")
        products = ask.texts("ProductDescription")
        zone, zone_name = ask.text("AvailabilityZone"), ask.text("AvailabilityZoneId")
        if zone and zone_name:
            message = "AvailabilityZone and AvailabilityZoneId cannot be used together"
            raise Refused("InvalidParameterCombination", message)
        if zone and zone not in self.zones(ask.region):
            raise Refused("InvalidParameterValue", f"Invalid availability zone: [{zone[:40]}]")
        found, tests = [], filters(ask)
        for host in self.hosts(ask.region):
            values = {
                "availability-zone": host.zone,
                "availability-zone-id": str(host.facts.get("az_id", host.zone)),
                "instance-type": host.sku,
                "product-description": aws_prices.PRODUCT,
            }
            if (
                host.spot_usd_per_hour is not None
                and (not types or host.sku in types)
                and (
                    not products or {aws_prices.PRODUCT, f"{aws_prices.PRODUCT} (Amazon VPC)"} & set(products)
                )
                and zone in ("", host.zone)
                and zone_name in ("", values["availability-zone-id"])
                and passes(tests, values)
            ):
                found.append(host)
        return found

    async def _placement_scores(self, ask: Ask) -> dict[str, Any]:
        """10 where spot can be had and half the room is free; fewer than three types always score low."""
        dry(ask)
        types, regions = ask.texts("InstanceType"), ask.texts("RegionName") or [ask.region]
        ask.number("TargetCapacity", 1, 1, 2_000_000_000)
        by_zone = ask.flag("SingleAvailabilityZone")
        best: dict[tuple[str, str], int] = {}
        for host in (h for region in regions for h in self.hosts(region)):
            if (types and host.sku not in types) or host.spot_usd_per_hour is None:
                continue
            place = (host.region, str(host.facts.get("az_id", host.zone)) if by_zone else "")
            room = Decimal(max(0, self.world.free(host))) / max(1, host.capacity)
            score = 1 + int(room * 9) if self.world.spot_available(host) else 1
            best[place] = max(best.get(place, 1), score if len(types) >= 3 else min(score, 3))
        rows = [
            {"region": region, "availabilityZoneId": zone or None, "score": score}
            for (region, zone), score in best.items()
        ]
        return {"spotPlacementScoreSet": rows}

    async def _capacity_blocks(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        instance_type = ask.text("InstanceType")
        count = ask.number("InstanceCount", 1, 1, 64)
        hours = ask.number("CapacityDurationHours", 24, 1, 182 * 24)
        if hours % 24 or (hours > 14 * 24 and hours % (7 * 24)):
            raise Refused("InvalidParameterValue", f"Invalid value '{hours}' for CapacityDurationHours")
        starts = datetime.fromtimestamp(self.world.clock.now_s(), UTC).replace(
            hour=11, minute=30, second=0, microsecond=0
        ) + timedelta(days=1)
        ends = starts + timedelta(hours=hours)
        rows = []
        for host in self.hosts(ask.region):
            if instance_type not in ("", host.sku) or not host.sku.startswith(BLOCK_FAMILIES):
                continue
            fee = host.usd_per_hour * _BLOCK_FACTOR * hours * count
            rows.append(
                {
                    "capacityBlockOfferingId": f"cb-{host.sku.replace('.', '-')}-{host.zone}-{hours}h",
                    "instanceType": host.sku,
                    "availabilityZone": host.zone,
                    "instanceCount": count,
                    "startDate": iso(starts.timestamp()),
                    "endDate": iso(ends.timestamp()),
                    "capacityBlockDurationHours": hours,
                    "upfrontFee": f"{fee:.4f}",
                    "currencyCode": "USD",
                    "tenancy": "default",
                }
            )
        shown, more = page(ask, rows, least=1)
        return {"capacityBlockOfferingSet": twice(ask, shown), "nextToken": more or None}

    async def _type_offerings(self, ask: Ask) -> dict[str, Any]:
        """What is rented out here, which is less than what AWS has."""
        dry(ask)
        kind, tests = ask.text("LocationType", "region"), filters(ask)
        if kind not in ("region", "availability-zone", "availability-zone-id"):
            raise Refused("InvalidParameterValue", f"Invalid value '{kind[:40]}' for LocationType")
        found: dict[tuple[str, str], dict[str, str]] = {}
        for host in self.hosts(ask.region):
            zone_id = str(host.facts.get("az_id", host.zone))
            place = {"region": host.region, "availability-zone": host.zone, "availability-zone-id": zone_id}
            if passes(tests, {"instance-type": host.sku, "location": place[kind]}):
                row = {"instanceType": host.sku, "locationType": kind, "location": place[kind]}
                found[host.sku, place[kind]] = row
        shown, more = page(ask, list(found.values()))
        return {"instanceTypeOfferingSet": twice(ask, shown), "nextToken": more or None}

    async def _describe_regions(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        wanted, tests = ask.texts("RegionName"), filters(ask)
        for name in wanted:
            if name not in REGIONS:
                raise Refused("InvalidParameterValue", f"Invalid region name: {name[:40]}")
        rows = []
        for name in wanted or REGIONS:
            endpoint = f"ec2.{name}.amazonaws.com"
            values = {"region-name": name, "endpoint": endpoint, "opt-in-status": "opt-in-not-required"}
            if passes(tests, values):
                rows.append(
                    {"regionName": name, "regionEndpoint": endpoint, "optInStatus": "opt-in-not-required"}
                )
        return {"regionInfo": twice(ask, rows)}

    async def _describe_zones(self, ask: Ask) -> dict[str, Any]:
        dry(ask)
        wanted = [*ask.texts("ZoneName"), *ask.texts("ZoneId")]
        known, tests = self.zones(ask.region), filters(ask)
        for name in wanted:
            if name not in known and name not in known.values():
                raise Refused("InvalidParameterValue", f"Invalid availability zone: [{name[:40]}]")
        rows = []
        for name, identity in known.items():
            values = {
                "zone-name": name,
                "zone-id": identity,
                "state": "available",
                "region-name": ask.region,
                "zone-type": "availability-zone",
                "group-name": f"{ask.region}-zg-1",
                "opt-in-status": "opt-in-not-required",
            }
            if (not wanted or {name, identity} & set(wanted)) and passes(tests, values):
                rows.append(
                    {
                        "optInStatus": "opt-in-not-required",
                        "regionName": ask.region,
                        "zoneName": name,
                        "zoneId": identity,
                        "groupName": f"{ask.region}-zg-1",
                        "networkBorderGroup": ask.region,
                        "zoneType": "availability-zone",
                        "zoneState": "available",
                    }
                )
        return {"availabilityZoneInfo": twice(ask, rows)}


def _place(token: Mapping[str, Any]) -> aws_prices.Place | None:
    at_s, rows = token.get("at_s"), token.get("rows")
    if not token:
        return None
    if not isinstance(at_s, int | float) or not isinstance(rows, int) or not 0 <= at_s < 2**33:
        raise Refused("InvalidParameterValue", "Unable to parse pagination token")
    return aws_prices.Place(at_s=float(at_s), rows=rows)
