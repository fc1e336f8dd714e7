"""`adaptive`: the cheapest way through a market that comes and goes, and never late.

Pure; it sees the present only.

Three parts, asked at every step:

1. What it believes (spells.py). Every look at a zone teaches how long capacity stays there and stays away,
   whatever the job runs on meanwhile; looks at all zones together teach how often there is another one to
   go to. What a spell on spot is worth depends on the zone; what comes after its loss on the market.
2. What it plans (outlook.py). For each thing it could do now: the cost of this step plus the expected cost
   of the rest, read from a table solved in advance and averaged over the regimes the market may be in. So it
   waits while waiting is worth it, buys on-demand before the slack is gone when the market looks bad, comes
   back from on-demand for a spell that has proved itself, and moves to another zone when that pays for the
   launch.
3. The net. What would leave no way to finish on demand in time, should the spot node be lost by the next
   look, is not among the things it could do. A job that can be done in time is done in time.

Times are read from the observation, not counted in steps: observations may come at any spacing. The net
looks ahead over the longest gap that it has met, at least the job's step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite
from operator import itemgetter
from typing import Any

import numpy as np

from gpubroker.policy.interface import Answer, Job, Observation
from gpubroker.policy.outlook import (
    FIRST_DOWN,
    NONE,
    ON_DEMAND,
    PRICES,
    SPOT,
    Outlook,
    Table,
    Terms,
    cover_of,
    hazards_per_hour,
    lost,
    outlook,
    weights,
)
from gpubroker.policy.spells import DOWN, UP, Floats, Spells

_EPSILON = 1e-9
# Hours of history that the present counts for in the chance of another zone.
_PRESENT_H = 2.0


class Adaptive:
    """See the module. `state` and `restore` let it be stored with the job and go on elsewhere."""

    def reset(self, job: Job) -> None:
        """See Policy. Solves the table for the job's terms unless this process has it already."""
        self._job = job
        self._terms = _terms(job)
        self._hazards = hazards_per_hour(self._terms.has_zones)
        self._cover = cover_of(self._terms.has_zones)
        self._outlook = outlook(self._terms)
        self._zones = [Spells() for _ in job.zones]
        self._market = Spells()  # of any zone
        self._prices = [inf] * len(job.zones)  # $/h, the last ones seen
        self._seen_h: float | None = None
        self._gap_h = job.step_h
        self._choice_h = self._history_h = 0.0  # with several zones up, and all
        self._saving_h = 0.0  # owed by the next launch for a stop by choice

    def step(self, obs: Observation) -> Answer:
        """See Policy."""
        self._watch(obs)
        answer = self._best(obs)
        if answer == "none" and obs.state != "none":
            self._saving_h = self._owed_h(obs)
        return answer

    def state(self) -> dict[str, Any]:
        """See Resumable."""
        return {
            "zones": [zone.record() for zone in self._zones],
            "market": self._market.record(),
            "prices": [price if isfinite(price) else None for price in self._prices],
            "seen_h": self._seen_h,
            "gap_h": self._gap_h,
            "choice_h": self._choice_h,
            "history_h": self._history_h,
            "saving_h": self._saving_h,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See Resumable."""
        self._zones = [Spells.of(record) for record in state["zones"]]
        self._market = Spells.of(state["market"])
        self._prices = [inf if price is None else price for price in state["prices"]]
        self._seen_h = state["seen_h"]
        self._gap_h = state["gap_h"]
        self._choice_h = state["choice_h"]
        self._history_h = state["history_h"]
        self._saving_h = state["saving_h"]

    def _watch(self, obs: Observation) -> None:
        """Learn what every zone shows."""
        hours = 0.0 if self._seen_h is None else obs.t_h - self._seen_h
        self._seen_h = obs.t_h
        if hours > self._gap_h + _EPSILON:
            self._gap_h = hours
        there = self._there = [None if is_up is None else bool(is_up) for is_up in obs.zone_available]
        if obs.state == "spot" and there[obs.zone] is None:
            there[obs.zone] = True  # the node that is held proves it
        for index, zone in enumerate(self._zones):
            zone.see(there[index], hours)
            if isfinite(obs.zone_price[index]):
                self._prices[index] = float(obs.zone_price[index])
        is_dark = not any(there) and None in there
        self._market.see(None if is_dark else any(there), hours)
        self._has_choice = there.count(True) > 1
        self._choice_h += hours * self._has_choice
        self._history_h += hours
        if obs.state != "none" or obs.preempted:
            self._saving_h = 0.0  # a launch has paid it

    def _best(self, obs: Observation) -> Answer:
        """The cheapest of what the net allows; on-demand when it allows nothing."""
        ways = self._ways(obs)
        if not ways.can_finish:
            is_faster = obs.state == "spot" and obs.delay_left_h < self._job.restart_delay_h
            return "spot" if is_faster else "on_demand"
        likely = self._regimes()
        up = [index for index, is_up in enumerate(self._there) if is_up]
        spots = self._spots(ways, likely, {index: self._zones[index].phase for index in up})
        if spots:
            cost, zone, belief = min(spots, key=itemgetter(0))
        else:
            cost, zone, belief = inf, -1, self._belief(min(self._prices), self._market.phase, likely)
        rent, wait = ways.on_demand(belief), ways.wait(belief)
        if cost < inf and cost <= min(rent, wait) + _EPSILON:
            return ("spot", zone)
        if rent <= wait + _EPSILON:
            return "on_demand"
        return self._trial(obs, ways, likely, wait) or "none"

    def _spots(
        self, ways: _Ways, likely: Floats, phases: Mapping[int, int]
    ) -> list[tuple[float, int, _Belief]]:
        """Cost, zone and what is believed of it, of spot in each of these zones."""
        beliefs = {index: self._belief(self._prices[index], phase, likely) for index, phase in phases.items()}
        return [(ways.spot(index, belief), index, belief) for index, belief in beliefs.items()]

    def _trial(self, obs: Observation, ways: _Ways, likely: Floats, wait: float) -> Answer | None:
        """The best zone that nobody knows, as if its spell began: asking in vain costs what waiting costs."""
        if obs.state != "none":
            return None
        unknown = [index for index, is_up in enumerate(self._there) if is_up is None]
        spots = self._spots(ways, likely, dict.fromkeys(unknown, 0))
        cost, zone, _ = min(spots, key=itemgetter(0), default=(inf, -1, None))
        return ("spot", zone) if cost <= wait else None

    def _ways(self, obs: Observation) -> _Ways:
        # A last step that the deadline cuts short may not be there to work in.
        job = self._job
        cut_h = job.deadline_h - floor(job.deadline_h / job.step_h + _EPSILON) * job.step_h
        return _Ways(
            terms=self._terms,
            table=self._outlook,
            cover=self._cover,
            obs=obs,
            left_h=obs.time_left_h - cut_h,
            gap_h=self._gap_h,
            launch_h=job.restart_delay_h + self._owed_h(obs),
        )

    def _owed_h(self, obs: Observation) -> float:
        """What the next launch takes beyond the restart delay."""
        if obs.state == "none":
            return self._saving_h
        return self._terms.save_h if obs.unsaved_h > 0 else 0.0

    def _regimes(self) -> Floats:
        """How likely each regime is.

        The factors are those of all zones together: one zone's own, learned from few spells, would only
        make the job jump from zone to zone.
        """
        up_factors = np.mean([zone.factors(UP) for zone in self._zones], axis=0)
        choice = (_PRESENT_H * self._has_choice + self._choice_h) / (_PRESENT_H + self._history_h)
        return weights(up_factors, self._market.factors(DOWN), choice, has_zones=self._terms.has_zones)

    def _belief(self, usd_per_hour: float, phase: int, likely: Floats) -> _Belief:
        return _Belief(
            price=usd_per_hour / self._job.on_demand_price,
            phase=phase,
            regimes=likely,
            ends=1 - np.exp(-self._hazards[phase] * self._gap_h),
        )


def _terms(job: Job) -> Terms:
    """Checkpoints cost time on spot, and a preemption half an interval of work unless it is announced."""
    is_periodic = job.checkpoint == "periodic"
    return Terms(
        deadline_h=job.deadline_h,
        step_h=job.step_h,
        delay_h=job.restart_delay_h,
        interval_h=job.ckpt_interval_h if is_periodic else 0.0,
        save_h=job.ckpt_cost_h if is_periodic else 0.0,
        is_warned=not is_periodic or job.grace_h >= job.ckpt_cost_h,
        has_zones=len(job.zones) > 1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Belief:
    """One zone at this moment."""

    price: float  # of spot, over on-demand
    phase: int
    regimes: Floats  # how likely each is
    ends: Floats  # chance by regime that the spell has ended at the next look

    def priced(self, costs: Table) -> Table:
        """[..., price, regime] -> [..., regime]."""
        at = min(max(bisect_right(PRICES, self.price) - 1, 0), len(PRICES) - 2)
        share = min(1.0, max(0.0, (self.price - PRICES[at]) / (PRICES[at + 1] - PRICES[at])))
        return np.asarray((1 - share) * costs[..., at, :] + share * costs[..., at + 1, :])

    def expected(self, lasts: Table, ends: Table, cover: Floats | float = 0.0) -> float:
        """Over what the next look shows and over the regimes; under cover the end shows nothing."""
        chance = self.ends * (1 - cover)
        return float(self.regimes @ ((1 - chance) * self.priced(lasts) + chance * self.priced(ends)))


@dataclass(kw_only=True)
class _Ways:
    """What each thing to do now costs to the end, in hours on demand; inf where the net forbids it."""

    terms: Terms
    table: Outlook
    cover: Floats
    obs: Observation
    left_h: float
    gap_h: float  # to the next look
    launch_h: float

    def __post_init__(self) -> None:
        obs = self.obs
        self._after_h = self.left_h - self.gap_h
        self._work_h = obs.work_left_h
        self._rent_h = self._work_h + (obs.delay_left_h if obs.state == "on_demand" else self.launch_h)
        self.can_finish = self._rent_h <= self.left_h + _EPSILON
        self._rented = self.table.cost(ON_DEMAND, self._after_h, self.left_h - self._rent_h)
        self._idle = self.table.cost(NONE, self._after_h, self._after_h - self._work_h - self.launch_h)
        self._runs: dict[float, tuple[Table, Table] | None] = {}

    def on_demand(self, belief: _Belief) -> float:
        """Rent now, or go on renting."""
        if self._rent_h <= self.gap_h:
            return self._rent_h
        return self.gap_h + self._off_spot(self._rented, belief)

    def wait(self, belief: _Belief) -> float:
        """Hold nothing until the next look."""
        return self._off_spot(self._idle, belief)

    def _off_spot(self, costs: Table | None, belief: _Belief) -> float:
        if costs is None:
            return inf
        if belief.phase >= FIRST_DOWN:
            return belief.expected(costs[belief.phase], costs[0])
        return belief.expected(costs[belief.phase], costs[FIRST_DOWN], self.cover)

    def spot(self, zone: int, belief: _Belief) -> float:
        """Run on spot in this zone until the next look."""
        obs = self.obs
        is_here = obs.state == "spot" and obs.zone == zone
        delay_h = obs.delay_left_h if is_here else self.launch_h
        unsaved_h = obs.unsaved_h if is_here else 0.0
        run_h = self._work_h + delay_h + self._writes_h(unsaved_h)
        if run_h <= self.gap_h:
            return belief.price * run_h if self._may_end_on_spot(run_h) else inf
        if delay_h not in self._runs:
            self._runs[delay_h] = self._after_spot(delay_h, unsaved_h)
        after = self._runs[delay_h]
        if after is None:
            return inf
        lives, dies = after
        return belief.price * self.gap_h + belief.expected(lives[belief.phase], dies)

    def _writes_h(self, unsaved_h: float) -> float:
        """Checkpoints that are still to be written before the end."""
        terms = self.terms
        return (
            terms.save_h * ceil((self._work_h + unsaved_h) / terms.interval_h)
            if terms.interval_h > 0
            else 0.0
        )

    def _may_end_on_spot(self, run_h: float) -> bool:
        """Whether the job ends in time before the next look, or could be made good when that comes sooner."""
        room_h = self.left_h - run_h
        if self.gap_h > self.terms.step_h + _EPSILON:
            room_h -= self._work_h + self.launch_h
        return room_h >= -_EPSILON

    def _after_spot(self, delay_h: float, unsaved_h: float) -> tuple[Table, Table] | None:
        """Costs when the node lives and when it is lost; None where its loss could make the job late."""
        terms = self.terms
        worked_h = max(0.0, self.gap_h - delay_h)
        # Slack of who is preempted at the next look, had nothing been written or lost.
        slack_h = self._after_h - (self._work_h - worked_h) - terms.delay_h
        worst_h = 0.0
        if terms.interval_h > 0:
            worst_h = worked_h + terms.save_h + (0.0 if terms.is_warned else unsaved_h)
        if slack_h < worst_h - _EPSILON:
            return None
        written_h = terms.written * worked_h
        lost_h = 0.0 if terms.is_warned else min(unsaved_h + worked_h, terms.interval_h)
        dies = self.table.cost(NONE, self._after_h, max(0.0, slack_h - written_h - lost_h))
        slack_h = self.left_h - self._work_h - delay_h - terms.delay_h - written_h
        lives = self.table.cost(SPOT, self._after_h, slack_h)
        assert dies is not None  # noqa: S101  # its slack is not below zero
        return (dies if lives is None else lives), lost(dies, self.cover)
