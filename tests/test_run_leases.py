"""Supervisors share jobs: each has its own, and when one is gone the others have them. On both databases."""

from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import update

from gpubroker.errors import NotOurs
from gpubroker.run import tables
from gpubroker.run.leases import LEASE_S, Leases
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from tests.test_bill import offer
from tests.test_run_renting import Vendor, order


@pytest.fixture
def supervisor(store, clock):
    """`supervisor("a")` is one that has joined."""

    def _supervisor(name):
        made = Leases(store.database, clock, host=name, pid=1)
        made.renew()
        return made

    return _supervisor


@pytest.fixture
def jobs(store, clock):
    """Five, nobody's; and one of a terminal."""
    records = Records(store.database, clock)
    records.add_job("terminal", "{}")
    return [records.add_job("job", "{}", unattended=True) for _ in range(5)]


@pytest.fixture
def expire(store):
    """A supervisor's lease is over, as on a database whose clock nobody turns."""

    def _expire(one):
        table = tables.supervisors
        with store.database.write() as connection:
            past = store.database.now(connection) - timedelta(seconds=1)
            connection.execute(update(table).where(table.c.id == one.id).values(until_at=past))

    return _expire


def mine(store, clock, one):
    rows = Records(store.database, clock).rows(only_unfinished=True)
    return {row.id for row in rows if row.supervisor_id == one.id}


def test_one_supervisor_has_all_jobs_but_a_terminals(store, clock, supervisor, jobs):
    """And has them once."""
    one = supervisor("a")
    assert sorted(jobs) == sorted(one.claim())
    assert [] == one.claim()
    assert set(jobs) == mine(store, clock, one)


def test_two_supervisors_share_the_jobs(store, clock, supervisor, jobs):
    """None has a job of the other's."""
    one, two = supervisor("a"), supervisor("b")
    found = one.claim(), two.claim()
    assert [3, 2] == [len(claimed) for claimed in found]
    assert sorted(jobs) == sorted([*found[0], *found[1]])


def test_the_jobs_of_one_that_is_gone_are_the_others(store, clock, supervisor, expire, jobs):
    """Once its lease is over, not before."""
    one, two = supervisor("a"), supervisor("b")
    one.claim(), two.claim()
    assert [] == two.claim()
    expire(one)
    assert 3 == len(two.claim())
    assert set(jobs) == mine(store, clock, two)
    assert {1: 2, 2: 3} == {
        claims: sum(row.claims == claims for row in Records(store.database, clock).rows(only_unfinished=True))
        for claims in (1, 2)
    }


def test_one_that_leaves_gives_its_jobs_back_at_once(store, clock, supervisor, jobs):
    """Nobody waits for a lease."""
    one, two = supervisor("a"), supervisor("b")
    one.claim()
    one.leave()
    assert 5 == len(two.claim())


def test_one_that_was_away_rents_nothing_for_a_job_that_it_has_lost(store, clock, supervisor, expire, jobs):
    """Its intent is refused in the transaction that would write it; the other's is not."""
    one, two = supervisor("a"), supervisor("b")
    one.claim()
    expire(one)
    two.claim()
    terms = {"usd_per_hour": Decimal(1), "bid": None, "caps": Caps(usd_per_day=None)}
    job = next(iter(mine(store, clock, two)))
    with pytest.raises(NotOurs, match=rf"{job} is run by {two.id} now"):
        Records(store.database, clock, one.id).intend(job, offer(), **terms)
    assert [] == Records(store.database, clock).attempts(job)
    assert 1 == Records(store.database, clock, two.id).intend(job, offer(), **terms).epoch


def test_a_renewed_lease_outlasts_the_old_one(store, clock, supervisor, jobs):
    """On the database's clock."""
    one, two = supervisor("a"), supervisor("b")
    one.claim(), two.claim()
    clock.sleep(LEASE_S - 1)
    one.renew(), two.renew()
    clock.sleep(LEASE_S - 1)
    assert [] == two.claim()


def test_a_supervisor_finds_jobs_that_are_over_and_still_bill(store, clock, supervisor, jobs):
    """Their nodes are to be ended."""
    one, records = supervisor("a"), Records(store.database, clock)
    one.claim()
    terms = {"usd_per_hour": Decimal(1), "bid": None, "caps": Caps(usd_per_day=None)}
    attempt = Records(store.database, clock, one.id).intend(jobs[0], offer(), **terms)
    for job in jobs:
        records.end_job(job, "done", "exit code 0")
    assert {jobs[0]} == mine(store, clock, one)
    records.ended(attempt, "done")
    assert set() == mine(store, clock, one)


def test_one_that_was_away_ends_no_node_of_a_job_that_it_has_lost(store, clock, supervisor, expire, jobs):
    """Nor does it write down what it saw of one. It may go by a list from before the node was there; a person without a supervisor may end it."""
    one, two, vendor = supervisor("a"), supervisor("b"), Vendor()
    one.claim()
    expire(one)
    two.claim()
    (job, *_) = mine(store, clock, two)
    found = {offer().provider: vendor}
    of = {who: Renting(Records(store.database, clock, who), found, clock) for who in (one.id, two.id, None)}
    attempt = of[two.id].rent(order(job), Caps(usd_per_day=None))
    with pytest.raises(NotOurs):
        of[one.id].end(attempt, "gone")
    for seen in ("running", "stopped"):
        with pytest.raises(NotOurs):
            getattr(Records(store.database, clock, one.id), seen)(attempt)
    assert [attempt] == Records(store.database, clock).attempts(job)
    assert [attempt.node_id] == list(vendor.nodes)
    of[None].end(attempt, "by hand")
    assert {} == vendor.nodes
