"""The test cloud's own URL, for tests and people: see nodes and bill, preempt, break things, set the clock.

    GET    /nodes                     every rental, the ended ones too
    POST   /nodes/{id}/preempt        {"notice_s": n or null}; with a notice it answers at once
    POST   /nodes/{id}/transfer       {"bytes_in": n, "bytes_out": n}: bytes the vendor would have metered
    POST   /nodes/{id}/gpu            {"utilization": percent or null}: what its nvidia-smi says; null = as
                                      much as a job there uses, which is how it begins
    POST   /nodes/{id}/published      {"attempt": text}: who published a checkpoint from there, where the test
                                      cloud cannot see it by itself (publishing.py)
    POST   /faults, DELETE /faults    the fault script
    GET    /bill                      {vendor: {tag: USD}}; ?by=node: the lines of every node
    GET    /clock, POST /clock        {"speed": x}
    GET    /bugs                      exceptions of the test cloud itself; [] = none

up.py -> Control -> World, bill.py. Money is a decimal string, time ISO 8601 UTC. No key: it is on loopback.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol

from aiohttp import web

from gpubroker.testcloud import bill
from gpubroker.testcloud.background import Background
from gpubroker.testcloud.world import Rental, Vendor, World

Preempt = Callable[[Rental, float | None], Awaitable[None]]
_CENT_PARTS = Decimal("0.000001")


class VendorApi(Protocol):
    """What `up` and this file need of a vendor's API.

    It may also have `site: Site` or `bugs: list[BaseException]`; `preempt(rental, notice_s)`, when losing a
    node is more than a stop or an end there; and `other_charges(now_s) -> {tag: USD}`, for what is billed and
    is no rental.
    """

    @property
    def env(self) -> Mapping[str, str]:
        """What a client's environment needs, once it listens."""

    async def start(self, port: int = 0) -> str:
        """Listen on loopback; the base URL."""

    async def close(self) -> None:
        """Listen no more."""


class Control(Background):
    """The control URL of one world."""

    def __init__(self, world: World, vendors: Mapping[Vendor, VendorApi]) -> None:
        super().__init__("control")
        self._world = world
        self._vendors = vendors
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1; the URL."""
        app = web.Application(middlewares=[_in_json])
        app.add_routes(
            [
                web.get("/nodes", self._nodes),
                web.post("/nodes/{id}/preempt", self._preempt),
                web.post("/nodes/{id}/transfer", self._transfer),
                web.post("/nodes/{id}/gpu", self._show_load),
                web.post("/nodes/{id}/published", self._published),
                web.post("/faults", self._add_faults),
                web.delete("/faults", self._clear_faults),
                web.get("/bill", self._bill),
                web.get("/clock", self._show_clock),
                web.post("/clock", self._set_clock),
                web.get("/bugs", self._show_bugs),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Listen no more; notices that have been given end with nothing."""
        await self.end_tasks()
        if self._runner is not None:
            await self._runner.cleanup()

    # Nodes

    async def _nodes(self, request: web.Request) -> web.Response:
        self._world.publishing.look()
        return web.json_response([_node_row(rental) for rental in self._world.rentals.values()])

    async def _preempt(self, request: web.Request) -> web.Response:
        rental = self._rental(request)
        notice_s = (await _body(request, "notice_s")).get("notice_s")
        if notice_s is not None and not _is_amount(notice_s):
            raise _refused(400, "notice_s: a number of seconds, or null")
        if rental.state not in ("pending", "running"):
            raise _refused(409, f"{rental.id} is {rental.state}")
        work = self._preempt_now(rental, None if notice_s is None else float(notice_s))
        if notice_s is None:
            await work
        else:
            self.spawn(work)
        return web.json_response(_node_row(rental))

    async def _preempt_now(self, rental: Rental, notice_s: float | None) -> None:
        """In the vendor's own way; else a signal, the notice, and the end (RunPod keeps a stopped pod)."""
        own: Preempt | None = getattr(self._vendors.get(rental.vendor), "preempt", None)
        if own is not None:
            await own(rental, notice_s)
            return
        if notice_s is not None:
            if rental.node is not None:
                await rental.node.notice(signal.SIGTERM)
            await self._world.clock.sleep(notice_s)
        if rental.vendor == "runpod":
            await self._world.stop(rental, "preempted")
        else:
            await self._world.end(rental, "preempted")

    async def _transfer(self, request: web.Request) -> web.Response:
        rental = self._rental(request)
        body = await _body(request, "bytes_in", "bytes_out")
        if not all(isinstance(n, int) and 0 <= n < 10**18 for n in body.values()):
            raise _refused(400, "bytes_in and bytes_out are numbers of bytes")
        self._world.record(rental, "transfer", **body)
        return web.json_response(_node_row(rental))

    async def _show_load(self, request: web.Request) -> web.Response:
        rental = self._rental(request)
        body = await _body(request, "utilization")
        percent = body.get("utilization")
        if "utilization" not in body or not (percent is None or (_is_amount(percent) and percent <= 100)):
            raise _refused(400, "utilization: percent from 0 to 100, or null")
        if rental.node is None:
            raise _refused(409, f"{rental.id} is {rental.state}")
        rental.node.show_load(None if percent is None else int(percent))
        return web.json_response(_node_row(rental))

    async def _published(self, request: web.Request) -> web.Response:
        rental = self._rental(request)
        rental.published_by = str((await _body(request, "attempt")).get("attempt", ""))
        return web.json_response(_node_row(rental))

    def _rental(self, request: web.Request) -> Rental:
        rental = self._world.rentals.get(request.match_info["id"])
        if rental is None:
            raise _refused(404, f"no node {request.match_info['id']!r}")
        return rental

    # Faults, the bill, the clock

    async def _add_faults(self, request: web.Request) -> web.Response:
        try:
            added = self._world.faults.add(await _json(request))
        except (ValueError, TypeError) as error:
            raise _refused(400, str(error)) from error
        return web.json_response({"added": added})

    async def _clear_faults(self, request: web.Request) -> web.Response:
        self._world.faults.clear()
        return web.json_response({})

    async def _bill(self, request: web.Request) -> web.Response:
        now_s = self._world.clock.now_s()
        if request.query.get("by") == "node":
            return web.json_response(_by_node(self._world.rentals.values(), now_s))
        left = bill.egress(self._world.rentals.values())
        sums: dict[str, dict[str, Decimal]] = {vendor: {} for vendor in self._vendors}
        for rental in self._world.rentals.values():
            tags = sums.setdefault(rental.vendor, {})
            usd = bill.total(rental, now_s) + left.get(rental.id, Decimal(0))
            tags[rental.tag] = tags.get(rental.tag, Decimal(0)) + usd
        for vendor, api in self._vendors.items():
            others: Callable[[float], Mapping[str, Decimal]] | None = getattr(api, "other_charges", None)
            for tag, usd in (others(now_s) if others else {}).items():
                sums[vendor][tag] = sums[vendor].get(tag, Decimal(0)) + usd
        return web.json_response(
            {v: {tag: _usd(usd) for tag, usd in tags.items()} for v, tags in sums.items()}
        )

    async def _show_clock(self, request: web.Request) -> web.Response:
        clock = self._world.clock
        return web.json_response({"now": _iso(clock.now_s()), "speed": clock.speed})

    async def _set_clock(self, request: web.Request) -> web.Response:
        speed = (await _body(request, "speed")).get("speed")
        if speed is None or not _is_amount(speed) or not 0 < speed <= 10**6:
            raise _refused(400, "speed: simulated seconds in a real one, above 0")
        self._world.clock.set_speed(float(speed))
        return await self._show_clock(request)

    async def _show_bugs(self, request: web.Request) -> web.Response:
        owners: dict[str, list[BaseException]] = {v: _bugs_of(api) for v, api in self._vendors.items()}
        owners["control"] = self.bugs
        return web.json_response(
            [f"{v}: {type(e).__name__}: {e}" for v, bugs in owners.items() for e in bugs]
        )


def _bugs_of(api: VendorApi) -> list[BaseException]:
    return list(getattr(getattr(api, "site", api), "bugs", ()))


def _node_row(rental: Rental) -> dict[str, Any]:
    """The contract's fields, and what tests need to reach it."""
    return {
        "id": rental.id,
        "vendor": rental.vendor,
        "tag": rental.tag,
        "sku": rental.host.sku,
        "state": rental.state,
        "created": _iso(rental.events[0].at_s),
        "since": _iso(rental.since_s),
        "published_by": rental.published_by,
        "published": [{"at": _iso(one.at_s), "where": one.where} for one in rental.published],
        "market": rental.market,
        "region": rental.host.region,
        "host": rental.host.id,
        "reason": rental.reason,
        "usd_per_hour": _usd(rental.usd_per_hour),
        "ssh_port": rental.node.ssh_port if rental.node else None,
        "ssh_sessions": rental.node.ssh_sessions if rental.node else None,
        "home": rental.node.home if rental.node else None,
    }


def _by_node(rentals: Iterable[Rental], now_s: float) -> dict[str, Any]:
    table: dict[str, Any] = {}
    rentals = list(rentals)
    left = bill.egress(rentals)
    for rental in rentals:
        lines = {line.item: line.usd for line in bill.lines(rental, now_s)}
        if usd := left.get(rental.id):
            lines["bytes_out"] = usd
        table[rental.id] = {
            "vendor": rental.vendor,
            "tag": rental.tag,
            "usd": _usd(sum(lines.values(), Decimal(0))),
            "lines": {item: _usd(usd) for item, usd in lines.items()},
        }
    return table


def _usd(amount: Decimal) -> str:
    return f"{amount.quantize(_CENT_PARTS):f}"


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _is_amount(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    )


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.text() or "{}")
    except (ValueError, RecursionError) as error:
        raise _refused(400, f"not JSON: {error}") from error


async def _body(request: web.Request, *known: str) -> dict[str, Any]:
    """An object with no other keys than these."""
    body = await _json(request)
    if not isinstance(body, dict) or set(body) - set(known):
        raise _refused(400, f"an object with {', '.join(known)} is wanted")
    return body


def _refused(status: int, message: str) -> web.HTTPException:
    kinds: dict[int, type[web.HTTPException]] = {404: web.HTTPNotFound, 409: web.HTTPConflict}
    return kinds.get(status, web.HTTPBadRequest)(
        text=json.dumps({"error": message}), content_type="application/json"
    )


@web.middleware
async def _in_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What aiohttp itself refuses is JSON too."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.content_type == "application/json":
            raise
        return web.json_response({"error": error.reason}, status=error.status)
