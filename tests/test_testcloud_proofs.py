"""What the test cloud promises as a whole: many nodes at once, no output lost, nothing left, loopback only.

Counts are those of the gate; with GPUBROKER_TEST_EXAMPLES=10 (.ci/soak) those in brackets.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
import requests

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

from gpubroker.testcloud.client import RunningCloud
from gpubroker.testcloud.front import ssh_port
from gpubroker.testcloud.hosts import LIARS
from gpubroker.testcloud.nodes import LocalNodes
from tests.processes import alive, descendants, listening, still_listening
from tests.support import EXAMPLES_FACTOR, PATIENCE_S
from tests.test_testcloud_nodes import (
    ESCAPE,
    H100,
    fakes_built_once,  # noqa: F401 a fixture
    in_loop,
    isolation,  # noqa: F401 a fixture
    marked,
    new_mark,
    until,
)
from tests.test_testcloud_nodes_ssh import PUBLIC, connect

NODES = min(200, 40 * EXAMPLES_FACTOR)  # 40 [200]
ROUNDS = EXAMPLES_FACTOR  # 1 [10] of nodes that are killed while all of it starts
OUTPUT_BYTES = 256 * 1024
UP = [sys.executable, "-m", "gpubroker", "testcloud", "up", "--format", "json", "--liars", "--speed", "3600"]
LOOPBACK = IPv4Network("127.0.0.0/8")


# Many at once


@in_loop
async def test_connects_and_commands_at_once_lose_no_output(tmp_path, isolation):  # noqa: F811
    """40 [200] nodes, and as many clients at once: each gets its own 256 KiB, whole, and its own status."""
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        started = await asyncio.gather(
            *(nodes.start(f"r{n}", H100, [PUBLIC], {"N": str(n)}) for n in range(NODES))
        )

        async def ask(number):
            async with connect(started[number], encoding=None, login_timeout=120) as client:
                done = await client.run(
                    f'yes "$N {"x" * 50}" | head -c {OUTPUT_BYTES}; echo "$N" >&2; exit $N', timeout=120
                )
            return hashlib.sha256(done.stdout).hexdigest(), done.stderr, done.exit_status

        answers = await asyncio.gather(*map(ask, range(NODES)))
    assert [(expected(n), f"{n}\n".encode(), n) for n in range(NODES)] == answers


def expected(number):
    """The sum of what a node says."""
    line = f"{number} {'x' * 50}\n".encode()
    return hashlib.sha256((line * (OUTPUT_BYTES // len(line) + 1))[:OUTPUT_BYTES]).hexdigest()


@in_loop
async def test_all_of_many_nodes_are_gone_with_whatever_got_away(tmp_path, isolation):  # noqa: F811
    """40 [200] nodes, each with a child that is double-forked, in its own session, without an environment.

    One is killed first, and its processes only.
    """
    mark = new_mark()
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        started = await asyncio.gather(*(nodes.start(f"r{n}", H100, [], {}) for n in range(NODES)))
        running = [asyncio.create_task(node.run(["sh", "-c", ESCAPE.format(mark)], {})) for node in started]
        await until(lambda: len(marked(f"sleep\0{mark}")) == 3 * NODES)
        await started[0].kill()
        assert 3 * (NODES - 1) == len(marked(mark))
        await asyncio.gather(*(node.kill() for node in started))
        assert [] == marked(mark)
        assert {137} == {status for status, _, _ in await asyncio.gather(*running)}


@in_loop
async def test_nodes_that_are_killed_while_they_start_to_work_leave_nothing(tmp_path, isolation):  # noqa: F811
    """1 [10] rounds of twenty: whatever the moment, no process of theirs is there afterwards."""
    mark = new_mark()
    async with LocalNodes(tmp_path, isolation=isolation) as nodes:
        for turn in range(ROUNDS):
            started = await asyncio.gather(*(nodes.start(f"r{n}", H100, [], {}) for n in range(20)))
            running = [
                asyncio.create_task(node.run(["sh", "-c", ESCAPE.format(mark)], {})) for node in started
            ]

            async def kill_later(number, node):
                await asyncio.sleep(number * 0.002 * (1 + turn % 3))  # noqa: B023 awaited in this round
                await node.kill()

            await asyncio.gather(*(kill_later(n, node) for n, node in enumerate(started)))
            assert [] == marked(mark)
            await asyncio.gather(*running)


# The whole of it, as a process


class Up(RunningCloud):
    """One that has rented one host of each kind that lies about its disk, network or SSH, and some honest ones."""

    def ask_vendor(self, vendor: str, method: str, path: str, body: Any = None) -> Any:
        answer = requests.request(
            method,
            self.env[f"GPUBROKER_{vendor.upper()}_URL"] + path,
            json=body,
            headers={"Authorization": f"Bearer test-key-{vendor}"},
            timeout=30,
        )
        assert 200 == answer.status_code, answer.text
        return answer.json()

    def rent_some(self, mark: str) -> None:
        """On vast three honest ones and five that lie; one of Lambda, which has an address of its own."""
        offers = self.ask_vendor("vast", "POST", "/api/v0/bundles/", {"limit": 200})["offers"]
        of_machine = {offer["machine_id"]: offer["id"] for offer in offers}
        lying = ("no-disk", "slow-network", "no-egress", "dead-network", "no-ssh")
        machines = [900_000 + n for n, liar in enumerate(LIARS) if liar.name in lying]
        machines += [machine for machine in of_machine if machine < 900_000][:3]
        for machine in machines:
            time.sleep(0.01)  # half a minute there: as often as vast takes it
            body = {"image": "x", "label": "job", "onstart": ESCAPE.format(mark)}
            self.ask_vendor("vast", "PUT", f"/api/v0/asks/{of_machine[machine]}/", body)
        self.ask_vendor("lambda", "POST", "/ssh-keys", {"name": "mine", "public_key": PUBLIC})
        types = self.ask_vendor("lambda", "GET", "/instance-types")["data"]
        name, region = next(
            (name, one["regions_with_capacity_available"][0]["name"])
            for name, one in types.items()
            if one["regions_with_capacity_available"]
        )
        body = {"region_name": region, "instance_type_name": name, "ssh_key_names": ["mine"]}
        self.ask_vendor("lambda", "POST", "/instance-operations/launch", body)
        self.wait_for(len(machines), vendor="vast", state="running")
        self.wait_for(1, vendor="lambda", state="running")
        _wait(lambda: len(marked(f"sleep\0{mark}")) == 3 * len(machines))


def _wait(condition: Any, within_s: float = PATIENCE_S) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)


@contextmanager
def up(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Up]]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        UP,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            yield process, Up(env=said["env"], control=said["control"], pid=process.pid)
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["stdin", signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_it_is_on_loopback_only_and_leaves_nothing_however_it_ends(how: Any, tmp_path: Path) -> None:
    """Nine nodes of two vendors, their children all over the place: no process, listener, mount or file is left.

    Killed with -9 it cannot remove its files; everything else is gone all the same.
    """
    mark = new_mark()
    with up(tmp_path) as (process, cloud):
        cloud.rent_some(mark)
        family = descendants(process.pid)
        sockets = listening(family)
        places = set(sockets.values())
        assert len(places) >= 5 + 1 + 8  # the APIs, the control URL, the nodes
        assert [] == [place for place in places if place[0] not in LOOPBACK]
        assert [] != [place for place in places if place[1] == ssh_port() and str(place[0]) != "127.0.0.1"]
        if how == "stdin":
            assert process.stdin is not None
            process.stdin.close()
        elif how == signal.SIGINT:
            os.killpg(process.pid, how)  # as Ctrl-C does
        else:
            process.send_signal(how)
        status = process.wait(PATIENCE_S)
        assert (-9 if how == signal.SIGKILL else 0) == status
        _wait(lambda: not marked(mark) and not alive(family), 0.0 if status == 0 else PATIENCE_S)
    assert set() == still_listening(sockets)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert [] == (list(tmp_path.iterdir()) if status == 0 else [])
