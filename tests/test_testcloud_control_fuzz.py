"""Any request at all to the control URL and to Modal's servers of blocks, and that no server is left out.

Twenty examples a route, two hundred in the soak.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from gpubroker.testcloud.aws import Aws
from gpubroker.testcloud.control import Control
from gpubroker.testcloud.lambda_cloud import LambdaCloud
from gpubroker.testcloud.runpod import RunPod
from gpubroker.testcloud.vast import Vast
from gpubroker.testcloud.world import World
from tests.test_testcloud_fuzz import EXAMPLES, JSON, bodies
from tests.testcloud_support import HOST, HandClock, NoNodes

FAULT = {
    "endpoint": "vast PUT /api/v0/asks/*",
    "kind": "5xx_after",
    "count": 2,
    "skip": 1,
    "seconds": 1.5,
    "status": 503,
    "code": "",
    "retry_after_s": 7,
    "per_day": 3,
}
# A body that works for each route of the control URL that takes one.
CONTROL: dict[tuple[str, str], Any] = {
    ("GET", "/nodes"): None,
    ("POST", "/nodes/{id}/preempt"): {"notice_s": 5},
    ("POST", "/nodes/{id}/transfer"): {"bytes_in": 5, "bytes_out": 10**9},
    ("POST", "/nodes/{id}/gpu"): {"utilization": 0},
    ("POST", "/nodes/{id}/published"): {"attempt": "a"},
    ("POST", "/faults"): [FAULT],
    ("DELETE", "/faults"): None,
    ("GET", "/bill"): None,
    ("GET", "/clock"): None,
    ("POST", "/clock"): {"speed": 60},
    ("GET", "/bugs"): None,
}
BLOCKS = [("PUT", "/blocks/{digest}"), ("GET", "/files/{volume}/{block}")]
# Servers whose routes are one for everything, and the tests that ask them by operation.
BY_OPERATION = {"Aws": "test_testcloud_aws_fuzz.py", "VolumeStore": "test_testcloud_s3_fuzz.py"}


class Bench:
    """A control URL over vast and two kinds of node, in an event loop that runs only while a test asks."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.world = World(HandClock(), NoNodes())
        self.do(self._start())

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def _start(self) -> None:
        self.vast = Vast(self.world)
        self.control = Control(self.world, {"vast": self.vast})
        self.url = await self.control.start()
        self.http = aiohttp.ClientSession()

    async def node(self) -> str:
        """One that runs."""
        number = f"n{len(self.world.rentals)}"
        rental = self.world.create(
            HOST, "on_demand", rental_id=number, tag="job", usd_per_hour=Decimal("1.2")
        )
        await self.world.boot(rental)
        return number

    async def ask(self, method: str, path: str, sent: bytes) -> tuple[int, bytes]:
        async with self.http.request(method, URL(self.url + path, encoded=True), data=sent) as answer:
            found = answer.status, await answer.read()
        for _ in range(20):
            await asyncio.sleep(0)
        return found

    def state(self) -> str:
        """Everything that a request could change."""
        rentals = [(r.id, r.state, r.published_by, r.events) for r in self.world.rentals.values()]
        return repr([rentals, self.world.faults._faults, self.world.clock.speed])

    def close(self) -> None:
        async def end() -> None:
            await self.http.close()
            await self.control.close()
            await self.vast.close()

        self.do(end())
        self.loop.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("route", CONTROL, ids=" ".join)
def test_the_control_url_survives_any_request(bench: Bench, route: tuple[str, str]) -> None:
    """No 5xx and no bug; what is refused has changed nothing, and is refused in JSON."""
    method, path = route

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def go(data: st.DataObject) -> None:
        bench.world.faults.clear()
        living = bench.do(bench.node())
        name = data.draw(st.just(living) | st.sampled_from(["n0", "x", "..", "%"]) | st.text(max_size=6))
        body = data.draw(bodies(CONTROL[route]) | JSON)
        sent = data.draw(
            st.just(json.dumps(body).encode()) | st.sampled_from([b"", b"{", b"\xff", b"[" * 9999])
        )
        query = data.draw(st.sampled_from(["", "?by=node", "?by=x", "?%ff"]))
        try:
            where = path.replace("{id}", quote(name, safe="")) + query
            before = bench.state()
            status, text = bench.do(bench.ask(method, where, sent if method != "GET" else b""))
        except (UnicodeError, aiohttp.InvalidURL):
            return  # such a path cannot be sent at all
        assert status < 500, text
        assert [] == [*bench.control.bugs, *bench.vast.site.bugs]
        assert json.loads(text) is not None
        if status >= 400:
            assert before == bench.state()

    go()


class Blocks:
    """Modal's Volumes with one file in one of them, and a client of their server of blocks."""

    def __init__(self) -> None:
        from modal_proto import api_pb2

        from gpubroker.testcloud.modal_volumes import Volumes

        self.loop = asyncio.new_event_loop()
        world = World(HandClock(), NoNodes())
        from gpubroker.testcloud.modal_account import Account

        self.volumes = Volumes(Account(world), world.publishing)
        self.do(self.volumes.start())
        self.volume = self.volumes._make("main", "v")
        (self.volume.folder / "a").write_bytes(b"0123456789")
        self.http = self.do(self._session())
        self.proto = api_pb2

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    async def ask(self, method: str, path: str, sent: bytes) -> tuple[int, bytes]:
        url = URL(self.volumes._url + path, encoded=True)
        async with self.http.request(method, url, data=sent or None) as answer:
            return answer.status, await answer.read()

    def state(self) -> str:
        return repr(sorted(str(path) for path in Path(self.volumes._root).rglob("*")))

    def close(self) -> None:
        self.do(self.http.close())
        self.do(self.volumes.close())
        self.loop.close()


@pytest.fixture(scope="module")
def blocks() -> Iterator[Blocks]:
    pytest.importorskip("modal_proto")
    made = Blocks()
    yield made
    made.close()


PARTS = st.sampled_from(
    ["0", "1", "-1", "x", "²", "9" * 30, "", "a", "..", "%2e%2e", "b" * 300, "%ff", "%00"]
)
CONTENT = st.binary(max_size=20)


@pytest.mark.parametrize("route", BLOCKS, ids=" ".join)
def test_modals_blocks_survive_any_request(blocks: Blocks, route: tuple[str, str]) -> None:
    """A block has the name of its content; a file is cut where the RPC said, and nothing outside is read."""
    method, path = route

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def go(data: st.DataObject) -> None:
        content = data.draw(CONTENT)
        digest = data.draw(st.just(hashlib.sha256(content).hexdigest()) | PARTS)
        volume = data.draw(st.just(blocks.volume.id) | PARTS)
        where = path.replace("{digest}", digest).replace("{volume}", volume)
        where = where.replace("{block}", data.draw(PARTS))
        names = data.draw(st.lists(st.sampled_from(["path", "start", "end"]), unique=True))
        query = "&".join(f"{name}={data.draw(PARTS)}" for name in names)
        before = blocks.state()
        status, text = blocks.do(blocks.ask(method, f"{where}?{query}", content if method == "PUT" else b""))
        assert status < 500, text
        if status >= 400:
            assert before == blocks.state()

    go()


def test_no_server_has_a_route_that_no_fuzz_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All five vendors and the control URL, as `testcloud up` starts them.

    vast, RunPod and Lambda are fuzzed route by route as their sites list them, Modal's RPCs by name
    (test_testcloud_modal_rpc.py).
    """
    pytest.importorskip("modal_proto")
    from gpubroker.testcloud.modal import Modal

    apps: list[tuple[str, web.Application]] = []
    real = web.AppRunner.__init__

    def noted(self: Any, app: web.Application, **options: Any) -> None:
        import inspect

        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        apps.append((type(caller.f_locals["self"]).__name__, app))  # type: ignore[union-attr]
        real(self, app, **options)

    monkeypatch.setattr(web.AppRunner, "__init__", noted)

    async def start_all() -> None:
        world = World(HandClock(), NoNodes())
        vendors: list[Any] = [make(world) for make in (Vast, RunPod, LambdaCloud, Aws, Modal)]
        control = Control(world, {})
        for one in (*vendors, control):
            await one.start()
        for one in (*vendors, control):
            await one.close()

    asyncio.run(start_all())
    owners = sorted(owner for owner, _ in apps)
    assert ["Aws", "Aws", "Control", "Site", "Site", "Site", "VolumeStore", "Volumes"] == owners
    routes = {
        owner: {(r.method, r.resource.canonical) for r in app.router.routes() if r.resource}
        for owner, app in apps
        if owner in ("Control", "Volumes")
    }
    assert {("GET", "/nodes"), *CONTROL} == {r for r in routes["Control"] if r[0] != "HEAD"}
    assert set(BLOCKS) == {r for r in routes["Volumes"] if r[0] != "HEAD"}
    for owner, app in apps:
        if owner in BY_OPERATION:
            assert ["/{path}"] == [r.canonical for r in app.router.resources()]
            assert (Path(__file__).parent / BY_OPERATION[owner]).is_file()
