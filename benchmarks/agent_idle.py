"""What the node's agent and its keeper cost while a job runs that does nothing, as a share of one core.

What they start counts too: an nvidia-smi that costs no more than any process, for no driver is at hand. The
baseline is the limit itself: half a percent of a core over the same time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Result
from gpubroker.doors import SystemClock
from gpubroker.node.bundle import NAME, bundle

LIMIT = 0.005
_CLOCK = SystemClock()


def agent_idle(quick: bool) -> Result:
    """User and system time of both processes over 20 s (60 s in full), with checkpoints in the folder."""
    wall_s = 20 if quick else 60
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / NAME).write_bytes(bundle())
        _checkpoints(root)
        config = root / "config.json"
        told = {
            "folder": f"{root}/agent",
            "cwd": str(root),
            "command": ["sleep", "600"],
            "store": {"kind": "folder", "path": f"{root}/store"},
            "max_s": 600,
        }
        config.write_text(json.dumps(told))
        agent = [sys.executable, str(root / NAME)]
        env = {**os.environ, "PATH": f"{_nvidia_smi(root)}:{os.environ['PATH']}"}
        started = json.loads(
            subprocess.run([*agent, "start", config], check=True, capture_output=True, env=env).stdout
        )
        try:
            _CLOCK.sleep(2)
            keeper = json.loads((root / "agent/keeper.json").read_text())["keeper"][0]
            pids = [started["agent_pid"], keeper]
            before, began = sum(map(_cpu_s, pids)), time.perf_counter()
            _CLOCK.sleep(wall_s)
            took_s = sum(map(_cpu_s, pids)) - before
            share = took_s / (time.perf_counter() - began)
        finally:
            subprocess.run([*agent, "stop", config], check=True, capture_output=True)
            _wait_for(root / "agent/result.json")
            _CLOCK.sleep(1)
    return Result(
        name="agent-idle",
        figure=round(share, 5),
        unit="cores",
        baseline=LIMIT,
        ratio=round(share / LIMIT, 3),
        limit=1.0,
        ok=share <= LIMIT,
        detail={"wall_s": wall_s, "checkpoints": 3},
    )


def _checkpoints(root: Path) -> None:
    for step in range(3):
        folder = root / f"checkpoints/step-{step}"
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"shard-{number}").write_bytes(b"x")


def _nvidia_smi(root: Path) -> Path:
    """The folder that it is in."""
    place = root / "bin/nvidia-smi"
    place.parent.mkdir()
    place.write_text("#!/bin/sh\necho 0\n")
    place.chmod(0o755)
    return place.parent


def _cpu_s(pid: int) -> float:
    """Its own and that of its children that have ended, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        _CLOCK.sleep(0.1)
