"""How long our own nodes were exposed to preemption, and how often it came.

It is evidence for the planner's hazard. The supervisor records a stretch for each node as it ends; `totals`
adds them up for each kind of node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import func, select

from gpubroker.prices import tables
from gpubroker.prices.database import Database

_KIND = ("provider", "gpu", "region", "market")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Preemptions in a number of node-seconds, of one kind of node; between two moments."""

    provider: str
    gpu: str
    region: str
    market: str
    preemptions: int
    exposed_s: int
    since_at: datetime
    until_at: datetime


def record(database: Database, exposure: Exposure) -> None:
    """Keep one stretch. Raises ValueError for one that cannot have been."""
    if exposure.preemptions < 0 or exposure.exposed_s < 0 or exposure.until_at < exposure.since_at:
        raise ValueError(f"no stretch of a node's life: {exposure}")
    with database.write() as connection:
        connection.execute(tables.exposure.insert().values(asdict(exposure)))


def totals(database: Database, since: datetime | None = None) -> list[Exposure]:
    """One sum for each (provider, gpu, region, market), over the stretches that ended at or after `since`."""
    kept = tables.exposure.c
    kind = [kept[name] for name in _KIND]
    query = select(
        *kind,
        func.sum(kept.preemptions),
        func.sum(kept.exposed_s),
        func.min(kept.since_at),
        func.max(kept.until_at),
    )
    if since is not None:
        query = query.where(kept.until_at >= since)
    names = (*_KIND, "preemptions", "exposed_s", "since_at", "until_at")
    with database.read() as connection:
        rows = [
            dict(zip(names, row, strict=True))
            for row in connection.execute(query.group_by(*kind).order_by(*kind))
        ]
    # PostgreSQL adds whole numbers up as Decimal.
    return [
        Exposure(**{**row, "preemptions": int(row["preemptions"]), "exposed_s": int(row["exposed_s"])})
        for row in rows
    ]
