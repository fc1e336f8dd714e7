"""Time in the test cloud: seconds since 1970 that may run faster than the real ones."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

_GLANCE_S = 0.25  # a sleeper looks at the clock so often


class SimClock:
    """Starts at the real time and runs `speed` times as fast; the speed may change at any moment."""

    def __init__(self, speed: float = 1.0, start_s: float | None = None) -> None:
        self._base_s = time.time() if start_s is None else start_s
        self._real_s = time.monotonic()
        self._speed = speed

    @property
    def speed(self) -> float:
        """Simulated seconds in a real one."""
        return self._speed

    def now_s(self) -> float:
        """Simulated seconds since 1970."""
        return self._base_s + (time.monotonic() - self._real_s) * self._speed

    def now(self) -> datetime:
        """The same as an aware UTC datetime."""
        return datetime.fromtimestamp(self.now_s(), UTC)

    def set_speed(self, speed: float) -> None:
        """From now on; the simulated time itself does not jump."""
        if speed <= 0:
            raise ValueError("a clock must run forwards")
        self._base_s, self._real_s, self._speed = self.now_s(), time.monotonic(), speed

    async def sleep(self, sim_s: float) -> None:
        """Wait simulated seconds, at least 1 ms of real time; a change of speed shortens a wait under way."""
        end_s = self.now_s() + sim_s
        await asyncio.sleep(0.001)
        while (left_s := end_s - self.now_s()) > 0:
            await asyncio.sleep(min(_GLANCE_S, max(0.001, left_s / self._speed)))
