"""Lambda's instances: virtual machines, on demand only.

launcher -> LambdaNodes.create       -> POST /ssh-keys, POST .../launch -> read_launched -> id
supervisor -> LambdaNodes.list_nodes -> GET /instances                  -> parse_nodes   -> [NodeView]

Facts are from the vendor's OpenAPI document 1.8.3. One request a second for the account, one launch in twelve
seconds. There is no key for idempotency: the tag is a tag of the instance (and its name, for people), and so
is the time of its creation, which the API does not keep. The vendor ends nothing by itself, and neither can
the instance.

    vendor's status      ours      preempted
    booting              starting
    active               running   starting while it has no `ip`
    unhealthy            stopped   yes: the host failed. It bills until it is ended.
    preempted            gone      yes
    terminating          stopped   it may still bill
    terminated           gone
    any other word       starting

A launch names exactly one SSH key of the account. The job's own is added under the tag before the launch and
removed with the instance; keys of other names are never touched. Where a launch is uncertain its key stays,
so that the instance that may come up lets the job in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Any

from gpubroker.doors import Shell
from gpubroker.errors import (
    AuthFailed,
    ConfigError,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    PayloadChanged,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
)
from gpubroker.http import HttpAnswer, HttpClient, retry_after_s
from gpubroker.model import Offer
from gpubroker.provider import TAG, Capabilities, NodeSpec, NodeStatus, NodeView, ProviderContext, SshAddress
from gpubroker_providers._nodes import (
    Door,
    Slot,
    check_launch,
    decoded,
    error_code,
    moment,
    once_each,
    port_or_none,
    reason_of,
    usd_or_none,
    words,
)
from gpubroker_providers._vendor import plain_text, refuse_drift, rows_at

NAME = "lambda"
KEY_VARIABLE = "LAMBDA_API_KEY"
SSH_PORT_VARIABLE = "GPUBROKER_LAMBDA_SSH_PORT"
VOLUME_MOUNT = "/home/ubuntu/volume"  # ubuntu is whom SSH lets in: VOLUME_PATH
TAG_KEY, CREATED_KEY = "gpubroker-tag", "gpubroker-created-at"
ALL_REQUESTS = Slot("api", 1.0)
_LAUNCHES = Slot("launch", 12.0)
_LAUNCH, _LIST, _SHOW, _END = "launch", "list instances", "show instance", "terminate"
_ADD_KEY, _LIST_KEYS, _DELETE_KEY = "add SSH key", "list SSH keys", "delete SSH key"
_REQUIRED = ("id", "status")
_CAPABILITIES = Capabilities(image_by="docker", create_interval_s=_LAUNCHES.interval_s)
_STATUSES: Mapping[str, NodeStatus] = {
    "active": "running",
    "unhealthy": "stopped",
    "preempted": "gone",
    "terminating": "stopped",
    "terminated": "gone",
}
_MISSING = "global/object-does-not-exist"
_ERRORS: Mapping[str, type[ProviderError]] = {
    "instance-operations/launch/insufficient-capacity": NoCapacity,
    "instance-operations/launch/file-system-in-wrong-region": Refused,
    "global/quota-exceeded": QuotaExceeded,
    "global/invalid-parameters": Refused,
    "global/duplicate": Refused,
    _MISSING: Refused,
    "global/invalid-api-key": AuthFailed,
    "global/account-inactive": AuthFailed,
    "global/invalid-address": AuthFailed,
}


def launch_body(offer: Offer, spec: NodeSpec, tag: str, now: datetime) -> dict[str, Any]:
    """The body of a launch. The job's environment has no place in it and comes over SSH."""
    body: dict[str, Any] = {
        "region_name": offer.region,
        "instance_type_name": offer.listing_id,
        "ssh_key_names": [tag],
        "name": tag,
        "tags": [
            {"key": TAG_KEY, "value": tag},
            {"key": CREATED_KEY, "value": now.isoformat(timespec="seconds")},
        ],
    }
    if spec.volume_id:
        body["file_system_mounts"] = [{"file_system_id": spec.volume_id, "mount_point": VOLUME_MOUNT}]
    return body


def read_launched(answer: HttpAnswer, tag: str, environment: Mapping[str, str]) -> str:
    """The new instance's id. Raises what any other answer means, by its code and then by its status.

    2xx with one id                               the id
    .../insufficient-capacity                     NoCapacity
    global/quota-exceeded                         QuotaExceeded
    .../file-system-in-wrong-region,              Refused
    invalid-parameters, object-does-not-exist
    401, 403 (invalid key, inactive account)      AuthFailed
    429                                           Transient
    global/internal-error, provider/*, 2xx        LaunchUncertain
    without one id, 3xx, 408, 5xx
    other 4xx                                     Refused
    """
    status, code, text = answer.status, error_code(answer), words(answer, environment)
    if status < 300:
        body = decoded(answer)
        data = body.get("data") if isinstance(body, dict) else None
        ids = data.get("instance_ids") if isinstance(data, dict) else None
        found = [i for i in ids if isinstance(i, str) and i] if isinstance(ids, list) else []
        if len(found) == 1:
            return found[0]
        raise LaunchUncertain(NAME, _LAUNCH, f"HTTP {status}, with {len(found)} ids", tag=tag, ids=found)
    if status == 429:
        raise Transient(NAME, _LAUNCH, text, retry_after_s=retry_after_s(answer.headers))
    if status < 400 or status == 408 or status >= 500 or code.startswith("provider/"):
        raise LaunchUncertain(NAME, _LAUNCH, text, tag=tag)
    if code == "global/internal-error":
        raise LaunchUncertain(NAME, _LAUNCH, text, tag=tag)
    if code in _ERRORS:
        raise _ERRORS[code](NAME, _LAUNCH, text)
    raise (AuthFailed if status in (401, 403) else Refused)(NAME, _LAUNCH, text)


def parse_nodes(rows: list[Any], ssh_port: int = 22) -> list[NodeView]:
    """Instances whose tag, or name where they lost it, is one of ours.

    Raises PayloadChanged when every row lacks a required key, or one of ours has no id: it must not be lost.
    """
    refuse_drift(NAME, _LIST, rows, "$.data", _REQUIRED)
    return once_each(_nodes(rows, ssh_port))


def _nodes(rows: list[Any], ssh_port: int) -> Iterator[NodeView]:
    for row in rows:
        if not isinstance(row, dict):
            continue
        tags = _tags(row)
        tag = tags.get(TAG_KEY) or str(row.get("name"))
        if not tag.startswith(TAG):
            continue
        instance_id = row.get("id")
        if not isinstance(instance_id, str) or not instance_id:
            raise PayloadChanged(NAME, _LIST, "$.data[].id", f"not text at {plain_text(tag)}")
        word, ip = row.get("status"), row.get("ip")
        status = _STATUSES.get(str(word), "starting")
        is_up = status == "running" and isinstance(ip, str) and ip.strip() != ""
        yield NodeView(
            id=instance_id,
            tag=tag,
            status="starting" if status == "running" and not is_up else status,
            reason=reason_of(word),
            is_preempted=word in ("preempted", "unhealthy"),
            ssh=SshAddress(host=str(ip).strip(), port=ssh_port, username="ubuntu") if is_up else None,
            usd_per_hour=_usd_per_hour(row),
            created_at=moment(tags.get(CREATED_KEY)),
        )


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    tags = row.get("tags")
    pairs = [t for t in tags if isinstance(t, dict)] if isinstance(tags, list) else []
    return {str(tag.get("key")): str(tag.get("value")) for tag in pairs}


def _usd_per_hour(row: Mapping[str, Any]) -> Decimal | None:
    """From cents for the whole instance."""
    kind = row.get("instance_type")
    cents = kind.get("price_cents_per_hour") if isinstance(kind, dict) else None
    return usd_or_none(Decimal(cents) / 100) if isinstance(cents, int) else None


def ssh_port(env: Mapping[str, str]) -> int:
    """Where an instance's SSH answers: 22, or where a test cloud says."""
    text = env.get(SSH_PORT_VARIABLE) or "22"
    port = port_or_none(text)
    if port is None:
        raise ConfigError(f"{SSH_PORT_VARIABLE} is not a port: {text!r}")
    return port


class LambdaNodes:
    """The part of LambdaCloud that is Compute."""

    _context: ProviderContext

    def endpoint(self) -> str:
        """See PriceSource."""
        raise NotImplementedError

    @property
    def capabilities(self) -> Capabilities:
        """See Compute."""
        return _CAPABILITIES

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        """See Compute. The machine has the vendor's own system: docker on it runs the job's image."""
        check_launch(_CAPABILITIES, ("on_demand",), offer, tag, bid_usd_per_hour)
        if not offer.region:
            raise ValueError("lambda: a launch names a region, and the offer has none")
        if not spec.ssh_public_key:
            raise ValueError("lambda: a launch names an SSH key, and the node has none")
        door = self._door(deadline_s)
        try:
            self._add_key(door, tag, spec.ssh_public_key)
            body = launch_body(offer, spec, tag, self._context.clock.now())
            path = "/instance-operations/launch"
            answer = door.launch(_LAUNCH, "POST", path, _LAUNCHES, ALL_REQUESTS, body=body, tag=tag)
            return read_launched(answer, tag, spec.env)
        except LaunchUncertain:
            raise
        except ProviderError:
            # For sure nothing came of it; a key that stays is harmless.
            with suppress(ProviderError):
                self._remove_keys(door, {tag})
            raise

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """See Compute. All of the account's in one answer."""
        port = ssh_port(self._context.env)
        return parse_nodes(self._rows(self._door(deadline_s), _LIST, "/instances"), port)

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """See Compute. Its SSH key goes after it; one that stays bills nothing: the sweep finds it."""
        door = self._door(deadline_s)
        body = {"instance_ids": [_checked(node_id)]}
        answer = door.send(_END, "POST", "/instance-operations/terminate", ALL_REQUESTS, body=body)
        names: set[str] | None = None
        if error_code(answer) != _MISSING and answer.status != 404:
            ended = door.answer(_END, answer)
            names = _key_names(rows_at(NAME, _END, ended, "data", "terminated_instances"))
        with suppress(ProviderError):
            names = self._key_names(door, node_id) if names is None else names
            if names:
                self._remove_keys(door, names)

    def restart(self, node_id: str, deadline_s: float) -> None:
        """See Compute."""
        raise Refused(NAME, "restart", "Lambda's instances cannot be stopped, so none can be started again")

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """See Compute."""
        return None

    def sweep_leftovers(self, in_use_tags: Collection[str], deadline_s: float) -> list[str]:
        """See Leftovers: keys of launches that came to nothing, or whose node ended by itself."""
        door = self._door(deadline_s)
        alive = {node.tag for node in self.list_nodes(deadline_s) if node.status != "gone"}
        rows = self._rows(door, _LIST_KEYS, "/ssh-keys")
        names = {str(row.get("name")) for row in rows if isinstance(row, dict)}
        ours = {name for name in names - alive - set(in_use_tags) if name.startswith(TAG)}
        if ours:
            self._remove_keys(door, ours)
        return [f"SSH key {name}" for name in sorted(ours)]

    def _add_key(self, door: Door, tag: str, public_key: str) -> None:
        body = {"name": tag, "public_key": public_key}
        answer = door.send(_ADD_KEY, "POST", "/ssh-keys", ALL_REQUESTS, body=body)
        if 400 <= answer.status < 500 and answer.status not in (401, 403, 408, 425, 429):
            raise Refused(NAME, _ADD_KEY, words(answer, {}))
        door.answer(_ADD_KEY, answer)

    def _key_names(self, door: Door, node_id: str) -> set[str]:
        """The job's key of an instance that has ended, for as long as the vendor remembers it."""
        answer = door.send(_SHOW, "GET", f"/instances/{node_id}", ALL_REQUESTS)
        if answer.status == 404 or error_code(answer) == _MISSING:
            return set()
        said = door.answer(_SHOW, answer)
        return _key_names([said.get("data") if isinstance(said, dict) else None])

    def _remove_keys(self, door: Door, names: set[str]) -> None:
        for row in self._rows(door, _LIST_KEYS, "/ssh-keys"):
            if isinstance(row, dict) and row.get("name") in names:
                path = f"/ssh-keys/{_checked(str(row.get('id')))}"
                answer = door.send(_DELETE_KEY, "DELETE", path, ALL_REQUESTS)
                if answer.status not in (400, 404):  # both say that it does not exist
                    door.answer(_DELETE_KEY, answer)

    def _rows(self, door: Door, operation: str, path: str) -> list[Any]:
        answer = door.send(operation, "GET", path, ALL_REQUESTS)
        return rows_at(NAME, operation, door.answer(operation, answer), "data")

    def _door(self, deadline_s: float) -> Door:
        key = self._context.env.get(KEY_VARIABLE, "").strip()
        if not key:
            raise MissingCredentials(NAME, KEY_VARIABLE)
        http = HttpClient(NAME, self.endpoint(), self._context.clock, token=key)
        return Door(self._context, NAME, http, deadline_s)


def _key_names(rows: list[Any]) -> set[str]:
    """Names of keys that we added, for these instances."""
    named = [row.get("ssh_key_names") for row in rows if isinstance(row, dict)]
    names = [name for some in named if isinstance(some, list) for name in some]
    return {name for name in names if isinstance(name, str) and name.startswith(TAG)}


def _checked(identifier: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", identifier):
        raise ValueError(f"not an id: {plain_text(identifier)!r}")
    return identifier
