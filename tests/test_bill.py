"""The bill: every line by its own rule, and the lines always add up."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.model import Offer, Priced
from gpubroker.money import round_usd
from gpubroker.plan.bill import bill_for, billed_seconds
from gpubroker.plan.course import Course, Risk, course_of, interruptions
from gpubroker.plan.fees import FeeTable
from gpubroker.plan.preempt import Interruptions, expect
from gpubroker.plan.rank import Pricing, quote_of
from gpubroker.plan.work import Checkpoints, Work


def fee(provider, item, value, unit="USD/GB", **more):
    return {
        "provider": provider, "item": item, "value": value, "unit": unit, "tier_from": "", "tier_to": "",
        "tier_unit": "", "region": "", "as_of": "2026-11-01", "source": "a test", "status": "official", "note": "",
    } | more  # fmt: skip


def startup(provider, billed_startup_s):
    return {
        "provider": provider, "market": "", "billed_startup_s": billed_startup_s, "source": "a test",
        "as_of": "2026-11-01", "status": "assumed",
    }  # fmt: skip


FEES = FeeTable(
    [
        fee("cloud", "egress_usd_per_gb", "0.05"),
        fee("cloud", "storage_running_usd_per_gb_month", "0.10", "USD/GB-month"),
    ],
    [startup("cloud", "180")],
)


def offer(**values):
    return Offer(
        **{
            "provider": "cloud",
            "sku": "h100",
            "gpu": "H100",
            "form_factor": "SXM",
            "gpu_count": 1,
            "vram_gib": 80,
            "market": "on_demand",
            "preemptible": False,
            "usd_per_hour": Decimal("2.000000"),
            **values,
        }
    )


PRICING = Pricing(fees=FEES)


def bill_of(made, work, fees=FEES, hazard=0.0):
    """The bill of an offer whose nodes are lost `hazard` times an hour."""
    start_s = Decimal(fees.startup(made.provider, made.market).billed_s)
    course = course_of(work.hours, interruptions(made.market, work.checkpoints, start_s, hazard))
    return bill_for(made, work, fees, course, price_source="live", risk_source="a risk")


def items(bill):
    return {line.item: line.usd for line in bill.lines}


def test_a_whole_bill_is_as_worked_out_by_hand():
    """8 h at $2, 180 s of start-up, 73 GB of disk at $0.10 a month, 20 GB out at $0.05."""
    bill = bill_of(offer(), Work(hours=Decimal(8), disk_gb=Decimal(73), egress_gb=Decimal(20)), FEES)
    source = "official, 2026-11-01: a test"
    assert [
        ("compute", Decimal("16.000000"), "8 h x $2.000000/h", "live"),
        ("start-up", Decimal("0.100000"), "180 s x $2.000000/h", "assumed: a test"),
        ("disk", Decimal("0.080500"), "73 GB x $0.100000/GB-month x 8.05 h / 730 h", source),
        ("egress", Decimal("1.000000"), "20 GB x $0.05/GB", source),
    ] == [(line.item, line.usd, line.how, line.source) for line in bill.lines]
    assert (Decimal("17.180500"), Decimal(28980)) == (bill.total_usd, bill.billed_s)
    assert Course(useful_h=Decimal(8), start_h=Decimal("0.05")) == bill.course


@pytest.mark.parametrize(
    ("run_s", "increment_s", "minimum_s", "expected"),
    [
        pytest.param("90", 1, 0, 90, id="by the second"),
        pytest.param("90.4", 1, 0, 91, id="a started second is a second"),
        pytest.param("90", 60, 0, 120, id="by the minute"),
        pytest.param("120", 60, 0, 120, id="whole minutes stay"),
        pytest.param("30", 1, 60, 60, id="AWS's minute"),
        pytest.param("3600", 3600, 0, 3600, id="exactly an hour"),
        pytest.param("3601", 3600, 0, 7200, id="an hour and a second"),
        pytest.param("28800", 1, 94_608_000, 94_608_000, id="three years reserved are three years"),
    ],
)
def test_billing_units_and_minimums(run_s, increment_s, minimum_s, expected):
    """What is billed is never less than what ran."""
    assert expected == billed_seconds(Decimal(run_s), increment_s, minimum_s)


def test_a_billing_unit_has_a_line_of_its_own():
    """So that a person sees why the total is more than hours times rate."""
    bill = bill_of(offer(billing_increment_s=3600), Work(hours=Decimal(1), disk_gb=Decimal(0)), FEES)
    assert {"compute": Decimal(2), "start-up": Decimal("0.1"), "billing unit": Decimal("1.9")} == items(bill)


def test_a_reserved_term_is_paid_whole():
    """Eight hours on a three-year reservation cost three years."""
    bill = bill_of(
        offer(market="reserved", minimum_s=3 * 365 * 86400),
        Work(hours=Decimal(8), disk_gb=Decimal(0)),
        FEES,
    )
    assert Decimal(2) * 3 * 365 * 24 == bill.total_usd


def test_cpu_and_ram_are_lines_where_they_are_billed_apart():
    """Modal: two cores and 16 GiB a GPU are assumed, for the whole time that is billed."""
    modal = offer(
        provider="other",
        gpu_count=2,
        cpu_usd_per_core_hour=Decimal("0.141912"),
        ram_usd_per_gib_hour=Decimal("0.024012"),
    )
    bill = bill_of(modal, Work(hours=Decimal(10), disk_gb=Decimal(0)), FEES)
    assert Decimal("5.676480") == items(bill)["cpu"]
    assert Decimal("7.683840") == items(bill)["ram"]


def test_a_disk_that_modal_has_no_fee_for_raises_its_ram():
    """20 GiB of disk beyond the included 512 need 1 GiB of RAM: 1 TB is 931.3 GiB, so 47 GiB."""
    fees = FeeTable(
        [
            fee("modal", "ephemeral_disk_included_gib", "512", "GiB"),
            fee("modal", "ephemeral_disk_gib_per_ram_gib", "20", "GiB"),
            fee("modal", "storage_running_usd_per_gb_month", "0", "USD/GB-month"),
        ]
    )
    modal = offer(provider="modal", ram_usd_per_gib_hour=Decimal("0.01"))
    small, large = (bill_of(modal, Work(hours=Decimal(1), disk_gb=Decimal(gb)), fees) for gb in (500, 1000))
    assert (Decimal("0.16"), Decimal("0.47")) == (items(small)["ram"], items(large)["ram"])


def test_the_hosts_own_fees_win_over_the_table():
    """vast hosts set storage and transfer themselves, in both directions."""
    host = offer(
        storage_usd_per_gb_month=Decimal("0.2"),
        egress_usd_per_gb=Decimal("0.01"),
        ingress_usd_per_gb=Decimal("0.004"),
        disk_included_gb=8,
    )
    bill = bill_of(
        host,
        Work(hours=Decimal(10), disk_gb=Decimal(8), egress_gb=Decimal(100), ingress_gb=Decimal(50)),
        FEES,
    )
    assert Decimal(1) == items(bill)["egress"]
    assert Decimal("0.2") == items(bill)["ingress"]
    assert "disk" not in items(bill)


money = st.decimals(min_value="0.000001", max_value=500, places=6)


@given(
    usd=money,
    hours=st.decimals(min_value="0.001", max_value=5000, places=3),
    disk=st.decimals(min_value=0, max_value=20000, places=1),
    egress=st.decimals(min_value=0, max_value=20000, places=2),
    increment=st.sampled_from([1, 60, 300, 3600]),
    minimum=st.sampled_from([0, 60, 86400]),
    cpu=st.none() | money,
)
def test_lines_add_up_and_nothing_is_negative(usd, hours, disk, egress, increment, minimum, cpu):
    """To the micro-dollar, whatever the offer."""
    made = offer(
        usd_per_hour=usd, billing_increment_s=increment, minimum_s=minimum, cpu_usd_per_core_hour=cpu
    )
    work = Work(hours=hours, disk_gb=disk, egress_gb=egress)
    bill = bill_of(made, work, FEES)
    assert sum(line.usd for line in bill.lines) == bill.total_usd
    assert all(line.usd >= 0 and line.usd == line.usd.quantize(Decimal("0.000001")) for line in bill.lines)
    assert bill.total_usd >= usd * hours - Decimal("0.000001")


@given(a=money, b=money, hours=st.decimals(min_value="0.1", max_value=1000, places=1))
def test_a_dearer_rate_never_makes_a_smaller_bill(a, b, hours):
    """All else equal."""
    low, high = sorted((a, b))
    work = Work(hours=hours)
    cheap, dear = (bill_of(offer(usd_per_hour=p), work, FEES) for p in (low, high))
    assert cheap.total_usd <= dear.total_usd


_NODE = ("compute", "start-up", "checkpoints", "rework", "restarts", "billing unit")
SPOT = {"market": "spot", "preemptible": True}
STORES = FeeTable(
    [
        fee("cloud", "egress_usd_per_gb", "0.05"),
        fee("cloud", "ingress_usd_per_gb", "0.01"),
        fee("cloud", "network_volume_usd_per_gb_month", "0.073", "USD/GB-month"),
        fee("cloudflare-r2", "egress_usd_per_gb", "0.02"),
        fee("cloudflare-r2", "storage_usd_per_gb_month", "0.073", "USD/GB-month", tier_from="10"),
    ],
    [startup("cloud", "180")],
)


def test_preemptions_cost_checkpoints_lost_work_and_restarts():
    """Each by its own line, as the closed form says, and without them there is none of the three."""
    work = Work(hours=Decimal(10), disk_gb=Decimal(0), checkpoints=Checkpoints(save_s=Decimal(36)))
    bill = bill_of(offer(**SPOT), work, hazard=0.2)
    course = bill.course
    expected = expect(10.0, Interruptions(hazard_per_hour=0.2, restart_h=0.05, checkpoint_h=0.01, wait_h=1.6))
    assert round(Decimal(expected.preemptions), 9) == course.preemptions
    assert {
        "compute": Decimal(20),
        "start-up": Decimal("0.1"),
        "checkpoints": round_usd(2 * course.pauses_h),
        "rework": round_usd(2 * course.rework_h),
        "restarts": round_usd(2 * course.restarts_h),
    } == {item: usd for item, usd in items(bill).items() if item != "billing unit"}
    assert Decimal("0.01") * course.checkpoints == course.pauses_h
    assert {"compute", "start-up"} == set(items(bill_of(offer(), work)))


def test_a_hazard_that_no_job_survives_has_no_bill():
    """Nodes that live a second, restarts of three minutes: said, not overflowed."""
    found = quote_of(
        Priced(offer=offer(**SPOT), source="x", as_of=None, live=True),
        Work(hours=Decimal(100)),
        Pricing(fees=FEES, risk_of=lambda of, hours: Risk(per_hour=3600.0, source="x")),
    )
    assert "would never finish: lost 3.6e+03 times an hour" == found


def test_checkpoints_that_leave_are_paid_at_both_ends():
    """Out of the node as they are written, out of the store and into the node at each resume."""
    saves = Checkpoints(gb=Decimal(10), every_s=Decimal(3600), store="cloudflare-r2")
    work = Work(hours=Decimal(10), disk_gb=Decimal(0), egress_gb=Decimal(5), checkpoints=saves)
    bill = bill_of(offer(**SPOT), work, STORES, hazard=0.1)
    lost = bill.course.preemptions
    assert Decimal(9) == bill.course.checkpoints
    assert {
        "checkpoint egress": Decimal("4.5"),
        "checkpoint ingress": round_usd(10 * lost * Decimal("0.01")),
        "checkpoints leaving their store": round_usd(10 * lost * Decimal("0.02")),
        "egress": Decimal("0.25"),
        "kept checkpoints": round_usd(10 * Decimal("0.0001") * bill.course.wall_h),
    } == {item: usd for item, usd in items(bill).items() if item not in _NODE}


def test_checkpoints_that_stay_with_the_provider_move_for_nothing():
    """Only keeping them costs, by the rate of the provider's volume."""
    saves = Checkpoints(gb=Decimal(10), every_s=Decimal(3600), store="cloud")
    work = Work(hours=Decimal(10), disk_gb=Decimal(0), checkpoints=saves)
    bill = bill_of(offer(), work, STORES, hazard=0.1)
    assert round_usd(20 * Decimal("0.0001") * bill.course.wall_h) == items(bill)["kept checkpoints"]
    assert not [item for item in items(bill) if "gress" in item]


def test_a_monthly_tier_is_used_by_checkpoints_before_artifacts():
    """100 GB are free: the checkpoints take 90, of the 20 GB of artifacts 10 are paid."""
    fees = FeeTable(
        [
            fee("cloud", "egress_usd_per_gb", "0", tier_from="0", tier_to="100"),
            fee("cloud", "egress_usd_per_gb", "1", tier_from="100"),
        ]
    )
    saves = Checkpoints(gb=Decimal(10), every_s=Decimal(3600), store="elsewhere")
    work = Work(hours=Decimal(10), disk_gb=Decimal(0), egress_gb=Decimal(20), checkpoints=saves)
    found = items(bill_of(offer(), work, fees, hazard=0.0001))
    assert (Decimal(0), Decimal(10)) == (found["checkpoint egress"], found["egress"])


def test_a_public_address_is_a_line_where_it_is_charged_for():
    """AWS: half a cent an hour, recalled."""
    fees = FeeTable([fee("aws", "public_ipv4_usd_per_hour", "0.005", "USD/h", status="recalled")])
    bill = bill_of(offer(provider="aws"), Work(hours=Decimal(10), disk_gb=Decimal(0)), fees)
    line = next(line for line in bill.lines if line.item == "public address")
    assert (Decimal("0.05"), "$0.005/h x 10 h") == (line.usd, line.how)
    assert line.source.startswith("recalled")


def test_data_is_read_again_at_each_start():
    """Where the node starts from nothing; a stopped vast node keeps its disk."""
    work = Work(hours=Decimal(10), disk_gb=Decimal(0), ingress_gb=Decimal(100), data_store="cloudflare-r2")
    fresh = bill_of(offer(**SPOT), work, STORES, hazard=0.1)
    starts = 1 + fresh.course.preemptions
    assert round_usd(100 * starts * Decimal("0.01")) == items(fresh)["ingress"]
    assert round_usd(100 * starts * Decimal("0.02")) == items(fresh)["data leaving its store"]
    kept = bill_of(
        offer(provider="vast", ingress_usd_per_gb=Decimal("0.01"), **SPOT), work, STORES, hazard=0.1
    )
    assert Decimal(1) == items(kept)["ingress"]


def test_an_outbid_node_waits_with_its_disk():
    """Vast: a stopped instance's disk is billed; no fee is known, so the running rate stands in."""
    host = offer(provider="vast", storage_usd_per_gb_month=Decimal("0.72"), **SPOT)
    bill = bill_of(host, Work(hours=Decimal(10), disk_gb=Decimal(100)), hazard=0.1)
    line = next(line for line in bill.lines if line.item == "disk while waiting")
    assert round_usd(Decimal("0.1") * bill.course.wait_h) == line.usd
    assert "may cost more" in line.source


def test_a_network_volume_is_held_to_the_end():
    """For the wall time, waits included; where none is sold, the offer is left out with that reason."""
    work = Work(hours=Decimal(10), disk_gb=Decimal(0), volume_gb=Decimal(100))
    bill = bill_of(offer(**SPOT), work, STORES, hazard=0.1)
    assert round_usd(Decimal("0.01") * bill.course.wall_h) == items(bill)["network volume"]
    priced = Priced(offer=offer(provider="other"), source="x", as_of=None, live=True)
    assert "no network volumes there" == quote_of(priced, work, Pricing(fees=STORES))


@given(
    hazard=st.floats(0, 2),
    more=st.floats(0, 2),
    hours=st.integers(1, 100),
    size=st.integers(0, 100),
    increment=st.sampled_from([1, 60, 3600]),
)
def test_a_bill_rises_with_the_hazard_and_adds_up(hazard, more, hours, size, increment):
    """All else equal; a micro-dollar a line may be lost to rounding."""
    saves = Checkpoints(gb=Decimal(size), every_s=Decimal(600), store="cloudflare-r2")
    work = Work(hours=Decimal(hours), checkpoints=saves, egress_gb=Decimal(size))
    made = offer(billing_increment_s=increment, **SPOT)
    low, high = (bill_of(made, work, STORES, hazard=h) for h in (hazard, hazard + more))
    assert sum(line.usd for line in high.lines) == high.total_usd
    unit_usd = 2 * Decimal(increment) / 3600
    assert low.total_usd <= high.total_usd + unit_usd + Decimal("0.00002")


@pytest.mark.parametrize("usd", ["0.1", "0.3", "0.5", "0.7", "2"])
def test_the_chosen_interval_is_about_as_cheap_as_any_though_egress_has_tiers(usd):
    """100 GB free, then $0.09: no interval of a user's choice is cheaper by more than 2%."""
    fees = FeeTable(
        [
            fee("cloud", "egress_usd_per_gb", "0", tier_from="0", tier_to="100"),
            fee("cloud", "egress_usd_per_gb", "0.09", tier_from="100"),
        ],
        [startup("cloud", "180")],
    )
    pricing = Pricing(fees=fees, risk_of=lambda of, hours: Risk(per_hour=0.3, source="a test"))
    priced = Priced(offer=offer(usd_per_hour=Decimal(usd), **SPOT), source="x", as_of=None, live=True)

    def total(every_s):
        saves = Checkpoints(gb=Decimal(20), store="elsewhere", every_s=every_s)
        return quote_of(priced, Work(hours=Decimal(8), checkpoints=saves), pricing).bill.total_usd

    others = [total(Decimal(minutes * 60)) for minutes in (5, 10, 20, 40, 60, 80, 120, 160, 240, 480)]
    assert total(None) <= min(others) * Decimal("1.02")


@pytest.mark.parametrize("increment_s", [60, 3600])
def test_a_rare_failure_does_not_add_a_whole_billing_unit(increment_s):
    """An hour exactly, lost once in ten thousand: the total is an hour and a hair."""
    fees = FeeTable([], [startup("cloud", "0")])
    made = offer(billing_increment_s=increment_s)
    total = bill_of(made, Work(hours=Decimal(1), disk_gb=Decimal(0)), fees, hazard=0.0001).total_usd
    assert Decimal(2) <= total < Decimal("2.001")
