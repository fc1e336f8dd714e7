"""The network between a node and everything else: as it is, slow, without a way out, or dead.

    client -> nodes_ssh.py -> Network.near -> the SSH server     slow: so many bytes a second, each way
                                                                 dead: accepted, and then not a byte
    the node's connect() -> nodes_keeper.py's listener -> Network -> its destination
                                                                 slow: late, and at the same rate
                                                                 dead, no_egress: no answer, ever

A node has no address of its own: all nodes and servers share the machine's loopback, and a network namespace
that reaches it takes root on the machine's own network. So the second line is drawn at the system call. The
kernel holds each connect of a process of such a node (whatever its language, environment, session or parent)
and tells us (seccomp_unotify(2)); we take the very socket (pidfd_getfd(2)) and connect it to a relay of ours,
or to a port that answers no SYN. Root is not needed; where the kernel or a container refuses, `outward` is
False and only the first line holds. Datagrams, and connections that come in to a node's own ports, are as
they were; those among a node's own processes over TCP are as slow as those to anybody else.

Rates and delays are in real time: what they hold up are real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpubroker.testcloud.nodes_process import writable

SLOW_BYTES_PER_S = 256 * 1024  # each way, for all connections of a node together
_SLOW_CONNECT_S = 0.3
_CHUNK_BYTES = 16 * 1024  # small: what a buffer takes at once was not slow
_NOTE = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, then seccomp_data
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE: as if nobody had asked
_PIDFD_GETFD = 438  # the same number on every machine
_UNCONNECTED = 7  # TCP_CLOSE
_libc = ctypes.CDLL(None, use_errno=True)

Kind = Literal["ok", "slow", "no_egress", "dead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A process of the node waits in connect()."""

    id: int
    pid: int  # of its thread
    fd: int
    address: int  # where in its memory
    length: int


class Network:
    """Of one node. It is closed when the node is gone."""

    def __init__(self, kind: Kind, connects: int = -1) -> None:
        """`connects`: the listener of what the node's processes connect to, ours from now on; -1 = none."""
        self.kind = kind
        self.outward = connects >= 0 and _may_take_sockets()
        self._connects = connects
        self._in, self._out = _Rate(), _Rate()
        self.relayed: set[tuple[str, int]] = set()  # our own ends of connections made for its processes
        self._hole: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        if connects >= 0:
            asyncio.get_running_loop().add_reader(connects, self._heard)

    def near(self, client: socket.socket) -> socket.socket | None:
        """What a server talks to instead of a client that has connected; None = nobody, ever."""
        if self.kind == "dead":
            self._keep(_swallow(client), client)
            return None
        if self.kind != "slow":
            return client
        ours, theirs = _pair()
        self._keep(self._carry(ours, client), ours, client)
        return theirs

    def close(self) -> None:
        """Every connection through here ends."""
        for task in self._tasks:
            task.cancel()
        self._stop_hearing()
        for sock in self._hole:
            sock.close()

    def _keep(self, work: Coroutine[Any, Any, None], *sockets: socket.socket) -> None:
        """Do it in the background; its sockets are closed afterwards, even when it never began."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            for sock in sockets:
                sock.close()

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)

    async def _carry(self, inside: socket.socket, outside: socket.socket) -> None:
        """Bytes both ways, each at the node's rate, until both have ended."""
        with contextlib.suppress(OSError):
            near_reader, near_writer = await asyncio.open_connection(sock=inside, limit=_CHUNK_BYTES)
            far_reader, far_writer = await asyncio.open_connection(sock=outside, limit=_CHUNK_BYTES)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(_pump(near_reader, far_writer, self._out))
                    both.create_task(_pump(far_reader, near_writer, self._in))
            except* OSError:
                pass
            finally:
                for writer in (near_writer, far_writer):
                    writer.transport.abort()

    # What the node's processes connect to

    def _heard(self) -> None:
        wish = _next_wish(self._connects)
        if wish is not None:
            self._keep(self._obey(wish))
        elif not _says(self._connects, select.POLLIN) and _says(self._connects, select.POLLHUP):
            self._stop_hearing()

    def _stop_hearing(self) -> None:
        if self._connects >= 0:
            asyncio.get_running_loop().remove_reader(self._connects)
            os.close(self._connects)
            self._connects = -1

    async def _obey(self, wish: _Wish) -> None:
        """Connect its socket to where we want it, and let it go on; one that has died is no error."""
        number, flags = 0, 0
        try:
            sock, destination = _look(wish)
        except (OSError, ValueError):  # no TCP, or connected already: the kernel has the right answer
            flags = _GO_ON
        else:
            with sock:
                try:
                    await (self._detour(sock, destination) if self.kind == "slow" else self._lose(sock))
                except OSError as error:
                    number = error.errno or errno.EIO
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._connects, _SEND, _ANSWER.pack(wish.id, 0, -number, flags))

    async def _detour(self, sock: socket.socket, destination: tuple[str, int]) -> None:
        """By way of us, if there is somebody at the end of it. Raises OSError."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(_SLOW_CONNECT_S)
        far = socket.socket(socket.AF_INET6 if ":" in destination[0] else socket.AF_INET)
        far.setblocking(False)
        try:
            await loop.sock_connect(far, destination)
            with _listening(1) as relay:
                _connect_anyhow(sock, relay)
                near, _ = await loop.sock_accept(relay)
        except BaseException:
            far.close()
            raise
        self._keep(self._relay(near, far), near, far)

    async def _relay(self, near: socket.socket, far: socket.socket) -> None:
        own = far.getsockname()[:2]
        self.relayed.add(own)
        try:
            await self._carry(near, far)
        finally:
            self.relayed.discard(own)

    async def _lose(self, sock: socket.socket) -> None:
        """Its SYN gets no answer: the kernel gives up after minutes, the program may do so before."""
        if not self._hole:
            hole, filler = _listening(0), socket.socket()
            _connect_anyhow(filler, hole)
            self._hole = [hole, filler]
        _connect_anyhow(sock, self._hole[0])
        if fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK:
            raise BlockingIOError(errno.EINPROGRESS, "")
        await writable(sock.fileno())  # or given up
        if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(number, "")


class _Rate:
    """When the next bytes may pass."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    async def wait(self, count: int) -> None:
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(now_s, self._free_at_s) + count / SLOW_BYTES_PER_S
        await asyncio.sleep(self._free_at_s - now_s)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: _Rate) -> None:
    writer.transport.set_write_buffer_limits(high=0)  # what is drained is with the kernel
    while chunk := await reader.read(_CHUNK_BYTES):
        await rate.wait(len(chunk))
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()


async def _swallow(client: socket.socket) -> None:
    """Until the client gives up."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while await loop.sock_recv(client, _CHUNK_BYTES):
            pass


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over TCP: a server may ask for addresses."""
    with _listening(1) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def _listening(backlog: int) -> socket.socket:
    listener = socket.socket()
    listener.setblocking(False)
    listener.bind(("127.0.0.1", 0))
    listener.listen(backlog)
    return listener


def _next_wish(listener: int) -> _Wish | None:
    """None = it has gone again. Never waits: whoever is listed waits for us."""
    if not _says(listener, select.POLLIN):
        return None
    note = bytearray(_NOTE.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, note)
    except OSError:
        return None
    number, pid, _, _, _, _, fd, address, length, *_ = _NOTE.unpack(note)
    return _Wish(id=number, pid=pid, fd=fd, address=address, length=length)


def _says(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return any(happened & event for _, happened in poll.poll(0))


def _look(wish: _Wish) -> tuple[socket.socket, tuple[str, int]]:
    """The process's own socket and where it wants to. Raises OSError; ValueError when it is not for us."""
    status = Path(f"/proc/{wish.pid}/status").read_text()
    process = int(status.partition("\nTgid:")[2].split()[0])
    with open(f"/proc/{wish.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(wish.address)
        destination = _address(memory.read(min(wish.length, 128)))
    sock = socket.socket(fileno=_take(process, wish.fd))
    if sock.type != socket.SOCK_STREAM or _tcp_state(sock) != _UNCONNECTED:
        sock.close()
        raise ValueError("not a TCP socket before its connect")
    return sock, destination


def _take(process: int, number: int) -> int:
    """A descriptor of ours for what a process has under a number. Raises OSError."""
    pidfd = os.pidfd_open(process)
    try:
        fd = int(_libc.syscall(ctypes.c_long(_PIDFD_GETFD), pidfd, ctypes.c_int(number), 0))
    finally:
        os.close(pidfd)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return fd


@functools.cache
def _may_take_sockets() -> bool:
    """A container may forbid the call, whoever we are."""
    reading, writing = os.pipe()
    try:
        os.close(_take(os.getpid(), reading))
    except OSError:
        return False
    finally:
        os.close(reading)
        os.close(writing)
    return True


def _address(raw: bytes) -> tuple[str, int]:
    family = int.from_bytes(raw[:2], "little" if struct.pack("H", 1)[0] else "big")
    port = int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET and len(raw) >= 16:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    if family == socket.AF_INET6 and len(raw) >= 24:
        return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port
    raise ValueError("neither IPv4 nor IPv6")


def _tcp_state(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def _connect_anyhow(sock: socket.socket, listener: socket.socket) -> None:
    """Begin it without waiting, even where the socket's owner would. Raises OSError."""
    host, port = listener.getsockname()
    flags = fcntl.fcntl(sock, fcntl.F_GETFL)
    fcntl.fcntl(sock, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    try:
        sock.connect((f"::ffff:{host}" if sock.family == socket.AF_INET6 else host, port))
    except BlockingIOError:
        pass
    finally:
        fcntl.fcntl(sock, fcntl.F_SETFL, flags)
