"""The memory of an export: the same for a month of polls and for a year, in all of its processes together."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import Result
from benchmarks.market_year import year
from benchmarks.quote_cold import clean_env
from gpubroker.doors import SystemClock

MOST_MB = 300
LIMIT = 1.15


def history_memory(quick: bool) -> Result:
    """figure: what all processes of `gpubroker export` held, each at its peak. Linux alone can tell."""
    shares = (0.01, 0.1) if quick else (0.01, 0.1, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        env = clean_env(Path(folder))
        peaks = {share: _peaks(share, Path(folder), env) for share in shares}
    most = {share: max(mine.values()) for share, mine in peaks.items()}
    figure, baseline = most[shares[-1]], most[shares[-2]]
    return Result(
        name="history-memory",
        figure=figure,
        unit="MB",
        baseline=baseline,
        ratio=round(figure / baseline, 3),
        limit=LIMIT,
        ok=figure <= MOST_MB and figure <= LIMIT * baseline,
        detail={"most_mb": MOST_MB, "by_share_of_a_year": peaks},
    )


def _peaks(share: float, folder: Path, env: Mapping[str, str]) -> dict[str, float]:
    """By the kind of file; a year as text takes too long."""
    asked = {**env, "GPUBROKER_DB_URL": f"sqlite:///{year(share)}"}
    kinds = ("parquet", "csv.gz") if share < 1 else ("parquet",)
    return {kind: peak_mb(["--to", f"{folder}/spans.{kind}"], asked) for kind in kinds}


def peak_mb(words: list[str], env: Mapping[str, str]) -> float:
    """Of `gpubroker export` with these words: the sum of the peaks of its processes."""
    peaks: dict[int, int] = {}
    command = [sys.executable, "-m", "gpubroker", "export", *words]
    with subprocess.Popen(command, env=dict(env), stderr=subprocess.DEVNULL) as ran:
        while ran.poll() is None:
            for pid in (ran.pid, *_children(ran.pid)):
                peaks[pid] = max(peaks.get(pid, 0), _peak_kb(pid))
            SystemClock().sleep(0.02)
    if ran.returncode != 0:
        raise AssertionError(f"{command} ended with {ran.returncode}")
    return round(sum(peaks.values()) / 1024, 1)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []  # it has just ended


def _peak_kb(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
