"""Which node wrote a checkpoint: what GET /nodes says under `published_by` and `published`.

An object store's PUT of a manifest    -> Publishing.heard -> the node that sent it
A manifest in a folder that nodes mount -> Publishing.look -> the node that had it mounted then

A checkpoint counts from the moment its manifest is there: a file called manifest.json, or ending in
.manifest.json. Its writer is found by what a node cannot choose, in this order: the credentials of an
instance's own role; else the process at the other end of the connection, which runs in a node's home; for a
mounted folder the one node that had it mounted when the manifest appeared (its ctime) and, where there were
several, the one whose id or tag stands in the manifest or in its path. A writer that is none of these, such
as the supervisor on its own machine or who writes a Volume from outside, makes no node a publisher; for nodes
that cannot be told apart there is POST /nodes/{id}/published.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

    from gpubroker.testcloud.world import Rental, World

MANIFEST = re.compile(r"(?:^|/)(?:[^/]*\.)?manifest\.json\Z")
_LARGEST_MANIFEST_BYTES = 1 << 20
_ESTABLISHED = "01"
_MOST_PARENTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One checkpoint that a node published."""

    at_s: float  # simulated
    where: str  # the store's own name for its manifest


@dataclass(slots=True, kw_only=True)
class _Mount:
    """A folder that a node saw. Times are the real clock's, as the file system's are."""

    rental: Rental
    folder: Path
    since_s: float
    until_s: float = float("inf")


class Publishing:
    """All that was published in one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._mounts: list[_Mount] = []
        self._seen: set[tuple[Path, int]] = set()

    def mounted(self, rental: Rental, folder: Path) -> None:
        """From now on the rental's node sees the folder."""
        if not any(m.rental is rental and m.folder == folder for m in self._open()):
            # A file system's clock ticks in steps of a few milliseconds and may be behind.
            self._mounts.append(_Mount(rental=rental, folder=folder, since_s=time.time() - 0.02))

    def unmounted(self, rental: Rental) -> None:
        """Its node is gone."""
        if not any(mount.rental is rental for mount in self._open()):
            return
        self.look()
        for mount in self._open():
            if mount.rental is rental:
                mount.until_s = time.time()

    async def heard(
        self, request: web.Request, status: int, *, node: str = "", root: Path | None = None
    ) -> None:
        """An S3 has answered /<bucket>/<key>. `node`: whose credentials those are; `root`: of the files."""
        key = request.path.removeprefix("/")
        of_object = {name for name in request.query if not name.lower().startswith("x-")} <= {"uploadId"}
        if status == 200 and request.method in ("PUT", "POST") and of_object and MANIFEST.search(key):
            peer = request.transport.get_extra_info("peername") if request.transport else None
            await self.put(f"s3://{key}", peer, node=node, path=root / key if root else None)

    async def put(
        self, where: str, peer: tuple[str, int] | None, *, node: str = "", path: Path | None = None
    ) -> None:
        """An object store has taken a manifest, which lies at `path` where nodes may have it mounted."""
        if path is not None:
            self.claim(path)
        rental = self._world.rentals.get(node) or self._relayed(peer)
        if rental is None and peer is not None:
            homes = {Path(r.node.home): r for r in self._world.rentals.values() if r.node is not None}
            home = await asyncio.to_thread(_home_of, peer, frozenset(homes))
            rental = None if home is None else homes[home]
        if rental is not None:
            self._record(rental, where)

    def claim(self, path: Path) -> None:
        """This file was not put there by a node that has the folder mounted, or that is known already."""
        with contextlib.suppress(OSError):
            self._seen.add((path, path.stat().st_ctime_ns))

    def look(self) -> None:
        """See what is new in the folders that are, or were, mounted."""
        for folder in dict.fromkeys(mount.folder for mount in self._mounts):
            for path, at_ns in _manifests(folder):
                if (path, at_ns) not in self._seen:
                    self._seen.add((path, at_ns))
                    if (rental := self._writer(folder, path, at_ns / 1e9)) is not None:
                        self._record(rental, str(path.relative_to(folder.parent)))
        self._mounts = [mount for mount in self._mounts if mount.until_s > time.time() - 60]

    def _relayed(self, peer: tuple[str, int] | None) -> Rental | None:
        """Whose connection it is that the test cloud itself made, for a node with a slow network."""
        rentals = self._world.rentals.values()
        return next((r for r in rentals if r.node is not None and peer in r.node.relayed), None)

    def _open(self) -> list[_Mount]:
        return [mount for mount in self._mounts if mount.until_s == float("inf")]

    def _writer(self, folder: Path, path: Path, at_s: float) -> Rental | None:
        had = [m.rental for m in self._mounts if m.folder == folder and m.since_s <= at_s <= m.until_s]
        if len({rental.id for rental in had}) <= 1:
            return had[0] if had else None
        said = f"{path}\n{_text(path)}"
        named = [r for r in had if r.id in said or (r.tag and r.tag in said)]
        return named[0] if len(named) == 1 else None

    def _record(self, rental: Rental, where: str) -> None:
        rental.published_by = rental.tag or rental.id
        rental.published.append(Publication(at_s=self._world.clock.now_s(), where=where))


def _manifests(folder: Path) -> Iterator[tuple[Path, int]]:
    """(file, ctime in ns) of every manifest below."""
    for here, _, names in os.walk(folder):
        for name in names:
            path = Path(here, name)
            if MANIFEST.search(name):
                with contextlib.suppress(OSError):
                    yield path, path.stat().st_ctime_ns


def _text(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(_LARGEST_MANIFEST_BYTES).decode("utf-8", "replace")
    return ""


# Who is at the other end of a connection on this machine (Linux; elsewhere nobody is found)


def _home_of(peer: tuple[str, int], homes: frozenset[Path]) -> Path | None:
    """The home that the process with this end of a connection runs in; None = none of these."""
    inode = _inode(peer)
    pid = _holder(f"socket:[{inode}]") if inode else None
    for _ in range(_MOST_PARENTS):
        if pid is None or pid <= 1:
            return None
        if home := _home(pid, homes):
            return home
        pid = _parent(pid)
    return None


def _inode(peer: tuple[str, int]) -> str:
    """Of the socket whose own address that is; "" = not on this machine."""
    packed = bytes(int(part) for part in peer[0].split(".")) if peer[0].count(".") == 3 else b""
    wanted = f"{int.from_bytes(packed, 'little'):08X}:{peer[1]:04X}"
    for line in _lines("/proc/net/tcp"):
        words = line.split()
        if words[1] == wanted and words[3] == _ESTABLISHED:
            return words[9]
    return ""


def _holder(link: str) -> int | None:
    """A process that has it open."""
    for pid in filter(str.isdigit, _names("/proc")):
        for name in _names(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == link:
                    return int(pid)
    return None


def _home(pid: int, homes: frozenset[Path]) -> Path | None:
    """By its environment, else by the folder it works in."""
    home = _environment(pid).get("HOME", "")
    if home and Path(home) in homes:
        return Path(home)
    with contextlib.suppress(OSError):
        here = Path(os.readlink(f"/proc/{pid}/cwd"))
        return next((one for one in (here, *here.parents) if one in homes), None)
    return None


def _environment(pid: int) -> Mapping[str, str]:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)
    return {}


def _parent(pid: int) -> int | None:
    for line in _lines(f"/proc/{pid}/stat"):
        return int(line.rpartition(")")[2].split()[1])
    return None


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def _names(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []
