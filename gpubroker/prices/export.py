"""Price spans out of the store into files: all of them, or those that have ended since the last time.

    spans -> batches of rows -> a writer -> NAME.part -> fsync -> NAME, day by day where it is a folder

A span is one offer at one set of terms, [first_at, until_at). exports.py goes on where the last export ended.
docs/export.md is the schema, FORMAT its version.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, Protocol, TypeAlias

from gpubroker.errors import ConfigError
from gpubroker.money import from_micros
from gpubroker.node.store import sync_folder
from gpubroker.prices.daily import Where, products
from gpubroker.prices.fastread import Run
from gpubroker.prices.rows import DAY_S, PRODUCT, RATES, moment

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
Kind = Literal["csv", "jsonl", "parquet"]
SUFFIXES: Mapping[str, tuple[Kind, bool]] = {  # -> (kind, compressed by gzip)
    ".csv": ("csv", False),
    ".csv.gz": ("csv", True),
    ".jsonl": ("jsonl", False),
    ".jsonl.gz": ("jsonl", True),
    ".parquet": ("parquet", False),
}
COLUMNS = (*PRODUCT, "machine_id", "usd_per_hour", *RATES, "first_at", "until_at")
USD = frozenset(name for name in COLUMNS if "usd" in name)
MOMENTS = frozenset({"first_at", "until_at"})
BOOLEANS = frozenset({"preemptible", "verified"})
BATCH = 1 << 16
_FROM_SQL = """
FROM spans s CROSS JOIN offers o CROSS JOIN products p
WHERE o.id = s.offer_id AND p.id = o.product_id
"""
_SPANS_SQL = f"""
SELECT o.product_id, o.machine_id, s.rates_id, s.usd_per_hour, s.first_at, s.until_at {_FROM_SQL}
"""
# Without what an offer is: whoever reads this many rows looks that up once for all of an offer's.
BARE_SQL = "SELECT s.offer_id, s.rates_id, s.usd_per_hour, s.first_at, s.until_at"


class Row(NamedTuple):
    """A span as it is read."""

    product_id: int
    machine_id: str
    rates_id: int
    usd_micros: int
    first_at: int
    until_at: int | None


Ended = Mapping[str, int]  # provider -> the last moment that is in


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Which spans, by when they ended: after `after` and up to `up_to`, for each provider."""

    after: Ended
    up_to: Ended


# Rows as they are read, or the same in columns of these names (export_source.py), for Parquet alone.
Batch: TypeAlias = "Sequence[Row] | pa.RecordBatch"


class Writer(Protocol):
    """One file."""

    def write(self, rows: Any) -> None:
        """A batch, in the order in which they come."""

    def close(self) -> None:
        """All of it is in the file then."""


# Begins a file of one sort of rows: (file, kind, whether by gzip).
Begin = Callable[[BinaryIO, Kind, bool], Writer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the ids in rows stand for, as the database has it."""

    products: Mapping[int, tuple[Any, ...]]  # in the order of PRODUCT
    rates: Mapping[int, tuple[Any, ...]]  # in the order of RATES


def names_of(run: Run) -> Names:
    """Of all products and rates: few, compared with spans."""
    rates = run(f"SELECT {', '.join(RATES)}, id FROM rates", ())  # noqa: S608  only names of columns
    return Names(
        products={key: tuple(one[:-1]) for key, one in products(run, Where()).items()},
        rates={row[-1]: tuple(row[:-1]) for row in rates},
    )


def all_spans(run: Run, where: Where) -> Iterator[list[Row]]:
    """Open ones too, in the order in which they began."""
    text, values = where.sql()
    yield from _batches(run(f"{_SPANS_SQL}{text} ORDER BY s.id", values))


def bare_sql(where: Where) -> tuple[str, tuple[str, ...]]:
    """The same spans in the same order, as BARE_SQL, with its values."""
    text, values = where.sql()
    return f"{BARE_SQL} {_FROM_SQL if text else 'FROM spans s'}{text} ORDER BY s.id", values


def ended_spans(run: Run, which: Range) -> Iterator[list[Row]]:
    """Those of a range, in the order in which they ended."""
    parts, values = list[str](), list[Any]()
    for provider, until in sorted(which.up_to.items()):
        parts.append("(p.provider = ? AND s.until_at > ? AND s.until_at <= ?)")
        values += [provider, which.after.get(provider, 0), until]
    if not parts:
        return
    least = min(which.after.get(provider, 0) for provider in which.up_to)
    sql = f"{_SPANS_SQL} AND s.until_at > ? AND ({' OR '.join(parts)}) ORDER BY s.until_at, s.offer_id"
    yield from _batches(run(sql, (least, *values)))


def ended_up_to(run: Run) -> dict[str, int]:
    """By provider: its last poll, after which no span of it can end at an earlier moment."""
    sql = "SELECT provider, max(observed_at) FROM polls WHERE observed_at IS NOT NULL GROUP BY provider"
    return {provider: int(at) for provider, at in run(sql, ())}


def _batches(found: Iterable[Sequence[Any]]) -> Iterator[list[Row]]:
    batch = list[Row]()
    for row in found:
        batch.append(Row._make(row))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


# Files


def suffix_of(name: str) -> str:
    """Which of SUFFIXES it ends in. Raises ConfigError."""
    found = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    if not found:
        raise ConfigError(f"{name}: the name must end in {', '.join(SUFFIXES)}")
    return max(found, key=len)


def write_file(path: Path, kind: Kind, zipped: bool, batches: Iterable[Sized], begin: Begin) -> int:
    """Whole or not at all. Returns how many rows. Raises ConfigError where it cannot be written."""
    part = path.with_name(path.name + ".part")
    rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            writer = begin(file, kind, zipped)
            for batch in batches:
                writer.write(batch)
                rows += len(batch)
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(str(path.parent))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return rows


def write_stream(file: BinaryIO, kind: Kind, zipped: bool, batches: Iterable[Sized], begin: Begin) -> int:
    """To standard output, or any file that is open."""
    writer, rows = begin(file, kind, zipped), 0
    for batch in batches:
        writer.write(batch)
        rows += len(batch)
    writer.close()
    return rows


def by_day(batches: Iterable[Sequence[Row]]) -> Iterator[tuple[int, Iterator[Sequence[Row]]]]:
    """(day of their end, batches of it), one day after the other; -1 = those that are open. Each is to be
    read before the next."""
    pending = (piece for batch in batches for piece in _pieces(batch))
    ahead = next(pending, None)

    def same(day: int) -> Iterator[Sequence[Row]]:
        nonlocal ahead
        while ahead is not None and ahead[0] == day:
            yield ahead[1]
            ahead = next(pending, None)

    while ahead is not None:
        day = ahead[0]
        yield day, same(day)


def _pieces(batch: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
    begin = 0
    for at in range(1, len(batch) + 1):
        if at == len(batch) or _day(batch[at]) != _day(batch[begin]):
            yield _day(batch[begin]), batch[begin:at]
            begin = at


def _day(row: Row) -> int:
    return -1 if row.until_at is None else row.until_at // DAY_S


# Writers


def spans_of(names: Names) -> Begin:
    """Files of spans."""

    def begin(file: BinaryIO, kind: Kind, zipped: bool) -> Writer:
        if kind == "parquet":
            from gpubroker.prices.export_parquet import ParquetWriter

            return ParquetWriter(file, names)
        return TextWriter(file, kind, zipped, COLUMNS, _Values(names, as_json=kind == "jsonl").of)

    return begin


class TextWriter:
    """CSV with a header, or a JSON object a line; `values`: of a row, in the order of the columns."""

    def __init__(
        self,
        file: BinaryIO,
        kind: Kind,
        zipped: bool,
        columns: Sequence[str],
        values: Callable[[Any], Sequence[Any]],
    ) -> None:
        self._stack = ExitStack()
        # No time and no name in the header: the same rows are the same bytes.
        raw = self._stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0)) if zipped else file
        self._text = TextIOWrapper(raw, encoding="utf-8", newline="", write_through=not zipped)
        self._values = values
        self._put: Callable[[Sequence[Any]], Any]
        if kind == "csv":
            made = csv.writer(self._text, lineterminator="\n")
            made.writerow(columns)
            self._put = made.writerow
        else:
            encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
            self._put = lambda values: self._text.write(
                encode(dict(zip(columns, values, strict=True))) + "\n"
            )

    def write(self, rows: Iterable[Any]) -> None:
        """See Writer."""
        for row in rows:
            self._put(self._values(row))

    def close(self) -> None:
        """See Writer."""
        self._text.flush()
        self._text.detach()
        self._stack.close()


class _Values:
    """A row's values as they are written."""

    def __init__(self, names: Names, *, as_json: bool) -> None:
        self._names, self._as_json = names, as_json
        self._products: dict[int, list[Any]] = {}
        self._rates: dict[int, list[Any]] = {}
        self._moment = lru_cache(maxsize=4096)(lambda at: moment(at).strftime("%Y-%m-%dT%H:%M:%SZ"))
        self._usd = lru_cache(maxsize=65536)(lambda micros: f"{from_micros(micros):f}")

    def of(self, row: Row) -> list[Any]:
        product = self._products.get(row.product_id)
        if product is None:
            product = self._listed(PRODUCT, self._names.products[row.product_id])
            self._products[row.product_id] = product
        rates = self._rates.get(row.rates_id)
        if rates is None:
            rates = self._listed(RATES, self._names.rates[row.rates_id])
            self._rates[row.rates_id] = rates
        until = None if row.until_at is None else self._moment(row.until_at)
        ends = [self._moment(row.first_at), until if self._as_json or until is not None else ""]
        return [*product, row.machine_id, self._usd(row.usd_micros), *rates, *ends]

    def _listed(self, names: Sequence[str], values: Sequence[Any]) -> list[Any]:
        return [self._one(name, value) for name, value in zip(names, values, strict=True)]

    def _one(self, name: str, value: Any) -> Any:
        if value is None:
            return None if self._as_json else ""
        if name in BOOLEANS:
            return bool(value) if self._as_json else str(bool(value)).lower()
        return self._usd(int(value)) if name in USD else value
