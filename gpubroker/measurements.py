"""Measured speeds of the user's own jobs, in the same database as the prices.

`gpubroker calibrate` records them; plan/throughput converts work with them, and they win over data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Row, delete, select

from gpubroker.plan.throughput import Measurement
from gpubroker.prices import tables
from gpubroker.prices.database import Database

_SECONDS_PER_MS = Decimal("0.001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A measurement with the number by which it can be removed."""

    id: int
    measurement: Measurement


def record(database: Database, measurement: Measurement) -> int:
    """Keep one. Steps whole, seconds to the millisecond. Returns its id."""
    m = measurement
    steps, duration_ms = int(m.steps), int(m.seconds / _SECONDS_PER_MS)
    if steps < 1 or duration_ms < 1:
        raise ValueError("a measurement has at least one step and one millisecond")
    values = {
        "job": m.job,
        "gpu": m.gpu,
        "form_factor": m.form_factor,
        "gpu_count": m.gpu_count,
        "steps": steps,
        "duration_ms": duration_ms,
        "measured_at": m.measured_at,
    }
    with database.write() as connection:
        added = connection.execute(
            tables.measurements.insert().values(values).returning(tables.measurements.c.id)
        )
        return int(added.scalar_one())


def recorded(database: Database, job: str | None = None) -> list[Recorded]:
    """Of this job, None = of all: by job, the newest first."""
    kept = tables.measurements
    query = select(kept).order_by(kept.c.job, kept.c.measured_at.desc(), kept.c.id.desc())
    if job is not None:
        query = query.where(kept.c.job == job)
    with database.read() as connection:
        return [_recorded_of(row) for row in connection.execute(query)]


def of_job(database: Database, job: str) -> tuple[Measurement, ...]:
    """What plan/throughput takes."""
    return tuple(found.measurement for found in recorded(database, job))


def remove(database: Database, ids: list[int]) -> int:
    """How many of them there were."""
    kept = tables.measurements
    with database.write() as connection:
        return connection.execute(delete(kept).where(kept.c.id.in_(ids))).rowcount


def _recorded_of(row: Row[tuple[object, ...]]) -> Recorded:
    values = dict(row._mapping)
    number, duration_ms, steps = values.pop("id"), values.pop("duration_ms"), values.pop("steps")
    measurement = Measurement(**values, steps=Decimal(steps), seconds=duration_ms * _SECONDS_PER_MS)
    return Recorded(id=number, measurement=measurement)
