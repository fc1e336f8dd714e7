"""Budgets: what is spent, when a person hears of it, and that a job is stopped in time and never for nothing."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.cli.renting import caps_of
from gpubroker.config import DayCaps
from gpubroker.errors import ConfigError
from gpubroker.jobspec import JobSpec, Limits
from gpubroker.plan.fees import FeeTable
from gpubroker.run.budget import (
    DayBreach,
    Ending,
    Share,
    Spend,
    Stored,
    breach,
    day_breach,
    shares,
    spend,
    stored,
)
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Caps, Checkpoint
from tests.support import EXAMPLES_FACTOR, NOW
from tests.support import settings as configured
from tests.test_run_decide import ATTEMPT

D = Decimal
ENDING = Ending(save_s=120, grace_s=10, tick_s=5)  # 135 s
# An estimate is rounded to the micro-dollar, once for each node.
ROUNDED = D("0.000001")


def limits(**values):
    return Limits.model_validate(values, context={"now": NOW})


def node(ran_s=3600, **values):
    """At $4.00/h and $0.40/h for its disk, running since so many seconds and still open."""
    since = NOW - timedelta(seconds=ran_s)
    terms = {"usd_per_hour": D(4), "held_usd_per_hour": D("0.4")}
    return replace(ATTEMPT, **{**terms, "intended_at": since, "running_at": since, **values})


def over(ran_s=3600, usd=4, **values):
    """One that has ended."""
    return node(ran_s, **{"ended_at": NOW, "usd_estimated": D(usd), **values})


# What is spent, and who hears of it


def test_what_is_spent_is_the_vendors_word_else_the_estimate():
    """With the disk of one that is stopped, and the hours of all."""
    stopped = node(7200, stopped_at=NOW - timedelta(seconds=3600))
    attempts = [over(), over(usd_settled=D("3.5")), stopped, node(running_at=None, node_id=None)]
    assert Spend(usd=D("4") + D("3.5") + D("4.4"), hours=D(4)) == spend(attempts, NOW)


@pytest.mark.parametrize(
    ("budget", "usd", "hours", "expected"),
    [
        pytest.param({}, 99, 99, None, id="no limit"),
        pytest.param({"budget_usd": 5}, "2.49", 99, None, id="less than half"),
        pytest.param({"budget_usd": 5}, "2.5", 0, (50, "50 % of limits.budget_usd: $2.50 of $5.00"), id="half"),
        pytest.param({"budget_usd": 5}, "4.1", 0, (80, "80 % of limits.budget_usd: $4.10 of $5.00"), id="80"),
        pytest.param({"budget_usd": 5}, "5", 0, (100, "100 % of limits.budget_usd: $5.00 of $5.00"), id="all"),
        pytest.param({"max_hours": 30}, 99, "24.5", (80, "80 % of limits.max_hours: 24.50 of 30.00 h"), id="hours"),
        pytest.param(
            {"budget_usd": 5, "max_hours": 30},
            "2.6",
            "29",
            (80, "80 % of limits.max_hours: 29.00 of 30.00 h"),
            id="whichever is nearer to its end",
        ),
    ],
)  # fmt: skip
def test_a_person_hears_of_the_largest_share_that_is_reached(budget, usd, hours, expected):
    """Of money and of hours, with the figures."""
    wanted = None if expected is None else Share(percent=expected[0], text=expected[1])
    assert wanted == shares(limits(**budget), D(usd), D(hours))


# A job's own budget


@pytest.mark.parametrize(
    ("attempts", "budget_usd", "said"),
    [
        # An hour of $4.00 is spent; 135 s and a billing unit of a second are $0.15 more.
        pytest.param([node()], "4.16", "", id="both fit"),
        pytest.param(
            [node()], "4.15", r"\$4.00 of \$4.15 are spent, .* up to \$0.15", id="a cent too little"
        ),
        pytest.param([node(billing_increment_s=3600)], "8.1", r"up to \$4.15", id="a begun hour is billed"),
        pytest.param([node(stopped_at=NOW)], "4.02", "", id="a stopped one adds its disk"),
        pytest.param([node(stopped_at=NOW)], "4.01", r"up to \$0.02", id="and no less"),
        pytest.param([node(0, running_at=None, minimum_s=3600)], "3.9", r"\$0.00 .* \$4.00", id="a minimum"),
        pytest.param([node(0, minimum_s=3600)], "3.9", r"\$4.00 of \$3.90", id="a minimum that begins now"),
        pytest.param([node(0, minimum_s=3600)], "4.16", "", id="and is counted once"),
        pytest.param([over()], "4.01", "", id="nothing is open"),
        pytest.param([over()], "4.00", r"\$4.00 of \$4.00", id="nothing is open and all is spent"),
        pytest.param([over(), node()], "8.15", r"\$8.00 of \$8.15", id="of all the job's nodes"),
        pytest.param([], "1", "", id="no node yet"),
    ],
)
def test_a_job_stops_while_saving_and_ending_fit_into_its_budget(attempts, budget_usd, said):
    """The reserve is what a node costs until it is gone; the reason has limit, spent and reserve."""
    found = breach(limits(budget_usd=budget_usd), attempts, NOW, ENDING)
    assert re.fullmatch(f".*{said}.*" if said else "", found), found


def test_the_hours_of_a_job_are_kept_as_its_money_is():
    """Those of its nodes until their end, and what it takes to end them."""
    attempts = [over(7200), node(3600)]
    assert "" == breach(limits(max_hours="3.04"), attempts, NOW, ENDING)
    said = "limits.max_hours: 3.00 of 3.03 h are used, and to save and to end takes up to 0.04 h"
    assert said == breach(limits(max_hours="3.03"), attempts, NOW, ENDING)


def test_what_lies_in_the_store_is_spent_too():
    """And it goes on costing while the job is ended."""
    kept = Stored(usd=D("0.5"), usd_per_hour=D(4))
    assert "" == breach(limits(budget_usd="4.81"), [node()], NOW, ENDING, kept)
    assert "$4.50 of $4.80" in breach(limits(budget_usd="4.80"), [node()], NOW, ENDING, kept)


NODES = st.lists(
    st.builds(
        node,
        st.integers(0, 40_000),
        usd_per_hour=st.decimals("0.01", 90, places=2),
        held_usd_per_hour=st.decimals(0, "0.01", places=3),
        billing_increment_s=st.sampled_from([1, 60, 3600]),
        minimum_s=st.sampled_from([0, 60, 3600]),
    )
    | st.builds(over, st.integers(0, 40_000), st.decimals(0, 90, places=2))
    | st.builds(lambda s: node(s, stopped_at=NOW - timedelta(seconds=s / 2)), st.integers(0, 40_000))
    | st.builds(lambda s: node(s, running_at=None), st.integers(0, 40_000)),
    max_size=4,
)
ENDINGS = st.builds(
    Ending, save_s=st.integers(0, 600), grace_s=st.integers(0, 60), tick_s=st.integers(0, 120)
)


@given(attempts=NODES, ending=ENDINGS, starts_s=st.integers(0, 120), more=st.decimals(0, 100, places=2))
@settings(max_examples=300 * EXAMPLES_FACTOR)
def test_what_may_go_on_can_still_be_ended_within_its_budget(attempts, ending, starts_s, more):
    """Also where a node that was asked for begins to run meanwhile: money and hours, of a job and of a day."""
    end = NOW + timedelta(seconds=float(ending.seconds))
    starts = min(end, NOW + timedelta(seconds=starts_s))
    later = [a if a.running_at or a.ended_at else replace(a, running_at=starts) for a in attempts]
    now, then = spend(attempts, NOW), spend(later, end)
    most_usd, most_h = max(D("0.01"), now.usd + more / 4), max(D("0.01"), now.hours + more / 400)
    if not breach(limits(budget_usd=most_usd), attempts, NOW, ending):
        assert then.usd <= most_usd + ROUNDED * len(attempts)
    if not breach(limits(max_hours=most_h), attempts, NOW, ending):
        assert then.hours <= most_h
    midnight = NOW.replace(hour=0)
    caps = Caps(usd_per_day=most_usd, node_hours_per_day=most_h)
    if not day_breach(attempts, caps, NOW, ending):
        assert sum(a.usd_since(midnight, end) for a in later) <= most_usd + ROUNDED * len(attempts)
        assert sum(a.hours_since(midnight, end) for a in later) <= most_h


@given(attempts=NODES, ending=ENDINGS)
@settings(max_examples=200 * EXAMPLES_FACTOR)
def test_no_job_is_stopped_that_is_far_below_its_budget(attempts, ending):
    """Half of it is spent, and two hours of all its nodes are not a quarter of the rest."""
    used = spend(attempts, NOW)
    rate = sum((a.usd_per_hour for a in attempts), D(0))
    far = limits(
        budget_usd=max(D("0.01"), 2 * used.usd, 16 * rate),
        max_hours=max(D(1), 2 * used.hours, D(len(attempts))),
    )
    assert "" == breach(far, attempts, NOW, ending)


@given(
    attempts=NODES, ending=ENDINGS, most=st.decimals("0.01", 200, places=2), later_s=st.integers(0, 90_000)
)
@settings(max_examples=200 * EXAMPLES_FACTOR)
def test_a_job_that_must_stop_must_stop_a_moment_later_too(attempts, ending, most, later_s):
    """As long as nothing of it ends: a supervisor that is replaced in between comes to the same."""
    later = NOW + timedelta(seconds=later_s)
    for budget in (limits(budget_usd=most), limits(max_hours=most)):
        said = [bool(breach(budget, attempts, now, ending)) for now in (NOW, later)]
        assert sorted(said) == said


@pytest.mark.parametrize("unit_s", [1, 60, 3600])
def test_a_job_that_runs_for_days_stops_just_before_its_budget_is_spent(unit_s):
    """Looked at every five seconds; from the word to the node's end it takes all the time that it may."""
    budget = limits(budget_usd=20)
    began = node(0, billing_increment_s=unit_s)
    now = NOW
    while not breach(budget, [began], now, ENDING):
        now += timedelta(seconds=5)
    ended = now + timedelta(seconds=130)
    usd = began.usd_by(ended)
    assert D(20) - 2 * D(4) * (135 + unit_s) / 3600 <= usd <= D(20)


# A day's caps


def test_a_days_cap_makes_nodes_wait_for_the_next_day():
    """All of them, or those of one account; another account's go on."""
    attempts = [node(provider="vast"), node(7200, provider="runpod", job_id="other")]
    caps = Caps(
        usd_per_day=D("12.29"), accounts={"vast": DayCaps(usd_per_day=D(9), node_hours_per_day=D("1.03"))}
    )
    until = datetime(2026, 11, 25, tzinfo=UTC)
    again = "are used today{}; it goes on at 2026-11-25T00:00Z"
    everything = DayBreach(provider="", until=until, reason=f"$12.00 of $12.29 {again.format('')}")
    vast = DayBreach(
        provider="vast", until=until, reason=f"1.00 of 1.03 node hours {again.format(' at vast')}"
    )
    assert [everything, vast] == day_breach(attempts, caps, NOW, ENDING)
    wider = replace(caps, usd_per_day=D("12.31"))
    assert [vast] == day_breach(attempts, wider, NOW, ENDING)
    assert [] == day_breach(attempts, Caps(usd_per_day=None), NOW, ENDING)


def test_what_was_used_yesterday_is_in_no_cap_of_today():
    """Of a node that ran through midnight, what it used since."""
    attempts = [node(24 * 3600)]
    caps = Caps(usd_per_day=D("48.31"), node_hours_per_day=D("12.04"))
    assert [] == day_breach(attempts, caps, NOW, ENDING)
    assert [""] == [
        one.provider for one in day_breach(attempts, replace(caps, usd_per_day=D(48)), NOW, ENDING)
    ]


def test_a_minimum_that_begins_with_the_day_is_of_that_day():
    """The vendor charges it at once: no part of it is of the day before."""
    midnight = NOW.replace(hour=0)
    rented = node(intended_at=midnight, running_at=midnight, minimum_s=3600)
    assert D(4) == rented.usd_since(midnight, midnight)


# What is kept in a store

FEES = FeeTable.load()
BUCKET = StoreKeys(where="s3://bucket/job")


def checkpoint(number, hours_ago, gb=100):
    return Checkpoint(
        epoch=1,
        number=number,
        name=f"step-{number}",
        step=number,
        bytes=gb * 10**9,
        published_at=NOW - timedelta(hours=hours_ago),
        place="",
    )


SAVES = [checkpoint(1, 730), checkpoint(2, 365), checkpoint(3, 0)]


def test_checkpoints_cost_what_their_store_asks_for_a_month():
    """100 GB for half a month of S3, then 200 GB; two are kept, so a third takes the place of the first."""
    found = stored(SAVES, 2, None, BUCKET, FEES, NOW)
    rate = FEES.get("aws", "s3_standard_usd_per_gb_month")
    assert Stored(usd=150 * rate, usd_per_hour=200 * (rate / 730)) == found
    alone = stored(SAVES, 3, None, BUCKET, FEES, NOW).usd_per_hour
    few = stored(SAVES, 3, 150 * 10**9, BUCKET, FEES, NOW).usd_per_hour
    assert [gb * (rate / 730) for gb in (300, 200)] == [alone, few]


@pytest.mark.parametrize(
    ("keys", "is_counted", "said"),
    [
        pytest.param(None, False, "", id="where its node is: that disk is in the node's bill"),
        pytest.param(StoreKeys(where="/mnt/own"), False, "", id="a folder"),
        pytest.param(StoreKeys(where="volume:data", folder="~/volume"), False, "no one job", id="a volume"),
        pytest.param(BUCKET, True, "", id="S3"),
        pytest.param(
            replace(BUCKET, endpoint="https://a1b2.r2.cloudflarestorage.com"), True, "", id="Cloudflare R2"
        ),
        pytest.param(
            replace(BUCKET, endpoint="http://127.0.0.1:9000/x"),
            False,
            "is not counted: no fee of 127.0.0.1 is known",
            id="somebody's own",
        ),
    ],
)
def test_what_is_not_counted_is_said(keys, is_counted, said):
    """Unknown is not free."""
    found = stored(SAVES, 2, None, keys, FEES, NOW)
    assert (is_counted, True) == (found.usd > 0 and found.usd_per_hour > 0, said in found.text)
    assert bool(said) == bool(found.text)


def test_a_store_without_a_fee_is_not_counted():
    """A table that knows nobody."""
    found = stored(SAVES, 2, None, BUCKET, FeeTable(()), NOW)
    assert (D(0), "what checkpoints cost in their store is not counted: no bucket fee of aws is known") == (
        found.usd,
        found.text,
    )
    assert Stored() == stored([], 2, None, BUCKET, FEES, NOW)


@given(
    saves=st.lists(st.tuples(st.integers(-5, 500), st.integers(0, 300)), min_size=1, max_size=6),
    more_h=st.integers(0, 500),
    keys=st.sampled_from([BUCKET, replace(BUCKET, endpoint="https://a1b2.r2.cloudflarestorage.com")]),
)
def test_what_the_store_costs_never_becomes_less(saves, more_h, keys):
    """Whatever clocks the nodes have, one of which is ahead, and whatever a store gives for nothing."""
    made = [checkpoint(number, *one) for number, one in enumerate(saves)]
    before, after = (
        stored(made, 2, None, keys, FEES, now).usd for now in (NOW, NOW + timedelta(hours=more_h))
    )
    assert 0 <= before <= after


# For people


def test_the_caps_of_a_job_are_its_own_and_the_configs():
    """One of an account that no provider has is refused: it would hold nothing."""
    spec = JobSpec.model_validate(
        {"gpu": {"name": "h100"}, "work": {"hours": 8}, "limits": {"budget_usd": 7}}
    )
    accounts = {"vast": DayCaps(usd_per_day=D(5))}
    caps = caps_of(configured(node_hours_per_day=D(9), accounts=accounts), spec)
    assert Caps(usd_per_day=D(100), usd_per_job=D(7), node_hours_per_day=D(9), accounts=accounts) == caps
    with pytest.raises(ConfigError, match="accounts: no provider is called 'vats'; installed: aws, "):
        caps_of(configured(accounts={"vats": DayCaps(usd_per_day=D(5))}), spec)
