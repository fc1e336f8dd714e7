"""Trace files as anyone may hand them over: whole, and broken in every way that has a sentence."""

import gzip
import json

import pytest

from gpubroker.errors import ConfigError
from gpubroker.policy.traces import Trace, groups, read_traces, timeline
from tests.support import SHARED
from tests.traces import trace

ROWS = "seconds,available,price_usd_per_hour\n0,1,0.5\n600,0,\n1200,1,0.75\n"
RECORD = {
    "name": "a",
    "file": "a.csv.gz",
    "group": "pool",
    "zone": "us-1a",
    "step_seconds": 600,
    "on_demand_price": 2.0,
    "default_spot_price": 0.6,
}


@pytest.fixture
def folder(tmp_path):
    """A directory with one trace; `write` replaces the record's fields or the rows."""

    def write(rows=ROWS, records=None, **fields):
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(rows.encode()) if isinstance(rows, str) else rows)
        record = {key: value for key, value in {**RECORD, **fields}.items() if value is not ...}
        manifest = {"format": "spot-trace-csv-1", "traces": [record] if records is None else records}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path

    write.path = tmp_path
    return write


def test_a_trace_is_read_with_the_manifests_price_where_it_has_none(folder):
    """By directory and by file alike."""
    expected = Trace(
        name="a",
        group="pool",
        zone="us-1a",
        step_s=600,
        on_demand_usd_per_hour=2.0,
        available=(True, False, True),
        spot_usd_per_hour=(0.5, 0.6, 0.75),
    )
    assert [expected] == read_traces([folder()])
    assert [expected] == read_traces([folder() / "a.csv.gz"])


def test_an_unpacked_file_is_read_too(folder):
    """Whoever unpacked it need not pack it again."""
    assert 3 == len(read_traces([folder(ROWS.encode())])[0].available)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        pytest.param("", "the header is not", id="empty"),
        pytest.param("a,b,c\n0,1,1\n", "the header is not", id="header"),
        pytest.param(ROWS[:37], "no steps", id="no rows"),
        pytest.param(ROWS + "1800,1\n", "a.csv.gz:5: 2 columns instead of 3", id="columns"),
        pytest.param(ROWS + "2400,1,1\n", "a.csv.gz:5: seconds is '2400', the step is 1800", id="gap"),
        pytest.param(ROWS + "1800,2,1\n", "a.csv.gz:5: available is '2', not 0 or 1", id="flag"),
        pytest.param(ROWS + "1800,1,nan\n", "a.csv.gz:5: 'nan' is not a price", id="nan"),
        pytest.param(ROWS + "1800,1,-1\n", "a.csv.gz:5: '-1' is not a price", id="negative"),
        pytest.param(ROWS + "1800,1,1e9\n", "a.csv.gz:5: '1e9' is not a price", id="huge"),
        pytest.param(b"\x1f\x8bnot gzip at all", "a.csv.gz: ", id="corrupt gzip"),
        pytest.param(gzip.compress(ROWS.encode())[:-9], "a.csv.gz: ", id="cut gzip"),
        pytest.param(b"\xff\xfe\x00", "a.csv.gz: ", id="no text"),
    ],
)
def test_a_broken_file_is_refused_in_a_sentence_that_names_it(folder, rows, said):
    """With the line where there is one."""
    with pytest.raises(ConfigError) as caught:
        read_traces([folder(rows)])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        pytest.param({"step_seconds": 0}, "step_seconds 0 is not between", id="step"),
        pytest.param({"step_seconds": True}, "step_seconds True is not between", id="bool"),
        pytest.param({"on_demand_price": None}, "on_demand_price is missing", id="no price"),
        pytest.param({"on_demand_price": "x"}, "'x' is not a price", id="text"),
        pytest.param(
            {"default_spot_price": ...}, "no price, and the manifest has no default", id="no default"
        ),
        pytest.param({"name": ""}, "a trace without name", id="no name"),
        pytest.param({"file": "../b.csv.gz"}, "b.csv.gz: No such file", id="elsewhere"),
        pytest.param({"records": []}, "not a manifest", id="no records"),
        pytest.param({"records": [1]}, "a trace's record is not an object", id="no object"),
    ],
)
def test_a_broken_manifest_is_refused_in_a_sentence(folder, fields, said):
    """It names the manifest, and the trace where it can."""
    with pytest.raises(ConfigError) as caught:
        read_traces([folder(**fields)])
    assert said in str(caught.value)


def test_a_manifest_that_is_no_json_or_not_there_is_refused(folder):
    """And a file that it does not know."""
    path = folder()
    (path / "b.csv.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="has no record of this file"):
        read_traces([path / "b.csv.gz"])
    (path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json: not JSON"):
        read_traces([path])
    (path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json: No such file"):
        read_traces([path])


def test_a_timeline_is_cut_to_its_shortest_zone_and_has_the_cheapest_on_demand_price():
    """Zones of one group side by side."""
    world = timeline([trace("1101", zone="a"), trace("011", zone="b", on_demand=2.5, price=2.0)])
    assert ((True, False), (True, True), (False, True)) == world.available
    assert (2.5, ((1.0, 2.0),) * 3) == (world.on_demand_usd_per_hour, world.price)
    assert ("g", ("a", "b"), (1, 1, 1)) == (world.name, world.zones, world.unchanged)


def test_groups_are_the_groups_of_several_zones():
    """One of a single zone is no multi-zone job."""
    made = groups([trace("1", zone="a"), trace("1", zone="b"), trace("1", group="alone")])
    assert [("g", ("a", "b"))] == [(world.name, world.zones) for world in made]


def test_zones_of_unlike_steps_are_no_group():
    """They are not aligned in time."""
    with pytest.raises(ConfigError, match="must have the same step"):
        timeline([trace("1"), trace("1", step_s=600)])


@pytest.mark.skipif(not (SHARED / "traces").is_dir(), reason="the public spot traces are not here")
def test_every_public_trace_is_read():
    """14 traces, two groups of several zones."""
    traces = read_traces([SHARED / "traces"])
    assert (14, [4, 5]) == (len(traces), [len(world.zones) for world in groups(traces)])
