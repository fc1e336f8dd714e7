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
from gpubroker.run.records import Attempt, EndKind

# Boot, image pull: an eight-GPU machine of Lambda takes a quarter of an hour.
STARTS_WITHIN = timedelta(minutes=25)
ANSWERS_WITHIN = timedelta(minutes=10)
APPEARS_WITHIN = timedelta(minutes=5)
# A job that was asked to save and to end is given so long: its node costs money meanwhile.
STOPS_WITHIN = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One look at an attempt's node."""

    is_listed: bool  # whether the vendor answered at all
    node: NodeView | None  # None = not in its list
    is_reached: bool  # whether the node's shell answered
    state: Mapping[str, Any] | None  # the agent's; None = not started, or not reached
    unreached_s: float  # of tries in vain, one after the other, by this process


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What the job is to be brought to, with a last checkpoint; resting: to have no node for a while."""

    state: Literal["cancelled", "over_budget", "failed", "resting"]
    why: str
    since: datetime


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
    kind: EndKind = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToStop:
    """Ask the job to save and to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The job is over; the node is to be ended once its artifacts are here."""

    state: Literal["done", "failed", "cancelled", "over_budget"]
    reason: str


Action: TypeAlias = Wait | Prepare | Revive | Replace | AskToStop | Finish


def decide(attempt: Attempt, seen: Observed, now: datetime, goal: Goal | None = None) -> Action:
    """For an open attempt whose node has an id. `goal` None = the job goes on to its own end."""
    result = (seen.state or {}).get("result")
    if isinstance(result, Mapping):
        return _of_result(result, goal)
    if goal is not None:
        return _towards(goal, seen, now)
    if not seen.is_listed:
        return Wait(why="the vendor does not answer")
    node = seen.node
    if node is None:
        is_new = attempt.running_at is None and now - attempt.intended_at < APPEARS_WITHIN
        return Wait(why="not yet in the vendor's list") if is_new else Replace(reason="gone", kind="lost")
    if node.is_preempted or node.status in ("stopped", "gone"):
        is_taken = node.is_preempted or node.status == "stopped"
        reason = f"{'preempted' if is_taken else 'gone'}{_words(node)}"
        return Replace(reason=reason, kind="preempted" if node.is_preempted else "lost")
    return _of_living(attempt, node, seen, now)


def _of_living(attempt: Attempt, node: NodeView, seen: Observed, now: datetime) -> Action:
    """Starting or running."""
    if node.status == "starting":
        is_late = now - attempt.intended_at > STARTS_WITHIN
        late = Replace(reason=f"did not start in time{_words(node)}", fault="no-start", kind="rejected")
        return late if is_late else Wait(why="starting")
    if seen.is_reached:
        return _of_agent(seen.state)
    if seen.unreached_s > ANSWERS_WITHIN.total_seconds():
        reason = "cannot be reached, though its vendor says that it runs"
        return Replace(reason=reason, fault="not-reached", kind="rejected")
    return Wait(why="not reached")


def _towards(goal: Goal, seen: Observed, now: datetime) -> Action:
    """What was begun is given time to save, unless nobody can ask it to."""
    finish = _at(goal)
    node, state = seen.node, seen.state or {}
    if not seen.is_listed:
        return Wait(why="the vendor does not answer")
    if node is None or node.is_preempted or node.status != "running" or now - goal.since > STOPS_WITHIN:
        return finish
    if not seen.is_reached:
        return Wait(why="not reached, and to be asked to save")
    is_at_work = state.get("pid") is not None and state.get("agent") is not False
    return AskToStop() if is_at_work else finish


def _of_agent(state: Mapping[str, Any] | None) -> Action:
    """By what the node says of it. A start that was cut off leaves a configuration and no agent."""
    if state is None:
        return Prepare()
    if state.get("agent") is False:
        return Prepare() if state.get("state") == "unknown" else Revive()
    return Wait(why="running")


def _at(goal: Goal) -> Finish | Replace:
    if goal.state == "resting":
        return Replace(reason=goal.why)
    return Finish(state=goal.state, reason=goal.why)


def _of_result(result: Mapping[str, Any], goal: Goal | None) -> Action:
    outcome, reason = str(result.get("outcome")), str(result.get("reason", ""))
    if outcome == "done":
        return Finish(state="done", reason=reason)
    if outcome == "failed":
        return Finish(state="failed", reason=reason)
    if goal is not None:
        return _at(goal)
    kind: EndKind = "crashed" if outcome == "retry" else "ended"
    return Replace(reason=f"{outcome.replace('_', ' ')}: {reason}", kind=kind)


def _words(node: NodeView | None) -> str:
    return f": {node.reason}" if node is not None and node.reason else ""
