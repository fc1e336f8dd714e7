"""What a RunInstances call asks for, checked; and an instance as AWS shows it.

aws_ec2.py -> read_launch -> Launch -> Instance -> instance_row
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gpubroker.testcloud.aws_moto import ACCOUNT
from gpubroker.testcloud.aws_query import (
    Ask,
    Refused,
    as_structure,
    as_structures,
    as_texts,
    iso,
    member,
    usd,
    whole,
)
from gpubroker.testcloud.bill import RECLAIMED
from gpubroker.testcloud.front import Front
from gpubroker.testcloud.world import Market, Rental, State

STATES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}
USER_SHUTDOWN = "Client.UserInitiatedShutdown"
OWN_SHUTDOWN = "Client.InstanceInitiatedShutdown"
SPOT_SHUTDOWN = "Server.SpotInstanceShutdown"
_MESSAGES = {
    USER_SHUTDOWN: "User initiated shutdown",
    OWN_SHUTDOWN: "Instance initiated shutdown",
    RECLAIMED: "Spot instance termination",
    SPOT_SHUTDOWN: "Spot instance shutdown",
}
# What a test cloud reads or may ignore; anything else is a slip of the client.
RUN_PARAMETERS = (
    *("BlockDeviceMapping", "CapacityReservationSpecification", "ClientToken", "CpuOptions"),
    *("CreditSpecification", "DisableApiStop", "DisableApiTermination", "DryRun", "EbsOptimized"),
    *("EnclaveOptions", "HibernationOptions", "IamInstanceProfile", "ImageId"),
    *("InstanceInitiatedShutdownBehavior", "InstanceMarketOptions", "InstanceType", "KeyName"),
    *("LaunchTemplate", "MaintenanceOptions", "MaxCount", "MetadataOptions", "MinCount", "Monitoring"),
    *("NetworkInterface", "NetworkPerformanceOptions", "Placement", "PrivateDnsNameOptions"),
    *("PrivateIpAddress", "SecurityGroup", "SecurityGroupId", "SubnetId", "TagSpecification", "UserData"),
)
_IMAGE = re.compile(r"ami-(?:[0-9a-f]{8}|[0-9a-f]{17})|resolve:ssm:/?[A-Za-z0-9._/:-]+")
_INSTANCE_TYPE = re.compile(r"[a-z0-9-]{2,30}\.[a-z0-9-]{2,30}")
_MOST_USER_DATA_BYTES = 16 * 1024
_DEFAULT_DISK_GB = 8
_LEAST_MAX_PRICE = Decimal("0.001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A RunInstances call, understood. "" = not given."""

    instance_type: str
    image: str
    least: int
    most: int
    market: Market
    max_price: Decimal | None  # None = up to on demand
    behaviour: str  # terminate or stop: what an interruption does
    persistent: bool
    on_shutdown: str  # terminate or stop: what a shutdown from inside does
    key_name: str
    zone: str
    zone_id: str
    subnet_id: str
    group_ids: tuple[str, ...]
    group_names: tuple[str, ...]
    profile: str
    http_tokens: str
    script: str  # user data, decoded
    disk_gb: int
    tags: Mapping[str, Mapping[str, str]]  # by kind of resource
    token: str

    @property
    def renters_tag(self) -> str:
        """What its renter finds it by: a tag of ours, a name, or the client token."""
        tags = self.tags.get("instance", {})
        return tags.get("gpubroker-attempt") or tags.get("Name") or self.token


@dataclass(slots=True, kw_only=True)
class Instance:
    """What AWS knows of a rental beside the rental."""

    rental: Rental
    launch: Launch
    launched_s: float
    reservation_id: str
    index: int
    tags: dict[str, str]
    subnet_id: str
    vpc_id: str
    groups: Mapping[str, str]  # id -> name
    volume_id: str
    spot_request_id: str  # "" = on demand
    spot_tags: dict[str, str]
    spot_cancelled: bool = False
    front: Front | None = None  # once it runs
    noticed_s: float | None = None  # when it was told that it will be taken back
    taken_s: float = 0.0  # when it will be
    looked_s: float = 0.0  # the step of the market in which it was last looked at
    restarts: bool = False  # stopped by AWS, to go on when there is room again
    scripted: bool = False  # its user data has been run

    @property
    def id(self) -> str:
        """The instance's."""
        return self.rental.id

    def state(self, at_s: float, grace_s: float, state: State | None = None) -> str:
        """In EC2's words; `state`: what a stale listing shows."""
        shown = self.rental.state if state is None else state
        if shown in ("pending", "running"):
            return "running" if shown == "running" and self.front is not None else "pending"
        leaving = at_s - self.rental.since_s < grace_s
        if shown == "stopped":
            return "stopping" if leaving else "stopped"
        return "shutting-down" if leaving else "terminated"


def read_launch(ask: Ask) -> Launch:
    """Raises Refused, without a look at what exists."""
    for name in ask.params:
        if name not in RUN_PARAMETERS:
            raise Refused("UnknownParameter", f"The parameter {name} is not recognized")
    if "LaunchTemplate" in ask.params:
        raise Refused("UnsupportedOperation", "The test cloud has no launch templates")
    for name in ("ImageId", "InstanceType", "MinCount", "MaxCount"):
        if name not in ask.params:
            raise Refused("MissingParameter", f"The request must contain the parameter {name}")
    image, instance_type = ask.text("ImageId"), ask.text("InstanceType")
    if not _IMAGE.fullmatch(image):
        raise Refused("InvalidAMIID.Malformed", f'Invalid id: "{image[:60]}"')
    if not _INSTANCE_TYPE.fullmatch(instance_type):
        raise Refused("InvalidParameterValue", f"Invalid value '{instance_type[:60]}' for InstanceType.")
    least = ask.number("MinCount", 1, 1, 1000)
    most = ask.number("MaxCount", 1, least, 1000)
    token = ask.text("ClientToken")
    if len(token) > 64 or not token.isascii():
        raise Refused("InvalidParameterValue", "ClientToken has at most 64 ASCII characters")
    market, max_price, behaviour, persistent = _market(ask)
    placement = as_structure(
        ask.params.get("Placement", {}),
        "Placement",
        *("AvailabilityZone", "AvailabilityZoneId", "GroupName", "Tenancy"),
    )
    subnet_id, groups = _interface(ask)
    return Launch(
        instance_type=instance_type,
        image=image,
        least=least,
        most=most,
        market=market,
        max_price=max_price,
        behaviour=behaviour,
        persistent=persistent,
        on_shutdown=_on_shutdown(ask),
        key_name=ask.text("KeyName"),
        zone=member(placement, "AvailabilityZone"),
        zone_id=member(placement, "AvailabilityZoneId"),
        subnet_id=subnet_id,
        group_ids=groups,
        group_names=tuple(ask.texts("SecurityGroup")),
        profile=_profile(ask),
        http_tokens=_http_tokens(ask),
        script=_user_data(ask.text("UserData")),
        disk_gb=_disk_gb(ask),
        tags=_tags(ask),
        token=token,
    )


def _market(ask: Ask) -> tuple[Market, Decimal | None, str, bool]:
    """(market, highest price, what an interruption does, persistent)."""
    options = as_structure(
        ask.params.get("InstanceMarketOptions", {}), "InstanceMarketOptions", "MarketType", "SpotOptions"
    )
    kind = member(options, "MarketType", "on-demand")
    if kind in ("capacity-block", "interruptible-capacity-reservation"):
        raise Refused("UnsupportedOperation", f"The test cloud sells no {kind}")
    if kind not in ("spot", "on-demand") or (kind != "spot" and "SpotOptions" in options):
        raise Refused("InvalidParameterValue", f"Invalid value '{kind[:40]}' for MarketType")
    spot = as_structure(
        options.get("SpotOptions", {}),
        "SpotOptions",
        *("MaxPrice", "SpotInstanceType", "InstanceInterruptionBehavior", "ValidUntil"),
    )
    behaviour = member(spot, "InstanceInterruptionBehavior", "terminate")
    life = member(spot, "SpotInstanceType", "one-time")
    if behaviour == "hibernate":
        raise Refused("UnsupportedOperation", "The test cloud's instances do not hibernate")
    if behaviour not in ("terminate", "stop") or life not in ("one-time", "persistent"):
        raise Refused("InvalidParameterValue", "Invalid SpotOptions")
    if behaviour == "stop" and life == "one-time":
        message = "The instance interruption behavior stop needs a persistent Spot Instance request"
        raise Refused("InvalidParameterCombination", message)
    max_price = usd(member(spot, "MaxPrice"), "MaxPrice") if "MaxPrice" in spot else None
    if max_price is not None and max_price <= _LEAST_MAX_PRICE:
        raise Refused("InvalidParameterValue", "MaxPrice must be more than 0.001")
    return ("spot" if kind == "spot" else "on_demand"), max_price, behaviour, life == "persistent"


def _on_shutdown(ask: Ask) -> str:
    behaviour = ask.text("InstanceInitiatedShutdownBehavior") or "stop"
    if behaviour not in ("terminate", "stop"):
        raise Refused("InvalidParameterValue", "Invalid value for InstanceInitiatedShutdownBehavior")
    return behaviour


def _interface(ask: Ask) -> tuple[str, tuple[str, ...]]:
    """(subnet, security groups), from where either is allowed to be said."""
    interfaces = ask.params.get("NetworkInterface", [])
    if not isinstance(interfaces, list) or not all(isinstance(one, dict) for one in interfaces):
        raise Refused("InvalidParameterValue", "NetworkInterface is no list of structures")
    if not interfaces:
        return ask.text("SubnetId"), tuple(ask.texts("SecurityGroupId"))
    if {"SubnetId", "SecurityGroupId", "SecurityGroup"} & set(ask.params):
        message = "Network interfaces and an instance-level subnet or group may not be combined"
        raise Refused("InvalidParameterCombination", message)
    first = interfaces[0]
    groups = as_texts(first.get("SecurityGroupId", []), "NetworkInterface.SecurityGroupId")
    return member(first, "SubnetId"), tuple(groups)


def _profile(ask: Ask) -> str:
    profile = as_structure(ask.params.get("IamInstanceProfile", {}), "IamInstanceProfile", "Arn", "Name")
    return member(profile, "Name") or member(profile, "Arn").rpartition("/")[2]


def _http_tokens(ask: Ask) -> str:
    options = as_structure(
        ask.params.get("MetadataOptions", {}),
        "MetadataOptions",
        *("HttpTokens", "HttpPutResponseHopLimit", "HttpEndpoint", "HttpProtocolIpv6"),
        "InstanceMetadataTags",
    )
    tokens = member(options, "HttpTokens", "optional")
    if tokens not in ("optional", "required"):
        raise Refused("InvalidParameterValue", "Invalid value for HttpTokens")
    return tokens


def _user_data(encoded: str) -> str:
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise Refused("InvalidUserData.Malformed", "Invalid BASE64 encoding of user data.") from error
    if len(raw) > _MOST_USER_DATA_BYTES:
        raise Refused("InvalidParameterValue", "User data is limited to 16384 bytes")
    return raw.decode("utf-8", "replace")


def _disk_gb(ask: Ask) -> int:
    mappings = ask.params.get("BlockDeviceMapping", [])
    if not isinstance(mappings, list) or not all(isinstance(one, dict) for one in mappings):
        raise Refused("InvalidParameterValue", "BlockDeviceMapping is no list of structures")
    total_gb = 0
    for one in mappings:
        disk = one.get("Ebs", {})
        if not isinstance(disk, dict):
            raise Refused("InvalidParameterValue", "Ebs is no structure")
        if disk:
            size = member(disk, "VolumeSize", str(_DEFAULT_DISK_GB))
            total_gb += whole(size, "VolumeSize", 1, 65536)
    return total_gb or _DEFAULT_DISK_GB


def _tags(ask: Ask) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    known = ("ResourceType", "Tag")
    for one in as_structures(ask.params.get("TagSpecification", []), "TagSpecification", *known):
        kind = member(one, "ResourceType")
        if kind not in ("instance", "volume", "spot-instances-request", "network-interface"):
            raise Refused("InvalidParameterValue", f"'{kind[:40]}' is not a valid taggable resource type")
        found.setdefault(kind, {}).update(read_tags(one.get("Tag", []), {}))
    return found


def read_tags(value: Any, before: Mapping[str, str]) -> dict[str, str]:
    """Tags as AWS allows them, on top of those that are there. Raises Refused."""
    tags = dict(before)
    for one in as_structures(value, "Tag", "Key", "Value"):
        key, text = member(one, "Key"), member(one, "Value")
        if not key or len(key) > 127 or len(text) > 255 or key.lower().startswith("aws:"):
            raise Refused("InvalidParameterValue", "Tag keys have 1 to 127 characters, values up to 255")
        tags[key] = text
    if len(tags) > 50:
        raise Refused("TagLimitExceeded", "More than 50 tags")
    return tags


def tag_rows(tags: Mapping[str, str]) -> list[dict[str, str]] | None:
    """As XML has them; None = none."""
    return [{"key": key, "value": value} for key, value in tags.items()] or None


def state_row(name: str) -> dict[str, Any]:
    """A state as XML has it."""
    return {"code": STATES[name], "name": name}


def instance_row(instance: Instance, state: str) -> dict[str, Any]:
    """An instance as DescribeInstances gives it."""
    rental, launch = instance.rental, instance.launch
    front = instance.front if state == "running" else None
    address = front.address if front else None
    dns = f"ec2-{address.replace('.', '-')}.compute-1.example" if address else ""
    gone = state in ("shutting-down", "terminated", "stopping", "stopped")
    reason = rental.reason if gone else ""
    groups = [{"groupId": key, "groupName": name} for key, name in instance.groups.items()] or None
    volume = {"volumeId": instance.volume_id, "status": "attached", "deleteOnTermination": True}
    return {
        "instanceId": rental.id,
        "imageId": launch.image,
        "instanceState": state_row(state),
        "privateDnsName": dns,
        "dnsName": dns,
        "reason": _MESSAGES.get(reason, reason) if reason else "",
        "keyName": launch.key_name or None,
        "amiLaunchIndex": instance.index,
        "instanceType": launch.instance_type,
        "launchTime": iso(instance.launched_s),
        "placement": {
            "availabilityZone": rental.host.zone,
            "availabilityZoneId": zone_id(rental),
            "groupName": "",
            "tenancy": "default",
        },
        "monitoring": {"state": "disabled"},
        "subnetId": instance.subnet_id or None,
        "vpcId": instance.vpc_id or None,
        "privateIpAddress": address,
        "ipAddress": address,
        "groupSet": groups,
        "stateReason": {"code": reason, "message": f"{reason}: {_MESSAGES.get(reason, reason)}"}
        if reason
        else None,
        "architecture": "x86_64",
        "rootDeviceType": "ebs",
        "rootDeviceName": "/dev/sda1",
        "blockDeviceMapping": None
        if state == "terminated"
        else [{"deviceName": "/dev/sda1", "ebs": {**volume, "attachTime": iso(instance.launched_s)}}],
        "virtualizationType": "hvm",
        "instanceLifecycle": "spot" if instance.spot_request_id else None,
        "spotInstanceRequestId": instance.spot_request_id or None,
        "clientToken": launch.token,
        "tagSet": tag_rows(instance.tags),
        "hypervisor": "xen",
        "ebsOptimized": False,
        "metadataOptions": {"state": "applied", "httpTokens": launch.http_tokens, "httpEndpoint": "enabled"},
    }


def reservation_row(instances: list[tuple[Instance, str]]) -> dict[str, Any]:
    """A reservation with those of its instances, each with its state."""
    return {
        "reservationId": instances[0][0].reservation_id,
        "ownerId": ACCOUNT,
        "groupSet": None,
        "instancesSet": [instance_row(instance, state) for instance, state in instances],
    }


def zone_id(rental: Rental) -> str:
    """The zone's own name, the same in all accounts."""
    return str(rental.host.facts.get("az_id", rental.host.zone))


def filter_values(instance: Instance, state: str) -> dict[str, str]:
    """What the filters of DescribeInstances look at; "" = it has none. Tags come beside."""
    rental, launch = instance.rental, instance.launch
    address = instance.front.address if instance.front and state == "running" else ""
    gone = state not in ("pending", "running")
    return {
        "instance-id": rental.id,
        "instance-type": launch.instance_type,
        "instance-state-name": state,
        "instance-state-code": str(STATES[state]),
        "instance-lifecycle": "spot" if instance.spot_request_id else "",
        "client-token": launch.token,
        "spot-instance-request-id": instance.spot_request_id,
        "availability-zone": rental.host.zone,
        "availability-zone-id": zone_id(rental),
        "image-id": launch.image,
        "key-name": launch.key_name,
        "reservation-id": instance.reservation_id,
        "owner-id": ACCOUNT,
        "subnet-id": instance.subnet_id,
        "vpc-id": instance.vpc_id,
        "ip-address": address,
        "private-ip-address": address,
        "state-reason-code": rental.reason if gone else "",
        "launch-time": iso(instance.launched_s),
    }
