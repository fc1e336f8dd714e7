"""What a node has cost so far, from our own record of it. Pure.

    created          running                 stopped                 ended
       |  its disk      |  all of it            |  its disk             |

Right within one billing unit and the time between two looks at the node, times its rate: when it began and
ceased to run is known no better. Not in it is what is billed by the byte (a vast host's or AWS's transfer),
and what outlives the node (volumes, buckets).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from gpubroker.money import SECONDS_PER_HOUR, round_usd
from gpubroker.plan.bill import billed_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a node costs."""

    usd_per_hour: Decimal  # while it runs: all that is billed by the hour, its disk too
    held_usd_per_hour: Decimal = Decimal(0)  # from the create to the end, while it does not run: its disk
    billing_increment_s: int = 1
    minimum_s: int = 0  # billed at least this long, once it has run


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """When a node was in which state, as far as it has been seen."""

    created: datetime
    running: datetime | None  # None = it never ran
    stopped: datetime | None  # None = it ran to the end
    until: datetime  # its end, or now


def estimate_usd(terms: Terms, life: Life, *, is_free: bool = False) -> Decimal:
    """In whole billing units. `is_free`: its running costs nothing; its disk is paid all the same."""
    run_s, has_run = Decimal(0), life.running is not None and life.running <= life.until
    if life.running is not None:
        run_s = _seconds(life.running, min(life.stopped or life.until, life.until))
    held_s = _seconds(life.created, life.until) - run_s
    usd = terms.held_usd_per_hour * max(held_s, Decimal(0))
    if is_free:
        usd += terms.held_usd_per_hour * run_s
    elif has_run:  # the minimum is paid for less than a second, too
        usd += terms.usd_per_hour * billed_seconds(run_s, terms.billing_increment_s, terms.minimum_s)
    return round_usd(usd / SECONDS_PER_HOUR)


def _seconds(since: datetime, until: datetime) -> Decimal:
    """Begun seconds are not counted."""
    return max(Decimal(0), Decimal(int((until - since).total_seconds())))
