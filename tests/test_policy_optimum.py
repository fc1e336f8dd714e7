"""The exact optimum: held against every plan there is, in small worlds."""

from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.policy.optimum import optimum_usd
from gpubroker.policy.replay import Setting, steps_of
from gpubroker.policy.traces import timeline
from tests.support import EXAMPLES_FACTOR
from tests.traces import line, trace


def best_of_all(job, world):
    """The least cost over every plan, by living through all of them; None where none is in time.

    (place, delay left, work left) -> least $ so far, step by step: nothing is left out but what is alike.
    """
    delay_h, best = job.restart_delay_h, None
    alive = {(None, 0.0, job.work_h): 0.0}
    for step in range(steps_of(job.deadline_h, world.step_s)):
        span_h = min(world.step_h, job.deadline_h - step * world.step_h)
        offers = {"on_demand": world.on_demand_usd_per_hour} | {
            z: world.price[step][z] for z, is_there in enumerate(world.available[step]) if is_there
        }
        before, alive = alive, {}
        for ((place, waits_h, left_h), usd), to in product(before.items(), (None, *offers)):
            after_wait_h = 0.0 if to is None else waits_h if to == place else delay_h
            worked_h = 0.0 if to is None else max(0.0, span_h - after_wait_h)
            if to is not None and left_h <= worked_h + 1e-8:  # keys are rounded
                done = usd + (after_wait_h + left_h) * offers[to]
                best = done if best is None else min(best, done)
                continue
            paid = usd + span_h * offers.get(to, 0.0)
            key = (to, round(max(0.0, after_wait_h - span_h), 9), round(left_h - worked_h, 9))
            alive[key] = min(paid, alive.get(key, inf))
    return best


def worlds(zones, steps):
    prices = st.lists(st.sampled_from((1.0, 1.0, 1.3, 2.0, 4.0)), min_size=steps, max_size=steps)
    zone = st.tuples(st.text("01", min_size=steps, max_size=steps), prices)
    return st.builds(
        lambda rows, step_s: timeline(
            [trace(p, prices=c, zone=f"z{n}", step_s=step_s) for n, (p, c) in enumerate(rows)]
        ),
        st.lists(zone, min_size=zones, max_size=zones),
        st.sampled_from((600, 900, 3600)),
    )


SHARES = st.sampled_from((0.1, 0.35, 0.5, 0.61, 0.8, 0.95, 1.0))
DELAYS = st.sampled_from((0.0, 0.07, 0.3, 0.5, 1.0, 1.4))  # steps
CUTS = st.sampled_from((0.0, 0.0, 0.4))  # steps


def check(world, share, delay, cut):
    """Delay and cut are in steps."""
    deadline_h = (len(world) - cut) * world.step_h
    setting = Setting(work_h=share * deadline_h, deadline_h=deadline_h, restart_delay_h=delay * world.step_h)
    job = setting.job(world)
    best, found = best_of_all(job, world), optimum_usd(job, world, 0)
    assert (best is None) == (found is None)
    assert best is None or pytest.approx(best, rel=1e-8, abs=1e-8) == found


@settings(max_examples=100 * EXAMPLES_FACTOR)
@given(world=worlds(1, 12), share=SHARES, delay=DELAYS, cut=CUTS)
def test_one_zone_costs_what_the_best_of_every_plan_costs(world, share, delay, cut):
    """3^12 plans each."""
    check(world, share, delay, cut)


@settings(max_examples=100 * EXAMPLES_FACTOR)
@given(world=worlds(2, 8), share=SHARES, delay=DELAYS, cut=CUTS)
def test_two_zones_cost_what_the_best_of_every_plan_costs(world, share, delay, cut):
    """4^8 plans each."""
    check(world, share, delay, cut)


@settings(max_examples=50 * EXAMPLES_FACTOR)
@given(
    patterns=st.lists(
        st.sampled_from(("1" * 14, "11111110000000", "00001111111111", "11110011101111", "00011111000110")),
        min_size=1,
        max_size=1,
    ),
    price=st.sampled_from((1.0, 2.9, 3.0, 3.5)),
    share=SHARES,
    delay=DELAYS,
)
def test_long_stretches_at_one_price_cost_what_the_best_of_every_plan_costs(patterns, price, share, delay):
    """Where a change of place could come sooner or later."""
    check(line(*patterns, price=price, step_s=600), share, delay, 0.0)


def test_a_job_that_no_plan_finishes_in_time_has_no_optimum():
    """Three hours of work and a launch do not fit into three hours."""
    world = line("111")
    assert optimum_usd(Setting(work_h=3, deadline_h=3, restart_delay_h=0.1).job(world), world, 0) is None


def test_free_spot_costs_nothing():
    """A price of zero is a price."""
    world = line("111", price=0.0)
    assert 0.0 == optimum_usd(Setting(work_h=2, deadline_h=3, restart_delay_h=0.1).job(world), world, 0)
