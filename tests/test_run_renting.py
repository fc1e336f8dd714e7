"""The one way to a node: killed at any point, nothing that bills is forgotten and nothing is rented twice."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpubroker.errors import LaunchUncertain, NoCapacity, OverBudget, Transient
from gpubroker.prices.store import Store
from gpubroker.provider import Capabilities, NodeSpec, NodeView
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import APPEARS_WITHIN, Order, Renting
from gpubroker.testing import FakeClock
from tests.support import EXAMPLES_FACTOR
from tests.test_bill import offer

CAPS = Caps(usd_per_day=Decimal(100))


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing after it runs."""


@dataclass
class Vendor:
    """A cloud in memory. `faults` are used up one a call: before, after, hidden, capacity, kill-before, kill-after."""

    nodes: dict[str, NodeView] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    created: int = 0
    hidden: set[str] = field(default_factory=set)
    specs: list[NodeSpec] = field(default_factory=list)  # of those that were created
    capabilities = Capabilities()

    def create(self, offer, spec, tag, *, bid_usd_per_hour, deadline_s):
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "kill-before":
            raise Killed
        if fault == "capacity":
            raise NoCapacity("cloud", "create", "none left")
        if fault == "before":
            raise LaunchUncertain("cloud", "create", "dropped", tag=tag)
        self.created += 1
        self.specs.append(spec)
        node_id = f"n{self.created}"
        self.nodes[node_id] = NodeView(id=node_id, tag=tag, status="running")
        if fault == "kill-after":
            raise Killed
        if fault == "hidden":
            self.hidden.add(node_id)
        if fault in ("after", "hidden"):
            raise LaunchUncertain("cloud", "create", "dropped", tag=tag)
        return node_id

    def list_nodes(self, deadline_s):
        return [node for node in self.nodes.values() if node.id not in self.hidden]

    def terminate(self, node_id, deadline_s):
        self.nodes.pop(node_id, None)


def order(job):
    return Order(
        job_id=job,
        offer=offer(),
        spec=NodeSpec(image="", disk_gb=10),
        usd_per_hour=Decimal(2),
        bid_usd_per_hour=None,
    )


@pytest.fixture
def records(store, clock):
    return Records(store.database, clock)


@pytest.fixture
def vendor():
    return Vendor()


@pytest.fixture
def renting(records, vendor, clock):
    return Renting(records, {"cloud": vendor}, clock)


def tick(renting):
    listed, _ = renting.list_all(["cloud"])
    renting.settle_doubts(listed)
    renting.sweep(renting.strays(listed))


def test_a_node_is_rented_and_ended(renting, records, vendor):
    """One row, one node, one end."""
    attempt = renting.rent(order(records.add_job("j", "{}")), CAPS)
    assert ["n1"] == list(vendor.nodes) == [attempt.node_id]
    renting.end(attempt, "done")
    assert ({}, []) == (vendor.nodes, records.open_attempts())


def test_without_capacity_nothing_is_open(renting, records, vendor):
    """The next offer may be tried at once."""
    vendor.faults = ["capacity"]
    with pytest.raises(NoCapacity):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    assert [] == records.open_attempts()


def test_past_the_cap_nothing_is_asked(renting, records, vendor):
    """The vendor hears nothing."""
    with pytest.raises(OverBudget):
        renting.rent(order(records.add_job("j", "{}")), Caps(usd_per_day=Decimal(1)))
    assert 0 == vendor.created


@pytest.mark.parametrize("fault", ["after", "kill-after"])
def test_a_create_that_may_have_worked_is_adopted_and_not_repeated(renting, records, vendor, fault):
    """After a dropped answer, and after kill -9 between the create and its record."""
    vendor.faults = [fault]
    with pytest.raises((LaunchUncertain, Killed)):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    assert [None] == [a.node_id for a in records.open_attempts()]
    tick(renting)
    assert (["n1"], ["n1"]) == ([a.node_id for a in records.open_attempts()], list(vendor.nodes))


@pytest.mark.parametrize("fault", ["before", "kill-before"])
def test_a_create_that_never_happened_is_given_up_after_a_while(renting, records, vendor, clock, fault):
    """A vendor's list may lag: not at once."""
    vendor.faults = [fault]
    with pytest.raises((LaunchUncertain, Killed)):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    tick(renting)
    assert 1 == len(records.open_attempts())
    clock.advance(APPEARS_WITHIN.total_seconds() + 1)
    tick(renting)
    assert [] == records.open_attempts()


def test_a_node_that_appears_after_it_was_given_up_is_swept(renting, records, vendor, clock):
    """However late: it carries our tag and nobody's attempt knows it."""
    vendor.faults = ["hidden"]
    with pytest.raises(LaunchUncertain):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    clock.advance(APPEARS_WITHIN.total_seconds() + 1)
    tick(renting)
    assert ["n1"] == list(vendor.nodes)
    vendor.hidden.clear()
    tick(renting)
    assert {} == vendor.nodes


def test_a_vendor_that_does_not_answer_settles_nothing(renting, records, vendor, clock, monkeypatch):
    """Silence is not absence."""
    vendor.faults = ["before"]
    with pytest.raises(LaunchUncertain):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    clock.advance(APPEARS_WITHIN.total_seconds() + 1)

    def silent(deadline_s):
        raise Transient("cloud", "list", "503")

    monkeypatch.setattr(vendor, "list_nodes", silent)
    listed, problems = renting.list_all(["cloud"])
    renting.settle_doubts(listed)
    assert ({"cloud": "cloud: list: 503"}, 1) == (problems, len(records.open_attempts()))


def test_two_nodes_with_one_tag_become_one(renting, records, vendor):
    """A vendor's client that repeats a create behind our back rents twice: the second is ended."""
    vendor.faults = ["after"]
    with pytest.raises(LaunchUncertain):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    (tag,) = [node.tag for node in vendor.nodes.values()]
    vendor.nodes["twin"] = NodeView(id="twin", tag=tag, status="running")
    tick(renting)
    assert ["n1"] == list(vendor.nodes) == [a.node_id for a in records.open_attempts()]


def test_a_node_whose_id_is_known_in_spite_of_doubt_is_kept_by_its_id(renting, records, vendor, monkeypatch):
    """A bid that failed and says which instance it left: it is ended by its id, listed or not."""

    def create(offer, spec, tag, **_):
        raise LaunchUncertain("cloud", "create", "bid too low", tag=tag, ids=["n7"])

    monkeypatch.setattr(vendor, "create", create)
    with pytest.raises(LaunchUncertain):
        renting.rent(order(records.add_job("j", "{}")), CAPS)
    assert ["n7"] == [a.node_id for a in records.open_attempts()]


def test_a_twin_that_appears_late_is_a_stray(renting, records, vendor):
    """Its tag is that of an open attempt, which has its node: the tag protects nothing any more."""
    attempt = renting.rent(order(records.add_job("j", "{}")), CAPS)
    vendor.nodes["twin"] = NodeView(id="twin", tag=attempt.tag, status="running")
    listed, _ = renting.list_all(["cloud"])
    assert [] == renting.end_strays_of(attempt.job_id, listed)
    assert ["n1"] == list(vendor.nodes)


def test_what_a_job_that_is_over_has_open_is_a_stray(renting, records):
    """Nobody wants it any more."""
    attempt = renting.rent(order(records.add_job("j", "{}")), CAPS)
    records.end_job(attempt.job_id, "done")
    listed, _ = renting.list_all(["cloud"])
    assert ["n1"] == [stray.node.id for stray in renting.strays(listed)]


def test_strays_are_told_and_swept_and_what_is_wanted_stays(renting, records, vendor):
    """A node of an ended attempt, and one from another database."""
    kept = renting.rent(order(records.add_job("j", "{}")), CAPS)
    leaked = renting.rent(order(records.add_job("k", "{}")), CAPS)
    records.ended(leaked, "forgotten")
    vendor.nodes["old"] = NodeView(id="old", tag="gpubroker-old-1", status="stopped")
    listed, _ = renting.list_all(["cloud"])
    found = renting.strays(listed)
    assert {leaked.node_id, "old"} == {stray.node.id for stray in found}
    assert [] == renting.sweep(found)
    assert [kept.node_id] == list(vendor.nodes)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A migrated database to copy: migrating takes longer than an example."""
    path = tmp_path_factory.mktemp("template") / "prices.db"
    with Store.open(f"sqlite:///{path}", FakeClock()) as store:
        store.migrate()
    return path


@settings(max_examples=40 * EXAMPLES_FACTOR, deadline=None)
@given(
    faults=st.lists(
        st.sampled_from(["", "capacity", "before", "after", "hidden", "kill-before", "kill-after"]),
        max_size=6,
    ),
    ends=st.lists(st.booleans(), max_size=6),
)
def test_whatever_happens_in_the_end_what_bills_is_known(template, tmp_path_factory, faults, ends):
    """After any faults and kills: each node belongs to one open attempt, and each open attempt has one node."""
    clock, vendor = FakeClock(), Vendor(faults=list(faults))
    path = tmp_path_factory.mktemp("db") / "prices.db"
    shutil.copyfile(template, path)
    with Store.open(f"sqlite:///{path}", clock) as store:
        records = Records(store.database, clock)
        renting = Renting(records, {"cloud": vendor}, clock)
        for index in range(len(faults)):
            with suppress(LaunchUncertain, NoCapacity, Killed):
                attempt = renting.rent(order(records.add_job("j", "{}")), CAPS)
                if index < len(ends) and ends[index]:
                    renting.end(attempt, "done")
            clock.advance(30)
            tick(renting)
        vendor.hidden.clear()
        clock.advance(APPEARS_WITHIN.total_seconds() + 1)
        tick(renting)
        assert sorted(vendor.nodes) == sorted(a.node_id for a in records.open_attempts())
