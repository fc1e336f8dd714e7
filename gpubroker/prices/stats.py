"""Figures of many prices at once: exact, in integer micro-dollars, each as often as it was seen. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate

# price -> how often
Counted = Iterable[tuple[int, int]]


class Prices:
    """A multiset of prices in micro-dollars."""

    def __init__(self, counted: Counted) -> None:
        totals: dict[int, int] = {}
        for usd_micros, n in counted:
            if n > 0:
                totals[usd_micros] = totals.get(usd_micros, 0) + n
        self._prices: Sequence[int] = sorted(totals)
        self._up_to: Sequence[int] = list(accumulate(map(totals.__getitem__, self._prices)))

    @property
    def n(self) -> int:
        """How many there are, each as often as it was seen."""
        return self._up_to[-1] if self._up_to else 0

    @property
    def least(self) -> int:
        """Raises IndexError where there is none, as all figures do."""
        return self._prices[0]

    @property
    def most(self) -> int:
        """The dearest."""
        return self._prices[-1]

    @property
    def mean(self) -> int:
        """To the nearest micro-dollar, a half to the even one."""
        before = [0, *self._up_to[:-1]]
        total = sum(p * (b - a) for p, a, b in zip(self._prices, before, self._up_to, strict=True))
        return round(Fraction(total, self.n)) if self.n else self._prices[0]

    def quantile(self, share: Fraction) -> int:
        """Linear between the two nearest, as numpy and pandas have it; to the nearest micro-dollar."""
        place = share * (self.n - 1)
        low = int(place)
        below = self._at(low)
        above = below if place == low else self._at(low + 1)
        return round(below + (place - low) * (above - below))

    def _at(self, place: int) -> int:
        """The price in this place of all of them in order, from 0."""
        return self._prices[bisect_right(self._up_to, place)]
