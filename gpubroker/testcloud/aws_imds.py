"""The instances' metadata, which real ones find at 169.254.169.254.

a node's process -> AWS_EC2_METADATA_SERVICE_ENDPOINT = http://127.0.0.1:<port>/imds/<instance id>
    -> aws.py -> Metadata.answer

Version 2 (a token by PUT) always works; version 1 (no token) where the launch did not forbid it. The two
minutes' notice is at latest/meta-data/spot/instance-action, 404 before.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpubroker.testcloud.aws_launch import Instance, zone_id
from gpubroker.testcloud.aws_moto import ACCOUNT
from gpubroker.testcloud.aws_query import iso

TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"  # noqa: S105
_LONGEST_TTL_S = 21600
_TOKEN = "testcloud/"  # then the instance, which the test cloud knows by it  # noqa: S105


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An answer in plain text."""

    status: int
    text: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Metadata:
    """The service of all instances, each under its own id."""

    def __init__(
        self, instances: Mapping[str, Instance], now_s: Callable[[], float], access_key: str, secret: str
    ) -> None:
        self._instances, self._now_s = instances, now_s
        self._access_key, self._secret = access_key, secret
        self._tokens: dict[str, tuple[str, float]] = {}  # token -> (instance, until when)

    def answer(self, method: str, instance_id: str, path: str, headers: Mapping[str, str]) -> Told:
        """`path` without the leading slash, such as latest/meta-data/instance-id."""
        instance = self._instances.get(instance_id)
        if instance is None or instance.rental.state not in ("pending", "running"):
            return Told(status=404)
        if path == "latest/api/token":
            return self._new_token(method, instance, headers)
        if method != "GET":
            return Told(status=405)
        token = headers.get(TOKEN_HEADER)
        if token is None and instance.launch.http_tokens == "required":
            return Told(status=401)
        if token is not None and not self._is_good(token, instance):
            return Told(status=401)
        text = self._tree(instance).get(path.removesuffix("/"))
        return Told(status=404) if text is None else Told(status=200, text=text)

    def _new_token(self, method: str, instance: Instance, headers: Mapping[str, str]) -> Told:
        ttl = headers.get(TTL_HEADER, "")
        if method != "PUT":
            return Told(status=405)
        if "X-Forwarded-For" in headers:
            return Told(status=403)
        if not (ttl.isascii() and ttl.isdigit() and len(ttl) < 6 and 1 <= int(ttl) <= _LONGEST_TTL_S):
            return Told(status=400)
        token = secrets.token_urlsafe(40)
        self._tokens[token] = (instance.id, self._now_s() + int(ttl))
        return Told(status=200, text=token, headers=((TTL_HEADER, ttl),))

    def _is_good(self, token: str, instance: Instance) -> bool:
        owner, until_s = self._tokens.get(token, ("", 0.0))
        return owner == instance.id and self._now_s() < until_s

    def _tree(self, instance: Instance) -> dict[str, str]:
        """Path -> text, of everything that there is now."""
        rental, launch = instance.rental, instance.launch
        address = instance.front.address if instance.front else "127.0.0.1"
        document = {
            "accountId": ACCOUNT,
            "architecture": "x86_64",
            "availabilityZone": rental.host.zone,
            "imageId": launch.image,
            "instanceId": instance.id,
            "instanceType": launch.instance_type,
            "pendingTime": iso(instance.launched_s),
            "privateIp": address,
            "region": rental.host.region,
            "version": "2017-09-30",
        }
        data = {
            "ami-id": launch.image,
            "ami-launch-index": str(instance.index),
            "instance-id": instance.id,
            "instance-life-cycle": "spot" if instance.spot_request_id else "on-demand",
            "instance-type": launch.instance_type,
            "local-ipv4": address,
            "public-ipv4": address,
            "placement/availability-zone": rental.host.zone,
            "placement/availability-zone-id": zone_id(rental),
            "placement/region": rental.host.region,
            "reservation-id": instance.reservation_id,
            **self._credentials(instance),
            **_notice(instance),
        }
        tree = {f"latest/meta-data/{path}": text for path, text in data.items()}
        tree["latest/meta-data"] = "\n".join(sorted({_entry(path) for path in data}))
        tree["latest/dynamic/instance-identity/document"] = json.dumps(document, indent=2)
        if launch.script:
            tree["latest/user-data"] = launch.script
        return tree

    def _credentials(self, instance: Instance) -> dict[str, str]:
        """Those of the instance's role, where it has one: what opens the test cloud opens it there too."""
        role = instance.launch.profile
        if not role:
            return {}
        keys = {
            "Code": "Success",
            "LastUpdated": iso(self._now_s()),
            "Type": "AWS-HMAC",
            "AccessKeyId": self._access_key,
            "SecretAccessKey": self._secret,
            "Token": f"{_TOKEN}{instance.id}",
            "Expiration": iso(self._now_s() + _LONGEST_TTL_S),
        }
        return {
            "iam/security-credentials": role,
            f"iam/security-credentials/{role}": json.dumps(keys),
        }


def instance_of(token: str) -> str:
    """Whose role's session token that is; "" = none's."""
    return token.removeprefix(_TOKEN) if token.startswith(_TOKEN) else ""


def _notice(instance: Instance) -> dict[str, str]:
    if instance.noticed_s is None or not instance.spot_request_id:
        return {}
    taken = iso(instance.taken_s)
    action = {"action": instance.launch.behaviour, "time": taken}
    return {
        "spot/instance-action": json.dumps(action),
        "spot/termination-time": taken,
        "events/recommendations/rebalance": json.dumps({"noticeTime": iso(instance.noticed_s)}),
    }


def _entry(path: str) -> str:
    head, more, _ = path.partition("/")
    return head + more
