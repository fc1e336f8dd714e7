"""What exists in the test cloud: hosts with what they list and what they really have, prices over time,
rentals and everything that happened to them.

Knows nothing of HTTP: the vendors' files translate. Knows nothing of processes: it calls a NodeHost.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, Protocol

from gpubroker.testcloud.clock import SimClock
from gpubroker.testcloud.faults import FaultScript
from gpubroker.testcloud.publishing import Publication, Publishing

Vendor = Literal["vast", "runpod", "lambda", "aws", "modal"]
Market = Literal["spot", "on_demand", "serverless"]
# pending: being made, not billed for compute yet. stopped: processes gone, disk kept. ended: gone.
State = Literal["pending", "running", "stopped", "ended"]
_STEP_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTruth:
    """What a host really has, which may differ from what it lists."""

    gpu_name: str  # as nvidia-smi prints it
    gpu_count: int
    memory_mib: int  # per GPU
    driver: str = "570.86.15"
    ecc_errors: int = 0  # uncorrected, volatile
    foreign_process_mib: int = 0  # memory that another tenant's process holds
    bf16_tflops: float = 200.0  # what a matrix product reaches; far below the card's own = held back
    cuda_error: int = 0  # what cuInit answers; 802 = system not yet initialised
    lost_gpus: int = 0  # of gpu_count: fallen off the bus; nvidia-smi has words for them, CUDA nothing
    pcie_lanes: int = 16  # of each GPU, of generation 3; 1 = behind a riser
    disk_free_gb: int = 500  # 0: writing fails; any other amount is only what `df` says
    # nodes_network.py; no_egress: SSH works, and nothing that runs there can connect to anybody
    network: Literal["ok", "slow", "no_egress", "dead"] = "ok"
    ssh: Literal["ok", "slow", "never"] = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One thing a vendor can rent out: a vast machine, an instance type in a zone, a GPU type in a cloud."""

    id: str  # unique within its vendor
    vendor: Vendor
    sku: str  # the vendor's name for it
    gpu: str  # canonical
    form_factor: str
    gpu_count: int
    vram_gib: int
    region: str
    zone: str = ""
    usd_per_hour: Decimal  # on demand (or the one price), for all of it
    spot_usd_per_hour: Decimal | None = None  # the usual spot price; None = no spot market
    capacity: int = 1  # how many rentals fit at once
    truth: HostTruth
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the vendor's listing says


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a rental; the bill is computed from these alone.

    kind: created, running, stopped, ended, rate (usd_per_hour changed), transfer (bytes_in, bytes_out).
    """

    at_s: float
    kind: Literal["created", "running", "stopped", "ended", "rate", "transfer"]
    usd_per_hour: Decimal | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Rental:
    """One node somebody rents."""

    id: str
    host: Host
    market: Market
    tag: str  # label, name or client token: what its renter finds it by
    usd_per_hour: Decimal
    disk_gb: int
    state: State = "pending"
    since_s: float = 0.0  # when it came into this state
    reason: str = ""  # why it is in this state, in the vendor's own code where there is one
    wish: dict[str, Any] = field(default_factory=dict)  # what the create call asked for, as it was
    events: list[Event] = field(default_factory=list)
    node: Node | None = None
    published_by: str = ""  # the attempt that last published a checkpoint from here
    published: list[Publication] = field(default_factory=list)  # those that were seen, the last one last
    # Starting and killing its node take turns: what is stopped while it starts dies when it has started.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    @property
    def vendor(self) -> Vendor:
        """Whose it is."""
        return self.host.vendor

    def state_at(self, at_s: float) -> State:
        """Its state at a moment, by what had happened until then."""
        state: State = "pending"
        for event in self.events:
            if event.at_s > at_s:
                break
            if event.kind in ("running", "stopped", "ended"):
                state = event.kind
        return state


class Node(Protocol):
    """A running node: processes, a home and an SSH server. Made by a NodeHost."""

    ssh_port: int
    ssh_sessions: int  # channels for a shell, a command or files, since it began
    home: str

    @property
    def relayed(self) -> Collection[tuple[str, int]]:
        """Our own ends of connections that the test cloud makes for its processes, on a slow network."""

    async def run(self, argv: list[str], env: Mapping[str, str]) -> tuple[int, bytes, bytes]:
        """Run a command on it, as a vendor without SSH does; exit status, output, errors."""

    async def notice(self, signal_number: int) -> None:
        """Send a signal to what runs there."""

    def show_load(self, percent: int | None) -> None:
        """What its nvidia-smi says of the GPUs' use from now on; None = what a job there uses."""

    async def kill(self) -> None:
        """Everything that runs there is gone when this returns; its home stays."""


class NodeHost(Protocol):
    """Where nodes run."""

    async def start(
        self, rental_id: str, truth: HostTruth, authorized_keys: Iterable[str], env: Mapping[str, str]
    ) -> Node:
        """A node for a rental; starting it again after `kill` finds the same home."""

    async def forget(self, rental_id: str) -> None:
        """The rental has ended: its home goes too."""


class World:
    """All of it, in one event loop. `on_tick` hears the time about twenty times a real second."""

    def __init__(self, clock: SimClock, nodes: NodeHost, *, seed: int = 0) -> None:
        self.clock = clock
        self.nodes = nodes
        self.seed = seed
        self.faults = FaultScript()
        self.hosts: dict[tuple[Vendor, str], Host] = {}
        self.rentals: dict[str, Rental] = {}
        self.series: dict[tuple[Vendor, str], PriceSeries] = {}
        self.on_tick: list[Callable[[float], Any]] = []
        self.publishing = Publishing(self)

    def add_host(self, host: Host) -> None:
        """Put a host on the market, with a price series of its own."""
        self.hosts[host.vendor, host.id] = host
        if host.spot_usd_per_hour is not None:
            self.series[host.vendor, host.id] = PriceSeries(self.seed, host)

    def free(self, host: Host) -> int:
        """How many more rentals fit."""
        taken = sum(r.host is host and r.state in ("pending", "running") for r in self.rentals.values())
        return host.capacity - taken

    def spot_price(self, host: Host) -> Decimal:
        """What spot costs on this host now; for vast the lowest bid that runs."""
        return self.series[host.vendor, host.id].price_at(self.clock.now_s())

    def spot_available(self, host: Host) -> bool:
        """Whether spot can be had and kept on this host now."""
        return self.series[host.vendor, host.id].available_at(self.clock.now_s())

    def create(
        self,
        host: Host,
        market: Market,
        *,
        rental_id: str,
        tag: str,
        usd_per_hour: Decimal,
        disk_gb: int = 0,
        wish: Mapping[str, Any] | None = None,
        state: State = "pending",
        reason: str = "",
    ) -> Rental:
        """Record a new rental. Its node is started by `boot`."""
        rental = Rental(
            id=rental_id,
            host=host,
            market=market,
            tag=tag,
            usd_per_hour=usd_per_hour,
            disk_gb=disk_gb,
            wish=dict(wish or {}),
        )
        self.rentals[rental_id] = rental
        self.record(rental, "created", usd_per_hour=usd_per_hour)
        self._enter(rental, state, reason)
        return rental

    async def boot(
        self, rental: Rental, authorized_keys: Iterable[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start the node; running from when it is there, unless the rental has gone on meanwhile."""
        async with rental.turn:
            if rental.state != "pending" or rental.node is not None:
                return
            before = len(rental.events)
            node = await self.nodes.start(rental.id, rental.host.truth, authorized_keys, env or {})
            if any(event.kind in ("stopped", "ended") for event in rental.events[before:]):
                await node.kill()
                return
            rental.node = node
            self.record(rental, "running")
            self._enter(rental, "running", "")

    def reprice(self, rental: Rental, usd_per_hour: Decimal) -> None:
        """From now on it costs this."""
        rental.usd_per_hour = usd_per_hour
        self.record(rental, "rate", usd_per_hour=usd_per_hour)

    def resume(self, rental: Rental) -> None:
        """A stopped rental is to run again; `boot` starts its node, which finds its home as it was."""
        if rental.state == "stopped":
            self._enter(rental, "pending", "")

    async def restart(
        self, rental: Rental, authorized_keys: Iterable[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Its processes die and it comes up anew; it stays running, and is billed on."""
        async with rental.turn:
            node, rental.node = rental.node, None
            if node is None:
                return
            await node.kill()
            node = await self.nodes.start(rental.id, rental.host.truth, authorized_keys, env or {})
            if rental.state == "running":
                rental.node = node
            else:
                await node.kill()

    async def stop(self, rental: Rental, reason: str) -> None:
        """Processes die at once, the disk stays."""
        if rental.state in ("stopped", "ended"):
            return
        self.record(rental, "stopped", reason=reason)
        self._enter(rental, "stopped", reason)
        await self._kill_node(rental)

    async def end(self, rental: Rental, reason: str) -> None:
        """All of it is gone."""
        if rental.state == "ended":
            return
        self.record(rental, "ended", reason=reason)
        self._enter(rental, "ended", reason)
        await self._kill_node(rental)
        await self.nodes.forget(rental.id)

    def record(self, rental: Rental, kind: Any, **values: Any) -> None:
        """Append an event at this moment."""
        rental.events.append(Event(at_s=self.clock.now_s(), kind=kind, **values))

    def tick(self) -> None:
        """Let everybody who watches the market look at the time."""
        now_s = self.clock.now_s()
        for hear in list(self.on_tick):
            hear(now_s)

    def _enter(self, rental: Rental, state: State, reason: str) -> None:
        rental.state, rental.since_s, rental.reason = state, self.clock.now_s(), reason

    async def _kill_node(self, rental: Rental) -> None:
        async with rental.turn:
            node, rental.node = rental.node, None
            if node is not None:
                await node.kill()
                self.publishing.unmounted(rental)


class PriceSeries:
    """A host's spot price and availability over time, in steps of five minutes: by seed, or by a trace."""

    def __init__(self, seed: int, host: Host) -> None:
        self._usual = host.spot_usd_per_hour or host.usd_per_hour
        self._ceiling = host.usd_per_hour
        self._key = f"{seed}/{host.vendor}/{host.id}"
        self._trace: list[tuple[bool, Decimal | None]] = []
        self._trace_step_s = _STEP_S
        self._trace_start_s = 0.0

    def follow(self, steps: list[tuple[bool, Decimal | None]], step_s: int, start_s: float) -> None:
        """From `start_s` on replay a trace: (available, price or None for the usual one); it repeats."""
        self._trace, self._trace_step_s, self._trace_start_s = steps, step_s, start_s

    def price_at(self, at_s: float) -> Decimal:
        """USD per hour, to the tenth of a cent, never above on demand."""
        if self._trace:
            price = self._step(at_s)[1]
            return self._usual if price is None else price
        factor = Decimal(_noise(self._key, int(at_s // _STEP_S)).uniform(0.85, 1.25))
        return min(self._ceiling, (self._usual * factor).quantize(Decimal("0.001")))

    def available_at(self, at_s: float) -> bool:
        """By the trace; without one, nine steps in ten."""
        if self._trace:
            return self._step(at_s)[0]
        return _noise(f"{self._key}/up", int(at_s // _STEP_S)).random() < 0.9

    def step_start_s(self, at_s: float) -> float:
        """When the step began that this moment is in: price and availability are the same since then."""
        if self._trace:
            return at_s - (at_s - self._trace_start_s) % self._trace_step_s
        return at_s - at_s % _STEP_S

    def _step(self, at_s: float) -> tuple[bool, Decimal | None]:
        index = int((at_s - self._trace_start_s) // self._trace_step_s)
        return self._trace[index % len(self._trace)]


def _noise(key: str, step: int) -> random.Random:
    digest = hashlib.sha256(f"{key}/{step}".encode()).digest()
    return random.Random(digest)


def new_id(prefix: str = "", digits: int = 0) -> str:
    """A fresh id: hexadecimal, or a number with so many digits."""
    value = uuid.uuid4()
    return f"{prefix}{value.int % 10**digits:0{digits}d}" if digits else f"{prefix}{value.hex}"
