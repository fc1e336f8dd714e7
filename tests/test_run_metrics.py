"""What Prometheus is told, scraped over loopback and read by prometheus_client's own parser."""

import socket
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpubroker.errors import ConfigError, StoreError
from gpubroker.run.events import Events
from gpubroker.run.metrics import Snapshot, Ticks, families, serve, snapshot
from gpubroker.run.records import Caps, Checkpoint, Records
from tests.support import NOW
from tests.test_bill import offer

NOTHING = Snapshot(
    jobs={},
    nodes={},
    usd_per_hour=Decimal(0),
    usd_today=Decimal(0),
    usd_of_jobs={},
    checkpoint_age_s={},
    events={},
    ticks=0,
    ticks_s=0.0,
    last_tick_s=0.0,
    listing_age_s={},
)


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


@pytest.fixture
def events(store, clock):
    return Events(store.database, clock)


def rent(records, job, usd=2, held=0, **values):
    """A node that runs from now on."""
    made = records.intend(
        job,
        offer(**values),
        usd_per_hour=Decimal(usd),
        held_usd_per_hour=Decimal(held),
        bid=None,
        caps=Caps(usd_per_day=None),
    )
    return records.running(records.created(made, f"n-{made.id}"))


def scrape(address):
    """{sample name: {values of labels, by their names: value}}, and the answer's text."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[
                tuple(sample.labels[name] for name in sorted(sample.labels))
            ] = sample.value
    return found, text


def test_a_scrape_tells_what_the_records_hold(records, events, clock):
    """Two nodes of two jobs, one stopped at its vendor; a job that is done is in the counts alone."""
    sft, dpo, over = (records.add_job(name, "{}") for name in ("sft", "dpo", "over"))
    records.ended(rent(records, over), "done")
    records.end_job(over, "done")
    records.ended(rent(records, sft, 3), "outbid", kind="preempted")
    rent(records, sft, 2, provider="aws", market="spot")
    stopped = rent(records, dpo, 4, "0.25", provider="vast", market="spot")
    clock.advance(3600)
    records.stopped(stopped)
    ticks = Ticks()
    ticks.took(0.5)
    ticks.took(0.25)
    ticks.listed("aws", clock.now())
    clock.advance(90)
    now = clock.now()
    with closing(serve("127.0.0.1:0", lambda: snapshot(records, events, now, ticks))) as serving:
        found, _ = scrape(serving.address)
    assert {("running",): 2, ("done",): 1} == {k: v for k, v in found["gpubroker_jobs"].items() if v}
    assert {("spot", "aws"): 1, ("spot", "vast"): 1} == found["gpubroker_open_nodes"]
    assert {(): 2.25} == found["gpubroker_usd_per_hour"]
    # 3690 s at $2.00, and 3600 s at $4.00 with 90 s at $0.25
    assert {(sft,): 2.05, (dpo,): 4.00625} == found["gpubroker_job_usd"]
    assert {(): 6.05625} == found["gpubroker_usd_today"]
    assert {(): 1} == found["gpubroker_preemptions_total"]
    assert ({(): 2}, {(): 0.75}) == (
        found["gpubroker_tick_seconds_count"],
        found["gpubroker_tick_seconds_sum"],
    )
    assert {(): 0.25} == found["gpubroker_last_tick_seconds"]
    assert {("aws",): 90} == found["gpubroker_listing_age_seconds"]
    assert {(): 1} == found["gpubroker_up"]


def test_a_job_that_has_rented_nothing_has_cost_nothing(records, events, clock):
    """And is there from the beginning, so that its cost begins at zero."""
    job = records.add_job("sft", "{}")
    assert {job: Decimal(0)} == snapshot(records, events, clock.now(), Ticks()).usd_of_jobs


def test_a_job_that_is_over_is_told_of_while_it_may_bill(records, events, clock):
    """Its node is not known to be gone."""
    job = records.add_job("sft", "{}")
    attempt = rent(records, job)
    records.end_job(job, "cancelled")
    clock.advance(1800)
    assert {job: Decimal(1)} == snapshot(records, events, clock.now(), Ticks()).usd_of_jobs
    records.ended(attempt, "cancelled")
    assert {} == snapshot(records, events, clock.now(), Ticks()).usd_of_jobs


def test_a_node_that_was_never_seen_running_costs_its_disk(records, events, clock):
    """As in the ledger."""
    records.intend(
        records.add_job("sft", "{}"),
        offer(),
        usd_per_hour=Decimal(2),
        held_usd_per_hour=Decimal("0.1"),
        bid=None,
        caps=Caps(usd_per_day=None),
    )
    assert Decimal("0.1") == snapshot(records, events, clock.now(), Ticks()).usd_per_hour


def test_the_age_of_the_newest_checkpoint_is_of_jobs_that_run(records, events, clock):
    """None where there is none; a node's clock that is ahead makes no negative age."""
    ages = {"sft": (600, 300), "ahead": (-60,), "unsaved": (), "over": (300,)}
    jobs = {name: records.add_job(name, "{}") for name in ages}
    for name, found_s in ages.items():
        made = [checkpoint(n, NOW - timedelta(seconds=age_s)) for n, age_s in enumerate(found_s)]
        records.published(jobs[name], made)
    records.end_job(jobs["over"], "done")
    found = snapshot(records, events, NOW, Ticks()).checkpoint_age_s
    assert {jobs["sft"]: 300, jobs["ahead"]: 0} == found


def checkpoint(number, published_at):
    return Checkpoint(
        epoch=1,
        number=number,
        name=f"step-{number}",
        step=number,
        bytes=1,
        published_at=published_at,
        place="b",
    )


def test_counters_go_on_after_a_restart(store, records, clock):
    """They are counted from the events, by whoever asks."""
    for kind in ("started", "resumed", "resumed", "preempted", "rejected", "leaked", "lost", "waiting"):
        records.tell(kind, "")
    again = Events(store.database, clock)
    found = families(snapshot(records, again, clock.now(), Ticks()))
    told = {family.name: family.samples[0].value for family in found if family.type == "counter"}
    expected = {
        "gpubroker_starts": 3,
        "gpubroker_preemptions": 1,
        "gpubroker_rejected_machines": 1,
        "gpubroker_leaked_nodes": 1,
        "gpubroker_lost_nodes": 1,
        "gpubroker_problems": 0,
    }
    assert expected == told


def test_a_state_without_jobs_is_told_as_zero():
    """An alert on it has something to compare."""
    (jobs,) = [family for family in families(NOTHING) if family.name == "gpubroker_jobs"]
    states = {sample.labels["state"]: sample.value for sample in jobs.samples}
    assert {"running", "done", "failed", "stopped", "cancelled", "over_budget"} == set(states)
    assert {0} == set(states.values())


def test_a_job_may_be_called_anything():
    """What would break the format is quoted."""
    name = 'a"b\\c\nd'
    with closing(serve("127.0.0.1:0", lambda: replace(NOTHING, usd_of_jobs={name: Decimal(1)}))) as serving:
        found, _ = scrape(serving.address)
    assert {(name,): 1} == found["gpubroker_job_usd"]


def test_a_database_that_cannot_be_read_is_told_as_such():
    """Nothing else is: no figure is better than an old one."""

    def fail():
        raise StoreError("prices.db is damaged")

    with closing(serve("127.0.0.1:0", fail)) as serving:
        found, text = scrape(serving.address)
    assert {"gpubroker_up": {(): 0}} == found
    assert "damaged" not in text


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("9464", id="a port alone"),
        pytest.param(":9464", id="no host"),
        pytest.param("127.0.0.1", id="no port"),
        pytest.param("127.0.0.1:99999", id="no such port"),
        pytest.param("http://127.0.0.1:9464", id="a URL"),
        pytest.param("", id="nothing"),
    ],
)
def test_an_address_that_is_none_is_one_sentence(address):
    """Exit code 2; nothing listens."""
    with pytest.raises(ConfigError, match="is not host:port, such as 127"):
        serve(address, lambda: NOTHING)


def test_an_address_that_is_taken_is_one_sentence():
    """Exit code 2, and which."""
    with closing(serve("127.0.0.1:0", lambda: NOTHING)) as serving:
        with pytest.raises(ConfigError, match=f"^metrics: {serving.address}: Address already in use$"):
            serve(serving.address, lambda: NOTHING)
        assert {(): 1} == scrape(serving.address)[0]["gpubroker_up"]


def test_only_the_address_that_was_told_is_bound():
    """Another one of the same machine answers nothing; nor does this one once it is closed."""
    serving = serve("127.0.0.1:0", lambda: NOTHING)
    port = int(serving.address.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=10)
    serving.close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(serving.address)


def test_an_address_of_ipv6_is_taken():
    """In brackets, as everywhere."""
    with closing(serve("[::1]:0", lambda: NOTHING)) as serving:
        assert serving.address.startswith("[::1]:")
        assert {(): 1} == scrape(serving.address)[0]["gpubroker_up"]
