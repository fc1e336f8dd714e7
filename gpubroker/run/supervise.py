"""One job to its end: rent, prove, start, watch, replace, bring back.

    step: job over?     yes -> end what is left of it
          open attempt? no  -> rent the next offer
                        yes -> observe (vendor's list, the node's agent) -> decide -> apply

`tick` asks the vendor for its list itself: `gpubroker run`, one job. `step` is given the lists: fleet.py,
many jobs. The truth is at the vendors, on the node and in the records: a supervisor that is killed anywhere
is replaced by another. Only connections and what was said to the person live in this object.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from gpubroker.doors import Clock, Shell
from gpubroker.errors import (
    ConfigError,
    ProviderError,
    SchemaTooNew,
    StoreError,
    Transient,
    Unreachable,
)
from gpubroker.plan.fees import FeeTable
from gpubroker.provider import Compute, NodeView
from gpubroker.run import budget, waste
from gpubroker.run.avoiding import keep_away
from gpubroker.run.contact import Connect
from gpubroker.run.decide import (
    Action,
    AskToStop,
    Finish,
    Goal,
    Observed,
    Prepare,
    Replace,
    Revive,
    Wait,
    decide,
)
from gpubroker.run.events import Kind
from gpubroker.run.launching import Candidate, Job, Launcher
from gpubroker.run.on_node import OnNode, checkpoints_in, passed_over_in, problems_in, unsaved_s
from gpubroker.run.passing import Passing
from gpubroker.run.payload import Errand
from gpubroker.run.records import Attempt, EndKind, JobRow, JobState, Records
from gpubroker.run.renting import Renting
from gpubroker.run.retrying import GiveUp, NotYet, after_failures
from gpubroker.run.verdict import Verdict, Wanted, judge

# A node that nobody has looked at for so long ends its job by itself.
RENEW_WITHIN_S = 1800.0
# A node that answers and yet cannot be prepared costs money all the while.
_MOST_FAILURES = 5
# A node may say anything, as often as it likes.
_MOST_PROBLEMS = 20
# What a node may go on for after it should stop: the agent waits so long for a last checkpoint and then for
# the job to end (node/config.py), and with many jobs it is looked at once a minute.
ENDING = budget.Ending(save_s=120, grace_s=10, tick_s=60)
# Nobody knows whether a node could be reached while its supervisor stood still, or looked elsewhere.
_LOOKS_WITHIN_S = 60.0
# Ticks in a row in which the database said no.
_MOST_STORE_FAILURES = 20
# How long an end waits for a vendor that does not confirm it, and how long between two tries.
_END_WITHIN_S, _END_AGAIN_S = 360.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the job ended."""

    state: JobState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What vendors have just listed: node by id, of those that answered. A twin of a listed id is dropped."""

    nodes: Mapping[str, Mapping[str, NodeView]]
    problems: Mapping[str, str]  # why the others did not answer

    @classmethod
    def of(cls, listed: Mapping[str, Sequence[NodeView]], problems: Mapping[str, str]) -> Listing:
        """From lists in the vendors' order."""
        nodes = {name: {node.id: node for node in found} for name, found in listed.items()}
        return cls(nodes=nodes, problems=problems)

    def lists(self) -> dict[str, list[NodeView]]:
        """As Renting takes them."""
        return {name: list(found.values()) for name, found in self.nodes.items()}


@dataclass(slots=True)
class _Contact:
    """With one attempt's node."""

    rented_at: datetime | None = None  # None = not by this process
    node: NodeView | None = None  # as its vendor listed it last
    shell: Shell | None = None
    host_key: str | None = None
    last_reached_at: datetime | None = None
    looked_s: float | None = None  # by the clock that never jumps; None = never
    unreached_s: float = 0.0  # of tries in vain, one after the other
    log_bytes: int | None = None  # of the job's output that are here; None = nobody has counted yet
    state: Mapping[str, Any] | None = None  # the agent's, when it was last reached
    made: int = 0  # checkpoints that are recorded
    passed_over: int = 0  # checkpoints that the agent did not trust, and that are recorded
    failures: int = 0  # of what was tried there
    problems: set[str] = field(default_factory=set)  # that were said
    hazard_per_hour: float | None = None  # by the plan; None = another process rented it
    idle_told_at: datetime | None = None  # that its GPUs do nothing; None = never by this process


@dataclass(kw_only=True)
class Supervisor:
    """See the module. `say` hears what a person should know, `log` the job's own output by attempt.

    `log_from`: how much of an attempt's output is here already.
    """

    job: Job
    records: Records
    renting: Renting
    computes: Mapping[str, Compute]
    candidates: Callable[[bool], Iterable[Candidate]]  # True = ask the vendors now, whatever is stored
    connect: Connect
    clock: Clock
    say: Callable[[str], None]
    log: Callable[[Attempt, bytes], None]
    log_from: Callable[[Attempt], int] = lambda attempt: 0
    renew_within_s: float = RENEW_WITHIN_S
    reach: Sequence[str] = ()  # "host:port" outside, of which a node must reach one
    fees: FeeTable | None = None  # what its store costs; None = that is not counted
    rests: Goal | None = None  # a day's cap is used up: no node until it begins anew
    _contacts: dict[int, _Contact] = field(default_factory=dict)
    _said: str = ""
    _store_failures: int = 0
    _told_percent: int = 0  # of its budget
    _past: tuple[int, list[Attempt]] | None = None  # (the open attempt, those before it)
    _kept: tuple[int, budget.Stored] | None = None  # (checkpoints, what they cost)
    _launcher: Launcher = field(init=False)

    def __post_init__(self) -> None:
        self._launcher = Launcher(
            job=self.job,
            records=self.records,
            renting=self.renting,
            computes=self.computes,
            candidates=self.candidates,
            clock=self.clock,
            say=self.say,
            once=self._once,
            wait=self._wait,
        )

    @property
    def passing(self) -> Passing:
        """What was not rented, and why."""
        return self._launcher.passing

    def tick(self) -> Outcome | None:
        """One step by lists of its own; the outcome once the job is over. See step."""
        return self._forgiving(lambda: self._step(self._row(), None))

    def step(self, row: JobRow, seen: Listing) -> Outcome | None:
        """One step, as the job and the vendors' lists were just seen; the outcome once the job is over.

        Raises OverBudget and AuthFailed: a person must act. A vendor or a database that is busy is asked
        again: what a step left undone, the next one finds out.
        """
        return self._forgiving(lambda: self._step(row, seen))

    def has_news(self, row: JobRow, attempts: Sequence[Attempt], seen: Listing) -> bool:
        """Whether a step would find more to do than to look at the node. `attempts`: the job's open ones."""
        if row.state != "running" or row.wanted or len(attempts) != 1 or attempts[0].node_id is None:
            return True
        contact, nodes = self._contacts.get(attempts[0].id), seen.nodes.get(attempts[0].provider)
        if contact is None or nodes is None:
            return False
        node, known = nodes.get(attempts[0].node_id), contact.node
        return node is None or known is None or (node.status, node.is_preempted) != (known.status, False)

    def unseen_s(self, attempts: Sequence[Attempt]) -> float:
        """Since this process last looked at the job's node, or tried to; infinite = it never has."""
        contact = self._contacts.get(attempts[-1].id) if attempts else None
        if contact is None or contact.looked_s is None:
            return math.inf
        return self.clock.monotonic_s() - contact.looked_s

    def _row(self) -> JobRow:
        row = self.records.row(self.job.id)
        if row is None:
            raise ConfigError(f"no job is called {self.job.id!r}")
        return row

    def _forgiving(self, step: Callable[[], Outcome | None]) -> Outcome | None:
        try:
            outcome = step()
        except SchemaTooNew:
            raise
        except StoreError as error:
            self._store_failures += 1
            if self._store_failures >= _MOST_STORE_FAILURES:
                raise
            self._once(str(error))
            return None
        except (Transient, Unreachable) as error:
            self._once(str(error))
            return None
        self._store_failures = 0
        return outcome

    def _step(self, row: JobRow, seen: Listing | None) -> Outcome | None:
        if row.state != "running":
            return self._wind_up(row.state, row.reason, seen)
        attempt = self._open_attempt()
        if attempt is None:
            return self._rent(row)
        if seen is None:
            listed, problems = self.renting.list_all([attempt.provider])
            self.renting.end_strays_of(self.job.id, listed)
            seen = Listing.of(listed, problems)
        if attempt.node_id is None:
            self._once(f"{attempt.provider}: it may have made a node, which is looked for")
            self.renting.settle_doubts(seen.lists())
            return None
        contact = self._contacts.setdefault(attempt.id, _Contact())
        nodes = seen.nodes.get(attempt.provider)
        node = None if nodes is None else nodes.get(attempt.node_id)
        if nodes is not None:
            attempt = self._meter(attempt, node)
            contact.node = node or contact.node
        look = self._observe(attempt, contact.node if nodes is None else node, is_listed=nodes is not None)
        action = decide(attempt, look, self.clock.now(), _goal(row) or self._judge_budget(row, attempt))
        if isinstance(action, Wait) and nodes is None and attempt.provider not in seen.problems:
            return None  # its list has not come yet
        try:
            outcome = self._apply(attempt, action)
        except (Transient, Unreachable) as error:
            self._drop(attempt)
            contact.failures += 1
            self._once(str(error))
            return None  # the next step sees what is left to do
        return self._rent(row) if isinstance(action, Replace) else outcome

    def _rent(self, row: JobRow) -> Outcome | None:
        """The next node, unless the job is to be no more, or its nodes come to nothing again and again."""
        if row.wanted:
            self.records.end_job(self.job.id, row.wanted, row.wanted_why)
            return self._wind_up(row.wanted, row.wanted_why)
        attempts = self.records.attempts(self.job.id)
        epochs = {made.epoch for made in self.records.checkpoints(self.job.id)}
        patience = after_failures(attempts, epochs, self.clock.now())
        if isinstance(patience, GiveUp):
            self.records.end_job(self.job.id, "failed", patience.why)
            return self._wind_up("failed", patience.why)
        if isinstance(patience, NotYet):
            self._wait(patience.why)
            return None
        rented = self._launcher.rent()
        if rented is not None:
            contact = _Contact(rented_at=rented.at, hazard_per_hour=rented.hazard_per_hour)
            self._contacts[rented.attempt.id] = contact
        return None

    @property
    def has_begun(self) -> bool:
        """Whether the job runs on its node, as the last look found: the agent there does without us then."""
        attempt = self._open_attempt()
        contact = None if attempt is None else self._contacts.get(attempt.id)
        state = None if contact is None else contact.state
        return state is not None and state.get("pid") is not None and state.get("result") is None

    def stop(self, reason: str) -> dict[tuple[str, str], str]:
        """End everything that the job has rented: (provider, node or tag) that may still bill -> why.

        A node that was asked for and is not listed yet, and a vendor that does not confirm, are waited for.
        """
        self.close()
        end_s = self.clock.monotonic_s() + _END_WITHIN_S
        while True:
            try:
                left = self.renting.end_all(self.job.id, reason, self._work_lost_s)
            except StoreError as error:
                left = {("gpubroker", self.job.id): str(error)}
            if not left or self.clock.monotonic_s() > end_s:
                return left
            self._once("; ".join(f"{provider} {what}: {why}" for (provider, what), why in left.items()))
            self.clock.sleep(_END_AGAIN_S)

    def close(self) -> None:
        """Let go of all connections."""
        for contact in self._contacts.values():
            if contact.shell is not None:
                contact.shell.close()
                contact.shell = None

    # Looking

    def open_attempts(self) -> list[Attempt]:
        """What the job has that may be billing."""
        return self.records.open_attempts(self.job.id)

    def _open_attempt(self) -> Attempt | None:
        """The newest. An older one that is still open was doubtful: it is settled by its tag, then ended."""
        found = self.open_attempts()
        return found[-1] if found else None

    def _observe(self, attempt: Attempt, node: NodeView | None, *, is_listed: bool) -> Observed:
        """While a vendor does not answer its node is looked at where it was last: that renews its lease."""
        contact, now_s = self._contacts[attempt.id], self.clock.monotonic_s()
        since_s = 0.0 if contact.looked_s is None else now_s - contact.looked_s
        look, contact.looked_s = None, now_s
        if contact.log_bytes is None:
            contact.log_bytes = self.log_from(attempt)
        if node is not None and node.status == "running":
            try:
                look = OnNode(self._shell(attempt, node), self.job.id).look(contact.log_bytes)
            except ProviderError as error:  # a node may refuse the key until its start script has run
                self._drop(attempt)
                self._once(f"not reached yet: {error.detail}")
        if look is not None:
            contact.last_reached_at, contact.unreached_s = self.clock.now(), 0.0
            if look.log:
                self.log(attempt, look.log)
                contact.log_bytes += len(look.log)
            contact.state = look.state
            self._keep_checkpoints(attempt, contact)
            self._tell_problems(attempt, contact)
            self._judge_use(attempt, contact)
        else:
            contact.unreached_s += min(since_s, _LOOKS_WITHIN_S)
        return Observed(
            is_listed=is_listed,
            node=node,
            is_reached=look is not None,
            state=None if look is None else look.state,
            unreached_s=contact.unreached_s,
        )

    def _meter(self, attempt: Attempt, node: NodeView | None) -> Attempt:
        """Write down when it began to run, and when it ceased to: what it costs goes by that."""
        can_stop = self.computes[attempt.provider].capabilities.stop
        if attempt.running_at is None:
            if node is None or node.status != "running":
                return attempt
            return self.records.running(attempt, self._ran_since(attempt, node))
        # Elsewhere "stopped" is the vendor's word for a state that is billed as before.
        is_off = node is None or node.status == "gone" or (node.status == "stopped" and can_stop)
        return self.records.stopped(attempt, is_stopped=is_off)

    def _ran_since(self, attempt: Attempt, node: NodeView) -> datetime:
        """Now, when this process has seen it before; else it may have run since it was made."""
        now = self.clock.now()
        contact = self._contacts.get(attempt.id)
        starts = self.computes[attempt.provider].capabilities.billing_starts
        if contact is not None and starts == "running":
            return now
        rented_at = None if contact is None else contact.rented_at
        # A vendor's clock may be wrong.
        return max(attempt.intended_at, min(now, rented_at or node.created_at or attempt.intended_at))

    def _keep_checkpoints(self, attempt: Attempt, contact: _Contact) -> None:
        """Write down what the agent says that it has published."""
        if self.job.store is None or contact.state is None:
            return
        base = f"{self.job.store.where.rstrip('/')}/{self.job.id}"
        made = checkpoints_in(contact.state, attempt.epoch, base)
        if made and made[-1].number != contact.made:
            self.records.published(self.job.id, made)
            contact.made = made[-1].number
        passed_over = passed_over_in(contact.state, attempt.epoch, base)
        if len(passed_over) != contact.passed_over:
            for one in self.records.add_passed_over(self.job.id, passed_over):
                self._tell("problem", f"checkpoint {one.place} is passed over: {one.reason}", attempt)
            contact.passed_over = len(passed_over)

    def _tell_problems(self, attempt: Attempt, contact: _Contact) -> None:
        """What the agent cannot do while the job goes on, such as saving into a full store; each once."""
        for text in problems_in(contact.state or {}):
            if text not in contact.problems and len(contact.problems) < _MOST_PROBLEMS:
                contact.problems.add(text)
                self._tell("problem", f"{attempt.provider} {attempt.node_id}: {text}", attempt)

    def _judge_use(self, attempt: Attempt, contact: _Contact) -> None:
        """GPUs that are paid for and do nothing are told of, and end the job where it says so."""
        now = self.clock.now()
        found = waste.judge(contact.state, self.job.spec, now, contact.idle_told_at)
        if isinstance(found, waste.Told):
            contact.idle_told_at = now
            self._tell("idle", f"{attempt.provider} {attempt.node_id}: {found.text}", attempt)
        elif isinstance(found, waste.End) and self.records.want(self.job.id, "failed", found.reason):
            self.say(found.reason)

    def _judge_budget(self, row: JobRow, attempt: Attempt) -> Goal | None:
        """A person hears of each share of the job's budget; before it is passed the job saves and ends."""
        limits, now = self.job.spec.limits, self.clock.now()
        if self.job.spec.box or (limits.budget_usd is None and limits.max_hours is None):
            return self.rests  # a box ends by its own lease
        if self._past is None or self._past[0] != attempt.id:
            past = [a for a in self.records.attempts(self.job.id) if a.id != attempt.id]
            self._past = (attempt.id, past)
        attempts, kept = [*self._past[1], attempt], self._stored()
        used = budget.spend(attempts, now)
        share = budget.shares(limits, used.usd + kept.usd, used.hours)
        if why := budget.breach(limits, attempts, now, ENDING, kept):
            self.records.told_percent(self.job.id, 100, why)
            if self.records.want(self.job.id, "over_budget", why):
                self.say(why)
            return Goal(state="over_budget", why=why, since=now)
        if share is not None and share.percent > max(row.told_percent, self._told_percent):
            self._told_percent = share.percent
            self.records.told_percent(self.job.id, share.percent, share.text)
            self.say(share.text)
        return self.rests

    def _stored(self) -> budget.Stored:
        """What its checkpoints cost in their store; worked out anew when there is another one."""
        made = sum(contact.made for contact in self._contacts.values())
        if self.fees is None or self.job.store is None or not made:
            return budget.Stored()
        if self._kept is None or self._kept[0] != made:
            spec, found = self.job.spec.checkpoint, self.records.checkpoints(self.job.id)
            most = None if spec.keep_size is None else int(spec.keep_size * 10**9)
            now = self.clock.now()
            self._kept = (made, budget.stored(found, spec.keep, most, self.job.store, self.fees, now))
        return self._kept[1]

    def _work_lost_s(self, attempt: Attempt) -> int | None:
        """Run since the save that is in the store; None = not by this process, so nobody knows."""
        contact = self._contacts.get(attempt.id)
        if contact is None or contact.last_reached_at is None:
            return 0 if attempt.running_at is None else None
        state = contact.state or {}
        lost_s = unsaved_s(state)
        result = state.get("result")
        if isinstance(result, Mapping):
            return 0 if result.get("outcome") in ("done", "failed") else round(lost_s)
        if state.get("pid") is None:
            return 0
        return round(lost_s + (self.clock.now() - contact.last_reached_at).total_seconds())

    def _shell(self, attempt: Attempt, node: NodeView) -> Shell:
        contact = self._contacts.setdefault(attempt.id, _Contact())
        if contact.shell is None:
            compute = self.computes[attempt.provider]
            contact.shell, contact.host_key = self.connect(
                compute, node, self.job.private_key, contact.host_key
            )
        return contact.shell

    def _drop(self, attempt: Attempt) -> None:
        contact = self._contacts.get(attempt.id)
        if contact is not None and contact.shell is not None:
            contact.shell.close()
            contact.shell = None

    # Acting

    def _apply(self, attempt: Attempt, action: Action) -> Outcome | None:
        if isinstance(action, Wait):
            self._once(f"{attempt.provider}: {action.why}")
        elif isinstance(action, Prepare):
            if self._contacts[attempt.id].failures < _MOST_FAILURES:
                self._prepare(attempt)
            else:
                self._reject(attempt, "not-prepared", "it answers, but cannot be prepared")
        elif isinstance(action, Revive):
            self._revive(attempt)
        elif isinstance(action, Replace):
            if action.fault:
                self._reject(attempt, action.fault, action.reason)
            else:
                self._end(attempt, action.reason, action.kind)
        elif isinstance(action, AskToStop):
            self._ask_to_stop(attempt)
        else:
            return self._finish(attempt, action)
        return None

    def _ask_to_stop(self, attempt: Attempt) -> None:
        """To save first. Asked at each look: a job that saves is not hurried by it."""
        shell = self._contacts[attempt.id].shell
        assert shell is not None  # noqa: S101  it was just looked at
        OnNode(shell, self.job.id).stop()
        self._once(f"{attempt.provider} {attempt.node_id}: asked to save and to end")

    def _finish(self, attempt: Attempt, action: Finish) -> Outcome | None:
        """The job is over before its node is ended: killed in between, nobody runs it a second time."""
        contact = self._contacts[attempt.id]
        state, reason = action.state, action.reason
        if contact.shell is not None and contact.failures < _MOST_FAILURES:
            missing = OnNode(contact.shell, self.job.id).bring_back(
                self.job.spec.artifacts.paths, self.job.out
            )
            if missing:
                reason += f"; not there: {', '.join(missing)}"
        elif contact.failures >= _MOST_FAILURES:
            state, reason = "failed", f"{reason}; but its artifacts could not be brought back"
        self.records.end_job(self.job.id, state, reason)
        return self._wind_up(state, reason)

    def _wind_up(self, state: JobState, reason: str, seen: Listing | None = None) -> Outcome | None:
        """End what a job that is over has left; None while a vendor does not confirm it."""
        open_now = self.open_attempts()
        listed, _ = self.renting.list_all(a.provider for a in open_now if a.node_id is None)
        self.renting.settle_doubts(listed)
        for attempt in self.open_attempts():
            if attempt.node_id is not None:
                self._end(attempt, state, "preempted" if self._is_taken(attempt, seen) else "ended")
        return None if self.open_attempts() else Outcome(state=state, reason=reason)

    def _is_taken(self, attempt: Attempt, seen: Listing | None) -> bool:
        """By its vendor, before we could end it: what it then costs may be another."""
        contact = self._contacts.get(attempt.id)
        node = None if contact is None else contact.node
        if seen is not None and attempt.node_id is not None:
            node = seen.nodes.get(attempt.provider, {}).get(attempt.node_id, node)
        return node is not None and node.is_preempted

    def _end(self, attempt: Attempt, reason: str, kind: EndKind = "ended") -> None:
        self._drop(attempt)
        lost_s = self._work_lost_s(attempt)
        ended = self.renting.end(attempt, reason, lost_s, kind=kind)
        self.say(f"{attempt.provider} {attempt.node_id}: {reason}; about ${ended.usd_estimated or 0:.4f}")

    def _reject(self, attempt: Attempt, code: str, reason: str) -> None:
        """End it and keep away from where it was."""
        keep_away(self.records, self.clock, attempt, code, reason)
        self._end(attempt, reason, "rejected")

    def _prepare(self, attempt: Attempt) -> None:
        """Prove the node, then send and start the job; a node that lies is ended and kept away from.

        Raises ConfigError when the checkpoint store is at fault: every node would meet the same.
        """
        shell = self._contacts[attempt.id].shell
        assert shell is not None  # noqa: S101  it was just looked at
        on_node = OnNode(shell, self.job.id)
        verdict = self._judge(on_node, attempt)
        if not verdict.is_trusted:
            self._reject(attempt, verdict.reasons[0].code, f"preflight: {verdict.text}")
            return
        if verdict.store:
            raise ConfigError(f"checkpoint.store: {verdict.store[0].text}")
        for text in verdict.unchecked:
            self._once(f"preflight: not checked: {text}")
        for text in verdict.told:
            self._once(f"preflight: {text}")
        on_node.start(self._errand(attempt), self.job.folder, self.job.secrets)
        self._contacts[attempt.id].failures = 0
        number = self._number(attempt)
        kind: Kind = "started" if number == 1 else "resumed"
        self._tell(kind, f"{attempt.provider} {attempt.node_id}: attempt {number} started", attempt)
        if self.job.spec.ports and not self.job.spec.box:
            self.say(f"its ports on this machine: gpubroker forward {self.job.id}")

    def _revive(self, attempt: Attempt) -> None:
        """Start the agent again: it goes on with the job that runs there."""
        contact = self._contacts[attempt.id]
        contact.failures += 1
        if contact.failures > _MOST_FAILURES or contact.shell is None:
            self._end(attempt, "its agent ends again and again", "crashed")
            return
        OnNode(contact.shell, self.job.id).start_agent()
        text = f"{attempt.provider} {attempt.node_id}: the agent was gone and is started again"
        self._tell("problem", text, attempt)

    def _judge(self, on_node: OnNode, attempt: Attempt) -> Verdict:
        wanted = Wanted(
            gpu=attempt.gpu,
            form_factor=attempt.form_factor,
            gpu_count=attempt.gpu_count,
            vram_gib=attempt.vram_gib,
            disk_gb=float(self.job.spec.disk),
            store="" if self.job.store is None else self.job.store.where,
        )
        facts = on_node.preflight(self.reach)
        verdict = judge(facts, wanted)
        if verdict.is_trusted and self.job.store is not None:  # one that lies never sees the store's keys
            verdict = judge({**facts, **on_node.try_store(self.job.store)}, wanted)
        return verdict

    def _number(self, attempt: Attempt) -> int:
        """Which of the job's nodes this is; what was refused was none."""
        before = self.records.attempts(self.job.id)
        return sum(a.node_id is not None and a.epoch <= attempt.epoch for a in before)

    def _errand(self, attempt: Attempt) -> Errand:
        now, limits = self.clock.now(), self.job.spec.limits
        budget_usd = limits.budget_usd
        left = None if budget_usd is None else max(Decimal("0.01"), budget_usd - self._launcher.usd_spent())
        running_s = 0.0 if attempt.running_at is None else (now - attempt.running_at).total_seconds()
        capabilities = self.computes[attempt.provider].capabilities
        return Errand(
            job_id=self.job.id,
            spec=self.job.spec,
            epoch=attempt.epoch,
            attempt=self._number(attempt),
            tag=attempt.tag,
            usd_per_hour=float(attempt.usd_per_hour),
            max_usd=None if left is None else float(left + attempt.usd_so_far(now)),
            max_s=self._launcher.left_s(attempt),
            renew_within_s=None if self.job.spec.box else self.renew_within_s,
            spent_s=running_s,
            has_imds=attempt.provider == "aws",
            has_docker_run_it=capabilities.image_by == "docker",
            own_end=capabilities.own_end,
            store=self.job.store,
            hazard_per_hour=self._contacts[attempt.id].hazard_per_hour,
        )

    def _tell(self, kind: Kind, text: str, attempt: Attempt | None = None) -> None:
        """To the person here, and to whoever asks later."""
        self.say(text)
        self.records.tell(kind, text, job_id=self.job.id, attempt=attempt)

    def _wait(self, text: str) -> None:
        """For what: told once."""
        if text != self._said:
            self._said = text
            self._tell("waiting", text)

    def _once(self, text: str) -> None:
        """Not the same thing at every tick."""
        if text != self._said:
            self._said = text
            self.say(text)


def _goal(row: JobRow) -> Goal | None:
    if not row.wanted or row.wanted_at is None:
        return None
    return Goal(state=row.wanted, why=row.wanted_why, since=row.wanted_at)


@contextlib.contextmanager
def closing(supervisor: Supervisor) -> Iterator[Supervisor]:
    """Connections are let go of, however it ends."""
    try:
        yield supervisor
    finally:
        supervisor.close()
