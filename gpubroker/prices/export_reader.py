"""The process that reads a SQLite file for export_source.py: a query, and Arrow's stream to standard output.

Spans name their offers; what those are is looked up here, once for each.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adbc_driver_sqlite
import numpy as np
import pyarrow as pa
from adbc_driver_manager import AdbcConnection, AdbcStatement, Error

from gpubroker.prices import arrow
from gpubroker.prices.arrow import Array

# Offers are read by so many at a time, and so many blocks of them are kept: 24 MB.
_BLOCK = 1 << 15
_BLOCKS = 32
_SCHEMA = pa.schema(
    [
        ("product_id", pa.int64()),
        ("machine_id", pa.dictionary(pa.int32(), pa.string())),
        ("rates_id", pa.int64()),
        ("usd_micros", pa.int64()),
        ("first_at", pa.int64()),
        ("until_at", pa.int64()),
    ]
)


def _main() -> None:
    asked = json.loads(sys.argv[1])
    uri = f"{Path(asked['path']).as_uri()}?mode=rw"
    try:
        with adbc_driver_sqlite.connect(uri) as database, AdbcConnection(database) as connection:
            connection.set_autocommit(False)  # all of it at one moment
            _send(connection, asked["sql"], asked["values"], asked["batch"])
    except Error as error:
        sys.exit(str(error).splitlines()[0])


def _send(connection: Any, sql: str, values: list[str], batch: int) -> None:
    offers = _Offers(connection)
    with (
        _query(connection, sql, values, batch) as found,
        pa.ipc.new_stream(sys.stdout.buffer, _SCHEMA) as out,
    ):
        for spans in found:
            ids, *terms = spans.columns
            out.write_batch(pa.record_batch([*offers.of(arrow.numbers(ids)), *terms], schema=_SCHEMA))


@contextmanager
def _query(connection: Any, sql: str, values: Sequence[Any], batch: int) -> Iterator[pa.RecordBatchReader]:
    """Without ADBC's DB-API, which imports half of pyarrow: a third of a second, and 50 MB."""
    with AdbcStatement(connection) as statement:
        statement.set_options(**{"adbc.sqlite.query.batch_rows": str(batch)})
        statement.set_sql_query(sql)
        if values:
            statement.prepare()
            row = [{str(at): value for at, value in enumerate(values)}]
            statement.bind(pa.RecordBatch.from_pylist(row))
        handle, _ = statement.execute_query()
        with pa.RecordBatchReader.from_stream(handle) as found:
            yield found


class _Offers:
    """What offers are, by their ids: as many as a market has now, and not all that it ever had."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._blocks: OrderedDict[int, tuple[Array, pa.Array]] = OrderedDict()

    def of(self, ids: Array) -> tuple[pa.Array, pa.DictionaryArray]:
        """Product and machine of each."""
        numbers, places = ids // _BLOCK, ids % _BLOCK
        used = np.flatnonzero(np.bincount(numbers))
        blocks = [self._block(int(number)) for number in used]
        at = np.searchsorted(used, numbers) * _BLOCK + places
        seen = np.zeros(len(used) * _BLOCK, dtype=bool)
        seen[at] = True
        offers = arrow.integers(np.flatnonzero(seen))  # of this batch alone: a dictionary has nothing else
        mine = arrow.integers((np.cumsum(seen) - 1)[at])
        machines = pa.concat_arrays([block[1] for block in blocks]).take(offers).dictionary_encode()
        product_ids = np.concatenate([block[0] for block in blocks])[at]
        machine_ids = pa.DictionaryArray.from_arrays(machines.indices.take(mine), machines.dictionary)
        return arrow.integers(product_ids), machine_ids

    def _block(self, number: int) -> tuple[Array, pa.Array]:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        begin = number * _BLOCK
        where = f"id >= {begin} AND id < {begin + _BLOCK}"
        sql = f"SELECT id, product_id, machine_id FROM offers WHERE {where} ORDER BY id"  # noqa: S608
        with _query(self._connection, sql, (), _BLOCK) as reader:
            found = reader.read_all().combine_chunks()
        places = arrow.numbers(found["id"].chunk(0)) - begin
        product_ids, rows = np.zeros((2, _BLOCK), dtype=np.int64)
        product_ids[places] = arrow.numbers(found["product_id"].chunk(0))
        rows[places] = np.arange(len(places))
        machines = found["machine_id"].chunk(0).cast(pa.string()).take(arrow.integers(rows))
        self._blocks[number] = product_ids, machines
        while len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[number]


if __name__ == "__main__":
    _main()
