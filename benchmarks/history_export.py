"""A year of polls into a Parquet file, against pyarrow writing the same table when it lies in memory."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks.harness import Result, pairs, result
from benchmarks.market_year import year
from gpubroker.prices import export, export_source
from gpubroker.prices.daily import Where

# 60% of the speed.
LIMIT = 1 / 0.6


def history_export(quick: bool) -> Result:
    """figure: seconds with all that is read, its process's start and fsync; the baseline only writes."""
    import pyarrow.parquet as pq

    timed, rows, seconds = {}, 0, {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.parquet", Path(folder) / "theirs.parquet"
        for share in (0.01, 0.1) if quick else (0.01, 0.1, 1.0):
            path = year(share)

            def write(path: Path = path) -> float:
                began = time.perf_counter()
                spans = export_source.columns(path, Where())
                with closing(sqlite3.connect(path)) as database:
                    names = export.names_of(database.execute)
                export.write_file(ours, "parquet", False, spans, export.spans_of(names))
                return time.perf_counter() - began

            write()
            table = pq.read_table(ours)
            rows = table.num_rows

            def baseline(table: object = table) -> float:
                began = time.perf_counter()
                pq.write_table(table, theirs, compression="zstd")
                return time.perf_counter() - began

            timed[share] = pairs(write, baseline, 5 if share < 1 else 3)
            if not pq.read_table(ours).equals(table):
                raise AssertionError("the same rows are not the same table")
            seconds[share] = result("history-export", timed[share], LIMIT)
            del table
    growth = {share: (one.figure, one.ratio) for share, one in seconds.items()}
    return result("history-export", timed[max(timed)], LIMIT, spans=rows, by_share_of_a_year=growth)
