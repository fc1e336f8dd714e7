"""Ranking 20,000 offers with every line of an interrupted job, and the spread of the best ten."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal

from benchmarks.harness import Result, pairs, result
from benchmarks.quote_cold import OFFERS, _offers
from gpubroker.model import Priced
from gpubroker.plan.course import risk_of
from gpubroker.plan.fees import FeeTable
from gpubroker.plan.hazard import Hazards
from gpubroker.plan.rank import Ask, Pricing, rank
from gpubroker.plan.work import Checkpoints, Work

# The plain ranking takes 0.5 s where nothing else runs: twice that is the half second allowed beyond it.
LIMIT = 2.0
_SPREADS = 10


def plan_rank(quick: bool) -> Result:
    """Against the ranking by uninterrupted bills alone, each in a process of its own."""
    timed = pairs(lambda: _seconds("whole"), lambda: _seconds("plain"), 3 if quick else 15)
    beyond_s = sorted(a - b for a, b in timed)[len(timed) // 2]
    return result("plan-rank", timed, LIMIT, offers=OFFERS, spreads=_SPREADS, beyond_s=round(beyond_s, 3))


def _seconds(kind: str) -> float:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_rank", kind], check=True, capture_output=True, text=True
    )
    return float(ran.stdout)


def _rank(kind: str) -> float:
    """Seconds of what a quote does once it has its offers, imports of numpy included."""
    at = datetime(2026, 11, 24, tzinfo=UTC)
    rows = [Priced(offer=offer, source="a benchmark", as_of=at, live=True) for offer in _offers()]
    fees = FeeTable.load()
    gc.disable()
    began = time.perf_counter()
    if kind == "plain":
        rank(rows, Ask(work=Work(hours=Decimal(8))), Pricing(fees=fees))
    else:
        hazards = Hazards()
        pricing = Pricing(fees=fees, risk_of=lambda offer, hours: risk_of(hazards.of(offer), hours))
        work = Work(hours=Decimal(8), checkpoints=Checkpoints(gb=Decimal(10)))
        found = rank(rows, Ask(work=work), pricing)
        from gpubroker.plan.spread import spread_of

        for quote in found.quotes[:_SPREADS]:
            spread_of(quote, pricing)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(_rank(sys.argv[1]))
