"""How long offers and prices last: Kaplan-Meier, and the stays that it is made of."""

import csv
import io
import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.cli import main
from gpubroker.model import OfferQuery, Parsed
from gpubroker.plan.hazard import Hazards
from gpubroker.prices.store import Store
from gpubroker.prices.survival import (
    AtPrice,
    Lasted,
    Stay,
    Watched,
    kaplan_meier,
    lasted,
    stays,
    typical_change,
    watched,
)
from tests.database import sweep
from tests.support import EXAMPLES_FACTOR, NOW, FakeClock
from tests.test_bill import offer

LASTED = st.lists(st.builds(Lasted, st.integers(1, 12), st.booleans()), max_size=30)
END = 40


@settings(max_examples=100 * EXAMPLES_FACTOR, deadline=None)
@given(seen=LASTED, age=st.integers(0, 15))
def test_the_curve_is_the_product_of_the_shares_that_outlived_each_age(seen, age):
    """By the definition, in fractions: at every age at which one ended, of those that were as old."""
    expected = Fraction(1)
    for at in range(1, age + 1):
        at_risk = sum(one.seconds >= at for one in seen)
        ended = sum(one.is_over for one in seen if one.seconds == at)
        expected *= 1 - Fraction(ended, at_risk) if at_risk else 1
    step = kaplan_meier(seen).alive_at(age)
    if age > max((one.seconds for one in seen), default=0):
        assert step is None
    else:
        assert pytest.approx(float(expected)) == step.alive
        assert step.low <= step.alive + 1e-12
        assert step.alive <= step.high + 1e-12


def test_figures_of_a_published_example_come_out():
    """The remission times under 6-MP of Freireich et al. 1963: S(10) = 0.753, S(23) = 0.448, median 23 weeks."""
    ended = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    cut_off = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    curve = kaplan_meier([*(Lasted(at, True) for at in ended), *(Lasted(at, False) for at in cut_off)])
    assert (21, 9, 35) == (curve.number, curve.ended, curve.followed_s)
    assert [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448] == [round(s.alive, 3) for s in curve.steps]
    middle, low, high = curve.gone_after_s(0.5)
    assert (23, None) == (middle, high)
    assert low < 23
    assert curve.alive_at(36) is None


def test_without_an_end_nothing_is_gone():
    """And without a stay nothing is known."""
    assert (None, None, None) == kaplan_meier([Lasted(5, False)]).gone_after_s(0.25)
    assert 1.0 == kaplan_meier([Lasted(5, False)]).alive_at(5).alive
    assert kaplan_meier([]).alive_at(1) is None


# A price or None for each second: what an offer was seen at.
SECONDS = st.lists(st.sampled_from([None, None, 10, 10, 10, 20]), min_size=1, max_size=END)


def held(offer_id, seconds):
    """The spans that such seconds make."""
    cuts = [at for at in range(len(seconds)) if at == 0 or seconds[at] != seconds[at - 1]]
    for begin, until in pairwise([*cuts, len(seconds)]):
        if seconds[begin] is not None:
            is_open = until == len(seconds)
            yield AtPrice(offer_id, seconds[begin], begin, None if is_open else until)


@settings(max_examples=100 * EXAMPLES_FACTOR, deadline=None)
@given(offers=st.lists(SECONDS, min_size=1, max_size=4), begin=st.integers(0, 10))
def test_ends_and_hours_are_those_of_the_seconds(offers, begin):
    """An offer ends where it is there at one second and not at the next; a price also where it differs."""
    offers = [seconds + [seconds[-1]] * (END - len(seconds)) for seconds in offers]
    spans = [span for number, seconds in enumerate(offers) for span in held(number, seconds)]
    there = [(seconds[at - 1], seconds[at]) for seconds in offers for at in range(max(1, begin), END)]
    open_s = sum(seconds[at] is not None for seconds in offers for at in range(begin, END))
    offer_ends = sum(before is not None and after is None for before, after in there)
    price_ends = sum(before is not None and before != after for before, after in there)
    assert Watched(offer_ends, open_s) == watched(stays(spans, 0, of_price=False), begin, END)
    assert Watched(price_ends, open_s) == watched(stays(spans, 0, of_price=True), begin, END)


def test_what_was_there_before_the_first_look_is_in_no_curve():
    """Nobody knows when it began; what is still there is cut off at the end."""
    found = list(
        stays(
            [AtPrice(1, 5, 0, 10), AtPrice(2, 5, 3, 9), AtPrice(2, 6, 9, 12), AtPrice(3, 5, 4, None)],
            0,
            of_price=False,
        )
    )
    assert [Stay(0, 10, False), Stay(3, 12, True), Stay(4, None, True)] == found
    assert [Lasted(9, True), Lasted(16, False)] == list(lasted(found, 0, 20))
    assert [Lasted(7, False), Lasted(6, False)] == list(lasted(found, 0, 10))


def test_a_typical_change_is_between_prices_that_follow_each_other():
    """Half of the changes are smaller; a new price after a gap is none."""
    spans = [AtPrice(1, 100, 0, 5), AtPrice(1, 110, 5, 7), AtPrice(1, 99, 7, 9), AtPrice(1, 999, 10, None)]
    assert pytest.approx(0.1) == typical_change(spans)
    assert typical_change(spans[-1:]) is None


# In the store


@pytest.fixture
def clean(store):
    sweep(store)
    store._clock.advance((NOW - store._clock.now()).total_seconds())
    return store


def poll(store, *machines, hours=1, **more):
    store._clock.advance(timedelta(hours=hours).total_seconds())
    offers = tuple(
        offer(**{"provider": "x", "market": "spot", "region": "here", "machine_id": name, **more})
        for name in machines
    )
    return store.keep(store.begin_poll("x", OfferQuery()), Parsed(offers=offers))


def test_a_day_keeps_how_often_machines_left_the_spot_list(clean):
    """Prices may change meanwhile; a quote reads it, and the hazard follows it."""
    poll(clean, "a", "b")  # 13:00
    poll(clean, "a", "b", usd_per_hour=Decimal("1.5"))
    poll(clean, "a")  # b leaves after two hours
    poll(clean, "a", "b")
    poll(clean, hours=2)  # both leave: after five hours, and after two
    assert () == clean.snapshot(None).exposures
    poll(clean, hours=12)
    (seen,) = clean.snapshot({"H100"}).exposures
    assert ("x", "H100", "here", "spot", True) == (
        seen.provider,
        seen.gpu,
        seen.region,
        seen.market,
        seen.is_listed,
    )
    assert (3, 5 + 2 + 2) == (seen.preemptions, seen.hours)
    assert () == clean.snapshot({"A100"}).exposures
    before, after = (
        Hazards(exposures).of(offer(provider="x", market="spot", region="here", machine_id="a"))
        for exposures in ((), (seen,))
    )
    assert before.gamma.after(3, 9) == after.gamma
    assert "9 h of the spot list" in after.text


@pytest.mark.parametrize(
    ("names", "market"),
    [pytest.param(("a", "b"), "on_demand", id="on demand"), pytest.param(("",), "spot", id="a kind")],
)
def test_only_single_machines_on_the_spot_list_count(clean, names, market):
    """That a kind of machine is no longer listed takes no node away."""
    poll(clean, *names, market=market)
    poll(clean)
    poll(clean, hours=24)
    assert () == clean.snapshot(None).exposures


def test_an_end_at_midnight_is_in_one_day(clean):
    """Of two whole days, all ends are there once, and all seconds."""
    totals = defaultdict(float)
    to_midnight = 24 - NOW.hour - NOW.minute / 60 - NOW.second / 3600
    poll(clean, "a")
    poll(clean, hours=to_midnight - 1)
    poll(clean, "a")
    poll(clean, hours=23)
    poll(clean, hours=24)
    for seen in clean.snapshot(None).exposures:
        totals["ends"] += seen.preemptions
        totals["hours"] += seen.hours
    assert 2 == totals["ends"]
    assert pytest.approx(to_midnight - 1 + 23) == totals["hours"]


# The command


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """`ask(*words)` -> exit code, what was printed, what was said; after two days of hourly polls.

    Machine n is listed after n hours, for n hours; half way its price doubles.
    """
    url = f"sqlite:///{tmp_path}/p.db"
    monkeypatch.setenv("GPUBROKER_DB_URL", url)
    clock = FakeClock(datetime.now(UTC) - timedelta(hours=48, minutes=1))
    with Store.open(url, clock) as store:
        store.migrate()
        for hour in range(49):
            there = [number for number in range(1, 24) if number <= hour < 2 * number]
            offers = [
                offer(
                    provider="vast",
                    market="spot",
                    region="us",
                    machine_id=str(number),
                    usd_per_hour=Decimal(1 + (hour >= 1.5 * number)),
                )
                for number in there
            ]
            store.keep(store.begin_poll("vast", OfferQuery()), Parsed(offers=tuple(offers)))
            clock.advance(3600)

    def _ask(*words):
        capsys.readouterr()
        code = main(list(words))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return _ask


def test_the_table_says_when_half_were_gone(ask):
    """For offers, and for prices, which last half as long."""
    code, out, said = ask("survival", "--gpu", "h100")
    assert 0 == code, said
    of_offers, of_prices = out.splitlines()[1:]
    assert ["vast", "spot", "offer", "23", "12h"] == of_offers.split()[:5]
    assert ["vast", "spot", "price"] == of_prices.split()[:3]
    assert "100.0%" == of_prices.split()[-1]
    assert "Since they were listed" in said
    assert max(map(len, out.splitlines())) <= 100


def test_the_curve_and_its_figures_are_there_for_programs(ask):
    """The same in JSON and, but for the curve, in CSV."""
    words = ("survival", "--gpu", "h100", "--by-region", "--market", "spot")
    told = json.loads(ask(*words, "--format", "json")[1])["lines"]
    rows = list(csv.DictReader(io.StringIO(ask(*words, "--format", "csv")[1])))
    of_offers = told[0]
    assert ("us", "offer", 23, 12 * 3600) == tuple(
        of_offers[name] for name in ("region", "of", "begun", "gone_50pct_after_s")
    )
    assert [hours * 3600 for hours in range(1, 24)] == [step["age_s"] for step in of_offers["curve"]]
    assert (sum(range(1, 24)), 23) == (of_offers["open_h"], of_offers["ends"])
    assert str(of_offers["alive_8h_share"]) == rows[0]["alive_8h_share"]


def test_a_picture_is_drawn_where_its_name_says_so(ask, tmp_path):
    """And a name that says nothing is refused first."""
    pytest.importorskip("matplotlib")
    assert 0 == ask("survival", "--gpu", "h100", "--plot", str(tmp_path / "s.svg"))[0]
    assert (tmp_path / "s.svg").read_text().count("<path") > 40
    code, _, said = ask("survival", "--gpu", "h100", "--plot", str(tmp_path / "s.doc"))
    assert (2, True) == (code, "must end in" in said)


def test_what_was_never_polled_is_said(ask):
    """In one sentence."""
    assert (2, True) == ((found := ask("survival", "--gpu", "a100"))[0], "nothing was seen" in found[2])
