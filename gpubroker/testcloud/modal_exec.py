"""Commands in a sandbox: their input, and their output kept from its first byte, so that any reader may begin
anywhere and come again.

modal.py -> Process -> nodes.py (LocalNode.spawn)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from gpubroker.testcloud.nodes_process import Command, Descriptors, copy_in, copy_out

_CHUNK_BYTES = 64 * 1024


class Shell(Protocol):
    """What this file needs of a node."""

    home: str

    async def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], stdio: Sequence[int], *, cwd: str = ""
    ) -> Command:
        """Start a command on three descriptors of the caller's. Raises OSError on a dead node."""

    async def signal(self, command: Command, number: int) -> None:
        """Send a signal to a command's process group."""


class Output:
    """What came out of one descriptor."""

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._data = bytearray()
        self._ended = False
        self._more = asyncio.Event()

    def write(self, data: bytes) -> None:
        """Append."""
        if self._keep:
            self._data += data
        self._wake()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._wake()

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """From there to the end, as it comes."""
        while True:
            while chunk := bytes(self._data[offset : offset + _CHUNK_BYTES]):
                offset += len(chunk)
                yield chunk
            if self._ended:
                return
            await self._more.wait()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


class Process:
    """A command that runs or ran."""

    def __init__(self, node: Shell, command: Command, stdin: asyncio.StreamReader) -> None:
        self.out, self.err = Output(), Output()
        self.exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()  # a signal is below zero
        self.stdin_bytes = 0  # taken so far
        self.stdin_closed = False
        self._node = node
        self._command = command
        self._stdin = stdin
        self._work: list[asyncio.Task[Any]] = []

    @classmethod
    async def start(
        cls, node: Shell, argv: Sequence[str], env: Mapping[str, str], cwd: str = "", *, keep: bool = True
    ) -> Process:
        """Run it. `keep`: False = its output goes nowhere. Raises OSError on a dead node."""
        fds = Descriptors()
        try:
            (in_theirs, in_ours), (out, out_theirs), (err, err_theirs) = fds.pipe(), fds.pipe(), fds.pipe()
            command = await node.spawn(argv, env, (in_theirs, out_theirs, err_theirs), cwd=cwd)
            fds.close(in_theirs, out_theirs, err_theirs)
        except BaseException:
            fds.close(in_theirs, in_ours, out, out_theirs, err, err_theirs)
            raise
        process = cls(node, command, asyncio.StreamReader())
        if not keep:
            process.out, process.err = Output(keep=False), Output(keep=False)
        process._keep(process._run(fds, in_ours, out, err))
        return process

    def write(self, offset: int, data: bytes, eof: bool) -> None:
        """Feed its input; what it has already is left out. Raises ValueError for a gap."""
        if offset > self.stdin_bytes:
            raise ValueError(f"offset {offset} is beyond the {self.stdin_bytes} bytes that came so far")
        fresh = data[self.stdin_bytes - offset :]
        if self.stdin_closed:
            return
        self.stdin_bytes += len(fresh)
        self._stdin.feed_data(fresh)
        if eof:
            self.stdin_closed = True
            self._stdin.feed_eof()

    async def signal(self, number: int) -> None:
        """To it and what it started, unless that left its process group."""
        await self._node.signal(self._command, number)

    def drop(self) -> None:
        """Nobody asks for it any more."""
        for task in self._work:
            task.cancel()

    def _keep(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work.append(asyncio.get_running_loop().create_task(work))

    async def _run(self, fds: Descriptors, in_ours: int, out: int, err: int) -> None:
        """Until it has ended and its output is read."""
        feeding = asyncio.create_task(copy_in(self._stdin.read, in_ours))
        feeding.add_done_callback(lambda _: fds.close(in_ours))
        with fds:
            try:
                status = await self._command.finish(
                    partial(copy_out, out, self.out.write), partial(copy_out, err, self.err.write)
                )
                self.exit.set_result(status)
            finally:
                self.exit.cancel()  # unless it has ended
                feeding.cancel()
                await asyncio.wait([feeding])
                self.out.end()
                self.err.end()
