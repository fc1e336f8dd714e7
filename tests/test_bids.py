"""Bids on vast: the least expected cost, held against a replay of the market, and what being outbid costs."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest

from gpubroker.plan.bids import BidJob, best_bid, outbid_text
from gpubroker.plan.hazard import Gamma, Span
from gpubroker.plan.preempt import Interruptions
from tests.support import EXAMPLES_FACTOR, NOW

PRIOR = Gamma(shape=0.8, hours=16.0)
PRIOR_WAIT_H = 1.6
JOB = BidJob(
    work_h=10.0,
    interruptions=Interruptions(hazard_per_hour=0, restart_h=0.25, checkpoint_h=0.05),
    min_bid=Decimal("0.20"),
    most=Decimal("0.60"),
    stopped_usd_per_hour=0.01,
)


def spans(*hours_and_prices):
    """(hours, price or None for not listed) one after the other, the last one ending now and open."""
    at = NOW - timedelta(hours=sum(hours for hours, _ in hours_and_prices))
    made = []
    for hours, usd in hours_and_prices:
        end = at + timedelta(hours=hours)
        if usd is not None:
            made.append(Span(at, None if end >= NOW else end, Decimal(usd)))
        at = end
    return made


def drawn(rng, hours, levels):
    """A market that jumps between prices, each held for an exponential time."""
    parts, at, level = [], 0.0, 0
    while at < hours:
        usd, mean_h = levels[level]
        held = float(rng.exponential(mean_h))
        parts.append((held, usd))
        at += held
        level = (level + int(rng.integers(1, len(levels)))) % len(levels)
    return parts


def replayed(parts, bid, job, interval_h):
    """What the job costs with this bid from the first moment that the bid runs; None = the market ends first."""
    i, usd, price = job.interruptions, 0.0, float(bid)
    saved, is_up, up_h = 0.0, False, 0.0
    for hours, min_bid in parts:
        if float(min_bid) > price:
            if is_up:
                done = int(max(0.0, up_h - i.restart_h) / (interval_h + i.checkpoint_h))
                saved += done * interval_h
                is_up, up_h = False, 0.0
            if saved or usd:
                usd += hours * job.stopped_usd_per_hour
            continue
        is_up = True
        full = max(0, int(np.ceil((job.work_h - saved) / interval_h - 1e-9)) - 1)
        needed = i.restart_h + (job.work_h - saved) + full * i.checkpoint_h - up_h
        if hours >= needed:
            return usd + price * needed
        usd += price * hours
        up_h += hours
    return None


def test_without_a_history_the_default_is_a_margin_and_says_so():
    """20% above the minimum; never above the price on demand; the prior is what is believed of it."""
    bid = best_bid(JOB, [], NOW, PRIOR, PRIOR_WAIT_H)
    assert (Decimal("0.240000"), PRIOR) == (bid.usd_per_hour, bid.hazard)
    assert "no history: 20% above the lowest bid that runs now, by default" == bid.basis
    near = best_bid(replace(JOB, most=Decimal("0.22")), [], NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.22") == near.usd_per_hour
    assert "on demand" in near.basis
    short = best_bid(JOB, spans((6, "0.20")), NOW, PRIOR, PRIOR_WAIT_H)
    assert short.basis.startswith("only 6 h of history")


def test_a_market_above_its_price_on_demand_gets_no_bid():
    """Then nobody should bid."""
    with pytest.raises(ValueError, match="above"):
        best_bid(replace(JOB, min_bid=Decimal("0.70")), [], NOW, PRIOR, PRIOR_WAIT_H)


def test_a_quiet_market_is_bid_its_minimum():
    """A price that never moved in a month: nothing is gained by more."""
    bid = best_bid(JOB, spans((720, "0.20")), NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.20") == bid.usd_per_hour
    assert "720 h of min_bid; this bid would have run for 720 h and lost 0 times" == bid.basis


def test_a_market_that_jumps_a_cent_every_hour_is_bid_the_cent():
    """Being outbid each hour costs a quarter of an hour of restart: a cent more is cheaper."""
    jumpy = spans(*[(1, "0.20"), (1, "0.21")] * 100, (1, "0.20"))
    bid = best_bid(JOB, jumpy, NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.21") == bid.usd_per_hour


def test_a_rare_jump_to_twice_the_price_is_sat_out():
    """Paying twice as much all the time to be spared one outage in two days is no bargain."""
    rare = spans(*[(47, "0.20"), (1, "0.40")] * 10, (5, "0.20"))
    bid = best_bid(JOB, rare, NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.20") == bid.usd_per_hour
    # 11 outages with the prior's: ten of an hour and one of 1.6 h.
    assert pytest.approx(11.6 / 11) == bid.outbid.wait_h
    assert "h stopped with its disk billed" in outbid_text(bid)


def test_a_machine_that_leaves_the_list_outbids_everybody():
    """An on-demand renter took it: the same losses at any price, so the minimum is bid."""
    gone = spans(*[(10, "0.20"), (2, None)] * 20, (5, "0.20"))
    bid = best_bid(JOB, gone, NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.20") == bid.usd_per_hour
    assert (PRIOR.after(20, 205)) == bid.hazard


def test_being_outbid_costs_its_hours():
    """Rework and restarts at the bid, the disk while it is stopped; all of them together are the difference."""
    jumpy = spans(*[(5, "0.20"), (2, "0.50")] * 20, (3, "0.20"))
    bid = best_bid(JOB, jumpy, NOW, PRIOR, PRIOR_WAIT_H)
    course, each = bid.course, bid.outbid
    undisturbed = 0.20 * (course.useful_h + course.first_start_h + course.checkpoint_pause_h)
    assert pytest.approx(undisturbed + course.preemptions * each.usd) == bid.usd_expected
    assert pytest.approx(0.20 * (each.rework_h + each.restart_h) + 0.01 * each.wait_h) == each.usd


def test_a_bid_below_the_minimum_needs_a_deadline_that_it_can_keep():
    """Waiting for the night's price is cheaper where there is time, and never taken where there is none."""
    nightly = spans(*[(12, "0.40"), (12, "0.10")] * 10, (6, "0.40"))
    now_dear = replace(JOB, min_bid=Decimal("0.40"))
    assert Decimal("0.40") == best_bid(now_dear, nightly, NOW, PRIOR, PRIOR_WAIT_H).usd_per_hour
    patient = best_bid(replace(now_dear, deadline_h=200.0), nightly, NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.10") == patient.usd_per_hour
    assert patient.first_wait_h > 5
    hurried = best_bid(replace(now_dear, deadline_h=11.0), nightly, NOW, PRIOR, PRIOR_WAIT_H)
    assert Decimal("0.40") <= hurried.usd_per_hour
    hopeless = best_bid(replace(now_dear, deadline_h=1.0), nightly, NOW, PRIOR, PRIOR_WAIT_H)
    assert hopeless.wall_h == min(hopeless.wall_h, hurried.wall_h)


@pytest.mark.parametrize(
    ("levels", "best"),
    [
        pytest.param((("0.20", 6.0), ("0.30", 2.0), ("0.50", 1.0)), "0.20", id="the minimum"),
        pytest.param((("0.20", 1.0), ("0.22", 4.0), ("0.50", 1.0)), "0.22", id="a little more"),
    ],
)
def test_the_chosen_bid_is_the_cheapest_of_replays_and_costs_what_was_expected(levels, best):
    """Within 3%: stays over several prices are not quite exponential, as the closed form takes them to be.

    90 days of history; 600 replays (6,000 in the soak) of the same market for each price.
    """
    rng = np.random.default_rng(11)
    history = spans(*drawn(rng, 24 * 90, levels), (0.5, "0.20"))
    bid = best_bid(JOB, history, NOW, PRIOR, PRIOR_WAIT_H)
    futures = [drawn(rng, 900, levels) for _ in range(600 * EXAMPLES_FACTOR)]
    costs = {}
    for price, _ in levels:
        interval_h = interval_at(Decimal(price), history)
        costs[price] = np.mean([replayed(parts, price, JOB, interval_h) for parts in futures])
    assert best == min(costs, key=costs.get) == f"{bid.usd_per_hour:.2f}"
    assert pytest.approx(costs[best], rel=0.03) == bid.usd_expected


def interval_at(usd, history):
    """The checkpoint interval that goes with a bid: each price is replayed at its own best."""
    only = replace(JOB, min_bid=usd, most=usd)
    return best_bid(only, history, NOW, PRIOR, PRIOR_WAIT_H).course.interval_h or JOB.work_h
