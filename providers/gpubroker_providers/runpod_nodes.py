"""RunPod's pods: on demand only, in the secure or the community cloud.

launcher -> RunPodNodes.create       -> POST /v2/pods -> read_created -> id
supervisor -> RunPodNodes.list_nodes -> GET /v2/pods  -> parse_nodes  -> [NodeView]

Facts are from RunPod's REST v2 description and docs. REST v1 and GraphQL are not used: v1 is gone, GraphQL
leaves in early 2027. Spot pods ended in 2026, and the body has no key for them. There is no key for
idempotency and names are not unique: the name carries the tag. One create names one GPU type.

    vendor's status           ours      preempted
    PROVISIONING, STARTING    starting
    RUNNING                   running   with 0 GPUs: they went to somebody else while it was stopped
    EXITED                    stopped   yes: nobody here stops a pod, so its host or its container failed, or
                                        the account ran dry
    ERROR                     stopped
    TERMINATED                gone
    any other word            starting

The job's key comes as PUBLIC_KEY in the pod's environment, which RunPod's own images and those that follow
their convention let in. The account's list of keys is never written: writing it replaces the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any
from urllib.parse import quote

from gpubroker.doors import Shell
from gpubroker.errors import (
    AuthFailed,
    LaunchUncertain,
    MissingCredentials,
    NoCapacity,
    PayloadChanged,
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
    moment,
    once_each,
    reason_of,
    usd_or_none,
    words,
)
from gpubroker_providers._vendor import plain_text, refuse_drift, rows_at

NAME = "runpod"
KEY_VARIABLE = "RUNPOD_API_KEY"
USUAL_IMAGE = "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"
PODS_PATH = "/v2/pods"
VOLUME_MOUNT = "/root/volume"  # root is whom SSH lets in: VOLUME_PATH
_CREATE, _LIST, _DELETE, _START = "create pod", "list pods", "delete pod", "start pod"
# The vendor promises no figure: its example allows sixty requests a minute, in bursts.
_CREATES, _LISTS, _ENDS, _STARTS = (
    Slot("create pod", 0.2),
    Slot("list pods", 0.2),
    Slot("delete pod", 0.2),
    Slot("pod action", 0.2),
)
_REQUIRED = ("id", "name", "status")
_MOST_PAGES = 400
_CAPABILITIES = Capabilities(stop=True)
_STATUSES: Mapping[str, NodeStatus] = {
    "RUNNING": "running",
    "EXITED": "stopped",
    "ERROR": "stopped",
    "TERMINATED": "gone",
}


def create_body(offer: Offer, spec: NodeSpec, tag: str) -> dict[str, Any]:
    """The body of a create; a key that the vendor does not know would be refused with 422."""
    environment = dict(spec.env)
    if spec.ssh_public_key:
        environment["PUBLIC_KEY"] = spec.ssh_public_key
    body: dict[str, Any] = {
        "name": tag,
        "image": spec.image or USUAL_IMAGE,
        "cloud": (offer.cloud or "secure").upper(),
        # The type's id exactly as it was listed: one real id has two spaces.
        "gpu": {"id": offer.listing_id, "count": offer.gpu_count},
        "disk": spec.disk_gb,
        "env": environment,
        "ports": ["22/tcp"],
        "startSsh": True,
    }
    if offer.region:
        body["dataCenterIds"] = [offer.region]
    if spec.volume_id:
        body["mounts"] = {"network": [{"volumeId": spec.volume_id, "path": VOLUME_MOUNT}]}
    return body


def own_end(base_url: str) -> dict[str, Any]:
    """A pod terminates itself with the key that RunPod gives it, which opens that pod alone."""
    url = f"{base_url}{PODS_PATH}/${{RUNPOD_POD_ID}}/action"
    headers = {"Authorization": "Bearer ${RUNPOD_API_KEY}"}
    return {"http": {"method": "POST", "url": url, "headers": headers, "body": {"action": "terminate"}}}


def read_created(answer: HttpAnswer, tag: str, environment: Mapping[str, str]) -> str:
    """The new pod's id. Raises what any other answer means.

    2xx with an id            the id
    400                       NoCapacity, in the vendor's words: a broken rule looks the same. When every
                              candidate gets it, it is the request.
    402                       QuotaExceeded: the balance is too low for an hour
    403                       NoCapacity: the account may not use this pool, others it may
    401                       AuthFailed
    429                       Transient, with Retry-After
    422, other 4xx            Refused
    2xx without, 3xx, 408,    LaunchUncertain
    5xx
    """
    status, text = answer.status, words(answer, environment)
    if status < 300:
        body = decoded(answer)
        found = body.get("id") if isinstance(body, dict) else None
        if isinstance(found, str) and found:
            return found
        # Not quoted: the answer repeats the pod's environment.
        raise LaunchUncertain(NAME, _CREATE, f"HTTP {status}, without an id", tag=tag)
    if status in (400, 403):
        raise NoCapacity(NAME, _CREATE, text)
    if status == 402:
        raise QuotaExceeded(NAME, _CREATE, text)
    if status == 401:
        raise AuthFailed(NAME, _CREATE, text)
    if status == 429:
        raise Transient(NAME, _CREATE, text, retry_after_s=retry_after_s(answer.headers))
    if 400 <= status < 500 and status != 408:
        raise Refused(NAME, _CREATE, text)
    raise LaunchUncertain(NAME, _CREATE, text, tag=tag)


def parse_nodes(rows: list[Any]) -> list[NodeView]:
    """Pods whose name begins with our tag.

    Raises PayloadChanged when every row lacks a required key, or one of ours has no id: it must not be lost.
    """
    refuse_drift(NAME, _LIST, rows, "$.pods", _REQUIRED)
    return once_each(_nodes(rows))


def _nodes(rows: list[Any]) -> Iterator[NodeView]:
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.startswith(TAG):
            continue
        pod_id = row.get("id")
        if not isinstance(pod_id, str) or not pod_id:
            raise PayloadChanged(NAME, _LIST, "$.pods[].id", f"not text at {plain_text(name)}")
        word = row.get("status")
        status = _STATUSES.get(str(word), "starting")
        has_lost_gpus = status == "running" and _gpu_count(row) == 0
        yield NodeView(
            id=pod_id,
            tag=name,
            status=status,
            reason=reason_of(word, "0 GPUs" if has_lost_gpus else ""),
            is_preempted=word == "EXITED" or has_lost_gpus,
            ssh=_ssh(row) if status == "running" else None,
            usd_per_hour=usd_or_none(row.get("cost")),
            created_at=moment(row.get("createdAt")),
        )


def _gpu_count(row: object) -> int | None:
    """How many GPUs a pod has; None where the answer does not say."""
    gpu = row.get("gpu") if isinstance(row, dict) else None
    count = gpu.get("count") if isinstance(gpu, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def _ssh(row: Mapping[str, Any]) -> SshAddress | None:
    """Straight to the pod. The vendor's proxy carries an interactive shell only, so it is no address here."""
    ways = row.get("ssh")
    direct = ways.get("direct") if isinstance(ways, dict) else None
    if not isinstance(direct, dict):
        return None
    host, port, user = direct.get("host"), direct.get("port"), direct.get("username")
    if not isinstance(host, str) or not host.strip() or not isinstance(port, int) or not 0 < port < 65536:
        return None
    return SshAddress(host=host.strip(), port=port, username=user if isinstance(user, str) else "root")


class RunPodNodes:
    """The part of RunPod that is Compute."""

    _context: ProviderContext

    def _http(self) -> HttpClient:
        raise NotImplementedError

    def endpoint(self) -> str:
        """See PriceSource."""
        raise NotImplementedError

    @property
    def capabilities(self) -> Capabilities:
        """See Compute."""
        return replace(_CAPABILITIES, own_end=own_end(self.endpoint()))

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        """See Compute. The image must run an SSH server that takes PUBLIC_KEY, as the vendor's own do."""
        check_launch(_CAPABILITIES, ("on_demand",), offer, tag, bid_usd_per_hour)
        body = create_body(offer, spec, tag)
        door = self._door(deadline_s)
        answer = door.launch(_CREATE, "POST", PODS_PATH, _CREATES, body=body, tag=tag)
        return read_created(answer, tag, spec.env)

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """See Compute. The description has no pages; `nextCursor` is followed where it comes."""
        door, rows = self._door(deadline_s), list[Any]()
        params: dict[str, str] = {}
        for _ in range(_MOST_PAGES):
            payload = door.answer(_LIST, door.send(_LIST, "GET", PODS_PATH, _LISTS, params=params))
            rows += rows_at(NAME, _LIST, payload, "pods")
            cursor = payload.get("nextCursor")
            if not cursor:
                return parse_nodes(rows)
            if cursor == params.get("cursor"):
                raise PayloadChanged(NAME, _LIST, "$.nextCursor", "the same one again")
            params = {"cursor": str(cursor)}
        raise PayloadChanged(NAME, _LIST, "$.nextCursor", f"no end after {_MOST_PAGES} pages")

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """See Compute."""
        door = self._door(deadline_s)
        answer = door.send(_DELETE, "DELETE", _pod(node_id), _ENDS)
        if answer.status not in (204, 404):
            door.answer(_DELETE, answer)

    def restart(self, node_id: str, deadline_s: float) -> None:
        """See Compute. On its own host only: NoCapacity when the GPUs there are somebody else's by now.

        It may also start without any GPU, and then bills: whoever gets NoCapacity ends the pod.
        """
        door = self._door(deadline_s)
        answer = door.send(_START, "POST", f"{_pod(node_id)}/action", _STARTS, body={"action": "start"})
        if answer.status in (400, 404):
            raise NoCapacity(NAME, _START, words(answer, {}))
        if answer.status in (409, 422):
            raise Refused(NAME, _START, words(answer, {}))
        if _gpu_count(door.answer(_START, answer)) == 0:
            raise NoCapacity(NAME, _START, "it started with 0 GPUs")

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """See Compute."""
        return None

    def _door(self, deadline_s: float) -> Door:
        if not self._context.env.get(KEY_VARIABLE, "").strip():
            raise MissingCredentials(NAME, KEY_VARIABLE)
        return Door(self._context, NAME, self._http(), deadline_s)


def _pod(node_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", node_id):
        raise ValueError(f"not the id of a pod: {node_id!r}")
    return f"{PODS_PATH}/{quote(node_id)}"
