"""Errors, classed by what the caller does next.

BrokerError                          exit code
├ ConfigError                        2   fix the configuration or the command line and rerun
│ └ MissingCredentials               2   set the variable that is named
├ NoFeasibleOffer(rejections)        3   what was tried and why each failed
├ OverBudget                         5   a cap would be passed: raise it, or wait
├ NotOurs                            2   another supervisor has the job now: leave it alone
├ ProviderError                      4   (provider, operation, detail)
│ ├ Transient(retry_after_s)         4   wait, same call again
│ ├ Unreachable                      4   no connection: the network or the host is away
│ ├ NoCapacity                       4   this offer is gone: the next one
│ │ └ QuotaExceeded                  4   the account may not: another provider or region, and tell the person
│ ├ Refused                          4   the request is wrong for this vendor: do not repeat it
│ ├ LaunchUncertain(tag, ids)        4   something may be billing: list by tag before anything else
│ ├ AuthFailed                       4   stop asking this provider
│ └ PayloadChanged(path)             4   never retry, tell a person
└ StoreError                         2   the database said no
  └ SchemaTooNew                     2   this gpubroker is older than its database
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime


class BrokerError(Exception):
    """Anything gpubroker reports in one sentence instead of a traceback."""

    exit_code = 1


class ConfigError(BrokerError):
    """The command line, a config file or the environment is wrong."""

    exit_code = 2


class MissingCredentials(ConfigError):
    """A provider's account variable is not set. `variable` is exactly what to set."""

    def __init__(self, provider: str, variable: str) -> None:
        super().__init__(f"{provider}: {variable} is not set")
        self.provider = provider
        self.variable = variable


class NoFeasibleOffer(BrokerError):
    """Nothing fits. `rejections` are (what, why) pairs, the nearest misses first."""

    exit_code = 3

    def __init__(self, message: str, rejections: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.rejections = tuple(rejections)


class OverBudget(BrokerError):
    """Spending more would pass a cap. Says the limit, what is spent, and what was wanted.

    `until`: when a day's cap begins anew; None = it is the job's own, and waiting does not help.
    """

    exit_code = 5

    def __init__(self, message: str, *, until: datetime | None = None) -> None:
        super().__init__(message)
        self.until = until


class NotOurs(BrokerError):
    """The job went to another supervisor, or to none, while this one was away: nothing was written."""

    exit_code = 2


class ProviderError(BrokerError):
    """A vendor's API failed. `detail` is safe to print: excerpts are cut and secrets redacted."""

    exit_code = 4

    def __init__(self, provider: str, operation: str, detail: str) -> None:
        super().__init__(f"{provider}: {operation}: {detail}")
        self.provider = provider
        self.operation = operation
        self.detail = detail


class Transient(ProviderError):
    """The same call may succeed later. `retry_after_s` is the vendor's wish, None when it gave none."""

    def __init__(
        self, provider: str, operation: str, detail: str, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(provider, operation, detail)
        self.retry_after_s = retry_after_s


class Unreachable(ProviderError):
    """The host could not be resolved or connected to: nothing was asked, nothing was done."""


class NoCapacity(ProviderError):
    """The offer cannot be had now, whatever was listed: try the next."""


class QuotaExceeded(NoCapacity):
    """The account's limit, not the market's: offers of the same kind would fail alike.

    `region` is where the limit holds; "" = for all of the account.
    """

    def __init__(self, provider: str, operation: str, detail: str, *, region: str = "") -> None:
        super().__init__(provider, operation, detail)
        self.region = region


class Refused(ProviderError):
    """The vendor understood the request and will not do it: repeating it changes nothing."""


class LaunchUncertain(ProviderError):
    """A create may have succeeded although it looked failed.

    The tag, and the ids that are known, say what to look for before another attempt.
    """

    def __init__(
        self, provider: str, operation: str, detail: str, *, tag: str, ids: Sequence[str] = ()
    ) -> None:
        known = f", ids {', '.join(ids)}" if ids else ""
        super().__init__(provider, operation, f"{detail}; what is tagged {tag} may be billing{known}")
        self.tag = tag
        self.ids = tuple(ids)


class AuthFailed(ProviderError):
    """The key was refused: asking again will not help."""


class PayloadChanged(ProviderError):
    """The answer is not in the documented shape. `path` names what is missing or wrong."""

    def __init__(self, provider: str, operation: str, path: str, detail: str) -> None:
        super().__init__(provider, operation, f"{path}: {detail}")
        self.path = path


class StoreError(BrokerError):
    """The price database could not be read or written."""

    exit_code = 2


class SchemaTooNew(StoreError):
    """The database was written by a newer gpubroker."""

    exit_code = 2
