"""A loopback address of its own for each node of a vendor that says only an address, never a port.

Lambda and AWS hand out an IP and mean port 22. A node listens on some port of 127.0.0.1, so:

    client -> 127.a.b.c:22 -> Front -> 127.0.0.1:<the node's port>

All of 127.0.0.0/8 is this machine. Who may not open port 22 (no root) gets FALLBACK_PORT instead, on the same
addresses: `ssh_port()` says which, and `testcloud up` tells its clients. Where the machine has no such
addresses (macOS), a front is 127.0.0.1 with the node's own port.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address

SSH_PORT = 22
FALLBACK_PORT = 2222
_CHUNK_BYTES = 1 << 16
_TRIES = 50
# Far from 127.0.0.1 and from what resolvers use; each process begins elsewhere, no address comes twice.
_FIRST = "127.64.0.0"
_numbers = itertools.count((os.getpid() % 16384 << 8) + 1)


@dataclass(slots=True, kw_only=True)
class Front:
    """Where one node is reached."""

    address: str
    port: int
    server: asyncio.Server | None = None

    def close(self) -> None:
        """No more connections; those that are open end with the node."""
        if self.server is not None:
            self.server.close()


async def open_front(port_of: Callable[[], int | None]) -> Front:
    """A front for a node, whose port on 127.0.0.1 is asked at each connection: a restart may change it."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if port := port_of():
                inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
                inner_writer.close()
        writer.close()

    for _ in range(_TRIES):
        address = _next_address()
        with contextlib.suppress(OSError):
            server = await asyncio.start_server(pass_on, address, ssh_port())
            return Front(address=address, port=ssh_port(), server=server)
    return Front(address="127.0.0.1", port=port_of() or 0)


@cache
def ssh_port() -> int:
    """22 where this process may listen on it, else FALLBACK_PORT; the same for all fronts."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((_next_address(), SSH_PORT))
        return SSH_PORT
    return FALLBACK_PORT


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes from one to the other until the first ends; then the other learns of the end."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()


def _next_address() -> str:
    """Never a network's first or last one, which some systems treat as their own."""
    number = next(_numbers)
    if number % 256 in (0, 255):
        return _next_address()
    return str(IPv4Address(_FIRST) + number)
