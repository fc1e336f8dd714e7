"""From the candidates in their order to one node: what is asked for, what is passed over and why.

    candidates -> kept away from? left alone? -> Renting.rent -> Rented, or the next, or wait

What is passed over is kept (passing.py) and said once, with the vendor's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from gpubroker.doors import Clock
from gpubroker.errors import (
    BrokerError,
    LaunchUncertain,
    NoCapacity,
    NotOurs,
    OverBudget,
    QuotaExceeded,
    StoreError,
    Transient,
)
from gpubroker.jobspec import JobSpec
from gpubroker.model import Offer
from gpubroker.provider import Compute, NodeSpec
from gpubroker.run.avoiding import kept_away, place
from gpubroker.run.boxes import hours_of
from gpubroker.run.passing import Passing
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Attempt, Caps, Records
from gpubroker.run.renting import Order, Renting
from gpubroker.run.risk import risk_of

# Less than this of the cap of hours is not worth a node's start: for a job to save and to end takes as long.
_LEAST_S, _LEAST_OF_BOX_S = 200.0, 60.0
# Offers that were chosen so long ago are looked for anew.
_OLD_S = 3.0
NO_STORE = "no --store is given: when the node is lost, all its work is lost with it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An offer worth trying, the best first."""

    offer: Offer
    usd_per_hour: Decimal  # all that is billed by the hour
    held_usd_per_hour: Decimal = Decimal(0)  # of that, what is billed while it does not run
    bid_usd_per_hour: Decimal | None
    name: str  # for people
    hazard_per_hour: float | None = None  # how often such a node is lost; None = nobody has said
    note: str = ""  # why this one, where it is not the cheapest; for people


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
class Rented:
    """A node that was just given an id."""

    attempt: Attempt
    at: datetime
    hazard_per_hour: float | None  # by the plan


@dataclass(kw_only=True)
class Launcher:
    """Of one job. `say` hears what happened, `once` what is said once, `wait` why nothing is rented."""

    job: Job
    records: Records
    renting: Renting
    computes: Mapping[str, Compute]
    candidates: Callable[[bool], Iterable[Candidate]]  # True = ask the vendors now, whatever is stored
    clock: Clock
    say: Callable[[str], None]
    once: Callable[[str], None]
    wait: Callable[[str], None]
    passing: Passing = field(default_factory=Passing)  # what was not rented, and why
    _told: set[str] = field(default_factory=set)
    _is_stale: bool = False  # an offer that is stored was gone: listings live for minutes

    def left_s(self, attempt: Attempt | None = None) -> float | None:
        """Billed time that the job's nodes but this one have left of its cap of hours; None = no cap."""
        hours = self.job.spec.limits.max_hours
        if hours is None:
            return None
        now = self.clock.now()
        others = [a for a in self.records.attempts(self.job.id) if attempt is None or a.id != attempt.id]
        return max(0.0, float(hours) * 3600 - sum(a.billed_s(now) for a in others))

    def rent(self) -> Rented | None:
        """The first candidate that can be had; None = not now, and a person has heard why.

        The first that is gone shows that what is stored is old: the vendors are asked before the next. Raises
        OverBudget, and AuthFailed where everybody refuses us.
        """
        left_s = self.left_s()
        least_s = _LEAST_OF_BOX_S if self.job.spec.box else _LEAST_S
        if left_s is not None and left_s < least_s:
            raise OverBudget(f"limits.max_hours: all of the {self.job.spec.limits.max_hours} h are used")
        return self._rent(frozenset())

    def _rent(self, turns: frozenset[str]) -> Rented | None:
        """`turns`: vendors whose turn has come, and been waited for."""
        avoided = kept_away(self.records, self.clock, self.job.id)
        is_fresh = self._is_stale or bool(turns)
        self.passing.over.clear()
        for candidate in self.candidates(is_fresh):
            offer = candidate.offer
            if offer.provider not in self.computes:
                continue
            if why := avoided.get((offer.provider, place(offer))):
                self.passing.pass_over(candidate.name, f"its machine is kept away from: {why}")
                continue
            if rest := self.passing.rest_of(offer, self.clock.now()):
                self.passing.pass_over(candidate.name, str(rest.error), rest.error)
                if rest.is_short:
                    return None
                continue
            try:
                waited_s = 0.0 if offer.provider in turns else self.renting.turn(offer.provider)
            except Transient as error:
                self._pass_over(candidate, error)
                return None
            if waited_s > _OLD_S:  # by now the offers may be others
                return self._rent(turns | {offer.provider})
            found = self._try(candidate)
            turns -= {offer.provider}
            if isinstance(found, Rented):
                return found
            if self._is_to_wait(candidate, found, is_fresh=is_fresh):
                return None
        if refused := self.passing.refused_by_all():
            raise refused
        self.wait(self.passing.summary())
        return None

    def _try(self, candidate: Candidate) -> Rented | Exception:
        """Ask for it; what its provider raised.

        Raises OverBudget, NotOurs: no other offer would do, and StoreError: its tag is looked for.
        """
        offer = candidate.offer
        order = Order(
            job_id=self.job.id,
            offer=offer,
            spec=self._node_spec(candidate.usd_per_hour),
            usd_per_hour=candidate.usd_per_hour,
            held_usd_per_hour=candidate.held_usd_per_hour,
            bid_usd_per_hour=candidate.bid_usd_per_hour,
        )
        try:
            attempt = self.renting.rent(order, self.job.caps)
        except (NotOurs, OverBudget, StoreError):
            raise
        except (BrokerError, ValueError) as error:
            return error
        at = self.clock.now()
        self._is_stale = False
        self.passing.rented(offer.provider)
        note = f" ({candidate.note})" if candidate.note else ""
        self.say(f"renting {candidate.name} at ${candidate.usd_per_hour:.4f}/h{note}: {attempt.node_id}")
        self._warn(offer)
        return Rented(attempt=attempt, at=at, hazard_per_hour=candidate.hazard_per_hour)

    def _is_to_wait(self, candidate: Candidate, error: Exception, *, is_fresh: bool) -> bool:
        """Rather than to ask for the next candidate now."""
        if isinstance(error, LaunchUncertain):
            self.say(f"{candidate.name}: {error.detail}")
            return True
        is_gone = isinstance(error, NoCapacity) and not isinstance(error, QuotaExceeded)
        self._is_stale |= is_gone
        return self._pass_over(candidate, error) or (is_gone and not is_fresh)

    def _warn(self, offer: Offer) -> None:
        """What this node may cost a person, and what it may lose."""
        if offer.usd_per_hour and (risk := risk_of(offer.provider, self.computes[offer.provider])):
            self.once(risk)
        if self.job.store is None and not self.job.spec.box and NO_STORE not in self._told:
            self._told.add(NO_STORE)
            self.say(NO_STORE)

    def _pass_over(self, candidate: Candidate, error: Exception) -> bool:
        """Keep the reason, which a person hears once. True = wait for this provider."""
        offer, now = candidate.offer, self.clock.now()
        self.passing.pass_over(candidate.name, str(error), error)
        is_waiting = self.passing.failed(offer, error, now)
        text = f"{candidate.name}: {error}"
        if text not in self._told:
            self._told.add(text)
            rest = self.passing.rest_of(offer, now)
            after = "asked again at" if is_waiting else "not asked for more before"
            self.say(text if rest is None else f"{text}; {offer.provider} is {after} {rest.until:%H:%M:%S}")
        return is_waiting

    def _node_spec(self, usd_per_hour: Decimal) -> NodeSpec:
        left_s = self.left_s()
        if self.job.spec.box:  # its vendor may be the only one to end it
            left_s = float(hours_of(self.job.spec, usd_per_hour, self.usd_spent()) * 3600)
        return NodeSpec(
            image=self.job.spec.image or "",
            disk_gb=int(self.job.spec.disk),
            ssh_public_key=self.job.public_key,
            volume_id="" if self.job.store is None else self.job.store.volume_id,
            lifetime_s=None if left_s is None else max(1, int(left_s)),
        )

    def usd_spent(self) -> Decimal:
        """By all of the job's nodes, as far as we know."""
        now = self.clock.now()
        return sum((a.usd_known(now) for a in self.records.attempts(self.job.id)), Decimal(0))
