"""One run of a policy over a timeline: the model that every figure of the backtest comes from. Pure.

At the start of a step a spot node whose zone has no capacity in it is preempted; then the policy sees the
present; its answer holds for the whole step. Every launch is billed for the restart delay without progress.
Billing is per second. Work left at the deadline is a miss; it is finished on demand and billed.

Periodic checkpoints: on spot, one after every `ckpt_interval_h` of work, `ckpt_cost_h` long. A preemption
loses the work since the last one unless the notice is long enough to write one. A stop by choice saves
first, and the next launch takes that much longer. On demand none are written.

Inside, time is in seconds: sums of whole ones are exact, so that ties fall the same way in every replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, nan

from gpubroker.errors import ConfigError
from gpubroker.policy.interface import Answer, Checkpoint, Job, Observation, Policy, State, Steady
from gpubroker.policy.traces import Timeline

_HOUR_S = 3600
# Far below what anyone bills, far above rounding.
_EPSILON_S = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a job asks of a policy, wherever and whenever it runs."""

    work_h: float
    deadline_h: float
    restart_delay_h: float
    checkpoint: Checkpoint = "instant"
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
            checkpoint=self.checkpoint,
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


def steps_of(deadline_h: float, step_s: int) -> int:
    """Steps of a run; the last one may be cut short by the deadline."""
    return ceil((deadline_h * _HOUR_S - _EPSILON_S) / step_s)


def replay(policy: Policy, job: Job, line: Timeline, start: int) -> Run:
    """Run a fresh policy from this step of the timeline. Raises ConfigError for an answer nobody knows."""
    steps = steps_of(job.deadline_h, line.step_s)
    if start < 0 or start + steps > len(line):
        raise ConfigError(f"{line.name}: {steps} steps from step {start} on leave its {len(line)} steps")
    world = _World(job, line, start)
    policy.reset(job)
    unchanged = policy.steps_unchanged if isinstance(policy, Steady) else None
    step = 0
    while step < steps:
        world.begin(step)
        is_changed = world.turn(policy.step(world.obs))
        stride = 1
        if unchanged is not None and not is_changed:
            stride = max(1, min(unchanged(world.obs), line.unchanged[start + step], steps - step))
        if world.live(stride):
            return world.result()
        step += stride
    return world.overrun()


class _World:
    """The node, the work and the bill of one run."""

    def __init__(self, job: Job, line: Timeline, start: int) -> None:
        self._line, self._start = line, start
        self._work_s = job.work_h * _HOUR_S
        self._deadline_s = job.deadline_h * _HOUR_S
        self._restart_s = job.restart_delay_h * _HOUR_S
        self._is_periodic = job.checkpoint == "periodic"
        self._interval_s = job.ckpt_interval_h * _HOUR_S
        self._write_s = job.ckpt_cost_h * _HOUR_S
        self._is_warned = job.grace_h >= job.ckpt_cost_h
        self._step = 0
        self._state: State = "none"
        self._zone = -1
        self._delay_s = 0.0  # left to run on this node
        self._writing_s = 0.0  # left of the checkpoint that is being written
        self._saving_s = 0.0  # added to the next launch
        self._done_s = self._unsaved_s = 0.0
        self._usd = self._on_demand_s = self._spot_s = self._lost_s = self._end_s = 0.0
        self._preemptions = self._launches = 0
        self.obs = Observation(on_demand_price=line.on_demand_usd_per_hour)

    def begin(self, step: int) -> None:
        """Preempt, then show the present."""
        self._step = step
        now = self._start + step
        available, price = self._line.available[now], self._line.price[now]
        obs = self.obs
        obs.preempted = self._state == "spot" and not available[self._zone]
        if obs.preempted:
            self._preempt()
        begun_s = step * self._line.step_s
        obs.step = step
        obs.t_h = begun_s / _HOUR_S
        obs.time_left_h = (self._deadline_s - begun_s) / _HOUR_S
        obs.work_done_h = self._done_s / _HOUR_S
        obs.work_left_h = (self._work_s - self._done_s) / _HOUR_S
        obs.unsaved_h = self._unsaved_s / _HOUR_S
        obs.state = self._state
        obs.zone = self._zone
        obs.delay_left_h = self._delay_s / _HOUR_S
        obs.zone_available = list(available)
        obs.zone_price = list(price)
        zone = self._plain_zone()
        obs.spot_available = zone >= 0
        obs.spot_price = price[zone] if zone >= 0 else nan
        obs.cost = self._usd

    def _preempt(self) -> None:
        self._preemptions += 1
        if not self._is_warned:
            self._done_s -= self._unsaved_s
            self._lost_s += self._unsaved_s
        self._unsaved_s = 0.0
        self._leave()

    def _leave(self) -> None:
        self._state, self._zone = "none", -1
        self._delay_s = self._writing_s = 0.0

    def _plain_zone(self) -> int:
        """Where 'spot' without a zone runs; -1 where there is none."""
        if self._state == "spot":
            return self._zone
        now = self._start + self._step
        price = self._line.price[now]
        there = [zone for zone, is_there in enumerate(self._line.available[now]) if is_there]
        return min(there, key=price.__getitem__, default=-1)

    def turn(self, answer: Answer) -> bool:
        """Bring about what the policy wants; whether that changes anything."""
        state, zone = self._wanted(answer)
        if state == self._state and zone == self._zone:
            return False
        if self._state != "none" and self._unsaved_s > 0:
            self._saving_s = self._write_s
            self._unsaved_s = 0.0
        self._leave()
        if state != "none":
            self._state, self._zone = state, zone
            self._launches += 1
            self._delay_s = self._restart_s + self._saving_s
            self._saving_s = 0.0
        return True

    def _wanted(self, answer: Answer) -> tuple[State, int]:
        """State and zone. Spot where there is none is none."""
        match answer:
            case "none" | "on_demand":
                return answer, -1
            case "spot":
                zone = self._plain_zone()
                return ("spot", zone) if zone >= 0 else ("none", -1)
            case ("spot", int(zone)) if 0 <= zone < len(self._line.zones):
                is_there = self._line.available[self._start + self._step][zone]
                return ("spot", zone) if is_there else ("none", -1)
        raise ConfigError(f"a policy answered {answer!r}: not none, spot, on_demand or (spot, zone)")

    def live(self, stride: int) -> bool:
        """Live through these steps; whether the work is done in them."""
        if self._state == "none":
            return False
        begun_s = self._step * self._line.step_s
        seconds = min(stride * self._line.step_s, self._deadline_s - begun_s)
        left_s = self._progress(seconds)
        self._bill(seconds - left_s)
        self._end_s = begun_s + seconds - left_s
        return self._is_done()

    def _is_done(self) -> bool:
        return self._work_s - self._done_s < _EPSILON_S

    def _progress(self, seconds: float) -> float:
        """Delay, work and checkpoints in their order; the seconds that are left when the work is done."""
        waited_s = min(self._delay_s, seconds)
        self._delay_s -= waited_s
        left_s = seconds - waited_s
        writes = self._is_periodic and self._state == "spot"
        while left_s > _EPSILON_S and not self._is_done():
            if self._writing_s > 0:
                left_s -= self._write(left_s)
            else:
                room_s = self._interval_s - self._unsaved_s if writes else left_s
                left_s -= self._do(min(left_s, room_s, self._work_s - self._done_s))
        return left_s if self._is_done() else 0.0

    def _do(self, seconds: float) -> float:
        self._done_s += seconds
        if self._is_periodic:
            self._unsaved_s += seconds
            if self._state == "spot" and self._interval_s - self._unsaved_s < _EPSILON_S:
                self._writing_s = self._write_s
                if self._write_s < _EPSILON_S:
                    self._writing_s = self._unsaved_s = 0.0
        return seconds

    def _write(self, seconds: float) -> float:
        """The checkpoint is good when its last second is written."""
        spent_s = min(self._writing_s, seconds)
        self._writing_s -= spent_s
        if self._writing_s < _EPSILON_S:
            self._writing_s = self._unsaved_s = 0.0
        return spent_s

    def _bill(self, seconds: float) -> None:
        if self._state == "on_demand":
            self._on_demand_s += seconds
            self._usd += seconds / _HOUR_S * self._line.on_demand_usd_per_hour
            return
        self._spot_s += seconds
        now = self._start + self._step
        last = now + int(seconds / self._line.step_s)
        paid = self._line.usd_before[self._zone]
        self._usd += paid[last] - paid[now]
        rest_s = seconds - (last - now) * self._line.step_s
        if rest_s > 0:
            self._usd += rest_s / _HOUR_S * self._line.price[last][self._zone]

    def overrun(self) -> Run:
        """Past the deadline: the rest on demand."""
        self.turn("on_demand")
        seconds = self._delay_s + self._work_s - self._done_s
        self._bill(seconds)
        self._end_s = self._deadline_s + seconds
        return self.result(is_missed=True)

    def result(self, *, is_missed: bool = False) -> Run:
        """The run's figures."""
        return Run(
            usd=self._usd,
            is_missed=is_missed,
            preemptions=self._preemptions,
            launches=self._launches,
            on_demand_h=self._on_demand_s / _HOUR_S,
            spot_h=self._spot_s / _HOUR_S,
            lost_h=self._lost_s / _HOUR_S,
            end_h=self._end_s / _HOUR_S,
        )
