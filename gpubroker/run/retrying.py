"""Whether a job whose nodes came to nothing gets another one now, later, or never. Pure.

A node that its vendor took back is nobody's fault, and a job that saved something on the way has come
further: neither counts. What counts are machines that were no good and programs that asked for another node,
one after the other: the first few are replaced at once, then the pauses double, then a person must look.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias

from gpubroker.run.records import Attempt

# So many in a row at once, and so many altogether.
_AT_ONCE = {"rejected": 4, "crashed": 1}
_MOST = {"rejected": 20, "crashed": 6}
_PAUSE, _LONGEST = timedelta(seconds=30), timedelta(minutes=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """Rent the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotYet:
    """Wait until then."""

    until: datetime
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The job has failed."""

    why: str


Patience: TypeAlias = Now | NotYet | GiveUp


def after_failures(attempts: Sequence[Attempt], saved_in: Collection[int], now: datetime) -> Patience:
    """`attempts`: all of the job's, the first first; `saved_in`: epochs that published a checkpoint."""
    failed = _in_a_row(attempts, saved_in)
    if not failed:
        return Now()
    last, kind = failed[-1], failed[-1].end_kind
    count = sum(attempt.end_kind == kind for attempt in failed)
    words = f"{count} nodes in a row {'were no good' if kind == 'rejected' else 'ended by themselves'}"
    if count >= _MOST[kind]:
        return GiveUp(why=f"{words}, the last one: {last.end_reason}")
    over = count - _AT_ONCE[kind]
    if over <= 0 or last.ended_at is None:
        return Now()
    until = last.ended_at + min(_PAUSE * 2 ** min(over - 1, 10), _LONGEST)
    # A clock that was set back must not make a pause of days.
    if now >= until or until - now > _LONGEST:
        return Now()
    return NotYet(until=until, why=f"{words}: the next is rented at {until:%H:%M:%S}")


def _in_a_row(attempts: Sequence[Attempt], saved_in: Collection[int]) -> list[Attempt]:
    """The last failures, the first first."""
    failed = []
    for attempt in reversed(attempts):
        if attempt.epoch in saved_in:
            break
        if attempt.end_kind in _MOST:
            failed.append(attempt)
    return failed[::-1]
