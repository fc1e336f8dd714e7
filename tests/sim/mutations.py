"""Bugs that were planted into the product, each by one function in another's place.

A simulation that finds none of them would prove nothing. `planted(name)` plants one for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import select, update

from gpubroker.errors import BrokerError, LaunchUncertain
from gpubroker.run import decide, tables
from gpubroker.run.fleet import Fleet
from gpubroker.run.launching import Launcher
from gpubroker.run.leases import Leases, unfinished
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Listing, Outcome, Supervisor
from gpubroker.run.verdict import Verdict

Patch = tuple[Any, str, Any]  # whose, which, what instead
MUTATIONS: dict[str, Callable[[], list[Patch]]] = {}


def mutation(plant: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
    """By its own name."""
    MUTATIONS[plant.__name__] = plant
    return plant


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Until the block is over."""
    patches = MUTATIONS[name]()
    before = [(owner, attribute, owner.__dict__[attribute]) for owner, attribute, _ in patches]
    for owner, attribute, bug in patches:
        setattr(owner, attribute, bug)
    try:
        yield
    finally:
        for owner, attribute, right in before:
            setattr(owner, attribute, right)


@mutation
def rents_before_it_writes_the_intent() -> list[Patch]:
    """A crash in between leaves a node that nobody knows."""

    def rent(self: Any, order: Any, caps: Any) -> Any:
        create = self._computes[order.offer.provider].create
        more = {"bid_usd_per_hour": order.bid_usd_per_hour, "deadline_s": 60}
        tag = f"gpubroker-early-{self._clock.monotonic_s()}"
        node_id = create(order.offer, order.spec, tag, **more)
        prices = {"usd_per_hour": order.usd_per_hour, "held_usd_per_hour": order.held_usd_per_hour}
        bid = order.bid_usd_per_hour
        return self._records.created(
            self._records.intend(order.job_id, order.offer, **prices, bid=bid, caps=caps), node_id
        )

    return [(Renting, "rent", rent)]


@mutation
def asks_again_with_the_same_tag() -> list[Patch]:
    """A create whose answer was lost is repeated: that makes two nodes."""
    right = Renting.rent

    def rent(self: Any, order: Any, caps: Any) -> Any:
        try:
            return right(self, order, caps)
        except LaunchUncertain as error:
            attempt = next(a for a in self._records.open_attempts() if a.tag == error.tag)
            more = {"bid_usd_per_hour": order.bid_usd_per_hour, "deadline_s": 60}
            create = self._computes[order.offer.provider].create
            return self._records.created(attempt, create(order.offer, order.spec, error.tag, **more))

    return [(Renting, "rent", rent)]


@mutation
def never_settles_doubts() -> list[Patch]:
    """A create whose answer was lost stays open for ever."""
    return [(Renting, "settle_doubts", lambda self, listed: [])]


@mutation
def ends_the_node_before_the_job() -> list[Patch]:
    """A crash in between, and a job that is done is run again."""

    def finish(self: Any, attempt: Any, action: Any) -> Any:
        self._end(attempt, action.state)
        self.records.end_job(self.job.id, action.state, action.reason)
        return Outcome(state=action.state, reason=action.reason)

    return [(Supervisor, "_finish", finish)]


@mutation
def takes_an_outage_for_an_empty_list() -> list[Patch]:
    """A vendor that does not answer has lost all its nodes."""
    right = Listing.of

    def of(listed: Any, problems: Any) -> Listing:
        return right({**listed, **{name: [] for name in problems}}, problems)

    return [(Listing, "of", staticmethod(of))]


@mutation
def kills_on_a_lost_heartbeat() -> list[Patch]:
    """A node that does not answer for half a minute is given up."""
    return [(decide, "ANSWERS_WITHIN", timedelta(seconds=30))]


@mutation
def does_not_check_the_caps() -> list[Patch]:
    """Nodes are rented with money that is not there."""
    return [(Records, "_check", lambda *_: None)]


@mutation
def lets_each_node_spend_the_whole_budget() -> list[Patch]:
    """As if those before it had cost nothing."""
    return [(Launcher, "usd_spent", lambda self: Decimal(0))]


@mutation
def resumes_what_is_over() -> list[Patch]:
    """Whoever claims a job begins it again, whatever came of it."""
    right = Leases.claim

    def claim(self: Any) -> list[str]:
        found = right(self)
        with self._database.write() as connection:
            jobs = tables.jobs
            connection.execute(update(jobs).where(jobs.c.id.in_(found)).values(state="running"))
        return found

    return [(Leases, "claim", claim)]


@mutation
def leaves_a_node_that_was_taken_back() -> list[Patch]:
    """A vast instance that was outbid is stopped, and its disk is billed."""
    right = Renting.end

    def end(self: Any, attempt: Any, reason: str, lost_s: Any = None, *, kind: Any = "ended") -> Any:
        if kind == "preempted":
            return self._records.ended(attempt, reason, lost_s, kind=kind)
        return right(self, attempt, reason, lost_s, kind=kind)

    return [(Renting, "end", end)]


@mutation
def takes_a_failed_end_for_an_end() -> list[Patch]:
    """The node goes on billing."""

    def end(self: Any, attempt: Any, reason: str, lost_s: Any = None, *, kind: Any = "ended") -> Any:
        with suppress(BrokerError):
            self._computes[attempt.provider].terminate(attempt.node_id, 60)
        return self._records.ended(attempt, reason, lost_s, kind=kind)

    return [(Renting, "end", end)]


@mutation
def rents_for_jobs_of_others() -> list[Patch]:
    """A supervisor that stood still for longer than its lease rents all the same."""
    return [(Records, "_refuse_others", lambda *_: None)]


@mutation
def ends_nodes_of_others() -> list[Patch]:
    """Those that it saw in a list before it stood still."""
    right = Records._change

    def change(self: Any, attempt: Any, *still: Any, is_seen: bool = False, **more: Any) -> Any:
        return right(self, attempt, *still, **more)

    return [(Records, "refuse_others", lambda *_: None), (Records, "_change", change)]


@mutation
def claims_whatever_the_leases() -> list[Patch]:
    """Jobs of a supervisor that is there and well."""

    def claim(self: Any) -> list[str]:
        jobs = tables.jobs
        with self._database.write() as connection:
            others = select(jobs.c.id).where(unfinished(), jobs.c.supervisor_id.is_not(self.id))
            found = list(connection.scalars(others))
            mine = update(jobs).where(jobs.c.id.in_(found))
            connection.execute(mine.values(supervisor_id=self.id))
            return found

    right = Leases.renew
    return [(Leases, "claim", claim), (Leases, "renew", lambda self: right(self) & {self.id})]


@mutation
def leaves_jobs_to_the_dead() -> list[Patch]:
    """Only jobs that never had a supervisor get one."""

    def claim(self: Any) -> list[str]:
        jobs = tables.jobs
        with self._database.write() as connection:
            found = list(
                connection.scalars(select(jobs.c.id).where(unfinished(), jobs.c.supervisor_id.is_(None)))
            )
            connection.execute(update(jobs).where(jobs.c.id.in_(found)).values(supervisor_id=self.id))
            return found

    return [(Leases, "claim", claim)]


@mutation
def does_not_sweep() -> list[Patch]:
    """A node that came late, or twice, bills on."""
    return [(Fleet, "_end_strays", lambda *_: None)]


@mutation
def trusts_every_node() -> list[Patch]:
    """Whatever its preflight says."""
    return [(Verdict, "is_trusted", property(lambda self: True))]


@mutation
def counts_epochs_by_the_job() -> list[Patch]:
    """All nodes of a job have its first epoch, so that nothing fences."""
    right = Supervisor._errand

    def errand(self: Any, attempt: Any) -> Any:
        return replace(right(self, attempt), epoch=1)

    return [(Supervisor, "_errand", errand)]


@mutation
def takes_every_first_hour_for_free() -> list[Patch]:
    """As AWS does when it takes a node back, and only then."""
    right = Records.ended

    def ended(self: Any, attempt: Any, reason: str, lost_s: Any = None, **more: Any) -> Any:
        return right(self, attempt, reason, lost_s, **{**more, "is_free": True})

    return [(Records, "ended", ended)]


@mutation
def never_sees_that_it_runs() -> list[Patch]:
    """So that it costs nothing."""
    return [(Records, "running", lambda self, attempt, since=None: attempt)]
