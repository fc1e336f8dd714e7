"""What every vendor's HTTP API in the test cloud has in common."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from gpubroker.testcloud.web import Call, Limit, Manners, Reply, Site, account_key
from gpubroker.testcloud.world import World
from tests.testcloud_support import HOST, HandClock, NoNodes

KEY = {"Authorization": f"Bearer {account_key('lambda')}"}
MANNERS = Manners(
    unauthorized=Reply(status=401, body={"error": "key"}),
    forbidden=Reply(status=403, body={"error": "not yours"}),
    not_found=Reply(status=404, body={"error": "no such"}),
    bad_request=Reply(status=400, body={"error": "no JSON"}),
    no_capacity=Reply(status=400, body={"error": "no capacity"}),
    too_often=lambda limit: Reply(
        status=429, body=f"threshold={limit.interval_s}", headers={"Retry-After": "9"}
    ),
    broken=lambda status: Reply(status=status, body={"error": "broken"}),
)


class Bench:
    """A site with one route that counts, and a client."""

    def __init__(self, site: Site, http: aiohttp.ClientSession) -> None:
        self.site, self.http, self.done = site, http, 0

    async def ask(self, method: str, path: str, **kwargs: Any) -> tuple[int, Any]:
        kwargs.setdefault("headers", KEY)
        async with self.http.request(method, self.site.url + path, **kwargs) as response:
            text = await response.text()
            return response.status, text


def bench(check: Callable[[Bench], Awaitable[None]], *limits: Limit) -> None:
    """Run a check against a site on loopback."""

    async def go() -> None:
        world = World(HandClock(), NoNodes())
        world.add_host(HOST)
        site = Site(world, "lambda", MANNERS)
        async with aiohttp.ClientSession() as http:
            room = Bench(site, http)

            async def echo(call: Call) -> Reply:
                room.done += 1
                return Reply(body={"body": call.body, "rows": call.rows([1, 2])})

            async def listing(call: Call) -> Reply:
                return Reply(body=[[r.id, call.state(r)] for r in call.rentals()])

            async def fail(call: Call) -> Reply:
                raise KeyError("ours")

            site.add("POST", "/echo", echo, *limits)
            site.add("GET", "/rentals", listing)
            site.add("GET", "/public", listing, public=True)
            site.add("GET", "/own/{id}", listing, own="id")
            site.add("GET", "/fail", fail)
            await site.start()
            try:
                await check(room)
            finally:
                await site.close()

    asyncio.run(go())


def test_numbers_come_in_as_decimals_and_go_out_as_numbers() -> None:
    """0.1 does not become 0.1000000000000000055."""

    async def check(room: Bench) -> None:
        assert (200, '{"body": {"a": 0.1, "b": 3}, "rows": [1, 2]}') == await room.ask(
            "POST", "/echo", data='{"a": 0.1, "b": 3}'
        )

    bench(check)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param(KEY, 200, id="bearer"),
        pytest.param(
            {"Authorization": "Basic " + base64.b64encode(b"test-key-lambda:").decode()}, 200, id="basic"
        ),
        pytest.param({}, 401, id="none"),
        pytest.param({"Authorization": "Bearer other"}, 401, id="wrong"),
        pytest.param({"Authorization": "Basic ***"}, 401, id="broken basic"),
        pytest.param({"Authorization": "Bearer of-node-7"}, 403, id="a node's own key"),
    ],
)
def test_the_key_decides_who_may_ask(headers: dict[str, str], status: int) -> None:
    """Only the account's key opens a route; a node's own key is known, and forbidden."""

    async def check(room: Bench) -> None:
        room.site.keys["of-node-7"] = "7"
        assert status == (await room.ask("GET", "/rentals", headers=headers))[0]

    bench(check)


def test_a_node_may_ask_about_itself_with_its_own_key() -> None:
    """Its key opens the routes of its own id and no others."""

    async def check(room: Bench) -> None:
        room.site.keys["of-node-7"] = "7"
        own = {"Authorization": "Bearer of-node-7"}
        assert 200 == (await room.ask("GET", "/own/7", headers=own))[0]
        assert 403 == (await room.ask("GET", "/own/8", headers=own))[0]

    bench(check)


def test_a_public_route_needs_no_key_but_refuses_a_wrong_one() -> None:
    """As vast's search does."""

    async def check(room: Bench) -> None:
        assert 200 == (await room.ask("GET", "/public", headers={}))[0]
        assert 401 == (await room.ask("GET", "/public", headers={"Authorization": "Bearer x"}))[0]

    bench(check)


@pytest.mark.parametrize("data", ["{", "NaN", b"\xff", "[" * 100_000, '{"a": 1e99999999999999999999}'])
def test_a_body_that_is_no_json_is_refused_in_the_vendors_shape(data: Any) -> None:
    """And nothing is done."""

    async def check(room: Bench) -> None:
        assert (400, '{"error": "no JSON"}') == await room.ask("POST", "/echo", data=data)
        assert 0 == room.done

    bench(check)


def test_a_path_or_method_that_does_not_exist_is_answered_in_the_vendors_shape() -> None:
    """Never with a page of the HTTP library's own."""

    async def check(room: Bench) -> None:
        assert (404, '{"error": "no such"}') == await room.ask("GET", "/nowhere")
        assert (404, '{"error": "no such"}') == await room.ask("DELETE", "/echo")

    bench(check)


def test_a_second_request_within_the_interval_is_refused_until_the_simulated_time_has_passed() -> None:
    """The interval is simulated time; a refused request does not start it again."""

    async def check(room: Bench) -> None:
        clock = room.site.world.clock
        assert isinstance(clock, HandClock)
        assert 200 == (await room.ask("POST", "/echo"))[0]
        clock.pass_s(4.0)
        assert (429, "threshold=4.5") == await room.ask("POST", "/echo")
        clock.pass_s(0.6)
        assert 200 == (await room.ask("POST", "/echo"))[0]
        assert 2 == room.done

    bench(check, Limit("create", 4.5))


@pytest.mark.parametrize(
    ("fault", "status", "done"),
    [
        pytest.param({"kind": "429"}, 429, 0, id="429"),
        pytest.param({"kind": "5xx_before", "status": 502}, 502, 0, id="5xx before"),
        pytest.param({"kind": "5xx_after", "status": 503}, 503, 1, id="5xx after"),
        pytest.param({"kind": "capacity"}, 400, 0, id="capacity"),
        pytest.param({"kind": "delay", "seconds": 60}, 200, 1, id="delay"),
        pytest.param({"kind": "drop_before"}, None, 0, id="drop before"),
        pytest.param({"kind": "drop_after"}, None, 1, id="drop after"),
    ],
)
def test_a_fault_does_what_it_says_once(fault: dict[str, Any], status: int | None, done: int) -> None:
    """The answer and whether the work was done; the next request is served as usual."""

    async def check(room: Bench) -> None:
        room.site.world.faults.add({"endpoint": "lambda POST /echo", **fault})
        try:
            got = (await room.ask("POST", "/echo"))[0]
        except aiohttp.ClientError:
            got = None
        assert (status, done) == (got, room.done)
        assert 200 == (await room.ask("POST", "/echo"))[0]

    bench(check)


def test_a_429_of_a_fault_says_when_to_come_back_only_where_it_was_told_to() -> None:
    """With and without Retry-After, both are in the script."""

    async def check(room: Bench) -> None:
        room.site.world.faults.add(
            [{"endpoint": "*", "kind": "429"}, {"endpoint": "*", "kind": "429", "retry_after_s": 7}]
        )
        seen = []
        for _ in range(2):
            async with room.http.post(room.site.url + "/echo", headers=KEY) as response:
                seen.append(response.headers.get("Retry-After"))
        assert [None, "7"] == seen

    bench(check)


def test_a_truncated_answer_is_whole_http_and_broken_json() -> None:
    """Cut in the middle, with the length of what is left."""

    async def check(room: Bench) -> None:
        whole = (await room.ask("POST", "/echo"))[1]
        room.site.world.faults.add({"endpoint": "*", "kind": "truncate"})
        assert (200, whole[: len(whole) // 2]) == await room.ask("POST", "/echo")

    bench(check)


def test_rows_come_twice_when_the_script_says_so() -> None:
    """Duplicate listing rows."""

    async def check(room: Bench) -> None:
        room.site.world.faults.add({"endpoint": "*", "kind": "duplicate"})
        assert '{"body": null, "rows": [1, 1, 2, 2]}' == (await room.ask("POST", "/echo"))[1]

    bench(check)


def test_a_stale_listing_shows_what_was_then() -> None:
    """A node made since is missing; one stopped since is still running."""

    async def check(room: Bench) -> None:
        world = room.site.world
        clock = world.clock
        assert isinstance(clock, HandClock)
        old = world.create(HOST, "on_demand", rental_id="old", tag="a", usd_per_hour=Decimal(1))
        await world.boot(old)
        clock.pass_s(100)
        await world.stop(old, "")
        world.create(HOST, "on_demand", rental_id="new", tag="b", usd_per_hour=Decimal(1))
        world.faults.add({"endpoint": "* /rentals", "kind": "stale", "seconds": 30})
        assert '[["old", "running"]]' == (await room.ask("GET", "/rentals"))[1]
        assert '[["old", "stopped"], ["new", "pending"]]' == (await room.ask("GET", "/rentals"))[1]

    bench(check)


def test_an_exception_of_ours_is_kept_as_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed, and tests can see that it happened."""

    async def check(room: Bench) -> None:
        assert 500 == (await room.ask("GET", "/fail"))[0]
        assert ["KeyError"] == [type(bug).__name__ for bug in room.site.bugs]
        assert "KeyError: 'ours'" in capsys.readouterr().err

    bench(check)
