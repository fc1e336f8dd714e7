"""The control URL: what tests and people see and do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from gpubroker.testcloud.control import Control
from gpubroker.testcloud.vast import Vast
from gpubroker.testcloud.world import Rental, World
from tests.testcloud_support import HOST, Client, HandClock, NoNodes


class Bench:
    """A control URL over one world with one Lambda host and a vast API."""

    def __init__(self, world: World, vast: Vast, nodes: NoNodes, client: Client) -> None:
        self.world, self.vast, self.nodes, self.client = world, vast, nodes, client

    @property
    def clock(self) -> HandClock:
        assert isinstance(self.world.clock, HandClock)
        return self.world.clock

    async def rent(self, number: str = "n1", tag: str = "job") -> Rental:
        rental = self.world.create(HOST, "on_demand", rental_id=number, tag=tag, usd_per_hour=Decimal("1.20"))
        await self.world.boot(rental)
        return rental


def run(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def go() -> None:
        nodes = NoNodes()
        world = World(HandClock(), nodes)
        world.add_host(HOST)
        vast = Vast(world)
        control = Control(world, {"vast": vast})
        url = await control.start()
        try:
            async with aiohttp.ClientSession() as http:
                await check(Bench(world, vast, nodes, Client(url, "", http)))
        finally:
            await control.close()
            await vast.close()

    asyncio.run(go())


def test_the_nodes_are_listed_with_the_contracts_fields() -> None:
    """The ended ones too."""

    async def check(room: Bench) -> None:
        rental = await room.rent()
        await room.world.end(rental, "user")
        status, rows = await room.client.ask("GET", "/nodes")
        assert 200 == status
        wanted = ("id", "vendor", "tag", "sku", "state", "since", "published_by")
        assert ("n1", "lambda", "job", "gpu_1x_a10", "ended", "2030-03-17T17:46:40.000Z", "") == tuple(
            rows[0][key] for key in wanted
        )

    run(check)


def test_a_node_is_preempted_at_once_without_a_notice() -> None:
    """Its processes are gone when the answer comes."""

    async def check(room: Bench) -> None:
        await room.rent()
        node = room.nodes.started["n1"]
        status, row = await room.client.ask("POST", "/nodes/n1/preempt", {"notice_s": None})
        assert (200, "ended", "preempted") == (status, row["state"], row["reason"])
        assert not node.alive
        assert [] == node.signals
        assert 409 == (await room.client.ask("POST", "/nodes/n1/preempt", {"notice_s": None}))[0]

    run(check)


def test_a_node_with_a_notice_gets_a_signal_first() -> None:
    """SIGTERM, then so many simulated seconds, then the end."""

    async def check(room: Bench) -> None:
        rental = await room.rent()
        began_s = room.clock.now_s()
        assert 200 == (await room.client.ask("POST", "/nodes/n1/preempt", {"notice_s": 30}))[0]
        while rental.state != "ended":
            await asyncio.sleep(0)
        assert [15] == room.nodes.started["n1"].signals
        assert 30 == room.clock.now_s() - began_s

    run(check)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        pytest.param("POST", "/nodes/none/preempt", {"notice_s": None}, 404, id="no such node"),
        pytest.param("POST", "/nodes/n1/preempt", {"notice_s": -1}, 400, id="a negative notice"),
        pytest.param("POST", "/nodes/n1/preempt", {"notice_s": "soon"}, 400, id="a notice in words"),
        pytest.param("POST", "/nodes/n1/preempt", {"notice": 1}, 400, id="an unknown key"),
        pytest.param("POST", "/nodes/n1/preempt", [], 400, id="no object"),
        pytest.param("POST", "/nodes/n1/transfer", {"bytes_in": -1}, 400, id="negative bytes"),
        pytest.param("POST", "/nodes/n1/gpu", {"utilization": 101}, 400, id="more than all of a GPU"),
        pytest.param("POST", "/nodes/n1/gpu", {"utilization": True}, 400, id="a truth for a percentage"),
        pytest.param("POST", "/nodes/n1/gpu", {}, 400, id="no utilization"),
        pytest.param("POST", "/nodes/n2/gpu", {"utilization": 0}, 404, id="the GPU of no node"),
        pytest.param("POST", "/faults", [{"endpoint": "*"}], 400, id="a fault without a kind"),
        pytest.param("POST", "/faults", 7, 400, id="a fault that is a number"),
        pytest.param("POST", "/clock", {"speed": 0}, 400, id="a clock that stands"),
        pytest.param("POST", "/clock", {}, 400, id="no speed"),
        pytest.param("GET", "/nowhere", None, 404, id="no such path"),
        pytest.param("PUT", "/nodes", {}, 405, id="no such method"),
    ],
)
def test_what_makes_no_sense_is_refused_in_json(method: str, path: str, body: Any, status: int) -> None:
    """With a sentence, and the node lives."""

    async def check(room: Bench) -> None:
        rental = await room.rent()
        got, answer = await room.client.ask(method, path, body)
        assert (status, True) == (got, bool(answer["error"]))
        assert "running" == rental.state

    run(check)


def test_the_bill_has_each_vendors_tags_in_dollars() -> None:
    """Two nodes of one tag add up; by node there are lines."""

    async def check(room: Bench) -> None:
        for number in ("n1", "n2"):
            await room.rent(number)
        room.clock.pass_s(1800)
        assert (200, {"vast": {}, "lambda": {"job": "1.200000"}}) == await room.client.ask("GET", "/bill")
        by_node = (await room.client.ask("GET", "/bill", by="node"))[1]
        assert {"vendor": "lambda", "tag": "job", "usd": "0.600000", "lines": {"gpu": "0.600000"}} == by_node[
            "n1"
        ]

    run(check)


def test_faults_come_and_go() -> None:
    """One is added and applies; after DELETE nothing does."""

    async def check(room: Bench) -> None:
        fault = {"endpoint": "vast *", "kind": "5xx_before", "count": -1}
        assert (200, {"added": 1}) == await room.client.ask("POST", "/faults", fault)
        assert room.world.faults.take("vast", "GET", "/") is not None
        await room.client.ask("DELETE", "/faults")
        assert room.world.faults.take("vast", "GET", "/") is None

    run(check)


def test_transfers_and_checkpoints_are_recorded() -> None:
    """As the vendor's meter and the job's store would."""

    async def check(room: Bench) -> None:
        rental = await room.rent()
        await room.client.ask("POST", "/nodes/n1/transfer", {"bytes_out": 10})
        row = (await room.client.ask("POST", "/nodes/n1/published", {"attempt": "a7"}))[1]
        assert 10 == rental.events[-1].bytes_out
        assert "a7" == row["published_by"]

    run(check)


def test_how_much_a_nodes_gpus_are_used_is_set() -> None:
    """In percent; null takes it back; a node that is gone has no GPU."""

    async def check(room: Bench) -> None:
        rental = await room.rent()
        node, said = room.nodes.started["n1"], list[int | None]()
        for percent in (0, 55, None):
            assert 200 == (await room.client.ask("POST", "/nodes/n1/gpu", {"utilization": percent}))[0]
            said.append(node.load)
        assert [0, 55, None] == said
        await room.world.end(rental, "user")
        assert 409 == (await room.client.ask("POST", "/nodes/n1/gpu", {"utilization": 0}))[0]

    run(check)


def test_what_leaves_aws_is_on_the_bill_of_the_node_that_sent_it() -> None:
    """By node and by tag; the account's first 100 GB a month are free."""

    async def check(room: Bench) -> None:
        aws = replace(HOST, vendor="aws")
        for number in ("n1", "n2"):
            room.world.create(aws, "spot", rental_id=number, tag="job", usd_per_hour=Decimal(1))
            body = {"bytes_in": 10**12, "bytes_out": 100 * 10**9}
            assert 200 == (await room.client.ask("POST", f"/nodes/{number}/transfer", body))[0]
            room.clock.pass_s(1)
        rows = (await room.client.ask("GET", "/bill?by=node"))[1]
        assert [{}, {"bytes_out": "9.000000"}] == [rows[number]["lines"] for number in ("n1", "n2")]
        assert {"job": "9.000000"} == (await room.client.ask("GET", "/bill"))[1]["aws"]

    run(check)


def test_the_clock_is_set_and_shown() -> None:
    """Simulated seconds in a real one."""

    async def check(room: Bench) -> None:
        assert 50 == (await room.client.ask("POST", "/clock", {"speed": 50}))[1]["speed"]
        assert 50 == (await room.client.ask("GET", "/clock"))[1]["speed"]

    run(check)


def test_bugs_of_the_test_cloud_are_shown() -> None:
    """None as long as it works."""

    async def check(room: Bench) -> None:
        assert [] == (await room.client.ask("GET", "/bugs"))[1]
        room.vast.site.bugs.append(KeyError("ours"))
        assert ["vast: KeyError: 'ours'"] == (await room.client.ask("GET", "/bugs"))[1]

    run(check)
