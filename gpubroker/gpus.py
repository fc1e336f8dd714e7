"""GPU names: every vendor's spelling, and what people type -> one canonical card in one form factor.

Names match whole, never by substring: "GB300" contains "B300". The tables are data files, built and
checked by scripts/build_data.py.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import cast

from gpubroker.errors import ConfigError
from gpubroker.model import FormFactor, Gpu

_FORM_WORDS: Mapping[str, FormFactor] = {
    **dict.fromkeys(("sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "oam"), "SXM"),
    **dict.fromkeys(("pcie", "pci"), "PCIe"),
    "nvl": "NVL",
}
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


def read_table(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file in gpubroker/data."""
    text = (files("gpubroker") / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


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


def resolve(vendor: str, spelling: str, *, memory_mib: float | None = None) -> GpuMatch | None:
    """The canonical card for a vendor's spelling, or None for a name nobody knows.

    `memory_mib` is per card, as the vendor or nvidia-smi reports it. It decides between cards that share a
    spelling (A100 SXM4 with 40 or 80 GB, a 4090 modified to 48 GB); without it such a spelling is
    None, except where one of them is the ordinary card.
    """
    rows = _aliases().get((vendor, spelling), ())
    candidates: list[tuple[int | None, GpuMatch]] = []
    for row in rows:
        form = cast(FormFactor, row["form_factor"])
        count = int(row["gpu_count"]) if row["gpu_count"].isdigit() else None
        if row["gpu_count"] and count is None:
            continue  # a fraction of a card is not a card
        variants = _variants(row["canonical_name"])
        for name in variants:
            vram = _vram_gib(name, form) or (int(row["vram_gib"]) if row["vram_gib"] else None)
            if vram is None:
                continue
            match = GpuMatch(name=name, form_factor=_settle_form(name, form), vram_gib=vram, gpu_count=count)
            candidates.append((None if len(variants) > 1 else vram, match))
    if not candidates:
        return None
    if memory_mib is None:
        return candidates[0][1] if candidates[0][0] is not None else None
    gib = memory_mib / 1024
    near = [m for _, m in candidates if abs(gib - m.vram_gib) <= _VRAM_TOLERANCE * m.vram_gib]
    if near:
        return min(near, key=lambda m: abs(gib - m.vram_gib))
    return _modified(vendor, candidates[0][1], gib)


def _modified(vendor: str, ordinary: GpuMatch, gib: float) -> GpuMatch | None:
    """A card whose memory was changed (a 4090 with 48 GB) is a card of its own, named with its size."""
    for row in (r for rows in _aliases().values() for r in rows):
        sized = row["canonical_name"].startswith(f"{ordinary.name}-") and row["vram_gib"]
        if sized and abs(gib - int(row["vram_gib"])) <= _VRAM_TOLERANCE * int(row["vram_gib"]):
            return GpuMatch(
                name=row["canonical_name"],
                form_factor=ordinary.form_factor,
                vram_gib=int(row["vram_gib"]),
                gpu_count=None,
            )
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
    words = [w for w in re.split(r"[^a-z0-9]+", text.lower()) if w]
    form: FormFactor | None = None
    kept = []
    for word in words:
        if word in _FORM_WORDS and form is None:
            form = _FORM_WORDS[word]
        elif word not in ("nvidia", "amd", "geforce", "tesla", "instinct", "generation"):
            kept.append(word)
    wanted = "".join(kept)
    names = _known_as().get(wanted)
    if names is None and form is None:
        for suffix in sorted(_FORM_WORDS, key=len, reverse=True):
            if wanted.endswith(suffix) and wanted.removesuffix(suffix) in _known_as():
                names, form = _known_as()[wanted.removesuffix(suffix)], _FORM_WORDS[suffix]
                break
    if names is None:
        raise ConfigError(f"no GPU is called {text!r}; {_near(wanted)}")
    if form is not None:
        names = frozenset(n for n in names if (n, form) in catalogue())
        if not names:
            raise ConfigError(f"{text!r}: that card is not made as {form}; {_near(wanted)}")
    return GpuRequest(text=text, names=names, form_factor=form)


@cache
def _known_as() -> Mapping[str, frozenset[str]]:
    """Letters and digits a person may type -> canonical names. A family name stands for all its sizes."""
    table: dict[str, set[str]] = {}
    extra = {row["canonical_name"] for rows in _aliases().values() for row in rows}
    for name in _names() | {n for n in extra if "mixed" not in n and len(_variants(n)) == 1}:
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        table.setdefault(plain, set()).add(name)
        for prefix in ("rtx", "quadrortx"):
            if plain.startswith(prefix) and len(plain) > len(prefix) + 2:
                table.setdefault(plain.removeprefix(prefix), set()).add(name)
    for name in _names():
        family = re.match(r"([A-Za-z0-9]+)-(?:\d+GB|S|WS|MaxQ)$", name)
        if family:
            table.setdefault(family[1].lower(), set()).add(name)
            if family[1].startswith("RTX"):
                table.setdefault(family[1].lower().removeprefix("rtx"), set()).add(name)
    return {typed: frozenset(names) for typed, names in table.items()}


def _near(wanted: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(wanted, _known_as(), n=5, cutoff=0.5)
    names = list(dict.fromkeys(name for c in close for name in sorted(_known_as()[c])))[:5]
    if not names:
        return "gpubroker offers --gpus lists the names"
    return f"did you mean {', '.join(names)}?"
