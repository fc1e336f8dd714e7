"""Preemptions in closed form: work and a hazard -> expected billed and wall hours. Pure, fast, no numpy.

Bill: expect() -> the hours that a line of the bill multiplies by a price. The model: a node is lost at a
constant hazard while it is billed, starts included. A lost node costs the work since the last checkpoint and
a restart, which may be lost as well. A checkpoint follows every interval of work but the last. simulate.py
draws the same model, and the tests hold one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

# Nobody saves more often: the floor where a checkpoint costs nothing and the best interval would be zero.
MIN_INTERVAL_H = 1 / 60
# The chance to lose a job below which it needs no checkpoint, and its products with a pause are no numbers.
_NEVER_LOST = 1e-14


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruptions:
    """What takes a node away and what that costs, in hours."""

    hazard_per_hour: float  # preemptions per billed hour
    restart_h: float  # cold start and reload: billed, no progress
    checkpoint_h: float = 0.0  # the pause of writing one
    interval_h: float | None = None  # work between checkpoints; None = the best for this job
    wait_h: float = 0.0  # mean wait for capacity after a preemption, not billed
    # Enough to write a checkpoint = every preemption saves: no work is lost, nothing is written in between.
    notice_h: float = 0.0
    first_start_h: float | None = None  # None = as long as a restart
    # What a checkpoint costs beside its pause (egress), in hours of the node's price: it lengthens the best
    # interval and is no billed time.
    checkpoint_fee_h: float = 0.0

    @property
    def start_h(self) -> float:
        """The first start."""
        return self.restart_h if self.first_start_h is None else self.first_start_h

    @property
    def saves_on_notice(self) -> bool:
        """Whether the notice is long enough to save, so that no work is ever lost."""
        return 0 < self.notice_h >= self.checkpoint_h


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Expected hours and counts. Five parts are billed_h exactly; infinite where the job never finishes."""

    useful_h: float
    first_start_h: float  # one undisturbed start
    checkpoint_pause_h: float  # of checkpoints that were completed
    rework_h: float  # work and pauses that were lost
    restart_h: float  # restarts, and starts that were lost
    preemptions: float
    checkpoints_written: float
    interval_h: float | None  # None = nothing is written at intervals
    wait_h: float  # all waits for capacity, not billed

    @property
    def billed_h(self) -> float:
        """What the vendor bills, before billing units."""
        return self.useful_h + self.first_start_h + self.checkpoint_pause_h + self.rework_h + self.restart_h

    @property
    def wall_h(self) -> float:
        """From the first start to the end of the job."""
        return self.billed_h + self.wait_h

    @property
    def finishes(self) -> bool:
        """False where the expectation is beyond any number: restarts are lost faster than they end."""
        return math.isfinite(self.billed_h)


@lru_cache(maxsize=65_536)
def expect(work_h: float, interruptions: Interruptions) -> Expectation:
    """The expected course of `work_h` useful hours. Raises ValueError for a figure that is no duration.

    A segment of s hours on a node that is up takes (e^(hazard s) - 1)/hazard of attempts, of which s is the
    one that counts, and e^(hazard s) - 1 preemptions, each followed by (e^(hazard R) - 1)/hazard of restarts.
    """
    i = interruptions
    _check(work_h, i)
    hazard = i.hazard_per_hour
    if i.saves_on_notice:
        return _saving_on_notice(work_h, i)
    interval_h = _interval_h(work_h, i)
    written = _written(work_h, interval_h)
    last_h = work_h - written * interval_h if written else work_h
    segment_h = interval_h + i.checkpoint_h if written else 0.0
    lost = written * _expm1(hazard * segment_h) + _expm1(hazard * last_h)
    rework_h = (written * _excess(hazard * segment_h) + _excess(hazard * last_h)) / hazard if hazard else 0.0
    return _with_restarts(
        i,
        work_h,
        lost=lost,
        rework_h=rework_h,
        written=float(written),
        interval_h=interval_h if written else None,
    )


def _saving_on_notice(work_h: float, i: Interruptions) -> Expectation:
    """Every preemption at work follows a save inside the notice: T + hazard T (c + restarts) + start."""
    lost = i.hazard_per_hour * work_h
    return _with_restarts(i, work_h, lost=lost, rework_h=0.0, written=lost, interval_h=None)


def _with_restarts(
    i: Interruptions, work_h: float, *, lost: float, rework_h: float, written: float, interval_h: float | None
) -> Expectation:
    """The whole course, from the preemptions while at work and what they lost."""
    hazard = i.hazard_per_hour
    restart_lost, start_lost = _expm1(hazard * i.restart_h), _expm1(hazard * i.start_h)
    preemptions = lost * (1 + restart_lost) + start_lost
    if not math.isfinite(preemptions) or not math.isfinite(rework_h):
        preemptions = rework_h = restart_h = math.inf
    elif hazard:
        restart_h = lost * (restart_lost / hazard) + _excess(hazard * i.start_h) / hazard
    else:
        restart_h = 0.0
    return Expectation(
        useful_h=work_h,
        first_start_h=i.start_h,
        checkpoint_pause_h=written * i.checkpoint_h if i.checkpoint_h else 0.0,
        rework_h=rework_h,
        restart_h=restart_h,
        preemptions=preemptions,
        checkpoints_written=written,
        interval_h=interval_h,
        wait_h=preemptions * i.wait_h if preemptions and i.wait_h else 0.0,
    )


def _check(work_h: float, i: Interruptions) -> None:
    figures = (
        work_h,
        i.hazard_per_hour,
        i.restart_h,
        i.checkpoint_h,
        i.wait_h,
        i.notice_h,
        i.start_h,
        i.checkpoint_fee_h,
    )
    if min(figures) >= 0 and sum(figures) < math.inf and (i.interval_h is None or i.interval_h > 0):
        return
    names = "work_h hazard_per_hour restart_h checkpoint_h wait_h notice_h first_start_h checkpoint_fee_h"
    for name, value in zip(names.split(), figures, strict=True):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: it must be a number of zero or more")
    if i.interval_h is not None and not i.interval_h > 0:
        raise ValueError(f"interval_h is {i.interval_h}: it must be more than zero")


# --- Intervals --------------------------------------------------------------------------------------------


def best_interval_h(hazard_per_hour: float, checkpoint_h: float) -> float:
    """The interval that costs a long job the least: M (1 + W0(-exp(-c/M - 1))), M the mean life.

    W0 is Lambert's function: the interval solves exp((tau + c)/M) (1 - tau/M) = 1. No hazard gives
    infinity (never write), a free checkpoint 0 (always write).
    """
    if hazard_per_hour == 0:
        return math.inf
    return _share_of_life(checkpoint_h * hazard_per_hour) / hazard_per_hour


def daly_interval_h(hazard_per_hour: float, checkpoint_h: float) -> float:
    """Daly's approximation (FGCS 22(3), 2006), within 2% of the best while a checkpoint is shorter than M."""
    if hazard_per_hour == 0:
        return math.inf
    x = checkpoint_h * hazard_per_hour / 2
    if x >= 1:
        return 1 / hazard_per_hour
    young = young_interval_h(hazard_per_hour, checkpoint_h)
    return young * (1 + math.sqrt(x) / 3 + x / 9) - checkpoint_h


def young_interval_h(hazard_per_hour: float, checkpoint_h: float) -> float:
    """Young's approximation (CACM 17(9), 1974): sqrt(2 c M)."""
    if hazard_per_hour == 0:
        return math.inf
    return math.sqrt(2 * checkpoint_h / hazard_per_hour)


def _share_of_life(pause: float) -> float:
    """y = 1 + W0(-exp(-pause - 1)), the root in [0, 1] of (1 - y) e^y = e^-pause."""
    if pause > 1:
        rest = 0.0  # 1 - y: each turn brings it at least six times nearer
        for _ in range(24):
            rest = math.exp(rest - pause - 1)
        return 1 - rest
    p = math.sqrt(-2 * math.expm1(-pause))
    y = p * (1 - p * (1 / 3 - p * (11 / 72 - p * (43 / 540 - p * 769 / 17280))))  # about the branch point
    if p < 0.01:
        return y
    for _ in range(8):  # Newton's, from a few per cent off
        step = (y + math.log1p(-y) + pause) * (1 - y) / y
        y += step
        if abs(step) <= 1e-15:
            break
    return y


def _interval_h(work_h: float, i: Interruptions) -> float:
    """The caller's interval, or the best one for a job of this length: equal parts, as many as pay."""
    if i.interval_h is not None:
        return i.interval_h
    hazard = i.hazard_per_hour
    if hazard * work_h < _NEVER_LOST or work_h <= MIN_INTERVAL_H:
        return math.inf
    fee = hazard * i.checkpoint_fee_h * math.exp(-hazard * i.restart_h)

    pause, work, expm1 = hazard * i.checkpoint_h, hazard * work_h, math.expm1

    def cost(parts: int) -> float:
        part = work / parts
        try:
            return (parts - 1) * (expm1(part + pause) + fee) + expm1(part)
        except OverflowError:
            return math.inf

    most = math.ceil(work_h / MIN_INTERVAL_H)
    long_job = _share_of_life(pause + fee) / hazard
    start = most if long_job * most <= work_h else max(1, round(work_h / long_job))
    return work_h / _least(cost, start, most)


def _least(cost: Callable[[int], float], start: int, most: int) -> int:
    """The count of the least cost from 1 to `most`: in the valley near `start`, or at 1."""
    best, least, step = start, cost(start), 1
    while step:
        for other in (best + step, best - step):
            if 1 <= other <= most and (at := cost(other)) < least:
                best, least, step = other, at, step * 2
                break
        else:
            step //= 2
    return best if least < cost(1) else 1


def _written(work_h: float, interval_h: float) -> int:
    """Checkpoints of a job: one after every interval but the last, which is never empty."""
    # A hair less, so that 30 tenths are 3 hours.
    return max(0, math.ceil(work_h / interval_h * (1 - 1e-12)) - 1)


def _expm1(x: float) -> float:
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def _excess(x: float) -> float:
    """e^x - 1 - x without cancellation."""
    if x < 0.01:
        return x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return _expm1(x) - x
