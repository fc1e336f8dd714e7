"""All jobs at one moment, for people: what each does, what it costs, what is saved. Reads the database alone.

look -> Standing, one a job -> `gpubroker jobs`, `gpubroker watch`
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import func, or_, select

from gpubroker.jobspec import JobSpec, kept_job
from gpubroker.prices.database import Database
from gpubroker.run import tables
from gpubroker.run.events import Event
from gpubroker.run.records import Attempt, Checkpoint, JobRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Of one job."""

    row: JobRow
    spec: JobSpec
    attempts: tuple[Attempt, ...]  # that had a node or may have one, the first first
    saved: tuple[Checkpoint, ...]  # the last two, the older first
    event: Event | None  # the last; None = nothing was ever told
    is_claimed: bool  # by a supervisor that is there

    @property
    def node(self) -> Attempt | None:
        """What it has now; None = nothing."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.ended_at is None else None

    @property
    def stage(self) -> str:
        """In a word: what its state is, or what it does while it is under way."""
        if self.row.state != "running":
            return self.row.state
        if self.row.wanted:
            return "stopping"
        if self.node is None:
            return "waiting"
        return "starting" if self.node.running_at is None else "running"

    @property
    def waits_for(self) -> str:
        """For people; "" = for nothing, or nobody has said."""
        if self.stage != "waiting":
            return ""
        if self.row.unattended and not self.is_claimed:
            return "a supervisor"
        if self.event is not None and self.event.kind == "waiting":
            return self.event.text
        return "" if self.row.unattended else "its terminal"

    @property
    def gpu(self) -> str:
        """What it has or last had, or what it asks for."""
        if self.attempts:
            return f"{self.attempts[-1].gpu_count}x {self.attempts[-1].gpu}"
        need = self.spec.gpu
        return f"{need.count}x {' or '.join(need.name) or f'{need.min_vram:f} GB'}"

    @property
    def started_at(self) -> datetime | None:
        """When its first node ran."""
        return min((a.running_at for a in self.attempts if a.running_at is not None), default=None)

    @property
    def saved_at(self) -> datetime | None:
        """By the node's clock."""
        return self.saved[-1].published_at if self.saved else None

    @property
    def due_at(self) -> datetime | None:
        """When the next checkpoint is to be expected: as the job says, or as the last two were apart."""
        node, saved_at = self.node, self.saved_at
        if node is None or node.running_at is None:
            return None
        every = None if self.spec.checkpoint.every is None else timedelta(seconds=self.spec.checkpoint.every)
        if every is None and len({one.epoch for one in self.saved}) == 1 < len(self.saved):
            every = self.saved[1].published_at - self.saved[0].published_at
        return None if every is None else max(saved_at or node.running_at, node.running_at) + every

    def unsaved_s(self, now: datetime) -> float | None:
        """Since its last save, or since its node runs: what would be lost now. None = nothing runs."""
        node = self.node
        if node is None or node.running_at is None:
            return None
        return max(0.0, (now - max(self.saved_at or node.running_at, node.running_at)).total_seconds())

    def usd(self, now: datetime) -> Decimal:
        """So far."""
        return sum((a.usd_known(now) for a in self.attempts), Decimal(0))

    def left_s(self, now: datetime) -> tuple[float, str] | None:
        """Until the first of its limits, and which one that is; None = it has none, or nothing runs."""
        limits, found = self.spec.limits, list[tuple[float, str]]()
        if self.row.state != "running":
            return None
        if limits.deadline is not None:
            found.append(((limits.deadline - now).total_seconds(), "deadline"))
        rate = rate_of(self.node)
        if limits.budget_usd is not None and rate > 0:
            found.append((float((limits.budget_usd - self.usd(now)) / rate) * 3600, "budget"))
        if limits.max_hours is not None and self.node is not None:
            used_s = sum(a.billed_s(now) for a in self.attempts)
            found.append((float(limits.max_hours) * 3600 - used_s, "hours"))
        return min(found, default=None)


def rate_of(attempt: Attempt | None) -> Decimal:
    """USD an hour that it costs now."""
    if attempt is None or attempt.ended_at is not None:
        return Decimal(0)
    return attempt.usd_per_hour if attempt.stopped_at is None else attempt.held_usd_per_hour


def look(database: Database, *, over_since: datetime | None) -> list[Standing]:
    """Jobs but no boxes, the newest first: those under way, stopped, or over since then; None = all."""
    jobs = tables.jobs.c
    with database.read() as connection:
        shown = select(jobs.id)
        if over_since is not None:
            shown = shown.where(or_(jobs.state.in_(("running", "stopped")), jobs.ended_at >= over_since))
        alive = set(
            connection.scalars(
                select(tables.supervisors.c.id).where(
                    tables.supervisors.c.until_at > database.now(connection)
                )
            )
        )
        rows = connection.execute(
            select(tables.jobs).where(jobs.id.in_(shown)).order_by(jobs.created_at.desc(), jobs.id.desc())
        ).all()
        attempts = _grouped(
            Attempt,
            connection.execute(
                select(tables.attempts)
                .where(tables.attempts.c.job_id.in_(shown))
                .where(or_(tables.attempts.c.node_id.is_not(None), tables.attempts.c.ended_at.is_(None)))
                .order_by(tables.attempts.c.epoch)
            ),
        )
        saved = _grouped(Checkpoint, connection.execute(_last_two(shown)))
        newest = select(func.max(tables.events.c.id)).where(tables.events.c.job_id.in_(shown))
        told = _grouped(
            Event,
            connection.execute(
                select(tables.events).where(tables.events.c.id.in_(newest.group_by(tables.events.c.job_id)))
            ),
        )
    found = []
    for row in rows:
        spec = kept_job(row.spec)
        if spec.box:
            continue
        found.append(
            Standing(
                row=JobRow(**{name: getattr(row, name) for name in JobRow.__dataclass_fields__}),
                spec=spec,
                attempts=tuple(attempts.get(row.id, ())),
                saved=tuple(saved.get(row.id, ())),
                event=next(iter(told.get(row.id, ())), None),
                is_claimed=row.supervisor_id in alive,
            )
        )
    return found


def _last_two(shown: Any) -> Any:
    """A job may have made thousands."""
    table = tables.checkpoints
    newness = func.row_number().over(
        partition_by=table.c.job_id, order_by=(table.c.epoch.desc(), table.c.number.desc())
    )
    counted = select(table, newness.label("newness")).where(table.c.job_id.in_(shown)).subquery()
    return select(counted).where(counted.c.newness <= 2).order_by(counted.c.epoch, counted.c.number)


def _grouped(kind: Any, rows: Any) -> dict[str, list[Any]]:
    """By job."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        values = {name: getattr(row, name) for name in kind.__dataclass_fields__}
        found.setdefault(row.job_id, []).append(kind(**values))
    return found
