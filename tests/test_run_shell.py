"""Commands and files over SSH, against nodes of the test cloud."""

import asyncio
import contextlib
import hashlib
import os

import pytest

pytest.importorskip("asyncssh", reason="needs the extra [testcloud]")

from gpubroker.errors import Refused, Transient, Unreachable
from gpubroker.provider import SshAddress
from gpubroker.run.shell import connect, make_key
from gpubroker.testcloud.nodes import LocalNodes
from tests.test_testcloud_nodes import H100, fakes_built_once, in_loop  # noqa: F401 a fixture

PRIVATE, PUBLIC = make_key()


@contextlib.asynccontextmanager
async def shell_on_a_node(root, work):
    """Run `work(shell, address)` in a thread beside the node's event loop; gives what it returns."""
    async with LocalNodes(root) as nodes:
        node = await nodes.start("r1", H100, [PUBLIC], {})
        address = SshAddress(host="127.0.0.1", port=node.ssh_port, username="root")

        def go():
            shell = connect(address, PRIVATE, host_key=None, deadline_s=10)
            try:
                return work(shell, address)
            finally:
                shell.close()

        yield await asyncio.to_thread(go)


@in_loop
async def test_a_command_has_its_output_errors_and_status(tmp_path):
    """Input in, both streams out, the status as it was."""

    def work(shell, address):
        return shell.run("cat; echo bad >&2; exit 7", stdin=b"given", deadline_s=10)

    async with shell_on_a_node(tmp_path, work) as ran:
        assert (7, None, b"given", b"bad\n") == (ran.status, ran.signal, ran.stdout, ran.stderr)


@in_loop
async def test_a_command_that_a_signal_ends_says_which(tmp_path):
    """No status is made up."""
    async with shell_on_a_node(tmp_path, lambda s, a: s.run("kill -9 $$", deadline_s=10)) as ran:
        assert (None, "KILL") == (ran.status, ran.signal)


@in_loop
async def test_a_command_past_its_deadline_is_given_up(tmp_path):
    """And the connection goes on working."""

    def work(shell, address):
        with pytest.raises(Transient, match=r"no end within 0\.3 s"):
            shell.run("sleep 60", deadline_s=0.3)
        return shell.run("echo alive", deadline_s=10)

    async with shell_on_a_node(tmp_path, work) as ran:
        assert b"alive\n" == ran.stdout


@in_loop
async def test_files_and_folders_go_and_come_back(tmp_path):
    """Byte for byte, with modes, odd names and a megabyte of noise."""
    folder = tmp_path / "job"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "sub dir" / "it's $HOME").write_bytes(os.urandom(1 << 20))
    (folder / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / "run.sh").chmod(0o755)

    def work(shell, address):
        shell.put(folder, "~/work place", deadline_s=20)
        shell.put(folder / "run.sh", "~/deep/er/run.sh", deadline_s=20)
        ran = shell.run("cd ~/'work place' && ./run.sh && cat ~/deep/er/run.sh", deadline_s=10)
        shell.get("~/work place", tmp_path / "back", deadline_s=20)
        return ran

    async with shell_on_a_node(tmp_path / "nodes", work) as ran:
        assert b"ran\n#!/bin/sh\necho ran\n" == ran.stdout
    sums = [
        hashlib.sha256((root / "sub dir" / "it's $HOME").read_bytes()).digest()
        for root in (folder, tmp_path / "back")
    ]
    assert sums[0] == sums[1]
    assert 0o755 == (tmp_path / "back" / "run.sh").stat().st_mode & 0o777


@in_loop
async def test_a_host_that_changed_its_key_is_refused(tmp_path):
    """Pinned at first contact; the same key is let in again."""

    def work(shell, address):
        connect(address, PRIVATE, host_key=shell.host_key, deadline_s=10).close()
        other = make_key()[1].rsplit(" ", 1)[0]
        with pytest.raises(Refused, match="another host key"):
            connect(address, PRIVATE, host_key=other, deadline_s=10)
        return shell.host_key

    async with shell_on_a_node(tmp_path, work) as host_key:
        assert host_key.startswith("ssh-")


@in_loop
async def test_a_key_the_node_does_not_know_is_refused(tmp_path):
    """Not an error that waiting would cure."""

    def work(shell, address):
        with pytest.raises(Refused, match="does not take the job's key"):
            connect(address, make_key()[0], host_key=None, deadline_s=10)

    async with shell_on_a_node(tmp_path, work):
        pass


def test_a_port_where_nobody_answers_is_unreachable():
    """Waiting may cure it."""
    with pytest.raises(Unreachable):
        connect(SshAddress(host="127.0.0.1", port=9, username="root"), PRIVATE, host_key=None, deadline_s=5)


@in_loop
async def test_a_node_that_dies_cuts_the_command_off(tmp_path):
    """Neither a status nor a hang."""
    async with LocalNodes(tmp_path) as nodes:
        node = await nodes.start("r1", H100, [PUBLIC], {})
        address = SshAddress(host="127.0.0.1", port=node.ssh_port, username="root")
        shell = await asyncio.to_thread(connect, address, PRIVATE, host_key=None, deadline_s=10)

        def work():
            try:
                return shell.run("sleep 60", deadline_s=20)
            except Unreachable as error:
                return error

        running = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.sleep(0.3)
        await node.kill()
        found = await asyncio.wait_for(running, 15)
        assert isinstance(found, Unreachable) or (None, None) == (found.status, found.signal)
        shell.close()
