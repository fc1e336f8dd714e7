"""What a policy sees and may answer: the one interface of the replay, the backtest and the supervisor.

A policy class is made without arguments, a fresh object for every run: `reset(job)` once, then `step(obs)`
at every step. It never sees the future.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

State: TypeAlias = Literal["none", "spot", "on_demand"]
# Saved at the preemption itself, or every so often: see gpubroker.policy.replay.
Checkpoint: TypeAlias = Literal["instant", "periodic"]
# 'spot' means: stay in the zone where the node is, else the cheapest available one.
Answer: TypeAlias = Literal["none", "spot", "on_demand"] | tuple[Literal["spot"], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job on one node. Nothing here changes while it runs."""

    work_h: float
    deadline_h: float  # from the start
    restart_delay_h: float  # billed without progress at every launch
    step_h: float  # the time between two observations; a live run may keep to it only roughly
    on_demand_price: float  # $/h, the lowest of the zones
    zones: tuple[str, ...]
    checkpoint: Checkpoint = "instant"
    ckpt_interval_h: float = 0.0  # of work on spot between two checkpoints
    ckpt_cost_h: float = 0.0  # without progress
    grace_h: float = 0.0  # notice before a preemption


@dataclass(slots=True, kw_only=True)
class Observation:
    """The present, after this step's preemptions. One object is reused between steps: copy what you keep."""

    step: int = 0
    t_h: float = 0.0
    time_left_h: float = 0.0
    work_done_h: float = 0.0  # unsaved work counts as done
    work_left_h: float = 0.0
    unsaved_h: float = 0.0  # what a preemption would throw away now
    state: State = "none"
    zone: int = -1  # of the spot node, -1 without one
    preempted: bool = False  # in this very step
    delay_left_h: float = 0.0  # of the node that runs
    spot_available: bool = False  # in any zone
    spot_price: float = float("nan")  # $/h where plain 'spot' would run, nan where it would not
    on_demand_price: float = 0.0
    zone_available: list[bool] = field(default_factory=list)
    zone_price: list[float] = field(default_factory=list)  # $/h
    cost: float = 0.0  # $ so far


class Policy(Protocol):
    """What decides, step by step."""

    def reset(self, job: Job) -> None:
        """Forget everything and take this job."""

    def step(self, obs: Observation) -> Answer:
        """What to hold until the next step."""


@runtime_checkable
class Resumable(Protocol):
    """A policy that can be stored with its job and go on in another process."""

    def state(self) -> dict[str, Any]:
        """Everything learned since reset, as JSON can hold it."""

    def restore(self, state: dict[str, Any]) -> None:
        """After reset(job) with the same job: go on from there."""


@runtime_checkable
class Steady(Protocol):
    """A policy that knows for how long it has nothing new to say: lets a replay skip equal steps."""

    def steps_unchanged(self, obs: Observation) -> int:
        """Asked after an answer that changes nothing: for how many steps, this one included, it stays.

        Until then at the most, or until the availability of any zone changes. 1 is always right.
        """
