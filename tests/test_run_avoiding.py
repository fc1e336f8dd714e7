"""What is kept away from after a node was refused: machines by all, nameless kinds by whom it hit, until there are more."""

import pytest

from gpubroker.run.avoiding import MACHINE_S, PLACE_S, keep_away, kept_away
from gpubroker.run.records import Caps, Records
from tests.test_bill import offer

NAMELESS = {"provider": "runpod", "machine_id": "", "sku": "4090", "region": "EU-RO-1"}
WHERE = ("runpod", "4090 EU-RO-1")
FREE = Caps(usd_per_day=None)


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


@pytest.fixture
def rent(records):
    """`rent(job)`: a node that runs."""

    def _rent(job, **values):
        wanted = offer(**{**NAMELESS, **values})
        attempt = records.intend(job, wanted, usd_per_hour=wanted.usd_per_hour, bid=None, caps=FREE)
        return records.running(records.created(attempt, f"node{attempt.id}"))

    return _rent


@pytest.fixture
def refuse(records, clock):
    """`refuse(attempt)`: as the supervisor does."""

    def _refuse(attempt):
        keep_away(records, clock, attempt, "slow-network", "0.2 Mbit/s")
        records.ended(attempt, "preflight: 0.2 Mbit/s", kind="rejected")

    return _refuse


@pytest.fixture
def away(records, clock):
    """`away(job)`: what the job keeps away from."""
    return lambda job: kept_away(records, clock, job)


def test_a_machine_that_has_a_name_is_kept_away_from_by_all_for_a_day(records, clock, rent, refuse, away):
    mine, other = records.add_job("a", "{}"), records.add_job("b", "{}")
    refuse(rent(mine, provider="vast", machine_id="88"))
    clock.advance(MACHINE_S - 1)
    assert {("vast", "88"): "slow-network: 0.2 Mbit/s"} == away(mine) == away(other)
    clock.advance(2)
    assert {} == away(mine) == away(other)


def test_one_nameless_node_is_the_matter_of_the_job_that_met_it(records, clock, rent, refuse, away):
    """It may be given the same one again; the other jobs most likely not."""
    mine, other = records.add_job("a", "{}"), records.add_job("b", "{}")
    refuse(rent(mine))
    assert {WHERE: "preflight: 0.2 Mbit/s"} == away(mine)
    assert {} == away(other)
    clock.advance(PLACE_S + 1)
    assert {} == away(mine)


def test_a_second_one_keeps_all_jobs_away(records, clock, rent, refuse, away):
    mine, other, third = (records.add_job(name, "{}") for name in "abc")
    refuse(rent(mine))
    refuse(rent(other))
    assert {WHERE} == set(away(third))
    clock.advance(PLACE_S + 1)
    assert {} == away(third)


def test_a_second_one_among_many_good_ones_does_not(records, rent, refuse, away):
    """Two of a hundred are that hundred's luck; two of four are a kind that is broken."""
    jobs = [records.add_job(str(number), "{}") for number in range(6)]
    good = [rent(job) for job in jobs[:3]]
    refuse(rent(jobs[3]))
    refuse(rent(jobs[4]))
    assert {} == away(jobs[5])
    records.ended(good[0], "done", kind="ended")
    refuse(rent(jobs[5]))
    assert {WHERE} == set(away(jobs[0]))


def test_nodes_of_another_region_or_of_long_ago_do_not_count(records, clock, rent, refuse, away):
    jobs = [records.add_job(str(number), "{}") for number in range(4)]
    refuse(rent(jobs[0], region="US-CA-2"))
    refuse(rent(jobs[1]))
    assert {} == away(jobs[3])
    clock.advance(PLACE_S + 1)
    refuse(rent(jobs[2]))
    assert {} == away(jobs[3])
