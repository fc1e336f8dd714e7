"""The rules that policies are measured against, and what they share: the net that never misses a deadline.

Sources: Wu et al., "Can't Be Late" (NSDI'24) for the net and Uniform Progress.
"""

from __future__ import annotations

from math import ceil, floor

from gpubroker.policy.interface import Answer, Job, Observation

# Steps or hours: sums are off by rounding, never by this much.
_EPSILON = 1e-9
_FOR_GOOD = 1 << 40  # steps


def steps_up(hours: float, step_h: float) -> int:
    """Whole steps that hold these hours."""
    return ceil(hours / step_h - _EPSILON)


def steps_down(hours: float, step_h: float) -> int:
    """Whole steps within these hours."""
    return floor(hours / step_h + _EPSILON)


def at_risk_h(job: Job) -> float:
    """What one preemption may cost beyond a launch: the work since a checkpoint, that one, and a step."""
    return job.ckpt_interval_h + job.ckpt_cost_h + job.step_h if job.checkpoint == "periodic" else 0.0


def net(job: Job, obs: Observation) -> Answer | None:
    """What the deadline demands now; None where it leaves the choice.

    Whoever waits must still be able to launch twice: a node on spot can die in its last step. Where nothing
    but the launch is at risk, a spot node that works may stay: hour for hour it loses no time.
    """
    left = steps_down(obs.time_left_h, job.step_h)
    risk = at_risk_h(job)
    needed, delay = obs.work_left_h + risk, job.restart_delay_h
    if obs.state != "spot" and steps_up(needed + 2 * delay, job.step_h) >= left:
        return "on_demand"
    if steps_up(needed + delay, job.step_h) >= left:
        may_stay = obs.state == "spot" and obs.delay_left_h <= _EPSILON and not risk
        return "spot" if may_stay else "on_demand"
    return None


class _Rule:
    """A rule that needs the job alone."""

    def reset(self, job: Job) -> None:
        """See Policy."""
        self._job = job


class OnDemand(_Rule):
    """Never spot."""

    def steps_unchanged(self, obs: Observation) -> int:
        """See Steady."""
        return _FOR_GOOD

    def step(self, obs: Observation) -> Answer:
        """See Policy."""
        return "on_demand"


class _Netted(_Rule):
    """A rule above the net. While it waits there is no spot; on demand there is none, or the net holds."""

    def steps_unchanged(self, obs: Observation) -> int:
        """See Steady. What the net says on demand, and on a spot node that has started, it says for good."""
        job, risk = self._job, at_risk_h(self._job)
        left = steps_down(obs.time_left_h, job.step_h)
        if obs.state == "none":
            return left - steps_up(obs.work_left_h + risk + 2 * job.restart_delay_h, job.step_h)
        if obs.state == "spot" and risk:
            return 1
        if obs.state == "spot" and obs.delay_left_h > _EPSILON:
            slack = left - steps_up(obs.work_left_h + job.restart_delay_h, job.step_h)
            return slack if slack < steps_up(obs.delay_left_h, job.step_h) else _FOR_GOOD
        return _FOR_GOOD


class Greedy(_Netted):
    """Spot when there is any, wait otherwise."""

    def step(self, obs: Observation) -> Answer:
        """See Policy."""
        return net(self._job, obs) or ("spot" if obs.spot_available else "none")


class OdFallback(_Netted):
    """Spot when there is any, on demand otherwise."""

    def step(self, obs: Observation) -> Answer:
        """See Policy."""
        return net(self._job, obs) or ("spot" if obs.spot_available else "on_demand")


class UniformProgress(_Netted):
    """Never behind the straight line from no work to all of it (Wu et al., NSDI'24).

    The published runs decide exact ties of the first comparison by rounding; so does this one.
    """

    def step(self, obs: Observation) -> Answer:
        """See Policy."""
        return net(self._job, obs) or self._choose(obs)

    def _choose(self, obs: Observation) -> Answer:
        rate = self._job.work_h / self._job.deadline_h
        if obs.state == "on_demand":
            is_ahead = (obs.t_h + 2 * self._job.restart_delay_h) * rate < obs.work_done_h
            return "spot" if obs.spot_available and is_ahead else "on_demand"
        if obs.spot_available:
            return "spot"
        return "on_demand" if obs.work_done_h < obs.t_h * rate - _EPSILON else "none"

    def steps_unchanged(self, obs: Observation) -> int:
        """See Steady."""
        if obs.state == "on_demand" and obs.spot_available:
            return 1
        held = super().steps_unchanged(obs)
        if obs.state != "none":
            return held
        ahead_h = obs.work_done_h * self._job.deadline_h / self._job.work_h - obs.t_h
        return min(held, int(ahead_h / self._job.step_h))
