"""Many jobs by one supervisor: each is stepped when it is due, and what goes wrong with one is its own affair."""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import update

from gpubroker.doors import Outcome, Ran, SerialPool
from gpubroker.errors import AuthFailed, ConfigError, Refused, Transient, Unreachable
from gpubroker.jobspec import job_from
from gpubroker.run import tables
from gpubroker.run.events import Events
from gpubroker.run.fleet import Fleet
from gpubroker.run.launching import Candidate, Job
from gpubroker.run.leases import Leases
from gpubroker.run.records import Caps, Records, midnight_before
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Supervisor
from tests.support import NOW
from tests.test_bill import offer
from tests.test_run_renting import Vendor

AT_WORK = {"state": "running", "pid": 7, "agent": True, "result": None}
DONE = {"state": "done", "result": {"outcome": "done", "reason": "exit code 0"}}
SPEC = {"command": ["true"], "gpu": {"name": ["h100"]}, "work": {"hours": "1"}}


@dataclass
class Node:
    """All nodes are this one: its agent says `state`."""

    state: object = field(default_factory=lambda: dict(AT_WORK))
    looks: int = 0
    stops: int = 0
    error: Exception | None = None

    def run(self, command, *, stdin=b"", deadline_s):
        if self.error:
            raise self.error
        self.looks += " look " in command
        if " stop " in command:
            self.stops += 1
            self.state = {"state": "stopped", "result": {"outcome": "stopped", "reason": "asked to"}}
        lines = json.dumps(self.state).encode() + b"\n"
        return Ran(status=0, signal=None, stdout=lines + b"out" * (self.looks == 1), stderr=b"")

    def get(self, remote, local, *, deadline_s):
        pass

    def close(self):
        pass


@dataclass
class LatePool(SerialPool):
    """Nothing is done before `catch_up`."""

    left: list = field(default_factory=list)

    def map(self, fn, items, deadline_s, *, on_done=None):
        items = list(items)
        self.left += [(fn, item) for item in items]
        return [Outcome(item, late=True) for item in items]

    def catch_up(self):
        todo, self.left[:] = list(self.left), []
        for fn, item in todo:
            fn(item)


@dataclass
class WaitingPool(SerialPool):
    """Remembers how long a list was waited for."""

    for_lists_s: list = field(default_factory=list)

    def map(self, fn, items, deadline_s, *, on_done=None):
        items = list(items)
        self.for_lists_s += [deadline_s for item in items if isinstance(item, str)]
        return super().map(fn, items, deadline_s)


@dataclass
class World:
    """A vendor, jobs and supervisors over one database."""

    store: object
    clock: object
    tmp_path: object
    vendor: Vendor = field(default_factory=Vendor)
    node: Node = field(default_factory=Node)
    said: list = field(default_factory=list)
    heard: list = field(default_factory=list)
    over: list = field(default_factory=list)
    broken: Exception | None = None  # no job can be run here
    caps: Caps = field(default_factory=lambda: Caps(usd_per_day=Decimal(100)))

    @property
    def records(self):
        return Records(self.store.database, self.clock)

    def submit(self, count=1, waste=None, **limits):
        spec = job_from({**SPEC, "limits": limits, "waste": waste or {}}, NOW, "test").model_dump_json()
        return [self.records.add_job("job", spec, unattended=True) for _ in range(count)]

    def fleet(self, pool=None, name="here"):
        leases = Leases(self.store.database, self.clock, host=name, pid=1)
        records, found = Records(self.store.database, self.clock, leases.id), {offer().provider: self.vendor}
        renting = Renting(records, found, self.clock)

        def make(job_id, spec):
            if self.broken:
                raise self.broken
            return Supervisor(
                job=Job(
                    id=job_id, spec=spec, folder=self.tmp_path, out=self.tmp_path, secrets={}, store=None,
                    private_key="", public_key="", caps=replace(self.caps, usd_per_job=spec.limits.budget_usd),
                ),
                records=records, renting=renting, computes=found,
                candidates=lambda is_fresh: [Candidate(offer=offer(), usd_per_hour=Decimal(2), bid_usd_per_hour=None, name="one")],
                connect=lambda *_: (self.node, "host key"), clock=self.clock, say=self.said.append,
                log=lambda attempt, data: self.heard.append((attempt.epoch, data)),
            )  # fmt: skip

        return Fleet(
            leases=leases, records=records, renting=renting, computes=found, clock=self.clock,
            pool=pool or SerialPool(), make=make, over=self.over.append, say=self.said.append,
        )  # fmt: skip

    def go(self, fleet, ticks, tick_s=5):
        for _ in range(ticks):
            fleet.tick()
            self.clock.sleep(tick_s)

    def expire(self):
        """Every lease is over, by whichever clock it goes."""
        with self.store.database.write() as connection:
            past = self.store.database.now(connection) - timedelta(seconds=1)
            connection.execute(update(tables.supervisors).values(until_at=past))

    def states(self):
        return {row.id: row.state for row in self.records.rows()}

    def story(self, job_id):
        return [event.kind for event in Events(self.store.database, self.clock).after(job_id=job_id)]


@pytest.fixture
def world(store, clock, tmp_path):
    return World(store, clock, tmp_path)


def test_every_job_has_a_node_until_it_is_done(world):
    """With one list a tick for all of them, and the story of each in the events."""
    jobs = world.submit(5)
    fleet, lists = world.fleet(), []
    listed = world.vendor.list_nodes
    world.vendor.list_nodes = lambda deadline_s: lists.append(1) or listed(deadline_s)
    world.go(fleet, 4)
    assert (5, 5, 4) == (world.vendor.created, len(world.vendor.nodes), len(lists))
    assert ["submitted", "rented"] == world.story(jobs[0])
    world.node.state = DONE
    world.go(fleet, 2)
    assert ({"done"}, {}) == (set(world.states().values()), world.vendor.nodes)
    assert ["submitted", "rented", "done", "ended"] == world.story(jobs[0])
    assert (sorted(jobs), 0, True) == (sorted(world.over), fleet.size, fleet.is_idle)


def test_a_lost_node_is_replaced_in_the_tick_that_shows_it(world):
    """No tick in between: time is money, and the deadline."""
    (job,) = world.submit()
    fleet = world.fleet()
    world.go(fleet, 2)
    world.vendor.nodes.clear()
    world.go(fleet, 1)
    assert (2, ["n2"]) == (world.vendor.created, list(world.vendor.nodes))
    assert ["submitted", "rented", "lost", "rented"] == world.story(job)


def test_nodes_are_looked_at_less_often_when_there_are_many(world):
    """At most thirty a second, each in its turn; a list shows a loss all the same, and it waits for no look."""
    world.caps = Caps(usd_per_day=None)
    world.submit(300)
    fleet, looked, run = world.fleet(), Counter(), world.node.run
    world.go(fleet, 3)
    world.node.run = lambda command, **more: looked.update([command]) or run(command, **more)
    world.go(fleet, 1)
    assert (150, {1}) == (len(looked), set(looked.values()))
    world.go(fleet, 1)
    assert (300, {1}) == (len(looked), set(looked.values()))
    gone = next(iter(world.vendor.nodes))
    del world.vendor.nodes[gone]
    world.go(fleet, 1, tick_s=0)
    assert 301 == world.vendor.created


def test_a_vendor_that_does_not_answer_costs_no_job_its_node(world):
    """The nodes are looked at all the while: that renews their leases."""
    (job,) = world.submit()
    fleet = world.fleet()
    world.go(fleet, 2)

    def silent(deadline_s):
        raise Unreachable("cloud", "list", "connection refused")

    listed, world.vendor.list_nodes = world.vendor.list_nodes, silent
    before = world.node.looks
    world.go(fleet, 720)
    assert (1, {job: "running"}) == (world.vendor.created, world.states())
    assert 720 == world.node.looks - before
    world.vendor.list_nodes = listed
    world.node.state = DONE
    world.go(fleet, 2)
    assert {job: "done"} == world.states()


def test_a_cancelled_job_is_asked_to_save_and_then_ended(world):
    """Its record says who wanted it."""
    (job,) = world.submit()
    fleet = world.fleet()
    world.go(fleet, 2)
    assert world.records.want(job, "cancelled", "by hand")
    assert not world.records.want(job, "cancelled", "by hand")
    world.go(fleet, 3)
    assert (1, {job: "cancelled"}, {}) == (world.node.stops, world.states(), world.vendor.nodes)
    assert ["submitted", "rented", "stopping", "cancelled", "ended"] == world.story(job)


@pytest.mark.parametrize(("then", "state"), [("tell", "running"), ("end", "failed")])
def test_a_gpu_that_does_nothing_is_told_of_once_and_ends_the_job_where_it_says_so(world, then, state):
    """With a last checkpoint: it is asked to save first."""
    (job,) = world.submit(waste={"after": "20m", "then": then})
    fleet = world.fleet()
    world.go(fleet, 2)
    for _ in range(5):
        world.node.state["gpu_idle_s"] = world.node.state.get("gpu_idle_s", 1190.0) + 5
        world.go(fleet, 1)
    assert {job: state} == world.states()
    told = {"tell": ["idle"], "end": ["stopping", "failed", "ended"]}[then]
    assert ["submitted", "rented", *told] == world.story(job)
    assert (then == "end") == world.node.stops


def test_a_job_that_cannot_be_run_here_is_told_once_and_tried_again(world):
    """Such as when its folder is on another machine; the others go on."""
    (job,) = world.submit()
    world.broken, fleet = ConfigError("its folder is elsewhere"), world.fleet()
    world.go(fleet, 24)
    assert (["submitted", "waiting"], 0) == (world.story(job), world.vendor.created)
    world.broken = None
    world.go(fleet, 30)
    assert 1 == world.vendor.created


def test_a_node_does_not_bill_while_its_job_waits_for_a_person(world):
    """An error that every node would meet ends the node, not the job."""
    (job,) = world.submit()
    fleet = world.fleet()
    world.go(fleet, 2)
    world.node.error = ConfigError("checkpoint.store: no such bucket")
    world.go(fleet, 2)
    assert ({job: "running"}, {}) == (world.states(), world.vendor.nodes)
    world.node.error = None
    world.go(fleet, 12)
    assert 1 == len(world.vendor.nodes)


@pytest.mark.parametrize("error", [Refused("cloud", "look", "odd"), ZeroDivisionError()])
def test_what_nobody_expected_costs_one_job_half_a_minute(world, error):
    """A bug of ours, or a vendor's: the others do not notice."""
    jobs = world.submit(2)
    fleet = world.fleet()
    world.go(fleet, 2)
    step = fleet._runners[jobs[0]].supervisor.step
    fleet._runners[jobs[0]].supervisor.step = lambda row, seen: (_ for _ in ()).throw(error)
    world.go(fleet, 1)
    assert "waiting" in world.story(jobs[0])
    if fleet._runners[jobs[0]].supervisor:
        fleet._runners[jobs[0]].supervisor.step = step
    world.node.state = DONE
    world.go(fleet, 8)
    assert {"done"} == set(world.states().values())


def test_a_jobs_own_limit_is_its_end_and_a_days_is_waited_for(world):
    """At midnight UTC it goes on."""
    small, big = world.submit(1, budget_usd="1")[0], world.submit(1)[0]
    world.caps = Caps(usd_per_day=Decimal(1))
    fleet = world.fleet()
    world.go(fleet, 3)
    world.caps = Caps(usd_per_day=None)
    assert {small: "running", big: "running"} == world.states()
    assert ["submitted", "waiting"] == world.story(big)
    other = world.fleet(name="other")
    fleet.close()
    world.go(other, 3)
    assert {small: "over_budget", big: "running"} == world.states()
    assert 1 == world.vendor.created


def test_a_slow_vendor_or_job_holds_up_no_tick_and_is_not_begun_twice(world):
    """What is under way goes on beside the ticks."""
    world.submit(2)
    pool = LatePool()
    fleet = world.fleet(pool)
    world.go(fleet, 3)
    assert 3 == len(pool.left)  # one list, two steps
    pool.catch_up()
    world.go(fleet, 1)
    pool.catch_up()
    assert 2 == world.vendor.created


def test_a_vendor_that_was_slow_is_not_waited_for_until_it_is_quick_again(world):
    """Pages that come one a second keep nobody from seeing what the others tell."""
    world.submit()
    pool, listed = WaitingPool(), world.vendor.list_nodes
    fleet = world.fleet(pool)
    world.vendor.list_nodes = lambda deadline_s: world.clock.sleep(14) or listed(deadline_s)
    world.go(fleet, 2)
    world.vendor.list_nodes = listed
    world.go(fleet, 2)
    assert [2.0, 0.0, 0.0, 2.0] == pool.for_lists_s
    assert 1 == world.vendor.created


def test_a_node_that_nobody_wants_is_ended_wherever_it_is(world):
    """A twin, one that came late, and one of a job that is over; not one of another database."""
    (job,) = world.submit()
    fleet = world.fleet()
    world.go(fleet, 2)
    (node,) = world.vendor.nodes.values()
    world.vendor.nodes["twin"] = replace(node, id="twin")
    world.vendor.nodes["foreign"] = replace(node, id="foreign", tag="gpubroker-0123456789-1")
    world.go(fleet, 1)
    assert {node.id, "foreign"} == set(world.vendor.nodes)
    world.node.state = DONE
    world.go(fleet, 2)
    world.vendor.nodes["late"] = replace(node, id="late")
    world.go(fleet, 15)
    assert ({"foreign"}, {job: "done"}) == (set(world.vendor.nodes), world.states())
    assert 2 == world.story(job).count("leaked")


def test_another_supervisor_goes_on_where_one_was_killed(world):
    """With the node that is there; both tell no story twice."""
    (job,) = world.submit()
    world.go(world.fleet(), 2)
    world.expire()
    other = world.fleet(name="other")
    world.go(other, 2)
    assert (1, 1) == (world.vendor.created, other.size)
    assert ["submitted", "rented", "claimed"] == world.story(job)


def test_the_output_of_a_node_goes_to_its_attempt(world):
    """One look's worth here."""
    world.submit()
    world.go(world.fleet(), 2)
    assert [(1, b"out")] == world.heard


def test_a_key_that_is_refused_everywhere_is_told_and_waited_for(world):
    """Somebody may set another one."""
    (job,) = world.submit()

    def refuse(*_, **__):
        raise AuthFailed("cloud", "create", "no such key")

    create, world.vendor.create = world.vendor.create, refuse
    fleet = world.fleet()
    world.go(fleet, 3)
    assert ({job: "running"}, 1) == (world.states(), world.story(job).count("waiting"))
    world.vendor.create = create
    world.go(fleet, 400)
    assert 1 == world.vendor.created


def test_a_terminate_that_fails_is_asked_again_until_the_node_is_gone(world):
    """The job is over before; what it left is not forgotten."""
    (job,) = world.submit()
    fleet = world.fleet()
    world.go(fleet, 2)
    terminate, asked = world.vendor.terminate, []

    def fail(node_id, deadline_s):
        asked.append(node_id)
        raise Transient("cloud", "terminate", "busy")

    world.vendor.terminate, world.node.state = fail, DONE
    world.go(fleet, 5)
    assert ({job: "done"}, 1) == (world.states(), len(world.vendor.nodes))
    assert len(asked) >= 4
    world.vendor.terminate = terminate
    world.go(fleet, 1)
    assert ({}, 0) == (world.vendor.nodes, len(world.records.open_attempts()))


def test_a_job_saves_and_ends_before_its_budget_is_passed(world):
    """A person has heard of half of it and of four fifths before; nothing bills afterwards."""
    (job,) = world.submit(budget_usd="4.20")
    fleet = world.fleet()
    world.go(fleet, 180, tick_s=60)
    assert ({job: "over_budget"}, {}, 1) == (world.states(), world.vendor.nodes, world.node.stops)
    (attempt,) = world.records.attempts(job)
    assert Decimal("4.0") < attempt.usd_estimated <= Decimal("4.20")
    told = [e.text for e in Events(world.store.database, world.clock).after(job_id=job) if e.kind == "budget"]
    assert ["50 %", "80 %", "limi"] == [text[:4] for text in told]


def test_a_days_cap_makes_nodes_save_and_wait_for_the_next_day(world):
    """No job ends by it; all go on at midnight UTC."""
    jobs = world.submit(2)
    world.caps = Caps(usd_per_day=Decimal(12))
    fleet = world.fleet()
    fleet.caps = world.caps
    now = world.clock.now()
    world.clock.sleep((midnight_before(now) + timedelta(days=1) - now).total_seconds())
    world.go(fleet, 240, tick_s=60)
    assert ({"running"}, {}, 2) == (set(world.states().values()), world.vendor.nodes, world.vendor.created)
    spent = sum(a.usd_estimated for job in jobs for a in world.records.attempts(job))
    assert Decimal("11.5") < spent <= Decimal(12)
    world.node.state = dict(AT_WORK)
    world.go(fleet, 1230, tick_s=60)
    assert (4, 2) == (world.vendor.created, len(world.vendor.nodes))
