"""A vendor of the test cloud and a client of it in one event loop, which runs only while a test asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiohttp

from gpubroker.testcloud.hosts import default_market
from gpubroker.testcloud.web import account_key
from gpubroker.testcloud.world import World
from tests.openapi import Checker, Exchange
from tests.testcloud_support import HandClock, NoNodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came back."""

    status: int
    headers: Any
    text: str

    @property
    def body(self) -> Any:
        """As JSON; None when there is none."""
        return json.loads(self.text) if self.text else None


class Room:
    """`ask` sends one request; a checker, where there is one, sees all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, vendor: Any, checker: Checker | None) -> None:
        self._loop, self.vendor, self.checker = loop, vendor, checker
        self.world: World = vendor.world
        self.clock: HandClock = vendor.world.clock
        self.nodes: NoNodes = vendor.world.nodes
        self.key = account_key(vendor.site.vendor)
        self.prefix = ""
        self.pause_s = 0.0  # the clock moves on by so much before each request
        self._http = self.do(_session())

    def do(self, work: Awaitable[Any]) -> Any:
        """Run something in the loop."""
        return self._loop.run_until_complete(work)

    def settle(self) -> None:
        """Let everything that runs in the background come to its end."""

        async def wait() -> None:
            for _ in range(50):
                await asyncio.sleep(0)

        self.do(wait())

    def ask(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, raw: bytes | None = None
    ) -> Answered:
        """One request; `body` as JSON, or `raw` as it is."""
        self.clock.pass_s(self.pause_s)
        sent = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        key = self.key if key is None else key
        answered: Answered = self.do(self._ask(method, path, sent, key))
        self.settle()
        if self.checker is not None and key == self.key:
            self.checker.see(
                Exchange(
                    method=method,
                    url=self.prefix + path,
                    request_body=sent,
                    status=answered.status,
                    content_type=answered.headers.get("Content-Type", ""),
                    body=answered.text.encode(),
                    headers=answered.headers,
                )
            )
        return answered

    async def _ask(self, method: str, path: str, sent: bytes, key: str) -> Answered:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if sent:
            headers["Content-Type"] = "application/json"
        url = self.vendor.site.url + self.prefix + path
        async with self._http.request(method, url, data=sent or None, headers=headers) as response:
            return Answered(
                status=response.status, headers=response.headers, text=await response.text(encoding="utf-8")
            )

    def close(self) -> None:
        """All of it is gone; a bug that the vendor's file had fails the test here."""
        self.do(self._http.close())
        self.do(self.vendor.close())
        assert [] == self.vendor.site.bugs


_market = cache(default_market)


@contextmanager
def room(make: Callable[[World], Any], checker: Checker | None = None, *, seed: int = 0) -> Iterator[Room]:
    """A vendor with the default market, a clock moved by hand and nodes without processes."""
    world = World(HandClock(), NoNodes(), seed=seed)
    for host in _market(seed):
        world.add_host(host)
    loop = asyncio.new_event_loop()
    try:
        vendor = make(world)
        loop.run_until_complete(vendor.start())
        here = Room(loop, vendor, checker)
        try:
            yield here
        finally:
            here.close()
    finally:
        loop.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()
