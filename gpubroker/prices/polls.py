"""What is recorded of polls, and what that says about the age of a price. In plain Python, as rows.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from gpubroker.model import MARKETS, Offer, OfferQuery, Skipped, Slice
from gpubroker.prices.rows import maybe_moment, moment

# Ids that are remembered of the rows skipped for one reason.
_SKIPPED_IDS = 5
_encode = json.JSONEncoder(separators=(",", ":")).encode


class SkipCount(NamedTuple):
    """How many rows were left out for one reason, and a few of them by id."""

    rows: int
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderState:
    """What the last attempt to refresh a provider found out, for every process that comes after."""

    provider: str
    missing: str = ""  # the variable that would give more; "" = nothing is missing
    unreachable_until: datetime | None = None  # None = it answered, or was never asked
    reason: str = ""  # why the last attempt failed, in words
    tried_at: datetime | None = None  # None = never
    asked_with: str = ""  # Settings.asks_with then


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The newest kept poll of one provider with one scope."""

    poll_id: int
    provider: str
    scope: OfferQuery
    observed_at: datetime
    source: str
    incomplete: tuple[Slice, ...] = ()
    skips: Mapping[str, SkipCount] = field(default_factory=dict)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Its skipped rows, as far as they are remembered one by one."""
        return tuple(_remembered(self.skips))

    def saw_all(self, query: OfferQuery) -> bool:
        """Whether no part of the query was cut or failed."""
        return not any(
            (part.gpus is None or query.gpus is None or part.gpus & query.gpus)
            and (part.market is None or query.markets is None or part.market in query.markets)
            for part in self.incomplete
        )


# The newest poll of each (provider, scope), as columns of Kept.
COVERAGE_SQL = """
SELECT p.id, p.provider, p.scope, p.observed_at, p.source, p.incomplete, p.skips
FROM coverage c JOIN polls p ON p.id = c.poll_id
"""


class Coverage:
    """Which poll last looked where an offer is. Scopes look at its GPU, its market and `verified` alone."""

    def __init__(self, kept: Iterable[Kept]) -> None:
        self._newest_first = sorted(kept, key=lambda k: k.observed_at, reverse=True)
        self._found: dict[tuple[Any, ...], Kept | None] = {}

    def of(self, offer: Offer) -> Kept | None:
        """The newest kept poll whose scope covers the offer."""
        asked = (offer.provider, offer.gpu, offer.market, offer.verified)
        if asked not in self._found:
            covering = (
                k for k in self._newest_first if k.provider == offer.provider and k.scope.covers(offer)
            )
            self._found[asked] = next(covering, None)
        return self._found[asked]

    def freshness(self, query: OfferQuery) -> dict[str, datetime | None]:
        """When each provider was last asked for all that the query asks for; None = never.

        A poll that could not see all of it counts: asking again at once would not help.
        """
        found: dict[str, datetime | None] = {}
        for kept in self._newest_first:
            if found.get(kept.provider) is None:
                found[kept.provider] = kept.observed_at if includes(kept.scope, query) else None
        return found

    def newest(self) -> dict[str, datetime]:
        """When each provider was last polled, whatever the scope."""
        return {k.provider: k.observed_at for k in reversed(self._newest_first)}

    def covered(self, query: OfferQuery) -> dict[tuple[str, str], datetime]:
        """When a poll last saw the whole of a (provider, market) for the query's GPUs: an offer that it did
        not list was not there."""
        whole = [(key, kept) for key, part, kept in self._by_market(query) if kept.saw_all(part)]
        return {key: kept.observed_at for key, kept in reversed(whole)}

    def newest_for(self, query: OfferQuery) -> list[Kept]:
        """The polls that speak for the query now: the newest of each (provider, market)."""
        newest: dict[tuple[str, str], Kept] = {}
        for key, _, kept in self._by_market(query):
            newest.setdefault(key, kept)
        return list({kept.poll_id: kept for kept in newest.values()}.values())

    def _by_market(self, query: OfferQuery) -> Iterator[tuple[tuple[str, str], OfferQuery, Kept]]:
        """Newest first: the markets of the query that each poll asked for whole."""
        for kept in self._newest_first:
            for market in query.markets or MARKETS:
                part = replace(query, markets=frozenset({market}))
                if includes(kept.scope, part):
                    yield (kept.provider, market), part, kept


def includes(scope: OfferQuery, query: OfferQuery) -> bool:
    """Whether a poll with this scope asked for everything that the query asks for."""
    return (
        (scope.gpus is None or (query.gpus is not None and query.gpus <= scope.gpus))
        and (scope.markets is None or (query.markets is not None and query.markets <= scope.markets))
        and (query.verified_only or not scope.verified_only)
        and (scope.whole or not query.whole)
    )


def scope_json(query: OfferQuery) -> str:
    """A query as canonical JSON: equal queries, equal text."""
    return _encode(
        {
            "gpus": None if query.gpus is None else sorted(query.gpus),
            "markets": None if query.markets is None else sorted(query.markets),
            "verified_only": query.verified_only,
            "whole": query.whole,
        }
    )


def scope_of(text: str) -> OfferQuery:
    """The query that scope_json wrote."""
    table = json.loads(text)
    return OfferQuery(**{**table, "gpus": _maybe_set(table["gpus"]), "markets": _maybe_set(table["markets"])})


def incomplete_json(slices: Iterable[Slice]) -> str:
    """The parts that a poll could not see."""
    return _encode(
        [
            {
                "reason": part.reason,
                "gpus": None if part.gpus is None else sorted(part.gpus),
                "market": part.market,
                "region": part.region,
                "cloud": part.cloud,
            }
            for part in slices
        ]
    )


def incomplete_of(text: str) -> tuple[Slice, ...]:
    """The slices that incomplete_json wrote."""
    return tuple(Slice(**{**part, "gpus": _maybe_set(part["gpus"])}) for part in json.loads(text))


def skips_json(skipped: Iterable[Skipped]) -> str:
    """reason -> [how many, the first ids]."""
    table: dict[str, tuple[int, list[str]]] = {}
    for skip in skipped:
        count, ids = table.get(skip.reason, (0, []))
        table[skip.reason] = (count + 1, [*ids, skip.id] if count < _SKIPPED_IDS else ids)
    return _encode(table)


def skips_of(text: str) -> dict[str, SkipCount]:
    """The counts that skips_json wrote."""
    return {reason: SkipCount(count, tuple(ids)) for reason, (count, ids) in json.loads(text).items()}


def kept_of(row: Sequence[Any]) -> Kept:
    """One row of COVERAGE_SQL."""
    poll_id, provider, scope, observed_at, source, incomplete, skips = row
    return Kept(
        poll_id=poll_id,
        provider=provider,
        scope=scope_of(scope),
        observed_at=moment(observed_at),
        source=source,
        incomplete=incomplete_of(incomplete),
        skips=skips_of(skips),
    )


def state_of(row: Sequence[Any]) -> ProviderState:
    """One row of provider_state."""
    provider, missing, unreachable_until, reason, tried_at, asked_with = row
    return ProviderState(
        provider=provider,
        missing=missing,
        unreachable_until=maybe_moment(unreachable_until),
        reason=reason,
        tried_at=maybe_moment(tried_at),
        asked_with=asked_with,
    )


def _remembered(skips: Mapping[str, SkipCount]) -> Iterator[Skipped]:
    for reason, skip in skips.items():
        for row_id in skip.ids:
            yield Skipped(id=row_id, reason=reason)
        if skip.rows > len(skip.ids):
            yield Skipped(id=f"and {skip.rows - len(skip.ids)} more", reason=reason)


def _maybe_set(names: list[Any] | None) -> frozenset[Any] | None:
    return None if names is None else frozenset(names)
