"""The model behind every figure: launches, preemptions, bills, misses, checkpoints."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.policy import Greedy, OdFallback, OnDemand, UniformProgress
from gpubroker.policy.replay import Run, Setting, replay
from gpubroker.policy.rules import at_risk_h
from gpubroker.policy.traces import timeline
from tests.support import EXAMPLES_FACTOR
from tests.traces import Scripted, line, trace

RULES = (OnDemand, Greedy, OdFallback, UniformProgress)


def run(policy, world, start=0, **setting):
    terms = Setting(**{"work_h": 2.0, "deadline_h": float(len(world)), "restart_delay_h": 0.5, **setting})
    return replay(policy, terms.job(world), world, start)


def test_a_launch_is_billed_for_the_restart_delay_and_the_last_step_pro_rata():
    """2 h of work and half an hour of restart on demand: 2.5 h at $3, of a third step half."""
    expected = Run(
        usd=7.5,
        is_missed=False,
        preemptions=0,
        launches=1,
        on_demand_h=2.5,
        spot_h=0.0,
        lost_h=0.0,
        end_h=2.5,
    )
    assert expected == run(OnDemand(), line("0000"))


def test_a_preempted_node_stops_billing_and_the_next_launch_pays_the_delay_again():
    """Up, up, down, up, up: 1.5 h of work, then 0.5 h after another half hour."""
    policy = Scripted("spot")
    found = run(policy, line("11011"))
    assert (3.0, 1, 2, 3.0, 4.0) == (found.usd, found.preemptions, found.launches, found.spot_h, found.end_h)
    assert [
        (0, "none", -1, False, 0.0, 0.0),
        (1, "spot", 0, False, 0.5, 0.0),
        (2, "none", -1, True, 1.5, 0.0),
        (3, "none", -1, False, 1.5, 0.0),
    ] == policy.seen


def test_an_unfinished_delay_carries_over_to_the_next_step():
    """A restart of 1.5 h takes one step and a half."""
    policy = Scripted("spot")
    run(policy, line("1111"), restart_delay_h=1.5)
    assert [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (1.5, 0.0)] == [seen[4:] for seen in policy.seen]


def test_spot_is_billed_at_each_steps_price():
    """$1, $2, then half of $4."""
    world = timeline([trace("1111", prices=[1.0, 2.0, 4.0, 8.0])])
    assert 5.0 == run(Scripted("spot"), world).usd


def test_plain_spot_stays_where_it_is_and_else_takes_the_cheapest_zone():
    """It starts in the cheap zone, fails over to the dear one, and does not come back by itself."""
    world = timeline([trace("10111", zone="cheap"), trace("11111", price=2.0, zone="dear")])
    policy = Scripted("spot")
    found = run(policy, world, work_h=3.0)
    assert [-1, -1, 1, 1] == [zone for _, _, zone, *_ in policy.seen]
    assert (2, 0.5 + 2 * 3.0) == (found.launches, found.usd - 0.5)


def test_a_zone_by_number_moves_the_node_and_pays_the_delay():
    """One hour in each zone."""
    found = run(Scripted(("spot", 0), ("spot", 1)), line("1111", "1111"), work_h=1.0)
    assert (2, 0, 2.0) == (found.launches, found.preemptions, found.spot_h)


def test_asking_for_spot_where_there_is_none_is_waiting():
    """Neither billed nor a launch, by name or by zone."""
    for answer in ("spot", ("spot", 0)):
        found = run(Scripted(answer), line("0011111"))
        assert (2.5, 1, 4.5) == (found.usd, found.launches, found.end_h)


def test_work_left_at_the_deadline_is_a_miss_and_is_finished_on_demand():
    """Nothing done in two hours: 2 h of work and a launch on demand, late by 2.5 h."""
    found = run(Scripted("none"), line("1111"), deadline_h=2.0)
    assert (True, 7.5, 4.5, 1) == (found.is_missed, found.usd, found.end_h, found.launches)


def test_a_deadline_within_a_step_cuts_the_last_step_short():
    """2.5 h are enough for 2 h of work and the restart, 2.4 h are not."""
    assert not run(OnDemand(), line("000"), deadline_h=2.5).is_missed
    assert run(OnDemand(), line("000"), deadline_h=2.4).is_missed


@pytest.mark.parametrize("answer", ["", "SPOT", None, ("spot", 1), ("spot", -1), ("on_demand", 0), 1])
def test_an_answer_that_nobody_knows_is_refused(answer):
    """In a sentence that shows it."""
    with pytest.raises(ConfigError, match="a policy answered"):
        run(Scripted(answer), line("111"))


@pytest.mark.parametrize("start", [-1, 2])
def test_a_run_that_leaves_its_trace_is_refused(start):
    """Rather than made up."""
    with pytest.raises(ConfigError, match="leave its 3 steps"):
        run(OnDemand(), line("111"), start, deadline_h=2.0)


PERIODIC = {"checkpoint": "periodic", "ckpt_interval_h": 1.0, "ckpt_cost_h": 0.25, "restart_delay_h": 0.0}


def test_a_checkpoint_takes_its_time_after_every_interval_of_work_on_spot():
    """2.5 h of work: two checkpoints, the last stretch needs none."""
    assert 3.0 == run(Scripted("spot"), line("11111"), work_h=2.5, **PERIODIC).spot_h


def test_no_checkpoint_is_written_on_demand_or_when_the_work_is_done():
    """1 h of work ends with its interval."""
    assert 2.5 == run(OnDemand(), line("1111"), work_h=2.5, **PERIODIC).on_demand_h
    assert 1.0 == run(Scripted("spot"), line("111"), work_h=1.0, **PERIODIC).spot_h


def test_a_preemption_loses_the_work_since_the_last_checkpoint():
    """1 h and a checkpoint, then 0.75 h lost."""
    found = run(Scripted("spot"), line("110111"), work_h=2.0, **PERIODIC)
    assert (0.75, 1, 4.0) == (found.lost_h, found.preemptions, found.end_h)


def test_a_half_written_checkpoint_is_worth_nothing():
    """Preempted while it writes: all of the hour is lost."""
    found = run(Scripted("spot"), line("10111"), work_h=2.0, **PERIODIC)
    assert 1.0 == found.lost_h


def test_notice_long_enough_for_a_checkpoint_loses_nothing():
    """As instant, but for the checkpoints on the way."""
    found = run(Scripted("spot"), line("110111"), work_h=2.0, grace_h=0.25, **PERIODIC)
    assert (0.0, 3.25) == (found.lost_h, found.end_h)


def test_a_stop_by_choice_saves_first_and_the_next_launch_takes_longer():
    """Half an hour of work would be unsaved: 0.25 h are added to the launch on demand."""
    policy = Scripted("spot", "none", "on_demand")
    found = run(policy, line("11111"), work_h=2.0, **(PERIODIC | {"restart_delay_h": 0.5}))
    assert (0.0, 2.25, 4.25) == (found.lost_h, found.on_demand_h, found.end_h)


def test_what_is_unsaved_on_demand_is_saved_by_moving_to_spot():
    """Two hours on demand, a move, and a preemption at once: only the hour on spot is lost."""
    policy = Scripted("on_demand", "on_demand", "spot")
    found = run(policy, line("111011111"), work_h=4.0, **PERIODIC)
    assert 0.75 == found.lost_h


WORLDS = st.builds(
    lambda patterns, prices: timeline(
        [
            trace(pattern, price=price, zone=f"z{n}", step_s=600)
            for n, (pattern, price) in enumerate(zip(patterns, prices, strict=False))
        ]
    ),
    st.lists(st.text("01", min_size=40, max_size=60), min_size=1, max_size=3),
    st.lists(st.sampled_from((0.5, 1.0, 2.5)), min_size=3, max_size=3),
)
SETTINGS = st.builds(
    lambda share, deadline_h, restart_h, periodic: Setting(
        work_h=share * deadline_h,
        deadline_h=deadline_h,
        restart_delay_h=restart_h,
        **({"checkpoint": "periodic", "ckpt_interval_h": 0.5, "ckpt_cost_h": 0.05} if periodic else {}),
    ),
    st.sampled_from((0.1, 0.3, 0.5, 0.7, 0.9)),
    st.sampled_from((2.0, 4.0, 5.75, 6.55)),
    st.sampled_from((0.0, 0.02, 0.1, 0.2, 0.4)),
    st.booleans(),
)


class _Asked:
    """The same policy without its word on how long an answer holds."""

    def __init__(self, policy):
        self.reset, self.step = policy.reset, policy.step


@settings(max_examples=200 * EXAMPLES_FACTOR)
@given(world=WORLDS, setting=SETTINGS, rule=st.sampled_from(RULES))
def test_strides_change_nothing(world, setting, rule):
    """A rule that says how long it holds comes out as if it had been asked at every step."""
    job = setting.job(world)
    strides, steps = replay(rule(), job, world, 0), replay(_Asked(rule()), job, world, 0)
    assert asdict(steps) == pytest.approx(asdict(strides), abs=1e-9)


@settings(max_examples=200 * EXAMPLES_FACTOR)
@given(world=WORLDS, setting=SETTINGS, rule=st.sampled_from(RULES))
def test_no_rule_misses_a_deadline_that_leaves_room_at_the_start(world, setting, rule):
    """Room for two restarts, and with periodic checkpoints for what one preemption can throw away."""
    whole = replace(setting, deadline_h=float(int(setting.deadline_h)))
    job = whole.job(world)
    if whole.work_h + 2 * whole.restart_delay_h + at_risk_h(job) <= whole.deadline_h:
        assert not replay(rule(), job, world, 0).is_missed
