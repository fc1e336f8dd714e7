"""What the vendors' HTTP APIs have in common: who asks, how often, what a fault script does to the request,
JSON with Decimals, and the answer in that vendor's own shape.

up.py -> one Site a vendor -> Call -> the vendor's handler -> Reply (or Refused) -> faults -> the wire

A vendor's file makes a Site with its Manners, adds its routes, and translates between Call/Reply and World:

    site = Site(world, "lambda", MANNERS)
    site.add("GET", "/api/v1/instances/{id}", show, Limit("all", 1.0))
    url = await site.start()

    async def show(call: Call) -> Reply: ...

Listings ask `call.rentals()` and `call.state(rental)`, never the world itself, and give their rows through
`call.rows(...)`: that is how stale answers and duplicate rows come about. A handler checks
everything before it changes anything. An exception that is not Refused is a bug of the test cloud: printed,
and kept in `site.bugs`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, TypeVar

from aiohttp import web

from gpubroker.testcloud.background import Background
from gpubroker.testcloud.clock import SimClock
from gpubroker.testcloud.faults import Fault
from gpubroker.testcloud.world import Host, Rental, State, Vendor, World

_LARGEST_BODY_BYTES = 1 << 20
_BEFORE = ("429", "5xx_before", "capacity")
T = TypeVar("T")


def account_key(vendor: Vendor) -> str:
    """The one key of a vendor's account in the test cloud."""
    return f"test-key-{vendor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer: `body` goes out as JSON, a str as it is, None as nothing."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = ""  # "" = application/json, or text/plain for a str


class Refused(Exception):
    """The request is not done; the reply says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Limit:
    """At least `interval_s` (simulated) between two requests of one key to all routes of this name.

    A refused request does not count, but each makes the wait `penalty_s` from then where that is longer.
    """

    name: str
    interval_s: float
    penalty_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """How a vendor says what every API must be able to say."""

    unauthorized: Reply  # no key, or a wrong one
    forbidden: Reply  # a key of one node that asks for another
    not_found: Reply  # no such route
    bad_request: Reply  # the body is no JSON
    no_capacity: Reply
    too_often: Callable[[Limit], Reply]
    broken: Callable[[int], Reply]  # a 5xx that a fault asked for


@dataclass(slots=True, kw_only=True)
class Call:
    """One request, as a handler sees it."""

    site: Site
    request: web.Request
    body: Any  # decoded, floats as Decimal; None when there was none
    key: str  # "" = none given, which only public routes allow
    stale_s: float = 0.0  # how old listings are
    twice: bool = False  # listing rows come twice

    @property
    def world(self) -> World:
        """Where it happens."""
        return self.site.world

    @property
    def as_of_s(self) -> float:
        """The moment that listings show."""
        return self.world.clock.now_s() - self.stale_s

    def path(self, name: str) -> str:
        """A part of the path, decoded."""
        return self.request.match_info[name]

    def query(self, name: str, default: str = "") -> str:
        """A query parameter."""
        return self.request.query.get(name, default)

    def rentals(self) -> list[Rental]:
        """This vendor's rentals that exist (as of then), oldest first; ended ones are not among them."""
        mine = [r for r in self.world.rentals.values() if r.vendor == self.site.vendor]
        return [r for r in mine if r.events[0].at_s <= self.as_of_s and self.state(r) != "ended"]

    def rental(self, rental_id: str) -> Rental | None:
        """One of this vendor's, ended or not, by its id; None = never was (as of then)."""
        rental = self.world.rentals.get(rental_id)
        if rental is None or rental.vendor != self.site.vendor or rental.events[0].at_s > self.as_of_s:
            return None
        return rental

    def state(self, rental: Rental) -> State:
        """Its state, as of then."""
        return rental.state_at(self.as_of_s) if self.stale_s else rental.state

    def free(self, host: Host) -> int:
        """How many more rentals fit on a host, as of then."""
        here = [rental for rental in self.rentals() if rental.host is host]
        return host.capacity - sum(self.state(rental) in ("pending", "running") for rental in here)

    def rows(self, rows: list[T]) -> list[T]:
        """The rows of a listing, each twice where the fault script says so."""
        return [row for row in rows for _ in range(1 + self.twice)]


Handler = Callable[[Call], Awaitable[Reply]]


class Site(Background):
    """One vendor's API on a loopback port of its own."""

    def __init__(self, world: World, vendor: Vendor, manners: Manners) -> None:
        super().__init__(vendor)
        self.world = world
        self.vendor = vendor
        self.manners = manners
        self.url = ""
        # key -> the rental it is bound to; "" = the whole account's
        self.keys: dict[str, str] = {account_key(vendor): ""}
        self._free_at_s: dict[tuple[str, str], float] = {}
        self._runner: web.AppRunner | None = None
        # Unknown paths and methods go the same way as known ones: no answer of aiohttp's own gets out.
        self._app = web.Application(middlewares=[self._unrouted], client_max_size=_LARGEST_BODY_BYTES)

    def add(
        self, method: str, path: str, handler: Handler, *limits: Limit, public: bool = False, own: str = ""
    ) -> None:
        """Serve `handler`. `public`: no key needed. `own`: the path parameter that the rental of a node's own
        key must equal; without it such a key is forbidden.
        """

        async def serve(request: web.Request) -> web.StreamResponse:
            return await self._serve(request, handler, limits, public, own)

        self._app.router.add_route(method, path, serve)

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1; the base URL."""
        self._runner = web.AppRunner(self._app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self.url

    async def close(self) -> None:
        """Stop listening and stop what runs in the background."""
        await self.end_tasks()
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _unrouted(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.match_info.http_exception is None:
            return await handler(request)

        async def not_found(call: Call) -> Reply:
            return self.manners.not_found

        return await self._serve(request, not_found, (), False, "")

    async def _serve(
        self, request: web.Request, handler: Handler, limits: tuple[Limit, ...], public: bool, own: str
    ) -> web.StreamResponse:
        fault = self.world.faults.take(self.vendor, request.method, request.path)
        if fault and fault.kind == "delay":
            # Whoever asked may give up meanwhile; what was asked for is done all the same.
            with contextlib.suppress(web.HTTPException):
                await request.read()

        async def answer() -> web.Response:
            try:
                return _respond(await self._answer(request, handler, limits, public, own, fault))
            except Refused as refused:
                return _respond(refused.reply)
            except Exception as error:
                self.bug(error)
                return _respond(self.manners.broken(500))

        return await with_fault(
            request, fault, self.world.clock, answer, lambda fault: _respond(self._fault_reply(fault))
        )

    async def _answer(
        self,
        request: web.Request,
        handler: Handler,
        limits: tuple[Limit, ...],
        public: bool,
        own: str,
        fault: Fault | None,
    ) -> Reply:
        key = _key_of(request)
        if key not in self.keys and (key or not public):
            return self.manners.unauthorized
        bound_to = self.keys.get(key, "")
        if bound_to and (not own or request.match_info.get(own) != bound_to):
            return self.manners.forbidden
        self._wait_your_turn(key, limits)
        call = Call(
            site=self,
            request=request,
            body=await self._body(request),
            key=key,
            stale_s=fault.seconds if fault and fault.kind == "stale" else 0.0,
            twice=fault is not None and fault.kind == "duplicate",
        )
        return await handler(call)

    def _wait_your_turn(self, key: str, limits: tuple[Limit, ...]) -> None:
        now_s = self.world.clock.now_s()
        for limit in limits:
            free_at_s = self._free_at_s.get((limit.name, key), 0.0)
            if now_s < free_at_s:
                self._free_at_s[limit.name, key] = max(free_at_s, now_s + limit.penalty_s)
                raise Refused(self.manners.too_often(limit))
        for limit in limits:
            self._free_at_s[limit.name, key] = now_s + limit.interval_s

    async def _body(self, request: web.Request) -> Any:
        if request.method == "GET":
            return None
        try:
            raw = await request.read()
            if not raw.strip():
                return None
            return json.loads(raw.decode("utf-8"), parse_float=Decimal, parse_constant=_no_constant)
        except (ValueError, ArithmeticError, RecursionError, web.HTTPException) as error:
            raise Refused(self.manners.bad_request) from error

    def _fault_reply(self, fault: Fault) -> Reply:
        if fault.kind == "capacity":
            return self.manners.no_capacity
        if fault.kind != "429":
            return self.manners.broken(fault.status)
        reply = self.manners.too_often(Limit("fault", float(fault.retry_after_s or 1)))
        if fault.retry_after_s is None:
            return replace(reply, headers={k: v for k, v in reply.headers.items() if k != "Retry-After"})
        return replace(reply, headers={**reply.headers, "Retry-After": str(fault.retry_after_s)})


async def with_fault(
    request: web.Request,
    fault: Fault | None,
    clock: SimClock,
    answer: Callable[[], Awaitable[web.StreamResponse]],
    refuse: Callable[[Fault], web.StreamResponse],
) -> web.StreamResponse:
    """The answer, as a fault spoils it; `answer` does the work. Only a whole web.Response can be truncated.

    `refuse`: the vendor's own words for 429, 5xx and a lack of capacity.
    """
    kind = fault.kind if fault else ""
    if fault and kind == "delay":
        await clock.sleep(fault.seconds)
    if kind == "drop_before":
        return _drop(request)
    if fault and kind in _BEFORE:
        return refuse(fault)
    response = await answer()
    if kind == "drop_after":
        return _drop(request)
    if fault and kind == "5xx_after":
        return refuse(fault)
    if kind == "truncate" and isinstance(response, web.Response) and isinstance(response.body, bytes):
        response.body = response.body[: len(response.body) // 2]
    return response


def dumps(value: Any) -> str:
    """JSON with Decimals as numbers."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() and abs(value) < 10**15 else float(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _key_of(request: web.Request) -> str:
    """Bearer KEY, Basic KEY:, or ?api_key=KEY; "" = none."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[0]
        except (binascii.Error, ValueError):
            return "?"
    return value or request.query.get("api_key", "")


def _respond(reply: Reply) -> web.Response:
    if reply.body is None:
        return web.Response(status=reply.status, headers=dict(reply.headers))
    is_text = isinstance(reply.body, str)
    text = reply.body if is_text else dumps(reply.body)
    # Bare, as the vendors have it: vast's own command line refuses a JSON type with a charset.
    kind = reply.content_type or ("text/plain" if is_text else "application/json")
    return web.Response(
        status=reply.status,
        body=text.encode(),
        headers={**reply.headers, "Content-Type": kind},
    )


def _drop(request: web.Request) -> web.Response:
    """The connection is gone before a byte of an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
