"""`gpubroker run` is killed at every write, every request and every command: what was there goes on or is ended.

The points are found by a run that nobody kills (tests/killing.py). The gate takes a few of them at one vendor,
.ci/soak all of them at every vendor.
"""

from signal import SIGKILL

import pytest

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from tests.run_room import ASKED
from tests.support import EXAMPLES_FACTOR

IS_SOAK = EXAMPLES_FACTOR >= 10
IN_GATE = 6  # points of a vendor


def go_on(user):
    """As a person would after a crash: resume the job, begin where there is none, leave what is over."""
    if user.is_over():
        return 0
    words = user.resume_words() if user.jobs() else user.run_words()
    return user.do(*words)


@pytest.mark.parametrize("vendor", ASKED)
def test_a_run_that_is_killed_anywhere_goes_on_and_leaves_nothing(room, vendor):
    """One job, one result, one node at a time, nothing that bills, and a row for every node there was."""
    if vendor != "vast" and not IS_SOAK:
        pytest.skip("only in .ci/soak")
    whole = room.user(vendor)
    assert (0, []) == (whole.do(*whole.run_words()), whole.flaws()), whole.text("err", 0)
    points = whole_points(whole)
    numbers = range(1, len(points) + 1) if IS_SOAK else spread(len(points), IN_GATE)
    assert [] == [flaw for number in numbers for flaw in killed_at(room, vendor, number)]


def whole_points(user):
    return user.text("trace", 0).splitlines()


def spread(count, wanted):
    """So many numbers from 1 to `count`, far apart."""
    return [1 + at * (count - 1) // (wanted - 1) for at in range(wanted)]


def killed_at(room, vendor, number):
    """What is wrong after a kill at this point and one more try."""
    user = room.user(vendor)
    code = user.do(*user.run_words(), strikes=[(number, 0, SIGKILL)])
    reached = whole_points(user)
    name = f"{number} {reached[-1] if reached else 'nothing'}"
    if code not in (-SIGKILL, 0):
        return [f"{name}: ended with {code}: {user.text('err')}"]
    again = go_on(user)
    said = user.text("err")
    flaws = user.flaws()
    if again or flaws:
        return [f"{name}: {again} {flaws}: {said}"]
    return []
