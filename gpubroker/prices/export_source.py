"""Spans of a SQLite file in columns, faster than rows of Python: read by ADBC, in a process of its own.

    columns() ──path, SQL──> export_reader.py ──Arrow's stream of batches──> columns()

Of its own because ADBC brings another copy of SQLite: two of them in one process that both have the file open
would lose each other's locks (https://www.sqlite.org/howtocorrupt.html, 2.2.1). It reads while the other one
writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from gpubroker.errors import StoreError
from gpubroker.prices.daily import Where
from gpubroker.prices.export import BATCH, bare_sql

if TYPE_CHECKING:
    import pyarrow as pa


def is_here() -> bool:
    """Whether what it needs is installed; else rows do."""
    return all(find_spec(name) is not None for name in ("pyarrow", "adbc_driver_sqlite"))


def columns(path: Path, where: Where) -> Iterator[pa.RecordBatch]:
    """Batches with the columns of export.Row, of one moment: before this returns. Raises StoreError."""
    found = _columns(path, where)
    first = next(found, None)
    return iter(()) if first is None else chain([first], found)


def _columns(path: Path, where: Where) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    sql, values = bare_sql(where)
    asked = json.dumps({"path": str(path.absolute()), "sql": sql, "values": values, "batch": BATCH})
    words = [sys.executable, "-m", "gpubroker.prices.export_reader", asked]
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own one keeps what is freed
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe) as source:  # noqa: S603
        memory = pa.system_memory_pool()
        cut_off = (pa.ArrowInvalid, OSError)  # its status says why
        with suppress(*cut_off), pa.ipc.open_stream(source.stdout, memory_pool=memory) as rows:
            yield from rows
        said = "" if source.stderr is None else source.stderr.read().decode(errors="replace")
    if source.returncode != 0:
        reason = (said.strip() or "its reader was killed").splitlines()[-1]
        raise StoreError(f"{path} cannot be read: {reason[:256]}")
