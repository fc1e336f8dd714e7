"""Measured runs and the exposure of our own nodes, on each kind of database; old databases get both tables."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from alembic import command
from alembic.config import Config

from gpubroker import exposure, measurements
from gpubroker.exposure import Exposure
from gpubroker.model import Parsed
from gpubroker.plan import hazard
from gpubroker.plan.throughput import Measurement, Yardstick, converter, parse_work
from gpubroker.prices import database
from gpubroker.prices.keeping import Keeping
from gpubroker.prices.rows import REVISION
from gpubroker.prices.store import Store
from tests.database import rows_of
from tests.support import NOW
from tests.test_bill import offer

RUN = Measurement(
    job="sft",
    gpu="H100",
    form_factor="SXM",
    gpu_count=1,
    steps=Decimal(1200),
    seconds=Decimal("600.250"),
    measured_at=NOW,
)
STRETCH = Exposure(
    provider="vast",
    gpu="RTX4090",
    region="US",
    market="spot",
    preemptions=1,
    exposed_s=7200,
    since_at=NOW - timedelta(hours=2),
    until_at=NOW,
)


def migrated_to(store, revision):
    """As a gpubroker of that time left it."""
    with store.database.write() as connection:
        config = Config()
        config.set_main_option("script_location", str(database._migrations()))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def test_a_database_of_the_first_revision_is_upgraded_with_all_that_it_holds(empty_url, clock):
    """By the first use, as by `db upgrade`."""
    with Store.open(empty_url, clock) as old:
        migrated_to(old, "0001")
        assert "0001" == old.revision()
        poll = "INSERT INTO polls (provider, scope, started_at) VALUES ('vast', '{}', 5)"
        with old.database.write() as connection:
            old.database.run(connection, poll)
    with Store.open(empty_url, clock) as store:
        store.migrate()
        assert REVISION == store.revision()
        assert [("vast", 5)] == rows_of(store, "SELECT provider, started_at FROM polls")
        assert [] == measurements.recorded(store.database)
        assert () == store.snapshot(None).exposures


def test_prices_of_an_older_database_are_still_read(empty_url, clock, monkeypatch):
    """What was polled before the upgrade is on offer after it."""
    with Store.open(empty_url, clock) as store, monkeypatch.context() as before:
        migrated_to(store, "0001")
        before.setattr(Keeping, "roll", lambda *_: None)  # there were no days then
        store.keep(store.begin_poll("vast", _everything()), Parsed(offers=(offer(provider="vast"),)))
        store.migrate()
        assert [offer(provider="vast")] == [p.offer for p in store.current()]


def _everything():
    from gpubroker.model import OfferQuery

    return OfferQuery()


def test_a_measurement_comes_back_as_it_was(store):
    """Steps whole, seconds to the millisecond."""
    number = measurements.record(store.database, RUN)
    assert [measurements.Recorded(id=number, measurement=RUN)] == measurements.recorded(store.database)
    assert (RUN,) == measurements.of_job(store.database, "sft")
    assert () == measurements.of_job(store.database, "another")


def test_measurements_are_listed_by_job_the_newest_first(store):
    """And removed by id, each once."""
    older = replace(RUN, measured_at=NOW - timedelta(days=1))
    other = replace(RUN, job="another")
    ids = [measurements.record(store.database, run) for run in (older, RUN, other)]
    assert [other, RUN, older] == [kept.measurement for kept in measurements.recorded(store.database)]
    assert 1 == measurements.remove(store.database, [ids[0], 999])
    assert 0 == measurements.remove(store.database, [ids[0]])
    assert [other, RUN] == [kept.measurement for kept in measurements.recorded(store.database)]


@pytest.mark.parametrize(
    "change", [{"steps": Decimal(0)}, {"seconds": Decimal("0.0001")}], ids=["steps", "time"]
)
def test_a_measurement_of_nothing_is_refused(store, change):
    """It would be an infinite or a zero speed."""
    with pytest.raises(ValueError, match="at least one step"):
        measurements.record(store.database, replace(RUN, **change))


def test_recorded_runs_convert_work(store):
    """From calibrate to hours: 2 steps/s here, 1 there."""
    slow = replace(RUN, gpu="RTX4090", form_factor="PCIe", steps=Decimal(600))
    for run in (RUN, slow):
        measurements.record(store.database, run)
    yardstick = Yardstick(
        work=parse_work("8h@h100-sxm"), measurements=measurements.of_job(store.database, "sft")
    )
    assert Decimal(16) == converter(yardstick)("RTX4090", "PCIe", 1).hours


def test_exposure_adds_up_by_kind_of_node(store):
    """Preemptions and hours, as a quote reads them."""
    later = replace(STRETCH, preemptions=0, exposed_s=3600, since_at=NOW, until_at=NOW + timedelta(hours=1))
    elsewhere = replace(STRETCH, region="DE", preemptions=2)
    for stretch in (STRETCH, later, elsewhere):
        exposure.record(store.database, stretch)
    kind = {"provider": STRETCH.provider, "gpu": STRETCH.gpu, "market": STRETCH.market}
    assert (
        hazard.Exposure(**kind, region="DE", preemptions=2, hours=2),
        hazard.Exposure(**kind, region=STRETCH.region, preemptions=1, hours=3),
    ) == store.snapshot(None).exposures


@pytest.mark.parametrize(
    "change",
    [{"preemptions": -1}, {"exposed_s": -1}, {"until_at": NOW - timedelta(hours=3)}],
    ids=["preemptions", "seconds", "backwards"],
)
def test_a_stretch_that_cannot_have_been_is_refused(store, change):
    """Nothing of it is kept."""
    with pytest.raises(ValueError, match="no stretch"):
        exposure.record(store.database, replace(STRETCH, **change))
    assert () == store.snapshot(None).exposures
