"""What is on the market right now, for a quote: fresh from the store, refreshed first where it is not.

The fresh path reads the SQLite file and imports neither SQLAlchemy nor requests; everything else is imported
only when a price is too old and somebody has to be asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gpubroker.config import Settings
from gpubroker.doors import Clock, ThreadPool, one_at_a_time
from gpubroker.errors import SchemaTooNew, StoreError
from gpubroker.model import Market, OfferQuery, Priced, Skipped
from gpubroker.plan.hazard import Exposure
from gpubroker.prices import fastread
from gpubroker.prices.polls import Coverage, ProviderState

if TYPE_CHECKING:
    from gpubroker.prices.poll import PollResult
    from gpubroker.prices.store import Store
    from gpubroker.provider import ProviderContext

# A quote may wait this long for all the vendors together.
REFRESH_S = 4.0
_LONGEST_REST = timedelta(days=2, minutes=5)
# A poll from further ahead than this was stamped by a clock that was wrong: its age is unknown.
CLOCK_TOLERANCE = timedelta(minutes=5)
# Reserved terms change by the month and are asked for by whole polls alone.
_QUOTED_MARKETS: frozenset[Market] = frozenset({"spot", "on_demand", "serverless"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why one provider's prices are not live or not fresh."""

    provider: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Current offers, and what a person must know about them.

    `covered` says per (provider, market) when a poll last saw all of it for the GPUs asked; `skipped` are
    the rows that the newest polls could not read.
    """

    live: list[Priced]
    covered: Mapping[tuple[str, str], datetime]
    problems: tuple[Problem, ...]
    gaps: tuple[Problem, ...]  # parts of a market that a poll could not see
    skipped: tuple[tuple[str, Skipped], ...]
    providers: frozenset[str]  # every provider that the store has heard of
    exposures: tuple[Exposure, ...] = ()  # what our own nodes have met


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a view is wanted of."""

    names: frozenset[str] | None  # canonical GPUs; None = every one
    providers: frozenset[str] = frozenset()  # empty = all
    verified_only: bool = True

    @property
    def query(self) -> OfferQuery:
        """What to ask the providers for."""
        return OfferQuery(
            gpus=self.names, markets=_QUOTED_MARKETS, verified_only=self.verified_only, whole=False
        )

    def wants(self, provider: str) -> bool:
        """Whether this provider's prices matter."""
        return not self.providers or provider in self.providers


def view(
    settings: Settings,
    wish: Wish,
    *,
    max_age_s: int,
    offline: bool,
    clock: Clock,
    on_ask: Callable[[list[str]], None] = lambda names: None,
    wait_s: float | None = None,
    shared: Shared | None = None,
) -> View:
    """Offers no older than `max_age_s` where they can be had within `wait_s`, older ones where not.

    `wait_s`: None = four seconds. `on_ask` hears whom a person has to wait for. `shared`: for many that look
    at once. Raises SchemaTooNew; any other trouble with the store is told as a problem, and what the vendors
    answer is then used without being kept.
    """
    found = _read(settings, wish.names)
    oldest = clock.now() - timedelta(seconds=max_age_s)
    if found is not None and (offline or not _due(found, wish, settings, oldest, clock.now())):
        return _view_of(found, wish, settings, clock.now())
    if offline and not _may_exist(settings):
        return _view_of(None, wish, settings, clock.now())
    wait = REFRESH_S if wait_s is None else wait_s

    def look(opened: tuple[Store, ProviderContext], found: fastread.Snapshot | None = None) -> View:
        """Through the store, with whoever is due asked first."""
        store, context = opened
        results = [] if offline else _refresh(store, context, found, wish, oldest, on_ask, wait)
        return _view_of(store.snapshot(wish.names), wish, context.settings, clock.now(), results)

    try:
        if shared is not None:
            with shared.alone(wish) as opened:
                return look(opened)
        with open_context(settings, os.environ, clock) as opened:
            return look(opened, found)
    except SchemaTooNew:
        raise
    except StoreError as error:
        seen = (
            _view_of(found, wish, settings, clock.now())
            if offline or found is not None
            else _unkept_view(settings, wish, clock, look)
        )
        return replace(seen, problems=(Problem(provider="store", reason=str(error)), *seen.problems))


def _unkept_view(
    settings: Settings, wish: Wish, clock: Clock, look: Callable[[tuple[Store, ProviderContext]], View]
) -> View:
    """What the vendors say, by way of a store that is thrown away."""
    try:
        with TemporaryDirectory(prefix="gpubroker-") as folder:
            unkept = replace(settings, db_url=f"sqlite:///{folder}/prices.db")
            with open_context(unkept, os.environ, clock) as opened:
                return look(opened)
    except (StoreError, OSError):
        return _view_of(None, wish, settings, clock.now())


class Shared:
    """One store for many that look at once: of those that wish the same, one asks the vendors for all.

    Each with a store of its own would take a connection or more from PostgreSQL, which has a hundred.
    """

    def __init__(self, store: Store, context: ProviderContext) -> None:
        self._opened = (store, context)
        self._gates: dict[Wish, AbstractContextManager[object]] = {}

    @contextmanager
    def alone(self, wish: Wish) -> Iterator[tuple[Store, ProviderContext]]:
        """What `open_context` gives, once nobody else is there who wishes the same."""
        with self._gates.setdefault(wish, one_at_a_time()):
            yield self._opened


@contextmanager
def open_context(
    settings: Settings, env: Mapping[str, str], clock: Clock
) -> Iterator[tuple[Store, ProviderContext]]:
    """The migrated store, and what providers are built with."""
    from gpubroker.prices.limits import StoreLimiter
    from gpubroker.prices.store import Store
    from gpubroker.provider import ProviderContext

    with Store.open(settings.db_url, clock) as store:
        store.migrate()
        limiter = StoreLimiter(store, clock)
        yield (
            store,
            ProviderContext(env=env, settings=settings, clock=clock, pool=ThreadPool(), limiter=limiter),
        )


def _read(settings: Settings, names: Collection[str] | None) -> fastread.Snapshot | None:
    """The store as it is, the cheap way; None when there is none yet, or only the dear way can tell."""
    path = fastread.sqlite_path(settings.db_url)
    return None if path is None else fastread.snapshot(path, names)


def _may_exist(settings: Settings) -> bool:
    """Whether a store may be there that the cheap way could not read."""
    path = fastread.sqlite_path(settings.db_url)
    return path is None or Path(path).exists()


def _due(
    found: fastread.Snapshot, wish: Wish, settings: Settings, oldest: datetime, now: datetime
) -> list[str]:
    """Providers whose prices are too old and who may be asked again.

    A provider that was never heard of here (a plugin installed since) is met at the next poll.
    """
    if not found.states:
        return ["every provider"]
    fresh = found.coverage.freshness(wish.query)
    due = []
    for name, state in found.states.items():
        if not wish.wants(name) or name in settings.disabled_providers:
            continue
        if state.missing:
            if _is_set(state.missing, os.environ):
                due.append(name)
        elif state.asked_with != settings.asks_with:
            due.append(name)
        elif not _is_resting(state, now):
            last = fresh.get(name)
            if last is None or last < oldest or last > now + CLOCK_TOLERANCE:
                due.append(name)
    return due


def _is_set(variables: str, env: Mapping[str, str]) -> bool:
    """Whether one of the variables that a provider missed is set by now."""
    return any(env.get(word.strip("(),")) for word in variables.split())


def _is_resting(state: ProviderState, now: datetime) -> bool:
    """Whether the provider failed so lately that nobody waits for it again."""
    until = state.unreachable_until
    # A time absurdly far ahead was written by a clock that was wrong.
    return until is not None and now < until <= now + _LONGEST_REST


def _refresh(
    store: Store,
    context: ProviderContext,
    found: fastread.Snapshot | None,
    wish: Wish,
    oldest: datetime,
    on_ask: Callable[[list[str]], None],
    wait_s: float,
) -> list[PollResult]:
    """Ask whoever is due, all at once."""
    from gpubroker.prices.poll import FIRST_CONTACT_S, poll
    from gpubroker.provider import names

    settings, now = context.settings, context.clock.now()
    if found is None:
        found = store.snapshot(wish.names)
    due = _due(found, wish, settings, oldest, now) if found.states else []
    new = [name for name in names() if name not in found.states]
    asked = [name for name in (*due, *new) if wish.wants(name) and name not in settings.disabled_providers]
    on_ask(asked)
    return poll(store, context, asked, wish.query, wait_s, first_contact_s=FIRST_CONTACT_S)


def _view_of(
    found: fastread.Snapshot | None,
    wish: Wish,
    settings: Settings,
    now: datetime,
    results: Collection[PollResult] = (),
) -> View:
    states = {} if found is None else found.states
    coverage = Coverage(()) if found is None else found.coverage
    problems = {
        name: reason
        for name, state in states.items()
        if wish.wants(name) and (reason := _problem(state, now)) is not None
    }
    problems |= {r.provider: r.reason for r in results if r.reason}
    live = [] if found is None else found.live
    newest = [kept for kept in coverage.newest_for(wish.query) if wish.wants(kept.provider)]
    return View(
        live=[p for p in live if p.offer.provider not in settings.disabled_providers],
        covered=coverage.covered(wish.query),
        problems=tuple(Problem(provider=name, reason=reason) for name, reason in sorted(problems.items())),
        gaps=tuple(
            Problem(provider=kept.provider, reason=reason)
            for kept in newest
            for reason in dict.fromkeys(part.reason for part in kept.incomplete)
        ),
        skipped=tuple((kept.provider, skip) for kept in newest for skip in kept.skipped),
        providers=frozenset(states),
        exposures=() if found is None else found.exposures,
    )


def _problem(state: ProviderState, now: datetime) -> str | None:
    if state.missing:
        return state.reason or f"{state.missing} is not set"
    if _is_resting(state, now) and state.unreachable_until is not None:
        left_s = (state.unreachable_until - now).total_seconds()
        return f"{state.reason} (not asked again for {left_s:.0f} s)"
    return None
