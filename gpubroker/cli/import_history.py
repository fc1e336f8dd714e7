"""`gpubroker import-history`: public or own price histories into the store, row by row, idempotently."""

from __future__ import annotations

from pathlib import Path

import click

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.render import console, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.history_import import import_file
from gpubroker.prices.store import Store


@click.command(
    name="import-history",
    context_settings={"max_content_width": 100},
    epilog="Example: gpubroker import-history gpurentalprices.csv.gz",
)
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@format_option("table", "json", "csv")
def import_history(*, files: tuple[Path, ...], output: str) -> None:
    """Import CSV or CSV.GZ price histories. Importing a file again adds nothing.

    Columns: observed_at, provider, sku, gpu, form_factor, gpu_count, market, region, usd_per_hour (for all
    the GPUs), source, stat, n_offers; or observed_at, provider, sku, region, available.

    A malformed line is reported with its number; the rest still goes in, and the exit code is 2.
    """
    results, refused = [], []
    with Store.open(config.load().db_url, SystemClock()) as store:
        store.migrate()
        for path in files:
            try:
                results.append((path, import_file(store, path)))
            except ConfigError as error:
                refused.append(str(error))
    for path, result in results:
        for number, reason in result.malformed:
            say(f"{path}:{number}: {reason}")
    if output == "json":
        print_json(
            {
                "files": [
                    {
                        "file": str(path),
                        "rows": result.rows,
                        "added": result.added,
                        "already_there": result.already_there,
                        "malformed": [{"line": n, "reason": r} for n, r in result.malformed],
                    }
                    for path, result in results
                ]
            }
        )
    elif output == "csv":
        print_csv(
            ("file", "rows", "added", "already_there", "malformed"),
            ((str(path), r.rows, r.added, r.already_there, len(r.malformed)) for path, r in results),
        )
    else:
        made = table(
            "file",
            "rows",
            "added",
            "already there",
            "malformed",
            right=("rows", "added", "already there", "malformed"),
        )
        for path, result in results:
            made.add_row(
                path.name,
                str(result.rows),
                str(result.added),
                str(result.already_there),
                str(len(result.malformed)),
            )
        console().print(made)
    if refused:
        raise ConfigError("; ".join(refused))
    if any(result.malformed for _, result in results):
        raise click.exceptions.Exit(2)
