"""A GPU's prices over time: each figure is that of the observations themselves, on both databases."""

import statistics
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.gpus import parse_request
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import history
from gpubroker.prices.daily import DAY_S, Where
from gpubroker.prices.history import STATS, Group, Query
from gpubroker.prices.history_import import import_file
from gpubroker.prices.stats import Prices
from tests.database import sweep
from tests.support import EXAMPLES_FACTOR, NOW
from tests.test_bill import offer
from tests.test_history_daily import FAR, clean  # noqa: F401
from tests.test_store_history import play

BEGIN = int(NOW.timestamp()) // DAY_S * DAY_S
PUBLIC = Path(__file__).parents[1].parent / "shared" / "prices" / "history_public"
DATABASE = settings(
    max_examples=40 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def asked(store, door=history.own, **more):
    query = Query(**{"where": Where(), "begin": BEGIN, "end": BEGIN + 40 * DAY_S, "bucket_s": DAY_S, **more})
    with store.database.read() as connection:
        return door(partial(store.database.run, connection), query)


# The figures


counted = st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 4)), min_size=1, max_size=20)


@given(counted=counted, share=st.fractions(0, 1))
def test_figures_are_those_of_all_prices_one_by_one(counted, share):
    """As numpy and statistics have them."""
    every = sorted(usd for usd, n in counted for _ in range(n))
    prices = Prices(counted)
    assert (len(every), every[0], every[-1]) == (prices.n, prices.least, prices.most)
    assert round(Fraction(statistics.median(map(Fraction, every)))) == prices.quantile(Fraction(1, 2))
    assert round(statistics.mean(map(Fraction, every))) == prices.mean
    assert abs(np.quantile(np.array(every, dtype=float), float(share)) - prices.quantile(share)) <= 1


# Our own polls


def observed(store, bucket_s):
    """(group, bucket) -> prices for one GPU, by the definition."""
    found = defaultdict(list)
    for provider in ("one", "two"):
        for moment, seen in store.observations(provider):
            at = int(moment.timestamp())
            usd = round(Fraction(int(seen.usd_per_hour * 10**6), seen.gpu_count))
            found[Group(provider, seen.market), at - at % bucket_s].append(usd)
    return found


@DATABASE
@given(sequence=st.lists(FAR, max_size=8), bucket_s=st.sampled_from([600, 3600, DAY_S, 7 * DAY_S]))
def test_a_bucket_has_what_was_observed_in_it(store, sequence, bucket_s):
    """By days and by less."""
    play(store, sequence)
    begin = BEGIN - BEGIN % bucket_s
    points = asked(store, bucket_s=bucket_s, begin=begin, stats=("n", "min", "p50", "max", "mean"))
    found = {
        (one.group, int(one.begin.timestamp())): [one.figures[s] for s in ("n", "min", "p50", "max", "mean")]
        for one in points
        if one.figures["n"]
    }
    expected = {
        key: [
            len(usd),
            min(usd),
            round(Fraction(statistics.median(map(Fraction, usd)))),
            max(usd),
            round(statistics.mean(map(Fraction, usd))),
        ]
        for key, usd in observed(store, bucket_s).items()
    }
    assert expected == found


def poll(store, *offers, hours=1, query=None):
    store._clock.advance(hours * 3600)
    parsed = Parsed(offers=offers)
    return store.keep(store.begin_poll("x", query or OfferQuery()), parsed)


def test_a_price_by_time_counts_for_as_long_as_it_lasted(clean):  # noqa: F811
    """One hour at $2, three at $4, and none."""
    for usd, hours in ((2, 1), (4, 1), (4, 2), (None, 1)):
        mine = () if usd is None else (offer(provider="x", gpu_count=2, usd_per_hour=Decimal(usd)),)
        poll(clean, *mine, hours=hours)
    (point,) = asked(clean, bucket_s=None, stats=STATS)
    figures = point.figures
    assert (3, 1_000_000, 2_000_000) == (figures["n"], figures["min"], figures["max"])
    # Seen at one price for an hour, at the other for three.
    assert (round((1 * 1 + 2 * 3) * 10**6 / 4), Fraction(3, 4)) == (figures["twap"], figures["available"])


def test_who_asks_for_one_line_gets_one(clean):  # noqa: F811
    """By provider, market, region and number of GPUs, or by none."""
    mine = [
        offer(provider="x", region=region, gpu_count=n, sku=f"{n}") for region in ("US", "EU") for n in (1, 8)
    ]
    poll(clean, *mine)
    for by, lines in (((), 1), (("region",), 2), (("region", "gpu_count"), 4), (("provider", "market"), 1)):
        points = asked(clean, by=by, stats=("n",))
        assert (lines, 4) == (len(points), sum(point.figures["n"] for point in points))
    (us,) = asked(clean, where=Where(wants=lambda product: product.region == "US"), stats=("n",))
    assert 2 == us.figures["n"]
    assert [] == asked(clean, where=Where(gpus=set()))


# Imported histories


def catalogued(gpu):
    """As the catalogue names it, where it is one card."""
    with suppress(ConfigError):
        if len(names := parse_request(gpu).names) == 1:
            (gpu,) = names
    return gpu


@pytest.mark.skipif(not PUBLIC.exists(), reason="the public histories are not here (../shared/prices)")
def test_daily_medians_of_the_public_history_are_those_of_pandas(store):
    """From the raw files, to the micro-dollar."""
    import pandas as pd

    sweep(store)
    frames = []
    for path in sorted(PUBLIC.glob("*.csv.gz")):
        import_file(store, path)
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "usd_per_hour" in frame:
            frames.append(frame[frame["usd_per_hour"] != ""])
    every = pd.concat(frames).drop_duplicates()
    every["usd"] = [
        round(Fraction(round(Fraction(usd) * 10**6), int(count)))
        for usd, count in zip(every["usd_per_hour"], every["gpu_count"], strict=True)
    ]
    every["day"] = pd.to_datetime(every["observed_at"], utc=True, format="ISO8601").dt.floor("D")
    every["gpu"] = [catalogued(gpu) for gpu in every["gpu"]]
    gpus = sorted(set(every["gpu"]))
    assert len(gpus) > 20
    for gpu in gpus:
        mine = every[every["gpu"] == gpu].groupby("day")["usd"].apply(list)
        expected = {
            day.to_pydatetime(): round(Fraction(statistics.median(map(Fraction, usd))))
            for day, usd in mine.items()
        }
        points = asked(
            store,
            history.imported,
            where=Where(gpus={gpu}),
            by=(),
            begin=0,
            end=int(datetime(2100, 1, 1, tzinfo=UTC).timestamp()),
            stats=("p50",),
        )
        assert expected == {one.begin: one.figures["p50"] for one in points if "p50" in one.figures}


@given(usd_micros=st.integers(0, 10**13), gpu_count=st.integers(1, 1024))
def test_the_price_for_one_gpu_is_rounded_once_and_half_to_even(usd_micros, gpu_count):
    """As all money is."""
    assert round(Fraction(usd_micros, gpu_count)) == history.for_one(usd_micros, gpu_count)
