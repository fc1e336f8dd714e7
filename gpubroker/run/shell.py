"""Commands and files on a node over SSH, for code that is synchronous.

One private thread runs the event loop that asyncssh needs; nobody else sees it. Each call is one SSH channel
on one connection: a folder goes as a tar through the standard input of a command, so that nodes need neither
sftp nor rsync. The host's key is pinned at first contact; agent forwarding and the user's own SSH
configuration stay out of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import tarfile
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import asyncssh

from gpubroker.doors import Ran
from gpubroker.errors import Refused, Transient, Unreachable
from gpubroker.provider import SshAddress

T = TypeVar("T")
# Who hears a command's output, and its errors.
Heard = tuple[Callable[[bytes], None], Callable[[bytes], None]]
_SPOOL_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 18
_FORWARD_S = 20.0
# A connection that says nothing for so long three times is dead.
_KEEPALIVE_S = 15
_starting = threading.Lock()  # two threads' first calls must not start two loops


def make_key() -> tuple[str, str]:
    """A new key pair for one job: private (OpenSSH PEM) and public (one line)."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment="gpubroker")
    return key.export_private_key().decode(), key.export_public_key().decode().strip()


def public_of(private_key: str) -> str:
    """The public half, one line."""
    return asyncssh.import_private_key(private_key).export_public_key().decode().strip()


class SshShell:
    """See Shell. `host_key` is what the host showed: pin it."""

    def __init__(self, connection: asyncssh.SSHClientConnection, name: str, host_key: str) -> None:
        self._connection, self._name = connection, name
        self.host_key = host_key

    def run(self, command: str, *, stdin: bytes = b"", deadline_s: float) -> Ran:
        """See Shell. Raises Transient when the command has not ended by the deadline; it is then killed."""
        return _wait(self._run(command, _pieces(stdin)), deadline_s, self._name, "run")

    def stream(
        self,
        command: str,
        *,
        stdin: bytes = b"",
        out: Callable[[bytes], None],
        err: Callable[[bytes], None],
    ) -> Ran:
        """To its end, however long it takes; its output is handed on as it comes, and not kept."""
        return _wait(self._run(command, _pieces(stdin), (out, err)), None, self._name, "run")

    def forward(self, local_port: int, remote_port: int) -> int:
        """One of the node's ports on this machine's loopback, while the connection lasts; gives it.

        `local_port` 0 = a free one. Raises Refused where it is taken.
        """
        work = self._connection.forward_local_port("127.0.0.1", local_port, "127.0.0.1", remote_port)
        try:
            return _wait(work, _FORWARD_S, self._name, "forward").get_port()
        except OSError as error:
            raise Refused("ssh", self._name, f"local port {local_port}: {error.strerror or error}") from error

    def wait(self) -> None:
        """Until the connection is lost: a forwarded port does nothing by itself."""
        _wait(self._connection.wait_closed(), None, self._name, "wait")

    def put(self, local: Path, remote: str, *, deadline_s: float) -> None:
        """See Shell. A file is moved into place when it is whole; a folder's files appear one by one."""
        place = quoted(remote)
        if local.is_file():
            command = f'mkdir -p "$(dirname {place})" && cat > {place}.part && mv {place}.part {place}'
            with local.open("rb") as file:
                ran = _wait(self._run(command, _blocks(file)), deadline_s, self._name, "put")
        else:
            ran = self.put_tar(lambda tar: tar.add(local, "."), remote, deadline_s=deadline_s)
        self._check(ran, "put")

    def put_tar(
        self, fill: Callable[[tarfile.TarFile], None], remote: str, *, then: str = "true", deadline_s: float
    ) -> Ran:
        """A folder of the caller's choice of files, unpacked, and a command after it, in one channel."""
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            with tarfile.open(fileobj=spool, mode="w") as tar:
                fill(tar)
            spool.seek(0)
            place = quoted(remote)
            command = f"mkdir -p {place} && tar -C {place} -x --no-same-owner && {{ {then}; }}"
            return _wait(self._run(command, _blocks(spool)), deadline_s, self._name, "put")

    def get(self, remote: str, local: Path, *, deadline_s: float) -> None:
        """See Shell. What would be written outside `local`, and links out of it, are refused."""
        place = quoted(remote)
        whole, alone = f"tar -C {place} -c .", f'tar -C "$(dirname {place})" -c "$(basename {place})"'
        ran = self.run(f"if [ -d {place} ]; then {whole}; else {alone}; fi", deadline_s=deadline_s)
        self._check(ran, "get")
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            spool.write(ran.stdout)
            spool.seek(0)
            with tarfile.open(fileobj=spool) as tar:
                tar.extractall(local, filter="data")

    def close(self) -> None:
        """See Shell."""
        _loop().call_soon_threadsafe(self._connection.abort)

    async def _run(self, command: str, stdin: Iterable[bytes], heard: Heard | None = None) -> Ran:
        try:
            process = await self._connection.create_process(command, encoding=None)
        except (asyncssh.Error, OSError) as error:
            raise Unreachable("ssh", self._name, str(error)) from error
        feeding = asyncio.create_task(_feed(process, stdin))
        try:
            if heard is not None:
                await asyncio.gather(_hear(process.stdout, heard[0]), _hear(process.stderr, heard[1]))
            done = await process.wait(check=False)
        except (asyncssh.Error, OSError) as error:
            raise Unreachable("ssh", self._name, str(error)) from error
        finally:
            feeding.cancel()
            process.close()
        signal = done.exit_signal[0] if done.exit_signal else None
        return Ran(
            status=None if signal else done.exit_status,
            signal=signal,
            stdout=_bytes(done.stdout),
            stderr=_bytes(done.stderr),
        )

    def _check(self, ran: Ran, what: str) -> None:
        if ran.status != 0:
            words = ran.stderr.decode(errors="replace").strip()[-200:]
            raise Transient("ssh", self._name, f"{what}: {words or ran.signal or ran.status or 'cut off'}")


def connect(address: SshAddress, private_key: str, *, host_key: str | None, deadline_s: float) -> SshShell:
    """One connection. `host_key` None = first contact: whatever it shows is taken, and to be pinned.

    Raises Unreachable while nothing answers, Refused when the key or the host is not the right one.
    """
    name = f"{address.username}@{address.host}:{address.port}"
    return _wait(_connect(address, private_key, host_key, name), deadline_s, name, "connect")


async def _connect(address: SshAddress, private_key: str, host_key: str | None, name: str) -> SshShell:
    # By the key alone: a name in a known_hosts line is written in another way on port 22.
    known: Any = None if host_key is None else ([asyncssh.import_public_key(host_key)], [], [])
    try:
        connection = await asyncssh.connect(
            address.host,
            address.port,
            username=address.username,
            client_keys=[asyncssh.import_private_key(private_key)],
            known_hosts=known,
            config=None,
            agent_path=None,
            agent_forwarding=False,
            keepalive_interval=_KEEPALIVE_S,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise Refused(
            "ssh", name, "another host key than at first contact: this is not the same node"
        ) from error
    except asyncssh.PermissionDenied as error:
        raise Refused("ssh", name, "the node does not take the job's key") from error
    except (asyncssh.Error, OSError) as error:
        raise Unreachable("ssh", name, str(error) or type(error).__name__) from error
    shown = connection.get_server_host_key()
    text = "" if shown is None else shown.export_public_key().decode().strip()
    return SshShell(connection, name, " ".join(text.split()[:2]))


def quoted(remote: str) -> str:
    """A path for a shell, with ~ at its beginning left to it."""
    if remote == "~" or remote.startswith("~/"):
        return "~" + (f"/{shlex.quote(remote[2:])}" if remote[2:] else "")
    return shlex.quote(remote)


def _pieces(data: bytes) -> Iterable[bytes]:
    return (data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES))


def _blocks(file: IO[bytes]) -> Iterable[bytes]:
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


async def _feed(process: asyncssh.SSHClientProcess[bytes], pieces: Iterable[bytes]) -> None:
    # A command may end without reading all of it.
    with contextlib.suppress(asyncssh.Error, OSError):
        for piece in pieces:
            process.stdin.write(piece)
            await process.stdin.drain()
        process.stdin.write_eof()


async def _hear(stream: asyncssh.SSHReader[bytes], say: Callable[[bytes], None]) -> None:
    while data := await stream.read(_CHUNK_BYTES):
        say(data)


def _bytes(output: Any) -> bytes:
    return output if isinstance(output, bytes) else b""


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        return _started_loop()


@cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="ssh").start()
    return loop


def _wait(work: Awaitable[T], deadline_s: float | None, name: str, what: str) -> T:
    """Run it in the loop's thread. Raises Transient past the deadline; the work is then cancelled.

    Interrupted (Ctrl-C), it is cancelled too.
    """
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, deadline_s), _loop())
    try:
        return future.result()
    except TimeoutError as error:
        raise Transient("ssh", name, f"{what}: no end within {deadline_s or 0:g} s") from error
    except KeyboardInterrupt:
        future.cancel()
        raise
