"""At how many polls a span was observed. Pure.

A span is [first_at, until_at); it was seen at each kept poll in it whose scope covers the offer and that
could speak for it (docs/decisions/0003-spans.md). Each of these is one observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from gpubroker.model import OfferQuery


class PollAt(NamedTuple):
    """A kept poll of one provider."""

    at: int  # seconds since 1970
    scope: OfferQuery
    unknown: frozenset[int]  # offers that it could not speak for, within its scope


class Kind(NamedTuple):
    """What a scope looks at."""

    gpu: str
    market: str
    verified: bool | None


class Seen:
    """One provider's kept polls, in any order."""

    def __init__(self, polls: Iterable[PollAt]) -> None:
        self._polls = sorted(polls, key=lambda poll: poll.at)
        self._moments: dict[Kind, list[int]] = {}
        self._unknown: defaultdict[int, list[int]] = defaultdict(list)
        for poll in self._polls:
            for offer_id in poll.unknown:
                self._unknown[offer_id].append(poll.at)

    def moments(self, kind: Kind) -> list[int]:
        """When polls looked for such offers."""
        found = self._moments.get(kind)
        if found is None:
            found = [poll.at for poll in self._polls if poll.scope.covers_all(*kind)]
            self._moments[kind] = found
        return found

    def count(self, offer_id: int, kind: Kind, first_at: int, until_at: int | None) -> int:
        """Of observations of a span of this offer; None = it is open."""
        total = _within(self.moments(kind), first_at, until_at)
        unknown = self._unknown.get(offer_id)
        return total if unknown is None else total - _within(unknown, first_at, until_at)

    def at(self, offer_id: int, kind: Kind, first_at: int, until_at: int | None) -> list[int]:
        """When they were made."""
        moments = self.moments(kind)
        end = len(moments) if until_at is None else bisect_left(moments, until_at)
        found = moments[bisect_left(moments, first_at) : end]
        unknown = self._unknown.get(offer_id)
        return found if unknown is None else [at for at in found if at not in set(unknown)]


def _within(moments: list[int], first_at: int, until_at: int | None) -> int:
    end = len(moments) if until_at is None else bisect_left(moments, until_at)
    return max(0, end - bisect_left(moments, first_at))
