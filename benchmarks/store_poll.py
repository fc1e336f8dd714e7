"""Storing a poll of 20,000 offers of which 5% changed their price, against bare sqlite3 on the same tables.

The baseline reads the current rows and the products and rates that they name, closes and opens the changed
spans and commits; it looks at no offer, and keeps nothing of what is volatile.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from itertools import count, cycle
from pathlib import Path

from benchmarks.harness import Result, pairs, result
from gpubroker.doors import SystemClock
from gpubroker.model import Offer, OfferQuery, Parsed
from gpubroker.prices.store import Store

OFFERS = 20_000
CHANGED = OFFERS // 20
LIMIT = 5.0
_CURRENT = """
SELECT s.id, s.offer_id, s.rates_id, s.usd_per_hour, o.product_id, o.machine_id
FROM spans s JOIN offers o ON o.id = s.offer_id WHERE s.until_at IS NULL
"""
# AWS keeps two or three details of an offer, vast eleven.
_DETAILS = {
    "duration_s": "",
    "dlperf": "",
    "inet_up": "812.5",
    "inet_down": "904.1",
    "driver_version": "570.86.15",
    "geolocation": "Utah, US",
}


def store_poll(quick: bool) -> Result:
    """figure and ratio: only prices change. In detail: every listing id is new as well, as on vast."""
    number = 5 if quick else 15
    with tempfile.TemporaryDirectory() as folder:
        same_ids = pairs(
            _ours(Path(folder) / "same.db", churn=False), _bare(Path(folder) / "same.db"), number
        )
        new_ids = pairs(_ours(Path(folder) / "new.db", churn=True), _bare(Path(folder) / "new.db"), number)
    churned = result("store-poll", new_ids, LIMIT)
    return result(
        "store-poll",
        same_ids,
        LIMIT,
        offers=OFFERS,
        changed=CHANGED,
        listing_ids="unchanged in figure and ratio; all new at each poll in the fields new_ids_*",
        new_ids_figure=churned.figure,
        new_ids_ratio=churned.ratio,
    )


def offer(number: int) -> Offer:
    """One machine of a made-up market with 40 cards, 50 places and prices that hosts set."""
    return Offer(
        provider="vast",
        sku=f"card {number % 40}",
        gpu="H100" if number % 10 == 0 else f"CARD{number % 40}",
        form_factor="SXM",
        gpu_count=1 + number % 8,
        vram_gib=80,
        market="spot" if number % 3 else "on_demand",
        preemptible=number % 3 > 0,
        region=f"place {number % 50}",
        machine_id=str(30_000 + number),
        host_id=str(1_000 + number // 3),
        usd_per_hour=Decimal(100_000 + number % 997) / 1_000_000,
        storage_usd_per_gb_month=Decimal(number % 17) / 1000,
        egress_usd_per_gb=Decimal("0.01"),
        ingress_usd_per_gb=Decimal("0.002"),
        verified=True,
        listing_id=str(10_000_000 + number),
        reliability=Decimal(9_900 + number % 100) / 10_000,
        disk_max_gb=number % 1_000,
        details={**_DETAILS, "dlperf": str(number), "duration_s": str(number * 1000 + 7)},
    )


def _ours(path: Path, *, churn: bool) -> Callable[[], float]:
    """Polls in turn from two markets that differ in 5% of the prices, and with churn in every listing id."""
    first = [offer(number) for number in range(OFFERS)]
    second = [
        replace(
            old,
            usd_per_hour=old.usd_per_hour + Decimal("0.01") * (number < CHANGED),
            listing_id=old.listing_id + "0" * churn,
        )
        for number, old in enumerate(first)
    ]
    store = Store.open(f"sqlite:///{path}", SystemClock())
    store.migrate()
    markets = cycle(
        Parsed(offers=tuple(offers), fetched=OFFERS, source="made up") for offers in (first, second)
    )

    def poll() -> float:
        poll_id = store.begin_poll("vast", OfferQuery())
        parsed = next(markets)
        began = time.perf_counter()
        kept = store.keep(poll_id, parsed)
        took_s = time.perf_counter() - began
        if kept.changed not in (0, CHANGED):
            raise AssertionError(f"{kept.changed} offers changed, not {CHANGED}")
        return took_s

    poll()
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(_twin(path))) as twin:
        source.backup(twin)
    return poll


def _bare(path: Path) -> Callable[[], float]:
    """The same work on a copy of that database, by sqlite3 alone."""
    database = sqlite3.connect(_twin(path), isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    seconds = count(4_000_000_000)

    def poll() -> float:
        at = next(seconds)
        began = time.perf_counter()
        database.execute("BEGIN IMMEDIATE")
        database.execute("SELECT * FROM products").fetchall()
        database.execute("SELECT * FROM rates").fetchall()
        changed = database.execute(_CURRENT).fetchall()[:CHANGED]
        database.executemany("UPDATE spans SET until_at = ? WHERE id = ?", [(at, row[0]) for row in changed])
        database.executemany(
            "INSERT INTO spans (offer_id, rates_id, usd_per_hour, first_at) VALUES (?, ?, ?, ?)",
            [(row[1], row[2], row[3] + 10_000, at) for row in changed],
        )
        database.execute("COMMIT")
        return time.perf_counter() - began

    return poll


def _twin(path: Path) -> Path:
    return path.with_suffix(".bare.db")
