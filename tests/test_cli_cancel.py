"""`gpubroker cancel`: by the supervisor with a last save, or from here and at once."""

import json

import pytest

from gpubroker.run import kept
from tests.unattended import rented


def test_a_supervisor_that_is_there_is_asked_to_let_the_job_save_itself(user, records, store_of_user):
    """Twice is once; what is over stays as it is."""
    user.supervisor(store_of_user.database)
    job_id, over = user.submitted(), user.submitted()
    records.end_job(over, "over_budget", "")
    code, _, said = user.do("cancel", job_id, over, job_id)
    assert (0, [f"{job_id} is asked to save itself", f"{over} is over budget already"]) == (
        code, [line.partition(":")[0] for line in said.splitlines()],
    )  # fmt: skip
    row = records.row(job_id)
    assert ("running", "cancelled", "by hand") == (row.state, row.wanted, row.wanted_why)
    assert f"{job_id} is asked to save itself already" in user.do("cancel", job_id)[2]
    assert ["submitted", "stopping"] == [e["kind"] for e in user.told("events", job_id)["events"]]


@pytest.mark.parametrize("is_supervised", [False, True])
def test_nodes_are_ended_from_here_where_nobody_is_there_or_now_is_said(
    user, records, store_of_user, is_supervised
):
    """This machine's own node; without a supervisor nothing secret is kept either."""
    words = ("--now",) if is_supervised else ()
    if is_supervised:
        user.supervisor(store_of_user.database)
    job_id = user.submitted()
    node = on_this_machine(records, job_id)
    code, _, said = user.do("cancel", job_id, *words)
    assert (0, f"{job_id} is cancelled\n") == (code, said)
    assert ("cancelled", "by hand", []) == (
        records.row(job_id).state, records.row(job_id).reason, records.open_attempts(),
    )  # fmt: skip
    assert not node.exists()
    assert is_supervised is kept.is_kept(user.jobs_dir / job_id)


def on_this_machine(records, job_id):
    """The folder of a node of it."""
    import os

    from gpubroker import config
    from gpubroker.doors import SystemClock
    from gpubroker.model import OfferQuery
    from gpubroker.prices.market import open_context
    from gpubroker.provider import NodeSpec
    from gpubroker.run.computes import computes
    from gpubroker.run.renting import Order, Renting
    from tests.unattended import FREE

    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (_, context):
        found, _ = computes(context, ["local"])
        (what,) = found["local"].offers(OfferQuery(markets=frozenset({"on_demand"})), 10).offers
        order = Order(
            job_id=job_id, offer=what, spec=NodeSpec(image="", disk_gb=1, ssh_public_key=""),
            usd_per_hour=what.usd_per_hour, bid_usd_per_hour=None,
        )  # fmt: skip
        attempt = Renting(records, found, clock).rent(order, FREE)
    folder = settings.cache_dir / "local-nodes" / attempt.tag
    assert folder.is_dir()
    return folder


def test_what_may_still_bill_is_exit_4_and_a_second_cancel_tries_again(user, records):
    """Its vendor has no account here: the job is over, its node is not."""
    job_id = user.submitted()
    rented(records, job_id)
    for _ in range(2):
        code, _, said = user.do("cancel", job_id)
        assert (4, True) == (code, "MAY STILL BILL: vast n-1 (disabled in your config)" in said)
    assert ("cancelled", ["n-1"]) == (records.row(job_id).state, [a.node_id for a in records.open_attempts()])


def test_a_stopped_job_is_cancelled_for_good(user, records):
    """Nothing of it runs."""
    job_id = user.submitted()
    records.stop_jobs("stop-all")
    assert 0 == user.do("cancel", job_id)[0]
    assert "cancelled" == records.row(job_id).state


def test_what_is_not_the_supervisors_says_what_ends_it(user, records):
    """Exit 2, and nothing is changed, also of the others that were named."""
    mine = user.submitted()
    box = json.dumps({"box": True, "gpu": {"name": "4090"}, "work": {"hours": 1}, "limits": {"max_hours": 1}})
    run = json.dumps({"gpu": {"name": "4090"}, "work": {"hours": 1}})
    for job_id, sentence in (
        ("job-x", "no job is called 'job-x'"),
        (records.add_job("box", box), "gpubroker down ends it"),
        (records.add_job("mine", run), "is a job of gpubroker run: Ctrl-C in its terminal ends it"),
    ):
        code, _, said = user.do("cancel", mine, job_id)
        assert (2, True) == (code, sentence in said)
    assert ("running", "") == (records.row(mine).state, records.row(mine).wanted)
