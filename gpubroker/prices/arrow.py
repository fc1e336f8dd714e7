"""Between numpy and Arrow by their buffers: pyarrow's own conversions import pandas wherever it is installed,

a quarter of a second and 50 MB in each process. Needs the extra `parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


def numbers(array: pa.Array) -> Array:
    """Of 64-bit integers without a null. Shares its memory."""
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")
    return np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array)]


def integers(values: Array, missing: Array | None = None) -> pa.Array:
    """64 bits each. `missing` is True where there is none, here and below."""
    return _made(pa.int64(), np.ascontiguousarray(values, dtype=np.int64), missing)


def booleans(values: Array, missing: Array | None = None) -> pa.Array:
    """A bit each."""
    return _made(pa.bool_(), np.packbits(values, bitorder="little"), missing, len(values))


def usd(micros: Array, missing: Array | None = None) -> pa.Array:
    """Micro-dollars as decimals with six places: 128-bit integers, low half first."""
    halves = np.empty((len(micros), 2), dtype="<i8")
    halves[:, 0], halves[:, 1] = micros, micros >> 63
    return _made(pa.decimal128(18, 6), halves, missing)


def strings(values: Sequence[str]) -> pa.Array:
    """As a dictionary."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers).dictionary_encode()


def _made(kind: pa.DataType, values: Array, missing: Array | None, length: int | None = None) -> pa.Array:
    valid = None
    if missing is not None and missing.any():
        valid = pa.py_buffer(np.packbits(~missing, bitorder="little"))
    return pa.Array.from_buffers(
        kind, len(values) if length is None else length, [valid, pa.py_buffer(values)]
    )
