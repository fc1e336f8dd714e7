"""All chance of a simulation, from one seed: what goes wrong, how often, and where a supervisor dies.

Each seed has its own mood: most kinds of faults are there at their usual rate, some are absent, some frequent,
so that what one fault hides another seed shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

# Of each chance: a call to a vendor, a command on a node, a write to the database, a node's life, a tick.
RATES = {
    # a vendor's create
    "create: no capacity": 0.08,
    "create: quota": 0.01,
    "create: busy": 0.04,
    "create: away": 0.02,
    "create: refused": 0.01,
    "create: lost, not made": 0.03,
    "create: lost, made": 0.05,
    "create: lost, made twice": 0.02,
    "create: made twice": 0.03,
    "create: named, and lost": 0.02,
    # its list
    "list: busy": 0.01,
    "list: away": 0.01,
    "list: stale": 0.03,
    "list: doubled": 0.02,
    # its end of a node
    "end: busy": 0.05,
    "end: away": 0.05,
    "end: done, but lost": 0.06,
    # a vendor in a tick
    "outage": 0.004,
    # a node, once
    "late in lists": 0.15,
    "very late in lists": 0.02,
    "never starts": 0.04,
    "lies": 0.06,
    "dies at once": 0.03,
    # a command on a node
    "shell: cut off": 0.006,
    "shell: done, but lost": 0.006,
    "shell: refused": 0.004,
    # a write
    "write: busy": 0.004,
    "write: done, but lost": 0.001,
    # a tick
    "clock jumps": 0.008,
    "hand over": 0.004,
    "joins": 0.02,
    # a point where a supervisor may die or stand still: the rare doors, the others
    "dies at a rare door": 0.012,
    "dies": 0.0006,
    "stands still at a rare door": 0.016,
    "stands still": 0.0004,
}
_MOODS = (0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 3.0)


class Crash(BaseException):
    """kill -9: nothing after it runs. Not an Exception, so that nothing catches it."""


class Broken(BaseException):
    """Something that must hold does not. Not an Exception either."""


class Faults:
    """By seed. `touched`: whom the faults of this tick have hit, "*" = the supervisor itself or its database."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.is_on = True
        self.rates = {kind: rate * rng.choice(_MOODS) for kind, rate in RATES.items()}
        self.touched: set[str] = set()
        self.told: Callable[[str], None] = lambda text: None
        self.kinds: Counter[str] = Counter()

    def happens(self, kind: str, whom: str) -> bool:
        """Whether it goes wrong here."""
        if not self.is_on or self.rng.random() >= self.rates[kind]:
            return False
        self.note(kind, whom)
        return True

    def note(self, kind: str, whom: str) -> None:
        """It did go wrong."""
        self.touched.add(whom)
        self.kinds[kind] += 1
        self.told(f"! {kind} ({whom})")

    def one_of(self, prefix: str, whom: str) -> str:
        """At most one of the kinds that begin so; "" = nothing goes wrong."""
        if not self.is_on:
            return ""
        left = self.rng.random()
        for kind, rate in self.rates.items():
            if kind.startswith(prefix):
                left -= rate
                if left < 0:
                    self.note(kind, whom)
                    return kind.removeprefix(prefix)
        return ""

    def between(self, least: float, most: float) -> float:
        """Evenly."""
        return least + (most - least) * self.rng.random()


class Doors:
    """Every call through a door comes by here before it is made, and again once it is done."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._is_still = False
        self.stand_still: Callable[[str], None] = lambda where: None

    def reach(self, where: str, *, is_rare: bool = False) -> None:
        """Raises Crash; or the supervisor stands still here while others go on."""
        faults = self._faults
        if not faults.is_on:
            return
        chance, suffix = faults.rng.random(), " at a rare door" if is_rare else ""
        dies = faults.rates[f"dies{suffix}"]
        if chance < dies:
            faults.note(f"dies{suffix}", "*")
            faults.told(f"! dies at {where}")
            raise Crash(where)
        if chance < dies + faults.rates[f"stands still{suffix}"] and not self._is_still:
            faults.note(f"stands still{suffix}", "*")
            faults.told(f"! stands still at {where}")
            self._is_still = True
            try:
                self.stand_still(where)
            finally:
                self._is_still = False
            faults.told(f"! goes on at {where}")
