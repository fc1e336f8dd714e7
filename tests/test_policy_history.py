"""Our own price history as a trace: made-up spans, and a store that two polls filled."""

from dataclasses import replace
from decimal import Decimal

import pytest

from gpubroker.errors import ConfigError
from gpubroker.model import Offer, OfferQuery, Parsed
from gpubroker.policy.history import ListedSpan, traces_of
from gpubroker.prices.spot_history import looks, past_offers
from gpubroker.prices.store import Store
from gpubroker.testing import FakeClock
from tests.support import NOW

HOUR = 3600
SPOT = ListedSpan(
    offer=1, provider="vast", zone="US", is_spot=True, usd_per_hour=1.0, first_s=0, until_s=None
)
ON_DEMAND = replace(SPOT, offer=9, is_spot=False, usd_per_hour=3.0)
LOOKS = {"vast": [hour * HOUR for hour in range(6)]}


def made(*spans, seen=LOOKS, most_gap_s=2 * HOUR):
    return traces_of(spans, seen, name="h100", step_s=HOUR, most_gap_s=most_gap_s)


def shown(trace):
    return "".join("01"[there] for there in trace.available), trace.spot_usd_per_hour


def test_a_step_is_available_where_one_offer_was_there_for_all_of_it():
    """An offer that went at half past two and another that came then leave a hole."""
    came = replace(SPOT, offer=2, usd_per_hour=2.0, first_s=5 * HOUR // 2)
    found = made(replace(SPOT, until_s=5 * HOUR // 2), came, ON_DEMAND)
    assert [("11011", (1.0, 1.0, 1.0, 2.0, 2.0))] == [shown(trace) for trace in found]


def test_a_new_price_of_the_same_offer_is_no_preemption():
    """The step keeps the price that it began with."""
    found = made(
        replace(SPOT, until_s=5 * HOUR // 2),
        replace(SPOT, first_s=5 * HOUR // 2, usd_per_hour=4.0),
        ON_DEMAND,
    )
    assert ("11111", (1.0, 1.0, 1.0, 4.0, 4.0)) == shown(found[0])


def test_the_cheapest_offer_of_a_zone_counts_and_zones_stay_apart():
    """Sorted by provider and zone."""
    found = made(SPOT, replace(SPOT, offer=2, usd_per_hour=0.5), replace(SPOT, offer=3, zone="DE"), ON_DEMAND)
    assert [("vast DE", 1.0, 3.0), ("vast US", 0.5, 3.0)] == [
        (trace.zone, trace.spot_usd_per_hour[0], trace.on_demand_usd_per_hour) for trace in found
    ]
    assert {"h100"} == {trace.group for trace in found}


def test_nothing_is_taken_for_available_where_nobody_looked():
    """Between the looks at 1 h and 4 h nobody knows."""
    found = made(SPOT, ON_DEMAND, seen={"vast": [0, HOUR, 4 * HOUR, 5 * HOUR]})
    assert "10001" == shown(found[0])[0]


def test_an_open_span_ends_at_its_providers_last_look():
    """Another provider was polled for longer."""
    found = made(SPOT, replace(ON_DEMAND, provider="aws"), seen={"vast": [0, 2 * HOUR], "aws": LOOKS["vast"]})
    assert "11000" == shown(found[0])[0]


@pytest.mark.parametrize(
    ("spans", "seen", "said"),
    [
        pytest.param((SPOT, ON_DEMAND), {}, "shorter than one step", id="never polled"),
        pytest.param((SPOT, ON_DEMAND), {"vast": [0, 60]}, "shorter than one step", id="a minute"),
        pytest.param((SPOT,), LOOKS, "no on-demand offers", id="no on-demand"),
        pytest.param((ON_DEMAND,), LOOKS, "no spot offers", id="no spot"),
    ],
)
def test_too_little_history_is_said(spans, seen, said):
    """What is missing, in a sentence."""
    with pytest.raises(ConfigError, match=said):
        made(*spans, seen=seen)


def test_the_store_gives_its_spans_and_looks():
    """Only polls that asked for the card count as looks; a closed offer keeps its end."""
    clock = FakeClock()
    offer = Offer(
        provider="vast",
        sku="s",
        gpu="H100",
        form_factor="SXM",
        gpu_count=1,
        vram_gib=80,
        market="spot",
        preemptible=True,
        region="US",
        usd_per_hour=Decimal("1.5"),
    )
    with Store.open("sqlite://", clock) as store:
        store.migrate()
        for listed, query in (
            ([offer], OfferQuery()),
            ([], OfferQuery(gpus=frozenset({"A100"}))),
            ([], OfferQuery()),
        ):
            store.keep(
                store.begin_poll("vast", query), Parsed(offers=tuple(listed), fetched=1, source="test")
            )
            clock.sleep(HOUR)
        span = past_offers(store, {"H100"}, 1)[0]
        first = int(NOW.timestamp())
        assert ("vast", "US", "spot", 1_500_000, first, first + 2 * HOUR) == (
            span.provider,
            span.region,
            span.market,
            span.usd_micros,
            span.first_at,
            span.until_at,
        )
        assert {"vast": [first, first + 2 * HOUR]} == looks(store, {"H100"})
