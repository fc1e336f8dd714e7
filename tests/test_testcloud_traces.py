"""Prices and preemptions follow a trace, or the seed: `testcloud up --trace FILE` and `--seed N`.

The traces are files of the format spot-trace-csv-1; they lie outside the repository.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from gpubroker.testcloud.client import running
from gpubroker.testcloud.up import follow_traces, read_trace
from gpubroker.testcloud.world import Rental, World
from tests.support import SHARED
from tests.test_testcloud_vast import Bench
from tests.test_testcloud_vast import run as run_vast
from tests.testcloud_aws import SPOT, AwsRoom, aws_room
from tests.testcloud_support import STEADY, HandClock, NoNodes

TRACES = SHARED / "traces"
FILES = sorted(TRACES.glob("*-20*.csv.gz"))

needs_traces = pytest.mark.skipif(not FILES, reason="the traces of ../shared are not here")


def preemptions(up: list[bool]) -> int:
    """How often what was held is lost."""
    return sum(before and not after for before, after in pairwise(up))


def follow(path: Path) -> tuple[list[bool], list[bool], list[Decimal], list[Decimal]]:
    """(held, available, lowest bid offered, price) of each step, of a bid at the price on demand on vast."""
    rows, step_s = read_trace(path)
    seen: tuple[list[bool], list[bool], list[Decimal], list[Decimal]] = ([], [], [], [])

    async def check(room: Bench) -> None:
        follow_traces(room.world, [(rows, step_s)])
        began_s = room.clock.now_s()
        series = room.world.series["vast", STEADY.id]
        rental: Rental | None = None
        for at in range(len(rows)):
            await room.pass_s(began_s + at * step_s + 30 - room.clock.now_s())
            available = rows[at][0]
            if rental is None and available:
                rental = room.rental(await room.rent(price=float(STEADY.usd_per_hour)))
                await room.pass_s(12)
            held = rental is not None and rental.state == "running"
            asked = room.vast._min_bid(STEADY, 0, [], room.clock.now_s())
            for one, value in zip(
                seen, (held, available, asked, available and series.price_at(room.clock.now_s())), strict=True
            ):
                one.append(value)  # type: ignore[arg-type]

    run_vast(check)
    return seen


@needs_traces
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".csv.gz"))
def test_a_bid_on_vast_is_held_when_the_trace_says_so_and_lost_when_it_says_so(path: Path) -> None:
    """Step by step to its end: outbid where spot is unavailable, running again where it is, at its price.

    Its ups and downs are taken around the host's own usual price, never above on demand.
    """
    manifest = {row["name"]: row for row in _manifest()}
    name = path.name.removesuffix(".csv.gz")
    held, available, asked, prices = follow(path)
    assert available == held
    assert [price or None for price in prices] == asked
    assert manifest[name]["preemptions"] == preemptions(held)
    rows, _ = read_trace(path)
    listed = [price for _, price in rows if price is not None]
    if listed:
        usual, mean = STEADY.spot_usd_per_hour, sum(listed, Decimal(0)) / len(listed)
        expected = [
            min(STEADY.usd_per_hour, (price * usual / mean).quantize(Decimal("0.001")))
            for (up, price), seen in zip(rows, prices, strict=False)
            if up and price is not None and usual is not None
        ]
        assert expected == [price for price in prices if price]


def _manifest() -> list[dict[str, Any]]:
    found = json.loads((TRACES / "manifest.json").read_text())
    return list(found if isinstance(found, list) else found["traces"])


@pytest.fixture
def aws() -> Iterator[AwsRoom]:
    with aws_room(steady=False) as made:
        yield made


@needs_traces
def test_spot_on_aws_is_reclaimed_when_the_trace_says_so(aws: AwsRoom) -> None:
    """With AWS's own reason, within the two minutes of its notice; the price history is the trace's."""
    path = TRACES / "aws-v100x1-2023-us-west-2b.csv.gz"
    rows, step_s = read_trace(path)
    follow_traces(aws.world, [(rows, step_s)])
    began_s = aws.clock.now_s()
    first = next(at for at, (up, _) in enumerate(rows) if up)
    lost = next(at for at, (up, _) in enumerate(rows) if at > first and not up)
    aws.pass_s(first * step_s + 5)
    made = aws.run(**SPOT)["InstanceId"]
    rental = aws.world.rentals[made]
    host = rental.host
    aws.pass_s(30)
    for at in range(first, lost):
        aws.pass_s(began_s + at * step_s + 60 - aws.clock.now_s())
        assert "running" == rental.state
        now = aws.clock.now()
        shown = aws.ec2(
            "describe_spot_price_history",
            InstanceTypes=[host.sku],
            AvailabilityZone=host.zone,
            ProductDescriptions=["Linux/UNIX"],
            StartTime=now,
            EndTime=now,
        )["SpotPriceHistory"]
        price = aws.world.series["aws", host.id].price_at(aws.clock.now_s())
        assert [price] == [Decimal(row["SpotPrice"]) for row in shown]
    aws.pass_s(began_s + lost * step_s + 1 - aws.clock.now_s())
    aws.pass_s(125)
    assert ("ended", "Server.SpotInstanceTermination") == (rental.state, rental.reason)


def test_the_command_takes_traces(tmp_path: Path) -> None:
    """A real process: up for 40 minutes, down for 20, over and over; each stop comes when it goes down."""
    step_s, up, down, speed = 300, 8, 4, 2400
    rows = [f"{at * step_s},{int(at < up)},0.5" for at in range(up + down)]
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["seconds,available,price_usd_per_hour", *rows]).encode()))
    with running(speed=1, traces=(path,)) as cloud:
        ready_s = _now_s(cloud.ask("GET", "/clock"))
        key = {"Authorization": f"Bearer {cloud.env['VAST_API_KEY']}"}
        url = f"{cloud.env['GPUBROKER_VAST_URL']}/api/v0"
        found = requests.post(f"{url}/bundles/", json={"type": "bid", "limit": 1}, headers=key, timeout=30)
        bid = {"image": "x", "price": 30, "label": "job"}
        number = found.json()["offers"][0]["id"]
        made = requests.put(f"{url}/asks/{number}/", json=bid, headers=key, timeout=30)
        assert 200 == made.status_code, made.text
        cloud.set_speed(speed)
        stops: set[float] = set()
        end_s = time.monotonic() + 60
        while len(stops) < 3 and time.monotonic() < end_s:
            for node in cloud.nodes(vendor="vast", state="stopped"):
                stops.add(datetime.fromisoformat(node["since"]).timestamp() - ready_s)
    assert len(stops) >= 3
    for at_s in stops:
        # The trace began a moment before the cloud said that it was ready.
        assert 0 <= (at_s + 60) % ((up + down) * step_s) - up * step_s < down * step_s


def _now_s(clock: dict[str, Any]) -> float:
    return datetime.fromisoformat(clock["now"]).timestamp()


def test_the_same_seed_gives_the_same_prices_and_the_same_losses() -> None:
    """At every moment of a week; another seed gives others."""

    def path_of(seed: int) -> list[tuple[Decimal, bool]]:
        world = World(HandClock(), NoNodes(), seed=seed)
        world.add_host(STEADY)
        series = world.series["vast", STEADY.id]
        return [(series.price_at(at_s), series.available_at(at_s)) for at_s in range(0, 604_800, 300)]

    assert path_of(3) == path_of(3)
    assert path_of(3) != path_of(4)
    assert {True, False} == {up for _, up in path_of(3)}
