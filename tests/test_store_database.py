"""The database under the store: migration, the two column types, and every refusal as one sentence."""

import socket
import sqlite3
import sys
from contextlib import closing
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, make_url, text

from gpubroker.errors import ConfigError, SchemaTooNew, StoreError
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import database, tables
from gpubroker.prices.rows import REVISION
from gpubroker.prices.store import Store
from gpubroker.run import tables as run_tables  # noqa: F401 they join the same metadata
from tests.database import rows_of
from tests.support import NOW, FakeClock
from tests.test_bill import offer


@pytest.fixture
def opened(empty_url, clock):
    """A store whose database is still empty."""
    made = Store.open(empty_url, clock)
    yield made
    made.close()


def open_sqlite(path):
    return Store.open(f"sqlite:///{path}", FakeClock())


def shape(engine):
    """Every table and index as the database describes it: SQLite by its SQL, PostgreSQL by its catalogue."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            described = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
            return {name: sql.split() for name, sql in described if not name.startswith("alembic")}
        found = inspect(connection)
        indexes = text("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'")
        return [
            {name: definition for name, definition in connection.execute(indexes) if "alembic" not in name},
            {
                table: (
                    [
                        (c["name"], str(c["type"]), c["nullable"], c["default"])
                        for c in found.get_columns(table)
                    ],
                    sorted(
                        (f["constrained_columns"], f["referred_table"]) for f in found.get_foreign_keys(table)
                    ),
                )
                for table in found.get_table_names()
                if table != "alembic_version"
            },
        ]


def test_migrations_make_the_tables_that_the_code_knows(opened):
    """Written out in 0001 and in tables.py: the same columns, keys and indexes."""
    opened.migrate()
    engine = create_engine(opened.database._url)
    migrated = shape(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE alembic_version"))
        tables.metadata.drop_all(connection)
        tables.metadata.create_all(connection)
    created = shape(engine)
    engine.dispose()
    assert created == migrated


def test_the_newest_migration_is_the_revision_that_readers_expect():
    """fastread has no Alembic to ask."""
    scripts = ScriptDirectory(str(database._migrations()))
    assert [REVISION] == scripts.get_heads()


def test_a_new_database_has_no_revision_and_then_the_newest(opened):
    """Opening does nothing; migrating twice does nothing more."""
    assert None is opened.revision()
    opened.migrate()
    opened.migrate()
    assert REVISION == opened.revision()


def test_opening_makes_the_folder_and_no_file(tmp_path):
    """The first write makes the file."""
    path = tmp_path / "a" / "b" / "prices.db"
    store = open_sqlite(path)
    assert (True, False) == (path.parent.is_dir(), path.exists())
    assert (path, str(path)) == (store.path, store.where)


def test_sqlite_is_set_up_for_a_writer_beside_readers(tmp_path):
    """WAL, NORMAL, foreign keys: on every connection."""
    store = open_sqlite(tmp_path / "prices.db")
    store.migrate()
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    assert [("wal",), (1,), (1,), (10_000,)] == [rows_of(store, f"PRAGMA {p}")[0] for p in pragmas]
    store.close()


def test_a_newer_schema_is_refused(opened):
    """By everything that would read or write it, with what to do."""
    opened.migrate()
    with opened.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for refused in (opened.migrate, opened.check_schema, opened.revision):
        with pytest.raises(SchemaTooNew, match=r"schema 9999, newer .* upgrade gpubroker") as caught:
            refused()
        assert 2 == caught.value.exit_code


def test_a_store_without_tables_says_how_to_get_them(opened):
    """One sentence, no traceback of SQL."""
    with pytest.raises(StoreError, match="has no tables yet: run gpubroker db upgrade"):
        opened.current()


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    """It may be somebody's photograph."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"JFIF" * 1000)
    with pytest.raises(StoreError, match=r"photo.jpg is not a gpubroker database: set GPUBROKER_DB_URL"):
        open_sqlite(path).migrate()
    assert b"JFIF" * 1000 == path.read_bytes()


def test_a_folder_in_the_place_of_the_file(tmp_path):
    """It cannot be opened."""
    with pytest.raises(StoreError, match="cannot be opened: check that its folder exists"):
        open_sqlite(tmp_path).migrate()


def test_a_folder_that_cannot_be_made(tmp_path):
    """A file stands in its place."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made"):
        open_sqlite(tmp_path / "file" / "prices.db")


def test_a_read_only_database_is_not_written(tmp_path):
    """The reason is permission, and the poll is not kept."""
    store = open_sqlite(tmp_path / "prices.db")
    store.migrate()
    with store.database.read() as connection:  # the pool hands this connection out again
        connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="may not be written: give this user write permission"):
        store.begin_poll("vast", OfferQuery())
    store.close()


def test_a_full_disk_costs_the_poll_and_nothing_else(tmp_path):
    """What was kept before is still there."""
    store = open_sqlite(tmp_path / "prices.db")
    store.migrate()
    store.keep(store.begin_poll("vast", OfferQuery()), Parsed(offers=(offer(provider="vast"),)))
    poll_id = store.begin_poll("vast", OfferQuery())
    with store.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    many = tuple(offer(provider="vast", machine_id=f"machine {n}") for n in range(2000))
    with pytest.raises(StoreError, match="has no room: free some disk space"):
        store.keep(poll_id, Parsed(offers=many))
    assert [offer(provider="vast")] == [p.offer for p in store.current()]
    store.close()


def test_a_writer_that_never_ends_is_named_after_a_while(tmp_path, monkeypatch):
    """Ten seconds in earnest."""
    monkeypatch.setattr(database, "BUSY_S", 0.01)
    store = open_sqlite(tmp_path / "prices.db")
    store.migrate()
    with closing(sqlite3.connect(tmp_path / "prices.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="was being written by another process"):
            store.begin_poll("vast", OfferQuery())
        assert [] == store.current()
    store.close()


def test_a_damaged_database_says_so(tmp_path):
    """Not just any error."""
    path = tmp_path / "prices.db"
    store = open_sqlite(path)
    store.migrate()
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(StoreError, match="is damaged: restore a copy"):
        open_sqlite(path).current()


def test_a_postgresql_that_is_away_is_named_without_its_password():
    """Errors are pasted into bug reports."""
    store = Store.open("postgresql://me:secret@127.0.0.1:1/prices", FakeClock())
    with pytest.raises(StoreError, match=r"@127\.0\.0\.1:1/prices does not answer") as caught:
        store.migrate()
    assert "secret" not in str(caught.value)
    assert "secret" not in store.where
    assert None is store.path


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://u@h/d", "postgresql+psycopg"),
        ("postgresql://u@h/d", "postgresql+psycopg"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg"),
        ("sqlite:///x.db", "sqlite"),
    ],
)
def test_the_usual_spellings_of_a_url_are_known(url, driver):
    """As hosters hand them out."""
    assert driver == database._parse(url).drivername


@pytest.mark.parametrize(
    ("url", "said"),
    [
        pytest.param("/home/me/prices.db", "is not a database URL such as sqlite:", id="a path"),
        pytest.param("", "is not a database URL", id="nothing"),
        pytest.param("mysql://u:secret@h/d", "mysql is neither sqlite nor postgresql", id="another database"),
    ],
)
def test_a_url_that_is_none_is_a_configuration_error(url, said):
    """Named by its variable, without what may be secret in it."""
    with pytest.raises(ConfigError, match=f"GPUBROKER_DB_URL.*{said}") as caught:
        Store.open(url, FakeClock())
    assert "secret" not in str(caught.value)


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch):
    """The extra is not everybody's."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'gpubroker\[postgres\]'"):
        Store.open("postgresql://u@h/d", FakeClock())


def test_money_and_moments_come_back_exactly(store):
    """Micro-dollars and seconds, whatever the offset they were given in."""
    cet = timezone(timedelta(hours=1))
    with store.database.write() as connection:
        values = {"provider": "x", "unreachable_until": datetime(2026, 11, 24, 13, tzinfo=cet)}
        connection.execute(tables.provider_state.insert().values(values))
        connection.execute(tables.series.insert().values(_series()))
        series_id = connection.execute(tables.series.select()).scalar_one()
        connection.execute(
            tables.observations.insert(),
            [
                {"series_id": series_id, "observed_at": NOW, "usd_per_hour": Decimal(price)}
                for price in ("0.201481", "1000000", "0.000001")
            ],
        )
    assert NOW == store.provider_states()["x"].unreachable_until
    with store.database.read() as connection:
        found = connection.execute(tables.observations.select().order_by(tables.observations.c.usd_per_hour))
        prices = [row.usd_per_hour for row in found]
    assert ["0.000001", "0.201481", "1000000.000000"] == [str(price) for price in prices]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        pytest.param("usd_per_hour", 1.5, "money is Decimal, not float", id="a float is no money"),
        pytest.param("usd_per_hour", 1, "money is Decimal, not int", id="nor is an int"),
        pytest.param("usd_per_hour", Decimal("0.0000001"), "finer than a micro", id="unrounded"),
        pytest.param("observed_at", datetime(2026, 1, 1), "has no time zone", id="naive"),  # noqa: DTZ001
    ],
)
def test_the_column_types_refuse_what_would_be_wrong(store, column, value, said):
    """Before it reaches the database."""
    row = {"series_id": 1, "observed_at": NOW, column: value}
    with pytest.raises(Exception, match=said), store.database.write() as connection:
        connection.execute(tables.observations.insert().values(row))


def test_imported_observations_are_told_apart_by_every_value(store):
    """The same row is one, NULLs included; two prices at one moment are two."""
    rows = [(1, 5, 100, None, None), (1, 5, 100, None, None), (1, 5, 101, None, None), (1, 5, None, 1, None)]
    with store.database.write() as connection:
        connection.execute(tables.series.insert().values(id=1, **_series()))
        sql = "INSERT INTO observations VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
        added = store.database.run(connection, sql, rows).rowcount
    assert (3, 3) == (added, store.counts()["observations"])


def test_the_migrations_are_found_beside_the_package_or_inside_it():
    """A checkout, and a wheel."""
    assert Path(database.__file__).parents[2] / "migrations" == database._migrations()


def test_a_file_name_with_odd_characters_is_one_file(tmp_path):
    """Percent signs and spaces are no URL tricks, nor alembic's."""
    store = Store.open(make_url("sqlite://").set(database=str(tmp_path / "a b%41.db")), FakeClock())
    store.migrate()
    assert ["a b%41.db"] == [path.name for path in tmp_path.glob("*.db")]
    store.close()


def _series():
    return {
        **dict.fromkeys(("provider", "sku", "gpu", "form_factor", "market", "region", "stat", "source"), "x"),
        "gpu_count": 1,
    }


def test_a_server_that_takes_the_connection_and_says_nothing_is_given_up(monkeypatch):
    """psycopg waits for ever unless it is told not to."""
    monkeypatch.setattr(database, "CONNECT_S", 2)  # libpq's smallest
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x"
        with Store.open(url, FakeClock()) as store, pytest.raises(StoreError):
            store.check_schema()


def test_a_name_that_is_let_go_can_be_held_at_once(store):
    """Not only when the server has seen the connection close."""
    for _ in range(50):
        with store.database.hold("notifications") as is_ours:
            assert is_ours
