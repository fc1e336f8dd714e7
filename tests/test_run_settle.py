"""What vendors say that nodes have cost: read as they report it, kept once nothing can be added to it."""

import copy
import json
from datetime import timedelta
from decimal import Decimal

import pytest
import responses
from responses import matchers

from gpubroker.errors import PayloadChanged, Transient
from gpubroker.provider import Usage, UsageReport
from gpubroker.run.records import Caps, Records
from gpubroker.run.settle import Settled, final_usd, settle
from gpubroker_providers.lambda_cloud import LambdaCloud
from gpubroker_providers.runpod import RunPod
from gpubroker_providers.runpod_usage import parse_billing
from gpubroker_providers.vast import Vast
from gpubroker_providers.vast_usage import parse_charges
from tests.compute_support import keep_to_document
from tests.support import NOW, context, payload
from tests.test_bill import offer

CHARGES = payload("vast/charges_synthetic.json")
BILLING = payload("runpod/billing_pods_synthetic.json")
CHARGES_URL = "https://console.vast.ai/api/v0/charges/"
BILLING_URL = "https://api.runpod.io/v2/billing/pods"


# What the reports say


def test_vasts_charges_are_a_sum_by_instance():
    """GPU, disk and transfer are in a contract's amount; volumes and other instances are not asked about."""
    found = parse_charges(CHARGES["results"], {"20000001", "20000002", "20000009"})
    assert {"20000001": Decimal("38.421"), "20000002": Decimal("0.012")} == found


@pytest.mark.parametrize("key", ["source", "amount"])
def test_charges_without_a_required_key_are_a_changed_payload(key):
    """A renamed key must not settle anything at $0."""
    rows = [{k: v for k, v in row.items() if k != key} for row in CHARGES["results"]]
    with pytest.raises(PayloadChanged, match=key):
        parse_charges(rows, {"20000001"})


@pytest.mark.parametrize("amount", [None, "x", True, Decimal("-1"), Decimal("NaN")])
def test_a_charge_that_is_no_amount_is_a_changed_payload(amount):
    """What is not understood is not money."""
    rows = copy.deepcopy(CHARGES["results"])
    rows[0]["amount"] = amount
    with pytest.raises(PayloadChanged, match="amount"):
        parse_charges(rows, {"20000001"})
    records = copy.deepcopy(BILLING["records"])
    records[0]["totalAmount"] = amount
    if amount != "x":
        with pytest.raises(PayloadChanged, match="totalAmount"):
            parse_billing(records, {"pod_abc123"})


def test_runpods_records_are_added_up_over_the_hours():
    """Rounded once, to the micro-dollar; a pod without a record is not $0."""
    found = parse_billing(BILLING["records"], {"pod_abc123", "pod_other"})
    assert {"pod_abc123": Decimal("1.234568")} == found


def test_billing_without_a_required_key_is_a_changed_payload():
    """As above."""
    for key in ("podId", "totalAmount"):
        rows = [{k: v for k, v in row.items() if k != key} for row in BILLING["records"]]
        with pytest.raises(PayloadChanged, match=key):
            parse_billing(rows, {"pod_abc123"})


# How they are asked for


@responses.activate
def test_vast_is_asked_for_all_pages_of_the_days_in_question():
    """A day more on each side; complete up to ten minutes ago."""
    since = NOW - timedelta(hours=5)
    days = f'{{"gte": {int(since.timestamp()) - 86400}, "lte": {int(NOW.timestamp()) + 86400}}}'
    filters = f'{{"day": {days}, "type": {{"in": ["instance"]}}}}'
    asked = {"select_filters": filters, "limit": "500"}
    first = {**CHARGES, "results": CHARGES["results"][:1], "next_token": "t2"}
    last = {**CHARGES, "results": CHARGES["results"][1:]}
    for query, answer in ((asked, first), ({**asked, "after_token": "t2"}, last)):
        responses.get(CHARGES_URL, body=dumps(answer), match=[matchers.query_param_matcher(query)])
    report = Vast(context({"VAST_API_KEY": "key"})).usage({"20000001", "20000002"}, since, 10)
    expected = {"20000001": Decimal("38.421"), "20000002": Decimal("0.012")}
    assert UsageReport(usd=expected, complete_until=NOW - timedelta(minutes=10)) == report
    assert ["Bearer key"] * 2 == [call.request.headers["Authorization"] for call in responses.calls]
    keep_to_document("vast", responses.calls)


@responses.activate
def test_runpod_is_asked_once_by_the_hour_however_many_pods_there_were():
    """The hour that runs is not complete."""
    query = {
        "bucketSize": "hour", "startTime": "2026-11-24T06:00:00Z", "endTime": "2026-11-24T12:00:00Z",
    }  # fmt: skip
    responses.get(BILLING_URL, body=dumps(BILLING), match=[matchers.query_param_matcher(query)])
    runpod = RunPod(context({"RUNPOD_API_KEY": "key"}))
    pods = {"pod_abc123", *(f"pod_{number}" for number in range(1000))}
    report = runpod.usage(pods, NOW - timedelta(hours=5, minutes=20), 10)
    assert UsageReport(usd={"pod_abc123": Decimal("1.234568")}, complete_until=NOW) == report
    keep_to_document("runpod", responses.calls)


def dumps(answer):
    return json.dumps(answer, default=float)


def test_lambda_reports_nothing():
    """It has no API for what was used."""
    assert not isinstance(LambdaCloud(context({})), Usage)


# What is kept


def ended_attempt(records, clock, node_id="n1", provider="cloud"):
    """Of two dollars an hour, after half an hour."""
    job = records.add_job("sft", "{}")
    caps = Caps(usd_per_day=None)
    made = records.intend(job, offer(provider=provider), usd_per_hour=Decimal(2), bid=None, caps=caps)
    made = records.running(records.created(made, node_id))
    clock.advance(1800)
    return records.ended(made, "done")


class Reporting:
    """A vendor that reports, as complete as it says; an error is raised."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def usage(self, node_ids, since, deadline_s):
        self.asked.append((sorted(node_ids), since))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


@pytest.mark.parametrize(
    ("complete_after_s", "usd"),
    [
        pytest.param(-1, None, id="not yet complete"),
        pytest.param(0, Decimal("1.5"), id="complete to the end"),
        pytest.param(3600, Decimal("1.5"), id="complete for long"),
    ],
)
def test_a_figure_is_kept_once_the_report_is_complete_to_the_nodes_end(records, clock, complete_after_s, usd):
    """Before, something may be added to it; until then nothing is settled."""
    attempt = ended_attempt(records, clock)
    complete = attempt.ended_at + timedelta(seconds=complete_after_s)
    report = UsageReport(usd={"n1": Decimal("1.5")}, complete_until=complete)
    assert usd == final_usd(attempt, report)
    ((one,), problems) = settle(records, {"cloud": Reporting(report)}, records.unsettled())
    assert (usd, {}) == (one.attempt.usd_settled, problems)
    assert (usd is None) == ("too early" in one.why_not)
    assert ([] if usd else [attempt]) == records.unsettled()
    assert Decimal(1) == one.attempt.usd_estimated


def test_a_node_that_a_report_does_not_name_is_not_settled_at_nothing(records, clock):
    """It may be named later."""
    attempt = ended_attempt(records, clock)
    report = UsageReport(usd={}, complete_until=clock.now())
    expected = [Settled(attempt=attempt, why_not="not in the vendor's report")]
    assert (expected, {}) == settle(records, {"cloud": Reporting(report)}, [attempt])


def test_one_report_is_asked_for_a_vendor_and_the_silent_one_is_told(records, clock):
    """The others are settled all the same; a vendor that reports nothing is said to."""
    first = ended_attempt(records, clock, "n1")
    second = ended_attempt(records, clock, "n2")
    for name in ("silent", "mute", "gone"):
        ended_attempt(records, clock, provider=name)
    usd = {"n1": Decimal(1), "n2": Decimal(2)}
    cloud = Reporting(UsageReport(usd=usd, complete_until=clock.now()))
    computes = {"cloud": cloud, "silent": Reporting(Transient("silent", "bill", "500")), "mute": object()}
    found, problems = settle(records, computes, records.unsettled())
    assert [(["n1", "n2"], first.intended_at)] == cloud.asked
    assert {"silent": "silent: bill: 500"} == problems
    assert {
        ("cloud", first.tag): "",
        ("cloud", second.tag): "",
        ("silent",): "the vendor did not answer",
        ("mute",): "mute does not report what a node has cost",
        ("gone",): "there is no account to ask with",
    } == {
        (one.attempt.provider, *([one.attempt.tag] if not one.why_not else [])): one.why_not for one in found
    }


def test_what_runs_and_what_never_was_is_not_asked_about(records, clock):
    """Ended nodes alone, of one job or of all."""
    job = records.add_job("sft", "{}")
    caps = Caps(usd_per_day=None)
    running, never = (
        records.intend(job, offer(), usd_per_hour=Decimal(2), bid=None, caps=caps) for _ in range(2)
    )
    records.created(running, "n3")
    records.ended(never, "not created: none left")
    ended = ended_attempt(records, clock)
    assert [ended] == records.unsettled()
    assert ([], [ended]) == (records.unsettled(job), records.unsettled(ended.job_id))
