"""Boxes in the records: when one stops, and how its end is noticed although nobody supervises it."""

from datetime import timedelta
from decimal import Decimal

import pytest

from gpubroker.jobspec import job_from
from gpubroker.provider import Capabilities
from gpubroker.run.boxes import boxes, ends_itself
from gpubroker.run.contact import keys_of
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from tests.support import NOW
from tests.test_run_renting import CAPS, Vendor, order


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


@pytest.fixture
def vendor():
    return Vendor()


@pytest.fixture
def renting(records, vendor, clock):
    return Renting(records, {"cloud": vendor}, clock)


def box(records, renting, **limits):
    """Up since now, at $2 an hour."""
    table = {"box": True, "command": "sleep 1", "gpu": {"name": "h100"}, "work": {"hours": "2"}}
    spec = job_from({**table, "limits": {"max_hours": "2", **limits}}, NOW, "test")
    job = records.add_job("box", spec.model_dump_json())
    return records.running(renting.rent(order(job), CAPS))


def look(renting):
    return renting.look_at_boxes()


def test_a_box_stops_when_its_hours_are_over_or_its_money_is_spent(records, renting, clock):
    """Whichever comes first, from when it began to bill."""
    first, second = box(records, renting), box(records, renting, budget_usd="3")
    stops = {one.attempt.id: one.stops_at for one in boxes(records)}
    assert {
        first.id: clock.now() + timedelta(hours=2),
        second.id: clock.now() + timedelta(hours=1.5),
    } == stops


def test_what_was_spent_before_shortens_a_budget(records, renting, vendor, clock):
    """A node that failed its preflight cost money, too."""
    first = box(records, renting, budget_usd="3")
    clock.sleep(1800)
    renting.end(first, "preflight: no GPU")
    records.running(renting.rent(order(first.job_id), CAPS))
    (found,) = boxes(records)
    assert clock.now() + timedelta(hours=1) == found.stops_at


def test_a_job_that_runs_a_command_is_no_box(records, renting):
    """Its supervisor sees to it."""
    job = records.add_job("job", "{}")
    renting.rent(order(job), CAPS)
    assert [] == boxes(records)


def test_a_box_that_ended_itself_cost_no_more_than_to_its_end(records, renting, vendor, clock):
    """Whoever looks the next day writes down when it was to stop."""
    attempt = box(records, renting)
    stops_at = boxes(records)[0].stops_at
    clock.sleep(24 * 3600)
    vendor.nodes.clear()
    look(renting)
    (ended,) = records.attempts(attempt.job_id)
    assert ([], stops_at, Decimal(4)) == (boxes(records), ended.ended_at, ended.usd_estimated)
    assert ("done", "its time was over") == records.job(attempt.job_id)[:2]


def test_a_box_that_went_before_its_time_ended_when_that_was_noticed(records, renting, vendor, clock):
    """Nobody knows better."""
    attempt = box(records, renting)
    clock.sleep(3600)
    vendor.nodes.clear()
    look(renting)
    (ended,) = records.attempts(attempt.job_id)
    assert ("gone before its time", Decimal(2)) == (ended.end_reason, ended.usd_estimated)


def test_a_box_that_is_not_listed_yet_is_not_gone(records, renting, vendor, clock):
    """A new node may take minutes to appear."""
    vendor.faults = ["hidden"]
    with pytest.raises(Exception, match="dropped"):
        box(records, renting)
    look(renting)
    assert 1 == len(boxes(records))


def test_a_vendor_that_is_silent_ends_no_box(records, renting, vendor):
    """It says nothing about it."""
    box(records, renting)
    renting.settle_boxes({})
    assert 1 == len(boxes(records))


def test_a_box_past_its_time_is_a_stray_and_one_before_it_is_not(records, renting, vendor, clock):
    """Nobody supervises it, so that sweep finds it; swept, it is over."""
    attempt = box(records, renting)
    listed, _ = look(renting)
    assert [] == renting.strays(listed)
    clock.sleep(2 * 3600 + 1)
    listed, _ = look(renting)
    (stray,) = renting.strays(listed)
    assert attempt.node_id == stray.node.id
    assert [] == renting.sweep([stray])
    renting.forget([("cloud", stray.node.id)], "its time was over")
    assert ([], {}) == (boxes(records), vendor.nodes)
    assert "done" == records.job(attempt.job_id)[0]


def test_a_box_that_is_over_leaves_the_days_cap_to_others(records, renting, vendor, clock):
    """Once somebody has looked."""
    box(records, renting)
    clock.sleep(11 * 3600)
    vendor.nodes.clear()
    assert Decimal(22) == records.usd_today(clock.now())
    look(renting)
    assert Decimal(4) == records.usd_today(clock.now())
    tight = Caps(usd_per_day=Decimal(7))
    renting.rent(order(records.add_job("j", "{}")), tight)


def test_a_vendor_that_ends_every_node_in_time_ends_a_box_too():
    """So does a node that may end its own billing."""
    assert [False, True, True] == [
        ends_itself(c)
        for c in (
            Capabilities(),
            Capabilities(own_end={"command": ["true"]}),
            Capabilities(max_lifetime_s=86400),
        )
    ]


def test_the_host_key_of_first_contact_stays(tmp_path):
    """By the node's tag, in a file that only the user reads; another key never takes its place."""
    keys = keys_of(tmp_path / "job-1")
    assert None is keys.host_key("t-1")
    keys.pin("t-1", "ssh-ed25519 AAAA")
    keys.pin("t-2", "ssh-ed25519 BBBB")
    keys.pin("t-1", "ssh-ed25519 CCCC")
    again = keys_of(tmp_path / "job-1")
    assert ("ssh-ed25519 AAAA", "ssh-ed25519 BBBB") == (again.host_key("t-1"), again.host_key("t-2"))
    assert keys.private == again.private
    assert "PRIVATE" not in repr(keys)
    assert [0o600, 0o600, 0o700] == [
        path.stat().st_mode & 0o777 for path in (keys.key_file, keys.known_hosts, keys.folder)
    ]
