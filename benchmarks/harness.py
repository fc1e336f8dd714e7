"""Interleaved pairs: the machine's noise hits both sides alike, so ratios hold where seconds do not."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One benchmark's answer. ratio = figure / baseline, both in `unit`, medians of the pairs."""

    name: str
    figure: float
    unit: str
    baseline: float
    ratio: float
    limit: float
    ok: bool
    detail: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def pairs(ours: Callable[[], float], baseline: Callable[[], float], count: int) -> list[tuple[float, float]]:
    """Seconds of both, one after the other, `count` times after one warm-up that is not counted."""
    ours()
    baseline()
    return [(ours(), baseline()) for _ in range(count)]


def result(name: str, timed: Sequence[tuple[float, float]], limit: float, **detail: Any) -> Result:
    """The median of the ratios pair by pair, against the limit."""
    ratio = statistics.median(a / b for a, b in timed)
    return Result(
        name=name,
        figure=round(statistics.median(a for a, _ in timed), 4),
        unit="s",
        baseline=round(statistics.median(b for _, b in timed), 4),
        ratio=round(ratio, 3),
        limit=limit,
        ok=ratio <= limit,
        detail={"pairs": len(timed), **detail},
    )


def wall_s(command: Sequence[str], env: Mapping[str, str]) -> float:
    """Seconds that a whole process takes. Raises when it fails."""
    began = time.perf_counter()
    subprocess.run(command, env=dict(env), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
