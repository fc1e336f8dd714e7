"""Exports of points: the history's own figures in files, whole or since the last day that was over."""

import csv
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.cli import main
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import export_points
from gpubroker.prices.daily import Where
from gpubroker.prices.exports import Points, since_last
from gpubroker.prices.history import STATS, Query, own
from gpubroker.prices.rows import DAY_S
from gpubroker.prices.store import Store
from tests.support import EXAMPLES_FACTOR, NOW, FakeClock
from tests.test_bill import offer
from tests.test_history_daily import FAR, clean  # noqa: F401
from tests.test_store_history import play

HOUR_S = 3600
BEGIN = int(NOW.timestamp()) // DAY_S * DAY_S


def expected(store, until, **more):
    """By the history itself, all days at once."""
    query = Query(
        **{"where": Where(), "begin": BEGIN, "end": until, "bucket_s": HOUR_S, "by": export_points.BY}
        | {"stats": STATS}
        | more
    )
    with store.database.read() as connection:
        return own(partial(store.database.run, connection), query)


@settings(
    max_examples=20 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=st.lists(FAR, max_size=6), cut=st.integers(0, 4))
def test_days_are_the_history_whichever_runs_they_are_in(store, sequence, cut):
    """Up to any midnight, and on from there; each provider by itself."""
    play(store, sequence)
    until = BEGIN + 40 * DAY_S
    middle = {"one": BEGIN + cut * DAY_S, "two": BEGIN + 2 * DAY_S}
    with store.database.read() as connection:
        run = partial(store.database.run, connection)
        runs = [({}, middle), (middle, dict.fromkeys(middle, until))]
        found = [
            (day, point)
            for after, up_to in runs
            for day, batches in export_points.by_day(run, Where(), HOUR_S, after, up_to)
            for batch in batches
            for point in batch
        ]
    key = lambda point: (point.begin, point.group)  # noqa: E731
    assert sorted(expected(store, until), key=key) == sorted((point for _, point in found), key=key)
    assert {int(point.begin.timestamp()) // DAY_S for _, point in found} == {day for day, _ in found}
    assert all(int(point.begin.timestamp()) // DAY_S == day for day, point in found)


def poll(store, usd, hours=6):
    store._clock.advance(timedelta(hours=hours).total_seconds())
    found = offer(provider="x", usd_per_hour=Decimal(usd), gpu_count=4)
    store.keep(store.begin_poll("x", OfferQuery()), Parsed(offers=(found,)))


def test_each_day_that_is_over_is_in_one_run_also_when_runs_are_cut_off(clean):  # noqa: F811
    """A run that died after its first file is made again, by the same names."""
    files = {}

    def put(name, batches, begin, *, dies_at=99):
        if len(files) >= dies_at:
            raise OSError("the machine died")
        files[name] = [point for batch in batches for point in batch]
        return len(files[name])

    for number in range(9):
        poll(clean, 1 + number)
    with pytest.raises(OSError, match="died"):
        since_last(clean.database, "a", "p/", ".csv", partial(put, dies_at=1), Points(HOUR_S))
    (begun,) = files
    for _ in range(4):
        poll(clean, 20)
    again, more = since_last(clean.database, "a", "p/", ".csv", put, Points(HOUR_S))
    assert (True, 1, False, 2) == (again.was_cut_off, again.number, more.was_cut_off, more.number)
    assert begun in again.files
    assert {name.partition("/")[0] for name in again.files}.isdisjoint(
        name.partition("/")[0] for name in more.files
    )
    last = max(files)
    assert ("points-1h-000002.csv", "day=") == (last.partition("/")[2], last[:4])
    with clean.database.read() as connection:
        over = export_points.days_over(partial(clean.database.run, connection))["x"]
    every = [point for name in sorted(files) for point in files[name]]
    assert expected(clean, over) == every
    assert [] == since_last(clean.database, "a", "p/", ".csv", put, Points(HOUR_S))
    with pytest.raises(OSError, match="died"):
        since_last(clean.database, "a", "p/", ".csv", partial(put, dies_at=0), Points(DAY_S))


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """`export(*words)` -> exit code, what was said; after three days of polls."""
    url = f"sqlite:///{tmp_path}/p.db"
    monkeypatch.setenv("GPUBROKER_DB_URL", url)
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    with Store.open(url, FakeClock(midnight - timedelta(days=3))) as store:
        store.migrate()
        for number in range(13):
            poll(store, 8 + number, hours=6)

    def _export(*words):
        capsys.readouterr()
        code = main(["export", *words])
        return code, capsys.readouterr().err

    return _export


def records(path):
    if path.suffix == ".parquet":
        pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra [parquet]")
        return [
            {
                name: f"{value:f}" if isinstance(value, Decimal) else value
                for name, value in {**row, "begin": row["begin"].strftime("%Y-%m-%dT%H:%M:%SZ")}.items()
            }
            for row in pq.read_table(path).to_pylist()
        ]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    numbers = {"resample_s": int, "gpu_count": int, "observations": int, "available_share": float}
    return [
        {name: numbers.get(name, str)(value) for name, value in row.items()}
        for row in csv.DictReader(path.read_text().splitlines())
    ]


def test_every_format_has_the_same_in_it(export, tmp_path):
    """Exact, and with what it is by."""
    files = [tmp_path / f"points.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    for path in files:
        code, said = export("--resample", "12h", "--to", str(path))
        assert (0, f"7 points in 1 file to {path}\n") == (code, said)
    first, *others = [records(path) for path in files]
    assert [first] * 2 == others
    assert list(export_points.COLUMNS) == list(first[0])
    assert {
        "p50_usd_per_gpu_hour": "2.375000",
        "observations": 2,
        "gpu_count": 4,
        "provider": "x",
    }.items() <= (first[1].items())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--resample", "7h", "--to", "x.csv"), "it divides one", id="no part of a day"),
        pytest.param(("--resample", "soon", "--to", "x.csv"), "is not a duration", id="no time"),
    ],
)
def test_what_is_no_stretch_of_a_day_is_refused(export, words, sentence):
    """One sentence, and exit 2."""
    code, said = export(*words)
    assert (2, True) == (code, sentence in said)


def test_a_cursor_of_points_is_another_than_that_of_spans(export, tmp_path):
    """The same name may be used for both."""
    place = f"{tmp_path}/out/"
    assert 0 == export("--cursor", "nightly", "--as", "csv", "--to", place)[0]
    code, said = export("--cursor", "nightly", "--as", "csv", "--to", place, "--resample", "1d")
    assert (0, f"3 points in 3 files to {place}\n") == (code, said)
    found = sorted(path.name for path in (tmp_path / "out").rglob("points*"))
    assert ["points-1d-000001.csv"] * 3 == found
    assert (0, "Nothing has ended since the last export.\n") == export(
        "--cursor", "nightly", "--as", "csv", "--to", place, "--resample", "1d"
    )
