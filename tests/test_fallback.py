"""Spot with an on-demand fallback keeps every deadline that can be kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.plan.fallback import Fallback, draw
from gpubroker.plan.preempt import Interruptions, expect
from gpubroker.plan.simulate import simulate
from tests.support import EXAMPLES_FACTOR

SPOT = Interruptions(hazard_per_hour=0.1, restart_h=0.1, checkpoint_h=0.01, wait_h=1.6)
SAME = Fallback(work_h=8.0, start_h=0.1)


def test_without_a_near_deadline_it_is_spot_alone():
    """The same billed hours, waits and preemptions as the closed form, within 1%."""
    legs = draw(8.0, SPOT, SAME, 1e9, seed=1, draws=100_000)
    expected = expect(8.0, SPOT)
    assert 0 == legs.fallback_h.max()
    assert pytest.approx(expected.billed_h, rel=0.01) == legs.spot_h.mean()
    assert pytest.approx(expected.wall_h, rel=0.01) == legs.wall_h.mean()
    assert pytest.approx(expected.preemptions, rel=0.02) == legs.preemptions.mean()


def test_a_deadline_that_leaves_no_room_is_on_demand_from_the_start():
    """8 h of work and 6 minutes of start in 8.5 h: a lost spot node could not be made good."""
    legs = draw(8.0, SPOT, SAME, 8.5, seed=1)
    assert (0.0, 8.1) == (legs.spot_h.max(), pytest.approx(legs.fallback_h.min()))


def test_a_nearer_deadline_costs_more_on_demand_hours():
    """From 24 h down to 9 h, step by step."""
    hours = [draw(8.0, SPOT, SAME, end, seed=1).fallback_h.mean() for end in (24.0, 16.0, 12.0, 10.0, 9.0)]
    assert sorted(hours) == hours


@given(
    work_h=st.floats(0.5, 60),
    hazard=st.floats(0, 3),
    restart_h=st.floats(0, 0.5),
    checkpoint_h=st.floats(0, 0.1),
    wait_h=st.floats(0, 5),
    slower=st.floats(0.3, 3),
    room=st.floats(1, 3),
    interval_h=st.none() | st.floats(0.05, 4),
)
def test_no_deadline_that_can_be_kept_is_missed(
    work_h, hazard, restart_h, checkpoint_h, wait_h, slower, room, interval_h
):
    """Whatever the market does: in every run."""
    spot = Interruptions(
        hazard_per_hour=hazard,
        restart_h=restart_h,
        checkpoint_h=checkpoint_h,
        wait_h=wait_h,
        interval_h=interval_h,
    )
    fallback = Fallback(work_h=work_h * slower, start_h=restart_h)
    deadline_h = room * (fallback.work_h + fallback.start_h)
    legs = draw(work_h, spot, fallback, deadline_h, seed=2, draws=200 * EXAMPLES_FACTOR)
    assert legs.wall_h.max() <= deadline_h + 1e-6


def test_a_fallback_does_only_what_was_not_saved():
    """Spot hours that were saved are not paid again."""
    spot = Interruptions(hazard_per_hour=0.5, restart_h=0.0, interval_h=1.0, wait_h=3.0)
    legs = draw(8.0, spot, Fallback(work_h=8.0, start_h=0.0), 12.0, seed=3)
    fell = legs.fallback_h > 0
    assert np.allclose(legs.fallback_h[fell], np.round(legs.fallback_h[fell]))
    assert fell.any()
    assert not fell.all()


def test_the_draws_are_those_of_the_plain_simulation_where_nothing_falls_back():
    """One model, two programs: their quantiles agree within 1%."""
    runs = simulate(8.0, SPOT, seed=5, draws=50_000)
    legs = draw(8.0, SPOT, SAME, 1e9, seed=6, draws=50_000)
    for share in (0.5, 0.9, 0.99):
        assert pytest.approx(np.quantile(runs.wall_h, share), rel=0.02) == np.quantile(legs.wall_h, share)
