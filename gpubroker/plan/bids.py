"""What to bid on vast: the bid that makes a job's expected cost least, and what being outbid costs. Pure.

Spans of min_bid, work -> best_bid() -> Bid. A bid runs while it is at least min_bid, and is paid as bid (vast
does not say what a winner pays; to pay less than one's bid would only make higher bids better). One that is
outbid is stopped: its disk is billed, its work since the last checkpoint is lost, and it waits until min_bid
is back at the bid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from gpubroker.money import round_usd
from gpubroker.plan.hazard import Gamma, Span, exposure_from_spans, figure
from gpubroker.plan.preempt import Expectation, Interruptions, expect

# Where the history is too short to tell: this much above the bid that runs now.
DEFAULT_MARGIN = Decimal("0.20")
LEAST_HISTORY_H = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbid:
    """What being outbid once costs, on average."""

    usd: float
    rework_h: float
    restart_h: float
    wait_h: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bid:
    """A bid and what the job is expected to cost with it."""

    usd_per_hour: Decimal
    usd_expected: float  # compute, and the disk while stopped
    hazard: Gamma
    course: Expectation
    first_wait_h: float  # until it runs at all; 0 = it runs now
    outbid: Outbid
    basis: str  # what it rests on, for people

    @property
    def wall_h(self) -> float:
        """From now to the end of the job."""
        return self.first_wait_h + self.course.wall_h


@dataclass(frozen=True, slots=True, kw_only=True)
class BidJob:
    """What is to be run, and between which prices."""

    work_h: float
    # The hazard and the mean wait in it are not read: they follow from the bid.
    interruptions: Interruptions
    min_bid: Decimal  # the lowest bid that runs now
    most: Decimal  # never bid more: the price on demand
    stopped_usd_per_hour: float = 0.0  # the disk of a stopped node
    deadline_h: float | None = None  # None = it must be able to start now


def best_bid(job: BidJob, history: Sequence[Span], now: datetime, prior: Gamma, prior_wait_h: float) -> Bid:
    """The bid of the least expected cost among the prices of the history.

    `prior` and `prior_wait_h` (mean hours until a lost node is back, which counts as one outage seen) are
    what is believed without a history. With a deadline, bids below today's minimum may wait; where none is
    expected to be in time, the soonest is taken. Raises ValueError where even the minimum is above `most`.
    """
    if job.min_bid > job.most:
        raise ValueError(f"the lowest bid that runs, ${job.min_bid:f}, is above ${job.most:f} on demand")
    seen_h = exposure_from_spans(history, now).hours
    if seen_h < LEAST_HISTORY_H:
        usd = min(job.most, round_usd(job.min_bid * (1 + DEFAULT_MARGIN)))
        bid = _priced(job, usd, prior, prior_wait_h, 0.0)
        return replace(bid, basis=_default_text(job, usd, seen_h))
    bids = list(_candidates(job, history, now, prior, prior_wait_h))
    in_time = [bid for bid in bids if job.deadline_h is None or bid.wall_h <= job.deadline_h]
    if in_time:
        best = min(in_time, key=lambda bid: (bid.usd_expected, bid.usd_per_hour))
    else:
        best = min(bids, key=lambda bid: (bid.wall_h, bid.usd_per_hour))
    return replace(best, basis=f"{figure(seen_h)} h of min_bid; {best.basis}")


def _candidates(
    job: BidJob, history: Sequence[Span], now: datetime, prior: Gamma, prior_wait_h: float
) -> Iterator[Bid]:
    prices = {span.usd_per_hour for span in history} | {job.min_bid, job.most}
    for usd in sorted(prices):
        if usd > job.most or (job.deadline_h is None and usd < job.min_bid):
            continue
        seen = exposure_from_spans(history, now, usd)
        wait_h = _mean_wait_h(history, now, usd, prior_wait_h)
        bid = _priced(
            job,
            usd,
            prior.after(seen.preemptions, seen.hours),
            wait_h,
            wait_h if usd < job.min_bid else 0.0,
        )
        yield replace(
            bid, basis=f"this bid would have run for {figure(seen.hours)} h and lost {seen.preemptions} times"
        )


def _mean_wait_h(history: Sequence[Span], now: datetime, bid: Decimal, prior_wait_h: float) -> float:
    """Mean hours until a bid that does not run would run again; one outage of the prior's length is added."""
    held = sorted((span for span in history if span.usd_per_hour <= bid), key=lambda span: span.start)
    first = min(span.start for span in history)
    away_h, returns = prior_wait_h, 1
    free = first
    for span in held:
        if span.start > free:
            away_h += (span.start - free).total_seconds() / 3600
            returns += 1
        free = max(free, now if span.end is None else span.end)
    return (away_h + max(0.0, (now - free).total_seconds() / 3600)) / returns


def _priced(job: BidJob, usd: Decimal, hazard: Gamma, wait_h: float, first_wait_h: float) -> Bid:
    inputs = replace(job.interruptions, hazard_per_hour=hazard.mean, wait_h=wait_h)
    course = expect(job.work_h, inputs)
    price = float(usd)
    lost = course.preemptions or 1.0
    each = Outbid(
        usd=(price * (course.rework_h + course.restart_h) + job.stopped_usd_per_hour * course.wait_h) / lost,
        rework_h=course.rework_h / lost,
        restart_h=course.restart_h / lost,
        wait_h=course.wait_h / lost,
    )
    return Bid(
        usd_per_hour=usd,
        usd_expected=price * course.billed_h + job.stopped_usd_per_hour * course.wait_h,
        hazard=hazard,
        course=course,
        first_wait_h=first_wait_h,
        outbid=each,
        basis="",
    )


def _default_text(job: BidJob, usd: Decimal, seen_h: float) -> str:
    seen = f"only {figure(seen_h)} h of history" if seen_h else "no history"
    if usd == job.most:
        return f"{seen}: the price on demand, which is less than {DEFAULT_MARGIN:.0%} above the minimum"
    return f"{seen}: {DEFAULT_MARGIN:.0%} above the lowest bid that runs now, by default"


def outbid_text(bid: Bid) -> str:
    """What being outbid once costs, in words."""
    each = bid.outbid
    hours = f"{figure(each.restart_h)} h of restart and {figure(each.rework_h)} h of lost work"
    stopped = f"{figure(each.wait_h)} h stopped with its disk billed"
    return f"outbid {figure(bid.course.preemptions)} times, each ${each.usd:.2f}: {stopped}, {hours}"
