"""`gpubroker backfill aws`: the vendor's record of its prices, page by page, once, and counted as it held."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial

import pytest

from gpubroker.cli import main
from gpubroker.errors import Transient
from gpubroker.model import OfferQuery, Parsed
from gpubroker.prices import history, steps
from gpubroker.prices.backfill import backfill
from gpubroker.prices.daily import DAY_S, Where
from gpubroker.prices.history import Query
from gpubroker.prices.store import Store
from gpubroker.provider import PastPage, PastPrice
from gpubroker_providers.aws import Aws
from tests.database import rows_of
from tests.support import NOW, FakeClock, FakeLimiter, context
from tests.test_bill import offer

pytest.importorskip("aiohttp", reason="needs the extra [testcloud]")

from gpubroker.testcloud.client import running

ROWS = """
SELECT s.sku, s.gpu_count, s.region, s.stat, s.source, o.observed_at, o.usd_per_hour
FROM series s JOIN observations o ON o.series_id = s.id ORDER BY s.sku, s.region, o.observed_at
"""
HOUR = 3600
# A midnight, of which the days here count.
START = int(NOW.timestamp()) // DAY_S * DAY_S


def at(seconds):
    return datetime.fromtimestamp(START + seconds, UTC)


def price(seconds, usd, zone="use1-az4", region="us-east-1", **more):
    made = offer(
        provider="aws", sku="p5.48xlarge", market="spot", preemptible=True, region=region, zone=zone,
        gpu_count=8, usd_per_hour=Decimal(usd), **more,
    )  # fmt: skip
    return PastPrice(offer=made, since=at(seconds))


class Vendor:
    """Gives these pages, and fails after so many."""

    past_days = 90

    def __init__(self, *pages, fails_after=99):
        self._pages, self._fails_after = pages, fails_after

    def past_regions(self, deadline_s):
        return ["us-east-1"]

    def past_prices(self, region, gpus, since, deadline_s):
        for number, page in enumerate(self._pages):
            if number == self._fails_after:
                raise Transient("aws", "DescribeSpotPriceHistory", "RequestLimitExceeded")
            yield PastPage(prices=page)


def fill(store, *pages, **more):
    source = Vendor(*pages, **more)
    return backfill(store.database, "aws", source, "us-east-1", gpus=None, since=at(0))


def points(store, **asked):
    query = Query(
        where=Where(), **{"begin": START, "end": START + DAY_S, "bucket_s": DAY_S, "by": (), **asked}
    )
    with store.database.read() as connection:
        return history.imported(partial(store.database.run, connection), query)


def test_a_run_that_broke_off_is_made_good_by_the_next_and_a_third_adds_nothing(store):
    """What came before it broke is kept, and the reason is told."""
    pages = [(price(7200, 16), price(3600, 8)), (price(0, 24), price(-9000, 32))]
    broken = fill(store, *pages, fails_after=1)
    assert (2, 2, "aws: DescribeSpotPriceHistory: RequestLimitExceeded") == (
        broken.rows,
        broken.added,
        broken.error,
    )
    assert (4, 2, "") == ((whole := fill(store, *pages)).rows, whole.added, whole.error)
    assert (4, 0) == ((again := fill(store, *pages)).rows, again.added)
    assert [
        ("p5.48xlarge", 8, "us-east-1/use1-az4", "step", "aws spot history", START + seconds, usd * 10**6)
        for seconds, usd in ((-9000, 32), (0, 24), (3600, 8), (7200, 16))
    ] == rows_of(store, ROWS)


def test_a_price_counts_for_as_long_as_it_held(store):
    """Once a whole hour, for one GPU; from the price in force when the day began to the newest change."""
    fill(store, (price(-9000, 8), price(5 * HOUR + 1, 16), price(20 * HOUR, 24)))
    stats = ("n", "min", "p50", "max", "twap", "available")
    (point,) = points(store, stats=stats)
    lasted = {10**6: 5 * HOUR + 1, 2 * 10**6: 15 * HOUR - 1, 3 * 10**6: 1}
    assert {
        "n": 21,  # 0 to 5, 6 to 19, 20
        "min": 10**6,
        "p50": 2 * 10**6,
        "max": 3 * 10**6,
        "twap": round(Fraction(sum(usd * s for usd, s in lasted.items()), sum(lasted.values()))),
        "available": 1,
    } == point.figures


def test_another_zone_that_changed_later_says_that_the_first_one_still_held(store):
    """Both were asked for at once; another region was not."""
    fill(
        store, (price(0, 8), price(10 * HOUR, 16, zone="use1-az6"), price(0, 4, region="us-west-2", zone="a"))
    )
    found = {point.group.region: point.figures["n"] for point in points(store, by=("region",), stats=("n",))}
    assert {"us-east-1": 11 + 1, "us-west-2": 1} == found


def test_zones_are_found_by_their_region_and_by_their_own_name(store):
    """As our own polls have them."""
    fill(store, (price(0, 8), price(0, 8, zone="use1-az6")))
    with store.database.read() as connection:
        found = steps.held(partial(store.database.run, connection), Where(), START, START + DAY_S)
        zones = sorted((one.product.region, one.product.zone) for one in found)
    assert [("us-east-1", "use1-az4"), ("us-east-1", "use1-az6")] == zones


def test_what_no_store_could_hold_is_skipped_with_its_reason(store):
    """A plugin may be anybody's."""
    found = fill(store, (price(0, 8), price(1, "-1")))
    assert (1, 1) == (found.rows, len(found.skipped))


def test_a_plugin_that_breaks_costs_its_region_alone(store):
    """And says which exception it was."""
    naive = PastPrice(offer=price(0, 8).offer, since=at(0).replace(tzinfo=None))
    found = fill(store, (price(0, 8),), (naive,))
    assert (1, True) == (found.added, found.error.startswith("ValueError: "))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The test cloud's AWS, and an empty store. Its clock is ours: one ahead would tell what it costs now."""
    with running() as made:
        for name, value in made.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
        monkeypatch.setenv("GPUBROKER_AWS_REGIONS", "us-east-1 us-west-2")
        yield made


def ask(capsys, *words):
    capsys.readouterr()
    code = main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_vendors_own_answer_is_in_the_store_row_by_row(cloud, tmp_path, capsys):
    """By real boto3, twice; and history and now show it."""
    import boto3

    words = ("backfill", "aws", "--gpu", "l4", "--days", "4", "--format", "json")
    began = datetime.now(UTC)
    code, out, said = ask(capsys, *words)
    first = json.loads(out)["regions"]
    assert (0, ["us-east-1", "us-west-2"]) == (code, [one["region"] for one in first]), said
    assert [True, False] == [one["rows"] > 100 for one in first]  # it rents no L4 out in the other
    assert all(one["added"] == one["rows"] for one in first), first
    client = boto3.client("ec2", region_name="us-east-1")
    pages = client.get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=["g6.xlarge"], ProductDescriptions=["Linux/UNIX"], StartTime=began - timedelta(days=3)
    )
    expected = {
        (
            f"us-east-1/{row['AvailabilityZoneId']}",
            int(row["Timestamp"].timestamp()),
            Decimal(row["SpotPrice"]),
        )
        for page in pages
        for row in page["SpotPriceHistory"]
        if row["Timestamp"] <= began
    }
    with Store.open(f"sqlite:///{tmp_path}/p.db", FakeClock()) as store:
        kept = {
            (place, moment, Decimal(usd) / 10**6)
            for sku, _, place, _, _, moment, usd in rows_of(store, ROWS)
            if sku == "g6.xlarge"
        }
    assert len(expected) > 50
    assert expected <= kept
    again = json.loads(ask(capsys, *words)[1])["regions"]
    assert all(one["already_there"] >= before["rows"] - 50 for one, before in zip(again, first, strict=True))
    code, out, said = ask(
        capsys, "history", "--data", "imported", "--provider", "aws", "--gpu", "l4", "--region", "us-east-1",
        "--stat", "n", "--stat", "p50", "--stat", "twap",
    )  # fmt: skip
    assert (0, ["aws", "spot"]) == (code, out.splitlines()[1].split()[:2]), said
    code, out, said = ask(capsys, "now", "--gpu", "l4")
    assert (0, True) == (code, "not polled" in out.splitlines()[1]), said
    assert "gpubroker poll asks" in said


@pytest.mark.parametrize(
    ("env", "words", "code", "sentence"),
    [
        pytest.param({}, ("aws",), 2, "AWS_ACCESS_KEY_ID (or AWS_PROFILE) is not set", id="no keys"),
        pytest.param({}, ("vast",), 2, "vast does not tell what its prices were: aws does", id="no history"),
        pytest.param({}, ("none",), 2, "no provider is called 'none'", id="no provider"),
        pytest.param({}, ("aws", "--days", "91"), 2, "--days: aws goes back 90 days", id="too far back"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch, capsys, env, words, code, sentence):
    """And nothing is asked."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GPUBROKER_DB_URL", f"sqlite:///{tmp_path}/p.db")
    found, _, said = ask(capsys, "backfill", *words)
    assert (code, True) == (found, sentence in said), said


def test_pages_wait_for_the_limit_that_all_processes_share(cloud, monkeypatch):
    """A page a slot."""
    import os

    limiter = FakeLimiter()
    aws = Aws(context(env=dict(os.environ), clock=FakeClock(datetime.now(UTC)), limiter=limiter))
    pages = list(aws.past_prices("us-east-1", {"L4"}, datetime.now(UTC) - timedelta(days=2), 600))
    assert len(pages) > 1
    assert len(limiter.waits) >= len(pages)
    assert {("aws", "spot history", 0.2)} == {wait[:3] for wait in limiter.waits}


def test_our_own_polls_take_over_from_the_record(store):
    """The time before the first of them is the vendor's; `now` has no price twice."""
    from gpubroker.cli.now import _lines

    fill(store, (price(0, 8), price(10 * HOUR, 16)))
    store._clock.advance((at(20 * HOUR) - store._clock.now()).total_seconds())
    own = offer(provider="aws", market="spot", preemptible=True, usd_per_hour=Decimal(5))
    store.keep(store.begin_poll("aws", OfferQuery()), Parsed(offers=(own,)))
    with store.database.read() as connection:
        (line,) = _lines(partial(store.database.run, connection), Where(), START + DAY_S)
    assert ("aws", "spot", 5 * 10**6, True) == (
        line.provider,
        line.market,
        line.usd_micros,
        line.is_polled,
    )
    assert 10**6 == line.standings[7].median_usd_micros
