"""Days of prices: what is counted is what was observed, whether a day is rolled or not; on both databases."""

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import daily
from gpubroker.prices.daily import DAY_S, Where
from gpubroker.prices.store import Store
from tests.database import sweep
from tests.support import EXAMPLES_FACTOR, NOW
from tests.test_bill import offer
from tests.test_measurements import migrated_to
from tests.test_store_history import play, polls

# Hours between polls, so that a sequence goes over several days.
FAR = st.builds(lambda poll, hours: replace(poll, after_s=hours * 3600), polls, st.integers(0, 30))

ALL = Where()


def counted(store, where=ALL, begin=None, end=None):
    """(product but its id, day, price) -> observations."""
    begin = begin or int(NOW.timestamp()) // DAY_S * DAY_S
    with store.database.read() as connection:
        run = partial(store.database.run, connection)
        known = daily.products(run, where)
        found = Counter()
        for one in daily.counts(run, where, begin, end or begin + 40 * DAY_S):
            for usd_micros, n in one.prices:
                found[known[one.product_id][:-1], one.begin // DAY_S, usd_micros] += n
        return found


def observed(store):
    """The same by the definition: every offer of every poll."""
    found = Counter()
    for provider in ("one", "two"):
        for moment, seen in store.observations(provider):
            product = tuple(getattr(seen, name) for name in daily.PRODUCT)
            found[product, int(moment.timestamp()) // DAY_S, int(seen.usd_per_hour * 10**6)] += 1
    return found


@settings(
    max_examples=40 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=st.lists(FAR, max_size=8))
def test_counts_are_those_of_the_observations(store, sequence):
    """Of rolled days, and of the last ones; a GPU's are its part of them."""
    play(store, sequence)
    expected = observed(store)
    assert expected == counted(store)
    h100 = Counter({key: n for key, n in expected.items() if key[0][2] == "H100"})
    assert h100 == counted(store, Where(gpus={"H100"}))


def poll(store, *offers, hours=1):
    store._clock.advance(timedelta(hours=hours).total_seconds())
    return store.keep(store.begin_poll("x", OfferQuery()), Parsed(offers=offers))


@pytest.fixture
def clean(store):
    sweep(store)
    store._clock.advance((NOW - store._clock.now()).total_seconds())
    return store


def test_a_day_is_rolled_by_the_first_poll_of_another(clean):
    """Not before, and once."""
    for hours in (1, 5, 5, 2, 12):
        poll(clean, offer(provider="x"), hours=hours)
    counts = clean.counts()
    assert (1, 1) == (counts["daily"], counts["rolled"])
    (day,) = {day for _, day, _ in counted(clean)} - {max(day for _, day, _ in counted(clean))}
    assert NOW.date().toordinal() - 719163 == day
    assert [2, 3] == sorted(counted(clean).values())


def test_a_database_from_before_is_caught_up_with_by_a_week_a_poll(clean):
    """Until then its days are counted by their spans: the same figures."""
    for _ in range(20):
        poll(clean, offer(provider="x", usd_per_hour=Decimal(2)), hours=24)
    with clean.database.write() as connection:
        clean.database.run(connection, "DELETE FROM daily", ())
        clean.database.run(connection, "DELETE FROM rolled", ())
    before = counted(clean)
    assert 20 == sum(before.values())
    rolled = []
    for _ in range(4):
        poll(clean, hours=0)
        rolled.append(clean.counts()["daily"])
        assert before == counted(clean)
    assert [7, 14, 19, 19] == rolled


def test_days_of_an_older_database_stay_what_they_were(empty_url, clock):
    """Of a row a price, one is made for each product's day."""
    with Store.open(empty_url, clock) as store:
        migrated_to(store, "0008")
        product = dict.fromkeys(daily.PRODUCT, "x") | {"gpu_count": 1, "vram_gib": 80, "preemptible": False}
        with store.database.write() as connection:
            marks = ", ".join("?" * len(product))
            sql = f"INSERT INTO products ({', '.join(product)}) VALUES ({marks})"
            store.database.run(connection, sql, tuple(product.values()))
            sql = "INSERT INTO daily (product_id, day, usd_per_hour, n) VALUES (1, ?, ?, ?)"
            store.database.run(connection, sql, [(7, 2_000_000, 3), (7, 10**12, 1), (9, 1, 2**31 - 1)])
            store.database.run(connection, "INSERT INTO rolled (provider, until_day) VALUES ('x', 10)")
        store.migrate()
        found = counted(store, begin=7 * DAY_S, end=10 * DAY_S)
    expected = {(7, 2_000_000): 3, (7, 10**12): 1, (9, 1): 2**31 - 1}
    assert expected == {key[1:]: n for key, n in found.items()}


@given(prices=st.dictionaries(st.integers(0, 2**62), st.integers(1, 2**62), min_size=1))
def test_packed_prices_come_back(prices):
    """In order, each with its count."""
    assert list(prices.items()) == list(daily.unpacked(daily.packed(prices.items())))
