"""Which supervisor has which jobs: one lease a supervisor, on the database's clock, and a claim on each job.

    renew (every third of a lease) -> claim (jobs of nobody, and of those whose lease is over) -> ... -> leave

A supervisor that was away for longer than its lease finds its jobs claimed: what it writes for them then is
refused by Records (NotOurs), and its nodes' epochs are fenced in the checkpoint store. The same on SQLite,
where all supervisors are on one machine and its clock is the database's.
"""

from __future__ import annotations

import secrets
from datetime import timedelta

from sqlalchemy import ColumnElement, bindparam, delete, exists, func, insert, or_, select, update

import gpubroker
from gpubroker.doors import Clock
from gpubroker.prices import tables as prices_tables
from gpubroker.prices.database import Database
from gpubroker.run import tables

LEASE_S = 60
# Supervisors that are long gone are forgotten.
_FORGOTTEN = timedelta(days=1)
# One that has not ended after so long has died: a poll takes 5 minutes unless it is told otherwise.
_LONGEST_POLL = timedelta(minutes=10)

# Built once: at every third of a lease, by every supervisor.
_RENEW = update(tables.supervisors).where(tables.supervisors.c.id == bindparam("mine"))
_ALIVE = select(tables.supervisors.c.id).where(tables.supervisors.c.until_at > bindparam("now"))


class Leases:
    """Of one supervisor process."""

    def __init__(
        self, database: Database, clock: Clock, *, host: str, pid: int, lease_s: int = LEASE_S
    ) -> None:
        self.id = f"{host}-{pid}-{secrets.token_hex(4)}"
        self._database, self._clock, self._lease = database, clock, timedelta(seconds=lease_s)
        self._about = {"id": self.id, "host": host, "pid": pid, "version": gpubroker.__version__}

    def renew(self) -> frozenset[str]:
        """Hold on to what is ours for another lease; the supervisors that are there, this one among them."""
        table = tables.supervisors
        with self._database.write("gpubroker supervisors") as connection:
            now = self._database.now(connection)
            until = {"until_at": now + self._lease}
            if connection.execute(_RENEW, {"mine": self.id, **until}).rowcount == 0:
                connection.execute(insert(table).values(**self._about, started_at=now, **until))
                connection.execute(delete(table).where(table.c.until_at < now - _FORGOTTEN))
            return frozenset(connection.scalars(_ALIVE, {"now": now}))

    def claim(self) -> list[str]:
        """Jobs that are ours from now on: those that nobody has, up to our share of all; the oldest first."""
        jobs = tables.jobs
        with self._database.write() as connection:
            now = self._database.now(connection)
            alive = select(tables.supervisors.c.id).where(tables.supervisors.c.until_at > now)
            others = connection.scalar(
                select(func.count()).select_from(alive.where(tables.supervisors.c.id != self.id).subquery())
            )
            total, mine = (
                connection.scalar(select(func.count()).where(unfinished(), *which))
                for which in ((), (jobs.c.supervisor_id == self.id,))
            )
            share = -(-(total or 0) // ((others or 0) + 1)) - (mine or 0)
            free = (
                select(jobs.c.id)
                .where(unfinished(), or_(jobs.c.supervisor_id.is_(None), jobs.c.supervisor_id.not_in(alive)))
                .order_by(jobs.c.created_at, jobs.c.id)
                .limit(max(0, share))
                .with_for_update(skip_locked=True)
            )
            found = list(connection.scalars(free))
            if found:
                ours = {"supervisor_id": self.id, "claims": jobs.c.claims + 1}
                connection.execute(update(jobs).where(jobs.c.id.in_(found)).values(ours))
            return found

    def leave(self) -> None:
        """Others may have our jobs at once."""
        table = tables.supervisors
        with self._database.write("gpubroker supervisors") as connection:
            over = {"until_at": self._database.now(connection)}
            connection.execute(update(table).where(table.c.id == self.id).values(over))


def forsaken(database: Database, within: timedelta) -> set[str]:
    """Jobs without a terminal that no supervisor has had for so long, over or not."""
    jobs, table = tables.jobs.c, tables.supervisors
    with database.read() as connection:
        since = database.now(connection) - within
        lately = select(table.c.id).where(table.c.until_at > since)
        is_nobodys = or_(jobs.supervisor_id.is_(None), jobs.supervisor_id.not_in(lately))
        return set(connection.scalars(select(jobs.id).where(jobs.unattended, is_nobodys)))


def alive(database: Database) -> list[str]:
    """The supervisors whose leases are not over."""
    table = tables.supervisors
    with database.read() as connection:
        found = select(table.c.id).where(table.c.until_at > database.now(connection))
        return list(connection.scalars(found.order_by(table.c.id)))


def busy(database: Database) -> str:
    """Who writes into this database now and would not wait for long, in words; "" = nobody."""
    if found := alive(database):
        return f"supervisor {found[0]} runs jobs on it"
    polls = prices_tables.polls.c
    with database.read() as connection:
        lately = database.now(connection) - _LONGEST_POLL
        found_poll = connection.scalar(
            select(polls.provider).where(polls.finished_at.is_(None), polls.started_at > lately)
        )
        in_terminals = (tables.jobs.c.state == "running") & ~tables.jobs.c.unattended
        jobs = list(connection.scalars(select(tables.jobs.c.id).where(in_terminals)))
    for job_id in jobs:
        with database.hold(f"job {job_id}") as is_free:
            if not is_free:
                return f"job {job_id} is running"
    return f"a poll of {found_poll} is running" if found_poll else ""


def unfinished() -> ColumnElement[bool]:
    """Jobs without a terminal that are not over, or have something left that may bill."""
    jobs, attempts = tables.jobs.c, tables.attempts.c
    is_open = exists().where(attempts.job_id == jobs.id, attempts.ended_at.is_(None))
    return jobs.unattended & (or_(jobs.state == "running", is_open))
