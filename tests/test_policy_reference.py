"""Replay and optimum against the published runs on the public traces, run by run."""

import csv
import gzip

import pytest

from gpubroker.policy.backtest import Case, policy_class, run_cases
from gpubroker.policy.replay import Setting
from gpubroker.policy.traces import groups, read_traces, timeline
from tests.support import EXAMPLES_FACTOR, SHARED

TRACES = SHARED / "traces"
pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason="the public spot traces are not here")
POLICIES = ("on_demand", "greedy", "uniform_progress", "od_fallback")


def lines(mode):
    traces = read_traces([TRACES])
    return groups(traces) if mode == "multi" else [timeline([trace]) for trace in traces]


def published(mode):
    """By setting: the row of each policy."""
    found = {}
    with gzip.open(TRACES / f"reference_runs_{mode}.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in list(row)[:5])
            found.setdefault(key, {})[row["policy"]] = row
    return found


def case_of(key, worlds):
    name, deadline_h, share, restart_h, start = key
    index = next(i for i, world in enumerate(worlds) if world.name == name)
    setting = Setting(
        work_h=float(share) * float(deadline_h),
        deadline_h=float(deadline_h),
        restart_delay_h=float(restart_h),
    )
    return Case(line=index, start=int(start), work_over_deadline=float(share), setting=setting)


def figures(row):
    return {
        "cost_over_on_demand": row.over_on_demand,
        "offline_optimum_over_on_demand": row.optimum_over_on_demand,
        "missed": float(row.run.is_missed),
        "preemptions": row.run.preemptions,
        "launches": row.run.launches,
        "on_demand_h": row.run.on_demand_h,
        "spot_h": row.run.spot_h,
    }


@pytest.mark.parametrize(("mode", "count"), [("single", 1200), ("multi", 300)])
def test_every_published_run_is_met_to_a_millionth(mode, count, monkeypatch):
    """Cost, misses, preemptions, launches and hours of every run; the optimum of every twentieth setting.

    Every setting's optimum takes minutes: asked for with GPUBROKER_TEST_EXAMPLES.
    """
    worlds, expected = lines(mode), published(mode)
    assert count == len(expected)
    for number, (key, rows) in enumerate(expected.items()):
        case = case_of(key, worlds)
        if number % 20 and EXAMPLES_FACTOR == 1:
            monkeypatch.setattr("gpubroker.policy.optimum.optimum_usd", lambda *_: None)
        else:
            monkeypatch.undo()
        for found in run_cases(worlds, [case], POLICIES):
            row = rows[found.policy]
            wanted = {name: float(row[name]) for name in figures(found)}
            got = figures(found)
            if got["offline_optimum_over_on_demand"] is None:
                del got["offline_optimum_over_on_demand"], wanted["offline_optimum_over_on_demand"]
            assert wanted == pytest.approx(got, abs=1e-6), (key, found.policy)


def test_every_named_policy_but_ours_is_among_the_published():
    """So that a new rule comes with runs to compare with."""
    assert all(callable(policy_class(name)) for name in POLICIES)
