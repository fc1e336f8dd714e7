"""The store by its own words: polls in, current prices and the whole history out, on both databases."""

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest

from gpubroker.errors import StoreError
from gpubroker.model import OfferQuery, Parsed, Priced, Skipped, Slice
from gpubroker.prices.polls import ProviderState, SkipCount
from gpubroker.prices.store import Poll
from tests.database import assert_sound, rows_of
from tests.support import NOW
from tests.test_bill import offer

ALL = OfferQuery()
H100 = OfferQuery(gpus=frozenset({"H100"}))
RICH = offer(
    provider="vast",
    sku="H100 SXM",
    market="spot",
    preemptible=True,
    region="US",
    zone="us-1",
    cloud="secure",
    machine_id="m1",
    host_id="h1",
    usd_per_hour=Decimal("1.234567"),
    billing_increment_s=60,
    minimum_s=3600,
    disk_included_gb=10,
    storage_usd_per_gb_month=Decimal("0.150000"),
    egress_usd_per_gb=Decimal("0.000000"),
    ingress_usd_per_gb=Decimal("0.002500"),
    cpu_usd_per_core_hour=Decimal("0.047160"),
    ram_usd_per_gib_hour=Decimal("0.008000"),
    verified=True,
    listing_id="31415926",
    stock="high",
    reliability=Decimal("0.9987"),
    disk_max_gb=512,
    details={"geolocation": 'Zürich, "CH"', "cpu": "EPYC\n\x00", "empty": ""},
)
H200 = replace(RICH, gpu="H200", sku="H200", machine_id="m2", details={})


def feed(store, *offers, query=ALL, after_s=60, provider="vast", **parsed):
    store._clock.advance(after_s)
    parsed = {"fetched": len(offers), "source": "POST /bundles", **parsed}
    return store.keep(store.begin_poll(provider, query), Parsed(offers=offers, **parsed))


def live(priced, as_of, source="POST /bundles"):
    return Priced(offer=priced, source=source, as_of=as_of, live=True)


def at(seconds):
    return NOW + timedelta(seconds=seconds)


def spans(store):
    return rows_of(store, "SELECT usd_per_hour, first_at, until_at FROM spans ORDER BY id")


def test_an_offer_comes_back_whole(store):
    """Every field, to the micro-dollar and to the last odd character."""
    feed(store, RICH, H200)
    assert [live(RICH, at(60)), live(H200, at(60))] == store.current()


def test_bare_terms_come_back_as_none(store):
    """None is not zero: the fee table decides, or the price includes it."""
    feed(store, offer(provider="vast"))
    assert [live(offer(provider="vast"), at(60))] == store.current()


def test_current_offers_are_asked_for_by_gpu(store):
    """None is every one, an empty set is none."""
    feed(store, RICH, H200)
    assert [H200] == [p.offer for p in store.current({"H200", "B200"})]
    assert [] == store.current(set())


def test_a_poll_that_finds_the_same_writes_no_span(store):
    """The age of the price is the newest poll's."""
    feed(store, RICH)
    result = feed(store, RICH)
    assert (1, 0, 0, 0) == (result.kept, result.opened, result.changed, result.closed)
    assert [(1_234_567, int(at(60).timestamp()), None)] == spans(store)
    assert [live(RICH, at(120))] == store.current()


def test_a_new_price_ends_the_old_span_and_begins_another(store):
    """At one moment: the old price holds until, and not at, the poll that found the new one."""
    feed(store, RICH)
    dearer = replace(RICH, usd_per_hour=Decimal("1.234568"))
    result = feed(store, dearer)
    assert (0, 1, 0) == (result.opened, result.changed, result.closed)
    first, second = int(at(60).timestamp()), int(at(120).timestamp())
    assert [(1_234_567, first, second), (1_234_568, second, None)] == spans(store)
    assert [live(dearer, at(120))] == store.current()


def test_a_new_listing_of_the_same_machine_is_no_new_price(store):
    """Its id, its host and its figures are the newest ones all the same."""
    feed(store, RICH)
    again = replace(RICH, listing_id="2", host_id="h2", stock="low", disk_max_gb=None, details={"x": "y"})
    feed(store, again)
    assert 1 == len(spans(store))
    assert [live(again, at(120))] == store.current()


def test_an_offer_that_is_gone_is_no_longer_current(store):
    """And when it comes back its history goes on, with a gap."""
    feed(store, RICH)
    assert 1 == feed(store).closed
    assert [] == store.current()
    assert [] == rows_of(store, "SELECT * FROM latest")
    assert 1 == feed(store, RICH).opened
    assert [(at(60), "m1"), (at(180), "m1")] == [(t, o.machine_id) for t, o in store.observations("vast")]
    assert 1 == len(rows_of(store, "SELECT id FROM offers"))


def test_a_poll_of_one_gpu_says_nothing_about_the_others(store):
    """They stay as old as the poll that saw them, with all that is volatile of them."""
    feed(store, RICH, H200, source="whole")
    feed(store, RICH, query=H100, source="part")
    assert [live(RICH, at(120), "part"), live(H200, at(60), "whole")] == store.current()


def test_a_failed_poll_changes_nothing(store):
    """All it would have covered is unknown; its error is recorded."""
    feed(store, RICH)
    store._clock.advance(60)
    poll_id = store.begin_poll("vast", ALL)
    store.fail_poll(poll_id, "no answer within 4 s")
    assert [live(RICH, at(60))] == store.current()
    failed = store.polls("vast")[0]
    assert ("no answer within 4 s", at(120), None) == (failed.error, failed.finished_at, failed.observed_at)


def test_what_was_cut_keeps_the_age_of_the_poll_that_saw_it(store):
    """Through any number of polls that could not speak for it, until one can."""
    cut = (Slice(reason="limit", gpus=frozenset({"H200"})),)
    feed(store, RICH, H200, source="first")
    for _ in range(2):
        assert 1 == feed(store, RICH, incomplete=cut, source="cut").unknown
    assert [live(RICH, at(180), "cut"), live(H200, at(60), "first")] == store.current()
    assert [at(60)] == [t for t, o in store.observations("vast") if o.gpu == "H200"]
    feed(store, RICH, H200, incomplete=cut, source="seen")
    assert [live(RICH, at(240), "seen"), live(H200, at(240), "seen")] == store.current()


def test_an_unknown_offer_that_a_whole_poll_does_not_find_is_gone(store):
    """Unknown is not for ever."""
    feed(store, RICH)
    feed(store, incomplete=(Slice(reason="limit"),))
    assert 1 == feed(store).closed
    assert [] == store.current()


def test_unverified_machines_outlive_polls_of_verified_ones(store):
    """A poll without --any-host cannot see them."""
    cheap = replace(RICH, machine_id="m9", verified=False)
    feed(store, RICH, cheap, query=OfferQuery(verified_only=False))
    assert 0 == feed(store, RICH).closed
    assert [live(RICH, at(120)), live(cheap, at(60))] == store.current()
    assert 1 == feed(store, RICH, query=OfferQuery(verified_only=False)).closed


def test_providers_do_not_touch_each_other(store):
    """Not even with the same machine and the same terms."""
    feed(store, RICH)
    feed(store, replace(RICH, provider="aws"), provider="aws")
    feed(store, provider="aws")
    assert ["vast"] == [p.offer.provider for p in store.current()]
    assert (1, 0) == (store.open_offers("vast"), store.open_offers("aws"))


def test_two_polls_within_a_second_are_a_second_apart(store):
    """A clock that stands still or runs backwards never makes two moments one."""
    moments = [feed(store, RICH, after_s=s).observed_at for s in (0, 0, -3600)]
    assert [at(0), at(1), at(2)] == moments
    assert_sound(store)


def test_nothing_is_dropped_silently(store):
    """The poll holds both counts, every reason, and five ids of each."""
    many = tuple(Skipped(id=str(n), reason="price is null") for n in range(7))
    twice = replace(RICH, usd_per_hour=Decimal(9), listing_id="dear")
    result = feed(
        store, RICH, twice, fetched=10, skipped=(*many, Skipped(id="x", reason="no GPU")), notes=("keyless",)
    )
    assert 9 == len(result.skipped)
    poll = store.last_poll("vast")
    assert (
        Poll(
            id=poll.id,
            provider="vast",
            scope=ALL,
            started_at=at(60),
            finished_at=at(60),
            observed_at=at(60),
            fetched=10,
            kept=1,
            skipped=9,
            skips={
                "price is null": SkipCount(7, ("0", "1", "2", "3", "4")),
                "no GPU": SkipCount(1, ("x",)),
                "the same offer was listed cheaper": SkipCount(1, ("dear",)),
            },
            source="POST /bundles",
            notes=("keyless",),
        )
        == poll
    )
    remembered = store.snapshot(()).coverage.newest_for(ALL)[0].skipped
    assert ["0", "1", "2", "3", "4", "and 2 more", "x", "dear"] == [skip.id for skip in remembered]


def test_a_scope_and_its_gaps_come_back_as_they_were(store):
    """What was asked and what was not seen are part of the record."""
    query = OfferQuery(
        gpus=frozenset({"H100", "A100-80GB"}), markets=frozenset({"spot"}), verified_only=False, whole=False
    )
    gaps = (
        Slice(reason="quota", gpus=frozenset({"H100"}), market="spot"),
        Slice(reason="a", region="r", cloud="c"),
    )
    feed(store, query=query, incomplete=gaps)
    assert (query, gaps) == (store.last_poll("vast").scope, store.last_poll("vast").incomplete)


def test_a_poll_that_ended_is_not_kept_again(store):
    """A thread that comes too late stores nothing."""
    poll_id = store.begin_poll("vast", ALL)
    store.fail_poll(poll_id, "late")
    with pytest.raises(StoreError, match=f"poll {poll_id} is not running"):
        store.keep(poll_id, Parsed(offers=(RICH,)))
    assert [] == store.current()


def test_a_poll_is_kept_whole_or_not_at_all(store, monkeypatch):
    """What breaks at the last step leaves nothing behind, and the poll can still be failed."""
    poll_id = store.begin_poll("vast", ALL)
    monkeypatch.setattr(store, "_finish", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.keep(poll_id, Parsed(offers=(RICH, H200)))
    monkeypatch.undo()
    counts = store.counts()
    assert {0} == {counts[name] for name in ("offers", "spans", "latest", "products", "rates", "coverage")}
    store.fail_poll(poll_id, "broke")
    assert "broke" == store.last_poll("vast").error


def test_polls_are_listed_newest_first_and_by_provider(store):
    """As many as were asked for."""
    for provider in ("vast", "aws", "vast"):
        feed(store, provider=provider)
    assert ["vast", "aws", "vast"] == [poll.provider for poll in store.polls()]
    assert 1 == len(store.polls("vast", limit=1))
    assert None is store.last_poll("modal")


def test_a_provider_state_changes_by_field(store):
    """What is not named stays."""
    store.set_provider_state("vast", missing="VAST_API_KEY", tried_at=NOW)
    store.set_provider_state("vast", unreachable_until=at(60), reason="no route")
    store.set_provider_state("aws")
    known = ProviderState(
        provider="vast", missing="VAST_API_KEY", unreachable_until=at(60), reason="no route", tried_at=NOW
    )
    assert {"aws": ProviderState(provider="aws"), "vast": known} == store.provider_states()
    store.set_provider_state("vast", unreachable_until=None)
    assert replace(known, unreachable_until=None) == store.provider_states()["vast"]


def test_freshness_counts_polls_that_asked_for_all_of_it(store):
    """A poll of H100 alone does not make H200 fresh; a whole one does both."""
    feed(store, RICH)
    feed(store, RICH, query=H100)
    feed(store, provider="aws", query=H100)
    coverage = store.snapshot(()).coverage
    assert {"vast": at(120), "aws": at(180)} == coverage.freshness(H100)
    assert {"vast": at(60), "aws": None} == coverage.freshness(ALL)
    assert {"vast": at(120), "aws": at(180)} == coverage.newest()


@pytest.mark.parametrize(
    ("asked", "wanted", "enough"),
    [
        pytest.param(ALL, H100, True, id="every GPU holds one"),
        pytest.param(H100, ALL, False, id="one is not every"),
        pytest.param(OfferQuery(markets=frozenset({"spot"})), ALL, False, id="one market is not every"),
        pytest.param(ALL, OfferQuery(verified_only=False), False, id="verified hosts are not any host"),
        pytest.param(OfferQuery(verified_only=False), ALL, True, id="any host includes verified"),
        pytest.param(OfferQuery(whole=False), ALL, False, id="the quick part is not the whole"),
        pytest.param(ALL, OfferQuery(whole=False), True, id="the whole includes the quick part"),
    ],
)
def test_what_a_poll_asked_for_decides_what_it_makes_fresh(store, asked, wanted, enough):
    """Scope by scope."""
    feed(store, query=asked)
    assert {"vast": at(60) if enough else None} == store.snapshot(()).coverage.freshness(wanted)


def test_a_market_with_a_gap_was_asked_but_not_seen_whole(store):
    """Nobody asks again at once, and the price book still speaks for what was not seen."""
    feed(store, RICH, incomplete=(Slice(reason="not priced", market="serverless"),))
    coverage = store.snapshot(()).coverage
    assert {"vast": at(60)} == coverage.freshness(ALL)
    assert {("vast", market): at(60) for market in ("spot", "on_demand", "reserved")} == coverage.covered(ALL)


def test_an_empty_store_answers(store):
    """Nothing is on the market, and nobody was asked."""
    snapshot = store.snapshot(None)
    assert ([], {}, {}) == (snapshot.live, snapshot.states, snapshot.coverage.freshness(ALL))
    assert [] == list(store.observations("vast"))


def test_the_same_rates_are_kept_once(store):
    """A thousand machines, one row of terms."""
    feed(store, *(replace(RICH, machine_id=f"m{n}") for n in range(1500)))
    assert (1500, 1) == (store.counts()["spans"], store.counts()["rates"])
    assert 1500 == len(store.current())


def test_moments_are_aware_and_utc(store):
    """Whatever the database calls them."""
    feed(store, RICH)
    poll = store.last_poll("vast")
    assert {timedelta(0)} == {m.utcoffset() for m in (poll.started_at, poll.observed_at)}
    assert isinstance(poll.started_at, datetime)
