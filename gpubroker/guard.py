"""What stands between a plugin and the rest: whatever it does wrong costs only itself, and is said.

A provider may be anybody's code. Its exceptions become our errors, its offers are checked field by field
before they reach the store, and what it prints does not reach standard output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeVar, get_args

from gpubroker.errors import BrokerError, ConfigError, ProviderError
from gpubroker.model import MARKETS, FormFactor, Offer, OfferQuery, Parsed, Skipped, Slice
from gpubroker.money import MAX_BELIEVABLE_USD, round_usd
from gpubroker.provider import Access, PriceSource, ProviderContext, load

T = TypeVar("T")
_TEXTS = ("sku", "gpu", "region", "zone", "cloud", "machine_id", "host_id", "listing_id", "stock")
# Field -> smallest and largest believable value.
_COUNTS = {
    "gpu_count": (1, 1024),
    "vram_gib": (1, 100_000),
    "billing_increment_s": (1, 10**9),
    "minimum_s": (0, 10**9),
    "disk_included_gb": (0, 10**9),
}
_RATES = (
    "storage_usd_per_gb_month",
    "egress_usd_per_gb",
    "ingress_usd_per_gb",
    "cpu_usd_per_core_hour",
    "ram_usd_per_gib_hour",
)
_LONGEST_TEXT = 300


class Guarded:
    """A provider that keeps to the protocol whatever the code behind it does."""

    def __init__(self, name: str, source: PriceSource) -> None:
        self.name = name
        self._source = source

    def access(self) -> Access:
        """See PriceSource. Raises ConfigError."""
        return self._expect(Access, "access", self._source.access)

    def endpoint(self) -> str | None:
        """See PriceSource. Raises ConfigError."""
        return self._expect((str, type(None)), "endpoint", self._source.endpoint)

    def offers(self, query: OfferQuery, deadline_s: float) -> Parsed:
        """See PriceSource; offers that are none are skipped with the reason."""
        parsed = self._call("offers", lambda: self._source.offers(query, deadline_s))
        if not isinstance(parsed, Parsed) or not all(isinstance(p, Slice) for p in parsed.incomplete):
            raise ProviderError(self.name, "offers", f"returned {type(parsed).__name__}, not what it must")
        good, skipped = [], []
        for number, offer in enumerate(parsed.offers):
            flaw = flaw_of(offer, self.name)
            if flaw is None:
                good.append(offer)
            else:
                skipped.append(Skipped(id=plain(str(getattr(offer, "sku", f"offer {number}"))), reason=flaw))
        told = [Skipped(id=plain(str(s.id)), reason=plain(str(s.reason))) for s in parsed.skipped]
        return replace(parsed, offers=tuple(good), skipped=(*told, *skipped))

    def check(self, deadline_s: float) -> str:
        """See PriceSource."""
        return plain(str(self._call("check", lambda: self._source.check(deadline_s))))

    def _expect(self, kind: Any, operation: str, call: Callable[[], T]) -> T:
        answer = self._call(operation, call)
        if not isinstance(answer, kind):
            raise ConfigError(f"provider {self.name}: {operation}() returned {type(answer).__name__}")
        return answer

    def _call(self, operation: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (BrokerError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too: a plugin must not end the process
            text = plain(f"{type(error).__name__}: {error}")
            raise ProviderError(self.name, operation, text) from error


def guarded(name: str, context: ProviderContext) -> Guarded:
    """A provider by name. Raises ConfigError when there is none, or when it does not start."""
    try:
        return Guarded(name, load(name, context))
    except (BrokerError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = plain(f"{type(error).__name__}: {error}")
        raise ConfigError(f"provider {name} does not start: {text}") from error


def flaw_of(offer: object, provider: str) -> str | None:
    """Why this is no offer that could be stored and billed; None when it is one."""
    if not isinstance(offer, Offer):
        return f"a {type(offer).__name__}, not an Offer"
    if offer.provider != provider:
        return "provider: not the plugin's own name"
    for field in _TEXTS:
        value = getattr(offer, field)
        if not isinstance(value, str) or value != plain(value):
            return f"{field}: not plain text of at most {_LONGEST_TEXT} characters"
    for field, (low, high) in _COUNTS.items():
        value = getattr(offer, field)
        if type(value) is not int or not low <= value <= high:
            return f"{field}: not a whole number from {low} to {high}"
    return _flaw_of_words(offer) or _flaw_of_money(offer)


def _flaw_of_words(offer: Offer) -> str | None:
    if offer.market not in MARKETS:
        return "market: unknown"
    if offer.form_factor not in get_args(FormFactor):
        return "form_factor: unknown"
    if not isinstance(offer.preemptible, bool) or offer.verified not in (True, False, None):
        return "preemptible or verified: not a yes or no"
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in dict(offer.details).items()):
        return "details: not texts"
    return None


def _flaw_of_money(offer: Offer) -> str | None:
    if not _is_usd(offer.usd_per_hour) or (offer.usd_per_hour == 0 and offer.provider != "local"):
        return "usd_per_hour: not a Decimal price in whole micro-dollars"
    for field in _RATES:
        value = getattr(offer, field)
        if value is not None and not _is_usd(value):
            return f"{field}: not a Decimal price in whole micro-dollars"
    if offer.reliability is not None and type(offer.reliability) is not Decimal:
        return "reliability: not a Decimal"
    if offer.disk_max_gb is not None and type(offer.disk_max_gb) is not int:
        return "disk_max_gb: not a whole number"
    return None


def _is_usd(value: object) -> bool:
    return (
        type(value) is Decimal
        and value.is_finite()
        and 0 <= value <= MAX_BELIEVABLE_USD
        and value == round_usd(value)
    )


def plain(text: str) -> str:
    """For people and the database: one line, no control characters, no lone surrogates, not too long."""
    if text.isprintable() and len(text) <= _LONGEST_TEXT:
        return text
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:_LONGEST_TEXT]
