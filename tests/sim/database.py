"""The product's database in memory, one a process: emptied for each seed by a copy of fresh tables.

Each write is a point where a supervisor may die or stand still, before it and once it is kept; it may be
refused, as SQLite does when another process writes, and on a server the answer to a commit may be lost.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import StaticPool

from gpubroker.errors import StoreError
from gpubroker.prices.database import Database
from gpubroker.prices.rows import REVISION
from tests.sim.clock import VirtualClock
from tests.sim.faults import Doors, Faults


class Memory(Database):
    """See the module. One connection stays open, and its transactions are begun and ended by hand: to take
    another one for each, through all of the library's layers, costs as much as all that is done in them.

    `read` is no such point: a supervisor that dies at a read dies as well at the door before it.
    """

    faults: Faults
    doors: Doors
    kept: Callable[[], None]  # hears of each commit

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__("sqlite://", clock)
        self._engine = create_engine("sqlite://", poolclass=StaticPool)
        self._open = self._engine.connect()
        driver: Any = self._open.connection.driver_connection
        self.raw: sqlite3.Connection = driver  # for the judge, who reads beside the product's own code
        self.raw.isolation_level = None  # nothing begins by itself
        self.raw.execute("PRAGMA foreign_keys = ON")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._explained():
            yield self._open

    @contextmanager
    def write(self, lock: str = "") -> Iterator[Connection]:
        self.doors.reach("before a write")
        if self.faults.happens("write: busy", "*"):
            raise StoreError("the database was being written by another process for 10 s: try again")
        self.raw.execute("BEGIN IMMEDIATE")
        try:
            with self._explained():
                yield self._open
        except BaseException:
            self.raw.execute("ROLLBACK")
            raise
        self.raw.execute("COMMIT")
        self.kept()
        if self.faults.happens("write: done, but lost", "*"):
            raise StoreError("the database does not answer")
        self.doors.reach("after a write")

    def check_schema(self) -> str | None:
        return REVISION


_kept: list[tuple[Memory, bytes]] = []


def fresh(clock: VirtualClock, faults: Faults, doors: Doors) -> Memory:
    """With empty tables. The one before is no more."""
    if not _kept:
        # By the migrations: what they make is what users have.
        migrated = Database("sqlite://", clock)
        migrated.migrate()
        with migrated.read() as connection:
            driver: Any = connection.connection.driver_connection
        _kept.append((Memory(clock), driver.serialize()))
        migrated.close()
    database, tables = _kept[0]
    database.raw.deserialize(tables)
    database._clock, database.faults, database.doors = clock, faults, doors
    database.kept = lambda: None
    return database
