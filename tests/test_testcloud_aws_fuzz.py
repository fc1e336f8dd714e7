"""Any request at all to AWS in the test cloud: no 500 but for missing room, and a refused one changes nothing.

Twenty examples an action, two hundred in the soak. What goes to moto is not fuzzed: its errors are moto's.
"""

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.testcloud.aws import ACCESS_KEY
from tests.testcloud_aws import IMAGE, TYPE, AwsRoom, aws_room

EXAMPLES = 20 * int(os.environ.get("GPUBROKER_TEST_EXAMPLES", "1"))
FILTER = {"Filter.1.Name": "instance-type", "Filter.1.Value.1": "g*"}
ID = "an id that exists"
# A form that works for each action that is done here.
FORMS: dict[str, dict[str, str]] = {
    "RunInstances": {
        "ImageId": IMAGE,
        "InstanceType": TYPE,
        "MinCount": "1",
        "MaxCount": "1",
        "ClientToken": "once",
        "InstanceMarketOptions.MarketType": "spot",
        "InstanceMarketOptions.SpotOptions.MaxPrice": "1.5",
        "Placement.AvailabilityZone": "us-east-1a",
        "BlockDeviceMapping.1.Ebs.VolumeSize": "20",
        "TagSpecification.1.ResourceType": "instance",
        "TagSpecification.1.Tag.1.Key": "a",
        "TagSpecification.1.Tag.1.Value": "b",
        "MetadataOptions.HttpTokens": "required",
        "UserData": "IyEvYmluL3No",
        "DryRun": "false",
    },
    "DescribeInstances": {**FILTER, "MaxResults": "5"},
    "DescribeInstanceStatus": {"InstanceId.1": ID, "IncludeAllInstances": "true"},
    "TerminateInstances": {"InstanceId.1": ID},
    "StopInstances": {"InstanceId.1": ID},
    "StartInstances": {"InstanceId.1": ID},
    "RebootInstances": {"InstanceId.1": ID},
    "CreateTags": {"ResourceId.1": ID, "Tag.1.Key": "a", "Tag.1.Value": "b"},
    "DeleteTags": {"ResourceId.1": ID, "Tag.1.Key": "a"},
    "DescribeSpotInstanceRequests": {"Filter.1.Name": "state", "Filter.1.Value.1": "active"},
    "CancelSpotInstanceRequests": {"SpotInstanceRequestId.1": ID},
    "DescribeSpotPriceHistory": {
        "InstanceType.1": TYPE,
        "ProductDescription.1": "Linux/UNIX",
        "StartTime": "2030-03-17T17:00:00Z",
        "EndTime": "2030-03-17T17:40:00Z",
        "MaxResults": "10",
        "NextToken": "eyJhdF9zIjogMTg5OTk5OTk5OSwgInJvd3MiOiAxfQ==",
    },
    "GetSpotPlacementScores": {"InstanceType.1": TYPE, "TargetCapacity": "1", "RegionName.1": "us-east-1"},
    "DescribeCapacityBlockOfferings": {"InstanceType": "p5.48xlarge", "CapacityDurationHours": "24"},
    "DescribeTags": {"Filter.1.Name": "resource-type", "Filter.1.Value.1": "instance"},
    "DescribeInstanceTypeOfferings": {"LocationType": "availability-zone", **FILTER},
    "DescribeRegions": {"RegionName.1": "us-east-1"},
    "DescribeAvailabilityZones": {"ZoneName.1": "us-east-1a"},
}
WORDS = st.sampled_from(
    [
        *("", "0", "1", "-1", "9" * 30, "²", "true", "x", "*", "[", "\\", "i-", "i-x", "us-east-1a", "spot"),
        *("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59Z", "2030-03-17", "NaN", "1e400", "\x00", "ä"),
        *("eyJhdCI6IC0xfQ==", "eyJhdCI6ICJ4In0=", "bnVsbA==", "W10=", "persistent", "stop", TYPE),
    ]
) | st.text(max_size=12)
NAMES = st.sampled_from(
    [
        *("InstanceId.1", "InstanceId", "InstanceId.x", "Filter.1.Name", "Filter.1.Value.1", "Filter.1"),
        *("NextToken", "MaxResults", "DryRun", "Tag.1.Key", "Tag", "Placement", "SubnetId.1", "Action"),
        *("InstanceMarketOptions.SpotOptions.SpotInstanceType", "AvailabilityZoneId", "a.b.c.d.e.f.g.h.i"),
        *("NetworkInterface.1.SecurityGroupId", "BlockDeviceMapping.1", "ClientToken", ".", "..", "1"),
    ]
) | st.text(max_size=8)


@st.composite
def forms(draw: Callable[..., Any], base: dict[str, str]) -> list[tuple[str, str]]:
    """The form that works, with up to three places of it dropped, changed, or added to."""
    form = dict(base)
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.sampled_from(["drop", "change", "add"]))
        if change == "add":
            form[draw(NAMES)] = draw(WORDS)
        elif form and change == "drop":
            del form[draw(st.sampled_from(sorted(form)))]
        elif form:
            form[draw(st.sampled_from(sorted(form)))] = draw(WORDS)
    return list(form.items())


@pytest.fixture(scope="module")
def here() -> Iterator[AwsRoom]:
    """One AWS for all, with an instance of each market."""
    with aws_room() as made:
        yield made


def state_of(here: AwsRoom) -> str:
    """Everything that a request could change."""
    ec2 = here.vendor.ec2
    rentals = [(r.id, r.state, r.tag, len(r.events)) for r in here.world.rentals.values()]
    tags = [(i.tags, i.spot_tags, i.spot_cancelled, i.restarts) for i in ec2.instances.values()]
    return repr([rentals, tags, ec2._tokens])


def ask(here: AwsRoom, body: bytes, service: str = "ec2", **headers: str) -> tuple[int, str]:
    """A signed POST of anything."""
    scope = f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20300317/us-east-1/{service}/aws4_request, Signature=0"
    found = here.post(here.vendor.url, body, Authorization=scope, **headers)
    here.settle()
    return found


def known_id(here: AwsRoom, action: str) -> str:
    """Of something that the action may change; made where there is none."""
    living = [i for i in here.vendor.ec2.instances.values() if i.rental.state in ("pending", "running")]
    if len(living) < 2:
        here.run(InstanceMarketOptions={"MarketType": "spot"})
        here.run()
        living = list(here.vendor.ec2.instances.values())
    spot = next((i for i in reversed(living) if i.spot_request_id), living[-1])
    return spot.spot_request_id if action == "CancelSpotInstanceRequests" else living[-1].id


def check(here: AwsRoom, status: int, text: str, before: str) -> None:
    """No bug; XML that can be read; nothing changed where it was refused."""
    assert [] == here.vendor.bugs
    found = ET.fromstring(text)  # noqa: S314 our own
    if status >= 500:
        assert "InsufficientInstanceCapacity" == found.findtext("Errors/Error/Code"), text
    if status >= 400:
        assert before == state_of(here)


@pytest.mark.parametrize("action", sorted(FORMS))
def test_ec2_survives_any_form(here: AwsRoom, action: str) -> None:
    """See the module."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(forms(FORMS[action]), st.booleans())
    def go(form: list[tuple[str, str]], pass_time: bool) -> None:
        if pass_time:
            here.pass_s(400)
        named = known_id(here, action)
        sent = [(name, named if value == ID else value) for name, value in form if name != "Action"]
        before = state_of(here)
        body = urlencode([("Action", action), ("Version", "2016-11-15"), *sent], errors="replace").encode()
        status, text = ask(here, body)
        check(here, status, text, before)

    go()


def test_every_action_is_fuzzed(here: AwsRoom) -> None:
    """None is forgotten."""
    assert set(FORMS) == set(here.vendor.ec2.actions)


@settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=True, database=None)
@given(
    st.binary(max_size=60) | st.sampled_from([b"", b"Action=", b"Action=\xff", b"Action.1=x", b"Action=x=y"])
)
def test_ec2_survives_any_bytes(here: AwsRoom, body: bytes) -> None:
    """No form at all."""
    before = state_of(here)
    status, text = ask(here, body)
    check(here, status, text, before)
    assert status >= 400


JSON_TEXTS = st.sampled_from(
    [
        *("", "[]", "{", "null", "1e999", '{"ServiceCode": "AmazonEC2"}', "[" * 10_000),
        '{"ServiceCode": "AmazonEC2", "Filters": 1}',
        '{"ServiceCode": "AmazonEC2", "Filters": [{"Type": "TERM_MATCH", "Field": 1, "Value": null}]}',
        '{"ServiceCode": "AmazonEC2", "MaxResults": 101}',
        '{"ServiceCode": "AmazonEC2", "MaxResults": true}',
        '{"ServiceCode": "AmazonEC2", "NextToken": "eyJhdCI6IC0xfQ=="}',
        '{"ServiceCode": ["AmazonEC2"]}',
        '{"ServiceCode": "AmazonEC2", "AttributeName": {"a": 1}}',
    ]
) | st.text(max_size=20)


@settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=True, database=None)
@given(JSON_TEXTS, st.sampled_from(["GetProducts", "DescribeServices", "GetAttributeValues", "", "Get"]))
def test_the_price_list_survives_any_body(here: AwsRoom, body: str, operation: str) -> None:
    """200 or 400, in JSON."""
    target = f"AWSPriceListService.{operation}"
    sent = body.encode("utf-8", "replace")
    status, _ = ask(here, sent, "pricing", **{"X-Amz-Target": target})
    assert [] == here.vendor.bugs
    assert status in (200, 400)


PATHS = st.lists(
    st.sampled_from(
        [
            *(
                "imds",
                "feeds",
                "latest",
                "meta-data",
                "api",
                "token",
                "..",
                "",
                "%00",
                "%ff",
                "spot.json",
                "{id}",
            )
        ]
    )
    | st.text(alphabet="az09-._~%25", max_size=6),
    max_size=6,
)
TOKEN_HEADERS = st.dictionaries(
    st.sampled_from(["X-aws-ec2-metadata-token", "X-aws-ec2-metadata-token-ttl-seconds", "X-Forwarded-For"]),
    st.sampled_from(["", "1", "21601", "-1", "x", "1" * 50]),
    max_size=2,
)


@settings(max_examples=10 * EXAMPLES, deadline=None, derandomize=True, database=None)
@given(PATHS, st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"]), TOKEN_HEADERS)
def test_feeds_and_metadata_survive_any_path(
    here: AwsRoom, path: list[str], method: str, headers: dict[str, str]
) -> None:
    """No 5xx, on any method and with any token."""
    joined = "/".join(path).replace("{id}", known_id(here, ""))
    status, _ = here.get(f"{here.vendor.side_url}/{joined}", method, **headers)
    assert [] == here.vendor.bugs
    assert status < 500
