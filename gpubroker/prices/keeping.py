"""One poll into the tables: read what is open, write what spans.diff says changed. Inside one transaction.

Plain SQL on tuples where 20,000 offers pass, SQLAlchemy where only the changed ones do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select, tuple_

from gpubroker.model import Offer, OfferQuery
from gpubroker.prices import tables
from gpubroker.prices.daily import roll
from gpubroker.prices.database import Database, chunks
from gpubroker.prices.fastread import where_in
from gpubroker.prices.polls import COVERAGE_SQL, Coverage, kept_of, scope_json
from gpubroker.prices.rows import (
    NOTHING,
    PRODUCT,
    RATES,
    Listed,
    Product,
    Rates,
    Volatile,
    listings_json,
    listings_of,
)
from gpubroker.prices.spans import Changes, CurrentRow, Known

_CURRENT_SQL = """
SELECT l.offer_id, l.product_id, l.machine_id, l.rates_id, l.usd_per_hour, l.confirmed_by
FROM latest l CROSS JOIN products p
WHERE p.id = l.product_id AND p.provider = ?
"""
_UPSERT_LATEST = """
INSERT INTO latest (offer_id, product_id, machine_id, rates_id, usd_per_hour) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (offer_id) DO UPDATE SET rates_id = excluded.rates_id, usd_per_hour = excluded.usd_per_hour
"""
_UPSERT_OFFER = """
INSERT INTO offers (product_id, machine_id, host_id) VALUES (?, ?, ?)
ON CONFLICT (product_id, machine_id) DO UPDATE SET host_id = excluded.host_id
"""
_UPSERT_LISTINGS = """
INSERT INTO listings (provider, gpu, offers) VALUES (?, ?, ?)
ON CONFLICT (provider, gpu) DO UPDATE SET offers = excluded.offers
"""
_UPSERT_COVERAGE = """
INSERT INTO coverage (provider, scope, poll_id) VALUES (?, ?, ?)
ON CONFLICT (provider, scope) DO UPDATE SET poll_id = excluded.poll_id
"""


class Keeping:
    """The tables of one provider within a write transaction that excludes its other polls."""

    def __init__(self, database: Database, connection: Connection, provider: str, query: OfferQuery) -> None:
        self._database = database
        self._connection = connection
        self._provider = provider
        self._query = query
        self.product_ids = self._read_products()

    def current(self) -> list[CurrentRow]:
        """What is open within the scope's GPUs."""
        where, names = where_in("p.gpu", self._query.gpus)
        found: list[CurrentRow] = self._run(_CURRENT_SQL + where, (self._provider, *names)).cursor.fetchall()
        return found

    def known(self, current: Iterable[CurrentRow]) -> Known:
        """What the ids in these rows stand for."""
        rates = tables.rates.c
        found = [
            row
            for chunk in chunks({rates_id for _, _, _, rates_id, _, _ in current})
            for row in self._connection.execute(
                select(rates.id, rates.digest, rates.verified).where(rates.id.in_(chunk))
            )
        ]
        return Known(
            products={product_id: product for product, product_id in self.product_ids.items()},
            digests={rates_id: digest for rates_id, digest, _ in found},
            verified={rates_id: verified for rates_id, _, verified in found},
        )

    def apply(self, changes: Changes, known: Known, at: int, poll_id: int) -> None:
        """Write the changes of the poll that observed at this second."""
        opened = self._find_offers(changes.opened)
        self._write_spans(changes, opened, at)
        self._write_confirmations(changes)
        self._write_listings(changes, opened, known)
        self._run(_UPSERT_COVERAGE, (self._provider, scope_json(self._query), poll_id))

    def roll(self, at: int) -> None:
        """Count the days that are over."""
        roll(self._run, self._many, self._provider, at)

    def _write_spans(self, changes: Changes, opened: Sequence[tuple[int, Listed]], at: int) -> None:
        begun = [*opened, *((old.offer_id, new) for old, new in changes.changed)]
        ended = [*changes.closed, *(old for old, _ in changes.changed)]
        rates_ids = self._find_rates(new.rates for _, new in begun)
        self._many(
            "UPDATE spans SET until_at = ? WHERE offer_id = ? AND until_at IS NULL",
            [(at, old.offer_id) for old in ended],
        )
        self._many(
            "INSERT INTO spans (offer_id, rates_id, usd_per_hour, first_at) VALUES (?, ?, ?, ?)",
            [(offer_id, rates_ids[new.rates.digest], new.usd_micros, at) for offer_id, new in begun],
        )
        self._many("DELETE FROM latest WHERE offer_id = ?", [(old.offer_id,) for old in changes.closed])
        self._many(
            _UPSERT_LATEST,
            [
                (
                    offer_id,
                    self.product_ids[new.product],
                    new.offer.machine_id,
                    rates_ids[new.rates.digest],
                    new.usd_micros,
                )
                for offer_id, new in begun
            ],
        )

    def _write_confirmations(self, changes: Changes) -> None:
        """What is unknown for the first time was last confirmed by the newest poll before this one."""
        coverage = Coverage(
            kept_of(row) for row in self._run(f"{COVERAGE_SQL} WHERE c.provider = ?", (self._provider,))
        )
        last = [(coverage.of(offer), old) for old, offer in changes.unknown if old.confirmed_by is None]
        self._many(
            "UPDATE latest SET confirmed_by = ? WHERE offer_id = ?",
            [(kept.poll_id, old.offer_id) for kept, old in last if kept is not None],
        )
        self._many(
            "UPDATE latest SET confirmed_by = NULL WHERE offer_id = ?",
            [(old.offer_id,) for old in changes.confirmed],
        )

    def _write_listings(self, changes: Changes, opened: Sequence[tuple[int, Listed]], known: Known) -> None:
        """Rewrite what is volatile for each GPU that was seen; what the poll did not see of it stays."""
        by_gpu: defaultdict[str, list[tuple[int, Offer | Volatile]]] = defaultdict(list)
        for seen in (*changes.seen, *((offer_id, new.offer) for offer_id, new in opened)):
            by_gpu[seen[1].gpu].append(seen)
        for old in changes.closed:
            by_gpu[known.gpu(old)] += ()
        unseen: dict[str, list[int]] = {}
        for old in [*(old for old, _ in changes.unknown), *changes.outside]:
            unseen.setdefault(known.gpu(old), []).append(old.offer_id)
        for gpu in unseen.keys() & by_gpu.keys():
            before = self._read_listings(gpu)
            by_gpu[gpu] += [(offer_id, before.get(offer_id, NOTHING)) for offer_id in unseen[gpu]]
        self._many(
            _UPSERT_LISTINGS,
            [(self._provider, gpu, listings_json(offers)) for gpu, offers in by_gpu.items()],
        )

    def _read_listings(self, gpu: str) -> dict[int, Volatile]:
        sql = "SELECT offers FROM listings WHERE provider = ? AND gpu = ?"
        text = self._run(sql, (self._provider, gpu)).scalar()
        return {} if text is None else listings_of(text)

    def _read_products(self) -> dict[Product, int]:
        where, names = where_in("gpu", self._query.gpus)
        sql = f"SELECT {', '.join(PRODUCT)}, id FROM products WHERE provider = ?{where}"  # noqa: S608
        return {tuple(row[:-1]): row[-1] for row in self._run(sql, (self._provider, *names))}

    def _find_offers(self, opened: Sequence[Listed]) -> list[tuple[int, Listed]]:
        """Each with its offer id, inserted where it was never seen before."""
        missing = {new.product for new in opened} - set(self.product_ids)
        if missing:
            self._insert("products", PRODUCT, sorted(missing))
            self.product_ids = self._read_products()
        keys = {(self.product_ids[new.product], new.offer.machine_id): new for new in opened}
        self._many(_UPSERT_OFFER, [(*key, new.offer.host_id) for key, new in keys.items()])
        offers = tables.offers.c
        pair = tuple_(offers.product_id, offers.machine_id)
        return [
            (offer_id, keys[product_id, machine_id])
            for chunk in chunks(keys)
            for offer_id, product_id, machine_id in self._connection.execute(
                select(offers.id, offers.product_id, offers.machine_id).where(pair.in_(chunk))
            )
        ]

    def _find_rates(self, rates: Iterable[Rates]) -> Mapping[str, int]:
        """digest -> id. In order of the digest: two providers that insert the same ones cannot deadlock."""
        wanted = dict(rates)
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
            for chunk in chunks(digests)
            for digest, rates_id in self._connection.execute(
                select(rates.digest, rates.id).where(rates.digest.in_(chunk))
            )
        }

    def _insert(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(columns))
        names = ", ".join(columns)
        self._many(f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING", rows)  # noqa: S608

    def _run(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        return self._database.run(self._connection, sql, values)

    def _many(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._database.run(self._connection, sql, rows)
