"""`adaptive` on the public traces at the published settings, against the published exact optimum.

figure: mean cost over the optimum, one zone. In detail: several zones, every column of work over deadline,
deadlines missed, and the time that a step and a reset take. The traces are not part of the repository.
"""

from __future__ import annotations

import csv
import gzip
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import Result
from gpubroker.policy import Adaptive
from gpubroker.policy.interface import Answer, Job, Observation
from gpubroker.policy.replay import Setting, replay
from gpubroker.policy.traces import Timeline, groups, read_traces, timeline

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
# Of the mean, and of every column.
LIMITS = {"single": (1.05, 1.12), "multi": (1.045, 1.10)}
STEP_MEAN_S, STEP_P99_S, RESET_S = 0.001, 0.020, 2.0
_QUICK = 10


def policy_adaptive(quick: bool) -> Result:
    """All 1,500 settings, or every tenth: then columns have too few runs to be held to their limit."""
    if not TRACES.is_dir():
        raise click.ClickException(f"no traces in {TRACES}")
    traces = read_traces([TRACES])
    times = _Times()
    single = _measure("single", [timeline([trace]) for trace in traces], times, quick)
    multi = _measure("multi", groups(traces), times, quick)
    detail = {**single.record("single"), **multi.record("multi"), **times.record()}
    return Result(
        name="policy-adaptive",
        figure=round(single.mean, 4),
        unit="of the optimum",
        baseline=1.0,
        ratio=round(single.mean, 4),
        limit=LIMITS["single"][0],
        ok=single.keeps(*LIMITS["single"], quick) and multi.keeps(*LIMITS["multi"], quick) and times.keep(),
        detail=detail,
    )


@dataclass(kw_only=True)
class _Times:
    """What the policy takes, over all runs."""

    step_s: list[float] = field(default_factory=list)
    reset_s: list[float] = field(default_factory=list)

    def record(self) -> dict[str, float]:
        """In ms."""
        p99 = statistics.quantiles(self.step_s, n=100)[-1]
        return {
            "step_mean_ms": round(1e3 * statistics.fmean(self.step_s), 3),
            "step_p99_ms": round(1e3 * p99, 3),
            "reset_max_ms": round(1e3 * max(self.reset_s), 1),
        }

    def keep(self) -> bool:
        """Whether they keep their limits."""
        figures = self.record()
        return (
            figures["step_mean_ms"] <= 1e3 * STEP_MEAN_S
            and figures["step_p99_ms"] <= 1e3 * STEP_P99_S
            and figures["reset_max_ms"] <= 1e3 * RESET_S
        )


class _Timed:
    """Adaptive with a clock beside it."""

    def __init__(self, times: _Times) -> None:
        self._policy, self._times = Adaptive(), times

    def reset(self, job: Job) -> None:
        began = time.perf_counter()
        self._policy.reset(job)
        self._times.reset_s.append(time.perf_counter() - began)

    def step(self, obs: Observation) -> Answer:
        began = time.perf_counter()
        answer: Answer = self._policy.step(obs)
        self._times.step_s.append(time.perf_counter() - began)
        return answer


@dataclass(kw_only=True)
class _Tally:
    """Runs of one kind: cost over the optimum by work over deadline."""

    columns: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    usd: float = 0.0  # over on-demand, as is the best
    best_usd: float = 0.0
    missed: int = 0

    @property
    def mean(self) -> float:
        """Of all runs."""
        return statistics.fmean(ratio for column in self.columns.values() for ratio in column)

    def by_column(self) -> dict[str, float]:
        """Means."""
        return {name: round(statistics.fmean(self.columns[name]), 3) for name in sorted(self.columns)}

    def keeps(self, limit: float, column_limit: float, quick: bool) -> bool:
        """No miss, and nothing above its limit."""
        is_even = quick or max(self.by_column().values()) <= column_limit
        return not self.missed and self.mean <= limit and is_even

    def record(self, kind: str) -> dict[str, Any]:
        """For the detail of a Result. The mean of ratios weighs runs alike, that of sums costs."""
        return {
            f"{kind}_mean_ratio": round(self.mean, 4),
            f"{kind}_ratio_of_sums": round(self.usd / self.best_usd, 4),
            f"{kind}_columns": self.by_column(),
            f"{kind}_missed": self.missed,
        }


def _measure(kind: str, lines: list[Timeline], times: _Times, quick: bool) -> _Tally:
    by_name = {line.name: line for line in lines}
    tally = _Tally()
    with gzip.open(TRACES / f"reference_runs_{kind}.csv.gz", "rt") as file:
        settings = [row for row in csv.DictReader(file) if row["policy"] == "greedy"]
    for row in settings[:: _QUICK if quick else 1]:
        line = by_name[row["trace_or_group"]]
        deadline_h, share = float(row["deadline_h"]), float(row["work_over_deadline"])
        setting = Setting(
            work_h=deadline_h * share,
            deadline_h=deadline_h,
            restart_delay_h=float(row["restart_delay_h"]),
        )
        job = setting.job(line)
        run = replay(_Timed(times), job, line, int(row["start_step"]))
        cost = run.usd / (job.on_demand_price * (job.work_h + job.restart_delay_h))
        best = float(row["offline_optimum_over_on_demand"])
        tally.columns[row["work_over_deadline"]].append(cost / best)
        tally.usd += cost
        tally.best_usd += best
        tally.missed += run.is_missed
    return tally
