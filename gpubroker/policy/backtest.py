"""Many runs of many policies over the same draws of settings and starts, and what they come to. Pure.

traces -> draw -> one `Row` a run -> `Score` a policy. Who runs the cases where is the caller's choice.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any

from gpubroker.errors import ConfigError
from gpubroker.policy.interface import Checkpoint, Policy
from gpubroker.policy.replay import Run, Setting, replay, steps_of
from gpubroker.policy.traces import Timeline

NAMED = {
    "on_demand": "gpubroker.policy:OnDemand",
    "greedy": "gpubroker.policy:Greedy",
    "uniform_progress": "gpubroker.policy:UniformProgress",
    "od_fallback": "gpubroker.policy:OdFallback",
    "adaptive": "gpubroker.policy:Adaptive",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every combination of these is a setting."""

    works_over_deadline: tuple[float, ...]
    deadlines_h: tuple[float, ...]
    restarts_h: tuple[float, ...]
    starts: int  # a timeline and deadline: the other settings share them
    seed: int = 0
    checkpoint: Checkpoint = "instant"
    ckpt_interval_h: float = 0.0
    ckpt_cost_h: float = 0.0
    grace_h: float = 0.0

    def setting(self, deadline_h: float, work_over_deadline: float, restart_h: float) -> Setting:
        """One of the combinations."""
        return Setting(
            work_h=deadline_h * work_over_deadline,
            deadline_h=deadline_h,
            restart_delay_h=restart_h,
            checkpoint=self.checkpoint,
            ckpt_interval_h=self.ckpt_interval_h,
            ckpt_cost_h=self.ckpt_cost_h,
            grace_h=self.grace_h,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setting at one start, for every policy."""

    line: int  # which of the timelines
    start: int
    work_over_deadline: float
    setting: Setting
    wants_optimum: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of one policy, beside the best that could be done."""

    policy: str
    line: str
    case: Case
    run: Run
    over_on_demand: float  # of on-demand from the start to the end
    optimum_over_on_demand: float | None  # None where not asked for, or no plan is in time

    @property
    def over_optimum(self) -> float | None:
        """None where there is none, or where it costs nothing."""
        return self.over_on_demand / self.optimum_over_on_demand if self.optimum_over_on_demand else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Means over some runs. Costs are over on-demand's, so that dear machines do not outweigh cheap ones."""

    runs: int
    over_on_demand: float
    compared: int  # runs beside an optimum
    over_optimum: float | None  # their mean cost over their mean optimum; None where there are none
    mean_of_ratios: float | None  # every run counts alike, also those that cost next to nothing
    missed: int
    preemptions: float  # a run
    launches: float  # a run


def policy_class(name: str) -> Callable[[], Policy]:
    """By name or as module:Class. Raises ConfigError."""
    target = NAMED.get(name.replace("-", "_"), name)
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{name!r} is not a policy: {', '.join(NAMED)}, or module:Class")
    try:
        made: Callable[[], Policy] = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"policy {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(made) or not all(callable(getattr(made, call, None)) for call in ("reset", "step")):
        raise ConfigError(f"policy {name!r} has no reset and step")
    return made


def draw(lines: Sequence[Timeline], grid: Grid) -> list[Case]:
    """Every setting of the grid at random starts: the same for every policy, whatever else is drawn.

    Raises ConfigError for a timeline that is shorter than a deadline.
    """
    cases = []
    for index, line in enumerate(lines):
        for deadline_h in grid.deadlines_h:
            room = len(line) - steps_of(deadline_h, line.step_s)
            if room < 0:
                hours = len(line) * line.step_h
                raise ConfigError(
                    f"{line.name} is {hours:g} h long: too short for a deadline of {deadline_h:g} h"
                )
            luck = random.Random(f"{grid.seed} {line.name} {deadline_h!r}")
            starts = [luck.randint(0, room) for _ in range(grid.starts)]
            cases += [
                Case(
                    line=index,
                    start=start,
                    work_over_deadline=share,
                    setting=grid.setting(deadline_h, share, restart_h),
                )
                for start, share, restart_h in product(starts, grid.works_over_deadline, grid.restarts_h)
            ]
    return cases


def with_optima(cases: Sequence[Case], most: int, seed: int) -> list[Case]:
    """The same cases, of which at most so many, drawn at random, are held against their optimum.

    A rule's run takes a fifth of a millisecond, an optimum three hundred times as long.
    """
    if len(cases) <= most:
        return list(cases)
    chosen = set(random.Random(f"{seed} optima").sample(range(len(cases)), most))
    return [replace(case, wants_optimum=number in chosen) for number, case in enumerate(cases)]


def run_cases(lines: Sequence[Timeline], cases: Iterable[Case], policies: Sequence[str]) -> list[Row]:
    """Every policy on every case. Raises ConfigError naming the policy that failed."""
    from gpubroker.policy.optimum import optimum_usd

    classes = [(name, policy_class(name)) for name in policies]
    rows = []
    for case in cases:
        line = lines[case.line]
        job = case.setting.job(line)
        full_usd = job.on_demand_price * (job.work_h + job.restart_delay_h)
        best_usd = optimum_usd(job, line, case.start) if case.wants_optimum else None
        for name, made in classes:
            try:
                run = replay(made(), job, line, case.start)
            except (Exception, SystemExit) as error:
                where = f"{line.name}, step {case.start}"
                raise ConfigError(f"policy {name}: {where}: {type(error).__name__}: {error}") from error
            rows.append(
                Row(
                    policy=name,
                    line=line.name,
                    case=case,
                    run=run,
                    over_on_demand=run.usd / full_usd,
                    optimum_over_on_demand=None if best_usd is None else best_usd / full_usd,
                )
            )
    return rows


def score(rows: Sequence[Row]) -> Score:
    """Of at least one row."""
    compared = [row for row in rows if row.over_optimum is not None]
    optimum = fmean(row.optimum_over_on_demand or 0.0 for row in compared) if compared else None
    return Score(
        runs=len(rows),
        over_on_demand=fmean(row.over_on_demand for row in rows),
        compared=len(compared),
        over_optimum=fmean(row.over_on_demand for row in compared) / optimum if optimum else None,
        mean_of_ratios=fmean(row.over_optimum or 0.0 for row in compared) if compared else None,
        missed=sum(row.run.is_missed for row in rows),
        preemptions=fmean(row.run.preemptions for row in rows),
        launches=fmean(row.run.launches for row in rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A policy over all runs, and by work over deadline."""

    policy: str
    overall: Score
    columns: tuple[tuple[float, Score], ...]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "policy": self.policy,
            **asdict(self.overall),
            "by_work_over_deadline": [
                {"work_over_deadline": share, **asdict(column)} for share, column in self.columns
            ],
        }


def standings(rows: Sequence[Row]) -> list[Standing]:
    """One for each policy, in the order of the rows."""
    by_policy: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        columns = by_policy.setdefault(row.policy, {})
        columns.setdefault(row.case.work_over_deadline, []).append(row)
    return [
        Standing(
            policy=policy,
            overall=score([row for column in columns.values() for row in column]),
            columns=tuple((share, score(column)) for share, column in sorted(columns.items())),
        )
        for policy, columns in by_policy.items()
    ]
