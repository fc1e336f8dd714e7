"""A thousand nodes at three vendors that only answer, for supervise_many.py; and bare looks at them.

    serve NODES                            lists by HTTP, looks by SSH; one JSON line when it is up
    look PORT COUNT LOOKS_PER_S SECONDS    the share of a core that they cost

Lists are the vendors' rows of tests/payloads with our ids and tags. All nodes are behind one SSH port: which
one is meant stands in the command. An agent has always just begun, and publishes every ten minutes.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
from aiohttp import web

from gpubroker.doors import Ran, Shell
from gpubroker.run.on_node import OnNode

HOST = "127.0.0.1"
PAGE = 25  # of vast's list; the others tell all at once
_PAYLOADS = Path(__file__).parents[1] / "tests" / "payloads"
_JOB = re.compile(r"gpubroker/([a-z0-9-]+)")
_LOG = b"step 12000: loss 2.1034, 38211 tokens/s, 71.2% of the run\n"
_PUBLISHED_EVERY_S = 600
_AT_ONCE = 20  # connections that are being made


class Nodes:
    """What is asked is counted. `told`: {vendor: [(node id, tag)]}."""

    def __init__(self, told: Mapping[str, list[list[str]]]) -> None:
        self._told = told
        self.lists, self.calls = Counter[str](), Counter[str]()
        self.most_calls: dict[str, int] = {}  # for one list
        self._calls_now = Counter[str]()
        self.looks = Counter[str]()  # by job
        self.port = 0  # of SSH

    def app(self) -> web.Application:
        """The vendors' lists, and what was counted."""
        app = web.Application()
        app.router.add_get("/runpod/v2/pods", self._runpod)
        app.router.add_get("/lambda/api/v1/instances", self._lambda)
        app.router.add_get("/vast/api/v1/instances/", self._vast)
        app.router.add_get("/counts", self._counts)
        app.router.add_route("*", "/{vendor}/{rest:.*}", self._other)
        return app

    async def _counts(self, request: web.Request) -> web.Response:
        looks = {"looks": self.looks.total(), "looked_at": len(self.looks)}
        calls = {"calls": self.calls, "most_calls": self.most_calls}
        return web.json_response({"lists": self.lists, **calls, **looks})

    async def _other(self, request: web.Request) -> web.Response:
        self.calls["other"] += 1
        return web.json_response({}, status=404)

    def _count(self, vendor: str, *, is_first: bool, is_last: bool) -> None:
        """One call of a list."""
        self.calls[vendor] += 1
        self._calls_now[vendor] = 1 if is_first else self._calls_now[vendor] + 1
        self.most_calls[vendor] = max(self.most_calls.get(vendor, 0), self._calls_now[vendor])
        self.lists[vendor] += is_last

    async def _runpod(self, request: web.Request) -> web.Response:
        self._count("runpod", is_first=True, is_last=True)
        row = _row("runpod/pods_synthetic.json", "pods", "gpubroker-running")
        row["ssh"]["direct"] |= {"host": HOST, "port": self.port}
        pods = [{**row, "id": node, "name": tag} for node, tag in self._told["runpod"]]
        return web.json_response({"pods": pods})

    async def _lambda(self, request: web.Request) -> web.Response:
        self._count("lambda", is_first=True, is_last=True)
        row = _row("lambda/nodes_synthetic.json", "data", "gpubroker-active") | {"ip": HOST}
        data = [
            {**row, "id": node, "name": tag, "tags": [{"key": "gpubroker-tag", "value": tag}]}
            for node, tag in self._told["lambda"]
        ]
        return web.json_response({"data": data})

    async def _vast(self, request: web.Request) -> web.Response:
        nodes, at = self._told["vast"], int(request.query.get("after_token", 0))
        row = _row("vast/instances_synthetic.json", "instances", "gpubroker-running")
        row |= {"public_ipaddr": HOST, "ports": {"22/tcp": [{"HostIp": HOST, "HostPort": str(self.port)}]}}
        page = [{**row, "id": int(node), "label": tag} for node, tag in nodes[at : at + PAGE]]
        token = str(at + PAGE) if at + PAGE < len(nodes) else None
        self._count("vast", is_first=at == 0, is_last=token is None)
        return web.json_response({"success": True, "instances": page, "next_token": token})

    async def run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Answer one command."""
        command = process.command or ""
        job = _JOB.search(command)
        if job is None or " look " not in command:
            process.exit(127)
            return
        self.looks[job[1]] += 1
        process.stdout.write(json.dumps(_state(job[1], time.time())).encode() + b"\n" + _LOG)  # noqa: TID251
        process.exit(0)


def _row(payload: str, key: str, tag: str) -> dict[str, Any]:
    rows = json.loads((_PAYLOADS / payload).read_text())[key]
    return dict(next(row for row in rows if tag in (row.get("name"), row.get("label"))))


def _state(job: str, now_s: float) -> dict[str, Any]:
    """As its agent would tell it. Jobs do not all publish at the same moment."""
    number, since_s = divmod(now_s + hash(job) % _PUBLISHED_EVERY_S, _PUBLISHED_EVERY_S)
    made = {
        "epoch": 1,
        "number": int(number),
        "name": f"step-{int(number)}",
        "step": int(number),
        "bytes": 5 << 30,
        "published_s": int(now_s - since_s),
    }
    return {
        "version": 1,
        "job": job,
        "epoch": 1,
        "attempt": 1,
        "node": "gpubroker",
        "state": "running",
        "agent_pid": 100,
        "pid": 101,
        "at": int(now_s),
        "seconds": 3600.0,
        "usd": "1.250000",
        "lease_left_s": 1800.0,
        "notice": None,
        "newest": made,
        "made": [made],
        "unsaved_s": round(since_s, 3),
        "gpu_idle_s": 0.0,
        "rejected": [],
        "problems": [],
        "agent": True,
        "result": None,
    }


class _LetIn(asyncssh.SSHServer):
    """Whoever has a key."""

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return True


async def serve(told: Mapping[str, list[list[str]]]) -> None:
    """Until standard input closes."""
    nodes = Nodes(told)
    ssh = await asyncssh.listen(
        HOST,
        0,
        server_factory=_LetIn,
        process_factory=nodes.run,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        encoding=None,
        backlog=1024,
        login_timeout=0,
    )
    nodes.port = ssh.get_port()
    runner = web.AppRunner(nodes.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    print(json.dumps({"url": f"http://{HOST}:{runner.addresses[0][1]}", "ssh_port": nodes.port}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    ssh.close()
    await runner.cleanup()


class _Words(Shell):
    """Hears which command a look is."""

    command = ""

    def run(self, command: str, *, stdin: bytes = b"", deadline_s: float) -> Ran:
        self.command = command
        return Ran(status=0, stdout=b"null\n")


async def look(port: int, count: int, looks_per_s: float, seconds: float) -> float:
    """The share of a core of so many connections and so many looks a second, by asyncssh and nothing else."""
    words = _Words()
    OnNode(words, "bare").look(0)
    async with _connected(port, count) as connections:
        begun_s, used_s = time.perf_counter(), time.process_time()
        under_way = set[asyncio.Task[Any]]()
        for number in range(int(seconds * looks_per_s)):
            await asyncio.sleep(begun_s + number / looks_per_s - time.perf_counter())
            task = asyncio.create_task(_look(connections[number % count], words.command))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
        return (time.process_time() - used_s) / (time.perf_counter() - begun_s)


async def _look(connection: asyncssh.SSHClientConnection, command: str) -> None:
    done = await connection.run(command, encoding=None, check=True)
    json.loads(bytes(done.stdout or b"").partition(b"\n")[0])  # type: ignore[arg-type]


@asynccontextmanager
async def _connected(port: int, count: int) -> AsyncIterator[list[asyncssh.SSHClientConnection]]:
    key, free = asyncssh.generate_private_key("ssh-ed25519"), asyncio.Semaphore(_AT_ONCE)

    async def connect() -> asyncssh.SSHClientConnection:
        async with free:
            return await asyncssh.connect(
                HOST,
                port,
                username="root",
                client_keys=[key],
                known_hosts=None,
                config=None,
                agent_path=None,
                keepalive_interval=15,
            )

    connections = await asyncio.gather(*(connect() for _ in range(count)))
    try:
        yield connections
    finally:
        for connection in connections:
            connection.abort()


def main(words: Iterable[str]) -> None:
    """See the module."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file is a connection
    what, *rest = words
    if what == "serve":
        asyncio.run(serve(json.loads(Path(rest[0]).read_text())))
    else:
        print(asyncio.run(look(int(rest[0]), int(rest[1]), float(rest[2]), float(rest[3]))))


if __name__ == "__main__":
    main(sys.argv[1:])
