"""Nodes on this machine: a folder to work in, and everything that was started from it. The part of local.py
that rents, for nothing.

create     -> <cache_dir>/local-nodes/<tag>/ with node.json and home/; the id is the tag
shell      -> a subprocess in a session of its own, at home; files as a tar, as for any other node
terminate  -> every process with the node's mark is killed, and the folder is deleted

A later process finds the nodes by their folders. Whatever a node's commands start carries its mark in the
environment, so that it is found in /proc wherever it went; only what clears its environment and leaves its
session as well escapes. That needs Linux.

A command sees the user's environment without what looks like a credential, and `~` is the node's own home;
caches and Python packages of the user stay where they are.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from gpubroker.doors import Clock, Ran, Shell
from gpubroker.errors import PayloadChanged, Refused, Transient, Unreachable
from gpubroker.model import Market, Offer
from gpubroker.provider import TAG, Capabilities, NodeSpec, NodeView, ProviderContext
from gpubroker_providers._tar_shell import TarShell

NAME = "local"
MARKETS: tuple[Market, ...] = ("on_demand",)
# Nothing bills here, so nothing is left to be ended once the job is.
_CAPABILITIES = Capabilities(
    has_ssh=False, own_end={"command": ["true"]}, idempotent_create=True, image_by="nobody"
)
_ID = re.compile(re.escape(TAG) + r"[A-Za-z0-9._-]+")
_NODE, _EXEC = "GPUBROKER_NODE", "GPUBROKER_EXEC"
_STATE, _HOME = "node.json", "home"
_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"
_KILL_S, _KILL_AGAIN_S = 10.0, 0.02
_SECRET_NAMES = re.compile(
    r"(VAST|RUNPOD|LAMBDA|MODAL|AWS|GPUBROKER)_.*|SSH_AUTH_SOCK"
    r"|.*(KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What /proc says of a process that has not ended."""

    pid: int
    parent: int
    session: int
    is_marked: bool


def marked_processes(processes: Mapping[int, Process]) -> set[int]:
    """Those with the mark, those in a session with one of them, and all that these have started."""
    sessions = {process.session for process in processes.values() if process.is_marked}
    found = {p.pid for p in processes.values() if p.is_marked or p.session in sessions}
    while more := {p.pid for p in processes.values() if p.parent in found} - found:
        found |= more
    return found


def node_environment(env: Mapping[str, str], home: Path, of_node: Mapping[str, str]) -> dict[str, str]:
    """A command's: the user's without credentials, and the node's own over it."""
    kept = {name: value for name, value in env.items() if not _SECRET_NAMES.fullmatch(name)}
    theirs = env.get("HOME")
    if theirs:
        kept.setdefault("XDG_CACHE_HOME", f"{theirs}/.cache")
        kept.setdefault("PYTHONUSERBASE", f"{theirs}/.local")
    return {"PATH": os.defpath, **kept, **of_node, "HOME": str(home)}


def parse_node(text: str, node_id: str, boot_id: str) -> NodeView:
    """A node's state as it was written. Raises ValueError. After a restart of the machine it is gone."""
    state = json.loads(text)
    if not isinstance(state, dict) or {"created_at", "boot_id", "usd_per_hour"} - set(state):
        raise ValueError("not the state of a node")
    is_lost = state["boot_id"] != boot_id
    return NodeView(
        id=node_id,
        tag=node_id,
        status="gone" if is_lost else "running",
        reason="this machine was restarted" if is_lost else "",
        is_preempted=is_lost,
        usd_per_hour=Decimal(state["usd_per_hour"]),
        created_at=datetime.fromisoformat(state["created_at"]),
    )


class LocalNodes:
    """The thin client of this machine."""

    def __init__(self, context: ProviderContext) -> None:
        self._context = context

    @property
    def capabilities(self) -> Capabilities:
        """See Compute."""
        return _CAPABILITIES

    def create(
        self, offer: Offer, spec: NodeSpec, tag: str, *, bid_usd_per_hour: Decimal | None, deadline_s: float
    ) -> str:
        """See Compute. Nothing runs yet; the same tag twice is one node."""
        from gpubroker_providers._nodes import check_launch

        check_launch(_CAPABILITIES, MARKETS, offer, tag, bid_usd_per_hour)
        if not _ID.fullmatch(tag) or spec.volume_id:
            raise ValueError(f"local: {tag!r} names no folder, or a network volume is asked for")
        if spec.image:
            raise Refused(NAME, "create", "your own machine runs no image: leave it out, or name --market")
        if not _BOOT_ID.exists():
            raise Refused(NAME, "create", "own GPUs are run on Linux alone: there is no /proc here")
        state = {
            "created_at": self._context.clock.now().isoformat(),
            "boot_id": _boot_id(),
            "usd_per_hour": str(offer.usd_per_hour),
            "env": dict(spec.env),
        }
        fresh = self._root / f".{tag}.{uuid4().hex}"
        try:
            (fresh / _HOME).mkdir(mode=0o700, parents=True)
            fresh.chmod(0o700)
            (fresh / _STATE).write_text(json.dumps(state), encoding="utf-8")
            with suppress(FileExistsError):
                _move(fresh, self._root / tag)
        except OSError as error:
            raise Refused(NAME, "create", f"{self._root}: {error.strerror}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return tag

    def list_nodes(self, deadline_s: float) -> list[NodeView]:
        """See Compute. Raises PayloadChanged naming a folder that is none of ours."""
        boot_id, nodes = _boot_id(), []
        for folder in sorted(self._root.glob(f"{TAG}*")):
            try:
                nodes.append(parse_node((folder / _STATE).read_text(encoding="utf-8"), folder.name, boot_id))
            except FileNotFoundError:  # it went meanwhile
                continue
            except (ValueError, ArithmeticError, OSError) as error:
                # Not from the error: it may hold the text, and so the job's environment.
                raise PayloadChanged(NAME, "nodes", str(folder / _STATE), str(error)) from None
        return nodes

    def terminate(self, node_id: str, deadline_s: float) -> None:
        """See Compute. Nothing that it started is left, nor what it wrote at home."""
        if not _ID.fullmatch(node_id):
            return
        clock, mark, folder = self._context.clock, f"{_NODE}={node_id}", self._root / node_id
        if not folder.exists() and not self._remains(node_id):
            return
        kill(mark, clock, deadline_s)
        with suppress(FileNotFoundError):
            _move(folder, self._root / f".{node_id}.{uuid4().hex}")
        kill(mark, clock, deadline_s)  # what was started before the folder went
        for gone in self._remains(node_id):
            shutil.rmtree(gone, ignore_errors=True)

    def restart(self, node_id: str, deadline_s: float) -> None:
        """Nothing here is ever stopped."""
        raise Refused(NAME, "restart", "nodes are not stopped, they end")

    def shell(self, node: NodeView, deadline_s: float) -> Shell | None:
        """Commands as subprocesses, at the node's home."""
        return LocalShell(self._root / node.id, self._context)

    def _remains(self, node_id: str) -> list[Path]:
        """What an end, or a create, that was cut off has left of it."""
        name = re.compile(re.escape(f".{node_id}.") + "[0-9a-f]{32}")
        return [folder for folder in self._root.glob(".*") if name.fullmatch(folder.name)]

    @property
    def _root(self) -> Path:
        return self._context.cache_dir / "local-nodes"


class LocalShell(TarShell):
    """See Shell."""

    def __init__(self, folder: Path, context: ProviderContext) -> None:
        super().__init__(NAME, folder.name)
        self._folder, self._context = folder, context

    def _run(self, command: str, stdin: IO[bytes], deadline_s: float) -> Ran:
        mark = uuid4().hex
        source, given = _source(stdin)
        try:
            process = subprocess.Popen(  # noqa: S603  the job's own command
                ["/bin/sh", "-c", command],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._folder / _HOME,
                env={**self._environment(), _EXEC: mark},
                start_new_session=True,
            )
        except OSError as error:
            raise Unreachable(NAME, self._node_id, f"it is gone: {error.strerror}") from error
        with process:
            try:
                out, err = process.communicate(given, timeout=deadline_s)
            except subprocess.TimeoutExpired:
                kill(f"{_EXEC}={mark}", self._context.clock, _KILL_S)
                raise Transient(NAME, self._node_id, f"run: no end within {deadline_s:g} s") from None
            except BaseException:
                kill(f"{_EXEC}={mark}", self._context.clock, _KILL_S)
                raise
        code = process.returncode
        ended_by = signal.Signals(-code).name.removeprefix("SIG") if code < 0 else None
        return Ran(status=None if ended_by else code, signal=ended_by, stdout=out, stderr=err)

    def _environment(self) -> dict[str, str]:
        state: dict[str, Any] = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
        of_node = {**state.get("env", {}), _NODE: self._node_id}
        return node_environment(self._context.env, self._folder / _HOME, of_node)


def kill(mark: str, clock: Clock, deadline_s: float) -> None:
    """Everything with this variable in its environment, until there is nothing. Raises Transient.

    The process that asks is spared: it may run on such a node itself.
    """
    end_s = clock.monotonic_s() + deadline_s
    while found := marked_processes(_processes(mark)) - {os.getpid()}:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if clock.monotonic_s() > end_s:
            raise Transient(NAME, "kill", f"{len(found)} processes do not end, such as {min(found)}")
        clock.sleep(_KILL_AGAIN_S)


def _processes(mark: str) -> dict[int, Process]:
    found = {}
    for folder in _PROC.glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # pid (name) state parent group session ...; a name may hold anything
            state, parent, _, session = (folder / "stat").read_text("latin-1").rpartition(")")[2].split()[:4]
            if state not in "ZX":
                found[int(folder.name)] = Process(
                    pid=int(folder.name),
                    parent=int(parent),
                    session=int(session),
                    is_marked=mark.encode() in _variables(folder),
                )
    return found


def _variables(process: Path) -> list[bytes]:
    """Of a process's environment; of somebody else's process none."""
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except PermissionError:
        return []


def _source(stdin: IO[bytes]) -> tuple[int | IO[bytes], bytes | None]:
    """(what a subprocess reads from, what to write into it): a file is given to it as it is."""
    try:
        stdin.fileno()
    except io.UnsupportedOperation:
        return subprocess.PIPE, stdin.read()
    return stdin, None


def _move(folder: Path, to: Path) -> None:
    """Raises FileExistsError rather than replacing a node."""
    try:
        folder.rename(to)
    except OSError as error:
        if to.is_dir():
            raise FileExistsError(str(to)) from error
        raise


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""
