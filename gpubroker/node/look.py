"""What a supervisor asks every few seconds: the node is still wanted, and how is the job?

python3 -IS gpubroker-node.pyz look CONFIG

A process each time, on a node whose time is the job's: it imports next to nothing, and so takes a fifth of
what the other commands take.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from gpubroker.node.files import lock_file, read_json


def look(folder: str) -> dict[str, Any]:
    """Renew the lease; the last heartbeat, whether the agent is alive, and the result.

    The agent may end meanwhile: it writes its last heartbeat, then its result, and is gone. They are read the
    other way round, so that a result comes with the heartbeat that names the last checkpoint, and an agent
    that is gone with its result.
    """
    ask(folder, "lease")
    is_alive = is_running(folder)
    result = read_json(os.path.join(folder, "result.json"))
    beat = read_json(os.path.join(folder, "heartbeat.json")) or {"state": "unknown"}
    return {**beat, "agent": is_alive, "result": result}


def ask(folder: str, what: str, text: str = "") -> None:
    """Leave a word for the agent: lease, stop or notice."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, what)
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def is_running(folder: str) -> bool:
    """Whether an agent holds its lock."""
    with contextlib.suppress(OSError):
        lock = lock_file(os.path.join(folder, "agent.lock"))
        if lock is None:
            return True
        os.close(lock)
    return False


def main() -> int:
    """0 done; 2 there is no configuration."""
    path = sys.argv[2]
    config = read_json(path)
    told = {"error": f"{path}: no configuration"} if config is None else look(str(config["folder"]))
    sys.stdout.write(json.dumps(told) + "\n")
    return 2 if config is None else 0
