"""The account of the test cloud's vast.ai: its SSH keys, its secrets, what it was charged.

Call -> Account -> bill.py for the charges -> Reply
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from gpubroker.testcloud import bill, vast_rows
from gpubroker.testcloud.keys import is_key
from gpubroker.testcloud.shapes import choice, complaints, items, record, text
from gpubroker.testcloud.shapes import whole as whole_number
from gpubroker.testcloud.vast_list import decoded, whole
from gpubroker.testcloud.web import Call, Handler, Refused, Reply
from gpubroker.testcloud.world import Rental, World

if TYPE_CHECKING:
    from gpubroker.testcloud.vast_volumes import Volume, Volumes

_USER_ID = 424242
_MOST_CHARGES = 500  # a page
_DAYS = record({"gte": whole_number(), "lte": whole_number()}, {})
_CHARGE_FILTERS = record(
    {"day": _DAYS}, {"type": record({"in": items(choice("instance", "volume", "serverless"))}, {})}
)
_SECRET = record({"key": text(1, 128, r"[A-Za-z_][A-Za-z0-9_]*\Z"), "value": text(0, 4096)}, {}, closed=False)


def refusal(status: int, code: str, message: str, **more: Any) -> Reply:
    """The vendor's usual shape for what it refuses."""
    return Reply(status=status, body={"success": False, "error": code, "msg": message, **more})


class Account:
    """Its state and its routes. `keys_changed` is called when other SSH keys open its instances."""

    def __init__(self, world: World, keys_changed: Callable[[], None], volumes: Volumes) -> None:
        self.world = world
        self._volumes = volumes
        self.ssh_keys: dict[int, tuple[str, datetime]] = {}
        self.secrets: dict[str, str] = {}
        self._keys_changed = keys_changed
        self._next_key = 1001

    def routes(self) -> tuple[tuple[str, str, Handler, str], ...]:
        """(method, path, handler, name of its limit)."""
        return (
            ("GET", "/api/v0/ssh", self._list_keys, ""),
            ("POST", "/api/v0/ssh", self._new_key, "new key"),
            ("PUT", "/api/v0/ssh/{key_id}", self._change_key, "new key"),
            ("DELETE", "/api/v0/ssh/{key_id}", self._drop_key, ""),
            ("GET", "/api/v0/secrets", self._list_secrets, "secrets"),
            ("POST", "/api/v0/secrets", self._new_secret, "new secret"),
            ("PUT", "/api/v0/secrets", self._change_secret, "new secret"),
            ("DELETE", "/api/v0/secrets", self._drop_secret, "new secret"),
            ("GET", "/api/v0/charges", self._charges, "charges"),
            ("GET", "/api/v0/users/current", self._user, ""),
        )

    async def _list_keys(self, call: Call) -> Reply:
        return Reply(body=[self._key_row(number, "key") for number in self.ssh_keys])

    async def _new_key(self, call: Call) -> Reply:
        key = public_key(call.body)
        number = self.new_key_id()
        self._keep_key(number, key)
        return Reply(body={"success": True, "key": self._key_row(number, "public_key")})

    async def _change_key(self, call: Call) -> Reply:
        number = whole(call.path("key_id"))
        if number is None or number not in self.ssh_keys:
            return refusal(400, "no_ssh_key", "No such ssh key")
        self._keep_key(number, public_key(call.body))
        return Reply(body={"success": True, "key": self._key_row(number, "public_key")})

    async def _drop_key(self, call: Call) -> Reply:
        number = whole(call.path("key_id"))
        if number is None or self.ssh_keys.pop(number, None) is None:
            return refusal(400, "no_ssh_key", "No such ssh key")
        return Reply(body={"success": True})

    def _keep_key(self, number: int, key: str) -> None:
        """A key of the account opens all its instances, those that run too."""
        self.ssh_keys[number] = (key, self.world.clock.now())
        self._keys_changed()

    def new_key_id(self) -> int:
        """Keys of the account and of instances are numbered together."""
        self._next_key += 1
        return self._next_key

    def _key_row(self, number: int, name: str) -> dict[str, Any]:
        key, created = self.ssh_keys[number]
        stamp = f"{created:%Y-%m-%dT%H:%M:%SZ}"
        return {"id": number, "user_id": _USER_ID, name: key, "created_at": stamp, "deleted_at": None}

    async def _list_secrets(self, call: Call) -> Reply:
        return Reply(body={"success": True, "secrets": dict(self.secrets)})

    async def _new_secret(self, call: Call) -> Reply:
        name, value = _secret(call.body)
        if name in self.secrets:
            return refusal(400, "existing_key", "The variable exists already")
        self.secrets[name] = value
        return Reply(body={"success": True, "msg": "The environment variable was saved."})

    async def _change_secret(self, call: Call) -> Reply:
        name, value = _secret(call.body)
        if name not in self.secrets:
            return refusal(400, "nonexistent_key", "No such variable")
        self.secrets[name] = value
        return Reply(body={"success": True, "msg": "The environment variable was saved."})

    async def _drop_secret(self, call: Call) -> Reply:
        name = call.body.get("key") if isinstance(call.body, dict) else None
        if not isinstance(name, str):
            return refusal(400, "missing_input", "key: expected a string")
        if self.secrets.pop(name.upper(), None) is None:
            return refusal(400, "nonexistent_key", "No such variable")
        return Reply(body={"success": True, "msg": "The environment variable was deleted."})

    async def _charges(self, call: Call) -> Reply:
        """Of the contracts that a range of days touches; whole contracts, since none here lasts for long."""
        filters = decoded(call.query("select_filters", "{}"))
        if complaints(_CHARGE_FILTERS, filters):
            return refusal(400, "", "Must provide both 'day' gte and lte filters for instance charges")
        limit, skip = whole(call.query("limit", "100")), _place(call.query("after_token"))
        if not limit:
            return refusal(400, "invalid_request", "Error in query parameters: limit is not a number")
        if skip is None:
            return refusal(400, "invalid_token", "Invalid pagination token")
        now_s = self.world.clock.now_s()
        days, kinds = filters["day"], filters.get("type", {}).get("in", ("instance", "volume"))
        rentals = [r for r in self.world.rentals.values() if r.vendor == "vast"]
        rows = [_charge_row(rental, now_s) for rental in rentals]
        rows += [_volume_row(volume, now_s) for volume in self._volumes.all()]
        found = [
            row
            for row in rows
            if row["type"] in kinds and row["start"] <= days["lte"] and row["end"] >= days["gte"]
        ]
        shown = found[skip : skip + min(limit, _MOST_CHARGES)]
        after = skip + len(shown)
        token = base64.b64encode(str(after).encode()).decode() if after < len(found) else None
        body = {"success": True, "count": len(shown), "total": len(found), "next_token": token}
        return Reply(body={**body, "results": shown})

    async def _user(self, call: Call) -> Reply:
        keys = [key for key, _ in self.ssh_keys.values()]
        return Reply(
            body={
                "id": _USER_ID,
                "key_id": 1,
                "email": "somebody@example.com",
                "username": "somebody",
                "balance": 100,
                "credit": 100,
                "ssh_key": keys[-1] if keys else "",
                "sid": "0" * 32,
            }
        )


def _place(token: str) -> int | None:
    """How many rows were before the page of this token; None = it is none of ours."""
    try:
        return whole(base64.b64decode(token, validate=True).decode()) if token else 0
    except ValueError:
        return None


def _secret(body: Any) -> tuple[str, str]:
    """(name in capitals, value); raises Refused."""
    if faults := complaints(_SECRET, body):
        raise Refused(refusal(400, "missing_input", faults[0]))
    return body["key"].upper(), body["value"]


def public_key(body: Any) -> str:
    """The key of a request; raises Refused."""
    key = body.get("ssh_key") if isinstance(body, dict) else None
    if not isinstance(key, str) or not key.strip():
        raise Refused(refusal(400, "no_ssh_key", "No ssh key provided"))
    if not is_key(key):
        raise Refused(refusal(400, "no_ssh_key", "Not an ssh key"))
    return key.strip()


def _charge_row(rental: Rental, now_s: float) -> dict[str, Any]:
    """One instance's charges; USD."""
    kinds = {"gpu": "gpu", "disk": "disk", "bytes_in": "bwd", "bytes_out": "bwu"}
    began, ended = int(rental.events[0].at_s), int(now_s)
    if rental.state == "ended":
        ended = int(rental.since_s)
    parts = [(kinds[line.item], line.item, line.usd) for line in bill.lines(rental, now_s)]
    return _contract_row("instance", rental.id, rental.tag, (began, ended), parts)


def _volume_row(volume: Volume, now_s: float) -> dict[str, Any]:
    """One volume's charges; USD."""
    ended = int(now_s if volume.deleted_s is None else volume.deleted_s)
    parts = [("disk", "disk", volume.usd(now_s))]
    return _contract_row("volume", str(volume.id), volume.name, (int(volume.created_s), ended), parts)


def _contract_row(
    kind: str, number: str, label: str, when: tuple[int, int], parts: list[tuple[str, str, Decimal]]
) -> dict[str, Any]:
    dates = {"start": when[0], "end": when[1]}
    return {
        **dates,
        "type": kind,
        "source": f"{kind}-{number}",
        "description": f"{kind.capitalize()} {number}",
        "amount": vast_rows.money(sum((usd for _, _, usd in parts), Decimal(0))),
        "metadata": {"label": label},
        "items": [
            {
                **dates,
                "type": letters,
                "source": None,
                "description": item,
                "amount": vast_rows.money(usd),
                "metadata": {},
                "items": [],
            }
            for letters, item, usd in parts
        ],
    }
