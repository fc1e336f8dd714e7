"""Backtesting greedy, against a bare loop that looks at each step of the same runs once.

The aim is 100,000 runs on two cores within 60 s: 1.2 ms a run and core. The bare loop takes about 12 us for
a run of the public grid (288 to 840 steps) on a core of 2023, so that the aim is a ratio of 100 there; a
third of it is the limit, for cores a third as fast. Runs are independent: two cores do twice as many.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harness import Result, pairs, result
from gpubroker.policy.backtest import Case, Grid, draw, run_cases
from gpubroker.policy.replay import steps_of
from gpubroker.policy.traces import Timeline, Trace, timeline

AIM_RUNS = 100_000
LIMIT = 35.0
STEP_S = 300
# Hours: between those of the public traces, which change every 1.6 h on average.
MEAN_UP_H, MEAN_DOWN_H = 1.8, 1.4


def backtest_greedy(quick: bool) -> Result:
    """figure: s for the runs of the grid on one core, made-up traces; seconds_aim: 100,000 on two."""
    lines = [timeline([_trace(seed)]) for seed in range(4)]
    grid = Grid(
        works_over_deadline=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        deadlines_h=(24.0, 48.0, 70.0),
        restarts_h=(0.02, 0.1, 0.2),
        starts=4,
    )
    cases = [replace(case, wants_optimum=False) for case in draw(lines, grid)]
    timed = pairs(lambda: _greedy_s(lines, cases), lambda: _bare_s(lines, cases), 5 if quick else 15)
    made = result("backtest-greedy", timed, LIMIT, runs=len(cases))
    seconds = made.figure * AIM_RUNS / len(cases) / 2
    return replace(made, detail={**made.detail, "seconds_aim": round(seconds, 1)})


def _trace(seed: int) -> Trace:
    luck = random.Random(seed)
    available: list[bool] = []
    while len(available) < 540 * 3600 // STEP_S:
        for is_up, mean_h in ((True, MEAN_UP_H), (False, MEAN_DOWN_H)):
            available += [is_up] * max(1, round(luck.expovariate(1 / mean_h) * 3600 / STEP_S))
    return Trace(
        name=f"made-up-{seed}",
        group="made-up",
        zone=str(seed),
        step_s=STEP_S,
        on_demand_usd_per_hour=3.06,
        available=tuple(available),
        spot_usd_per_hour=(0.97,) * len(available),
    )


def _greedy_s(lines: Sequence[Timeline], cases: Sequence[Case]) -> float:
    began = time.perf_counter()
    run_cases(lines, cases, ["greedy"])
    return time.perf_counter() - began


def _bare_s(lines: Sequence[Timeline], cases: Sequence[Case]) -> float:
    began = time.perf_counter()
    for case in cases:
        line = lines[case.line]
        up = 0
        for there in line.available[case.start : case.start + steps_of(case.setting.deadline_h, line.step_s)]:
            if there[0]:
                up += 1
    return time.perf_counter() - began
