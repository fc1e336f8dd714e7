"""Other people's price histories into the store: `gpubroker import-history FILE...`.

Reads CSV or CSV.GZ line by line in two shapes, told apart by their header: prices, and availability. A line
that is wrong is reported with its number and costs only itself; the same line twice is one observation.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from gpubroker import gpus
from gpubroker.errors import ConfigError
from gpubroker.model import MARKETS
from gpubroker.money import parse_usd, to_micros
from gpubroker.prices.database import chunks
from gpubroker.prices.rows import seconds
from gpubroker.prices.store import Store

_GZIP = b"\x1f\x8b"
_FORMS = ("SXM", "PCIe", "NVL", "unstated")
# "mixed": the source does not tell spot from on demand.
_MARKETS: Mapping[str, str] = {
    **dict(zip(MARKETS, MARKETS, strict=True)),
    "on-demand": "on_demand",
    "mixed": "mixed",
}
_SERIES = ("provider", "sku", "gpu", "form_factor", "gpu_count", "market", "region", "stat", "source")
_PRICES = {*_SERIES, "observed_at", "usd_per_hour", "n_offers"}
_AVAILABILITY = {"observed_at", "provider", "sku", "region", "available"}
_MARKS = ", ".join("?" * len(_SERIES))
_ADD_SERIES = f"INSERT INTO series ({', '.join(_SERIES)}) VALUES ({_MARKS}) ON CONFLICT DO NOTHING"  # noqa: S608
_FIND_SERIES = f"SELECT id FROM series WHERE ({', '.join(_SERIES)}) = ({_MARKS})"  # noqa: S608
_ADD_OBSERVATION = """
INSERT INTO observations (series_id, observed_at, usd_per_hour, available, n_offers) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING
"""

_Series = tuple[Any, ...]  # in the order of _SERIES


class _Observation(NamedTuple):
    series: _Series
    observed_at: int
    usd_micros: int | None
    available: int | None
    n_offers: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """rows = added + already there + malformed. Lines count from 1, which is the header."""

    rows: int
    added: int
    already_there: int
    malformed: list[tuple[int, str]]  # line number, what is wrong with it


def import_file(store: Store, path: Path) -> ImportResult:
    """Store one file's observations. Raises ConfigError for a file that is no price history at all."""
    malformed: list[tuple[int, str]] = []
    series_ids: dict[_Series, int] = {}
    sound = added = 0
    for batch in chunks(_observations(path, malformed)):
        sound += len(batch)
        added += _add(store, series_ids, batch)
    return ImportResult(
        rows=sound + len(malformed), added=added, already_there=sound - added, malformed=malformed
    )


def _add(store: Store, series_ids: dict[_Series, int], batch: Sequence[_Observation]) -> int:
    """How many were new."""
    database = store.database
    with database.write("gpubroker import") as connection:
        for series in {row.series for row in batch} - series_ids.keys():
            database.run(connection, _ADD_SERIES, series)
            series_ids[series] = database.run(connection, _FIND_SERIES, series).scalar_one()
        rows = [(series_ids[row.series], *row[1:]) for row in batch]
        return int(database.run(connection, _ADD_OBSERVATION, rows).rowcount)


def _observations(path: Path, malformed: list[tuple[int, str]]) -> Iterator[_Observation]:
    """The sound lines; the others go to `malformed`."""
    lines = _lines(path)
    _, header = next(lines, (1, b""))
    columns = _fields(header.removeprefix(b"\xef\xbb\xbf"))
    parse = _parser(path, columns)
    for number, line in lines:
        if isinstance(line, str):
            malformed.append((number, line))
            continue
        try:
            fields = _fields(line)
            if len(fields) != len(columns):
                raise ValueError(f"{len(fields)} fields, not {len(columns)}")
            observation = parse(dict(zip(columns, fields, strict=True)))
        except (ValueError, csv.Error) as error:
            malformed.append((number, str(error)))
        else:
            yield observation


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, line) of each that is not empty; where a compressed file breaks off, (number, why)."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if number == 0:
            raise ConfigError(f"{path}: {error}") from error
        yield number + 1, f"the file breaks off here: {error}"
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as stream:
        compressed = stream.read(len(_GZIP)) == _GZIP
    return gzip.open(path) if compressed else path.open("rb")


def _fields(line: bytes) -> list[str]:
    """One line by itself, so that a quote left open cannot swallow the lines after it."""
    if b"\0" in line:
        raise ValueError("a NUL character")
    return next(csv.reader([line.decode("utf-8").rstrip("\r\n")], strict=True), [])


def _parser(path: Path, columns: Sequence[str]) -> Callable[[Mapping[str, str]], _Observation]:
    if set(columns) >= _PRICES:
        return _price
    if set(columns) >= _AVAILABILITY:
        return _availability
    raise ConfigError(
        f"{path}: line 1 does not name the columns of a price history: {', '.join(sorted(_PRICES))}"
    )


def _price(row: Mapping[str, str]) -> _Observation:
    series = (
        _named(row, "provider"),
        row["sku"],
        _canonical(_named(row, "gpu")),
        _one_of(row, "form_factor", {form: form for form in _FORMS}),
        _whole(row, "gpu_count", 1),
        _one_of(row, "market", _MARKETS),
        row["region"],
        row["stat"],
        row["source"],
    )
    try:
        micros = to_micros(parse_usd(row["usd_per_hour"]))
    except ValueError as error:
        raise ValueError(f"usd_per_hour: {error}") from None
    n_offers = _whole(row, "n_offers", 0) if row["n_offers"] else None
    return _Observation(series, _observed_at(row), micros, None, n_offers)


def _availability(row: Mapping[str, str]) -> _Observation:
    """Whether a sku was to be had; what it is made of comes from its name, where that is known."""
    provider, sku = _named(row, "provider"), _named(row, "sku")
    available = int(_one_of(row, "available", {"0": "0", "1": "1"}))
    series = (provider, sku, *_made_of(provider, sku), "", row["region"], "available", "")
    return _Observation(series, _observed_at(row), None, available, None)


def _observed_at(row: Mapping[str, str]) -> int:
    try:
        return seconds(datetime.fromisoformat(row["observed_at"]))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"observed_at: {error}") from None


def _named(row: Mapping[str, str], column: str) -> str:
    if not row[column]:
        raise ValueError(f"{column} is empty")
    return row[column]


def _whole(row: Mapping[str, str], column: str, least: int) -> int:
    text = row[column]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ValueError(f"{column}: {text[:40]!r} is not a whole number from {least}")
    return int(text)


def _one_of(row: Mapping[str, str], column: str, known: Mapping[str, str]) -> str:
    try:
        return known[row[column]]
    except KeyError:
        raise ValueError(f"{column}: {row[column][:40]!r} is none of {', '.join(known)}") from None


@cache
def _canonical(gpu: str) -> str:
    """Our name of the card where there is one for it, the file's where not."""
    try:
        names = gpus.parse_request(gpu).names
    except ConfigError:
        return gpu
    return gpu if gpu in names or len(names) > 1 else next(iter(names))


@cache
def _made_of(provider: str, sku: str) -> tuple[str, str, int]:
    match = gpus.resolve(provider, sku)
    return ("", "unstated", 0) if match is None else (match.name, match.form_factor, match.gpu_count or 1)
