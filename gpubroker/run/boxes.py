"""Boxes: nodes that run nothing but are the user's own for some hours. Read off the records alone.

A box is a job whose command waits. It is rented and begun by the same supervisor as any job, which then
leaves: the node's agent holds its lease, and what it is and when it stops is in the records. Nobody
supervises it, so its end is noticed by whoever looks next.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from gpubroker.jobspec import JobSpec, kept_job
from gpubroker.provider import Capabilities
from gpubroker.run.records import Attempt, Records


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One that may be billing."""

    job_id: str
    spec: JobSpec
    attempt: Attempt
    stops_at: datetime  # by its lease: its hours are over then, or its budget is spent

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.spec.name


def boxes(records: Records) -> list[Box]:
    """All that are open, the oldest first."""
    newest = {attempt.job_id: attempt for attempt in records.open_attempts()}
    return [
        _box(job_id, kept_job(text), newest[job_id], records)
        for job_id, text in records.jobs_under_way()
        if job_id in newest and json.loads(text).get("box")
    ]


def job_as_box(records: Records, job_id: str) -> Box | None:
    """The node that a job runs on now, to be talked to like a box; None = no such job has one."""
    newest = {attempt.job_id: attempt for attempt in records.open_attempts()}
    kept = records.job(job_id)
    return _box(job_id, kept_job(kept[2]), newest[job_id], records) if kept and job_id in newest else None


def _box(job_id: str, spec: JobSpec, attempt: Attempt, records: Records) -> Box:
    before = [a for a in records.attempts(job_id) if a.epoch < attempt.epoch]
    spent_usd = sum((a.usd_so_far(attempt.intended_at) for a in before), Decimal(0))
    return Box(job_id=job_id, spec=spec, attempt=attempt, stops_at=_stops_at(spec, attempt, spent_usd))


def _stops_at(spec: JobSpec, attempt: Attempt, spent_usd: Decimal) -> datetime:
    """Counted from when it began to bill, or was asked for."""
    hours = hours_of(spec, attempt.usd_per_hour, spent_usd)
    return (attempt.running_at or attempt.intended_at) + timedelta(seconds=float(hours) * 3600)


def hours_of(spec: JobSpec, usd_per_hour: Decimal, spent_usd: Decimal) -> Decimal:
    """How long a box's node may go on: its hours, or what is left of its budget."""
    hours, budget_usd = spec.limits.max_hours or Decimal(0), spec.limits.budget_usd
    if budget_usd is None or usd_per_hour <= 0:
        return hours
    return min(hours, max(Decimal(0), budget_usd - spent_usd) / usd_per_hour)


def over(records: Records, box: Box, reason: str, *, at: datetime | None = None) -> Attempt:
    """Its node is known to be gone, now or since `at`."""
    ended = records.ended(box.attempt, reason, 0, at=at)
    records.end_job(box.job_id, "done", reason)
    return ended


def ends_itself(capabilities: Capabilities) -> bool:
    """Whether the node, or its vendor, ends its billing when its time is over, with nobody there."""
    return capabilities.self_terminate or capabilities.max_lifetime_s is not None
