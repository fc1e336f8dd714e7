"""Where the test cloud's nodes run: on this machine, each with its own home, processes and SSH server.

    world.py  start, kill, forget
      -> nodes.py
           -> nodes_home.py     the home, and the GPU it seems to have (fakes/)
           -> nodes_ssh.py      the server on a loopback port
           -> nodes_network.py  how well it is reached, and what it reaches
           -> nodes_process.py  commands, by way of one helper process (nodes_keeper.py)

A node is a fixture, not a jail: its commands are kept together so that all of them die at once, but they are
this user's, in this machine's file system and on its network.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import asyncssh

from gpubroker.testcloud.nodes_home import build_fakes, environment, furnish, show_load
from gpubroker.testcloud.nodes_network import Network
from gpubroker.testcloud.nodes_process import Command, Descriptors, Init, Isolation, Keeper, copy_out
from gpubroker.testcloud.nodes_ssh import Inside, SshServer
from gpubroker.testcloud.world import HostTruth

_GONE_STATUS = 137  # of a command whose node died under it


class LocalNode:
    """A running node. When its processes die by whatever hand, its SSH server goes with them."""

    def __init__(
        self, home: Path, init: Init, env: Mapping[str, str], host_key: asyncssh.SSHKey, truth: HostTruth
    ) -> None:
        self.home = str(home)
        self.disk = init.disk  # free; full = ENOSPC in its home; unwritable = EFBIG wherever files are
        self.network = Network(truth.network, init.connects)
        self.host_key = host_key.export_public_key().decode().strip()  # known_hosts without the host's name
        self._init = init
        self._env = dict(env)
        self._shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
        self.ssh_sessions = 0  # channels for a shell, a command or files, since the node began
        inside = Inside(
            init=init,
            home=self.home,
            shell=self._shell,
            env=self._environment,
            count_session=self._count_session,
        )
        self._server = SshServer(inside, host_key, truth.ssh, self.network)
        self.ssh_port = self._server.port
        init.gone.add_done_callback(lambda _: self._sever())

    async def run(self, argv: Sequence[str], env: Mapping[str, str]) -> tuple[int, bytes, bytes]:
        """Run a command as a vendor without SSH does: status (128 + n = signal n), output, errors."""
        output: list[bytes] = []
        errors: list[bytes] = []
        with open(os.devnull, "rb") as nothing, Descriptors() as fds:
            (out, out_theirs), (err, err_theirs) = fds.pipe(), fds.pipe()
            stdio = (nothing.fileno(), out_theirs, err_theirs)
            try:
                command = await self._init.run(argv, self._environment("root", env), self.home, stdio)
            except OSError:  # the node is gone
                return _GONE_STATUS, b"", b""
            fds.close(out_theirs, err_theirs)
            status = await command.finish(
                partial(copy_out, out, output.append), partial(copy_out, err, errors.append)
            )
        return status if status >= 0 else 128 - status, b"".join(output), b"".join(errors)

    async def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], stdio: Sequence[int], *, cwd: str = ""
    ) -> Command:
        """Start a command on the caller's descriptors, in home or `cwd`. Raises OSError on a dead node."""
        return await self._init.run(argv, self._environment("root", env), cwd or self.home, stdio)

    async def signal(self, command: Command, number: int) -> None:
        """Send a signal to a command's process group; where it has ended there is nothing."""
        with contextlib.suppress(OSError):
            await self._init.signal_group(command, number)

    async def notice(self, signal_number: int) -> None:
        """Send a signal to everything that runs there; on a dead node there is nothing."""
        with contextlib.suppress(OSError):
            await self._init.signal_all(signal_number)

    def show_load(self, percent: int | None) -> None:
        """How much its GPUs seem to be used; None = all of them while a job runs there."""
        show_load(self.home, percent)

    async def kill(self) -> None:
        """Connections drop and every process is gone when this returns; the home stays."""
        self._server.abort()
        self._init.order_end()  # the network after that: who waits for it is not to be told that it is gone
        await asyncio.shield(self._init.gone)

    @property
    def relayed(self) -> Collection[tuple[str, int]]:
        """Our own ends of connections that are made for its processes."""
        return self.network.relayed

    @property
    def alive(self) -> bool:
        """Whether it has processes, or may start some."""
        return not self._init.gone.done()

    def _count_session(self) -> None:
        self.ssh_sessions += 1

    def _sever(self) -> None:
        self._server.abort()
        self.network.close()

    def _environment(self, user: str, more: Mapping[str, str]) -> dict[str, str]:
        return environment(Path(self.home), self._shell, user, {**self._env, **more})


class LocalNodes:
    """Nodes whose homes lie under one folder. As `async with`: none is left afterwards.

    isolation: PID namespaces where they are allowed, else a subreaper, unless one of them is asked for.
    """

    def __init__(self, root: Path, *, isolation: Isolation | None = None) -> None:
        self._root = root
        self._wanted = isolation
        self._keeper: Keeper | None = None
        self._fakes = Path()
        self._opening = asyncio.Lock()
        self._nodes: dict[str, LocalNode] = {}
        self._host_keys: dict[str, asyncssh.SSHKey] = {}

    async def start(
        self, rental_id: str, truth: HostTruth, authorized_keys: Iterable[str], env: Mapping[str, str]
    ) -> LocalNode:
        """A node for a rental; starting it again finds the same home and host key, and nothing that ran."""
        keeper = await self.open()
        if rental_id in self._nodes:
            await self._nodes[rental_id].kill()
        home = self._home(rental_id)
        furnish(home, truth, authorized_keys, self._fakes)
        init = await keeper.new_init(
            full=str(home) if truth.disk_free_gb <= 0 else "", connects=truth.network != "ok"
        )
        if rental_id not in self._host_keys:
            self._host_keys[rental_id] = asyncssh.generate_private_key("ssh-ed25519")
        node = LocalNode(home, init, env, self._host_keys[rental_id], truth)
        self._nodes[rental_id] = node
        return node

    async def forget(self, rental_id: str) -> None:
        """The rental has ended: what still runs there is killed, and its home goes."""
        node = self._nodes.pop(rental_id, None)
        if node is not None:
            await node.kill()
        self._host_keys.pop(rental_id, None)
        await asyncio.to_thread(shutil.rmtree, self._home(rental_id), ignore_errors=True)

    async def open(self) -> Keeper:
        """What all nodes share, made by whoever comes first. Raises KeeperFailed."""
        async with self._opening:
            if self._keeper is None:
                self._fakes = await build_fakes(self._root / ".build")
                self._keeper = await Keeper.open(self._wanted)
        return self._keeper

    async def close(self) -> None:
        """Every node and the helper process are gone when this returns; the homes stay."""
        await asyncio.gather(*(node.kill() for node in self._nodes.values()))
        self._nodes.clear()
        if self._keeper is not None:
            await self._keeper.close()
            self._keeper = None

    async def __aenter__(self) -> LocalNodes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _home(self, rental_id: str) -> Path:
        return self._root / quote(rental_id, safe="").replace(".", "%2E")
