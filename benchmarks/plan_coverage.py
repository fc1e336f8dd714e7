"""How often a bill on the public spot traces stays below the quoted p50 and p90: measured, not judged.

Runs take spot whenever there is any and write periodic checkpoints. Each is quoted twice: by the packaged
prior alone, and by what the first half of its trace showed; it is billed on the second half. The prior and
its age factors were themselves read off these traces. Most traces record whether a node could be launched.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Result
from gpubroker.plan.hazard import Gamma, Prior, packaged_priors
from gpubroker.plan.preempt import Interruptions, expect
from gpubroker.plan.simulate import Rates, distribution, simulate
from gpubroker.policy.traces import Trace, read_traces

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
WORKS_H = (4.0, 12.0, 24.0)
RESTART_H, CHECKPOINT_H = 0.1, 0.02
# Mean hours until spot is back, before a trace has shown its own: of the pooled public traces.
PRIOR_WAIT_H = 1.6
# Starts leave this much of the trace, times the work. A run that the trace ends counts as beyond every quote.
ROOM = 3

Spell = tuple[float, float]  # hours in which spot could be held


def plan_coverage(quick: bool) -> Result:
    """The share of bills at or below the quoted p90, by what the first halves showed; more in `detail`."""
    if not TRACES.is_dir():
        return _result(0.0, {"skipped": f"there are no public traces at {TRACES}: nothing was measured"})
    prior = packaged_priors()["aws", "spot", ""]
    starts = 10 if quick else 60
    tallies = {"prior alone": Tally(), "prior and first half": Tally()}
    for number, trace in enumerate(read_traces([TRACES])):
        _measure(trace, prior, starts, number, tallies)
    detail = {name: tally.shares() for name, tally in tallies.items()}
    history = tallies["prior and first half"]
    return _result(history.shares()["bill below p90"], {"runs": len(history.rows), **detail})


def _result(figure: float, detail: dict[str, object]) -> Result:
    return Result(
        name="plan-coverage",
        figure=round(figure, 4),
        unit="of bills below p90",
        baseline=0.9,
        ratio=round(figure / 0.9, 3),
        limit=1.12,  # all of them: nothing is refused here
        ok=True,
        detail=detail,
    )


class Tally:
    """Whether each bill and each finish was at or below the quoted quantiles."""

    def __init__(self) -> None:
        self.rows: list[tuple[bool, ...]] = []

    def shares(self) -> dict[str, float]:
        """Of all runs; up to as many more may have been below as were `cut off` by the end of their trace."""
        names = ("bill below p50", "bill below p90", "finish below p50", "finish below p90", "cut off")
        counts = (sum(column) for column in zip(*self.rows, strict=True))
        return {name: round(n / len(self.rows), 3) for name, n in zip(names, counts, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a quote rests on."""

    gamma: Gamma
    wait_h: float


def _measure(trace: Trace, prior: Prior, starts: int, seed: int, tallies: dict[str, Tally]) -> None:
    spells = list(_spells(trace))
    end_h = len(trace.available) * trace.step_s / 3600
    half_h = end_h / 2
    seen = _seen([s for s in spells if s[0] < half_h], half_h, prior.gamma)
    known = {"prior alone": Known(gamma=prior.gamma, wait_h=PRIOR_WAIT_H), "prior and first half": seen}
    price = statistics.fmean(trace.spot_usd_per_hour)
    rng = random.Random(seed)
    for work_h, (name, basis) in itertools.product(WORKS_H, known.items()):
        inputs = Interruptions(
            hazard_per_hour=prior.ages.over(basis.gamma.mean, work_h),
            restart_h=RESTART_H,
            checkpoint_h=CHECKPOINT_H,
            wait_h=basis.wait_h,
        )
        runs = simulate(work_h, inputs, seed=1, ages=prior.ages, uncertain=basis.gamma)
        quoted = distribution(runs, Rates(usd_per_hour=price))
        rng.seed(f"{seed} {work_h}")
        for start_h in _starts(spells, half_h, end_h - ROOM * work_h, starts, rng):
            billed_h, wall_h = replay(spells, start_h, work_h, inputs)
            usd = billed_h * price
            tallies[name].rows.append(
                (
                    usd <= quoted.usd.p50,
                    usd <= quoted.usd.p90,
                    wall_h <= quoted.finish_h.p50,
                    wall_h <= quoted.finish_h.p90,
                    math.isinf(wall_h),
                )
            )


def _spells(trace: Trace) -> Iterator[Spell]:
    step_h, at = trace.step_s / 3600, 0
    for is_there, steps in itertools.groupby(trace.available):
        count = sum(1 for _ in steps)
        if is_there:
            yield at * step_h, (at + count) * step_h
        at += count


def _seen(spells: Sequence[Spell], until_h: float, prior: Gamma) -> Known:
    """Ended spells are losses; gaps are waits, with one of the prior's length added."""
    held_h = sum(min(end, until_h) - begin for begin, end in spells)
    lost = sum(end < until_h for _, end in spells)
    away = [begin - end for (_, end), (begin, _) in itertools.pairwise(spells)]
    return Known(gamma=prior.after(lost, held_h), wait_h=(sum(away) + PRIOR_WAIT_H) / (len(away) + 1))


def _starts(
    spells: Sequence[Spell], from_h: float, to_h: float, count: int, rng: random.Random
) -> Iterator[float]:
    """Moments when spot is there: a quote is for an offer that there is."""
    parts = [(max(b, from_h), min(e, to_h)) for b, e in spells if e > from_h and b < to_h]
    weights = [end - begin for begin, end in parts]
    for begin, end in rng.choices(parts, weights, k=count) if parts else ():
        yield rng.uniform(begin, end)


def replay(
    spells: Sequence[Spell], start_h: float, work_h: float, inputs: Interruptions
) -> tuple[float, float]:
    """Billed and wall hours of a run that takes spot when it is there; infinite where the trace ends."""
    interval_h = expect(work_h, inputs).interval_h or work_h
    saved_h = billed_h = 0.0
    for begin_h, end_h in spells:
        if end_h <= start_h:
            continue
        up_from_h = max(begin_h, start_h)
        left_h = work_h - saved_h
        pauses = max(0, math.ceil(left_h / interval_h - 1e-9) - 1)
        needed_h = inputs.restart_h + left_h + pauses * inputs.checkpoint_h
        if end_h - up_from_h >= needed_h:
            return billed_h + needed_h, up_from_h + needed_h - start_h
        billed_h += end_h - up_from_h
        run_h = max(0.0, end_h - up_from_h - inputs.restart_h)
        saved_h += min(pauses, int(run_h / (interval_h + inputs.checkpoint_h))) * interval_h
    return math.inf, math.inf
