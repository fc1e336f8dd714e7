"""What a node answers to the commands of run/on_node.py, and what runs on it in virtual time.

    payload.tar -> config.json -> agent -> claims its epoch in the store -> the program, from the newest save
    save -> published by its epoch        result -> waits for the supervisor, or ends the node

The lease is the real one (gpubroker/node/lease.py); agent and store keep the rules of agent.py and generations.py.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpubroker.doors import Ran
from gpubroker.errors import Transient, Unreachable
from gpubroker.node.lease import Lease, Terms
from tests.sim.clock import World
from tests.sim.faults import Broken, Doors, Faults

_CARD = {
    "index": 0,
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-0",
    "driver": "570.86.15",
    "memory": "81559",
    "memory_mib": 81559,
    "used_mib": 0,
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
    "clocks_throttle_reasons.active": "0x0000000000000001",
    "power.limit": "700.00",
    "power.default_limit": "700.00",
    "compute_cap": "9.0",
    "mig.mode.current": "Disabled",
    "persistence_mode": "Enabled",
}
_HEALTHY = {
    "version": 2,
    "smi_error": None,
    "words": "",
    "gpus": [_CARD],
    "processes_error": None,
    "processes": [],
    "cuda": {
        "error": 0,
        "text": "",
        "version": 12080,
        "devices": [{"index": 0, "name": _CARD["name"], "total_mib": 81079, "copy_gb_s": 25.3}],
    },
    "torch": {
        "version": "2.13.0",
        "has_nccl": True,
        "devices": [
            {
                "index": 0,
                "kind": "bf16",
                "matrix": 8192,
                "tflops": 700.0,
                "product_error": 0.002,
                "forward_difference": 1e-6,
            }
        ],
    },
    "group": None,
    "disk": {"free_gb": 500.0, "write_mb_s": 900.0},
    "network": {"reached": "pypi.org:443", "errors": {}},
    "store": None,
}
HEALTHY = json.dumps(_HEALTHY).encode()
LYING = json.dumps({**_HEALTHY, "gpus": [{**_CARD, "name": "NVIDIA GeForce RTX 3060"}]}).encode()
STORE = json.dumps({"store": {"write_mb_s": 120.0, "read_mb_s": 200.0}}).encode()
# A job that is stopped saves first, and is struck down if it takes too long.
_FINISH_S = 2.0


class Store:
    """What all nodes publish into, by the rules of generations.py: claims fence, readers take the newest.

    There a late node is refused and stops. Here nobody may be late, for a node is known to be gone before the
    next one is asked for: whoever is refused breaks what must hold.
    """

    def __init__(self) -> None:
        self._claims: dict[str, tuple[int, str]] = {}  # job: the highest epoch, and whose it is
        self._saves: dict[str, tuple[int, int, float]] = {}  # job: epoch, number, progress of the newest

    def claim(self, job: str, epoch: int, owner: str) -> None:
        highest, whose = self._claims.get(job, (0, ""))
        if (highest, whose) != (epoch, owner) and highest >= epoch:
            raise Broken(f"{owner} begins {job} with epoch {epoch}, and {whose} has {highest}")
        self._claims[job] = (epoch, owner)

    def publish(self, job: str, epoch: int, owner: str, progress_s: float) -> int:
        if self._claims[job] != (epoch, owner):
            raise Broken(f"{owner} publishes {job} by epoch {epoch}, and {self._claims[job]} has claimed it")
        before, number, _ = self._saves.get(job, (0, 0, 0.0))
        number = number + 1 if before == epoch else 1
        self._saves[job] = (epoch, number, progress_s)
        return number

    def newest_s(self, job: str) -> float:
        """Progress of the save that a new attempt goes on from."""
        return self._saves.get(job, (0, 0, 0.0))[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a job does, however often it is begun. Fails for good, or asks for other nodes at first."""

    work_s: float
    save_every_s: float
    saving_s: float
    fails_at_s: float | None = None  # of its work; None = it does not
    retries: int = 0  # so many attempts end with 75


@dataclass(kw_only=True)
class Run:
    """The agent's and its program's state in a job's folder."""

    config: dict[str, Any]
    owner: str
    lease: Lease
    began_s: float = 0.0
    progress_s: float = 0.0  # when it began
    saved_s: float = 0.0  # progress of what is in the store
    unpublished_s: float | None = None  # a save that no agent has seen yet
    has_agent: bool = True
    is_alive: bool = False  # the program
    exit_code: int | None = None
    stopping: tuple[str, str] | None = None
    result: dict[str, Any] | None = None
    is_seen: bool = False  # somebody was told the result
    made: list[dict[str, Any]] = field(default_factory=list)


class Inside:
    """One node, seen from within."""

    def __init__(self, **parts: Any) -> None:
        self.id = ""
        self.world: World
        self.faults: Faults
        self.store: Store
        self.program_of: Callable[[str], Program]
        self.begins: Callable[[Inside], None] = lambda inside: None
        self.end_itself: Callable[[], None] | None = None
        self.lies = False
        self.is_on = False
        self.silent_until_s = 0.0
        self.answered_s: float | None = None
        self.run: Run | None = None
        self.unpacked: dict[str, Any] | None = None
        self.sent: dict[str, Any] | None = None
        for name, part in parts.items():
            setattr(self, name, part)

    # Power

    def power_on(self) -> None:
        self.is_on = True
        self.answered_s = self.world.now_s
        faults = self.faults
        if not faults.is_on or faults.rng.random() > 0.35:
            return
        kind = faults.rng.random()
        at_s = faults.between(30, 1500)
        if kind < 0.4:
            self.world.after(at_s, lambda: self._fall_silent(faults.between(60, 480)))
        elif kind < 0.5:
            self.world.after(at_s, lambda: self._fall_silent(1e9))
        else:
            self.world.after(at_s, self._lose_agent)

    def power_off(self) -> None:
        self.is_on = False
        if self.run is not None:
            self.run.is_alive = self.run.has_agent = False

    def _fall_silent(self, for_s: float) -> None:
        if self.is_on and self.faults.is_on:
            self.faults.told(f"{self.id} is silent for {for_s:.0f} s")
            self.silent_until_s = self.world.now_s + for_s

    def _lose_agent(self) -> None:
        if self.run is not None and self.run.has_agent and self.is_on and self.faults.is_on:
            self.faults.told(f"{self.id} loses its agent")
            self.run.has_agent = False

    def answer(self, what: str) -> None:
        """Raises Unreachable."""
        if not self.is_on or self.world.now_s < self.silent_until_s:
            raise Unreachable("node", what, "no route to host")

    @property
    def is_at_work(self) -> bool:
        return self.run is not None and self.run.is_alive

    # Commands

    def do(self, command: str) -> bytes:
        """What it prints. The commands are those of run/on_node.py, and no others."""
        if "-m gpubroker.node.preflight" in command:
            self.world.advance(self.faults.between(2, 12))
            return STORE if "--store" in command else LYING if self.lies else HEALTHY
        if "tar -xf payload.tar" in command:
            if self.sent is not None:
                self.unpacked, self.sent = self.sent, None
            return self._start()
        if " start config.json" in command:
            return self._start()
        if " look config.json" in command:
            return self._look()
        if " stop config.json" in command:
            return self._stop()
        if command.startswith("for p in "):
            return b"file\n" * command.split(";", maxsplit=1)[0].count("~/")
        raise AssertionError(f"the node does not know this command: {command}")

    def take(self, tar: Path) -> None:
        """The payload has arrived."""
        with tarfile.open(tar) as packed:
            file = packed.extractfile("config.json")
            assert file is not None
            self.sent = json.load(io.TextIOWrapper(file))

    def _start(self) -> bytes:
        if self.unpacked is None:
            return b'{"error": "config.json: no such file"}'
        config, now_s, run = self.unpacked, self.world.now_s, self.run
        if run is not None and run.config["epoch"] == config["epoch"]:
            if run.result is not None:
                return b'{"state": "finished"}'
            if not run.has_agent:
                run.has_agent = True
                self.faults.told(f"{self.id} has an agent again")
                self._publish_what_is_left(run)
                self._watch_lease(run)
                if run.exit_code is not None:  # it ended while nobody looked
                    self._hear_exit(run, run.exit_code)
            return b'{"state": "adopted"}'
        terms = Terms(config["max_s"], config["max_usd"], config["usd_per_hour"], config["renew_within_s"])
        lease = Lease(terms, now_s, config["spent_s"])
        self.run = run = Run(config=config, owner=f"{self.id}@{now_s}", lease=lease)
        self.begins(self)
        self._begin(run)
        return b'{"state": "started"}'

    def _begin(self, run: Run) -> None:
        job, epoch = run.config["job"], run.config["epoch"]
        self.store.claim(job, epoch, run.owner)
        run.began_s, run.is_alive = self.world.now_s, True
        run.progress_s = run.saved_s = self.store.newest_s(job)
        self.faults.told(f"{self.id} runs {job} from {run.progress_s:.0f} s on, epoch {epoch}")
        program = self.program_of(job)
        if run.config["attempt"] <= program.retries:
            self.world.after(20, lambda: self._exit(run, 75))
        elif program.fails_at_s is not None:
            self.world.after(max(1, program.fails_at_s - run.progress_s), lambda: self._exit(run, 1))
        else:
            self.world.after(max(1, program.work_s - run.progress_s), lambda: self._exit(run, 0))
        self.world.after(program.save_every_s, lambda: self._save(run))
        self._watch_lease(run)

    def progress_s(self, run: Run) -> float:
        return run.progress_s + self.world.now_s - run.began_s

    def _save(self, run: Run) -> None:
        if not run.is_alive:
            return
        run.unpublished_s = self.progress_s(run)
        self._publish_what_is_left(run)
        every_s = self.program_of(run.config["job"]).save_every_s
        self.world.after(every_s, lambda: self._save(run))

    def _publish_what_is_left(self, run: Run) -> None:
        if run.unpublished_s is None or not run.has_agent or run.config.get("store") is None:
            return
        job, epoch = run.config["job"], run.config["epoch"]
        number = self.store.publish(job, epoch, run.owner, run.unpublished_s)
        run.saved_s, run.unpublished_s = run.unpublished_s, None
        made = {"epoch": epoch, "number": number, "name": f"step-{number}", "step": number, "bytes": 1000}
        run.made = [*run.made, {**made, "published_s": int(self.world.now_s)}][-3:]

    def _exit(self, run: Run, code: int) -> None:
        if not run.is_alive:
            return
        if code == 0:
            run.unpublished_s = self.progress_s(run)
        run.is_alive, run.exit_code = False, code
        if run.has_agent:
            self._hear_exit(run, code)

    def _hear_exit(self, run: Run, code: int) -> None:
        self._publish_what_is_left(run)
        outcome = run.config["exit_codes"].get(str(code), "failed" if code else "done")
        self._finish(run, outcome, f"exit code {code}")

    def _finish(self, run: Run, outcome: str, reason: str) -> None:
        if run.result is None:
            self.faults.told(f"{self.id}: {outcome}: {reason}")
            run.result = {"version": 1, "outcome": outcome, "reason": reason, "epoch": run.config["epoch"]}
            if outcome == "lease_ended":
                self._end_itself(run)

    # Stopping

    def notice(self, seconds: float) -> None:
        """Its vendor takes it soon: it saves at once, and stops in time."""
        run = self.run
        if run is None or not run.is_alive or not run.has_agent:
            return
        saving_s = self.program_of(run.config["job"]).saving_s
        self.world.after(min(saving_s, seconds / 2), lambda: self._save_now(run))
        self.world.after(seconds - 10, lambda: self._strike(run, "preempted", "notice by aws"))

    def _save_now(self, run: Run) -> None:
        if run.is_alive:
            run.unpublished_s = self.progress_s(run)
            self._publish_what_is_left(run)

    def _strike(self, run: Run, outcome: str, reason: str) -> None:
        if run.is_alive and run.has_agent:
            run.is_alive = False
            self._finish(run, outcome, reason)

    def _stop(self) -> bytes:
        if self.run is not None and self.run.result is None and self.run.has_agent:
            self._begin_stop(self.run, "stopped", "asked to")
        return b'{"stop": "asked", "agent": true}'

    def _begin_stop(self, run: Run, outcome: str, reason: str) -> None:
        if run.stopping is None and run.result is None:
            run.stopping = (outcome, reason)
            saving_s = self.program_of(run.config["job"]).saving_s
            self.world.after(saving_s, lambda: self._save_now(run))
            self.world.after(saving_s + _FINISH_S, lambda: self._strike(run, outcome, reason))

    def _watch_lease(self, run: Run) -> None:
        """Due when it ends, unless it was renewed meanwhile."""
        ends = run.lease.ends_s()
        if not self.is_on or self.run is not run or not run.has_agent or ends is None:
            return
        left_s = ends[0] - self.world.now_s
        if left_s > 0:
            self.world.after(left_s, lambda: self._watch_lease(run))
        elif run.result is None:
            self._begin_stop(run, "lease_ended", ends[1])
        else:
            self._end_itself(run)

    def _end_itself(self, run: Run) -> None:
        if run.config.get("end") is not None and self.end_itself is not None and self.is_on:
            self.faults.told(f"{self.id} ends itself")
            self.end_itself()

    # Telling

    def _look(self) -> bytes:
        if self.unpacked is None:
            return b"null\n"
        run, now_s = self.run, self.world.now_s
        if run is None or run.config["epoch"] != self.unpacked["epoch"]:
            return b'{"state": "unknown", "agent": false, "result": null}\n'
        run.lease.renew(now_s)
        run.is_seen = run.is_seen or run.result is not None
        state = {
            "version": 1,
            "job": run.config["job"],
            "epoch": run.config["epoch"],
            "state": "running" if run.is_alive else "finished",
            "pid": 7,
            "agent": run.has_agent,
            "made": run.made,
            "unsaved_s": max(0.0, self.progress_s(run) - run.saved_s) if run.is_alive else 0.0,
            "rejected": [],
            "problems": [],
            "result": run.result,
        }
        return json.dumps(state).encode() + b"\n"


class NodeShell:
    """The product's Shell onto a node."""

    def __init__(self, inside: Inside, world: World, faults: Faults, doors: Doors) -> None:
        self._inside, self._world, self._faults, self._doors = inside, world, faults, doors
        self._vendor = inside.id.partition("-")[0]

    def run(self, command: str, *, stdin: bytes = b"", deadline_s: float) -> Ran:
        is_rare = " look " not in command
        fault = self._before("run", is_rare=is_rare)
        if fault == "cut off":
            return Ran(status=None)
        printed = self._inside.do(command)
        self._inside.answer("run")  # it may have gone meanwhile
        self._after(fault, "run", is_rare=is_rare)
        return Ran(status=0, stdout=printed)

    def put(self, local: Path, remote: str, *, deadline_s: float) -> None:
        fault = self._before("put", is_rare=True)
        if fault == "cut off":
            raise Transient("node", "put", "cut off")
        self._inside.take(local)
        self._after(fault, "put", is_rare=True)

    def get(self, remote: str, local: Path, *, deadline_s: float) -> None:
        fault = self._before("get", is_rare=True)
        if fault == "cut off":
            raise Transient("node", "get", "cut off")
        self._after(fault, "get", is_rare=True)

    def close(self) -> None:
        pass

    def _before(self, what: str, *, is_rare: bool) -> str:
        self._doors.reach(f"node {what}", is_rare=is_rare)
        self._world.advance(0.05)
        self._inside.answer(what)
        fault = self._faults.one_of("shell: ", self._vendor)
        if fault == "refused":
            raise Unreachable("node", what, "connection refused")
        return fault

    def _after(self, fault: str, what: str, *, is_rare: bool) -> None:
        answered_s = self._world.now_s
        self._doors.reach(f"node {what} done", is_rare=is_rare)
        if fault == "done, but lost":
            raise Unreachable("node", what, "connection lost")
        self._inside.answered_s = max(answered_s, self._inside.answered_s or 0.0)
