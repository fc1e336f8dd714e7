"""Virtual time: what is due happens when somebody waits, in order; the wall clock may jump, the other never."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import count

# Three hours before a day's caps begin anew.
BEGIN = datetime(2026, 11, 24, 21, 0, 0, tzinfo=UTC)
MIDNIGHT_S = 3 * 3600.0


class World:
    """Seconds since the beginning, and what is still to happen."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """It happens once so much time has passed."""
        heappush(self._due, (self.now_s + seconds, next(self._numbers), what))

    def advance(self, seconds: float) -> None:
        """Let time pass, with all that is due in it."""
        until_s = self.now_s + seconds
        while self._due and self._due[0][0] <= until_s:
            at_s, _, what = heappop(self._due)
            self.now_s = max(self.now_s, at_s)
            what()
        self.now_s = max(self.now_s, until_s)


class VirtualClock:
    """The machine that the supervisors run on has this one; what is waited for happens meanwhile."""

    def __init__(self, world: World, reach: Callable[[str], None]) -> None:
        self._world, self._reach = world, reach
        self._ahead_s = 0.0
        self.jumps: list[tuple[float, float]] = []  # (when, how far), in seconds

    def now(self) -> datetime:
        """The wall clock's, aware UTC."""
        return BEGIN + timedelta(seconds=self._world.now_s + self._ahead_s)

    def monotonic_s(self) -> float:
        """True seconds."""
        return self._world.now_s

    def sleep(self, seconds: float) -> None:
        """A door: a supervisor may die in its sleep."""
        self._reach("clock")
        self._world.advance(max(0.0, seconds))

    def jump(self, seconds: float) -> None:
        """Somebody set the wall clock."""
        self._ahead_s += seconds
        self.jumps.append((self._world.now_s, seconds))

    def jumped_s(self, since_s: float, until_s: float) -> float:
        """How far it was set in that time, both ways added up."""
        return sum(abs(far_s) for at_s, far_s in self.jumps if since_s <= at_s <= until_s)
