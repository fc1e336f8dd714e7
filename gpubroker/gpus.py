"""GPU names: every vendor's spelling, and what people type -> one canonical card in one form factor.

Names match whole, never by substring: "GB300" contains "B300". The tables are data files, built and
checked by scripts/build_data.py; a quote that starts cold reads only the small one of typed names.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from typing import cast

from gpubroker.errors import ConfigError
from gpubroker.model import FormFactor, Gpu

_FORM_WORDS: Mapping[str, FormFactor] = {
    **dict.fromkeys(("sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "oam"), "SXM"),
    **dict.fromkeys(("pcie", "pci"), "PCIe"),
    "nvl": "NVL",
}
_BRANDS = frozenset(("nvidia", "amd", "geforce", "tesla", "instinct", "generation"))
_LONGEST_NAME = 100
_MOST_NEAR = 5
# Beside this file, not through importlib.resources: that import alone costs a tenth of a cold quote.
_DATA = os.path.join(os.path.dirname(__file__), "data")
# nvidia-smi and vast report 24564 or 24576 MiB for the same 24 GB card, 22888 to 24576 with ECC or
# driver reserve: a variant is told apart by far more than that.
_VRAM_TOLERANCE = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMatch:
    """What a vendor's spelling means. gpu_count is None where the spelling does not fix it."""

    name: str
    form_factor: FormFactor
    vram_gib: int
    gpu_count: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """What a person asked for: any of these cards, in this form factor (None = every form)."""

    text: str
    names: frozenset[str]
    form_factor: FormFactor | None

    def matches(self, name: str, form_factor: str) -> bool:
        """An unstated form factor matches only a request that names none: a listing must not be upgraded."""
        return name in self.names and self.form_factor in (None, form_factor)


def data_path(name: str) -> str:
    """Where a packaged table lies."""
    return os.path.join(_DATA, name)


def read_table(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file in gpubroker/data."""
    with open(data_path(name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def catalogue() -> Mapping[tuple[str, str], Gpu]:
    """Every canonical card by (name, form factor)."""

    def figure(text: str) -> Decimal | None:
        return Decimal(text) if text else None

    return {
        (row["name"], row["form_factor"]): Gpu(
            name=row["name"],
            form_factor=cast(FormFactor, row["form_factor"]),
            vram_gib=int(row["vram_gib"]),
            architecture=row["architecture"],
            compute_capability=row["compute_capability"],
            memory_bandwidth_gb_s=figure(row["memory_bandwidth_gb_s"]),
            bf16_dense_tflops=figure(row["bf16_dense_tflops"]),
            fp16_dense_tflops=figure(row["fp16_dense_tflops"]),
            tdp_w=int(row["tdp_w"]) if row["tdp_w"] else None,
        )
        for row in read_table("gpus.csv")
    }


@cache
def _names() -> frozenset[str]:
    return frozenset(name for name, _ in catalogue())


@cache
def _aliases() -> Mapping[tuple[str, str], tuple[dict[str, str], ...]]:
    """(vendor, spelling) -> its rows: one spelling can be several cards, told apart by their memory."""
    table: dict[tuple[str, str], tuple[dict[str, str], ...]] = {}
    for row in read_table("aliases.csv"):
        key = (row["vendor"], row["alias"])
        table[key] = (*table.get(key, ()), row)
    return table


def spellings(vendor: str, names: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
    """A vendor's spellings and the canonical names each can mean, for those names (None = all)."""
    wanted = None if names is None else set(names)
    table: dict[str, tuple[str, ...]] = {}
    for (of, alias), rows in _aliases().items():
        if of != vendor:
            continue
        meant = tuple(dict.fromkeys(name for row in rows for name in _variants(row["canonical_name"])))
        if wanted is None or wanted & set(meant):
            table[alias] = meant
    return table


def _variants(name: str) -> tuple[str, ...]:
    """Canonical cards that a name without its memory size stands for: A100-mixedVRAM, V100."""
    if name in _names():
        return (name,)
    base = name.removesuffix("-mixedVRAM")
    sized = re.compile(rf"{re.escape(base)}-\d+GB")
    return tuple(sorted(n for n in _names() if sized.fullmatch(n))) or (name,)


def resolve(vendor: str, spelling: str, *, memory_mib: float | Decimal | None = None) -> GpuMatch | None:
    """The canonical card for a vendor's spelling ("nvidia-smi" is a vendor too), None for an unknown one.

    `memory_mib` is per card, as the vendor or nvidia-smi reports it. It decides between cards that share a
    spelling (A100 SXM4 with 40 or 80 GB, a 4090 modified to 48 GB); without it such a spelling is
    None, except where one of them is the ordinary card. Memory that fits none of them is None, too.
    """
    candidates: list[GpuMatch] = []
    ambiguous = False
    for row in _aliases().get((vendor, spelling), ()):
        if row["gpu_count"] and not row["gpu_count"].isdigit():
            continue  # a fraction of a card is not a card
        form = cast(FormFactor, row["form_factor"])
        variants = _variants(row["canonical_name"])
        ambiguous = ambiguous or len(variants) > 1
        for name in variants:
            candidates.append(
                GpuMatch(
                    name=name,
                    form_factor=_settle_form(name, form),
                    vram_gib=_vram_gib(name, form) or int(row["vram_gib"]),
                    gpu_count=int(row["gpu_count"]) if row["gpu_count"] else None,
                )
            )
    if not candidates:
        return None
    if memory_mib is None:
        return None if ambiguous else candidates[0]
    gib = _gib(memory_mib)
    near = [match for match in candidates if _is_near(gib, match.vram_gib)]
    if near:
        return min(near, key=lambda match: abs(gib - match.vram_gib))
    return _modified(candidates[0], gib)


def _gib(memory_mib: float | Decimal) -> float:
    """NaN, which is near nothing, for what no card can have: the figure comes from a vendor."""
    try:
        return float(memory_mib) / 1024
    except (OverflowError, ValueError):
        return math.nan


def _is_near(gib: float, vram_gib: int) -> bool:
    return abs(gib - vram_gib) <= _VRAM_TOLERANCE * vram_gib


def _modified(ordinary: GpuMatch, gib: float) -> GpuMatch | None:
    """A card whose memory was changed (a 4090 with 48 GB) is a card of its own, named with its size."""
    sized = re.compile(rf"{re.escape(ordinary.name)}-\d+GB")
    for (name, _), gpu in catalogue().items():
        if sized.fullmatch(name) and _is_near(gib, gpu.vram_gib):
            return replace(ordinary, name=name, vram_gib=gpu.vram_gib)
    return None


def _vram_gib(name: str, form: str) -> int | None:
    exact = catalogue().get((name, form))
    if exact:
        return exact.vram_gib
    return next((gpu.vram_gib for (n, _), gpu in catalogue().items() if n == name), None)


def _settle_form(name: str, form: FormFactor) -> FormFactor:
    """A card that is only made in one form has that form, whatever the listing leaves out."""
    if form != "unstated":
        return form
    forms = [f for n, f in catalogue() if n == name]
    return cast(FormFactor, forms[0]) if len(forms) == 1 else form


def parse_request(text: str) -> GpuRequest:
    """What a person typed after --gpu: h100, h100-sxm, a100, "A100 80GB PCIe", 4090, rtx-a6000.

    Raises ConfigError with near matches for a name nobody knows.
    """
    shown = "".join(c for c in text[:_LONGEST_NAME] if c.isprintable()).strip()
    if len(text) > _LONGEST_NAME:
        raise ConfigError(f"no GPU is called {shown!r}...; the name is too long")
    wanted, form = typed_key(text)
    rows = _typed().get(wanted)
    if rows is None and form is None:
        wanted, form = _glued_form(wanted)
        rows = _typed().get(wanted)
    if rows is None:
        raise ConfigError(f"no GPU is called {shown!r}; {_near(wanted)}")
    form = form or cast(FormFactor | None, rows[0]["form"] or None)
    names = frozenset(row["name"] for row in rows if form is None or form in row["made_as"].split())
    if not names:
        made = {made for row in rows for made in row["made_as"].split()} - {"unstated"}
        only = f", only as {' or '.join(sorted(made))}" if made else ""
        raise ConfigError(f"{shown!r}: {rows[0]['name']} is not made as {form}{only}")
    return GpuRequest(text=shown, names=names, form_factor=form)


def typed_key(text: str) -> tuple[str, FormFactor | None]:
    """A name's letters and digits without brands, as the table of typed names has it, and its form factor."""
    form: FormFactor | None = None
    kept = []
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        if word in _FORM_WORDS and form is None:
            form = _FORM_WORDS[word]
        elif word not in _BRANDS:
            kept.append(word)
    return "".join(kept), form


def _glued_form(wanted: str) -> tuple[str, FormFactor | None]:
    """The form factor off the end of h100sxm5, where that leaves a name."""
    for word, form in _FORM_WORDS.items():
        if wanted.endswith(word) and wanted.removesuffix(word) in _typed():
            return wanted.removesuffix(word), form
    return wanted, None


@cache
def _typed() -> Mapping[str, tuple[dict[str, str], ...]]:
    """What people may type -> the cards it means. A family name stands for all its sizes."""
    table: dict[str, tuple[dict[str, str], ...]] = {}
    for row in read_table("typed.csv"):
        table[row["typed"]] = (*table.get(row["typed"], ()), row)
    return table


def _near(wanted: str) -> str:
    """What begins with the words comes first, the shortest ahead; then what is spelled alike."""
    from difflib import get_close_matches

    begun = sorted((typed for typed in _typed() if wanted and typed.startswith(wanted)), key=len)
    close = get_close_matches(wanted, _typed(), n=_MOST_NEAR, cutoff=0.5)
    meant = dict.fromkeys(row["name"] for typed in (*begun, *close) for row in _typed()[typed])
    names = list(meant)[:_MOST_NEAR]
    if not names:
        return "gpubroker offers --gpus lists the names"
    return f"did you mean {', '.join(names)}?"
