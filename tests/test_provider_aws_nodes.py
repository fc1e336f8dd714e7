"""Nodes at AWS: what is asked of EC2, what its errors mean, and the contract on a test cloud with real nodes."""

import contextlib
import time
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache

import boto3
import pytest
from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from botocore.stub import Stubber

pytest.importorskip("moto", reason="needs the extra [testcloud]")

from gpubroker.doors import SystemClock, ThreadPool
from gpubroker.errors import (
    AuthFailed,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    PayloadChanged,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.provider import Capabilities, NodeSpec, NodeView, SshAddress
from gpubroker.run.shell import connect, make_key
from gpubroker.testcloud.client import running
from gpubroker.testing import ComputeContract
from gpubroker_providers.aws import Aws
from gpubroker_providers.aws_nodes import (
    IMAGE_PARAMETER,
    Image,
    launch_error,
    launch_request,
    newest_image,
    parse_instance,
)
from gpubroker_providers.aws_rows import instance_offer
from tests.support import PATIENCE_S, context

TAG = "gpubroker-0123456789ab"
TYPE = "g6.xlarge"
REGION = "us-east-1"
PRIVATE, PUBLIC = make_key()
SPEC = NodeSpec(image="", disk_gb=20, ssh_public_key=PUBLIC)
ON_DEMAND = instance_offer(TYPE, "on_demand", Decimal("0.8048"), region=REGION)
SPOT = instance_offer(TYPE, "spot", Decimal("0.40"), region=REGION, zone="use1-az2")
IMAGE = Image(id="ami-0123456789abcdef0", root_device="/dev/sda1", disk_gb=75)
ACCOUNT = {"AWS_ACCESS_KEY_ID": "AKIASYNTHETICTEST001", "AWS_SECRET_ACCESS_KEY": "secret-of-the-aws-test"}
TAGS = [{"Key": "gpubroker-attempt", "Value": TAG}, {"Key": "Name", "Value": TAG}]


# What is asked


def test_a_spot_launch_is_one_time_without_a_price_and_tagged_everywhere():
    """AWS advises against MaxPrice; tokens guard the metadata; a shutdown from inside ends it."""
    expected = {
        "ImageId": "ami-0123456789abcdef0",
        "InstanceType": TYPE,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": TAG,
        "KeyName": TAG,
        "SecurityGroupIds": ["sg-1"],
        "SubnetId": "subnet-1",
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": 75, "VolumeType": "gp3", "DeleteOnTermination": True},
            }
        ],
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required"},
        "InstanceMarketOptions": {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        },
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": TAGS} for kind in ("instance", "volume", "spot-instances-request")
        ],
    }
    assert expected == launch_request(SPOT, SPEC, TAG, IMAGE, subnet_id="subnet-1", group_id="sg-1")


def test_an_on_demand_launch_leaves_the_zone_to_aws():
    """And has the disk that the job asks for when it is more than the image's."""
    spec = NodeSpec(image="", disk_gb=300, ssh_public_key=PUBLIC, env={"SECRET": "of the job"})
    request = launch_request(ON_DEMAND, spec, TAG, IMAGE, subnet_id="", group_id="sg-1")
    assert {"SubnetId", "InstanceMarketOptions", "UserData"}.isdisjoint(request)
    assert 300 == request["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"]
    assert ["instance", "volume"] == [spec["ResourceType"] for spec in request["TagSpecifications"]]
    assert "of the job" not in repr(request)


def test_the_newest_image_is_taken_with_its_disk():
    """Its root volume says how small a disk may be."""

    def row(number, day, size):
        disks = [{"DeviceName": "/dev/sdb"}, {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": size}}]
        return {
            "ImageId": f"ami-{number}",
            "CreationDate": f"2026-11-{day}T00:00:00.000Z",
            "RootDeviceName": "/dev/xvda",
            "BlockDeviceMappings": disks,
        }

    rows = [row(1, "02", 60), row(2, "20", 65), row(3, "11", 70)]
    assert Image(id="ami-2", root_device="/dev/xvda", disk_gb=65) == newest_image(rows)
    assert newest_image([]) is None


# What the errors mean

REQUEST = {"ClientToken": TAG, "InstanceType": "g5.xlarge"}


def refused(code, status=400):
    error = {"Error": {"Code": code, "Message": "as it says"}}
    return sdk.ClientError({**error, "ResponseMetadata": {"HTTPStatusCode": status}}, "RunInstances")


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        pytest.param(refused("InsufficientInstanceCapacity", 500), NoCapacity, id="no capacity, a 500"),
        pytest.param(refused("InsufficientHostCapacity", 500), NoCapacity, id="no host capacity"),
        pytest.param(refused("UnfulfillableCapacity", 500), NoCapacity, id="unfulfillable"),
        pytest.param(refused("SpotMaxPriceTooLow"), NoCapacity, id="spot is dearer than on demand"),
        pytest.param(refused("Unsupported"), NoCapacity, id="not sold in this zone"),
        pytest.param(refused("MaxSpotInstanceCountExceeded"), QuotaExceeded, id="spot quota"),
        pytest.param(refused("VcpuLimitExceeded"), QuotaExceeded, id="vCPU quota"),
        pytest.param(refused("InstanceLimitExceeded"), QuotaExceeded, id="instance quota"),
        pytest.param(refused("PendingVerification"), QuotaExceeded, id="the account is being validated"),
        pytest.param(refused("UnauthorizedOperation", 403), AuthFailed, id="not allowed"),
        pytest.param(refused("AuthFailure", 401), AuthFailed, id="wrong key"),
        pytest.param(refused("OptInRequired", 403), AuthFailed, id="no subscription"),
        pytest.param(refused("Blocked", 403), AuthFailed, id="a blocked account"),
        pytest.param(refused("RequestLimitExceeded", 503), Transient, id="throttled, a 503"),
        pytest.param(refused("Throttling"), Transient, id="throttled"),
        pytest.param(refused("InternalError", 500), LaunchUncertain, id="a 500"),
        pytest.param(refused("ServiceUnavailable", 503), LaunchUncertain, id="a 503"),
        pytest.param(refused("IdempotentParameterMismatch"), LaunchUncertain, id="one token, two requests"),
        pytest.param(refused("InvalidParameterValue"), Refused, id="wrong value"),
        pytest.param(refused("InvalidAMIID.NotFound"), Refused, id="no such image"),
        pytest.param(refused("InvalidKeyPair.NotFound"), Refused, id="no such key"),
        pytest.param(sdk.ParamValidationError(report="no"), Refused, id="not even sent"),
        pytest.param(sdk.EndpointConnectionError(endpoint_url="x"), Unreachable, id="no connection"),
        pytest.param(sdk.ConnectTimeoutError(endpoint_url="x"), Unreachable, id="no connection in time"),
        pytest.param(sdk.ReadTimeoutError(endpoint_url="x"), LaunchUncertain, id="no answer in time"),
        pytest.param(sdk.ConnectionClosedError(endpoint_url="x"), LaunchUncertain, id="cut off"),
        pytest.param(ResponseParserError("half an answer"), LaunchUncertain, id="not XML"),
        pytest.param(KeyError("Instances"), LaunchUncertain, id="an answer without an instance"),
        pytest.param(sdk.NoCredentialsError(), MissingCredentials, id="no credentials"),
    ],
)
def test_what_a_launch_raises_says_whether_something_may_bill(raised, error):
    """Only what AWS refuses for sure is no doubt; a doubt names the tag."""
    found = launch_error(raised, REQUEST, REGION)
    assert error is type(found)
    if isinstance(found, LaunchUncertain):
        assert TAG == found.tag


@pytest.mark.parametrize(
    ("more", "what"),
    [
        pytest.param({"InstanceType": "p5.48xlarge"}, "vCPUs of on-demand P instances", id="on demand"),
        pytest.param(
            {"InstanceMarketOptions": {"MarketType": "spot"}}, "vCPUs of spot G instances", id="spot"
        ),
    ],
)
def test_a_quota_says_what_to_ask_for_and_where(more, what):
    """A quota is one of a region, a family of types and a market."""
    found = launch_error(refused("VcpuLimitExceeded"), {**REQUEST, **more}, REGION)
    assert REGION == found.region
    assert f"{what}: https://{REGION}.console.aws.amazon.com/servicequotas/" in str(found)


def test_no_secret_is_in_an_error_of_a_launch():
    """Proxies print what they were sent."""
    proxy = sdk.ProxyConnectionError(proxy_url="http://u:hidden@p", error="no")
    error = launch_error(proxy, REQUEST, REGION, ["hidden"])
    assert "hidden" not in str(error)


# What an instance is


def row(state, **more):
    return {"InstanceId": "i-1", "State": {"Name": state}, "Tags": TAGS, **more}


NO_REASON = {"id": "i-1", "tag": TAG}
ADDRESS = SshAddress(host="198.51.100.7", port=22, username="ubuntu")
LAUNCHED = datetime(2026, 11, 24, 11, 59, tzinfo=UTC)


@pytest.mark.parametrize(
    ("instance", "node"),
    [
        pytest.param(row("pending"), NodeView(**NO_REASON, status="starting"), id="pending"),
        pytest.param(
            row("running", PublicIpAddress="198.51.100.7", PublicDnsName="ec2.example", LaunchTime=LAUNCHED),
            NodeView(**NO_REASON, status="running", ssh=ADDRESS, created_at=LAUNCHED),
            id="running",
        ),
        pytest.param(
            row("running", PublicDnsName="ec2.example"),
            NodeView(
                **NO_REASON,
                status="running",
                ssh=SshAddress(host="ec2.example", port=22, username="ubuntu"),
            ),
            id="running, by name",
        ),
        pytest.param(row("stopped"), NodeView(**NO_REASON, status="stopped"), id="stopped"),
        pytest.param(
            row("shutting-down", StateReason={"Code": "Server.SpotInstanceTermination", "Message": "taken"}),
            NodeView(**NO_REASON, status="gone", reason="taken", is_preempted=True),
            id="reclaimed",
        ),
        pytest.param(
            row("terminated", StateReason={"Code": "Client.UserInitiatedShutdown"}),
            NodeView(**NO_REASON, status="gone", reason="Client.UserInitiatedShutdown"),
            id="ended by us",
        ),
        pytest.param(
            row("terminated", StateReason={"Code": "Client.InstanceInitiatedShutdown"}),
            NodeView(**NO_REASON, status="gone", reason="Client.InstanceInitiatedShutdown"),
            id="ended from inside",
        ),
        pytest.param({**row("running"), "Tags": []}, None, id="somebody else's"),
        pytest.param(
            {**row("running"), "Tags": [{"Key": "gpubroker-attempt", "Value": "mine"}]}, None, id="not a tag"
        ),
    ],
)
def test_an_instance_is_a_node_in_our_words(instance, node):
    """Billing ends with shutting-down; only AWS's own reasons are a preemption."""
    assert node == parse_instance(instance)


@pytest.mark.parametrize("broken", [{"InstanceId": "i-1", "Tags": TAGS}, {**row("melting")}, {"Tags": TAGS}])
def test_an_instance_that_cannot_be_read_is_a_changed_payload(broken):
    """Leaving it out would say that it is gone."""
    with pytest.raises(PayloadChanged, match="DescribeInstances"):
        parse_instance(broken)


def test_what_aws_can_do():
    """Two minutes' notice; the tag is a client token; what AWS takes back in its first hour is free."""
    expected = Capabilities(
        notice_s=120,
        own_end={"command": ["sudo", "-n", "shutdown", "-h", "now"]},
        idempotent_create=True,
        tag_max=64,
        image_by="docker",
        bills_idle_disk=True,
        free_if_preempted_within_s=3600,
        least_disk_gb=100,
    )
    assert expected == Aws(context(env=ACCOUNT)).capabilities


# How it is asked, with stubs


@pytest.fixture
def ec2(monkeypatch):
    """The client of us-east-1, which answers as it is told and fails the test when it is not asked."""
    make = boto3.Session.client
    session = boto3.Session(aws_access_key_id="x", aws_secret_access_key="y")
    stubber = Stubber(make(session, "ec2", region_name=REGION))
    monkeypatch.setattr(boto3.Session, "client", lambda self, *args, **named: stubber.client)
    with stubber:
        yield stubber
        stubber.assert_no_pending_responses()


SUBNETS = [{"SubnetId": f"subnet-{n}", "VpcId": "vpc-1", "AvailabilityZoneId": f"use1-az{n}"} for n in (1, 2)]
GROUP = {"GroupId": "sg-1", "IpPermissions": [{"FromPort": 22}]}


def prepare(ec2, subnets=SUBNETS, groups=(GROUP,)):
    """Answers to what comes before a launch."""
    image = {"ImageId": "ami-0123456789abcdef0", "RootDeviceName": "/dev/sda1"}
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 75}}
    ec2.add_response(
        "describe_images",
        {"Images": [{**image, "BlockDeviceMappings": [disk]}]},
        {
            "Owners": ["amazon"],
            "Filters": [
                {
                    "Name": "name",
                    "Values": ["Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04)*"],
                },
                {"Name": "state", "Values": ["available"]},
                {"Name": "architecture", "Values": ["x86_64"]},
            ],
        },
    )
    ec2.add_response(
        "describe_subnets",
        {"Subnets": subnets},
        {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]},
    )
    if subnets:
        ec2.add_response("describe_security_groups", {"SecurityGroups": list(groups)})


def import_key(ec2):
    ec2.add_response(
        "import_key_pair", {"KeyName": TAG}, {"KeyName": TAG, "PublicKeyMaterial": PUBLIC.encode()}
    )


def create(provider, offer=SPOT, spec=SPEC):
    return provider.create(offer, spec, TAG, bid_usd_per_hour=None, deadline_s=30)


def aws():
    return Aws(context(env=ACCOUNT, aws_regions=(REGION,)))


def test_a_launch_goes_to_the_subnet_of_its_zone(ec2):
    """With what was found there, in one request whose token is the tag."""
    prepare(ec2)
    import_key(ec2)
    expected = launch_request(SPOT, SPEC, TAG, IMAGE, subnet_id="subnet-2", group_id="sg-1")
    ec2.add_response("run_instances", {"Instances": [{"InstanceId": "i-1"}]}, expected)
    assert "i-1" == create(aws())


def test_a_missing_subnet_and_group_are_made(ec2):
    """Under our names, and that group lets SSH in and nothing else."""
    prepare(ec2, subnets=[])
    with pytest.raises(Refused, match="aws ec2 create-default-vpc --region us-east-1"):
        create(aws())
    prepare_made = {"Subnet": {"SubnetId": "subnet-2", "VpcId": "vpc-1"}}
    image = {"ImageId": "ami-0123456789abcdef0"}
    ec2.add_response("describe_images", {"Images": [image]})
    ec2.add_response("describe_subnets", {"Subnets": SUBNETS[:1]})
    ec2.add_response("create_default_subnet", prepare_made, {"AvailabilityZoneId": "use1-az2"})
    wanted = [
        {"Name": "group-name", "Values": ["gpubroker-ssh"]},
        {"Name": "vpc-id", "Values": ["vpc-1"]},
    ]
    ec2.add_response("describe_security_groups", {"SecurityGroups": []}, {"Filters": wanted})
    tags = [{"ResourceType": "security-group", "Tags": [{"Key": "Name", "Value": "gpubroker-ssh"}]}]
    ec2.add_response(
        "create_security_group",
        {"GroupId": "sg-2"},
        {
            "GroupName": "gpubroker-ssh",
            "Description": "SSH to nodes that gpubroker rents",
            "VpcId": "vpc-1",
            "TagSpecifications": tags,
        },
    )
    ec2.add_response("describe_security_groups", {"SecurityGroups": [{"GroupId": "sg-2"}]})
    anywhere = [{"CidrIp": "0.0.0.0/0", "Description": "SSH, by key"}]
    rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": anywhere}
    ec2.add_response("authorize_security_group_ingress", {}, {"GroupId": "sg-2", "IpPermissions": [rule]})
    ec2.add_client_error("import_key_pair", "InvalidKeyPair.Duplicate", "it is there")
    ec2.add_response("run_instances", {"Instances": [{"InstanceId": "i-1"}]})
    assert "i-1" == create(aws())


@pytest.mark.parametrize(
    ("subnets", "path"),
    [
        pytest.param([{"SubnetId": "subnet-2", "AvailabilityZoneId": "use1-az2"}], "VpcId", id="no VPC"),
        pytest.param([{"VpcId": "vpc-1", "AvailabilityZoneId": "use1-az2"}], "SubnetId", id="no subnet"),
    ],
)
def test_an_answer_without_what_a_launch_needs_is_a_changed_payload(ec2, subnets, path):
    """Nothing was launched, and no traceback is shown."""
    prepare(ec2, subnets=subnets)
    ec2._queue.pop()  # nobody asks for groups
    with pytest.raises(PayloadChanged, match=path):
        create(aws())


def test_a_refused_launch_takes_its_key_pair_back(ec2):
    """A ranking is fallen through with a new tag each time."""
    prepare(ec2)
    import_key(ec2)
    ec2.add_client_error("run_instances", "InsufficientInstanceCapacity", "none", http_status_code=500)
    ec2.add_response("delete_key_pair", {}, {"KeyName": TAG})
    with pytest.raises(NoCapacity, match="InsufficientInstanceCapacity"):
        create(aws())


def test_a_doubtful_launch_keeps_its_key_pair(ec2):
    """What may run can be talked to."""
    prepare(ec2)
    import_key(ec2)
    ec2.add_client_error("run_instances", "InternalError", "oops", http_status_code=500)
    with pytest.raises(LaunchUncertain, match=TAG):
        create(aws())


def test_a_refusal_before_the_launch_is_one_too(ec2):
    """By the same table: here the account may have no more groups."""
    prepare(ec2, groups=())
    ec2.add_client_error("create_security_group", "SecurityGroupLimitExceeded", "no more")
    with pytest.raises(QuotaExceeded, match="SecurityGroupLimitExceeded") as caught:
        create(aws())
    assert REGION == caught.value.region


def test_a_launch_that_its_deadline_overtakes_is_not_sent(ec2):
    """Nobody waits for its answer any more."""
    prepare(ec2)
    import_key(ec2)
    ec2.add_response("delete_key_pair", {}, {"KeyName": TAG})
    with pytest.raises(Transient, match="deadline"):
        aws().create(SPOT, SPEC, TAG, bid_usd_per_hour=None, deadline_s=0)


@pytest.mark.parametrize(
    ("offer", "spec"),
    [
        pytest.param(instance_offer(TYPE, "spot", Decimal(1)), SPEC, id="no region"),
        pytest.param(SPOT, NodeSpec(image="", disk_gb=20), id="no key"),
        pytest.param(
            SPOT, NodeSpec(image="", disk_gb=1, ssh_public_key=PUBLIC, volume_id="v"), id="a volume"
        ),
    ],
)
def test_a_launch_that_makes_no_sense_is_not_asked(offer, spec):
    """Without a region there is no place, without a key no way in, and no network volume is mounted."""
    with pytest.raises(ValueError, match="aws"):
        create(aws(), offer, spec)


def test_an_instance_unknown_soon_after_its_create_is_not_gone(ec2):
    """Each of EC2's machines hears of it in its own time; after some minutes it is."""
    prepare(ec2)
    import_key(ec2)
    ec2.add_response("run_instances", {"Instances": [{"InstanceId": "i-1"}]})
    provider = aws()
    create(provider)
    for _ in range(2):
        ec2.add_client_error("terminate_instances", "InvalidInstanceID.NotFound", "no such instance")
    with pytest.raises(Transient, match="not yet"):
        provider.terminate("i-1", 30)
    provider._context.clock.advance(301)
    ec2.add_response("delete_key_pair", {}, {"KeyName": TAG})
    provider.terminate("i-1", 30)


def test_the_listing_asks_for_our_tag_and_reads_all_pages(ec2):
    """A region may have more than a page of them."""
    asked = {"Filters": [{"Name": "tag:gpubroker-attempt", "Values": ["gpubroker-*"]}], "MaxResults": 1000}
    first = {"Reservations": [{"Instances": [row("running")]}], "NextToken": "2"}
    second = {"Reservations": [{"Instances": [row("running"), {**row("pending"), "InstanceId": "i-2"}]}]}
    ec2.add_response("describe_instances", first, asked)
    ec2.add_response("describe_instances", second, {**asked, "NextToken": "2"})
    assert ["i-1", "i-2"] == [node.id for node in aws().list_nodes(30)]


def test_a_region_that_fails_fails_the_listing(ec2):
    """A node that is not listed would count as gone."""
    ec2.add_client_error("describe_instances", "InternalError", "oops", http_status_code=500)
    with pytest.raises(Transient, match="DescribeInstances"):
        aws().list_nodes(30)


def test_an_instance_is_never_started_again():
    """A one-time spot instance cannot be stopped."""
    with pytest.raises(Refused):
        aws().restart("i-1", 30)


# On a test cloud: real nodes, real SSH, real faults

FAULTY = {"create": "RunInstances", "list": "DescribeInstances", "end": "TerminateInstances"}


@pytest.fixture(scope="module")
def cloud():
    with running(seed=5, speed=20) as up:
        yield up


@cache
def boto3_clients(cloud_pid):
    """Making one takes longer than a call."""
    return {}


def newly_built(cloud, *regions):
    """As a process that has just begun, but for boto3's clients."""
    provider = Aws(context(env=dict(cloud.env), aws_regions=regions, clock=SystemClock(), pool=ThreadPool()))
    provider._accounts = boto3_clients(cloud.pid)
    return provider


def client_of(cloud):
    return boto3.client(
        "ec2",
        region_name=REGION,
        endpoint_url=cloud.env["AWS_ENDPOINT_URL"],
        aws_access_key_id=cloud.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cloud.env["AWS_SECRET_ACCESS_KEY"],
    )


def spot_offer(owner):
    """One that has room now."""
    seen = owner.describe_spot_price_history(InstanceTypes=[TYPE], StartTime=datetime.now(UTC))
    for place in seen["SpotPriceHistory"]:
        launch = {"ImageId": IMAGE.id, "InstanceType": TYPE, "MinCount": 1, "MaxCount": 1}
        market = {"InstanceMarketOptions": {"MarketType": "spot"}}
        where = {"Placement": {"AvailabilityZone": place["AvailabilityZone"]}}
        with contextlib.suppress(sdk.ClientError):
            made = owner.run_instances(**launch, **market, **where)["Instances"][0]
            owner.terminate_instances(InstanceIds=[made["InstanceId"]])
            zone = place["AvailabilityZoneId"]
            return instance_offer(TYPE, "spot", Decimal(place["SpotPrice"]), region=REGION, zone=zone)
    pytest.fail("the test cloud has no spot at all")


class TestAwsRentsByTheContract(ComputeContract):
    """Of the test cloud's EC2."""

    markets = ("spot", "on_demand")
    unknown_id = "i-0123456789abcdef0"

    @pytest.fixture(autouse=True)
    def _cloud(self, cloud):
        self.cloud = cloud

    def make(self):
        return newly_built(self.cloud, "us-east-2", REGION)

    def offer(self, market):
        return spot_offer(client_of(self.cloud)) if market == "spot" else ON_DEMAND

    def at_vendor(self, tag):
        return [node["id"] for node in self.cloud.nodes(vendor="aws", tag=tag) if node["state"] != "ended"]

    @contextlib.contextmanager
    def breaking(self, operation, kind):
        seconds = {"seconds": 3600} if kind == "stale" else {}
        self.cloud.break_with({"endpoint": f"aws POST /ec2/{FAULTY[operation]}", "kind": kind, **seconds})
        try:
            yield
        finally:
            self.cloud.mend()

    def rent_untagged(self):
        launch = {"ImageId": IMAGE.id, "InstanceType": TYPE, "MinCount": 1, "MaxCount": 1}
        return client_of(self.cloud).run_instances(**launch)["Instances"][0]["InstanceId"]


@pytest.fixture
def provider(cloud):
    return newly_built(cloud, REGION)


def until_it_runs(provider, tag):
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        found = [node for node in provider.list_nodes(30) if node.tag == tag and node.ssh]
        if found:
            return found[0]
        time.sleep(0.1)
    raise TimeoutError(tag)


def key_names(owner):
    return [pair["KeyName"] for pair in owner.describe_key_pairs()["KeyPairs"]]


def test_a_command_runs_on_a_node_over_ssh_with_the_jobs_own_key(cloud, provider):
    """By our launch, our listing and our shell; when it has gone its key pair has too."""
    owner, tag = client_of(cloud), "gpubroker-talks"
    made = provider.create(ON_DEMAND, SPEC, tag, bid_usd_per_hour=None, deadline_s=30)
    assert tag in key_names(owner)
    shell = connect(until_it_runs(provider, tag).ssh, PRIVATE, host_key=None, deadline_s=20)
    try:
        ran = shell.run("nvidia-smi -L; cat; exit 7", stdin=b"given", deadline_s=20)
    finally:
        shell.close()
    assert (7, True, True) == (ran.status, b"NVIDIA L4" in ran.stdout, ran.stdout.endswith(b"given"))
    provider.terminate(made, 30)
    assert tag not in key_names(owner)


def test_the_same_tag_twice_is_one_node(cloud, provider):
    """AWS itself sees to that, so a create that failed in doubt may be repeated."""
    tag = "gpubroker-twice"
    made = {provider.create(ON_DEMAND, SPEC, tag, bid_usd_per_hour=None, deadline_s=30) for _ in range(2)}
    assert made == {node["id"] for node in cloud.nodes(vendor="aws", tag=tag)}
    assert 1 == len(made)
    provider.terminate(made.pop(), 30)


def test_a_node_that_aws_takes_back_is_preempted(cloud, provider):
    """And not one that its owner ended."""
    tag = "gpubroker-taken"
    offer = spot_offer(client_of(cloud))
    made = provider.create(offer, SPEC, tag, bid_usd_per_hour=None, deadline_s=30)
    cloud.preempt(made)
    node = next(node for node in provider.list_nodes(30) if node.id == made)
    assert ("gone", True) == (node.status, node.is_preempted)


@pytest.mark.parametrize("code", ["MaxSpotInstanceCountExceeded", "VcpuLimitExceeded"])
def test_a_quota_is_told_from_a_lack_of_capacity(cloud, provider, code):
    """The next offer of the same kind would fail alike."""
    cloud.break_with({"endpoint": "aws POST /ec2/RunInstances", "kind": "capacity", "code": code})
    with pytest.raises(QuotaExceeded, match=code):
        provider.create(ON_DEMAND, SPEC, "gpubroker-quota", bid_usd_per_hour=None, deadline_s=30)
    assert [] == cloud.nodes(vendor="aws", tag="gpubroker-quota")


def test_leftovers_are_swept_and_what_is_in_use_stays(cloud, provider):
    """Key pairs of launches that came to nothing, and at last the security group."""
    owner = client_of(cloud)
    provider.sweep_leftovers([], 30)  # those of other tests
    for name in ("gpubroker-left", "gpubroker-under-way", "mine"):
        owner.import_key_pair(KeyName=name, PublicKeyMaterial=PUBLIC.encode())
    made = provider.create(ON_DEMAND, SPEC, "gpubroker-alive", bid_usd_per_hour=None, deadline_s=30)
    assert ["us-east-1 key pair gpubroker-left"] == provider.sweep_leftovers(["gpubroker-under-way"], 30)
    assert {"gpubroker-under-way", "gpubroker-alive", "mine"} == set(key_names(owner))
    provider.terminate(made, 30)
    assert "us-east-1 key pair gpubroker-under-way" in provider.sweep_leftovers([], 30)
    assert ["mine"] == key_names(owner)
    groups = owner.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["gpubroker-ssh"]}])
    assert [] == groups["SecurityGroups"]


BEFORE_A_LAUNCH = (
    *("DescribeImages", "DescribeSubnets", "DescribeSecurityGroups", "CreateSecurityGroup"),
    *("AuthorizeSecurityGroupIngress", "ImportKeyPair"),
)


@pytest.mark.parametrize("kind", ["429", "drop_after", "truncate"])
@pytest.mark.parametrize("operation", BEFORE_A_LAUNCH)
def test_what_goes_wrong_before_a_launch_leaves_nothing_and_no_doubt(cloud, provider, operation, kind):
    """And the same create, asked for again, finds what the first one made."""
    tag = f"gpubroker-{operation}-{kind}".lower().replace("_", "-")
    provider.sweep_leftovers([], 30)
    cloud.break_with({"endpoint": f"aws POST /ec2/{operation}", "kind": kind})
    try:
        with pytest.raises((Transient, PayloadChanged)):
            provider.create(ON_DEMAND, SPEC, tag, bid_usd_per_hour=None, deadline_s=30)
    finally:
        cloud.mend()
    assert [] == cloud.nodes(vendor="aws", tag=tag)
    made = newly_built(cloud, REGION).create(ON_DEMAND, SPEC, tag, bid_usd_per_hour=None, deadline_s=30)
    assert [made] == [node["id"] for node in cloud.nodes(vendor="aws", tag=tag)]
    wanted = [{"Name": "group-name", "Values": ["gpubroker-ssh"]}]
    groups = client_of(cloud).describe_security_groups(Filters=wanted)["SecurityGroups"]
    assert [[22]] == [[rule["FromPort"] for rule in group["IpPermissions"]] for group in groups]
    provider.terminate(made, 30)


def test_a_region_without_the_image_by_name_takes_it_by_parameter(cloud, provider):
    """As the test cloud's regions are."""
    made = provider.create(ON_DEMAND, SPEC, "gpubroker-image", bid_usd_per_hour=None, deadline_s=30)
    shown = client_of(cloud).describe_instances(InstanceIds=[made])["Reservations"][0]["Instances"][0]
    assert IMAGE_PARAMETER == shown["ImageId"]
    assert "required" == shown["MetadataOptions"]["HttpTokens"]
    provider.terminate(made, 30)


def test_no_key_of_the_account_is_with_a_node(cloud, provider):
    """Neither in its environment nor in a file of its own."""
    tag = "gpubroker-secret"
    made = provider.create(ON_DEMAND, SPEC, tag, bid_usd_per_hour=None, deadline_s=30)
    shell = connect(until_it_runs(provider, tag).ssh, PRIVATE, host_key=None, deadline_s=20)
    try:
        ran = shell.run("env; grep -r . ~ 2>/dev/null || true", deadline_s=20)
    finally:
        shell.close()
        provider.terminate(made, 30)
    assert cloud.env["AWS_SECRET_ACCESS_KEY"].encode() not in ran.stdout


def test_errors_of_a_wrong_account_do_not_show_it(cloud):
    """AuthFailed, and no key in it."""
    env = {**cloud.env, "AWS_ACCESS_KEY_ID": "AKIDOTHER", "AWS_SECRET_ACCESS_KEY": "never-shown"}
    provider = Aws(context(env=env, aws_regions=(REGION,)))
    with pytest.raises(ProviderError) as caught:
        provider.list_nodes(30)
    assert isinstance(caught.value, AuthFailed)
    assert "never-shown" not in str(caught.value)
