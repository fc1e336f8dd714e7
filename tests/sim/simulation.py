"""One seed from its beginning to its end: five jobs, three vendors, supervisors that come and go.

faults on    TICKS rounds, in each of which one supervisor ticks, by turns
faults off   until all jobs are over and nothing bills, at most MOST_TICKS rounds
"""

from __future__ import annotations

import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from random import Random

from gpubroker.doors import SerialPool
from gpubroker.errors import StoreError
from gpubroker.jobspec import JobSpec, job_from, kept_job
from gpubroker.run.fleet import Fleet
from gpubroker.run.launching import Candidate, Job
from gpubroker.run.leases import Leases
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Supervisor
from tests.sim import database
from tests.sim.clock import BEGIN, VirtualClock, World
from tests.sim.cloud import KINDS, Machine, Vendor
from tests.sim.faults import Broken, Crash, Doors, Faults
from tests.sim.judge import JobFacts, Judge, Round
from tests.sim.nodes import Inside, Program, Store

JOBS, TICKS, MOST_TICKS = 5, 200, 900
_STORE = StoreKeys(where="s3://bucket/jobs", access_key="key", secret_key="secret")
# Between the ticks of others while one stands still.
_OTHERS_TICK_S = 20.0
# Once faults have stopped, while nodes are there and while none is: jobs may wait for the next day.
_CALM_TICK_S, _IDLE_TICK_S = 50.0, 600.0


@dataclass(kw_only=True)
class Found:
    """What came of one seed."""

    seed: int
    broken: str = ""  # "" = all held
    trace: list[str] = field(default_factory=list)
    ticks: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # how often each kind
    nodes: int = 0
    supervisors: int = 0
    states: list[str] = field(default_factory=list)
    worst_ledger_usd: Decimal = Decimal(0)


def simulate(seed: int) -> Found:
    """The same seed gives the same, whatever was simulated before."""
    with _seeded_secrets(seed):
        return Simulation(seed).run()


class Simulation:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.found = Found(seed=seed)
        self.world, self.faults = World(), Faults(self.rng)
        self.doors = Doors(self.faults)
        self.clock = VirtualClock(self.world, self.doors.reach)
        self.faults.told = self.told
        self.doors.stand_still = self._stand_still
        self.database = database.fresh(self.clock, self.faults, self.doors)
        self.store = Store()
        self.vendors = {kind.name: Vendor(kind, self.world, self.faults, self.doors) for kind in KINDS}
        self.programs: dict[str, Program] = {}
        self.fleets: list[Fleet] = []
        self.ticking: list[Fleet] = []  # the innermost last: one that stands still lets others tick
        self.cancels: dict[str, int] = {}  # job: the round in which somebody cancels it
        self.late: dict[str, str] = {}  # supervisors that have stood still in their tick: where last
        self.tick_s = self.rng.choice((5.0, 10.0, 20.0, 20.0))
        self.look_every_s = self.rng.choice((5.0, 25.0, 45.0))  # as with few jobs, and with many
        self.day_usd = self.rng.choice((None, None, None, None, Decimal(8)))
        self.judge = Judge(
            world=self.world,
            clock=self.clock,
            database=self.database,
            vendors=self.vendors,
            jobs={},
            day_usd=self.day_usd,
            tick_s=lambda: self.tick_s,
            stood_at=lambda: self.late.get(self.ticking[-1].leases.id, "") if self.ticking else "",
        )
        for vendor in self.vendors.values():
            vendor.asked, vendor.ending = self.judge.asked, self.judge.ending
            vendor.make_inside = self._inside
        self.database.kept = self.judge.kept

    def told(self, text: str) -> None:
        self.found.trace.append(f"{self.world.now_s:9.2f} {text}")

    def run(self) -> Found:
        found = self.found
        try:
            self._submit()
            self._play()
        except Broken as broken:
            found.broken = str(broken)
            self.told(f"BROKEN: {broken}")
        found.faults = self.faults.kinds
        found.nodes = sum(len(v.machines) for v in self.vendors.values())
        found.states = sorted(job.state for job in self.judge.job_rows().values())
        found.worst_ledger_usd = self.judge.worst_ledger_usd
        return found

    def _play(self) -> None:
        for number in range(TICKS + MOST_TICKS):
            if number == TICKS:
                self._calm()
            if number > TICKS and self._is_over():
                break
            self.found.ticks += 1
            self._round()
        self.judge.at_the_end(is_over=self._is_over())

    def _is_over(self) -> bool:
        rows = self.judge.job_rows().values()
        bills = any(m.ended_s is None for v in self.vendors.values() for m in v.machines.values())
        is_open = any(a.ended_at is None for a in self.judge.attempt_rows())
        return all(row.state != "running" for row in rows) and not bills and not is_open

    def _calm(self) -> None:
        """Nothing new goes wrong; what has, may have to be waited for."""
        self.told("faults stop")
        self.faults.is_on = False
        self.tick_s = _CALM_TICK_S
        for vendor in self.vendors.values():
            vendor.away_until_s = 0.0

    def _round(self) -> None:
        faults = self.faults
        for vendor in self.vendors.values():
            vendor.happen()
        if faults.happens("clock jumps", "*"):
            self.clock.jump(self.rng.choice((-600, -90, -5, 5, 90, 600)) * self.rng.random())
        if not self.fleets or (len(self.fleets) < 2 and faults.happens("joins", "*")):
            self._begin_one()
        for job_id in [job_id for job_id, number in self.cancels.items() if number == self.found.ticks]:
            self._cancel(job_id)
        self._tick(self.fleets[self.found.ticks % len(self.fleets)])
        if self.fleets and faults.happens("hand over", "*"):
            self._hand_over(self.fleets[0])
        is_idle = not faults.is_on and all(a.ended_at is not None for a in self.judge.attempt_rows())
        self.world.advance(_IDLE_TICK_S if is_idle else self.tick_s)

    # Supervisors

    def _begin_one(self) -> None:
        self.found.supervisors += 1
        self.judge.unrest.append(self.world.now_s)
        leases = Leases(self.database, self.clock, host="sim", pid=self.found.supervisors)
        records = Records(self.database, self.clock, leases.id)
        renting = Renting(records, self.vendors, self.clock)
        self.told(f"supervisor {leases.id}")

        def make(job_id: str, spec: JobSpec) -> Supervisor:
            return self._supervisor(job_id, spec, records, renting)

        fleet = Fleet(
            leases=leases,
            records=records,
            renting=renting,
            computes=self.vendors,
            clock=self.clock,
            pool=SerialPool(),
            make=make,
            caps=None if self.day_usd is None else Caps(usd_per_day=self.day_usd),
            say=self.told,
            tick_s=self.look_every_s,
        )
        self.fleets.append(fleet)

    def _tick(self, fleet: Fleet) -> None:
        """One, with what it brings; a supervisor that dies in it is gone."""
        faults, outer = self.faults, self.faults.touched
        faults.touched = {v.kind.name for v in self.vendors.values() if self.world.now_s < v.away_until_s}
        had, begun_s = self._jobs_of(fleet), self.world.now_s
        self.ticking.append(fleet)
        try:
            fleet.tick()
        except Crash:
            self.fleets.remove(fleet)
            self.judge.unrest.append(self.world.now_s)
        except StoreError as error:
            self.told(str(error))
        finally:
            self.ticking.pop()
            self.late.pop(fleet.leases.id, None)
            touched, faults.touched = faults.touched, outer
        if "*" not in touched:
            jobs, listed = (
                had & self._jobs_of(fleet),
                {n for n, v in self.vendors.items() if v.told_at_s >= begun_s},
            )
            self.judge.rounds.append(
                Round(begun_s, self.world.now_s, jobs, frozenset(touched), frozenset(listed))
            )
        self.judge.look()

    def _jobs_of(self, fleet: Fleet) -> frozenset[str]:
        rows = self.database.raw.execute("SELECT id FROM jobs WHERE supervisor_id = ?", (fleet.leases.id,))
        return frozenset(row[0] for row in rows)

    def _stand_still(self, where: str) -> None:
        """The supervisor that ticks now does not, for longer than its lease; others do."""
        if not self.ticking:
            return
        self.late[self.ticking[-1].leases.id] = where
        self.judge.unrest.append(self.world.now_s)
        until_s = self.world.now_s + self.rng.choice((70, 90, 150, 400, 700))
        while self.world.now_s < until_s:
            others = [fleet for fleet in self.fleets if fleet not in self.ticking]
            if not others:
                self._begin_one()
                continue
            for fleet in others:
                self._tick(fleet)
            self.world.advance(_OTHERS_TICK_S)

    def _hand_over(self, fleet: Fleet) -> None:
        self.told(f"{fleet.leases.id} leaves")
        with suppress(Crash, StoreError):
            fleet.close()
        self.fleets.remove(fleet)

    def _cancel(self, job_id: str) -> None:
        """By its user, from another process, which tries again when the database is busy."""
        is_on, self.faults.is_on = self.faults.is_on, False
        Records(self.database, self.clock).want(job_id, "cancelled", "by its user")
        self.told(f"{job_id} is cancelled")
        self.faults.is_on = is_on

    # What they are given

    def _supervisor(self, job_id: str, spec: JobSpec, records: Records, renting: Renting) -> Supervisor:
        job = Job(
            id=job_id,
            spec=spec,
            folder=_folder(),
            out=_folder() / "gpubroker-out",
            secrets={},
            store=_STORE,
            private_key="private",
            public_key="public",
            caps=Caps(usd_per_day=self.day_usd, usd_per_job=spec.limits.budget_usd),
        )
        return Supervisor(
            job=job,
            records=records,
            renting=renting,
            computes=self.vendors,
            candidates=self._candidates,
            connect=lambda compute, node, key, host_key: (
                self.vendors[compute.kind.name].connect(node),
                "host key",
            ),
            clock=self.clock,
            say=lambda text: self.told(f"  {job_id}: {text}"),
            log=lambda attempt, data: None,
        )

    def _candidates(self, is_fresh: bool) -> list[Candidate]:
        found = []
        for vendor in self.vendors.values():
            for offer in vendor.offers():
                bid = offer.usd_per_hour if vendor.capabilities.takes_bids else None
                held = vendor.kind.held_usd_per_hour
                found.append(
                    Candidate(
                        offer=offer,
                        usd_per_hour=offer.usd_per_hour + held,
                        held_usd_per_hour=held,
                        bid_usd_per_hour=bid,
                        name=f"{offer.provider} {offer.sku} {offer.region}",
                    )
                )
        return sorted(found, key=lambda one: one.usd_per_hour)

    def _inside(self, machine: Machine) -> Inside:
        vendor = self.vendors[machine.kind.name]
        end_itself = (
            None
            if machine.kind.capabilities.own_end is None
            else lambda: vendor.gone(machine, "ended itself")
        )
        return Inside(
            id=machine.id,
            world=self.world,
            faults=self.faults,
            store=self.store,
            program_of=self.programs.__getitem__,
            begins=self.judge.begins,
            end_itself=end_itself,
            lies=self.faults.happens("lies", machine.kind.name),
        )

    def _submit(self) -> None:
        """Five jobs, as somebody on another machine would."""
        records, is_on = Records(self.database, self.clock), self.faults.is_on
        self.faults.is_on = False
        for number in range(JOBS):
            program = self._program()
            hours = Decimal(program.work_s / 3600).quantize(Decimal("0.01")) + Decimal("0.01")
            limits = {}
            if self.rng.random() < 0.5:
                limits["budget_usd"] = str(self.rng.choice((2, 3, 3, 4)))
            if self.rng.random() < 0.3:
                limits["max_hours"] = str(hours + self.rng.choice((1, 2)))
            spec = _spec(str(hours), tuple(sorted(limits.items())))
            job_id = f"job-{number}"
            records.add_job("job", spec, unattended=True, job_id=job_id)
            self.programs[job_id] = program
            if self.rng.random() < 0.1:
                self.cancels[job_id] = self.rng.randrange(1, TICKS)
            self.judge.jobs[job_id] = JobFacts(id=job_id, budget_usd=kept_job(spec).limits.budget_usd)
        self.faults.is_on = is_on

    def _program(self) -> Program:
        rng = self.rng
        fate, work_s = rng.random(), rng.choice((60, 200, 400, 600, 1200, 2400, 6000))
        return Program(
            work_s=work_s,
            save_every_s=rng.choice((40, 100, 300)),
            saving_s=rng.choice((2, 10, 30)),
            fails_at_s=work_s * rng.random() if fate < 0.12 else None,
            retries=rng.choice((1, 2, 9)) if 0.12 < fate < 0.22 else 0,
        )


@cache
def _spec(hours: str, limits: tuple[tuple[str, str], ...]) -> str:
    table = {
        "command": ["true"],
        "gpu": {"name": ["h100"]},
        "work": {"hours": hours},
        "limits": dict(limits),
        "exit_codes": {"75": "retry"},
        "checkpoint": {"store": "s3://bucket/jobs"},
    }
    return job_from(table, BEGIN, "simulation").model_dump_json()


@cache
def _folder() -> Path:
    """An empty one, that all jobs share."""
    place = tempfile.TemporaryDirectory(prefix="gpubroker-sim-")
    _kept.append(place)
    return Path(place.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextmanager
def _seeded_secrets(seed: int) -> Iterator[None]:
    """Names that nobody else has are made by chance, too."""
    real, rng = secrets.token_hex, Random(~seed)
    secrets.token_hex = lambda nbytes=16: f"{rng.getrandbits(8 * (nbytes or 16)):0{2 * (nbytes or 16)}x}"
    try:
        yield
    finally:
        secrets.token_hex = real
