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

_INTEGERS = frozenset({"gpu_count", "vram_gib", "billing_increment_s", "minimum_s", "disk_included_gb"})


class ParquetWriter:
    """See export.Writer. Raises ConfigError without pyarrow."""

    def __init__(self, file: BinaryIO, names: Names) -> None:
        pa, pq = _arrow()
        self._pa = pa
        fields = [pa.field(name, _type(pa, name)) for name in COLUMNS]
        about = {"gpubroker.format": str(FORMAT), "gpubroker.rows": "spans"}
        self._schema = pa.schema(fields, metadata=about)
        self._file = pq.ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            store_decimal_as_integer=True,
            write_statistics=["usd_per_hour", *sorted(MOMENTS)],
        )
        self._products = _Table(pa, PRODUCT, names.products)
        self._rates = _Table(pa, RATES, names.rates)

    def write(self, rows: Batch) -> None:
        """One row group."""
        pa = self._pa
        batch = rows if isinstance(rows, pa.RecordBatch) else self._batch(rows)
        columns = {
            **self._products.take(np.asarray(batch["product_id"])),
            "machine_id": batch["machine_id"],
            "usd_per_hour": _decimals(pa, np.asarray(batch["usd_micros"])),
            **self._rates.take(np.asarray(batch["rates_id"])),
            "first_at": batch["first_at"].cast(_type(pa, "first_at")),
            "until_at": batch["until_at"].cast(_type(pa, "until_at")),
        }
        self._file.write_table(pa.table([columns[name] for name in COLUMNS], schema=self._schema))

    def _batch(self, rows: Sequence[Row]) -> Any:
        """The same in columns."""
        pa = self._pa
        columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
        machine_ids = pa.array(columns.pop("machine_id"), pa.string()).dictionary_encode()
        return pa.record_batch(
            {
                "machine_id": machine_ids,
                **{name: pa.array(said, pa.int64()) for name, said in columns.items()},
            }
        )

    def close(self) -> None:
        """The footer."""
        self._file.close()


class PointWriter:
    """The same for the points of export_points.py."""

    def __init__(self, file: BinaryIO, resample_s: int) -> None:
        self._pa, pq = _arrow()
        self._resample_s = resample_s
        pa = self._pa
        money = [column(stat) for stat in STATS if stat not in ("available", "n")]
        types: dict[str, Any] = {
            "begin": pa.timestamp("s", tz="UTC"),
            "resample_s": pa.int64(),
            "gpu_count": pa.int64(),
            column("available"): pa.float64(),
            column("n"): pa.int64(),
            **{name: pa.decimal128(18, 6) for name in money},
        }
        text = pa.dictionary(pa.int32(), pa.string())
        about = {"gpubroker.format": str(FORMAT), "gpubroker.rows": "points"}
        self._schema = pa.schema([(name, types.get(name, text)) for name in POINT_COLUMNS], metadata=about)
        self._file = pq.ParquetWriter(file, self._schema, compression="zstd", store_decimal_as_integer=True)

    def write(self, rows: Sequence[Point]) -> None:
        """One row group."""
        pa = self._pa
        columns: dict[str, list[Any]] = {name: [getattr(point.group, name) for point in rows] for name in BY}
        columns["begin"] = [int(point.begin.timestamp()) for point in rows]
        columns["resample_s"] = [self._resample_s] * len(rows)
        made = {name: pa.array(values) for name, values in columns.items()}
        for stat in STATS:
            found = [point.figures.get(stat) for point in rows]
            if stat in ("available", "n"):
                made[column(stat)] = pa.array([None if one is None else float(one) for one in found])
            else:
                missing = np.array([one is None for one in found], dtype=bool)
                micros = np.array([int(one or 0) for one in found], dtype=np.int64)
                made[column(stat)] = _decimals(pa, micros, missing)
        arrays = [
            made[field.name].dictionary_encode().cast(field.type)
            if pa.types.is_dictionary(field.type)
            else made[field.name].cast(field.type)
            for field in self._schema
        ]
        self._file.write_table(pa.table(arrays, schema=self._schema))

    def close(self) -> None:
        """The footer."""
        self._file.close()


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'gpubroker[parquet]'") from error
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own one keeps what is freed: 40 MB
    return pa, pq


class _Table:
    """Few rows with many columns, of which each span takes one by its id."""

    def __init__(self, pa: Any, names: Sequence[str], rows: Mapping[int, Sequence[Any]]) -> None:
        self._pa, ids = pa, sorted(rows)
        self._places = np.zeros(max(ids, default=0) + 1, dtype=np.int64)  # by id
        self._places[ids] = np.arange(len(ids))
        self._columns = {
            name: _column(pa, name, [rows[key][at] for key in ids]) for at, name in enumerate(names)
        }

    def take(self, ids: np.ndarray[Any, Any]) -> dict[str, Any]:
        """A column each."""
        places = self._pa.array(self._places[ids])
        return {name: column.take(places) for name, column in self._columns.items()}


def _type(pa: Any, name: str) -> Any:
    if name in USD:
        return pa.decimal128(18, 6)
    if name in MOMENTS:
        return pa.timestamp("s", tz="UTC")
    if name in BOOLEANS:
        return pa.bool_()
    return pa.int64() if name in _INTEGERS else pa.dictionary(pa.int32(), pa.string())


def _column(pa: Any, name: str, values: Sequence[Any]) -> Any:
    if name in USD:
        micros = np.array([0 if value is None else int(value) for value in values], dtype=np.int64)
        return _decimals(pa, micros, np.array([value is None for value in values], dtype=bool))
    if name in BOOLEANS:
        return pa.array([None if value is None else bool(value) for value in values], pa.bool_())
    if name in _INTEGERS:
        return pa.array([None if value is None else int(value) for value in values], pa.int64())
    return pa.array([str(value) for value in values], pa.string()).dictionary_encode()


def _decimals(pa: Any, micros: np.ndarray[Any, Any], missing: np.ndarray[Any, Any] | None = None) -> Any:
    """Micro-dollars as decimals with six places: 128-bit integers, low half first."""
    halves = np.empty((len(micros), 2), dtype="<i8")
    halves[:, 0], halves[:, 1] = micros, micros >> 63
    valid = None
    if missing is not None and missing.any():
        valid = pa.py_buffer(np.packbits(~missing, bitorder="little"))
    return pa.Array.from_buffers(pa.decimal128(18, 6), len(micros), [valid, pa.py_buffer(halves)])
