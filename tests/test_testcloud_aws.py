"""Instances of the test cloud's AWS, asked by boto3: launch, capacity, spot, metadata, the end."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from gpubroker.testcloud import bill
from gpubroker.testcloud.aws import ACCESS_KEY
from gpubroker.testcloud.keys import new_key_pair
from tests.testcloud_aws import IMAGE, SPOT, TYPE, AwsRoom, aws_room, refusal


@pytest.fixture
def here() -> Iterator[AwsRoom]:
    """One AWS a test."""
    with aws_room() as made:
        yield made


def capacity(here: AwsRoom, instance_type: str = TYPE) -> int:
    """How many fit in the region."""
    return sum(
        h.capacity for h in here.world.hosts.values() if (h.sku, h.region) == (instance_type, "us-east-1")
    )


def imds(here: AwsRoom, instance_id: str, path: str) -> tuple[int, str]:
    """With a token, as version 2 asks for it."""
    base = here.nodes.envs[instance_id]["AWS_EC2_METADATA_SERVICE_ENDPOINT"]
    status, token = here.get(
        f"{base}/latest/api/token", "PUT", **{"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    assert 200 == status
    return here.get(f"{base}/latest/{path}", **{"X-aws-ec2-metadata-token": token})


def test_an_instance_is_pending_then_runs_at_an_address_of_its_own(here: AwsRoom) -> None:
    """Billed from running on, like the real one."""
    made = here.run(ClientToken="one")
    assert "pending" == made["State"]["Name"]
    shown = here.show(made["InstanceId"])
    assert ("running", 16) == (shown["State"]["Name"], shown["State"]["Code"])
    assert shown["PublicIpAddress"].startswith("127.")
    assert shown["Placement"]["AvailabilityZoneId"].startswith("use1-az")
    rental = here.world.rentals[made["InstanceId"]]
    assert ["created", "running"] == [event.kind for event in rental.events]
    assert "InstanceLifecycle" not in shown


def test_a_token_makes_one_reservation(here: AwsRoom) -> None:
    """The same call again gives the same instance, and it is one rental."""
    wish = {"ClientToken": "once", **SPOT}
    first, second = here.run(**wish), here.run(**wish)
    assert first["InstanceId"] == second["InstanceId"]
    assert 1 == len(here.world.rentals)
    assert "running" == second["State"]["Name"]


def test_a_token_with_other_parameters_is_refused(here: AwsRoom) -> None:
    """Nothing is launched."""
    here.run(ClientToken="once")
    code = refusal(lambda: here.run(ClientToken="once", InstanceType="g5.xlarge"))
    assert "IdempotentParameterMismatch" == code
    assert 1 == len(here.world.rentals)


def test_a_token_gives_a_terminated_instance_back(here: AwsRoom) -> None:
    """A new attempt needs a new token."""
    made = here.run(ClientToken="once")
    here.ec2("terminate_instances", InstanceIds=[made["InstanceId"]])
    here.pass_s(10)
    again = here.run(ClientToken="once")
    assert (made["InstanceId"], "terminated") == (again["InstanceId"], again["State"]["Name"])


def test_a_token_counts_in_its_region_only(here: AwsRoom) -> None:
    """As the real ones do."""
    asked = {"ImageId": IMAGE, "InstanceType": "p5en.48xlarge", "MinCount": 1, "MaxCount": 1}
    for region in ("us-east-1", "us-west-2"):
        here.ec2("run_instances", region=region, ClientToken="once", **asked)
    assert ["us-east-1", "us-west-2"] == [r.host.region for r in here.world.rentals.values()]


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        pytest.param({"InstanceType": "zz9.large"}, "InvalidParameterValue", id="bogus type"),
        pytest.param({"InstanceType": "t3.micro"}, "Unsupported", id="a type that is not rented out"),
        pytest.param({"ImageId": "ami-x"}, "InvalidAMIID.Malformed", id="image"),
        pytest.param({"KeyName": "none"}, "InvalidKeyPair.NotFound", id="key"),
        pytest.param({"SubnetId": "subnet-0"}, "InvalidSubnetID.NotFound", id="subnet"),
        pytest.param({"SecurityGroupIds": ["sg-0"]}, "InvalidGroup.NotFound", id="group"),
        pytest.param({"Placement": {"AvailabilityZone": "us-east-1z"}}, "InvalidParameterValue", id="zone"),
        pytest.param({"MinCount": 5, "MaxCount": 1}, "InvalidParameterValue", id="counts"),
        pytest.param({"ClientToken": "x" * 65}, "InvalidParameterValue", id="long token"),
        pytest.param({"DryRun": True}, "DryRunOperation", id="dry run"),
        pytest.param({"UserData": "x" * 20000}, "InvalidParameterValue", id="user data"),
        pytest.param({"KernelId": "aki-1"}, "UnknownParameter", id="a parameter from long ago"),
        pytest.param(
            {"InstanceMarketOptions": {"MarketType": "capacity-block"}}, "UnsupportedOperation", id="block"
        ),
        pytest.param(
            {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.001"}}},
            "InvalidParameterValue",
            id="price too low for anybody",
        ),
        pytest.param(
            {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.002"}}},
            "SpotMaxPriceTooLow",
            id="price below the market's",
        ),
        pytest.param(
            {
                "InstanceMarketOptions": {
                    "MarketType": "spot",
                    "SpotOptions": {"InstanceInterruptionBehavior": "stop"},
                }
            },
            "InvalidParameterCombination",
            id="stop, but one-time",
        ),
        pytest.param(
            {"TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "aws:x", "Value": ""}]}]},
            "InvalidParameterValue",
            id="tag",
        ),
    ],
)
def test_a_launch_is_refused_with_aws_own_code(here: AwsRoom, wish: dict[str, Any], code: str) -> None:
    """And nothing is rented."""
    assert code == refusal(lambda: here.run(**wish))
    assert {} == here.world.rentals


def test_a_full_zone_has_no_capacity(here: AwsRoom) -> None:
    """AWS counts that among its own errors: status 500, which the SDK tries again."""
    most = capacity(here)
    here.ec2("run_instances", ImageId=IMAGE, InstanceType=TYPE, MinCount=most, MaxCount=most)
    with pytest.raises(ClientError) as caught:
        here.run()
    assert "InsufficientInstanceCapacity" == caught.value.response["Error"]["Code"]
    assert 500 == caught.value.response["ResponseMetadata"]["HTTPStatusCode"]
    assert most == len(here.world.rentals)


def test_a_launch_may_get_fewer_than_it_hoped_for(here: AwsRoom) -> None:
    """Between MinCount and MaxCount, in one reservation."""
    most = capacity(here)
    made = here.ec2("run_instances", ImageId=IMAGE, InstanceType=TYPE, MinCount=1, MaxCount=most + 5)
    assert most == len(made["Instances"])
    assert [most] == [len(r["Instances"]) for r in here.ec2("describe_instances")["Reservations"]]


def test_no_spot_capacity_leaves_on_demand(here: AwsRoom) -> None:
    """The market says no, to spot alone."""
    here.market(available=False)
    assert "InsufficientInstanceCapacity" == refusal(lambda: here.run(**SPOT))
    assert here.run()["InstanceId"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 500),
        ("MaxSpotInstanceCountExceeded", 400),
        ("VcpuLimitExceeded", 400),
        ("InsufficientHostCapacity", 500),
    ],
)
def test_capacity_and_quotas_come_by_fault(here: AwsRoom, code: str, status: int) -> None:
    """The fault names the code."""
    here.world.faults.add({"endpoint": "aws POST /ec2/RunInstances", "kind": "capacity", "code": code})
    with pytest.raises(ClientError) as caught:
        here.run()
    assert (code or "InsufficientInstanceCapacity") == caught.value.response["Error"]["Code"]
    assert status == caught.value.response["ResponseMetadata"]["HTTPStatusCode"]
    assert here.run()["InstanceId"]


def test_an_answer_that_is_lost_is_found_by_its_token(here: AwsRoom) -> None:
    """5xx after the effect: the same token finds what was made."""
    here.world.faults.add({"endpoint": "aws POST /ec2/RunInstances", "kind": "5xx_after", "status": 503})
    assert "Unavailable" == refusal(lambda: here.run(ClientToken="lost"))
    found = here.ids(client_token="lost")
    assert [here.run(ClientToken="lost")["InstanceId"]] == found


def test_throttling_is_requestlimitexceeded(here: AwsRoom) -> None:
    """As EC2 says it, with Retry-After where the fault has it."""
    here.world.faults.add({"endpoint": "aws POST /ec2/*", "kind": "429", "retry_after_s": 3})
    with pytest.raises(ClientError) as caught:
        here.ec2("describe_instances")
    assert "RequestLimitExceeded" == caught.value.response["Error"]["Code"]
    assert "3" == caught.value.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"]


def test_a_new_instance_may_not_be_seen_yet(here: AwsRoom) -> None:
    """Eventual consistency, by fault: not found by its id, missing in the list; then both."""
    made = here.run()["InstanceId"]
    stale = {"endpoint": "aws POST /ec2/DescribeInstances", "kind": "stale", "seconds": 600, "count": 2}
    here.world.faults.add(stale)
    assert "InvalidInstanceID.NotFound" == refusal(lambda: here.show(made))
    assert [] == here.ids()
    assert [made] == here.ids()


def test_filters_find_by_token_lifecycle_and_tag(here: AwsRoom) -> None:
    """What moto answers with a 500."""
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "gpubroker-attempt", "Value": "a-1"}]}]
    spot = here.run(ClientToken="s", TagSpecifications=tags, **SPOT)
    on_demand = here.run(ClientToken="d")["InstanceId"]
    assert [spot["InstanceId"]] == here.ids(client_token="s")
    assert [spot["InstanceId"]] == here.ids(instance_lifecycle="spot")
    assert [spot["InstanceId"]] == here.ids(**{"tag:gpubroker-attempt": "a-?"})
    assert [spot["InstanceId"]] == here.ids(spot_instance_request_id=spot["SpotInstanceRequestId"])
    assert [spot["InstanceId"], on_demand] == here.ids(instance_state_name="run*")
    assert [] == here.ids(client_token="s", **{"tag:gpubroker-attempt": "b"})
    assert "InvalidParameterValue" == refusal(lambda: here.ids(colour="red"))
    assert "a-1" == here.world.rentals[spot["InstanceId"]].tag


def test_a_long_list_comes_in_pages(here: AwsRoom) -> None:
    """MaxResults and NextToken."""
    here.ec2("run_instances", ImageId=IMAGE, InstanceType=TYPE, MinCount=8, MaxCount=8)
    first = here.ec2("describe_instances", MaxResults=5)
    second = here.ec2("describe_instances", MaxResults=5, NextToken=first["NextToken"])
    counts = [len(page["Reservations"][0]["Instances"]) for page in (first, second)]
    assert [5, 3] == counts
    assert "NextToken" not in second


def test_tags_are_added_and_taken_away(here: AwsRoom) -> None:
    """On an instance and on its spot request."""
    made = here.run(**SPOT)
    both = [made["InstanceId"], made["SpotInstanceRequestId"]]
    here.ec2("create_tags", Resources=both, Tags=[{"Key": "a", "Value": "1"}, {"Key": "b", "Value": "2"}])
    here.ec2("delete_tags", Resources=both, Tags=[{"Key": "a"}])
    assert [{"Key": "b", "Value": "2"}] == here.show(made["InstanceId"])["Tags"]
    requests = here.ec2("describe_spot_instance_requests")["SpotInstanceRequests"]
    assert [{"Key": "b", "Value": "2"}] == requests[0]["Tags"]
    listed = here.ec2("describe_tags", Filters=[{"Name": "key", "Values": ["b"]}])["Tags"]
    assert both == [row["ResourceId"] for row in listed]
    assert "InvalidInstanceID.NotFound" == refusal(
        lambda: here.ec2("create_tags", Resources=["i-0123"], Tags=[{"Key": "a", "Value": "1"}])
    )


def test_a_terminated_instance_is_seen_for_an_hour(here: AwsRoom) -> None:
    """shutting-down, terminated with the reason, then not found."""
    made = here.run()["InstanceId"]
    change = here.ec2("terminate_instances", InstanceIds=[made])["TerminatingInstances"][0]
    assert ("running", "shutting-down") == (change["PreviousState"]["Name"], change["CurrentState"]["Name"])
    here.pass_s(10)
    shown = here.show(made)
    assert ("terminated", "Client.UserInitiatedShutdown") == (
        shown["State"]["Name"],
        shown["StateReason"]["Code"],
    )
    assert "PublicIpAddress" not in shown
    assert not here.nodes.started[made].alive
    here.pass_s(3600)
    assert "InvalidInstanceID.NotFound" == refusal(lambda: here.show(made))
    assert [] == here.ids()


def test_terminating_names_all_or_nothing(here: AwsRoom) -> None:
    """One id that is not there, and nothing is touched; twice is no error."""
    made = here.run()["InstanceId"]
    assert "InvalidInstanceID.NotFound" == refusal(
        lambda: here.ec2("terminate_instances", InstanceIds=[made, "i-00000000000000000"])
    )
    assert "running" == here.show(made)["State"]["Name"]
    here.ec2("terminate_instances", InstanceIds=[made])
    here.pass_s(10)
    again = here.ec2("terminate_instances", InstanceIds=[made])["TerminatingInstances"][0]
    assert "terminated" == again["CurrentState"]["Name"]


def test_on_demand_stops_and_starts(here: AwsRoom) -> None:
    """Its disk is billed on, its address is another one."""
    made = here.run()["InstanceId"]
    here.ec2("stop_instances", InstanceIds=[made])
    here.pass_s(10)
    assert "stopped" == here.show(made)["State"]["Name"]
    here.pass_s(3600)
    here.ec2("start_instances", InstanceIds=[made])
    here.pass_s(60)
    assert "running" == here.show(made)["State"]["Name"]
    lines = {line.item: line.usd for line in bill.lines(here.world.rentals[made], here.clock.now_s())}
    assert lines["volume"] > 0
    assert lines["gpu"] < here.world.rentals[made].usd_per_hour / 10


def test_one_time_spot_cannot_be_stopped(here: AwsRoom) -> None:
    """Only a persistent request's can."""
    made = here.run(**SPOT)["InstanceId"]
    assert "UnsupportedOperation" == refusal(lambda: here.ec2("stop_instances", InstanceIds=[made]))
    options = {"SpotInstanceType": "persistent", "InstanceInterruptionBehavior": "stop"}
    other = here.run(InstanceMarketOptions={"MarketType": "spot", "SpotOptions": options})["InstanceId"]
    here.ec2("stop_instances", InstanceIds=[other])
    here.pass_s(10)
    assert "stopped" == here.show(other)["State"]["Name"]


def test_spot_is_taken_back_after_two_minutes_notice(here: AwsRoom) -> None:
    """First at its metadata, then terminated by AWS; the first hour is free."""
    made = here.run(**SPOT)["InstanceId"]
    assert 404 == imds(here, made, "meta-data/spot/instance-action")[0]
    assert 404 == imds(here, made, "meta-data/events/recommendations/rebalance")[0]
    here.market(available=False)
    here.pass_s(1)
    status, text = imds(here, made, "meta-data/spot/instance-action")
    assert (200, "terminate") == (status, json.loads(text)["action"])
    assert "noticeTime" in json.loads(imds(here, made, "meta-data/events/recommendations/rebalance")[1])
    here.pass_s(110)
    assert "running" == here.show(made)["State"]["Name"]
    here.pass_s(15)
    here.pass_s(10)
    shown = here.show(made)
    assert ("terminated", "Server.SpotInstanceTermination") == (
        shown["State"]["Name"],
        shown["StateReason"]["Code"],
    )
    assert not here.nodes.started[made].alive
    requests = here.ec2("describe_spot_instance_requests")["SpotInstanceRequests"]
    assert "instance-terminated-no-capacity" == requests[0]["Status"]["Code"]
    assert "gpu" not in {line.item for line in bill.lines(here.world.rentals[made], here.clock.now_s())}


def test_spot_above_its_highest_price_is_taken_back(here: AwsRoom) -> None:
    """And without a limit it costs what spot costs now."""
    here.market(price="0.30")
    limited = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.40"}}
    first = here.run(InstanceMarketOptions=limited)["InstanceId"]
    second = here.run(**SPOT)["InstanceId"]
    here.market(price="0.50")
    here.pass_s(1)
    here.pass_s(130)
    assert "shutting-down" == here.show(first)["State"]["Name"]
    assert "running" == here.show(second)["State"]["Name"]
    assert "0.50" == str(here.world.rentals[second].usd_per_hour)


def test_a_persistent_request_goes_on_when_there_is_room_again(here: AwsRoom) -> None:
    """Stopped by AWS with its own reason, then the same instance runs."""
    options = {"SpotInstanceType": "persistent", "InstanceInterruptionBehavior": "stop"}
    made = here.run(InstanceMarketOptions={"MarketType": "spot", "SpotOptions": options})["InstanceId"]
    here.market(available=False)
    here.pass_s(1)
    here.pass_s(130)
    here.pass_s(10)
    assert "Server.SpotInstanceShutdown" == here.show(made)["StateReason"]["Code"]
    here.market(available=True)
    here.pass_s(1)
    here.pass_s(60)
    assert "running" == here.show(made)["State"]["Name"]


def test_a_test_may_take_a_node_back_by_hand(here: AwsRoom) -> None:
    """At once and without a word, or with a notice."""
    silent, told = here.run(**SPOT)["InstanceId"], here.run(**SPOT)["InstanceId"]
    here.do(here.vendor.preempt(here.world.rentals[silent], None))
    here.do(here.vendor.preempt(here.world.rentals[told], 30))
    assert "Server.SpotInstanceTermination" == here.show(silent)["StateReason"]["Code"]
    assert 200 == imds(here, told, "meta-data/spot/instance-action")[0]
    here.pass_s(31)
    assert "shutting-down" == here.show(told)["State"]["Name"]


def test_metadata_wants_a_token_where_the_launch_says_so(here: AwsRoom) -> None:
    """Version 2; and only its own instance's."""
    strict = here.run(MetadataOptions={"HttpTokens": "required"})["InstanceId"]
    loose = here.run()["InstanceId"]
    path = "latest/meta-data/instance-id"
    bases = {one: here.nodes.envs[one]["AWS_EC2_METADATA_SERVICE_ENDPOINT"] for one in (strict, loose)}
    assert (401, "") == here.get(f"{bases[strict]}/{path}")
    assert (200, loose) == here.get(f"{bases[loose]}/{path}")
    assert (200, strict) == imds(here, strict, "meta-data/instance-id")
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    _, token = here.get(f"{bases[loose]}/latest/api/token", "PUT", **ttl)
    assert 401 == here.get(f"{bases[strict]}/{path}", **{"X-aws-ec2-metadata-token": token})[0]
    here.pass_s(61)
    assert 401 == here.get(f"{bases[loose]}/{path}", **{"X-aws-ec2-metadata-token": token})[0]
    assert 400 == here.get(f"{bases[loose]}/latest/api/token", "PUT")[0]


def test_metadata_says_where_and_what_it_is(here: AwsRoom) -> None:
    """And has the credentials of its role."""
    made = here.run(IamInstanceProfile={"Name": "worker"}, UserData="#cloud-config")["InstanceId"]
    shown = here.show(made)
    assert (
        shown["Placement"]["AvailabilityZone"] == imds(here, made, "meta-data/placement/availability-zone")[1]
    )
    assert "on-demand" == imds(here, made, "meta-data/instance-life-cycle")[1]
    assert "#cloud-config" == imds(here, made, "user-data")[1]
    document = json.loads(imds(here, made, "dynamic/instance-identity/document")[1])
    assert ("us-east-1", made) == (document["region"], document["instanceId"])
    keys = json.loads(imds(here, made, "meta-data/iam/security-credentials/worker")[1])
    assert here.vendor.env["AWS_ACCESS_KEY_ID"] == keys["AccessKeyId"]


def test_an_imported_key_opens_the_node(here: AwsRoom) -> None:
    """moto keeps the key pair, the node gets its public half."""
    _, public = new_key_pair("mine")
    here.ec2("import_key_pair", KeyName="mine", PublicKeyMaterial=public.encode())
    made = here.run(KeyName="mine")["InstanceId"]
    assert [public.split()[:2]] == [key.split()[:2] for key in here.nodes.keys[made]]


def test_a_node_that_is_stopped_while_it_starts_comes_up_once(here: AwsRoom) -> None:
    """Two starts of one instance leave one address open."""
    made = here.run()["InstanceId"]
    for _ in range(3):
        here.ec2("stop_instances", InstanceIds=[made])
        here.ec2("start_instances", InstanceIds=[made])
    here.pass_s(60)
    assert "running" == here.show(made)["State"]["Name"]
    assert here.nodes.started[made].alive


def test_status_checks_pass_when_it_runs(here: AwsRoom) -> None:
    """DescribeInstanceStatus, for boto3's waiter."""
    made = here.run()["InstanceId"]
    rows = here.ec2("describe_instance_status", InstanceIds=[made])["InstanceStatuses"]
    assert ["ok"] == [row["InstanceStatus"]["Status"] for row in rows]


def test_calls_that_would_make_unseen_instances_are_refused(here: AwsRoom) -> None:
    """moto would make them, and nobody would be billed."""
    assert "UnsupportedOperation" == refusal(lambda: here.ec2("request_spot_instances", InstanceCount=1))
    assert "DryRunOperation" == refusal(
        lambda: here.ec2(
            "purchase_capacity_block",
            CapacityBlockOfferingId="cb-1",
            InstancePlatform="Linux/UNIX",
            DryRun=True,
        )
    )


def test_a_key_that_sts_gave_out_opens_s3(here: AwsRoom) -> None:
    """For a node that is to have no key of the account; its policy is not enforced."""
    made = here.call("sts", "assume_role", RoleArn="arn:aws:iam::123456789012:role/r", RoleSessionName="job")
    key = made["Credentials"]["AccessKeyId"]
    assert key != ACCESS_KEY
    here.s3("create_bucket", Bucket="ckpt")
    assert [] == here.call("s3", "list_objects_v2", Bucket="ckpt", access_key=key).get("Contents", [])


def test_a_wrong_key_opens_nothing(here: AwsRoom) -> None:
    """Each service in its own words."""
    nobody = {"access_key": "nobody"}
    assert "AuthFailure" == refusal(lambda: here.ec2("describe_instances", **nobody))
    assert "InvalidAccessKeyId" == refusal(lambda: here.s3("list_buckets", **nobody))
    unknown = refusal(lambda: here.call("pricing", "describe_services", **nobody))
    assert "UnrecognizedClientException" == unknown
    assert 403 == here.get(f"{here.vendor.url}/")[0]
