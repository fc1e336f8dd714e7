"""An offer and a job -> the lines of its bill. Pure; every line carries its arithmetic and its source.

Compute runs from the moment the vendor starts billing: start-up (boot, image pull, preflight), the useful
hours, and what the billing unit and minimum add. The lines are rounded to the micro-dollar one by one and
the total is their sum, so that they always add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from gpubroker.model import Offer
from gpubroker.money import SECONDS_PER_HOUR, round_usd
from gpubroker.plan.fees import UNKNOWN, Direction, FeeTable

ZERO = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What has to be paid for, whichever offer does it. Gigabytes are 10^9 bytes."""

    hours: Decimal  # useful GPU work
    disk_gb: Decimal = Decimal(50)
    egress_gb: Decimal = ZERO
    ingress_gb: Decimal = ZERO
    egress_gb_this_month: Decimal = ZERO  # already used of account-monthly tiers
    cpu_cores_per_gpu: Decimal = Decimal(2)  # billed only where CPU and RAM are apart
    ram_gib_per_gpu: Decimal = Decimal(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLine:
    """One line of a bill. `how` is the arithmetic in words a person can check."""

    item: str
    usd: Decimal
    how: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one offer would cost for the work."""

    lines: tuple[CostLine, ...]
    total_usd: Decimal
    billed_s: Decimal


def bill_for(offer: Offer, work: Work, fees: FeeTable, *, price_source: str) -> Bill:
    """Every line of the bill for running `work` once on `offer`, without interruptions."""
    startup = fees.startup(offer.provider, offer.market)
    useful_s = work.hours * SECONDS_PER_HOUR
    run_s = useful_s + startup.billed_s
    billed_s = billed_seconds(run_s, offer.billing_increment_s, offer.minimum_s)
    billed_h = billed_s / SECONDS_PER_HOUR

    lines = [
        CostLine(
            item="compute",
            usd=round_usd(offer.usd_per_hour * work.hours),
            how=f"{work.hours:f} h x ${offer.usd_per_hour:f}/h",
            source=price_source,
        )
    ]
    if startup.billed_s:
        lines.append(
            CostLine(
                item="start-up",
                usd=round_usd(offer.usd_per_hour * startup.billed_s / SECONDS_PER_HOUR),
                how=f"{startup.billed_s} s x ${offer.usd_per_hour:f}/h",
                source=startup.source,
            )
        )
    if billed_s > run_s:
        extra_s = billed_s - run_s
        lines.append(
            CostLine(
                item="billing unit",
                usd=round_usd(offer.usd_per_hour * extra_s / SECONDS_PER_HOUR),
                how=_unit_text(offer, extra_s),
                source=price_source,
            )
        )
    lines += _cpu_and_ram(offer, work, billed_h, fees, price_source)
    lines += _disk(offer, work, billed_h, fees)
    lines += _transfer(offer, work, fees)
    return Bill(lines=tuple(lines), total_usd=sum((line.usd for line in lines), ZERO), billed_s=billed_s)


def billed_seconds(run_s: Decimal, increment_s: int, minimum_s: int) -> Decimal:
    """The run rounded up to whole billing increments, and at least the minimum."""
    units = (run_s / increment_s).to_integral_value(rounding=ROUND_CEILING)
    return max(units * increment_s, Decimal(minimum_s))


def _unit_text(offer: Offer, extra_s: Decimal) -> str:
    if offer.minimum_s >= 86400:
        what = f"the whole term of {offer.minimum_s // 86400} days is paid"
    elif offer.minimum_s and offer.billing_increment_s == 1:
        what = f"at least {offer.minimum_s} s are billed"
    else:
        what = f"billed in steps of {offer.billing_increment_s} s"
    return f"{what}: {extra_s:f} s x ${offer.usd_per_hour:f}/h"


def _cpu_and_ram(offer: Offer, work: Work, billed_h: Decimal, fees: FeeTable, source: str) -> list[CostLine]:
    """Where they are billed beside the GPU, by the assumption that the work carries."""
    lines = []
    for item, rate, per_gpu, unit in (
        ("cpu", offer.cpu_usd_per_core_hour, work.cpu_cores_per_gpu, "cores"),
        ("ram", offer.ram_usd_per_gib_hour, work.ram_gib_per_gpu, "GiB"),
    ):
        if rate is None:
            continue
        amount = per_gpu * offer.gpu_count
        if item == "ram":
            amount = max(amount, _ram_for_disk_gib(offer, work, fees))
        if amount:
            lines.append(
                CostLine(
                    item=item,
                    usd=round_usd(rate * amount * billed_h),
                    how=f"{amount:f} {unit} assumed x ${rate:f}/h x {_hours(billed_h)} h",
                    source=source,
                )
            )
    return lines


def _ram_for_disk_gib(offer: Offer, work: Work, fees: FeeTable) -> Decimal:
    """Modal has no disk fee: a disk larger than the included one raises the RAM that is billed."""
    per_ram_gib = fees.get(offer.provider, "ephemeral_disk_gib_per_ram_gib")
    included_gib = fees.get(offer.provider, "ephemeral_disk_included_gib") or ZERO
    disk_gib = work.disk_gb * 10**9 / 2**30
    if not per_ram_gib or disk_gib <= included_gib:
        return ZERO
    return (disk_gib / per_ram_gib).to_integral_value(rounding=ROUND_CEILING)


def _disk(offer: Offer, work: Work, billed_h: Decimal, fees: FeeTable) -> list[CostLine]:
    extra_gb = work.disk_gb - offer.disk_included_gb
    if extra_gb <= 0:
        return []
    if offer.storage_usd_per_gb_month is not None:
        rate, source, is_known = offer.storage_usd_per_gb_month, "the offer itself", True
    else:
        fee = fees.storage_usd_per_gb_month(offer.provider)
        rate, source, is_known = fee.usd, fee.source_text, fee.status != UNKNOWN
    if is_known and not rate:
        return []  # no line for what is free; one of $0 for what nobody knows
    month_h = fees.hours_per_month(offer.provider)
    return [
        CostLine(
            item="disk",
            usd=round_usd(extra_gb * rate * billed_h / month_h),
            how=f"{_disk_text(offer, work)} x ${rate:f}/GB-month x {_hours(billed_h)} h / {month_h} h",
            source=source,
        )
    ]


def _disk_text(offer: Offer, work: Work) -> str:
    if not offer.disk_included_gb:
        return f"{work.disk_gb:f} GB"
    return f"({work.disk_gb:f} - {offer.disk_included_gb} included) GB"


def _transfer(offer: Offer, work: Work, fees: FeeTable) -> list[CostLine]:
    ways: tuple[tuple[Direction, Decimal, Decimal | None, Decimal], ...] = (
        ("ingress", work.ingress_gb, offer.ingress_usd_per_gb, ZERO),
        ("egress", work.egress_gb, offer.egress_usd_per_gb, work.egress_gb_this_month),
    )
    lines = []
    for item, gb, rate, so_far_gb in ways:
        if not gb:
            continue
        if rate is not None:
            usd, how, source = round_usd(gb * rate), f"{gb:f} GB x ${rate:f}/GB", "the offer itself"
        else:
            charge = fees.transfer_usd(
                offer.provider, item, gb, region=offer.region, month_so_far_gb=so_far_gb
            )
            usd, how, source = charge.usd, charge.how, charge.source_text
        lines.append(CostLine(item=item, usd=usd, how=how, source=source))
    return lines


def _hours(hours: Decimal) -> str:
    return f"{hours:.4f}".rstrip("0").rstrip(".")
