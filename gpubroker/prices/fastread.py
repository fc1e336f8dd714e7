"""The short way to the store, for quotes and the history: reads the SQLite file with sqlite3 alone, because

importing SQLAlchemy takes longer than such a command may. Store.snapshot runs the same `read` over its own
connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gpubroker.model import Priced
from gpubroker.money import SECONDS_PER_HOUR
from gpubroker.prices.polls import COVERAGE_SQL, Coverage, ProviderState, kept_of, state_of
from gpubroker.prices.rows import (
    NOTHING,
    PRODUCT,
    RATES,
    REVISION,
    Volatile,
    listings_of,
    maybe_moment,
    offer_of,
)

if TYPE_CHECKING:
    from gpubroker.plan.hazard import Exposure

T = TypeVar("T")
# Of pages that are read again and again; SQLite's own 2 MB are too few for a day of 20,000 offers.
_CACHE_KIB = 1 << 16
# Runs SQL with ? for its values.
Run = Callable[[str, tuple[Any, ...]], Iterable[Sequence[Any]]]

# CROSS JOIN keeps SQLite to the order products -> latest; PostgreSQL does not mind.
_CURRENT_SQL = f"""
SELECT {", ".join(f"p.{name}" for name in PRODUCT)}, {", ".join(f"r.{name}" for name in RATES)},
       l.offer_id, l.machine_id, l.usd_per_hour, u.observed_at, u.source
FROM products p
CROSS JOIN latest l
CROSS JOIN rates r
LEFT JOIN polls u ON u.id = l.confirmed_by
WHERE l.product_id = p.id AND r.id = l.rates_id
"""  # noqa: S608  only names of columns go in
_STATES_SQL = """
SELECT provider, missing, unreachable_until, reason, tried_at, asked_with
FROM provider_state ORDER BY provider
"""
_EXPOSURE_SQL = """
SELECT provider, gpu, region, market, SUM(preemptions), SUM(exposed_s)
FROM exposure GROUP BY provider, gpu, region, market ORDER BY provider, gpu, region, market
"""
# The last month of each provider that there is of it.
_LISTED_SQL = """
SELECT s.provider, s.gpu, s.region, s.market, SUM(s.ends), SUM(s.open_s)
FROM stays s JOIN rolled r ON r.provider = s.provider AND s.day >= r.until_day - 30
WHERE 1 = 1
"""
_LISTED_GROUPS = " GROUP BY s.provider, s.gpu, s.region, s.market ORDER BY 1, 2, 3, 4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The store at one moment, as far as a quote looks."""

    live: list[Priced]  # current offers of the GPUs asked
    states: Mapping[str, ProviderState]
    coverage: Coverage
    exposures: tuple[Exposure, ...]  # of our own nodes, whatever their GPU, and of what was listed of these


def sqlite_path(db_url: str) -> str | None:
    """The file of this database; None = it is on a server."""
    path = db_url.removeprefix("sqlite:///")
    return None if path == db_url else path


def snapshot(path: str | Path, gpus: Collection[str] | None) -> Snapshot | None:
    """Current offers of these GPUs (None = every one) from a SQLite file; else as `ask`."""
    return ask(path, lambda run: read(run, gpus))


def ask(path: str | Path, question: Callable[[Run], T]) -> T | None:
    """What a question finds in a SQLite file, at one moment.

    None when there is no such file, when its schema is not this code's, and when anything at all goes wrong:
    Store knows what to do then, and says why.
    """
    # Where its folder may not be written SQLite cannot make the -shm file: read the database as it lies.
    # Not while a -wal file holds what is newest: that would be left out without a word.
    wal = Path(f"{path}-wal")
    modes = ("mode=ro",) if wal.exists() and wal.stat().st_size else ("mode=ro", "mode=ro&immutable=1")
    for mode in modes:
        found = _ask(f"{Path(path).absolute().as_uri()}?{mode}", question)
        if found is not None:
            return found
    return None


def _ask(uri: str, question: Callable[[Run], T]) -> T | None:
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=1, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            connection.execute("BEGIN")
            if connection.execute("SELECT version_num FROM alembic_version").fetchone() != (REVISION,):
                return None
            return question(connection.execute)
    except (sqlite3.Error, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def read(run: Run, gpus: Collection[str] | None) -> Snapshot:
    """The same for any connection, within its transaction."""
    where, names = where_in("p.gpu", gpus)
    rows = run(f"{_CURRENT_SQL}{where} ORDER BY l.offer_id", names)
    where, names = where_in("gpu", gpus)
    listings: dict[int, Volatile] = {}
    for (text,) in run(f"SELECT offers FROM listings WHERE 1 = 1{where}", names):  # noqa: S608
        listings |= listings_of(text)
    coverage = Coverage(map(kept_of, run(COVERAGE_SQL, ())))
    where, names = where_in("s.gpu", gpus)
    listed = run(f"{_LISTED_SQL}{where}{_LISTED_GROUPS}", names)
    own = run(_EXPOSURE_SQL, ())
    return Snapshot(
        live=[_priced(row, listings, coverage) for row in rows],
        states={state.provider: state for state in map(state_of, run(_STATES_SQL, ()))},
        coverage=coverage,
        exposures=(
            *(_exposure_of(row, is_listed=False) for row in own),
            *(_exposure_of(row, is_listed=True) for row in listed),
        ),
    )


def _exposure_of(row: Sequence[Any], *, is_listed: bool) -> Exposure:
    from gpubroker.plan.hazard import Exposure

    # PostgreSQL adds whole numbers up as Decimal.
    kind = dict(zip(("provider", "gpu", "region", "market"), row[:4], strict=True))
    hours = float(row[5]) / SECONDS_PER_HOUR
    return Exposure(**kind, preemptions=float(row[4]), hours=hours, is_listed=is_listed)


def where_in(column: str, wanted: Collection[str] | None) -> tuple[str, tuple[str, ...]]:
    """What to add to a WHERE, with its values; None = any."""
    if wanted is None:
        return "", ()
    names = tuple(sorted(wanted))
    return f" AND {column} IN ({', '.join('?' * len(names)) or 'NULL'})", names


def _priced(row: Sequence[Any], listings: Mapping[int, Volatile], coverage: Coverage) -> Priced:
    """One row of _CURRENT_SQL, with the poll that last confirmed it.

    An offer that newer polls could not speak for keeps the poll that saw it (latest.confirmed_by).
    """
    product, rates = row[: len(PRODUCT)], row[len(PRODUCT) : -5]
    offer_id, machine_id, usd_micros, frozen_at, source = row[-5:]
    offer = offer_of(product, machine_id, usd_micros, rates, listings.get(offer_id, NOTHING))
    as_of = maybe_moment(frozen_at)
    if as_of is None and (kept := coverage.of(offer)) is not None:
        as_of, source = kept.observed_at, kept.source
    return Priced(offer=offer, source=source or "", as_of=as_of, live=True)
