"""`gpubroker cost`: what was spent, in groups that add up, and what is left of the day's cap."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, get_args

import click

from gpubroker import config
from gpubroker.cli.options import Duration, format_option
from gpubroker.cli.render import console, dollars, iso, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.market import open_context
from gpubroker.run.costs import By, Spent, spent, total
from gpubroker.run.records import Records

_CSV = ("nodes", "node_hours", "usd", "usd_estimated", "usd_settled")


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker cost
  gpubroker cost job-1a2b3c --by day
  gpubroker cost --since 7d --by provider --format csv""",
)
@click.argument("job_id", metavar="[JOB]", required=False)
@click.option("--since", type=Duration(), help="Only what was spent in so long: 7d, 12h.  [default: ever]")
@click.option("--by", type=click.Choice(get_args(By)), default="job", show_default=True, help="In groups.")
@format_option("table", "json", "csv")
def cost(*, job_id: str | None, since: int | None, by: By, output: str) -> None:
    """What nodes have cost: the vendor's own figure where it is known, else our estimate. Days are UTC.

    Boxes are in it. `gpubroker job settle` asks the vendors for their figures.
    """
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, _):
        records, now = Records(store.database, clock), clock.now()
        if job_id is not None and records.row(job_id) is None:
            raise ConfigError(f"no job is called {job_id[:60]!r}")
        begin = None if since is None else now - timedelta(seconds=since)
        attempts = records.attempts_since(begin, job_id)
        today_usd = records.usd_today(now)
    groups = spent(attempts, by, now, begin)
    added = total(groups, attempts)
    if output == "json":
        _print_json(groups, added, by, begin, today_usd, settings.usd_per_day)
    elif output == "csv":
        rows = ((name, _record(one)) for name, one in groups.items())
        print_csv((by, *_CSV), ([name, *(row[column] for column in _CSV)] for name, row in rows))
    else:
        _print(groups, added, by)
        cap = settings.usd_per_day
        of = "" if cap is None else f" of the {dollars(cap)} that a day may cost"
        say(f"Today all jobs together: {dollars(today_usd)}{of}.")


def _record(one: Spent) -> dict[str, Any]:
    return {
        "nodes": one.nodes,
        "node_hours": f"{one.node_h:.4f}",
        "usd": f"{one.usd:.6f}",
        "usd_estimated": f"{one.usd_estimated:.6f}",
        "usd_settled": f"{one.usd_settled:.6f}",
    }


def _print_json(
    groups: dict[str, Spent],
    added: Spent,
    by: By,
    begin: datetime | None,
    today_usd: Decimal,
    cap: Decimal | None,
) -> None:
    print_json(
        {
            "by": by,
            "since": iso(begin),
            "groups": [{by: name, **_record(one)} for name, one in groups.items()],
            "total": _record(added),
            "today": {"usd": f"{today_usd:.6f}", "cap_usd": None if cap is None else f"{cap:f}"},
        }
    )


def _print(groups: dict[str, Spent], added: Spent, by: By) -> None:
    if not groups:
        say("Nothing was spent.")
        return
    right = ("nodes", "node hours", "estimated", "settled", "cost")
    made = table(by, *right, right=right)
    for name, one in groups.items():
        made.add_row(name, *_cells(one))
    if len(groups) > 1:
        made.add_section()
        made.add_row("total", *_cells(added))
    console().print(made)


def _cells(one: Spent) -> tuple[str, ...]:
    settled = dollars(one.usd_settled) if one.usd_settled else ""
    return str(one.nodes), f"{one.node_h:.2f}", dollars(one.usd_estimated), settled, dollars(one.usd)
