"""The same work on unlike GPUs: `--work 8h@h100-sxm` or FLOPs -> hours on any other card. Pure.

The user's own measurements (`gpubroker calibrate`) win over published figures, which are weighed by what
bounds the work: bf16 TFLOPS or memory bandwidth. Every assumption comes back as a sentence for the quote.
Hours are Decimal throughout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from functools import cache
from typing import Literal

from gpubroker.errors import ConfigError
from gpubroker.gpus import catalogue, parse_request
from gpubroker.model import Gpu
from gpubroker.money import SECONDS_PER_HOUR

MOST_HOURS = Decimal(100_000)
MOST_GPUS = 1024
DEFAULT_BOUND = Decimal("0.7")
DEFAULT_MFU = Decimal("0.4")
_MFU_SOURCE = "Llama 3 reached 0.38-0.43 on H100s, arXiv 2407.21783; PaLM 0.46, arXiv 2204.02311"
_MOST_FLOP = Decimal("1e30")
_MOST_STEPS = Decimal("1e12")
_TERA = Decimal(10**12)
_HOUR_STEP = Decimal("0.000001")
# What a doubling of the GPUs leaves of each one's speed: with NVLink, and over PCIe. Assumed.
_KEPT_LINKED = Decimal("0.95")
_KEPT_PCIE = Decimal("0.90")
_PREFIXES = {
    "": 0, "k": 3, "m": 6, "g": 9, "t": 12, "p": 15, "e": 18, "z": 21, "y": 24,
    "kilo": 3, "mega": 6, "giga": 9, "tera": 12, "peta": 15, "exa": 18, "zetta": 21, "yotta": 24,
}  # fmt: skip
_NUMBER = r"(\d{1,30}(?:\.\d{1,30})?(?:e\+?\d{1,3})?)"
_FLOP = re.compile(
    rf"{_NUMBER}\s*({'|'.join(_PREFIXES)})flops?(?:/s)?(?:[- ](hour|day|year)s?)?",
    re.ASCII,
)
_STEPS = re.compile(rf"{_NUMBER}\s*steps?", re.ASCII)
_ON_CARD = re.compile(r"([^@]+)@\s*(?:(\d{1,4})\s*x\s*)?([^@]+)", re.ASCII)
_DURATION = re.compile(rf"(?:{_NUMBER}\s*d)?\s*(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m)?", re.ASCII)
_PERIOD_S = {"": 1, "hour": 3600, "day": 86400, "year": 365 * 86400}
_EXAMPLES = "8h@h100-sxm, 3e21flop, 5pflop-days or 20000steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much work: `value` hours on `count` of `card`, FLOP, or steps of a measured job."""

    unit: Literal["hours", "flop", "steps"]
    value: Decimal
    card: Gpu | None = None  # hours only
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one finished run did: steps of a job by `gpu_count` cards in so many seconds."""

    job: str
    gpu: str
    form_factor: str
    gpu_count: int
    steps: Decimal
    seconds: Decimal
    measured_at: datetime

    @property
    def steps_per_s(self) -> Decimal:
        """Of all its cards together."""
        return self.steps / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Work, and what it is converted with.

    bound: the share of the time that compute bounds, the rest is memory's. measurements: of this job alone,
    of each card and count the newest counts.
    """

    work: Amount
    bound: Decimal = DEFAULT_BOUND
    mfu: Decimal = DEFAULT_MFU
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """Hours on one kind of offer; None = it is left out, and `how` is the reason."""

    hours: Decimal | None
    how: str
    is_measured: bool = False


def parse_work(text: str) -> Amount:
    """What a person typed after --work. Raises ConfigError with examples.

    Hours on a card (8h@h100-sxm, 1h30m@4x4090), FLOP (3e21flop, 5pflop-days) or steps of a calibrated job.
    """
    shown = "".join(c for c in text[:60] if c.isprintable()).strip()
    plain = text.strip().lower()
    if len(plain) <= 200:
        if found := _ON_CARD.fullmatch(plain):
            return _hours_on(shown, found[1].strip(), int(found[2] or 1), found[3])
        if found := _FLOP.fullmatch(plain):
            flop = Decimal(found[1]).scaleb(_PREFIXES[found[2]]) * _PERIOD_S[found[3] or ""]
            return Amount(unit="flop", value=_within(shown, flop, _MOST_FLOP, "FLOP"))
        if found := _STEPS.fullmatch(plain):
            return Amount(unit="steps", value=_within(shown, Decimal(found[1]), _MOST_STEPS, "steps"))
    raise ConfigError(f"work: {shown!r} is not an amount of work such as {_EXAMPLES}")


def _hours_on(shown: str, duration: str, count: int, name: str) -> Amount:
    found = _DURATION.fullmatch(duration)
    if found is None or not any(found.groups()):
        raise ConfigError(f"work: {duration[:40]!r} is not a time such as 8h, 90m or 1d12h")
    days, hours, minutes = (Decimal(part or 0) for part in found.groups())
    total = days * 24 + hours + minutes / 60
    if not 1 <= count <= MOST_GPUS:
        raise ConfigError(f"work: {shown!r}: a job has between 1 and {MOST_GPUS} GPUs")
    value = _within(shown, total, MOST_HOURS, "hours")
    return Amount(unit="hours", value=value, card=reference_card(name), count=count)


def _within(shown: str, value: Decimal, most: Decimal, unit: str) -> Decimal:
    if not 0 < value <= most:
        raise ConfigError(f"work: {shown!r}: it must be above 0 and at most {most:g} {unit}")
    return value


def reference_card(name: str) -> Gpu:
    """The one card that these words mean. Raises ConfigError where they mean several that differ."""
    request = parse_request(name)
    cards = [gpu for (of, form), gpu in catalogue().items() if request.matches(of, form)]
    if len(cards) != 1:
        several = ", ".join(f"{gpu.name}-{gpu.form_factor}".lower() for gpu in cards[:4])
        raise ConfigError(f"{request.text!r} can be {several}: say which")
    return cards[0]


def parse_bound(text: str) -> Decimal:
    """compute, memory or the share of compute: 0.7, 70%. Raises ConfigError."""
    plain = text.strip().lower()
    if plain in ("compute", "memory"):
        return Decimal(plain == "compute")
    if found := re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)(%?)", plain, re.ASCII):
        share = Decimal(found[1]) / (100 if found[2] else 1)
        if share <= 1:
            return share
    raise ConfigError(f"bound: {text[:40]!r} is neither compute nor memory nor a share such as 0.7")


def parse_mfu(text: str) -> Decimal:
    """The share of the published TFLOPS that the work really gets: 0.4, 40%. Raises ConfigError."""
    if found := re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)(%?)", text.strip(), re.ASCII):
        share = Decimal(found[1]) / (100 if found[2] else 1)
        if 0 < share <= 1:
            return share
    raise ConfigError(f"mfu: {text[:40]!r} is not a share above 0 and at most 1, such as 0.4")


def card_of(name: str, form_factor: str) -> Gpu | None:
    """An offer's card; of one whose form nobody states the slowest: a listing must not be upgraded."""
    exact = catalogue().get((name, form_factor))
    if exact is not None:
        return exact
    forms = [gpu for (of, _), gpu in catalogue().items() if of == name]
    return min(forms, key=lambda g: (g.bf16_dense_tflops or 0, g.memory_bandwidth_gb_s or 0), default=None)


def efficiency(form_factor: str, count: int) -> Decimal:
    """What each of `count` GPUs still does of what one alone does.

    Every doubling keeps 95% with NVLink (SXM) and 90% over PCIe: assumed, as it depends on the job.
    """
    kept = _KEPT_LINKED if form_factor == "SXM" else _KEPT_PCIE
    return _power(kept, count)


@cache
def _power(kept: Decimal, count: int) -> Decimal:
    with localcontext(prec=28):
        return Decimal(1) if count == 1 else kept ** (Decimal(count).ln() / Decimal(2).ln())


def converter(yardstick: Yardstick) -> Callable[[str, str, int], Converted]:
    """(gpu, form factor, count) -> hours. One call a kind of offer is computed, the others are remembered.

    Raises ConfigError for work that cannot be converted at all: steps of a job that was never measured, a
    reference card without figures.
    """
    scale = _Scale(yardstick)
    scale.check()
    return cache(scale.convert)


def assumption(yardstick: Yardstick) -> str:
    """One sentence for the quote: what was converted, and by what."""
    return f"{_Scale(yardstick).assumption()}."


class _Scale:
    """Speeds in one unit: reference cards (published) or steps/s (measured)."""

    def __init__(self, yardstick: Yardstick) -> None:
        self._y = yardstick
        self._measured = _newest(yardstick.measurements)
        self._anchor = self._choose_anchor()

    def check(self) -> None:
        work = self._y.work
        if work.unit == "steps" and self._anchor is None:
            raise ConfigError(
                "work in steps needs a measured run: gpubroker calibrate --job NAME --gpu ... records one"
            )
        if work.card is not None and self._rate(work.card, work.count) is None:
            raise ConfigError(
                f"work: {_named(work.card)} cannot be the reference: {self._lacking(work.card)}"
            )

    def convert(self, name: str, form_factor: str, count: int) -> Converted:
        card = card_of(name, form_factor)
        if card is None:
            return Converted(hours=None, how=f"no figures are known for {name}")
        found = self._rate(card, count)
        if found is None:
            return Converted(hours=None, how=f"not comparable: {self._lacking(card)}")
        rate, how, is_measured = found
        with localcontext(prec=28):
            hours = (self._wanted() / rate).quantize(_HOUR_STEP, rounding=ROUND_HALF_EVEN)
        if hours > MOST_HOURS:
            return Converted(hours=None, how=f"it would take {hours:.2g} hours")
        return Converted(hours=max(hours, _HOUR_STEP), how=how, is_measured=is_measured)

    def assumption(self) -> str:
        y, work = self._y, self._y.work
        if self._anchor is not None:
            cards = list(dict.fromkeys(_measured_name(m) for m in self._measured.values()))
            job = self._anchor.job
            text = f"{_work_text(work)}, by your measurements of {job!r} on {', '.join(cards)}"
            return f"{text}; other cards from there by published figures, {_bound_text(y.bound)}"
        if work.unit == "flop":
            is_assumed = f"assumed; {_MFU_SOURCE}" if y.mfu == DEFAULT_MFU else "as you said"
            share = f"{_percent(y.mfu)} of the published dense bf16 TFLOPS"
            return f"{_work_text(work)} at {share} (MFU, {is_assumed})"
        return f"{_work_text(work)}, converted by published figures: {_bound_text(y.bound)}"

    def _choose_anchor(self) -> Measurement | None:
        """The measurement that the cards without one are compared with: of the reference card, or the newest.

        FLOPs know no steps: measurements cannot help there.
        """
        if self._y.work.unit == "flop":
            return None
        card = self._y.work.card
        own = [
            m
            for m in self._measured.values()
            if card and (m.gpu, m.form_factor) == (card.name, card.form_factor)
        ]
        among = (
            own
            or [
                m
                for m in self._measured.values()
                if (c := card_of(m.gpu, m.form_factor)) and self._published(c)
            ]
            or list(self._measured.values())
        )
        # Of as many cards as the work is measured by, or the nearest count; of those the newest.
        wanted = self._y.work.count
        return min(among, key=lambda m: (abs(m.gpu_count - wanted), -m.measured_at.timestamp()), default=None)

    def _wanted(self) -> Decimal:
        """The work in hours times the unit of the rates."""
        work = self._y.work
        if work.unit == "steps":
            return work.value / SECONDS_PER_HOUR
        if work.card is None:
            return work.value / (_TERA * SECONDS_PER_HOUR)
        found = self._rate(work.card, work.count)
        if found is None:
            raise ConfigError(
                f"work: {_named(work.card)} cannot be the reference: {self._lacking(work.card)}"
            )
        return work.value * found[0]

    def _rate(self, card: Gpu, count: int) -> tuple[Decimal, str, bool] | None:
        """Speed of so many cards, how it is known, whether it was measured on that card."""
        own = self._nearest(card, count)
        if own is not None:
            scaled = _speedup(card, count) / _speedup(card, own.gpu_count)
            how = f"measured: {own.steps_per_s:.4g} steps/s on {_measured_name(own)}"
            if count != own.gpu_count:
                how += f", {count}x by {_efficiency_text(card, count)}"
            return own.steps_per_s * scaled, how, True
        speed = self._published(card)
        if speed is None:
            return None
        many = f", {count}x at {_efficiency_text(card, count)}" if count > 1 else ""
        if self._y.work.unit == "flop":
            how = f"{card.bf16_dense_tflops:f} bf16 TFLOPS x {_percent(self._y.mfu)} MFU{many}"
            return speed * _speedup(card, count), how, False
        if self._anchor is None:
            return (
                speed * _speedup(card, count),
                f"published figures, {_bound_text(self._y.bound)}{many}",
                False,
            )
        base = card_of(self._anchor.gpu, self._anchor.form_factor)
        base_speed = self._published(base) if base else None
        if base is None or base_speed is None:
            return None
        per_speed = self._anchor.steps_per_s / (base_speed * _speedup(base, self._anchor.gpu_count))
        how = f"from {_measured_name(self._anchor)}, measured, by published figures{many}"
        return per_speed * speed * _speedup(card, count), how, False

    def _nearest(self, card: Gpu, count: int) -> Measurement | None:
        """Of this card: with that many, or the nearest number of them."""
        if self._anchor is None:
            return None
        own = [
            m for (gpu, form, _), m in self._measured.items() if (gpu, form) == (card.name, card.form_factor)
        ]
        return min(own, key=lambda m: (abs(m.gpu_count - count), m.gpu_count), default=None)

    def _published(self, card: Gpu) -> Decimal | None:
        """Speed of one card: TFLOPS that are reached, or how often faster than one TFLOPS and one GB/s."""
        compute, memory = card.bf16_dense_tflops, card.memory_bandwidth_gb_s
        if self._y.work.unit == "flop":
            return None if compute is None else compute * self._y.mfu
        base = self._y.work.card or self._base_card()
        if base is None:
            return None
        time = Decimal(0)
        parts = (
            (self._y.bound, compute, base.bf16_dense_tflops),
            (1 - self._y.bound, memory, base.memory_bandwidth_gb_s),
        )
        for share, own, of_base in parts:
            if share and (own is None or of_base is None):
                return None
            if share and own is not None and of_base is not None:
                time += share * of_base / own
        return 1 / time

    def _base_card(self) -> Gpu | None:
        """What a share of the time refers to, where the work names no card: the newest measured one."""
        newest = max(self._measured.values(), key=lambda m: m.measured_at, default=None)
        return None if newest is None else card_of(newest.gpu, newest.form_factor)

    def _lacking(self, card: Gpu) -> str:
        missing = []
        if card.bf16_dense_tflops is None and (self._y.bound or self._y.work.unit == "flop"):
            missing.append("bf16 TFLOPS")
        if card.memory_bandwidth_gb_s is None and self._y.bound < 1 and self._y.work.unit != "flop":
            missing.append("memory bandwidth")
        what = " and ".join(missing) or "figures of the card that was measured"
        return f"no published {what} of {_named(card)}; a measured run would do (gpubroker calibrate)"


def _newest(measurements: Iterable[Measurement]) -> dict[tuple[str, str, int], Measurement]:
    ordered: Sequence[Measurement] = sorted(measurements, key=lambda m: m.measured_at)
    return {(m.gpu, m.form_factor, m.gpu_count): m for m in ordered}


def _speedup(card: Gpu, count: int) -> Decimal:
    return count * efficiency(card.form_factor, count)


def _efficiency_text(card: Gpu, count: int) -> str:
    return f"{efficiency(card.form_factor, count):.0%} each (assumed)"


def _named(card: Gpu) -> str:
    return card.name if card.form_factor == "unstated" else f"{card.name} {card.form_factor}"


def _measured_name(m: Measurement) -> str:
    form = "" if m.form_factor == "unstated" else f" {m.form_factor}"
    return f"{m.gpu_count}x {m.gpu}{form}"


def _work_text(work: Amount) -> str:
    if work.card is not None:
        return f"{work.value.normalize():f} h on {work.count}x {_named(work.card)}"
    if work.unit == "steps":
        return f"{work.value:,.0f} steps"
    return f"{work.value:.3g} FLOP"


def _bound_text(bound: Decimal) -> str:
    if bound in (0, 1):
        return "bf16 TFLOPS alone" if bound else "memory bandwidth alone"
    text = f"{_percent(bound)} of the time by bf16 TFLOPS, the rest by memory bandwidth"
    return f"{text} (assumed)" if bound == DEFAULT_BOUND else text


def _percent(share: Decimal) -> str:
    return f"{(share * 100).normalize():f}%"
