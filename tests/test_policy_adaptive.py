"""The policy that plans: never late where one can be in time, cheaper than the rules, the same after a restore."""

import json
import random
from dataclasses import replace
from math import isnan, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.policy.adaptive import Adaptive
from gpubroker.policy.interface import Job, Observation
from gpubroker.policy.outlook import NONE, ON_DEMAND, SPOT, Outlook, Terms
from gpubroker.policy.replay import Setting, replay
from gpubroker.policy.rules import Greedy, UniformProgress
from gpubroker.policy.spells import DOWN, FACTOR_PRIOR, STAGES, UP, Spells
from gpubroker.policy.traces import Trace, timeline
from tests.support import EXAMPLES_FACTOR

ON_DEMAND_PRICE = 3.0
JOB = Job(
    work_h=6.0, deadline_h=12.0, restart_delay_h=0.1, step_h=0.25, on_demand_price=3.0, zones=("a", "b")
)


def sight(**values):
    """An observation at the beginning of JOB."""
    seen = {
        "time_left_h": 12.0,
        "work_left_h": 6.0,
        "on_demand_price": 3.0,
        "zone_available": [False, False],
        "zone_price": [1.0, 1.0],
    }
    return Observation(**{**seen, **values})


def answer(job=JOB, **values):
    policy = Adaptive()
    policy.reset(job)
    return policy.step(sight(**values))


def zone(flags, *, step_s=600, price=1.0, name="a"):
    """A trace with one price."""
    return Trace(
        name=name,
        group="g",
        zone=name,
        step_s=step_s,
        on_demand_usd_per_hour=ON_DEMAND_PRICE,
        available=tuple(flags),
        spot_usd_per_hour=(price,) * len(flags),
    )


def flaps(seed, steps, per_step=0.2):
    """Spells of random lengths."""
    random_ = random.Random(seed)
    up = random_.random() < 0.5
    flags = []
    for _ in range(steps):
        up = up if random_.random() > per_step else not up
        flags.append(up)
    return flags


def test_takes_spot_while_there_is_time():
    """Cheap and there: nothing else makes sense."""
    assert ("spot", 0) == answer(zone_available=[True, False])


def test_takes_the_cheaper_of_two_zones():
    """Both are there and equally old."""
    assert ("spot", 1) == answer(zone_available=[True, True], zone_price=[1.2, 0.8])


def test_waits_while_waiting_costs_nothing():
    """Half of the time is slack."""
    assert "none" == answer()


def test_rents_on_demand_when_the_slack_is_gone():
    """11.8 h of work and 0.1 h of delay in 12 h: a step of waiting would be too much."""
    assert "on_demand" == answer(work_left_h=11.8)


def test_does_not_pay_more_for_spot_than_for_on_demand():
    """A market may ask anything for spot."""
    assert "none" == answer(zone_available=[True, False], zone_price=[3.5, nan])


def test_stays_on_demand_for_a_spell_that_has_just_begun_and_leaves_for_one_that_lasts():
    """Young spells flap, and a change costs two launches."""
    job = replace(JOB, work_h=11.0, restart_delay_h=0.25, zones=("a",))
    policy = Adaptive()
    policy.reset(job)
    answers = []
    for step in range(1, 30):
        t_h = step * job.step_h
        seen = {"t_h": t_h, "time_left_h": 12.0 - t_h, "work_left_h": 11.25 - t_h}
        market = {"zone_available": [step > 1], "zone_price": [0.6]}
        answers.append(policy.step(sight(**seen, **market, state="on_demand")))
    assert ["on_demand"] * 3 == answers[:3]
    assert ("spot", 0) in answers


def test_leaves_a_dear_node_for_a_cheap_zone_when_there_is_much_work_left():
    """Six hours at half the price are worth six minutes of launch."""
    here = {"state": "spot", "zone": 0, "zone_available": [True, True], "zone_price": [1.4, 0.7]}
    assert ("spot", 1) == answer(**here)
    assert ("spot", 0) == answer(**here, work_left_h=0.05)


def test_fails_over_at_once():
    """The zone is gone, another one is there."""
    assert ("spot", 1) == answer(preempted=True, zone_available=[False, True], zone_price=[0.7, 1.4])


def test_a_zone_that_nobody_has_looked_at_is_tried_rather_than_waited_for():
    """None is not known: asking in vain costs no more than waiting."""
    assert ("spot", 0) == answer(zone_available=[None, False], zone_price=[1.0, nan])
    assert ("spot", 1) == answer(zone_available=[None, True], zone_price=[0.9, 1.0])
    assert "on_demand" == answer(zone_available=[None, None], work_left_h=11.8)


def test_a_zone_without_a_known_price_is_not_used():
    """nan may be anything."""
    assert "none" == answer(zone_available=[None, True], zone_price=[nan, nan])


def test_a_deadline_that_has_passed_is_a_job_that_cannot_be_in_time():
    """Whoever drives it may ask late, and of a job without any time."""
    assert "on_demand" == answer(time_left_h=-1.0)
    assert "on_demand" == answer(replace(JOB, deadline_h=0.0), time_left_h=0.0)


@pytest.mark.parametrize(
    ("state", "delay_left_h", "expected"),
    [
        pytest.param("spot", 0.0, "spot", id="a spot node that works may make it"),
        pytest.param("none", 0.0, "on_demand", id="nothing runs"),
        pytest.param("on_demand", 0.05, "on_demand", id="on demand"),
    ],
)
def test_a_job_that_cannot_be_in_time_takes_what_is_done_first(state, delay_left_h, expected):
    """12 h of work in 12 h."""
    seen = {"state": state, "delay_left_h": delay_left_h, "zone": 0 if state == "spot" else -1}
    assert expected == answer(**seen, work_left_h=12.0, zone_available=[True, False])


@settings(max_examples=40 * EXAMPLES_FACTOR, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    per_step=st.sampled_from([0.02, 0.1, 0.3, 0.6]),
    share=st.sampled_from([0.3, 0.7, 0.9, 0.98]),
    delay_h=st.sampled_from([0.0, 0.02, 0.1, 0.2, 0.5]),
    zones=st.integers(1, 3),
)
def test_never_misses_a_deadline_that_on_demand_meets(seed, per_step, share, delay_h, zones):
    """Whatever the market does, with instant checkpoints."""
    line = timeline([zone(flaps(seed + i, 72, per_step), name=f"z{i}") for i in range(zones)])
    work_h = 12.0 * share - delay_h
    setting = Setting(work_h=work_h, deadline_h=12.0, restart_delay_h=delay_h)
    assert not replay(Adaptive(), setting.job(line), line, 0).is_missed


@settings(max_examples=40 * EXAMPLES_FACTOR, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    per_step=st.sampled_from([0.02, 0.1, 0.3, 0.6]),
    share=st.sampled_from([0.3, 0.7, 0.9]),
    interval_h=st.sampled_from([0.1, 0.5, 2.0]),
    cost_h=st.sampled_from([0.0, 0.02, 0.1]),
    grace_h=st.sampled_from([0.0, 0.03, 1.0]),
)
def test_never_misses_with_checkpoints_that_take_time_and_lose_work(
    seed, per_step, share, interval_h, cost_h, grace_h
):
    """What is not saved is part of what the net expects to lose."""
    line = timeline([zone(flaps(seed + i, 72, per_step), name=f"z{i}") for i in range(2)])
    setting = Setting(
        work_h=12.0 * share,
        deadline_h=12.0,
        restart_delay_h=0.2,
        checkpoint="periodic",
        ckpt_interval_h=interval_h,
        ckpt_cost_h=cost_h,
        grace_h=grace_h,
    )
    assert not replay(Adaptive(), setting.job(line), line, 0).is_missed


def test_costs_less_than_the_rules_over_markets_that_flap():
    """Forty markets; a rule can win in one of them."""

    def usd(policy):
        total = 0.0
        for seed in range(40):
            line = timeline([zone(flaps(seed, 144, 0.05))])
            setting = Setting(work_h=16.0, deadline_h=24.0, restart_delay_h=0.1)
            total += replay(policy(), setting.job(line), line, 0).usd
        return total

    assert usd(Adaptive) < 0.98 * min(usd(Greedy), usd(UniformProgress))


@pytest.mark.parametrize("grace_h", [pytest.param(0.0, id="work is lost"), pytest.param(0.1, id="warned")])
def test_costs_less_than_the_rules_where_checkpoints_take_time(grace_h):
    """Checkpoints eat slack, and so does work that is lost: both are part of the plan."""

    def usd(policy):
        total = 0.0
        for seed in range(40):
            line = timeline([zone(flaps(seed, 144, 0.03))])
            setting = Setting(
                work_h=14.0,
                deadline_h=24.0,
                restart_delay_h=0.1,
                checkpoint="periodic",
                ckpt_interval_h=0.25,
                ckpt_cost_h=0.02,
                grace_h=grace_h,
            )
            total += replay(policy(), setting.job(line), line, 0).usd
        return total

    assert usd(Adaptive) < 0.99 * min(usd(Greedy), usd(UniformProgress))


def test_does_not_wait_for_a_market_that_is_there():
    """Nothing is gained by starting later, with or without checkpoints."""
    job = replace(JOB, checkpoint="periodic", ckpt_interval_h=0.25, ckpt_cost_h=0.02)
    assert ("spot", 0) == answer(job, zone_available=[True, True])


class Interrupted:
    """Adaptive that is stored as JSON and restored into a new object before every step."""

    def reset(self, job):
        self._job, self._stored = job, None

    def step(self, obs):
        policy = Adaptive()
        policy.reset(self._job)
        if self._stored is not None:
            policy.restore(json.loads(self._stored))
        result = policy.step(obs)
        self._stored = json.dumps(policy.state(), allow_nan=False)
        return result


class Compared:
    """Both, asked the same at steps of uneven length."""

    def reset(self, job):
        self.plain, self.interrupted = Adaptive(), Interrupted()
        self.plain.reset(job)
        self.interrupted.reset(job)
        self.answers = []

    def step(self, obs):
        late = 0.01 * (obs.step % 3)
        seen = replace(obs, t_h=obs.t_h + late, time_left_h=obs.time_left_h - late)
        self.answers.append((self.plain.step(seen), self.interrupted.step(seen)))
        return self.answers[-1][0]


@pytest.mark.parametrize("checkpoint", ["instant", "periodic"])
def test_answers_the_same_after_a_restore_at_uneven_steps(checkpoint):
    """The state is all there is to know."""
    line = timeline([zone(flaps(i, 144, 0.1), name=f"z{i}") for i in range(3)])
    setting = Setting(
        work_h=18.0,
        deadline_h=24.0,
        restart_delay_h=0.1,
        checkpoint=checkpoint,
        ckpt_interval_h=0.5,
        ckpt_cost_h=0.05,
    )
    both = Compared()
    replay(both, setting.job(line), line, 0)
    assert len(both.answers) > 50
    assert [] == [pair for pair in both.answers if pair[0] != pair[1]]


def test_the_net_looks_as_far_ahead_as_the_longest_gap_it_has_met():
    """Who was away for two hours may be again."""
    values = {"work_left_h": 8.1, "time_left_h": 10.0, "zone_price": [0.1, 0.1]}
    assert "none" == answer(**values)
    policy = Adaptive()
    policy.reset(JOB)
    policy.step(sight())
    assert "on_demand" == policy.step(sight(t_h=2.0, **values))


def test_a_spell_ages_and_begins_anew():
    """Stages begin at one and four hours; a spell met on the way counts as old."""
    spells = Spells()
    phases = []
    for is_up, hours in [(True, 0.0), (False, 1.0), (False, 0.9), (False, 0.2), (False, 3.0), (True, 0.5)]:
        spells.see(is_up, hours)
        phases.append(spells.phase)
    assert [STAGES - 1, STAGES, STAGES, STAGES + 1, STAGES + 2, 0] == phases


def test_many_ends_make_a_high_factor_likely_and_long_silence_a_low_one():
    """The likelihood is that of a Poisson count."""
    restless, calm = Spells(), Spells()
    for step in range(200):
        restless.see(step % 2 == 0, 0.25)
        calm.see(True, 0.25)
    assert 2 == restless.factors(UP).argmax() == restless.factors(DOWN).argmax()
    low, _, high = calm.factors(UP)
    assert low > FACTOR_PRIOR[0]
    assert high < FACTOR_PRIOR[2] / 4
    assert pytest.approx(FACTOR_PRIOR) == list(calm.factors(DOWN))


def test_what_is_not_seen_teaches_nothing():
    """An unknown zone stays as it was, and older by the time that passed when it is seen again."""
    seen = Spells()
    for is_up, hours in [(False, 0.0), (True, 1.0), (None, 2.0), (None, 1.5), (True, 1.0)]:
        seen.see(is_up, hours)
    assert 4.5 == seen.age_h
    assert seen == Spells.of(json.loads(json.dumps(seen.record())))


TERMS = Terms(
    deadline_h=12.0,
    step_h=0.25,
    delay_h=0.1,
    interval_h=0.0,
    save_h=0.0,
    is_warned=True,
    has_zones=True,
)


def test_the_table_rises_with_work_price_and_lost_slack():
    """Costs lie between those of spot alone and of on-demand alone."""
    table = Outlook(TERMS)
    costs = table.cost(NONE, 10.0, 3.0)
    work_h = 10.0 - 3.0 - 0.1
    assert (costs <= work_h + 0.1 + 1e-4).all()
    assert (costs[:, 0] >= 0.1 * work_h - 1e-4).all()
    assert (costs[:, 1:] >= costs[:, :-1] - 1e-4).all()
    assert (table.cost(SPOT, 10.0, 3.0)[:STAGES] <= costs[:STAGES] + 1e-4).all()
    assert (table.cost(NONE, 10.0, 1.0) >= costs - 1e-4).all()


def test_the_table_says_nothing_where_the_deadline_is_at_stake():
    """No slack is not a cost."""
    table = Outlook(TERMS)
    assert table.cost(NONE, 10.0, -0.01) is None
    assert pytest.approx(10.0, abs=1e-4) == float(table.cost(ON_DEMAND, 10.0, 0.0)[STAGES + 2].max())


def test_spot_that_loses_work_is_worth_less():
    """Checkpoints take time, a preemption without notice takes work."""

    def cost(**terms):
        return float(Outlook(replace(TERMS, **terms)).cost(SPOT, 10.0, 3.0)[1].mean())

    instant = cost()
    warned = cost(interval_h=0.5, save_h=0.05)
    unwarned = cost(interval_h=0.5, save_h=0.05, is_warned=False)
    assert instant < warned < unwarned
    assert not isnan(unwarned)


ONE = replace(JOB, work_h=2.0, deadline_h=4.0, restart_delay_h=0.1, step_h=0.1, zones=("a",))


def test_a_late_look_does_not_make_it_leave_a_node_that_is_in_time():
    """0.25 h of work in 0.3 h: on demand it is done in time, a launch of 0.1 h would be late."""
    policy = Adaptive()
    policy.reset(ONE)
    for t_h, left_h, state in ((0.0, 2.0, "none"), (0.6, 1.5, "spot"), (0.7, 0.25, "on_demand")):
        time_left_h = 0.3 if state == "on_demand" else 4.0 - t_h
        said = policy.step(
            sight(
                t_h=t_h, time_left_h=time_left_h, work_left_h=left_h, state=state,
                zone=0 if state == "spot" else -1, zone_available=[True], zone_price=[0.5],
            )
        )  # fmt: skip
    assert "on_demand" == said


@pytest.mark.parametrize("left_h", [0.08, 0.09])
def test_the_last_moments_on_demand_are_not_thrown_away_for_spot(left_h):
    """0.07 h of work, a launch of 0.02 h: only where both fit may spot end the job."""
    job = replace(ONE, restart_delay_h=0.02)
    said = answer(
        job, t_h=4.0 - left_h, time_left_h=left_h, work_left_h=0.07, state="on_demand",
        zone_available=[True], zone_price=[0.5],
    )  # fmt: skip
    assert ("on_demand" if left_h == 0.08 else ("spot", 0)) == said


@pytest.mark.parametrize("step_s", [600, 1800, 3600])
@pytest.mark.parametrize("interval_h", [0.1, 0.5])
def test_checkpoints_that_are_still_to_be_written_are_counted_before_the_end(step_s, interval_h):
    """Spot is always there and every interval costs a fifth of itself: no deadline that on-demand keeps is missed."""
    line = timeline([zone([True] * 200, step_s=step_s)])
    missed = []
    for work_h in (1.0, 2.0, 8.0):
        for more in (1.02, 1.1, 1.25, 1.5):
            setting = Setting(
                work_h=work_h, deadline_h=work_h * more, restart_delay_h=0.0, checkpoint="periodic",
                ckpt_interval_h=interval_h, ckpt_cost_h=interval_h / 5,
            )  # fmt: skip
            if replay(Adaptive(), setting.job(line), line, 0).is_missed:
                missed.append((work_h, more))
    assert [] == missed


def test_a_node_that_is_held_proves_its_zone():
    """A broker knows a zone when it is polled or tried; the one it runs in is there."""
    said = answer(state="spot", zone=0, zone_available=[None, None], zone_price=[1.0, nan], work_left_h=5.0)
    assert ("spot", 0) == said
