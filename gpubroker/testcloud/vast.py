"""vast.ai's API in the test cloud: a market of single machines, rented on demand or by bid.

Call -> Vast -> World (rentals, bids against the market) -> vast_rows.py, vast_list.py -> Reply
     -> Account (vast_account.py): keys, secrets, charges; Volumes (vast_volumes.py)

Facts are from vast's OpenAPI description and from what public clients met:
- an ask id lives for minutes; the machine stays;
- a create without `price` rents on demand, whatever was searched for;
- a bid that is too low, without `cancel_unavail`, leaves a stopped instance whose disk is billed, and the
  error carries its id in `new_contract`;
- the outbid are stopped, keep their (billed) disk, and run again when their bid wins; renters on demand
  outrank every bid;
- one who asks too often gets plain text, with the endpoint's interval in it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpubroker.testcloud import vast_rows
from gpubroker.testcloud.shapes import (
    boolean,
    choice,
    complaints,
    items,
    nullable,
    record,
    table,
    text,
)
from gpubroker.testcloud.vast_account import Account, public_key, refusal
from gpubroker.testcloud.vast_list import decoded, page_of, whole
from gpubroker.testcloud.vast_rows import BadQuery
from gpubroker.testcloud.vast_volumes import Chosen, Volumes
from gpubroker.testcloud.web import Call, Handler, Limit, Manners, Refused, Reply, Site, account_key
from gpubroker.testcloud.world import Host, Rental, State, Vendor, World

VENDOR: Vendor = "vast"
ASK_LIFE_S = 240  # an ask id is replaced so often
ASK_GRACE_S = 60  # and can still be rented for so long, at least
_ASK_GRACE_REAL_S = 5  # of real time, however fast the clock runs: clients do not
RECLAIM_S = 600  # who was preempted by hand stays outbid for so long
_SETTLE_S = 10.0  # bids are compared with the market so often
_FIRST_CONTRACT = 20_000_001
_KINDS = {"ondemand": "ondemand", "on-demand": "ondemand", "bid": "bid", "reserved": "reserved"}
_NOT_FILTERS = frozenset(("type", "order", "limit", "allocated_storage", "disable_bundling"))
_DEFAULT_FILTERS: dict[str, Any] = {
    "verified": {"eq": True},
    "rentable": {"eq": True},
    "rented": {"eq": False},
}
_OUTBID, _BY_USER, _BID_TOO_LOW, _WAITS = "outbid", "stopped by its user", "bid too low", "waits for a GPU"

_LIMITS = {
    "create": Limit("create", 4.5, penalty_s=12.0),
    "show": Limit("show", 2.0),
    "list": Limit("list", 1.0),
    "manage": Limit("manage", 1.0),
    "destroy": Limit("destroy", 3.0),
    "bid": Limit("bid", 5.5),
    "reboot": Limit("reboot", 1.0),
    "recycle": Limit("recycle", 1.0),
    "deposit": Limit("deposit", 3.0),
    "detach": Limit("detach", 2.0),
    "charges": Limit("charges", 1.0),
    "search volumes": Limit("search volumes", 5.5),
    "rent volume": Limit("rent volume", 5.5),
    "list volumes": Limit("list volumes", 5.5),
    "delete volume": Limit("delete volume", 5.5),
    "new key": Limit("new key", 1.0),
    "new secret": Limit("new secret", 3.0),
    "secrets": Limit("secrets", 5.0),
}


MANNERS = Manners(
    unauthorized=refusal(401, "auth_error", "Invalid user key"),
    forbidden=refusal(403, "auth_error", "This key may not do that"),
    not_found=refusal(404, "not_found", "No such endpoint"),
    bad_request=refusal(400, "invalid_request", "Invalid json body"),
    no_capacity=refusal(
        410, "no_such_ask", "error 410/3907: no_such_ask Instance type is no longer available."
    ),
    too_often=lambda limit: Reply(
        status=429, body=f"API requests too frequent endpoint threshold={limit.interval_s:.1f}"
    ),
    broken=lambda status: Reply(
        status=status, body="<html><h1>Server Error</h1></html>", content_type="text/html"
    ),
)


def _number(least: str, most: str) -> Callable[[Any, str], Iterator[str]]:
    def check(value: Any, where: str) -> Iterator[str]:
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            yield f"{where}: expected a number"
        elif not Decimal(least) <= value <= Decimal(most):
            yield f"{where}: expected {least} to {most}"

    return check


def _anything(value: Any, where: str) -> Iterator[str]:
    yield from ()


def _scalar(value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, str | int | Decimal):
        yield f"{where}: expected a string"
    elif isinstance(value, str):
        yield from text()(value, where)


def _env(value: Any, where: str) -> Iterator[str]:
    """Docker flags in one string, as the document has it, or an object, as every client sends."""
    yield from (text() if isinstance(value, str) else table(_scalar))(value, where)
    if isinstance(value, str):
        try:
            shlex.split(value)
        except ValueError as error:
            yield f"{where}: {error}"


_CREATE = record(
    {},
    {
        "image": nullable(text(1, 1024)),
        "template_hash_id": nullable(text(1, 64)),
        "label": nullable(text(0, 1024)),
        "disk": nullable(_number("1", "100000")),
        "runtype": nullable(text(1, 64)),
        "target_state": nullable(choice("running", "stopped")),
        "env": nullable(_env),
        "cancel_unavail": nullable(boolean),
        "onstart": nullable(text(0, 4048)),
        "args": nullable(items(text())),
    },
    closed=False,
)
_MANAGE = record({}, {"state": choice("running", "stopped"), "label": text(0, 1024)}, closed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """An id under which a host can be rented, until then."""

    host_id: str
    until_s: float


@dataclass(slots=True, kw_only=True)
class Extra:
    """What this API knows of an instance beyond the world's rental."""

    keys: dict[int, str] = field(default_factory=dict)  # SSH keys attached to it alone
    authorized: list[str] = field(default_factory=list)  # what its node accepts
    log: bytes = b""  # what its onstart printed
    outbid_until_s: float = 0.0  # preempted by hand


class Vast:
    """The vendor: `start` serves it, `preempt` outbids somebody by hand."""

    vendor = VENDOR

    def __init__(self, world: World, *, boot_s: float = 15.0) -> None:
        self.world = world
        self.boot_s = boot_s  # simulated: pulling the image; a host's fact `boot_s` goes before it
        self.site = Site(world, "vast", MANNERS)
        self._asks: dict[int, Ask] = {}
        self._extras: dict[str, Extra] = {}
        self._next_contract = _FIRST_CONTRACT
        self.volumes = Volumes(world)
        self.account = Account(world, self._authorize_all, self.volumes)
        self._searches: dict[tuple[str, str], int] = {}
        self._settled_s = 0.0
        self._routes()
        world.on_tick.append(self._tick)

    async def start(self, port: int = 0) -> str:
        """Serve on loopback; the base URL."""
        return await self.site.start(port)

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment needs, once it is served."""
        url = self.site.url
        return {"GPUBROKER_VAST_URL": url, "VAST_URL": url, "VAST_API_KEY": account_key(VENDOR)}

    async def close(self) -> None:
        """Serve no more; the volumes' files are gone."""
        await self.site.close()
        self.volumes.folders.close()

    def other_charges(self, now_s: float) -> dict[str, Decimal]:
        """USD of volumes, by name: they are billed and are no rentals."""
        return self.volumes.charges(now_s)

    async def preempt(self, rental: Rental, notice_s: float | None) -> None:
        """Somebody bids more, without a notice: this vendor gives none."""
        self._extra(rental).outbid_until_s = self.world.clock.now_s() + RECLAIM_S
        await self.world.stop(rental, _OUTBID)

    def _routes(self) -> None:
        instance = "/api/v0/instances/{id}"
        self._add("POST", "/api/v0/bundles", self._search, public=True)
        self._add("PUT", "/api/v0/search/asks", self._search_new, public=True)
        self._add("PUT", "/api/v0/asks/{id}", self._create, "create")
        self._add("GET", "/api/v1/instances", self._list, "list")
        self._add("GET", "/api/v0/instances", self._old_list)
        self._add("DELETE", "/api/v0/instances", self._destroy_many, "destroy")
        self._add("GET", instance, self._show, "show", own="id")
        self._add("PUT", instance, self._manage, "manage", own="id")
        self._add("DELETE", instance, self._destroy, "destroy", own="id")
        self._add("PUT", "/api/v0/instances/bid_price/{id}", self._change_bid, "bid")
        self._add("PUT", "/api/v0/instances/reboot/{id}", self._reboot, "reboot", own="id")
        self._add("PUT", "/api/v0/instances/recycle/{id}", self._reboot, "recycle")
        self._add("GET", "/api/v0/instances/balance/{id}", self._deposit, "deposit")
        self._add("PUT", "/api/v0/instances/request_logs/{id}", self._request_logs)
        self._add("GET", "/logs/{id}", self._read_logs, public=True)
        self._add("GET", f"{instance}/ssh", self._instance_keys)
        self._add("POST", f"{instance}/ssh", self._attach_key)
        self._add("DELETE", f"{instance}/ssh/{{key_id}}", self._detach_key, "detach")
        for method, path, handler, limit in (*self.account.routes(), *self.volumes.routes()):
            self._add(method, path, handler, limit)

    def _add(self, method: str, path: str, handler: Handler, limit: str = "", **more: Any) -> None:
        limits = (_LIMITS[limit],) if limit else ()
        self.site.add(method, path + "{slash:/?}", handler, *limits, **more)

    # The market

    def _occupants(self, host: Host, state: Callable[[Rental], State]) -> tuple[int, list[Rental]]:
        """(slots taken on demand, rentals by bid) that hold a GPU of this host."""
        here = [r for r in self._of(host) if state(r) in ("pending", "running")]
        bids = [r for r in here if r.wish["is_bid"]]
        return len(here) - len(bids), bids

    def _of(self, host: Host) -> list[Rental]:
        return [r for r in self.world.rentals.values() if r.host is host and r.state != "ended"]

    def _min_bid(self, host: Host, on_demand: int, bids: list[Rental], at_s: float) -> Decimal | None:
        """The lowest bid that would run; None = no bid would."""
        series = self.world.series.get(("vast", host.id))
        if series is None or on_demand >= host.capacity or not series.available_at(at_s):
            return None
        floor = series.price_at(at_s)
        if on_demand + len(bids) >= host.capacity:
            floor = max(floor, min(r.usd_per_hour for r in bids) + Decimal("0.001"))
        return floor

    def _min_bid_now(self, host: Host) -> Decimal | None:
        return self._min_bid(host, *self._occupants(host, lambda r: r.state), self.world.clock.now_s())

    def _tick(self, now_s: float) -> None:
        if abs(now_s - self._settled_s) < _SETTLE_S:
            return
        self._settled_s = now_s
        hosts = {id(r.host): r.host for r in self.world.rentals.values() if r.vendor == VENDOR}
        for host in hosts.values():
            self._settle(host)

    def _settle(self, host: Host) -> None:
        """Who holds this host's GPUs: renters on demand first, then the highest bids that the market takes.

        A renter on demand who waits is started before any bid.
        """
        now_s = self.world.clock.now_s()
        here = self._of(host)
        free = host.capacity - self._occupants(host, lambda r: r.state)[0]
        for rental in here:
            if free > 0 and _waits(rental) and not rental.wish["is_bid"] and not self._held(rental, now_s):
                self._run(rental)
                free -= 1
        series = self.world.series.get(("vast", host.id))
        taken = series is None or not series.available_at(now_s)
        price = None if series is None or taken else series.price_at(now_s)
        bids = [r for r in here if r.wish["is_bid"] and (_waits(r) or r.state != "stopped")]
        for rental in sorted(bids, key=lambda r: (-r.usd_per_hour, r.events[0].at_s)):
            takes = price is not None and rental.usd_per_hour >= price
            wins = free > 0 and takes and not self._held(rental, now_s)
            free -= wins
            if wins and rental.state == "stopped":
                self._run(rental)
            elif not wins and rental.state != "stopped":
                self.site.spawn(self.world.stop(rental, _OUTBID))

    def _held(self, rental: Rental, now_s: float) -> bool:
        """Whether it was preempted by hand a short while ago."""
        return now_s < self._extra(rental).outbid_until_s

    def _run(self, rental: Rental) -> None:
        self.world.resume(rental)
        self.site.spawn(self._boot(rental))

    async def _boot(self, rental: Rental) -> None:
        began = len(rental.events)
        if boot_s := float(rental.host.facts.get("boot_s", self.boot_s)):
            await self.world.clock.sleep(boot_s)
        if len(rental.events) > began and rental.events[-1].kind in ("stopped", "ended"):
            return
        self._authorize(rental)
        env = {
            **self.account.secrets,
            **rental.wish["env"],
            "CONTAINER_ID": rental.id,
            "CONTAINER_API_KEY": str(rental.wish["api_key"]),
            "CONTAINER_LABEL": f"C.{rental.id}",
            "PUBLIC_IPADDR": "127.0.0.1",
        }
        await self.world.boot(rental, self._extra(rental).authorized, env)
        await self._started(rental, env)

    async def _started(self, rental: Rental, env: Mapping[str, str]) -> None:
        """The node is up: remember where, and run the start script on it."""
        node, script = rental.node, rental.wish.get("onstart")
        if node is None:
            return
        rental.wish["last_port"] = node.ssh_port
        self.volumes.mount(rental)
        if script:
            self.site.spawn(self._run_onstart(rental, str(script), env))

    async def _run_onstart(self, rental: Rental, script: str, env: Mapping[str, str]) -> None:
        node = rental.node
        if node is not None:
            _, output, errors = await node.run(["/bin/sh", "-c", script], env)
            self._extra(rental).log += output + errors

    def _authorize(self, rental: Rental) -> None:
        """The account's keys and its own; a running node's SSH server reads its file at each login."""
        extra = self._extra(rental)
        before = set(extra.authorized)
        extra.authorized[:] = [*(key for key, _ in self.account.ssh_keys.values()), *extra.keys.values()]
        file = Path(rental.node.home, ".ssh", "authorized_keys") if rental.node is not None else None
        if file is not None and file.is_file():
            others = [line for line in file.read_text().splitlines() if line not in before]
            lines = dict.fromkeys([*others, *extra.authorized])
            file.write_text("".join(f"{line}\n" for line in lines))

    def _extra(self, rental: Rental) -> Extra:
        return self._extras.setdefault(rental.id, Extra())

    # Searching

    def _ask_id(self, host: Host, now_s: float) -> int:
        """The id of the moment; what was listed before stays in `_asks` until nobody can rent it."""
        phase = int(host.facts["machine_id"]) % ASK_LIFE_S
        period = int((now_s + phase) // ASK_LIFE_S)
        digest = hashlib.sha256(f"{self.world.seed}/{host.id}/{period}".encode()).digest()
        ask_id = 10_000_000 + int.from_bytes(digest[:6]) % 1_000_000_000
        grace_s = max(ASK_GRACE_S, _ASK_GRACE_REAL_S * self.world.clock.speed)
        until_s = (period + 1) * ASK_LIFE_S - phase + grace_s
        self._asks[ask_id] = Ask(host_id=host.id, until_s=until_s)
        return ask_id

    async def _search(self, call: Call) -> Reply:
        return self._answer(call, call.body)

    async def _search_new(self, call: Call) -> Reply:
        body = call.body if isinstance(call.body, dict) else {}
        reply = self._answer(call, body.get("q"))
        columns = body.get("select_cols")
        if reply.status != 200 or not isinstance(columns, list) or "*" in columns:
            return reply
        rows = [{str(name): row.get(str(name)) for name in columns} for row in reply.body["offers"]]
        return Reply(body={"success": True, "offers": rows})

    def _answer(self, call: Call, query: Any) -> Reply:
        if not isinstance(query, dict):
            return MANNERS.bad_request
        try:
            kind = _KINDS[query.get("type", "ondemand")]
        except (KeyError, TypeError):
            return refusal(400, "invalid_request", "type must be one of ondemand, bid, reserved")
        faults = complaints(
            record(
                {},
                {
                    "limit": nullable(_number("1", "100000")),
                    "allocated_storage": nullable(_number("0", "100000")),
                    "order": nullable(items(items(text(), 2, 2))),
                },
                closed=False,
            ),
            query,
        )
        if faults:
            return refusal(400, "invalid_request", faults[0])
        filters = {**_DEFAULT_FILTERS, **{k: v for k, v in query.items() if k not in _NOT_FILTERS}}
        order = [(column, direction) for column, direction in query.get("order") or [["score", "desc"]]]
        self._count_search(call)
        storage = Decimal(query.get("allocated_storage") or 8)
        rows = [row for host in self._hosts() if (row := self._offer(call, host, kind, storage))]
        limit = int(query.get("limit") or 64)
        try:
            columns = vast_rows.search_columns(rows[0] if rows else {})
            vast_rows.check_filters(filters if rows else {}, columns)
            if rows and (unknown := next((c for c, _ in order if c not in columns), None)):
                raise BadQuery(f"Error in query parameters: {unknown} is not a valid sort key")
            found = [row for row in rows if vast_rows.matches(row, filters)]
        except BadQuery as error:
            return refusal(400, "invalid_request", str(error))
        ordered = vast_rows.in_order(found, [(c, d) for c, d in order if not rows or c in rows[0]])
        return Reply(body={"success": True, "offers": call.rows(ordered[:limit])})

    def _hosts(self) -> list[Host]:
        return [host for (vendor, _), host in self.world.hosts.items() if vendor == VENDOR]

    def _offer(self, call: Call, host: Host, kind: str, storage: Decimal) -> dict[str, Any] | None:
        """None = not to be rented at all now."""
        on_demand, bids = self._occupants(host, call.state)
        min_bid = self._min_bid(host, on_demand, bids, call.as_of_s)
        if on_demand >= host.capacity or (kind == "bid" and min_bid is None):
            return None
        return vast_rows.offer_row(
            host,
            kind=kind,
            ask_id=self._ask_id(host, call.as_of_s),
            min_bid=min_bid,
            allocated_gb=storage,
            rented=False,
            now_s=call.as_of_s,
        )

    def _count_search(self, call: Call) -> None:
        """Raises Refused when the key's searches of the day are used up: as many as the fault script says."""
        limit = self.world.faults.per_day(VENDOR, call.request.method, call.request.path)
        key, now = call.key, self.world.clock.now()
        used = self._searches.get((key, f"{now:%F}"), 0)
        if limit is not None and used >= limit:
            midnight = datetime(now.year, now.month, now.day, tzinfo=UTC) + timedelta(days=1)
            headers = {"X-RateLimit-Reset": str(int(midnight.timestamp()))}
            raise Refused(Reply(status=429, body={"error": "search_quota_exceeded"}, headers=headers))
        self._searches[key, f"{now:%F}"] = used + 1

    # Renting

    async def _create(self, call: Call) -> Reply:
        ask_id = whole(call.path("id"))
        body = call.body
        if not isinstance(body, dict):
            return MANNERS.bad_request
        ask = self._asks.get(ask_id or 0)
        if ask is None or ask.until_s < self.world.clock.now_s():
            message = f"error 404/3603: no_such_ask Instance type by id {ask_id} is not available."
            return refusal(404, "invalid_args", message, ask_id=ask_id)
        host = self.world.hosts["vast", ask.host_id]
        volume = self._check_create(body, host, ask_id)
        price = None if body.get("price") is None else Decimal(body["price"])
        wanted = body.get("target_state") or "running"
        cancel = body.get("cancel_unavail")
        cancel = cancel if cancel is not None else price is None and wanted == "running"
        fits = wanted == "stopped" or self._fits(host, price)
        if not fits and cancel:
            message = f"error 410/3907: no_such_ask Instance type {ask_id} is no longer available."
            return refusal(410, "no_such_ask", message, ask_id=ask_id)
        rental = self._rent(host, body, price, wanted)
        self.volumes.attach(rental, volume)
        if fits and wanted == "running":
            self._run(rental)
            self._settle(host)
        elif price is not None and wanted == "running":
            rental.reason = _BID_TOO_LOW
            message = f"error 400/3712: bid {price} is below min_bid; the instance is stopped."
            return refusal(400, "invalid_price", message, ask_id=ask_id, new_contract=int(rental.id))
        return Reply(
            body={
                "success": True,
                "new_contract": int(rental.id),
                "instance_api_key": rental.wish["api_key"],
            }
        )

    def _check_create(self, body: dict[str, Any], host: Host, ask_id: int | None) -> Chosen | None:
        """The volume that it asks for. Raises Refused."""
        faults = complaints(_CREATE, body)
        if not body.get("image") and not body.get("template_hash_id"):
            faults.append("image: is required")
        if body.get("disk") is not None and not faults and body["disk"] > host.facts["disk_space"]:
            faults.append(f"disk: the machine has {host.facts['disk_space']} GB")
        volume = None
        try:
            volume = self.volumes.chosen(body.get("volume_info"), host)
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise Refused(
                refusal(400, "invalid_args", f"error 400/3467: Invalid args: {faults[0]}", ask_id=ask_id)
            )
        price_faults = complaints(nullable(_number("0.001", "128")), body.get("price"))
        if price_faults:
            raise Refused(
                refusal(400, "invalid_price", f"error 400/3468: price{price_faults[0]}", ask_id=ask_id)
            )
        return volume

    def _fits(self, host: Host, price: Decimal | None) -> bool:
        """Whether it would run at once."""
        if price is None:
            return self._occupants(host, lambda r: r.state)[0] < host.capacity
        least = self._min_bid_now(host)
        return least is not None and price >= least

    def _rent(self, host: Host, body: dict[str, Any], price: Decimal | None, wanted: str) -> Rental:
        """A contract whose instance is stopped; its disk is there and billed."""
        wish: dict[str, Any] = {
            **{name: body.get(name) for name in ("onstart", "args", "template_hash_id")},
            "image": body.get("image") or "vastai/base-image:@vastai-automatic-tag",
            "runtype": body.get("runtype") or ("args" if body.get("args") else "ssh"),
            "env": _env_of(body.get("env")),
            "is_bid": price is not None,
            "wanted": wanted,
        }
        rental_id, self._next_contract = str(self._next_contract), self._next_contract + 1
        wish["api_key"] = hashlib.sha256(f"{self.world.seed}/{rental_id}/key".encode()).hexdigest()
        self.site.keys[wish["api_key"]] = rental_id
        rental = self.world.create(
            host,
            "on_demand" if price is None else "spot",
            rental_id=rental_id,
            tag=body.get("label") or "",
            usd_per_hour=host.usd_per_hour if price is None else price,
            disk_gb=vast_rows.whole_gb(10 if body.get("disk") is None else body["disk"]),
            wish=wish,
            state="stopped",
            reason=_WAITS,
        )
        self.world.record(rental, "stopped", reason=_WAITS)
        return rental

    # Instances

    def _existing(self, call: Call, error: str = "not_found") -> Rental:
        number = whole(call.path("id"))
        if number is None:
            raise Refused(refusal(400, "invalid_args", "invalid instance_id"))
        rental = call.rental(str(number))
        if rental is None or call.state(rental) == "ended":
            raise Refused(refusal(404, error, "Instance not found"))
        return rental

    def _row(self, call: Call, rental: Rental) -> dict[str, Any]:
        row = vast_rows.instance_row(
            rental,
            call.state(rental),
            min_bid=self._min_bid_now(rental.host),
            tag=rental.tag,
            now_s=self.world.clock.now_s(),
        )
        return {**row, "volume_info": self.volumes.info(rental)}

    async def _show(self, call: Call) -> Reply:
        try:
            rental = self._existing(call)
        except Refused as refused:
            return refused.reply if refused.reply.status == 400 else Reply(body={"instances": None})
        return Reply(body={"instances": self._row(call, rental)})

    async def _old_list(self, call: Call) -> Reply:
        return refusal(410, "deprecated", "Use GET /api/v1/instances/")

    async def _list(self, call: Call) -> Reply:
        rows = [self._row(call, rental) for rental in call.rentals()]
        try:
            page, found, token = page_of(rows, call.query)
        except BadQuery as error:
            return refusal(400, "invalid_request", str(error))
        labels = [row["label"] or "" for row in found]
        columns = decoded(call.query("select_cols", '["*"]'))
        if isinstance(columns, list) and "*" not in columns:
            page = [{str(name): row.get(str(name)) for name in columns} for row in page]
        return Reply(
            body={
                "success": True,
                "instances_found": len(page),
                "total_instances": len(found),
                "label_counts": {label: labels.count(label) for label in dict.fromkeys(labels)},
                "next_token": token,
                "instances": call.rows(page),
            }
        )

    async def _manage(self, call: Call) -> Reply:
        rental, body = self._existing(call), call.body
        faults = complaints(_MANAGE, body)
        if not faults and not {"state", "label"} & set(body):
            faults = ["state or label is required"]
        if faults:
            return refusal(400, "invalid_args", faults[0])
        if "label" in body:
            rental.tag = body["label"]
        if body.get("state") == "stopped":
            rental.wish["wanted"] = "stopped"
            await self.world.stop(rental, _BY_USER)
        elif body.get("state") == "running":
            rental.wish["wanted"] = "running"
        self._settle(rental.host)
        return Reply(body={"success": True})

    async def _destroy(self, call: Call) -> Reply:
        await self._end(self._existing(call))
        return Reply(body={"success": True, "msg": "Instance destroyed successfully"})

    async def _destroy_many(self, call: Call) -> Reply:
        wanted = call.body.get("instance_ids") if isinstance(call.body, dict) else None
        if not isinstance(wanted, list):
            return refusal(400, "invalid_args", "instance_ids: expected an array")
        for rental in [r for r in call.rentals() if int(r.id) in wanted]:
            await self._end(rental)
        return Reply(body={"success": True})

    async def _end(self, rental: Rental) -> None:
        self.site.keys.pop(str(rental.wish["api_key"]), None)
        await self.world.end(rental, "destroyed")
        self._settle(rental.host)

    async def _change_bid(self, call: Call) -> Reply:
        rental = self._existing(call, "no_such_instance")
        body = call.body if isinstance(call.body, dict) else {}
        if complaints(_number("0.001", "32"), body.get("price")):
            return refusal(400, "invalid_args", "Please set a bid price >= 0.001.")
        if not rental.wish["is_bid"]:
            return refusal(400, "invalid_args", "The instance is not interruptible.")
        self.world.reprice(rental, Decimal(body["price"]))
        self._settle(rental.host)
        return Reply(body={"success": True})

    async def _reboot(self, call: Call) -> Reply:
        rental = self._existing(call)
        if rental.state != "running":
            return refusal(400, "invalid_args", "The instance is not running.")
        self._authorize(rental)
        env = {**self.account.secrets, **rental.wish["env"], "CONTAINER_ID": rental.id}
        await self.world.restart(rental, self._extra(rental).authorized, env)
        await self._started(rental, env)
        return Reply(body={"success": True})

    async def _deposit(self, call: Call) -> Reply:
        self._existing(call)
        return Reply(
            body={"success": True, "refundable_deposit": 0, "total_discount": 0, "discount_months": 0}
        )

    async def _request_logs(self, call: Call) -> Reply:
        rental = self._existing(call)
        return Reply(
            body={"success": True, "result_url": f"{self.site.url}/logs/{rental.id}", "msg": "Logs requested"}
        )

    async def _read_logs(self, call: Call) -> Reply:
        extra = self._extras.get(call.path("id"))
        return MANNERS.not_found if extra is None else Reply(body=extra.log.decode("utf-8", "replace"))

    # The keys of an instance

    async def _instance_keys(self, call: Call) -> Reply:
        extra = self._extra(self._existing(call))
        keys = {**{n: key for n, (key, _) in self.account.ssh_keys.items()}, **extra.keys}
        rows = [{"id": number, "name": "", "public_key": key} for number, key in keys.items()]
        return Reply(body={"success": True, "ssh_keys": json.dumps(rows)})

    async def _attach_key(self, call: Call) -> Reply:
        rental, key = self._existing(call), public_key(call.body)
        extra = self._extra(rental)
        if key not in extra.keys.values():
            extra.keys[self.account.new_key_id()] = key
        self._authorize(rental)
        return Reply(body={"success": True, "msg": "SSH key attached successfully"})

    async def _detach_key(self, call: Call) -> Reply:
        rental = self._existing(call, "no_such_instance")
        number = whole(call.path("key_id"))
        if number is None or self._extra(rental).keys.pop(number, None) is None:
            return refusal(404, "no_such_ssh_key", "No such ssh key on the instance.")
        self._authorize(rental)
        return Reply(body={"success": True, "msg": "SSH key removed from instance."})

    def _authorize_all(self) -> None:
        """A key of the account opens all its instances, those that run too."""
        for rental in self.world.rentals.values():
            if rental.vendor == VENDOR and rental.state != "ended":
                self._authorize(rental)


def _waits(rental: Rental) -> bool:
    return rental.state == "stopped" and rental.wish["wanted"] == "running"


def _env_of(env: Any) -> dict[str, str]:
    """Variables from an object or from docker flags; port mappings are not variables."""
    if isinstance(env, dict):
        return {name: str(value) for name, value in env.items() if not name.startswith("-")}
    words = shlex.split(env or "")
    pairs = (word.partition("=") for flag, word in pairwise(words) if flag == "-e")
    return {name: value for name, _, value in pairs if name}
