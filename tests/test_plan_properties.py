"""What holds for every quote: the expected cost rises with price, hazard, restart and egress, and lines add up."""

from dataclasses import replace
from decimal import Decimal

from hypothesis import assume, given
from hypothesis import strategies as st

from gpubroker.model import Offer, Priced
from gpubroker.plan.course import Risk
from gpubroker.plan.fees import FeeTable
from gpubroker.plan.rank import Pricing, quote_of
from gpubroker.plan.work import Checkpoints, Work


def fee(provider, item, value, unit):
    return {
        "provider": provider, "item": item, "value": value, "unit": unit, "tier_from": "", "tier_to": "",
        "tier_unit": "", "region": "", "as_of": "2026-11-01", "source": "a test", "status": "official", "note": "",
    }  # fmt: skip


def pricing(start_s=180):
    startup = {
        "provider": "cloud", "market": "", "billed_startup_s": str(start_s), "source": "a test",
        "as_of": "2026-11-01", "status": "assumed",
    }  # fmt: skip
    fees = [
        fee("cloud", "storage_running_usd_per_gb_month", "0.10", "USD/GB-month"),
        fee("bucket", "egress_usd_per_gb", "0.02", "USD/GB"),
    ]
    return Pricing(fees=FeeTable(fees, [startup]))


def decimals(low, high):
    return st.decimals(low, high, places=4, allow_nan=False, allow_infinity=False)


prices = decimals("0.05", 50)
hazards = st.floats(0.001, 2)
works = st.builds(
    Work,
    hours=decimals("0.1", 100),
    egress_gb=decimals(0, 500),
    checkpoints=st.builds(
        Checkpoints,
        gb=decimals(0, 200),
        every_s=st.sampled_from([Decimal(600), Decimal(3600)]),
        store=st.sampled_from(["", "bucket"]),
    ),
)


def offer(usd_per_hour, egress_usd_per_gb):
    return Offer(
        provider="cloud", sku="h100", gpu="H100", form_factor="SXM", gpu_count=1, vram_gib=80, market="spot",
        preemptible=True, usd_per_hour=usd_per_hour, egress_usd_per_gb=egress_usd_per_gb,
        ingress_usd_per_gb=Decimal("0.01"),
    )  # fmt: skip


def total(usd_per_hour, egress_usd_per_gb, work, hazard, start_s=180):
    """None where the job would never finish."""
    priced = Priced(offer=offer(usd_per_hour, egress_usd_per_gb), source="a test", as_of=None, live=True)
    quote = quote_of(priced, work, pricing(start_s), risk=Risk(per_hour=hazard, source="a test"))
    return None if isinstance(quote, str) else quote.bill.total_usd


@given(prices, decimals(0, 1), works, hazards, decimals("0.01", 10))
def test_a_dearer_hour_makes_a_dearer_job(price, egress, work, hazard, more):
    """At a fixed interval, and at the best one where nothing leaves."""
    for each in (work, replace(work, checkpoints=replace(work.checkpoints, every_s=None, store=""))):
        now = total(price, egress, each, hazard)
        assume(now is not None)
        assert total(price + more, egress, each, hazard) > now


@given(prices, decimals(0, 1), works, hazards, decimals("0.001", 1))
def test_dearer_egress_makes_a_dearer_job(price, egress, work, hazard, more):
    """By what leaves: artifacts, and checkpoints that are kept elsewhere."""
    now, then = (total(price, rate, work, hazard) for rate in (egress, egress + more))
    assume(now is not None)
    assert then >= now
    if work.egress_gb >= 1:
        assert then > now


@given(prices, decimals(0, 1), works, hazards, st.floats(0.001, 1))
def test_more_preemptions_make_a_dearer_job(price, egress, work, hazard, more):
    """Never a cheaper one, at a fixed interval and at the best one; one that never finishes is dearer still."""
    for each in (work, replace(work, checkpoints=replace(work.checkpoints, every_s=None, store=""))):
        now, then = (total(price, egress, each, rate) for rate in (hazard, hazard + more))
        assume(now is not None)
        assert then is None or then >= now


@given(prices, decimals(0, 1), works, hazards, st.integers(60, 3600))
def test_a_longer_restart_makes_a_dearer_job(price, egress, work, hazard, more_s):
    """Each start is billed, and so is what is lost in it."""
    now, then = (total(price, egress, work, hazard, start_s) for start_s in (180, 180 + more_s))
    assume(now is not None)
    assert then is None or then > now


@given(prices, decimals(0, 1), works, hazards)
def test_the_lines_are_the_total(price, egress, work, hazard):
    """To the micro-dollar."""
    priced = Priced(offer=offer(price, egress), source="a test", as_of=None, live=True)
    quote = quote_of(priced, work, pricing(), risk=Risk(per_hour=hazard, source="a test"))
    assume(not isinstance(quote, str))
    assert sum(line.usd for line in quote.bill.lines) == quote.bill.total_usd
    assert all(line.usd >= 0 for line in quote.bill.lines)
