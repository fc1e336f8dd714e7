"""The HTTP door of the providers: one client, every request with a deadline, every error classed once.

JSON numbers become Decimal, NaN and Infinity too, so that the row's own check can refuse them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from urllib3.exceptions import HTTPError as Urllib3Error
from urllib3.exceptions import ProtocolError, ReadTimeoutError

from gpubroker.doors import Clock
from gpubroker.errors import AuthFailed, ConfigError, PayloadChanged, ProviderError, Transient, Unreachable

_MAX_BODY_BYTES = 64 * 1024 * 1024
_EXCERPT = 256
_MAX_WAIT_S = 30.0
# What a vendor asks for beyond this is a mistake.
_LONGEST_WAIT_S = 86400.0
# What a vendor's own error rule may turn an answer into: (status, headers, body text) -> error or None.
Classify = Callable[[int, Mapping[str, str], str], ProviderError | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """What a vendor said to one request, whatever its status. Its text may repeat what was sent."""

    status: int
    headers: Mapping[str, str]
    text: str = field(repr=False)


class _Bearer(requests.auth.AuthBase):
    """As an auth object, so that a .netrc entry cannot replace it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _NoAuth(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class HttpClient:
    """Requests to one vendor. `token` is sent as a bearer token and never appears in an error."""

    def __init__(self, provider: str, base_url: str, clock: Clock, *, token: str | None = None) -> None:
        self._provider = provider
        self._base_url = base_url.rstrip("/")
        self._clock = clock
        if token and not (token.isascii() and token.isprintable()):
            # The HTTP library would put such a key into its error text.
            raise ConfigError(f"{provider}: the key holds characters that no key has: copy it again")
        self._token = token
        self._session = requests.Session()

    def json(
        self,
        method: str,
        path: str,
        *,
        operation: str,
        deadline_s: float,
        params: Mapping[str, str] | None = None,
        body: object = None,
        classify: Classify | None = None,
        attempts: int = 3,
    ) -> Any:
        """The decoded answer of an idempotent read, tried again on Transient while the deadline allows."""
        end_s = self._clock.monotonic_s() + deadline_s

        def wait_s(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_s if isinstance(error, Transient) else None
            return min(asked if asked is not None else 0.5 * 2**state.attempt_number, _MAX_WAIT_S)

        def out_of_time(state: RetryCallState) -> bool:
            return self._clock.monotonic_s() + (state.upcoming_sleep or 0) >= end_s

        retrying = Retrying(
            retry=retry_if_exception_type(Transient),
            stop=lambda state: stop_after_attempt(attempts)(state) or out_of_time(state),
            wait=wait_s,
            sleep=self._clock.sleep,
            reraise=True,
        )
        return retrying(
            lambda: self._decode(
                operation, self._text(method, path, operation, end_s, params, body, classify)
            )
        )

    @contextmanager
    def stream(self, url: str, *, operation: str, timeout_s: float) -> Iterator[requests.Response]:
        """A body that is too big to hold: iterate its lines. `url` may be absolute."""
        full = url if "://" in url else self._base_url + url
        try:
            with self._session.get(full, stream=True, timeout=timeout_s, auth=_NoAuth()) as response:
                if response.status_code >= 300:
                    answer = HttpAnswer(status=response.status_code, headers=response.headers, text="")
                    raise self.error_of(operation, answer)
                yield response
        except requests.RequestException as error:
            raise self._failed(operation, error) from error

    def exchange(
        self,
        method: str,
        path: str,
        *,
        operation: str,
        deadline_s: float,
        params: Mapping[str, str] | None = None,
        body: object = None,
    ) -> HttpAnswer:
        """One request, never repeated, and its answer, never judged: for calls that change something.

        Raises Unreachable when it was surely not sent, and Transient or PayloadChanged when nobody knows
        what became of it.
        """
        end_s = self._clock.monotonic_s() + deadline_s
        return self._exchange(method, path, operation, end_s, params, body)

    def error_of(self, operation: str, answer: HttpAnswer) -> ProviderError:
        """The usual class of an answer that is none of success, with an excerpt of its text."""
        status, text = answer.status, self.excerpt(answer.text)
        detail = f"HTTP {status}: {text}" if text else f"HTTP {status}"
        if status in (401, 403):
            return AuthFailed(self._provider, operation, detail)
        if status in (408, 425, 429) or status >= 500:
            return Transient(self._provider, operation, detail, retry_after_s=retry_after_s(answer.headers))
        if 300 <= status < 400:
            detail = f"HTTP {status}: moved to {self.excerpt(answer.headers.get('Location', '?'))}"
        return ProviderError(self._provider, operation, detail)

    def _text(
        self,
        method: str,
        path: str,
        operation: str,
        end_s: float,
        params: Mapping[str, str] | None,
        body: object,
        classify: Classify | None,
    ) -> str:
        answer = self._exchange(method, path, operation, end_s, params, body)
        if answer.status >= 300:
            special = classify(answer.status, answer.headers, answer.text) if classify else None
            raise special or self.error_of(operation, answer)
        return answer.text

    def _exchange(
        self,
        method: str,
        path: str,
        operation: str,
        end_s: float,
        params: Mapping[str, str] | None,
        body: object,
    ) -> HttpAnswer:
        left_s = end_s - self._clock.monotonic_s()
        if left_s <= 0:
            raise Transient(self._provider, operation, "no time left before the deadline")
        try:
            with self._session.request(
                method,
                self._base_url + path,
                params=params,
                json=body,
                auth=_Bearer(self._token) if self._token else _NoAuth(),
                timeout=(min(left_s, 10), left_s),
                stream=True,
                allow_redirects=False,
            ) as response:
                raw = bytearray()
                # Read what is there, not full chunks: requests' timeout is per read, and a server that
                # drips would never end.
                while chunk := response.raw.read1(65536, decode_content=True):
                    raw += chunk
                    if self._clock.monotonic_s() > end_s:
                        raise Transient(self._provider, operation, "the answer came too slowly")
                    if len(raw) > _MAX_BODY_BYTES:
                        raise PayloadChanged(self._provider, operation, "$", "answer larger than 64 MiB")
                text = raw.decode("utf-8", "replace")
                return HttpAnswer(status=response.status_code, headers=response.headers, text=text)
        except (requests.RequestException, Urllib3Error) as error:
            raise self._failed(operation, error) from error

    def _decode(self, operation: str, text: str) -> Any:
        try:
            return loads(text)
        except (ValueError, RecursionError) as error:
            what = "HTML" if text.lstrip()[:1] == "<" else "not JSON"
            raise PayloadChanged(self._provider, operation, "$", f"{what}: {self.excerpt(text)}") from error

    def _failed(self, operation: str, error: requests.RequestException | Urllib3Error) -> ProviderError:
        if isinstance(error, requests.ReadTimeout | ReadTimeoutError):
            return Transient(self._provider, operation, "no answer before the deadline")
        if isinstance(error, requests.ConnectionError):
            kind = Transient if _broke(error) else Unreachable
            return kind(self._provider, operation, self.excerpt(_cause(error)))
        # Not its text: an invalid proxy URL is quoted in it, with its password.
        return Transient(self._provider, operation, f"the HTTP request failed: {type(error).__name__}")

    def excerpt(self, text: str) -> str:
        """At most 256 characters on one line, with the key taken out."""
        if self._token:
            text = text.replace(self._token, "[key]")
        return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:_EXCERPT]


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds; None when it is absent or a date."""
    text = headers.get("Retry-After", "").strip()
    return min(float(text), _LONGEST_WAIT_S) if text.isascii() and text.isdecimal() else None


def loads(text: str) -> Any:
    """JSON with Decimals. Raises ValueError or RecursionError."""
    return json.loads(text, parse_float=_number, parse_constant=Decimal)


def _number(text: str) -> Decimal:
    """NaN for 1e9999999999999999999, which Decimal refuses: one absurd row must not cost the others."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal("NaN")


def _broke(error: requests.ConnectionError) -> bool:
    """Whether there was a connection that ended too early: it may have carried the request."""
    return bool(error.args) and isinstance(error.args[0], ProtocolError)


def _cause(error: BaseException) -> str:
    """The innermost reason in a few words: requests wraps it four times, urllib3 prints object addresses."""
    seen: BaseException = error
    while True:
        inner = seen.__cause__ or seen.__context__
        if inner is None:
            break
        seen = inner
    text = seen.args[-1] if seen.args and isinstance(seen.args[-1], str) else str(seen)
    return re.sub(r"//[^/@\s]*@", "//[key]@", text)[:120]
