"""The user's own GPUs: found by the drivers' tools or declared in the config, priced by watts and $/kWh.

Feeds prices/poll like any vendor, so that a quote can say "your own GPU first". Nothing remote is asked.
Each tool's output has a pure parser; one small function runs programs. A card that is declared
(`local_gpus`) wins over the same card found. Cards that are not in the GPU table, Apple's with their unified
memory among them, are left out with a reason; declaring the card that one stands in for brings it back.
"""

from __future__ import annotations

import csv
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import reduce
from typing import Any

from gpubroker import gpus
from gpubroker.config import LocalGpu
from gpubroker.errors import ConfigError, PayloadChanged, ProviderError, Transient
from gpubroker.model import FormFactor, Gpu, Offer, OfferQuery, Parsed, Skipped, Slice
from gpubroker.money import parse_usd, round_usd
from gpubroker.plan.fees import FeeTable
from gpubroker.provider import Access
from gpubroker_providers._vendor import plain_text, refuse_drift, rows_at
from gpubroker_providers.local_nodes import NAME, LocalNodes

DECLARED = "local_gpus"
_FREE = round_usd(Decimal(0))
_VRAM_TOLERANCE = 0.10
_MOST_WATTS = Decimal(5000)
_MOST_MIB = Decimal(10_000_000)
_MOST_CARDS = 64
_MIB = {"B": Decimal(1) / 2**20, "KB": Decimal(1) / 2**10, "MB": Decimal(1), "GB": Decimal(2**10)}
_HOW_TO_DECLARE = f'to quote it, declare the card that it stands in for: {DECLARED} = [{{ gpu = "rtx4090" }}]'
_TOOL_TIMEOUT_S = 2.0
# A tool whose driver hangs cannot always be killed; the declared cards do not wait for it.
_GIVE_UP_S = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Some equal cards of this machine. `watts` is what one draws at its limit."""

    gpu: str
    form_factor: FormFactor
    vram_gib: int
    watts: Decimal
    count: int = 1

    @property
    def kind(self) -> tuple[str, FormFactor, int]:
        """What makes two cards equal."""
        return self.gpu, self.form_factor, self.vram_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one tool, or the config, says. Every row that was looked at is a card or a skip."""

    cards: tuple[Card, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    fetched: int = 0
    sources: tuple[str, ...] = ()

    def __add__(self, other: Seen) -> Seen:
        """Both."""
        return Seen(
            cards=self.cards + other.cards,
            skipped=self.skipped + other.skipped,
            fetched=self.fetched + other.fetched,
            sources=self.sources + other.sources,
        )


def _seen(source: str, rows: Sequence[tuple[object, Any]], card: Callable[[Any], Card]) -> Seen:
    """Each row (its id, what it says) as a card, or skipped for the reason that `card` raises."""
    cards, skipped = [], []
    for row_id, row in rows:
        try:
            cards.append(card(row))
        except ValueError as error:
            skipped.append(Skipped(id=f"{source} {plain_text(row_id)}", reason=str(error)))
    return Seen(
        cards=tuple(cards), skipped=tuple(skipped), fetched=len(rows), sources=(source,) if rows else ()
    )


# What the tools print


def parse_nvidia_smi(text: str) -> Seen:
    """`nvidia-smi --query-gpu=index,name,memory.total,power.limit,uuid --format=csv,noheader,nounits`.

    MiB and W. What a card does not support is "[N/A]" or "[Not Supported]".
    """
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [[field.strip() for field in row] for row in csv.reader(lines)]
    if rows and all(len(row) != 5 for row in rows):
        raise PayloadChanged(NAME, "nvidia-smi", "columns", f"5 were asked for: {plain_text(lines[0])}")
    return _seen("nvidia-smi", [(row[0], row) for row in rows], _nvidia_card)


def _nvidia_card(row: list[str]) -> Card:
    if len(row) != 5:
        raise ValueError(f"columns: {len(row)}, not 5")
    _, name, memory, power, _ = row
    memory_mib = _positive(memory, _MOST_MIB)
    if memory_mib is None:
        raise ValueError(f"memory.total: {plain_text(memory)!r} is not a number of MiB ({plain_text(name)})")
    found = gpus.resolve("nvidia-smi", name, memory_mib=memory_mib) or gpus.resolve(
        "nvidia-smi", f"NVIDIA {name}", memory_mib=memory_mib
    )  # older drivers leave the brand out
    if found is None:
        raise ValueError(f"name: unknown GPU {plain_text(name)!r} with {memory_mib:f} MiB; {_HOW_TO_DECLARE}")
    known = gpus.catalogue().get((found.name, found.form_factor))
    return Card(
        gpu=found.name,
        form_factor=found.form_factor,
        vram_gib=found.vram_gib,
        watts=_watts(power, known.tdp_w if known else None),
    )


def parse_amd_smi(text: str) -> Seen:
    """`amd-smi static --asic --vram --limit --json`: a list, since ROCm 7 inside {"gpu_data": ...}."""
    payload = _decoded("amd-smi", text)
    rows = payload if isinstance(payload, list) else rows_at(NAME, "amd-smi", payload, "gpu_data")
    refuse_drift(NAME, "amd-smi", rows, "$", ("asic.market_name", "vram.size"))
    return _seen("amd-smi", [(_at(row, "gpu"), row) for row in rows], _amd_smi_card)


def _amd_smi_card(row: Any) -> Card:
    size, unit = _at(row, "vram", "size", "value"), _at(row, "vram", "size", "unit")
    mib = _positive(size, _MOST_MIB * 2**20)
    if mib is None or unit not in _MIB:
        raise ValueError(f"vram.size: {plain_text(size)} {plain_text(unit)} is not a size")
    power = _at(row, "limit", "socket_power", "value") or _at(row, "limit", "max_power", "value")
    return _amd_card(_at(row, "asic", "market_name"), mib * _MIB[unit], power)


def parse_rocm_smi(text: str) -> Seen:
    """`rocm-smi --showproductname --showmeminfo vram --showmaxpower --json`: one object a card, in text.

    The case of the keys differs between releases. Nothing at all is printed where there is no GPU.
    """
    payload = _decoded("rocm-smi", text) if text.strip() else {}
    if not isinstance(payload, dict):
        raise PayloadChanged(NAME, "rocm-smi", "$", "not an object by card")
    rows = [
        (key, {str(name).lower(): value for name, value in row.items()} if isinstance(row, dict) else row)
        for key, row in payload.items()
        if key.startswith("card")
    ]
    refuse_drift(
        NAME, "rocm-smi", [row for _, row in rows], "card*", ("card series", "vram total memory (b)")
    )
    return _seen("rocm-smi", rows, _rocm_smi_card)


def _rocm_smi_card(row: Any) -> Card:
    size = _at(row, "vram total memory (b)")
    memory_b = _positive(size, _MOST_MIB * 2**20)
    if memory_b is None:
        raise ValueError(f"VRAM Total Memory (B): {plain_text(size)!r} is not a number of bytes")
    return _amd_card(
        _at(row, "card series"), memory_b * _MIB["B"], _at(row, "max graphics package power (w)")
    )


def _amd_card(name: object, memory_mib: Decimal, power: object) -> Card:
    gpu = _one_card(plain_text(name), memory_mib)
    return Card(
        gpu=gpu.name,
        form_factor=gpu.form_factor,
        vram_gib=gpu.vram_gib,
        watts=_watts(power, gpu.tdp_w),
    )


def parse_system_profiler(text: str) -> Seen:
    """`system_profiler SPDisplaysDataType -json`. No Mac's GPU is in the GPU table: every row is a skip."""
    rows = rows_at(NAME, "system_profiler", _decoded("system_profiler", text), "SPDisplaysDataType")
    refuse_drift(NAME, "system_profiler", rows, "SPDisplaysDataType", ("sppci_model",))
    return _seen("system_profiler", list(enumerate(rows)), _mac_card)


def _mac_card(row: Any) -> Card:
    name = plain_text(_at(row, "sppci_model"))
    raise ValueError(f"{name}: a Mac's GPU, its memory is not a card's own; {_HOW_TO_DECLARE}")


def parse_declared(declared: Iterable[LocalGpu], found: Iterable[Card]) -> Seen:
    """The config's cards. One without watts draws what the same card that was found does, else its TDP."""
    limits = {card.kind: card.watts for card in found}

    def card(own: LocalGpu) -> Card:
        gpu = _one_card(own.gpu)
        if own.count > _MOST_CARDS:
            raise ValueError(f"count: {own.count} is more than {_MOST_CARDS}")
        if own.watts is not None and own.watts > _MOST_WATTS:
            raise ValueError(f"watts: {own.watts} is more than {_MOST_WATTS}")
        limit = limits.get((gpu.name, gpu.form_factor, gpu.vram_gib))
        return Card(
            gpu=gpu.name,
            form_factor=gpu.form_factor,
            vram_gib=gpu.vram_gib,
            watts=_watts(own.watts or limit, gpu.tdp_w),
            count=own.count,
        )

    return _seen(DECLARED, [(own.gpu, own) for own in declared], card)


def _one_card(text: str, memory_mib: Decimal | None = None) -> Gpu:
    """The one card of the GPU table that these words (and this memory) mean."""
    try:
        request = gpus.parse_request(text)
    except ConfigError as error:
        raise ValueError(f"{error}; {_HOW_TO_DECLARE}") from None
    fits = [gpu for (name, form), gpu in gpus.catalogue().items() if request.matches(name, form)]
    if memory_mib is not None:
        gib = float(memory_mib) / 1024
        fits = [gpu for gpu in fits if abs(gib - gpu.vram_gib) <= _VRAM_TOLERANCE * gpu.vram_gib]
        if not fits:
            raise ValueError(f"{text!r} does not come with {gib:.0f} GiB; {_HOW_TO_DECLARE}")
    if len(fits) > 1:
        cards = ", ".join(f"{gpu.name} {gpu.form_factor}" for gpu in fits)
        raise ValueError(f"{text!r} can be {cards}: say which")
    return fits[0]


def _watts(limit: object, tdp_w: int | None) -> Decimal:
    """A card's own limit, or else what its maker says."""
    watts = _positive(limit, _MOST_WATTS) or tdp_w
    if watts is None:
        raise ValueError("power: neither a limit nor the card's TDP is known; declare it with watts")
    return Decimal(watts)


def _positive(value: object, most: Decimal) -> Decimal | None:
    """A number above zero, None for anything else, such as "[N/A]"."""
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() and 0 < number <= most else None


def _decoded(tool: str, text: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=Decimal)
    except (ValueError, RecursionError):
        raise PayloadChanged(NAME, tool, "$", f"not JSON: {plain_text(text)}") from None


def _at(row: Any, *path: str) -> Any:
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


# What they cost


def own_offers(cards: Iterable[Card], usd_per_kwh: Decimal, said: str, machine_id: str) -> tuple[Offer, ...]:
    """One offer for each number of equal cards, at what the electricity costs. `said` is $/kWh in words."""
    kinds: dict[tuple[str, FormFactor, int], list[Card]] = {}
    for card in cards:
        kinds.setdefault(card.kind, []).append(card)
    return tuple(
        _offer(equal, count, usd_per_kwh, said, machine_id)
        for equal in kinds.values()
        for count in range(1, sum(card.count for card in equal) + 1)
    )


def _offer(equal: Sequence[Card], count: int, usd_per_kwh: Decimal, said: str, machine_id: str) -> Offer:
    watts = max(card.watts for card in equal)
    gpu, form_factor, vram_gib = equal[0].kind
    return Offer(
        provider=NAME,
        sku=gpu,
        gpu=gpu,
        form_factor=form_factor,
        gpu_count=count,
        vram_gib=vram_gib,
        market="on_demand",
        preemptible=False,
        machine_id=machine_id,
        usd_per_hour=parse_usd(usd_per_kwh, per_hour_factor=watts * count / 1000, allow_zero=True),
        storage_usd_per_gb_month=_FREE,
        egress_usd_per_gb=_FREE,
        ingress_usd_per_gb=_FREE,
        details={"label": f"own {gpu} x{count}", "watts": f"{watts:f}", "usd_per_kwh": said},
    )


# Looking


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tool:
    command: tuple[str, ...]
    parse: Callable[[str], Seen]


# Of the tools in one line only the first that is installed is asked: both would list the same cards.
_TOOLS = (
    (
        _Tool(
            command=(
                "nvidia-smi",
                "--query-gpu=index,name,memory.total,power.limit,uuid",
                "--format=csv,noheader,nounits",
            ),
            parse=parse_nvidia_smi,
        ),
    ),
    (
        _Tool(
            command=("amd-smi", "static", "--asic", "--vram", "--limit", "--json"),
            parse=parse_amd_smi,
        ),
        _Tool(
            command=(
                "rocm-smi",
                "--showproductname",
                "--showmeminfo",
                "vram",
                "--showmaxpower",
                "--json",
            ),
            parse=parse_rocm_smi,
        ),
    ),
    (
        _Tool(
            command=("system_profiler", "SPDisplaysDataType", "-json"),
            parse=parse_system_profiler,
        ),
    ),
)


def _output(command: Sequence[str], timeout_s: float) -> str | None:
    """What a program prints, None when it is not installed. Raises Transient when it fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  one of the fixed commands above, no shell
            [program, *command[1:]],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise Transient(NAME, command[0], f"no answer within {timeout_s:g} s") from None
    except OSError as error:
        raise Transient(NAME, command[0], plain_text(error)) from error
    if done.returncode != 0:
        said = plain_text((done.stderr or done.stdout).strip())
        raise Transient(NAME, command[0], f"exit status {done.returncode}: {said}")
    return done.stdout


class Local(LocalNodes):
    """The thin client: runs the tools side by side and adds what is declared; and rents this machine out."""

    name = NAME

    def access(self) -> Access:
        """Nobody needs an account for what they own."""
        return Access(has_credentials=True, live_without=True)

    def endpoint(self) -> None:
        """Nothing remote is asked."""

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """Every own card, whatever the query asks.

        A tool that fails or hangs is noted, and makes what it might have found unknown rather than gone.
        """
        usd_per_kwh, said = self._electricity()
        found, problems = self._look(deadline_s)
        declared = parse_declared(self._context.settings.local_gpus, found.cards)
        own = {card.kind for card in declared.cards}
        cards = declared.cards + tuple(card for card in found.cards if card.kind not in own)
        seen = found + declared
        return Parsed(
            offers=own_offers(cards, usd_per_kwh, said, plain_text(socket.gethostname())),
            skipped=seen.skipped,
            fetched=seen.fetched,
            incomplete=tuple(Slice(reason=problem) for problem in problems),
            source=" + ".join(seen.sources) or "no GPU found or declared",
            notes=tuple(problems),
        )

    def check(self, deadline_s: float) -> str:
        """What was found, what was left out and why."""
        parsed = self.offers(OfferQuery(), deadline_s)
        most = {(o.gpu, o.form_factor): o.gpu_count for o in parsed.offers}
        cards = ", ".join(f"{count}x {gpu} {form}" for (gpu, form), count in most.items())
        left_out = [f"{skip.id}: {skip.reason}" for skip in parsed.skipped]
        return "; ".join([f"{parsed.source}: {cards}" if cards else parsed.source, *parsed.notes, *left_out])

    def _look(self, deadline_s: float) -> tuple[Seen, list[str]]:
        timeout_s = min(deadline_s, _TOOL_TIMEOUT_S)

        def ask(alternatives: tuple[_Tool, ...]) -> Seen:
            for tool in alternatives:
                text = _output(tool.command, timeout_s)
                if text is not None:
                    return tool.parse(text)
            return Seen()

        seen: list[Seen] = []
        problems = []
        for outcome in self._context.pool.map(ask, _TOOLS, min(deadline_s, _GIVE_UP_S)):
            if isinstance(outcome.error, ProviderError):
                problems.append(f"{outcome.error.operation}: {outcome.error.detail}")
            elif outcome.error is not None:
                raise outcome.error
            elif outcome.value is not None:
                seen.append(outcome.value)
            else:
                problems.append(f"{outcome.item[0].command[0]}: no answer within {timeout_s:g} s")
        return reduce(Seen.__add__, seen, Seen()), problems

    def _electricity(self) -> tuple[Decimal, str]:
        """$/kWh, and in words where it is from."""
        settings = self._context.settings
        own = settings.local_usd_per_kwh
        if own is None:
            own = settings.fees.get((NAME, "electricity_usd_per_kwh"))
        listed = FeeTable.load(settings.fees).get(NAME, "electricity_usd_per_kwh")
        usd_per_kwh = own if own is not None else listed
        if usd_per_kwh is None:
            raise ConfigError("local_usd_per_kwh is not set, and no price of electricity is assumed")
        try:
            parse_usd(usd_per_kwh, allow_zero=True)
        except ValueError as error:
            raise ConfigError(f"local_usd_per_kwh: {error}") from None
        assumed = "" if own is not None else " (assumed: set local_usd_per_kwh)"
        return usd_per_kwh, f"{usd_per_kwh:f}{assumed}"
