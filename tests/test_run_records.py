"""What is remembered of jobs and nodes, on both kinds of database: intents, caps, ledger, machines to avoid."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from gpubroker.config import DayCaps
from gpubroker.errors import OverBudget
from gpubroker.run.records import Caps, Checkpoint, Records
from tests.support import NOW
from tests.test_bill import offer

FREE = Caps(usd_per_day=None)


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


def intend(records, job, usd=Decimal(2), caps=FREE, **values):
    return records.intend(job, offer(usd_per_hour=usd, **values), usd_per_hour=usd, bid=None, caps=caps)


def test_an_intent_is_open_from_before_the_call_until_the_node_is_gone(records, clock):
    """Whatever happens in between, it is on the list of what may be billing."""
    job = records.add_job("sft", "{}")
    attempt = intend(records, job)
    assert [(attempt.id, None)] == [(a.id, a.node_id) for a in records.open_attempts()]
    attempt = records.created(attempt, "node-7")
    clock.advance(60)
    attempt = records.running(attempt)
    clock.advance(1800)
    attempt = records.ended(attempt, "preempted")
    assert [] == records.open_attempts()
    assert ("node-7", "preempted", Decimal("1.000000")) == (
        attempt.node_id,
        attempt.end_reason,
        attempt.usd_estimated,
    )


def test_an_id_that_another_job_has_is_drawn_again(records, monkeypatch):
    """Six letters are few; two of a thousand jobs would share them every thirtieth time."""
    drawn = iter(("aaaaaa", "aaaaaa", "bbbbbb", "bbbbbb", "aaaaaa", "cccccc"))
    monkeypatch.setattr("secrets.token_hex", lambda size: next(drawn))
    made = [records.add_job("sft", "{}"), records.add_job("sft", "{}"), records.new_job_id("sft")]
    assert ["sft-aaaaaa", "sft-bbbbbb", "sft-cccccc"] == made


def test_a_checkpoint_that_is_told_of_twice_is_kept_once(records):
    """The agent tells of its last ones at every look; jobs do not see each other's."""
    job, other = records.add_job("sft", "{}"), records.add_job("sft", "{}")
    found = [checkpoint(epoch, number) for epoch, number in ((1, 1), (1, 2), (2, 3))]
    records.published(job, found[:2])
    records.published(job, found)
    records.published(other, found[:1])
    assert (found, found[:1]) == (records.checkpoints(job), records.checkpoints(other))


def checkpoint(epoch, number):
    return Checkpoint(
        epoch=epoch,
        number=number,
        name=f"step-{number}",
        step=number,
        bytes=1 << 40,
        published_at=NOW,
        place="s3://b",
    )


def test_the_lost_work_of_an_attempt_is_kept_with_its_end(records):
    """None = nobody knows."""
    job = records.add_job("sft", "{}")
    lost = [records.ended(intend(records, job), "preempted", seconds).work_lost_s for seconds in (90, None)]
    assert [90, None] == lost


def test_epochs_count_up_and_tags_are_never_the_same(records):
    """A retry is a new attempt with a new tag: no vendor but AWS knows idempotency."""
    job, other = records.add_job("sft", "{}"), records.add_job("sft", "{}")
    found = [intend(records, job), intend(records, job), intend(records, other)]
    assert [1, 2, 1] == [a.epoch for a in found]
    assert 3 == len({a.tag for a in found})
    assert all(a.tag.startswith("gpubroker-") and len(a.tag) <= 40 for a in found)


def test_ending_twice_keeps_the_first_end(records, clock):
    """Ending is idempotent: a supervisor may say it again."""
    attempt = records.running(records.created(intend(records, records.add_job("sft", "{}")), "n"))
    clock.advance(3600)
    first = records.ended(attempt, "done")
    clock.advance(3600)
    assert first == records.ended(first, "again")


def test_a_node_that_never_ran_cost_nothing(records, clock):
    """As far as we know; the settled figure is the vendor's."""
    attempt = intend(records, records.add_job("sft", "{}"))
    clock.advance(600)
    ended = records.ended(attempt, "no capacity")
    assert Decimal(0) == ended.usd_estimated
    assert Decimal("0.03") == records.settled(ended, Decimal("0.03")).usd_settled


def test_the_cap_of_a_day_holds_over_all_jobs(records, clock):
    """$10: three nodes of $3 reserve an hour each, a fourth would pass it; nothing is written then."""
    caps = Caps(usd_per_day=Decimal(10))
    for _ in range(3):
        intend(records, records.add_job("sft", "{}"), Decimal(3), caps)
    job = records.add_job("sft", "{}")
    with pytest.raises(
        OverBudget, match=r"limit of today is \$10.00: \$9.00 are spent or reserved, .* \$3.00"
    ):
        intend(records, job, Decimal(3), caps)
    assert [] == records.attempts(job)
    assert intend(records, job, Decimal(1), caps).epoch == 1


def test_the_next_day_begins_at_midnight(records, clock):
    """What was spent yesterday counts no more; what still runs does."""
    caps = Caps(usd_per_day=Decimal(10))
    attempt = records.running(
        records.created(intend(records, records.add_job("sft", "{}"), Decimal(1), caps), "n")
    )
    clock.advance(8 * 3600)
    records.ended(attempt, "done")
    assert Decimal(8) == records.usd_today(clock.now())
    with pytest.raises(OverBudget):
        intend(records, records.add_job("sft", "{}"), Decimal(3), caps)
    clock.advance(5 * 3600)
    assert Decimal(0) == records.usd_today(clock.now())
    assert intend(records, records.add_job("sft", "{}"), Decimal(3), caps)


def test_the_hours_of_a_day_are_capped_as_its_money_is(records, clock):
    """4 h: one node has run two, it and another reserve one each; a vendor's price has nothing to do with it."""
    caps = Caps(usd_per_day=None, node_hours_per_day=Decimal(4))
    attempt = records.running(
        records.created(intend(records, records.add_job("sft", "{}"), Decimal(1), caps), "n")
    )
    intend(records, records.add_job("sft", "{}"), Decimal(1), caps)
    clock.advance(2 * 3600)
    job = records.add_job("sft", "{}")
    with pytest.raises(
        OverBudget, match=r"limit of today is 4.00 node hours: 4.00 are used or reserved, .* add 1.00"
    ) as caught:
        intend(records, job, Decimal(1), caps)
    assert ([], datetime(2026, 11, 25, tzinfo=UTC)) == (records.attempts(job), caught.value.until)
    records.ended(attempt, "done")
    assert 1 == intend(records, job, Decimal(1), caps).epoch
    clock.advance(11 * 3600)  # another day; two are open still, and one of them has never run
    assert 1 == intend(records, records.add_job("sft", "{}"), Decimal(1), caps).epoch


@pytest.mark.parametrize(
    ("account", "words"),
    [
        pytest.param(DayCaps(usd_per_day=Decimal(5)), r"today at vast is \$5.00: \$3.00", id="money"),
        pytest.param(
            DayCaps(node_hours_per_day=Decimal(1)), "today at vast is 1.00 node hours: 1.00", id="hours"
        ),
    ],
)
def test_the_cap_of_an_account_holds_over_its_nodes_alone(records, account, words):
    """Another vendor's neither count nor are kept from it."""
    caps = Caps(usd_per_day=None, accounts={"vast": account})
    job = records.add_job("sft", "{}")
    intend(records, job, Decimal(3), caps, provider="vast")
    with pytest.raises(OverBudget, match=words):
        intend(records, job, Decimal(3), caps, provider="vast")
    assert ["vast", "runpod", "runpod"] == [
        *(a.provider for a in records.attempts(job)),
        *(intend(records, job, Decimal(3), caps, provider="runpod").provider for _ in range(2)),
    ]


def test_waiting_for_the_next_day_helps_against_a_cap_of_the_day_alone(records):
    """A job's own budget is not filled up at midnight."""
    for caps, until in (
        (Caps(usd_per_day=Decimal(1)), datetime(2026, 11, 25, tzinfo=UTC)),
        (Caps(usd_per_day=None, usd_per_job=Decimal(1)), None),
    ):
        with pytest.raises(OverBudget) as caught:
            intend(records, records.add_job("sft", "{}"), Decimal(2), caps)
        assert until == caught.value.until


def test_attempts_of_all_jobs_are_found_by_when_they_were_open(records, clock):
    """For the caps of a day, and for what everything has cost."""
    first, second = (records.created(intend(records, records.add_job("sft", "{}")), "n") for _ in range(2))
    records.ended(first, "gone")
    clock.advance(60)
    later = clock.now()
    clock.advance(60)
    third = records.created(intend(records, records.add_job("sft", "{}")), "n")
    found = [[a.id for a in records.attempts_since(moment)] for moment in (later, None)]
    assert [[second.id, third.id], [first.id, second.id, third.id]] == found


def test_the_cap_of_a_job_is_its_own(records, clock):
    """$5 for this job, whatever others spend."""
    caps = Caps(usd_per_day=None, usd_per_job=Decimal(5))
    job = records.add_job("sft", "{}")
    attempt = records.running(records.created(intend(records, job, Decimal(2), caps), "n"))
    clock.advance(2 * 3600)
    records.ended(attempt, "preempted")
    with pytest.raises(OverBudget, match="limit of this job"):
        intend(records, job, Decimal(2), caps)
    assert intend(records, records.add_job("sft", "{}"), Decimal(2), caps)


def test_a_machine_is_avoided_until_its_time_is_over(records, clock):
    """With the code and the reason; without a name there is nothing to avoid."""
    records.avoid("vast", "88", "cuda", "error 802", for_s=3600)
    records.avoid("vast", "88", "cuda", "error 802 again", for_s=7200)
    records.avoid("runpod", "", "cuda", "error 802", for_s=3600)
    assert {("vast", "88"): "cuda: error 802 again"} == records.avoided()
    clock.advance(7201)
    assert {} == records.avoided()


def test_what_a_stopped_node_costs_is_its_disk(records, clock):
    """Also when nobody could end it for a while; one that runs again costs all of it."""
    job = records.add_job("sft", "{}")
    attempt = records.intend(
        job,
        offer(),
        usd_per_hour=Decimal(2),
        held_usd_per_hour=Decimal("0.25"),
        bid=None,
        caps=Caps(usd_per_day=None),
    )
    attempt = records.running(records.created(attempt, "n"))
    clock.advance(3600)
    attempt = records.stopped(attempt)
    clock.advance(2 * 3600)
    assert attempt == records.stopped(attempt)
    assert Decimal("2.5") == attempt.usd_so_far(clock.now())
    assert Decimal("2.5") == records.ended(attempt, "preempted").usd_estimated
    assert Decimal(6) == records.stopped(attempt, is_stopped=False).usd_by(clock.now())


def test_what_the_vendor_has_said_counts_instead_of_the_estimate(records, clock):
    """For the caps: transfer is in no estimate."""
    caps = Caps(usd_per_day=Decimal(10))
    attempt = records.running(
        records.created(intend(records, records.add_job("sft", "{}"), Decimal(1), caps), "n")
    )
    clock.advance(3600)
    attempt = records.ended(attempt, "done")
    records.settled(attempt, Decimal("9.5"))
    assert (Decimal(1), Decimal("9.5")) == (attempt.usd_estimated, records.usd_today(clock.now()))
    with pytest.raises(OverBudget):
        intend(records, records.add_job("sft", "{}"), Decimal(1), caps)
