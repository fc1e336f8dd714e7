"""A whole database into another one, from SQLite to PostgreSQL or the other way: `gpubroker db copy`.

    source, held still ──rows in batches──> target, in one transaction ──read back, digests alike──> commit

Until the commit the target is as empty as it was: killed at any point, the same command is run again, and
half a database is never taken for a whole one. Ids are kept: whatever names one still means the same row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, Text, inspect

from gpubroker.errors import ConfigError, StoreError
from gpubroker.prices.database import Database
from gpubroker.prices.rows import REVISION
from gpubroker.prices.tables import metadata

_BATCH = 5000
_ALEMBIC = "alembic_version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One table, the same on both sides."""

    table: str
    rows: int
    digest: str  # of all its rows, in any order


def copy(
    source: Database,
    target: Database,
    *,
    refuse: Callable[[], None] = lambda: None,
    on_rows: Callable[[str, int], None] = lambda table, rows: None,
) -> list[Copied]:
    """Every table of the schema. `refuse` is called once nobody can write into the source any more.

    `on_rows` hears of each batch, twice: as it is written and as it is read back. Raises ConfigError where
    the source is of another revision or the target not empty, StoreError where a side says no or they differ.
    """
    if (found := source.check_schema()) != REVISION:
        raise ConfigError(
            f"{source.where} has revision {found or 'none'}, and this gpubroker {REVISION}:"
            " run gpubroker db upgrade on it"
        )
    _refuse_tables_of_others(target)
    target.migrate()
    with _held_still(source) as from_there:
        refuse()
        with _taken(target) as into:
            sent = {
                table.name: _send(source, from_there, target, into, table, on_rows) for table in _tables()
            }
            for table in _tables():
                there = _Digest()
                for batch in _batches(target, into, table):
                    there.add(batch)
                    on_rows(table.name, len(batch))
                if there.copied(table) != sent[table.name]:
                    raise StoreError(
                        f"{target.where}: {table.name} came out other than it went in ({there.rows:,} rows of"
                        f" {sent[table.name].rows:,}): nothing was kept of it, try again"
                    )
            _number_on(source, from_there, target, into)
    if not target.is_sqlite:  # a server plans by what it knows of its tables
        target.vacuum(*(table.name for table in _tables()))
    return list(sent.values())


def counts(source: Database) -> int:
    """Rows of all tables."""
    with source.read() as connection:
        return sum(_count(source, connection, table) for table in _tables())


class _Digest:
    """Of rows in any order: the sum of theirs."""

    def __init__(self) -> None:
        self.rows, self._sum = 0, 0

    def add(self, batch: Sequence[Sequence[Any]]) -> None:
        for row in batch:
            # True and 1 are the same: SQLite says truth in numbers.
            said = repr([int(value) if value is True or value is False else value for value in row])
            digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self._sum += int.from_bytes(digest, "big")
        self.rows += len(batch)

    def copied(self, table: Table) -> Copied:
        return Copied(table=table.name, rows=self.rows, digest=f"{self._sum % (1 << 128):032x}")


def _tables() -> Sequence[Table]:
    """What refers to another comes after it."""
    return metadata.sorted_tables


def _send(
    source: Database,
    from_there: Connection,
    target: Database,
    into: Connection,
    table: Table,
    on_rows: Callable[[str, int], None],
) -> Copied:
    sent, names = _Digest(), [column.name for column in table.c]
    for batch in _batches(source, from_there, table):
        target.load(into, table.name, names, batch)
        sent.add(batch)
        on_rows(table.name, len(batch))
    return sent.copied(table)


def _batches(database: Database, connection: Connection, table: Table) -> Iterator[Sequence[Sequence[Any]]]:
    """As the database has them, a few at a time."""
    names = ", ".join(column.name for column in table.c)
    with closing(database.stream(connection, f"SELECT {names} FROM {table.name}")) as found:  # noqa: S608
        while batch := found.fetchmany(_BATCH):
            yield batch


@contextmanager
def _held_still(source: Database) -> Iterator[Connection]:
    """One moment of it, which is the last until the end: what writes beside waits, or says that it cannot."""
    if source.is_sqlite:
        with source.write() as connection:
            yield connection
        return
    with source.read() as connection:
        _lock(source, connection, "SHARE")
        yield connection


@contextmanager
def _taken(target: Database) -> Iterator[Connection]:
    """Nobody else's until it is whole."""
    with target.write() as connection:
        if not target.is_sqlite:
            _lock(target, connection, "ACCESS EXCLUSIVE")
        for table in _tables():
            if rows := _count(target, connection, table):
                raise ConfigError(
                    f"{target.where} already has {rows:,} rows in {table.name}: name an empty database"
                )
        yield connection


def _lock(database: Database, connection: Connection, mode: str) -> None:
    names = ", ".join(table.name for table in _tables())
    database.run(connection, f"LOCK TABLE {names} IN {mode} MODE")


def _count(database: Database, connection: Connection, table: Table) -> int:
    return int(database.run(connection, f"SELECT count(*) FROM {table.name}").scalar())  # noqa: S608


def _refuse_tables_of_others(target: Database) -> None:
    with target.read() as connection:
        there = set(inspect(connection).get_table_names())
    others = there - {_ALEMBIC} - {table.name for table in _tables()}
    if others or (there and _ALEMBIC not in there):
        some = ", ".join(sorted(others or there)[:3])
        raise ConfigError(f"{target.where} has tables of something else ({some}): name an empty database")


def _number_on(source: Database, from_there: Connection, target: Database, into: Connection) -> None:
    """The next row that counts up by itself comes after all that ever did, also those that are gone."""
    for table in _tables():
        if "id" not in table.primary_key or isinstance(table.c.id.type, Text):
            continue
        spent = _spent(source, from_there, table)
        if target.is_sqlite:
            if table.dialect_options["sqlite"]["autoincrement"] and spent:
                target.run(into, "DELETE FROM sqlite_sequence WHERE name = ?", (table.name,))
                sql = "INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)"
                target.run(into, sql, (table.name, spent))
        elif spent and (sequence := _sequence(target, into, table)):
            target.run(into, "SELECT setval(?, ?)", (sequence, spent))


def _spent(database: Database, connection: Connection, table: Table) -> int:
    """The highest id that the table has given; 0 = none."""
    highest = f"SELECT max(id) FROM {table.name}"  # noqa: S608  only names go in
    if not database.is_sqlite and (sequence := _sequence(database, connection, table)):
        highest = f"SELECT last_value FROM {sequence} WHERE is_called"  # noqa: S608
    elif table.dialect_options["sqlite"]["autoincrement"]:
        highest = f"SELECT seq FROM sqlite_sequence WHERE name = '{table.name}'"  # noqa: S608
    return int(database.run(connection, highest).scalar() or 0)


def _sequence(database: Database, connection: Connection, table: Table) -> str | None:
    named = "SELECT pg_get_serial_sequence(?, 'id')"
    found: str | None = database.run(connection, named, (table.name,)).scalar()
    return found
