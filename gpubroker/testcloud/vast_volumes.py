"""The volumes of the test cloud's vast.ai: disks of one machine that outlive its instances.

Call -> Volumes -> vast_rows.py for the rows, bill.py for the charges -> Reply
vast.py (volume_info of a create) -> chosen, attach -> volumes.py -> a folder in the instance's home

As the vendor has them: local, so an instance uses one only on the same machine; of a fixed size; attached
only at create; deleted only when no instance uses it; billed by GB and month at the machine's own price from
creation to deletion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gpubroker.testcloud import bill, vast_rows
from gpubroker.testcloud.shapes import boolean, complaints, nullable, record, text, whole
from gpubroker.testcloud.vast_account import refusal
from gpubroker.testcloud.vast_list import whole as number_of
from gpubroker.testcloud.vast_rows import BadQuery
from gpubroker.testcloud.volumes import Folders, mount
from gpubroker.testcloud.web import Call, Handler, Reply
from gpubroker.testcloud.world import Host, Rental, World

_FIRST = 30_000_001
_USUAL_GB = 15
_NOT_FILTERS = frozenset(("order", "limit", "allocated_storage"))
_SEARCH = record({}, {"limit": nullable(whole(1, 100_000))}, closed=False)
_RENT = record({"id": whole(1)}, {"size": nullable(whole(1, 100_000)), "name": nullable(text(1, 128))})
_INFO = record(
    {"create_new": boolean, "volume_id": whole(1), "mount_path": text(2, 256, r"^/[A-Za-z0-9._/-]+\Z")},
    {"size": nullable(whole(1, 100_000)), "name": nullable(text(1, 128))},
    closed=False,
)
# What a volume's listing says of its machine.
_OFFERED = (
    *("bundle_id", "cpu_arch", "cpu_ghz", "cpu_name", "cuda_max_good", "disk_bw", "disk_name"),
    *("driver_version", "external", "geolocation", "gpu_arch", "host_id", "inet_down", "inet_up"),
    *("machine_id", "mobo_name", "reliability", "reliability2", "reliability_mult", "static_ip"),
    *("storage_cost", "verification", "vms_enabled", "hosting_type", "os_version"),
)
_SHOWN = (
    *("driver_version", "cuda_max_good", "machine_id", "reliability2", "host_id", "cpu_name", "mobo_name"),
    *("disk_name", "inet_up", "inet_down", "os_version", "verification", "static_ip", "cpu_arch"),
)


@dataclass(slots=True, kw_only=True)
class Volume:
    """One that somebody rents, or has rented."""

    id: int
    name: str
    host: Host
    size_gb: int
    created_s: float
    deleted_s: float | None = None  # None = it is there

    def usd(self, now_s: float) -> Decimal:
        """What it has cost."""
        until_s = now_s if self.deleted_s is None else self.deleted_s
        return bill.vast_volume(self.size_gb, self.host.facts["storage_cost"], until_s - self.created_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a create's volume_info comes to: a volume that is there, or a new one."""

    path: str
    volume: Volume | None  # None = a new one of that size
    size_gb: int
    name: str


class Volumes:
    """Its state and its routes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.volumes: dict[int, Volume] = {}
        self.old: list[Volume] = []  # deleted; their bill stays
        self.folders = Folders("vast")
        self._next = _FIRST

    def routes(self) -> tuple[tuple[str, str, Handler, str], ...]:
        """(method, path, handler, name of its limit)."""
        return (
            ("POST", "/api/v0/volumes/search", self._search, "search volumes"),
            ("PUT", "/api/v0/volumes", self._rent, "rent volume"),
            ("GET", "/api/v0/volumes", self._list, "list volumes"),
            ("DELETE", "/api/v0/volumes", self._delete, "delete volume"),
        )

    def charges(self, now_s: float) -> dict[str, Decimal]:
        """USD by name."""
        sums: dict[str, Decimal] = {}
        for volume in self.all():
            sums[volume.name] = sums.get(volume.name, Decimal(0)) + volume.usd(now_s)
        return sums

    def all(self) -> tuple[Volume, ...]:
        """The deleted ones too."""
        return (*self.old, *self.volumes.values())

    # Of an instance

    def chosen(self, info: Any, host: Host) -> Chosen | None:
        """What a create on this machine asks for; None = no volume. Raises ValueError that says why not."""
        if not info:
            return None
        if wrong := complaints(_INFO, info):
            raise ValueError(f"volume_info: {wrong[0]}")
        size_gb, name = info.get("size") or _USUAL_GB, info.get("name") or ""
        if not info["create_new"]:
            volume = self.volumes.get(info["volume_id"])
            if volume is None or volume.host is not host:
                raise ValueError("volume_info: no such volume on this machine")
            return Chosen(path=info["mount_path"], volume=volume, size_gb=volume.size_gb, name=volume.name)
        if info["volume_id"] != self._offer_id(host):
            raise ValueError("volume_info: no such volume offer on this machine")
        if size_gb > self._free_gb(host):
            raise ValueError(f"volume_info: the machine has {self._free_gb(host)} GB")
        return Chosen(path=info["mount_path"], volume=None, size_gb=size_gb, name=name)

    def attach(self, rental: Rental, chosen: Chosen | None) -> None:
        """The instance has it from its start on; a new one exists, and is billed, from now."""
        if chosen is not None:
            volume = chosen.volume or self._make(rental.host, chosen.size_gb, chosen.name)
            rental.wish["volume"] = {"id": volume.id, "path": chosen.path}

    def mount(self, rental: Rental) -> None:
        """Its node is up."""
        if wish := rental.wish.get("volume"):
            mount(self.world, rental, wish["path"], self.folders.folder(str(wish["id"])))

    def info(self, rental: Rental) -> list[dict[str, Any]]:
        """What its row says."""
        wish = rental.wish.get("volume")
        volume = self.volumes.get(wish["id"]) if wish else None
        if wish is None or volume is None:
            return []
        return [{"id": volume.id, "name": volume.name, "size": volume.size_gb, "mount_path": wish["path"]}]

    # Of the account

    async def _search(self, call: Call) -> Reply:
        query = {} if call.body is None else call.body
        if wrong := complaints(_SEARCH, query):
            return refusal(400, "invalid_request", wrong[0])
        filters = {key: value for key, value in query.items() if key not in _NOT_FILTERS}
        rows = [self._offer(host, call.as_of_s) for host in self._hosts() if self._free_gb(host) > 0]
        try:
            vast_rows.check_filters(
                filters if rows else {}, vast_rows.search_columns(rows[0] if rows else {})
            )
        except BadQuery as error:
            return refusal(400, "invalid_args", str(error))
        found = [row for row in rows if vast_rows.matches(row, filters)]
        return Reply(body={"offers": call.rows(found[: query.get("limit") or 64])})

    async def _rent(self, call: Call) -> Reply:
        if wrong := complaints(_RENT, call.body):
            return refusal(400, "invalid_args", wrong[0])
        host = next((h for h in self._hosts() if self._offer_id(h) == call.body["id"]), None)
        if host is None:
            return refusal(404, "no_such_ask", "The volume offer is no longer available.")
        size_gb = call.body.get("size") or _USUAL_GB
        if size_gb > self._free_gb(host):
            return refusal(400, "invalid_args", f"The machine has {self._free_gb(host)} GB.")
        volume = self._make(host, size_gb, call.body.get("name") or "")
        return Reply(body={"success": True, "volume_name": volume.name})

    async def _list(self, call: Call) -> Reply:
        rows = [self._row(volume) for volume in self.volumes.values() if volume.created_s <= call.as_of_s]
        return Reply(body={"volumes": call.rows(rows)})

    async def _delete(self, call: Call) -> Reply:
        """By the id in the body, as the document has it, or in the query, as the vendor's client sends it."""
        asked = call.body["id"] if isinstance(call.body, dict) and "id" in call.body else None
        asked = number_of(call.query("id")) if asked is None else asked
        if isinstance(asked, bool) or not isinstance(asked, int):
            return refusal(400, "invalid_args", "Please provide a valid volume ID.")
        volume = self.volumes.get(asked)
        if volume is None:
            return refusal(404, "no_such_volume", "Volume with that ID does not exist.")
        if self._users(volume):
            return refusal(400, "invalid_args", "The volume is used by an instance: destroy that first.")
        volume.deleted_s = self.world.clock.now_s()
        self.old.append(self.volumes.pop(asked))
        self.folders.forget(str(asked))
        return Reply(body={"success": True})

    def _make(self, host: Host, size_gb: int, name: str) -> Volume:
        volume = Volume(
            id=self._next,
            name=name or f"V.{self._next}",
            host=host,
            size_gb=size_gb,
            created_s=self.world.clock.now_s(),
        )
        self._next += 1
        self.volumes[volume.id] = volume
        return volume

    def _hosts(self) -> list[Host]:
        return [host for (vendor, _), host in self.world.hosts.items() if vendor == "vast"]

    def _offer_id(self, host: Host) -> int:
        digest = hashlib.sha256(f"{self.world.seed}/{host.id}/volume".encode()).digest()
        return 2_000_000_000 + int.from_bytes(digest[:6]) % 1_000_000_000

    def _free_gb(self, host: Host) -> int:
        taken = sum(volume.size_gb for volume in self.volumes.values() if volume.host is host)
        return int(host.facts["disk_space"]) - taken

    def _users(self, volume: Volume) -> list[Rental]:
        return [
            rental
            for rental in self.world.rentals.values()
            if rental.vendor == "vast"
            and rental.state != "ended"
            and rental.wish.get("volume", {}).get("id") == volume.id
        ]

    def _offer(self, host: Host, now_s: float) -> dict[str, Any]:
        hardware, facts, offer_id = vast_rows.hardware(host), host.facts, self._offer_id(host)
        return {
            **{key: hardware[key] for key in _OFFERED},
            "id": offer_id,
            "ask_contract_id": offer_id,
            "disk_space": self._free_gb(host),
            "driver_vers": str(hardware["driver_vers"]),
            "geolocode": str(hardware["geolocode"]),
            "vericode": str(hardware["vericode"]),
            "start_date": int(now_s) - 86400,
            "end_date": int(now_s) + facts["duration_s"],
            "duration": facts["duration_s"],
            "storage_total_cost": vast_rows.money(vast_rows.disk_usd_per_hour(host, 1)),
        }

    def _row(self, volume: Volume) -> Mapping[str, Any]:
        hardware = vast_rows.hardware(volume.host)
        return {
            **{key: hardware[key] for key in _SHOWN},
            "id": volume.id,
            "label": volume.name,
            "status": "active",
            "instances": [{"id": int(rental.id)} for rental in self._users(volume)],
            "public_ipaddr": "127.0.0.1",
            "disk_space": volume.size_gb,
            "storage_total_cost": vast_rows.money(vast_rows.disk_usd_per_hour(volume.host, volume.size_gb)),
            "start_date": volume.created_s,
        }
