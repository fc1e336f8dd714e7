"""A month of one GPU, asked by a cold process of a year of polls, against imports that any such tool has."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Result, pairs, result, wall_s
from benchmarks.market_year import year
from benchmarks.quote_cold import BASELINE, clean_env
from gpubroker.money import from_micros
from gpubroker.prices.rows import DAY_S

LIMIT = 1.3
_ASKED = ("history", "--gpu", "h100", "--since", "30d", "--stat", "p50", "--format", "json")
# The last day is one that nobody has counted yet: the slowest there is.
_SPANS_SQL = """
SELECT p.market, p.gpu_count, s.usd_per_hour, s.first_at, coalesce(s.until_at, 1 << 40)
FROM spans s JOIN offers o ON o.id = s.offer_id JOIN products p ON p.id = o.product_id
WHERE p.gpu = 'H100' AND (s.until_at > ? OR s.until_at IS NULL)
"""


def history_p50(quick: bool) -> Result:
    """figure: a p50 for each day and market, of 2,000 offers in 20,000; each is as by the expanded spans."""
    with tempfile.TemporaryDirectory() as folder:
        shares = (0.01, 0.1) if quick else (0.01, 0.1, 1.0)
        timed, points = {}, 0
        for share in shares:
            env = {**clean_env(Path(folder)), "GPUBROKER_DB_URL": f"sqlite:///{year(share)}"}
            points = _check(year(share), env)
            ask = [sys.executable, "-m", "gpubroker", *_ASKED]
            baseline = [sys.executable, "-c", BASELINE]
            timed[share] = pairs(lambda: wall_s(ask, env), lambda: wall_s(baseline, env), 5 if quick else 15)  # noqa: B023
    ratios = {share: result("history-p50", mine, LIMIT).ratio for share, mine in timed.items()}
    return result("history-p50", timed[shares[-1]], LIMIT, points=points, by_share_of_a_year=ratios)


def _check(path: Path, env: Mapping[str, str]) -> int:
    """How many points there are. Raises AssertionError where one is not that of the expanded spans."""
    command = [sys.executable, "-m", "gpubroker", *_ASKED]
    ran = subprocess.run(command, env=dict(env), check=True, capture_output=True, text=True)
    told = json.loads(ran.stdout)["points"]
    begins = [int(datetime.fromisoformat(point["begin"]).timestamp()) for point in told]
    expanded = _expanded(path, min(begins))
    for begin, point in zip(begins, told, strict=True):
        expected = f"{from_micros(_median(expanded, begin, point['market'])):f}"
        if point["p50_usd_per_gpu_hour"] != expected:
            raise AssertionError(f"{point} is not {expected}")
    days = set(begins)
    if len(told) != 2 * len(days) or len(days) != (max(days) - min(days)) // DAY_S + 1:
        raise AssertionError(f"{len(told)} points of {len(days)} days")
    return len(told)


def _expanded(path: Path, begin: int) -> dict[str, Any]:
    """The moments of all polls since then, and the spans of the GPU, in columns."""
    with closing(sqlite3.connect(path)) as database:
        sql = "SELECT observed_at FROM polls WHERE observed_at >= ? ORDER BY 1"
        polls = np.array([at for (at,) in database.execute(sql, (begin,))])
        markets, *numbers = zip(*database.execute(_SPANS_SQL, (begin,)), strict=True)
    counts, usd, first, until = (np.array(column, dtype=np.int64) for column in numbers)
    return {
        "polls": polls,
        "market": np.array(markets),
        "of": counts,
        "usd": usd,
        "first": first,
        "until": until,
    }


def _median(seen: dict[str, Any], begin: int, market: str) -> int:
    """Every observation of a day written out, in order, and the middle of them."""
    first, until = np.maximum(seen["first"], begin), np.minimum(seen["until"], begin + DAY_S)
    n = np.searchsorted(seen["polls"], until) - np.searchsorted(seen["polls"], first)
    mine = (seen["market"] == market) & (n > 0)
    for_one = [
        round(Fraction(int(usd), int(of)))
        for usd, of in zip(seen["usd"][mine], seen["of"][mine], strict=True)
    ]
    prices = np.sort(np.repeat(np.array(for_one, dtype=np.int64), n[mine]))
    below, above = prices[(len(prices) - 1) // 2], prices[len(prices) // 2]
    return round(Fraction(int(below) + int(above), 2))
