"""`gpubroker job show`, `resume`, `settle`: what became of a job, going on with it, and its vendors' bill."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import click

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, dollars, iso, plain, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.market import open_context
from gpubroker.run.events import Event, Events
from gpubroker.run.records import Attempt, Records

Number = TypeVar("Number", int, Decimal)
_CSV = (
    "provider", "sku", "market", "node", "tag", "started", "ended", "end_reason", "usd_estimated",
    "usd_settled", "work_lost_s",
)  # fmt: skip
_SETTLED_CSV = ("job", "provider", "node", "tag", "ended", "usd_estimated", "usd_settled", "why_not")
_FAILED = 4
_MOST_EVENTS = 200


@click.group()
def job() -> None:
    """Jobs that were run or are running."""


@job.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker job show job-1a2b3c
  gpubroker job show job-1a2b3c --format json""",
)
@click.argument("job_id", metavar="ID")
@format_option("table", "json", "csv")
def show(*, job_id: str, output: str) -> None:
    """What became of a job: every node it had, what it lost, saved and cost. CSV has a row a node."""
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, _):
        records, now = Records(store.database, clock), clock.now()
        kept = records.job(job_id)
        if kept is None:
            raise ConfigError(f"no job is called {job_id[:60]!r}")
        found = job_record(job_id, kept[0], records, now)
        story = Events(store.database, clock).last(_MOST_EVENTS, job_id=job_id) if output == "table" else []
    if output == "json":
        print_json(found)
    elif output == "csv":
        print_csv(_CSV, ([one[name] for name in _CSV] for one in found["attempts"]))
    else:
        _print(found, kept[1])
        _print_story(story)


@job.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker job resume job-1a2b3c""",
)
@click.argument("job_id", metavar="ID")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Of a job of gpubroker run: where its artifacts go."
)
@format_option("table", "json")
def resume(*, job_id: str, out: Path | None, output: str) -> None:
    """A job that was stopped goes on unattended, from its last checkpoint.

    One of `gpubroker run` whose terminal is gone, too: its folder is copied as it is now. To see it through
    in a terminal: `gpubroker run --resume`.
    """
    from gpubroker.cli.submit import resume_unattended

    resume_unattended(job_id, out, output)


@job.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker job settle job-1a2b3c
  gpubroker job settle --format json""",
)
@click.argument("job_id", metavar="[ID]", required=False)
@format_option("table", "json", "csv")
def settle(*, job_id: str | None, output: str) -> None:
    """Ask the vendors what ended nodes have cost, of one job or of all, and keep their figures.

    vast.ai and RunPod report by the node; a figure is kept once it is complete, at RunPod after the hour in
    which the node ended. Elsewhere the estimate stays. Exits with 4 when a vendor did not answer.
    """
    from gpubroker.run.computes import computes
    from gpubroker.run.settle import settle as settle_attempts

    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, context):
        records = Records(store.database, clock)
        if job_id is not None and records.job(job_id) is None:
            raise ConfigError(f"no job is called {job_id[:60]!r}")
        attempts = records.unsettled(job_id)
        able, _ = computes(context, sorted({attempt.provider for attempt in attempts}))
        found, problems = settle_attempts(records, able, attempts)
        rows = [
            {**_attempt_record(one.attempt, clock.now()), "job": one.attempt.job_id, "why_not": one.why_not}
            for one in found
        ]
    _print_settled(rows, problems, output)
    if problems:
        raise click.exceptions.Exit(_FAILED)


def _print_settled(rows: list[dict[str, Any]], problems: Mapping[str, str], output: str) -> None:
    if output == "json":
        told = [{"provider": name, "reason": reason} for name, reason in problems.items()]
        print_json({"attempts": rows, "problems": told})
        return
    if output == "csv":
        print_csv(_SETTLED_CSV, ([row[name] for name in _SETTLED_CSV] for row in rows))
    elif not rows:
        say("Every ended node has its vendor's figure.")
    else:
        made = table("job", "node", "estimated", "settled", "", right=("estimated", "settled"))
        for row in rows:
            usd = row["usd_settled"]
            settled = "" if usd is None else dollars(Decimal(usd))
            estimated = dollars(Decimal(row["usd_estimated"]))
            made.add_row(row["job"], f"{row['provider']} {row['node']}", estimated, settled, row["why_not"])
        console().print(made)
    for name, reason in problems.items():
        say(f"{name}: {reason}")


def job_record(job_id: str, state: str, records: Records, now: datetime) -> dict[str, Any]:
    """The job as scripts read it. Money is a decimal string; null is what nobody knows (yet)."""
    attempts = [a for a in records.attempts(job_id) if a.node_id is not None]
    settled = _sum(Decimal(0), (a.usd_settled for a in attempts))
    return {
        "id": job_id,
        "state": state,
        "attempts": [_attempt_record(a, now) for a in attempts],
        "checkpoints": [
            {
                "step": made.step,
                "epoch": made.epoch,
                "published": iso(made.published_at),
                "bytes": made.bytes,
                "where": made.place,
            }
            for made in records.checkpoints(job_id)
        ],
        "passed_over": [
            {"where": one.place, "epoch": one.epoch, "reason": one.reason}
            for one in records.passed_over(job_id)
        ],
        "usd_estimated": f"{sum((a.usd_so_far(now) for a in attempts), Decimal(0)):.6f}",
        "usd_settled": None if settled is None else f"{settled:.6f}",
        "work_lost_s": _sum(0, (a.work_lost_s for a in attempts if a.ended_at is not None)),
    }


def _attempt_record(a: Attempt, now: datetime) -> dict[str, Any]:
    return {
        "provider": a.provider,
        "sku": a.sku,
        "market": a.market,
        "node": a.node_id,
        "tag": a.tag,
        "started": iso(a.running_at),
        "ended": iso(a.ended_at),
        "end_reason": a.end_reason,
        "usd_estimated": f"{a.usd_so_far(now):.6f}",
        "usd_settled": None if a.usd_settled is None else f"{a.usd_settled:.6f}",
        "work_lost_s": a.work_lost_s,
    }


def _sum(zero: Number, parts: Iterable[Number | None]) -> Number | None:
    """None where one of them is not known."""
    found = list(parts)
    known = [part for part in found if part is not None]
    return sum(known, zero) if len(known) == len(found) else None


def _print(found: dict[str, Any], reason: str) -> None:
    made = table("#", "node", "sku", "started", "ended", "why", "lost", "cost", right=("#", "lost", "cost"))
    for number, a in enumerate(found["attempts"], 1):
        lost = a["work_lost_s"]
        made.add_row(
            str(number),
            f"{a['provider']} {a['node']}",
            f"{a['sku']} {a['market'].replace('_', '-')}",
            _short(a["started"]),
            _short(a["ended"]),
            a["end_reason"],
            "" if lost is None else f"{lost} s",
            dollars(Decimal(a["usd_estimated"])),
        )
    out = console()
    out.print(f"{found['id']} is {found['state']}{f': {reason}' if reason else ''}")
    out.print(made)
    saves = found["checkpoints"]
    if saves:
        last = saves[-1]
        out.print(f"{len(saves)} checkpoints, the last at {_short(last['published'])}: {last['where']}")
    for one in found["passed_over"]:
        out.print(f"passed over: {one['where']}: {one['reason']}", markup=False)
    settled = [Decimal(a["usd_settled"]) for a in found["attempts"] if a["usd_settled"] is not None]
    if settled:
        which = "" if len(settled) == len(found["attempts"]) else f" for {len(settled)} of them"
        out.print(f"${sum(settled, Decimal(0)):.4f} by the vendors' own bills{which}.")
    out.print(f"About ${Decimal(found['usd_estimated']):.4f} by our own record, without transfer.")


def _print_story(story: Iterable[Event]) -> None:
    made = table("when", "what", "", whole=("when", "what"))
    for event in story:
        made.add_row(f"{event.at:%m-%d %H:%M:%S}", event.kind, plain(event.text))
    if made.row_count:
        console().print()
        console().print(made)


def _short(moment: str | None) -> str:
    """Without the seconds."""
    return "" if moment is None else moment[:16].replace("T", " ")
