"""Alerts: what crosses a limit and what arms again, and that one crossing is told once, whoever looks."""

import os
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubroker.gpus import parse_request
from gpubroker.model import OfferQuery, Parsed, Slice
from gpubroker.prices.wanted import Wanted, wanted_of
from gpubroker.run.alerts import Alerts, usd
from gpubroker.run.events import Events
from tests.database import sweep
from tests.support import EXAMPLES_FACTOR, PATIENCE_S
from tests.test_bill import offer

MAX_AGE_S = 1800
LIMIT = Decimal("1.80")
H100 = Wanted(gpus=(parse_request("h100"),))
SPOT = offer(
    provider="vast", market="spot", gpu_count=8, region="US", machine_id="m1", usd_per_hour=Decimal("13.936")
)
REPOSITORY = Path(__file__).parents[1]


class Market:
    """Polls of a store, each followed by a look."""

    def __init__(self, store, clock):
        self.store, self.clock, self.alerts = store, clock, Alerts(store.database, clock)

    def poll(self, *offers, provider="vast", unseen=(), query=OfferQuery(), then=True):  # noqa: B008
        self.clock.advance(300)
        poll_id = self.store.begin_poll(provider, query)
        parts = tuple(Slice(reason="cut", region=region) for region in unseen)
        self.store.keep(poll_id, Parsed(offers=offers, incomplete=parts))
        return self.alerts.look(MAX_AGE_S) if then else []

    def fail(self, provider="vast"):
        self.clock.advance(300)
        self.store.fail_poll(self.store.begin_poll(provider, OfferQuery()), "down")


@pytest.fixture
def market(store, clock):
    return Market(store, clock)


def at(usd_per_gpu, **more):
    return replace(SPOT, usd_per_hour=Decimal(usd_per_gpu) * 8, **more)


def test_a_crossing_is_told_once_with_what_where_and_how_much(market, store, clock):
    """Its event is there for `gpubroker events` and for whoever sends messages."""
    market.alerts.add(H100, LIMIT)
    expected = "h100-sxm x8 spot at vast (US): $1.7420 for a GPU-hour, below $1.80; $13.94 an hour for the node (alert 1)"
    assert [[expected], []] == [market.poll(SPOT), market.poll(SPOT)]
    (event,) = Events(store.database, clock).after()
    assert ("alert", expected, None) == (event.kind, event.text, event.job_id)
    (alert,) = (alert for alert, _ in market.alerts.standing(MAX_AGE_S))
    assert (True, 1, event.at) == (alert.is_below, alert.told, alert.told_at)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param((at("1.80"),), id="at the limit, which is not below it"),
        pytest.param((at("1.90"),), id="above it"),
        pytest.param((), id="no offer"),
        pytest.param((at("1.70", stock="none"),), id="none in stock"),
    ],
)
def test_it_is_armed_again_by_a_poll_that_finds_nothing_below_the_limit(market, between):
    """And tells the next time."""
    market.alerts.add(H100, LIMIT)
    assert [1, 0, 0, 1, 0] == [
        len(found) for found in (
            market.poll(at("1.70")), market.poll(*between), market.poll(*between), market.poll(at("1.79")),
            market.poll(at("1.60")),
        )
    ]  # fmt: skip


def test_what_a_poll_could_not_see_neither_tells_nor_arms(market):
    """The offer may still be there; another one that was seen above the limit does not change that."""
    market.alerts.add(H100, LIMIT)
    dear = at("2.50", machine_id="m2", region="DE")
    assert [1, 0, 0, 0] == [
        len(found)
        for found in (
            market.poll(at("1.70"), dear),
            market.poll(dear, unseen=("US",)),
            market.poll(at("2.60", machine_id="m2", region="DE"), unseen=("US",)),
            market.poll(at("1.70"), dear),
        )
    ]
    market.alerts.remove(1)
    market.poll(dear, unseen=("US",), then=False)
    market.alerts.add(H100, LIMIT)
    assert ([], 1) == (market.poll(dear, unseen=("US",)), len(market.poll(at("1.70"), dear)))


def test_a_failed_poll_and_what_has_grown_old_neither_tell_nor_arm(market, clock):
    """Another vendor's polls go on meanwhile."""
    market.alerts.add(H100, LIMIT)
    other = offer(provider="lambda", usd_per_hour=Decimal(3))
    assert 1 == len(market.poll(at("1.70")))
    for _ in range(8):
        market.fail()
        assert [] == market.poll(other, provider="lambda")
    market.alerts.remove(1)
    market.alerts.add(H100, LIMIT)
    assert [] == market.poll(other, provider="lambda")
    (_, found) = market.alerts.standing(MAX_AGE_S)[0]
    assert (other, True) == (found.cheapest, found.may_be_below)
    assert [1, 0] == [len(market.poll(at("1.70"))), len(market.poll(at("1.70")))]


def test_a_price_from_the_future_is_not_believed(market, clock):
    """A clock that was wrong stamped it."""
    market.alerts.add(H100, LIMIT)
    clock.advance(3600)
    market.poll(at("1.70"), then=False)
    clock.advance(-3600)
    assert [] == market.alerts.look(MAX_AGE_S)


@pytest.mark.parametrize(
    ("wanted", "one", "is_told"),
    [
        pytest.param({}, offer(provider="local", usd_per_hour=Decimal("0.1")), False, id="one's own GPU"),
        pytest.param(
            {"providers": ("local",)},
            offer(provider="local", usd_per_hour=Decimal("0.1")),
            True,
            id="by name",
        ),
        pytest.param({}, at("1", market="reserved"), False, id="a month"),
        pytest.param({"markets": ("reserved",)}, at("1", market="reserved"), True, id="a month, by name"),
        pytest.param({"count": 4}, at("1"), False, id="another count"),
        pytest.param({"count": 8}, at("1"), True, id="the count"),
        pytest.param({"markets": ("on_demand",)}, at("1"), False, id="another market"),
        pytest.param({"regions": ("eu",)}, at("1"), False, id="another region"),
        pytest.param({"regions": ("us",)}, at("1"), True, id="the region"),
        pytest.param({"gpus": (parse_request("h100-pcie"),)}, at("1"), False, id="another form"),
    ],
)
def test_only_what_was_asked_for_counts(market, wanted, one, is_told):
    """Also after it was kept and read again."""
    asked = Wanted(**{"gpus": H100.gpus, **wanted})
    assert asked == wanted_of(asked.kept)
    market.alerts.add(asked, LIMIT)
    assert is_told == bool(market.poll(one, provider=one.provider))


def test_the_cheapest_of_all_vendors_is_told(market):
    """By the GPU, not by the node; a host that is not verified is said to be none."""
    market.alerts.add(H100, LIMIT)
    market.poll(at("1.75"), then=False)
    alone = offer(provider="runpod", usd_per_hour=Decimal("1.7"), verified=False, form_factor="unstated")
    (text,) = market.poll(alone, provider="runpod", query=OfferQuery(verified_only=False))
    assert (
        "h100 on-demand at runpod: $1.70 for a GPU-hour, below $1.80, a host that runpod has not verified (alert 1)"
        == text
    )


def test_the_same_alert_is_kept_once_and_no_number_comes_twice(market):
    """An event names its alert."""
    first, is_new = market.alerts.add(H100, LIMIT)
    assert (1, True, (first, False)) == (first.id, is_new, market.alerts.add(H100, LIMIT))
    assert (True, False) == (market.alerts.remove(1), market.alerts.remove(1))
    assert 2 == market.alerts.add(H100, Decimal("1.80"))[0].id


def test_of_two_that_saw_the_same_one_tells(market, store, clock):
    """Each has looked before the other wrote; so it is with what a slow one has seen of the crossing before."""
    market.alerts.add(H100, LIMIT)
    market.poll(SPOT, then=False)
    seen = market.alerts.standing(MAX_AGE_S)
    others = [Alerts(store.database, clock) for _ in range(2)]
    for other in others:
        other.standing = lambda _: seen
    assert [1, 0] == [len(other.look(MAX_AGE_S)) for other in others]
    assert [[], 1] == [market.poll(at("2")), len(market.poll(SPOT))]
    assert [] == market.poll(at("2"))
    assert [] == others[0].look(MAX_AGE_S)
    assert 2 == len(Events(store.database, clock).after())


LOOKER = """
import sys
from gpubroker.prices.store import Store
from gpubroker.run.alerts import Alerts
from gpubroker.testing import FakeClock

clock = FakeClock()
with Store.open(sys.argv[1], clock) as store:
    alerts = Alerts(store.database, clock)
    alerts.standing(1800)
    print("ready", flush=True)
    for line in sys.stdin:
        print(len(alerts.look(1800)), flush=True)
"""


def test_processes_that_look_at_once_tell_once(store, empty_url, clock):
    """Real ones, on one database, again and again."""
    alerts = Alerts(store.database, clock)
    alerts.add(H100, LIMIT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    lookers = [
        subprocess.Popen(
            [sys.executable, "-c", LOOKER, empty_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=REPOSITORY,
        )
        for _ in range(3)
    ]
    try:
        assert ["ready\n"] * 3 == [looker.stdout.readline() for looker in lookers]
        told_each_time = []
        for number in range(10 * EXAMPLES_FACTOR):
            price = SPOT if number % 2 == 0 else at("2")
            store.keep(store.begin_poll("vast", OfferQuery()), Parsed(offers=(price,)))
            for looker in lookers:
                looker.stdin.write("go\n")
                looker.stdin.flush()
            told_each_time.append(sum(int(looker.stdout.readline()) for looker in lookers))
        assert [1, 0] * 5 * EXAMPLES_FACTOR == told_each_time
    finally:
        for looker in lookers:
            looker.communicate(timeout=PATIENCE_S)
    assert 5 * EXAMPLES_FACTOR == len(Events(store.database, clock).after())


# What a poll finds: a price for one GPU, nothing, or it cannot see where the offer is, or it fails.
LOOKS = st.lists(
    st.sampled_from(["1.70", "1.79", "1.80", "2", "none", "unseen", "failed"]), min_size=1, max_size=12
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(looks=LOOKS)
def test_of_any_polls_as_many_are_told_as_there_are_crossings(market, looks):
    """A crossing: known below, and before it known at or above, or known to be none, or never known."""
    sweep(market.store)
    (alert, _), expected, count = market.alerts.add(H100, LIMIT), 0, 0
    was_below = False
    for look in looks:
        if look == "failed":
            market.fail()
            count += len(market.alerts.look(MAX_AGE_S))
            continue
        offers = () if look in ("none", "unseen") else (at(look),)
        count += len(market.poll(*offers, unseen=("US",) if look == "unseen" else ()))
        if look != "unseen":
            is_below = look != "none" and Decimal(look) < LIMIT
            expected += is_below and not was_below
            was_below = is_below
    assert (expected, H100) == (count, alert.wanted)


@pytest.mark.parametrize(
    ("amount", "text"),
    [("1.8", "$1.80"), ("1.742", "$1.7420"), ("3.3333333333", "$3.333333"), ("1234", "$1,234.00")],
)
def test_money_is_told_exactly(amount, text):
    """Two places where they say it all."""
    assert text == usd(Decimal(amount))


def test_a_wish_is_told_in_words():
    """As the one who asked would say it."""
    asked = Wanted(
        gpus=(parse_request("H100-SXM"), parse_request("h200")),
        providers=("vast", "aws"),
        markets=("spot", "on_demand"),
        regions=("us",),
        count=8,
    )
    assert "H100-SXM or h200 x8 spot or on-demand at vast or aws in us" == asked.text
