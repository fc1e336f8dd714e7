"""One poll into the tables: read what is open, write what spans.diff says changed. Inside one transaction.

Plain SQL on tuples where 20,000 offers pass, SQLAlchemy where only the changed ones do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, select, tuple_

from gpubroker.model import Offer, OfferQuery, Skipped
from gpubroker.prices import tables
from gpubroker.prices.database import Database
from gpubroker.prices.rows import (
    COVERAGE_SQL,
    PRODUCT,
    RATES,
    Coverage,
    Listed,
    Product,
    kept_of,
    scope_json,
    where_gpus,
)
from gpubroker.prices.spans import Changes, Current, Key, by_key

T = TypeVar("T")
_CHUNK = 1000  # values in one statement: SQLite allows 32766, PostgreSQL 65535

# From latest, which holds what is current and nothing else. CROSS JOIN keeps SQLite to this order.
_OPEN_SQL = """
SELECT p.id, o.machine_id, o.host_id, l.offer_id, s.id, s.usd_per_hour, r.digest, r.verified,
       l.details, l.confirmed_by
FROM latest l
CROSS JOIN products p
CROSS JOIN offers o
CROSS JOIN spans s
CROSS JOIN rates r
WHERE p.id = l.product_id AND o.id = l.offer_id
  AND s.offer_id = l.offer_id AND s.until_at IS NULL AND r.id = s.rates_id
  AND p.provider = ?
"""
_UPSERT_LATEST = """
INSERT INTO latest (offer_id, product_id, details) VALUES (?, ?, ?)
ON CONFLICT (offer_id) DO UPDATE SET details = excluded.details, confirmed_by = NULL
"""


class Keeping:
    """The tables of one provider within a write transaction that excludes its other polls."""

    def __init__(self, database: Database, connection: Connection, provider: str, query: OfferQuery) -> None:
        self._database = database
        self._connection = connection
        self._provider = provider
        self._query = query
        self._product_ids = self._read_products()

    def listed(self, offers: Sequence[Listed]) -> tuple[dict[Key, Listed], list[Skipped]]:
        """What the poll brought by key, its new products inserted."""
        missing = {row.product for row in offers} - set(self._product_ids)
        if missing:
            self._insert("products", PRODUCT, sorted(missing))
            self._product_ids = self._read_products()
        return by_key(offers, self._product_ids)

    def current(self) -> dict[Key, Current]:
        """What is open within the scope's GPUs."""
        products = {product_id: product for product, product_id in self._product_ids.items()}
        where, names = where_gpus(self._query.gpus)
        found = self._run(_OPEN_SQL + where, (self._provider, *names)).cursor.fetchall()
        return {(row[0], row[1]): Current(products[row[0]], *row) for row in found}

    def apply(self, changes: Changes, at: int) -> None:
        """Write the changes of the poll that observed at this second."""
        opened = self._find_offers(changes.opened)
        changed = [(old.offer_id, old.product_id, new) for old, new in changes.changed]
        refreshed = [(old.offer_id, old.product_id, new) for old, new in changes.refreshed]
        rates_ids = self._find_rates([new for _, _, new in opened + changed])
        ended = [*changes.closed, *(old for old, _ in changes.changed)]
        self._many("UPDATE spans SET until_at = ? WHERE id = ?", [(at, old.span_id) for old in ended])
        self._many(
            "INSERT INTO spans (offer_id, rates_id, usd_per_hour, first_at) VALUES (?, ?, ?, ?)",
            [(offer_id, rates_ids[new.digest], new.usd_micros, at) for offer_id, _, new in opened + changed],
        )
        self._many(
            _UPSERT_LATEST,
            [
                (offer_id, product_id, new.volatile)
                for offer_id, product_id, new in opened + changed + refreshed
            ],
        )
        self._many("DELETE FROM latest WHERE offer_id = ?", [(old.offer_id,) for old in changes.closed])
        self._many(
            "UPDATE offers SET host_id = ? WHERE id = ?",
            [
                (new.host_id, old.offer_id)
                for old, new in changes.changed + changes.refreshed
                if new.host_id != old.host_id
            ],
        )

    def freeze(self, unknown: Iterable[tuple[Current, Offer]]) -> None:
        """Note who confirmed these last, before the poll counts that could not speak for them."""
        rows = self._run(COVERAGE_SQL + " WHERE c.provider = ?", (self._provider,))
        coverage = Coverage(kept_of(row) for row in rows)
        seen = [(coverage.of(offer), old) for old, offer in unknown if old.confirmed_by is None]
        self._many(
            "UPDATE latest SET confirmed_by = ? WHERE offer_id = ?",
            [(kept.poll_id, old.offer_id) for kept, old in seen if kept is not None],
        )

    def cover(self, poll_id: int) -> None:
        """From now on this poll is the newest of its scope."""
        self._many(
            "INSERT INTO coverage (provider, scope, poll_id) VALUES (?, ?, ?)"
            " ON CONFLICT (provider, scope) DO UPDATE SET poll_id = excluded.poll_id",
            [(self._provider, scope_json(self._query), poll_id)],
        )

    def _read_products(self) -> dict[Product, int]:
        where, names = where_gpus(self._query.gpus)
        sql = f"SELECT {', '.join(PRODUCT)}, id FROM products p WHERE p.provider = ?{where}"  # noqa: S608
        return {tuple(row[:-1]): row[-1] for row in self._run(sql, (self._provider, *names))}

    def _find_offers(self, opened: Sequence[Listed]) -> list[tuple[int, int, Listed]]:
        """(offer id, product id, listed) of each, inserted where it was never seen before."""
        keys = {(self._product_ids[new.product], new.machine_id): new for new in opened}
        self._many(
            "INSERT INTO offers (product_id, machine_id, host_id) VALUES (?, ?, ?)"
            " ON CONFLICT (product_id, machine_id) DO UPDATE SET host_id = excluded.host_id",
            [(*key, new.host_id) for key, new in keys.items()],
        )
        offers = tables.offers.c
        pair = tuple_(offers.product_id, offers.machine_id)
        found = []
        for chunk in _chunks(keys):
            query = select(offers.id, offers.product_id, offers.machine_id).where(pair.in_(chunk))
            for offer_id, product_id, machine_id in self._connection.execute(query):
                found.append((offer_id, product_id, keys[product_id, machine_id]))
        return found

    def _find_rates(self, listed: Iterable[Listed]) -> Mapping[str, int]:
        """digest -> id. In order of the digest: two providers that insert the same ones cannot deadlock."""
        wanted = {new.digest: new.rates for new in listed}
        known = self._read_rates(wanted)
        missing = sorted(set(wanted) - set(known))
        if not missing:
            return known
        self._insert("rates", ("digest", *RATES), [(digest, *wanted[digest]) for digest in missing])
        return known | self._read_rates(missing)

    def _read_rates(self, digests: Iterable[str]) -> dict[str, int]:
        rates = tables.rates.c
        return {
            digest: rates_id
            for chunk in _chunks(digests)
            for digest, rates_id in self._connection.execute(
                select(rates.digest, rates.id).where(rates.digest.in_(chunk))
            )
        }

    def _insert(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(columns))
        names = ", ".join(columns)
        self._many(f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING", rows)  # noqa: S608

    def _run(self, sql: str, values: tuple[Any, ...]) -> Any:
        return self._database.run(self._connection, sql, values)

    def _many(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._database.run(self._connection, sql, rows)


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk
