"""The spread of a bill agrees with the bill itself."""

from decimal import Decimal

import pytest

from gpubroker.model import Priced
from gpubroker.plan.course import Risk
from gpubroker.plan.rank import Pricing, quote_of
from gpubroker.plan.spread import rates_of, runs_of, spread_of
from gpubroker.plan.work import Checkpoints, Work
from tests.test_bill import SPOT, STORES, offer


def quoted(hazard, **values):
    pricing = Pricing(fees=STORES, risk_of=lambda of, hours: Risk(per_hour=hazard, source="a test"))
    saves = Checkpoints(gb=Decimal(10), store="cloudflare-r2")
    work = Work(hours=Decimal(20), egress_gb=Decimal(30), ingress_gb=Decimal(5), checkpoints=saves)
    priced = Priced(offer=offer(**values), source="x", as_of=None, live=True)
    return quote_of(priced, work, pricing), pricing


@pytest.mark.parametrize("increment_s", [1, 60, 3600])
def test_without_preemptions_every_run_costs_the_bill(increment_s):
    """p50, p90 and p99 are the total, and the finish is the wall time."""
    quote, pricing = quoted(0.0, billing_increment_s=increment_s)
    spread = spread_of(quote, pricing)
    total = pytest.approx(float(quote.bill.total_usd), abs=0.002)  # the lines are rounded one by one
    assert (total, total, total) == (spread.usd.p50, spread.usd.p90, spread.usd.p99)
    assert round(float(quote.bill.course.wall_h), 6) == round(spread.finish_h.p99, 6)


@pytest.mark.parametrize("hazard", [0.01, 0.1, 0.5])
def test_the_mean_of_the_runs_is_the_expected_bill(hazard):
    """Within half a per cent over 40,000 runs: the same prices on the same model."""
    quote, pricing = quoted(hazard, **SPOT)
    spread = spread_of(quote, pricing, draws=40_000)
    assert abs(spread.usd_mean / float(quote.bill.total_usd) - 1) < 0.005
    assert spread.usd.p50 < spread.usd.p90 < spread.usd.p99


def test_the_rates_are_those_of_the_bill():
    """An hour at $2 with its disk, a preemption that reads data and checkpoint again, what is due anyway."""
    quote, pricing = quoted(0.1, **SPOT)
    rates = rates_of(quote, pricing)
    course = quote.bill.course
    assert round(2.0, 3) == round(rates.usd_per_hour, 2)
    # 10 GB in and out of the store, 5 GB of data, each at the test's rates.
    assert round(10 * 0.01 + 10 * 0.02 + 5 * 0.01, 6) == round(rates.usd_per_preemption, 6)
    total = (
        rates.usd_fixed
        + rates.usd_per_hour * float(course.run_h)
        + rates.usd_per_preemption * float(course.preemptions)
        + rates.usd_per_wait_hour * float(course.wait_h)
    )
    assert abs(total - float(quote.bill.total_usd)) < 0.0001


def test_the_same_quote_has_the_same_spread():
    """The seed is fixed: nothing a person sees flickers."""
    quote, pricing = quoted(0.2, **SPOT)
    assert spread_of(quote, pricing) == spread_of(quote, pricing)
    assert (runs_of(quote).billed_h == runs_of(quote).billed_h).all()
