"""An offer and a job -> the lines of its bill. Pure; every line carries its arithmetic and its source.

The node is paid from the moment the vendor starts billing: start-up (boot, image pull, preflight), the useful
hours, what preemptions are expected to add (checkpoints, lost work, restarts), and what the billing unit and
minimum add. The lines are rounded to the micro-dollar one by one and the total is their sum, so that they
always add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal

from gpubroker.model import Offer
from gpubroker.money import SECONDS_PER_HOUR, round_usd
from gpubroker.plan.course import Course
from gpubroker.plan.fees import UNKNOWN, Charge, Direction, FeeTable
from gpubroker.plan.work import ZERO, Work

# What an item is for, in the words of a table that has no room for every line.
GROUPS = {
    **dict.fromkeys(("compute", "start-up"), "compute"),
    **dict.fromkeys(("checkpoints", "rework", "restarts", "disk while waiting"), "preemptions"),
    "billing unit": "billing unit",
    **dict.fromkeys(("cpu", "ram"), "cpu and ram"),
    **dict.fromkeys(("disk", "network volume", "kept checkpoints"), "storage"),
}
_TRANSFER = "transfer"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLine:
    """One line of a bill. The arithmetic is put into words only when somebody reads it: rows are many."""

    item: str
    usd: Decimal
    source: str
    words: Callable[[], str] = field(compare=False, repr=False)

    @property
    def how(self) -> str:
        """The arithmetic in words that a person can check."""
        return self.words()

    @property
    def group(self) -> str:
        """compute, preemptions, billing unit, cpu and ram, storage or transfer."""
        return GROUPS.get(self.item, _TRANSFER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one offer is expected to cost for the work."""

    lines: tuple[CostLine, ...]
    total_usd: Decimal
    billed_s: Decimal
    course: Course


def bill_for(
    offer: Offer, work: Work, fees: FeeTable, course: Course, *, price_source: str, risk_source: str = ""
) -> Bill:
    """Every line of the bill for `work` on `offer`, going as `course` says.

    `risk_source` says where the preemptions of the course come from.
    """
    run_s = course.run_h * SECONDS_PER_HOUR
    billed_s = expected_billed_s(course, offer.billing_increment_s, offer.minimum_s)
    billed_h = billed_s / SECONDS_PER_HOUR
    lines = [
        *_node(offer, course, fees, price_source, risk_source),
        *_billing_unit(offer, billed_s - run_s, price_source),
        *_cpu_and_ram(offer, work, billed_h, fees, price_source),
        *_address(offer, billed_h, fees),
        *_disk(offer, work, billed_h, fees),
        *_paused_disk(offer, work, course, fees),
        *_held(offer, work, course, fees),
        *_transfer(offer, work, course, fees),
    ]
    return Bill(
        lines=tuple(lines),
        total_usd=sum((line.usd for line in lines), ZERO),
        billed_s=billed_s,
        course=course,
    )


def _node(offer: Offer, course: Course, fees: FeeTable, price: str, risk: str) -> Iterator[CostLine]:
    """The hours of the node, by what they are spent on."""
    rate = offer.usd_per_hour
    yield CostLine(
        item="compute",
        usd=round_usd(rate * course.useful_h),
        words=lambda: f"{_hours(course.useful_h)} h x ${rate:f}/h",
        source=price,
    )
    if course.start_h:
        yield CostLine(
            item="start-up",
            usd=round_usd(rate * course.start_h),
            words=lambda: f"{_seconds(course.start_h)} s x ${rate:f}/h",
            source=fees.startup(offer.provider, offer.market).source,
        )
    if not course.preemptions:
        return
    if course.pauses_h:
        yield CostLine(
            item="checkpoints",
            usd=round_usd(rate * course.pauses_h),
            words=lambda: f"{_pauses_text(course)} x ${rate:f}/h",
            source=risk,
        )
    yield _lost("rework", course.rework_h, "lost and done again", rate, course, risk)
    yield _lost("restarts", course.restarts_h, "starting again", rate, course, risk)


def _lost(item: str, hours: Decimal, what: str, rate: Decimal, course: Course, risk: str) -> CostLine:
    return CostLine(
        item=item,
        usd=round_usd(rate * hours),
        words=lambda: f"{_hours(course.preemptions)} preemptions: {_hours(hours)} h {what} x ${rate:f}/h",
        source=risk,
    )


def _pauses_text(course: Course) -> str:
    each_s = _seconds(course.pauses_h / course.checkpoints) if course.checkpoints else "0"
    every = "" if course.interval_h is None else f", one every {_hours(course.interval_h * 60)} min"
    return f"{_hours(course.checkpoints)} saves of {each_s} s{every}"


def expected_billed_s(course: Course, increment_s: int, minimum_s: int) -> Decimal:
    """Billing units over all nodes: what is sure to run in whole units, what is expected on top as it is.

    Each lost node ends somewhere in a unit, and wastes half of one on average.
    """
    sure_s = (course.useful_h + course.start_h + course.pauses_h) * SECONDS_PER_HOUR
    lost_s = (course.rework_h + course.restarts_h) * SECONDS_PER_HOUR
    whole_s = sure_s if increment_s == 1 and lost_s else billed_seconds(sure_s, increment_s, 0)
    return max(whole_s + lost_s + course.preemptions * (increment_s - 1) / 2, Decimal(minimum_s))


def billed_seconds(run_s: Decimal, increment_s: int, minimum_s: int) -> Decimal:
    """The run rounded up to whole billing increments, and at least the minimum."""
    units = (run_s / increment_s).to_integral_value(rounding=ROUND_CEILING)
    return max(units * increment_s, Decimal(minimum_s))


def _billing_unit(offer: Offer, extra_s: Decimal, source: str) -> Iterator[CostLine]:
    usd = round_usd(offer.usd_per_hour * extra_s / SECONDS_PER_HOUR)
    if usd:
        yield CostLine(item="billing unit", usd=usd, words=lambda: _unit_text(offer, extra_s), source=source)


def _unit_text(offer: Offer, extra_s: Decimal) -> str:
    if offer.minimum_s >= 86400:
        what = f"the whole term of {offer.minimum_s // 86400} days is paid"
    elif offer.minimum_s and offer.billing_increment_s == 1:
        what = f"at least {offer.minimum_s} s are billed"
    else:
        what = f"billed in steps of {offer.billing_increment_s} s"
    return f"{what}: {_hours(extra_s)} s x ${offer.usd_per_hour:f}/h"


def _cpu_and_ram(
    offer: Offer, work: Work, billed_h: Decimal, fees: FeeTable, source: str
) -> Iterator[CostLine]:
    """Where they are billed beside the GPU, by the assumption that the work carries."""
    if offer.cpu_usd_per_core_hour is not None:
        cores = work.cpu_cores_per_gpu * offer.gpu_count
        yield from _apart("cpu", "cores", cores, offer.cpu_usd_per_core_hour, billed_h, source)
    if offer.ram_usd_per_gib_hour is not None:
        gib = max(work.ram_gib_per_gpu * offer.gpu_count, _ram_for_disk_gib(offer, work, fees))
        yield from _apart("ram", "GiB", gib, offer.ram_usd_per_gib_hour, billed_h, source)


def _apart(
    item: str, unit: str, amount: Decimal, rate: Decimal, billed_h: Decimal, source: str
) -> Iterator[CostLine]:
    if amount:
        yield CostLine(
            item=item,
            usd=round_usd(rate * amount * billed_h),
            words=lambda: f"{amount:f} {unit} assumed x ${rate:f}/h x {_hours(billed_h)} h",
            source=source,
        )


def _address(offer: Offer, billed_h: Decimal, fees: FeeTable) -> Iterator[CostLine]:
    """A public address, where it is charged for by the hour: without one nobody could reach the node."""
    rate = fees.get(offer.provider, "public_ipv4_usd_per_hour")
    if rate:
        yield CostLine(
            item="public address",
            usd=round_usd(rate * billed_h),
            words=lambda: f"${rate:f}/h x {_hours(billed_h)} h",
            source=fees.source_of(offer.provider, "public_ipv4_usd_per_hour"),
        )


def _ram_for_disk_gib(offer: Offer, work: Work, fees: FeeTable) -> Decimal:
    """Modal has no disk fee: a disk larger than the included one raises the RAM that is billed."""
    per_ram_gib = fees.get(offer.provider, "ephemeral_disk_gib_per_ram_gib")
    included_gib = fees.get(offer.provider, "ephemeral_disk_included_gib") or ZERO
    disk_gib = work.disk_gb * 10**9 / 2**30
    if not per_ram_gib or disk_gib <= included_gib:
        return ZERO
    return (disk_gib / per_ram_gib).to_integral_value(rounding=ROUND_CEILING)


def _disk(offer: Offer, work: Work, billed_h: Decimal, fees: FeeTable) -> Iterator[CostLine]:
    extra_gb = work.disk_gb - offer.disk_included_gb
    if extra_gb <= 0:
        return
    rate, source, is_known = _disk_rate(offer, fees)
    if is_known and not rate:
        return  # no line for what is free; one of $0 for what nobody knows
    what = f"({work.disk_gb:f} - {offer.disk_included_gb} included)" if offer.disk_included_gb else extra_gb
    yield _disk_line(
        "disk", extra_gb, f"{what}", rate, billed_h, fees.hours_per_month(offer.provider), source
    )


def _disk_rate(offer: Offer, fees: FeeTable) -> tuple[Decimal, str, bool]:
    """USD a GB and month, who says so, and whether anybody does."""
    if offer.storage_usd_per_gb_month is not None:
        return offer.storage_usd_per_gb_month, "the offer itself", True
    fee = fees.storage_usd_per_gb_month(offer.provider)
    return fee.usd, fee.source_text, fee.status != UNKNOWN


def _disk_line(
    item: str, gb: Decimal, gb_text: str, rate: Decimal, hours: Decimal, month_h: int, source: str
) -> CostLine:
    return CostLine(
        item=item,
        usd=round_usd(gb * rate * hours / month_h),
        words=lambda: f"{gb_text} GB x ${rate:f}/GB-month x {_hours(hours)} h / {month_h} h",
        source=source,
    )


# Where a preempted node is stopped rather than ended, so that its disk stays and is paid.
_KEEPS_DISK = frozenset({("vast", "spot")})


def keeps_disk(offer: Offer) -> bool:
    """Whether a preempted node waits with its disk, instead of starting from nothing elsewhere."""
    return (offer.provider, offer.market) in _KEEPS_DISK


def _paused_disk(offer: Offer, work: Work, course: Course, fees: FeeTable) -> Iterator[CostLine]:
    """The disk of a node that waits to come back."""
    if not keeps_disk(offer) or not course.wait_h:
        return
    rate, source = _idle_disk_rate(offer, fees)
    gb, month_h = work.disk_gb, fees.hours_per_month(offer.provider)
    yield _disk_line("disk while waiting", gb, f"{gb:f}", rate, course.wait_h, month_h, source)


def _idle_disk_rate(offer: Offer, fees: FeeTable) -> tuple[Decimal, str]:
    stopped = fees.storage_usd_per_gb_month(offer.provider, "storage_stopped")
    if stopped.status != UNKNOWN:
        return stopped.usd, stopped.source_text
    rate, running, _ = _disk_rate(offer, fees)
    return rate, f"the running rate ({running}); a stopped disk may cost more"


def idle_disk_usd_per_hour(offer: Offer, work: Work, fees: FeeTable) -> Decimal:
    """What its disk costs while nothing runs, where that is billed."""
    extra_gb = max(ZERO, work.disk_gb - offer.disk_included_gb)
    return round_usd(extra_gb * _idle_disk_rate(offer, fees)[0] / fees.hours_per_month(offer.provider))


def _held(offer: Offer, work: Work, course: Course, fees: FeeTable) -> Iterator[CostLine]:
    """What lies apart from the node from the first start to the end: a volume, and kept checkpoints."""
    saves = work.checkpoints
    if work.volume_gb:
        charge = fees.held_usd(offer.provider, work.volume_gb, course.wall_h)
        yield _charged("network volume", charge)
    if saves.gb and saves.store:
        charge = fees.held_usd(saves.store, saves.gb * saves.generations, course.wall_h, kind="bucket")
        yield _charged("kept checkpoints", charge)


def _transfer(offer: Offer, work: Work, course: Course, fees: FeeTable) -> Iterator[CostLine]:
    """What goes in at each start, and what leaves: checkpoints as they are written, artifacts at the end.

    A monthly tier is used up in that order.
    """
    saves = work.checkpoints
    starts = Decimal(1) if keeps_disk(offer) else 1 + course.preemptions
    if work.ingress_gb:
        gb = work.ingress_gb * starts
        yield _moved("ingress", "ingress", gb, offer, work, fees)
        if work.data_store not in ("", offer.provider):
            yield _from_store("data leaving its store", gb, work.data_store, fees)
    left_gb = ZERO
    if saves.leave(offer.provider):
        left_gb = saves.gb * course.checkpoints
        if left_gb:
            yield _moved("checkpoint egress", "egress", left_gb, offer, work, fees)
        read_gb = saves.gb * course.preemptions
        if read_gb:
            yield _moved("checkpoint ingress", "ingress", read_gb, offer, work, fees)
            yield _from_store("checkpoints leaving their store", read_gb, saves.store, fees)
    if work.egress_gb:
        yield _moved("egress", "egress", work.egress_gb, offer, work, fees, before_gb=left_gb)


def checkpoint_fee_usd(offer: Offer, work: Work, fees: FeeTable, count: Decimal) -> Decimal:
    """What one checkpoint that leaves adds to the bill: the mean of `count`, since there may be tiers."""
    saves = work.checkpoints
    if not saves.leave(offer.provider) or not count:
        return ZERO
    return _moved("", "egress", count * saves.gb, offer, work, fees).usd / count


def _moved(
    item: str,
    direction: Direction,
    gb: Decimal,
    offer: Offer,
    work: Work,
    fees: FeeTable,
    before_gb: Decimal = ZERO,
) -> CostLine:
    """Into or out of the node's provider, by the offer's own rate where it has one."""
    rate = offer.egress_usd_per_gb if direction == "egress" else offer.ingress_usd_per_gb
    if rate is not None:
        return CostLine(
            item=item,
            usd=round_usd(gb * rate),
            words=lambda: f"{_hours(gb)} GB x ${rate:f}/GB",
            source="the offer itself",
        )
    so_far_gb = work.egress_gb_this_month + before_gb if direction == "egress" else ZERO
    charge = fees.transfer_usd(offer.provider, direction, gb, region=offer.region, month_so_far_gb=so_far_gb)
    return _charged(item, charge)


def _from_store(item: str, gb: Decimal, store: str, fees: FeeTable) -> CostLine:
    return _charged(item, fees.transfer_usd(store, "egress", gb))


def _charged(item: str, charge: Charge) -> CostLine:
    return CostLine(item=item, usd=charge.usd, words=lambda: charge.how, source=charge.source_text)


def _hours(value: Decimal) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _seconds(hours: Decimal) -> str:
    return f"{hours * SECONDS_PER_HOUR:.0f}"
