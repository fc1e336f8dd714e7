"""Old price history made small: each day's exact prices and counts stay, the spans behind them go.

    limits (how far each provider may be thinned) -> plan (what would go) -> thin: told first, then in batches

A span goes when it had ended by its provider's limit: a midnight before which days are counted (daily.py),
every named export has all spans, and prices finer than a day are wanted no more. With it go offers that have
no other span, and polls before the limit but for those that say how old a current price is. Rates stay: they
are few, and looking for those that nothing uses would read every span. docs/decisions/0016-thinning.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from sqlalchemy import Connection, insert, select, update

from gpubroker.doors import Clock
from gpubroker.errors import ConfigError, StoreError
from gpubroker.prices import tables
from gpubroker.prices.daily import rolled
from gpubroker.prices.database import Database, chunks
from gpubroker.prices.fastread import Run
from gpubroker.prices.rows import DAY_S, moment, seconds

# A batch is a write that others wait for: so long at most, and then a pause in which they come through.
# SQLite's own waiting looks every tenth of a second.
_BATCH_S, _PAUSE_S = 0.25, 0.15
_FIRST, _LEAST, _MOST = 1000, 100, 20_000
# docs/decisions/0003-spans.md: with every index and its share of offers.
_SPAN_BYTES = 84
_POLL_TEXTS = " + ".join(
    f"length({name})" for name in ("scope", "skips", "incomplete", "unknown_offers", "source", "notes")
)
_OLD_SPANS = """
FROM spans s CROSS JOIN offers o CROSS JOIN products p
WHERE o.id = s.offer_id AND p.id = o.product_id AND p.provider = ? AND s.until_at >= ? AND s.until_at <= ?
"""
_LATER = "SELECT 1 FROM spans t WHERE t.offer_id = s.offer_id AND (t.until_at IS NULL OR t.until_at > ?)"
_OLD_POLLS = """
FROM polls WHERE provider = ? AND id > ? AND coalesce(observed_at, started_at) < ?
AND id NOT IN (SELECT poll_id FROM coverage)
AND id NOT IN (SELECT confirmed_by FROM latest WHERE confirmed_by IS NOT NULL)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How far one provider may be thinned."""

    provider: str
    until_at: int  # what had ended by then may go; 0 = nothing
    held_by: tuple[str, ...] = ()  # exports that would lose what they have not written yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would go of one provider."""

    limit: Limit
    spans: int
    offers: int
    polls: int
    bytes: int  # about
    oldest: int | None  # when the first of the spans began; None = there are none
    cut_off: bool = False  # one was begun and did not come to its end

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.spans or self.polls or self.cut_off)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """Rows that one call took away, of all providers."""

    spans: int = 0
    offers: int = 0
    polls: int = 0

    def __add__(self, other: Gone) -> Gone:
        return Gone(
            spans=self.spans + other.spans, offers=self.offers + other.offers, polls=self.polls + other.polls
        )


def limits(run: Run, now: datetime, keep_days: int, *, without: str | None = None) -> list[Limit]:
    """Of every provider with days that are counted. `without`: an export that is about to be forgotten."""
    wanted = (seconds(now) // DAY_S - keep_days) * DAY_S
    exported = {name: json.loads(done) for name, done in run("SELECT name, done FROM exports", ())}
    exported.pop(without or "", None)
    found = []
    for provider, until_day in rolled(run).items():
        may = max(0, min(wanted, until_day * DAY_S))
        reached = {name: done.get(provider, 0) // DAY_S * DAY_S for name, done in exported.items()}
        held_by = tuple(sorted(name for name, until in reached.items() if until < may))
        until_at = min([may, *reached.values()])
        found.append(Limit(provider=provider, until_at=until_at, held_by=held_by))
    return found


def plan(run: Run, limit: Limit) -> Plan:
    """Counts; reads every span that would go."""
    old = (limit.provider, 0, limit.until_at)
    ((spans, oldest),) = run(f"SELECT count(*), min(s.first_at) {_OLD_SPANS}", old)
    ((offers,),) = run(
        f"SELECT count(DISTINCT s.offer_id) {_OLD_SPANS} AND NOT EXISTS ({_LATER})", (*old, limit.until_at)
    )
    ((polls, texts),) = run(f"SELECT count(*), sum({_POLL_TEXTS}) {_OLD_POLLS}", old)
    return Plan(
        limit=limit,
        spans=int(spans),
        offers=int(offers),
        polls=int(polls),
        bytes=int(spans) * _SPAN_BYTES + int(texts or 0),
        oldest=None if oldest is None else int(oldest),
        cut_off=limit.provider in unfinished(run),
    )


def thin(
    database: Database,
    clock: Clock,
    plans: Sequence[Plan],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Gone:
    """Take away what was planned; `on_rows` hears how many spans and polls each batch took.

    From the first write on, whoever asks is told that the provider is thinned: killed at any point, nothing
    is answered with too little, and the next run goes on. Raises ConfigError while another process does it.
    """
    with database.hold("compact") as is_ours:
        if not is_ours:
            raise ConfigError("gpubroker db compact is running in another process: wait for it")
        gone = Gone()
        for one in plans:
            if not one.is_empty:
                gone += _Thinning(database, clock, one.limit, on_rows).run()
        return gone


class _Thinning:
    """Of one provider."""

    def __init__(
        self, database: Database, clock: Clock, limit: Limit, on_rows: Callable[[int], None]
    ) -> None:
        self._database, self._clock, self._limit, self._on_rows = database, clock, limit, on_rows
        self._size = _FIRST

    def run(self) -> Gone:
        self._id = self._begin()
        gone, last = Gone(), 0
        spans = f"SELECT s.id, s.offer_id, s.until_at {_OLD_SPANS} ORDER BY s.until_at"
        while rows := self._read(spans, last):
            gone += self._write(partial(self._drop_spans, rows), len(rows))
            last = int(rows[-1][2])
        last = 0
        while rows := self._read(f"SELECT id {_OLD_POLLS} ORDER BY id", last):
            gone += self._write(partial(self._drop_polls, rows), len(rows))
            last = int(rows[-1][0])
        if moment(self._limit.until_at) >= self._told:
            with self._database.write() as connection:
                mine = update(tables.compactions).where(tables.compactions.c.id == self._id)
                connection.execute(mine.values(ended_at=self._database.now(connection)))
        return gone

    def _begin(self) -> int:
        """Its record; that of a run which was cut off is gone on with."""
        table, until_at = tables.compactions, moment(self._limit.until_at)
        with self._database.write() as connection:
            mine = select(table.c.id, table.c.until_at).where(
                table.c.provider == self._limit.provider, table.c.ended_at.is_(None)
            )
            if (found := connection.execute(mine).first()) is not None:
                self._told = max(until_at, found.until_at)  # what may be gone stays said
                later = {"until_at": self._told}
                connection.execute(update(table).where(table.c.id == found.id).values(later))
                return int(found.id)
            self._told = until_at
            begun = {"begun_at": self._database.now(connection), "until_at": until_at}
            row = insert(table).values(provider=self._limit.provider, **begun)
            return int(connection.execute(row.returning(table.c.id)).scalar_one())

    def _read(self, sql: str, after: int) -> list[tuple[int, ...]]:
        """A batch of rows. Outside the write, which only deletes them: nobody changes what is over."""
        values = (self._limit.provider, after, self._limit.until_at)
        with self._database.read() as connection:
            found = self._database.run(connection, f"{sql} LIMIT {self._size}", values)
            return [tuple(row) for row in found.fetchall()]

    def _write(self, work: Callable[[Connection], Gone], rows: int) -> Gone:
        start_s = self._clock.monotonic_s()
        # The lock of the provider's polls: none opens a span of an offer that goes.
        with self._database.write(f"gpubroker keep {self._limit.provider}") as connection:
            gone = work(connection)
            table = tables.compactions.c
            count = {name: table[name] + getattr(gone, name) for name in ("spans", "offers", "polls")}
            connection.execute(update(tables.compactions).where(table.id == self._id).values(count))
        took_s = self._clock.monotonic_s() - start_s
        self._size = _next_size(self._size, took_s)
        self._on_rows(rows)
        self._clock.sleep(_PAUSE_S)
        return gone

    def _drop_spans(self, rows: Sequence[tuple[int, ...]], connection: Connection) -> Gone:
        self._refuse_if_held(connection)
        spans = self._delete(connection, "spans", [row[0] for row in rows])
        orphaned = " AND NOT EXISTS (SELECT 1 FROM spans s WHERE s.offer_id = offers.id)"
        offers = self._delete(connection, "offers", sorted({row[1] for row in rows}), orphaned)
        return Gone(spans=spans, offers=offers)

    def _refuse_if_held(self, connection: Connection) -> None:
        """An export of a new name has begun since the limit was found, and may be cut off and come again."""
        self._database.lock(connection, "gpubroker exports")
        for name, done in self._database.run(connection, "SELECT name, done FROM exports"):
            if json.loads(done).get(self._limit.provider, 0) < self._limit.until_at:
                raise ConfigError(f"export {name} began meanwhile: run gpubroker db compact again after it")

    def _drop_polls(self, rows: Sequence[tuple[int, ...]], connection: Connection) -> Gone:
        return Gone(polls=self._delete(connection, "polls", [row[0] for row in rows]))

    def _delete(self, connection: Connection, table: str, ids: Sequence[int], more: str = "") -> int:
        gone = 0
        for chunk in chunks(ids):
            sql = f"DELETE FROM {table} WHERE id IN ({', '.join('?' * len(chunk))}){more}"  # noqa: S608
            gone += int(self._database.run(connection, sql, tuple(chunk)).rowcount)
        return gone


def _next_size(size: int, took_s: float) -> int:
    """Twice as many while a batch is quick, half as many once it is not."""
    if took_s > _BATCH_S:
        return max(_LEAST, size // 2)
    return min(_MOST, size * 2) if took_s < _BATCH_S / 3 else size


def unfinished(run: Run) -> set[str]:
    """Providers whose last compaction is under way, or was cut off."""
    return {provider for (provider,) in run("SELECT provider FROM compactions WHERE ended_at IS NULL", ())}


def forget_export(database: Database, name: str) -> None:
    """An export that is run no more: what it has not written waits for it no longer. Raises ConfigError."""
    table = tables.exports
    with database.hold(f"export {name}") as is_ours, database.write("gpubroker exports") as connection:
        if not is_ours:
            raise ConfigError(f"export {name} is running in another process: wait for it")
        if connection.execute(table.delete().where(table.c.name == name)).rowcount == 0:
            raise ConfigError(f"no export is called {name!r}")


def give_back(database: Database, free_bytes: Callable[[], int]) -> int:
    """SQLite: write the file anew without its holes; the bytes that the disk has back. Others wait meanwhile.

    Raises StoreError where the disk has no room for the copy and its log.
    """
    size, holes = _size(database)
    needed = 2 * (size - holes)
    if (free := free_bytes()) < needed:
        raise StoreError(
            f"{database.where}: writing it anew takes {needed / 1e6:,.0f} MB of free disk, and there are"
            f" {free / 1e6:,.0f} MB: its holes are filled by later polls all the same"
        )
    database.vacuum()
    return size - _size(database)[0]


def _size(database: Database) -> tuple[int, int]:
    """Bytes of all pages, and of those that nothing is on."""
    with database.read() as connection:
        pages, free, size = (
            int(database.run(connection, f"PRAGMA {name}").scalar())
            for name in ("page_count", "freelist_count", "page_size")
        )
    return pages * size, free * size
