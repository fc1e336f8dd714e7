"""Many jobs by one process that nobody watches, and by several of them on one database.

    tick: renew the lease -> claim jobs -> one list a vendor -> a step for each job that is due -> end strays

What is slow, a vendor's list or a job's step, goes on beside the ticks: nothing waits for it, and it is not
begun again before it is over. What a tick does is decided by the database, the vendors and the nodes alone,
so another supervisor goes on wherever this one is killed.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpubroker.doors import Clock, Pool
from gpubroker.errors import AuthFailed, BrokerError, ConfigError, NotOurs, OverBudget, SchemaTooNew
from gpubroker.jobspec import JobSpec, kept_job
from gpubroker.provider import Compute, NodeView
from gpubroker.run.budget import day_breach
from gpubroker.run.decide import Goal
from gpubroker.run.leases import LEASE_S, Leases
from gpubroker.run.records import Attempt, Caps, JobRow, Records, midnight_before
from gpubroker.run.renting import APPEARS_WITHIN, Renting, Stray
from gpubroker.run.supervise import ENDING, Listing, Outcome, Supervisor

TICK_S = 5.0
# Looks at nodes are spread out: at most so many a second, or as many as bring each its turn in time.
_LOOKS_PER_S = 30.0
_LONGEST_LOOK_S = 120.0
# How long a tick waits for what it began; the rest goes on without it.
_WAIT_S = 2.0
# A job that cannot be run here is tried again after so long, and after twice as long each time.
_TRY_AGAIN_S, _TRY_AGAIN_MOST_S = 30.0, 1800.0
# A node that nobody wants may be where no job has one.
_EVERYWHERE_S = 60.0
# What a day has cost is added up so often.
_DAY_LOOK_S = 15.0
_NEVER_S = -1e9


@dataclass(slots=True)
class _Runner:
    """One job of ours."""

    job_id: str
    supervisor: Supervisor | None = None  # None = not made yet, or to be made anew
    is_busy: bool = False
    not_before_s: float = _NEVER_S
    failures: int = 0
    said: str = ""


@dataclass(slots=True)
class _Vendor:
    """Its list, as it came last and nobody has used it yet."""

    is_busy: bool = False
    nodes: list[NodeView] | None = None
    problem: str = ""


@dataclass(kw_only=True)
class Fleet:
    """See the module. `make` builds a job's own Supervisor; ConfigError = it cannot be run here."""

    leases: Leases
    records: Records
    renting: Renting
    computes: Mapping[str, Compute]
    clock: Clock
    pool: Pool
    make: Callable[[str, JobSpec], Supervisor]
    over: Callable[[str], None] = lambda job_id: None  # a job of ours is over, and nothing of it bills
    listed: Callable[[str], None] = lambda provider: None  # a vendor has answered
    caps: Caps | None = None  # of a day; None = there is none
    say: Callable[[str], None] = lambda text: None
    tick_s: float = TICK_S
    _runners: dict[str, _Runner] = field(default_factory=dict)
    _vendors: dict[str, _Vendor] = field(default_factory=dict)
    _foreign: set[str] = field(default_factory=set)  # tags that are none of our business
    _renew_at_s: float = _NEVER_S
    _look_everywhere_at_s: float = _NEVER_S
    _look_at_day_s: float = _NEVER_S
    _alive: frozenset[str] = frozenset()
    _unfinished: int | None = None  # None = nobody has looked

    def tick(self) -> None:
        """One round. Raises StoreError, and SchemaTooNew once a newer gpubroker has migrated the database."""
        self._hold()
        rows = self._claimed()
        attempts = self._open_attempts(rows)
        seen = self._ask(self._wanted(attempts))
        self._rest(attempts)
        due = self._due(rows, attempts, seen)
        by_id = {row.id: row for row in rows}
        for runner in due:
            runner.is_busy = True
        self.pool.map(lambda runner: self._step(runner, by_id[runner.job_id], seen), due, _WAIT_S)
        self._end_strays(seen, attempts)

    def close(self) -> None:
        """Let go of all connections, and of the jobs: they go on, and another supervisor may have them."""
        for runner in self._runners.values():
            if runner.supervisor is not None and not runner.is_busy:
                runner.supervisor.close()
        self.leases.leave()

    @property
    def size(self) -> int:
        """How many jobs it has."""
        return len(self._runners)

    @property
    def is_idle(self) -> bool:
        """Whether no job was left at the last tick, another supervisor's or nobody's either."""
        return self._unfinished == 0

    # Which jobs

    def _hold(self) -> None:
        now_s = self.clock.monotonic_s()
        if now_s >= self._renew_at_s:
            self.records.check_schema()
            self._alive = self.leases.renew()
            self._renew_at_s = now_s + LEASE_S / 3

    def _claimed(self) -> list[JobRow]:
        """Ours, after claiming what nobody has."""
        rows = self.records.rows(only_unfinished=True)
        if any(row.supervisor_id not in self._alive for row in rows):
            claimed = set(self.leases.claim())
            for row in rows:
                if row.id in claimed and row.supervisor_id is not None:
                    text = f"{row.supervisor_id} was not heard of any more: {self.leases.id} goes on with it"
                    self.records.tell("claimed", text, job_id=row.id)
            if claimed:
                rows = self.records.rows(only_unfinished=True)
        self._unfinished = len(rows)
        mine = [row for row in rows if row.supervisor_id == self.leases.id]
        ids = {row.id for row in mine}
        for job_id in [job_id for job_id in self._runners if job_id not in ids]:
            self._let_go(self._runners.pop(job_id))
        for job_id in ids:
            self._runners.setdefault(job_id, _Runner(job_id=job_id))
        return mine

    def _let_go(self, runner: _Runner) -> None:
        """It is over, or another supervisor's. A step that is still under way finds out by itself."""
        if runner.supervisor is not None and not runner.is_busy:
            runner.supervisor.close()
        row = self.records.row(runner.job_id)
        if row is not None and row.state != "running" and row.supervisor_id == self.leases.id:
            self.over(runner.job_id)

    def _open_attempts(self, rows: Iterable[JobRow]) -> dict[str, list[Attempt]]:
        found: dict[str, list[Attempt]] = {row.id: [] for row in rows}
        for attempt in self.records.open_attempts():
            if attempt.job_id in found:
                found[attempt.job_id].append(attempt)
        return found

    def _rest(self, attempts: Mapping[str, Sequence[Attempt]]) -> None:
        """Once a day's cap is as good as used up, our nodes save and end, and wait for the next day."""
        now_s = self.clock.monotonic_s()
        if self.caps is None or now_s < self._look_at_day_s:
            return
        self._look_at_day_s = now_s + _DAY_LOOK_S
        now = self.clock.now()
        today = self.records.attempts_since(midnight_before(now))
        breaches = {one.provider: one for one in day_breach(today, self.caps, now, ENDING)}
        for job_id, found in attempts.items():
            supervisor = self._runners[job_id].supervisor
            if supervisor is None:
                continue
            over = [breaches[name] for name in ("", *(a.provider for a in found)) if name in breaches]
            if not over or not found:
                supervisor.rests = None
            elif supervisor.rests is None:
                supervisor.rests = Goal(state="resting", why=over[0].reason, since=now)

    # Looking

    def _wanted(self, attempts: Mapping[str, Sequence[Attempt]]) -> set[str]:
        """Vendors to be asked for their lists: where our nodes are, and every so often all, for strays."""
        now_s = self.clock.monotonic_s()
        if now_s >= self._look_everywhere_at_s:
            self._look_everywhere_at_s = now_s + _EVERYWHERE_S
            return set(self.computes)
        return {attempt.provider for found in attempts.values() for attempt in found}

    def _ask(self, providers: set[str]) -> Listing:
        """What came in since the last tick. A vendor that takes its time is waited for beside the ticks."""
        todo = []
        for name in sorted(providers & set(self.computes)):
            vendor = self._vendors.setdefault(name, _Vendor())
            if not vendor.is_busy and vendor.nodes is None:
                vendor.is_busy = True
                todo.append(name)
        self.pool.map(self._list, todo, _WAIT_S)
        nodes, problems = dict[str, list[NodeView]](), dict[str, str]()
        for name, vendor in self._vendors.items():
            if vendor.nodes is not None:
                nodes[name], vendor.nodes = vendor.nodes, None
            elif vendor.problem:
                problems[name] = vendor.problem
        return Listing.of(nodes, problems)

    def _list(self, name: str) -> None:
        vendor = self._vendors[name]
        try:
            listed, problems = self.renting.list_all([name])
            vendor.problem = problems.get(name, "")
            vendor.nodes = listed.get(name)
            if vendor.nodes is not None:
                self.listed(name)
        finally:
            vendor.is_busy = False

    def _due(
        self, rows: Sequence[JobRow], attempts: Mapping[str, Sequence[Attempt]], seen: Listing
    ) -> list[_Runner]:
        """Who has news; and of the others, whose nodes are only looked at, those that have waited longest.

        A loss is never behind looks, and no tick begins more than fit into it.
        """
        news, others = list[_Runner](), list[tuple[float, _Runner]]()
        for row in rows:
            runner, found = self._runners[row.id], attempts.get(row.id, [])
            if self._is_put_off(runner, row):
                continue
            supervisor = runner.supervisor
            if supervisor is None:
                others.append((math.inf, runner))
            elif supervisor.has_news(row, found, seen) or (supervisor.rests and found):
                news.append(runner)
            else:
                others.append((supervisor.unseen_s(found), runner))
        most = math.ceil(self.tick_s * max(_LOOKS_PER_S, len(rows) / _LONGEST_LOOK_S))
        others.sort(key=lambda one: one[0], reverse=True)
        return news + [runner for _, runner in others[:most]]

    def _is_put_off(self, runner: _Runner, row: JobRow) -> bool:
        is_to_end = row.state != "running" or bool(row.wanted)
        return runner.is_busy or (self.clock.monotonic_s() < runner.not_before_s and not is_to_end)

    # Stepping

    def _step(self, runner: _Runner, row: JobRow, seen: Listing) -> None:
        """Whatever goes wrong with one job is its own affair."""
        try:
            self._one_step(runner, row, seen)
        except SchemaTooNew:
            raise
        except OverBudget as error:
            self._over_budget(runner, error)
        except NotOurs as error:
            self.say(str(error))
        except (ConfigError, AuthFailed) as error:
            self._put_off(runner, str(error), for_s=self._growing_s(runner))
            if runner.supervisor is not None:  # what is up would bill for nothing meanwhile
                self.renting.end_all(runner.job_id, str(error), lambda attempt: None)
        except BrokerError as error:
            self._put_off(runner, str(error), for_s=_TRY_AGAIN_S)
        except Exception as error:
            self.say(traceback.format_exc())
            self._put_off(runner, f"a bug in gpubroker: {type(error).__name__}", for_s=_TRY_AGAIN_S)
        finally:
            runner.is_busy = False

    def _one_step(self, runner: _Runner, row: JobRow, seen: Listing) -> None:
        if runner.supervisor is None:
            kept = self.records.job(runner.job_id)
            if kept is None:
                return
            runner.supervisor = self.make(runner.job_id, kept_job(kept[2]))
        outcome = runner.supervisor.step(row, seen)
        runner.failures = 0
        if isinstance(outcome, Outcome):
            runner.supervisor.close()

    def _over_budget(self, runner: _Runner, error: OverBudget) -> None:
        """A job's own limit is its end; a day's is waited for."""
        if error.until is None:
            self.records.end_job(runner.job_id, "over_budget", str(error))
        else:
            why = f"{error}; it goes on after {error.until:%Y-%m-%d %H:%M} UTC"
            self._put_off(runner, why, for_s=self._growing_s(runner))

    def _growing_s(self, runner: _Runner) -> float:
        runner.failures += 1
        return min(_TRY_AGAIN_S * 2.0 ** min(runner.failures - 1, 10), _TRY_AGAIN_MOST_S)

    def _put_off(self, runner: _Runner, why: str, *, for_s: float) -> None:
        """Told once."""
        runner.not_before_s = self.clock.monotonic_s() + for_s
        if why != runner.said:
            runner.said = why
            self.say(f"{runner.job_id}: {why}")
            self.records.tell("waiting", why, job_id=runner.job_id)

    # Strays

    def _end_strays(self, seen: Listing, attempts: Mapping[str, Sequence[Attempt]]) -> None:
        """Nodes that no open attempt knows, of jobs that are nobody else's: late, twice, or forgotten."""
        known = {(a.provider, a.tag, a.node_id) for found in attempts.values() for a in found}
        odd = [
            Stray(provider=name, node=node)
            for name, nodes in seen.nodes.items()
            for node in nodes.values()
            if node.status != "gone"
            and (name, node.tag, node.id) not in known
            and node.tag not in self._foreign
        ]
        if not odd:
            return
        owners = self.records.owners(stray.node.tag for stray in odd)
        for stray in odd:
            if stray.node.tag not in owners:
                self._foreign.add(stray.node.tag)
            elif self._is_unwanted(stray, *owners[stray.node.tag]) and not self.renting.sweep([stray]):
                self._tell_leaked(stray, owners[stray.node.tag][0])

    def _is_unwanted(self, stray: Stray, attempt: Attempt, job: JobRow) -> bool:
        is_others = job.supervisor_id != self.leases.id and job.supervisor_id in self._alive
        is_wanted = attempt.ended_at is None and attempt.node_id in (None, stray.node.id)
        return job.unattended and not is_others and not is_wanted

    def _tell_leaked(self, stray: Stray, attempt: Attempt) -> None:
        """Unless it was ended a moment ago: a vendor may list it for a while."""
        ended_at = attempt.ended_at
        if (
            ended_at is None
            or attempt.node_id != stray.node.id
            or self.clock.now() - ended_at > APPEARS_WITHIN
        ):
            text = f"{stray.provider} {stray.node.id}: nobody wanted it, and it is ended"
            self.records.tell("leaked", text, job_id=attempt.job_id, attempt=attempt)
