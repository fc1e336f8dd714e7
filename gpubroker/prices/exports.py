"""Exports that go on where the last one ended: each ended span in one file of one run, and none twice.

    begin: what is about to be written -> pending     write: day=.../spans-000007.parquet     end: -> done

However a run ends, the next one finds `pending` and writes the same rows to the same names again: a file is
whole or not there, and writing it once more changes nothing. Runs of one name exclude each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

from sqlalchemy import insert, select, update

from gpubroker.errors import ConfigError
from gpubroker.prices import tables
from gpubroker.prices.database import Database
from gpubroker.prices.export import Batch, Names, Range, by_day, ended_spans, ended_up_to, names_of
from gpubroker.prices.rows import DAY_S, moment

# Writes one file by its name below the place; returns its rows.
Put = Callable[[str, Iterable[Batch], Names], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A run whose files may be there in part."""

    number: int
    place: str
    suffix: str
    up_to: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a run wrote."""

    number: int
    files: dict[str, int]  # name below the place -> rows
    was_cut_off: bool  # the run before it was, and its files were written again

    @property
    def rows(self) -> int:
        """In all of them."""
        return sum(self.files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far the exports of a name have come."""

    name: str
    runs: int
    up_to: datetime | None  # what has ended until then is in; None = nothing yet
    is_cut_off: bool  # or under way


def standings(database: Database) -> list[Standing]:
    """Of every name."""
    table = tables.exports
    with database.read() as connection:
        rows = connection.execute(select(table).order_by(table.c.name)).all()
    return [
        Standing(
            name=row.name,
            runs=row.number,
            up_to=moment(max(done.values())) if (done := json.loads(row.done)) else None,
            is_cut_off=row.pending is not None,
        )
        for row in rows
    ]


def since_last(database: Database, name: str, place: str, suffix: str, put: Put) -> list[Exported]:
    """What has ended since the last run of this name; first what that one may have left undone.

    Raises ConfigError: another process is at it, or the last one was cut off while it wrote elsewhere.
    """
    with database.hold(f"export {name}") as is_ours:
        if not is_ours:
            raise ConfigError(f"export {name} is running in another process: wait for it")
        runs = list[Exported]()
        done, number, pending = _state(database, name)
        if pending is not None:
            if (pending.place, pending.suffix) != (place, suffix):
                raise ConfigError(
                    f"export {name} was cut off while it wrote {pending.suffix} files to {pending.place}:"
                    " run it like that once more"
                )
            runs.append(_run(database, name, done, pending, put, was_cut_off=True))
            done, number, _ = _state(database, name)
        with database.read() as connection:
            up_to = ended_up_to(partial(database.run, connection))
        if up_to != done:
            pending = Pending(number=number + 1, place=place, suffix=suffix, up_to=up_to)
            with database.write("gpubroker exports") as connection:
                mine = update(tables.exports).where(tables.exports.c.name == name)
                connection.execute(mine.values(pending=json.dumps(asdict(pending))))
            runs.append(_run(database, name, done, pending, put, was_cut_off=False))
        return runs


def _state(database: Database, name: str) -> tuple[dict[str, int], int, Pending | None]:
    """Of a name; a new one gets a row."""
    table = tables.exports
    with database.write("gpubroker exports") as connection:
        row = connection.execute(select(table).where(table.c.name == name)).first()
        if row is None:
            connection.execute(insert(table).values(name=name, number=0, done="{}"))
            return {}, 0, None
    return json.loads(row.done), row.number, row.pending and Pending(**json.loads(row.pending))


def _run(
    database: Database, name: str, done: dict[str, int], pending: Pending, put: Put, *, was_cut_off: bool
) -> Exported:
    files = dict[str, int]()
    with database.read() as connection:
        names = names_of(partial(database.run, connection))
        spans = ended_spans(partial(database.stream, connection), Range(after=done, up_to=pending.up_to))
        for day, batches in by_day(spans):
            date = datetime.fromtimestamp(day * DAY_S, UTC)
            file = f"day={date:%Y-%m-%d}/spans-{pending.number:06d}{pending.suffix}"
            files[file] = put(file, batches, names)
    with database.write("gpubroker exports") as connection:
        mine = update(tables.exports).where(tables.exports.c.name == name)
        over = {"done": json.dumps({**done, **pending.up_to}), "number": pending.number, "pending": None}
        connection.execute(mine.values(over))
    return Exported(number=pending.number, files=files, was_cut_off=was_cut_off)
