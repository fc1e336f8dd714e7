"""The one way to a node and the one way out: nothing is rented or ended elsewhere.

    rent: intent (within the caps) -> create -> id        a crash between any two leaves an open attempt
    settle_doubts: open attempts + the vendors' lists -> adopted, or known never to have been
    end: terminate -> ended                               gone already is success
    end_all: the same with all of a job's, once around    what is left may still bill

A create that may have worked is never repeated: its tag is looked for first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from gpubroker.doors import Clock
from gpubroker.errors import BrokerError, LaunchUncertain
from gpubroker.model import Offer
from gpubroker.provider import Compute, Leftovers, Limiter, NodeSpec, NodeView
from gpubroker.run.boxes import Box, boxes, over
from gpubroker.run.records import Attempt, Caps, EndKind, Records

# How long a node that was asked for may take to appear in its vendor's list.
APPEARS_WITHIN = timedelta(minutes=5)
_CALL_S = 60.0
# A longer-lasting create is a queue: Modal's scheduler may take its time.
_CREATE_S = 120.0
_TURN_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One node to be rented for a job."""

    job_id: str
    offer: Offer
    spec: NodeSpec
    usd_per_hour: Decimal  # all that is billed by the hour, disk and the like included
    held_usd_per_hour: Decimal = Decimal(0)  # of that, what is billed while it does not run
    bid_usd_per_hour: Decimal | None  # None = not a bid


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A node with our tag that no open attempt knows."""

    provider: str
    node: NodeView


class Renting:
    """Over the records and the providers that rent nodes."""

    def __init__(
        self,
        records: Records,
        computes: Mapping[str, Compute],
        clock: Clock,
        limiter: Limiter | None = None,  # None = one job at a time: nobody queues
    ) -> None:
        self._records, self._computes, self._clock, self._limiter = records, computes, clock, limiter

    @property
    def providers(self) -> list[str]:
        """Those that can be asked."""
        return sorted(self._computes)

    def turn(self, provider: str) -> float:
        """Wait until this vendor may be asked for another node; the seconds that it took.

        Before an offer is chosen and an intent is written: in a queue an offer grows old, and an intent
        whose process dies is in doubt for minutes. Raises Transient when the turn is far away.
        """
        interval_s = self._computes[provider].capabilities.create_interval_s
        if self._limiter is None or not interval_s:
            return 0.0
        began_s = self._clock.monotonic_s()
        self._limiter.wait(provider, "turn", interval_s, _TURN_S)
        return self._clock.monotonic_s() - began_s

    def rent(self, order: Order, caps: Caps) -> Attempt:
        """Ask for one node. Raises OverBudget before anything is asked, and what the provider raises.

        After NoCapacity, Refused and the like the attempt is ended: nothing was created. After
        LaunchUncertain it stays open: with its node where the vendor gave an id, else for settle_doubts.
        """
        compute = self._computes[order.offer.provider]
        attempt = self._records.intend(
            order.job_id,
            order.offer,
            usd_per_hour=order.usd_per_hour,
            held_usd_per_hour=order.held_usd_per_hour,
            bid=order.bid_usd_per_hour,
            caps=caps,
        )
        try:
            node_id = compute.create(
                order.offer,
                order.spec,
                attempt.tag,
                bid_usd_per_hour=order.bid_usd_per_hour,
                deadline_s=_CREATE_S,
            )
        except LaunchUncertain as error:
            if len(error.ids) == 1:
                self._records.created(attempt, error.ids[0])
            raise
        except (BrokerError, ValueError) as error:
            self._records.ended(attempt, f"not created: {error}")
            raise
        return self._records.created(attempt, node_id)

    def end(
        self, attempt: Attempt, reason: str, work_lost_s: int | None = None, *, kind: EndKind = "ended"
    ) -> Attempt:
        """End the node and the attempt. Raises when the vendor does not confirm: it may still bill.

        Raises NotOurs, before anything is asked, for a job that went to another supervisor.
        """
        if attempt.node_id is None:
            raise ValueError(f"attempt {attempt.id} has no node to end: settle_doubts finds out")
        # A supervisor that stood still may have seen it in a list that is long out of date.
        self._records.refuse_others(attempt.job_id)
        compute = self._computes[attempt.provider]
        compute.terminate(attempt.node_id, _CALL_S)
        free_for = timedelta(seconds=compute.capabilities.free_if_preempted_within_s)
        ran_for = self._clock.now() - (attempt.running_at or attempt.intended_at)
        is_free = kind == "preempted" and ran_for < free_for
        return self._records.ended(attempt, reason, work_lost_s, is_free=is_free, kind=kind)

    def settle_doubts(self, listed: Mapping[str, Sequence[NodeView]]) -> list[Attempt]:
        """Open attempts without an id: adopt what carries their tag, end those that never came to be.

        `listed` is what each vendor that answered just listed. A vendor that did not answer says nothing: its
        attempts stay open. One that has been silent about a tag for long enough has no such node. Of
        several nodes with one tag the first is kept: the others are strays from then on. Returns the adopted.
        """
        adopted = []
        for attempt in self._records.open_attempts():
            if attempt.node_id is not None or attempt.provider not in listed:
                continue
            mine = [n for n in listed[attempt.provider] if n.tag == attempt.tag and n.status != "gone"]
            if mine:
                adopted.append(self._records.created(attempt, mine[0].id))
            elif self._clock.now() - attempt.intended_at > APPEARS_WITHIN:
                self._records.ended(attempt, "never came to be")
        return adopted

    def list_all(self, providers: Iterable[str]) -> tuple[dict[str, list[NodeView]], dict[str, str]]:
        """One call to each vendor: nodes with our tag, and why a vendor did not answer."""
        listed, problems = dict[str, list[NodeView]](), dict[str, str]()
        for name in sorted(set(providers)):
            if name not in self._computes:
                problems[name] = f"{name}: there is no account to ask with"
                continue
            try:
                listed[name] = self._computes[name].list_nodes(_CALL_S)
            except BrokerError as error:
                problems[name] = str(error)
        return listed, problems

    def end_all(
        self, job_id: str, reason: str, lost_s: Callable[[Attempt], int | None]
    ) -> dict[tuple[str, str], str]:
        """End what a job has rented, once around: (provider, node or tag) that may still bill -> why."""
        mine = self._records.open_attempts(job_id)
        listed, problems = self.list_all(a.provider for a in mine)
        self.settle_doubts(listed)
        left = {(stray.provider, stray.node.id): "not ended" for stray in self.end_strays_of(job_id, listed)}
        for attempt in self._records.open_attempts(job_id):
            if attempt.node_id is None or attempt.provider not in self._computes:
                why = problems.get(attempt.provider, "it was asked for, and may appear yet")
                left[attempt.provider, attempt.node_id or attempt.tag] = why
                continue
            try:
                self.end(attempt, reason, lost_s(attempt))
            except BrokerError as error:
                left[attempt.provider, attempt.node_id] = str(error)
        return left

    def end_strays_of(self, job_id: str, listed: Mapping[str, Sequence[NodeView]]) -> list[Stray]:
        """A job's nodes that came late or twice; returns those that could not be ended."""
        tags = {a.tag for a in self._records.attempts(job_id)}
        return self.sweep(stray for stray in self.strays(listed) if stray.node.tag in tags)

    def strays(
        self,
        listed: Mapping[str, Sequence[NodeView]],
        is_forsaken: Callable[[str], bool] = lambda job_id: False,
    ) -> list[Stray]:
        """What bills with our tag and is no open attempt's of a job that runs: leaked, whoever leaked it.

        An attempt that has no id yet protects its tag; one of a job that is forsaken, or of a box whose time
        is over, protects nothing: nobody supervises it, so this is where it is found.
        """
        now = self._clock.now()
        stops_at = {box.attempt.id: box.stops_at for box in boxes(self._records)}
        attempts = [
            a
            for a in self._records.open_attempts(only_wanted=True)
            if (stops_at[a.id] > now if a.id in stops_at else not is_forsaken(a.job_id))
        ]
        tags = {(a.provider, a.tag) for a in attempts if a.node_id is None}
        ids = {(a.provider, a.node_id) for a in attempts}
        return [
            Stray(provider=name, node=node)
            for name, nodes in listed.items()
            for node in nodes
            if node.status != "gone" and (name, node.id) not in ids and (name, node.tag) not in tags
        ]

    def stop_jobs(self, reason: str) -> None:
        """Whoever runs a job rents nothing more for it."""
        self._records.stop_jobs(reason)

    def forget(self, gone: Iterable[tuple[str, str]], reason: str) -> None:
        """These nodes (provider, id) were ended by hand: so are their attempts, and boxes altogether."""
        ids = set(gone)
        for box in boxes(self._records):
            if (box.attempt.provider, box.attempt.node_id) in ids:
                over(self._records, box, reason)
        for attempt in self._records.open_attempts():
            if (attempt.provider, attempt.node_id) in ids:
                self._records.ended(attempt, reason)

    def look_at_boxes(self) -> tuple[dict[str, list[NodeView]], dict[str, str]]:
        """Ask the vendors of open boxes what became of them: what they list, and why one did not answer."""
        open_at = {box.attempt.provider for box in boxes(self._records)} & set(self._computes)
        listed, problems = self.list_all(open_at)
        self.settle_doubts(listed)
        self.settle_boxes(listed)
        return listed, problems

    def settle_boxes(self, listed: Mapping[str, Sequence[NodeView]]) -> list[Box]:
        """Boxes that are gone by now are over since they were to stop, at the latest: nobody saw it."""
        now = self._clock.now()
        gone = [box for box in boxes(self._records) if self._is_gone(box, listed)]
        for box in gone:
            is_due = box.stops_at <= now
            over(
                self._records,
                box,
                "its time was over" if is_due else "gone before its time",
                at=min(now, box.stops_at),
            )
        return gone

    def _is_gone(self, box: Box, listed: Mapping[str, Sequence[NodeView]]) -> bool:
        attempt = box.attempt
        if attempt.node_id is None or attempt.provider not in listed:
            return False
        node = next((n for n in listed[attempt.provider] if n.id == attempt.node_id), None)
        if node is None:
            return attempt.running_at is not None or self._clock.now() - attempt.intended_at > APPEARS_WITHIN
        return node.status == "gone"

    def sweep_leftovers(self, providers: Iterable[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
        """What launches left at these vendors: (provider, what went), and why a vendor did not answer."""
        in_use = {(a.provider, a.tag) for a in self._records.open_attempts()}
        gone, problems = list[tuple[str, str]](), dict[str, str]()
        for name in sorted(providers):
            compute = self._computes[name]
            if not isinstance(compute, Leftovers):
                continue
            try:
                tags = [tag for provider, tag in in_use if provider == name]
                gone += [(name, what) for what in compute.sweep_leftovers(tags, _CALL_S)]
            except BrokerError as error:
                problems[name] = str(error)
        return gone, problems

    def sweep(self, strays: Iterable[Stray]) -> list[Stray]:
        """End them; returns those that could not be ended, which may still bill."""
        left = []
        for stray in strays:
            try:
                self._computes[stray.provider].terminate(stray.node.id, _CALL_S)
            except BrokerError:
                left.append(stray)
        return left
