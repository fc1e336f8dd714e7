"""One run of a policy over a timeline: the model that every figure of the backtest comes from. Pure.

At the start of a step a spot node whose zone has no capacity in it is preempted; then the policy sees the
present; its answer holds for the whole step. Every launch is billed for the restart delay without progress.
Billing is per second. Work left at the deadline is a miss; it is finished on demand and billed.

Periodic checkpoints: on spot, one after every `ckpt_interval_h` of work, `ckpt_cost_h` long. A preemption
loses the work since the last one unless the notice is long enough to write one. A stop by choice saves
first, and the next launch takes that much longer. On demand none are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

from gpubroker.errors import ConfigError
from gpubroker.policy.interface import Answer, Job, Observation, Policy, State, Steady
from gpubroker.policy.rules import steps_down
from gpubroker.policy.traces import Timeline

# Hours: far below a second, far above rounding.
_EPSILON_H = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a job asks of a policy, wherever and whenever it runs."""

    work_h: float
    deadline_h: float
    restart_delay_h: float
    checkpoint: str = "instant"
    ckpt_interval_h: float = 0.0
    ckpt_cost_h: float = 0.0
    grace_h: float = 0.0

    def job(self, line: Timeline) -> Job:
        """This job on this timeline."""
        return Job(
            work_h=self.work_h,
            deadline_h=self.deadline_h,
            restart_delay_h=self.restart_delay_h,
            step_h=line.step_h,
            on_demand_price=line.on_demand_usd_per_hour,
            zones=line.zones,
            checkpoint="periodic" if self.checkpoint == "periodic" else "instant",
            ckpt_interval_h=self.ckpt_interval_h,
            ckpt_cost_h=self.ckpt_cost_h,
            grace_h=self.grace_h,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of one run."""

    usd: float
    is_missed: bool
    preemptions: int
    launches: int
    on_demand_h: float  # billed
    spot_h: float  # billed
    lost_h: float  # work thrown away by preemptions
    end_h: float  # when the work was done, after the deadline for a miss


def steps_of(deadline_h: float, step_h: float) -> int:
    """Steps of a run; the last one may be cut short by the deadline."""
    whole = steps_down(deadline_h, step_h)
    return whole + (deadline_h - whole * step_h > _EPSILON_H)


def replay(policy: Policy, job: Job, line: Timeline, start: int) -> Run:
    """Run a fresh policy from this step of the timeline. Raises ConfigError for an answer nobody knows."""
    steps = steps_of(job.deadline_h, job.step_h)
    if start < 0 or start + steps > len(line):
        raise ConfigError(
            f"{line.name}: a run of {steps} steps from step {start} leaves its {len(line)} steps"
        )
    world = _World(job, line, start)
    policy.reset(job)
    holds = policy.holds if isinstance(policy, Steady) else None
    obs = world.obs
    whole = steps_down(job.deadline_h, job.step_h)
    step = 0
    while step < steps:
        world.begin(step)
        answer = policy.step(obs)
        stride = 1
        if not world.turn(answer) and holds is not None and step < whole:
            stride = max(1, min(holds(obs), line.unchanged[start + step], whole - step))
        if world.spend(stride):
            return world.result()
        step += stride
    return world.overrun()


class _World:
    """The node, the work and the bill of one run."""

    def __init__(self, job: Job, line: Timeline, start: int) -> None:
        self._job, self._line, self._start = job, line, start
        self._now = start  # step of the timeline
        self._state: State = "none"
        self._zone = -1
        self._delay_h = 0.0  # left to run on this node
        self._writing_h = 0.0  # left of a checkpoint that is being written
        self._saving_h = 0.0  # added to the next launch
        self._done_h = self._unsaved_h = 0.0
        self._periodic = job.checkpoint == "periodic"
        self._usd = self._on_demand_h = self._spot_h = self._lost_h = self._end_h = 0.0
        self._preemptions = self._launches = 0
        self.obs = Observation(on_demand_price=line.on_demand_usd_per_hour)

    def begin(self, step: int) -> None:
        """Preempt, then show the present."""
        job, obs = self._job, self.obs
        self._now = now = self._start + step
        available, price = self._line.available[now], self._line.price[now]
        obs.preempted = self._state == "spot" and not available[self._zone]
        if obs.preempted:
            self._preempt()
        obs.step = step
        obs.t_h = step * job.step_h
        obs.time_left_h = job.deadline_h - obs.t_h
        obs.work_done_h = self._done_h
        obs.work_left_h = job.work_h - self._done_h
        obs.unsaved_h = self._unsaved_h
        obs.state = self._state
        obs.zone = self._zone
        obs.delay_left_h = self._delay_h
        obs.zone_available = list(available)
        obs.zone_price = list(price)
        obs.spot_available = True in available
        zone = self._plain_zone()
        obs.spot_price = nan if zone < 0 else price[zone]
        obs.cost = self._usd

    def _preempt(self) -> None:
        self._preemptions += 1
        if self._periodic:
            if self._job.grace_h < self._job.ckpt_cost_h:
                self._done_h -= self._unsaved_h
                self._lost_h += self._unsaved_h
            self._unsaved_h = 0.0
        self._leave()

    def _leave(self) -> None:
        self._state, self._zone = "none", -1
        self._delay_h = self._writing_h = 0.0

    def _plain_zone(self) -> int:
        """Where 'spot' without a zone would run; -1 where there is none."""
        if self._state == "spot":
            return self._zone
        available, price = self._line.available[self._now], self._line.price[self._now]
        return min((z for z, there in enumerate(available) if there), key=price.__getitem__, default=-1)

    def turn(self, answer: Answer) -> bool:
        """Bring about what the policy wants. Whether that changes anything."""
        state, zone = self._wanted(answer)
        if state == self._state and zone == self._zone:
            return False
        if self._state != "none" and self._periodic and self._unsaved_h > 0:
            self._saving_h = self._job.ckpt_cost_h
            self._unsaved_h = 0.0
        self._leave()
        if state != "none":
            self._state, self._zone = state, zone
            self._launches += 1
            self._delay_h = self._job.restart_delay_h + self._saving_h
            self._saving_h = 0.0
        return True

    def _wanted(self, answer: Answer) -> tuple[State, int]:
        """Spot where there is none is none."""
        if answer == "spot":
            zone = self._plain_zone()
            return ("spot", zone) if zone >= 0 else ("none", -1)
        if answer in ("none", "on_demand"):
            return answer, -1  # type: ignore[return-value]
        match answer:
            case ("spot", int(zone)) if 0 <= zone < len(self._line.zones):
                return ("spot", zone) if self._line.available[self._now][zone] else ("none", -1)
        raise ConfigError(f"a policy answered {answer!r}: not none, spot, on_demand or (spot, zone)")

    def spend(self, stride: int) -> bool:
        """Live through these steps; whether the work is done in them."""
        begun_h = (self._now - self._start) * self._job.step_h
        hours = min(stride * self._job.step_h, self._job.deadline_h - begun_h)
        if self._state == "none":
            return False
        used_h, is_done = self._work(hours)
        self._bill(used_h)
        self._end_h = begun_h + used_h
        return is_done

    def _work(self, hours: float) -> tuple[float, bool]:
        """Hours used on this node, of these, and whether the work is done: then the rest is not."""
        left_h = hours - min(self._delay_h, hours)
        self._delay_h -= hours - left_h
        if self._delay_h < _EPSILON_H:
            self._delay_h = 0.0
        is_writing = self._periodic and self._state == "spot"
        while left_h > _EPSILON_H:
            if self._writing_h > 0:
                spent_h = min(self._writing_h, left_h)
                left_h -= spent_h
                self._writing_h -= spent_h
                if self._writing_h < _EPSILON_H:
                    self._writing_h = self._unsaved_h = 0.0
                continue
            room_h = self._job.ckpt_interval_h - self._unsaved_h if is_writing else left_h
            todo_h = self._job.work_h - self._done_h
            worked_h = min(left_h, room_h, todo_h)
            left_h -= worked_h
            self._done_h += worked_h
            if self._periodic:
                self._unsaved_h += worked_h
            if self._job.work_h - self._done_h < _EPSILON_H:
                return hours - left_h, True
            if is_writing and self._job.ckpt_interval_h - self._unsaved_h < _EPSILON_H:
                self._writing_h = self._job.ckpt_cost_h
                if self._writing_h <= 0:
                    self._unsaved_h = 0.0
        return hours, False

    def _bill(self, hours: float) -> None:
        if self._state == "on_demand":
            self._on_demand_h += hours
            self._usd += hours * self._line.on_demand_usd_per_hour
            return
        self._spot_h += hours
        whole = steps_down(hours, self._job.step_h)
        paid = self._line.usd_before[self._zone]
        self._usd += paid[self._now + whole] - paid[self._now]
        rest_h = hours - whole * self._job.step_h
        if rest_h > _EPSILON_H:
            self._usd += rest_h * self._line.price[self._now + whole][self._zone]

    def overrun(self) -> Run:
        """Past the deadline: the rest on demand."""
        if self._state != "on_demand":
            self.turn("on_demand")
        hours = self._delay_h + self._job.work_h - self._done_h
        self._done_h = self._job.work_h
        self._bill(hours)
        self._end_h = self._job.deadline_h + hours
        return self.result(is_missed=True)

    def result(self, *, is_missed: bool = False) -> Run:
        """The run's figures."""
        return Run(
            usd=self._usd,
            is_missed=is_missed,
            preemptions=self._preemptions,
            launches=self._launches,
            on_demand_h=self._on_demand_h,
            spot_h=self._spot_h,
            lost_h=self._lost_h,
            end_h=self._end_h,
        )
