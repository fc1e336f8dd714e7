"""The diff of one poll: what is listed against what is open, in every combination."""

from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker.model import OfferQuery, Slice
from gpubroker.prices.rows import listing, product_of
from gpubroker.prices.spans import Current, Known, diff
from tests.test_bill import offer

SPOT = offer(provider="vast", market="spot", preemptible=True, machine_id="m1", verified=True)
ALL = OfferQuery()
PRODUCTS = {7: product_of(SPOT)}


def known(verified=True):
    digest = listing([replace(SPOT, verified=verified)], OfferQuery(verified_only=False), {})[0]
    return Known(
        products=PRODUCTS,
        digests={3: next(iter(digest.values())).rates.digest},
        verified={3: verified},
    )


def current(machine_id="m1", confirmed_by=None):
    return (11, 7, machine_id, 3, 2_000_000, confirmed_by)


def compare(open_rows, offers, query=ALL, incomplete=(), verified=True):
    listed, _ = listing(offers, query, {product: number for number, product in PRODUCTS.items()})
    return diff(open_rows, listed, known(verified), query, incomplete)


def test_an_offer_at_the_same_terms_is_only_seen():
    """Its span goes on."""
    changes = compare([current()], [SPOT])
    assert [(11, SPOT)] == changes.seen
    assert ([], [], [], [], []) == (
        changes.opened,
        changes.changed,
        changes.closed,
        changes.unknown,
        changes.outside,
    )


@pytest.mark.parametrize(
    "terms",
    [
        pytest.param({"usd_per_hour": Decimal("2.000001")}, id="price, by a micro-dollar"),
        pytest.param({"billing_increment_s": 60}, id="billing unit"),
        pytest.param({"minimum_s": 3600}, id="minimum"),
        pytest.param({"disk_included_gb": 10}, id="disk"),
        pytest.param({"storage_usd_per_gb_month": Decimal("0.1")}, id="storage"),
        pytest.param({"egress_usd_per_gb": Decimal(0)}, id="transfer out: none is not zero"),
        pytest.param({"ingress_usd_per_gb": Decimal("0.01")}, id="transfer in"),
        pytest.param({"cpu_usd_per_core_hour": Decimal("0.04")}, id="CPU"),
        pytest.param({"ram_usd_per_gib_hour": Decimal("0.004")}, id="RAM"),
        pytest.param({"verified": None}, id="verification"),
    ],
)
def test_a_priced_term_that_changes_is_a_new_price(terms):
    """Each of them, by itself."""
    changes = compare([current()], [replace(SPOT, **terms)])
    assert [11] == [old.offer_id for old, _ in changes.changed]


@pytest.mark.parametrize(
    "volatile",
    [
        pytest.param({"listing_id": "9"}, id="listing id"),
        pytest.param({"host_id": "9"}, id="host"),
        pytest.param({"stock": "low"}, id="stock"),
        pytest.param({"reliability": Decimal("0.9")}, id="reliability"),
        pytest.param({"disk_max_gb": 9}, id="largest disk"),
        pytest.param({"details": {"dlperf": "9"}}, id="details"),
    ],
)
def test_what_is_volatile_is_never_a_new_price(volatile):
    """Ask ids churn within minutes."""
    changes = compare([current()], [replace(SPOT, **volatile)])
    assert ([], 1) == (changes.changed, len(changes.seen))


@pytest.mark.parametrize(
    ("query", "incomplete", "fate"),
    [
        pytest.param(ALL, (), "closed", id="covered and not listed: it is gone"),
        pytest.param(OfferQuery(gpus=frozenset({"H100"})), (), "closed", id="covered by its GPU"),
        pytest.param(OfferQuery(gpus=frozenset({"H200"})), (), "outside", id="another GPU"),
        pytest.param(OfferQuery(markets=frozenset({"on_demand"})), (), "outside", id="another market"),
        pytest.param(ALL, (Slice(reason="cut"),), "unknown", id="nothing was seen whole"),
        pytest.param(ALL, (Slice(reason="cut", market="spot"),), "unknown", id="its market was cut"),
        pytest.param(ALL, (Slice(reason="cut", market="on_demand"),), "closed", id="another market was cut"),
        pytest.param(ALL, (Slice(reason="x", gpus=frozenset({"H100"})),), "unknown", id="its GPU was cut"),
        pytest.param(ALL, (Slice(reason="x", region="US"),), "closed", id="another region failed"),
    ],
)
def test_an_offer_that_is_not_listed_is_gone_unknown_or_outside(query, incomplete, fate):
    """Only what a poll could have seen can be gone."""
    changes = compare([current()], [], query, incomplete)
    found = {
        "closed": changes.closed,
        "unknown": [old for old, _ in changes.unknown],
        "outside": changes.outside,
    }
    assert {fate: [Current(*current())]} == {name: rows for name, rows in found.items() if rows}


def test_an_unverified_machine_is_outside_a_poll_of_verified_ones():
    """`--any-host` finds it again; a poll without says nothing about it."""
    assert [Current(*current())] == compare([current()], [], verified=False).outside


def test_what_a_cut_poll_lists_is_seen_all_the_same():
    """Incomplete speaks of what is missing, not of what is there."""
    changes = compare([current()], [SPOT], incomplete=(Slice(reason="cut"),))
    assert ([(11, SPOT)], []) == (changes.seen, changes.unknown)


def test_an_unknown_offer_that_is_seen_again_is_confirmed():
    """Its age counts from the newest poll again."""
    assert [Current(*current(confirmed_by=5))] == compare([current(confirmed_by=5)], [SPOT]).confirmed


def test_a_product_or_machine_that_is_not_open_is_opened():
    """In the order of the listing."""
    others = [replace(SPOT, machine_id="m2"), replace(SPOT, sku="h100 x")]
    assert others == [new.offer for new in compare([current()], [SPOT, *others]).opened]


def test_the_cheapest_of_two_listings_of_one_offer_is_kept():
    """The dearer one is a skip with its listing's id."""
    dear = replace(SPOT, usd_per_hour=Decimal(3), listing_id="dear")
    for order in ([SPOT, dear], [dear, SPOT]):
        listed, skipped = listing(order, ALL, {})
        assert [SPOT] == [new.offer for new in listed.values()]
        assert [("dear", "the same offer was listed cheaper")] == [(s.id, s.reason) for s in skipped]


def test_an_offer_that_cannot_be_stored_is_skipped_with_the_reason():
    """A float or an unrounded price from a plugin costs only that row, even when an equal Decimal is known."""
    bad = [
        replace(SPOT, machine_id="float", usd_per_hour=2.0),
        replace(SPOT, machine_id="fine", usd_per_hour=Decimal("0.0000001")),
    ]
    listed, skipped = listing([SPOT, *bad], ALL, {})
    assert [SPOT] == [new.offer for new in listed.values()]
    assert ["float", "fine"] == [skip.id for skip in skipped]
    assert "money is Decimal, not float" in skipped[0].reason
    assert "finer than a micro-dollar" in skipped[1].reason


def test_offers_outside_the_scope_are_dropped_without_a_skip():
    """Nobody asked for them."""
    assert ({}, []) == listing([SPOT], OfferQuery(gpus=frozenset({"H200"})), {})
