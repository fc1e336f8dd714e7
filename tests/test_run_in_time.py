"""A deadline decides whether a job may still go onto a node that can be taken away."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.plan.course import Course
from gpubroker.run.in_time import has_slack, saved_h
from tests.support import NOW
from tests.test_run_decide import ATTEMPT

H = Decimal
HOURS = st.decimals("0", "1000", places=3)
COURSE = Course(useful_h=H(8), start_h=H("0.1"), pauses_h=H("0.2"), interval_h=H("0.5"))


@pytest.mark.parametrize(
    ("left_h", "saved", "expected"),
    [
        pytest.param("9", "0", True, id="one node may be lost before it saves"),
        pytest.param("8.9", "0", True, id="exactly so much"),
        pytest.param("8.89", "0", False, id="a minute less"),
        pytest.param("5", "4", True, id="half of it is saved"),
        pytest.param("0.5", "8", False, id="the deadline is here"),
        pytest.param("-1", "0", False, id="it has passed"),
    ],
)
def test_spot_is_for_as_long_as_there_is_slack(left_h, saved, expected):
    """A start and an interval wasted, a start again, then all that is left."""
    assert expected == has_slack(COURSE, H(saved), H(left_h))


def test_a_job_that_saves_nothing_must_be_able_to_begin_again():
    """All of its work may be lost with the node."""
    course = replace(COURSE, interval_h=None, pauses_h=H(0))
    assert [False, True] == [has_slack(course, H(0), H(h)) for h in (16, 17)]


@given(HOURS, HOURS, HOURS, HOURS)
def test_more_time_and_more_saved_work_never_take_slack_away(useful, left, saved, more):
    """Monotone in both."""
    course = replace(COURSE, useful_h=useful)
    if has_slack(course, saved, left):
        assert has_slack(course, saved, left + more)
        assert has_slack(course, saved + more, left)


def test_what_nodes_ran_less_what_they_lost_and_their_starts_is_saved():
    """One that nobody watched, or that never ran, has saved nothing for sure."""
    ran = replace(ATTEMPT, running_at=NOW, ended_at=NOW + timedelta(hours=3), work_lost_s=1800)
    unknown = replace(ATTEMPT, running_at=NOW, ended_at=NOW + timedelta(hours=3), work_lost_s=None)
    never = replace(ATTEMPT, running_at=None, ended_at=NOW, work_lost_s=0)
    short = replace(ATTEMPT, running_at=NOW, ended_at=NOW + timedelta(minutes=2), work_lost_s=0)
    assert H("2.4") == saved_h([ran, unknown, never, short], H("0.1"), NOW)
