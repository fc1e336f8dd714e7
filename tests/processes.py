"""What the kernel says of processes: which there are below one, and where they listen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

_LISTEN, _UNCONNECTED = "0A", "07"  # of TCP; of UDP


def descendants(pid: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below


def alive(pids: Iterable[int]) -> set[int]:
    """Those that run; a zombie does not."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "Z"

    return {pid for pid in pids if state(pid) not in "ZX"}


def listening(pids: Iterable[int]) -> dict[str, tuple[IPv4Address | IPv6Address, int]]:
    """(address, port) of every TCP socket of theirs that listens and every UDP socket that hears anybody.

    By the kernel's number of the socket, which no other has had since: a port may be another process's a moment later.
    """
    sockets = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sockets.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    return {number: place for number, place in _listening().items() if number in sockets}


def still_listening(numbers: Iterable[str]) -> set[str]:
    """Those of these sockets that anybody holds."""
    return set(numbers) & set(_listening())


def _listening() -> dict[str, tuple[IPv4Address | IPv6Address, int]]:
    found = {}
    for table, wanted in (("tcp", _LISTEN), ("tcp6", _LISTEN), ("udp", _UNCONNECTED), ("udp6", _UNCONNECTED)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == wanted:
                address, _, port = words[1].partition(":")
                found[words[9]] = (_address(address), int(port, 16))
    return found


def _address(text: str) -> IPv4Address | IPv6Address:
    """As the kernel prints it: words of four bytes, each in the machine's own order (here the little end first)."""
    words = [bytes.fromhex(text[n : n + 8])[::-1] for n in range(0, len(text), 8)]
    return IPv4Address(words[0]) if len(words) == 1 else IPv6Address(b"".join(words))
