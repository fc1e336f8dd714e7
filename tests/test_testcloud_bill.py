"""What the test cloud charges, by each vendor's own rules. Expected figures are worked out by hand."""

from __future__ import annotations

import ast
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpubroker.testcloud import bill
from gpubroker.testcloud.world import Event, Market, Rental, Vendor
from tests.testcloud_support import HOST

D = Decimal


def rental(
    vendor: Vendor, events: list[Event], *, market: Market = "on_demand", disk_gb: int = 0, **wish: Any
) -> Rental:
    """One with these events; its rate is that of the first."""
    facts = {"storage_cost": D("0.15"), "inet_up_cost": D("0.005"), "inet_down_cost": D("0.001")}
    return Rental(
        id="1",
        host=replace(HOST, vendor=vendor, facts=facts),
        market=market,
        tag="t",
        usd_per_hour=events[0].usd_per_hour or D(0),
        disk_gb=disk_gb,
        wish=wish,
        events=events,
    )


def made(at_s: float, usd: str) -> Event:
    return Event(at_s=at_s, kind="created", usd_per_hour=D(usd))


def at(at_s: float, kind: Any, **more: Any) -> Event:
    return Event(at_s=at_s, kind=kind, **more)


def items(one: Rental, now_s: float) -> dict[str, Decimal]:
    return {line.item: line.usd for line in bill.lines(one, now_s)}


def test_vast_bills_the_gpu_while_running_at_the_rate_of_each_moment_and_the_disk_always() -> None:
    """An hour at 0.36, half an hour at 0.72, an hour stopped: the disk is a third dearer then."""
    one = rental(
        "vast",
        [
            made(0, "0.36"),
            at(600, "running"),
            at(4200, "rate", usd_per_hour=D("0.72")),
            at(6000, "stopped", reason="outbid"),
            at(9600, "ended"),
        ],
        disk_gb=48,
    )
    # 48 GB at 0.15 a month are 0.01 an hour.
    disk = D("0.01") * 6000 / 3600 + D("0.01") * 4 / 3
    got = items(one, 20_000)
    assert D("0.72") == got["gpu"]
    assert round(disk, 12) == got["disk"]


def test_vast_bills_bytes_both_ways_in_any_state() -> None:
    """10 GB in at 0.001, 4 GB out at 0.005, while it is stopped."""
    moved = at(20, "transfer", bytes_in=10 * 10**9, bytes_out=4 * 10**9)
    one = rental("vast", [made(0, "1"), at(10, "stopped"), moved, at(30, "ended")])
    assert {"bytes_in": D("0.01"), "bytes_out": D("0.02")} == items(one, 30)


def test_a_failed_vast_bid_bills_its_disk_and_nothing_else() -> None:
    """Created stopped: no GPU second is paid, the disk is."""
    one = rental("vast", [made(0, "0.2"), at(0, "stopped", reason="bid")], disk_gb=48)
    got = items(one, 3600)
    assert {"disk"} == set(got)
    assert round(D("0.01") * 4 / 3, 12) == got["disk"]


def test_runpod_bills_container_disk_while_running_and_the_volume_double_when_stopped() -> None:
    """An hour running, an hour stopped, 72 GB of each."""
    one = rental(
        "runpod",
        [made(0, "0.5"), at(0, "running"), at(3600, "stopped"), at(7200, "ended")],
        disk_gb=72,
        mounts={"persistent": {"size": 72, "path": "/workspace"}},
    )
    assert {"gpu": D("0.5"), "disk": D("0.01"), "volume": D("0.03")} == items(one, 9999)


@pytest.mark.parametrize(
    ("sizes", "until_s", "usd"),
    [
        pytest.param([(0, 720)], 1, D("0.07"), id="an hour begun is an hour"),
        pytest.param([(0, 720), (3600, 0)], 90_000, D("0.07"), id="deleted after an hour"),
        pytest.param([(0, 1720)], 3600, D("0.07") * 1000 / 720 + D("0.05"), id="beyond 1 TB is cheaper"),
        pytest.param([(0, 360), (1800, 720)], 7200, D("0.105"), id="a growing volume"),
    ],
)
def test_a_network_volume_bills_hours(sizes: list[tuple[float, int]], until_s: float, usd: Decimal) -> None:
    """0.07 USD per GB and month up to 1000 GB, 0.05 beyond."""
    assert round(usd, 12) == bill.network_volume(sizes, until_s)


@pytest.mark.parametrize(("seconds", "minutes"), [(1, 1), (60, 1), (61, 2), (3600, 60)], ids=str)
def test_lambda_bills_minutes_begun_from_active_to_terminate(seconds: int, minutes: int) -> None:
    """Booting is free; there is no other minimum."""
    one = rental("lambda", [made(0, "1.2"), at(300, "running"), at(300 + seconds, "ended")])
    assert {"gpu": D("0.02") * minutes} == items(one, 10_000)


def test_aws_bills_a_minute_at_least_and_the_volume_in_every_state() -> None:
    """Ended after 18 s of running; 9 GB of gp3 for 80 s; the address for the 18 s."""
    one = rental("aws", [made(0, "36"), at(62, "running"), at(80, "ended", reason="user")], disk_gb=9)
    volume = round(D("0.001") * 80 / 3600, 12)
    assert {"gpu": D("0.6"), "volume": volume, "public_ip": D("0.000025")} == items(one, 120)


def test_aws_bills_the_minimum_for_each_start() -> None:
    """Two starts of 36 s are two minutes; the address is billed by the second."""
    one = rental(
        "aws",
        [made(0, "36"), at(0, "running"), at(36, "stopped"), at(90, "running"), at(126, "ended")],
    )
    assert {"gpu": D("1.2"), "public_ip": D("0.0001")} == items(one, 130)


@pytest.mark.parametrize(
    ("market", "ran_s", "reason", "usd"),
    [
        pytest.param("spot", 3599, bill.RECLAIMED, D(0), id="taken back in the first hour"),
        pytest.param("spot", 3600, bill.RECLAIMED, D("36.005"), id="taken back after it"),
        pytest.param("spot", 1800, "Client.UserInitiatedShutdown", D("18.0025"), id="ended by its user"),
    ],
)
def test_a_spot_instance_that_aws_takes_back_in_its_first_hour_is_free(
    market: Market, ran_s: int, reason: str, usd: Decimal
) -> None:
    """Only what AWS itself ends, and only in the first hour."""
    one = rental("aws", [made(0, "36"), at(0, "running"), at(ran_s, "ended", reason=reason)], market=market)
    assert usd == bill.total(one, 9999)


def sent(vendor: Vendor, number: str, *transfers: tuple[float, int]) -> Rental:
    """A rental that sent so many bytes at these moments, and received as many."""
    events = [at(at_s, "transfer", bytes_out=size, bytes_in=size) for at_s, size in transfers]
    one = rental(vendor, [made(0, "1"), *events])
    one.id = number
    return one


GB, MONTH_S = 10**9, 31 * 86400  # January 1970


@pytest.mark.parametrize(
    ("rentals", "usd"),
    [
        pytest.param([sent("aws", "a", (0, 100 * GB))], {"a": D(0)}, id="the first 100 GB are free"),
        pytest.param(
            [sent("aws", "a", (0, 60 * GB)), sent("aws", "b", (1, 60 * GB))],
            {"a": D(0), "b": D("1.80")},
            id="account-wide, in order of time",
        ),
        pytest.param(
            [sent("aws", "a", (0, 110 * GB), (MONTH_S, 110 * GB))], {"a": D("1.80")}, id="each month anew"
        ),
        pytest.param(
            [sent("aws", "a", (0, 200_000 * GB))],
            {"a": D("0.09") * 10140 + D("0.085") * 40960 + D("0.07") * 102400 + D("0.05") * 46400},
            id="all tiers",
        ),
        pytest.param([sent("modal", "m", (0, 1025 * 2**30))], {"m": D("0.04")}, id="modal beyond a TiB"),
        pytest.param(
            [sent("lambda", "l", (0, 10**15)), sent("runpod", "r", (0, 10**15))], {}, id="free elsewhere"
        ),
    ],
)
def test_what_leaves_is_billed_by_the_accounts_month(rentals: list[Rental], usd: dict[str, Decimal]) -> None:
    """AWS: 0.09 USD per GB beyond 100 GB, then less; Modal: 0.04 per GiB beyond a TiB. What comes in is free."""
    assert usd == bill.egress(rentals)


def test_modal_bills_gpu_cores_and_memory_times_the_regions_factor() -> None:
    """An hour of an H100 at 3.9492, 2 cores and 4 GiB, in a broad region."""
    one = rental(
        "modal",
        [made(0, "3.9492"), at(10, "running"), at(3610, "ended")],
        region_multiplier="1.15",
        cpu_cores="2",
        memory_mib=4096,
    )
    assert {
        "gpu": D("3.9492") * D("1.15"),
        "cpu": D("0.00003942") * 2 * 3600 * D("1.15"),
        "ram": D("0.00000667") * 4 * 3600 * D("1.15"),
    } == items(one, 9999)


def test_what_goes_on_is_billed_until_now() -> None:
    """Half an hour of running so far."""
    assert {"gpu": D("0.5")} == items(
        rental("modal", [made(0, "1"), at(0, "running")], memory_mib=0, cpu_cores=0), 1800
    )


def test_the_bill_imports_nothing_of_the_planner() -> None:
    """Agreement of two independent computations means something."""
    tree = ast.parse(Path(bill.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"gpubroker.testcloud.world"} == {
        name for name in imported if name and name.startswith("gpubroker")
    }
