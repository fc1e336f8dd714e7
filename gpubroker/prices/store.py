"""The store: what the providers said, kept as price spans, and the same read back.

poll -> begin_poll, keep or fail_poll -> snapshot -> quote. Every method is one transaction.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from sqlalchemy import Connection, Row, func, select, update

from gpubroker.doors import Clock
from gpubroker.errors import StoreError
from gpubroker.model import Offer, OfferQuery, Parsed, Priced, Skipped, Slice
from gpubroker.plan.hazard import Span
from gpubroker.prices import fastread, polls, rows, tables
from gpubroker.prices.database import Database
from gpubroker.prices.fastread import Snapshot
from gpubroker.prices.keeping import Keeping
from gpubroker.prices.polls import ProviderState, SkipCount
from gpubroker.prices.spans import diff


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepResult:
    """What a kept poll changed, in offers. kept = opened + changed + those whose price stayed."""

    observed_at: datetime
    kept: int
    opened: int  # first seen, or back again
    changed: int  # a priced term is another
    closed: int  # no longer offered
    unknown: int  # may still be there: the poll could not see their part
    skipped: tuple[Skipped, ...]  # the provider's, and offers that were listed twice


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """One recorded poll.

    finished_at None: still running, or its process died. observed_at None: nothing was kept.
    """

    id: int
    provider: str
    scope: OfferQuery
    started_at: datetime
    finished_at: datetime | None = None
    observed_at: datetime | None = None
    fetched: int = 0
    kept: int = 0
    skipped: int = 0
    skips: Mapping[str, SkipCount] = field(default_factory=dict)  # reason -> rows
    incomplete: tuple[Slice, ...] = ()
    unknown_offers: frozenset[int] = frozenset()  # current offers it could not speak for
    error: str | None = None  # None = it did not fail
    source: str = ""
    notes: tuple[str, ...] = ()


class _StateChanges(TypedDict, total=False):
    missing: str
    unreachable_until: datetime | None
    reason: str
    tried_at: datetime | None
    asked_with: str


class Store:
    """The price database. Opening does no I/O but making the parent folder."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database = database
        self._clock = clock

    @classmethod
    def open(cls, url: str, clock: Clock) -> Store:
        """Raises ConfigError for a URL that is none, StoreError when the folder cannot be made."""
        database = Database(url, clock)
        if database.path is not None:
            try:
                database.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"{database.path.parent} cannot be made ({error.strerror}): set GPUBROKER_DB_URL"
                ) from error
        return cls(database, clock)

    @property
    def where(self) -> str:
        """Where the database is, for people; without a password."""
        return self.database.where

    @property
    def path(self) -> Path | None:
        """The SQLite file, for fastread; None for PostgreSQL."""
        return self.database.path

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def migrate(self) -> None:
        """Bring the tables up to this code; at once for any number of processes. Raises SchemaTooNew."""
        self.database.migrate()

    def revision(self) -> str | None:
        """The schema's; None = there are no tables yet. Raises SchemaTooNew."""
        return self.database.check_schema()

    def check_schema(self) -> None:
        """Raises SchemaTooNew when a newer gpubroker wrote this database."""
        self.database.check_schema()

    def begin_poll(self, provider: str, query: OfferQuery) -> int:
        """Record that a poll starts, and its scope. Returns its id."""
        values = {"provider": provider, "scope": polls.scope_json(query), "started_at": self._clock.now()}
        with self.database.write() as connection:
            added = connection.execute(tables.polls.insert().values(values).returning(tables.polls.c.id))
            return int(added.scalar_one())

    def keep(self, poll_id: int, parsed: Parsed) -> KeepResult:
        """Store what a poll brought, whole or not at all.

        Its moment is now, or a second after the provider's last kept poll where the clock has not moved
        on: two polls are never at one moment, and spans never run backwards.
        """
        with self.database.read() as connection:
            provider, _ = _running(connection, poll_id)
        with _collector_paused(), self.database.write(f"gpubroker keep {provider}") as connection:
            _, query = _running(connection, poll_id)
            keeping = Keeping(self.database, connection, provider, query)
            current = keeping.current()
            known = keeping.known(current)
            listed, left_out = rows.listing(parsed.offers, query, keeping.product_ids)
            changes = diff(current, listed, known, query, parsed.incomplete)
            at = self._next_second(connection, provider)
            keeping.apply(changes, known, at, poll_id)
            keeping.roll(at)
            result = KeepResult(
                observed_at=rows.moment(at),
                kept=len(listed),
                opened=len(changes.opened),
                changed=len(changes.changed),
                closed=len(changes.closed),
                unknown=len(changes.unknown),
                skipped=(*parsed.skipped, *left_out),
            )
            self._finish(
                connection,
                poll_id,
                observed_at=result.observed_at,
                fetched=parsed.fetched,
                kept=result.kept,
                skipped=len(result.skipped),
                skips=polls.skips_json(result.skipped),
                incomplete=polls.incomplete_json(parsed.incomplete),
                unknown_offers=json.dumps([old.offer_id for old, _ in changes.unknown]),
                source=parsed.source,
                notes=json.dumps(parsed.notes),
            )
        return result

    def fail_poll(self, poll_id: int, error: str) -> None:
        """Record that a poll brought nothing: all it would have covered is unknown."""
        with self.database.write() as connection:
            _running(connection, poll_id)
            self._finish(connection, poll_id, error=error)

    def snapshot(self, gpus: Collection[str] | None) -> Snapshot:
        """Current offers of these GPUs (None = every one), provider states and what was polled when."""
        with self.database.read() as connection:
            return fastread.read(partial(self.database.run, connection), gpus)

    def current(self, gpus: Collection[str] | None = None) -> list[Priced]:
        """Offers with an open span, each as old as the poll that last confirmed it. None = every GPU."""
        return self.snapshot(gpus).live

    def polls(self, provider: str | None = None, limit: int = 20) -> list[Poll]:
        """Recorded polls, the newest first."""
        recorded = tables.polls
        query = select(recorded).order_by(recorded.c.id.desc()).limit(limit)
        if provider is not None:
            query = query.where(recorded.c.provider == provider)
        with self.database.read() as connection:
            return [_poll_of(row) for row in connection.execute(query)]

    def last_poll(self, provider: str) -> Poll | None:
        """The newest poll, kept or not; None = there was none."""
        return next(iter(self.polls(provider, limit=1)), None)

    def provider_states(self) -> dict[str, ProviderState]:
        """What the last refresh of each provider found out."""
        return dict(self.snapshot(()).states)

    def set_provider_state(self, provider: str, **changes: Unpack[_StateChanges]) -> None:
        """Change the named fields; the others stay."""
        state = tables.provider_state
        with self.database.write(f"gpubroker state {provider}") as connection:
            mine = state.c.provider == provider
            if connection.execute(select(state.c.provider).where(mine)).first() is None:
                connection.execute(state.insert().values(provider=provider, **changes))
            elif changes:
                connection.execute(update(state).where(mine).values(changes))

    def introduce(self, providers: Iterable[str]) -> None:
        """Have a row for each of them, so that one nobody has asked yet is known to be due."""
        state = tables.provider_state
        with self.database.write("gpubroker introduce") as connection:
            known = set(connection.execute(select(state.c.provider)).scalars())
            for provider in sorted(set(providers) - known):
                connection.execute(state.insert().values(provider=provider))

    def observations(self, provider: str) -> Iterator[tuple[datetime, Offer]]:
        """Every offer of every kept poll, as it was listed but for what is volatile."""
        with self.database.read() as connection:
            yield from _expanded(self.database, connection, provider)

    def spans_of(self, offer: Offer) -> list[Span]:
        """At what price this very offer was there, and when; gaps are times without it."""
        product, found = tables.products.c, tables.spans.c
        query = (
            select(found.first_at, found.until_at, found.usd_per_hour)
            .select_from(tables.spans.join(tables.offers).join(tables.products))
            .where(*(product[name] == getattr(offer, name) for name in rows.PRODUCT))
            .where(tables.offers.c.machine_id == offer.machine_id)
            .order_by(found.first_at)
        )
        with self.database.read() as connection:
            return [Span(*row) for row in connection.execute(query)]

    def open_offers(self, provider: str) -> int:
        """How many current offers a provider has."""
        query = select(func.count()).select_from(tables.latest.join(tables.products))
        with self.database.read() as connection:
            return connection.execute(query.where(tables.products.c.provider == provider)).scalar_one()

    def counts(self) -> dict[str, int]:
        """Rows of each table."""
        with self.database.read() as connection:
            return {
                table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in tables.metadata.sorted_tables
            }

    def _next_second(self, connection: Connection, provider: str) -> int:
        sql = "SELECT max(observed_at) FROM polls WHERE provider = ?"
        last = self.database.run(connection, sql, (provider,)).scalar()
        now = rows.seconds(self._clock.now())
        return now if last is None else max(now, last + 1)

    def _finish(self, connection: Connection, poll_id: int, **values: Any) -> None:
        values["finished_at"] = self._clock.now()
        connection.execute(update(tables.polls).where(tables.polls.c.id == poll_id).values(values))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeping makes 100,000 objects without a cycle: looking for one costs a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _running(connection: Connection, poll_id: int) -> tuple[str, OfferQuery]:
    recorded = tables.polls.c
    query = select(recorded.provider, recorded.scope, recorded.finished_at).where(recorded.id == poll_id)
    row = connection.execute(query).first()
    if row is None or row.finished_at is not None:
        raise StoreError(f"poll {poll_id} is not running: begin another")
    return row.provider, polls.scope_of(row.scope)


def _poll_of(row: Row[Any]) -> Poll:
    values = dict(row._mapping)
    return Poll(
        **{
            **values,
            "scope": polls.scope_of(values["scope"]),
            "skips": polls.skips_of(values["skips"]),
            "incomplete": polls.incomplete_of(values["incomplete"]),
            "unknown_offers": frozenset(json.loads(values["unknown_offers"])),
            "notes": tuple(json.loads(values["notes"])),
        }
    )


_POLLS_SQL = """
SELECT observed_at, scope, unknown_offers FROM polls
WHERE provider = ? AND observed_at IS NOT NULL ORDER BY observed_at
"""
_SPANS_SQL = f"""
SELECT {", ".join(f"p.{name}" for name in rows.PRODUCT)}, {", ".join(f"r.{name}" for name in rows.RATES)},
       s.offer_id, o.machine_id, o.host_id, s.usd_per_hour, s.first_at, s.until_at
FROM products p JOIN offers o ON o.product_id = p.id JOIN spans s ON s.offer_id = o.id
     JOIN rates r ON r.id = s.rates_id
WHERE p.provider = ? ORDER BY s.first_at, o.id
"""  # noqa: S608  only names of columns go in


def _expanded(database: Database, connection: Connection, provider: str) -> Iterator[tuple[datetime, Offer]]:
    """Polls in order, with the spans that are open at each: from first_at until before until_at."""
    spans = iter(database.run(connection, _SPANS_SQL, (provider,)))
    upcoming = next(spans, None)
    active: dict[int, tuple[int | None, Offer]] = {}
    for at, scope, unknown_offers in database.run(connection, _POLLS_SQL, (provider,)).all():
        query, unknown = polls.scope_of(scope), set(json.loads(unknown_offers))
        while upcoming is not None and upcoming.first_at <= at:
            offer_id, until, offer = _span_of(upcoming)
            active[offer_id] = (until, offer)
            upcoming = next(spans, None)
        active = {key: span for key, span in active.items() if span[0] is None or span[0] > at}
        for offer_id, (_, offer) in active.items():
            if offer_id not in unknown and query.covers(offer):
                yield rows.moment(at), offer


def _span_of(row: Any) -> tuple[int, int | None, Offer]:
    product, rates = row[: len(rows.PRODUCT)], row[len(rows.PRODUCT) : -6]
    volatile = rows.Volatile(host_id=row.host_id)
    offer = rows.offer_of(product, row.machine_id, row.usd_per_hour, rates, volatile)
    return row.offer_id, row.until_at, offer
