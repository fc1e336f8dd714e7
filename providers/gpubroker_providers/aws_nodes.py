"""Nodes at AWS: EC2 instances, spot and on demand. The part of aws.py that rents.

create     -> image, subnet, security group, key pair (each found or made) -> RunInstances
list_nodes -> DescribeInstances by our tag, all pages, every region in use -> NodeView

The tag is the ClientToken, so that the same create twice is one instance; it is also the instance's tag
`gpubroker-attempt`, its Name, and the name of its key pair, which goes when the instance goes. The security
group `gpubroker-ssh` is one a network. Both can be found by these names alone: `sweep_leftovers` removes
those that nothing uses any more.

A spot request never has a MaxPrice: AWS advises against one, and without it the most is the on-demand price.
An instance has no role, so no credentials of the account, and its metadata answers to tokens only. NodeSpec's
`env` and `lifetime_s` are not for the vendor here: whoever runs commands on the node sees to both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from gpubroker.doors import Shell
from gpubroker.errors import (
    AuthFailed,
    BrokerError,
    LaunchUncertain,
    NoCapacity,
    PayloadChanged,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.model import Market, Offer
from gpubroker.provider import TAG, Capabilities, NodeSpec, NodeStatus, NodeView, ProviderContext, SshAddress
from gpubroker_providers._nodes import check_launch
from gpubroker_providers.aws_account import Account, error_code, http_status, our_error

NAME = "aws"
TAG_KEY = "gpubroker-attempt"
GROUP_NAME = "gpubroker-ssh"
MARKETS: tuple[Market, ...] = ("spot", "on_demand")
# Driver, CUDA, docker with NVIDIA's toolkit. By name, because its row says how large its disk is; the
# parameter is for regions and accounts that do not see it by name.
IMAGE_NAME = "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04)*"
IMAGE_PARAMETER = (
    "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
)
_USERNAME = "ubuntu"
_SSH_PORT = 22
_ROOT_DEVICE, _ROOT_GB = "/dev/sda1", 100
# By InstanceInitiatedShutdownBehavior of the launch a shutdown from inside is a termination.
OWN_END: Mapping[str, Any] = {"command": ["sudo", "-n", "shutdown", "-h", "now"]}
_CAPABILITIES = Capabilities(
    notice_s=120,
    own_end=OWN_END,
    idempotent_create=True,
    tag_max=64,
    image_by="docker",
    bills_idle_disk=True,
    free_if_preempted_within_s=3600,
    least_disk_gb=_ROOT_GB,
)
# So long after its create an instance may be unknown to another of EC2's machines.
_SETTLES_S = 300.0
_RECLAIMED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")
# Billing ends with shutting-down.
_STATUS: Mapping[str, NodeStatus] = {
    "pending": "starting",
    "running": "running",
    "stopping": "stopped",
    "stopped": "stopped",
    "shutting-down": "gone",
    "terminated": "gone",
}
# What AWS says for sure it has not done, by its error code, whatever the HTTP status.
_REFUSALS: tuple[tuple[type[ProviderError], re.Pattern[str]], ...] = (
    (Transient, re.compile("RequestLimitExceeded|Throttl.*|.*ThrottledException|TooManyRequests.*")),
    (QuotaExceeded, re.compile("MaxSpotInstanceCountExceeded|PendingVerification|.*LimitExceeded")),
    (NoCapacity, re.compile("Insufficient.*|UnfulfillableCapacity|SpotMaxPriceTooLow|Unsupported")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What an instance boots from."""

    id: str
    root_device: str
    disk_gb: int  # its root volume cannot be smaller


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Where an instance is that this process has made or seen."""

    region: str
    tag: str
    made_s: float | None = None  # monotonic; None = it was there already


def newest_image(rows: Iterable[Mapping[str, Any]]) -> Image | None:
    """The latest of DescribeImages' rows; None of none."""
    row = max(rows, key=lambda row: str(row.get("CreationDate", "")), default=None)
    if row is None:
        return None
    disks = {d.get("DeviceName"): d.get("Ebs", {}) for d in row.get("BlockDeviceMappings", [])}
    root = str(row.get("RootDeviceName") or _ROOT_DEVICE)
    return Image(
        id=row["ImageId"], root_device=root, disk_gb=disks.get(root, {}).get("VolumeSize") or _ROOT_GB
    )


def launch_request(
    offer: Offer, spec: NodeSpec, tag: str, image: Image, *, subnet_id: str, group_id: str
) -> dict[str, Any]:
    """The arguments of RunInstances. `subnet_id` "" = any of the region's default ones."""
    kinds = ["instance", "volume"] + (["spot-instances-request"] if offer.market == "spot" else [])
    root = {"VolumeSize": max(spec.disk_gb, image.disk_gb), "VolumeType": "gp3", "DeleteOnTermination": True}
    request: dict[str, Any] = {
        "ImageId": image.id,
        "InstanceType": offer.sku,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": tag,
        "KeyName": tag,
        "SecurityGroupIds": [group_id],
        "BlockDeviceMappings": [{"DeviceName": image.root_device, "Ebs": root}],
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required"},
        "TagSpecifications": [{"ResourceType": kind, "Tags": _tags(tag)} for kind in kinds],
    }
    if subnet_id:
        request["SubnetId"] = subnet_id
    if offer.market == "spot":
        once = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        request["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": once}
    return request


def launch_error(
    error: Exception, request: Mapping[str, Any], region: str, secrets: Iterable[str] = ()
) -> BrokerError:
    """What RunInstances raised, by what the caller does next.

    A refusal that AWS gives for sure is one of its codes or a 4xx; anything else may have launched.
    """
    from botocore.exceptions import ParamValidationError

    tag = request["ClientToken"]
    ours = our_error("RunInstances", error, secrets)
    if not isinstance(ours, ProviderError) or isinstance(ours, AuthFailed | Unreachable):
        return ours
    code = error_code(error)
    known = refusal(code)
    if known is None and code == "IdempotentParameterMismatch":
        detail = f"{ours.detail} (a bug of gpubroker: one tag, two requests)"
        return LaunchUncertain(NAME, ours.operation, detail, tag=tag)
    if known is None and (400 <= http_status(error) < 500 or isinstance(error, ParamValidationError)):
        known = Refused
    if known is None:
        return LaunchUncertain(NAME, ours.operation, ours.detail, tag=tag)
    if known is QuotaExceeded:
        detail = f"{ours.detail} ({quota_remedy(request, region)})"
        return QuotaExceeded(NAME, ours.operation, detail, region=region)
    return known(NAME, ours.operation, ours.detail)


def quota_remedy(request: Mapping[str, Any], region: str) -> str:
    """What a person does about a quota of vCPUs: one a region, a family of types and a market; new accounts
    have none of the larger families."""
    market = "spot" if "InstanceMarketOptions" in request else "on-demand"
    family = re.split(r"\d", str(request["InstanceType"]))[0].upper()
    page = f"https://{region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas"
    return f"ask for more vCPUs of {market} {family} instances: {page}"


def refusal(code: str) -> type[ProviderError] | None:
    """The class of a code that says what AWS lacks; None for any other."""
    return next((kind for kind, codes in _REFUSALS if codes.fullmatch(code)), None)


def parse_instance(row: Mapping[str, Any], *, ssh_port: int = _SSH_PORT) -> NodeView | None:
    """A row of DescribeInstances; None when the tag is not ours. Raises PayloadChanged."""
    state = row.get("State", {}).get("Name")
    if not row.get("InstanceId") or state not in _STATUS:
        raise PayloadChanged(NAME, "DescribeInstances", "Instances[].State", f"{state!r} is unknown")
    tag = next((t.get("Value", "") for t in row.get("Tags", []) if t.get("Key") == TAG_KEY), "")
    if not tag.startswith(TAG):
        return None
    reason = row.get("StateReason") or {}
    host = row.get("PublicIpAddress") or row.get("PublicDnsName")
    launched = row.get("LaunchTime")
    return NodeView(
        id=row["InstanceId"],
        tag=tag,
        status=_STATUS[state],
        reason=str(reason.get("Message") or reason.get("Code") or ""),
        is_preempted=reason.get("Code") in _RECLAIMED,
        ssh=SshAddress(host=host, port=ssh_port, username=_USERNAME) if host else None,
        created_at=launched if isinstance(launched, datetime) else None,
    )


class AwsNodes:
    """The thin client. What it remembers only saves calls: everything can be found again by the tag."""

    def __init__(self, context: ProviderContext) -> None:
        self._context = context
        self._accounts: dict[int, Account] = {}
        self._regions: tuple[str, ...] = ()
        self._images: dict[str, Image] = {}
        self._known: dict[str, _Known] = {}

    @property
    def capabilities(self) -> Capabilities:
        """See Compute."""
        return _CAPABILITIES

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        """See Compute. The same tag with the same request twice is one instance."""
        check_launch(_CAPABILITIES, MARKETS, offer, tag, bid_usd_per_hour)
        if not offer.region or not spec.ssh_public_key or spec.volume_id:
            raise ValueError("aws: a launch needs a region and an SSH key, and mounts no network volume")
        end_s = self._context.clock.monotonic_s() + deadline_s
        account = self._account(deadline_s)
        client = account.client("ec2", offer.region)
        with _refusals(offer.region):
            image = self._image(account, client, offer.region)
            subnet_id, vpc_id = _subnet(account, client, offer.zone)
            request = launch_request(
                offer, spec, tag, image, subnet_id=subnet_id, group_id=_group(account, client, vpc_id)
            )
            _import_key(account, client, tag, spec.ssh_public_key)
        try:
            return self._launch(client, request, offer.region, account.secrets, end_s)
        except LaunchUncertain:
            raise
        except BrokerError:
            self._delete_key(account, offer.region, tag)
            raise

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """See Compute: one call, and its pages, a region."""
        account = self._account(deadline_s)
        asked = {"Filters": [{"Name": f"tag:{TAG_KEY}", "Values": [f"{TAG}*"]}]}
        nodes: dict[str, NodeView] = {}
        for region, rows in self._describe(account, deadline_s, asked):
            for row in rows:
                node = parse_instance(row, ssh_port=self._ssh_port)
                if node is not None:
                    nodes[node.id] = node
                    self._known.setdefault(node.id, _Known(region=region, tag=node.tag))
        return list(nodes.values())

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """See Compute. Its key pair goes with it."""
        account = self._account(deadline_s)
        known = self._known.get(node_id) or self._find(account, node_id, deadline_s)
        if known is None:
            return
        client = account.client("ec2", known.region)
        try:
            account.ask(client, "terminate_instances", InstanceIds=[node_id])
        except ProviderError as error:
            if not error.detail.startswith("InvalidInstanceID.NotFound"):
                raise
            if known.made_s is not None and self._context.clock.monotonic_s() < known.made_s + _SETTLES_S:
                raise Transient(NAME, error.operation, f"{error.detail} (not yet)") from error
        self._delete_key(account, known.region, known.tag)

    def restart(self, node_id: str, deadline_s: float) -> None:
        """One-time spot instances cannot be stopped, so nothing is ever started again."""
        raise Refused(NAME, "restart", "instances are not stopped, they end")

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """It is SSH."""
        return None

    def sweep_leftovers(self, in_use_tags: Collection[str], deadline_s: float) -> list[str]:
        """Delete our key pairs and security groups that no instance and none of these tags needs.

        The names of what went, each with its region. Tags of launches that may be under way are in use.
        """
        account = self._account(deadline_s)
        alive = {node.tag for node in self.list_nodes(deadline_s) if node.status != "gone"}
        gone: list[str] = []
        for region in self._regions_in_use(account):
            client = account.client("ec2", region)
            ours = _filters({"key-name": f"{TAG}*"})
            keys = account.rows(client, "describe_key_pairs", "KeyPairs", Filters=ours)
            for name in sorted(row["KeyName"] for row in keys):
                if name.startswith(TAG) and name not in alive.union(in_use_tags):
                    account.ask(client, "delete_key_pair", KeyName=name)
                    gone.append(f"{region} key pair {name}")
            if not alive and not in_use_tags:
                gone += [f"{region} security group {name}" for name in _delete_groups(account, client)]
        return gone

    @property
    def _ssh_port(self) -> int:
        """22; a test cloud that may not listen there says where it does."""
        return int(self._context.env.get("GPUBROKER_AWS_SSH_PORT") or _SSH_PORT)

    def _account(self, deadline_s: float) -> Account:
        """Kept by its timeouts: making its clients takes longer than a call. Nothing is tried twice."""
        whole_s = max(1, int(deadline_s))
        if whole_s not in self._accounts:
            end_s = self._context.clock.monotonic_s() + whole_s
            self._accounts[whole_s] = Account(self._context, end_s, attempts=1)
        return self._accounts[whole_s]

    def _regions_in_use(self, account: Account) -> tuple[str, ...]:
        """Those of the settings; every one that the account may use where they name none."""
        self._regions = self._context.settings.aws_regions or self._regions or account.regions()
        return self._regions

    def _describe(
        self, account: Account, deadline_s: float, asked: Mapping[str, Any]
    ) -> list[tuple[str, list[Mapping[str, Any]]]]:
        """(region, its instances) of all regions at once. Raises what one of them raises."""
        work = {region: account.client("ec2", region) for region in self._regions_in_use(account)}

        def instances(region: str) -> list[Mapping[str, Any]]:
            reservations = account.pages(work[region], "describe_instances", "Reservations", 1000, **asked)
            return [row for reservation in reservations for row in reservation.get("Instances", [])]

        found = []
        for outcome in self._context.pool.map(instances, work, deadline_s):
            if outcome.error is not None:
                raise outcome.error
            if outcome.value is None:
                raise Transient(NAME, "DescribeInstances", f"{outcome.item}: no answer before the deadline")
            found.append((outcome.item, outcome.value))
        return found

    def _find(self, account: Account, node_id: str, deadline_s: float) -> _Known | None:
        """Where an instance is that an earlier process made; None = nowhere."""
        asked = {"Filters": [{"Name": "instance-id", "Values": [node_id]}]}
        for region, rows in self._describe(account, deadline_s, asked):
            for row in rows:
                node = parse_instance(row)
                return _Known(region=region, tag=node.tag if node else "")
        return None

    def _image(self, account: Account, client: Any, region: str) -> Image:
        """Looked up once: an image that is newer is no reason to be slower."""
        if region not in self._images:
            wanted = {"name": IMAGE_NAME, "state": "available", "architecture": "x86_64"}
            rows = account.rows(
                client, "describe_images", "Images", Owners=["amazon"], Filters=_filters(wanted)
            )
            by_parameter = Image(id=IMAGE_PARAMETER, root_device=_ROOT_DEVICE, disk_gb=_ROOT_GB)
            self._images[region] = newest_image(rows) or by_parameter
        return self._images[region]

    def _launch(
        self, client: Any, request: Mapping[str, Any], region: str, secrets: Iterable[str], end_s: float
    ) -> str:
        tag = request["ClientToken"]
        if self._context.clock.monotonic_s() >= end_s:
            raise Transient(NAME, "RunInstances", "the deadline came before the launch")
        try:
            node_id = str(client.run_instances(**request)["Instances"][0]["InstanceId"])
        except Exception as error:  # whatever it is, an instance may run
            raise launch_error(error, request, region, secrets) from error
        self._known[node_id] = _Known(region=region, tag=tag, made_s=self._context.clock.monotonic_s())
        return node_id

    def _delete_key(self, account: Account, region: str, tag: str) -> None:
        """A key pair costs nothing: one that cannot be deleted now is left to the sweep."""
        if tag:
            with suppress(ProviderError):
                account.ask(account.client("ec2", region), "delete_key_pair", KeyName=tag)


@contextmanager
def _refusals(region: str) -> Iterator[None]:
    """What AWS will not do before anything was launched, classed as Compute says."""
    try:
        yield
    except ProviderError as error:
        if type(error) is not ProviderError:
            raise
        kind = refusal(error.detail.partition(":")[0]) or Refused
        if kind is QuotaExceeded:
            raise QuotaExceeded(NAME, error.operation, error.detail, region=region) from error
        raise kind(NAME, error.operation, error.detail) from error
    except KeyError as error:
        raise PayloadChanged(NAME, "before RunInstances", str(error.args[0]), "missing") from error


def _subnet(account: Account, client: Any, zone: str) -> tuple[str, str]:
    """(subnet, VPC) of the zone, by its id; without a zone the subnet is AWS's choice. Raises Refused."""
    default = _filters({"default-for-az": "true"})
    rows = account.rows(client, "describe_subnets", "Subnets", Filters=default)
    if not rows:
        region = client.meta.region_name
        remedy = f"aws ec2 create-default-vpc --region {region}"
        raise Refused(NAME, "DescribeSubnets", f"{region} has no default network: {remedy}")
    if not zone:
        return "", rows[0]["VpcId"]
    here = [row for row in rows if zone in (row.get("AvailabilityZoneId"), row.get("AvailabilityZone"))]
    if here:
        return here[0]["SubnetId"], here[0]["VpcId"]
    made = account.ask(client, "create_default_subnet", AvailabilityZoneId=zone)["Subnet"]
    return made["SubnetId"], made["VpcId"]


def _group(account: Account, client: Any, vpc_id: str) -> str:
    """The network's security group that lets SSH in, found or made, and whole."""
    group = _find_group(account, client, vpc_id)
    if group is None:
        tags = [{"Key": "Name", "Value": GROUP_NAME}]
        with _unless("InvalidGroup.Duplicate"):  # somebody else made it meanwhile
            account.ask(
                client,
                "create_security_group",
                GroupName=GROUP_NAME,
                Description="SSH to nodes that gpubroker rents",
                VpcId=vpc_id,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
            )
        group = _find_group(account, client, vpc_id)
    if group is None:
        raise Transient(NAME, "DescribeSecurityGroups", f"{GROUP_NAME} was made and is not there yet")
    group_id = str(group["GroupId"])
    if not any(rule.get("FromPort") == _SSH_PORT for rule in group.get("IpPermissions", [])):
        anywhere = [{"CidrIp": "0.0.0.0/0", "Description": "SSH, by key"}]
        rule = {"IpProtocol": "tcp", "FromPort": _SSH_PORT, "ToPort": _SSH_PORT, "IpRanges": anywhere}
        with _unless("InvalidPermission.Duplicate"):
            account.ask(client, "authorize_security_group_ingress", GroupId=group_id, IpPermissions=[rule])
    return group_id


def _find_group(account: Account, client: Any, vpc_id: str) -> Mapping[str, Any] | None:
    wanted = _filters({"group-name": GROUP_NAME, "vpc-id": vpc_id})
    found = account.rows(client, "describe_security_groups", "SecurityGroups", Filters=wanted)
    return found[0] if found else None


def _delete_groups(account: Account, client: Any) -> list[str]:
    """The ids of those that went; one that is still in use stays."""
    wanted = _filters({"group-name": GROUP_NAME})
    gone = []
    for row in account.rows(client, "describe_security_groups", "SecurityGroups", Filters=wanted):
        with _unless("DependencyViolation"):
            account.ask(client, "delete_security_group", GroupId=row["GroupId"])
            gone.append(row["GroupId"])
    return gone


def _import_key(account: Account, client: Any, name: str, public_key: str) -> None:
    """One that is there already is of the same create: its name is the tag."""
    with _unless("InvalidKeyPair.Duplicate"):
        account.ask(client, "import_key_pair", KeyName=name, PublicKeyMaterial=public_key.encode())


@contextmanager
def _unless(code: str) -> Iterator[None]:
    """Done already, or not to be done, when AWS says so."""
    try:
        yield
    except ProviderError as error:
        if not error.detail.startswith(f"{code}:"):
            raise


def _filters(wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"Name": name, "Values": [value]} for name, value in wanted.items()]


def _tags(tag: str) -> list[dict[str, str]]:
    return [{"Key": TAG_KEY, "Value": tag}, {"Key": "Name", "Value": tag}]
