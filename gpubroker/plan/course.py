"""How a job will go on an offer: hours of each kind that somebody bills, expected over preemptions. Pure.

bill.py multiplies them by prices. The closed form and its assumptions are preempt.py's; here an offer and
the work become its inputs, and its floats become decimals that add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from gpubroker.money import SECONDS_PER_HOUR
from gpubroker.plan.hazard import Ages, Gamma, Hazard
from gpubroker.plan.preempt import Interruptions, expect
from gpubroker.plan.work import ZERO, Checkpoints

_NANO = Decimal("0.000000001")
# Mean wait for the same market to have a node again. The pooled public spot traces return at 1.64 an hour in
# the first hour without one, 0.31 from there to the fourth, 0.10 later: 1.6 h on average.
_WAIT_H = {"spot": 1.6}
_LONGEST_H = 1e6
# A serverless scheduler starts the next container by itself.
_OTHER_WAIT_H = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """How often an offer's nodes are lost, and who says so."""

    per_hour: float  # of billed time, the mean of what is known
    source: str
    text: str = ""  # the same in a few words, for each line that rests on it; "" = `source` is short
    uncertain: Gamma | None = None  # what is known of the rate, where it is not certain
    ages: Ages | None = None  # how it changes with a node's age; None = it does not


NO_RISK = Risk(per_hour=0.0, source="")


@lru_cache(maxsize=4096)
def risk_of(hazard: Hazard, hours: Decimal) -> Risk:
    """A hazard as a job of that length meets it: its nodes are young more often than others."""
    return Risk(
        per_hour=hazard.over(float(hours)),
        source=f"{hazard.text}; prior, {hazard.prior.as_of}: {hazard.prior.source}",
        text=hazard.text,
        uncertain=hazard.gamma,
        ages=hazard.ages,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Expected hours and counts of one job on one offer."""

    useful_h: Decimal
    start_h: Decimal = ZERO  # billed before the first useful second
    pauses_h: Decimal = ZERO  # writing checkpoints
    rework_h: Decimal = ZERO  # work that was lost and done again
    restarts_h: Decimal = ZERO  # starts after preemptions
    wait_h: Decimal = ZERO  # without a node, not billed
    preemptions: Decimal = ZERO
    checkpoints: Decimal = ZERO
    interval_h: Decimal | None = None  # None = none is written at intervals

    @property
    def run_h(self) -> Decimal:
        """What a vendor bills, before billing units."""
        return self.useful_h + self.start_h + self.pauses_h + self.rework_h + self.restarts_h

    @property
    def wall_h(self) -> Decimal:
        """From the first start to the end."""
        return self.run_h + self.wait_h


@lru_cache(maxsize=1024)
def interruptions(market: str, saves: Checkpoints, start_s: Decimal, hazard_per_hour: float) -> Interruptions:
    """The inputs of the closed form, but for what a checkpoint costs beside its pause."""
    return Interruptions(
        hazard_per_hour=hazard_per_hour,
        restart_h=_hours(start_s + saves.reload_s),
        first_start_h=_hours(start_s),
        checkpoint_h=_hours(saves.pause_s),
        interval_h=None if saves.every_s is None else _hours(saves.every_s),
        wait_h=_WAIT_H.get(market, _OTHER_WAIT_H),
    )


@lru_cache(maxsize=4096)
def course_of(hours: Decimal, inputs: Interruptions) -> Course | None:
    """The expected course; None where restarts are lost faster than they end, so that it never finishes."""
    found = expect(float(hours), inputs)
    if not found.finishes or found.billed_h > _LONGEST_H:
        return None
    return Course(
        useful_h=hours,
        start_h=_decimal(found.first_start_h),
        pauses_h=_decimal(found.checkpoint_pause_h),
        rework_h=_decimal(found.rework_h),
        restarts_h=_decimal(found.restart_h),
        wait_h=_decimal(found.wait_h),
        preemptions=_decimal(found.preemptions),
        checkpoints=_decimal(found.checkpoints_written),
        interval_h=None if found.interval_h is None else _decimal(found.interval_h),
    )


def _hours(seconds: Decimal) -> float:
    return float(seconds / SECONDS_PER_HOUR)


def _decimal(hours: float) -> Decimal:
    """To the billionth, without the noise that a float has after it."""
    return Decimal(repr(hours)).quantize(_NANO).normalize() + 0
