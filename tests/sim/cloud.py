"""Three vendors in memory, behind the product's Compute. They bill by their own books, not by its ledger.

vast     bids; lists nodes late; a node that is taken back is stopped, and its disk is billed until it is ended
lambda   on demand; bills begun minutes; a node cannot end itself
aws      spot with two minutes' notice; the same tag twice is one node; a first hour that is cut short is free
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal

from gpubroker.doors import Shell
from gpubroker.errors import LaunchUncertain, NoCapacity, QuotaExceeded, Refused, Transient, Unreachable
from gpubroker.model import Market, Offer
from gpubroker.provider import Capabilities, NodeSpec, NodeStatus, NodeView
from tests.sim.clock import BEGIN, World
from tests.sim.faults import Doors, Faults
from tests.sim.nodes import Inside, NodeShell

OWN_END = {"command": ["end-this-node"]}
# AWS goes on listing what has ended.
_LISTED_AFTER_S = 3600.0
_STALE_S = 60.0
_FREE_WITHIN_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is particular about a vendor."""

    name: str
    market: Market
    capabilities: Capabilities
    increment_s: int
    minimum_s: int
    held_usd_per_hour: Decimal  # the disk, from the create to the end
    sku: str
    boot_s: tuple[float, float]
    late_s: tuple[float, float]  # in lists, where it is late
    life_s: float  # until a node is taken back, on average; 0 = never
    notice_s: float = 0.0
    notice_chance: float = 0.0
    machines: bool = False  # they have names


KINDS = (
    Kind(
        name="vast",
        market="spot",
        capabilities=Capabilities(takes_bids=True, stop=True, bills_idle_disk=True, own_end=OWN_END),
        increment_s=1,
        minimum_s=0,
        held_usd_per_hour=Decimal("0.02"),
        sku="ask",
        boot_s=(20, 240),
        late_s=(30, 200),
        life_s=1500,
        machines=True,
    ),
    Kind(
        name="lambda",
        market="on_demand",
        capabilities=Capabilities(image_by="docker"),
        increment_s=60,
        minimum_s=0,
        held_usd_per_hour=Decimal(0),
        sku="gpu_1x_h100",
        boot_s=(60, 400),
        late_s=(5, 60),
        life_s=9000,
    ),
    Kind(
        name="aws",
        market="spot",
        capabilities=Capabilities(
            notice_s=120,
            own_end=OWN_END,
            idempotent_create=True,
            bills_idle_disk=True,
            free_if_preempted_within_s=_FREE_WITHIN_S,
        ),
        increment_s=1,
        minimum_s=60,
        held_usd_per_hour=Decimal("0.01"),
        sku="p5.4xlarge",
        boot_s=(20, 90),
        late_s=(5, 40),
        life_s=2400,
        notice_s=120,
        notice_chance=0.7,
    ),
)


@dataclass(kw_only=True)
class Machine:
    """A node that somebody has rented."""

    id: str
    tag: str
    kind: Kind
    usd_per_hour: Decimal  # while it runs, its disk included
    machine_id: str
    created_s: float
    listed_s: float
    inside: Inside = field(default_factory=Inside)
    running_s: float | None = None  # None = it never ran
    off_s: float | None = None  # stopped, not ended
    ended_s: float | None = None
    is_preempted: bool = False
    is_free: bool = False
    reason: str = ""

    @property
    def status(self) -> NodeStatus:
        if self.ended_s is not None:
            return "gone"
        if self.off_s is not None:
            return "stopped"
        return "starting" if self.running_s is None else "running"

    def usd(self, now_s: float) -> Decimal:
        """What its vendor charges for it, up to now."""
        kind = self.kind
        end_s = now_s if self.ended_s is None else self.ended_s
        run_s = 0.0
        if self.running_s is not None:
            run_s = max(0.0, min(end_s, self.off_s or end_s) - self.running_s)
        held_s = end_s - self.created_s - run_s
        usd = kind.held_usd_per_hour * Decimal(held_s)
        if self.is_free:
            return (usd + kind.held_usd_per_hour * Decimal(run_s)) / 3600
        if run_s:
            billed_s = max(kind.minimum_s, math.ceil(run_s / kind.increment_s) * kind.increment_s)
            usd += self.usd_per_hour * billed_s
        return usd / 3600

    def view(self) -> NodeView:
        return NodeView(
            id=self.id,
            tag=self.tag,
            status=self.status,
            reason=self.reason,
            is_preempted=self.is_preempted,
            usd_per_hour=self.usd_per_hour,
            created_at=BEGIN + timedelta(seconds=self.created_s),
        )


class Vendor:
    """A Compute. `machines` are all that were ever rented."""

    def __init__(self, kind: Kind, world: World, faults: Faults, doors: Doors) -> None:
        self.kind, self._world, self._faults, self._doors = kind, world, faults, doors
        self.capabilities = kind.capabilities
        self.machines: dict[str, Machine] = {}
        self.by_tag: dict[str, list[Machine]] = {}
        self.away_until_s = 0.0
        self.troubled_s = -1.0  # when a list or an end last went wrong
        self.told_at_s = -1.0  # when somebody was last given a true list
        self.usd_per_hour = Decimal(round(faults.between(1.5, 4.0), 2)).quantize(Decimal("0.01"))
        self._last: tuple[float, list[NodeView]] = (-_STALE_S, [])
        self.asked: Callable[[Vendor, str, Decimal], None] = lambda vendor, tag, usd_per_hour: None
        self.ending: Callable[[Machine], None] = lambda machine: None
        self.make_inside: Callable[[Machine], Inside] = lambda machine: Inside()

    # As the market has it

    def offers(self) -> list[Offer]:
        """What it has now, at prices of now."""
        kind, faults = self.kind, self._faults
        price = self.usd_per_hour * Decimal(100 + round(faults.between(-30, 30))) / 100
        return [
            Offer(
                provider=kind.name,
                sku=f"{kind.sku}{number}" if kind.machines else kind.sku,
                gpu="H100",
                form_factor="SXM",
                gpu_count=1,
                vram_gib=80,
                market=kind.market,
                preemptible=kind.market == "spot",
                region=f"region-{number % 3}",
                machine_id=f"m{number}" if kind.machines else "",
                usd_per_hour=(price * (100 + number) / 100).quantize(Decimal("0.0001")),
                billing_increment_s=kind.increment_s,
                minimum_s=kind.minimum_s,
            )
            for number in range(12 if kind.machines else 3)
        ]

    def happen(self) -> None:
        """Once a tick: it may go away for minutes."""
        if self._world.now_s >= self.away_until_s and self._faults.happens("outage", self.kind.name):
            self.away_until_s = self._world.now_s + self._faults.between(60, 900)
        if self._world.now_s < self.away_until_s:
            self._faults.touched.add(self.kind.name)

    # Compute

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        name, faults = self.kind.name, self._faults
        self._doors.reach(f"{name} create", is_rare=True)
        self._world.advance(faults.between(0.5, 4))
        self.asked(self, tag, offer.usd_per_hour + self.kind.held_usd_per_hour)
        self._refuse_while_away("create")
        fault = faults.one_of("create: ", name)
        if fault == "no capacity":
            raise NoCapacity(name, "create", "none left")
        if fault == "quota":
            raise QuotaExceeded(name, "create", "1 of 1 nodes", region=offer.region)
        if fault == "busy":
            raise Transient(name, "create", "HTTP 429", retry_after_s=faults.rng.choice((None, 5, 90)))
        if fault == "away":
            raise Unreachable(name, "create", "connection refused")
        if fault == "refused":
            raise Refused(name, "create", "HTTP 400")
        if fault == "lost, not made":
            raise LaunchUncertain(name, "create", "no answer", tag=tag)
        machine = self._rent(offer, tag, late=fault.startswith("lost"))
        if fault.endswith("made twice") and not self.capabilities.idempotent_create:
            self._rent(offer, tag, late=faults.rng.random() < 0.5)
        self._doors.reach(f"{name} created", is_rare=True)
        if fault == "named, and lost":
            raise LaunchUncertain(name, "create", "no answer", tag=tag, ids=[machine.id])
        if fault.startswith("lost"):
            raise LaunchUncertain(name, "create", "no answer", tag=tag)
        return machine.id

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        name, faults, now_s = self.kind.name, self._faults, self._world.now_s
        self._doors.reach(f"{name} list")
        self._world.advance(faults.between(0.05, 0.4))
        self._refuse_while_away("list")
        fault = faults.one_of("list: ", name)
        if fault:
            self.troubled_s = now_s
        if fault == "busy":
            raise Transient(name, "list", "HTTP 500")
        if fault == "away":
            raise Unreachable(name, "list", "connection refused")
        if fault == "stale" and now_s - self._last[0] < _STALE_S:
            return list(self._last[1])
        views = [m.view() for m in self.machines.values() if self._is_listed(m)]
        self._last = (now_s, views)
        self.told_at_s = now_s
        if fault == "doubled":
            views = [*views, *views]
        self._doors.reach(f"{name} listed")
        return views

    def terminate(self, node_id: str, deadline_s: float) -> None:
        name, faults = self.kind.name, self._faults
        self._doors.reach(f"{name} end", is_rare=True)
        self._world.advance(faults.between(0.1, 1))
        self._refuse_while_away("end")
        fault = faults.one_of("end: ", name)
        if fault:
            self.troubled_s = self._world.now_s
        if fault == "busy":
            raise Transient(name, "end", "HTTP 500")
        if fault == "away":
            raise Unreachable(name, "end", "connection reset")
        machine = self.machines.get(node_id)
        if machine is not None and machine.ended_s is None:
            self.ending(machine)
            self.gone(machine, "ended by its user")
        self._doors.reach(f"{name} ended", is_rare=True)
        if fault:
            raise Transient(name, "end", "no answer")

    def restart(self, node_id: str, deadline_s: float) -> None:
        raise NotImplementedError

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        return None

    def connect(self, node: NodeView) -> NodeShell:
        """A way onto it, as SSH would be. Raises Unreachable."""
        self._doors.reach(f"{self.kind.name} connect")
        machine = self.machines[node.id]
        machine.inside.answer("connect")
        return NodeShell(machine.inside, self._world, self._faults, self._doors)

    # What becomes of its nodes

    def gone(self, machine: Machine, reason: str) -> None:
        """It bills no more."""
        machine.ended_s, machine.reason = self._world.now_s, reason
        machine.inside.power_off()

    def _refuse_while_away(self, operation: str) -> None:
        if self._world.now_s >= self.away_until_s:
            return
        self._faults.touched.add(self.kind.name)
        self.troubled_s = self._world.now_s
        if self._faults.rng.random() < 0.5:
            raise Unreachable(self.kind.name, operation, "connection refused")
        raise Transient(self.kind.name, operation, "HTTP 503")

    def _is_listed(self, machine: Machine) -> bool:
        now_s = self._world.now_s
        if now_s < machine.listed_s:
            return False
        ended_s = machine.ended_s
        return ended_s is None or (self.kind.name == "aws" and now_s - ended_s < _LISTED_AFTER_S)

    def _rent(self, offer: Offer, tag: str, *, late: bool) -> Machine:
        faults, kind, now_s = self._faults, self.kind, self._world.now_s
        twins = self.by_tag.setdefault(tag, [])
        if twins and self.capabilities.idempotent_create:
            return twins[0]
        listed_s = now_s
        if faults.happens("very late in lists", kind.name):
            listed_s += faults.between(240, 500)
        elif late or faults.happens("late in lists", kind.name):
            listed_s += faults.between(*kind.late_s)
        machine = Machine(
            id=f"{kind.name}-{len(self.machines) + 1}",
            tag=tag,
            kind=kind,
            usd_per_hour=offer.usd_per_hour + kind.held_usd_per_hour,
            machine_id=offer.machine_id,
            created_s=now_s,
            listed_s=listed_s,
        )
        machine.inside = self.make_inside(machine)
        self.machines[machine.id] = machine
        twins.append(machine)
        self._faults.told(f"{machine.id} is made for {tag}")
        if not faults.happens("never starts", kind.name):
            self._world.after(faults.between(*kind.boot_s), lambda: self._start(machine))
        return machine

    def _start(self, machine: Machine) -> None:
        if machine.ended_s is not None:
            return
        world, kind, faults = self._world, self.kind, self._faults
        machine.running_s = world.now_s
        machine.inside.power_on()
        if not faults.is_on:
            return
        if faults.happens("dies at once", kind.name):
            world.after(faults.between(5, 60), lambda: self._take(machine))
        elif faults.rng.random() < 0.9:
            life_s = faults.rng.expovariate(1 / kind.life_s)
            if faults.rng.random() < kind.notice_chance:
                world.after(life_s, lambda: self._give_notice(machine))
            else:
                world.after(life_s, lambda: self._take(machine))

    def _give_notice(self, machine: Machine) -> None:
        if machine.ended_s is None and self._faults.is_on:
            machine.inside.notice(self.kind.notice_s)
            self._world.after(self.kind.notice_s, lambda: self._take(machine))

    def _take(self, machine: Machine) -> None:
        """Back from its user; or on demand, the machine breaks."""
        if machine.ended_s is not None or not self._faults.is_on:
            return
        now_s, kind = self._world.now_s, self.kind
        self._faults.told(f"{machine.id} is taken back")
        if kind.capabilities.stop:
            machine.off_s, machine.is_preempted, machine.reason = now_s, True, "outbid"
            machine.inside.power_off()
            return
        if kind.market == "spot":
            machine.is_preempted = True
            run_s = now_s - (machine.running_s or now_s)
            machine.is_free = run_s < kind.capabilities.free_if_preempted_within_s
        self.gone(machine, "taken back" if machine.is_preempted else "its host failed")
