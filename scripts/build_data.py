"""Public price tables -> the tables inside the package (gpubroker/data), every row checked on the way.

    python scripts/build_data.py ../shared/prices            writes them, prints counts and what was left out
    python scripts/build_data.py ../shared/prices --check    only says whether they are what would be written

What the public tables lack and the project needs stands in scripts/data. A row that is broken in a way
nobody has looked at stops the build; the ways that are known are refusals, and each is printed.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path

from gpubroker.doors import SystemClock
from gpubroker.gpus import typed_key
from gpubroker.model import MARKETS
from gpubroker.money import parse_usd, round_usd, usd_text
from gpubroker.plan.fees import CONFLICT, is_figure, trust

OWN = Path(__file__).parent / "data"
PACKAGED = Path(__file__).parents[1] / "gpubroker" / "data"

Row = dict[str, str]

FORMS = ("SXM", "PCIe", "NVL", "unstated")
VENDORS = frozenset(
    (
        "aws",
        "lambda",
        "modal",
        "nvidia-smi",
        "runpod",
        "runpod-display",
        "skypilot/gpuhunt",
        "vast",
        "vast-cli",
    )
)
PROVIDERS = ("aws", "cloudflare-r2", "lambda", "local", "modal", "runpod", "vast")
# USD per GPU and hour. The cheapest GPU of the tables costs 0.08, the dearest 18.
BELIEVABLE_USD = (Decimal("0.02"), Decimal(25))
MAX_GPUS = 8
DAY_S = 86_400


class Refused(ValueError):
    """Left out for a reason that was looked at and found right."""


@dataclass
class Report:
    """What happened to the rows, for the person who runs the build."""

    counts: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def each(self, table: str, rows: Iterable[Row], parse: Callable[[Row], Row]) -> list[Row]:
        """Every row parsed; one that cannot be is noted with its line, not raised."""
        kept = []
        for line, row in enumerate(rows, start=2):
            try:
                kept.append(parse(row))
            except Refused as reason:
                self.refused.append(f"{table} line {line}: {reason}")
            except ValueError as reason:
                self.broken.append(f"{table} line {line}: {reason}")
        return kept

    def unique(self, table: str, rows: Iterable[Row], *columns: str) -> None:
        """Note rows whose key another row has already."""
        seen: set[tuple[str, ...]] = set()
        for row in rows:
            key = tuple(row[c] for c in columns)
            if key in seen:
                self.broken.append(f"{table}: {' '.join(key)} twice")
            seen.add(key)


def build(shared: Path, today: date) -> tuple[dict[str, str], Report]:
    """The text of every packaged table by file name; none while a row is broken."""
    report = Report()
    gpus = report.each("gpus.csv", read_public(shared / "gpus.csv"), parse_gpu)
    gpus += report.each("extra_gpus.csv", read(OWN / "extra_gpus.csv"), parse_gpu)
    report.unique("gpus", gpus, "name", "form_factor")
    cards = Cards(gpus)
    aliases = report.each("aliases.csv", read_public(shared / "aliases.csv"), cards.parse_alias)
    aliases += report.each("extra_aliases.csv", read(OWN / "extra_aliases.csv"), cards.parse_alias)
    report.unique("aliases", aliases, "vendor", "alias", "canonical_name", "memory_total_mib")
    cards.declare(aliases)
    dates = Dates(today)
    fees = report.each("fees.csv", read_public(shared / "fees.csv"), dates.parse_fee)
    fees += report.each("extra_fees.csv", read(OWN / "extra_fees.csv"), dates.parse_fee)
    report.broken += gaps(fees)
    startups = report.each("startup.csv", read(OWN / "startup.csv"), dates.parse_startup)
    report.unique("startup", startups, "provider", "market")
    hazards = report.each("hazard.csv", read(OWN / "hazard.csv"), dates.parse_hazard)
    report.unique("hazard", hazards, "provider", "market", "band")
    disks = report.each("lambda_disks.csv", read(OWN / "lambda_disks.csv"), parse_disk)
    report.unique("lambda_disks", disks, "sku")
    listed = report.each(
        "pricebook.csv", read_public(shared / "pricebook.csv"), PriceRows(cards, dates).parse
    )
    listed = with_disks(newest(listed, report), disks, report)
    if report.broken:
        return {}, report
    prices = expand(listed, ModalFees.of(fees), report)
    report.unique("prices", prices, *IDENTITY)
    files = {
        "gpus.csv": csv_text(gpus, "name", "form_factor"),
        "aliases.csv": csv_text(aliases, "vendor", "alias", "vram_gib", "memory_total_mib"),
        "typed.csv": csv_text(typed_names(cards, aliases), "typed", "name"),
        "fees.csv": csv_text(fees, "provider", "item", "region", "tier_from", "status", "value"),
        "startup.csv": csv_text(startups, "provider", "market"),
        "hazard.csv": csv_text(hazards, "provider", "market", "hours"),
        "pricebook.csv": csv_text(prices),
    }
    report.counts = {name: text.count("\n") - 1 for name, text in files.items()}
    return files, report


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


# Sources that name files which a reader of the package does not have.
PRIVATE_SOURCES = (
    (r" cited in /\S+( [\d.]+)?", " (third party)"),
    (r"^reference/providers-aws-modal\S+ 2\.2$", "https://modal.com/pricing (via vendor notes)"),
    (r"reference/providers-\S+\.md( [\d.x]+)?", "vendor notes"),
)


def read_public(path: Path) -> Iterator[Row]:
    """The rows of a public table, each with a source that stands for itself: "same" means the row above's."""
    above = ""
    for row in read(path):
        above = above if row["source"] == "same" else row["source"]
        source = above
        for pattern, plain in PRIVATE_SOURCES:
            source = re.sub(pattern, plain, source)
        yield {**row, "source": source}


def csv_text(rows: Iterable[Row], *order: str) -> str:
    """The rows in a fixed order, so that the same facts always give the same bytes."""
    rows = list(rows)
    columns = list(rows[0])
    key = [*order, *columns]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: [natural(row[column]) for column in key]))
    return out.getvalue()


def natural(text: str) -> tuple[int, Decimal, str]:
    """Numbers by size, before words."""
    return (0, Decimal(text), "") if is_figure(text) else (1, Decimal(0), text)


def whole(text: str, what: str, low: int, high: int) -> int:
    """A whole number within bounds, or ValueError."""
    if not text.isdigit() or not low <= int(text) <= high:
        raise ValueError(f"{what} {text!r} is not a whole number from {low} to {high}")
    return int(text)


def one_of(text: str, what: str, allowed: Iterable[str]) -> str:
    """A word of a list, or ValueError."""
    if text not in allowed:
        raise ValueError(f"{what} {text!r} is not known")
    return text


def stated(row: Row, *columns: str) -> None:
    """ValueError unless each of these columns says something."""
    for column in columns:
        if not (row[column] or "").strip():
            raise ValueError(f"{column} is empty")


# --- GPUs and their names ---------------------------------------------------------------------------------


def parse_gpu(row: Row) -> Row:
    """A card in one form, as packaged."""
    stated(row, "name", "architecture", "source")
    one_of(row["form_factor"], "form factor", FORMS)
    whole(row["vram_gib"], "vram_gib", 1, 1000)
    if not re.fullmatch(r"\d+\.\d|gfx\w+", row["compute_capability"]):
        raise ValueError(f"compute_capability {row['compute_capability']!r}")
    for column in ("memory_bandwidth_gb_s", "bf16_dense_tflops", "fp16_dense_tflops"):
        if row[column] and not (is_figure(row[column]) and 1 <= Decimal(row[column]) <= 20_000):
            raise ValueError(f"{column} {row[column]!r} is not believable")
    if row["tdp_w"]:
        whole(row["tdp_w"], "tdp_w", 10, 3000)
    return row


class Cards:
    """The catalogue: which cards there are, in which forms, with how much memory."""

    def __init__(self, gpus: Iterable[Row]) -> None:
        self.vram_gib = {(gpu["name"], gpu["form_factor"]): int(gpu["vram_gib"]) for gpu in gpus}
        self.forms: dict[str, list[str]] = {}
        for name, form in sorted(self.vram_gib):
            self.forms.setdefault(name, []).append(form)
        self._vast: dict[tuple[str, str], str] = {}

    def sized(self, name: str) -> list[str]:
        """The cards that a name without its memory size stands for."""
        base = name.removesuffix("-mixedVRAM")
        return [n for n in self.forms if re.fullmatch(rf"{re.escape(base)}-\d+GB", n)]

    def settle(self, name: str, form: str) -> str:
        """A card that is made in one form has that form, whatever a listing leaves out."""
        made = self.forms.get(name, [])
        return made[0] if form == "unstated" and len(made) == 1 else form

    def declare(self, aliases: Iterable[Row]) -> None:
        """Take in the names that only the table of spellings has: slices of cards."""
        for row in aliases:
            name, form = row["canonical_name"], row["form_factor"]
            if name not in self.forms and not self.sized(name) and row["gpu_count"] == "1":
                self.forms[name] = [form]
                self.vram_gib[name, form] = int(row["vram_gib"])
            if row["vendor"] == "vast":
                for meant in [name] if name in self.forms else self.sized(name):
                    self._vast.setdefault((meant, self.settle(meant, form)), row["alias"])

    def vast_name(self, name: str, form: str) -> str:
        """What vast itself calls a card; feeds put words of their own there."""
        try:
            return self._vast[name, form]
        except KeyError:
            raise ValueError(f"vast has no name for {name} {form}") from None

    def parse_alias(self, row: Row) -> Row:
        """A vendor's spelling, as packaged."""
        stated(row, "alias", "canonical_name", "source")
        one_of(row["vendor"], "vendor", VENDORS)
        one_of(row["form_factor"], "form factor", FORMS)
        if row["gpu_count"] and not (is_figure(row["gpu_count"]) and 0 < Decimal(row["gpu_count"]) <= 16):
            raise ValueError(f"gpu_count {row['gpu_count']!r}")
        name = row["canonical_name"]
        if row["vram_gib"]:
            vram_gib = whole(row["vram_gib"], "vram_gib", 1, 1000)
            for (known, form), gib in self.vram_gib.items():
                if known == name and row["form_factor"] in (form, "unstated"):
                    near(vram_gib, gib, f"vram_gib of {name} {form}")
            if row["memory_total_mib"]:
                near(whole(row["memory_total_mib"], "memory", 1, 10**6) / 1024, vram_gib, "memory_total_mib")
        elif not self.sized(name):
            raise ValueError(f"{name} has no memory size, here or in the catalogue")
        return row


def near(gib: float, expected: int, what: str) -> None:
    """Vendors report the same card with a few per cent more or less."""
    if abs(gib - expected) > 0.10 * expected:
        raise ValueError(f"{what}: {gib:g} GiB where {expected} are known")


# Instance types fix more than the card; SkyPilot's RTX6000 is one of three cards that a person may mean.
NOT_TYPED = ("aws", "lambda", "skypilot/gpuhunt")


def typed_names(cards: Cards, aliases: Iterable[Row]) -> list[Row]:
    """What a person may type for a card: its name with and without RTX, its family, what vendors call it."""
    table: dict[str, dict[str, str]] = {}
    for name in cards.forms:
        for typed in short_names(name):
            table.setdefault(typed, {})[name] = ""
    for name in cards.forms:
        family = re.fullmatch(r"(\w+)-(?:\d+GB|S|WS|MaxQ)", name)
        if family and family[1] not in cards.forms:
            for typed in short_names(family[1]):
                table.setdefault(typed, {})[name] = ""
    canonical = frozenset(table)
    for row in aliases:
        typed, form = typed_key(row["alias"])
        if row["vendor"] in NOT_TYPED or typed in canonical:
            continue
        meant = (
            [row["canonical_name"]]
            if row["canonical_name"] in cards.forms
            else cards.sized(row["canonical_name"])
        )
        fixed = row["form_factor"] if not form and len(cards.forms[meant[0]]) > 1 else ""
        for name in meant:
            for key in {typed, typed.removeprefix("rtx")} - canonical:
                table.setdefault(key, {})[name] = fixed.replace("unstated", "")
    return [
        {"typed": typed, "name": name, "made_as": " ".join(cards.forms[name]), "form": form}
        for typed, names in table.items()
        for name, form in names.items()
    ]


def short_names(name: str) -> Iterator[str]:
    """RTX4090 is also 4090, A100-80GB also A100-80. QuadroRTX6000 is not RTX 6000: three cards could be."""
    plain, _ = typed_key(name)
    yield plain
    if plain.startswith("rtx"):
        yield plain.removeprefix("rtx")
    if re.search(r"\d+GB$", name):
        yield plain.removesuffix("gb")
        yield plain.removesuffix("b")


# --- Fees -------------------------------------------------------------------------------------------------

# One name a concept, whatever the provider calls the product: what the config overrides is named alike.
RENAMED = {
    ("aws", "ebs_gp3_usd_per_gb_month"): "storage_running_usd_per_gb_month",
    ("aws", "efs_standard_usd_per_gb_month"): "network_volume_usd_per_gb_month",
    ("lambda", "filesystem_usd_per_gb_month"): "network_volume_usd_per_gb_month",
}
UNITS = {
    "_usd_per_gb": ("USD/GB", "USD/GiB"),
    "_usd_per_gb_month": ("USD/GB-month", "USD/GiB-month"),
    "_usd_per_core_second": ("USD/core-s",),
    "_usd_per_gib_second": ("USD/GiB-s",),
    "_usd_per_hour": ("USD/h",),
    "_usd_per_month": ("USD",),
    "_usd_per_1000": ("USD/1000",),
    "_usd_per_million": ("USD/1e6",),
    "_usd_per_kwh": ("USD/kWh",),
    "_usd": ("USD",),
    "_s": ("s",),
    "_hours": ("h",),
    "_gb_per_month": ("GB",),
    "_multiplier": ("x",),
    "_included_gib": ("GiB",),
    "_gib_per_ram_gib": ("GiB/GiB",),
}
REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
# The labels of AWS's Spot Advisor; "" = none.
ADVISOR_BANDS = ("", "<5%", "5-10%", "10-15%", "15-20%", ">20%")


@dataclass(frozen=True)
class Dates:
    """Checks that need to know what day it is."""

    today: date

    def check(self, text: str) -> str:
        """An ISO date, perhaps without day or month, that is not in the future; empty = undated."""
        if text:
            try:
                day = date.fromisoformat(f"{text}-01-01"[:10] if len(text) == 4 else f"{text}-01"[:10])
            except ValueError:
                raise ValueError(f"as_of {text!r} is not a date") from None
            if day > self.today:
                raise ValueError(f"as_of {text} is in the future")
        return text

    def parse_fee(self, row: Row) -> Row:
        """A fee, as packaged: rows that disagree, and rows without a figure, are kept for people to see."""
        stated(row, "item", "unit", "source", "status")
        one_of(row["provider"], "provider", PROVIDERS)
        self.check(row["as_of"])
        if row["status"] != CONFLICT and trust(row["status"]) is None:
            raise ValueError(f"status {row['status']!r} is not known")
        check_unit(row)
        check_value(row)
        if row["status"] == CONFLICT and not row["value"]:
            raise Refused(f"{row['provider']} {row['item']}: a claim without a figure")
        item = RENAMED.get((row["provider"], row["item"]), row["item"])
        named = re.match(r"(broad|narrow) ", row["region"])
        note = [row["note"], f"the product is {row['item'].split('_usd')[0]}" if item != row["item"] else ""]
        if not REGION.fullmatch(row["region"]) and row["region"] not in ("", "all"):
            note.insert(0, row["region"])
        return {
            **row,
            "item": f"{item}_{named[1]}" if named else item,
            "region": row["region"] if REGION.fullmatch(row["region"]) else "",
            "note": "; ".join(part for part in note if part),
        }

    def parse_startup(self, row: Row) -> Row:
        """What is billed before useful work, as packaged."""
        stated(row, "source", "status")
        one_of(row["provider"], "provider", PROVIDERS)
        one_of(row["market"], "market", ("", *MARKETS))
        whole(row["billed_startup_s"], "billed_startup_s", 0, 3600)
        self.check(row["as_of"])
        if trust(row["status"]) is None:
            raise ValueError(f"status {row['status']!r} is not known")
        return row

    def parse_hazard(self, row: Row) -> Row:
        """How often a market takes a node away before anything was seen of it, as packaged."""
        stated(row, "source", "status", "as_of")
        one_of(row["provider"], "provider", ("", *PROVIDERS))
        one_of(row["market"], "market", MARKETS)
        one_of(row["band"], "band", ADVISOR_BANDS)
        self.check(row["as_of"])
        if trust(row["status"]) is None:
            raise ValueError(f"status {row['status']!r} is not known")
        for column in ("shape", "hours"):
            if not is_figure(row[column]) or not Decimal(row[column]):
                raise ValueError(f"{column} {row[column]!r} is not a figure above zero")
        if not Decimal("0.00001") <= Decimal(row["shape"]) / Decimal(row["hours"]) <= 3:
            raise ValueError(f"{row['shape']} in {row['hours']} h is not believable")
        ages = [row[column] for column in ("first_hour", "to_4_h", "later")]
        if any(ages) and not all(is_figure(age) and Decimal("0.01") <= Decimal(age) <= 20 for age in ages):
            raise ValueError(f"ages {' '.join(ages)} are not three factors")
        return row


def check_unit(row: Row) -> None:
    """The unit must be what the item's name says, and that of the tiers, too."""
    suffix = max((s for s in UNITS if row["item"].endswith(s)), key=len, default="")
    if row["unit"] not in UNITS.get(suffix, ()):
        raise ValueError(f"unit {row['unit']!r} does not fit {row['item']}")
    tiers = row["tier_from"], row["tier_to"]
    if any(text and not is_figure(text) for text in tiers) or (row["tier_to"] and not row["tier_from"]):
        raise ValueError(f"tier {'..'.join(tiers)} is not a range")
    if all(tiers) and Decimal(row["tier_to"]) <= Decimal(row["tier_from"]):
        raise ValueError(f"tier {'..'.join(tiers)} is empty")
    if bool(row["tier_from"]) != bool(row["tier_unit"]):
        raise ValueError("a tier and its unit go together")
    if row["tier_unit"]:
        counted = {"USD/1e6": "million"}.get(row["unit"], row["unit"].partition("/")[2].partition("-")[0])
        if row["tier_unit"].split()[0] != counted:
            raise ValueError(f"tier in {row['tier_unit']}, unit {row['unit']}")


def check_value(row: Row) -> None:
    """One figure; nothing or a range only where that is what is known."""
    if is_figure(row["value"]):
        if Decimal(row["value"]) > 1000:
            raise ValueError(f"value {row['value']} is beyond belief")
    elif row["value"] and not (row["status"] == CONFLICT and re.fullmatch(r"[\d.]+-[\d.]+", row["value"])):
        raise ValueError(f"value {row['value']!r} is not a figure")


def gaps(fees: Iterable[Row]) -> Iterator[str]:
    """Tiers of one fee must follow one another."""
    tiers: dict[tuple[str, str, str], list[Row]] = {}
    for row in fees:
        if row["tier_from"]:
            tiers.setdefault((row["provider"], row["item"], row["region"]), []).append(row)
    for key, rows in tiers.items():
        rows.sort(key=lambda row: Decimal(row["tier_from"]))
        for row, following in itertools.pairwise(rows):
            if row["tier_to"] != following["tier_from"]:
                yield f"fees {' '.join(key)}: nothing between {row['tier_to']} and {following['tier_from']}"


# --- Prices -----------------------------------------------------------------------------------------------

MARKET_WORDS: dict[str, str] = {"on-demand": "on_demand", **{market: market for market in MARKETS}}
CLOUDS = {"secure-cloud": "secure", "community-cloud": "community"}
# An availability zone id begins with its region's: use1-az4, or use1-atl2-az1 for a local zone.
ZONE_PREFIXES = {
    "use1": "us-east-1",
    "use2": "us-east-2",
    "usw1": "us-west-1",
    "usw2": "us-west-2",
    "cac1": "ca-central-1",
    "sae1": "sa-east-1",
    "euc1": "eu-central-1",
    "eun1": "eu-north-1",
    "euw1": "eu-west-1",
    "euw2": "eu-west-2",
    "euw3": "eu-west-3",
    "apne1": "ap-northeast-1",
    "apne2": "ap-northeast-2",
    "aps1": "ap-south-1",
    "apse1": "ap-southeast-1",
    "apse2": "ap-southeast-2",
}
# Vast's dph_total holds this much disk unless more is asked for; min_bid holds none.
VAST_DISK_GB = 8
IDENTITY = ("provider", "sku", "gpu", "form_factor", "gpu_count", "market", "region", "zone", "cloud")


@dataclass(frozen=True)
class PriceRows:
    """Parses the public price book's rows into the packaged columns."""

    cards: Cards
    dates: Dates

    def parse(self, row: Row) -> Row:
        """One list price, as packaged, before the counts and regions it stands for are written out."""
        if row["gpu"] == "A100-mixedVRAM":
            raise Refused(f"{row['sku']}: 40 or 80 GB is not said, a quote for either could be wrong")
        stated(row, "sku", "source")
        provider = one_of(row["provider"], "provider", PROVIDERS)
        gpu = one_of(row["gpu"], "gpu", self.cards.forms)
        form = self.cards.settle(gpu, one_of(row["form_factor"], "form factor", FORMS))
        if form != "unstated" and form not in self.cards.forms[gpu]:
            raise ValueError(f"{gpu} is not made as {form}")
        count = whole(row["gpu_count"], "gpu_count", 1, 16)
        market = MARKET_WORDS[one_of(row["market"], "market", MARKET_WORDS)]
        if row["as_of"] and len(self.dates.check(row["as_of"])) != 10:
            raise ValueError(f"as_of {row['as_of']} names no day")
        check_published(row)
        # The GPU comes first: a quote skips the lines of other cards by their first word.
        return {
            "gpu": gpu,
            "form_factor": form,
            "provider": provider,
            "sku": self.cards.vast_name(gpu, form) if provider == "vast" else row["sku"],
            "gpu_count": row["gpu_count"],
            "vram_gib": self._vram_gib(row, gpu, form),
            "market": market,
            **place(provider, row["region"]),
            "usd_per_hour": usd_text(believable(row["usd_per_hour"], count)),
            "billing_increment_s": str(whole(row["billing_increment_s"], "billing_increment_s", 1, 3600)),
            "minimum_s": minimum_s(row, market),
            "disk_included_gb": str(VAST_DISK_GB if provider == "vast" and market == "on_demand" else 0),
            "disk_max_gb": "",
            "cpu_usd_per_core_hour": "",
            "ram_usd_per_gib_hour": "",
            "as_of": row["as_of"],
            "source": row["source"],
            "note": row["note"],
        }

    def _vram_gib(self, row: Row, gpu: str, form: str) -> str:
        known = {
            gib
            for (name, made), gib in self.cards.vram_gib.items()
            if name == gpu and form in (made, "unstated")
        }
        vram_gib = whole(row["vram_gib_per_gpu"], "vram_gib_per_gpu", 1, 1000)
        nearest = min(known, key=lambda gib: abs(gib - vram_gib))
        near(vram_gib, nearest, f"vram of {gpu} {form}")
        return str(nearest)


def believable(text: str, count: int) -> Decimal:
    """USD an hour for the whole offer, or ValueError."""
    usd = parse_usd(text)
    low, high = BELIEVABLE_USD
    if not low <= usd / count <= high:
        raise ValueError(f"${usd / count:f} a GPU-hour is not believable")
    return usd


def check_published(row: Row) -> None:
    """Where the note gives the price per second as published, the hour must follow from it."""
    published = re.search(r"published as ([\d.]+) USD(?: per GPU-second|/s)", row["note"])
    if published:
        hour = parse_usd(published[1], per_hour_factor=3600 * int(row["gpu_count"]))
        if hour != parse_usd(row["usd_per_hour"]):
            raise ValueError(f"{published[0]} is ${hour} an hour, not {row['usd_per_hour']}")


def minimum_s(row: Row, market: str) -> str:
    """What is billed at least; of a reserved term, all of it."""
    if market != "reserved":
        return str(whole(row["minimum_s"], "minimum_s", 0, DAY_S))
    term = re.search(r"/(\d)yr$", row["sku"])
    if not term:
        raise ValueError(f"the term of {row['sku']} is not stated")
    return str(int(term[1]) * 365 * DAY_S)


def place(provider: str, text: str) -> Row:
    """Region, zone and cloud from the one column that the public table has for them."""
    if provider == "aws":
        zone_id = re.fullmatch(r"([a-z]+\d)(-[a-z]+\d+)?-az\d+", text)
        zone_name = re.fullmatch(rf"({REGION.pattern})[a-z]", text)
        if zone_id:
            region = ZONE_PREFIXES[one_of(zone_id[1], "zone prefix", ZONE_PREFIXES)]
        elif zone_name:
            region = zone_name[1]
        elif REGION.fullmatch(text):
            return {"region": text, "zone": "", "cloud": ""}
        else:
            raise ValueError(f"region {text!r} is not known")
        return {"region": region, "zone": text, "cloud": ""}
    if provider == "runpod":
        cloud = CLOUDS[one_of(text, "region", CLOUDS)] if text else ""
        return {"region": "", "zone": "", "cloud": cloud}
    if provider == "lambda" and text == "all regions (one price)":
        text = ""
    if text and not (provider == "vast" and re.fullmatch(r"[A-Z]{2}", text)):
        raise ValueError(f"region {text!r} is not known")
    return {"region": text, "zone": "", "cloud": ""}


def newest(rows: Iterable[Row], report: Report) -> list[Row]:
    """Of the rows for the same thing the newest; a dated one before one without a date."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[column] for column in IDENTITY)
        older, newer = sorted((best.get(key, row), row), key=lambda r: r["as_of"])
        if older is not newer:
            if older["as_of"] == newer["as_of"]:
                report.broken.append(f"prices: {' '.join(key)} twice on {row['as_of']}")
            was, now = (f"${r['usd_per_hour']} of {r['as_of'] or 'no date'}" for r in (older, newer))
            report.refused.append(f"pricebook.csv: {' '.join(filter(None, key))}: {was} superseded by {now}")
        best[key] = newer
    return list(best.values())


def parse_disk(row: Row) -> Row:
    """The local SSD of one of Lambda's instance types, as its API states it."""
    stated(row, "sku", "source")
    whole(row["storage_gib"], "storage_gib", 100, 100_000)
    return row


def with_disks(rows: Iterable[Row], disks: Iterable[Row], report: Report) -> list[Row]:
    """Lambda's rows with the local SSD that their price includes; there is no larger one to rent."""
    known = {row["sku"]: str(int(row["storage_gib"]) * 2**30 // 10**9) for row in disks}
    rows = list(rows)
    skus = {row["sku"] for row in rows if row["provider"] == "lambda"}
    report.unknown += [f"the disk of lambda {sku}" for sku in sorted(skus - known.keys())]
    report.broken += [f"lambda_disks: {sku} has no price" for sku in sorted(known.keys() - skus)]
    return [
        {**row, "disk_included_gb": known[row["sku"]], "disk_max_gb": known[row["sku"]]}
        if row["provider"] == "lambda" and row["sku"] in known
        else row
        for row in rows
    ]


@dataclass(frozen=True)
class ModalFees:
    """What Modal bills beside the GPU, and by how much a region makes it all dearer."""

    cpu_usd_per_core_hour: Decimal
    ram_usd_per_gib_hour: Decimal
    multipliers: Mapping[str, Decimal]
    as_of: str

    @classmethod
    def of(cls, fees: Iterable[Row]) -> ModalFees:
        """Sandbox rates: jobs run in sandboxes, and those cost three times what functions do."""
        rows = {row["item"]: row for row in fees if row["provider"] == "modal"}
        broad = Decimal(rows["region_multiplier_broad"]["value"])
        narrow = Decimal(rows["region_multiplier_narrow"]["value"])
        return cls(
            cpu_usd_per_core_hour=Decimal(rows["cpu_sandbox_usd_per_core_second"]["value"]) * 3600,
            ram_usd_per_gib_hour=Decimal(rows["ram_sandbox_usd_per_gib_second"]["value"]) * 3600,
            multipliers={"": Decimal(1), "us": broad, "eu": broad, "us-east": narrow},
            as_of=min(rows["region_multiplier_broad"]["as_of"], rows["region_multiplier_narrow"]["as_of"]),
        )


def expand(rows: Iterable[Row], modal: ModalFees, report: Report) -> list[Row]:
    """Prices per GPU written out for every count, and Modal's for every region."""
    rows = list(rows)
    singles = {(row["provider"], row["sku"], row["market"]): row for row in rows if row["gpu_count"] == "1"}
    prices = []
    for row in rows:
        if row["provider"] == "runpod" and row["market"] == "on_demand":
            prices += [times(row, count) for count in range(1, MAX_GPUS + 1)]
        elif row["provider"] != "modal":
            prices.append(row)
        elif row["gpu_count"] == "1":
            prices += modal_rows(row, modal)
        else:
            single = singles[row["provider"], row["sku"].partition(":")[0], row["market"]]
            if times(single, int(row["gpu_count"]))["usd_per_hour"] != row["usd_per_hour"]:
                report.broken.append(f"prices: modal {row['sku']} is not the price of one times the count")
    return prices


def times(row: Row, count: int, multiplier: Decimal = Decimal(1)) -> Row:
    """The row of one GPU for several, rounded once."""
    usd = round_usd(Decimal(row["usd_per_hour"]) * count * multiplier)
    return {**row, "gpu_count": str(count), "usd_per_hour": usd_text(usd)}


def modal_rows(row: Row, modal: ModalFees) -> Iterator[Row]:
    """A GPU of Modal for every count and region; a region makes GPU, CPU and RAM dearer alike."""
    for count in range(1, (4 if row["sku"] == "A10" else MAX_GPUS) + 1):
        for region, multiplier in modal.multipliers.items():
            yield {
                **times(row, count, multiplier),
                "sku": row["sku"] if count == 1 else f"{row['sku']}:{count}",
                "region": region,
                "cpu_usd_per_core_hour": usd_text(round_usd(modal.cpu_usd_per_core_hour * multiplier)),
                "ram_usd_per_gib_hour": usd_text(round_usd(modal.ram_usd_per_gib_hour * multiplier)),
                "as_of": min(row["as_of"], modal.as_of) if region else row["as_of"],
            }


# --- The command ------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """0 when every row was good (and, with --check, every file is up to date)."""
    parser = argparse.ArgumentParser(description="Build and check the tables in gpubroker/data.")
    parser.add_argument("shared", type=Path, help="the directory with the public price tables")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--today", type=date.fromisoformat, default=SystemClock().now().date())
    options = parser.parse_args(arguments)
    files, report = build(options.shared, options.today)
    for line in report.refused:
        print(f"left out: {line}")
    for line in report.broken:
        print(f"BROKEN: {line}")
    for line in report.unknown:
        print(f"not known: {line}")
    for name, count in report.counts.items():
        print(f"{name}: {count} rows")
    if report.broken:
        return 1
    stale = [name for name, text in files.items() if not is_current(PACKAGED / name, text)]
    if options.check:
        print(f"out of date: {', '.join(stale)}" if stale else "up to date")
        return 1 if stale else 0
    for name in stale:
        (PACKAGED / name).write_text(files[name], encoding="utf-8", newline="\n")
        print(f"written: {name}")
    return 0


def is_current(path: Path, text: str) -> bool:
    """Whether the file holds exactly this."""
    return path.exists() and path.read_bytes() == text.encode()


if __name__ == "__main__":
    sys.exit(main())
