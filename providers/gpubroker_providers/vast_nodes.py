"""vast.ai's instances: one machine each, rented on demand or by a bid.

launcher -> VastNodes.create     -> PUT /api/v0/asks/{ask}/      -> read_created -> id
supervisor -> VastNodes.list_nodes -> GET /api/v1/instances/ (25 a page) -> parse_nodes -> [NodeView]

Facts are from vast's OpenAPI description, its SDK's requests and public clients. There is no key for
idempotency: the label carries the tag. The instance id is `new_contract`, never the ask's. A refusal may
carry one too: a bid that is too low can leave a stopped instance whose disk is billed until it is destroyed.

Status, by actual_status and the triple cur_state, intended_status, next_state; the first line that fits:

    triple all "stopped"              stopped   with is_bid, and unless its container never came up:
                                                preempted. A stop by hand looks the same, which no caller
                                                of ours does; who stops one in the console knows.
    running                           running
    exited, unknown, offline, frozen  stopped   the vendor: it will not run again by itself
    stopped                           stopped
    null, created, loading,           starting
    rebooting, any other word

The job's key comes with the create, in the start script, and goes with the instance. A key of the account
would open all of the account's instances, and attaching one afterwards is a second call, that can fail while
the instance bills. The script runs at each start, a moment after SSH answers: a key that is not taken yet is
no reason to give up on a node that has just begun to run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from gpubroker.doors import Shell
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
    port_or_none,
    reason_of,
    usd_or_none,
    words,
)
from gpubroker_providers._vendor import plain_text, refuse_drift, rows_at

NAME = "vast"
KEY_VARIABLE = "VAST_API_KEY"
USUAL_IMAGE = "vastai/base-image:@vastai-automatic-tag"
PAGE = 25
_CREATE, _LIST, _DESTROY, _START = "create instance", "list instances", "destroy instance", "start instance"
# Seconds between two requests to one endpoint (the description's x-rateLimit).
_CREATES, _LISTS, _ENDS, _STARTS = (
    Slot("create", 4.5),
    Slot("list", 1.0),
    Slot("destroy", 3.0),
    Slot("manage", 1.0),
)
_REQUIRED = ("id", "label", "actual_status", "intended_status", "cur_state", "next_state", "is_bid")
_MOST_PAGES = 400
_CAPABILITIES = Capabilities(
    takes_bids=True, stop=True, bills_idle_disk=True, create_interval_s=_CREATES.interval_s
)
# A start that is not the first follows a preemption, and nobody waits for that node any more.
_END_IF_BACK = (
    "for c in ~/gpubroker/*/config.json; do"
    ' [ ! -e "$c" ] || (cd "${c%/*}" && python3 gpubroker-node.pyz end config.json); done'
)
_NEVER_RUNS = ("exited", "unknown", "offline", "frozen", "stopped")
_NEVER_CAME_UP = "oci runtime create failed"


def create_body(offer: Offer, spec: NodeSpec, tag: str, bid_usd_per_hour: Decimal | None) -> dict[str, Any]:
    """The body of a create. `price` is there exactly for a bid: with it the vendor makes an interruptible."""
    body: dict[str, Any] = {
        "client_id": "me",
        "image": spec.image or USUAL_IMAGE,
        "env": dict(spec.env),
        "disk": spec.disk_gb,
        "label": tag,
        "runtype": "ssh_direct",
        "target_state": "running",
        # Without it a bid that does not win leaves a stopped instance whose disk is billed.
        "cancel_unavail": True,
    }
    if spec.ssh_public_key:
        body["onstart"] = f"{_END_IF_BACK}; {_key_script(spec.ssh_public_key)}"
    if bid_usd_per_hour is not None:
        body["price"] = float(bid_usd_per_hour)  # JSON has no other numbers; its shortest form is exact
    return body


def own_end(base_url: str) -> dict[str, Any]:
    """An instance destroys itself with the key that vast gives it, which opens that instance alone."""
    url = f"{base_url.rstrip('/')}/api/v0/instances/${{CONTAINER_ID}}/"
    headers = {"Authorization": "Bearer ${CONTAINER_API_KEY}"}
    return {"http": {"method": "DELETE", "url": url, "headers": headers, "body": {}}}


def _key_script(public_key: str) -> str:
    """Lets the key in beside those that are there, once, however often the instance starts."""
    key, file = shlex.quote(public_key.strip()), "~/.ssh/authorized_keys"
    return (
        f"mkdir -p ~/.ssh && chmod 700 ~/.ssh && {{ grep -qxF {key} {file} 2>/dev/null"
        f" || printf '\\n%s\\n' {key} >> {file}; }}; chmod 600 {file}"
    )


def read_created(answer: HttpAnswer, tag: str, environment: Mapping[str, str]) -> str:
    """The new instance's id. Raises what any other answer means.

    200 with new_contract             the id
    any with new_contract, no success LaunchUncertain with that id: it may bill
    401, 403, any 4xx with auth_error AuthFailed (a key of nobody's is a 404); 403 about this offer: Refused
    404, 410                          NoCapacity: the ask is gone
    402, or words about credit        QuotaExceeded
    429                               Transient
    other 4xx, success false          Refused
    3xx, 408, 5xx, no JSON            LaunchUncertain
    """
    said, status, text = decoded(answer), answer.status, words(answer, environment)
    body = said if isinstance(said, dict) else {}
    contract, error = body.get("new_contract"), body.get("error")
    if isinstance(contract, int) and not isinstance(contract, bool):
        if status < 300 and body.get("success") is True:
            return str(contract)
        raise LaunchUncertain(NAME, _CREATE, text, tag=tag, ids=[str(contract)])
    if 400 <= status < 500 and error == "auth_error":
        raise AuthFailed(NAME, _CREATE, text)
    if status in (404, 410) or (status < 300 and body.get("success") is False and error == "no_such_ask"):
        raise NoCapacity(NAME, _CREATE, text)
    if status == 429:
        raise Transient(NAME, _CREATE, text, retry_after_s=pause_s(answer))
    if status == 402 or (400 <= status < 500 and "credit" in str(error)):
        raise QuotaExceeded(NAME, _CREATE, text)
    if status == 401 or (status == 403 and error != "invalid_args"):
        raise AuthFailed(NAME, _CREATE, text)
    if (status < 300 and body.get("success") is False) or (400 <= status < 500 and status != 408):
        raise Refused(NAME, _CREATE, text)
    # An answer of success is not quoted: it may hold the instance's own key.
    detail = f"HTTP {status}, without an id" if status < 300 else text
    raise LaunchUncertain(NAME, _CREATE, detail, tag=tag)


def pause_s(answer: HttpAnswer) -> float | None:
    """Seconds that it wants no request: by the header, or the endpoint's interval in its plain text."""
    threshold = re.search(r"threshold=(\d{1,3}(?:\.\d+)?)", answer.text)
    return retry_after_s(answer.headers) or (float(threshold[1]) if threshold else None)


def parse_nodes(rows: list[Any]) -> list[NodeView]:
    """Instances whose label begins with our tag.

    Raises PayloadChanged when every row lacks a required key, or one of ours has no id: it must not be lost.
    """
    refuse_drift(NAME, _LIST, rows, "$.instances", _REQUIRED)
    return once_each(_nodes(rows))


def _nodes(rows: list[Any]) -> Iterator[NodeView]:
    for row in rows:
        label = row.get("label") if isinstance(row, dict) else None
        if not isinstance(label, str) or not label.startswith(TAG):
            continue
        number = row.get("id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise PayloadChanged(NAME, _LIST, "$.instances[].id", f"not a number at {plain_text(label)}")
        status, is_preempted = _status(row)
        yield NodeView(
            id=str(number),
            tag=label,
            status=status,
            reason=reason_of(row.get("actual_status"), row.get("status_msg")),
            is_preempted=is_preempted,
            ssh=_ssh(row) if status == "running" else None,
            # A stopped one costs its disk.
            usd_per_hour=usd_or_none(row.get("storage_total_cost" if status == "stopped" else "dph_total")),
            created_at=moment(row.get("start_date")),
        )


def _status(row: Mapping[str, Any]) -> tuple[NodeStatus, bool]:
    """See the table above."""
    actual = row.get("actual_status")
    if all(row.get(key) == "stopped" for key in ("cur_state", "intended_status", "next_state")):
        never_up = _NEVER_CAME_UP in str(row.get("status_msg")).lower()
        return "stopped", row.get("is_bid") is True and not never_up
    if actual == "running":
        return "running", False
    return ("stopped" if actual in _NEVER_RUNS else "starting"), False


def _ssh(row: Mapping[str, Any]) -> SshAddress | None:
    """Straight to the machine where its port is published, else through the vendor's proxy."""
    host, port = row.get("public_ipaddr"), _published_port(row.get("ports"))
    if not isinstance(host, str) or not host.strip() or port is None:
        host, port = row.get("ssh_host"), port_or_none(row.get("ssh_port"))
    if not isinstance(host, str) or not host.strip() or port is None:
        return None
    return SshAddress(host=host.strip(), port=port, username="root")


def _published_port(ports: object) -> int | None:
    entries = ports.get("22/tcp") if isinstance(ports, dict) else None
    first = entries[0] if isinstance(entries, list) and entries else None
    return port_or_none(first.get("HostPort")) if isinstance(first, dict) else None


class VastNodes:
    """The part of Vast that is Compute."""

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
        """See Compute. Volumes lie on one machine here, so that none can be mounted."""
        check_launch(_CAPABILITIES, ("on_demand", "spot"), offer, tag, bid_usd_per_hour)
        if not re.fullmatch(r"[0-9]+", offer.listing_id):
            raise ValueError(f"not the id of an ask: {offer.listing_id!r}")
        if spec.volume_id:
            raise Refused(NAME, _CREATE, "vast.ai has no network volumes")
        body = create_body(offer, spec, tag, bid_usd_per_hour)
        path = f"/api/v0/asks/{offer.listing_id}/"
        answer = self._door(deadline_s).launch(_CREATE, "PUT", path, _CREATES, body=body, tag=tag)
        return read_created(answer, tag, spec.env)

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """See Compute."""
        door, rows = self._door(deadline_s), list[Any]()
        params = {"limit": str(PAGE)}
        for _ in range(_MOST_PAGES):
            payload = door.answer(_LIST, door.send(_LIST, "GET", "/api/v1/instances/", _LISTS, params=params))
            rows += rows_at(NAME, _LIST, payload, "instances")
            token = payload.get("next_token")
            if not token:
                return parse_nodes(rows)
            if token == params.get("after_token"):
                raise PayloadChanged(NAME, _LIST, "$.next_token", "the same one again")
            params = {**params, "after_token": str(token)}
        raise PayloadChanged(NAME, _LIST, "$.next_token", f"no end after {_MOST_PAGES} pages")

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """See Compute."""
        door = self._door(deadline_s)
        answer = door.send(_DESTROY, "DELETE", _instance(node_id), _ENDS, body={})
        if not _is_gone(answer):
            self._check(door, _DESTROY, answer)

    def restart(self, node_id: str, deadline_s: float) -> None:
        """See Compute. On its own machine only; a bid that does not win there waits without an end."""
        door = self._door(deadline_s)
        answer = door.send(_START, "PUT", _instance(node_id), _STARTS, body={"state": "running"})
        if _is_gone(answer) or answer.status == 410 or "resources_unavailable" in answer.text:
            raise NoCapacity(NAME, _START, words(answer, {}))
        self._check(door, _START, answer)

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """See Compute."""
        return None

    def _check(self, door: Door, operation: str, answer: HttpAnswer) -> None:
        said = door.answer(operation, answer)
        if not isinstance(said, dict) or said.get("success") is not True:
            raise ProviderError(NAME, operation, words(answer, {}))

    def _door(self, deadline_s: float) -> Door:
        if not self._context.env.get(KEY_VARIABLE, "").strip():
            raise MissingCredentials(NAME, KEY_VARIABLE)
        return Door(self._context, NAME, self._http(), deadline_s, pause_s)


def _instance(node_id: str) -> str:
    if not re.fullmatch(r"[0-9]+", node_id):
        raise ValueError(f"not the id of an instance: {node_id!r}")
    return f"/api/v0/instances/{node_id}/"


def _is_gone(answer: HttpAnswer) -> bool:
    """Raises AuthFailed: to a key of nobody's everything is a 404, and what it asks about bills on."""
    body = decoded(answer)
    error = body.get("error") if isinstance(body, dict) else None
    if answer.status == 404 and error == "auth_error":
        raise AuthFailed(NAME, "instance", words(answer, {}))
    return answer.status == 404 or error in ("no_such_instance", "not_found")
