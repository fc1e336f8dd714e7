"""How long our own nodes were exposed to preemption, and how often it came.

It is evidence for the planner's hazard. The supervisor records a stretch for each node as it ends; a quote
reads the sums with the prices (prices/fastread.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime

from gpubroker.prices import tables
from gpubroker.prices.database import Database


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
