"""The price book: dated list prices shipped in the package, for vendors that no poll has seen.

Read inside a process that starts cold and should answer at once: lines of other GPUs are skipped before
anything is converted.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import cast

from gpubroker.gpus import data_path
from gpubroker.model import FormFactor, Market, Offer, Priced


def load(names: Collection[str] | None = None) -> list[Priced]:
    """List prices of these canonical GPUs (None = all). `as_of` None means that the source has no date."""
    with open(data_path("pricebook.csv"), encoding="utf-8", newline="") as file:
        header, *lines = file.read().splitlines()
    columns = header.split(",")
    if names is not None:
        wanted = frozenset(names)
        lines = [line for line in lines if line[: line.index(",")] in wanted]
    return [_priced(dict(zip(columns, cells, strict=True))) for cells in csv.reader(lines)]


def _priced(row: Mapping[str, str]) -> Priced:
    market = cast(Market, row["market"])
    offer = Offer(
        provider=row["provider"],
        sku=row["sku"],
        gpu=row["gpu"],
        form_factor=cast(FormFactor, row["form_factor"]),
        gpu_count=int(row["gpu_count"]),
        vram_gib=int(row["vram_gib"]),
        market=market,
        # Modal's GPU sandboxes are preemptible at their one price; RunPod's serverless workers are not.
        preemptible=market == "spot" or (market == "serverless" and row["provider"] == "modal"),
        region=row["region"],
        zone=row["zone"],
        cloud=row["cloud"],
        usd_per_hour=Decimal(row["usd_per_hour"]),
        billing_increment_s=int(row["billing_increment_s"]),
        minimum_s=int(row["minimum_s"]),
        disk_included_gb=int(row["disk_included_gb"]),
        cpu_usd_per_core_hour=_amount(row["cpu_usd_per_core_hour"]),
        ram_usd_per_gib_hour=_amount(row["ram_usd_per_gib_hour"]),
        disk_max_gb=int(row["disk_max_gb"]) if row["disk_max_gb"] else None,
        details={"note": row["note"]} if row["note"] else {},
    )
    return Priced(offer=offer, source=row["source"], as_of=_day(row["as_of"]), live=False)


def _amount(text: str) -> Decimal | None:
    return Decimal(text) if text else None


def _day(text: str) -> datetime | None:
    return datetime.fromisoformat(text).replace(tzinfo=UTC) if text else None
