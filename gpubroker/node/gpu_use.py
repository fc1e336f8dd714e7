"""Since when no GPU of the node has done anything, by what nvidia-smi says of them every so often.

nvidia-smi -> percents (in a thread) -> GpuUse -> gpu_idle_s in heartbeat.json
"""

from __future__ import annotations

from typing import Sequence

from gpubroker.node.preflight_smi import number, query

_FIELD = "utilization.gpu"
_SMI_S = 20.0
_MOST_MISSED = 4  # answers in a row, until nobody knows any more


def percents() -> list[int | None]:
    """Of each GPU; None where nvidia-smi has no number for it. [] = it did not answer.

    It may never return: a driver that hangs does not let a process be killed.
    """
    rows, _, _ = query("--query-gpu", (_FIELD,), timeout_s=_SMI_S)
    return [number(row[_FIELD]) for row in rows]


class GpuUse:
    """`kept`: what an agent before this one kept. Times are of one clock, which does not jump."""

    def __init__(self, every_s: float, kept: Sequence[float | None] = (None, None)) -> None:
        self._patience_s = _MOST_MISSED * every_s + _SMI_S
        self._since_s, self._heard_s = kept

    @property
    def kept(self) -> list[float | None]:
        """[the first answer without any use, the last answer]; None = there was none."""
        return [self._since_s, self._heard_s]

    def hear(self, used: Sequence[int | None], now_s: float) -> None:
        """One GPU in use is use; one of which nothing is known may be, and then nothing is learned."""
        if any(used):
            self._since_s = None
        elif used and None not in used:
            if self._since_s is None or not self._is_known(now_s):
                self._since_s = now_s
        else:
            return
        self._heard_s = now_s

    def begin_anew(self) -> None:
        """What comes now has not been idle yet."""
        self._since_s = self._heard_s = None

    def idle_s(self, now_s: float) -> float | None:
        """Between the first answer without any use and the last; 0 = in use, None = nobody knows."""
        if self._heard_s is None or not self._is_known(now_s):
            return None
        return 0.0 if self._since_s is None else self._heard_s - self._since_s

    def _is_known(self, now_s: float) -> bool:
        return self._heard_s is not None and now_s - self._heard_s <= self._patience_s
