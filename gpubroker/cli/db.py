"""`gpubroker db`: where the price database is, and bringing it to this version's schema."""

from __future__ import annotations

import click

from gpubroker import config
from gpubroker.cli.db_check import check
from gpubroker.cli.db_compact import compact
from gpubroker.cli.db_copy import copy_command
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, print_csv, print_json, table
from gpubroker.doors import SystemClock
from gpubroker.prices.store import Store


@click.group(context_settings={"max_content_width": 100})
def db() -> None:
    """The price database: SQLite in the data directory, or what GPUBROKER_DB_URL names."""


db.add_command(check)
db.add_command(compact)
db.add_command(copy_command)


@db.command(epilog="Example: gpubroker db upgrade")
def upgrade() -> None:
    """Migrate to this version's schema. The first use does it too; a newer database is refused."""
    with Store.open(config.load().db_url, SystemClock()) as store:
        store.migrate()
        click.echo(f"{store.where}: revision {store.revision()}")


@db.command(epilog="Example: gpubroker db info --format json")
@format_option("table", "json", "csv")
def info(*, output: str) -> None:
    """Where it is, its revision, and how much it holds."""
    with Store.open(config.load().db_url, SystemClock()) as store:
        store.migrate()
        facts = {"where": store.where, "revision": store.revision(), **store.counts()}
    if output == "json":
        print_json(facts)
        return
    if output == "csv":
        print_csv(("what", "value"), facts.items())
        return
    made = table("what", "value")
    for name, value in facts.items():
        made.add_row(name, str(value))
    console().print(made)
