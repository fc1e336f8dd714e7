"""All jobs at one moment, on both kinds of database: what they do, cost and have saved; who is there to run them."""

from datetime import timedelta
from decimal import Decimal

import pytest

from gpubroker.jobspec import job_from
from gpubroker.run.events import Events
from gpubroker.run.leases import Leases, alive
from gpubroker.run.overview import look, rate_of
from gpubroker.run.records import Records
from tests.support import NOW
from tests.unattended import rented, saved


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


def job(records, *, unattended=True, **more):
    told = {"command": ["true"], "gpu": {"name": "4090"}, "work": {"hours": 1}, **more}
    return records.add_job("job", job_from(told, NOW, "test").model_dump_json(), unattended=unattended)


def seen(store, over_since=None):
    return {one.row.id: one for one in look(store.database, over_since=over_since)}


def test_a_job_is_seen_with_its_nodes_its_last_two_saves_and_its_last_event(store, records, clock):
    """Each its own; what was refused by a vendor is no node."""
    one, other = job(records), job(records)
    first = rented(records, one)
    clock.advance(3600)
    records.ended(first, "preempted", kind="preempted")
    second = rented(records, one, usd=3, node="n-2")
    for number in range(1, 6):
        saved(records, second, number, clock.now())
    clock.advance(1800)
    found = seen(store)[one]
    assert ["n-1", "n-2"] == [a.node_id for a in found.attempts]
    assert ([4, 5], "rented", "running") == ([s.number for s in found.saved], found.event.kind, found.stage)
    assert (Decimal("3.5"), 3) == (found.usd(clock.now()), rate_of(found.node))
    assert ((), (), "waiting") == (
        seen(store)[other].attempts,
        seen(store)[other].saved,
        seen(store)[other].stage,
    )


def test_the_first_of_its_limits_says_what_is_left(store, records, clock):
    """The deadline, the money at this rate, or the hours; nothing of a job that is over."""
    limits = {"deadline": "2026-11-24T22:00Z", "budget_usd": 12, "max_hours": 7}
    several = {name: job(records, limits={name: limits[name]}) for name in limits}
    several["all"], several["none"] = job(records, limits=limits), job(records)
    for number, job_id in enumerate(several.values()):
        rented(records, job_id, node=f"n-{number}")
    clock.advance(3600)
    left = {name: seen(store)[job_id].left_s(clock.now()) for name, job_id in several.items()}
    assert {
        "deadline": (9 * 3600, "deadline"),
        "budget_usd": (5 * 3600, "budget"),
        "max_hours": (6 * 3600, "hours"),
        "all": (5 * 3600, "budget"),
        "none": None,
    } == left
    records.end_job(several["all"], "done")
    assert None is seen(store)[several["all"]].left_s(clock.now())


def test_only_what_is_under_way_or_over_since_then_is_seen(store, records, clock):
    """A stopped job is: it may go on."""
    early, late, runs, stopped = (job(records) for _ in range(4))
    records.end_job(early, "done")
    clock.advance(3600)
    records.end_job(late, "failed")
    records.end_job(stopped, "stopped")
    clock.advance(60)
    assert {late, runs, stopped} == set(seen(store, clock.now() - timedelta(minutes=5)))
    assert 4 == len(seen(store))


def test_what_a_job_waits_for_is_a_supervisor_or_what_the_last_event_says(store, records, clock):
    """A supervisor whose lease is over is none."""
    job_id, terminals = job(records), job(records, unattended=False)
    leases = Leases(store.database, clock, host="here", pid=1)
    assert ([], "a supervisor") == (alive(store.database), seen(store)[job_id].waits_for)
    leases.renew()
    leases.claim()
    records.tell("waiting", "no 4090 is to be had", job_id=job_id)
    assert "its terminal" == seen(store)[terminals].waits_for
    assert ([leases.id], "no 4090 is to be had") == (alive(store.database), seen(store)[job_id].waits_for)
    leases.leave()
    assert ([], "a supervisor") == (alive(store.database), seen(store)[job_id].waits_for)


def test_a_job_that_is_handed_over_runs_unattended(records, store):
    """Running or stopped, whatever was wanted of it; one that is over stays as it is."""
    job_id = job(records)
    records.want(job_id, "cancelled", "by hand")
    records.stop_jobs("stop-all")
    assert True is records.hand_over(job_id)
    row = records.row(job_id)
    assert ("running", "", "", None, None) == (row.state, row.reason, row.wanted, row.wanted_at, row.ended_at)
    records.end_job(job_id, "done", "exit code 0")
    assert (False, "done") == (records.hand_over(job_id), records.row(job_id).state)
    kinds = [event.kind for event in Events(store.database, None).after(job_id=job_id)]
    assert ["submitted", "stopping", "stopped", "submitted", "done"] == kinds


def test_nodes_since_a_moment_are_those_that_were_there_then_or_later(records, clock):
    """Of one job or of all; what never had an id is none."""
    one, other = job(records), job(records)
    early = rented(records, one)
    clock.advance(60)
    records.ended(early, "done")
    clock.advance(60)
    late = rented(records, other, node="n-2")
    assert [early.id, late.id] == [a.id for a in records.attempts_since(None)]
    assert [late.id] == [a.id for a in records.attempts_since(clock.now() - timedelta(seconds=10))]
    assert [early.id] == [a.id for a in records.attempts_since(None, one)]


def test_events_are_read_by_kind_and_time(records, store, clock):
    """Those that are asked for, the oldest first."""
    events = Events(store.database, clock)
    records.tell("problem", "old")
    clock.advance(60)
    for kind, text in (("problem", "new"), ("idle", "newer"), ("problem", "newest")):
        records.tell(kind, text)
    assert ["new", "newest"] == [e.text for e in events.after(kinds=("problem",), since=clock.now())]
    assert ["newest"] == [e.text for e in events.last(1, kinds=("problem",))]
    assert ["newer", "newest"] == [e.text for e in events.last(2)]
