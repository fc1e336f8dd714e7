"""When GPUs that do nothing are told of, and when they end their job."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.jobspec import JobSpec
from gpubroker.run.waste import End, Told, judge
from tests.support import NOW

LEAST = {"gpu": {"name": "h100"}, "work": {"hours": 8}}
TELL = JobSpec.model_validate(LEAST)
END = JobSpec.model_validate({**LEAST, "waste": {"after": "20m", "then": "end"}})


def state(idle_s, **more):
    """As an agent tells it."""
    return {"state": "running", "agent": True, "gpu_idle_s": idle_s, **more}


def test_gpus_that_do_nothing_for_twenty_minutes_are_told_of():
    """Which is what a job allows that says nothing; a minute less is nothing to talk about."""
    text = "no GPU of its node has done anything for 21 minutes"
    assert [None, Told(text=text)] == [judge(state(s), TELL, NOW, None) for s in (1199.9, 1290)]


def test_a_job_that_says_so_is_ended_for_it():
    """At every look, until it is over."""
    reason = "no GPU of its node has done anything for 20 minutes, and waste.then is end"
    assert [End(reason=reason)] * 2 == [judge(state(1200), END, NOW, told) for told in (None, NOW)]


@pytest.mark.parametrize(
    ("told_s_ago", "is_told"),
    [
        pytest.param(None, True, id="never"),
        pytest.param(60, False, id="since they began to do nothing"),
        pytest.param(3000, True, id="before, and they have worked since"),
    ],
)
def test_a_person_hears_of_it_once(told_s_ago, is_told):
    """Until the GPUs have worked in between."""
    told = None if told_s_ago is None else NOW - timedelta(seconds=told_s_ago)
    assert is_told == isinstance(judge(state(1500), TELL, NOW, told), Told)


def test_a_long_restore_is_told_of_and_ends_no_job():
    """Its command has not begun, so it wastes nothing."""
    text = "no GPU of its node has done anything for 25 minutes: the checkpoint is still being restored"
    assert Told(text=text) == judge(state(1500, state="restoring"), END, NOW, None)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(None, id="nothing was started there"),
        pytest.param({}, id="it says nothing"),
        pytest.param(state(None), id="nobody knows"),
        pytest.param(state("9999"), id="text"),
        pytest.param(state(True), id="a truth"),
        pytest.param(state(-9999), id="negative"),
        pytest.param(state(float("nan")), id="NaN"),
        pytest.param(state(float("inf")), id="for ever"),
        pytest.param(state(1e300), id="since before the universe"),
        pytest.param(state(10**400), id="beyond a float"),
        pytest.param(state([9999]), id="a list"),
        pytest.param(state(9999, agent=False), id="its agent is gone"),
        pytest.param(state(9999, state="finishing"), id="its last checkpoint is on its way"),
        pytest.param(state(9999, state="saving"), id="it is about to end"),
        pytest.param(state(9999, state="done"), id="it is over"),
        pytest.param(state(9999, state=["running"]), id="a state that is none"),
    ],
)
def test_what_makes_no_sense_or_is_over_says_nothing(found):
    """A node may say anything."""
    assert None is judge(found, END, NOW, None)


@given(
    st.dictionaries(
        st.sampled_from(("state", "agent", "gpu_idle_s")),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(),
            st.just("running"),
            st.lists(st.none()),
        ),
    )
)
def test_no_state_breaks_the_judge(found):
    """And nothing short of the job's own limit is waste."""
    verdict = judge(found, END, NOW, None)
    assert verdict is None or found["gpu_idle_s"] >= 1200
