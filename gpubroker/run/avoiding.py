"""What to keep away from after a node was refused, and for how long.

A vendor that names its machines: that machine, for all jobs, for a day. Others (RunPod, Lambda, AWS, Modal)
give the next node of a kind, in its region, from the same few or from another thousand, and nobody is told:

    the job that met it    keeps away from the kind for minutes, since the next may be the same one
    all jobs               once two were refused there, and they were half of what we had there or more
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from gpubroker.doors import Clock
from gpubroker.model import Offer
from gpubroker.run.records import Attempt, Records

MACHINE_S = 24 * 3600
PLACE_S = 300
_LEAST_REFUSED = 2


def place(what: Attempt | Offer) -> str:
    """The machine, or what its vendor has instead of machines."""
    return what.machine_id or " ".join(filter(None, (what.sku, what.region, what.zone)))


def keep_away(records: Records, clock: Clock, attempt: Attempt, code: str, reason: str) -> None:
    """`attempt` is refused. Called before its node is ended: a crash in between forgets nothing."""
    if attempt.machine_id:
        records.avoid(attempt.provider, attempt.machine_id, code, reason, for_s=MACHINE_S)
        return
    there = [
        other
        for other in records.attempts_since(clock.now() - timedelta(seconds=PLACE_S))
        if (other.provider, place(other)) == (attempt.provider, place(attempt)) and other.id != attempt.id
    ]
    refused = 1 + sum(other.end_kind == "rejected" for other in there)
    if refused >= _LEAST_REFUSED and refused * 2 >= 1 + len(there):
        records.avoid(attempt.provider, place(attempt), code, reason, for_s=PLACE_S)


def kept_away(records: Records, clock: Clock, job_id: str) -> Mapping[tuple[str, str], str]:
    """(provider, place) that this job keeps away from now -> why."""
    since = clock.now() - timedelta(seconds=PLACE_S)
    own = {
        (attempt.provider, place(attempt)): attempt.end_reason
        for attempt in records.attempts_since(since, job_id)
        if attempt.end_kind == "rejected"
    }
    return {**own, **records.avoided()}
