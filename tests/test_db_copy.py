"""`gpubroker db copy`: the same rows in another database, or none; and all goes on there."""

import json
import random
import sqlite3
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Boolean, Text, insert, make_url, select

from gpubroker.cli import main
from gpubroker.errors import ConfigError, StoreError
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import copying
from gpubroker.prices.copying import copy
from gpubroker.prices.database import Database
from gpubroker.prices.export import names_of
from gpubroker.prices.exports import since_last
from gpubroker.prices.store import Store
from gpubroker.prices.tables import Moment, Money, metadata
from gpubroker.run.leases import Leases
from gpubroker.run.records import Records
from tests.database import rows_of, sweep
from tests.support import EXAMPLES_FACTOR, NOW, FakeClock
from tests.test_bill import offer
from tests.test_db_check import count_rows, fill, wrong
from tests.test_history_daily import FAR
from tests.test_store_history import in_order, play

# Kept by the store itself, as random polls leave them.
POLLED = {
    *("polls", "coverage", "products", "offers", "rates", "spans", "latest", "listings", "daily", "rolled"),
    "exports",
    "stays",
}


def furnish(store, chance):
    """Two rows in every table that polls do not fill, of all types; jobs before what belongs to them."""
    with store.database.write() as connection:
        for table in metadata.sorted_tables:
            if table.name in POLLED:
                continue
            for number in range(2):
                row = {column.name: value(connection, column, number, chance) for column in table.c}
                connection.execute(insert(table).values(row))


TEXTS = ("é", "\\", "a\tb\nc", "\\N", "", chr(0x1F600))


def value(connection, column, number, chance):
    """What fits; NULL, where it may be, in every second row."""
    if column.nullable and (number or not chance.random() < 0.5):
        return None
    for key in column.foreign_keys:
        there = list(connection.scalars(select(key.column)))
        return chance.choice(there) if there else None
    if column.primary_key and not isinstance(column.type, Text):
        return 7 + 3 * number
    made = {
        Money: lambda: Decimal(chance.randrange(10**9)) / 10**6,
        Moment: lambda: datetime.fromtimestamp(chance.randrange(2**31), UTC),
        Boolean: lambda: chance.random() < 0.5,
        Text: lambda: f"{number} {chance.choice(TEXTS)}",
    }
    return made.get(type(column.type), lambda: chance.randrange(2**30) * 2 + number)()


def everything(store):
    """table -> its rows, as the database has them but for truth, which SQLite says in numbers."""
    found = {}
    for table in metadata.sorted_tables:
        names = ", ".join(column.name for column in table.c)
        rows = rows_of(store, f"SELECT {names} FROM {table.name}")
        found[table.name] = in_order(tuple(int(v) if isinstance(v, bool) else v for v in row) for row in rows)
    return found


@contextmanager
def opened(url):
    with Store.open(url, FakeClock()) as store:
        yield store


def sqlite_url(folder, name):
    return f"sqlite:///{folder}/{name}.db"


@settings(
    max_examples=5 * EXAMPLES_FACTOR,
    deadline=None,
    phases=[
        Phase.explicit,
        Phase.generate,
    ],  # each example is three databases: a smaller one is found by hand
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=st.lists(FAR, max_size=8), seed=st.integers(0, 1000))
def test_there_and_back_is_the_same_in_every_row_and_all_goes_on(tmp_path, postgres_url, sequence, seed):
    """From SQLite to a server to SQLite; polls and exports say the same on all three from then on."""
    urls = (sqlite_url(tmp_path, "old"), postgres_url, sqlite_url(tmp_path, "new"))
    stores = [Store.open(url, FakeClock()) for url in urls]
    try:
        old, server, new = stores
        for store in stores:
            store.migrate()
            sweep(store)
        play(old, sequence)
        since_last(old.database, "nightly", "there/", ".csv", count_rows)
        furnish(old, random.Random(seed))
        expected = everything(old)
        copied = copy(old.database, server.database)
        assert copied == copy(server.database, new.database)
        assert [expected, expected] == [everything(server), everything(new)]
        assert {name: len(rows) for name, rows in expected.items()} == {one.table: one.rows for one in copied}
        now = old._clock.now()
        found = [go_on(store, now) for store in stores]
        assert found[0] == found[1] == found[2]
    finally:
        for store in stores:
            store.close()


def go_on(store, now):
    """Polls, an export and a job more; what is then there to see."""
    store._clock.advance((now - store._clock.now()).total_seconds())
    for number in range(3):
        store._clock.advance(86400)
        there = (offer(provider="one", machine_id="new", usd_per_hour=Decimal(1 + number)),)
        store.keep(store.begin_poll("one", OfferQuery()), Parsed(offers=there))
    rows = []
    with store.database.read() as connection:
        products = names_of(partial(store.database.run, connection)).products

    def put(name, batches, begin):
        rows.extend((products[row.product_id][:-1], row[3:]) for batch in batches for row in batch)
        return len(rows)

    (run,) = since_last(store.database, "nightly", "there/", ".csv", put)
    Records(store.database, store._clock).add_job("sft", "{}")
    assert {"compactions"} == set(wrong(store))  # made up by `furnish`
    return in_order(store.observations("one")), run.number, sorted(rows, key=repr)


@pytest.fixture
def old(tmp_path):
    with opened(sqlite_url(tmp_path, "old")) as store:
        store.migrate()
        fill(store)
        yield store


def test_a_number_that_was_given_is_given_to_nobody_else(old, postgres_url, tmp_path):
    """An event names an alert that is gone; so does an id of a row that went in PostgreSQL."""
    alert = "INSERT INTO alerts (created_at, wanted, usd_per_gpu_hour) VALUES (1, '{}', 1) RETURNING id"
    with old.database.write() as connection:
        for _ in range(3):
            old.database.run(connection, alert).all()
        old.database.run(connection, "DELETE FROM alerts WHERE id > 1")
    with opened(postgres_url) as server, opened(sqlite_url(tmp_path, "new")) as new:
        copy(old.database, server.database)
        copy(server.database, new.database)
        found = []
        for store in (old, server, new):
            with store.database.write() as connection:
                found.append(store.database.run(connection, alert).scalar())
    assert [4, 4, 4] == found


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("empty_url", ["sqlite", "postgresql"], indirect=True)
def test_killed_at_any_batch_there_is_nothing_and_the_next_copy_is_whole(old, empty_url, monkeypatch):
    """Half of it is never there to be taken for all."""
    monkeypatch.setattr(copying, "_BATCH", 10)
    with opened(empty_url) as new:
        total = 0

        def on_rows(table, rows, limit):
            nonlocal total
            total += 1
            if total == limit:
                raise Killed

        for limit in (1, 2, 5, 9, 14, 20, 24):
            total = 0
            with pytest.raises(Killed):
                copy(old.database, new.database, on_rows=partial(on_rows, limit=limit))
            assert {0} == set(new.counts().values()), limit
        total = 0
        copy(old.database, new.database, on_rows=partial(on_rows, limit=None))
        assert total > 24
        assert everything(old) == everything(new)


def test_what_comes_out_other_than_it_went_in_is_not_kept(old, tmp_path, monkeypatch):
    """A row that the target lost or changed."""
    load = Database.load

    def lossy(self, connection, table, columns, rows):
        changed = [(*row[:-1], 1) for row in rows[:1]] if table == "spans" else rows[:1]
        load(self, connection, table, columns, [*changed, *rows[1:]])

    monkeypatch.setattr(Database, "load", lossy)
    with opened(sqlite_url(tmp_path, "new")) as new:
        with pytest.raises(StoreError, match="spans came out other than it went in"):
            copy(old.database, new.database)
        assert {0} == set(new.counts().values())


def test_nobody_writes_into_the_old_one_while_it_is_copied(old, tmp_path):
    """What came late would be left behind."""
    held = []

    def on_rows(table, rows):
        other = sqlite3.connect(old.path, timeout=0, isolation_level=None)
        try:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            held.append(table)
        finally:
            other.close()

    with opened(sqlite_url(tmp_path, "new")) as new:
        copy(old.database, new.database, on_rows=on_rows)
    assert "spans" in held


def test_an_older_database_is_upgraded_first(old, tmp_path):
    """By its own command: copying changes nothing in the source."""
    with old.database.write() as connection:
        old.database.run(connection, "UPDATE alembic_version SET version_num = '0001'")
    with (
        opened(sqlite_url(tmp_path, "new")) as new,
        pytest.raises(ConfigError, match="run gpubroker db upgrade"),
    ):
        copy(old.database, new.database)


# The command


@pytest.fixture
def ask(capsys):
    """`ask(*words)` -> exit code, what was printed, what was said."""

    def _ask(*words):
        capsys.readouterr()
        code = main(["db", "copy", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return _ask


def test_the_command_prints_rows_and_digests(ask, old, postgres_url, tmp_path):
    """And says which variable names the new one now; a second copy is refused."""
    code, out, said = ask(sqlite_url(tmp_path, "old"), postgres_url, "--format", "json")
    told = json.loads(out)
    assert 0 == code, said
    assert {name: len(rows) for name, rows in everything(old).items()} == {
        one["table"]: one["rows"] for one in told["tables"]
    }
    assert "GPUBROKER_DB_URL, or db_url in config.toml, names it now" in said
    code, _, said = ask(sqlite_url(tmp_path, "old"), postgres_url)
    assert (2, True) == (code, "already has" in said), said
    code, out, _ = ask(postgres_url, sqlite_url(tmp_path / "deep", "new"))
    assert (0, ["table", "rows", "digest"]) == (code, out.splitlines()[0].split())
    assert max(map(len, out.splitlines())) <= 100


def test_a_supervisor_or_a_poll_that_runs_is_waited_for_by_the_user(ask, old, tmp_path):
    """What they write would be left behind; a poll that died long ago is none."""
    urls = (sqlite_url(tmp_path, "old"), sqlite_url(tmp_path, "new"))
    clock = FakeClock(datetime.now(UTC))
    with Store.open(urls[0], clock) as store:
        leases = Leases(store.database, clock, host="h", pid=1)
        leases.renew()
        code, _, said = ask(*urls)
        assert (2, True) == (code, "runs jobs on it: stop what uses it" in said), said
        clock.advance(-3600)
        leases.leave()
        job = Records(store.database, clock).add_job("sft", "{}")
        with store.database.hold(f"job {job}"):
            code, _, said = ask(*urls)
            assert (2, True) == (code, f"job {job} is running: stop what uses it" in said), said
        store.begin_poll("vast", OfferQuery())
        code, _, said = ask(*urls)
        assert 0 == code, said
        clock.advance(3600)
        store.begin_poll("vast", OfferQuery())
    code, _, said = ask(urls[0], sqlite_url(tmp_path, "newer"))
    assert (2, True) == (code, "a poll of vast is running" in said), said


def test_tables_of_something_else_are_left_alone(ask, old, tmp_path):
    """The target is empty, or it is another's."""
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE photos (id)")
    connection.close()
    code, _, said = ask(sqlite_url(tmp_path, "old"), f"sqlite:///{other}")
    assert (2, True) == (code, "has tables of something else (photos)" in said), said


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        pytest.param("nonsense", "sqlite:////x.db", "SOURCE is not a database URL", id="no URL"),
        pytest.param("postgresql:///x", "mysql://h/x", "TARGET: mysql is neither", id="MySQL"),
        pytest.param("sqlite://", "sqlite:////tmp/x.db", "SOURCE: that names no file", id="in memory"),
    ],
)
def test_what_is_no_database_is_one_sentence(ask, source, target, sentence):
    """And exit 2."""
    code, out, said = ask(source, target)
    assert (2, "", True) == (code, out, sentence in said), said


def test_a_source_that_is_not_there_is_not_made(ask, tmp_path):
    """Opening it would leave an empty one."""
    code, _, said = ask(f"sqlite:///{tmp_path}/folder/none.db", sqlite_url(tmp_path, "new"))
    assert (2, True, []) == (code, "there is no database at" in said, list(tmp_path.iterdir())), said


def test_a_password_is_never_shown(ask, old, tmp_path, postgres_url):
    """Not in an error, nor in what is printed at the end."""
    away = "postgresql://me:hunter2@127.0.0.1:1/db"
    code, out, said = ask(sqlite_url(tmp_path, "old"), away)
    assert (2, False) == (code, "hunter2" in out + said), said
    url = make_url(postgres_url).set(password="hunter2").render_as_string(hide_password=False)
    for output in ("table", "json"):
        with Store.open(postgres_url, FakeClock(NOW)) as store:
            if store.revision():
                sweep(store)
        code, out, said = ask(sqlite_url(tmp_path, "old"), url, "--format", output)
        assert (0, False) == (code, "hunter2" in out + said), said
