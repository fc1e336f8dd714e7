"""A run goes on when a node or its vendor is away in the middle of something; nothing is billed for ever."""

from dataclasses import dataclass, field
from decimal import Decimal

import pytest

from gpubroker.doors import Ran
from gpubroker.errors import StoreError, Transient, Unreachable
from gpubroker.jobspec import job_from
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Candidate, Job, Supervisor
from tests.support import NOW
from tests.test_bill import offer
from tests.test_run_renting import Vendor


@dataclass
class Node:
    """An idle node: its agent was never started, and its preflight ends as `preflight` says."""

    preflight: object
    closed: int = field(default=0)

    def run(self, command, *, stdin=b"", deadline_s):
        if "preflight.py" not in command:
            return Ran(status=0, signal=None, stdout=b"null\n", stderr=b"")
        if isinstance(self.preflight, Exception):
            raise self.preflight
        return self.preflight

    def close(self):
        self.closed += 1


@pytest.fixture
def supervised(store, clock, tmp_path):
    """`supervised(node)` is a supervisor with a vendor of such nodes, the vendor, and what it has said."""

    def _supervised(node):
        records, vendor, said = Records(store.database, clock), Vendor(), []
        spec = job_from(
            {"command": ["true"], "gpu": {"name": ["h100"]}, "work": {"hours": "1"}, "limits": {}},
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
            store=None,
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
            log=lambda data: None,
        )
        return supervisor, vendor, said

    return _supervised


CUT_OFF = [
    pytest.param(Ran(status=None, signal=None, stdout=b"", stderr=b""), id="no exit status"),
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
