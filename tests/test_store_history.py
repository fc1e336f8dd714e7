"""Random polls in, and out again: the same observations, the same current prices, by either door.

The model beside the store is the definition: what was fed, and a dictionary of what may still be there.
"""

from dataclasses import dataclass, field, replace
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpubroker.model import MARKETS, Offer, OfferQuery, Parsed, Priced, Slice
from gpubroker.prices import fastread
from tests.database import assert_sound, sweep
from tests.support import EXAMPLES_FACTOR, NOW
from tests.test_bill import offer

GPUS = ("H100", "A100-80GB")
TWO_MARKETS = ("spot", "on_demand")
DATABASE = settings(
    max_examples=60 * EXAMPLES_FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

money = st.sampled_from([None, Decimal("0"), Decimal("0.000001"), Decimal("0.15")])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
names = st.sampled_from(["", "a", "b"])
offers = st.builds(
    offer,
    provider=st.just("x"),
    gpu=st.sampled_from(GPUS),
    market=st.sampled_from(TWO_MARKETS),
    preemptible=st.booleans(),
    region=names,
    machine_id=names,
    usd_per_hour=st.sampled_from([Decimal("1.000000"), Decimal("1.000001"), Decimal("999999")]),
    billing_increment_s=st.sampled_from([1, 60]),
    storage_usd_per_gb_month=money,
    egress_usd_per_gb=money,
    verified=st.sampled_from([None, True, False]),
    listing_id=texts,
    reliability=st.sampled_from([None, Decimal("0.9"), Decimal("1.0000")]),
    disk_max_gb=st.sampled_from([None, 0, 512]),
    details=st.dictionaries(texts, texts, max_size=2),
)


def some(values):
    return st.none() | st.frozensets(st.sampled_from(values))


queries = st.builds(
    OfferQuery, gpus=some(GPUS), markets=some(TWO_MARKETS), verified_only=st.booleans(), whole=st.booleans()
)
slices = st.builds(
    Slice,
    reason=st.just("cut"),
    gpus=some(GPUS),
    market=st.sampled_from([None, *TWO_MARKETS]),
    region=st.none() | names,
)


@dataclass
class Polled:
    provider: str
    query: OfferQuery
    parsed: Parsed | None  # None = it failed
    after_s: int


polls = st.builds(
    Polled,
    provider=st.sampled_from(["one", "two"]),
    query=queries,
    parsed=st.none()
    | st.builds(
        Parsed,
        offers=st.lists(offers, max_size=5).map(tuple),
        incomplete=st.lists(slices, max_size=2).map(tuple),
        source=names,
    ),
    after_s=st.integers(-1, 3),
)


@dataclass
class Model:
    """What the store should say."""

    observed: dict = field(default_factory=dict)  # provider -> [(moment, offer but for what is volatile)]
    current: dict = field(default_factory=dict)  # identity -> Priced

    def keep(self, provider, query, parsed, moment):
        cheapest = {}
        for new in parsed.offers:
            if query.covers(new):
                old = cheapest.setdefault(identity(new), new)
                cheapest[identity(new)] = min(old, new, key=lambda o: o.usd_per_hour)
        self.observed.setdefault(provider, []).extend((moment, lasting(o)) for o in cheapest.values())
        for key, priced in list(self.current.items()):
            gone = priced.offer.provider == provider and key not in cheapest and query.covers(priced.offer)
            if gone and not any(part.covers(priced.offer) for part in parsed.incomplete):
                del self.current[key]
        for key, new in cheapest.items():
            self.current[key] = Priced(offer=new, source=parsed.source, as_of=moment, live=True)


def identity(o):
    return (
        *(o.provider, o.sku, o.gpu, o.form_factor, o.gpu_count, o.vram_gib, o.market, o.preemptible),
        *(o.region, o.zone, o.cloud, o.machine_id),
    )


def lasting(o: Offer) -> Offer:
    return replace(o, listing_id="", stock="", reliability=None, disk_max_gb=None, details={})


def in_order(things):
    return sorted(things, key=repr)


def play(store, sequence):
    """Feed the polls to the store and to the model."""
    sweep(store)
    store._clock.advance((NOW - store._clock.now()).total_seconds())
    model = Model()
    for poll in sequence:
        store._clock.advance(poll.after_s)
        poll_id = store.begin_poll(poll.provider, poll.query)
        if poll.parsed is None:
            store.fail_poll(poll_id, "it failed")
            continue
        parsed = replace(
            poll.parsed, offers=tuple(replace(o, provider=poll.provider) for o in poll.parsed.offers)
        )
        kept = store.keep(poll_id, parsed)
        model.keep(poll.provider, poll.query, parsed, kept.observed_at)
    return model


@given(sequence=st.lists(polls, max_size=8))
@example(sequence=[])
@DATABASE
def test_spans_expand_to_exactly_what_was_polled(store, sequence):
    """Lossless: every observation of every kept poll, and not one more."""
    model = play(store, sequence)
    for provider in ("one", "two"):
        assert in_order(model.observed.get(provider, [])) == in_order(store.observations(provider))
    assert_sound(store)


@given(sequence=st.lists(polls, max_size=8), gpus=some(GPUS))
@DATABASE
def test_current_prices_are_those_last_seen_and_not_known_to_be_gone(store, sequence, gpus):
    """With all their fields, and the moment and the source of the poll that last saw them."""
    model = play(store, sequence)
    expected = [p for p in model.current.values() if gpus is None or p.offer.gpu in gpus]
    assert in_order(expected) == in_order(store.current(gpus))


@pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
@given(sequence=st.lists(polls, max_size=8), gpus=some(GPUS), query=queries)
@DATABASE
def test_the_fast_door_reads_what_the_store_reads(store, sequence, gpus, query):
    """sqlite3 alone, and the same to the last field and in the same order."""
    play(store, sequence)
    store.set_provider_state("one", missing="KEY", tried_at=NOW)
    slow, fast = store.snapshot(gpus), fastread.snapshot(store.path, gpus)
    assert (slow.live, slow.states) == (fast.live, fast.states)
    assert slow.coverage.newest() == fast.coverage.newest()
    assert slow.coverage.freshness(query) == fast.coverage.freshness(query)
    assert slow.coverage.covered(query) == fast.coverage.covered(query)
    assert slow.coverage.newest_for(query) == fast.coverage.newest_for(query)


@given(sequence=st.lists(polls, max_size=8), query=queries)
@DATABASE
def test_coverage_is_what_the_polls_say(store, sequence, query):
    """Recomputed from every recorded poll, newest first."""
    play(store, sequence)
    coverage = store.snapshot(()).coverage
    kept = [p for p in store.polls(limit=99) if p.observed_at is not None]

    def newest(fits):
        return {p.provider: p.observed_at for p in sorted(kept, key=lambda p: p.observed_at) if fits(p)}

    def asked_for(poll, gpu, market, verified):
        return poll.scope.covers(offer(provider="x", gpu=gpu, market=market, verified=verified))

    wanted = [
        (gpu, market, verified)
        for gpu in query.gpus or (*GPUS, "any other")
        for market in query.markets or (*MARKETS,)
        for verified in ((True,) if query.verified_only else (True, False))
    ]
    fresh = newest(lambda p: all(asked_for(p, *one) for one in wanted) and (p.scope.whole or not query.whole))
    if query.gpus != frozenset() and query.markets != frozenset():
        assert fresh == {name: at for name, at in coverage.freshness(query).items() if at is not None}
    assert newest(lambda _: True) == coverage.newest()
