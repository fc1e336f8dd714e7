"""`gpubroker jobs`: every job in a row, with what it does, what it costs and what it has saved."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from typing import Any

import click
from rich.text import Text

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.render import age, console, dollars, fitted, iso, plain, print_csv, print_json, say
from gpubroker.doors import SystemClock
from gpubroker.prices.market import open_context
from gpubroker.run.events import Event
from gpubroker.run.leases import alive
from gpubroker.run.overview import Standing, look, rate_of

# How long a job that is over stays in the list.
_SHOWN_AFTER = timedelta(days=1)
_CSV = (
    "id", "state", "stage", "reason", "waits_for", "provider", "node", "market", "gpu", "submitted",
    "started", "ended", "usd", "budget_usd", "usd_per_hour", "last_checkpoint", "unattended",
)  # fmt: skip


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker jobs
  gpubroker jobs --all --format json""",
)
@click.option("--all", "is_all", is_flag=True, help="Also those that were over before yesterday.")
@format_option("table", "json", "csv")
def jobs(*, is_all: bool, output: str) -> None:
    """Jobs under way, stopped, or over since yesterday: the newest first.

    Boxes are not among them: gpubroker boxes.
    """
    clock = SystemClock()
    with open_context(config.load(), os.environ, clock) as (store, _):
        now = clock.now()
        found = look(store.database, over_since=None if is_all else now - _SHOWN_AFTER)
        supervisors = alive(store.database)
    if output == "json":
        print_json({"jobs": [job_line(one, now) for one in found], "supervisors": supervisors})
    elif output == "csv":
        rows = (job_line(one, now) for one in found)
        print_csv(_CSV, ([row[name] for name in _CSV] for row in rows))
    elif not found:
        say(
            "No job: gpubroker submit job.toml"
            if is_all
            else "No job now: gpubroker jobs --all shows older ones."
        )
    else:
        _print(found, now)
        if not supervisors and any(one.row.unattended and one.row.state == "running" for one in found):
            say("NO SUPERVISOR RUNS: gpubroker supervise, or gpubroker service install for good.")


def job_line(one: Standing, now: datetime) -> dict[str, Any]:
    """As scripts read it. Money is a decimal string; null is what is not (yet)."""
    row, node, budget_usd = one.row, one.node, one.spec.limits.budget_usd
    return {
        "id": row.id,
        "state": row.state,
        "stage": one.stage,
        "reason": row.reason,
        "waits_for": one.waits_for,
        "provider": None if node is None else node.provider,
        "node": None if node is None else node.node_id,
        "market": None if node is None else node.market,
        "gpu": one.gpu,
        "submitted": iso(row.created_at),
        "started": iso(one.started_at),
        "ended": iso(row.ended_at),
        "usd": f"{one.usd(now):.6f}",
        "budget_usd": None if budget_usd is None else f"{budget_usd:f}",
        "usd_per_hour": f"{rate_of(node):f}",
        "last_checkpoint": iso(one.saved_at),
        "last_event": None if one.event is None else event_record(one.event),
        "unattended": row.unattended,
        "supervisor": row.supervisor_id if one.is_claimed else None,
    }


def event_record(event: Event) -> dict[str, Any]:
    """As scripts read it."""
    return {"id": event.id, "at": iso(event.at), "job": event.job_id, "kind": event.kind, "text": event.text}


def where(one: Standing) -> str:
    """What it runs on, waits for, or why it ended."""
    if one.node is not None:
        return f"{one.node.provider} {one.node.market.replace('_', '-')}"
    return f"for {one.waits_for}" if one.waits_for else one.row.reason


def _print(found: list[Standing], now: datetime) -> None:
    rows = [
        [
            one.row.id,
            one.stage.replace("_", " "),
            plain(where(one)),
            one.gpu,
            ago(one.started_at, now),
            dollars(one.usd(now)),
            "" if one.spec.limits.budget_usd is None else dollars(one.spec.limits.budget_usd),
            ago(one.saved_at, now),
            "" if one.event is None else f"{one.event.kind.replace('_', ' ')} {ago(one.event.at, now)}",
        ]
        for one in found
    ]
    names = ("job", "state", "on", "GPU", "began", "cost", "of", "saved", "last event")
    out = console()
    made = fitted(
        names,
        [[Text(cell) for cell in row] for row in rows],
        flexible=("on", "GPU", "last event"),
        right=("cost", "of"),
        width=out.width,
    )
    out.print(made)


def ago(moment: datetime | None, now: datetime) -> str:
    """How long ago; nothing for what never was."""
    return "" if moment is None else f"{age(moment, now)} ago"
