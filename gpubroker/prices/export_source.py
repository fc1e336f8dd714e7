"""Spans of a SQLite file in columns, faster than rows of Python: read by ADBC, in a process of its own.

    columns() ──path, SQL──> this module as a process ──Arrow's stream of batches──> columns()

Of its own because ADBC brings another copy of SQLite: two of them in one process that both have the file open
would lose each other's locks (https://www.sqlite.org/howtocorrupt.html, 2.2.1). It reads while the other one
writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpubroker.errors import StoreError
from gpubroker.prices.daily import Where
from gpubroker.prices.export import BATCH, bare_sql

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# Offers are read by so many at a time, and as many blocks of them are kept: 50 MB.
_BLOCK = 1 << 15
_BLOCKS = 128


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
    words = [sys.executable, "-m", __name__, asked]
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own one keeps what is freed
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe) as source:  # noqa: S603
        # A stream that ends before its time is told by its process's status.
        pool = pa.system_memory_pool()
        with (
            suppress(pa.ArrowInvalid, OSError),
            pa.ipc.open_stream(source.stdout, memory_pool=pool) as sent,
        ):
            yield from sent
        said = "" if source.stderr is None else source.stderr.read().decode(errors="replace")
    if source.returncode != 0:
        reason = (said.strip() or "its reader was killed").splitlines()[-1]
        raise StoreError(f"{path} cannot be read: {reason[:256]}")


class _NoPandas:
    """pyarrow imports pandas wherever it is: 50 MB, for nothing here."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _main() -> None:
    import adbc_driver_sqlite
    from adbc_driver_manager import AdbcConnection, Error

    sys.meta_path.insert(0, _NoPandas())
    asked = json.loads(sys.argv[1])
    uri = f"{Path(asked['path']).as_uri()}?mode=rw"
    try:
        with adbc_driver_sqlite.connect(uri) as database, AdbcConnection(database) as connection:
            connection.set_autocommit(False)  # all of it at one moment
            _send(connection, asked["sql"], asked["values"], asked["batch"])
    except Error as error:
        sys.exit(str(error).splitlines()[0])


def _send(connection: Any, sql: str, values: list[str], batch: int) -> None:
    import numpy as np
    import pyarrow as pa

    offers = _Offers(connection)
    schema = pa.schema(
        [
            ("product_id", pa.int64()),
            ("machine_id", pa.dictionary(pa.int32(), pa.string())),
            ("rates_id", pa.int64()),
            ("usd_micros", pa.int64()),
            ("first_at", pa.int64()),
            ("until_at", pa.int64()),
        ]
    )
    with _query(connection, sql, values, batch) as found, pa.ipc.new_stream(sys.stdout.buffer, schema) as out:
        for spans in found:
            ids, *terms = spans.columns
            product_ids, machine_ids = offers.of(np.asarray(ids))
            out.write_batch(pa.record_batch([product_ids, machine_ids, *terms], schema=schema))


@contextmanager
def _query(connection: Any, sql: str, values: Sequence[Any], batch: int) -> Iterator[pa.RecordBatchReader]:
    """Without ADBC's DB-API, which imports half of pyarrow: a third of a second, and 50 MB."""
    import pyarrow as pa
    from adbc_driver_manager import AdbcStatement

    with AdbcStatement(connection) as statement:
        statement.set_options(**{"adbc.sqlite.query.batch_rows": str(batch)})
        statement.set_sql_query(sql)
        if values:
            statement.prepare()
            statement.bind(pa.record_batch({str(at): [value] for at, value in enumerate(values)}))
        handle, _ = statement.execute_query()
        with pa.RecordBatchReader.from_stream(handle) as found:
            yield found


class _Offers:
    """What offers are, by their ids: as many as a market has now, and not all that it ever had."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._blocks: OrderedDict[int, tuple[np.ndarray[Any, Any], pa.Array]] = OrderedDict()

    def of(self, ids: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], pa.DictionaryArray]:
        """Product and machine of each."""
        import numpy as np
        import pyarrow as pa

        numbers, places = ids // _BLOCK, ids % _BLOCK
        used = np.flatnonzero(np.bincount(numbers))
        blocks = [self._block(int(number)) for number in used]
        at = np.searchsorted(used, numbers) * _BLOCK + places
        seen = np.zeros(len(used) * _BLOCK, dtype=bool)
        seen[at] = True
        offers = np.flatnonzero(seen)  # of this batch alone: a dictionary has nothing else
        mine = (np.cumsum(seen) - 1)[at]
        machines = pa.concat_arrays([block[1] for block in blocks]).take(offers).dictionary_encode()
        product_ids = np.concatenate([block[0] for block in blocks])[at]
        return product_ids, pa.DictionaryArray.from_arrays(machines.indices.take(mine), machines.dictionary)

    def _block(self, number: int) -> tuple[np.ndarray[Any, Any], pa.Array]:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        import numpy as np
        import pyarrow as pa

        begin = number * _BLOCK
        sql = "SELECT id, product_id, machine_id FROM offers WHERE id >= ? AND id < ? ORDER BY id"
        with _query(self._connection, sql, (begin, begin + _BLOCK), _BLOCK) as reader:
            found = reader.read_all()
        places = np.asarray(found["id"]) - begin
        product_ids = np.zeros(_BLOCK, dtype=np.int64)
        product_ids[places] = np.asarray(found["product_id"])
        rows = np.zeros(_BLOCK, dtype=np.int64)
        rows[places] = np.arange(len(places))
        machines = found["machine_id"].combine_chunks().cast(pa.string()).take(rows)
        self._blocks[number] = product_ids, machines
        while len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[number]


if __name__ == "__main__":
    _main()
