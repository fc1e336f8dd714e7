"""What would change the answer."""

from decimal import Decimal

import pytest

from gpubroker.gpus import parse_request
from gpubroker.model import Priced
from gpubroker.plan.breakeven import flips
from gpubroker.plan.course import Risk
from gpubroker.plan.fees import FeeTable
from gpubroker.plan.rank import Ask, Pricing, rank
from gpubroker.plan.work import Work
from gpubroker.prices import book
from tests.test_bill import fee, offer

FEES = FeeTable(
    [
        fee("dear", "egress_usd_per_gb", "0"),
        fee("cheap", "egress_usd_per_gb", "0", tier_from="0", tier_to="1000"),
        fee("cheap", "egress_usd_per_gb", "0.10", tier_from="1000"),
    ]
)


def ranked(rows, hours=10, fees=FEES, hazard=0.0, **work):
    pricing = Pricing(
        fees=fees,
        risk_of=lambda of, hours: Risk(per_hour=hazard if of.preemptible else 0.0, source="a test"),
    )
    ask = Ask(work=Work(hours=Decimal(hours), disk_gb=Decimal(0), **work))
    priced = [Priced(offer=row, source="x", as_of=None, live=True) for row in rows]
    return rank(priced, ask, pricing).quotes, pricing


def found(rows, **more):
    quotes, pricing = ranked(rows, **more)
    return {
        (flip.what, flip.at > flip.now): (float(flip.at), flip.winner.offer.provider)
        for flip in flips(quotes, pricing)
    }


def test_egress_past_a_free_tier_flips_the_order():
    """$10 of advantage are eaten by 100 GB beyond the free 1,000, at $0.10."""
    rows = [offer(provider="cheap", usd_per_hour=Decimal(1)), offer(provider="dear")]
    at, winner = found(rows)["egress_gb", True]
    assert (pytest.approx(1100, rel=1e-3), "dear") == (at, winner)


def test_a_minimum_flips_the_order_for_long_jobs():
    """$1/h with a minimum of 24 h against $2/h by the second: they meet at 12 h."""
    rows = [
        offer(provider="term", usd_per_hour=Decimal(1), minimum_s=86400),
        offer(provider="dear", usd_per_hour=Decimal(2)),
    ]
    at, winner = found(rows)["hours", True]
    assert (pytest.approx(12, rel=1e-3), "term") == (at, winner)
    at, winner = found(rows, hours=20)["hours", False]
    assert (pytest.approx(12, rel=1e-3), "dear") == (at, winner)


def test_a_preemption_rate_flips_the_order_either_way():
    """Spot that wins has a rate at which it no longer does; spot that loses one at which it would."""
    rows = [
        offer(provider="spot", market="spot", preemptible=True, usd_per_hour=Decimal("1.9")),
        offer(provider="firm", usd_per_hour=Decimal(2)),
    ]
    at, winner = found(rows, hazard=0.01)["preemptions_per_hour", True]
    lost, other = found(rows, hazard=3.0)["preemptions_per_hour", False]
    assert ("firm", "spot") == (winner, other)
    assert pytest.approx(at, rel=0.02) == lost


def test_a_dearer_host_of_the_same_market_with_cheaper_egress_wins_first():
    """Vast's hosts set their own: $1.00 with $0.05/GB against $1.01 with none, from 2 GB on."""
    rows = [
        offer(provider="vast", sku="a", usd_per_hour=Decimal(1), egress_usd_per_gb=Decimal("0.05")),
        offer(provider="vast", sku="b", usd_per_hour=Decimal("1.01"), egress_usd_per_gb=Decimal(0)),
    ]
    at, _ = found(rows)["egress_gb", True]
    assert pytest.approx(2, rel=0.02) == at


def test_a_single_row_has_nothing_to_flip():
    """Nobody to lose to."""
    quotes, pricing = ranked([offer(provider="cheap")])
    assert [] == flips(quotes, pricing)


def _runpod_or_modal(markets, overrides):
    """One H200 for ten hours at RunPod against Modal, at the price book's prices."""
    rows = [p for p in book.load(frozenset({"H200"})) if p.offer.provider in ("runpod", "modal")]
    work = Work(hours=Decimal(10), disk_gb=Decimal(0))
    ask = Ask(work=work, gpus=(parse_request("h200-sxm"),), markets=markets)
    pricing = Pricing(fees=FeeTable.load(overrides))
    quotes = rank(rows, ask, pricing).quotes
    flip = next(f for f in flips(quotes, pricing) if f.what == "egress_gb")
    return quotes[0].offer.provider, flip.winner.offer.provider, flip.at


OLDER_CLAIM = {("runpod", "egress_usd_per_gb"): Decimal("0.05"), ("modal", "egress_usd_per_gb"): Decimal(0)}


@pytest.mark.parametrize(
    ("markets", "overrides", "first", "winner", "least_gb", "most_gb"),
    [
        # Modal's first TiB is free (1,100 GB); from there its $0.043 a GB eats the $4 it is cheaper by.
        pytest.param(("serverless",), {}, "modal", "runpod", 1100, 1250, id="shipped fees"),
        # The $13 that a RunPod pod is cheaper by are eaten at $0.05 a GB.
        pytest.param(("on_demand", "serverless"), OLDER_CLAIM, "runpod", "modal", 100, 500, id="older claim"),
    ],
)
def test_moving_checkpoints_turns_runpod_against_modal(markets, overrides, first, winner, least_gb, most_gb):
    """The classic: shipped, Modal charges past a TiB and RunPod never; the older claim has it the other way."""
    cheapest, then, at_gb = _runpod_or_modal(markets, overrides)
    assert (first, winner) == (cheapest, then)
    assert least_gb < at_gb < most_gb
