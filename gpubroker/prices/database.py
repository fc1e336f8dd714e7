"""The database itself: one engine, read and write transactions, migration, and errors as sentences.

SQLite (WAL) and PostgreSQL behave alike behind it: a read sees one moment, a write excludes other writes
where it must, and whatever the database says no to becomes a StoreError that names the next step.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    exc,
    inspect,
    make_url,
    text,
)

import gpubroker
from gpubroker.doors import Clock
from gpubroker.errors import ConfigError, SchemaTooNew, StoreError
from gpubroker.prices.rows import REVISION

T = TypeVar("T")
# Values or rows in one statement: SQLite allows 32766 values, PostgreSQL 65535.
_CHUNK = 1000
_ROWS_AT_A_TIME = 10_000
# Files of held names, and the bytes of them that this process holds.
_HELD_FILES: dict[Path, int] = {}
_HELD: set[tuple[Path, int]] = set()
# How long a write waits for another process's: SQLite lets one write at a time.
BUSY_S = 10
# A server that takes the connection and never answers must not hang a command.
CONNECT_S = 5
_POSTGRES = ("postgres", "postgresql", "postgresql+psycopg")
# What a database says -> what a person does.
_NEXT_STEPS = (
    ("file is not a database", "is not a gpubroker database: set GPUBROKER_DB_URL to another file"),
    ("malformed", "is damaged: restore a copy, or move it away and poll again"),
    ("readonly database", "may not be written: give this user write permission to the file and its folder"),
    ("unable to open", "cannot be opened: check that its folder exists and this user may write there"),
    ("disk is full", "has no room: free some disk space and try again"),
    ("No space left", "has no room: free some disk space and try again"),
    ("database is locked", f"was being written by another process for {BUSY_S} s: try again"),
    ("no such table", "has no tables yet: run gpubroker db upgrade"),
    ("UndefinedTable", "has no tables yet: run gpubroker db upgrade"),
    ("too many clients", "has no connection left: raise its max_connections, or run fewer supervisors"),
    ("QueuePool limit", "is too busy: all connections of this process were in use for 30 s"),
    ("connection", "does not answer: check that PostgreSQL runs and that GPUBROKER_DB_URL is right"),
)


class Database:
    """Nothing is opened before the first transaction."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = _parse(url)
        self._clock = clock
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = _engine(self._url)

    @property
    def where(self) -> str:
        """For people; without a password."""
        return str(self.path) if self.path else self._url.set(query={}).render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """The SQLite file; None for PostgreSQL and for a database in memory."""
        if not self.is_sqlite or self._url.database in (None, "", ":memory:"):
            return None
        return Path(str(self._url.database))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one moment."""
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._explained(), self._engine.connect() as opened:
            connection = opened.execution_options(**options)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self, lock: str = "") -> Iterator[Connection]:
        """A transaction that is kept whole or not at all.

        On SQLite it is the only writer. On PostgreSQL it excludes those that name the same lock.
        """
        with self._explained(), self._engine.connect() as opened:
            connection = opened.execution_options(sqlite_begin="IMMEDIATE")
            with connection.begin():
                if lock:
                    self.lock(connection, lock)
                yield connection

    def lock(self, connection: Connection, name: str) -> None:
        """Exclude the other writes with this lock to the end of this one, which may have another one, too."""
        if not self.is_sqlite:  # where there is no other write
            self.run(connection, "SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", (name,))

    @contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Be the only process of all that use this database to hold this name; False = another one is.

        However the process ends, the name is free: on PostgreSQL it belongs to a connection, on SQLite to an
        open file beside the database. A database in memory is nobody else's.
        """
        if self.is_sqlite:
            with self._hold_file(name) as is_ours:
                yield is_ours
            return
        with self._explained(), self._engine.connect() as opened:
            connection = opened.execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()  # closed at the end, and not kept for others with the lock on it
            ask = "SELECT pg_try_advisory_lock(hashtextextended(?, 0))"
            is_ours = bool(self.run(connection, ask, (name,)).scalar())
            try:
                yield is_ours
            finally:
                # The server sees a closed connection a moment later; of one that is lost the name is free.
                with suppress(exc.DBAPIError):
                    self.run(connection, "SELECT pg_advisory_unlock_all()")

    @contextmanager
    def _hold_file(self, name: str) -> Iterator[bool]:
        """A byte of the file for each name."""
        if self.path is None:
            yield True
            return
        path = self.path.with_name(f"{self.path.name}-held").absolute()
        # A process loses all its locks on a file when it closes any descriptor of it: this one stays open.
        if path not in _HELD_FILES:
            _HELD_FILES[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        file = _HELD_FILES[path]
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        is_ours = (path, place) not in _HELD and _lock(file, place)
        if is_ours:
            _HELD.add((path, place))
        try:
            yield is_ours
        finally:
            if is_ours:
                _HELD.discard((path, place))
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)

    def run(
        self, connection: Connection, sql: str, values: tuple[Any, ...] | Sequence[tuple[Any, ...]] = ()
    ) -> Any:
        """Hand-written SQL with ? for values, as a CursorResult; a list of tuples runs it once for each."""
        driver_sql = sql if self.is_sqlite else sql.replace("?", "%s")
        return connection.exec_driver_sql(driver_sql, values if isinstance(values, tuple) else list(values))

    def stream(self, connection: Connection, sql: str, values: tuple[Any, ...] = ()) -> Any:
        """The same for more rows than fit into memory: some at a time, in a transaction that reads."""
        driver_sql = sql if self.is_sqlite else sql.replace("?", "%s")
        options = {"stream_results": True, "max_row_buffer": _ROWS_AT_A_TIME}
        return connection.exec_driver_sql(driver_sql, values, execution_options=options)

    def load(
        self, connection: Connection, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Many rows into a table, as quickly as the database takes them."""
        names = ", ".join(columns)
        if self.is_sqlite:
            sql = f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608
            self.run(connection, sql, [tuple(row) for row in rows])
            return
        from psycopg import Error

        driver: Any = connection.connection.driver_connection
        try:
            with driver.cursor() as cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN") as into:
                for row in rows:
                    into.write_row(row)
        except Error as error:
            raise StoreError(f"{self.where} {_next_step(error)}") from error

    def now(self, connection: Connection) -> datetime:
        """By the clock that all users of this database share: the server's, or this machine's for a file."""
        if self.is_sqlite:
            return self._clock.now()
        found: datetime = self.run(connection, "SELECT clock_timestamp()").scalar()
        return found.astimezone(UTC)

    def migrate(self) -> None:
        """Bring the tables up to this code, at once for any number of processes. Raises SchemaTooNew."""
        if self.check_schema() == REVISION:
            return
        from alembic import command
        from alembic.config import Config

        if self.is_sqlite:
            self._set_wal()
        with self.write("gpubroker migrate") as connection:
            if _revision(connection) == REVISION:
                return  # another process was first
            config = Config()
            config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
            config.set_main_option("path_separator", "os")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def check_schema(self) -> str | None:
        """The database's revision; None = it has no tables yet. Raises SchemaTooNew for an unknown one."""
        with self.read() as connection:
            found = _revision(connection)
        if found not in (None, REVISION) and not list(_migrations().glob(f"versions/{found}_*.py")):
            raise SchemaTooNew(
                f"{self.where} has schema {found}, newer than this gpubroker knows ({REVISION}):"
                " upgrade gpubroker"
            )
        return found

    def vacuum(self, *changed: str) -> None:
        """SQLite: write the file anew, without holes, which excludes all others. PostgreSQL: let later rows
        have the room of those that went, in these tables, beside all others."""
        if not self.is_sqlite:
            with self._explained(), self._engine.connect() as opened:
                connection = opened.execution_options(isolation_level="AUTOCOMMIT")
                self.run(connection, f"VACUUM (ANALYZE) {', '.join(changed)}")
            return
        with self._explained():
            raw = self._engine.raw_connection()
            try:
                for sql in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                    raw.cursor().execute(sql)
            finally:
                raw.close()

    def _set_wal(self) -> None:
        """Readers and a writer at once. SQLite refuses it for a moment while others open the file."""
        end_s = self._clock.monotonic_s() + BUSY_S
        while True:
            connection = None
            try:
                with self._explained():
                    connection = self._engine.raw_connection()
                    connection.cursor().execute("PRAGMA journal_mode = WAL")
                return
            except StoreError as error:
                if "another process" not in str(error) or self._clock.monotonic_s() > end_s:
                    raise
                self._clock.sleep(0.05)
            finally:
                if connection is not None:
                    connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error) as error:
            raise StoreError(f"{self.where} {_next_step(error)}") from error


def _lock(file: int, place: int) -> bool:
    """That byte of the file; False = another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """As many at a time as one statement takes."""
    rest = iter(items)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _next_step(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    said = f"{type(cause).__name__}: {cause}"
    for words, step in _NEXT_STEPS:
        if words in said:
            return step
    return f"said no: {' '.join(said.split())[:256]}"


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise ConfigError(
            "GPUBROKER_DB_URL is not a database URL such as sqlite:////home/me/gpubroker.db"
            " or postgresql://user@host/name"
        ) from None
    if parsed.drivername in _POSTGRES:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigError(f"GPUBROKER_DB_URL: {parsed.drivername} is neither sqlite nor postgresql")
    return parsed


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            options = {"client_encoding": "utf8", "connect_timeout": CONNECT_S}
            return create_engine(url, pool_pre_ping=True, connect_args=options)
        except ImportError as error:
            raise ConfigError(
                f"PostgreSQL needs its driver: pip install 'gpubroker[postgres]' ({error})"
            ) from error
    engine = create_engine(url, connect_args={"timeout": BUSY_S})

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # BEGIN is ours: the driver's own comes too late
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        kind = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {kind}")

    return engine


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _migrations() -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    package = Path(gpubroker.__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"
