"""Which candidates were passed over, and why; which providers are left alone for a while. No clock, no I/O.

a create raised                     its other offers
NoCapacity, Refused, ...            are asked for
QuotaExceeded                       are left alone for a while: in its region, or everywhere
AuthFailed, ConfigError,            are left alone for a while: a person must act
PayloadChanged
Unreachable                         are left alone for a minute
Transient                           wait for as long as the vendor wishes; left alone when it goes on so
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from gpubroker.errors import (
    AuthFailed,
    ConfigError,
    PayloadChanged,
    QuotaExceeded,
    Transient,
    Unreachable,
)
from gpubroker.model import Offer

# Asking in between only costs requests.
_FOR_A_PERSON = timedelta(minutes=15)
# For a vendor that does not say how long, and the longest that is worth waiting for at one vendor.
_PAUSE, _WORTH_A_WAIT = timedelta(seconds=10), timedelta(seconds=60)
# So often in a row a vendor may ask for patience before the others are tried.
_MOST_PAUSES = 3
_EVERYWHERE = ""
_MOST_REASONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A candidate that was not taken."""

    name: str  # of the offer, for people
    reason: str
    error: Exception | None = None  # what its provider raised, now or lately; None = it was not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """A provider that is left alone."""

    until: datetime
    error: Exception
    is_short: bool  # worth waiting for: the others would cost more


@dataclass(slots=True)
class Passing:
    """Over the life of one supervisor. `over` is the last round's, in the order of the candidates."""

    over: list[PassedOver] = field(default_factory=list)
    _rests: dict[tuple[str, str], Rest] = field(default_factory=dict)
    _pauses: dict[str, int] = field(default_factory=dict)

    def rest_of(self, offer: Offer, now: datetime) -> Rest | None:
        """Why its provider is not asked for this offer now; None = it may be."""
        rests = (self._rests.get((offer.provider, where)) for where in (_EVERYWHERE, offer.region))
        return next((rest for rest in rests if rest is not None and rest.until > now), None)

    def pass_over(self, name: str, reason: str, error: Exception | None = None) -> PassedOver:
        """It is not taken; the reason may be shown."""
        passed = PassedOver(name=name, reason=reason, error=error)
        self.over.append(passed)
        return passed

    def rented(self, provider: str) -> None:
        """It has patience again."""
        self._pauses.pop(provider, None)

    def failed(self, offer: Offer, error: Exception, now: datetime) -> bool:
        """A create raised this. True = wait for this provider, rather than ask the next."""
        if isinstance(error, Transient):
            return self._pause(offer.provider, error, now)
        where = error.region if isinstance(error, QuotaExceeded) else _EVERYWHERE
        if isinstance(error, Unreachable):
            self._leave(offer.provider, where, error, now + _WORTH_A_WAIT)
        elif isinstance(error, QuotaExceeded | AuthFailed | ConfigError | PayloadChanged):
            self._leave(offer.provider, where, error, now + _FOR_A_PERSON)
        return False

    def refused_by_all(self) -> AuthFailed | None:
        """The error, when nobody who has an offer takes our key: waiting changes nothing."""
        errors = [passed.error for passed in self.over]
        last = errors[-1] if errors and all(isinstance(error, AuthFailed) for error in errors) else None
        return last if isinstance(last, AuthFailed) else None

    def summary(self) -> str:
        """Of the last round, when nothing came of it: how many were passed over for which reason."""
        if not self.over:
            return "nobody offers such a node now"
        reasons = Counter(passed.reason for passed in self.over)
        told = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(_MOST_REASONS))
        return f"none of {len(self.over)} offers can be had now ({told})"

    def _leave(
        self, provider: str, where: str, error: Exception, until: datetime, *, is_short: bool = False
    ) -> None:
        self._rests[provider, where] = Rest(until=until, error=error, is_short=is_short)

    def _pause(self, provider: str, error: Transient, now: datetime) -> bool:
        self._pauses[provider] = self._pauses.get(provider, 0) + 1
        wished = _PAUSE if error.retry_after_s is None else timedelta(seconds=error.retry_after_s)
        is_short = wished <= _WORTH_A_WAIT and self._pauses[provider] <= _MOST_PAUSES
        until = now + (wished if is_short else max(wished, _WORTH_A_WAIT))
        self._leave(provider, _EVERYWHERE, error, until, is_short=is_short)
        return is_short
