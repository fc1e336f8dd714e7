"""Exports: what was observed is in the files, whole or since the last time, whatever kills a run in between."""

import csv
import gzip
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.market_year import Size, write
from gpubroker.cli import main
from gpubroker.errors import StoreError
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import export, export_source
from gpubroker.prices.daily import Where
from gpubroker.prices.export import COLUMNS, Range, Row
from gpubroker.prices.store import Store
from tests.support import EXAMPLES_FACTOR, NOW, FakeClock
from tests.test_bill import offer
from tests.test_history_daily import FAR
from tests.test_store_history import play

# Each is a process that dies; in .ci/soak there are fifty.
KILLS = 15 if EXAMPLES_FACTOR == 1 else 50


def spans(store):
    """As the database has them."""
    columns = ", ".join([*(f"p.{name}" for name in export.PRODUCT), "o.machine_id", "s.usd_per_hour"])
    rates = ", ".join(f"r.{name}" for name in export.RATES)
    sql = (
        f"SELECT {columns}, {rates}, s.first_at, s.until_at FROM spans s JOIN offers o ON o.id = s.offer_id"
        " JOIN products p ON p.id = o.product_id JOIN rates r ON r.id = s.rates_id"
    )
    with store.database.read() as connection:
        return [typed(dict(zip(COLUMNS, row, strict=True))) for row in store.database.run(connection, sql)]


def typed(record):
    """With money as Decimal, moments in UTC and truth as bool."""
    for name, value in record.items():
        if value is None:
            continue
        if name in export.USD:
            record[name] = Decimal(int(value)) / 10**6
        elif name in export.MOMENTS:
            record[name] = datetime.fromtimestamp(value, UTC)
        elif name in export.BOOLEANS:
            record[name] = bool(value)
    return record


def in_order(records):
    return sorted(records, key=repr)


def written(store, kind, zipped=False, where=Where()):  # noqa: B008
    with store.database.read() as connection:
        run = partial(store.database.run, connection)
        file = io.BytesIO()
        rows = export.write_stream(
            file, kind, zipped, export.all_spans(run, where), export.spans_of(export.names_of(run))
        )
    return rows, file.getvalue()


def read_back(kind, data):
    """Records of a file, as `typed` has them."""
    if kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra [parquet]")
        return pq.read_table(io.BytesIO(data)).to_pylist()
    if kind == "jsonl":
        records = [json.loads(line) for line in data.decode().splitlines()]
    else:
        records = list(csv.DictReader(io.StringIO(data.decode())))
    return [_typed_text(record) for record in records]


def _typed_text(record):
    found = {}
    for name, value in record.items():
        if value is None or (value == "" and name in _MAY_BE_NULL):
            found[name] = None
        elif name in export.USD:
            found[name] = Decimal(value)
        elif name in export.MOMENTS:
            found[name] = datetime.fromisoformat(value)
        elif name in export.BOOLEANS:
            found[name] = value in (True, "true")
        else:
            found[name] = int(value) if name in _WHOLE else value
    return found


_WHOLE = {"gpu_count", "vram_gib", "billing_increment_s", "minimum_s", "disk_included_gb"}
_MAY_BE_NULL = (export.USD | {"verified", "until_at"}) - {"usd_per_hour"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@settings(
    max_examples=30 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=st.lists(FAR, max_size=6))
def test_a_file_has_each_span_to_the_micro_dollar(store, kind, sequence):
    """In its format's own types."""
    play(store, sequence)
    rows, data = written(store, kind)
    expected = spans(store)
    assert len(expected) == rows
    assert in_order(expected) == in_order(read_back(kind, data))


def test_the_same_rows_are_the_same_bytes(store):
    """Compressed, too: no time and no name is in them."""
    play(store, [])
    poll(store, offer(provider="x"))
    for kind, zipped in (("csv", True), ("jsonl", True), ("parquet", False)):
        if kind != "parquet" or pytest.importorskip("pyarrow"):
            assert written(store, kind, zipped) == written(store, kind, zipped)
    assert gzip.decompress(written(store, "csv", zipped=True)[1]) == written(store, "csv")[1]


def poll(store, *offers, hours=1, provider="x"):
    store._clock.advance(hours * 3600)
    return store.keep(store.begin_poll(provider, OfferQuery()), Parsed(offers=offers))


def test_days_follow_one_another_whatever_batches_are(monkeypatch):
    """Each day is whole before the next."""
    monkeypatch.setattr(export, "BATCH", 3)
    day = export.DAY_S
    rows = [Row(1, "", 1, n, 0, until) for n, until in enumerate([5, 9, day, day, day + 1, 3 * day])]
    rows += [Row(1, "", 1, n, 0, None) for n in range(2)]
    found = [
        (day, [row.usd_micros for batch in b for row in batch])
        for day, b in export.by_day(export._batches(rows))
    ]
    assert [(0, [0, 1]), (1, [2, 3, 4]), (3, [5]), (-1, [0, 1])] == found


def test_a_range_is_each_providers_own(store):
    """One that polled later has more in it."""
    play(store, [])
    for provider in ("one", "two", "one", "one"):
        poll(
            store,
            *(offer(provider=provider, usd_per_hour=Decimal(n)) for n in range(1, 2)),
            provider=provider,
        )
        poll(store, provider=provider)
    with store.database.read() as connection:
        run = partial(store.database.run, connection)
        up_to = export.ended_up_to(run)
        every = [row for batch in export.ended_spans(run, Range(after={}, up_to=up_to)) for row in batch]
        assert 4 == len(every)
        middle = {"one": every[0].until_at, "two": every[1].until_at}
        first = [row for b in export.ended_spans(run, Range(after={}, up_to=middle)) for row in b]
        rest = [row for b in export.ended_spans(run, Range(after=middle, up_to=up_to)) for row in b]
    assert every == [*first, *rest]
    assert 2 == len(first)


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A made-up market of a day, with open spans and more offers than a block of them has."""
    path = tmp_path_factory.mktemp("market") / "p.db"
    write(path, Size(polls=300, offers=400, new=0.5), int(NOW.timestamp()) // export.DAY_S * export.DAY_S)
    return path


@pytest.mark.parametrize(
    "where", [Where(), Where(gpus={"H100", "CARD1"}, markets={"spot"}), Where(providers={"nobody"})]
)
def test_columns_are_the_rows_in_their_order(market, monkeypatch, where):
    """Read by another process, whatever batches and blocks of offers are."""
    pytest.importorskip("adbc_driver_sqlite", reason="needs the extra [parquet]")
    monkeypatch.setattr(export_source, "BATCH", 100)
    with Store.open(f"sqlite:///{market}", FakeClock()) as store, store.database.read() as connection:
        expected = [
            row for batch in export.all_spans(partial(store.database.run, connection), where) for row in batch
        ]
    found = [Row(**row) for batch in export_source.columns(market, where) for row in batch.to_pylist()]
    assert expected == found
    assert (0 == len(found)) is (where.providers is not None)


def test_what_offers_are_is_read_in_blocks_of_which_few_are_kept(market, monkeypatch):
    """Memory does not grow with all offers that a market ever had."""
    pytest.importorskip("adbc_driver_sqlite", reason="needs the extra [parquet]")
    import adbc_driver_sqlite
    import numpy as np
    from adbc_driver_manager import AdbcConnection

    from gpubroker.prices import arrow, export_reader

    monkeypatch.setattr(export_reader, "_BLOCK", 16)
    monkeypatch.setattr(export_reader, "_BLOCKS", 3)
    with closing(sqlite3.connect(market)) as database:
        expected = {
            row[0]: row[1:] for row in database.execute("SELECT id, product_id, machine_id FROM offers")
        }
    ids = np.array([1, *random.Random(7).choices(sorted(expected), k=300), max(expected)])
    with (
        adbc_driver_sqlite.connect(f"{market.as_uri()}?mode=rw") as opened,
        AdbcConnection(opened) as connection,
    ):
        offers = export_reader._Offers(connection)
        for some in np.split(ids, [2, 50, 51]):
            product_ids, machine_ids = offers.of(some)
            found = zip(arrow.numbers(product_ids).tolist(), machine_ids.to_pylist(), strict=True)
            assert [expected[one] for one in some.tolist()] == list(found)
            assert len(set(machine_ids.dictionary.to_pylist())) == len(machine_ids.dictionary)
        assert 3 == len(offers._blocks)


def test_a_reader_that_fails_is_one_sentence(tmp_path):
    """And what it said is in it."""
    pytest.importorskip("adbc_driver_sqlite", reason="needs the extra [parquet]")
    (tmp_path / "photo.jpg").write_bytes(b"JFIF" * 1000)
    with pytest.raises(StoreError, match=r"photo.jpg cannot be read: .*file is not a database"):
        export_source.columns(tmp_path / "photo.jpg", Where())


def test_rows_do_where_adbc_is_not_installed(market, tmp_path, monkeypatch, capsys):
    """The file has the same in it."""
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra [parquet]")
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{market}")
    for name, is_here in (("columns", export_source.is_here), ("rows", lambda: False)):
        monkeypatch.setattr(export_source, "is_here", is_here)
        assert 0 == main(["export", "--to", str(tmp_path / f"{name}.parquet")])
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("columns", "rows")]
    assert tables[0].schema.equals(tables[1].schema, check_metadata=True)
    assert tables[0].to_pylist() == tables[1].to_pylist()


def test_a_server_sends_some_rows_at_a_time(store):
    """All of them in memory would be as much as there is."""
    with store.database.read() as connection:
        sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) SELECT i FROM n"
        found = store.database.stream(connection, sql, (30_000,))
        assert store.database.is_sqlite or "ServerCursor" == type(found.cursor).__name__
        assert 30_000 == sum(1 for _ in found)


# The command


@pytest.fixture
def ask(tmp_path, monkeypatch, capfdbinary):
    """`ask(*words)` -> exit code, the bytes that were printed, what was said."""
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")

    def _ask(*words):
        capfdbinary.readouterr()
        code = main(["export", *words])
        sys.stdout.flush()
        printed = capfdbinary.readouterr()
        return code, printed.out, printed.err.decode()

    return _ask


@pytest.fixture
def polled(tmp_path):
    """A store of a user whose prices change at every poll."""
    clock = FakeClock(NOW)
    with Store.open(f"sqlite:///{tmp_path}/p.db", clock) as store:
        store.migrate()
        yield store


def change(store, number, offers=3):
    mine = [offer(provider="x", sku=str(n), usd_per_hour=Decimal(number + 1)) for n in range(offers)]
    poll(store, *mine, hours=5)


def all_in(folder):
    """Records of all files, and their names."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("spans-*"))
    return [record for name in names for record in read_back("csv", (folder / name).read_bytes())], names


def test_cron_adds_what_has_ended_and_nothing_twice(ask, polled, tmp_path):
    """By the day of its end."""
    words = ("--cursor", "nightly", "--as", "csv", "--to", f"{tmp_path}/out/")
    for number in range(12):
        change(polled, number)
        if number % 4 == 3:
            assert 0 == ask(*words)[0]
    found, names = all_in(tmp_path / "out")
    expected = [one for one in spans(polled) if one["until_at"] is not None]
    assert in_order(expected) == in_order(found)
    assert {"day=2026-11-24/spans-000001.csv", "day=2026-11-27/spans-000003.csv"} <= set(names)
    assert (0, b"", "Nothing has ended since the last export.\n") == ask(*words)


def test_all_of_it_goes_to_a_file_or_to_standard_output(ask, polled, tmp_path):
    """What is open has no end."""
    change(polled, 1)
    change(polled, 2)
    path = tmp_path / "all.csv.gz"
    code, out, said = ask("--to", str(path))
    assert (0, b"", f"6 spans in 1 file to {path}\n") == (code, out, said)
    found = read_back("csv", gzip.decompress(path.read_bytes()))
    assert 3 == sum(one["until_at"] is None for one in found)
    code, out, _ = ask("--as", "csv", "--to", "-", "--gpu", "h100")
    assert (0, gzip.decompress(path.read_bytes())) == (code, out)
    assert 1 == len(ask("--as", "csv", "--to", "-", "--provider", "nobody")[1].splitlines())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--to", "x.xls"), "the name must end in .csv", id="no such format"),
        pytest.param(("--to", "-"), "--as csv|", id="no format"),
        pytest.param(
            ("--to", "x.csv", "--cursor", "c"), "--cursor takes a folder/", id="a cursor and a file"
        ),
        pytest.param(
            (
                "--to",
                "/proc/x/y.csv",
            ),
            "/proc/x/y.csv: ",
            id="cannot be written",
        ),
    ],
)
def test_what_cannot_be_written_is_one_sentence(ask, polled, words, sentence):
    """And exit 2."""
    change(polled, 1)
    code, out, said = ask(*words)
    assert (2, b"", True) == (code, out, sentence in said), said


def test_a_bucket_has_the_same_files(ask, polled, monkeypatch):
    """Its objects are named as files are; one that is not there is one sentence."""
    pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")
    import boto3

    from gpubroker.testcloud.client import running

    for number in range(4):
        change(polled, number)
    with running(speed=10) as cloud:
        for name, value in cloud.env.items():
            monkeypatch.setenv(name, value)
        store = boto3.client("s3")
        store.create_bucket(Bucket="prices")
        words = ("--cursor", "nightly", "--as", "csv", "--to")
        code, _, said = ask(*words, "s3://prices/gpu/")
        assert (0, "9 spans in 2 files to s3://prices/gpu/\n") == (code, said)
        keys = [found["Key"] for found in store.list_objects_v2(Bucket="prices")["Contents"]]
        bodies = [store.get_object(Bucket="prices", Key=key)["Body"].read() for key in keys]
        code, _, said = ask("--as", "csv", "--to", "s3://nowhere/")
    assert [f"gpu/day=2026-11-2{day}/spans-000001.csv" for day in (4, 5)] == keys
    found = [record for body in bodies for record in read_back("csv", body)]
    assert in_order(one for one in spans(polled) if one["until_at"]) == in_order(found)
    assert (2, True) == (code, "s3://nowhere/spans.csv: " in said), said


def test_a_run_that_was_cut_off_is_made_good_where_it_wrote(ask, polled, tmp_path, monkeypatch):
    """Elsewhere it is refused: half of its rows are there."""
    change(polled, 1), change(polled, 2)
    words = ("--cursor", "c", "--as", "csv", "--to")
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda fd: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert 130 == ask(*words, f"{tmp_path}/a/")[0]
    code, _, said = ask(*words, f"{tmp_path}/b/")
    assert (2, True) == (code, "was cut off while it wrote .csv files to" in said)
    change(polled, 3)
    code, _, said = ask(*words, f"{tmp_path}/a/")
    assert (0, True) == (code, "the last run was cut off: written again" in said)
    found, _ = all_in(tmp_path / "a")
    assert in_order(one for one in spans(polled) if one["until_at"] is not None) == in_order(found)


def test_kills_at_any_moment_leave_exactly_the_right_rows(polled, tmp_path):
    """At random; prices go on changing meanwhile."""
    out, chance, killed = tmp_path / "out", random.Random(7), 0
    words = [sys.executable, "-m", "gpubroker", "export", "--cursor", "c", "--as", "csv", "--to", f"{out}/"]
    env = {**os.environ, "GPUBROKER_DB_URL": f"sqlite:///{tmp_path}/p.db"}
    change(polled, 0)
    change(polled, 1, offers=400)
    began_s = time.monotonic()
    assert 0 == subprocess.run(words, env=env, capture_output=True, check=False).returncode
    whole_s, number = time.monotonic() - began_s, 1
    while killed < KILLS:
        number += 1
        assert number < 10 * KILLS
        change(polled, number, offers=400)
        began_s = time.monotonic()
        with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
            try:
                # Most of the time goes into the start: the end is where it writes.
                run.wait(whole_s * (0.5 + 0.5 * chance.random()))
                whole_s = time.monotonic() - began_s
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                killed += 1
                whole_s *= 1.1  # later and later, until one comes to its end: a machine is not always as fast
    assert 0 == subprocess.run(words, env=env, capture_output=True, check=False).returncode
    found, _ = all_in(out)
    expected = [one for one in spans(polled) if one["until_at"] is not None]
    assert len(expected) == len(found)
    assert in_order(expected) == in_order(found)
    assert [] == list(Path(out).rglob("*.part"))
