"""The same course drawn many times: the spread of a bill and of its finish, by numpy. Pure: seeds are given.

Bill: simulate() -> Runs -> distribution() -> p50, p90, p99, and the chance to keep a deadline and a budget.
The model is preempt.py's, with three things that have no closed form: a hazard that falls with a node's age,
one that is known only as a Gamma, and billing units, which hold for every node of a run. Only what is shown
with a distribution pays for the import of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpubroker.plan.hazard import Ages, Gamma
from gpubroker.plan.preempt import Interruptions, expect

Array = NDArray[np.float64]
DRAWS = 4_000
# A run that has lost this many nodes counts as one that never finishes.
MOST_NODES = 2_000
_FOR_EVER_H = 1e15


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """One element a run; infinite where it did not finish."""

    billed_h: Array  # by the vendor's units
    wall_h: Array
    wait_h: Array  # of wall_h: without a node
    preemptions: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What turns the hours of a run into its bill, in USD as floats: statistics, not money."""

    usd_per_hour: float
    usd_fixed: float = 0.0  # data in, results out
    usd_per_preemption: float = 0.0  # reading the checkpoint again
    usd_per_wait_hour: float = 0.0  # a stopped node's disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """The value that half, nine in ten and 99 in 100 of the runs do not pass."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What a table shows of many runs. USD here are floats: round once before a person sees them."""

    usd: Quantiles
    finish_h: Quantiles
    usd_mean: float
    deadline_chance: float | None  # None = none was given
    budget_chance: float | None
    both_chance: float | None  # None unless both were given
    draws: int


def simulate(
    work_h: float,
    interruptions: Interruptions,
    *,
    seed: int | Sequence[int],
    draws: int = DRAWS,
    ages: Ages | None = None,
    uncertain: Gamma | None = None,
    bill: Callable[[Array], Array] | None = None,
    most_nodes: int = MOST_NODES,
) -> Runs:
    """Draw `draws` runs of the job, node by node.

    `uncertain` replaces the hazard, of which the mean still decides on the checkpoint interval; waits are
    exponential; `bill` turns the hours of every node into billed ones (billing_units). Raises ValueError as
    expect() does.
    """
    rng = np.random.default_rng(seed)
    run = _Running(work_h, interruptions, draws, bill)
    hazard: Array | float = interruptions.hazard_per_hour
    if uncertain is not None:
        hazard = rng.gamma(uncertain.shape, 1 / uncertain.hours, draws)
    for _ in range(most_nodes):
        if not run.index.size:
            break
        each = hazard[run.index] if isinstance(hazard, np.ndarray) else hazard
        run.next_node(lives(rng, each, run.index.size, ages))
    # A sum of exponential waits.
    lost = np.where(np.isfinite(run.preemptions), run.preemptions, 0.0)
    wait_h = rng.standard_gamma(lost) * interruptions.wait_h
    return Runs(billed_h=run.billed_h, wall_h=run.held_h + wait_h, wait_h=wait_h, preemptions=run.preemptions)


def lives(rng: np.random.Generator, hazard: Array | float, size: int, ages: Ages | None) -> Array:
    """Lives of that many nodes, by the integral of their hazard."""
    if not isinstance(hazard, np.ndarray) and hazard == 0:
        return np.full(size, _FOR_EVER_H)
    with np.errstate(divide="ignore", over="ignore"):
        life = np.minimum(rng.standard_exponential(size) / hazard, _FOR_EVER_H)
    if ages is None or not ages.until_h:
        return life / (ages.factors[0] if ages else 1.0)
    at_h = [0.0, *ages.until_h]
    spent = [0.0]
    for begin, end, factor in zip(at_h, ages.until_h, ages.factors, strict=False):
        spent.append(spent[-1] + (end - begin) * factor)
    at_h.append(at_h[-1] + _FOR_EVER_H / ages.factors[-1])
    spent.append(spent[-1] + _FOR_EVER_H)
    drawn: Array = np.interp(life, spent, at_h)
    return drawn


class _Running:
    """Runs side by side. Those that are over leave; `index` says where in the results the others belong."""

    def __init__(
        self,
        work_h: float,
        interruptions: Interruptions,
        draws: int,
        bill: Callable[[Array], Array] | None,
    ) -> None:
        course = expect(work_h, interruptions)
        self._i, self._bill = interruptions, bill
        self._saves = interruptions.saves_on_notice
        # Without an interval the only segment is the last, which is the whole job.
        interval_h = course.interval_h or 0.0
        self._segments = 0 if self._saves else round(course.checkpoints_written)
        self._segment_h = interval_h + interruptions.checkpoint_h
        self._last_h = work_h - self._segments * interval_h
        self.index = np.arange(draws)
        self._done = np.zeros(draws)  # segments that are saved; with notice, hours
        self._has_run = np.zeros(draws, dtype=bool)
        self._held = np.zeros(draws)
        self._billed = self._held if bill is None else np.zeros(draws)
        self._nodes = 0
        self.held_h = np.full(draws, math.inf)
        self.billed_h = self.held_h if bill is None else np.full(draws, math.inf)
        self.preemptions = np.full(draws, math.inf)

    def next_node(self, life_h: Array) -> None:
        """Each run gets a node that lives so long, and is over or loses it."""
        i = self._i
        start_h: Array | float = i.restart_h
        if i.start_h != i.restart_h:
            start_h = np.where(self._has_run, i.restart_h, i.start_h)
        up_h = life_h - start_h
        if self._saves:
            needed_h = self._last_h - self._done
        elif self._segments:
            needed_h = (self._segments - self._done) * self._segment_h + self._last_h
        else:
            needed_h = np.full(up_h.size, self._last_h)
        lost = up_h < needed_h
        held_h = np.where(lost, life_h, start_h + needed_h)
        if self._saves:
            held_h += np.where(lost & (up_h > 0), i.checkpoint_h, 0.0)
        self._held += held_h
        if self._bill is not None:
            self._billed += self._bill(held_h)
        self._finish(~lost)
        self._nodes += 1
        self._go_on(lost, up_h[lost])

    def _finish(self, over: NDArray[np.bool_]) -> None:
        where = self.index[over]
        self.preemptions[where] = self._nodes
        self.held_h[where] = self._held[over]
        if self._bill is not None:
            self.billed_h[where] = self._billed[over]

    def _go_on(self, lost: NDArray[np.bool_], up_h: Array) -> None:
        self.index = self.index[lost]
        self._held = self._held[lost]
        self._billed = self._held if self._bill is None else self._billed[lost]
        self._done = self._done[lost]
        if self._i.start_h != self._i.restart_h:
            self._has_run = self._has_run[lost] | (up_h >= 0)
        if self._saves:
            self._done += np.maximum(up_h, 0.0)
        elif self._segments:
            saved = np.floor(np.maximum(up_h, 0.0) / self._segment_h)
            self._done = np.minimum(self._done + saved, self._segments)


def billing_units(increment_s: int, minimum_s: int) -> Callable[[Array], Array] | None:
    """How a vendor rounds the hours of one node; None where a second is a second."""
    if increment_s <= 1 and minimum_s <= 1:
        return None

    def billed_h(held_h: Array) -> Array:
        # A hair less, so that the last digit of a float begins no new unit.
        units = np.ceil(held_h * (3600 / increment_s) * (1 - 1e-12))
        hours: Array = np.maximum(units * increment_s, minimum_s) / 3600
        return hours

    return billed_h


def usd_of(runs: Runs, rates: Rates) -> Array:
    """The bill of every run."""
    usd: Array = runs.billed_h * rates.usd_per_hour + rates.usd_fixed
    for each, rate in ((runs.preemptions, rates.usd_per_preemption), (runs.wait_h, rates.usd_per_wait_hour)):
        if rate:
            usd = usd + each * rate
    return usd


def distribution(
    runs: Runs, rates: Rates, *, deadline_h: float | None = None, budget_usd: float | None = None
) -> Distribution:
    """What the runs cost and when they end. A run that did not finish keeps neither deadline nor budget."""
    usd = usd_of(runs, rates)
    ended = np.isfinite(runs.wall_h)
    in_time = None if deadline_h is None else ended & (runs.wall_h <= deadline_h)
    in_budget = None if budget_usd is None else ended & (usd <= budget_usd)
    both = None if in_time is None or in_budget is None else in_time & in_budget
    return Distribution(
        usd=quantiles(usd),
        finish_h=quantiles(runs.wall_h),
        usd_mean=float(usd.mean()),
        deadline_chance=None if in_time is None else float(in_time.mean()),
        budget_chance=None if in_budget is None else float(in_budget.mean()),
        both_chance=None if both is None else float(both.mean()),
        draws=usd.size,
    )


def quantiles(values: Array) -> Quantiles:
    """Values that occurred, not means of neighbours: one of them may be infinite."""
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99), method="inverted_cdf")
    return Quantiles(p50=float(p50), p90=float(p90), p99=float(p99))
