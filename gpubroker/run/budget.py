"""What jobs have used of their budgets, and when one must stop so that the cap holds. Pure.

attempts -> spend -> shares      a person hears of 50, 80 and 100 %
         -> breach               a job is to save and to end, while both still fit into its budget
         -> day_breach           a day's cap: nodes are ended and wait for the next day, no job ends
checkpoints -> stored            what lies in the job's store costs too

What is spent is known within one tick and one billing unit (ledger.py), so as much is kept in reserve.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from gpubroker.jobspec import VOLUME, Limits
from gpubroker.money import SECONDS_PER_HOUR, round_usd
from gpubroker.plan.fees import UNKNOWN, FeeTable
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Attempt, Caps, Checkpoint, midnight_before

PERCENTS = (100, 80, 50)
# The agent keeps two generations, whatever they weigh (node/generations.py).
_LEAST_KEPT = 2
_R2 = ".r2.cloudflarestorage.com"
_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How long a node goes on after it should stop."""

    save_s: float  # the wait for a last checkpoint
    grace_s: float  # between SIGTERM and SIGKILL
    tick_s: float  # before the supervisor looks again

    @property
    def seconds(self) -> Decimal:
        """All of it."""
        return Decimal(str(self.save_s + self.grace_s + self.tick_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """By some attempts, until now."""

    usd: Decimal
    hours: Decimal  # of nodes, from when they ran to their end


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a job's checkpoints cost where they are kept."""

    usd: Decimal = _ZERO
    usd_per_hour: Decimal = _ZERO  # of what is kept now
    text: str = ""  # why it is not counted; "" = it is, or there is nothing to count


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of a budget that is reached."""

    percent: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DayBreach:
    """A cap of the day that would be passed: its nodes save and end, and none is rented before `until`."""

    provider: str  # whose nodes; "" = all
    until: datetime
    reason: str


def spend(attempts: Iterable[Attempt], now: datetime) -> Spend:
    """The vendors' own figures where there are any, else the estimates."""
    mine = list(attempts)
    return Spend(
        usd=sum((a.usd_known(now) for a in mine), _ZERO),
        hours=sum((a.hours_since(a.intended_at, now) for a in mine), _ZERO),
    )


def shares(limits: Limits, usd: Decimal, hours: Decimal) -> Share | None:
    """The largest of PERCENTS that is reached, by money or by hours; None = none is."""
    found = []
    if limits.budget_usd is not None:
        found += _share(usd, limits.budget_usd, f"limits.budget_usd: ${usd:.2f} of ${limits.budget_usd:.2f}")
    if limits.max_hours is not None:
        text = f"limits.max_hours: {hours:.2f} of {limits.max_hours:.2f} h"
        found += _share(hours, limits.max_hours, text)
    return max(found, key=lambda share: share.percent, default=None)


def _share(used: Decimal, limit: Decimal, text: str) -> list[Share]:
    reached = [percent for percent in PERCENTS if used * 100 >= limit * percent]
    return [Share(percent=percent, text=f"{percent} % of {text}") for percent in reached[:1]]


def breach(
    limits: Limits, attempts: Sequence[Attempt], now: datetime, ending: Ending, stored: Stored | None = None
) -> str:
    """Why the job must save and end now; "" = it may go on until the next tick.

    `attempts` are all of the job's. Once it is said it stays so for as long as nothing ends.
    """
    used, kept = spend(attempts, now), stored or Stored()
    if limits.budget_usd is not None:
        usd = used.usd + kept.usd
        reserve = _reserve_usd(attempts, now, ending) + kept.usd_per_hour * ending.seconds / SECONDS_PER_HOUR
        if _is_passed(limits.budget_usd, usd, reserve):
            return (
                f"limits.budget_usd: ${usd:.2f} of ${limits.budget_usd:.2f} are spent,"
                f" and to save and to end takes up to ${reserve:.2f}"
            )
    if limits.max_hours is not None:
        reserve_h = _reserve_h(attempts, ending)
        if _is_passed(limits.max_hours, used.hours, reserve_h):
            return (
                f"limits.max_hours: {used.hours:.2f} of {limits.max_hours:.2f} h are used,"
                f" and to save and to end takes up to {reserve_h:.2f} h"
            )
    return ""


def day_breach(attempts: Sequence[Attempt], caps: Caps, now: datetime, ending: Ending) -> list[DayBreach]:
    """Which caps of the day would be passed. `attempts` are of all jobs, at least those of today.

    What lies in stores is in no day's cap.
    """
    midnight, found = midnight_before(now), list[DayBreach]()
    for provider, most in caps.by_day():
        mine = [a for a in attempts if provider in ("", a.provider)]
        usd = sum((a.usd_since(midnight, now) for a in mine), _ZERO)
        hours = sum((a.hours_since(midnight, now) for a in mine), _ZERO)
        where, reasons = f" at {provider}" if provider else "", list[str]()
        limit_usd = most.usd_per_day
        if limit_usd is not None and _is_passed(limit_usd, usd, _reserve_usd(mine, now, ending)):
            reasons.append(f"${usd:.2f} of ${limit_usd:.2f}")
        limit_h = most.node_hours_per_day
        if limit_h is not None and _is_passed(limit_h, hours, _reserve_h(mine, ending)):
            reasons.append(f"{hours:.2f} of {limit_h:.2f} node hours")
        if reasons:
            until = midnight + timedelta(days=1)
            reason = f"{' and '.join(reasons)} are used today{where}; it goes on at {until:%Y-%m-%dT%H:%MZ}"
            found.append(DayBreach(provider=provider, until=until, reason=reason))
    return found


def _is_passed(limit: Decimal, used: Decimal, reserve: Decimal) -> bool:
    return used >= limit or used + reserve > limit


def _reserve_usd(attempts: Iterable[Attempt], now: datetime, ending: Ending) -> Decimal:
    """The most that open nodes may add before they are ended, a begun billing unit with it."""
    return sum((_ending_usd(a, now, ending.seconds) for a in attempts if a.ended_at is None), _ZERO)


def _ending_usd(attempt: Attempt, now: datetime, seconds: Decimal) -> Decimal:
    if attempt.stopped_at is not None:
        return attempt.held_usd_per_hour * seconds / SECONDS_PER_HOUR
    billed_s = seconds + attempt.billing_increment_s
    if attempt.running_at is None or attempt.running_at > now:  # its minimum is not in what is spent
        billed_s = max(billed_s, Decimal(attempt.minimum_s))
    return max(attempt.usd_per_hour, attempt.held_usd_per_hour) * billed_s / SECONDS_PER_HOUR


def _reserve_h(attempts: Iterable[Attempt], ending: Ending) -> Decimal:
    open_now = sum(a.ended_at is None for a in attempts)
    return open_now * ending.seconds / SECONDS_PER_HOUR


# What is kept in the store


def stored(
    checkpoints: Sequence[Checkpoint],
    keep: int,
    keep_bytes: int | None,
    keys: StoreKeys | None,
    fees: FeeTable,
    now: datetime,
) -> Stored:
    """Since the first was published, by the store's fee for a month; `checkpoints` as they were made.

    By the fee of the first tier: what of it is free, or less than that, is the whole account's and not the
    job's. A network volume costs the same whatever lies on it, and belongs to no one job.
    """
    provider, why = _owner(keys)
    if not checkpoints or not provider:
        return Stored(text=why)
    rate = fees.storage_usd_per_gb_month(provider, "bucket")
    if rate.status == UNKNOWN:
        return Stored(text=f"what checkpoints cost in their store is not counted: {rate.how}")
    usd_per_gb_hour = rate.usd / fees.hours_per_month(provider)
    kept = _kept(checkpoints, keep, keep_bytes, now)
    gb_hours = sum((gb * hours for gb, hours in kept), _ZERO)
    return Stored(usd=round_usd(gb_hours * usd_per_gb_hour), usd_per_hour=kept[-1][0] * usd_per_gb_hour)


def _owner(keys: StoreKeys | None) -> tuple[str, str]:
    """Who charges for what lies there, as the fee table names it; "" = nobody we can say, and why."""
    if keys is None:
        return "", ""
    if keys.where.startswith(VOLUME):
        return "", "what the volume costs is not counted: it belongs to no one job"
    if not keys.where.startswith("s3://"):
        return "", ""
    if keys.endpoint is None:
        return "aws", ""
    host = keys.endpoint.partition("://")[2].partition("/")[0].partition(":")[0]
    if host.endswith(_R2):
        return "cloudflare-r2", ""
    return "", f"what checkpoints cost in their store is not counted: no fee of {host} is known"


def _kept(
    checkpoints: Sequence[Checkpoint], keep: int, keep_bytes: int | None, now: datetime
) -> list[tuple[Decimal, Decimal]]:
    """(GB kept at a time, for how many hours), one after the other, until now. Times are nodes' own."""
    window, size, found = deque[int](), 0, list[tuple[Decimal, Decimal]]()
    moments = [min(now, one.published_at) for one in checkpoints]
    for at, one, following in zip(moments, checkpoints, [*moments[1:], now], strict=True):
        window.append(one.bytes)
        size += one.bytes
        while len(window) > keep or (
            keep_bytes is not None and size > keep_bytes and len(window) > _LEAST_KEPT
        ):
            size -= window.popleft()
        lasting_s = max(0, int((following - at).total_seconds()))
        found.append((Decimal(size) / 10**9, Decimal(lasting_s) / SECONDS_PER_HOUR))
    return found
