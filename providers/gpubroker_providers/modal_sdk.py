"""The door to Modal's SDK for modal.py and modal_nodes.py: a question with a deadline, its errors as ours.

The SDK finds the token and MODAL_SERVER_URL by itself, and is imported when it is first asked.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Mapping
from decimal import InvalidOperation
from typing import Any, TypeVar

from gpubroker.errors import (
    AuthFailed,
    BrokerError,
    ConfigError,
    MissingCredentials,
    PayloadChanged,
    ProviderError,
    Transient,
    Unreachable,
)
from gpubroker.provider import ProviderContext
from gpubroker_providers._vendor import plain_text

T = TypeVar("T")
NAME = "modal"
_INSTALL = "pip install 'gpubroker[modal]'"
_TOKEN_VARIABLES = ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")
# By name, so that telling what went wrong does not need the module that may be what is missing.
_SDK_ERRORS: Mapping[str, type[ProviderError]] = {
    "AuthError": AuthFailed,
    "PermissionDeniedError": AuthFailed,
    "ConnectionError": Unreachable,
    "ServiceError": Transient,
    "InternalError": Transient,
    "InternalFailure": Transient,
    "ResourceExhaustedError": Transient,
    "TimeoutError": Transient,
    "ClientClosed": Transient,
}
_SDK_CONFIG_ERRORS = frozenset(("InvalidError", "VersionError"))
# Whose connection the SDK keeps, by token and server: it makes one a process.
_connected: list[tuple[str | None, ...]] = []
# What to do about an error, and what may be shown of it -> ours.
Classed = Callable[[Exception, str], BrokerError]


class Sdk:
    """The SDK with this context's credentials around it."""

    def __init__(self, context: ProviderContext) -> None:
        self._env = context.env

    def missing(self) -> str:
        """The variable to set; "" when the token is in the two, or in the file of `modal token`."""
        config = self._env.get("MODAL_CONFIG_PATH") or os.path.expanduser("~/.modal.toml")
        unset = [name for name in _TOKEN_VARIABLES if not self._env.get(name)]
        return unset[0] if unset and not os.path.exists(config) else ""

    def ask(self, work: Callable[[], Coroutine[Any, Any, T]], deadline_s: float, classed: Classed) -> T:
        """What the work brings.

        Through the SDK's async door, because only there a call that hangs can be cancelled: one that is left
        behind in a thread prints tracebacks when the process ends.
        """
        missing = self.missing()
        if missing:
            raise MissingCredentials(NAME, missing)
        self._leave_others()
        try:
            return asyncio.run(asyncio.wait_for(work(), deadline_s))
        except BrokerError:
            raise
        except Exception as error:  # the SDK lets through what gRPC, HTTP/2, TLS and Decimal raise
            raise classed(error, self._shown(error)) from error

    def _leave_others(self) -> None:
        """A connection with another token, such as one that was typed wrong, is not ours."""
        mine = tuple(self._env.get(name) for name in (*_TOKEN_VARIABLES, "MODAL_SERVER_URL"))
        client = getattr(sys.modules.get("modal"), "Client", None)
        if [mine] != _connected and client is not None:
            client._set_env_client(None)
        _connected[:] = [mine]

    def _shown(self, error: Exception) -> str:
        text = str(error) or type(error).__name__
        for variable in _TOKEN_VARIABLES:
            text = text.replace(self._env.get(variable) or "\0", "[key]")
        return plain_text(text)


def kinds(error: BaseException | None) -> list[str]:
    """The names of the SDK's classes that it is one of."""
    return [kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] == "modal"]


def classed(operation: str, error: Exception, text: str) -> BrokerError:
    """What the caller should do about an error of a question that changes nothing."""
    if isinstance(error, ImportError | AttributeError):
        return ConfigError(f"modal: no SDK with {operation.replace('.', ' ')} ({text}): {_INSTALL}")
    if isinstance(error, InvalidOperation):
        return PayloadChanged(NAME, operation, "rates", "a rate that is not a number")
    if isinstance(error, TimeoutError):
        return Transient(NAME, operation, "no answer before the deadline")
    if isinstance(error, OSError):
        return Unreachable(NAME, operation, text)
    names = kinds(error)
    if _SDK_CONFIG_ERRORS.intersection(names):
        return ConfigError(f"modal: {text}")
    return next((_SDK_ERRORS[name] for name in names if name in _SDK_ERRORS), ProviderError)(
        NAME, operation, text
    )
