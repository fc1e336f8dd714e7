"""Exports that go on where the last one ended: each ended span in one file of one run, and none twice.

    begin: what is about to be written -> pending     write: day=.../spans-000007.parquet     end: -> done

However a run ends, the next one finds `pending` and writes the same rows to the same names again: a file is
whole or not there, and writing it once more changes nothing. Runs of one name exclude each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Protocol

from sqlalchemy import Connection, insert, select, update

from gpubroker.errors import ConfigError
from gpubroker.prices import export_points, tables
from gpubroker.prices.daily import Where
from gpubroker.prices.database import Database
from gpubroker.prices.export import Begin, Range, by_day, ended_spans, ended_up_to, names_of, spans_of
from gpubroker.prices.fastread import Run
from gpubroker.prices.rows import DAY_S, moment
from gpubroker.units import duration_text

# Writes one file by its name below the place; returns its rows.
Put = Callable[[str, Iterable[Sized], Begin], int]


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


class Content(Protocol):
    """What goes into the files of a cursor."""

    @property
    def stem(self) -> str:
        """Of a file's name."""

    @property
    def what(self) -> str:
        """After the cursor's name, where it is not what cursors usually are of."""

    def up_to(self, run: Run) -> dict[str, int]:
        """By provider: what had ended by that second never changes."""

    def by_day(
        self, database: Database, connection: Connection, after: Mapping[str, int], up_to: Mapping[str, int]
    ) -> Iterator[tuple[int, Iterable[Sized]]]:
        """(day, batches of it); each is to be read before the next."""

    def begin(self, database: Database, connection: Connection) -> Begin:
        """A file."""


class Spans:
    """Spans that have ended, by the day on which they did."""

    stem, what = "spans", ""

    def up_to(self, run: Run) -> dict[str, int]:
        """See Content."""
        return ended_up_to(run)

    def by_day(
        self, database: Database, connection: Connection, after: Mapping[str, int], up_to: Mapping[str, int]
    ) -> Iterator[tuple[int, Iterable[Sized]]]:
        """See Content."""
        return by_day(ended_spans(partial(database.stream, connection), Range(after=after, up_to=up_to)))

    def begin(self, database: Database, connection: Connection) -> Begin:
        """See Content."""
        return spans_of(names_of(partial(database.run, connection)))


SPANS = Spans()


@dataclass(frozen=True, slots=True)
class Points:
    """Points of days that are over."""

    resample_s: int

    @property
    def stem(self) -> str:
        """With how long each stretch is."""
        return f"points-{duration_text(self.resample_s)}"

    @property
    def what(self) -> str:
        """Another cursor than that of spans, and of other stretches."""
        return f" {self.stem}"

    def up_to(self, run: Run) -> dict[str, int]:
        """See Content."""
        return export_points.days_over(run)

    def by_day(
        self, database: Database, connection: Connection, after: Mapping[str, int], up_to: Mapping[str, int]
    ) -> Iterator[tuple[int, Iterable[Sized]]]:
        """See Content."""
        run = partial(database.run, connection)
        return export_points.by_day(run, Where(), self.resample_s, after, up_to)

    def begin(self, database: Database, connection: Connection) -> Begin:
        """See Content."""
        return export_points.points_of(self.resample_s)


def since_last(
    database: Database, name: str, place: str, suffix: str, put: Put, content: Content = SPANS
) -> list[Exported]:
    """What has ended since the last run of this name; first what that one may have left undone.

    Raises ConfigError: another process is at it, or the last one was cut off while it wrote elsewhere.
    """
    name = f"{name}{content.what}"
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
            runs.append(_run(database, name, done, pending, put, content, was_cut_off=True))
            done, number, _ = _state(database, name)
        with database.read() as connection:
            up_to = content.up_to(partial(database.run, connection))
        if up_to != done:
            pending = Pending(number=number + 1, place=place, suffix=suffix, up_to=up_to)
            with database.write("gpubroker exports") as connection:
                mine = update(tables.exports).where(tables.exports.c.name == name)
                connection.execute(mine.values(pending=json.dumps(asdict(pending))))
            runs.append(_run(database, name, done, pending, put, content, was_cut_off=False))
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
    database: Database,
    name: str,
    done: dict[str, int],
    pending: Pending,
    put: Put,
    content: Content,
    *,
    was_cut_off: bool,
) -> Exported:
    files = dict[str, int]()
    with database.read() as connection:
        begin = content.begin(database, connection)
        for day, batches in content.by_day(database, connection, done, pending.up_to):
            date = moment(day * DAY_S)
            file = f"day={date:%Y-%m-%d}/{content.stem}-{pending.number:06d}{pending.suffix}"
            files[file] = put(file, batches, begin)
    with database.write("gpubroker exports") as connection:
        mine = update(tables.exports).where(tables.exports.c.name == name)
        over = {"done": json.dumps({**done, **pending.up_to}), "number": pending.number, "pending": None}
        connection.execute(mine.values(over))
    return Exported(number=pending.number, files=files, was_cut_off=was_cut_off)
