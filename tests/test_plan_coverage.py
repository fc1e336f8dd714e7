"""The benchmark of coverage on real traces: its replay by hand, and what it says where there are no traces."""

import math

import pytest

from benchmarks import plan_coverage as coverage
from gpubroker.plan.preempt import Interruptions
from tests.support import SHARED

INPUTS = Interruptions(hazard_per_hour=0.1, restart_h=0.25, checkpoint_h=0.05, interval_h=1.0)


def test_a_run_inside_one_spell_is_its_start_work_and_pauses():
    """0.25 + 3 h with two checkpoints of 3 minutes."""
    assert pytest.approx((3.35, 3.35)) == coverage.replay([(0.0, 10.0)], 2.0, 3.0, INPUTS)


def test_a_lost_spell_keeps_what_was_checkpointed():
    """2.5 h hold a start and two hours with their checkpoints; the last hour waits 2.5 h for the next spell."""
    billed_h, wall_h = coverage.replay([(0.0, 2.5), (5.0, 9.0)], 0.0, 3.0, INPUTS)
    assert pytest.approx((2.5 + 1.25, 5.0 + 1.25)) == (billed_h, wall_h)


def test_a_run_that_the_trace_ends_is_beyond_every_quote():
    """Infinite hours."""
    assert (math.inf, math.inf) == coverage.replay([(0.0, 2.0)], 0.0, 3.0, INPUTS)


def test_without_the_traces_it_says_so(tmp_path, monkeypatch):
    """One clear sentence, and no figure that could be taken for one."""
    monkeypatch.setattr(coverage, "TRACES", tmp_path / "none")
    result = coverage.plan_coverage(True)
    assert (0.0, True) == (result.figure, result.ok)
    assert result.detail["skipped"].startswith("there are no public traces at ")


@pytest.mark.skipif(
    not (SHARED / "traces").is_dir(), reason="the public traces (../shared/traces) are not on this machine"
)
def test_the_coverage_of_the_public_traces_is_measured():
    """14 traces, three lengths of work, ten starts each; a prior of 0.1/h left more than half above p90."""
    result = coverage.plan_coverage(True)
    assert result.detail["runs"] > 350
    shares = result.detail["prior and first half"]
    assert 0.4 < shares["bill below p50"] < shares["bill below p90"] <= 1 - shares["cut off"]
