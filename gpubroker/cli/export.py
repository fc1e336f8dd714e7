"""`gpubroker export`: the price history as files, whole or since the last time."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence, Sized
from functools import partial
from pathlib import Path

import click

from gpubroker import config
from gpubroker.cli.options import Duration, GpuName, Lower, MarketName, format_option
from gpubroker.cli.render import print_json, say
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.model import Market
from gpubroker.prices import export as files
from gpubroker.prices import export_points, export_source
from gpubroker.prices.daily import Where, thinned
from gpubroker.prices.database import Database
from gpubroker.prices.export import SUFFIXES, Begin, Kind, spans_of, suffix_of
from gpubroker.prices.exports import SPANS, Content, Exported, Points, since_last
from gpubroker.prices.opening import polled
from gpubroker.prices.rows import DAY_S, moment

_S3 = "s3://"
_KINDS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker export --to prices.parquet
  gpubroker export --gpu h100 --as csv --to -
  gpubroker export --gpu h100 --resample 1h --to hours.parquet
  gpubroker export --cursor nightly --as parquet --to history/
  gpubroker export --cursor nightly --as csv.gz --to s3://bucket/prices/

The second last line is one for cron (gpubroker schedule install writes it there): each run adds what has
ended since the last one, and nothing twice.""",
)
@click.option(
    "--to", "place", required=True, help="A file, a folder/, s3://bucket/prefix/, or - for standard output."
)
@click.option("--as", "suffix", type=click.Choice(_KINDS), help="Where the name does not say it.")
@click.option("--cursor", metavar="NAME", help="Only what has ended since the last export of this name.")
@click.option("--resample", type=Duration(least_s=60), help="Points every 5m, 1h, 1d instead of spans.")
@click.option("--gpu", "gpus", type=GpuName(), multiple=True, help="Only these. Not with --cursor.")
@click.option("--provider", "providers", type=Lower(), multiple=True, help="Not with --cursor.")
@click.option("--market", "markets", type=MarketName(), multiple=True, help="Not with --cursor.")
@format_option("table", "json")
def export(
    *,
    place: str,
    suffix: str | None,
    cursor: str | None,
    resample: int | None,
    gpus: tuple[GpuRequest, ...],
    providers: tuple[str, ...],
    markets: tuple[Market, ...],
    output: str,
) -> None:
    """Write price spans: one offer at one set of terms, from when it was first seen until it was not.

    Whole, open spans are in it, without an end. With --cursor a span comes once it has ended, in a file of
    its day; a run that is killed is made good by the next one. With --resample it is points instead: what
    each GPU cost in each stretch of time at each provider and place; with a cursor those of days that are
    over. A file is whole or not there. docs/export.md has the columns.
    """
    settings, clock = config.load(), SystemClock()
    is_folder = place.endswith("/") or place.startswith(_S3) or Path(place).is_dir()
    if suffix is None and (is_folder or place == "-"):
        raise click.UsageError(f"--as {'|'.join(_KINDS)} says which kind of files")
    ending = f".{suffix}" if suffix is not None else suffix_of(place)
    if resample is not None and DAY_S % resample:
        raise click.UsageError("--resample: files are by days, so that it divides one: 5m, 1h, 6h, 1d")
    content: Content = SPANS if resample is None else Points(resample)
    with polled(settings.db_url, clock) as store:
        if cursor is not None:
            if not is_folder or gpus or providers or markets:
                raise click.UsageError("--cursor takes a folder/ or s3://bucket/prefix/, and all prices")
            runs = added(store.database, cursor, place, ending, content)
            if any(run.number == 1 for run in runs):
                _say_thinned(store.database)
            _tell(runs, place, output, content)
            return
        where = Where(
            gpus=frozenset().union(*(gpu.names for gpu in gpus)) or None,
            providers=providers or None,
            markets=markets or None,
        )
        write = partial(_write, place, ending, content.stem, is_folder=is_folder)
        if resample is None:
            written = _all_spans(store.database, where, ending, write)
        else:
            written = _all_points(store.database, where, resample, int(clock.now().timestamp()) + 1, write)
        _say_thinned(store.database)
    _tell([Exported(number=0, files=written, was_cut_off=False)], place, output, content)


def added(
    database: Database, cursor: str, place: str, ending: str, content: Content = SPANS
) -> list[Exported]:
    """What has ended since the last export of this name, below a folder/ or s3://bucket/prefix/.

    Raises ConfigError: another process is at it, or the place takes nothing.
    """
    return since_last(database, cursor, place, ending, partial(_put, place, ending), content)


def sentence(runs: Sequence[Exported], place: str, content: Content = SPANS) -> str:
    """What was written, for people."""
    rows = content.stem.partition("-")[0]
    if not runs:
        return "Nothing has ended since the last export."
    return "\n".join(
        f"{run.rows:,} {rows} in {len(run.files)} file{'s' * (len(run.files) != 1)} to {place}"
        + " (the last run was cut off: written again)" * run.was_cut_off
        for run in runs
    )


def _say_thinned(database: Database) -> None:
    """A history that begins later than its polls did is not passed off as all of it."""
    with database.read() as connection:
        gone = thinned(partial(database.run, connection))
    if gone:
        days = (f"{provider} {moment(at):%Y-%m-%d}" for provider, at in sorted(gone.items()))
        say(f"Spans that had ended before a day are gone (gpubroker db compact): {', '.join(days)}.")


# Writes rows to where they are wanted: file -> rows.
_Write = Callable[[Iterable[Sized], Begin], dict[str, int]]


def _write(
    place: str, ending: str, stem: str, batches: Iterable[Sized], begin: Begin, *, is_folder: bool
) -> dict[str, int]:
    kind, zipped = SUFFIXES[ending]
    if place == "-":
        return {"-": files.write_stream(sys.stdout.buffer, kind, zipped, batches, begin)}
    if is_folder:
        return {f"{stem}{ending}": _put(place, ending, f"{stem}{ending}", batches, begin)}
    path = Path(place)
    return {path.name: files.write_file(path, kind, zipped, batches, begin)}


def _all_spans(database: Database, where: Where, ending: str, write: _Write) -> dict[str, int]:
    if SUFFIXES[ending][0] == "parquet" and database.path is not None and export_source.is_here():
        spans = export_source.columns(database.path, where)
        # Products and terms are only ever added: what is read later has all that the spans name.
        with database.read() as connection:
            names = files.names_of(partial(database.run, connection))
        return write(spans, spans_of(names))
    with database.read() as connection:
        names = files.names_of(partial(database.run, connection))
        return write(files.all_spans(partial(database.stream, connection), where), spans_of(names))


def _all_points(database: Database, where: Where, resample_s: int, end: int, write: _Write) -> dict[str, int]:
    with database.read() as connection:
        run = partial(database.run, connection)
        until = dict.fromkeys(export_points.first_days(run), end)
        days = export_points.by_day(run, where, resample_s, {}, until)
        points = (batch for _, batches in days for batch in batches)
        return write(points, export_points.points_of(resample_s))


def _put(place: str, ending: str, name: str, batches: Iterable[Sized], begin: Begin) -> int:
    """One file below a folder or a prefix."""
    kind, zipped = SUFFIXES[ending]
    if not place.startswith(_S3):
        return files.write_file(Path(place) / name, kind, zipped, batches, begin)
    return _put_s3(place, name, kind, zipped, batches, begin)


def _put_s3(place: str, name: str, kind: Kind, zipped: bool, batches: Iterable[Sized], begin: Begin) -> int:
    """Written here first: an object is whole or not there, too."""
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = place.removeprefix(_S3).partition("/")
    with tempfile.TemporaryDirectory(prefix="gpubroker-export-") as folder:
        path = Path(folder) / "file"
        rows = files.write_file(path, kind, zipped, batches, begin)
        try:
            boto3.client("s3").upload_file(str(path), bucket, f"{prefix.rstrip('/')}/{name}".lstrip("/"))
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise ConfigError(f"{place}{name}: {error}") from error
    return rows


def _tell(runs: Sequence[Exported], place: str, output: str, content: Content) -> None:
    if output == "json" and place != "-":
        print_json(
            {"to": place, "runs": [{"files": run.files, "was_cut_off": run.was_cut_off} for run in runs]}
        )
        return
    say(sentence(runs, place, content))
