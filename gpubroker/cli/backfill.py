"""`gpubroker backfill`: a vendor's own record of its past prices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timedelta

import click

from gpubroker import config
from gpubroker.cli.bars import progress
from gpubroker.cli.options import GpuName, Lower, format_option
from gpubroker.cli.render import console, plain, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.prices.backfill import Filled, backfill
from gpubroker.prices.market import open_context
from gpubroker.prices.store import Store
from gpubroker.provider import PriceHistory, load

_FAILED = 4
_REGIONS_S = 30.0
_COLUMNS = ("region", "rows", "added", "already_there", "skipped", "error")


@click.command(
    name="backfill",
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker backfill aws
  gpubroker backfill aws --gpu h100 --gpu a100 --region us-east-1 --days 30
  gpubroker history --data imported --provider aws --gpu h100 --since 90d""",
)
@click.argument("provider", type=Lower())
@click.option("--gpu", "gpus", type=GpuName(), multiple=True, help="Only this GPU. Repeat for several.")
@click.option("--region", "regions", multiple=True, help="Only this one.  [default: aws_regions, else all]")
@click.option("--days", type=click.IntRange(1), help="How far back.  [default: as far as the vendor goes]")
@format_option("table", "json", "csv")
def backfill_command(
    *, provider: str, gpus: tuple[GpuRequest, ...], regions: tuple[str, ...], days: int | None, output: str
) -> None:
    """Fetch what a vendor says its prices were: AWS's 90 days of spot by availability zone (aws).

    It joins the imported histories: gpubroker history --data imported shows it, and gpubroker now takes it
    for the time before your own polls. Run again it adds only what is new, and makes good what was cut off.
    It needs the vendor's account, and exits with 4 when a region failed.
    """
    names = frozenset().union(*(gpu.names for gpu in gpus)) if gpus else None
    clock = SystemClock()
    with open_context(config.load(), os.environ, clock) as (store, context):
        source = load(provider, context)
        if not isinstance(source, PriceHistory):
            raise ConfigError(f"{provider} does not tell what its prices were: aws does")
        if days is not None and days > source.past_days:
            raise click.UsageError(f"--days: {provider} goes back {source.past_days} days")
        now = clock.now()
        since = now - timedelta(days=days or source.past_days)
        known = source.past_regions(_REGIONS_S)
        if unknown := sorted(set(regions) - set(known)):
            raise ConfigError(f"--region {unknown[0]}: the account has {', '.join(known)}")
        found = _filled(store, provider, source, list(regions) or known, names, since, now)
    _print(found, output)
    if any(one.error for one in found):
        raise click.exceptions.Exit(_FAILED)


def _filled(
    store: Store,
    provider: str,
    source: PriceHistory,
    regions: Sequence[str],
    gpus: frozenset[str] | None,
    since: datetime,
    now: datetime,
) -> list[Filled]:
    """Region by region; the bar goes back in days within each."""
    found, days = [], max(1, (now - since).days)
    with progress() as bar:
        task = bar.add_task("", total=days * len(regions))
        for number, region in enumerate(regions):
            bar.update(task, description=f"{region}, in days", completed=days * number)

            def on_page(rows: int, oldest: datetime, number: int = number) -> None:
                back = min(days, max(0, (now - oldest).days))
                bar.update(task, completed=days * number + back)

            one = backfill(store.database, provider, source, region, gpus=gpus, since=since, on_page=on_page)
            found.append(one)
    return found


def _print(found: Sequence[Filled], output: str) -> None:
    rows = [
        {
            "region": one.region,
            "rows": one.rows,
            "added": one.added,
            "already_there": one.rows - one.added,
            "skipped": len(one.skipped),
            "error": one.error,
        }
        for one in found
    ]
    if output == "json":
        print_json({"regions": rows})
    elif output == "csv":
        print_csv(_COLUMNS, ([row[name] for name in _COLUMNS] for row in rows))
    else:
        right = ("rows", "added", "already there", "skipped")
        made = table("region", *right, right=right)
        for row in rows:
            made.add_row(
                str(row["region"]),
                *(f"{row[name]:,}" for name in ("rows", "added", "already_there", "skipped")),
            )
        console().print(made)
    reasons = {one.reason: one for filled in found for one in filled.skipped}
    for reason, one in sorted(reasons.items()):
        say(f"skipped, such as {plain(one.id)}: {plain(reason)}")
    for filled in found:
        if filled.error:
            say(f"{filled.region}: {plain(filled.error)}")
