"""`gpubroker offers`: what is on offer right now, by the hour; `--gpus` lists the cards that are known."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import filter_options, format_option
from gpubroker.cli.render import age, console, dollars, iso, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.gpus import GpuRequest, catalogue
from gpubroker.model import Gpu, Market, Priced
from gpubroker.money import usd_text
from gpubroker.plan.rank import Ask, list_price_text, merge, why_not
from gpubroker.plan.work import Work
from gpubroker.prices import book, market


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker offers --gpu h100 --count 8 --market spot
  gpubroker offers --provider lambda --format csv
  gpubroker offers --gpus""",
)
@filter_options
@click.option("--top", type=click.IntRange(1, 100_000), default=30, help="Rows of the table; 30 unless told.")
@click.option("--gpus", "list_gpus", is_flag=True, help="The canonical GPUs with their figures, instead.")
@format_option("table", "json", "csv")
def offers(
    *,
    gpus: tuple[GpuRequest, ...],
    count: int,
    markets: tuple[Market, ...],
    providers: tuple[str, ...],
    regions: tuple[str, ...],
    min_vram: int | None,
    verified: bool,
    top: int,
    list_gpus: bool,
    output: str,
) -> None:
    """Stored offers and list prices, cheapest a GPU first. Asks no vendor: `gpubroker poll` does."""
    if list_gpus:
        _print_gpus(output)
        return
    settings = config.load()
    clock = SystemClock()
    ask = Ask(
        work=Work(hours=Decimal(1), disk_gb=Decimal(0)),
        gpus=gpus,
        gpu_count=count,
        markets=markets,
        providers=providers,
        regions=regions,
        min_vram_gib=min_vram,
        verified_only=verified,
    )
    names = frozenset().union(*(g.names for g in gpus)) if gpus else None
    wish = market.Wish(names=names, providers=frozenset(providers), verified_only=verified)
    view = market.view(settings, wish, max_age_s=0, offline=True, clock=clock)
    rows, _ = merge(view.live, book.load(names), view.covered)
    found = sorted((p for p in rows if why_not(p.offer, ask) is None), key=lambda p: p.offer.usd_per_gpu_hour)
    if output == "json":
        print_json({"offers": [_record(p) for p in found]})
    elif output == "csv":
        records = [_record(p) for p in found]
        print_csv(list(_record_names()), ([r[n] for n in _record_names()] for r in records))
    else:
        _print_table(found, top, clock.now())


def _print_table(found: list[Priced], top: int, now: Any) -> None:
    made = table(
        "provider", "GPU", "market", "region", "$/h", "$/GPU-h", "stock", "price", right=("$/h", "$/GPU-h")
    )
    for priced in found[:top]:
        offer = priced.offer
        form = "" if offer.form_factor == "unstated" else f" {offer.form_factor}"
        made.add_row(
            offer.provider,
            f"{offer.gpu_count}x {offer.gpu}{form}",
            offer.market.replace("_", "-"),
            offer.zone or offer.region or offer.cloud or "any",
            dollars(offer.usd_per_hour),
            dollars(offer.usd_per_gpu_hour),
            offer.stock,
            f"{age(priced.as_of, now)} old" if priced.live else list_price_text(priced),
        )
    console().print(made)
    if len(found) > top:
        say(f"{len(found) - top} more: --top {len(found)} shows all")


def _record_names() -> tuple[str, ...]:
    return (
        "provider", "sku", "gpu", "form_factor", "gpu_count", "vram_gib", "market", "preemptible", "region",
        "zone", "cloud", "machine_id", "host_id", "listing_id", "usd_per_hour", "billing_increment_s",
        "minimum_s", "disk_included_gb", "storage_usd_per_gb_month", "egress_usd_per_gb",
        "ingress_usd_per_gb", "verified", "reliability", "stock", "as_of", "source", "live",
    )  # fmt: skip


def _record(priced: Priced) -> dict[str, Any]:
    """Flat, so that JSON and CSV have the same fields."""
    values: dict[str, Any] = {}
    for name in _record_names():
        value = getattr(priced if name in ("as_of", "source", "live") else priced.offer, name)
        if name == "as_of":
            value = iso(value)
        elif isinstance(value, Decimal):
            value = usd_text(value) if "usd" in name else f"{value:f}"
        values[name] = value
    return values


def _print_gpus(output: str) -> None:
    names = (
        "name", "form_factor", "vram_gib", "architecture", "compute_capability", "memory_bandwidth_gb_s",
        "bf16_dense_tflops", "tdp_w",
    )  # fmt: skip

    def text(gpu: Gpu, name: str) -> str:
        value = getattr(gpu, name)
        return "" if value is None else str(value)

    rows = [[text(gpu, name) for name in names] for gpu in catalogue().values()]
    if output == "json":
        print_json({"gpus": [dict(zip(names, row, strict=True)) for row in rows]})
    elif output == "csv":
        print_csv(names, rows)
    else:
        made = table(
            "GPU",
            "form",
            "GiB",
            "architecture",
            "compute",
            "GB/s",
            "bf16 TFLOPS",
            "W",
            right=("GiB", "GB/s", "bf16 TFLOPS", "W"),
        )
        for row in rows:
            made.add_row(*row)
        console().print(made)
