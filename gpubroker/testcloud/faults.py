"""Faults by script: what goes wrong, on which endpoint, how often."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "delay",  # seconds
    "drop_after",  # do it, then close the connection without an answer
    "drop_before",  # close the connection, do nothing
    "429",  # with Retry-After when `retry_after_s` is given
    "5xx_before",  # `status`, nothing done
    "5xx_after",  # do it, then `status`
    "truncate",  # cut the JSON in the middle
    "stale",  # listings as they were `seconds` ago (eventual consistency)
    "duplicate",  # listing rows twice
    "capacity",  # the vendor's own no-capacity answer
    "quota",  # `per_day` such requests in a UTC day, where the vendor has a daily quota (vast's searches)
]
_MOST = 10**9
_LONGEST_S = 1e9
KINDS: tuple[str, ...] = Kind.__args__  # type: ignore[attr-defined]


@dataclass(slots=True, kw_only=True)
class Fault:
    """One line of a fault script: for `count` matching requests after the first `skip`; -1 = for ever."""

    endpoint: str  # "vast PUT /api/v0/asks/*": vendor, method and path, each with shell wildcards
    kind: Kind
    count: int = 1
    skip: int = 0
    seconds: float = 0.0
    status: int = 500
    code: str = ""  # capacity: the vendor's own code, where it has several
    retry_after_s: int | None = None
    per_day: int = 0  # quota
    hits: int = field(default=0, init=False)

    def matches(self, vendor: str, method: str, path: str) -> bool:
        """Whether the request is one of those meant."""
        return fnmatchcase(f"{vendor} {method} {path}", self.endpoint)


class FaultScript:
    """The faults in force, in order; the first that applies to a request is used up by it."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, script: Any) -> int:
        """Take a fault or a list of them, decoded from JSON. Raises ValueError that says what is wrong."""
        entries = script if isinstance(script, list) else [script]
        self._faults += [_parse(entry) for entry in entries]
        return len(entries)

    def clear(self) -> None:
        """From now on nothing goes wrong."""
        self._faults.clear()

    def per_day(self, vendor: str, method: str, path: str) -> int | None:
        """How many such requests a day are answered; None = any number."""
        quotas = [f.per_day for f in self._faults if f.kind == "quota" and f.matches(vendor, method, path)]
        return min(quotas, default=None)

    def take(self, vendor: str, method: str, path: str) -> Fault | None:
        """The fault that this request meets, counted; None = none. A quota is met by asking `per_day`."""
        for fault in self._faults:
            if fault.kind == "quota" or not fault.matches(vendor, method, path):
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.count == 0:
                continue
            fault.count -= fault.count > 0
            fault.hits += 1
            return fault
        return None


def load(spec: str) -> Any:
    """The script of `--faults`: JSON itself, or the path of a file that holds it."""
    text = spec if spec.lstrip().startswith(("[", "{")) else Path(spec).read_text(encoding="utf-8")
    return json.loads(text)


def _parse(entry: Any) -> Fault:
    if not isinstance(entry, dict):
        raise ValueError(f"a fault is an object, not {entry!r}")
    known = {f.name for f in fields(Fault) if f.init}
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"a fault has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if "endpoint" not in entry or entry.get("kind") not in KINDS:
        raise ValueError(f"a fault needs an endpoint and a kind of {', '.join(KINDS)}")
    for name, value in entry.items():
        if not _CHECKS.get(name, _is_text)(value):
            raise ValueError(f"a fault's {name} is not {value!r:.60}")
    return Fault(**entry)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LONGEST_S


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "count": _is_whole(-1, _MOST),
    "skip": _is_whole(0, _MOST),
    "per_day": _is_whole(0, _MOST),
    "status": _is_whole(500, 599),
    "seconds": _is_seconds,
    "retry_after_s": lambda value: value is None or _is_whole(0, _MOST)(value),
}
