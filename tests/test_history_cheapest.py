"""The cheapest offer over time: the least price at each second, and how now stands against the past."""

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.prices.cheapest import Priced, Step, rhythm, standing, steps
from gpubroker.prices.rows import DAY_S, HOUR_S

spans = st.lists(
    st.builds(
        lambda usd, at, s: Priced(usd, at, at + s), st.integers(1, 5), st.integers(0, 60), st.integers(0, 40)
    ),
    max_size=8,
)


@given(found=spans, begin=st.integers(0, 30), length=st.integers(1, 60))
def test_each_second_has_the_least_price_of_what_is_there(found, begin, length):
    """And a step is there only where it changes."""
    end = begin + length
    made = steps(found, begin, end)
    for at in range(begin, end):
        there = [one.usd_micros for one in found if one.first_at <= at < one.until_at]
        assert min(there, default=None) == [step.usd_micros for step in made if step.at <= at][-1]
    assert begin == made[0].at
    assert all(a.at < b.at and a.usd_micros != b.usd_micros for a, b in pairwise(made))


MIDNIGHT = int(datetime(2026, 11, 23, tzinfo=UTC).timestamp())  # a Monday


def days(*prices):
    """One price a day, the last one until MIDNIGHT."""
    begin = MIDNIGHT - len(prices) * DAY_S
    return [Step(begin + day * DAY_S, usd) for day, usd in enumerate(prices)]


@pytest.mark.parametrize(
    ("prices", "usd", "share", "median"),
    [
        pytest.param((2, 4, 2, 4, 2, 4, 3), 3, 3.5 / 7, 3, id="in the middle"),
        pytest.param((2, 4, 2, 4, 2, 4, 3), 1, 0, 3, id="never so cheap"),
        pytest.param((2, 4, 2, 4, 2, 4, 3), 5, 1, 3, id="never so dear"),
        pytest.param((None, None, None, 4, None, 2, 2), 2, 1 / 3, 2, id="days without an offer do not count"),
    ],
)
def test_now_stands_against_the_time_before(prices, usd, share, median):
    """By time, not by the number of changes."""
    found = standing(days(*prices), usd, 7, MIDNIGHT)
    assert (pytest.approx(share), median) == (found.cheaper_share, found.median_usd_micros)
    assert found.between[0] <= found.cheaper_share <= found.between[1]
    assert sum(one is not None for one in prices) == found.seen_days


def test_more_days_make_surer():
    """Of the same prices."""
    few, many = (standing(days(*([2, 4] * n)), 3, 2 * n, MIDNIGHT).between for n in (3, 45))
    assert many[1] - many[0] < few[1] - few[0]


def test_what_was_never_there_stands_against_nothing():
    """No figure is made up."""
    assert None is standing(days(None, None), 3, 7, MIDNIGHT)


def test_hours_and_days_of_the_week_have_their_price():
    """Nights at $1 and the rest at $3, but for Sundays at $6."""
    made = []
    for hour in range(28 * 24):
        at = MIDNIGHT + hour * HOUR_S
        moment = datetime.fromtimestamp(at, UTC)
        made.append(Step(at, 6 if moment.weekday() == 6 else 1 if moment.hour < 6 else 3))
    found = rhythm(made, MIDNIGHT, MIDNIGHT + 28 * DAY_S)
    mean = (6 * (6 * 1 + 18 * 3) + 24 * 6) / (7 * 24)
    assert found.by_weekday == pytest.approx((*[2.5 / mean] * 6, 6 / mean))
    assert found.by_hour == pytest.approx((*[(6 * 1 + 6) / 7 / mean] * 6, *[(6 * 3 + 6) / 7 / mean] * 18))
