"""The least a job can cost with the future known: what every policy is held against. Pure, exact.

A launch takes the restart delay, so a plan's work is its billed hours less its launches x delay. (A stay
shorter than the delay counts as negative work here: it is worth nothing in the replay, and never part of
the best plan.) The search takes states in the order of cost so far + the least cost to go, so that the
first finished one is the best. Three things keep it small:

* The least cost to go comes from Lagrangian duals: where each hour of work is rewarded with some $, the
  best plan without the demand to finish is a plain recursion, and its cost plus the reward for the work
  that is needed is a lower bound, whatever the reward.
* A state that needs as much work and has cost as much as another one at the same step and place is left.
* A change of place is *loose* where both places were there at the same difference in price a step before:
  it could as well come sooner or later. Of two loose changes one can be moved against the other, at no
  cost and without a change in work, until it is not loose any more. So a plan needs one at the most.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpubroker.policy.interface import Job
from gpubroker.policy.replay import steps_of
from gpubroker.policy.traces import Timeline

Floats = NDArray[np.float64]
_EPSILON = 1e-9  # hours and $
_DIGITS = 8  # of $: plans closer than that are alike, and the one that got further is tried first
_REWARDS = 48  # duals at a time


def optimum_usd(job: Job, line: Timeline, start: int) -> float | None:
    """$ of the best plan with instant checkpoints, the last step pro rata; None where none is in time."""
    world = _World.of(job, line, start)
    if world.most_work_h[0, 0] < job.work_h - _EPSILON:
        return None
    return _Search(world, _Bounds.of(world, job.work_h)).run(job.work_h)


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """The run's steps. Places: 0 nowhere, 1 on demand, then the zones."""

    delay_h: float
    hours: Floats  # of each step; the last may be cut short
    usd_per_hour: Floats  # step, place; infinite where there is no node
    most_work_h: Floats  # step, place: what can still be done from there

    @classmethod
    def of(cls, job: Job, line: Timeline, start: int) -> _World:
        steps = steps_of(job.deadline_h, line.step_s)
        hours = np.full(steps, line.step_h)
        hours[-1] = job.deadline_h - (steps - 1) * line.step_h
        part = slice(start, start + steps)
        spot = np.where(np.array(line.available[part]), np.array(line.price[part]), inf)
        usd = np.column_stack([np.zeros(steps), np.full(steps, line.on_demand_usd_per_hour), spot])
        free = np.where(np.isfinite(usd), 0.0, inf)
        most = -_to_go(free, hours, job.restart_delay_h, np.ones(1))[:, :, 0]
        return cls(delay_h=job.restart_delay_h, hours=hours, usd_per_hour=usd, most_work_h=most)


def _to_go(usd_per_hour: Floats, hours: Floats, delay_h: float, rewards: Floats) -> Floats:
    """Least $ less rewards from each step and place on, while work is left, by reward in $/h of work.

    The work may end within a step: a part of it on a node costs no less than either nothing or all of it.
    """
    steps, places = usd_per_hour.shape
    node = usd_per_hour[:, 1:, None]
    worth = (node - rewards) * hours[:, None, None]
    ended = np.where(np.isfinite(node), 0.0, inf)
    to_go = np.zeros((steps + 1, places, len(rewards)))
    to_go[steps, 0] = inf  # with work left, whoever is nowhere must launch once more
    for k in range(steps - 1, -1, -1):
        stay = np.minimum(worth[k] + np.minimum(to_go[k + 1, 1:], 0.0), ended[k])
        anew = np.minimum(to_go[k + 1, 0], stay.min(axis=0) + rewards * delay_h)
        to_go[k, 0] = anew
        np.minimum(anew, stay, out=to_go[k, 1:])
    return to_go


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """Duals of the cost to go."""

    rewards: Floats
    to_go: Floats  # step, place, reward

    @classmethod
    def of(cls, world: _World, work_h: float) -> _Bounds:
        """Rewards at the prices themselves and far beyond; then many around the best of these."""
        prices = np.unique(world.usd_per_hour[:, 1:][np.isfinite(world.usd_per_hour[:, 1:])])
        some = prices[np.linspace(0, len(prices) - 1, min(len(prices), _REWARDS)).astype(int)]
        wide = np.geomspace(max(prices[0], 1e-6) / 2, max(prices[-1], 1e-6) * 100, _REWARDS)
        rewards = np.unique(np.concatenate([some, wide]))
        to_go = _to_go(world.usd_per_hour, world.hours, world.delay_h, rewards)
        best = int(np.argmax(rewards * work_h + to_go[0, 0]))
        near = np.linspace(rewards[max(best - 1, 0)], rewards[min(best + 1, len(rewards) - 1)], _REWARDS)
        closer = _to_go(world.usd_per_hour, world.hours, world.delay_h, near)
        return cls(rewards=np.concatenate([rewards, near]), to_go=np.concatenate([to_go, closer], axis=2))

    def least_usd(self, step: int, place: int, need_h: float) -> float:
        """No plan that does this much work from there costs less."""
        return float((self.rewards * need_h + self.to_go[step, place]).max())


class _State(NamedTuple):
    """In the order of the queue: the cheapest first, of these the furthest."""

    least_usd: float  # so far and to go, rounded
    steps_back: int  # minus the step
    place: int
    is_settled: bool  # whether the loose change has been made
    need_h: float  # of work; 0 when done
    usd: float  # so far


class _Stairs:
    """States of one place and step of which none is as good as another: less need, more $."""

    def __init__(self) -> None:
        self._needs_h: list[float] = []  # rising
        self._usd: list[float] = []  # falling

    def has_as_good(self, need_h: float, usd: float) -> bool:
        """Whether one of them needs no more and has cost no more."""
        at = bisect_right(self._needs_h, need_h + _EPSILON)
        return at > 0 and self._usd[at - 1] <= usd + _EPSILON

    def add(self, need_h: float, usd: float) -> None:
        """One that they have nothing as good as; those that it is as good as go."""
        at = end = bisect_right(self._needs_h, need_h)
        while end < len(self._usd) and self._usd[end] >= usd:
            end += 1
        self._needs_h[at:end] = [need_h]
        self._usd[at:end] = [usd]


class _Search:
    """States by cost, until one is done."""

    def __init__(self, world: _World, bounds: _Bounds) -> None:
        self._bounds = bounds
        self._delay_h = world.delay_h
        self._hours: list[float] = world.hours.tolist()
        self._rates: list[list[float]] = world.usd_per_hour.tolist()
        self._most_h: list[list[float]] = world.most_work_h.tolist()
        self._best: defaultdict[tuple[int, int, bool], _Stairs] = defaultdict(_Stairs)

    def run(self, work_h: float) -> float:
        """$ of the first state that is done."""
        queue = [_State(0.0, 0, 0, False, work_h, 0.0)]
        while True:
            state = heapq.heappop(queue)
            if state.need_h <= 0:
                return state.usd
            if self._is_worth(state):
                for after in self._after(state):
                    heapq.heappush(queue, after)

    def _is_worth(self, state: _State) -> bool:
        """Whether no other state is as good and as free."""
        _, steps_back, place, is_settled, need_h, usd = state
        if is_settled and self._best[steps_back, place, False].has_as_good(need_h, usd):
            return False
        best = self._best[steps_back, place, is_settled]
        if best.has_as_good(need_h, usd):
            return False
        best.add(need_h, usd)
        return True

    def _after(self, state: _State) -> Iterator[_State]:
        """The states that each place in the coming step leads to."""
        _, steps_back, place, was_settled, need_h, usd = state
        step = -steps_back
        for to, rate in enumerate(self._rates[step]):
            if rate == inf:
                continue
            is_loose = to != place and self._is_loose(step, place, to)
            if is_loose and was_settled:
                continue
            is_settled = was_settled or is_loose
            delay_h = 0.0 if to in (0, place) else self._delay_h
            worked_h = self._hours[step] - delay_h if to else 0.0
            if to and need_h <= worked_h + _EPSILON:
                total = usd + (need_h + delay_h) * rate
                yield _State(round(total, _DIGITS), steps_back - 1, to, is_settled, 0.0, total)
                continue
            left_h = need_h - worked_h
            if self._most_h[step + 1][to] < left_h - _EPSILON:
                continue
            paid = usd + self._hours[step] * rate
            least = paid + self._bounds.least_usd(step + 1, to, left_h)
            yield _State(round(least, _DIGITS), steps_back - 1, to, is_settled, left_h, paid)

    def _is_loose(self, step: int, place: int, to: int) -> bool:
        if not 0 < step < len(self._hours) - 1:
            return False
        was, now = self._rates[step - 1], self._rates[step]
        # Infinite less infinite is no number, and no number is small.
        return abs((now[to] - now[place]) - (was[to] - was[place])) < _EPSILON
