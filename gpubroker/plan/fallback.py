"""Spot until it is no longer safe, on demand from then: a job with a deadline, drawn. Pure, numpy.

The model is preempt.py's, with a clock. A new spot node is begun, or waited for, only while losing all that
it could lose would still leave time to do the rest on demand; from then on the job is on demand and stays.
So a deadline that can be met is met, but for failures of the on-demand node, which are not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpubroker.plan.hazard import Ages, Gamma
from gpubroker.plan.preempt import Interruptions, expect
from gpubroker.plan.simulate import DRAWS, MOST_NODES, Array, lives

_A_MOMENT_H = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """Where the job goes when time runs short."""

    work_h: float  # of the whole job on that card
    start_h: float  # billed before it works, checkpoint read


@dataclass(frozen=True, slots=True, kw_only=True)
class Legs:
    """One element a run. A run that never fell back has no fallback hours."""

    spot_h: Array  # billed
    fallback_h: Array
    wall_h: Array
    wait_h: Array
    preemptions: Array


def draw(
    work_h: float,
    spot: Interruptions,
    fallback: Fallback,
    deadline_h: float,
    *,
    seed: int,
    draws: int = DRAWS,
    ages: Ages | None = None,
    uncertain: Gamma | None = None,
    bill: Callable[[Array], Array] | None = None,
) -> Legs:
    """Draw the runs. The unsaved work of a lost node is lost; the fallback starts from what was saved."""
    rng = np.random.default_rng(seed)
    plan = expect(work_h, spot)
    segments = round(plan.checkpoints_written)
    interval_h = plan.interval_h or work_h
    segment_h = interval_h + spot.checkpoint_h
    last_h = work_h - segments * interval_h
    slower = fallback.work_h / work_h
    rate = (
        spot.hazard_per_hour if uncertain is None else rng.gamma(uncertain.shape, 1 / uncertain.hours, draws)
    )
    hazard = np.broadcast_to(np.asarray(rate, dtype=np.float64), (draws,))

    clock, saved, spot_h, wait_h, fallback_h, lost = (np.zeros(draws) for _ in range(6))
    running = np.arange(draws)

    def room_h(start_h: float) -> Array:
        """What is left when a spot node that begins now loses its first segment and the rest is on demand."""
        rest_h = fallback.start_h + (work_h - saved[running] * interval_h) * slower
        room: Array = deadline_h - clock[running] - start_h - segment_h - rest_h
        return room

    for node in range(MOST_NODES):
        start_h = spot.restart_h if node else spot.start_h
        room = room_h(start_h)
        late = room < -_A_MOMENT_H
        over = running[late]
        fallback_h[over] = fallback.start_h + (work_h - saved[over] * interval_h) * slower
        running, room = running[~late], room[~late]
        if not running.size:
            break
        left = segments - saved[running]
        # A saved segment may take more time than it spares on demand: after so many the job leaves by itself.
        spent_h = segment_h - interval_h * slower
        may = np.floor(np.maximum(room, 0.0) / spent_h) + 1 if spent_h > 0 else np.full(left.size, math.inf)
        leaves = may <= left
        needed = start_h + np.where(leaves, np.minimum(may, left) * segment_h, left * segment_h + last_h)
        up = lives(rng, hazard[running], running.size, ages)
        gone = up < needed
        held = np.where(gone, up, needed)
        spot_h[running] += held if bill is None else bill(held)
        clock[running] += held
        gained = np.floor(np.maximum(held - start_h, 0.0) / segment_h + _A_MOMENT_H)
        saved[running] += np.minimum(gained, left)
        lost[running] += gone
        running = running[gone | leaves]
        wait = rng.standard_exponential(running.size) * spot.wait_h
        # Waiting ends when a node is back, or when it is too late for one; who left does not wait.
        wait = np.minimum(wait, np.maximum(room_h(spot.restart_h), 0.0))
        clock[running] += wait
        wait_h[running] += wait
    else:
        clock[running] = math.inf
    return Legs(
        spot_h=spot_h, fallback_h=fallback_h, wall_h=clock + fallback_h, wait_h=wait_h, preemptions=lost
    )
