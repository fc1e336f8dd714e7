"""One job's folder on one node, over a Shell: send and start, look, stop, bring back.

Few channels: one sends everything, one unpacks and starts, one a look renews the lease, reads the agent's
state and the new part of the log.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gpubroker.doors import Ran, Shell
from gpubroker.errors import Refused, Transient
from gpubroker.node.bundle import NAME
from gpubroker.prices.rows import moment
from gpubroker.run import payload
from gpubroker.run.payload import Errand
from gpubroker.run.records import Checkpoint

_PREFLIGHT = Path(payload.__file__).parents[1] / "node" / "preflight.py"
_START = f"python3 {NAME} start {payload.CONFIG}"
_SEND_S, _CALL_S, _PREFLIGHT_S = 1800.0, 60.0, 600.0
_MOST_LOG_BYTES = 1 << 18
_MOST, _MOST_NAME = 1 << 53, 200
_LAST_S = 253_402_300_799  # the year 9999


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The agent's state now; None = nothing was started there. `log` is what came since the last look."""

    state: Mapping[str, Any] | None
    log: bytes


class OnNode:
    """Where the job lives on a node."""

    def __init__(self, shell: Shell, job_id: str) -> None:
        self._shell = shell
        self._place = f"$HOME/gpubroker/{job_id}"
        self._remote = f"~/gpubroker/{job_id}"

    def preflight(self) -> Mapping[str, Any]:
        """The node's facts. Raises Transient when it gives none."""
        script = f"{self._place}/preflight.py"
        command = (
            f'mkdir -p "{self._place}" && cat > "{script}" && '
            f'python3 "{script}" --folder "{self._place}/{payload.WORK}" --write-mb 64'
        )
        ran = self._shell.run(command, stdin=_PREFLIGHT.read_bytes(), deadline_s=_PREFLIGHT_S)
        return _json_of(ran, "preflight")

    def start(self, errand: Errand, folder: Path, secrets: Mapping[str, str]) -> Mapping[str, Any]:
        """Send everything and start the agent, which goes on without us. Twice is once."""
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            payload.write(file.file, errand, folder, secrets)
            file.flush()
            self._shell.put(Path(file.name), f"{self._remote}/payload.tar", deadline_s=_SEND_S)
        command = (
            f'cd "{self._place}" && umask 077 && tar -xf payload.tar --no-same-owner && rm payload.tar && '
            f"mkdir -p {payload.WORK} && {_START}"
        )
        return self._started(command)

    def start_agent(self) -> Mapping[str, Any]:
        """Start it where everything is there already; it goes on with what runs."""
        return self._started(f'cd "{self._place}" && {_START}')

    def _started(self, command: str) -> Mapping[str, Any]:
        found = _json_of(self._shell.run(command, deadline_s=_CALL_S), "start")
        if found.get("error"):
            raise Refused("node", "start", str(found["error"])[:200])
        return found

    def look(self, log_from: int) -> Look:
        """Renew the lease, read the state and the log from that byte on."""
        command = (
            f'cd "{self._place}" 2>/dev/null && [ -e {payload.CONFIG} ] || {{ echo null; exit 0; }}\n'
            f"python3 {NAME} renew {payload.CONFIG} >/dev/null; python3 {NAME} status {payload.CONFIG}; "
            f"tail -c +{log_from + 1} job.log 2>/dev/null | head -c {_MOST_LOG_BYTES}"
        )
        ran = self._shell.run(command, deadline_s=_CALL_S)
        first, _, log = ran.stdout.partition(b"\n")
        try:
            state = json.loads(first)
        except ValueError:
            words = ran.stderr.decode(errors="replace").strip()[-200:]
            raise Transient("node", "look", words or "no state") from None
        return Look(state=state if isinstance(state, dict) else None, log=log)

    def stop(self) -> None:
        """Ask the job to save and end it."""
        self._shell.run(f'cd "{self._place}" && python3 {NAME} stop {payload.CONFIG}', deadline_s=_CALL_S)

    def bring_back(self, paths: tuple[str, ...], into: Path) -> list[str]:
        """Artifacts, by their names in the working folder, and the log; returns what is not there."""
        remotes = {path: f"{self._remote}/{payload.WORK}/{path}" for path in paths}
        remotes["job.log"] = f"{self._remote}/job.log"
        kinds = self._kinds(list(remotes.values()))
        missing = []
        for (name, remote), kind in zip(remotes.items(), kinds, strict=True):
            place = into / name if kind == "folder" else (into / name).parent
            if kind == "":
                missing.append(name)
                continue
            place.mkdir(parents=True, exist_ok=True)
            self._shell.get(remote, place, deadline_s=_SEND_S)
        return missing

    def _kinds(self, remotes: list[str]) -> list[str]:
        """folder, file, or nothing for what is not there."""
        places = " ".join(_quoted(remote) for remote in remotes)
        tell = 'if [ -d "$p" ]; then echo folder; elif [ -e "$p" ]; then echo file; else echo; fi'
        command = f"for p in {places}; do {tell}; done"
        ran = self._shell.run(command, deadline_s=_CALL_S)
        found = ran.stdout.decode(errors="replace").split("\n")[: len(remotes)]
        if len(found) != len(remotes):
            raise Transient("node", "artifacts", "cut off")
        return found


def checkpoints_in(state: Mapping[str, Any], epoch: int, base: str) -> list[Checkpoint]:
    """What this attempt's agent says it has published; a node may say anything, so nonsense is left out."""
    told = state.get("made")
    found = (_checkpoint(one, epoch, base) for one in (told if isinstance(told, list) else []))
    return [one for one in found if one is not None]


def _checkpoint(told: Any, epoch: int, base: str) -> Checkpoint | None:
    if not isinstance(told, dict) or told.get("epoch") != epoch:
        return None
    number, size, published_s = told.get("number"), told.get("bytes"), told.get("published_s")
    if not (_is_count(number) and _is_count(size) and _is_count(published_s)):
        return None
    step = told.get("step")
    return Checkpoint(
        epoch=epoch,
        number=number,
        name=str(told.get("name"))[:_MOST_NAME],
        step=step if _is_count(step) else None,
        bytes=size,
        published_at=moment(min(published_s, _LAST_S)),
        place=f"{base}/{epoch:08d}/{number:06d}",
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def unsaved_s(state: Mapping[str, Any]) -> float:
    """What the job has run since its last save that is safe; 0 where the node says nonsense."""
    told = state.get("unsaved_s")
    return float(told) if isinstance(told, int | float) and 0 <= told < _LAST_S else 0.0


def _quoted(remote: str) -> str:
    """With ~ left to the shell."""
    return f"~/{shlex.quote(remote.removeprefix('~/'))}"


def _json_of(ran: Ran, what: str) -> Mapping[str, Any]:
    lines = ran.stdout.decode(errors="replace").strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        words = ran.stderr.decode(errors="replace").strip()[-200:]
        raise Transient("node", what, words or f"status {ran.status}, signal {ran.signal}")
    return found
