"""The fast door to the store: it reads only what it knows, and leaves everything else to the slow one."""

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import fastread
from gpubroker.prices.store import Store
from tests.support import FakeClock
from tests.test_bill import offer


@pytest.fixture
def path(tmp_path):
    """A SQLite store with one offer, closed, under a name with signs that mean something in a URI."""
    store = Store.open(f"sqlite:///{tmp_path}/made.db", FakeClock())
    store.migrate()
    store.keep(store.begin_poll("vast", OfferQuery()), Parsed(offers=(offer(provider="vast"),)))
    store.close()
    return (tmp_path / "made.db").rename(tmp_path / "prices #1 50%41?.db")


def change(path, sql):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql)


def test_a_store_is_read_whatever_its_file_is_called(path):
    """And no other file is made."""
    assert [offer(provider="vast")] == [p.offer for p in fastread.snapshot(path, {"H100"}).live]
    assert [path] == [p for p in path.parent.iterdir() if p.name.endswith(".db")]


def test_reading_changes_nothing(path):
    """A quote may run beside anything."""
    before = path.read_bytes()
    fastread.snapshot(path, None)
    assert before == path.read_bytes()


def test_a_writer_at_work_is_not_waited_for(path):
    """What it has not committed is not there."""
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM latest")
        assert 1 == len(fastread.snapshot(path, None).live)


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    """The slow door makes it."""
    assert None is fastread.snapshot(tmp_path / "none.db", None)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param("UPDATE alembic_version SET version_num = '9999'", id="a newer schema"),
        pytest.param("UPDATE alembic_version SET version_num = '0000'", id="an older schema"),
        pytest.param("DELETE FROM alembic_version", id="no revision"),
        pytest.param("DROP TABLE latest", id="a table is missing"),
        pytest.param("UPDATE listings SET offers = 'x'", id="no JSON"),
        pytest.param("UPDATE listings SET offers = '[{}]'", id="other JSON"),
        pytest.param("UPDATE polls SET scope = '3'", id="a scope that is none"),
        pytest.param("UPDATE latest SET usd_per_hour = 'dear'", id="a price that is none"),
    ],
)
def test_what_it_does_not_know_it_leaves_alone(path, sql):
    """Nothing raises: the slow door says what is wrong."""
    change(path, sql)
    assert None is fastread.snapshot(path, None)


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    """As is a folder."""
    (tmp_path / "photo.jpg").write_bytes(b"JFIF" * 1000)
    assert [None, None] == [fastread.snapshot(p, None) for p in (tmp_path / "photo.jpg", tmp_path)]


def test_an_offer_without_volatile_fields_is_an_offer_all_the_same(path):
    """Prices matter more than listing ids."""
    change(path, "DELETE FROM listings")
    assert [offer(provider="vast")] == [p.offer for p in fastread.snapshot(path, None).live]


def test_it_imports_nothing_heavy():
    """Or it would not be fast."""
    code = "import sys, gpubroker.prices.fastread; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"sqlalchemy", "alembic", "requests", "click", "asyncio", "logging"}
    assert set() == heavy & set(loaded.split())
