"""Other people's price histories into the store: `gpubroker import-history FILE...`.

Reads a CSV or CSV.GZ file line by line, in one of two shapes that the header tells apart: prices, and
availability. A line that is wrong is reported with its number and costs only itself; the same line twice is
one observation.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple, get_args

from sqlalchemy import Connection

from gpubroker import gpus
from gpubroker.errors import ConfigError
from gpubroker.model import MARKETS, FormFactor
from gpubroker.money import parse_usd, to_micros
from gpubroker.prices.database import Database, chunks
from gpubroker.prices.rows import seconds
from gpubroker.prices.store import Store

# PostgreSQL's indexes hold 2,700 bytes a row, and most of a line is the key of its series. The longest line
# known has 200.
_LONGEST_LINE = 2000
_PRICE_COLUMNS = (
    *("observed_at", "provider", "sku", "gpu", "form_factor", "gpu_count", "market", "region"),
    *("usd_per_hour", "source", "stat", "n_offers"),
)
_AVAILABILITY_COLUMNS = ("observed_at", "provider", "sku", "region", "available")
_HISTORY_MARKETS = (*MARKETS, "mixed")  # mixed: its source does not tell spot from on-demand
_FORM_FACTORS = get_args(FormFactor)
_YEARS = range(2000, 2100)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(?P<zone>Z|[+-]\d\d:\d\d)?", re.ASCII)
_WHOLE_NUMBER = re.compile(r"[0-9]{1,6}")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """What became of a file's lines: rows = added + already_there + len(malformed).

    The header and blank lines are no rows. `malformed` holds (line number in the file from 1, reason).
    """

    rows: int
    added: int
    already_there: int
    malformed: tuple[tuple[int, str], ...]


class Series(NamedTuple):
    """Whose observations they are: a row of the table series."""

    provider: str
    sku: str
    gpu: str
    form_factor: str
    gpu_count: int
    market: str
    region: str
    stat: str
    source: str


class Observation(NamedTuple):
    """One row of a history."""

    series: Series
    observed_at: int  # seconds since 1970
    usd_micros: int | None = None
    available: int | None = None
    n_offers: int | None = None


_Fields = Mapping[str, str]  # a line by its columns
_Parse = Callable[[_Fields], Observation]  # raises ValueError with the reason
_INSERT_SERIES = f"""
INSERT INTO series ({", ".join(Series._fields)}) VALUES ({", ".join("?" * len(Series._fields))})
ON CONFLICT DO NOTHING
"""  # noqa: S608  only names of columns go in
_SERIES_ID = f"SELECT id FROM series WHERE {' AND '.join(f'{name} = ?' for name in Series._fields)}"  # noqa: S608
_INSERT_OBSERVATIONS = """
INSERT INTO observations (series_id, observed_at, usd_per_hour, available, n_offers) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING
"""


def import_file(store: Store, path: Path) -> ImportResult:
    """Store one file's observations, a thousand lines a transaction; a line that is there already stays.

    Raises ConfigError for a file that cannot be read or is no such history. Of one that breaks off (a
    download cut short) all that comes before is kept, and the last malformed entry says where it broke.
    """
    rows = added = 0
    malformed: list[tuple[int, str]] = []
    series_ids: dict[Series, int] = {}
    with _opened(path) as file:
        for batch in chunks(_entries(file, path)):
            observations = [said for _, said in batch if isinstance(said, Observation)]
            malformed += [(number, said) for number, said in batch if isinstance(said, str)]
            rows += len(batch)
            added += add(store.database, observations, series_ids)
    return ImportResult(
        rows=rows,
        added=added,
        already_there=rows - added - len(malformed),
        malformed=tuple(malformed),
    )


def add(database: Database, observations: Sequence[Observation], series_ids: dict[Series, int]) -> int:
    """How many of them were new. `series_ids` learns the series they belong to."""
    if not observations:
        return 0
    with database.write("gpubroker import-history") as connection:
        for series in {row.series for row in observations} - series_ids.keys():
            series_ids[series] = _series_id(database, connection, series)
        values = [(series_ids[row.series], *row[1:]) for row in observations]
        return int(database.run(connection, _INSERT_OBSERVATIONS, values).rowcount)


def _series_id(database: Database, connection: Connection, series: Series) -> int:
    database.run(connection, _INSERT_SERIES, series)
    return int(database.run(connection, _SERIES_ID, series).scalar_one())


def _opened(path: Path) -> BufferedIOBase:
    try:
        return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _entries(file: BufferedIOBase, path: Path) -> Iterator[tuple[int, Observation | str]]:
    """Each data line's number, with what it says or with the reason why it says nothing."""
    lines = enumerate(_lines(file), 1)
    _, header = next(lines, (1, "it is empty"))
    columns, parse = _shape(header, path)
    for number, line in lines:
        if isinstance(line, str):
            yield number, line
        elif line.strip():
            try:
                yield number, parse(_fields(line, columns))
            except ValueError as error:
                yield number, str(error)


def _lines(file: BufferedIOBase) -> Iterator[bytes | str]:
    """Line by line; in place of a line that cannot be read, the reason."""
    while True:
        try:
            line = file.readline(_LONGEST_LINE)
            is_too_long = len(line) == _LONGEST_LINE
            while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                line = file.readline(_LONGEST_LINE)
        except (OSError, EOFError, zlib.error) as error:
            yield f"the file breaks off here, nothing after it was read: {error}"
            return
        if is_too_long:
            yield f"a line of {_LONGEST_LINE} bytes or more"
        elif line:
            yield line
        else:
            return


def _shape(header: bytes | str, path: Path) -> tuple[tuple[str, ...], _Parse]:
    """The columns of the rest, and how to read them."""
    if isinstance(header, str):
        raise ConfigError(f"{path} is no price history: {header}")
    try:
        columns = tuple(_split(header.removeprefix(codecs.BOM_UTF8)))
        return columns, _SHAPES[columns]
    except (KeyError, ValueError):
        known = " nor ".join(",".join(shape) for shape in _SHAPES)
        raise ConfigError(f"{path} is no price history: its first line is neither {known}") from None


def _split(line: bytes) -> list[str]:
    """A line's fields, each line for itself: an open quote must not swallow the lines after it."""
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} is not UTF-8") from None
    control = _CONTROL_CHARACTER.search(text)
    if control:
        raise ValueError(f"there is a control character, 0x{ord(control[0]):02x}")
    try:
        return [field.strip() for field in next(csv.reader([text], strict=True))]
    except csv.Error as error:
        raise ValueError(f"it is not CSV: {error}") from None


def _fields(line: bytes, columns: tuple[str, ...]) -> _Fields:
    fields = _split(line)
    if len(fields) != len(columns):
        raise ValueError(f"{len(fields)} fields instead of {len(columns)}")
    return dict(zip(columns, fields, strict=True))


def _price(fields: _Fields) -> Observation:
    gpu, form_factor = _canonical(
        _required(fields, "gpu"), _one_of("form_factor", fields["form_factor"], _FORM_FACTORS)
    )
    return Observation(
        Series(
            provider=_required(fields, "provider"),
            sku=fields["sku"],
            gpu=gpu,
            form_factor=form_factor,
            gpu_count=_whole_number("gpu_count", fields["gpu_count"], at_least=1),
            market=_one_of("market", fields["market"].lower().replace("-", "_"), _HISTORY_MARKETS),
            region=fields["region"],
            stat=_required(fields, "stat"),
            source=_required(fields, "source"),
        ),
        _moment(fields["observed_at"]),
        usd_micros=to_micros(parse_usd(fields["usd_per_hour"] or None)),
        n_offers=_whole_number("n_offers", fields["n_offers"], at_least=0) if fields["n_offers"] else None,
    )


def _availability(fields: _Fields) -> Observation:
    provider, sku = _required(fields, "provider"), _required(fields, "sku")
    gpu, form_factor, gpu_count = _card(provider, sku)
    return Observation(
        Series(
            provider=provider,
            sku=sku,
            gpu=gpu,
            form_factor=form_factor,
            gpu_count=gpu_count,
            market="spot",
            region=fields["region"],
            stat="available",
            source="",  # the file does not say, and its name may change between two imports
        ),
        _moment(fields["observed_at"]),
        available=int(_one_of("available", fields["available"], ("0", "1"))),
    )


# By the columns of the first line.
_SHAPES: Mapping[tuple[str, ...], _Parse] = {_PRICE_COLUMNS: _price, _AVAILABILITY_COLUMNS: _availability}


@lru_cache(maxsize=1024)
def _canonical(gpu: str, form_factor: str) -> tuple[str, str]:
    """The catalogue's name and, where only the name says it, the form; as they came if it is not one card."""
    try:
        request = gpus.parse_request(gpu)
    except ConfigError:
        return gpu, form_factor
    if len(request.names) != 1:
        return gpu, form_factor
    (name,) = request.names
    return name, (form_factor if form_factor != "unstated" else request.form_factor or form_factor)


@lru_cache(maxsize=1024)
def _card(provider: str, sku: str) -> tuple[str, str, int]:
    """GPU, form factor and count behind a sku; "", unstated and 0 where the catalogue does not say."""
    match = gpus.resolve(provider, sku)
    return (match.name, match.form_factor, match.gpu_count or 0) if match else ("", "unstated", 0)


def _required(fields: _Fields, name: str) -> str:
    if not fields[name]:
        raise ValueError(f"{name} is empty")
    return fields[name]


def _one_of(name: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise ValueError(f"{name} {_excerpt(text)} is none of {', '.join(known)}")
    return text


def _whole_number(name: str, text: str, at_least: int) -> int:
    if not _WHOLE_NUMBER.fullmatch(text) or int(text) < at_least:
        raise ValueError(f"{name} {_excerpt(text)} is not a whole number from {at_least} to 999999")
    return int(text)


def _moment(text: str) -> int:
    """Seconds since 1970. A time without a zone could be anybody's: it is refused."""
    known = _MOMENT.fullmatch(text)
    if not known:
        raise ValueError(f"observed_at {_excerpt(text)} is no time such as 2026-07-05T23:04:21Z")
    if not known["zone"]:
        raise ValueError(f"observed_at {_excerpt(text)} has no time zone")
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"observed_at {_excerpt(text)}: {error}") from None
    if at.year not in _YEARS:
        raise ValueError(
            f"observed_at {_excerpt(text)} is not in the years {_YEARS.start} to {_YEARS.stop - 1}"
        )
    return seconds(at)


def _excerpt(text: str) -> str:
    return repr(text[:40])
