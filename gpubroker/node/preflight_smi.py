"""The cards by nvidia-smi, who else is on them, and what it says when it cannot tell.

Fields: `nvidia-smi --help-query-gpu`. A whole query is refused for one field that the driver's version does
not know, so what not every version has is asked for together and, where that is refused, one by one. A card
that is lost gives lines of words instead of a row, and the others their rows all the same.
"""

from __future__ import annotations

import subprocess
from typing import Any, Callable, Dict, Sequence

Facts = Dict[str, Any]
Say = Callable[[str], None]
Row = Dict[str, str]
# The name is free text, which may have a comma in it: it comes last.
_FIELDS = ("index", "uuid", "driver_version", "memory.total", "memory.used", "name")
MORE_FIELDS = (
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
    "power.limit",
    "power.default_limit",
    "compute_cap",
    "mig.mode.current",
    "persistence_mode",
)
_MOST_NUMBER = 1e15
_MOST_WORDS = 400


def facts(told: Facts, say: Say) -> Facts:
    """smi_error None = it answered. `words`: what it said beside the rows."""
    say("nvidia-smi: cards")
    rows, words, error = query("--query-gpu", _FIELDS)
    if error is not None:
        return {"smi_error": error, "words": words, "gpus": [], "processes": []}
    gpus = [_gpu(row) for row in rows]
    say("nvidia-smi: health")
    for field, values in _more().items():
        for gpu in gpus:
            if gpu["uuid"] in values:
                gpu[field] = values[gpu["uuid"]]
    say("nvidia-smi: processes")
    processes, _, error = query("--query-compute-apps", ("pid", "used_memory", "gpu_uuid"))
    return {
        "smi_error": None,
        "words": words,
        "gpus": gpus,
        "processes_error": error,
        "processes": [
            {"pid": number(row["pid"]), "used_mib": number(row["used_memory"]), "gpu_uuid": row["gpu_uuid"]}
            for row in processes
        ],
    }


def _gpu(row: Row) -> Facts:
    return {
        "index": int(row["index"]),
        "name": row["name"],
        "uuid": row["uuid"],
        "driver": row["driver_version"],
        "memory": row["memory.total"],
        "memory_mib": number(row["memory.total"]),
        "used_mib": number(row["memory.used"]),
    }


def _more() -> dict[str, dict[str, str]]:
    """Field -> uuid -> value, of the fields that this version knows."""
    rows, _, error = query("--query-gpu", ("uuid", *MORE_FIELDS))
    if error is None:
        return {field: {row["uuid"]: row[field] for row in rows} for field in MORE_FIELDS}
    found = {}
    for field in MORE_FIELDS:
        rows, _, error = query("--query-gpu", ("uuid", field))
        if error is None:
            found[field] = {row["uuid"]: row[field] for row in rows}
    return found


def query(
    kind: str, fields: Sequence[str], *, timeout_s: float | None = None
) -> tuple[list[Row], str, str | None]:
    """Rows by field, the other lines, and why there are none; a process that hangs hangs its caller."""
    command = ["nvidia-smi", f"{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        return [], "", "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], "", f"nvidia-smi: {error}"
    rows, words = parse(ran.stdout, fields)
    if ran.returncode != 0 and not rows:
        return [], words, f"nvidia-smi: {words or f'it ended with {ran.returncode}'}"
    return rows, words, None


def parse(output: bytes, fields: Sequence[str]) -> tuple[list[Row], str]:
    """Rows and all other lines, of whatever it printed."""
    rows, words = [], []
    for line in output.decode("utf-8", "replace").splitlines():
        cells = [cell.strip() for cell in line.split(",", len(fields) - 1)]
        is_row = len(cells) == len(fields) and (fields[0] != "index" or _is_index(cells[0]))
        if is_row:
            rows.append(dict(zip(fields, cells)))
        elif line.strip():
            words.append(line.strip())
    return rows, " ".join(words)[:_MOST_WORDS]


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 5


def number(text: str) -> int | None:
    """None for [N/A] and all else that is no number of something."""
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if 0 <= value < _MOST_NUMBER else None
