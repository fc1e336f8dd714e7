"""A loopback address of its own for each node of a vendor that says only an address, never a port.

Lambda and AWS hand out an IP and mean port 22. A node listens on some port of 127.0.0.1, so:

    client -> 127.a.b.c:22 -> Front -> 127.0.0.1:<the node's port>

All of 127.0.0.0/8 is this machine. Who may not open port 22 (no root) gets FALLBACK_PORT instead, on the same
addresses: `Front.port` says which, and `testcloud up` tells its clients. Where the machine has no such addresses
(macOS), a front is 127.0.0.1 with the node's own port.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
from dataclasses import dataclass

SSH_PORT = 22
FALLBACK_PORT = 2222
_CHUNK_BYTES = 1 << 16
_TAKEN = (errno.EADDRINUSE,)
# 127.64.0.1 and on: far from 127.0.0.1 and from what resolvers use. A count for the process: no address twice.
_numbers = itertools.count(1)


@dataclass(slots=True, kw_only=True)
class Front:
    """Where one node is reached."""

    address: str
    port: int
    server: asyncio.Server | None = None

    async def close(self) -> None:
        """No more connections; those that are open end with the node."""
        if self.server is not None:
            self.server.close()


async def open_front(node_port: int) -> Front:
    """A front for the node that listens on 127.0.0.1:node_port."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", node_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))

    for _ in range(1000):
        address = _address(next(_numbers))
        for port in (SSH_PORT, FALLBACK_PORT):
            try:
                server = await asyncio.start_server(pass_on, address, port)
            except PermissionError:
                continue
            except OSError as error:
                if error.errno in _TAKEN:
                    break  # another test cloud has it: the next address
                return Front(address="127.0.0.1", port=node_port)
            return Front(address=address, port=port, server=server)
    return Front(address="127.0.0.1", port=node_port)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes from one to the other until the first ends; then the other learns of the end."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


def _address(number: int) -> str:
    return f"127.{64 + (number >> 16) % 64}.{(number >> 8) & 255}.{number & 255}"
