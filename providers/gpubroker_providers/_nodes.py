"""What the providers that rent nodes over HTTP share: one create, errors without secrets, rows of nodes.

launcher -> create -> check_launch (no call yet) -> Door.launch (one call) -> the vendor's own reader -> id

An answer about nodes repeats what they were created with, the job's environment too. So no answer that was
read is ever quoted, and of a refusal the vendor's words without any value of that environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from gpubroker.errors import (
    AuthFailed,
    LaunchUncertain,
    PayloadChanged,
    ProviderError,
    QuotaExceeded,
    Refused,
    Transient,
    Unreachable,
)
from gpubroker.http import HttpAnswer, HttpClient, loads, retry_after_s
from gpubroker.model import Offer
from gpubroker.money import parse_usd
from gpubroker.provider import TAG, Capabilities, NodeView, ProviderContext, VolumeRules
from gpubroker_providers._vendor import plain_text

_LONGEST_WORDS = 256
# A shorter value of an environment ("1", "yes") is no secret, and would cut holes into every sentence.
_SHORTEST_SECRET = 4


def check_launch(
    can: Capabilities,
    markets: Sequence[str],
    offer: Offer,
    tag: str,
    bid_usd_per_hour: Decimal | None,
) -> None:
    """Raise ValueError for what must not even be asked: no call is made.

    A vendor that takes bids rents on demand when the bid of a spot offer is forgotten.
    """
    if offer.market not in markets:
        raise ValueError(f"{offer.provider} does not rent {offer.market}, only {' and '.join(markets)}")
    if not tag.startswith(TAG) or len(tag) > can.tag_max:
        raise ValueError(f"a tag begins with {TAG} and has at most {can.tag_max} characters: {tag!r}")
    is_bid = can.takes_bids and offer.market == "spot"
    if is_bid and bid_usd_per_hour is None:
        raise ValueError(f"{offer.provider}: a spot node without a bid would be rented on demand")
    if not is_bid and bid_usd_per_hour is not None:
        raise ValueError(f"{offer.provider}: a bid for {offer.market}, which takes none")
    if bid_usd_per_hour is not None and not (bid_usd_per_hour.is_finite() and bid_usd_per_hour > 0):
        raise ValueError(f"{offer.provider}: a bid of {bid_usd_per_hour} USD per hour")


def check_volume(provider: str, rules: VolumeRules, name: str, size_gb: int | None, region: str) -> None:
    """Raise ValueError for a volume that must not even be asked for: no call is made."""
    if not re.fullmatch(rf"{TAG}[a-z0-9-]{{1,40}}", name):
        raise ValueError(f"{provider}: a volume's name begins with {TAG}: {plain_text(name)!r}")
    if bool(region) is not rules.has_region:
        raise ValueError(f"{provider}: a volume {'needs' if rules.has_region else 'has no'} region")
    if rules.sizes_gb is None:
        if size_gb is not None:
            raise ValueError(f"{provider}: a volume has no size, it grows")
    elif size_gb is None or not rules.sizes_gb[0] <= size_gb <= rules.sizes_gb[1]:
        raise ValueError(f"{provider}: a volume has {rules.sizes_gb[0]} to {rules.sizes_gb[1]} GB")


@dataclass(frozen=True, slots=True)
class Slot:
    """An endpoint's pace: at least so long between two requests of the account."""

    endpoint: str
    interval_s: float


class Door:
    """Requests about nodes to one vendor, until one deadline, each endpoint at its pace.

    `pause_s`: for how long the vendor wants to be left alone, by its answer with status 429.
    """

    def __init__(
        self,
        context: ProviderContext,
        provider: str,
        http: HttpClient,
        deadline_s: float,
        pause_s: Callable[[HttpAnswer], float | None] = lambda answer: retry_after_s(answer.headers),
    ) -> None:
        self._context, self._provider, self._http, self._pause_s = context, provider, http, pause_s
        self._end_s = context.clock.monotonic_s() + deadline_s

    def send(
        self,
        operation: str,
        method: str,
        path: str,
        *slots: Slot,
        body: object = None,
        params: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        """One answer, whatever it is, once all of the slots have come."""
        self._take(operation, slots)
        return self._exchange(operation, method, path, slots, body, params)

    def launch(
        self, operation: str, method: str, path: str, *slots: Slot, body: object, tag: str
    ) -> HttpAnswer:
        """The answer to a create. Once it was sent, no whole answer means LaunchUncertain."""
        self._take(operation, slots)
        try:
            return self._exchange(operation, method, path, slots, body, None)
        except Unreachable:
            raise
        except ProviderError as error:
            lost = LaunchUncertain(self._provider, operation, error.detail, tag=tag)
        raise lost

    def answer(self, operation: str, answer: HttpAnswer) -> Any:
        """What a successful answer holds. Raises the usual error for any other."""
        if answer.status >= 300:
            error = self._http.error_of(operation, answer)
            if isinstance(error, Transient) and error.retry_after_s is None:
                error.retry_after_s = self._pause_s(answer)
            raise error
        found = decoded(answer)
        if found is None:
            raise PayloadChanged(
                self._provider, operation, "$", f"not JSON, in {len(answer.text)} characters"
            )
        return found

    def _take(self, operation: str, slots: Iterable[Slot]) -> None:
        limiter = self._context.limiter
        for slot in slots:
            limiter.wait(self._provider, slot.endpoint, slot.interval_s, self._left_s())
        if self._left_s() <= 0:
            raise Transient(self._provider, operation, "no time left before the deadline")

    def _left_s(self) -> float:
        return self._end_s - self._context.clock.monotonic_s()

    def _exchange(
        self,
        operation: str,
        method: str,
        path: str,
        slots: tuple[Slot, ...],
        body: object,
        params: Mapping[str, str] | None,
    ) -> HttpAnswer:
        answer = self._http.exchange(
            method, path, operation=operation, deadline_s=self._left_s(), body=body, params=params
        )
        pause_s = self._pause_s(answer) if answer.status == 429 else None
        if pause_s and slots:
            self._context.limiter.block(
                self._provider, slots[0].endpoint, pause_s, f"{operation}: asked too often"
            )
        return answer


def created_id(provider: str, operation: str, answer: HttpAnswer, *, tag: str, at: Sequence[str]) -> str:
    """The new volume's id. Raises what any other answer means: in doubt LaunchUncertain."""
    status, text = answer.status, words(answer, {})
    if status < 300:
        found = decoded(answer)
        for key in at:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, str) and found:
            return found
        raise LaunchUncertain(provider, operation, f"HTTP {status}, without an id", tag=tag)
    if status == 429:
        raise Transient(provider, operation, text, retry_after_s=retry_after_s(answer.headers))
    if status < 400 or status == 408 or status >= 500:
        raise LaunchUncertain(provider, operation, text, tag=tag)
    if error_code(answer) == "global/quota-exceeded" or status == 402:
        raise QuotaExceeded(provider, operation, text)
    raise (AuthFailed if status in (401, 403) else Refused)(provider, operation, text)


def our_volumes(
    provider: str, operation: str, rows: Iterable[Any], at: str
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(id, name, row) of volumes whose name begins with our tag; `at` is where the rows were found.

    Raises PayloadChanged when one of ours has no id: it must not be lost.
    """
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.startswith(TAG):
            continue
        volume_id = row.get("id")
        if not isinstance(volume_id, str) or not volume_id:
            raise PayloadChanged(provider, operation, f"{at}[].id", f"not text at {plain_text(name)}")
        yield volume_id, name, row


def error_code(answer: HttpAnswer) -> str:
    """The code in {"error": {"code": ...}}; "" where there is none."""
    body = decoded(answer)
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("code", "")) if isinstance(error, dict) else ""


def decoded(answer: HttpAnswer) -> Any:
    """The JSON in it; None where it is none, or null."""
    try:
        return loads(answer.text)
    except (ValueError, RecursionError):
        return None


def words(answer: HttpAnswer, environment: Mapping[str, str]) -> str:
    """What the vendor said, on one line, for people: without any value of the job's environment."""
    text = answer.text
    # The longest first: one may be a part of another.
    for value in sorted(environment.values(), key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
                text = text.replace(form, "[hidden]")
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:_LONGEST_WORDS]
    return f"HTTP {answer.status}: {line}" if line else f"HTTP {answer.status}"


def once_each(nodes: Iterable[NodeView]) -> list[NodeView]:
    """One view a node, the last that was read: pages overlap when nodes come and go between them."""
    return list({node.id: node for node in nodes}.values())


def usd_or_none(value: object) -> Decimal | None:
    """USD per hour as far as the vendor says one: what a node costs is no reason to lose sight of it."""
    try:
        return parse_usd(value, allow_zero=True)
    except ValueError:
        return None


def moment(value: object) -> datetime | None:
    """An epoch, or ISO 8601 with its offset; None for anything else."""
    try:
        if isinstance(value, str):
            found = datetime.fromisoformat(value)
            return found.astimezone(UTC) if found.tzinfo else None
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            return datetime.fromtimestamp(int(value), UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return None


def port_or_none(value: object) -> int | None:
    """A TCP port: a number, or its digits."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    return int(text) if re.fullmatch(r"[0-9]{1,5}", text) and 0 < int(text) < 65536 else None


def reason_of(*parts: object) -> str:
    """The vendor's words for a state, those that there are."""
    return ": ".join(plain_text(part) for part in parts if part not in (None, ""))
