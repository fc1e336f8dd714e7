"""How often a job whose nodes come to nothing gets another one."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.run.retrying import GiveUp, NotYet, Now, after_failures
from tests.support import NOW
from tests.test_run_decide import ATTEMPT


def ended(*kinds):
    """Attempts that ended so, the last one now."""
    return [
        replace(ATTEMPT, id=epoch, epoch=epoch, ended_at=NOW, end_kind=kind, end_reason="exit code 75")
        for epoch, kind in enumerate(kinds, 1)
    ]


@pytest.mark.parametrize(
    ("kinds", "saved_in", "wait_s"),
    [
        pytest.param((), (), 0, id="nothing yet"),
        pytest.param(("preempted",) * 50, (), 0, id="taken away again and again"),
        pytest.param(("lost", "ended", ""), (), 0, id="nobody's fault"),
        pytest.param(("crashed",), (), 0, id="crashed once"),
        pytest.param(("crashed",) * 2, (), 30, id="crashed twice"),
        pytest.param(("crashed",) * 3, (), 60, id="crashed three times"),
        pytest.param(("crashed", "preempted", "crashed"), (), 30, id="taken away in between"),
        pytest.param(("crashed",) * 3, (3,), 0, id="it came further"),
        pytest.param(("crashed",) * 4, (2,), 30, id="it came further once"),
        pytest.param(("rejected",) * 4, (), 0, id="four bad machines"),
        pytest.param(("rejected",) * 6, (), 60, id="six bad machines"),
        pytest.param(("rejected",) * 19, (), 1800, id="nineteen bad machines"),
        pytest.param(("rejected", "rejected", "crashed"), (), 0, id="each counts for itself"),
    ],
)
def test_pauses_double_while_nothing_is_saved(kinds, saved_in, wait_s):
    """At once at first; what was taken away by its vendor does not count."""
    found = after_failures(ended(*kinds), saved_in, NOW)
    assert (wait_s or None) == ((found.until - NOW).total_seconds() if isinstance(found, NotYet) else None)
    assert isinstance(after_failures(ended(*kinds), saved_in, NOW + timedelta(seconds=wait_s)), Now)


@pytest.mark.parametrize(("kind", "most"), [("crashed", 6), ("rejected", 20)])
def test_a_person_must_look_in_the_end(kind, most):
    """With how the last one ended."""
    found = after_failures(ended(*[kind] * most), (), NOW + timedelta(days=1))
    assert isinstance(found, GiveUp)
    assert f"{most} nodes in a row" in found.why
    assert "the last one: exit code 75" in found.why


@given(
    kinds=st.lists(st.sampled_from(["preempted", "lost", "rejected", "crashed", "ended", ""]), max_size=40),
    jump=st.timedeltas(timedelta(days=-400), timedelta(days=400)),
)
def test_no_pause_is_longer_than_half_an_hour_whatever_the_clock_does(kinds, jump):
    """A clock that was set back does not stop a job for a year."""
    found = after_failures(ended(*kinds), (), NOW + jump)
    assert not isinstance(found, NotYet) or found.until - (NOW + jump) <= timedelta(minutes=30)
