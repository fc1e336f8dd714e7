"""`gpubroker providers`: what each provider can do right now and what is missing."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.render import age, console, iso, print_csv, print_json, table
from gpubroker.config import Settings
from gpubroker.doors import SystemClock
from gpubroker.errors import BrokerError
from gpubroker.guard import guarded
from gpubroker.prices.market import open_context
from gpubroker.prices.store import Store
from gpubroker.provider import ProviderContext, names

_COLUMNS = ("provider", "prices", "missing", "without", "last_poll", "offers", "problem")


@click.command(
    epilog="Example: gpubroker providers --format json", context_settings={"max_content_width": 100}
)
@format_option("table", "json", "csv")
def providers(*, output: str) -> None:
    """Every installed provider: live prices or the price book, its last poll, and what to set."""
    settings = config.load()
    clock = SystemClock()
    with open_context(settings, os.environ, clock) as (store, context):
        rows = [_row(name, settings, store, context) for name in names()]
    _print(rows, output, clock.now())


def _row(name: str, settings: Settings, store: Store, context: ProviderContext) -> dict[str, Any]:
    last = store.last_poll(name)
    row: dict[str, Any] = {
        "provider": name,
        "prices": "disabled" if name in settings.disabled_providers else "live",
        "missing": "",
        "without": "",
        "last_poll": last.observed_at if last else None,
        "offers": store.open_offers(name),
        "problem": (last.error or "") if last else "",
    }
    try:
        access = guarded(name, context).access()
    except BrokerError as error:
        return row | {"prices": "unusable", "problem": str(error)}
    if access.missing:
        row |= {"missing": access.missing, "without": access.without}
        if not access.live_without and row["prices"] == "live":
            row["prices"] = "price book"
    return row


def _print(rows: list[dict[str, Any]], output: str, now: datetime) -> None:
    if output == "json":
        print_json({"providers": [row | {"last_poll": iso(row["last_poll"])} for row in rows]})
        return
    if output == "csv":
        print_csv(_COLUMNS, ([iso(r[n]) if n == "last_poll" else r[n] for n in _COLUMNS] for r in rows))
        return
    made = table(
        "provider", "prices", "not set", "without it", "last poll", "offers", "problem", right=("offers",)
    )
    for row in rows:
        made.add_row(
            row["provider"],
            row["prices"],
            row["missing"],
            row["without"],
            f"{age(row['last_poll'], now)} ago" if row["last_poll"] else "never",
            str(row["offers"]),
            row["problem"],
        )
    console().print(made)
