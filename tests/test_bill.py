"""The bill: every line by its own rule, and the lines always add up."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.model import Offer
from gpubroker.plan.bill import Bill, CostLine, Work, bill_for, billed_seconds
from gpubroker.plan.fees import FeeTable


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


def items(bill):
    return {line.item: line.usd for line in bill.lines}


def test_a_whole_bill_is_as_worked_out_by_hand():
    """8 h at $2, 180 s of start-up, 73 GB of disk at $0.10 a month, 20 GB out at $0.05."""
    bill = bill_for(
        offer(), Work(hours=Decimal(8), disk_gb=Decimal(73), egress_gb=Decimal(20)), FEES, price_source="live"
    )
    source = "official, 2026-11-01: a test"
    assert (
        Bill(
            lines=(
                CostLine(item="compute", usd=Decimal("16.000000"), how="8 h x $2.000000/h", source="live"),
                CostLine(item="start-up", usd=Decimal("0.100000"), how="180 s x $2.000000/h", source="assumed: a test"),
                CostLine(item="disk", usd=Decimal("0.080500"), how="73 GB x $0.100000/GB-month x 8.05 h / 730 h", source=source),
                CostLine(item="egress", usd=Decimal("1.000000"), how="20 GB x $0.05/GB", source=source),
            ),
            total_usd=Decimal("17.180500"),
            billed_s=Decimal(28980),
        )
        == bill
    )  # fmt: skip


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
    bill = bill_for(
        offer(billing_increment_s=3600), Work(hours=Decimal(1), disk_gb=Decimal(0)), FEES, price_source="x"
    )
    assert {"compute": Decimal(2), "start-up": Decimal("0.1"), "billing unit": Decimal("1.9")} == items(bill)


def test_a_reserved_term_is_paid_whole():
    """Eight hours on a three-year reservation cost three years."""
    bill = bill_for(
        offer(market="reserved", minimum_s=3 * 365 * 86400),
        Work(hours=Decimal(8), disk_gb=Decimal(0)),
        FEES,
        price_source="x",
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
    bill = bill_for(modal, Work(hours=Decimal(10), disk_gb=Decimal(0)), FEES, price_source="x")
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
    small, large = (
        bill_for(modal, Work(hours=Decimal(1), disk_gb=Decimal(gb)), fees, price_source="x")
        for gb in (500, 1000)
    )
    assert (Decimal("0.16"), Decimal("0.47")) == (items(small)["ram"], items(large)["ram"])


def test_the_hosts_own_fees_win_over_the_table():
    """vast hosts set storage and transfer themselves, in both directions."""
    host = offer(
        storage_usd_per_gb_month=Decimal("0.2"),
        egress_usd_per_gb=Decimal("0.01"),
        ingress_usd_per_gb=Decimal("0.004"),
        disk_included_gb=8,
    )
    bill = bill_for(
        host,
        Work(hours=Decimal(10), disk_gb=Decimal(8), egress_gb=Decimal(100), ingress_gb=Decimal(50)),
        FEES,
        price_source="x",
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
    bill = bill_for(made, work, FEES, price_source="x")
    assert sum(line.usd for line in bill.lines) == bill.total_usd
    assert all(line.usd >= 0 and line.usd == line.usd.quantize(Decimal("0.000001")) for line in bill.lines)
    assert bill.total_usd >= usd * hours - Decimal("0.000001")


@given(a=money, b=money, hours=st.decimals(min_value="0.1", max_value=1000, places=1))
def test_a_dearer_rate_never_makes_a_smaller_bill(a, b, hours):
    """All else equal."""
    low, high = sorted((a, b))
    work = Work(hours=hours)
    cheap, dear = (bill_for(offer(usd_per_hour=p), work, FEES, price_source="x") for p in (low, high))
    assert cheap.total_usd <= dear.total_usd
