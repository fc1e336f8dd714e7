"""Preemptions in closed form: the limits, the parts, the interval, and the figures of the literature.

tests/test_simulate.py holds the same formulas against draws.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.plan.preempt import (
    MIN_INTERVAL_H,
    Interruptions,
    best_interval_h,
    daly_interval_h,
    expect,
    young_interval_h,
)

hazards = st.floats(0, 3) | st.floats(1e-12, 1e-3)
works = st.floats(0.01, 100)
restarts = st.floats(0, 1)
checkpoints = st.floats(0, 0.5)


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def published(work_h, hazard, restart_h, checkpoint_h, interval_h):
    """The formula of the literature, with nothing written after the last segment: whole segments only."""
    up = math.exp(hazard * restart_h)
    segment = (math.exp(hazard * (interval_h + checkpoint_h)) - 1) / hazard
    last = up * (math.exp(hazard * (interval_h + checkpoint_h)) - math.exp(hazard * interval_h)) / hazard
    return work_h / interval_h * up * segment + (up - 1) / hazard - last


@pytest.mark.parametrize("hazard", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("interval_h", [0.5, 1.0, 2.0])
def test_the_billed_hours_are_those_of_the_published_formula(hazard, interval_h):
    """E[B] = (T/tau) e^(lR) (e^(l(tau+c)) - 1)/l + first start - the checkpoint that is not written."""
    course = expect(
        12.0, Interruptions(hazard_per_hour=hazard, restart_h=0.2, checkpoint_h=0.05, interval_h=interval_h)
    )
    assert close(published(12.0, hazard, 0.2, 0.05, interval_h)) == course.billed_h


def test_a_shorter_last_segment_is_counted_as_it_is():
    """2.5 h of work by the hour: two segments with a checkpoint, and half an hour without one."""
    course = expect(2.5, Interruptions(hazard_per_hour=0.3, restart_h=0.1, checkpoint_h=0.05, interval_h=1.0))
    up = math.exp(0.03)
    by_hand = up * (2 * math.expm1(0.3 * 1.05) + math.expm1(0.3 * 0.5)) / 0.3 + math.expm1(0.03) / 0.3
    assert (2, close(by_hand)) == (course.checkpoints_written, course.billed_h)


def test_three_hours_are_thirty_tenths():
    """A float's last digit makes no empty segment."""
    course = expect(3.0, Interruptions(hazard_per_hour=0.1, restart_h=0.1, checkpoint_h=0.01, interval_h=0.1))
    assert 29 == course.checkpoints_written


def test_without_a_hazard_the_job_takes_its_start_and_its_work():
    """Nothing is written, nothing is lost."""
    course = expect(8.0, Interruptions(hazard_per_hour=0, restart_h=0.25, checkpoint_h=0.1))
    assert (8.25, 8.25, 0, 0, None) == (
        course.billed_h, course.wall_h, course.preemptions, course.checkpoints_written, course.interval_h,
    )  # fmt: skip


@given(st.floats(1e-300, 1e-9), works, restarts, checkpoints)
def test_a_vanishing_hazard_comes_to_the_same_as_none(hazard, work_h, restart_h, checkpoint_h):
    """No cancellation: what a tiny hazard adds is tiny, and never negative."""
    given_interval = {"restart_h": restart_h, "checkpoint_h": checkpoint_h, "interval_h": 1.0}
    none = expect(work_h, Interruptions(hazard_per_hour=0, **given_interval))
    tiny = expect(work_h, Interruptions(hazard_per_hour=hazard, **given_interval))
    assert close(none.billed_h) == pytest.approx(tiny.billed_h, rel=1e-6)
    assert tiny.billed_h >= none.billed_h
    assert tiny.rework_h >= 0 <= tiny.restart_h


def test_with_free_checkpoints_next_to_nothing_is_lost():
    """c -> 0: the interval goes down to its floor of a minute, and billed hours to T e^(lR) + start."""
    course = expect(8.0, Interruptions(hazard_per_hour=0.2, restart_h=0.1))
    assert pytest.approx(MIN_INTERVAL_H, rel=0.01) == course.interval_h
    assert pytest.approx(8 * math.exp(0.02) + math.expm1(0.02) / 0.2, rel=0.002) == course.billed_h


def test_a_job_shorter_than_its_interval_writes_nothing():
    """Every attempt begins again: (e^(lT) - 1)/l of attempts."""
    course = expect(0.5, Interruptions(hazard_per_hour=1.0, restart_h=0.0, checkpoint_h=0.1, interval_h=2.0))
    assert (0, None, close(math.expm1(0.5))) == (
        course.checkpoints_written, course.interval_h, course.billed_h,
    )  # fmt: skip


def test_a_restart_longer_than_the_mean_life_is_finite_and_dear():
    """R = 3 M: a start alone takes (e^3 - 1) M."""
    course = expect(1.0, Interruptions(hazard_per_hour=1.0, restart_h=3.0, checkpoint_h=0.1, interval_h=0.5))
    assert course.finishes
    assert course.billed_h > math.expm1(3) + math.exp(3)


def test_restarts_that_are_lost_for_ever_never_finish():
    """Beyond what a float holds the answer is infinity, not an exception."""
    course = expect(8.0, Interruptions(hazard_per_hour=10, restart_h=100, checkpoint_h=0.02, wait_h=1))
    assert not course.finishes
    assert (math.inf,) * 3 == (course.billed_h, course.wall_h, course.preemptions)


@given(st.floats(0, 1e300), st.floats(0, 1e300), st.floats(0, 1e300), st.floats(0, 1e300))
def test_no_figure_however_large_raises(work_h, hazard, restart_h, checkpoint_h):
    """Absurd durations give infinities, never an exception or a NaN."""
    course = expect(
        work_h, Interruptions(hazard_per_hour=hazard, restart_h=restart_h, checkpoint_h=checkpoint_h)
    )
    assert not math.isnan(course.wall_h)
    assert course.billed_h >= work_h


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        pytest.param({"hazard_per_hour": -0.1}, "hazard_per_hour", id="negative hazard"),
        pytest.param({"restart_h": math.nan}, "restart_h", id="restart that is no number"),
        pytest.param({"checkpoint_h": math.inf}, "checkpoint_h", id="endless checkpoint"),
        pytest.param({"interval_h": 0.0}, "interval_h", id="no interval"),
        pytest.param({"first_start_h": -1.0}, "first_start_h", id="negative start"),
    ],
)
def test_a_figure_that_is_no_duration_is_named(changes, name):
    """ValueError with the name of the figure."""
    with pytest.raises(ValueError, match=name):
        expect(8.0, Interruptions(**{"hazard_per_hour": 0.1, "restart_h": 0.1, **changes}))


def test_enough_notice_saves_the_work_of_every_preemption():
    """E[B] = T + (1 + lT)(e^(lR) - 1)/l + lT c: a save at each, nothing is lost, nothing written between."""
    course = expect(
        20.0, Interruptions(hazard_per_hour=0.2, restart_h=0.1, checkpoint_h=0.03, notice_h=0.033)
    )
    by_hand = 20 + (1 + 4) * math.expm1(0.02) / 0.2 + 4 * 0.03
    assert (0, None, close(4.0), close(by_hand)) == (
        course.rework_h, course.interval_h, course.checkpoints_written, course.billed_h,
    )  # fmt: skip


def test_too_short_a_notice_is_none():
    """A checkpoint that takes longer than the notice is not there in time."""
    either = {"hazard_per_hour": 0.2, "restart_h": 0.1, "checkpoint_h": 0.03}
    assert expect(20.0, Interruptions(**either)) == expect(20.0, Interruptions(**either, notice_h=0.029))


def test_waits_are_on_the_wall_clock_and_not_on_the_bill():
    """E[wall] = E[B] + N x mean wait."""
    course = expect(20.0, Interruptions(hazard_per_hour=0.2, restart_h=0.1, checkpoint_h=0.03, wait_h=2.0))
    assert close(course.billed_h + 2 * course.preemptions) == course.wall_h


@given(works, hazards, restarts, checkpoints, st.none() | st.floats(0.05, 5), st.none() | restarts)
def test_the_parts_are_the_whole_and_preemptions_are_hazard_times_hours(
    work_h, hazard, restart_h, checkpoint_h, interval_h, first_start_h
):
    """Every billed hour is one of five kinds, and every billed hour has the same hazard."""
    course = expect(
        work_h,
        Interruptions(
            hazard_per_hour=hazard,
            restart_h=restart_h,
            checkpoint_h=checkpoint_h,
            interval_h=interval_h,
            first_start_h=first_start_h,
        ),
    )
    parts = (
        course.useful_h, course.first_start_h, course.checkpoint_pause_h, course.rework_h, course.restart_h,
    )  # fmt: skip
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(course.billed_h, rel=1e-12)
    if course.finishes:
        assert pytest.approx(hazard * course.billed_h, rel=1e-6, abs=1e-12) == course.preemptions


@given(works, hazards, restarts, checkpoints, st.floats(0.001, 1))
def test_more_hazard_or_longer_restarts_never_cost_less(work_h, hazard, restart_h, checkpoint_h, more):
    """With the same interval, and with the best one for each."""
    for interval_h in (None, 1.0):
        base = {"checkpoint_h": checkpoint_h, "interval_h": interval_h}
        now = expect(work_h, Interruptions(hazard_per_hour=hazard, restart_h=restart_h, **base))
        for worse in (
            Interruptions(hazard_per_hour=hazard + more, restart_h=restart_h, **base),
            Interruptions(hazard_per_hour=hazard, restart_h=restart_h + more, **base),
        ):
            assert expect(work_h, worse).billed_h >= now.billed_h * (1 - 1e-12)


# --- Intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean_life_h", "published_min", "formula_min"),
    [
        pytest.param(24, 117, 116.7, id="M = 24 h"),
        pytest.param(6, 57, 56.7, id="M = 6 h"),
        pytest.param(0.25, 9.1, 9.14, id="M = 15 min"),
    ],
)
def test_dalys_formula_gives_the_optima_of_his_paper(mean_life_h, published_min, formula_min):
    """c = 5 min; the exact interval agrees within 0.3%."""
    minutes = daly_interval_h(1 / mean_life_h, 5 / 60) * 60
    assert pytest.approx(formula_min, abs=0.05) == minutes
    assert pytest.approx(published_min, rel=0.01) == minutes
    assert pytest.approx(minutes, rel=0.003) == best_interval_h(1 / mean_life_h, 5 / 60) * 60


@pytest.mark.parametrize(
    ("ratio", "young_excess"), [pytest.param(0.01, 0.05, id="0.01"), pytest.param(0.5, 0.43, id="0.5")]
)
def test_young_is_too_long_by_what_is_known(ratio, young_excess):
    """c/M = .01: 5% high; c/M = .5: 43% high."""
    assert pytest.approx(1 + young_excess, abs=0.005) == young_interval_h(1, ratio) / best_interval_h(
        1, ratio
    )


@given(st.floats(1e-6, 1))
def test_daly_is_within_two_per_cent_of_the_exact_interval(ratio):
    """Up to c = M."""
    assert pytest.approx(best_interval_h(1, ratio), rel=0.02) == daly_interval_h(1, ratio)


@given(st.floats(1e-15, 600), st.floats(1e-6, 100))
def test_the_exact_interval_solves_its_equation(ratio, hazard):
    """exp((tau + c)/M)(1 - tau/M) = 1, in the logarithm of it where that is no cancellation."""
    share = best_interval_h(hazard, ratio / hazard) * hazard
    assert 0 < share <= 1
    if 1e-9 < ratio < 20:
        assert share + math.log1p(-share) == pytest.approx(-ratio, rel=1e-6)


@given(st.floats(0.01, 3), st.floats(0.001, 1), st.floats(0.01, 0.5))
def test_the_exact_interval_is_a_minimum(hazard, checkpoint_h, off):
    """Time per useful hour of a long job, a little shorter and a little longer."""

    def per_hour(interval_h):
        return math.expm1(hazard * (interval_h + checkpoint_h)) / interval_h

    best = best_interval_h(hazard, checkpoint_h)
    assert per_hour(best * (1 - off)) > per_hour(best) < per_hour(best * (1 + off))


@given(works, hazards, restarts, checkpoints, st.floats(MIN_INTERVAL_H, 200))
def test_no_interval_beats_the_one_that_is_chosen(work_h, hazard, restart_h, checkpoint_h, interval_h):
    """For the job at hand, whose last segment writes nothing; every interval from a minute up."""
    base = {"hazard_per_hour": hazard, "restart_h": restart_h, "checkpoint_h": checkpoint_h}
    chosen = expect(work_h, Interruptions(**base))
    other = expect(work_h, Interruptions(**base, interval_h=interval_h))
    assert chosen.billed_h <= other.billed_h * (1 + 1e-9)


@given(st.floats(0.1, 10), st.floats(0.01, 3), restarts, checkpoints, st.floats(0, 20))
def test_a_fee_for_each_checkpoint_is_weighed_as_hours(work_h, hazard, restart_h, checkpoint_h, fee_h):
    """Of all whole numbers of parts none costs less in hours and fees."""
    base = {"hazard_per_hour": hazard, "restart_h": restart_h, "checkpoint_h": checkpoint_h}

    def cost(course):
        return course.billed_h + fee_h * course.checkpoints_written

    chosen = expect(work_h, Interruptions(**base, checkpoint_fee_h=fee_h))
    others = [
        expect(work_h, Interruptions(**base, interval_h=work_h / parts))
        for parts in range(1, 60)
        if parts == 1 or work_h / parts >= MIN_INTERVAL_H
    ]
    assert cost(chosen) <= min(map(cost, others)) * (1 + 1e-9)


@pytest.mark.parametrize("interval", [best_interval_h, daly_interval_h, young_interval_h])
def test_without_a_hazard_nothing_is_ever_written(interval):
    """Infinity; and a free checkpoint is written all the time."""
    assert (math.inf, 0) == (interval(0, 0.1), interval(0.5, 0))


def test_a_hazard_that_is_hardly_a_number_is_none():
    """5e-324 an hour: no checkpoint is written against it."""
    course = expect(1.0, Interruptions(hazard_per_hour=5e-324, restart_h=0.0, checkpoint_h=0.5))
    assert (1.0, 0.0) == (course.billed_h, course.checkpoints_written)
