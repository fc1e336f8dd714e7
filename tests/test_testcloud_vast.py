"""The test cloud's vast.ai: its market, its instances, and what it says in its own words.

With the vendor's OpenAPI document at hand, every exchange of these tests is checked against it.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import asyncssh
import pytest

from gpubroker.testcloud import bill
from gpubroker.testcloud.vast import ASK_GRACE_S, ASK_LIFE_S, Vast
from gpubroker.testcloud.web import account_key
from gpubroker.testcloud.world import Host, Rental, World
from tests import openapi
from tests.testcloud_support import MACHINES, STEADY, Client, HandClock, NoNodes

D = Decimal
EVER = '{"day": {"gte": 0, "lte": 9999999999}}'


def _checker() -> openapi.Checker | None:
    try:
        return openapi.checker("vast")
    except pytest.skip.Exception:
        return None


CHECKER = _checker()


class Bench:
    """A vast with a client; `wait` moves the clock so far that nobody asks too often."""

    def __init__(self, vast: Vast, client: Client, nodes: NoNodes) -> None:
        self.vast, self.client, self.nodes = vast, client, nodes
        self.world = vast.world

    @property
    def clock(self) -> HandClock:
        assert isinstance(self.world.clock, HandClock)
        return self.world.clock

    async def ask(self, method: str, path: str, body: Any = None, **query: str) -> tuple[int, Any]:
        self.clock.pass_s(13)
        return await self.client.ask(method, path, body, **query)

    async def pass_s(self, seconds: float) -> None:
        """Let time pass, and what follows from it happen."""
        self.clock.pass_s(seconds)
        self.world.tick()
        await self.settled()

    async def settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def offer(self, host: Host = STEADY, kind: str = "bid") -> dict[str, Any]:
        query = {
            "machine_id": {"eq": host.facts["machine_id"]},
            "type": kind,
            "verified": {"in": [True, False]},
            "limit": 5,
        }
        status, answer = await self.ask("POST", "/api/v0/bundles/", query)
        assert 200 == status
        return dict(answer["offers"][0])

    async def create(self, **body: Any) -> tuple[int, Any]:
        ask_id = (await self.offer())["id"]
        return await self.ask("PUT", f"/api/v0/asks/{ask_id}/", {"image": "pytorch", "disk": 20, **body})

    async def rent(self, **body: Any) -> str:
        status, answer = await self.create(**body)
        assert 200 == status, answer
        await self.settled()
        return str(answer["new_contract"])

    async def instance(self, number: str) -> dict[str, Any]:
        status, answer = await self.ask("GET", f"/api/v0/instances/{number}/")
        assert 200 == status
        return dict(answer["instances"])

    def rental(self, number: str) -> Rental:
        return self.world.rentals[number]

    def market(self, price: str | None) -> None:
        """From now on the steady machine's lowest winning bid; None = no bid wins."""
        step = (price is not None, None if price is None else D(price))
        self.world.series["vast", STEADY.id].follow([step], 300, 0)


def run(check: Callable[[Bench], Awaitable[None]], *hosts: Host) -> None:
    """A check against a vast with these hosts on loopback."""

    async def go() -> None:
        nodes = NoNodes()
        world = World(HandClock(), nodes, seed=7)
        for host in hosts or (STEADY,):
            world.add_host(host)
        vast = Vast(world, boot_s=0)
        await vast.start()
        try:
            async with aiohttp.ClientSession() as http:
                room = Bench(vast, Client(vast.site.url, account_key("vast"), http, CHECKER), nodes)
                if not hosts:
                    room.market("0.2")
                await check(room)
        finally:
            await vast.close()
        assert [] == vast.site.bugs

    asyncio.run(go())


def public_key() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()


# Searching


def test_the_default_market_has_forty_machines_of_eight_kinds() -> None:
    """And its search gives them, priced, with the machine's facts."""

    async def check(room: Bench) -> None:
        query = {"limit": 1000, "verified": {"in": [True, False]}, "type": "on-demand"}
        status, answer = await room.ask("POST", "/api/v0/bundles/", query)
        assert 200 == status
        assert len(answer["offers"]) >= 40
        assert len({row["gpu_name"] for row in answer["offers"]}) >= 8
        assert len({row["id"] for row in answer["offers"]}) == len(answer["offers"])

    run(check, *MACHINES)


@pytest.mark.parametrize(
    ("filters", "keeps"),
    [
        pytest.param({"gpu_name": {"eq": "RTX 4090"}}, lambda r: r["gpu_name"] == "RTX 4090", id="eq"),
        pytest.param({"gpu_name": {"neq": "RTX 4090"}}, lambda r: r["gpu_name"] != "RTX 4090", id="neq"),
        pytest.param({"num_gpus": {"gte": 4}}, lambda r: r["num_gpus"] >= 4, id="gte"),
        pytest.param({"num_gpus": {"gt": 1, "lt": 8}}, lambda r: 1 < r["num_gpus"] < 8, id="gt and lt"),
        pytest.param({"num_gpus": {"in": [1, 2]}}, lambda r: r["num_gpus"] in (1, 2), id="in"),
        pytest.param({"num_gpus": {"notin": [1, 2]}}, lambda r: r["num_gpus"] > 2, id="notin"),
        pytest.param({"num_gpus": {"eq": "1"}}, lambda r: r["num_gpus"] == 1, id="a number in a string"),
        pytest.param(
            {"geolocation": {"in": ["US"]}}, lambda r: r["geolocation"].endswith("US"), id="country"
        ),
        pytest.param({"dph_total": {"lte": 0.5}}, lambda r: r["dph_total"] <= D("0.5"), id="lte"),
        pytest.param({"datacenter": {"eq": True}}, lambda r: r["hosting_type"] == 1, id="datacenter"),
        pytest.param({"verified": {"eq": False}}, lambda r: r["verification"] != "verified", id="unverified"),
        pytest.param({"verified": {"eq": True}}, lambda r: r["verification"] == "verified", id="verified"),
    ],
)
def test_a_filter_keeps_what_it_says(filters: dict[str, Any], keeps: Callable[[Any], bool]) -> None:
    """Checked against all rows."""

    async def check(room: Bench) -> None:
        everything = {"verified": {"in": [True, False]}, "limit": 1000}
        rows = (await room.client.ask("POST", "/api/v0/bundles/", everything))[1]["offers"]
        got = (await room.client.ask("POST", "/api/v0/bundles/", {**everything, **filters}))[1]["offers"]
        expected = {row["id"] for row in rows if keeps(row)}
        assert expected
        assert expected == {row["id"] for row in got}

    run(check, *MACHINES)


def test_without_filters_only_the_verified_are_found_and_at_most_64() -> None:
    """The server's defaults."""

    async def check(room: Bench) -> None:
        rows = (await room.ask("POST", "/api/v0/bundles/", {}))[1]["offers"]
        assert {"verified"} == {row["verification"] for row in rows}
        assert 64 == len(rows)

    many = [
        replace(h, id=f"{h.id}{n}", facts={**h.facts, "machine_id": int(f"{h.id}{n}")})
        for h in MACHINES
        for n in range(3)
    ]
    run(check, *many)


def test_offers_come_in_the_order_and_number_asked_for() -> None:
    """Cheapest first, five of them."""

    async def check(room: Bench) -> None:
        query = {"order": [["dph_total", "asc"]], "limit": 5}
        prices = [
            row["dph_total"] for row in (await room.ask("POST", "/api/v0/bundles/", query))[1]["offers"]
        ]
        assert sorted(prices) == prices
        assert 5 == len(prices)

    run(check, *MACHINES)


def test_the_total_has_the_disk_that_was_asked_for_and_the_bid_does_not() -> None:
    """dph_total = dph_base + GB * storage_cost / 720."""

    async def check(room: Bench) -> None:
        query = {"allocated_storage": 720, "verified": {"in": [True, False]}, "type": "on-demand"}
        row = (await room.ask("POST", "/api/v0/bundles/", query))[1]["offers"][0]
        assert row["dph_base"] + row["storage_cost"] == row["dph_total"]
        assert D("0.2") == row["min_bid"]

    run(check)


@pytest.mark.parametrize(
    "query",
    [
        {"no_such_column": {"eq": 1}},
        {"num_gpus": {"about": 1}},
        {"num_gpus": 1},
        {"type": "gift"},
        {"limit": "many"},
        {"limit": 0},
        {"order": "dph_total"},
        {"order": [["no_such_column", "asc"]]},
        {"gpu_name": {"in": "RTX 4090"}},
        [],
        None,
    ],
    ids=str,
)
def test_a_search_that_makes_no_sense_is_refused(query: Any) -> None:
    """400, in the shape of the document."""

    async def check(room: Bench) -> None:
        status, answer = await room.ask("POST", "/api/v0/bundles/", query)
        assert (400, "invalid_request") == (status, answer["error"])

    run(check)


def test_the_newer_search_takes_its_query_inside_and_chooses_columns() -> None:
    """PUT /search/asks/ with q and select_cols."""

    async def check(room: Bench) -> None:
        body = {"select_cols": ["id", "gpu_name"], "q": {"verified": {"in": [True, False]}}}
        status, answer = await room.client.ask("PUT", "/api/v0/search/asks/", body)
        assert (200, {"id", "gpu_name"}) == (status, set(answer["offers"][0]))

    run(check)


def test_the_search_needs_no_key_and_refuses_a_wrong_one() -> None:
    """As public clients use it."""

    async def check(room: Bench) -> None:
        room.client.headers = {}
        assert 200 == (await room.ask("POST", "/api/v0/bundles/", {}))[0]
        room.client.headers = {"Authorization": "Bearer wrong"}
        assert 401 == (await room.ask("POST", "/api/v0/bundles/", {}))[0]

    run(check)


def test_when_the_days_searches_are_used_up_the_answer_says_when_there_are_new_ones() -> None:
    """429 with its own error and the next midnight; the day after it goes on."""

    async def check(room: Bench) -> None:
        room.world.faults.add({"endpoint": "vast * /api/v0/*", "kind": "quota", "per_day": 1})
        assert 200 == (await room.ask("POST", "/api/v0/bundles/", {}))[0]
        status, answer = await room.ask("POST", "/api/v0/bundles/", {})
        assert (429, {"error": "search_quota_exceeded"}) == (status, answer)
        reset_s = int(room.client.answer_headers["X-RateLimit-Reset"])
        assert 0 == reset_s % 86400
        assert 0 < reset_s - room.clock.now_s() <= 86400
        room.clock.pass_s(reset_s - room.clock.now_s())
        assert 200 == (await room.ask("POST", "/api/v0/bundles/", {}))[0]

    run(check)


def test_an_ask_id_is_replaced_and_can_be_rented_only_a_little_longer() -> None:
    """The machine keeps its own number."""

    async def check(room: Bench) -> None:
        first = await room.offer()
        room.clock.pass_s(ASK_LIFE_S)
        second = await room.offer()
        assert first["machine_id"] == second["machine_id"]
        assert first["id"] != second["id"]
        room.clock.pass_s(ASK_GRACE_S)
        status, answer = await room.ask("PUT", f"/api/v0/asks/{first['id']}/", {"image": "x"})
        assert 404 == status
        assert "no_such_ask" in answer["msg"]
        assert {} == room.world.rentals

    run(check)


# Renting


def test_without_a_price_the_machine_is_rented_on_demand_whatever_was_searched_for() -> None:
    """As the real one does, at the list price and not at the bid."""

    async def check(room: Bench) -> None:
        number = await room.rent(label="job-1", price=None)
        one = await room.instance(number)
        assert (False, "running", "job-1") == (one["is_bid"], one["actual_status"], one["label"])
        assert STEADY.usd_per_hour == one["dph_base"]
        assert "on_demand" == room.rental(number).market

    run(check)


def test_a_bid_pays_what_was_bid() -> None:
    """Not the lowest bid that would have won."""

    async def check(room: Bench) -> None:
        number = await room.rent(price=0.35)
        one = await room.instance(number)
        assert (True, D("0.35")) == (one["is_bid"], one["dph_base"])

    run(check)


def test_a_running_instance_says_where_its_ssh_server_is() -> None:
    """The proxy's host and port, and the direct ones, as text; only while it runs."""

    async def check(room: Bench) -> None:
        number = await room.rent()
        port = room.nodes.started[number].ssh_port
        one = await room.instance(number)
        assert ("127.0.0.1", port) == (one["ssh_host"], one["ssh_port"])
        assert "127.0.0.1" == one["public_ipaddr"].strip()
        assert str(port) == one["ports"]["22/tcp"][0]["HostPort"]
        await room.ask("PUT", f"/api/v0/instances/{number}/", {"state": "stopped"})
        assert (await room.instance(number))["ports"] is None

    run(check)


def test_a_rented_machine_is_no_longer_offered() -> None:
    """On demand it is gone for everybody; with a bid on it, a higher bid may have it."""

    async def check(room: Bench) -> None:
        number = await room.rent(price=0.35)
        assert D("0.351") == (await room.offer())["min_bid"]
        await room.ask("DELETE", f"/api/v0/instances/{number}/", {})
        await room.rent()
        query = {"verified": {"in": [True, False]}}
        for kind in ("bid", "on-demand"):
            assert [] == (await room.ask("POST", "/api/v0/bundles/", {**query, "type": kind}))[1]["offers"]

    run(check)


def test_a_bid_that_is_too_low_leaves_a_stopped_instance_whose_disk_is_billed() -> None:
    """The error carries its id; it runs once the bid wins."""

    async def check(room: Bench) -> None:
        status, answer = await room.create(price=0.1)
        number = str(answer["new_contract"])
        assert (400, False) == (status, answer["success"])
        one = await room.instance(number)
        assert {"stopped"} == {one["cur_state"], one["intended_status"], one["next_state"]}
        room.clock.pass_s(3600)
        rows = (await room.ask("GET", "/api/v0/charges/", select_filters=EVER))[1]["results"]
        assert ["disk"] == [line["type"] for line in rows[0]["items"]]
        room.market("0.09")
        await room.pass_s(20)
        assert "running" == (await room.instance(number))["actual_status"]

    run(check)


def test_a_bid_that_is_too_low_leaves_nothing_when_it_says_so() -> None:
    """cancel_unavail: 410 and no instance."""

    async def check(room: Bench) -> None:
        status, answer = await room.create(price=0.1, cancel_unavail=True)
        assert (410, "no_such_ask") == (status, answer["error"])
        assert {} == room.world.rentals

    run(check)


def test_on_demand_is_refused_when_the_machine_is_taken() -> None:
    """410 by default; with cancel_unavail false it waits, stopped, and starts when the other has gone."""

    async def check(room: Bench) -> None:
        ask_id = (await room.offer())["id"]
        body = {"image": "x"}
        first = str((await room.ask("PUT", f"/api/v0/asks/{ask_id}/", body))[1]["new_contract"])
        assert 410 == (await room.ask("PUT", f"/api/v0/asks/{ask_id}/", body))[0]
        body = {"image": "x", "cancel_unavail": False}
        status, answer = await room.ask("PUT", f"/api/v0/asks/{ask_id}/", body)
        second = str(answer["new_contract"])
        assert 200 == status
        one = await room.instance(second)
        assert ("stopped", "running") == (one["cur_state"], one["next_state"])
        await room.ask("DELETE", f"/api/v0/instances/{first}/", {})
        await room.settled()
        assert "running" == (await room.instance(second))["actual_status"]

    run(check)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        pytest.param({"price": 0.0001}, "invalid_price", id="price too low"),
        pytest.param({"price": 129}, "invalid_price", id="price too high"),
        pytest.param({"price": "0.2"}, "invalid_price", id="price as text"),
        pytest.param({"price": True}, "invalid_price", id="price as a boolean"),
        pytest.param({"image": None}, "invalid_args", id="no image"),
        pytest.param({"disk": -1}, "invalid_args", id="no disk"),
        pytest.param({"disk": 99999}, "invalid_args", id="more disk than there is"),
        pytest.param({"label": 7}, "invalid_args", id="label as a number"),
        pytest.param({"env": "-e 'A"}, "invalid_args", id="broken flags"),
        pytest.param({"env": {"A=B": "1"}}, "invalid_args", id="a name with ="),
        pytest.param({"onstart": "x" * 4049}, "invalid_args", id="a long start script"),
        pytest.param({"target_state": "flying"}, "invalid_args", id="unknown state"),
    ],
)
def test_a_create_that_makes_no_sense_is_refused_and_makes_nothing(body: dict[str, Any], error: str) -> None:
    """400 with the document's own word for it."""

    async def check(room: Bench) -> None:
        status, answer = await room.create(**body)
        assert (400, error) == (status, answer["error"])
        assert {} == room.world.rentals

    run(check)


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"A": "1", "B": 'x "y"', "-p 22:22": "1"}, id="object"),
        pytest.param("-e A=1 -p 22:22 -e 'B=x \"y\"'", id="docker flags"),
    ],
)
def test_a_node_gets_its_variables_its_keys_and_a_key_of_its_own(env: Any) -> None:
    """The node's key opens its own instance and nothing else."""

    async def check(room: Bench) -> None:
        key = public_key()
        await room.ask("POST", "/api/v0/ssh/", {"ssh_key": key})
        await room.ask("POST", "/api/v0/secrets/", {"key": "hf_token", "value": "s"})
        number = await room.rent(env=env)
        got = room.nodes.envs[number]
        assert ("1", 'x "y"', "s", number) == tuple(got[k] for k in ("A", "B", "HF_TOKEN", "CONTAINER_ID"))
        assert [key] == list(room.nodes.keys[number])
        room.client.headers = {"Authorization": f"Bearer {got['CONTAINER_API_KEY']}"}
        assert 403 == (await room.ask("DELETE", "/api/v0/instances/1/", {}))[0]
        assert 200 == (await room.ask("DELETE", f"/api/v0/instances/{number}/", {}))[0]
        assert 401 == (await room.ask("GET", f"/api/v0/instances/{number}/"))[0]

    run(check)


# Being outbid


def test_the_outbid_are_stopped_keep_their_disk_and_run_again_when_their_bid_wins() -> None:
    """No notice; the home is the same, the state triple is all that tells; its disk is billed, its GPU not."""

    async def check(room: Bench) -> None:
        number = await room.rent(price=0.25)
        first = room.nodes.started[number]
        room.market("0.3")
        await room.pass_s(20)
        one = await room.instance(number)
        assert {"stopped"} == {one["cur_state"], one["intended_status"], one["next_state"]}
        assert not first.alive
        assert [] == first.signals
        before = {line.item: line.usd for line in bill.lines(room.rental(number), room.clock.now_s())}
        await room.pass_s(3600)
        after = {line.item: line.usd for line in bill.lines(room.rental(number), room.clock.now_s())}
        assert (before["gpu"], True) == (after["gpu"], after["disk"] > before["disk"] > 0)
        room.market("0.2")
        await room.pass_s(20)
        assert "running" == (await room.instance(number))["actual_status"]
        assert first is not room.nodes.started[number]
        assert [] == room.nodes.forgotten

    run(check)


def test_a_higher_bid_brings_the_outbid_back() -> None:
    """And is what is paid from then on."""

    async def check(room: Bench) -> None:
        number = await room.rent(price=0.25)
        room.market("0.3")
        await room.pass_s(20)
        path = f"/api/v0/instances/bid_price/{number}/"
        assert 200 == (await room.ask("PUT", path, {"client_id": "me", "price": 0.31}))[0]
        await room.settled()
        one = await room.instance(number)
        assert ("running", D("0.31")) == (one["actual_status"], one["dph_base"])

    run(check)


def test_who_rents_on_demand_outranks_every_bid() -> None:
    """The bid is stopped though it was higher."""

    async def check(room: Bench) -> None:
        bid = await room.rent(price=30)
        number = await room.rent()
        assert "running" == (await room.instance(number))["actual_status"]
        assert "stopped" == (await room.instance(bid))["cur_state"]

    run(check)


def test_who_was_stopped_by_his_own_wish_stays_stopped() -> None:
    """A winning bid starts only what its user wants to run."""

    async def check(room: Bench) -> None:
        number = await room.rent(price=0.25)
        await room.ask("PUT", f"/api/v0/instances/{number}/", {"state": "stopped"})
        await room.pass_s(600)
        assert "stopped" == (await room.instance(number))["cur_state"]
        await room.ask("PUT", f"/api/v0/instances/{number}/", {"state": "running"})
        await room.settled()
        assert "running" == (await room.instance(number))["actual_status"]

    run(check)


@pytest.mark.parametrize("price", [pytest.param(0.25, id="bid"), pytest.param(None, id="on demand")])
def test_preempted_by_hand_it_stays_away_for_a_while(price: float | None) -> None:
    """Long enough to be seen, and then it runs again."""

    async def check(room: Bench) -> None:
        number = await room.rent(price=price)
        await room.vast.preempt(room.rental(number), None)
        await room.pass_s(300)
        assert "stopped" == room.rental(number).state
        await room.pass_s(400)
        assert "running" == room.rental(number).state

    run(check)


# Instances


def test_what_is_gone_is_null_when_asked_for_and_an_error_when_destroyed_again() -> None:
    """As the real one: 200 with null, 404."""

    async def check(room: Bench) -> None:
        number = await room.rent()
        path = f"/api/v0/instances/{number}/"
        assert 200 == (await room.ask("DELETE", path, {}))[0]
        assert (200, {"instances": None}) == await room.client.ask("GET", path)
        assert 404 == (await room.ask("DELETE", path, {}))[0]
        assert [number] == room.nodes.forgotten

    run(check)


def test_the_list_comes_in_pages_of_25_and_finds_by_label() -> None:
    """With a token for the next page; nothing twice, nothing lost."""

    async def check(room: Bench) -> None:
        for n in range(30):
            body = {"image": "x", "label": f"job-{n}", "target_state": "stopped"}
            ask_id = (await room.offer())["id"]
            await room.ask("PUT", f"/api/v0/asks/{ask_id}/", body)
        page = (await room.ask("GET", "/api/v1/instances/", limit="25"))[1]
        assert (25, 30) == (page["instances_found"], page["total_instances"])
        more = (await room.ask("GET", "/api/v1/instances/", after_token=page["next_token"]))[1]
        assert (5, None) == (more["instances_found"], more["next_token"])
        seen = [row["label"] for row in page["instances"] + more["instances"]]
        assert [f"job-{n}" for n in range(30)] == seen
        query = json.dumps({"label": {"eq": "job-7"}})
        found = (await room.ask("GET", "/api/v1/instances/", select_filters=query))[1]
        assert ["job-7"] == [row["label"] for row in found["instances"]]
        assert {"job-7": 1} == found["label_counts"]
        newest = (
            await room.ask("GET", "/api/v1/instances/", order_by='[{"col":"id","dir":"desc"}]', limit="1")
        )[1]
        assert "job-29" == newest["instances"][0]["label"]

    run(check)


@pytest.mark.parametrize(
    "query",
    [
        {"select_filters": '{"dph_total": {"lt": 1}}'},
        {"select_filters": '{"num_gpus": {"eq": 1}}'},
        {"select_filters": "{"},
        {"order_by": '[{"col":"dph_total"}]'},
        {"after_token": "nonsense"},
        {"after_token": base64.b64encode(b'{"values":{}}').decode()},
        {"limit": "many"},
    ],
    ids=str,
)
def test_a_list_by_a_computed_column_or_a_broken_token_is_refused(query: dict[str, str]) -> None:
    """400, as the document says."""

    async def check(room: Bench) -> None:
        assert 400 == (await room.ask("GET", "/api/v1/instances/", **query))[0]

    run(check)


def test_the_old_list_is_gone() -> None:
    """The first version of the list is no longer served."""

    async def check(room: Bench) -> None:
        assert 410 == (await room.client.ask("GET", "/api/v0/instances/"))[0]

    run(check)


@pytest.mark.parametrize(
    ("method", "path", "body", "seconds"),
    [
        pytest.param("PUT", "/api/v0/asks/1/", {"image": "x"}, "4.5", id="create"),
        pytest.param("GET", "/api/v0/instances/1/", None, "2.0", id="show"),
        pytest.param("GET", "/api/v1/instances/", None, "1.0", id="list"),
        pytest.param("PUT", "/api/v0/instances/1/", {"label": "x"}, "1.0", id="manage"),
        pytest.param("DELETE", "/api/v0/instances/1/", {}, "3.0", id="destroy"),
        pytest.param(
            "PUT", "/api/v0/instances/bid_price/1/", {"client_id": "me", "price": 1}, "5.5", id="bid"
        ),
    ],
)
def test_who_asks_too_often_is_told_so_in_plain_text(method: str, path: str, body: Any, seconds: str) -> None:
    """With the interval of the endpoint; after it, the same request is served."""

    async def check(room: Bench) -> None:
        first = (await room.ask(method, path, body))[0]
        assert (429, f"API requests too frequent endpoint threshold={seconds}") == await room.client.ask(
            method, path, body
        )
        assert "text/plain" in room.client.answer_headers["Content-Type"]
        assert first == (await room.ask(method, path, body))[0]

    run(check)


def test_label_reboot_recycle_deposit_and_logs() -> None:
    """The smaller operations on an instance."""

    async def check(room: Bench) -> None:
        number = await room.rent(onstart="echo hello")
        first = room.nodes.started[number]
        path = f"/api/v0/instances/{number}/"
        assert 200 == (await room.ask("PUT", path, {"label": "new"}))[0]
        assert "new" == (await room.instance(number))["label"]
        assert 400 == (await room.ask("PUT", path, {}))[0]
        for operation in ("reboot", "recycle"):
            assert 200 == (await room.ask("PUT", f"/api/v0/instances/{operation}/{number}/", {}))[0]
        assert first is not room.nodes.started[number]
        assert 200 == (await room.ask("GET", f"/api/v0/instances/balance/{number}/"))[0]
        answer = (await room.ask("PUT", f"/api/v0/instances/request_logs/{number}/", {}))[1]
        assert answer["result_url"].startswith(room.vast.site.url)

    run(check)


def test_ssh_keys_of_the_account_and_of_an_instance() -> None:
    """Made, listed, changed, attached, detached, dropped; a key that is none is refused."""

    async def check(room: Bench) -> None:
        number = await room.rent()
        accepted = room.vast._extras[number].authorized
        mine, other, extra = public_key(), public_key(), public_key()
        key_id = (await room.ask("POST", "/api/v0/ssh/", {"ssh_key": mine}))[1]["key"]["id"]
        assert [mine] == accepted
        assert [mine] == [row["key"] for row in (await room.ask("GET", "/api/v0/ssh/"))[1]]
        assert 200 == (await room.ask("PUT", f"/api/v0/ssh/{key_id}/", {"ssh_key": other}))[0]
        assert 200 == (await room.ask("POST", f"/api/v0/instances/{number}/ssh/", {"ssh_key": extra}))[0]
        assert [other, extra] == accepted
        rows = json.loads((await room.ask("GET", f"/api/v0/instances/{number}/ssh/"))[1]["ssh_keys"])
        assert [other, extra] == [row["public_key"] for row in rows]
        detach = f"/api/v0/instances/{number}/ssh/{rows[1]['id']}/"
        assert [200, 404] == [(await room.ask("DELETE", detach))[0] for _ in range(2)]
        assert [200, 400] == [(await room.ask("DELETE", f"/api/v0/ssh/{key_id}/"))[0] for _ in range(2)]
        for broken in ({"ssh_key": ""}, {"ssh_key": "ssh-rsa nonsense"}, {}, []):
            assert 400 == (await room.ask("POST", "/api/v0/ssh/", broken))[0]

    run(check)


def test_secrets_and_the_account() -> None:
    """Made, listed, changed, dropped; names become capitals."""

    async def check(room: Bench) -> None:
        path = "/api/v0/secrets/"
        assert 200 == (await room.ask("POST", path, {"key": "token", "value": "a"}))[0]
        assert 400 == (await room.ask("POST", path, {"key": "token", "value": "b"}))[0]
        assert 200 == (await room.ask("PUT", path, {"key": "token", "value": "b"}))[0]
        assert {"TOKEN": "b"} == (await room.ask("GET", path))[1]["secrets"]
        assert [200, 400] == [(await room.ask("DELETE", path, {"key": "token"}))[0] for _ in range(2)]
        assert 400 == (await room.ask("PUT", path, {"key": "token", "value": "b"}))[0]
        assert isinstance((await room.ask("GET", "/api/v0/users/current/"))[1]["id"], int)

    run(check)


def test_a_volume_is_local_outlives_its_instances_and_is_billed_until_it_is_deleted(tmp_path: Path) -> None:
    """Searched, rented, listed, used at create, kept while in use."""

    async def check(room: Bench) -> None:
        room.nodes.homes = tmp_path
        query = {"machine_id": {"eq": STEADY.facts["machine_id"]}, "verified": {"in": [True, False]}}
        offers = (await room.ask("POST", "/api/v0/volumes/search/", query))[1]["offers"]
        assert [STEADY.facts["machine_id"]] == [offer["machine_id"] for offer in offers]
        rented = {"id": offers[0]["id"], "size": 72, "name": "data"}
        status, made = await room.ask("PUT", "/api/v0/volumes/", rented)
        assert (200, "data") == (status, made["volume_name"])
        began_s = room.clock.now_s()
        volume = (await room.ask("GET", "/api/v0/volumes/"))[1]["volumes"][0]
        assert (72, []) == (volume["disk_space"], volume["instances"])
        info = {"create_new": False, "volume_id": volume["id"], "mount_path": "/workspace"}
        first = await room.rent(price=0.9, volume_info=info, label="job-a1")
        (tmp_path / first / "workspace/manifest.json").write_text("{}")
        assert ["/workspace"] == [v["mount_path"] for v in (await room.instance(first))["volume_info"]]
        assert 400 == (await room.ask("DELETE", "/api/v0/volumes/", {"id": volume["id"]}))[0]
        await room.ask("DELETE", f"/api/v0/instances/{first}/")
        assert "job-a1" == room.rental(first).published_by
        second = await room.rent(volume_info=info)
        assert "{}" == (tmp_path / second / "workspace/manifest.json").read_text()
        await room.ask("DELETE", f"/api/v0/instances/{second}/")
        assert 200 == (await room.ask("DELETE", "/api/v0/volumes/", {}, id=str(volume["id"])))[0]
        hours = D(str(room.clock.now_s() - began_s)) / 3600
        await room.pass_s(10**6)
        usd = 72 * D(STEADY.facts["storage_cost"]) / 720 * hours
        assert {"data": round(usd, 12)} == room.vast.other_charges(room.clock.now_s())
        path = "/api/v0/charges/"
        charges = (await room.ask("GET", path, select_filters=EVER))[1]["results"]
        assert ["instance", "instance", "volume"] == [row["type"] for row in charges]
        first = (await room.ask("GET", path, select_filters=EVER, limit="2"))[1]
        after = {"limit": "2", "after_token": first["next_token"]}
        last = (await room.ask("GET", path, select_filters=EVER, **after))[1]
        assert (charges, None) == (first["results"] + last["results"], last["next_token"])
        assert 400 == (await room.ask("GET", path, select_filters='{"day": {"gte": 1}}'))[0]

    run(check)


def test_a_volume_may_be_made_with_its_instance() -> None:
    """The SDK's --create-volume; the id is the volume offer's."""

    async def check(room: Bench) -> None:
        offer = (await room.ask("POST", "/api/v0/volumes/search/", {"verified": {"in": [True, False]}}))[1]
        info = {"create_new": True, "volume_id": offer["offers"][0]["id"], "size": 30, "mount_path": "/data"}
        number = await room.rent(volume_info=info)
        volumes = (await room.ask("GET", "/api/v0/volumes/"))[1]["volumes"]
        assert [(30, [{"id": int(number)}])] == [(v["disk_space"], v["instances"]) for v in volumes]

    run(check)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"volume_id": 7}, "no such volume"),
        ({"mount_path": "data"}, "mount_path"),
        ({"create_new": True, "volume_id": 7}, "no such volume offer"),
        ({"create_new": None}, "create_new"),
    ],
)
def test_a_volume_that_is_not_there_or_elsewhere_is_refused(change: dict[str, Any], says: str) -> None:
    """With nothing made."""
    elsewhere = next(host for host in MACHINES if host.id != STEADY.id)

    async def check(room: Bench) -> None:
        volume = room.vast.volumes._make(elsewhere, 10, "far")
        usual = {"create_new": False, "volume_id": volume.id, "mount_path": "/data"}
        for info in (usual, {**usual, **change}):
            status, answer = await room.create(volume_info=info)
            assert (400, "invalid_args") == (status, answer["error"])
        assert says in answer["msg"]
        assert {} == room.world.rentals

    run(check)


def test_a_volume_larger_than_the_disk_or_a_wrong_id_is_refused() -> None:
    """And a deleted one is gone."""

    async def check(room: Bench) -> None:
        offer = (await room.ask("POST", "/api/v0/volumes/search/", {"verified": {"in": [True, False]}}))[1]
        number = offer["offers"][0]["id"]
        statuses = [
            (await room.ask(method, "/api/v0/volumes/", body))[0]
            for method, body in (
                ("PUT", {"id": number, "size": 99_999}),
                ("PUT", {"id": 1}),
                ("PUT", {"id": number, "size": "x"}),
                ("DELETE", {"id": 5}),
                ("DELETE", {"id": "x"}),
            )
        ]
        assert [400, 404, 400, 404, 400] == statuses
        assert {} == room.vast.volumes.volumes

    run(check)


def test_every_exchange_kept_to_the_vendors_document() -> None:
    """Runs last in this file: at least 20 operations were seen, and every violation has a known reason."""
    checker = openapi.checker("vast")
    assert CHECKER is not None
    assert [] == sorted(set(CHECKER.unexplained))
    assert checker.document.vendor == "vast"
    assert len(CHECKER.accepted) >= 20, sorted(CHECKER.accepted)
