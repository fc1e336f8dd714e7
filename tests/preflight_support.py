"""A vendor whose machines are nodes of the test cloud: real processes behind real SSH, found by the supervisor."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from gpubroker.doors import Shell
from gpubroker.errors import Unreachable
from gpubroker.jobspec import job_from
from gpubroker.model import Offer
from gpubroker.prices.store import Store
from gpubroker.provider import Capabilities, NodeView, SshAddress
from gpubroker.run.launching import Candidate, Job
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from gpubroker.run.shell import connect, make_key
from gpubroker.run.supervise import Outcome, Supervisor
from gpubroker.testcloud.nodes import LocalNodes
from gpubroker.testcloud.world import HostTruth
from gpubroker.testing import FakeClock

PRIVATE, PUBLIC = make_key()
CONNECT_S = 1.5
_CALL_S = 5.0


def torch_folder() -> str | None:
    """Where a torch lies that a node's Python can import: this one's, or that of TORCH_PYTHON."""
    python = os.environ.get("TORCH_PYTHON", sys.executable)
    ask = "import sys, torch; print(sys.version_info[:2]); print(torch.__path__[0])"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return None
    theirs, place = found.stdout.splitlines()
    node = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
    own = subprocess.run(
        [node, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True, check=True
    )
    return str(Path(place).parent) if own.stdout.strip() == theirs else None


class Nodes:
    """Nodes of the test cloud, their servers in a thread of their own."""

    def __init__(self, root: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._nodes = LocalNodes(root)

    def start(self, name: str, truth: HostTruth, env: Mapping[str, str]) -> Any:
        """A node that takes the job's key."""
        return self._do(self._nodes.start(name, truth, [PUBLIC], env))

    def forget(self, name: str) -> None:
        """It is gone."""
        self._do(self._nodes.forget(name))

    def close(self) -> None:
        """All are gone."""
        self._do(self._nodes.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


@dataclass(frozen=True)
class Machine:
    """What is offered, and what it really has."""

    offer: Offer
    truth: HostTruth
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Vendor:
    """Rents its machines out; `homes` of the nodes by id, and their tags."""

    nodes: Nodes
    machines: Mapping[str, Machine]
    homes: dict[str, str] = field(default_factory=dict)
    open: dict[str, NodeView] = field(default_factory=dict)
    capabilities = Capabilities()

    def create(
        self, offer: Offer, spec: Any, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        machine = self.machines[offer.machine_id or offer.sku]
        node = self.nodes.start(tag, machine.truth, machine.env)
        address = SshAddress(host="127.0.0.1", port=node.ssh_port, username="root")
        self.homes[tag] = node.home
        self.open[tag] = NodeView(id=tag, tag=tag, status="running", ssh=address)
        return tag

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        return list(self.open.values())

    def terminate(self, node_id: str, deadline_s: float) -> None:
        if self.open.pop(node_id, None):
            self.nodes.forget(node_id)


@dataclass
class Trial:
    """One supervised job over one vendor's machines."""

    supervisor: Supervisor
    vendor: Vendor
    records: Records
    clock: FakeClock
    said: list[str]
    marker: Path  # the job writes the home of its node there

    def ran_in(self) -> list[str]:
        """The homes of the nodes where the user's code ran."""
        return self.marker.read_text().split() if self.marker.exists() else []

    def until(self, condition: Any, *, step_s: float = 10.0, most: int = 400) -> Outcome | None:
        """Tick, with so much simulated time in between, until it holds or the job is over."""
        for _ in range(most):
            outcome = self.supervisor.tick()
            if outcome is not None or condition():
                return outcome
            self.clock.advance(step_s)
        raise AssertionError(f"it did not come about: {self.said}")

    def attempts(self) -> list[Any]:
        return self.records.attempts(self.supervisor.job.id)


def database(template: Path, place: Path, clock: FakeClock) -> Store:
    """A migrated one: copying is faster than migrating."""
    if not template.exists():
        with Store.open(f"sqlite:///{template}", clock) as store:
            store.migrate()
    shutil.copyfile(template, place)
    return Store.open(f"sqlite:///{place}", clock)


@contextmanager
def trial(
    nodes: Nodes,
    folder: Path,
    machines: list[Machine],
    *,
    reach: tuple[str, ...],
    keys: StoreKeys | None = None,
    template: Path,
) -> Iterator[Trial]:
    """A supervisor whose job writes down where it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    work, marker, clock, said = folder / "job", folder / "ran-in", FakeClock(), list[str]()
    work.mkdir()
    with database(template, folder / "runs.db", clock) as store:
        records = Records(store.database, clock)
        vendor = Vendor(nodes, {m.offer.machine_id or m.offer.sku: m for m in machines})
        spec = job_from(
            {
                "command": f'echo "$HOME" >> {marker}',
                "gpu": {"name": ["h100"]},
                "work": {"hours": "1"},
                "limits": {},
            },
            clock.now(),
            "test",
        )
        computes: Any = {"cloud": vendor}
        job = Job(
            id=records.add_job("job", "{}"),
            spec=spec,
            folder=work,
            out=folder / "out",
            secrets={},
            store=keys,
            private_key=PRIVATE,
            public_key=PUBLIC,
            caps=Caps(usd_per_day=Decimal(1000)),
        )
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=Renting(records, computes, clock),
            computes=computes,
            candidates=lambda is_fresh: [
                Candidate(offer=m.offer, usd_per_hour=Decimal(2), bid_usd_per_hour=None, name=m.offer.sku)
                for m in machines
            ],
            connect=lambda *asked: _connect(clock, *asked),
            clock=clock,
            say=said.append,
            log=lambda attempt, data: None,
            reach=reach,
        )
        try:
            yield Trial(supervisor, vendor, records, clock, said, marker)
        finally:
            supervisor.close()
            for node_id in list(vendor.open):
                vendor.terminate(node_id, 10)


def _connect(
    clock: FakeClock, compute: Any, node: NodeView, key: str, host_key: str | None
) -> tuple[Shell, str | None]:
    """As `gpubroker run` does."""
    if node.ssh is None:
        raise Unreachable("node", "connect", "no address")
    shell = connect(node.ssh, key, host_key=host_key, deadline_s=CONNECT_S)
    return cast(Shell, _Timed(shell, clock)), shell.host_key


class _Timed:
    """Whose commands take a while, for which the node is paid."""

    def __init__(self, shell: Shell, clock: FakeClock) -> None:
        self._shell, self._clock = shell, clock

    def run(self, command: str, **more: Any) -> Any:
        self._clock.advance(_CALL_S)
        return self._shell.run(command, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shell, name)


class Bucket(ThreadingHTTPServer):
    """An S3-compatible store in memory, with what may be wrong with one: `fault` is a code, or "damaged"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Objects)
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fault = ""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A node that was ended in the middle is no error of ours."""

    @property
    def place(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.server_address[1]}"

    def store(self) -> StoreKeys:
        """As a job has it."""
        return StoreKeys(
            where="s3://bucket/jobs",
            endpoint=f"http://{self.place}",
            access_key="for-this-job",
            secret_key="hush",
        )


class _Objects(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_let_in():
            self.server.objects[self.path] = body
            self._send(200, b"")

    def do_GET(self) -> None:
        if self._is_let_in():
            found = self.server.objects.get(self.path)
            if found is None and "list-type" not in self.path:
                self._refuse(404, "NoSuchKey")
            else:
                self._send(200, (found or b"")[:: -1 if self.server.fault == "damaged" else 1])

    def do_DELETE(self) -> None:
        if self._is_let_in():
            self.server.objects.pop(self.path, None)
            self._send(200, b"")

    def _is_let_in(self) -> bool:
        self.server.asked.append(f"{self.command} {self.path}")
        code = self.server.fault
        if code and code != "damaged":
            self._refuse(403, code)
            return False
        return True

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code></Error>".encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""
