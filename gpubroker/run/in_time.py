"""Whether a job with a deadline may still go onto a node that can be taken away. Pure.

The safety net of the spot policies (gpubroker/policy): even if the next node is lost before it has saved
anything, what is left to do must fit on one that nobody takes. It is asked at every rent, so a job is on spot
for as long as there is slack, and firm from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal

from gpubroker.plan.course import Course
from gpubroker.run.records import Attempt

_SECONDS = Decimal(3600)


def saved_h(attempts: Iterable[Attempt], start_h: Decimal, now: datetime) -> Decimal:
    """Hours of the work that earlier nodes have done and saved; a start takes `start_h` of a node's time."""
    kept = (
        Decimal(str(a.billed_s(now) - (a.work_lost_s or 0))) / _SECONDS - start_h
        for a in attempts
        if a.running_at is not None and a.work_lost_s is not None
    )
    return sum((max(Decimal(0), hours) for hours in kept), Decimal(0))


def has_slack(course: Course, saved: Decimal, left_h: Decimal) -> bool:
    """Whether a node may be lost and the deadline, `left_h` from now, be kept all the same."""
    to_do_h = max(Decimal(0), course.useful_h - saved) + course.pauses_h
    wasted_h = course.start_h + (course.interval_h or course.useful_h)
    return left_h >= wasted_h + course.start_h + to_do_h
