"""Whether a job wastes its node: GPUs that have done nothing for as long as the job allows. Pure.

the agent's gpu_idle_s -> judge -> Told: a person hears of it; End: the job is to save and to end, failed

A node may say anything: what makes no sense says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from gpubroker.jobspec import JobSpec

_LONGEST_S = 10 * 365 * 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """To be told, once for each time that the GPUs do nothing."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The job is to be asked to save and to end; it failed."""

    reason: str


def judge(
    state: Mapping[str, Any] | None, spec: JobSpec, now: datetime, told: datetime | None
) -> Told | End | None:
    """By the agent's state, read now. `told`: when a person last heard of this node's idleness; None = never.

    A restore that takes long is told of too, and ends no job: its command has not begun.
    """
    idle_s = _idle_s(state)
    if state is None or idle_s is None or idle_s < spec.waste.after:
        return None
    if state.get("state") == "running" and spec.waste.then == "end":
        return End(reason=f"{_text(idle_s)}, and waste.then is end")
    if told is not None and told > now - timedelta(seconds=idle_s):
        return None
    is_restoring = state.get("state") == "restoring"
    return Told(text=_text(idle_s) + (": the checkpoint is still being restored" if is_restoring else ""))


def _idle_s(state: Mapping[str, Any] | None) -> float | None:
    """None where the agent is not there, the job does not run or is not about to, or nobody knows."""
    if state is None or state.get("agent") is False or state.get("state") not in ("restoring", "running"):
        return None
    told = state.get("gpu_idle_s")
    if isinstance(told, bool) or not isinstance(told, int | float):
        return None
    return float(told) if 0 <= told < _LONGEST_S else None


def _text(idle_s: float) -> str:
    minutes = int(idle_s // 60)
    lasting = f"{minutes} minutes" if minutes > 1 else f"{int(idle_s)} seconds"
    return f"no GPU of its node has done anything for {lasting}"
