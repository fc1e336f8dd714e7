"""What happened and why, for people: written with what it tells of, in one transaction, and never changed.

records, supervise -> add -> events -> `gpubroker events`, notifications (by a cursor each)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Select, func, insert, select, update

from gpubroker.doors import Clock
from gpubroker.prices.database import Database
from gpubroker.run import tables

Kind = Literal[
    "submitted",
    "claimed",  # by a supervisor, from one that is no more
    "waiting",  # for what the text says
    "rented",
    "started",  # its command runs on a node for the first time
    "resumed",  # on another node, from a checkpoint or from the beginning
    "preempted",  # its vendor took a node back
    "lost",  # a node is gone, and nobody says why
    "crashed",  # by its own word it is to be tried on another node
    "ended",  # a node, by us
    "rejected",  # a machine that failed its preflight, or was never reached
    "problem",  # that does not keep the job from going on
    "idle",  # its GPUs do nothing
    "budget",  # 50, 80, 100 % of a limit
    "stopping",  # asked to save and to end
    "done",
    "failed",
    "stopped",
    "cancelled",
    "over_budget",
    "leaked",  # a node that nobody wanted was found, and ended
    "alert",  # a price came below the limit of alerts.py
]
# A node or a vendor may say anything, at any length.
_MOST_TEXT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One."""

    id: int
    at: datetime
    job_id: str | None  # None = of no one job
    attempt_id: int | None  # None = of no one node
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far a reader has come."""

    position: int
    moved_at: datetime


_ADD = insert(tables.events)


def add(
    connection: Connection,
    at: datetime,
    kind: Kind,
    text: str,
    *,
    job_id: str | None = None,
    attempt_id: int | None = None,
) -> None:
    """In the transaction of what it tells of."""
    row = {"at": at, "kind": kind, "text": text[:_MOST_TEXT], "job_id": job_id, "attempt_id": attempt_id}
    connection.execute(_ADD, row)


class Events:
    """To read them, and to remember how far one has read."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def after(
        self,
        event_id: int = 0,
        *,
        job_id: str | None = None,
        kinds: Collection[str] = (),
        since: datetime | None = None,
        most: int = 1000,
    ) -> list[Event]:
        """Those that came later, the oldest first. `job_id` None = of all jobs, and of none."""
        table = tables.events
        query = _of(job_id, kinds).where(table.c.id > event_id)
        if since is not None:
            query = query.where(table.c.at >= since)
        return self._read(query.order_by(table.c.id).limit(most))

    def last(self, most: int, *, job_id: str | None = None, kinds: Collection[str] = ()) -> list[Event]:
        """The newest so many, the oldest of them first."""
        return self._read(_of(job_id, kinds).order_by(tables.events.c.id.desc()).limit(most))[::-1]

    def newest_id(self) -> int:
        """0 = there is none."""
        with self._database.read() as connection:
            return connection.execute(select(func.max(tables.events.c.id))).scalar() or 0

    def cursor(self, name: str) -> int | None:
        """The last event that a reader is done with; None = it has never read."""
        table = tables.cursors
        with self._database.read() as connection:
            return connection.execute(select(table.c.position).where(table.c.name == name)).scalar()

    def cursors(self) -> dict[str, Cursor]:
        """Of all readers, by name."""
        with self._database.read() as connection:
            found = connection.execute(select(tables.cursors))
            return {row.name: Cursor(position=row.position, moved_at=row.moved_at) for row in found}

    def counts(self) -> dict[Kind, int]:
        """How many of each kind there are; a kind of which there is none is not in it."""
        kind = tables.events.c.kind
        with self._database.read() as connection:
            rows = connection.execute(select(kind, func.count()).group_by(kind))
            return {row[0]: row[1] for row in rows}

    def move(self, name: str, position: int) -> None:
        """The reader is done with all events up to this one."""
        table, values = tables.cursors, {"position": position, "moved_at": self._clock.now()}
        with self._database.write(f"cursor {name}") as connection:
            moved = connection.execute(update(table).where(table.c.name == name).values(values))
            if moved.rowcount == 0:
                connection.execute(insert(table).values(name=name, **values))

    def _read(self, query: Select[Any]) -> list[Event]:
        with self._database.read() as connection:
            return [Event(**row._mapping) for row in connection.execute(query)]


def _of(job_id: str | None, kinds: Collection[str]) -> Select[Any]:
    query = select(tables.events)
    if job_id is not None:
        query = query.where(tables.events.c.job_id == job_id)
    return query.where(tables.events.c.kind.in_(kinds)) if kinds else query
