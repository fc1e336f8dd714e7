"""What several providers share: a request that keeps to the vendor's limits, and rows that may be broken.

A row's reader raises ValueError with a reason that names the field; its caller turns that into a Skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from gpubroker.errors import PayloadChanged, Transient
from gpubroker.money import parse_usd
from gpubroker.provider import ProviderContext

_LONGEST_TEXT = 120


def ask(
    context: ProviderContext,
    provider: str,
    endpoint: str,
    interval_s: float,
    end_s: float,
    send: Callable[[float], Any],
) -> Any:
    """One answer, after the endpoint's next slot. `send` gets the seconds left until `end_s` (monotonic).

    A wait that the vendor asks for (Retry-After, a quota) is passed on to every process before it is
    raised as Transient.
    """
    context.limiter.wait(provider, endpoint, interval_s, end_s - context.clock.monotonic_s())
    try:
        return send(end_s - context.clock.monotonic_s())
    except Transient as error:
        if error.retry_after_s:
            context.limiter.block(provider, endpoint, error.retry_after_s, error.detail)
        raise


def rows_at(provider: str, operation: str, payload: object, *path: str) -> list[Any]:
    """The list at this path. Raises PayloadChanged naming where the answer stops being what it was."""
    at, found = "$", payload
    for key in path:
        if not isinstance(found, dict):
            raise PayloadChanged(provider, operation, at, f"{kind(found)}, not an object")
        if key not in found:
            has = ", ".join(sorted(plain_text(k) for k in found)) or "nothing"
            raise PayloadChanged(provider, operation, f"{at}.{key}", f"missing; the answer has {has}"[:200])
        at, found = f"{at}.{key}", found[key]
    if not isinstance(found, list):
        raise PayloadChanged(provider, operation, at, f"{kind(found)}, not a list")
    return found


def refuse_drift(
    provider: str, operation: str, rows: Sequence[Any], at: str, required: Iterable[str]
) -> None:
    """Raise PayloadChanged when not one row has a required key ("price.secure" is a key in a key).

    One row without it is a broken row; all of them are a changed API.
    """
    if not rows:
        return
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        raise PayloadChanged(provider, operation, f"{at}[]", f"{kind(rows[0])}, not an object, in every row")
    for key in required:
        if not any(_has(row, key) for row in objects):
            raise PayloadChanged(provider, operation, f"{at}[].{key}", "missing in every row")


def _has(row: object, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(row, dict) and first in row and (not rest or _has(row[first], rest))


def needed(row: dict[str, Any], key: str) -> Any:
    """The value of a required key, present and not null."""
    value = row.get(key)
    if value is None:
        raise ValueError(f"{key}: {'null' if key in row else 'missing'}")
    return value


def usd(row: dict[str, Any], key: str, *, times: int | Decimal = 1, allow_zero: bool = False) -> Decimal:
    """A price or rate of this row times a count, rounded once."""
    try:
        return parse_usd(row.get(key), per_hour_factor=times, allow_zero=allow_zero)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def whole(row: dict[str, Any], key: str, low: int, high: int) -> int:
    """A whole number between the two, both included; 2.0 is one, true is not."""
    value = needed(row, key)
    number = figure(value)
    if number is None or number != int(number) or not low <= number <= high:
        raise ValueError(f"{key}: {plain_text(value)!r} is not a whole number from {low} to {high}")
    return int(number)


def figure(value: object) -> Decimal | None:
    """A finite number within reason (18 places either side of the point), None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    number = Decimal(value)
    return number if number.is_finite() and abs(number.adjusted()) < 18 else None


def kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    for types, word in ((bool, "a boolean"), (dict, "an object"), (list, "a list"), (str, "text")):
        if isinstance(value, types):
            return word
    return "a number"


def plain_text(value: object) -> str:
    """For people: no control characters, and not longer than a line."""
    shown = f"{value:f}" if isinstance(value, Decimal) and figure(value) is not None else str(value)
    shown = shown[:_LONGEST_TEXT].strip()
    return shown if shown.isprintable() else "".join(c if c.isprintable() else "?" for c in shown)


def row_id(row: object, index: int, key: str = "id") -> str:
    """What to call a row in a skip: its id, or its place in the answer."""
    value = row.get(key) if isinstance(row, dict) else None
    return plain_text(value) if isinstance(value, int | str) and value != "" else f"row {index}"
