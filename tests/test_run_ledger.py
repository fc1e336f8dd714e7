"""Estimates: what our own record of a node says that it cost, and how near that is to what it did cost."""

from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.run.ledger import Life, Terms, estimate_usd
from tests.support import EXAMPLES_FACTOR, NOW

HOURLY = Terms(usd_per_hour=Decimal("3.60"), held_usd_per_hour=Decimal("0.36"))


def at(seconds):
    return NOW + timedelta(seconds=seconds)


def life(created=0, running=None, stopped=None, until=0):
    return Life(
        created=at(created),
        running=None if running is None else at(running),
        stopped=None if stopped is None else at(stopped),
        until=at(until),
    )


@pytest.mark.parametrize(
    ("terms", "lived", "is_free", "usd"),
    [
        pytest.param(HOURLY, life(until=100), False, "0.01", id="never ran: its disk"),
        pytest.param(HOURLY, life(running=0, until=100), False, "0.1", id="ran all the time"),
        pytest.param(HOURLY, life(running=40, until=100), False, "0.064", id="disk while it started"),
        pytest.param(HOURLY, life(running=0, stopped=40, until=100), False, "0.046", id="disk while stopped"),
        pytest.param(HOURLY, life(running=0, stopped=40, until=100), True, "0.01", id="free but for its disk"),
        pytest.param(Terms(usd_per_hour=Decimal(60), billing_increment_s=60), life(running=0, until=61), False, "2", id="minutes begun"),
        pytest.param(Terms(usd_per_hour=Decimal(60), minimum_s=60), life(running=0, until=1), False, "1", id="a minimum"),
        pytest.param(Terms(usd_per_hour=Decimal(60), minimum_s=60), life(running=9, until=9), False, "1", id="a minimum of less than a second"),
        pytest.param(Terms(usd_per_hour=Decimal(60), minimum_s=60), life(running=10, until=9), False, "0", id="no minimum before it runs"),
        pytest.param(Terms(usd_per_hour=Decimal(60), minimum_s=60), life(until=9), False, "0", id="no minimum of what never ran"),
        pytest.param(HOURLY, life(running=50, until=20), False, "0.002", id="clocks that disagree"),
    ],
)  # fmt: skip
def test_an_estimate_is_the_sum_of_what_each_state_costs(terms, lived, is_free, usd):
    """All of it while it runs, in billing units; its disk from the create to the end."""
    assert Decimal(usd) == estimate_usd(terms, lived, is_free=is_free)


TERMS = st.builds(
    Terms,
    usd_per_hour=st.decimals(1, 100, places=2),
    held_usd_per_hour=st.decimals(0, 1, places=2),
    billing_increment_s=st.sampled_from([1, 60, 3600]),
    minimum_s=st.sampled_from([0, 60]),
)
SECONDS = st.integers(0, 20_000)


@given(terms=TERMS, spans=st.tuples(SECONDS, SECONDS, SECONDS), more=SECONDS)
@settings(max_examples=200 * EXAMPLES_FACTOR)
def test_what_a_node_has_cost_never_becomes_less(terms, spans, more):
    """A cap that was passed stays passed."""
    started, ran, stopped = spans
    moments = [started, started + ran, started + ran + stopped]
    before, after = (
        estimate_usd(terms, life(running=moments[0], stopped=moments[1], until=until))
        for until in (moments[2], moments[2] + more)
    )
    assert before <= after


@given(terms=TERMS, spans=st.tuples(*[SECONDS] * 3), late=st.tuples(*[st.integers(0, 600)] * 2))
@settings(max_examples=300 * EXAMPLES_FACTOR)
def test_an_estimate_is_right_within_one_billing_unit_and_one_observation(terms, spans, late):
    """A node is seen to run, and to run no more, up to one interval after it did; the create and the end are ours.

    What it did cost is metered here second by second, in the words of the vendors.
    """
    started, ran, stopped = spans
    interval = max(late)
    runs, stops = started, started + ran
    ends = stops + stopped + interval
    seen_running, seen_stopped = runs + late[0], stops + late[1]
    if seen_running > seen_stopped:  # it was never seen running
        seen_running = seen_stopped = None
    estimated = estimate_usd(terms, life(running=seen_running, stopped=seen_stopped, until=ends))
    disk = terms.held_usd_per_hour * (started + ends - stops)
    units = -(-ran // terms.billing_increment_s) * terms.billing_increment_s
    billed = (disk + terms.usd_per_hour * (max(units, terms.minimum_s) if ran else 0)) / 3600
    unit_s = max(terms.billing_increment_s, terms.minimum_s)
    allowed = (terms.usd_per_hour + terms.held_usd_per_hour) * (interval + unit_s) / 3600
    assert abs(estimated - billed) <= allowed + Decimal("0.000001")
