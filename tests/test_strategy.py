"""Strategies: what is offered, in which order, and what each rests on."""

from datetime import timedelta
from decimal import Decimal

import pytest

from gpubroker.model import Priced
from gpubroker.plan.course import Risk
from gpubroker.plan.hazard import Gamma, Span
from gpubroker.plan.rank import Ask, Pricing, rank
from gpubroker.plan.strategy import Limits, at_best_bid, reaches, strategies
from gpubroker.plan.work import Checkpoints, Work
from tests.support import NOW
from tests.test_bill import SPOT, STORES, offer

RATE = 0.1
PRICING = Pricing(
    fees=STORES,
    risk_of=lambda of, hours: Risk(per_hour=RATE if of.preemptible else 0.0, source="a test"),
)
SAVES = Checkpoints(gb=Decimal(10), store="cloudflare-r2")


def quoted(*offers, hours=10, saves=SAVES, **work):
    asked = Work(hours=Decimal(hours), disk_gb=Decimal(0), checkpoints=saves, **work)
    rows = [Priced(offer=row, source="x", as_of=NOW, live=True) for row in offers]
    return list(rank(rows, Ask(work=asked), PRICING).quotes)


def planned(quotes, bids=None, **limits):
    return strategies(quotes, bids or {}, PRICING, Limits(**limits))


CHEAP_SPOT = offer(sku="spot", usd_per_hour=Decimal(1), region="a", **SPOT)
FIRM = offer(sku="firm", usd_per_hour=Decimal(3), region="b")


def test_without_a_deadline_cheap_spot_wins():
    """Never on demand unless it is cheaper."""
    assert ["spot", "on demand"] == [s.kind for s in planned(quoted(CHEAP_SPOT, FIRM))]


def test_on_demand_wins_where_it_is_cheaper():
    """Spot at nearly the same price costs more once preemptions are in the bill."""
    dear = offer(sku="spot", usd_per_hour=Decimal("2.99"), **SPOT)
    assert "on demand" == planned(quoted(dear, FIRM))[0].kind


def test_a_deadline_puts_spot_with_a_fallback_first():
    """Spot alone misses 14 h too often; the fallback never does, and is cheaper than on demand throughout."""
    found = planned(quoted(CHEAP_SPOT, FIRM), deadline_h=14.0)
    assert ["spot, then on demand", "on demand", "spot"] == [s.kind for s in found]
    assert 1.0 == found[0].chances(Limits(deadline_h=14.0))[0]
    assert found[0].usd_mean < found[1].usd_mean
    assert found[2].chances(Limits(deadline_h=14.0))[0] < 0.95


def test_a_deadline_too_near_for_spot_leaves_on_demand():
    """No strategy that could not begin on spot is shown."""
    found = planned(quoted(CHEAP_SPOT, FIRM), deadline_h=10.1)
    assert ("on demand", True) == (found[0].kind, found[0].keeps(Limits(deadline_h=10.1)))
    assert "spot, then on demand" not in [s.kind for s in found]


def test_a_budget_counts_like_a_deadline():
    """Too little for on demand, enough for spot."""
    found = planned(quoted(CHEAP_SPOT, FIRM), budget_usd=20.0)
    assert ["spot", "on demand"] == [s.kind for s in found]
    assert [True, False] == [s.keeps(Limits(budget_usd=20.0)) for s in found]


def test_own_gpu_and_serverless_are_strategies():
    """Beside what is rented by the hour."""
    own = offer(provider="local", usd_per_hour=Decimal("0.1"))
    worker = offer(sku="worker", market="serverless", preemptible=True, usd_per_hour=Decimal(5))
    assert ["own GPU", "on demand", "serverless"] == [s.kind for s in planned(quoted(own, worker, FIRM))]


def test_several_spot_markets_shorten_the_waits():
    """A mixed strategy is done sooner than its first market alone."""
    second = offer(sku="spot", usd_per_hour=Decimal("1.1"), region="c", **SPOT)
    found = {s.kind: s for s in planned(quoted(CHEAP_SPOT, second), confidence=0.95)}
    assert {"spot", "mixed"} == set(found)
    assert found["mixed"].finish_quantiles.p90 < found["spot"].finish_quantiles.p90


def test_only_markets_of_one_card_are_mixed():
    """Hours on one card are not hours on another."""
    other = offer(sku="spot", gpu="A100-80GB", usd_per_hour=Decimal("1.1"), region="c", **SPOT)
    assert ["spot", "spot"] == [s.kind for s in planned(quoted(CHEAP_SPOT, other))]


def test_a_reserved_term_is_no_fallback():
    """Three years would be paid for two hours."""
    term = offer(
        sku="term", market="reserved", region="b", minimum_s=3 * 365 * 86400, usd_per_hour=Decimal(1)
    )
    found = planned(quoted(CHEAP_SPOT, term), deadline_h=14.0)
    assert "spot, then on demand" not in [s.kind for s in found]


def test_a_fallback_is_billed_in_its_own_units():
    """By the hour: its hours are whole."""
    hourly = offer(sku="firm", region="b", usd_per_hour=Decimal(3), billing_increment_s=3600)
    by_second, by_hour = (
        next(s for s in planned(quoted(CHEAP_SPOT, firm), deadline_h=14.0) if s.fallback)
        for firm in (FIRM, hourly)
    )
    assert by_hour.usd_mean > by_second.usd_mean


@pytest.mark.parametrize(
    ("saves", "here", "there", "can"),
    [
        pytest.param(SAVES, {"provider": "a"}, {"provider": "b"}, True, id="a store apart"),
        pytest.param(Checkpoints(), {"provider": "a"}, {"provider": "b"}, False, id="another provider"),
        pytest.param(Checkpoints(), {"region": "x"}, {"region": "x"}, True, id="the same region"),
        pytest.param(Checkpoints(), {"region": "x"}, {"region": "y"}, False, id="another region"),
        pytest.param(
            Checkpoints(),
            {"provider": "vast", "machine_id": "7"},
            {"provider": "vast", "machine_id": "7"},
            True,
            id="the same machine",
        ),
        pytest.param(
            Checkpoints(), {"provider": "vast"}, {"provider": "vast"}, False, id="some machine of vast"
        ),
    ],
)
def test_checkpoints_are_reached_only_from_where_they_can_be_read(saves, here, there, can):
    """A fallback that could not resume is none."""
    spot = quoted(offer(**SPOT, **here), saves=saves)[0]
    firm = quoted(offer(**there), saves=saves)[0]
    assert can == reaches(spot, firm)


def test_a_fallback_that_cannot_read_the_checkpoints_is_not_offered():
    """Two providers and no store apart."""
    elsewhere = offer(provider="other", sku="firm", usd_per_hour=Decimal(3))
    found = planned(quoted(CHEAP_SPOT, elsewhere, saves=Checkpoints()), deadline_h=14.0)
    assert "spot, then on demand" not in [s.kind for s in found]


def test_a_bid_is_chosen_from_the_history_and_paid():
    """Ten days at $1.00 with an hour at $1.50 each day: $1.00 is lost daily, $1.50 never; the cheaper wins."""
    spot = quoted(CHEAP_SPOT)[0]
    days = [NOW - timedelta(days=n) for n in range(10, 0, -1)]
    history = []
    for day in days:
        history.append(Span(day, day + timedelta(hours=23), Decimal(1)))
        history.append(Span(day + timedelta(hours=23), day + timedelta(hours=24), Decimal("1.5")))
    found, bid = at_best_bid(spot, history, Decimal(3), PRICING, NOW, None)
    assert Decimal(1) == bid.usd_per_hour == found.offer.usd_per_hour
    assert "240 h of min_bid" in found.risk.source
    assert isinstance(found.risk.uncertain, Gamma)


def test_without_history_a_bid_has_the_default_margin():
    """20% above the minimum, and it says so."""
    found, bid = at_best_bid(quoted(CHEAP_SPOT)[0], [], Decimal(3), PRICING, NOW, None)
    assert Decimal("1.2") == bid.usd_per_hour
    assert "no history" in found.risk.source
