"""What the test cloud's AWS says of its market: history, prices, feeds; S3 behind the same endpoint."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from botocore.exceptions import ClientError

from gpubroker.model import OfferQuery
from gpubroker_providers.aws import Aws
from tests.support import context
from tests.testcloud_aws import TYPE, AwsRoom, aws_room, refusal


@pytest.fixture
def here() -> Iterator[AwsRoom]:
    """One AWS a test."""
    with aws_room() as made:
        yield made


@pytest.fixture
def free() -> Iterator[AwsRoom]:
    """One whose prices follow the seed."""
    with aws_room(steady=False) as made:
        yield made


def history(here: AwsRoom, **asked: Any) -> list[dict[str, Any]]:
    """All rows, by pages where MaxResults says so."""
    rows: list[dict[str, Any]] = []
    token = ""
    while True:
        more = {"NextToken": token} if token else {}
        answer = here.ec2("describe_spot_price_history", **asked, **more)
        rows += answer["SpotPriceHistory"]
        token = answer.get("NextToken", "")
        if not token:
            return rows


def now(here: AwsRoom) -> datetime:
    """Simulated."""
    return datetime.fromtimestamp(here.clock.now_s(), UTC)


def test_from_now_on_there_is_one_price_for_each_zone(free: AwsRoom) -> None:
    """The change in force now is the last one before the start."""
    rows = history(free, InstanceTypes=[TYPE], StartTime=now(free))
    hosts = [h for h in free.world.hosts.values() if (h.sku, h.region) == (TYPE, "us-east-1")]
    assert len(hosts) == len(rows)
    expected = {h.facts["az_id"]: free.world.spot_price(h) for h in hosts}
    assert expected == {row["AvailabilityZoneId"]: Decimal(row["SpotPrice"]) for row in rows}
    assert all(row["Timestamp"] <= now(free) for row in rows)
    assert {"Linux/UNIX"} == {row["ProductDescription"] for row in rows}


def test_a_stretch_of_time_has_its_changes_and_what_was_in_force_before(free: AwsRoom) -> None:
    """Newest first, each the price from its moment on; pages of any size give the same rows."""
    start, end = now(free) - timedelta(hours=3), now(free) - timedelta(hours=1)
    asked = {"InstanceTypes": [TYPE], "StartTime": start, "EndTime": end}
    rows = history(free, **asked)
    assert rows == history(free, **asked, MaxResults=7)
    assert sorted(rows, key=lambda row: row["Timestamp"], reverse=True) == rows
    before = Counter(row["AvailabilityZone"] for row in rows if row["Timestamp"] <= start)
    assert {1} == set(before.values())
    zones = {row["AvailabilityZone"]: row for row in rows if row["Timestamp"] <= start}
    for host in (h for h in free.world.hosts.values() if (h.sku, h.region) == (TYPE, "us-east-1")):
        series = free.world.series[host.vendor, host.id]
        for row in (row for row in rows if row["AvailabilityZone"] == host.zone):
            assert Decimal(row["SpotPrice"]) == series.price_at(row["Timestamp"].timestamp())
        in_force = Decimal(zones[host.zone]["SpotPrice"])
        assert in_force == series.price_at(start.timestamp())


def test_history_is_narrowed_by_zone_product_and_filter(here: AwsRoom) -> None:
    """As the SDK's parameters say."""
    zone = history(here, InstanceTypes=[TYPE], StartTime=now(here))[0]["AvailabilityZone"]
    by_zone = history(here, InstanceTypes=[TYPE], StartTime=now(here), AvailabilityZone=zone)
    assert [zone] == [row["AvailabilityZone"] for row in by_zone]
    by_filter = [{"Name": "instance-type", "Values": [TYPE]}, {"Name": "availability-zone", "Values": [zone]}]
    assert by_zone == history(here, Filters=by_filter, StartTime=now(here))
    assert [] == history(here, ProductDescriptions=["Windows"], StartTime=now(here))
    both = {"AvailabilityZone": zone, "AvailabilityZoneId": "use1-az1"}
    assert "InvalidParameterCombination" == refusal(lambda: history(here, **both))
    assert "DryRunOperation" == refusal(lambda: history(here, DryRun=True))


def test_three_types_are_needed_for_a_good_score(here: AwsRoom) -> None:
    """Placement scores, as AWS's text says."""
    few = here.ec2("get_spot_placement_scores", InstanceTypes=[TYPE], TargetCapacity=1)
    many = here.ec2(
        "get_spot_placement_scores", InstanceTypes=[TYPE, "g5.xlarge", "g6e.xlarge"], TargetCapacity=1
    )
    assert few["SpotPlacementScores"][0]["Score"] < many["SpotPlacementScores"][0]["Score"]


def test_the_price_list_has_the_rows_that_make_p5_look_free(here: AwsRoom) -> None:
    """What is sold is capacitystatus Used; allocated reservations are at 0.00."""

    def prices(**fields: str) -> dict[str, str]:
        filters = [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in fields.items()]
        answer = here.call("pricing", "get_products", ServiceCode="AmazonEC2", Filters=filters)
        found = {}
        for text in answer["PriceList"]:
            document = json.loads(text)
            term = next(iter(document["terms"]["OnDemand"].values()))
            dimension = next(iter(term["priceDimensions"].values()))
            status = document["product"]["attributes"]["capacitystatus"]
            found[status] = dimension["pricePerUnit"]["USD"]
        return found

    where = {"instanceType": "p5.48xlarge", "regionCode": "us-east-1", "operatingSystem": "Linux"}
    found = prices(**where)
    assert "0.0000000000" == found["AllocatedCapacityReservation"]
    assert Decimal("55.04") == Decimal(found["Used"])
    assert {"Used"} == set(prices(**where, capacitystatus="Used"))
    assert {} == prices(**{**where, "regionCode": "moon-1"})


def test_the_price_list_comes_in_pages(here: AwsRoom) -> None:
    """MaxResults up to 100, and a token."""
    first = here.call("pricing", "get_products", ServiceCode="AmazonEC2", MaxResults=10)
    second = here.call(
        "pricing", "get_products", ServiceCode="AmazonEC2", MaxResults=10, NextToken=first["NextToken"]
    )
    assert (10, 10) == (len(first["PriceList"]), len(second["PriceList"]))
    assert not set(first["PriceList"]) & set(second["PriceList"])
    wrong = refusal(lambda: here.call("pricing", "get_products", ServiceCode="AmazonS4"))
    assert "InvalidParameterException" == wrong


def test_capacity_blocks_begin_tomorrow_and_cost_all_at_once(here: AwsRoom) -> None:
    """For the families that are sold so, at 11:30 UTC."""
    asked = {"InstanceType": "p5.48xlarge", "InstanceCount": 2, "CapacityDurationHours": 48}
    rows = here.ec2("describe_capacity_block_offerings", **asked)["CapacityBlockOfferings"]
    assert rows
    assert all(timedelta(hours=48) == row["EndDate"] - row["StartDate"] for row in rows)
    assert Decimal("55.04") * Decimal("0.72") * 96 == Decimal(rows[0]["UpfrontFee"])
    other = {**asked, "InstanceType": TYPE}
    assert [] == here.ec2("describe_capacity_block_offerings", **other)["CapacityBlockOfferings"]
    odd = {**asked, "CapacityDurationHours": 25}
    assert "InvalidParameterValue" == refusal(lambda: here.ec2("describe_capacity_block_offerings", **odd))


def test_the_feeds_are_as_aws_publishes_them(here: AwsRoom) -> None:
    """spot.json has N/A where there is none; the offers file has five lines before its header."""
    feeds = here.vendor.env["GPUBROKER_AWS_FEEDS_URL"]
    here.market(available=False, zone="us-east-2a")
    spot = json.loads(here.get(f"{feeds}/spot.json")[1])
    assert {"us-east-1", "us-east-2", "us-west-2"} == {r["region"] for r in spot["config"]["regions"]}
    index = json.loads(here.get(f"{feeds}/offers/v1.0/aws/AmazonEC2/current/region_index.json")[1])
    path = index["regions"]["us-east-1"]["currentVersionUrl"].replace(".json", ".csv")
    lines = here.get(feeds + path)[1].splitlines()
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[5:]))))
    prices = {row["PricePerUnit"] for row in rows if row["Instance Type"] == "p5.48xlarge"}
    assert {"0.0000000000", "55.0400000000"} <= prices
    assert 404 == here.get(f"{feeds}/offers/none")[0]


@pytest.mark.parametrize("with_keys", [True, False], ids=["with credentials", "without"])
def test_our_own_provider_gets_offers_from_it(here: AwsRoom, with_keys: bool, tmp_path: Any) -> None:
    """Polled as the real AWS is; no offer is free."""
    env = dict(here.vendor.env) | {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    if not with_keys:
        env = {key: value for key, value in env.items() if not key.startswith("AWS_A")}
        env.pop("AWS_SECRET_ACCESS_KEY")
    provider = Aws(context(env=env))
    parsed = here.in_thread(lambda: provider.offers(OfferQuery(whole=True), 60))
    found = Counter(offer.market for offer in parsed.offers)
    assert {"spot", "on_demand"} <= set(found)
    assert bool(found["reserved"]) == with_keys
    assert min(offer.usd_per_hour for offer in parsed.offers) > Decimal("0.1")
    if with_keys:
        assert () == parsed.incomplete


def test_s3_writes_only_if_nobody_has(here: AwsRoom) -> None:
    """Conditional writes, which fencing stands on; the size of an object is its own in a HEAD."""
    here.s3("create_bucket", Bucket="checkpoints")
    where = {"Bucket": "checkpoints", "Key": "run ä/epoch"}
    tag = here.s3("put_object", **where, Body=b"1" * 70_000, IfNoneMatch="*")["ETag"]
    assert "PreconditionFailed" == refusal(lambda: here.s3("put_object", **where, Body=b"", IfNoneMatch="*"))
    assert "PreconditionFailed" == refusal(lambda: here.s3("put_object", **where, Body=b"", IfMatch='"0"'))
    assert 70_000 == here.s3("head_object", **where)["ContentLength"]
    here.s3("put_object", **where, Body=b"2", IfMatch=tag)
    assert ["run ä/epoch"] == [o["Key"] for o in here.s3("list_objects_v2", Bucket="checkpoints")["Contents"]]


def test_a_bucket_is_billed_by_the_hour_and_the_request(here: AwsRoom) -> None:
    """2.3 cents a GB and month; half a cent for a thousand writes or lists, less for reads, deletes free."""
    here.s3("create_bucket", Bucket="ckpt")
    here.s3("put_object", Bucket="ckpt", Key="a", Body=b"x" * 720_000)
    here.s3("get_object", Bucket="ckpt", Key="a")
    here.s3("list_objects_v2", Bucket="ckpt")
    requests = 3 * Decimal("0.000005") + Decimal("0.0000004")
    assert {"ckpt": requests} == here.vendor.other_charges(here.clock.now_s())
    here.pass_s(3700)
    here.s3("delete_object", Bucket="ckpt", Key="a")
    stored = Decimal("0.00072") * Decimal("0.023") / 720
    assert {"ckpt": round(requests + stored, 12)} == here.vendor.other_charges(here.clock.now_s())
    here.pass_s(3600)
    assert {"ckpt": round(requests + stored, 12)} == here.vendor.other_charges(here.clock.now_s())


def test_s3_has_faults_too(here: AwsRoom) -> None:
    """By bucket and key, before and after the effect."""
    here.s3("create_bucket", Bucket="checkpoints")
    where = {"Bucket": "checkpoints", "Key": "a"}
    here.world.faults.add({"endpoint": "aws PUT /s3/checkpoints/*", "kind": "429"})
    assert "SlowDown" == refusal(lambda: here.s3("put_object", **where, Body=b"1"))
    assert "404" == refusal(lambda: here.s3("head_object", **where))
    here.world.faults.add({"endpoint": "aws PUT /s3/checkpoints/*", "kind": "5xx_after"})
    assert "InternalError" == refusal(lambda: here.s3("put_object", **where, Body=b"1"))
    assert 1 == here.s3("head_object", **where)["ContentLength"]


def test_what_nobody_knows_is_an_error_that_says_so(here: AwsRoom) -> None:
    """Not moto's HTML page with a 500."""
    with pytest.raises(ClientError) as caught:
        here.ec2("describe_host_reservations")
    assert "UnsupportedOperation" == caught.value.response["Error"]["Code"]
    assert 400 == caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


def test_a_type_is_offered_where_it_is_rented_out(here: AwsRoom) -> None:
    """By zone as by region."""
    asked = {"Filters": [{"Name": "instance-type", "Values": [TYPE]}], "LocationType": "availability-zone"}
    rows = here.ec2("describe_instance_type_offerings", **asked)["InstanceTypeOfferings"]
    zones = [h.zone for h in here.world.hosts.values() if (h.sku, h.region) == (TYPE, "us-east-1")]
    assert sorted(zones) == sorted(row["Location"] for row in rows)


def test_zones_are_named_the_same_everywhere(here: AwsRoom) -> None:
    """In moto's subnets as in our own answers."""
    zones = {z["ZoneName"]: z["ZoneId"] for z in here.ec2("describe_availability_zones")["AvailabilityZones"]}
    subnets = here.ec2("describe_subnets")["Subnets"]
    found = {s["AvailabilityZone"]: s["AvailabilityZoneId"] for s in subnets}
    assert {name: zones[name] for name in found if name in zones} == {
        name: identity for name, identity in found.items() if name in zones
    }
