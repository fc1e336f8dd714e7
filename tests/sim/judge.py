"""What must hold, asked after every tick, and at some calls before they are done.

A *quiet round* is one tick of a job's own supervisor in which nothing went wrong at the vendor that is meant,
at its nodes, in the database and with the supervisor itself. It is the measure of all delays: while there is
none, nobody could have seen or done anything.

1. A job has one open attempt, and its program runs on one node at a time, which has proved itself and has a
   higher epoch than any before: in the store nobody is ever refused (nodes.Store).
2. A node that no open attempt of a running job knows is ended within QUIET_ROUNDS in which its vendor was listed,
   and every vendor that answers is listed every EVERYWHERE_S.
3. A job's nodes cost no more than its budget, a day's no more than its cap: but for a billing unit, and the time
   in which nobody could see them or end them. By its lease each node keeps to it on its own.
4. A node is asked for only by an intent that is in the database, once, for a job that is not over, within the caps.
5. What has ended stays as it is: no other state, no other node, no second run of a result that was seen.
6. A node that works and was reached lately is not ended; nor is one with a result before its job's end is written.
7. The ledger is right within a billing unit and the time between two quiet rounds, at the node's rate.
8. A job goes to another supervisor only once the lease of its own is over.
9. Once faults stop every job ends, and then nothing bills.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NamedTuple

from gpubroker.run.decide import ANSWERS_WITHIN
from tests.sim.clock import BEGIN, MIDNIGHT_S, VirtualClock, World
from tests.sim.cloud import Machine, Vendor
from tests.sim.database import Memory
from tests.sim.faults import Broken
from tests.sim.nodes import Inside, Run

QUIET_ROUNDS, EVERYWHERE_S = 3, 60.0
# What a job that is stopped may take to save, and what the database's whole seconds hide.
_STOPS_S, _ROUNDING_S = 60.0, 5.0
# A lease is for a cent at least, and for whole micro-dollars.
_CENTS_USD = Decimal("0.02")
# To prepare a node is no look at it, and takes so long.
_PREPARES_S = 60.0
# The wall clock may be so far away from the true time.
_JUMPS_S = 1800.0
_BEGIN_S = BEGIN.timestamp()
_FINAL = ("done", "failed", "cancelled", "over_budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the judge knows of a job beside the database."""

    id: str
    budget_usd: Decimal | None


class Round(NamedTuple):
    """One tick that was over."""

    begun_s: float
    ended_s: float
    jobs: frozenset[str]  # that it had
    touched: frozenset[str]  # vendors at which something went wrong
    listed: frozenset[str]  # vendors that were asked for their lists, and told the truth


class JobNow(NamedTuple):
    id: str
    state: str
    owner: str | None
    wanted: str


class AttemptNow(NamedTuple):
    id: int
    job: str
    epoch: int
    tag: str
    vendor: str
    node: str | None
    intended_at: int
    running_at: int | None
    ended_at: int | None
    usd_micros: int | None


@dataclass(kw_only=True)
class Judge:
    """Raises Broken with one sentence."""

    world: World
    clock: VirtualClock
    database: Memory
    vendors: dict[str, Vendor]
    jobs: dict[str, JobFacts]
    day_usd: Decimal | None  # None = no such cap
    tick_s: Callable[[], float]
    stood_at: Callable[[], str]  # the door at which the supervisor that ticks stood still last; "" = at none
    rounds: list[Round] = field(default_factory=list)
    unrest: list[float] = field(default_factory=list)  # when a supervisor died, stood still or came
    _asked: set[str] = field(default_factory=set)
    _never: set[int] = field(default_factory=set)  # attempts that were given up: what comes later is a stray
    _ended: dict[str, str] = field(default_factory=dict)  # jobs that are over: their state
    _owners: dict[str, str | None] = field(default_factory=dict)
    _strays: dict[str, float] = field(default_factory=dict)  # since when
    _over: dict[str, float] = field(default_factory=dict)  # jobs beyond their budget, since when
    _settled: set[int] = field(default_factory=set)
    worst_ledger_usd: Decimal = Decimal(0)

    # The database, read beside the product

    def job_rows(self) -> dict[str, JobNow]:
        rows = self.database.raw.execute("SELECT id, state, supervisor_id, wanted FROM jobs")
        return {row[0]: JobNow(*row) for row in rows.fetchall()}

    def attempt_rows(self) -> list[AttemptNow]:
        query = (
            "SELECT id, job_id, epoch, tag, provider, node_id, intended_at, running_at, ended_at, usd_estimated"
            " FROM attempts ORDER BY id"
        )
        return [AttemptNow(*row) for row in self.database.raw.execute(query).fetchall()]

    # At calls

    def asked(self, vendor: Vendor, tag: str, usd_per_hour: Decimal) -> None:
        """A create is about to be done."""
        if self.database.raw.in_transaction:
            raise Broken("a vendor is asked inside a transaction")
        if tag in self._asked:
            raise Broken(f"{vendor.kind.name} is asked for {tag} a second time")
        self._asked.add(tag)
        found = [a for a in self.attempt_rows() if a.tag == tag]
        if not found:
            raise Broken(f"{vendor.kind.name} is asked for {tag}, and no intent of it is written")
        (attempt,) = found
        if self.stood_at():
            return
        state = self.job_rows()[attempt.job].state
        if attempt.ended_at is not None or state != "running":
            raise Broken(f"{attempt.job} is {state}, and {tag} is asked for")
        every = self.attempt_rows()
        caps = [(attempt.job, self.jobs[attempt.job].budget_usd, [a for a in every if a.job == attempt.job])]
        if self.world.now_s < MIDNIGHT_S - _JUMPS_S:
            caps.append(("the day", self.day_usd, every))
        for whose, most, attempts in caps:
            spent, slack = self.spent(attempts)
            if most is not None and spent + usd_per_hour > most + slack:
                raise Broken(f"{whose} has spent {spent:.3f} of {most}, and {tag} is asked for")

    def begins(self, inside: Inside) -> None:
        """An agent begins a job that was not begun on its node."""
        run = inside.run
        assert run is not None
        job = run.config["job"]
        if inside.lies:
            raise Broken(f"{job} is begun on {inside.id}, which failed its preflight")
        for machine in self._machines():
            other = machine.inside
            if other is not inside and other.is_at_work and _job_of(other.run) == job:
                raise Broken(f"{job} is begun on {inside.id} while it runs on {other.id}")
        state = self.job_rows()[job].state
        if state in _FINAL and not self.stood_at():
            raise Broken(f"{job} is {state}, and is begun on {inside.id}")
        self._lease_fits(job, inside.id, run)

    def _lease_fits(self, job: str, node: str, run: Run) -> None:
        """A node ends its job by itself before the budget is passed, should nobody look."""
        budget_usd = self.jobs[job].budget_usd
        if budget_usd is None:
            return
        before = [a for a in self.attempt_rows() if a.job == job and a.epoch < run.config["epoch"]]
        spent, slack = self.spent(before)
        may_usd = Decimal(run.config["max_usd"])
        if spent + may_usd > budget_usd + slack + _CENTS_USD:
            raise Broken(
                f"{node} may spend {may_usd:.3f} of {budget_usd} by its lease, of which {spent:.3f} are spent"
                f" (+ {slack:.3f} unseen)"
            )

    def ending(self, machine: Machine) -> None:
        """A node that bills is about to be ended by us."""
        run = machine.inside.run
        if run is None or machine.status != "running" or self.stood_at().endswith(" end"):
            return  # nobody can tell a call that is under way that it is too late
        row = self.job_rows()[run.config["job"]]
        if row.state != "running":
            return
        silent_s = self.world.now_s - (machine.inside.answered_s or 0.0)
        if silent_s >= ANSWERS_WITHIN.total_seconds() - _PREPARES_S:
            return
        outcome = None if run.result is None else run.result["outcome"]
        if outcome in ("done", "failed") and run.is_seen:
            raise Broken(f"{machine.id} is ended with the result {outcome} before {row.id}'s end is written")
        if run.is_alive and run.stopping is None and not row.wanted and run.has_agent:
            raise Broken(f"{machine.id} works at {row.id}, answered {silent_s:.0f} s ago, and is ended")

    # After a tick

    def look(self) -> None:
        """Whatever must hold now."""
        jobs, attempts = self.job_rows(), self.attempt_rows()
        self._one_node_each(attempts)
        self._finished_is_final(jobs)
        self._strays_end(jobs, attempts)
        self._budgets_hold(attempts)
        self._ledger_is_right(attempts)

    def _one_node_each(self, attempts: list[AttemptNow]) -> None:
        opened: dict[str, AttemptNow] = {}
        for attempt in attempts:
            if attempt.ended_at is None and (other := opened.setdefault(attempt.job, attempt)) != attempt:
                raise Broken(f"{attempt.job} has two open attempts: {other.tag} and {attempt.tag}")

    def kept(self) -> None:
        """After a commit: a job goes to another supervisor only once the lease of its own is over."""
        for job_id, owner in self.database.raw.execute("SELECT id, supervisor_id FROM jobs").fetchall():
            before = self._owners.get(job_id)
            if before is not None and owner != before:
                query = "SELECT until_at FROM supervisors WHERE id = ?"
                row = self.database.raw.execute(query, (before,)).fetchone()
                left_s = 0 if row is None else row[0] - self.clock.now().timestamp()
                if left_s > 0:
                    raise Broken(f"{job_id} was claimed from {before}, whose lease lasts {left_s:.0f} s more")
            self._owners[job_id] = owner

    def _finished_is_final(self, jobs: dict[str, JobNow]) -> None:
        for job in jobs.values():
            before = self._ended.get(job.id)
            if before is not None and job.state != before:
                raise Broken(f"{job.id} was {before} and is {job.state}")
            if job.state in _FINAL:
                self._ended[job.id] = job.state

    def _strays_end(self, jobs: dict[str, JobNow], attempts: list[AttemptNow]) -> None:
        of_tag = {a.tag: a for a in attempts}
        unfinished = {a.job for a in attempts if a.ended_at is None}
        unfinished |= {job.id for job in jobs.values() if job.state == "running"}
        for machine in self._machines():
            if machine.ended_s is not None:
                self._strays.pop(machine.id, None)
                continue
            attempt = of_tag[machine.tag]
            is_known = attempt.ended_at is None and attempt.node in (None, machine.id)
            if is_known and jobs[attempt.job].state == "running":
                self._strays.pop(machine.id, None)
                continue
            troubled_s = self.vendors[machine.kind.name].troubled_s
            since_s = max(self._strays.setdefault(machine.id, self.world.now_s), machine.listed_s, troubled_s)
            is_nobodys = attempt.job not in unfinished
            quiet = self._quiet(attempt.job, machine.kind.name, since_s, by_anybody=is_nobodys)
            listed = sum(machine.kind.name in one.listed for one in quiet)
            quiet_s = len(quiet) * self.tick_s()
            if listed > QUIET_ROUNDS or quiet_s > EVERYWHERE_S + QUIET_ROUNDS * self.tick_s():
                raise Broken(
                    f"{machine.id} ({machine.tag}, of {attempt.job}, {jobs[attempt.job].state}) bills for"
                    f" {self.world.now_s - since_s:.0f} s and {len(quiet)} quiet rounds, and nobody wants it"
                )

    def _budgets_hold(self, attempts: list[AttemptNow]) -> None:
        for job in self.jobs.values():
            if job.budget_usd is not None:
                mine = [a for a in attempts if a.job == job.id]
                self._budget_holds(job.id, job.budget_usd, mine)
        if self.day_usd is not None and self.world.now_s < MIDNIGHT_S - _JUMPS_S:
            self._budget_holds("the day", self.day_usd, attempts)

    def _budget_holds(self, whose: str, budget_usd: Decimal, attempts: list[AttemptNow]) -> None:
        """`attempts`: what it is spent by."""
        rented = [(a, machine) for a in attempts for machine in self._machines_of(a)]
        bills = [(a, machine) for a, machine in rented if machine.ended_s is None]
        if not bills or sum(machine.usd(self.world.now_s) for _, machine in rented) <= budget_usd:
            self._over.pop(whose, None)
            return
        spent, slack = self.spent(attempts)
        if spent <= budget_usd + slack:
            self._over.pop(whose, None)
            return
        since_s = self._over.setdefault(whose, self.world.now_s)
        for attempt, machine in bills:
            quiet = self._quiet(attempt.job, machine.kind.name, since_s + _STOPS_S)
            if len(quiet) > QUIET_ROUNDS:
                raise Broken(
                    f"{whose} has spent {spent:.3f} of {budget_usd} (+ {slack:.3f} unseen), and"
                    f" {machine.id} bills on after {len(quiet)} quiet rounds"
                )

    def _ledger_is_right(self, attempts: list[AttemptNow]) -> None:
        for attempt in attempts:
            if attempt.ended_at is not None and attempt.node is None:
                self._never.add(attempt.id)
            if attempt.ended_at is None or attempt.node is None or attempt.id in self._settled | self._never:
                continue
            machine = self.vendors[attempt.vendor].machines[attempt.node]
            if machine.ended_s is None:
                raise Broken(f"attempt {attempt.id} of {attempt.job} has ended, and {machine.id} bills")
            self._settled.add(attempt.id)
            estimate = _estimate(attempt)
            bill = machine.usd(machine.ended_s)
            unseen_s = self._unseen_s(attempt, machine)
            allowed = machine.usd_per_hour * Decimal(unseen_s + machine.kind.increment_s) / 3600
            off = abs(estimate - bill)
            if self._may_be_free(attempt, machine, unseen_s):
                others = replace(machine, is_free=not machine.is_free)
                off = min(off, abs(estimate - others.usd(machine.ended_s)))
            if off > allowed:
                raise Broken(
                    f"{machine.id} of {attempt.job}: the ledger says {estimate:.4f}, its vendor {bill:.4f};"
                    f" {allowed:.4f} may be unseen ({unseen_s:.0f} s)"
                )
            self.worst_ledger_usd = max(self.worst_ledger_usd, off)

    def _may_be_free(self, attempt: AttemptNow, machine: Machine, unseen_s: float) -> bool:
        """Where what nobody saw decides: it was taken while we were about to end it, or about when the hour was over."""
        free_s = machine.kind.capabilities.free_if_preempted_within_s
        if not machine.is_preempted or not free_s or machine.ended_s is None or machine.running_s is None:
            return False
        is_near = abs(machine.ended_s - machine.running_s - free_s) < unseen_s
        return is_near or machine.ended_s >= self.vendors[attempt.vendor].told_at_s

    def at_the_end(self, *, is_over: bool) -> None:
        """Faults have stopped long ago."""
        jobs = self.job_rows()
        left = [f"{j.id} ({j.state})" for j in jobs.values() if j.state not in _FINAL]
        if left or not is_over:
            raise Broken(f"not over, though nothing goes wrong any more: {', '.join(left)}")
        bills = [m.id for m in self._machines() if m.ended_s is None]
        if bills:
            raise Broken(f"all is over, and these bill: {', '.join(bills)}")
        open_now = [a.id for a in self.attempt_rows() if a.ended_at is None]
        if open_now:
            raise Broken(f"all is over, and attempts are open: {open_now}")

    # Measures

    def spent(self, attempts: list[AttemptNow]) -> tuple[Decimal, Decimal]:
        """($ by the vendors' books, $ of it that nobody may have seen yet)."""
        usd = slack = Decimal(0)
        for attempt in attempts:
            for machine in self._machines_of(attempt):
                bill = machine.usd(self.world.now_s)
                usd += bill
                if attempt.node != machine.id:  # a stray, or not known yet: its time is bounded elsewhere
                    slack += bill
                elif attempt.ended_at is not None:  # by as much as rule 7 allows
                    slack += max(Decimal(0), bill - _estimate(attempt))
                else:
                    unseen_s = self._unseen_s(attempt, machine) + machine.kind.increment_s
                    slack += machine.usd_per_hour * Decimal(unseen_s) / 3600
        return usd, slack

    def _unseen_s(self, attempt: AttemptNow, machine: Machine) -> float:
        """Time in which nobody could have seen that it began to bill, and that it ceased to."""
        now_s, name = self.world.now_s, machine.kind.name
        end_s = now_s if machine.ended_s is None else machine.ended_s
        total = _ROUNDING_S
        recorded_s = now_s if attempt.ended_at is None else attempt.ended_at - _BEGIN_S
        begun_s = max(machine.running_s or machine.created_s, machine.listed_s)
        # One that is found by its tag is known in one round, and looked at in the next.
        total += self._until_quiet(attempt.job, name, begun_s, 2) - (machine.running_s or machine.created_s)
        stop_s = end_s if machine.off_s is None else machine.off_s
        total += self._until_quiet(attempt.job, name, stop_s) - stop_s
        if any(machine.created_s - 1 <= at_s <= begun_s + 120 for at_s in self.unrest):
            total += max(0.0, begun_s - machine.created_s)
        return total + self.clock.jumped_s(machine.created_s - 60, max(recorded_s, end_s) + 60)

    def _until_quiet(self, job: str, vendor: str, since_s: float, rounds: int = 1) -> float:
        found = self._quiet(job, vendor, since_s)
        return found[rounds - 1].ended_s if len(found) >= rounds else self.world.now_s

    def _quiet(self, job: str, vendor: str, since_s: float, *, by_anybody: bool = False) -> list[Round]:
        """Rounds of the job's supervisor; `by_anybody`: it is over, and has none."""
        found = []
        for one in reversed(self.rounds):
            if one.begun_s < since_s:
                break
            if vendor not in one.touched and (by_anybody or job in one.jobs):
                found.append(one)
        return found[::-1]

    def _machines(self) -> Iterable[Machine]:
        for vendor in self.vendors.values():
            yield from vendor.machines.values()

    def _machines_of(self, attempt: AttemptNow) -> list[Machine]:
        """More than one where a create made twins."""
        return self.vendors[attempt.vendor].by_tag.get(attempt.tag, [])


def _estimate(attempt: AttemptNow) -> Decimal:
    return Decimal(attempt.usd_micros or 0) / 10**6


def _job_of(run: Run | None) -> Any:
    return None if run is None else run.config["job"]
