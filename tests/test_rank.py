"""Ranking: by what one would really pay, and nothing left out without a reason."""

from datetime import timedelta
from decimal import Decimal

import pytest

from gpubroker.gpus import parse_request
from gpubroker.model import Priced
from gpubroker.plan.rank import Ask, LeftOut, best_of_each, in_region, merge, rank, why_not
from gpubroker.plan.sentence import advice
from gpubroker.plan.work import Work
from tests.support import NOW
from tests.test_bill import PRICING, offer

WORK = Work(hours=Decimal(8), disk_gb=Decimal(0))
ASK = Ask(work=WORK, gpus=(parse_request("h100"),))


def priced(*, live=True, as_of=NOW, **values):
    return Priced(offer=offer(**values), source="a test", as_of=as_of, live=live)


def order(ranking):
    return [q.offer.sku for q in ranking.quotes]


def test_an_offer_with_more_gpus_is_priced_whole():
    """Eight H100 at $10 are dearer than one at $7, though the hour of one card is cheaper."""
    eight = priced(sku="eight", gpu_count=8, usd_per_hour=Decimal(10))
    one = priced(sku="one", usd_per_hour=Decimal(7))
    assert ["one", "eight"] == order(rank([eight, one], ASK, PRICING))


def test_what_has_no_stock_comes_last():
    """However cheap: it cannot be had."""
    gone = priced(sku="gone", usd_per_hour=Decimal(1), stock="none")
    assert ["here", "gone"] == order(rank([gone, priced(sku="here")], ASK, PRICING))


def test_equal_bills_go_to_what_cannot_be_preempted_then_to_what_is_live():
    """A tie is not left to chance."""
    rows = [
        priced(sku="spot", market="spot", preemptible=True),
        priced(sku="listed", live=False),
        priced(sku="live"),
    ]
    assert ["live", "listed", "spot"] == order(rank(rows, ASK, PRICING))


@pytest.mark.parametrize(
    ("values", "ask", "reason"),
    [
        pytest.param({"form_factor": "unstated"}, {"gpus": (parse_request("h100-sxm"),)}, "form factor not stated", id="unstated"),
        pytest.param({}, {"gpu_count": 2}, "too few GPUs: 1 of 2", id="fewer never match"),
        pytest.param({}, {"min_vram_gib": 96}, "too little memory: 80 of 96 GiB a GPU", id="memory"),
        pytest.param({}, {"markets": ("spot",)}, "another market: on_demand", id="market"),
        pytest.param({}, {"providers": ("vast",)}, "provider not asked for", id="provider"),
        pytest.param({"region": "eu-west-1"}, {"regions": ("us",)}, "another region: eu-west-1", id="region"),
        pytest.param({"verified": False}, {}, "not verified", id="unverified"),
        pytest.param({"disk_max_gb": 10}, {"work": Work(hours=Decimal(1))}, "too little disk: 10 of 50 GB", id="disk"),
    ],
)  # fmt: skip
def test_each_misfit_is_left_out_with_its_reason(values, ask, reason):
    """The first reason that holds."""
    asked = Ask(**{"work": WORK, "gpus": (parse_request("h100"),), **ask})
    assert reason in why_not(offer(**values), asked)
    assert [LeftOut] == [type(x) for x in rank([priced(**values)], asked, PRICING).left_out]


def test_other_cards_are_not_even_left_out():
    """A PCIe card when SXM was asked for: nobody asked."""
    asked = Ask(work=WORK, gpus=(parse_request("h100-sxm"),))
    pcie = priced(form_factor="PCIe")
    assert ((), ()) == (rank([pcie], asked, PRICING).quotes, rank([pcie], asked, PRICING).left_out)
    assert "another card" == why_not(pcie.offer, asked)


def test_any_host_takes_the_unverified():
    """--any-host."""
    assert why_not(offer(verified=False), Ask(work=WORK, verified_only=False)) is None


@pytest.mark.parametrize(
    ("place", "region", "inside"),
    [
        pytest.param({"region": "us-east-1"}, "us", True, id="a part of the world"),
        pytest.param({"region": "us-east-1", "zone": "use1-az4"}, "use1-az4", True, id="a zone"),
        pytest.param({"region": "US"}, "us", True, id="vast's country"),
        pytest.param({"details": {"data_centers": "EU-RO-1,US-KS-2"}}, "us", True, id="a data centre of several"),
        pytest.param({"region": "us-east-1"}, "us-east", True, id="a longer part"),
        pytest.param({"region": "us-east-1"}, "us-e", False, id="not by letters"),
        pytest.param({}, "us", False, id="no region stated"),
        pytest.param({"region": "BG"}, "eu", True, id="a country of Europe"),
        pytest.param({"region": "eu-central-1"}, "europe", True, id="europe is eu"),
        pytest.param({"details": {"data_centers": "EUR-IS-1"}}, "eu", True, id="RunPod's EUR"),
        pytest.param({"region": "US"}, "eu", False, id="not of Europe"),
    ],
)  # fmt: skip
def test_regions(place, region, inside):
    """us covers us-east-1, US and US-KS-2."""
    assert inside == in_region(offer(**place), region)


def test_a_live_price_replaces_the_listed_one_of_the_same_card_and_market():
    """Live beats listed; what no poll has seen stays, dated."""
    live = [priced(market="spot")]
    book = [
        priced(market="spot", live=False, as_of=NOW - timedelta(days=9), sku="old spot"),
        priced(live=False, as_of=None, sku="undated"),
    ]
    rows, left_out = merge(live, book, {})
    assert [live[0], book[1]] == rows
    assert ["old spot"] == [x.id for x in left_out]


def test_a_poll_that_found_none_also_outdates_the_list():
    """vast has no spot H100 right now: last month's must not be quoted."""
    book = [priced(market="spot", live=False, as_of=NOW - timedelta(days=30))]
    rows, left_out = merge([], book, {("cloud", "spot"): NOW})
    assert ([], 1) == (rows, len(left_out))


def test_a_list_newer_than_a_stale_poll_is_kept():
    """Dates decide, not the kind of source."""
    old = priced(as_of=NOW - timedelta(days=90))
    new = priced(live=False, as_of=NOW - timedelta(days=5))
    assert ([old, new], []) == merge([old], [new], {})


def test_the_table_has_the_best_of_each_vendor_then_the_next_best():
    """In the order of the bill."""
    rows = [priced(sku=f"a{i}", usd_per_hour=Decimal(1 + i)) for i in range(5)]
    rows += [
        priced(sku="b", provider="b", usd_per_hour=Decimal(9)),
        priced(sku="c", provider="c", usd_per_hour=Decimal(8)),
    ]
    quotes = rank(rows, ASK, PRICING).quotes
    assert ["a0", "a1", "c", "b"] == [q.offer.sku for q in best_of_each(quotes, 4)]
    assert ["a0", "c", "b"] == [q.offer.sku for q in best_of_each(quotes, 1)]
    assert 7 == len(best_of_each(quotes, 100))


def test_rows_that_look_the_same_are_shown_once():
    """Modal's H100 and H100! differ in what may be given, not in anything the table shows."""
    rows = [priced(sku="H100"), priced(sku="H100!"), priced(sku="else", usd_per_hour=Decimal(3))]
    quotes = rank(rows, ASK, PRICING).quotes
    assert ["H100", "else"] == [q.offer.sku for q in best_of_each(quotes, 10)]


def test_what_can_be_taken_away_is_said_even_when_nothing_firm_is_there():
    """--market spot."""
    quotes = rank([priced(market="spot", preemptible=True)], ASK, PRICING).quotes
    assert "It can be taken away at any time." in advice(quotes, ASK, NOW)


def test_ones_own_gpu_is_named_first():
    """Even when renting would be cheaper, which is then said."""
    own = priced(provider="local", usd_per_hour=Decimal("0.119"))
    quotes = rank([own, priced(sku="rented")], ASK, PRICING).quotes
    assert advice(quotes, ASK, NOW).startswith(
        "Your own 1x H100 can do it for $0.95 of electricity; the cheapest to rent"
    )


def test_the_sentence_says_what_to_take_why_and_what_is_firm():
    """A preemptible winner names the best that cannot be taken away."""
    spot = priced(market="spot", preemptible=True, usd_per_hour=Decimal(1), region="US")
    quotes = rank([spot, priced(provider="other")], ASK, PRICING).quotes
    assert (
        "Take cloud 1x H100 SXM spot in US: $8.05 for 8 h, the cheapest of 2 offers, $7.95 less than the best of "
        "other. It can be taken away at any time; other 1x H100 SXM on-demand cannot, for $7.95 more."
    ) == advice(quotes, ASK, NOW)


def test_an_old_list_price_is_cautioned_where_it_is_recommended():
    """A person must not rent by a price of last spring."""
    quotes = rank([priced(live=False, as_of=NOW - timedelta(days=120))], ASK, PRICING).quotes
    assert "rests on a list price from 120 days ago" in advice(quotes, ASK, NOW)


def test_nobody_having_one_is_said():
    """No stock anywhere."""
    quotes = rank([priced(stock="none")], ASK, PRICING).quotes
    assert advice(quotes, ASK, NOW).startswith("Nobody has one free right now")
