"""The SSH server of a node: one loopback port, its own host key, the node's home and its processes behind it.

As sshd does: commands and shells with a terminal or without, environment, signals, SFTP and scp from the
home, forwarding to loopback; the keys are those in the home's `.ssh/authorized_keys` at that moment. Nothing
is forwarded from the node, agents neither. Any user name is let in and is only a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import posixpath
import signal
import socket
import struct
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import asyncssh

from gpubroker.testcloud.nodes_network import Network
from gpubroker.testcloud.nodes_process import Command, Descriptors, Init, copy_in, copy_out

_SLOW_BANNER_S = 3.0
_BACKLOG = 512
_SFTP_VERSION = 3
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What a connection finds behind the server."""

    init: Init
    home: str
    shell: str
    env: Callable[[str, Mapping[str, str]], Mapping[str, str]]  # of a user, with what the command asks for
    count_session: Callable[[], None]  # hears of each channel for a shell, a command or files


class SshServer:
    """Listens from when it is made. `banner`: slow = after seconds, never = the port refuses connections."""

    def __init__(
        self,
        inside: Inside,
        host_key: asyncssh.SSHKey,
        banner: Literal["ok", "slow", "never"],
        network: Network,
    ) -> None:
        self._network = network
        self._inside = inside
        self._host_key = host_key
        self._banner = banner
        self._connections: set[asyncssh.SSHServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fresh: set[socket.socket] = set()  # accepted, and nobody has begun to serve them
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        if banner != "never":  # bound all the same: no other node may get this port
            self._socket.listen(_BACKLOG)
            asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def abort(self) -> None:
        """The port and every connection are gone in a moment, with no farewell.

        The loop must let go of a socket before it is closed: its number may be another's the next moment.
        """
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        for task in self._tasks:
            task.cancel()
        for client in self._fresh:  # a task that is cancelled before it begins closes nothing
            client.close()
        for connection in list(self._connections):
            connection.abort()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # it has gone again
            client, _ = self._socket.accept()
            client.setblocking(False)
            self._fresh.add(client)
            task = asyncio.get_running_loop().create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        self._fresh.discard(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        near: socket.socket | None = client
        try:
            if self._banner == "slow":
                await asyncio.sleep(_SLOW_BANNER_S)
            near = self._network.near(client)
            if near is not None:
                await self._run(near)
        except (asyncssh.Error, OSError):  # a client that gave up, or has no key of ours
            pass
        except asyncio.CancelledError:
            if near is not None:
                near.close()  # asyncssh may not have come to it yet; if it has, it has let go of it
            raise

    async def _run(self, client: socket.socket) -> None:
        await asyncssh.run_server(
            client,
            server_factory=lambda: _Server(self._inside, self._connections),
            server_host_keys=[self._host_key],
            encoding=None,
            line_editor=False,
            agent_forwarding=False,
            compression_algs=None,
            gss_host=None,
        )


class _Server(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, inside: Inside, connections: set[asyncssh.SSHServerConnection]) -> None:
        self._inside = inside
        self._connections = connections
        self._connection: asyncssh.SSHServerConnection | None = None
        self._user = ""

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._made())

    def begin_auth(self, username: str) -> bool:
        self._user = username
        with contextlib.suppress(OSError, ValueError):  # no file, or no key in it: nobody is let in
            self._made().set_authorized_keys(os.path.join(self._inside.home, ".ssh", "authorized_keys"))
        return True

    def session_requested(self) -> asyncssh.SSHServerProcess[bytes]:
        self._inside.count_session()
        return _Session(self._inside, self._user)

    def _made(self) -> asyncssh.SSHServerConnection:
        if self._connection is None:
            raise RuntimeError("asked before the connection was made")
        return self._connection

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        return dest_host in _LOOPBACK


class _Session(asyncssh.SSHServerProcess[bytes]):
    """A shell, a command, SFTP or scp."""

    def __init__(self, inside: Inside, user: str) -> None:
        super().__init__(self._run, lambda chan: _HomeFiles(chan, inside), _SFTP_VERSION, True)
        self._inside = inside
        self._user = user
        self._running: Command | None = None
        self._terminal = -1
        self._signals: set[asyncio.Task[None]] = set()
        self._work: asyncio.Task[Any] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: the command lives on, with nobody at the other end of its pipes or terminal."""
        super().connection_lost(exc)
        if self._work is not None:
            self._work.cancel()

    def pty_requested(self, term_type: str, term_size: Any, term_modes: Any) -> bool:
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == "sftp"

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        if self._terminal >= 0:
            _resize(self._terminal, (width, height, pixwidth, pixheight))

    def break_received(self, msec: int) -> bool:
        return False

    def signal_received(self, signal: str) -> None:
        task = asyncio.get_running_loop().create_task(self._signal(signal))
        self._signals.add(task)
        task.add_done_callback(self._signals.discard)

    async def _signal(self, name: str) -> None:
        number = getattr(signal, f"SIG{name}", None)
        if self._running is not None and number is not None:
            with contextlib.suppress(OSError):  # the node is gone
                await self._inside.init.signal_group(self._running, int(number))

    async def _run(self, _: object) -> None:
        self._work = asyncio.current_task()
        try:
            status = await (self._run_on_pipes() if self.term_type is None else self._run_in_terminal())
        except* (OSError, asyncssh.Error):  # the client has gone, or the node has
            self.channel.abort()
        else:
            if status >= 0:
                self.exit(status)
            else:
                self.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))

    async def _run_on_pipes(self) -> int:
        with Descriptors() as fds:
            (in_theirs, in_ours), (out, out_theirs), (err, err_theirs) = fds.pipe(), fds.pipe(), fds.pipe()
            command = await self._start((in_theirs, out_theirs, err_theirs), tty=False)
            fds.close(in_theirs, out_theirs, err_theirs)
            feeding = asyncio.create_task(copy_in(self.stdin.read, in_ours))
            feeding.add_done_callback(lambda _: fds.close(in_ours))
            try:
                return await command.finish(
                    partial(copy_out, out, self.stdout.write, drain=self.stdout.drain),
                    partial(copy_out, err, self.stderr.write, drain=self.stderr.drain),
                )
            finally:
                await _cancelled(feeding)

    async def _run_in_terminal(self) -> int:
        with Descriptors() as fds:
            terminal, theirs = fds.terminal()
            self._terminal = terminal
            _resize(terminal, self.term_size)
            command = await self._start((theirs, theirs, theirs), tty=True)
            fds.close(theirs)
            feeding = asyncio.create_task(copy_in(self.stdin.read, terminal))
            try:
                return await command.finish(
                    partial(copy_out, terminal, self.stdout.write, drain=self.stdout.drain)
                )
            finally:
                self._terminal = -1
                await _cancelled(feeding)

    async def _start(self, stdio: tuple[int, int, int], *, tty: bool) -> Command:
        """Run what was asked for."""
        argv = [self._inside.shell, *(["-l"] if self.command is None else ["-c", self.command])]
        own = {"TERM": self.term_type or "dumb", "SSH_TTY": os.ttyname(stdio[0])} if tty else {}
        env = self._inside.env(self._user, {**self.env, **self._addresses(), **own})
        self._running = await self._inside.init.run(argv, env, self._inside.home, stdio, tty=tty)
        return self._running

    def _addresses(self) -> dict[str, str]:
        """By which a command knows that it came over SSH."""
        client, here = self.get_extra_info("peername"), self.get_extra_info("sockname")
        return {
            "SSH_CLIENT": f"{client[0]} {client[1]} {here[1]}",
            "SSH_CONNECTION": f"{client[0]} {client[1]} {here[0]} {here[1]}",
        }


class _HomeFiles(asyncssh.SFTPServer):
    """Files as seen from the home: relative paths start there, absolute ones are the machine's."""

    def __init__(self, chan: Any, inside: Inside) -> None:
        super().__init__(chan)
        self._home = inside.home.encode()
        self._full = inside.init.disk != "free"

    def map_path(self, path: bytes) -> bytes:
        return posixpath.join(self._home, path)

    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        """Where commands find the disk full, so do files that come this way."""
        if self._full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file_obj, offset, data)

    def exit(self) -> None:
        """The client is done: OpenSSH's scp takes a session without an exit status for a failure."""
        if self.channel.get_subsystem() is not None and not self.connection.is_closed():
            self.channel.exit(0)


async def _cancelled(task: asyncio.Task[None]) -> None:
    """It uses its descriptor no more when this returns."""
    task.cancel()
    await asyncio.wait([task])


def _resize(terminal: int, size: tuple[int, int, int, int]) -> None:
    columns, rows, width, height = size
    with contextlib.suppress(OSError, struct.error):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, width, height))
