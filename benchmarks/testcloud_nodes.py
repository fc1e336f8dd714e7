"""200 nodes of the test cloud at once, against the same number of bare processes held the same way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import asyncssh

from benchmarks.harness import Result, result
from gpubroker.testcloud.nodes import LocalNode, LocalNodes
from gpubroker.testcloud.world import HostTruth

NODES = 200
LIMIT = 2.5  # a home, keys, a GPU and an SSH server on top of what `unshare` does
NODE_LIMIT_S = 0.3
_TRUTH = HostTruth(gpu_name="NVIDIA H100 80GB HBM3", gpu_count=8, memory_mib=81559)
_UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_SLEEP = "sleep 987654321"
_RAW = ("sh", "-c", f"echo up; exec {_SLEEP}")


def testcloud_nodes(quick: bool) -> Result:
    """Seconds a node, 200 at once; a lone one in under 300 ms, no output lost, no process left."""
    pairs = 3 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(Path(folder), pairs))


async def _measure(root: Path, pairs: int) -> Result:
    key = asyncssh.generate_private_key("ssh-ed25519")
    public = [key.export_public_key().decode()]
    async with LocalNodes(root) as nodes:
        keeper = await nodes.open()
        raw = (*_UNSHARE, *_RAW) if keeper.isolation == "namespace" and os.getuid() == 0 else _RAW
        alone_s = [await _one_s(nodes, f"alone-{n}", public) for n in range(20)]
        timed = [(await _nodes_s(nodes, f"{n}", public), _raw_s(raw)) for n in range(pairs + 1)][1:]
        lost, connects_s = await _connects(nodes, key)
        kills_s = await _kills(nodes)
        leftovers = _leftovers(of_keeper=False)
    leftovers += _leftovers(of_keeper=True)
    measured = result(
        "testcloud-nodes",
        timed,
        LIMIT,
        nodes=NODES,
        isolation=keeper.isolation,
        baseline_of=raw[0],
        slowest_alone_s=round(max(alone_s), 4),
        node_limit_s=NODE_LIMIT_S,
        connects_and_execs=NODES,
        connects_and_execs_s=round(connects_s, 3),
        lost_outputs=lost,
        kill_slowest_s=round(max(kills_s), 4),
        leftovers=leftovers,
    )
    fast = max(alone_s) <= NODE_LIMIT_S and measured.figure <= NODE_LIMIT_S
    return replace(measured, ok=measured.ok and fast and lost == 0 and leftovers == 0)


async def _one_s(nodes: LocalNodes, name: str, keys: Sequence[str]) -> float:
    """From nothing to a node that can be logged into."""
    began = time.perf_counter()
    await nodes.start(name, _TRUTH, keys, {})
    return time.perf_counter() - began


async def _nodes_s(nodes: LocalNodes, name: str, keys: Sequence[str]) -> float:
    """Wall seconds a node, all at once; they are gone afterwards."""
    names = [f"{name}-{n}" for n in range(NODES)]
    began = time.perf_counter()
    await asyncio.gather(*(nodes.start(each, _TRUTH, keys, {}) for each in names))
    took_s = time.perf_counter() - began
    await asyncio.gather(*map(nodes.forget, names))
    return took_s / NODES


def _raw_s(command: Sequence[str]) -> float:
    """Wall seconds a process that has said it is up, all at once."""
    began = time.perf_counter()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(NODES)]
    for process in processes:
        if process.stdout is None or process.stdout.readline() != b"up\n":
            raise RuntimeError(f"{command[0]} did not start")
    took_s = time.perf_counter() - began
    for process in processes:
        process.kill()
        process.communicate()
    return took_s / NODES


async def _connects(nodes: LocalNodes, key: asyncssh.SSHKey) -> tuple[int, float]:
    """How many of 200 commands lost output, all at once over new connections to as many nodes; seconds."""
    public = [key.export_public_key().decode()]
    started = await asyncio.gather(
        *(nodes.start(f"ssh-{n}", _TRUTH, public, {"N": str(n)}) for n in range(NODES))
    )
    expected = "".join(f"{n}\n" for n in range(1, 2001))

    async def whole(number: int, node: LocalNode) -> bool:
        async with asyncssh.connect(
            "127.0.0.1", node.ssh_port, username="root", client_keys=[key], known_hosts=None, config=None
        ) as client:
            done = await client.run("seq 2000; echo $N; echo $N >&2; exit 7")
        said = (done.stdout, done.stderr, done.exit_status)
        return said == (f"{expected}{number}\n", f"{number}\n", 7)

    began = time.perf_counter()
    answers = await asyncio.gather(
        *(whole(n, node) for n, node in enumerate(started)), return_exceptions=True
    )
    return sum(answer is not True for answer in answers), time.perf_counter() - began


async def _kills(nodes: LocalNodes) -> list[float]:
    """Seconds until each node of ten is gone, which has a child that got away from its command."""
    script = f"(setsid env -i sh -c '{_SLEEP} & exec {_SLEEP}' </dev/null >/dev/null 2>&1 &) ; echo up"
    started = [await nodes.start(f"kill-{n}", _TRUTH, [], {}) for n in range(10)]
    await asyncio.gather(*(node.run(["sh", "-c", script], {}) for node in started))
    took_s = []
    for node in started:
        began = time.perf_counter()
        await node.kill()
        took_s.append(time.perf_counter() - began)
    return took_s


def _leftovers(*, of_keeper: bool) -> int:
    """Processes of killed nodes, or of the helper too, that are still there."""
    found = 0
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:
            continue
        found += _SLEEP.replace(" ", "\0").encode() in command
        found += of_keeper and b"nodes_keeper.py" in command and _parent(process) == os.getpid()
    return found


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
