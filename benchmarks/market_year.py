"""A made-up year of polls, as the database that polling it would have left: every 5 minutes 20,000 offers.

    Market: who is listed at which price, poll by poll    write(): the statements of Store.keep, in bulk

Of 200 machines that are listed one leaves at each poll and another one comes; 3 of 1,000 change their price;
every ask has a new id. The market is half as big again as its list: a machine that leaves is rented out and
comes back at the price that it had, but for one of a hundred, which is new. tests/test_market_year.py holds
the database against one that Store.keep wrote.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpubroker.doors import SystemClock
from gpubroker.model import Offer, OfferQuery, Parsed
from gpubroker.money import from_micros
from gpubroker.prices.database import chunks
from gpubroker.prices.polls import scope_json
from gpubroker.prices.rows import DAY_S, PRODUCT, RATES, Listed, listing, listings_json
from gpubroker.prices.store import Store

Ints = np.ndarray[Any, np.dtype[np.int64]]
PROVIDER = "vast"
POLL_S = 300
QUERY = OfferQuery(verified_only=False)
_CARDS, _PLACES, _RATES = 40, 50, 200
_DETAILS = {"duration_s": "3456789", "dlperf": "812.5", "inet_up": "904.1", "driver_version": "570.86.15"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a market, and of the time in which it is watched. Shares are of the offers, at each poll."""

    polls: int = 365 * DAY_S // POLL_S
    offers: int = 20_000
    changed: float = 0.003
    turnover: float = 0.005
    new: float = 0.01  # of the machines that come
    seed: int = 7

    def times(self, poll: int, share: float) -> int:
        """How often something happens at this poll, so that a share of an offer is none lost."""
        return int(poll * share * self.offers) - int((poll - 1) * share * self.offers)


class Turn(NamedTuple):
    """What is different at a poll. Machines by their numbers, in the order of the list."""

    poll: int
    at: int  # seconds since 1970
    gone: Ints
    come: Ints
    changed: Ints


class Market:
    """The list as it is after the last turn."""

    def __init__(self, size: Size, end: int) -> None:
        """The last poll is just before `end`, in seconds since 1970."""
        self._size, self._begin = size, end - size.polls * POLL_S
        self._chance = np.random.default_rng(size.seed)
        self.listed: Ints = np.arange(size.offers, dtype=np.int64)
        self._away: Ints = np.arange(size.offers, size.offers + size.offers // 2, dtype=np.int64)
        self._next = size.offers + size.offers // 2
        most = self._next + int(size.polls * size.turnover * size.offers * size.new) + 1
        self.usd_micros: Ints = self._chance.integers(300_000, 3_500_000, most) * gpu_counts(np.arange(most))

    def turns(self) -> Iterator[Turn]:
        """Poll by poll. The first one finds all of the list new."""
        none = np.empty(0, dtype=np.int64)
        yield Turn(0, self._begin, none, self.listed.copy(), none)
        for poll in range(1, self._size.polls):
            yield self._turn(poll)

    def _turn(self, poll: int) -> Turn:
        size, chance = self._size, self._chance
        moved, changed = size.times(poll, size.turnover), size.times(poll, size.changed)
        places = chance.choice(size.offers, moved + changed, replace=False)
        left, priced = np.sort(places[:moved]), np.sort(places[moved:])
        gone = self.listed[left]
        back = chance.choice(len(self._away), moved, replace=False)
        come = self._away[back]
        self._away[back] = gone
        new = size.times(poll, size.turnover * size.new)
        come[:new] = np.arange(self._next, self._next + new)
        self._next += new
        self.listed[left] = come
        machines = self.listed[priced]
        before = self.usd_micros[machines]
        after = (before * chance.uniform(0.9, 1.1, changed)).astype(np.int64)
        self.usd_micros[machines] = np.where(after == before, before + 1, after)
        return Turn(poll, self._begin + poll * POLL_S, gone, come, machines)

    def parsed(self, poll: int) -> Parsed:
        """What a provider would have brought."""
        return Parsed(offers=tuple(self.offers(poll)), fetched=self._size.offers, source="made up")

    def offers(self, poll: int) -> Iterator[Offer]:
        """The whole list, each with the ask id that it has at this poll."""
        usd = self.usd_micros[self.listed].tolist()
        for place, (machine, micros) in enumerate(zip(self.listed.tolist(), usd, strict=True)):
            yield offer(machine, micros, listing_id=str(poll * self._size.offers + place))


# Machines: what each of them is follows from its number.


def _mixed(machines: Ints, shift: int) -> Ints:
    return ((machines * 2_654_435_761) & 0xFFFF_FFFF) >> shift


def gpu_counts(machines: Ints) -> Ints:
    """1, 2, 4 or 8."""
    return 1 << (_mixed(machines, 5) & 3)


def products(machines: Ints) -> Ints:
    """A number for each product: one of 37 cards (one in ten is an H100), 50 places, 4 counts, 2 markets."""
    card = np.where(machines % 10 == 0, 0, machines % _CARDS)
    place = _mixed(machines, 8) % _PLACES
    return ((card * _PLACES + place) * 4 + (_mixed(machines, 5) & 3)) * 2 + (_mixed(machines, 20) % 3 > 0)


def rates(machines: Ints) -> Ints:
    """A number for each set of the other priced terms."""
    return _mixed(machines, 12) % _RATES


def offer(machine: int, usd_micros: int, listing_id: str = "") -> Offer:
    """A machine as it is listed."""
    one = np.array([machine], dtype=np.int64)
    return _offer(machine, usd_micros, int(products(one)[0]), int(rates(one)[0]), listing_id)


def _offer(machine: int, usd_micros: int, product: int, rate: int, listing_id: str = "") -> Offer:
    rest, is_spot = divmod(product, 2)
    rest, count = divmod(rest, 4)
    card, place = divmod(rest, _PLACES)
    return Offer(
        provider=PROVIDER,
        sku=f"card {card}" if card else "H100 SXM",
        gpu=f"CARD{card}" if card else "H100",
        form_factor="SXM",
        gpu_count=1 << count,
        vram_gib=80,
        market="spot" if is_spot else "on_demand",
        preemptible=bool(is_spot),
        region=f"place {place}",
        machine_id=str(30_000 + machine),
        host_id=str(1_000 + machine // 3),
        usd_per_hour=from_micros(usd_micros),
        storage_usd_per_gb_month=Decimal(rate % 20) / 100,
        egress_usd_per_gb=Decimal(rate // 20) / 1000,
        ingress_usd_per_gb=Decimal("0.002"),
        verified=rate % 4 > 0,
        listing_id=listing_id,
        reliability=Decimal(9_900 + machine % 100) / 10_000,
        disk_max_gb=machine % 1_000,
        details=_DETAILS,
    )


# The database


def year(share: float, offers: int = 20_000) -> Path:
    """A SQLite file with this share of a year, up to the last midnight.

    It is made once a process and deleted at its end; in the folder $GPUBROKER_TEST_MARKETS it is kept.
    """
    return _made(Size(polls=int(Size().polls * share), offers=offers))


@cache
def _made(size: Size) -> Path:
    end = int(SystemClock().now().timestamp()) // DAY_S * DAY_S
    kept = os.environ.get("GPUBROKER_TEST_MARKETS")
    folder = Path(kept or tempfile.mkdtemp(prefix="gpubroker-year-"))
    if kept is None:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"market-{size.polls}-{size.offers}-{end // DAY_S}.db"
    if not path.exists():
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        write(part, size, end)
        part.rename(path)
    return path


def write(path: Path, size: Size, end: int) -> None:
    """The database of somebody who polled this market, up to just before `end`."""
    with Store.open(f"sqlite:///{path}", SystemClock()) as store:
        store.migrate()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -600000"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        _Writer(connection, Market(size, end)).write(size)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")


_POLL_SQL = """
INSERT INTO polls (provider, scope, started_at, finished_at, observed_at, fetched, kept, source)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_END_SQL = "UPDATE spans SET until_at = ? WHERE offer_id = ? AND until_at IS NULL"
_BEGIN_SQL = "INSERT INTO spans (offer_id, rates_id, usd_per_hour, first_at) VALUES (?, ?, ?, ?)"


class _Writer:
    """Writes turns in the order in which Store.keep does, so that pages fill as they do there."""

    def __init__(self, connection: sqlite3.Connection, market: Market) -> None:
        self._connection, self._market = connection, market
        machines = np.arange(len(market.usd_micros), dtype=np.int64)
        self._product, self._rate = products(machines), rates(machines)
        self._offer_ids = np.zeros_like(machines)  # of machines; 0 = not seen yet, as below
        self._product_ids = np.zeros(_CARDS * _PLACES * 8, dtype=np.int64)
        self._rates_ids = np.zeros(_RATES, dtype=np.int64)
        self._first_at = np.zeros_like(machines)  # of open spans
        # Today: product, price, first, until, and whether the machine left.
        self._ended: list[tuple[Ints, Ints, Ints, Ints, Ints]] = []
        self._left_at_midnight = np.zeros(0, dtype=np.int64)  # products: these ended on the day that began

    def write(self, size: Size) -> None:
        """All of it."""
        scope, today, turn, opened = scope_json(QUERY), None, None, list[int]()
        usd_before = self._market.usd_micros.copy()
        for turn in self._market.turns():
            at = turn.at
            opened = self._found(turn.come)
            changed = turn.changed[np.argsort(self._offer_ids[turn.changed])]
            gone = turn.gone[np.argsort(self._offer_ids[turn.gone])]
            self._end(at, np.concatenate((gone, changed)), len(gone), usd_before)
            usd_before[changed] = self._market.usd_micros[changed]
            self._begin(at, np.array([*opened, *changed.tolist()], dtype=np.int64))
            if today is not None and at // DAY_S > today:
                self._roll(today)
            if today is None or at // DAY_S > today:
                today = at // DAY_S
                self._connection.execute("INSERT OR REPLACE INTO rolled VALUES (?, ?)", (PROVIDER, today))
            row = (PROVIDER, scope, at, at, at, size.offers, size.offers, "made up")
            self._connection.execute(_POLL_SQL, row)
        if turn is not None:
            self._finish(scope, turn.poll, opened)

    def _found(self, come: Ints) -> list[int]:
        """The machines that came, in the order in which Keeping finds their offers; new ones are inserted."""
        new = come[self._offer_ids[come] == 0]
        if len(new):
            self._insert_names(new)
            rows = [
                (int(self._product_ids[self._product[one]]), str(30_000 + one), str(1_000 + one // 3))
                for one in new.tolist()
            ]
            sql = "INSERT INTO offers (product_id, machine_id, host_id) VALUES (?, ?, ?)"
            self._connection.executemany(sql, rows)
            (last,) = self._connection.execute("SELECT max(id) FROM offers").fetchone()
            self._offer_ids[new] = np.arange(last - len(new) + 1, last + 1)
        ids = self._product_ids[self._product[come]].tolist()
        keyed = [(product, str(30_000 + one), one) for product, one in zip(ids, come.tolist(), strict=True)]
        return [one for chunk in chunks(keyed) for _, _, one in sorted(chunk)]

    def _insert_names(self, machines: Ints) -> None:
        """Products and rates that were not there before."""
        missing = set(self._product[machines].tolist())
        made = {p: _listed(p, 0) for p in missing if self._product_ids[p] == 0}
        for product, listed in sorted(made.items(), key=lambda item: item[1].product):
            self._product_ids[product] = self._insert("products", PRODUCT, listed.product)
        made = {r: _listed(0, r) for r in set(self._rate[machines].tolist()) if self._rates_ids[r] == 0}
        for rate, listed in sorted(made.items(), key=lambda item: item[1].rates.digest):
            values = (listed.rates.digest, *listed.rates.values)
            self._rates_ids[rate] = self._insert("rates", ("digest", *RATES), values)

    def _insert(self, table: str, columns: Sequence[str], values: Sequence[Any]) -> int:
        marks = ", ".join("?" * len(columns))
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        return int(self._connection.execute(sql, values).lastrowid or 0)

    def _end(self, at: int, machines: Ints, gone: int, usd_before: Ints) -> None:
        """The first so many of them left; of the others the price changed."""
        offer_ids = self._offer_ids[machines].tolist()
        self._connection.executemany(_END_SQL, [(at, offer_id) for offer_id in offer_ids])
        first = self._first_at[machines]
        left = (np.arange(len(machines)) < gone).astype(np.int64)
        until = np.full_like(first, at)
        self._ended.append((self._product[machines], usd_before[machines], first, until, left))

    def _begin(self, at: int, machines: Ints) -> None:
        columns = (
            self._offer_ids[machines],
            self._rates_ids[self._rate[machines]],
            self._market.usd_micros[machines],
            np.full_like(machines, at),
        )
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        self._connection.executemany(_BEGIN_SQL, rows)
        self._first_at[machines] = at

    def _roll(self, day: int) -> None:
        """What daily.roll counts: of each product and price, how often it was seen on this day."""
        begin, end = max(day * DAY_S, self._market._begin), (day + 1) * DAY_S
        listed = self._market.listed
        still = (
            self._product[listed],
            self._market.usd_micros[listed],
            self._first_at[listed],
            np.full_like(listed, end),
            np.zeros_like(listed),
        )
        product, usd, first, until, left = (
            np.concatenate(parts) for parts in zip(*self._ended, still, strict=True)
        )
        n = (np.minimum(until, end) - np.maximum(first, begin)) // POLL_S
        keys = (self._product_ids[product] << 32) + usd
        found, place = np.unique(keys[n > 0], return_inverse=True)
        totals = np.bincount(place, weights=n[n > 0]).astype(np.int64)
        product_ids, begins = np.unique(found >> 32, return_index=True)
        rows = [
            (product_id, day, np.concatenate((usd & 0xFFFF_FFFF, counts)).tobytes())
            for product_id, usd, counts in zip(
                product_ids.tolist(), np.split(found, begins[1:]), np.split(totals, begins[1:]), strict=True
            )
        ]
        self._connection.executemany("INSERT INTO daily VALUES (?, ?, ?)", rows)
        self._roll_stays(day, product, np.minimum(until, end) - np.maximum(first, begin), left * until, end)
        self._ended.clear()

    def _roll_stays(self, day: int, product: Ints, open_s: Ints, left_at: Ints, end: int) -> None:
        """What daily.roll counts of spot machines, by card and place. `left_at`: 0 = it did not leave."""
        is_spot, places = product % 2 == 1, product // 8
        ended = np.concatenate((product[(left_at > 0) & (left_at < end)], self._left_at_midnight))
        self._left_at_midnight = product[left_at == end]
        number = _CARDS * _PLACES
        ends = np.bincount(ended[ended % 2 == 1] // 8, minlength=number)
        seconds = np.bincount(places[is_spot], weights=open_s[is_spot], minlength=number).astype(np.int64)
        rows = [
            (one.gpu, PROVIDER, one.market, one.region, day, int(ends[place]), int(seconds[place]))
            for place in np.flatnonzero((ends > 0) | (seconds > 0)).tolist()
            for one in (_offer(0, 1, place * 8 + 1, 0),)
        ]
        self._connection.executemany("INSERT INTO stays VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _finish(self, scope: str, poll: int, opened: list[int]) -> None:
        """What only the last poll leaves."""
        listed = np.sort(self._offer_ids[self._market.listed])
        machine_of = np.zeros(int(self._offer_ids.max()) + 1, dtype=np.int64)
        machine_of[self._offer_ids] = np.arange(len(self._offer_ids))
        machines = machine_of[listed]
        columns = (
            listed,
            self._product_ids[self._product[machines]],
            machines + 30_000,
            self._rates_ids[self._rate[machines]],
            self._market.usd_micros[machines],
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        sql = "INSERT INTO latest VALUES (?, ?, ?, ?, ?, NULL)"
        self._connection.executemany(sql, [(a, b, str(c), d, e) for a, b, c, d, e in rows])
        sql = "INSERT INTO coverage VALUES (?, ?, (SELECT max(id) FROM polls))"
        self._connection.execute(sql, (PROVIDER, scope))
        by_id = dict(
            zip(self._offer_ids[self._market.listed].tolist(), self._market.offers(poll), strict=True)
        )
        last = set(new_ids := self._offer_ids[np.array(opened, dtype=np.int64)].tolist())
        gpus = self._connection.execute("SELECT DISTINCT gpu FROM products")
        by_gpu: dict[str, list[tuple[int, Offer]]] = {gpu: [] for (gpu,) in gpus}
        for offer_id in [*(one for one in listed.tolist() if one not in last), *new_ids]:
            by_gpu[by_id[offer_id].gpu].append((offer_id, by_id[offer_id]))
        for gpu, mine in by_gpu.items():
            sql = "INSERT INTO listings VALUES (?, ?, ?)"
            self._connection.execute(sql, (PROVIDER, gpu, listings_json(mine)))


def _listed(product: int, rate: int) -> Listed:
    """As the store would have it."""
    found, _ = listing([_offer(0, 1, product, rate)], QUERY, {})
    return next(iter(found.values()))
