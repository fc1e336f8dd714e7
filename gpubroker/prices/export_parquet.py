"""Spans as Parquet, a row group a batch: columns are built by numpy and Arrow, not a value at a time.

Money is decimal128(18, 6), moments timestamps in UTC. The least and the most of a row group are kept for
moments and the price alone: of all others it has every one. Needs the extra `parquet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from gpubroker.errors import ConfigError
from gpubroker.prices.asked import column
from gpubroker.prices.export import BOOLEANS, COLUMNS, FORMAT, MOMENTS, USD, Batch, Names, Row
from gpubroker.prices.export_points import BY
from gpubroker.prices.export_points import COLUMNS as POINT_COLUMNS
from gpubroker.prices.history import STATS, Point
from gpubroker.prices.rows import PRODUCT, RATES

try:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gpubroker.prices import arrow
except ImportError as error:
    raise ConfigError("Parquet needs pyarrow: pip install 'gpubroker[parquet]'") from error

_INTEGERS = frozenset({"gpu_count", "vram_gib", "billing_increment_s", "minimum_s", "disk_included_gb"})


class ParquetWriter:
    """See export.Writer."""

    def __init__(self, file: BinaryIO, names: Names) -> None:
        pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own one keeps what is freed: 40 MB
        about = {"gpubroker.format": str(FORMAT), "gpubroker.rows": "spans"}
        self._schema = pa.schema([pa.field(name, _type(name)) for name in COLUMNS], metadata=about)
        self._file = pq.ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            store_decimal_as_integer=True,
            write_statistics=["usd_per_hour", *sorted(MOMENTS)],
            # Nearly each of these is another: a dictionary of them would be started and given up.
            use_dictionary=[name for name in COLUMNS if name not in ("usd_per_hour", "first_at")],
        )
        self._products = _Table(PRODUCT, names.products)
        self._rates = _Table(RATES, names.rates)

    def write(self, rows: Batch) -> None:
        """One row group."""
        batch = rows if isinstance(rows, pa.RecordBatch) else _batch(rows)
        columns = {
            **self._products.take(arrow.numbers(batch["product_id"])),
            "machine_id": batch["machine_id"],
            "usd_per_hour": arrow.usd(arrow.numbers(batch["usd_micros"])),
            **self._rates.take(arrow.numbers(batch["rates_id"])),
            "first_at": batch["first_at"].cast(_type("first_at")),
            "until_at": batch["until_at"].cast(_type("until_at")),
        }
        self._file.write_table(pa.table([columns[name] for name in COLUMNS], schema=self._schema))

    def close(self) -> None:
        """The footer."""
        self._file.close()


class PointWriter:
    """The same for the points of export_points.py."""

    def __init__(self, file: BinaryIO, resample_s: int) -> None:
        pa.set_memory_pool(pa.system_memory_pool())
        self._resample_s = resample_s
        about = {"gpubroker.format": str(FORMAT), "gpubroker.rows": "points"}
        self._schema = pa.schema([(name, _point_type(name)) for name in POINT_COLUMNS], metadata=about)
        self._file = pq.ParquetWriter(file, self._schema, compression="zstd", store_decimal_as_integer=True)

    def write(self, rows: Sequence[Point]) -> None:
        """One row group."""
        begins = np.array([int(point.begin.timestamp()) for point in rows], dtype=np.int64)
        made = {
            "begin": arrow.integers(begins).cast(_point_type("begin")),
            "resample_s": arrow.integers(np.full(len(rows), self._resample_s, dtype=np.int64)),
        }
        for name in BY:
            values = [getattr(point.group, name) for point in rows]
            made[name] = arrow.integers(*_numbers(values)) if name in _INTEGERS else arrow.strings(values)
        for stat in STATS:
            found = [point.figures.get(stat) for point in rows]
            if stat == "available":
                made[column(stat)] = pa.array(
                    [None if one is None else float(one) for one in found], pa.float64()
                )
            else:
                make = arrow.integers if stat == "n" else arrow.usd
                made[column(stat)] = make(*_numbers(found))
        self._file.write_table(pa.table([made[name] for name in POINT_COLUMNS], schema=self._schema))

    def close(self) -> None:
        """The footer."""
        self._file.close()


def _point_type(name: str) -> Any:
    if name == "begin":
        return pa.timestamp("s", tz="UTC")
    if name == column("available"):
        return pa.float64()
    if name in ("resample_s", "gpu_count", column("n")):
        return pa.int64()
    return pa.dictionary(pa.int32(), pa.string()) if name in BY else pa.decimal128(18, 6)


class _Table:
    """Few rows with many columns, of which each span takes one by its id."""

    def __init__(self, names: Sequence[str], rows: Mapping[int, Sequence[Any]]) -> None:
        ids = sorted(rows)
        self._places = np.zeros(max(ids, default=0) + 1, dtype=np.int64)  # by id
        self._places[ids] = np.arange(len(ids))
        self._columns = {name: _column(name, [rows[key][at] for key in ids]) for at, name in enumerate(names)}

    def take(self, ids: np.ndarray[Any, Any]) -> dict[str, Any]:
        """A column each."""
        places = arrow.integers(self._places[ids])
        return {name: column.take(places) for name, column in self._columns.items()}


def _type(name: str) -> Any:
    if name in USD:
        return pa.decimal128(18, 6)
    if name in MOMENTS:
        return pa.timestamp("s", tz="UTC")
    if name in BOOLEANS:
        return pa.bool_()
    return pa.int64() if name in _INTEGERS else pa.dictionary(pa.int32(), pa.string())


def _column(name: str, values: Sequence[Any]) -> Any:
    if name not in USD | BOOLEANS | _INTEGERS:
        return arrow.strings([str(value) for value in values])
    make = arrow.usd if name in USD else arrow.booleans if name in BOOLEANS else arrow.integers
    return make(*_numbers(values))


def _numbers(values: Sequence[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Them, and where there is none."""
    missing = np.array([value is None for value in values], dtype=bool)
    return np.array([0 if value is None else int(value) for value in values], dtype=np.int64), missing


def _batch(rows: Sequence[Row]) -> Any:
    """The same in columns."""
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
    return pa.record_batch(
        {
            name: arrow.strings(said) if name == "machine_id" else arrow.integers(*_numbers(said))
            for name, said in columns.items()
        }
    )
