"""One job's folder on one node, over a Shell: send and start, look, stop, bring back.

Few channels: one sends everything, one unpacks and starts, one a look renews the lease, reads the agent's
state and the new part of the log.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gpubroker.doors import Ran, Shell
from gpubroker.errors import Refused, Transient
from gpubroker.node.bundle import NAME, bundle
from gpubroker.prices.rows import moment
from gpubroker.run import payload
from gpubroker.run.payload import Errand, StoreKeys
from gpubroker.run.records import Checkpoint, PassedOver

_START = f"python3 {NAME} start {payload.CONFIG}"
_PACK = "preflight.pyz"
_SEND_S, _CALL_S, _PREFLIGHT_S = 1800.0, 60.0, 600.0
_MOST_LOG_BYTES = 1 << 18
_MOST, _MOST_NAME, _MOST_TEXT, _MOST_LINES = 1 << 53, 200, 300, 20
_LAST_S = 253_402_300_799  # the year 9999
_GENERATION = re.compile(r"\d{8}/\d{6}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The agent's state now; None = nothing was started there. `log` is what came since the last look."""

    state: Mapping[str, Any] | None
    log: bytes


class OnNode:
    """Where the job lives on a node."""

    def __init__(self, shell: Shell, job_id: str) -> None:
        self._shell, self._job_id = shell, job_id
        self._place = f"$HOME/gpubroker/{job_id}"
        self._remote = f"~/gpubroker/{job_id}"
        path = f'PYTHONPATH="{self._place}/{_PACK}${{PYTHONPATH:+:$PYTHONPATH}}"'
        self._python = f"{path} python3 -m gpubroker.node.preflight"

    def preflight(self, reach: Sequence[str] = ()) -> Mapping[str, Any]:
        """The node's facts. `reach`: "host:port" outside. Raises Transient when it gives none."""
        places = " ".join(f"--reach {shlex.quote(place)}" for place in reach)
        command = (
            f'mkdir -p "{self._place}" && cat > "{self._place}/{_PACK}"'
            """ || { cat >/dev/null; echo '{"no_room": true}'; exit 0; }\n"""
            f'{self._python} --folder "{self._place}/{payload.WORK}" --write-mb 64'
            f' --lock "{self._place}/preflight.lock" {places}'
        )
        return _json_of(self._shell.run(command, stdin=bundle(), deadline_s=_PREFLIGHT_S), "preflight")

    def try_store(self, keys: StoreKeys) -> Mapping[str, Any]:
        """`store` of the facts, by the job's own keys: only for a node that has proved itself otherwise."""
        told = {**payload.store_config(keys), "job": self._job_id, "keys": payload.keys_of(keys)}
        ran = self._shell.run(
            f"{self._python} --store", stdin=json.dumps(told).encode(), deadline_s=_CALL_S * 2
        )
        return _json_of(ran, "checkpoint store")

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
            f"python3 -IS {NAME} look {payload.CONFIG}; "
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


def passed_over_in(state: Mapping[str, Any], epoch: int, base: str) -> list[PassedOver]:
    """What this attempt's agent did not dare to go on from."""
    told = state.get("rejected")
    found = []
    for one in (told if isinstance(told, list) else [])[:_MOST_LINES]:
        if isinstance(one, dict) and _GENERATION.fullmatch(str(one.get("id"))):
            name = str(one["id"])
            reason = _line(one.get("reason"))
            found.append(PassedOver(generation=name, epoch=epoch, place=f"{base}/{name}", reason=reason))
    return found


def problems_in(state: Mapping[str, Any]) -> list[str]:
    """What goes wrong on the node though the job goes on: a full store, metadata that do not answer."""
    told = state.get("problems")
    return [_line(one) for one in (told if isinstance(told, list) else [])[:_MOST_LINES]]


def _line(told: Any) -> str:
    """For a person: one line, without what moves a terminal's cursor."""
    return "".join(sign if sign.isprintable() else " " for sign in str(told)[:_MOST_TEXT])


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
