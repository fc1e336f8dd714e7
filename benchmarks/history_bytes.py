"""What a year of polls weighs: bytes of the table of spans with all its indexes, for each span."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from benchmarks.harness import Result
from benchmarks.market_year import year

LIMIT = 120


def history_bytes(quick: bool) -> Result:
    """figure: bytes a span, by SQLite's own count of pages (dbstat); in detail: what else there is."""
    sizes = {share: _size(year(share)) for share in ((0.01, 0.1) if quick else (0.01, 0.1, 1.0))}
    spans, span_bytes, file_bytes, daily_bytes = sizes[max(sizes)]
    figure = span_bytes / spans
    return Result(
        name="history-bytes",
        figure=round(figure, 1),
        unit="bytes a span",
        baseline=LIMIT,
        ratio=round(figure / LIMIT, 3),
        limit=1.0,
        ok=figure <= LIMIT,
        detail={
            "spans": spans,
            "file_mb": round(file_bytes / 1e6),
            "days_mb": round(daily_bytes / 1e6),
            "by_share_of_a_year": {share: round(mine[1] / mine[0], 1) for share, mine in sizes.items()},
        },
    )


def _size(path: Path) -> tuple[int, int, int, int]:
    """Spans, their bytes with indexes, those of the file, and of the days that are counted."""
    sql = """
    SELECT m.tbl_name, sum(d.pgsize) FROM dbstat d JOIN sqlite_master m ON m.name = d.name GROUP BY m.tbl_name
    """
    with closing(sqlite3.connect(path)) as database:
        (spans,) = database.execute("SELECT count(*) FROM spans").fetchone()
        sizes = dict(database.execute(sql))
    return spans, sizes["spans"], path.stat().st_size, sizes["daily"]
