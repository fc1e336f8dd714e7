"""What a provider must be able to do, in parts, and the registry that finds providers by entry point.

A plugin from outside stands on equal ground with the built-in ones: it ships an entry point in the
group `gpubroker.providers` that names a class taking one ProviderContext.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from gpubroker.config import Settings
from gpubroker.doors import Clock, Pool
from gpubroker.errors import ConfigError
from gpubroker.model import OfferQuery, Parsed

GROUP = "gpubroker.providers"


class Limiter(Protocol):
    """Rate limits that hold across processes: they are kept in the store."""

    def wait(self, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        """Take the next slot of this endpoint and sleep until it comes.

        Raises Transient when it would come after the deadline, without taking it.
        """

    def block(self, provider: str, endpoint: str, seconds: float, reason: str) -> None:
        """Nobody asks this endpoint again for so long: a quota or a Retry-After said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderContext:
    """Everything a provider gets from outside. Building a provider does no I/O."""

    env: Mapping[str, str]
    settings: Settings
    clock: Clock
    pool: Pool
    limiter: Limiter

    @property
    def cache_dir(self) -> Path:
        """Where big, versioned downloads may be kept."""
        return self.settings.cache_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How far a provider gets with the credentials at hand."""

    has_credentials: bool
    missing: str = ""  # exactly the variable to set, when something is missing
    without: str = ""  # what works without it: "keyless search", "price book"
    live_without: bool = False  # whether live prices come without it


@runtime_checkable
class PriceSource(Protocol):
    """The part every provider has."""

    name: str

    def access(self) -> Access:
        """From the environment alone, without I/O beyond looking whether a credentials file exists."""

    def endpoint(self) -> str | None:
        """The URL that `offers` talks to first: a quote finds out cheaply that there is no network.

        None when nothing remote is asked.
        """

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """Current offers. Raises MissingCredentials or a ProviderError; a broken row is only skipped."""

    def check(self, deadline_s: float) -> str:
        """For `doctor`: try the credentials without spending anything; one line that says what was proven."""


def names() -> list[str]:
    """Installed providers, without importing any. A name that two distributions claim is refused."""
    return sorted(_entry_points())


def load(name: str, context: ProviderContext) -> PriceSource:
    """One provider, built. Raises ConfigError that says what to install when its module is missing."""
    found = _entry_points().get(name)
    if found is None:
        raise ConfigError(f"no provider is called {name!r}; installed: {', '.join(names())}")
    try:
        factory = found.load()
    except ImportError as error:
        raise ConfigError(f"provider {name} ({found.value}) does not import: {error}") from error
    return cast(PriceSource, factory(context))


def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found and found[point.name].value != point.value:
            both = ", ".join(sorted(p.dist.name if p.dist else p.value for p in (found[point.name], point)))
            raise ConfigError(f"two distributions provide {point.name!r}: {both}; uninstall one")
        found[point.name] = point
    return found
