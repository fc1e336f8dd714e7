"""What to do about a job's node, case by case."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.provider import NodeView
from gpubroker.run.decide import AskToStop, Finish, Goal, Observed, Prepare, Replace, Revive, Wait, decide
from gpubroker.run.records import Attempt
from tests.support import NOW

ATTEMPT = Attempt(
    id=1, job_id="job", epoch=1, tag="gpubroker-a-1", provider="vast", sku="RTX 4090", gpu="RTX4090",
    form_factor="PCIe", vram_gib=24, gpu_count=1, market="spot", region="US", zone="", machine_id="7",
    usd_per_hour=Decimal(1), held_usd_per_hour=Decimal(0), bid_usd_per_hour=Decimal(1), billing_increment_s=1,
    minimum_s=0, intended_at=NOW - timedelta(minutes=2), node_id="n1", running_at=NOW - timedelta(minutes=1),
    stopped_at=None, ended_at=None, end_reason="", end_kind="", usd_estimated=None, usd_settled=None, work_lost_s=None,
)  # fmt: skip
RUNNING = NodeView(id="n1", tag=ATTEMPT.tag, status="running")
SEEN = Observed(
    is_listed=True,
    node=RUNNING,
    is_reached=True,
    state={"state": "running", "result": None},
    unreached_s=0,
)


def result(outcome, reason="exit code 0"):
    return {"state": outcome, "result": {"outcome": outcome, "reason": reason}}


OLD = NOW - timedelta(hours=2)


@pytest.mark.parametrize(
    ("attempt", "seen", "action"),
    [
        pytest.param({}, {}, Wait(why="running"), id="runs"),
        pytest.param({}, {"state": None}, Prepare(), id="idle node"),
        pytest.param({}, {"state": {"state": "unknown", "agent": False, "result": None}}, Prepare(), id="a start that was cut off"),
        pytest.param({}, {"state": {"state": "unknown", "agent": True, "result": None}}, Wait(why="running"), id="an agent that has just begun"),
        pytest.param({}, {"state": {"state": "running", "agent": False, "result": None}}, Revive(), id="its agent is gone"),
        pytest.param({}, {"state": {**result("done"), "agent": False}}, Finish(state="done", reason="exit code 0"), id="its agent has gone after the end"),
        pytest.param({}, {"state": result("done")}, Finish(state="done", reason="exit code 0"), id="done"),
        pytest.param({}, {"state": result("failed", "exit code 1")}, Finish(state="failed", reason="exit code 1"), id="failed"),
        pytest.param({}, {"state": result("retry", "exit code 75")}, Replace(reason="retry: exit code 75", kind="crashed"), id="asks for another try"),
        pytest.param({}, {"state": result("lease_ended", "its time is over")}, Replace(reason="lease ended: its time is over"), id="lease"),
        pytest.param({}, {"is_listed": False, "node": None, "is_reached": False, "state": None}, Wait(why="the vendor does not answer"), id="silent vendor"),
        pytest.param({}, {"is_listed": False, "node": None, "state": result("done")}, Finish(state="done", reason="exit code 0"), id="done and a silent vendor"),
        pytest.param({"running_at": None}, {"node": None, "is_reached": False, "state": None}, Wait(why="not yet in the vendor's list"), id="list lags"),
        pytest.param({"running_at": None, "intended_at": OLD}, {"node": None, "is_reached": False, "state": None}, Replace(reason="gone", kind="lost"), id="never came"),
        pytest.param({}, {"node": None, "is_reached": False, "state": None}, Replace(reason="gone", kind="lost"), id="ran and is gone"),
        pytest.param({}, {"node": replace(RUNNING, status="gone", reason="reclaimed", is_preempted=True), "is_reached": False, "state": None}, Replace(reason="preempted: reclaimed", kind="preempted"), id="reclaimed"),
        pytest.param({}, {"node": replace(RUNNING, status="stopped", reason="outbid"), "is_reached": False, "state": None}, Replace(reason="preempted: outbid", kind="lost"), id="outbid"),
        pytest.param({"running_at": None}, {"node": replace(RUNNING, status="starting"), "is_reached": False, "state": None}, Wait(why="starting"), id="starts"),
        pytest.param({"running_at": None, "intended_at": OLD}, {"node": replace(RUNNING, status="starting", reason="loading"), "is_reached": False, "state": None}, Replace(reason="did not start in time: loading", fault="no-start", kind="rejected"), id="starts for ever"),
        pytest.param({}, {"is_reached": False, "state": None}, Wait(why="not reached"), id="unreachable for a moment"),
        pytest.param({}, {"is_reached": False, "state": None, "unreached_s": 7200}, Replace(reason="cannot be reached, though its vendor says that it runs", fault="not-reached", kind="rejected"), id="unreachable for long"),
    ],
)  # fmt: skip
def test_each_case_has_its_action(attempt, seen, action):
    """A lost connection alone kills nothing; what the agent says of the end counts before all else."""
    assert action == decide(replace(ATTEMPT, **attempt), replace(SEEN, **seen), NOW)


GOAL = Goal(state="cancelled", why="by hand", since=NOW - timedelta(minutes=1))
OVER = Finish(state="cancelled", reason="by hand")
AT_WORK = {"state": "running", "result": None, "pid": 7, "agent": True}


@pytest.mark.parametrize(
    ("goal", "seen", "action"),
    [
        pytest.param({}, {"state": AT_WORK}, AskToStop(), id="it is at work"),
        pytest.param({}, {"state": None}, OVER, id="nothing was begun"),
        pytest.param({}, {"state": {**AT_WORK, "agent": False}}, OVER, id="nobody can ask it"),
        pytest.param({}, {"state": result("stopped")}, OVER, id="it has saved and ended"),
        pytest.param({}, {"state": result("done")}, Finish(state="done", reason="exit code 0"), id="it was done before it heard"),
        pytest.param({}, {"node": replace(RUNNING, status="gone")}, OVER, id="its node is gone"),
        pytest.param({}, {"node": None, "is_reached": False, "state": None}, OVER, id="its node is listed no more"),
        pytest.param({}, {"node": replace(RUNNING, status="starting"), "is_reached": False, "state": None}, OVER, id="its node starts"),
        pytest.param({}, {"is_reached": False, "state": None}, Wait(why="not reached, and to be asked to save"), id="not reached for a moment"),
        pytest.param({"since": OLD}, {"is_reached": False, "state": None}, OVER, id="not reached for long"),
        pytest.param({"since": OLD}, {"state": AT_WORK}, OVER, id="it saves for ever"),
        pytest.param({}, {"is_listed": False, "node": None, "is_reached": False, "state": None}, Wait(why="the vendor does not answer"), id="silent vendor"),
    ],
)  # fmt: skip
def test_a_job_that_is_to_end_is_given_time_to_save(goal, seen, action):
    """Unless nothing was begun, or nobody can ask it; and never for longer than ten minutes."""
    assert action == decide(ATTEMPT, replace(SEEN, **seen), NOW, replace(GOAL, **goal))


@given(
    status=st.sampled_from(["starting", "running"]),
    minutes=st.integers(0, 9),
    is_listed=st.booleans(),
    is_reached=st.booleans(),
)
def test_a_node_that_lives_is_not_replaced_within_ten_minutes_of_its_last_word(
    status, minutes, is_listed, is_reached
):
    """Whatever else is seen."""
    seen = Observed(
        is_listed=is_listed,
        node=replace(RUNNING, status=status) if is_listed else None,
        is_reached=is_reached,
        state={"state": "running", "result": None} if is_reached else None,
        unreached_s=minutes * 60,
    )
    assert not isinstance(decide(ATTEMPT, seen, NOW), Replace)
