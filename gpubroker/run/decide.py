"""What to do about a job, from what is seen of it now. Pure, and the same answer every time it is asked.

observe -> decide -> apply: nothing is remembered here, so a supervisor may crash anywhere and ask again. A
node that cannot be reached is given time, and its vendor is asked first: a lost connection kills nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias

from gpubroker.provider import NodeView
from gpubroker.run.records import Attempt

# Boot, image pull: an eight-GPU machine of Lambda takes a quarter of an hour.
STARTS_WITHIN = timedelta(minutes=25)
ANSWERS_WITHIN = timedelta(minutes=10)
APPEARS_WITHIN = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One look at an attempt's node."""

    is_listed: bool  # whether the vendor answered at all
    node: NodeView | None  # None = not in its list
    is_reached: bool  # whether the node's shell answered
    state: Mapping[str, Any] | None  # the agent's; None = not started, or not reached
    last_reached_at: datetime | None  # None = never by this process


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to do."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """The node is there and idle: prove it, send the job, start it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revive:
    """The job was started there, and its agent is gone: start the agent again, which goes on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """End this node and go on with another; `fault` = what its machine is to be avoided for, if anything."""

    reason: str
    fault: str = ""
    is_preempted: bool = False  # the vendor took it back


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The job is over; the node is to be ended once its artifacts are here."""

    state: Literal["done", "failed"]
    reason: str


Action: TypeAlias = Wait | Prepare | Revive | Replace | Finish


def decide(attempt: Attempt, seen: Observed, now: datetime) -> Action:
    """For an open attempt whose node has an id."""
    result = (seen.state or {}).get("result")
    if isinstance(result, Mapping):
        return _of_result(result)
    if not seen.is_listed:
        return Wait(why="the vendor does not answer")
    node = seen.node
    if node is None:
        is_new = attempt.running_at is None and now - attempt.intended_at < APPEARS_WITHIN
        return Wait(why="not yet in the vendor's list") if is_new else Replace(reason="gone")
    if node.is_preempted or node.status in ("stopped", "gone"):
        is_taken = node.is_preempted or node.status == "stopped"
        reason = f"{'preempted' if is_taken else 'gone'}{_words(node)}"
        return Replace(reason=reason, is_preempted=node.is_preempted)
    return _of_living(attempt, node, seen, now)


def _of_living(attempt: Attempt, node: NodeView, seen: Observed, now: datetime) -> Action:
    """Starting or running."""
    if node.status == "starting":
        is_late = now - attempt.intended_at > STARTS_WITHIN
        late = Replace(reason=f"did not start in time{_words(node)}", fault="no-start")
        return late if is_late else Wait(why="starting")
    if seen.is_reached:
        return _of_agent(seen.state)
    since = seen.last_reached_at or attempt.running_at or attempt.intended_at
    if now - since > ANSWERS_WITHIN:
        return Replace(reason="cannot be reached, though its vendor says that it runs", fault="not-reached")
    return Wait(why="not reached")


def _of_agent(state: Mapping[str, Any] | None) -> Action:
    """By what the node says of it. A start that was cut off leaves a configuration and no agent."""
    if state is None:
        return Prepare()
    if state.get("agent") is False:
        return Prepare() if state.get("state") == "unknown" else Revive()
    return Wait(why="running")


def _of_result(result: Mapping[str, Any]) -> Action:
    outcome, reason = str(result.get("outcome")), str(result.get("reason", ""))
    if outcome == "done":
        return Finish(state="done", reason=reason)
    if outcome == "failed":
        return Finish(state="failed", reason=reason)
    return Replace(reason=f"{outcome.replace('_', ' ')}: {reason}")


def _words(node: NodeView | None) -> str:
    return f": {node.reason}" if node is not None and node.reason else ""
