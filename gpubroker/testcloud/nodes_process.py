"""The test cloud's side of the processes of its nodes: asks the keeper for an init, an init for commands.

All of it in one event loop; nodes_keeper.py is the other side and says how the two talk.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

Isolation = Literal["namespace", "subreaper"]
# full: writing to a file in the home fails with ENOSPC; unwritable: to any file, with EFBIG.
Disk = Literal["free", "full", "unwritable"]
_SCRIPT = Path(__file__).with_name("nodes_keeper.py")
_CHUNK_BYTES = 65_536
_LINGER_S = 1.0  # how long output is waited for that a command's children may still write after its end


class KeeperFailed(RuntimeError):
    """The keeper or an init did not come up; the reason is in the text or on standard error."""


class Keeper:
    """The helper process that holds the processes of all nodes, and dies with this one."""

    def __init__(self, isolation: Isolation, process: subprocess.Popen[bytes], hub: socket.socket) -> None:
        self.isolation = isolation
        self._process = process
        self._hub = hub
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, isolation: Isolation | None = None) -> Keeper:
        """One with PID namespaces where they are allowed, else a subreaper; or the kind that is asked for."""
        if isolation is not None:
            return await cls._open(isolation)
        try:
            return await cls._open("namespace")
        except KeeperFailed:
            return await cls._open("subreaper")

    @classmethod
    async def _open(cls, isolation: Isolation) -> Keeper:
        hub, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hub.setblocking(False)
        with theirs:
            process = subprocess.Popen(  # noqa: S603 our own file; nothing of this process's environment
                [sys.executable, "-I", "-S", str(_SCRIPT), isolation, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        keeper = cls(isolation, process, hub)
        try:
            answer = await asyncio.get_running_loop().sock_recv(hub, 1024)
        except BaseException:
            hub.close()  # which ends it
            raise
        if answer != b"ready":
            await keeper.close()
            raise KeeperFailed(f"{isolation}: {answer.decode() or 'the keeper ended'}")
        _allow_many_files()
        return keeper

    async def new_init(self, *, full: str = "", connects: bool = False) -> Init:
        """The processes of a new node: none yet. Raises KeeperFailed.

        full: the home on whose disk nothing can be written; `disk` of the init says how that is done.
        connects: its `connects` is to be the listener of what it connects to, where that is possible.
        """
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gone, gone_theirs = os.pipe()
        control.setblocking(False)
        init = Init(control, gone)
        try:
            with theirs, _closing(gone_theirs), _memory({"full": full, "connects": connects}) as wish:
                await _send(self._hub, self._turn, "node", [theirs.fileno(), gone_theirs, wish])
            await _ready(control.fileno(), asyncio.get_running_loop().create_future())
            answer, fds, _, _ = socket.recv_fds(control, 64, 1, socket.MSG_CMSG_CLOEXEC)
        except BaseException:
            control.close()  # which ends it
            raise
        if not answer.startswith(b"up "):
            control.close()
            raise KeeperFailed("the keeper gave no init")
        init.up = True
        init.disk = cast(Disk, answer.decode().split()[1])
        init.connects = fds[0] if fds else -1
        return init

    async def close(self) -> None:
        """Every process of every node is gone when this returns."""
        with contextlib.suppress(OSError):  # the keeper has died
            self._hub.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self._process.wait)
        self._hub.close()


class Init:
    """The processes of one node."""

    def __init__(self, control: socket.socket, gone: int) -> None:
        self.up = False
        self.disk: Disk = "free"
        self.connects = -1  # for who takes it to close
        self._control = control
        self._turn = asyncio.Lock()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done when all are gone
        _on_end(gone, self._end)

    async def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        stdio: Sequence[int],
        *,
        tty: bool = False,
    ) -> Command:
        """Start a command on three descriptors; the caller closes them. Raises OSError on a dead node."""
        wish = {"argv": list(argv), "env": dict(env), "cwd": cwd, "tty": tty}
        report, report_theirs = os.pipe()
        command = Command(report)
        with _memory(wish) as memory, _closing(report_theirs):
            await self._ask("run", [*stdio, memory, report_theirs])
        return command

    async def signal_group(self, command: Command, number: int) -> None:
        """To the process group of a command; to nobody when it has ended."""
        pid = await command.pid
        await self._ask(f"signal {pid} {number}", [])

    async def signal_all(self, number: int) -> None:
        """To every process of the node; sent when this returns."""
        done, done_theirs = os.pipe()
        sent = asyncio.get_running_loop().create_future()
        _on_end(done, lambda: _settle(sent, None))
        with _closing(done_theirs):
            await self._ask(f"all {number}", [done_theirs])
        await sent

    def order_end(self) -> None:
        """From here on they die; `gone` tells when they are."""
        with contextlib.suppress(OSError):  # they are gone
            self._control.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        if self.up:  # else somebody waits on it, and will close it
            self._control.close()
        _settle(self.gone, None)

    async def _ask(self, words: str, fds: Sequence[int]) -> None:
        await _send(self._control, self._turn, words, fds)


class Command:
    """A command that has been asked for."""

    def __init__(self, report: int) -> None:
        loop = asyncio.get_running_loop()
        self.pid: asyncio.Future[int] = loop.create_future()  # 0 when the node died before it started
        self.exit: asyncio.Future[int] = loop.create_future()  # status, or a signal's number below zero
        _on_end(report, self._note_end, self._note)

    def _note(self, text: bytes) -> None:
        for line in text.decode().splitlines():
            word, number = line.split()
            if word == "pid":
                _settle(self.pid, int(number))
            else:
                _settle(self.exit, os.waitstatus_to_exitcode(int(number)))

    def _note_end(self) -> None:
        _settle(self.pid, 0)
        _settle(self.exit, -signal.SIGKILL)  # when nothing was told, the init is gone, and so is what it ran

    async def finish(self, *outputs: Callable[[asyncio.Future[None]], Coroutine[Any, Any, None]]) -> int:
        """Wait for its end and its output; the exit status. Raises an ExceptionGroup of an output's errors.

        Outputs run to their end, which a child left in the background can put off for ever; so a while after
        the command's end they are told to take what is there and return.
        """
        loop = asyncio.get_running_loop()
        enough = loop.create_future()
        async with asyncio.TaskGroup() as tasks:
            for output in outputs:
                tasks.create_task(output(enough))
            status = await self.exit
            loop.call_later(_LINGER_S, _settle, enough, None)
        return status


class Descriptors:
    """Descriptors that are closed at the end of a `with`, or before, each once."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def pipe(self) -> tuple[int, int]:
        """The end to read and the end to write."""
        return self._add(os.pipe())

    def terminal(self) -> tuple[int, int]:
        """Ours and the command's."""
        return self._add(os.openpty())

    def close(self, *fds: int) -> None:
        """Those that are still open."""
        for fd in self._open & set(fds):
            self._open.remove(fd)
            os.close(fd)

    def _add(self, pair: tuple[int, int]) -> tuple[int, int]:
        self._open.update(pair)
        return pair


async def copy_out(
    fd: int,
    write: Callable[[bytes], object],
    enough: asyncio.Future[None],
    drain: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Hand on what comes out of a pipe or terminal until it ends, or is `enough`: then what lies in it."""
    os.set_blocking(fd, False)
    while not enough.done():
        try:
            data = _read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            await _ready(fd, enough)
            continue
        if not data:
            return
        write(data)
        if drain is not None:
            await drain()
        await asyncio.sleep(0)  # a fast writer must not keep the loop to itself
    if left := _waiting_bytes(fd):
        write(_read(fd, left))


async def copy_in(read: Callable[[int], Awaitable[bytes]], fd: int) -> None:
    """Feed a pipe or terminal until the reader ends or nobody takes it any more."""
    os.set_blocking(fd, False)
    with contextlib.suppress(OSError):
        while data := await read(_CHUNK_BYTES):
            rest = memoryview(data)
            while rest:
                try:
                    rest = rest[os.write(fd, rest) :]
                except BlockingIOError:
                    await writable(fd)


def _read(fd: int, most: int) -> bytes:
    try:
        return os.read(fd, most)
    except BlockingIOError:
        raise
    except OSError:  # a terminal that nobody has open any more answers EIO
        return b""


def _waiting_bytes(fd: int) -> int:
    size = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, size)
    except OSError:
        return 0
    return size[0]


async def _ready(fd: int, enough: asyncio.Future[None]) -> None:
    """Until there is something to read or it is enough."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell(_: object = None) -> None:
        _settle(ready, None)

    loop.add_reader(fd, tell)
    enough.add_done_callback(tell)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
        enough.remove_done_callback(tell)


async def writable(fd: int) -> None:
    """Until there is room to write, or nobody who reads."""
    loop = asyncio.get_running_loop()
    room = loop.create_future()
    loop.add_writer(fd, _settle, room, None)
    try:
        await room
    finally:
        loop.remove_writer(fd)


def _settle(future: asyncio.Future[Any], value: object) -> None:
    """Unless it is settled or was given up."""
    if not future.done():
        future.set_result(value)


def _on_end(fd: int, ended: Callable[[], object], heard: Callable[[bytes], object] = lambda _: None) -> None:
    """Call back with what comes through a pipe and at its end, which closes it."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)

    def look() -> None:
        data = os.read(fd, 4096)
        if data:
            heard(data)
            return
        loop.remove_reader(fd)
        os.close(fd)
        ended()

    loop.add_reader(fd, look)


async def _send(sock: socket.socket, turn: asyncio.Lock, words: str, fds: Sequence[int]) -> None:
    """One datagram with descriptors; waits for room. Raises OSError when the other end is gone."""
    async with turn:
        while True:
            try:
                socket.send_fds(sock, [words.encode()], fds)
                return
            except BlockingIOError:
                await writable(sock.fileno())


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _memory(value: object) -> Iterator[int]:
    """JSON of any size, beside a request."""
    with _closing(os.memfd_create("wish")) as memory:
        os.write(memory, json.dumps(value).encode())
        yield memory


def _allow_many_files() -> None:
    """Two hundred nodes with a command each need more descriptors than a shell's usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
