"""One job to its end: rent, prove, start, watch, replace, bring back.

    tick: job over?     yes -> end what is left of it
          open attempt? no  -> rent the next offer
                        yes -> observe (vendor's list, the node's agent) -> decide -> apply

The truth is at the vendors, on the node and in the records: a supervisor that is killed anywhere is replaced
by another that ticks. Only connections and what was said to the person live in this object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from gpubroker.doors import Clock, Shell
from gpubroker.errors import (
    BrokerError,
    LaunchUncertain,
    NoCapacity,
    OverBudget,
    ProviderError,
    SchemaTooNew,
    StoreError,
    Transient,
    Unreachable,
)
from gpubroker.jobspec import JobSpec
from gpubroker.model import Offer
from gpubroker.provider import Compute, NodeSpec, NodeView
from gpubroker.run.decide import Action, Finish, Observed, Prepare, Replace, Revive, Wait, decide
from gpubroker.run.on_node import OnNode, checkpoints_in, unsaved_s
from gpubroker.run.payload import Errand, StoreKeys
from gpubroker.run.records import Attempt, Caps, JobState, Records
from gpubroker.run.renting import Order, Renting
from gpubroker.run.verdict import Verdict, Wanted, judge

# A machine that failed its preflight, and one that nobody could reach, are left alone for so long.
AVOID_S = 24 * 3600
# A node that nobody has looked at for so long ends its job by itself.
RENEW_WITHIN_S = 1800.0
_DISK_MARGIN_GB = 1.0
# A node that answers and yet cannot be prepared costs money all the while.
_MOST_FAILURES = 5
# Ticks in a row in which the database said no.
_MOST_STORE_FAILURES = 20
# How long an end waits for a vendor that does not confirm it, and how long between two tries.
_END_WITHIN_S, _END_AGAIN_S = 360.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An offer worth trying, the best first."""

    offer: Offer
    usd_per_hour: Decimal  # all that is billed by the hour
    bid_usd_per_hour: Decimal | None
    name: str  # for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done, with everything that is not in its description."""

    id: str
    spec: JobSpec
    folder: Path  # what is sent
    out: Path  # where artifacts go
    secrets: Mapping[str, str]
    store: StoreKeys | None
    private_key: str
    public_key: str
    caps: Caps


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the job ended."""

    state: JobState
    reason: str


@dataclass(slots=True)
class _Contact:
    """With one attempt's node."""

    shell: Shell | None = None
    host_key: str | None = None
    last_reached_at: datetime | None = None
    log_bytes: int = 0
    state: Mapping[str, Any] | None = None  # the agent's, when it was last reached
    made: int = 0  # checkpoints that are recorded
    failures: int = 0  # of what was tried there


Connect = Callable[[Compute, NodeView, str, str | None], tuple[Shell, str | None]]


@dataclass(kw_only=True)
class Supervisor:
    """See the module. `say` hears what a person should know, `log` the job's own output."""

    job: Job
    records: Records
    renting: Renting
    computes: Mapping[str, Compute]
    candidates: Callable[[bool], Iterable[Candidate]]  # True = ask the vendors now, whatever is stored
    connect: Connect
    clock: Clock
    say: Callable[[str], None]
    log: Callable[[bytes], None]
    _contacts: dict[int, _Contact] = field(default_factory=dict)
    _said: str = ""
    _is_stale: bool = False  # an offer that is stored was gone: listings live for minutes
    _store_failures: int = 0

    def tick(self) -> Outcome | None:
        """One step; the outcome once the job is over. Raises OverBudget and AuthFailed: a person must act.

        A vendor or a database that is busy is asked again: what a step left undone, the next one finds out.
        """
        try:
            outcome = self._tick()
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

    def _tick(self) -> Outcome | None:
        state, reason = self.records.state(self.job.id)
        if state != "running":
            return self._wind_up(state, reason)
        attempt = self._open_attempt()
        if attempt is None:
            self._rent()
            return None
        listed, problems = self.renting.list_all([attempt.provider])
        self.renting.end_strays_of(self.job.id, listed)
        if attempt.node_id is None:
            self._once(f"{attempt.provider}: it may have made a node, which is looked for")
            self.renting.settle_doubts(listed)
            return None
        nodes = listed.get(attempt.provider, [])
        node = next((n for n in nodes if n.id == attempt.node_id), None)
        seen = self._observe(attempt, node, is_listed=not problems)
        if node is not None and node.status == "running":
            attempt = self.records.running(attempt)
        action = decide(attempt, seen, self.clock.now())
        try:
            return self._apply(attempt, action)
        except (Transient, Unreachable) as error:
            self._drop(attempt)
            self._contacts[attempt.id].failures += 1
            self._once(str(error))
            return None  # the next tick sees what is left to do

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
        return [a for a in self.records.open_attempts() if a.job_id == self.job.id]

    def _open_attempt(self) -> Attempt | None:
        """The newest. An older one that is still open was doubtful: it is settled by its tag, then ended."""
        found = self.open_attempts()
        return found[-1] if found else None

    def _observe(self, attempt: Attempt, node: NodeView | None, *, is_listed: bool) -> Observed:
        contact = self._contacts.setdefault(attempt.id, _Contact())
        look = None
        if node is not None and node.status == "running":
            try:
                look = OnNode(self._shell(attempt, node), self.job.id).look(contact.log_bytes)
            except ProviderError as error:  # a node may refuse the key until its start script has run
                self._drop(attempt)
                self._once(f"not reached yet: {error.detail}")
        if look is not None:
            contact.last_reached_at = self.clock.now()
            contact.log_bytes += len(look.log)
            self.log(look.log)
            contact.state = look.state
            self._keep_checkpoints(attempt, contact)
        return Observed(
            is_listed=is_listed,
            node=node,
            is_reached=look is not None,
            state=None if look is None else look.state,
            last_reached_at=contact.last_reached_at,
        )

    def _keep_checkpoints(self, attempt: Attempt, contact: _Contact) -> None:
        """Write down what the agent says that it has published."""
        if self.job.store is None or contact.state is None:
            return
        base = f"{self.job.store.where.rstrip('/')}/{self.job.id}"
        made = checkpoints_in(contact.state, attempt.epoch, base)
        if made and made[-1].number != contact.made:
            self.records.published(self.job.id, made)
            contact.made = made[-1].number

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
                self._end(attempt, "it answers, but cannot be prepared")
        elif isinstance(action, Revive):
            self._revive(attempt)
        elif isinstance(action, Replace):
            self._end(attempt, action.reason)
        else:
            return self._finish(attempt, action)
        return None

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

    def _wind_up(self, state: JobState, reason: str) -> Outcome | None:
        """End what a job that is over has left; None while a vendor does not confirm it."""
        open_now = self.open_attempts()
        listed, _ = self.renting.list_all(a.provider for a in open_now if a.node_id is None)
        self.renting.settle_doubts(listed)
        for attempt in self.open_attempts():
            if attempt.node_id is not None:
                self._end(attempt, state)
        return None if self.open_attempts() else Outcome(state=state, reason=reason)

    def _end(self, attempt: Attempt, reason: str) -> None:
        self._drop(attempt)
        ended = self.renting.end(attempt, reason, self._work_lost_s(attempt))
        self.say(f"{attempt.provider} {attempt.node_id}: {reason}; about ${ended.usd_estimated or 0:.4f}")

    def _prepare(self, attempt: Attempt) -> None:
        """Prove the node, then send and start the job; a node that lies is ended and kept away from."""
        shell = self._contacts[attempt.id].shell
        assert shell is not None  # noqa: S101  it was just looked at
        on_node = OnNode(shell, self.job.id)
        verdict = self._judge(on_node, attempt)
        if not verdict.is_trusted:
            worst = verdict.reasons[0]
            text = "; ".join(reason.text for reason in verdict.reasons)
            self.records.avoid(attempt.provider, attempt.machine_id, worst.code, text, for_s=AVOID_S)
            self._end(attempt, f"preflight: {text}")
            return
        for text in verdict.unchecked:
            self._once(f"preflight: not checked: {text}")
        on_node.start(self._errand(attempt), self.job.folder, self.job.secrets)
        self._contacts[attempt.id].failures = 0
        self.say(f"{attempt.provider} {attempt.node_id}: attempt {self._number(attempt)} started")

    def _revive(self, attempt: Attempt) -> None:
        """Start the agent again: it goes on with the job that runs there."""
        contact = self._contacts[attempt.id]
        contact.failures += 1
        if contact.failures > _MOST_FAILURES or contact.shell is None:
            self._end(attempt, "its agent ends again and again")
            return
        OnNode(contact.shell, self.job.id).start_agent()
        self.say(f"{attempt.provider} {attempt.node_id}: the agent was gone and is started again")

    def _judge(self, on_node: OnNode, attempt: Attempt) -> Verdict:
        wanted = Wanted(
            gpu=attempt.gpu,
            form_factor=attempt.form_factor,
            gpu_count=attempt.gpu_count,
            vram_gib=attempt.vram_gib,
            disk_gb=_DISK_MARGIN_GB,
        )
        return judge(on_node.preflight(), wanted)

    def _number(self, attempt: Attempt) -> int:
        """Which of the job's nodes this is; what was refused was none."""
        before = self.records.attempts(self.job.id)
        return sum(a.node_id is not None and a.epoch <= attempt.epoch for a in before)

    def _errand(self, attempt: Attempt) -> Errand:
        now, limits = self.clock.now(), self.job.spec.limits
        spent = sum((a.usd_so_far(now) for a in self.records.attempts(self.job.id)), Decimal(0))
        left = None if limits.budget_usd is None else max(Decimal("0.01"), limits.budget_usd - spent)
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
            max_s=None if limits.max_hours is None else float(limits.max_hours) * 3600,
            renew_within_s=RENEW_WITHIN_S,
            spent_s=running_s,
            has_imds=attempt.provider == "aws",
            ends_by_shutdown=attempt.provider == "aws" and capabilities.self_terminate,
            store=self.job.store,
        )

    def _rent(self) -> None:
        """The first candidate that can be had. Raises OverBudget.

        The first that is gone shows that what is stored is old: the vendors are asked before the next.
        """
        avoided = self.records.avoided()
        tried, is_fresh = 0, self._is_stale
        for candidate in self.candidates(is_fresh):
            offer = candidate.offer
            why = avoided.get((offer.provider, offer.machine_id))
            if why is not None or offer.provider not in self.computes:
                continue
            tried += 1
            order = Order(
                job_id=self.job.id,
                offer=offer,
                spec=self._node_spec(),
                usd_per_hour=candidate.usd_per_hour,
                bid_usd_per_hour=candidate.bid_usd_per_hour,
            )
            try:
                attempt = self.renting.rent(order, self.job.caps)
            except LaunchUncertain as error:
                self.say(f"{candidate.name}: {error.detail}")
                return
            except (OverBudget, StoreError):
                raise  # after StoreError nobody knows whether there is a node: its tag is looked for
            except NoCapacity as error:
                self._once(f"{candidate.name}: {error}")
                self._is_stale = True
                if not is_fresh:
                    return
                continue
            except BrokerError as error:
                self._once(f"{candidate.name}: {error}")
                continue
            self._is_stale = False
            self.say(f"renting {candidate.name} at ${candidate.usd_per_hour:.4f}/h: {attempt.node_id}")
            return
        self._once("nobody has one now" if tried else "no offer is left to try")

    def _node_spec(self) -> NodeSpec:
        limits = self.job.spec.limits
        return NodeSpec(
            image=self.job.spec.image or "",
            disk_gb=int(self.job.spec.disk),
            ssh_public_key=self.job.public_key,
            lifetime_s=None if limits.max_hours is None else int(limits.max_hours * 3600),
        )

    def _once(self, text: str) -> None:
        """Not the same thing at every tick."""
        if text != self._said:
            self._said = text
            self.say(text)


@contextlib.contextmanager
def closing(supervisor: Supervisor) -> Iterator[Supervisor]:
    """Connections are let go of, however it ends."""
    try:
        yield supervisor
    finally:
        supervisor.close()
