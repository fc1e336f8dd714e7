"""Rate limits across processes: slots are handed out one by one, and a block holds for everybody."""

import subprocess
import sys

import pytest

from gpubroker.errors import Transient
from gpubroker.prices.limits import StoreLimiter
from gpubroker.prices.store import Store
from gpubroker.provider import Limiter
from tests.support import FakeClock


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store(tmp_path, clock):
    made = Store.open(f"sqlite:///{tmp_path}/prices.db", clock)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def limiter(store, clock) -> Limiter:
    return StoreLimiter(store, clock)


def test_calls_are_spaced_by_the_interval(limiter, clock):
    """The first at once, each other a whole interval later."""
    for _ in range(3):
        limiter.wait("vast", "bundles", 1.5, 60)
    assert [1.5, 1.5] == clock.slept_s


def test_two_limiters_share_the_slots(store, clock):
    """As two processes do."""
    StoreLimiter(store, clock).wait("vast", "bundles", 2.0, 60)
    StoreLimiter(store, clock).wait("vast", "bundles", 2.0, 60)
    assert [2.0] == clock.slept_s


def test_endpoints_do_not_wait_for_each_other(limiter, clock):
    """Each has its own interval."""
    limiter.wait("vast", "bundles", 5, 60)
    limiter.wait("vast", "instances", 5, 60)
    limiter.wait("lambda", "bundles", 5, 60)
    assert [] == clock.slept_s


def test_a_slot_after_the_deadline_is_refused_and_not_taken(limiter, clock):
    """A quote has four seconds; the next caller still finds the slot."""
    limiter.wait("lambda", "launch", 12, 60)
    with pytest.raises(Transient) as caught:
        limiter.wait("lambda", "launch", 12, 4)
    assert 12.0 == caught.value.retry_after_s
    limiter.wait("lambda", "launch", 12, 60)
    assert [12.0] == clock.slept_s


def test_a_block_holds_for_everybody_until_it_is_over(store, limiter, clock):
    """search_quota_exceeded: nobody asks before the reset."""
    limiter.block("vast", "bundles", 3600, "the day's search quota is used up")
    with pytest.raises(Transient, match="quota") as caught:
        StoreLimiter(store, clock).wait("vast", "bundles", 1, 60)
    assert 3600 == round(caught.value.retry_after_s)
    clock.advance(3601)
    limiter.wait("vast", "bundles", 1, 60)


def test_a_shorter_block_does_not_end_a_longer_one(limiter, clock):
    """Two processes hear different things."""
    limiter.block("vast", "bundles", 3600, "quota")
    limiter.block("vast", "bundles", 5, "too often")
    clock.advance(10)
    with pytest.raises(Transient, match="quota"):
        limiter.wait("vast", "bundles", 1, 60)


def test_a_slot_written_by_a_wrong_clock_is_ignored(store, limiter, clock):
    """Else a laptop that once lived in 2040 would never poll again."""
    clock.advance(86400 * 365 * 14)
    limiter.wait("vast", "bundles", 1, 60)
    clock.advance(-86400 * 365 * 14)
    StoreLimiter(store, clock).wait("vast", "bundles", 1, 60)
    assert [] == clock.slept_s


def test_without_a_writable_store_the_process_limits_itself(tmp_path, clock):
    """The poll is not lost."""
    unmigrated = StoreLimiter(Store.open(f"sqlite:///{tmp_path}/empty.db", clock), clock)
    unmigrated.wait("vast", "bundles", 1.0, 60)
    unmigrated.wait("vast", "bundles", 1.0, 60)
    unmigrated.block("vast", "bundles", 60, "too often")
    assert [1.0] == clock.slept_s


def test_processes_at_once_get_slots_of_their_own(store, tmp_path):
    """Four processes, five slots each: twenty slots, none twice."""
    code = f"""
from datetime import datetime, UTC
from gpubroker.doors import SystemClock
from gpubroker.prices.limits import StoreLimiter
from gpubroker.prices.store import Store
class Clock(SystemClock):
    def now(self):
        return datetime(2026, 11, 24, 12, tzinfo=UTC)
    def sleep(self, seconds):
        print(round(seconds * 1000))
limiter = StoreLimiter(Store.open("sqlite:///{tmp_path}/prices.db", Clock()), Clock())
for _ in range(5):
    limiter.wait("vast", "bundles", 1.0, 600)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    printed = [line for process in running for line in process.communicate()[0].split()]
    assert [0] * 4 == [process.returncode for process in running]
    assert [str(1000 * n) for n in range(20)] == sorted(printed, key=int)
