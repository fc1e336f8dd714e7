"""Jobs and attempts in the database: the memory that survives every crash.

An attempt is written before its node is asked for and is open until the node is known to be gone: what is
open may be billing. The caps are checked in the transaction that writes the intent, so that two launchers
cannot both take the last dollar, or the last hour.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, bindparam, delete, func, insert, or_, select, update

from gpubroker.config import DayCaps
from gpubroker.doors import Clock
from gpubroker.errors import NotOurs, OverBudget
from gpubroker.model import Offer
from gpubroker.money import SECONDS_PER_HOUR
from gpubroker.prices.database import Database
from gpubroker.provider import TAG
from gpubroker.run import events, tables
from gpubroker.run.leases import unfinished
from gpubroker.run.ledger import Life, Terms, estimate_usd

JobState = Literal["running", "done", "failed", "stopped", "cancelled", "over_budget"]
# How a node's time ended: its vendor took it, it was gone, it was no good, its job wanted another, or by us.
EndKind = Literal["", "preempted", "lost", "rejected", "crashed", "ended"]
# What a job is to be brought to, with a last checkpoint; "" = to its own end.
Wanted = Literal["", "cancelled", "over_budget", "failed"]
# What an open node is taken to use at least, before anybody looks at it again.
_RESERVED_H = Decimal(1)
_EVER = datetime.fromtimestamp(0, UTC)
_Row = TypeVar("_Row", "JobRow", "Attempt")
_LOCK = "gpubroker launch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """The most that may be spent. None = no such cap."""

    usd_per_day: Decimal | None  # over all jobs, by UTC day
    usd_per_job: Decimal | None = None
    node_hours_per_day: Decimal | None = None  # over all jobs, by UTC day
    accounts: Mapping[str, DayCaps] = field(default_factory=dict)  # provider -> over all its nodes

    def by_day(self) -> Iterator[tuple[str, DayCaps]]:
        """(provider, its caps); "" = all providers together."""
        yield "", DayCaps(usd_per_day=self.usd_per_day, node_hours_per_day=self.node_hours_per_day)
        yield from self.accounts.items()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job as the database has it, but for its description."""

    id: str
    state: JobState
    reason: str
    created_at: datetime
    ended_at: datetime | None  # None = it is not over
    unattended: bool
    supervisor_id: str | None  # None = nobody's yet; a terminal's
    claims: int
    wanted: Wanted
    wanted_why: str
    wanted_at: datetime | None  # None = it may go on to its own end
    told_percent: int  # of its budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One intent to rent one node, and what became of it."""

    id: int
    job_id: str
    epoch: int
    tag: str
    provider: str
    sku: str
    gpu: str
    form_factor: str
    vram_gib: int
    gpu_count: int
    market: str
    region: str
    zone: str
    machine_id: str
    usd_per_hour: Decimal
    held_usd_per_hour: Decimal
    bid_usd_per_hour: Decimal | None
    billing_increment_s: int
    minimum_s: int
    intended_at: datetime
    node_id: str | None  # None = not known to exist
    running_at: datetime | None  # None = never seen running
    stopped_at: datetime | None  # when it was seen to run no more; None = not yet, or it ran to the end
    ended_at: datetime | None  # None = may be billing
    end_reason: str
    end_kind: EndKind
    usd_estimated: Decimal | None
    usd_settled: Decimal | None
    work_lost_s: int | None  # None = it has not ended, or nobody knows

    def billed_s(self, now: datetime) -> float:
        """Of its node's time, until now where it has not ended."""
        return 0.0 if self.running_at is None else ((self.ended_at or now) - self.running_at).total_seconds()

    def hours_since(self, moment: datetime, now: datetime) -> Decimal:
        """Of its node's time between two moments: from when it ran to its end."""
        if self.running_at is None:
            return Decimal(0)
        since, until = max(moment, self.running_at), min(now, self.ended_at or now)
        return Decimal(max(0, int((until - since).total_seconds()))) / SECONDS_PER_HOUR

    def usd_so_far(self, now: datetime) -> Decimal:
        """Estimated: of what has ended as recorded then, of what is open until now."""
        return self.usd_by(now) if self.usd_estimated is None else self.usd_estimated

    def usd_known(self, now: datetime) -> Decimal:
        """The vendor's own figure where there is one, else the estimate."""
        return self.usd_so_far(now) if self.usd_settled is None else self.usd_settled

    def usd_since(self, moment: datetime, now: datetime) -> Decimal:
        """As far as we know; a vendor's figure that is below the estimate of before takes nothing back."""
        before = self.usd_by(moment) if self.intended_at < moment else Decimal(0)
        return max(Decimal(0), self.usd_known(now) - before)

    def usd_by(self, moment: datetime, *, is_free: bool = False) -> Decimal:
        """Estimated, of what it had cost by then. See ledger.estimate_usd."""
        if self.node_id is None or moment < self.intended_at:
            return Decimal(0)
        terms = Terms(
            usd_per_hour=self.usd_per_hour,
            held_usd_per_hour=self.held_usd_per_hour,
            billing_increment_s=self.billing_increment_s,
            minimum_s=self.minimum_s,
        )
        life = Life(
            created=self.intended_at,
            running=self.running_at,
            stopped=self.stopped_at,
            until=moment if self.ended_at is None else min(moment, self.ended_at),
        )
        return estimate_usd(terms, life, is_free=is_free)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One that was published, still kept or not."""

    epoch: int
    number: int
    name: str
    step: int | None
    bytes: int
    published_at: datetime  # by the node's clock
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A checkpoint that an attempt could not trust, and went on from an older one."""

    generation: str  # epoch/number
    epoch: int  # of the attempt that found out
    place: str
    reason: str


# What is asked at every tick or step is built once: to build it costs as much as to run it.
_JOBS = select(*(tables.jobs.c[name] for name in JobRow.__dataclass_fields__))
_NEWEST_JOBS = _JOBS.order_by(tables.jobs.c.created_at.desc(), tables.jobs.c.id.desc())
_UNFINISHED = _JOBS.where(unfinished()).order_by(tables.jobs.c.created_at, tables.jobs.c.id)
_JOB = _JOBS.where(tables.jobs.c.id == bindparam("job"))
_ATTEMPTS = select(*(tables.attempts.c[name] for name in Attempt.__dataclass_fields__))
_ATTEMPT = _ATTEMPTS.where(tables.attempts.c.id == bindparam("attempt"))
_ATTEMPTS_OF_JOB = _ATTEMPTS.where(tables.attempts.c.job_id == bindparam("job")).order_by("epoch")
_OPEN = _ATTEMPTS.where(tables.attempts.c.ended_at.is_(None)).order_by(tables.attempts.c.id)
_SINCE = _ATTEMPTS.where(
    or_(tables.attempts.c.ended_at.is_(None), tables.attempts.c.ended_at > bindparam("since"))
).order_by("id")
_NODES_SINCE = _SINCE.where(tables.attempts.c.node_id.is_not(None))
_ATTEMPTS_BY_TAG = _ATTEMPTS.where(tables.attempts.c.tag.in_(bindparam("tags", expanding=True)))
_JOBS_BY_ID = _JOBS.where(tables.jobs.c.id.in_(bindparam("ids", expanding=True)))
_ADD_CHECKPOINT = insert(tables.checkpoints)
_KNOWN_CHECKPOINTS = select(tables.checkpoints.c.epoch, tables.checkpoints.c.number).where(
    tables.checkpoints.c.job_id == bindparam("job")
)
_OPEN_OF_JOB = _OPEN.where(tables.attempts.c.job_id == bindparam("job"))


class Records:
    """Over a migrated database. Every method is one transaction, with the event that tells of it.

    `supervisor_id`: whose these are. Nothing is rented for a job that another supervisor has.
    """

    def __init__(self, database: Database, clock: Clock, supervisor_id: str | None = None) -> None:
        self._database, self._clock, self._supervisor_id = database, clock, supervisor_id

    def add_job(self, name: str, spec: str, *, unattended: bool = False, job_id: str | None = None) -> str:
        """A new job's id. `job_id`: from `new_job_id`, where something is kept under it before that."""
        now = self._clock.now()
        values = {"spec": spec, "state": "running", "created_at": now, "unattended": unattended}
        with self._database.write(_LOCK) as connection:
            job_id = job_id or _free_job_id(connection, name)
            connection.execute(insert(tables.jobs).values({**values, "id": job_id}))
            events.add(connection, now, "submitted", name, job_id=job_id)
        return job_id

    def new_job_id(self, name: str) -> str:
        """Its name and a few letters that no other job has."""
        with self._database.read() as connection:
            return _free_job_id(connection, name)

    def end_job(self, job_id: str, state: JobState, reason: str = "") -> None:
        """It is over, for good: a job that has ended stays as it is. What it rented is not ended by this."""
        now = self._clock.now()
        values = {"state": state, "reason": reason, "ended_at": now}
        mine = (tables.jobs.c.id == job_id, tables.jobs.c.state.in_(("running", "stopped")))
        with self._database.write(_LOCK) as connection:
            ended = connection.execute(update(tables.jobs).where(*mine).values(values))
            if ended.rowcount and state != "running":
                events.add(connection, now, state, reason, job_id=job_id)

    def want(self, job_id: str, wanted: Wanted, why: str) -> bool:
        """Bring it to that state, with a last checkpoint; False where it is over, or asked for already."""
        now = self._clock.now()
        values = {"wanted": wanted, "wanted_why": why, "wanted_at": now}
        open_one = (tables.jobs.c.id == job_id, tables.jobs.c.state == "running", tables.jobs.c.wanted == "")
        with self._database.write(_LOCK) as connection:
            done = connection.execute(update(tables.jobs).where(*open_one).values(values))
            if done.rowcount:
                events.add(connection, now, "stopping", why, job_id=job_id)
            return bool(done.rowcount)

    def tell(
        self, kind: events.Kind, text: str, *, job_id: str | None = None, attempt: Attempt | None = None
    ) -> None:
        """An event that goes with no other change."""
        attempt_id = None if attempt is None else attempt.id
        with self._database.write(_LOCK) as connection:
            events.add(connection, self._clock.now(), kind, text, job_id=job_id, attempt_id=attempt_id)

    def told_percent(self, job_id: str, percent: int, text: str) -> None:
        """A person hears of each share of a budget once."""
        less = (tables.jobs.c.id == job_id, tables.jobs.c.told_percent < percent)
        with self._database.write(_LOCK) as connection:
            changed = connection.execute(update(tables.jobs).where(*less).values(told_percent=percent))
            if changed.rowcount:
                events.add(connection, self._clock.now(), "budget", text, job_id=job_id)

    def stop_jobs(self, reason: str) -> None:
        """Every job that runs is stopped: who runs it ends what it has and leaves. `reopen` takes it up."""
        now, jobs = self._clock.now(), tables.jobs
        values = {"state": "stopped", "reason": reason, "ended_at": now}
        with self._database.write(_LOCK) as connection:
            running = update(jobs).where(jobs.c.state == "running").values(values).returning(jobs.c.id)
            for job_id in list(connection.scalars(running)):
                events.add(connection, now, "stopped", reason, job_id=job_id)

    def reopen(self, job_id: str) -> None:
        """A stopped job runs again; nothing for any other."""
        mine = (tables.jobs.c.id == job_id, tables.jobs.c.state == "stopped")
        values = {"state": "running", "reason": "", "ended_at": None}
        with self._database.write(_LOCK) as connection:
            connection.execute(update(tables.jobs).where(*mine).values(values))

    def hand_over(self, job_id: str) -> bool:
        """A job that runs or is stopped goes on without a terminal; False for any other."""
        now = self._clock.now()
        mine = (tables.jobs.c.id == job_id, tables.jobs.c.state.in_(("running", "stopped")))
        values = {
            **{"state": "running", "reason": "", "ended_at": None, "unattended": True},
            **{"wanted": "", "wanted_why": "", "wanted_at": None},
        }
        with self._database.write(_LOCK) as connection:
            handed = connection.execute(update(tables.jobs).where(*mine).values(values))
            if handed.rowcount:
                events.add(connection, now, "submitted", "it goes on unattended", job_id=job_id)
            return bool(handed.rowcount)

    def intend(
        self,
        job_id: str,
        offer: Offer,
        *,
        usd_per_hour: Decimal,
        held_usd_per_hour: Decimal = Decimal(0),
        bid: Decimal | None,
        caps: Caps,
    ) -> Attempt:
        """Write down that a node is about to be asked for. Raises OverBudget, and then nothing is written."""
        now = self._clock.now()
        with self._database.write(_LOCK) as connection:
            self._refuse_others(connection, job_id)
            self._check(connection, job_id, offer.provider, usd_per_hour, caps, now)
            last = connection.execute(
                select(func.max(tables.attempts.c.epoch)).where(tables.attempts.c.job_id == job_id)
            ).scalar()
            epoch = (last or 0) + 1
            values = {
                "job_id": job_id,
                "epoch": epoch,
                "tag": f"{TAG}{secrets.token_hex(5)}-{epoch}",
                "provider": offer.provider,
                "sku": offer.sku,
                "gpu": offer.gpu,
                "form_factor": offer.form_factor,
                "vram_gib": offer.vram_gib,
                "gpu_count": offer.gpu_count,
                "market": offer.market,
                "region": offer.region,
                "zone": offer.zone,
                "machine_id": offer.machine_id,
                "usd_per_hour": usd_per_hour,
                "held_usd_per_hour": held_usd_per_hour,
                "bid_usd_per_hour": bid,
                "billing_increment_s": offer.billing_increment_s,
                "minimum_s": offer.minimum_s,
                "intended_at": now,
            }
            added = connection.execute(
                insert(tables.attempts).values(values).returning(tables.attempts.c.id)
            ).scalar_one()
            return _one(connection, added)

    def refuse_others(self, job_id: str) -> None:
        """Raises NotOurs where another supervisor has the job by now; a person may do what they want."""
        if self._supervisor_id is not None:
            with self._database.read() as connection:
                self._refuse_others(connection, job_id)

    def _refuse_others(self, connection: Connection, job_id: str) -> None:
        """Its row stays locked until what follows is written: nobody claims it in between."""
        found = tables.jobs.c
        row = connection.execute(
            select(found.supervisor_id, found.unattended).where(found.id == job_id).with_for_update()
        ).one()
        if row.unattended and row.supervisor_id != self._supervisor_id:
            raise NotOurs(f"{job_id} is run by {row.supervisor_id or 'nobody'} now")

    def created(self, attempt: Attempt, node_id: str) -> Attempt:
        """The vendor gave it an id."""
        text = (
            f"{attempt.provider} {attempt.gpu_count}x {attempt.gpu} {attempt.market.replace('_', '-')}"
            f"{f' in {attempt.region}' if attempt.region else ''} at ${attempt.usd_per_hour:.4f}/h: {node_id}"
        )
        return self._change(attempt, node_id=node_id, event=("rented", text))

    def running(self, attempt: Attempt, since: datetime | None = None) -> Attempt:
        """It was seen running, and bills from now or from when the vendor says. Raises NotOurs."""
        if attempt.running_at is not None:
            return attempt
        return self._change(attempt, is_seen=True, running_at=since or self._clock.now())

    def stopped(self, attempt: Attempt, *, is_stopped: bool = True) -> Attempt:
        """It was seen to run no more, and then costs its disk alone; or to run again. Raises NotOurs."""
        if (attempt.stopped_at is not None) == is_stopped:
            return attempt
        return self._change(attempt, is_seen=True, stopped_at=self._clock.now() if is_stopped else None)

    def ended(
        self,
        attempt: Attempt,
        reason: str,
        work_lost_s: int | None = None,
        *,
        at: datetime | None = None,
        is_free: bool = False,
        kind: EndKind = "ended",
    ) -> Attempt:
        """It is known to be gone, now or since `at`, or never to have been.

        `is_free`: the vendor does not bill what ran. The first word about how it ended stays.
        """
        if attempt.ended_at is not None:
            return attempt
        now = at or self._clock.now()
        usd, node = attempt.usd_by(now, is_free=is_free), attempt.node_id
        values: dict[str, Any] = {
            "ended_at": now,
            "end_reason": reason,
            "end_kind": kind if node else "",
            "usd_estimated": usd,
            "work_lost_s": work_lost_s,
        }
        still = tables.attempts.c.ended_at.is_(None)
        text = f"{attempt.provider} {node}: {reason}; about ${usd:.4f}"
        # What was refused had no node: it is told of as a reason to wait.
        return self._change(attempt, still, **values, event=(kind or "ended", text) if node else None)

    def settled(self, attempt: Attempt, usd: Decimal) -> Attempt:
        """The vendor's own figure."""
        return self._change(attempt, usd_settled=usd)

    def job(self, job_id: str) -> tuple[str, str, str] | None:
        """State, reason and description of a job; None for one that is unknown."""
        found = tables.jobs
        with self._database.read() as connection:
            row = connection.execute(select(found).where(found.c.id == job_id)).first()
            return None if row is None else (row.state, row.reason, row.spec)

    def rows(self, *, only_unfinished: bool = False, most: int | None = None) -> list[JobRow]:
        """All jobs, the newest first; or supervisors' that are not over or may bill, the oldest first."""
        query = _UNFINISHED if only_unfinished else _NEWEST_JOBS.limit(most)
        with self._database.read() as connection:
            return [_as(JobRow, row) for row in connection.execute(query)]

    def row(self, job_id: str) -> JobRow | None:
        """One job; None for one that is unknown."""
        with self._database.read() as connection:
            row = connection.execute(_JOB, {"job": job_id}).first()
            return None if row is None else _as(JobRow, row)

    def jobs_under_way(self) -> list[tuple[str, str]]:
        """Id and description of those that are not over, the oldest first."""
        found = tables.jobs
        with self._database.read() as connection:
            rows = connection.execute(
                select(found).where(found.c.state == "running").order_by(found.c.created_at, found.c.id)
            )
            return [(row.id, row.spec) for row in rows]

    def state(self, job_id: str) -> tuple[JobState, str]:
        """Of a job that is there: its state and why."""
        found = tables.jobs
        with self._database.read() as connection:
            row = connection.execute(select(found.c.state, found.c.reason).where(found.c.id == job_id)).one()
            return row.state, row.reason

    def attempts(self, job_id: str) -> list[Attempt]:
        """Of one job, the first first."""
        with self._database.read() as connection:
            rows = connection.execute(_ATTEMPTS_OF_JOB, {"job": job_id})
            return [_as(Attempt, row) for row in rows]

    def attempts_of_unfinished(self) -> dict[str, list[Attempt]]:
        """Of every job that is not over or may bill, by its id; of one that never rented there are none."""
        jobs, found = tables.jobs.c, tables.attempts
        open_ones = select(found.c.job_id).where(found.c.ended_at.is_(None))
        mine = select(jobs.id).where(or_(jobs.state == "running", jobs.id.in_(open_ones)))
        with self._database.read() as connection:
            attempts: dict[str, list[Attempt]] = {job_id: [] for job_id in connection.scalars(mine)}
            for row in connection.execute(_ATTEMPTS.where(found.c.job_id.in_(mine)).order_by(found.c.id)):
                attempts[row.job_id].append(_as(Attempt, row))
            return attempts

    def count_by_state(self) -> dict[JobState, int]:
        """All jobs; a state in which there is none is not in it."""
        state = tables.jobs.c.state
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(select(state, func.count()).group_by(state))}

    def newest_checkpoints(self) -> dict[str, datetime]:
        """When each job that runs last published one, by its node's clock; none = it is not in it."""
        jobs, found = tables.jobs.c, tables.checkpoints.c
        query = (
            select(found.job_id, func.max(found.published_at))
            .join(tables.jobs, jobs.id == found.job_id)
            .where(jobs.state == "running")
            .group_by(found.job_id)
        )
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def published(self, job_id: str, found: Iterable[Checkpoint]) -> None:
        """Keep those that are not known yet."""
        with self._database.write(_LOCK) as connection:
            rows = connection.execute(_KNOWN_CHECKPOINTS, {"job": job_id})
            known = {(epoch, number) for epoch, number in rows}
            new = [asdict(one) for one in found if (one.epoch, one.number) not in known]
            if new:
                connection.execute(_ADD_CHECKPOINT, [{"job_id": job_id, **one} for one in new])

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Of one job, in the order in which they were made."""
        table = tables.checkpoints
        with self._database.read() as connection:
            rows = connection.execute(
                select(*[c for c in table.c if c is not table.c.job_id])
                .where(table.c.job_id == job_id)
                .order_by(table.c.epoch, table.c.number)
            )
            return [Checkpoint(**row._mapping) for row in rows]

    def add_passed_over(self, job_id: str, found: Iterable[PassedOver]) -> list[PassedOver]:
        """Keep those that are not known yet, and return them."""
        table, new = tables.passed_over, []
        with self._database.write(_LOCK) as connection:
            known = set(connection.scalars(select(table.c.generation).where(table.c.job_id == job_id)))
            for one in found:
                if one.generation not in known:
                    known.add(one.generation)
                    connection.execute(insert(table).values(job_id=job_id, **asdict(one)))
                    new.append(one)
        return new

    def passed_over(self, job_id: str) -> list[PassedOver]:
        """Of one job, in the order in which they were found."""
        table = tables.passed_over
        with self._database.read() as connection:
            rows = connection.execute(
                select(*[c for c in table.c if c is not table.c.job_id])
                .where(table.c.job_id == job_id)
                .order_by(table.c.epoch, table.c.generation)
            )
            return [PassedOver(**row._mapping) for row in rows]

    def open_attempts(self, job_id: str | None = None, *, only_wanted: bool = False) -> list[Attempt]:
        """Everything that may be billing, of one job or of all, or only of those that are not over."""
        query, values = (_OPEN, {}) if job_id is None else (_OPEN_OF_JOB, {"job": job_id})
        if only_wanted:
            running = select(tables.jobs.c.id).where(tables.jobs.c.state == "running")
            query = query.where(tables.attempts.c.job_id.in_(running))
        with self._database.read() as connection:
            return [_as(Attempt, row) for row in connection.execute(query, values)]

    def owners(self, tags: Iterable[str]) -> dict[str, tuple[Attempt, JobRow]]:
        """Whose nodes have these tags, of those that are in this database."""
        with self._database.read() as connection:
            rows = connection.execute(_ATTEMPTS_BY_TAG, {"tags": list(tags)})
            found = [_as(Attempt, row) for row in rows]
            mine = connection.execute(_JOBS_BY_ID, {"ids": list({a.job_id for a in found})})
            by_id = {row.id: _as(JobRow, row) for row in mine}
        return {attempt.tag: (attempt, by_id[attempt.job_id]) for attempt in found}

    def check_schema(self) -> None:
        """Raises SchemaTooNew once a newer gpubroker has migrated the database."""
        self._database.check_schema()

    def attempts_since(self, since: datetime | None = None, job_id: str | None = None) -> list[Attempt]:
        """Nodes of one job or of all that were there since then, the oldest first; None = ever."""
        query, values = _NODES_SINCE, {"since": since or _EVER}
        if job_id is not None:
            query = query.where(tables.attempts.c.job_id == job_id)
        with self._database.read() as connection:
            return [_as(Attempt, row) for row in connection.execute(query, values)]

    def unsettled(self, job_id: str | None = None) -> list[Attempt]:
        """Ended nodes, of one job or of all, whose vendor has not said what they cost."""
        found = tables.attempts.c
        wanted = _ATTEMPTS.where(
            found.ended_at.is_not(None), found.node_id.is_not(None), found.usd_settled.is_(None)
        )
        if job_id is not None:
            wanted = wanted.where(found.job_id == job_id)
        with self._database.read() as connection:
            return [_as(Attempt, row) for row in connection.execute(wanted.order_by(found.id))]

    def avoid(self, provider: str, machine_id: str, code: str, reason: str, *, for_s: int) -> None:
        """Keep away from a machine for a while; nothing where the vendor does not name machines."""
        if not machine_id:
            return
        table = tables.avoided
        values = {
            "provider": provider,
            "machine_id": machine_id,
            "code": code,
            "reason": reason,
            "until_at": self._clock.now() + timedelta(seconds=for_s),
        }
        mine = (table.c.provider == provider, table.c.machine_id == machine_id)
        with self._database.write(_LOCK) as connection:
            connection.execute(delete(table).where(*mine))
            connection.execute(insert(table).values(values))

    def avoided(self) -> Mapping[tuple[str, str], str]:
        """(provider, machine) -> why, of those whose time is not over."""
        table = tables.avoided
        with self._database.read() as connection:
            rows = connection.execute(select(table).where(table.c.until_at > self._clock.now()))
            return {(row.provider, row.machine_id): f"{row.code}: {row.reason}" for row in rows}

    def usd_today(self, now: datetime) -> Decimal:
        """Spent by all jobs since midnight UTC, as far as we know."""
        with self._database.read() as connection:
            return _usd_today(connection, now)

    def _change(
        self,
        attempt: Attempt,
        *still: ColumnElement[bool],
        event: tuple[events.Kind, str] | None = None,
        is_seen: bool = False,
        **values: Any,
    ) -> Attempt:
        """`still`: what must hold, or nothing is changed.

        `is_seen`: in a list, and not done by us. A supervisor that stood still has an old one.
        """
        with self._database.write(_LOCK) as connection:
            if is_seen and self._supervisor_id is not None:
                self._refuse_others(connection, attempt.job_id)
            mine = (tables.attempts.c.id == attempt.id, *still)
            changed = connection.execute(update(tables.attempts).where(*mine).values(values))
            if event is not None and changed.rowcount:
                kind, text = event
                job_id, now = attempt.job_id, self._clock.now()
                events.add(connection, now, kind, text, job_id=job_id, attempt_id=attempt.id)
            return _one(connection, attempt.id)

    def _check(
        self,
        connection: Connection,
        job_id: str,
        provider: str,
        usd_per_hour: Decimal,
        caps: Caps,
        now: datetime,
    ) -> None:
        """One more hour of this node, and one of every other that is open, must still fit."""
        today, midnight, wanted = _today(connection, now), midnight_before(now), usd_per_hour * _RESERVED_H
        for account, most in caps.by_day():
            if account not in ("", provider):
                continue
            what = f"today at {account}" if account else "today"
            mine = [a for a in today if account in ("", a.provider)]
            if most.usd_per_day is not None:
                usd = sum((a.usd_since(midnight, now) + _reserved_usd(a) for a in mine), Decimal(0))
                _refuse(what, most.usd_per_day, usd, wanted, until=midnight + timedelta(days=1))
            if most.node_hours_per_day is not None:
                hours = sum((a.hours_since(midnight, now) + _reserved_h(a) for a in mine), Decimal(0))
                _refuse_hours(what, most.node_hours_per_day, hours, until=midnight + timedelta(days=1))
        if caps.usd_per_job is not None:
            own = [_as(Attempt, row) for row in connection.execute(_ATTEMPTS_OF_JOB, {"job": job_id})]
            spent = sum((a.usd_known(now) + _reserved_usd(a) for a in own), Decimal(0))
            _refuse("this job", caps.usd_per_job, spent, wanted)


def midnight_before(now: datetime) -> datetime:
    """When the day (UTC) of the caps began."""
    return now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _free_job_id(connection: Connection, name: str) -> str:
    """Few letters, as people type them: among a thousand jobs two would draw the same, so it is looked."""
    while True:
        job_id = f"{name}-{secrets.token_hex(3)}"
        if connection.execute(_JOB, {"job": job_id}).first() is None:
            return job_id


def _reserved_h(attempt: Attempt) -> Decimal:
    return Decimal(0) if attempt.ended_at is not None else _RESERVED_H


def _reserved_usd(attempt: Attempt) -> Decimal:
    return attempt.usd_per_hour * _reserved_h(attempt)


def _refuse(
    what: str, limit: Decimal, spent: Decimal, wanted: Decimal, *, until: datetime | None = None
) -> None:
    if spent + wanted > limit:
        raise OverBudget(
            f"the limit of {what} is ${limit:.2f}: ${spent:.2f} are spent or reserved,"
            f" an hour of this node would add ${wanted:.2f}",
            until=until,
        )


def _refuse_hours(what: str, limit: Decimal, used: Decimal, *, until: datetime) -> None:
    if used + _RESERVED_H > limit:
        raise OverBudget(
            f"the limit of {what} is {limit:.2f} node hours: {used:.2f} are used or reserved,"
            f" this node would add {_RESERVED_H:.2f}",
            until=until,
        )


def _usd_today(connection: Connection, now: datetime) -> Decimal:
    midnight = midnight_before(now)
    return sum((a.usd_since(midnight, now) for a in _today(connection, now)), Decimal(0))


def _today(connection: Connection, now: datetime) -> list[Attempt]:
    """Those that have used anything since midnight UTC, or may yet."""
    rows = connection.execute(_SINCE, {"since": midnight_before(now)})
    return [_as(Attempt, row) for row in rows]


def _as(made: type[_Row], row: Row[Any]) -> _Row:
    """Of what was asked for by its fields, in their order."""
    return made(**dict(zip(made.__dataclass_fields__, row, strict=True)))


def _one(connection: Connection, attempt_id: int) -> Attempt:
    row = connection.execute(_ATTEMPT, {"attempt": attempt_id}).one()
    return _as(Attempt, row)
