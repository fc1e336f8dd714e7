"""What was spent, in groups that add up: by job, day, provider and GPU, estimated and settled."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as some

from gpubroker.run.costs import Spent, spent, total
from gpubroker.run.records import Attempt

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def attempt(number=1, *, hours=1.0, usd_per_hour=2, start=NOON, is_open=False, **more):
    """Rented and running at once; ended after so many hours."""
    made = Attempt(
        id=number, job_id="job-a", epoch=number, tag=f"t-{number}", provider="vast", sku="s", gpu="H100",
        form_factor="SXM", vram_gib=80, gpu_count=2, market="spot", region="", zone="", machine_id="",
        usd_per_hour=Decimal(usd_per_hour), held_usd_per_hour=Decimal(0), bid_usd_per_hour=None,
        billing_increment_s=1, minimum_s=0, intended_at=start, node_id=f"n-{number}", running_at=start,
        stopped_at=None, ended_at=None if is_open else start + timedelta(hours=hours), end_reason="",
        end_kind="", usd_estimated=None, usd_settled=None, work_lost_s=None,
    )  # fmt: skip
    if not is_open:
        made = replace(made, usd_estimated=made.usd_by(made.ended_at))
    return replace(made, **more)


def figures(groups):
    return {name: (one.nodes, one.node_h, one.usd) for name, one in groups.items()}


def test_nodes_are_summed_up_by_what_is_asked_the_dearest_first():
    """A vendor's own figure stands for the estimate; what never came to be is in no group."""
    found = [
        attempt(1),
        attempt(2, job_id="job-b", provider="aws", gpu_count=1, hours=3, usd_settled=Decimal("7.5")),
        attempt(3, job_id="job-b", node_id=None),
    ]
    now = NOON + timedelta(days=9)
    assert {"job-b": (1, 3, Decimal("7.5")), "job-a": (1, 1, 2)} == figures(spent(found, "job", now))
    assert ["job-b", "job-a"] == list(spent(found, "job", now))
    assert {"aws": (1, 3, Decimal("7.5")), "vast": (1, 1, 2)} == figures(spent(found, "provider", now))
    assert {"1x H100": (1, 3, Decimal("7.5")), "2x H100": (1, 1, 2)} == figures(spent(found, "gpu", now))
    groups = spent(found, "job", now)
    assert Spent(
        nodes=2, node_h=Decimal(4), usd=Decimal("9.5"), usd_estimated=Decimal(8), usd_settled=Decimal("7.5")
    ) == total(groups, found)


def test_a_node_over_midnight_is_in_both_days_and_its_vendors_word_in_the_last():
    """13 hours from 18:00 at $2; the vendor bills a dollar less."""
    found = [attempt(1, start=NOON + timedelta(hours=6), hours=13, usd_settled=Decimal(25))]
    groups = spent(found, "day", NOON + timedelta(days=5))
    assert {"2026-11-24": (1, 6, 12), "2026-11-25": (1, 7, 13)} == figures(groups)
    assert (1, 25) == (total(groups, found).nodes, total(groups, found).usd)


def test_only_what_was_spent_since_then_counts():
    """Of a node that runs on, the hours after; nothing of one that had ended."""
    found = [attempt(1), attempt(2, is_open=True)]
    now, since = NOON + timedelta(hours=10), NOON + timedelta(hours=8)
    assert {"job-a": (1, 2, 4)} == figures(spent(found, "job", now, since))
    assert {"2026-11-24": (1, 2, 4)} == figures(spent(found, "day", now, since))


@given(
    rows=some.lists(
        some.tuples(
            some.integers(0, 200), some.integers(1, 100), some.booleans(),
            some.none() | some.decimals(0, 500, places=6), some.sampled_from(["vast", "aws"]),
        ),
        max_size=6,
    ),
    since_h=some.none() | some.integers(-10, 310),
)  # fmt: skip
def test_every_grouping_adds_up_to_the_same(rows, since_h):
    """Whatever the groups, and whatever part of the time."""
    now = NOON + timedelta(hours=300)
    found = [
        attempt(
            number, start=NOON + timedelta(hours=begin), hours=hours, is_open=is_open, provider=provider,
            usd_settled=None if is_open else settled,
        )
        for number, (begin, hours, is_open, settled, provider) in enumerate(rows)
    ]  # fmt: skip
    since = None if since_h is None else NOON + timedelta(hours=since_h)
    sums = {total(spent(found, by, now, since), found).usd for by in ("job", "day", "provider", "gpu")}
    assert 1 == len(sums)
    if since is None:
        assert {sum((a.usd_known(now) for a in found), Decimal(0))} == sums
