"""A run goes on when a node or its vendor is away in the middle of something; nothing is billed for ever."""

import json
from dataclasses import dataclass, field, replace
from decimal import Decimal

import pytest

from gpubroker.cli.job import job_record
from gpubroker.doors import Ran
from gpubroker.errors import StoreError, Transient, Unreachable
from gpubroker.jobspec import job_from
from gpubroker.provider import Capabilities
from gpubroker.run.launching import Candidate, Job
from gpubroker.run.payload import StoreKeys, agent_config
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Listing, Supervisor
from tests.support import NOW
from tests.test_bill import offer
from tests.test_run_renting import Vendor

SPEC = job_from(
    {"command": ["true"], "gpu": {"name": ["h100"]}, "work": {"hours": "1"}, "limits": {}}, NOW, "test"
)


@dataclass
class Node:
    """An idle node: its agent was never started, and its preflight ends as `preflight` says."""

    preflight: object
    state: object = None  # the agent's; None = it was never started
    closed: int = field(default=0)

    def run(self, command, *, stdin=b"", deadline_s):
        if "preflight.py" not in command:
            return Ran(status=0, signal=None, stdout=json.dumps(self.state).encode() + b"\n", stderr=b"")
        if isinstance(self.preflight, Exception):
            raise self.preflight
        return self.preflight

    def close(self):
        self.closed += 1


@pytest.fixture
def supervised(store, clock, tmp_path):
    """`supervised(node, **limits)` is a supervisor with a vendor of such nodes, the vendor, and what it has said."""

    def _supervised(node, keys=None, **limits):
        records, vendor, said = Records(store.database, clock), Vendor(), []
        spec = job_from(
            {"command": ["true"], "gpu": {"name": ["h100"]}, "work": {"hours": "1"}, "limits": limits},
            NOW,
            "test",
        )
        wanted = Candidate(offer=offer(), usd_per_hour=Decimal(2), bid_usd_per_hour=None, name="one")
        found = {wanted.offer.provider: vendor}
        job = Job(
            id=records.add_job("job", "{}"),
            spec=spec,
            folder=tmp_path,
            out=tmp_path,
            secrets={},
            store=keys,
            private_key="",
            public_key="",
            caps=Caps(usd_per_day=Decimal(100)),
        )
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=Renting(records, found, clock),
            computes=found,
            candidates=lambda is_fresh: [wanted],
            connect=lambda *_: (node, "host key"),
            clock=clock,
            say=said.append,
            log=lambda attempt, data: None,
        )
        return supervisor, vendor, said

    return _supervised


SILENT = Ran(status=None, signal=None, stdout=b"", stderr=b"")
CUT_OFF = [
    pytest.param(SILENT, id="no exit status"),
    pytest.param(Transient("ssh", "node", "no end within 600 s"), id="too slow"),
    pytest.param(Unreachable("ssh", "node", "connection lost"), id="connection lost"),
]


@pytest.mark.parametrize("preflight", CUT_OFF)
def test_a_node_that_goes_in_the_middle_of_its_preflight_is_replaced(supervised, preflight):
    """As at any other time: the vendor says that it is gone, and another one is rented."""
    supervisor, vendor, _ = supervised(Node(preflight))
    assert (None, None) == (supervisor.tick(), supervisor.tick())
    vendor.nodes.clear()
    for _ in range(2):
        assert supervisor.tick() is None
    assert (2, ["n2"]) == (vendor.created, list(vendor.nodes))
    assert ["gone", ""] == [a.end_reason for a in supervisor.records.attempts(supervisor.job.id)]


@pytest.mark.parametrize("preflight", CUT_OFF)
def test_a_node_that_can_never_be_prepared_is_ended(supervised, preflight):
    """It would bill for as long as it answers."""
    node = Node(preflight)
    supervisor, vendor, said = supervised(node)
    for _ in range(1 + 5 + 1):
        assert vendor.created <= 1
        assert supervisor.tick() is None
    assert {} == vendor.nodes
    assert node.closed >= 5
    assert any("cannot be prepared" in text for text in said)


def test_a_node_is_not_given_up_for_the_time_in_which_its_supervisor_stood_still(supervised, clock):
    """The first look after a long sleep may fail; what counts is for how long it was tried."""
    node = Node(None, state={"state": "running", "pid": 7, "agent": True})
    supervisor, vendor, _ = supervised(node)
    for _ in range(2):
        supervisor.tick()
    clock.sleep(1200)
    node.run = lambda *_, **__: (_ for _ in ()).throw(Unreachable("ssh", "node", "no route to host"))
    for _ in range(10):
        supervisor.tick()
        assert ["n1"] == list(vendor.nodes)
        clock.sleep(61)
    supervisor.tick()
    (attempt,) = supervisor.records.attempts(supervisor.job.id)
    assert "cannot be reached, though its vendor says that it runs" == attempt.end_reason


def test_hours_that_earlier_nodes_have_used_are_taken_off_the_next_ones(supervised, clock):
    """A cap of three: two are used, so the next node's lease is one hour, and its vendor is told."""
    supervisor, vendor, _ = supervised(Node(SILENT), max_hours="3")
    for _ in range(2):
        supervisor.tick()
    clock.sleep(2 * 3600)
    vendor.nodes.clear()
    for _ in range(2):
        supervisor.tick()
    assert [3 * 3600, 3600] == [spec.lifetime_s for spec in vendor.specs]
    clock.sleep(600)
    (attempt,) = supervisor.records.open_attempts()
    assert 3600 == supervisor._errand(attempt).max_s


def test_a_job_whose_hours_are_used_rents_no_more(supervised, clock):
    """Its node's time counts to the last, and the job has ended by its budget."""
    supervisor, vendor, _ = supervised(Node(SILENT), max_hours="3")
    for _ in range(2):
        supervisor.tick()
    clock.sleep(3 * 3600)
    vendor.nodes.clear()
    outcome = supervisor.tick()
    assert ("over_budget", 1) == (outcome.state, vendor.created)
    assert "limits.max_hours: 3.00 of 3.00 h are used" in outcome.reason


def test_the_caps_of_time_and_money_are_in_what_the_node_is_told(supervised, clock):
    """With how it ends itself; what it has cost before its agent began counts."""
    supervisor, vendor, _ = supervised(Node(SILENT), max_hours="3", budget_usd="10")
    vendor.capabilities = Capabilities(own_end={"command": ["halt"]})
    for _ in range(2):
        supervisor.tick()
    clock.sleep(90)
    (attempt,) = supervisor.records.open_attempts()
    config = agent_config(supervisor._errand(attempt))
    expected = {"max_s": 3 * 3600, "max_usd": 10, "spent_s": 90, "renew_within_s": 1800}
    assert expected == {name: config[name] for name in expected}
    assert {"command": ["halt"]} == config["end"]


def test_a_node_that_cannot_end_itself_is_told_of_once_it_is_rented(supervised):
    """One sentence; nothing of one that can."""
    supervisor, _, said = supervised(Node(SILENT))
    supervisor.tick()
    assert 1 == sum("cannot end its own billing" in text for text in said)
    supervisor, vendor, said = supervised(Node(SILENT))
    vendor.capabilities = Capabilities(own_end={"command": ["halt"]})
    supervisor.tick()
    assert not any("cannot end its own billing" in text for text in said)


def test_a_checkpoint_that_is_passed_over_is_said_once_and_kept_in_the_record(supervised):
    """Which one and why; by `job show` as well, and not again by a later attempt or another supervisor."""
    rejected = [{"id": "00000001/000007", "reason": "model.bin is missing"}]
    node = Node(None, state={"state": "running", "rejected": rejected})
    supervisor, _, said = supervised(node, StoreKeys(where="s3://bucket/sft/"))
    for _ in range(4):
        assert supervisor.tick() is None
    place = f"s3://bucket/sft/{supervisor.job.id}/00000001/000007"
    told = f"checkpoint {place} is passed over: model.bin is missing"
    assert [told] == [text for text in said if "passed over" in text]
    record = job_record(supervisor.job.id, "running", supervisor.records, supervisor.clock.now())
    assert [{"where": place, "epoch": 1, "reason": "model.bin is missing"}] == record["passed_over"]
    supervisor._contacts.clear()
    assert supervisor.tick() is None
    assert [told] == [text for text in said if "passed over" in text]


def test_a_store_that_is_full_is_said_once_and_the_job_goes_on(supervised):
    """The agent tells it at every look; the node stays."""
    full = "publishing step-7: [Errno 28] No space left on device"
    supervisor, vendor, said = supervised(Node(None, state={"state": "running", "problems": [full]}))
    for _ in range(4):
        assert supervisor.tick() is None
    (node_id,) = vendor.nodes
    (attempt,) = supervisor.records.open_attempts()
    assert [f"{attempt.provider} {node_id}: {full}"] == [text for text in said if "No space" in text]


def test_a_node_cannot_flood_the_terminal(supervised):
    """Other problems at every look are shown up to a number."""
    node = Node(None)
    supervisor, _, said = supervised(node)
    for number in range(40):
        node.state = {"state": "running", "problems": [f"problem {number}"]}
        assert supervisor.tick() is None
    assert 20 == sum("problem " in text for text in said)


def test_a_node_that_could_not_be_written_down_is_found_by_its_tag(supervised, monkeypatch):
    """The database was busy when the vendor had answered: no second node is rented."""
    supervisor, vendor, said = supervised(Node(CUT_OFF[0].values[0]))

    def busy(attempt, node_id):
        monkeypatch.undo()
        raise StoreError("p.db was being written by another process for 10 s: try again")

    monkeypatch.setattr(supervisor.records, "created", busy)
    assert [None] * 3 == [supervisor.tick() for _ in range(3)]
    assert (1, ["n1"]) == (vendor.created, [a.node_id for a in supervisor.open_attempts()])
    assert any("another process" in text for text in said)


def test_a_job_that_is_over_is_wound_up_and_not_rented_for(supervised, monkeypatch):
    """Its node's end is asked for until it is confirmed."""
    supervisor, vendor, _ = supervised(Node(CUT_OFF[0].values[0]))
    supervisor.tick()
    supervisor.records.end_job(supervisor.job.id, "done", "exit code 0")

    def lost(node_id, deadline_s):
        monkeypatch.undo()
        vendor.nodes.pop(node_id)
        raise Transient("cloud", "terminate", "the answer was lost")

    monkeypatch.setattr(vendor, "terminate", lost)
    assert supervisor.tick() is None
    outcome = supervisor.tick()
    assert ("done", "exit code 0", 1, []) == (
        outcome.state,
        outcome.reason,
        vendor.created,
        supervisor.open_attempts(),
    )


@pytest.mark.parametrize("is_forgotten", [False, True], ids=["the same supervisor", "another one"])
def test_a_node_that_was_taken_before_its_cancelled_job_ended_it_is_free_where_its_vendor_says_so(
    supervised, clock, monkeypatch, is_forgotten
):
    """AWS charges nothing for a first hour that it cuts short: the end may be asked for twice, by two supervisors."""
    supervisor, vendor, _ = supervised(Node(None, state={"state": "running", "pid": 7, "agent": True}))
    monkeypatch.setattr(vendor, "capabilities", Capabilities(free_if_preempted_within_s=3600))
    for _ in range(2):
        supervisor.tick()
    supervisor.close()
    clock.sleep(1800)
    vendor.nodes["n1"] = replace(vendor.nodes["n1"], status="gone", is_preempted=True)
    supervisor.records.want(supervisor.job.id, "cancelled", "by its user")

    def lost(node_id, deadline_s):
        monkeypatch.delattr(vendor, "terminate")
        raise Transient("cloud", "terminate", "the answer was lost")

    monkeypatch.setattr(vendor, "terminate", lost, raising=False)
    assert supervisor.tick() is None
    if is_forgotten:
        supervisor._contacts.clear()
    row, (attempt,) = supervisor.records.row(supervisor.job.id), supervisor.open_attempts()
    listed = Listing.of({attempt.provider: list(vendor.nodes.values())}, {})
    assert "cancelled" == supervisor.step(row, listed).state
    (ended,) = supervisor.records.attempts(supervisor.job.id)
    assert ("preempted", Decimal(0)) == (ended.end_kind, ended.usd_estimated)


def test_what_a_vendor_does_not_end_is_told_at_the_stop(supervised, monkeypatch):
    """It is tried for a while, and then said with the vendor's words."""
    supervisor, vendor, said = supervised(Node(CUT_OFF[0].values[0]))
    supervisor.tick()

    def refuses(node_id, deadline_s):
        raise Transient("cloud", "terminate", "HTTP 500")

    monkeypatch.setattr(vendor, "terminate", refuses)
    provider = supervisor.open_attempts()[0].provider
    assert {(provider, "n1"): "cloud: terminate: HTTP 500"} == supervisor.stop("interrupted")
    assert any("HTTP 500" in text for text in said)


class Queue:
    """A limiter whose next turn comes after so many seconds."""

    def __init__(self, clock, *waits_s):
        self.clock, self.waits_s, self.asked = clock, list(waits_s), []

    def wait(self, provider, endpoint, interval_s, deadline_s):
        wait_s = self.waits_s.pop(0)
        self.asked.append((provider, endpoint, interval_s))
        if wait_s > deadline_s:
            raise Transient(provider, endpoint, "its turn comes later", retry_after_s=wait_s)
        self.clock.sleep(wait_s)


@pytest.mark.parametrize(("wait_s", "asked"), [(1, [False]), (40, [False, True])])
def test_offers_that_grew_old_while_a_vendors_turn_was_waited_for_are_looked_for_anew(
    supervised, clock, wait_s, asked
):
    """And nothing is written down meanwhile: whoever is killed in the queue leaves no doubt."""
    supervisor, vendor, _ = supervised(Node(SILENT))
    vendor.capabilities = Capabilities(create_interval_s=4.5)
    queue, fresh = Queue(clock, wait_s), []
    supervisor.renting._limiter = queue
    candidates = supervisor.candidates(False)
    supervisor._launcher.candidates = lambda is_fresh: fresh.append(is_fresh) or candidates
    supervisor.tick()
    assert (asked, 1, [("cloud", "turn", 4.5)]) == (fresh, vendor.created, queue.asked)


def test_a_turn_that_is_far_away_is_not_waited_for(supervised, clock):
    """The next tick asks again; no attempt is written down."""
    supervisor, vendor, said = supervised(Node(SILENT))
    vendor.capabilities = Capabilities(create_interval_s=4.5)
    supervisor.renting._limiter = Queue(clock, 600, 0)
    supervisor.tick()
    assert (0, []) == (vendor.created, supervisor.records.attempts(supervisor.job.id))
    assert any("its turn comes later" in text for text in said)
    clock.sleep(600)
    supervisor.tick()
    assert 1 == vendor.created
