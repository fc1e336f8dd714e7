"""Several processes on one database, and processes that are killed: real ones."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gpubroker.doors import SystemClock
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices.store import Store
from tests.database import assert_sound, rows_of
from tests.support import FakeClock
from tests.test_bill import offer

REPOSITORY = Path(__file__).parents[1]
# Polls of a market that changes all the time: prices, machines, whole scopes and parts of them. It kills itself
# after so many SQL statements, 0 = never.
POLLER = """
import os, random, signal, sys
from decimal import Decimal
from sqlalchemy import Engine, event
from gpubroker.doors import SystemClock
from gpubroker.model import OfferQuery, Parsed, Slice
from gpubroker.prices.store import Store
from tests.test_bill import offer

url, provider, polls, seed, left = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
chance = random.Random(seed)
store = Store.open(url, SystemClock())
store.migrate()

@event.listens_for(Engine, "after_cursor_execute")
def count_down(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

for _ in range(polls):
    query = OfferQuery(gpus=chance.choice([None, None, frozenset({"H100"})]))
    offers = tuple(
        offer(provider=provider, gpu=chance.choice(["H100", "H200"]), machine_id=str(machine),
              usd_per_hour=Decimal(chance.randrange(1, 4)), billing_increment_s=chance.choice([1, 60]))
        for machine in range(50) if chance.random() < 0.9
    )
    gaps = (Slice(reason="cut"),) * chance.randrange(2)
    store.keep(store.begin_poll(provider, query), Parsed(offers=offers, incomplete=gaps))
"""


def poller(url, provider, *, polls, seed, die_after=0):
    return subprocess.Popen(
        [sys.executable, "-c", POLLER, url, provider, *map(str, (polls, seed, die_after))],
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_processes_that_poll_at_once_corrupt_nothing(empty_url):
    """The first use included: four processes meet on an empty database, two of them for one provider."""
    running = [
        poller(empty_url, provider, polls=15, seed=seed) for seed, provider in enumerate(["a", "a", "b", "c"])
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [0, 0, 0, 0] == [process.returncode for process in running], errors

    store = Store.open(empty_url, FakeClock())
    assert_sound(store)
    counts = "SELECT provider, count(*), count(observed_at), count(error) FROM polls GROUP BY provider"
    assert [("a", 30, 30, 0), ("b", 15, 15, 0), ("c", 15, 15, 0)] == sorted(rows_of(store, counts))
    store.close()


def test_a_poller_that_is_killed_leaves_whole_polls(empty_url):
    """kill -9 after any statement of the second poll: each poll is whole or not at all, and the next works."""
    one_poll = 20  # statements, about
    kills = range(one_poll, 2 * one_poll + 8, 3)
    for seed, die_after in enumerate(kills):
        process = poller(empty_url, "a", polls=9, seed=seed, die_after=die_after)
        assert (-signal.SIGKILL, "") == (process.wait(), process.communicate()[1])

    store = Store.open(empty_url, FakeClock())
    assert_sound(store)
    polls = store.polls("a", limit=999)
    assert 0 < len([poll for poll in polls if poll.finished_at is None]) <= len(kills)
    kept = {poll.observed_at: poll.kept for poll in polls if poll.finished_at is not None}
    assert kept == Counter(at for at, _ in store.observations("a"))

    again = offer(provider="a", machine_id="new")
    store.keep(store.begin_poll("a", OfferQuery()), Parsed(offers=(again,)))
    assert [again] == [p.offer for p in store.current()]
    store.close()


HOLDER = """
import sys
from gpubroker.doors import SystemClock
from gpubroker.prices.store import Store

store = Store.open(sys.argv[1], SystemClock())
with store.database.hold(sys.argv[2]) as is_ours:
    print("ours" if is_ours else "taken", flush=True)
    sys.stdin.read()
"""


def test_a_name_is_held_by_one_process_until_it_is_gone(empty_url):
    """Killed or not; other names are free."""
    url = empty_url
    with holder(url, "a") as first:
        assert "ours\n" == first.stdout.readline()
        with holder(url, "a") as second, holder(url, "b") as third:
            assert ["taken\n", "ours\n"] == [second.stdout.readline(), third.stdout.readline()]
        first.kill()
        first.wait()
        with holder(url, "a") as fourth:
            assert "ours\n" == fourth.stdout.readline()


def test_a_name_stays_held_when_another_is_let_go(empty_url):
    """By the same process, which has it once; what it lets go is free."""
    with Store.open(empty_url, SystemClock()) as store:
        with store.database.hold("a") as first:
            with store.database.hold("b") as second, store.database.hold("a") as again:
                assert (True, True, False) == (first, second, again)
            with holder(empty_url, "a") as other, holder(empty_url, "b") as third:
                assert ["taken\n", "ours\n"] == [other.stdout.readline(), third.stdout.readline()]
        with holder(empty_url, "a") as other:
            assert "ours\n" == other.stdout.readline()


def holder(url, name):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
