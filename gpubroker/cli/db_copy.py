"""`gpubroker db copy`: the whole database, to another place."""

from __future__ import annotations

import click

from gpubroker.cli.bars import progress
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.copying import Copied, copy, counts
from gpubroker.prices.database import Database
from gpubroker.prices.store import Store
from gpubroker.run import tables as run_tables  # noqa: F401  jobs move, too
from gpubroker.run.leases import busy

_TOLD = "GPUBROKER_DB_URL"


@click.command(
    name="copy",
    short_help="Everything into another database, and verified.",
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker db copy sqlite:////home/me/gpubroker.db postgresql://me@db.example/gpubroker
  gpubroker db copy postgresql://me@db.example/gpubroker sqlite:////home/me/gpubroker.db

A password belongs into PGPASSWORD or ~/.pgpass: others on this machine can see a command line.""",
)
@click.argument("source")
@click.argument("target")
@format_option("table", "json", "csv")
def copy_command(*, source: str, target: str, output: str) -> None:
    """Copy everything in SOURCE into TARGET, which is empty: prices, history, jobs, ledger, exports.

    It is verified, table by table, before it counts; a copy that is killed is run again. Nothing can be
    written into SOURCE meanwhile: stop supervisors and polls first. SOURCE stays as it is.
    """
    for url, name in ((source, "SOURCE"), (target, "TARGET")):
        _check(url, name)
    clock = SystemClock()
    with Store.open(source, clock) as old, Store.open(target, clock) as new:
        if old.revision() is None:
            raise ConfigError(f"{old.where} has no tables of gpubroker")

        def refuse() -> None:
            if reason := busy(old.database):
                raise ConfigError(f"{old.where}: {reason}: stop what uses it, then copy")

        refuse()
        with progress() as bar:
            task = bar.add_task("", total=2 * counts(old.database))

            def on_rows(name: str, rows: int) -> None:
                bar.update(task, description=name, advance=rows)

            copied = copy(old.database, new.database, refuse=refuse, on_rows=on_rows)
        _print(copied, old.where, new.where, output)


def _check(url: str, name: str) -> None:
    """Before anything is opened, which makes what is not there."""
    if url.rstrip("/") in ("sqlite:", "sqlite+pysqlite:") or url.endswith(":memory:"):
        raise ConfigError(f"{name}: that names no file; one that does is sqlite:////home/me/gpubroker.db")
    try:
        database = Database(url, SystemClock())
    except ConfigError as error:
        raise ConfigError(str(error).replace(_TOLD, name)) from error
    if name == "SOURCE" and database.path is not None and not database.path.exists():
        raise ConfigError(f"there is no database at {database.where}")


def _print(copied: list[Copied], old: str, new: str, output: str) -> None:
    if output == "json":
        tables = [{"table": one.table, "rows": one.rows, "digest": one.digest} for one in copied]
        print_json({"source": old, "target": new, "tables": tables})
    elif output == "csv":
        print_csv(("table", "rows", "digest"), ((one.table, one.rows, one.digest) for one in copied))
    else:
        made = table("table", "rows", "digest", right=("rows",))
        for one in copied:
            made.add_row(one.table, f"{one.rows:,}", one.digest)
        console().print(made)
    rows = sum(one.rows for one in copied)
    say(f"{rows:,} rows are in {new}, the same as in {old}: {_TOLD}, or db_url in config.toml, names it now.")
