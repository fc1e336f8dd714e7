"""`gpubroker db compact`: old price history made small, by rule and never silently."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.bars import progress
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, print_csv, print_json, say, table
from gpubroker.config import LEAST_KEEP_DAYS
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.compacting import Gone, Plan, forget_export, give_back, limits, plan, thin
from gpubroker.prices.opening import polled
from gpubroker.prices.rows import moment
from gpubroker.prices.store import Store
from gpubroker.run.leases import busy

_COLUMNS = ("provider", "before", "since", "spans", "offers", "polls", "bytes", "held_by")
_RIGHT = ("spans", "offers", "polls", "about")


@click.command(
    short_help="Thin old price history; its days stay exact.",
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker db compact --dry-run
  gpubroker db compact --keep-days 365
  gpubroker db compact --yes

The last line is one for cron. What the days are: docs/decisions/0016-thinning.md.""",
)
@click.option(
    "--keep-days",
    type=click.IntRange(LEAST_KEEP_DAYS, 100_000),
    metavar="N",
    help="How long prices finer than a day are kept.  [default: keep_days of the config, else 400]",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--vacuum", is_flag=True, help="SQLite: give the room back to the disk. Polls wait meanwhile.")
@click.option("--forget-export", metavar="NAME", help="First forget a --cursor that is exported no more.")
@format_option("table", "json", "csv")
def compact(
    *,
    keep_days: int | None,
    dry_run: bool,
    yes: bool,
    vacuum: bool,
    forget_export: str | None,
    output: str,
) -> None:
    """Thin old price history: each day's exact prices and counts stay, the spans behind them go.

    gpubroker history by days is the same to the last micro-dollar. What is lost of the time before: prices
    finer than a day, twap, available, and spans for a new export; history says so. What a cursor of gpubroker
    export has not written stays. Polls may go on beside it; killed at any point, the next run goes on.
    """
    settings, clock = config.load(), SystemClock()
    days = keep_days or settings.keep_days
    with polled(settings.db_url, clock) as store:
        if vacuum:
            _refuse_while_busy(store)
        if forget_export is not None:
            _forget(store, forget_export, yes=yes, dry_run=dry_run)
        plans = _plans(store, clock.now(), days, without=forget_export)
        gone: Gone | None = None
        if output == "table":
            _print(plans, days)
        is_due = not all(one.is_empty for one in plans)
        if not dry_run and is_due:
            _ask("Thin the history now?", yes=yes)
            gone = _thin(store, clock, plans)
        given_back = None
        if vacuum and not dry_run:
            given_back = give_back(store.database, partial(_free_bytes, store))
        elif gone is not None and store.path is None:
            store.database.vacuum("spans", "offers", "polls")
    if output == "json":
        print_json(_record(store.where, days, plans, gone, given_back))
    elif output == "csv":
        print_csv(_COLUMNS, ([_flat(_row(one)[name]) for name in _COLUMNS] for one in plans))
    _tell(store, gone, given_back, is_due=is_due)


def _plans(store: Store, now: datetime, days: int, without: str | None) -> list[Plan]:
    with store.database.read() as connection, progress() as bar:
        run = partial(store.database.run, connection)
        found = limits(run, now, days, without=without)
        return [plan(run, one) for one in bar.track(found, description="counting")]


def _thin(store: Store, clock: SystemClock, plans: Sequence[Plan]) -> Gone:
    with progress() as bar:
        task = bar.add_task("rows", total=sum(one.spans + one.polls for one in plans))
        return thin(store.database, clock, plans, lambda rows: bar.advance(task, rows))


def _ask(words: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to ask: --yes does it, --dry-run only says what would go")
    click.confirm(words, abort=True, err=True)


def _forget(store: Store, name: str, *, yes: bool, dry_run: bool) -> None:
    if dry_run:
        return
    _ask(f"Forget the export {name}? One of that name then begins anew.", yes=yes)
    forget_export(store.database, name)


def _refuse_while_busy(store: Store) -> None:
    """Writing the file anew makes everybody wait for longer than they do."""
    if store.path is None:
        raise click.UsageError("--vacuum is for SQLite: PostgreSQL's own is done each time")
    if reason := busy(store.database):
        raise ConfigError(f"{reason}: --vacuum waits for nobody, run it when nothing else does")


def _free_bytes(store: Store) -> int:
    return shutil.disk_usage((store.path or Path()).absolute().parent).free


def _print(plans: Sequence[Plan], days: int) -> None:
    made = table("provider", "before", "since", "spans", "offers", "polls", "about", right=_RIGHT)
    for one in plans:
        row = _row(one)
        made.add_row(
            one.limit.provider,
            row["before"] or "-",
            row["since"] or "-",
            *(f"{row[name]:,}" for name in ("spans", "offers", "polls")),
            _megabytes(one.bytes),
        )
    console().print(made)
    say(
        f"What ended longer than {days} days ago goes, up to the day `before`. Stays: every day's exact"
        " prices and counts (gpubroker history by days), what is newer, and what is current."
    )
    say("Gone for good is of the time before: what is finer than a day, twap, available, spans to export.")
    held: dict[str, list[str]] = {}
    for one in plans:
        for name in one.limit.held_by:
            held.setdefault(name, []).append(one.limit.provider)
    for name, providers in held.items():
        say(
            f"Export {name} has not written all of it for {', '.join(providers)}: that stays until it has."
            f" One that is run no more: --forget-export {shlex.quote(name)}"
        )
    if begun := [one.limit.provider for one in plans if one.cut_off]:
        say(f"The last run was cut off: this one goes on with {', '.join(begun)}.")


def _tell(store: Store, gone: Gone | None, given_back: int | None, *, is_due: bool) -> None:
    if gone is not None:
        say(f"{gone.spans:,} spans, {gone.offers:,} offers and {gone.polls:,} polls are gone.")
    elif not is_due:
        say("There is nothing to thin.")
    if given_back is not None:
        say(f"{store.where} is {_megabytes(given_back)} smaller.")
    elif gone is not None and store.path is not None:
        say("The file keeps its size, and later polls fill it: --vacuum gives the room back to the disk.")


def _row(one: Plan) -> dict[str, Any]:
    return {
        "provider": one.limit.provider,
        "before": _date(one.limit.until_at),
        "since": _date(one.oldest),
        "spans": one.spans,
        "offers": one.offers,
        "polls": one.polls,
        "bytes": one.bytes,
        "held_by": list(one.limit.held_by),
    }


def _record(
    where: str, days: int, plans: Sequence[Plan], gone: Gone | None, given_back: int | None
) -> dict[str, Any]:
    done = None if gone is None else {"spans": gone.spans, "offers": gone.offers, "polls": gone.polls}
    return {
        "where": where,
        "keep_days": days,
        "providers": [_row(one) for one in plans],
        "gone": done,  # null: nothing was done
        "bytes_given_back": given_back,
    }


def _flat(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value


def _date(at: int | None) -> str | None:
    return None if not at else f"{moment(at):%Y-%m-%d}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
