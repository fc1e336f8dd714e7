"""What the rest of a job will cost when every later choice is the best one: `adaptive`'s table. Pure.

A finite-horizon dynamic programme, solved backwards in time for every regime of a zone (spells.py) and a few
prices of spot, in units of the on-demand price. Its state:

* the time left;
* the slack: hours that can still be wasted before on-demand from now on is the only way to be in time. It is
  the coordinate that makes the programme small: a node that works keeps it, waiting costs it hour by hour, a
  launch costs the restart delay, and a preemption what was not saved. Below zero nothing is allowed;
* the node: none, on demand, or spot;
* the phase of the zone's spell.

The slack counts the launch of the on-demand node that would have to save the day, unless that node runs
already. The delay of a launch is charged to the slack at once; a node lost in its first step gives back what
it has not used up. Periodic checkpoints make spot lose slack while they are written and, without a notice
long enough to write one, half an interval at a preemption.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import NDArray

from gpubroker.policy.spells import (
    DOWN_PER_HOUR,
    FACTOR_PRIOR,
    FACTORS,
    MEMORY_H,
    STAGE_H,
    STAGES,
    UP_PER_HOUR,
    Floats,
)

Table = NDArray[np.float32]

NONE, ON_DEMAND, SPOT = range(3)
UP = slice(0, STAGES)
FIRST_DOWN = STAGES
# Prices of spot over on-demand for which the programme is solved; between them costs are interpolated.
PRICES = (0.1, 0.2, 0.35, 0.6, 1.0)
# Chance that there is another zone to go to when the node's is lost: none, or for sure.
COVERS = (0.0, 1.0)
# The stage in which that other zone is met.
_MET = 1
# Time steps of the programme: finer ones do not change what a run costs.
_STEPS = 128
# Slack is told apart step by step up to here, then ever more coarsely.
_FINE_H, _GROWTH = 2.5, 1.12
# More than any job costs: what is not allowed.
_NEVER = np.float32(1e6)
# Hours: sums are off by rounding, never by this much.
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What of a job the table depends on, in hours."""

    deadline_h: float
    step_h: float
    delay_h: float  # restart
    interval_h: float  # of work between checkpoints on spot; 0: every moment is saved
    save_h: float  # to write one
    is_warned: bool  # a preemption leaves the time to write one
    has_zones: bool  # more than one

    @property
    def written(self) -> float:
        """Share of the time on spot that checkpoints take."""
        return self.save_h / (self.save_h + self.interval_h) if self.interval_h > 0 else 0.0

    @property
    def loss_h(self) -> float:
        """Work that a preemption throws away, on average."""
        return 0.0 if self.is_warned else self.interval_h / 2


def _regimes(has_zones: bool) -> Floats:
    """[regime, (factor of spells up, factor of spells down, cover)]."""
    return np.array(list(product(FACTORS, FACTORS, COVERS if has_zones else COVERS[:1])))


def weights(up_factors: Floats, down_factors: Floats, cover_chance: float, *, has_zones: bool) -> Floats:
    """How likely each regime is."""
    covers = [1 - cover_chance, cover_chance] if has_zones else [1.0]
    return np.multiply.outer(np.outer(up_factors, down_factors).ravel(), covers).ravel()


def cover_of(has_zones: bool) -> Floats:
    """By regime."""
    return _regimes(has_zones)[:, 2]


def hazards_per_hour(has_zones: bool) -> Floats:
    """[phase, regime] of one zone; phases are the stages of a spell up, then those of a spell down."""
    up, down, _ = _regimes(has_zones).T
    return np.concatenate([np.outer(UP_PER_HOUR, up), np.outer(DOWN_PER_HOUR, down)])


class Outlook:
    """The solved table."""

    def __init__(self, terms: Terms) -> None:
        self._dt = max(terms.step_h, terms.deadline_h / _STEPS)
        self._slack = _slack_grid(terms.deadline_h, self._dt)
        self._edges: list[float] = self._slack.tolist()
        self._cost = _solve(terms, self._slack, self._dt)

    def cost(self, node: int, left_h: float, slack_h: float) -> Table | None:
        """[phase, price, regime] in hours on demand; None where the deadline would be at stake."""
        if slack_h < -_EPSILON:
            return None
        edges, steps = self._edges, len(self._cost) - 1
        i = min(bisect_right(edges, slack_h + _EPSILON) - 1, len(edges) - 2)
        across = min(1.0, max(0.0, (slack_h - edges[i]) / (edges[i + 1] - edges[i])))
        n = max(0, min(int(left_h / self._dt + _EPSILON), steps - 1))
        along = min(1.0, max(0.0, left_h / self._dt - n))
        corners = self._cost[n : n + 2, node, i : i + 2]
        lines = corners[:, 0] * np.float32(1 - across) + corners[:, 1] * np.float32(across)
        return np.asarray(lines[0] * np.float32(1 - along) + lines[1] * np.float32(along))


@lru_cache(maxsize=8)
def outlook(terms: Terms) -> Outlook:
    """The table for these terms, solved once a process."""
    return Outlook(terms)


def _slack_grid(deadline_h: float, dt: float) -> NDArray[np.float64]:
    points, width = [0.0], dt
    while points[-1] < max(deadline_h, dt):
        if points[-1] > _FINE_H:
            width *= _GROWTH
        points.append(points[-1] + width)
    return np.array(points)


def _solve(terms: Terms, slack: NDArray[np.float64], dt: float) -> Table:
    """[time, node, slack, phase, price, regime]."""
    chances = _Chances(dt, terms.has_zones)
    delay, save = terms.delay_h, terms.save_h
    worked = max(0.0, dt - delay)  # in the first step of a node
    begun = min(delay, dt) + terms.written * worked + min(terms.loss_h, worked)  # when it is the last as well
    started = delay + terms.written * worked
    drain, loss = terms.written * dt, terms.loss_h
    down_to = {
        name: _lowered(slack, by)
        for name, by in {
            "wait": dt,
            "stop": dt + delay + save,
            "stay": drain,
            "die": drain + loss,
            "leave": save,
            "leave and wait": save + dt,
            "launch": started,
            "launch, die": begun,
            "change": delay + save + started,
            "change, die": delay + save + begun,
        }.items()
    }
    price = np.array(PRICES, np.float32)[:, None]
    steps = max(1, ceil(terms.deadline_h / dt - _EPSILON))
    count = len(cover_of(terms.has_zones))
    table = np.zeros((steps + 1, 3, len(slack), 2 * STAGES, len(PRICES), count), np.float32)
    change = _changes(dt, terms.has_zones).T.astype(np.float32)
    for n in range(1, steps + 1):
        none, on_demand, spot = table[n - 1] @ change
        idle, rented = chances.next(none), chances.next(on_demand)
        lives, dies = chances.on_spot(spot, none)

        def hours(owed_h: float, now: float = n * dt) -> Table:
            """That the next node runs in this step: it may be done sooner."""
            run = np.clip(now - slack + owed_h, 0, dt).astype(np.float32)
            return np.asarray(run[:, None, None, None])

        buy = hours(0.0) + rented
        wait = down_to["wait"](idle)
        new = table[n]
        new[NONE] = np.minimum(wait, buy)
        new[NONE][:, UP] = np.minimum(
            new[NONE][:, UP], price * hours(0.0) + down_to["launch"](lives) + down_to["launch, die"](dies)
        )
        new[ON_DEMAND] = np.minimum(buy, down_to["stop"](idle))
        new[ON_DEMAND][:, UP] = np.minimum(
            new[ON_DEMAND][:, UP],
            price * hours(delay) + down_to["change"](lives) + down_to["change, die"](dies),
        )
        stay = price * hours(-delay) + down_to["stay"](lives) + down_to["die"](dies)
        leave = np.minimum(down_to["leave"](buy[:, UP]), down_to["leave and wait"](idle[:, UP]))
        new[SPOT][:, UP] = np.minimum(stay, leave)
        is_done = n * dt - slack <= _EPSILON
        new[ON_DEMAND][is_done] = 0.0
        is_done = n * dt - slack - delay <= _EPSILON
        new[NONE][is_done] = 0.0
        new[SPOT][is_done] = 0.0
    return table


def _lowered(slack: NDArray[np.float64], by_h: float) -> Callable[[Table], Table]:
    """From costs by slack to costs of having that much less of it."""
    if by_h <= 0:
        return lambda costs: costs
    wanted = slack - by_h
    below = np.clip(np.searchsorted(slack, wanted + _EPSILON) - 1, 0, len(slack) - 2)
    across = np.clip((wanted - slack[below]) / (slack[below + 1] - slack[below]), 0, 1)
    share = across.astype(np.float32)[:, None, None, None]
    is_too_much = wanted < -_EPSILON

    def lower(costs: Table) -> Table:
        moved = costs[below] * (1 - share) + costs[below + 1] * share
        moved[is_too_much] = _NEVER
        return np.asarray(moved)

    return lower


def _changes(dt: float, has_zones: bool) -> Floats:
    """[regime before, regime after a time step]: factors are drawn anew every MEMORY_H; cover stays."""
    share = 1 - np.exp(-dt / MEMORY_H)
    factor = (1 - share) * np.eye(len(FACTORS)) + share * np.array(FACTOR_PRIOR)
    return np.asarray(np.kron(np.kron(factor, factor), np.eye(len(COVERS) if has_zones else 1)))


class _Chances:
    """How a spell goes on over one time step, [phase, 1, regime].

    A market with cover stays up when the node's own zone does not.
    """

    def __init__(self, dt: float, has_zones: bool) -> None:
        older = [min(stage + 1, STAGES - 1) for stage in range(STAGES)]
        self._older = np.array(older + [STAGES + stage for stage in older])
        self._other = np.array([FIRST_DOWN] * STAGES + [0] * STAGES)
        hazard = hazards_per_hour(has_zones)
        cover = cover_of(has_zones)
        self._cover = cover.astype(np.float32)
        self._zone = _split(hazard, dt)
        hazard[UP] *= 1 - cover
        self._market = _split(hazard, dt)

    def next(self, costs: Table) -> Table:
        """Expected costs after the step, by phase before it, for who does not run on spot."""
        lasts, ages, ends = self._market
        return np.asarray(lasts * costs + ages * costs[:, self._older] + ends * costs[:, self._other])

    def on_spot(self, spot: Table, none: Table) -> tuple[Table, Table]:
        """The same for who does, in two parts: the node lives, the node is lost."""
        lasts, ages, ends = (part[UP] for part in self._zone)
        lives = lasts * spot[:, UP] + ages * spot[:, self._older[UP]]
        return np.asarray(lives), np.asarray(ends * lost(none, self._cover)[:, None])


def lost(none: Table, cover: Table | Floats) -> Table:
    """Costs of who has just lost its spot node: the market is down, or another zone is there."""
    return np.asarray((1 - cover) * none[..., FIRST_DOWN, :, :] + cover * none[..., _MET, :, :])


def _split(hazard: Floats, dt: float) -> tuple[Table, Table, Table]:
    """Chances that a spell stays in its stage, grows out of it, ends."""
    ends = 1 - np.exp(-hazard * dt)
    grows = (1 - ends) * np.array([1 - np.exp(-dt / hours) for hours in STAGE_H] * 2)[:, None]
    parts = (1 - ends - grows, grows, ends)
    lasts, ages, over = (part.astype(np.float32)[:, None] for part in parts)
    return lasts, ages, over
