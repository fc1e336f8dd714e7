"""`gpubroker db check`: whether the database still is what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gpubroker import config
from gpubroker.cli.bars import progress
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, plain, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices import checking
from gpubroker.prices.checking import Checked
from gpubroker.prices.store import Store
from gpubroker.run import tables as run_tables  # noqa: F401  jobs' tables are checked, too

# Damage is neither a wrong option nor a missing one: cron can tell it from those.
_DAMAGED = 4
_MOST = 3


@click.command(
    short_help="Whether the database is whole; what is lost where not.",
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker db check
  gpubroker db check --deep --format json""",
)
@click.option("--deep", is_flag=True, help="Count every day anew, not five of each provider's.")
@format_option("table", "json", "csv")
def check(*, deep: bool, output: str) -> None:
    """Whether the database is whole: its pages, what its rows refer to, and every rule of the history.

    Reads only; polls may go on beside it. Exits with 4 when something is broken, and says what is lost by it
    and what to do.
    """
    with Store.open(config.load().db_url, SystemClock()) as store:
        if store.path is not None and not store.path.exists():  # looking into it would make it
            raise ConfigError(f"there is no database at {store.where} yet: gpubroker poll makes one")
        found = _checked(store, deep)
    is_whole = not any(one.wrong for one in found)
    if output == "json":
        print_json({"where": store.where, "ok": is_whole, "checks": [_record(one) for one in found]})
    elif output == "csv":
        columns = ("check", "looked_at", "wrong", "examples", "lost", "note")
        print_csv(columns, ([_flat(_record(one)[name]) for name in columns] for one in found))
    else:
        _print(found)
    if not is_whole:
        raise click.exceptions.Exit(_DAMAGED)


def _checked(store: Store, deep: bool) -> list[Checked]:
    with progress() as bar:
        task = bar.add_task("", total=len(checking.names(store.database)))
        name = ""

        def on_check(begun: str) -> None:
            nonlocal name
            name = begun
            bar.update(task, description=begun)

        found = []
        for one in checking.check(
            store.database,
            deep=deep,
            on_check=on_check,
            on_step=lambda step: bar.update(task, description=f"{name}: {step}"),
        ):
            found.append(one)
            bar.advance(task)
    return found


def _print(found: Sequence[Checked]) -> None:
    made = table("check", "looked at", "wrong", "", right=("looked at", "wrong"))
    for one in found:
        made.add_row(one.name, f"{one.looked_at:,}", f"{one.wrong:,}", "BROKEN" if one.wrong else "ok")
    console().print(made)
    for one in found:
        if one.note:
            say(f"{one.name}: {plain(one.note)}.")
    for one in found:
        if one.wrong:
            some = "; ".join(plain(text, 120) for text in one.examples[:_MOST])
            rest = one.wrong - min(_MOST, len(one.examples))
            say(f"{one.name}: {some}{f', and {rest:,} more' if rest else ''}. {one.lost}")


def _record(one: Checked) -> dict[str, object]:
    return {
        "check": one.name,
        "looked_at": one.looked_at,
        "wrong": one.wrong,
        "examples": list(one.examples),
        "lost": one.lost,
        "note": one.note,
    }


def _flat(value: object) -> object:
    return "; ".join(value) if isinstance(value, list) else value
