"""What a request's body may look like: small checkers that say what is wrong and where.

runpod.py, lambda_cloud.py -> a Shape for each body -> complaints(shape, body), none = well formed

Written by hand after the vendors' documents: those are not shipped, and the tests compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shape = Callable[[Any, str], Iterator[str]]
_LARGEST = 10**12  # no number that means anything to a vendor is larger
# A node cannot be given them: no process takes a NUL, and a lone surrogate is no text.
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


def complaints(shape: Shape, value: Any) -> list[str]:
    """What is wrong with a body, each as one line; [] = nothing."""
    return list(shape(value, ""))


def text(least: int = 0, most: int = 100_000, pattern: str = "") -> Shape:
    """A string of so many characters; the pattern must match from the start."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, str):
            yield f"{where}: expected a string"
        elif not least <= len(value) <= most:
            yield f"{where}: expected {least} to {most} characters"
        elif _UNUSABLE.search(value) or (pattern and not re.match(pattern, value)):
            yield f"{where}: does not match the format"

    return check


def whole(least: int = 0, most: int = _LARGEST) -> Shape:
    """An integer in a range, both ends included."""

    def check(value: Any, where: str) -> Iterator[str]:
        if isinstance(value, bool) or not isinstance(value, int):
            yield f"{where}: expected an integer"
        elif not least <= value <= most:
            yield f"{where}: expected {least} to {most}"

    return check


def boolean(value: Any, where: str) -> Iterator[str]:
    """True or false."""
    if not isinstance(value, bool):
        yield f"{where}: expected a boolean"


def choice(*known: str) -> Shape:
    """One of these words."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, str) or value not in known:
            yield f"{where}: expected one of {', '.join(known)}"

    return check


def items(inner: Shape, least: int = 0, most: int = 10_000) -> Shape:
    """A list."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{where}: expected an array"
        elif not least <= len(value) <= most:
            yield f"{where}: expected {least} to {most} items"
        else:
            for index, item in enumerate(value):
                yield from inner(item, f"{where}[{index}]")

    return check


def table(inner: Shape) -> Shape:
    """An object with any keys."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where}: expected an object"
            return
        for key, item in value.items():
            if not key or "=" in key or _UNUSABLE.search(key):
                yield f"{where}: {key!r} is no usable key"
            yield from inner(item, f"{where}.{key}")

    return check


def nullable(inner: Shape) -> Shape:
    """That or null."""

    def check(value: Any, where: str) -> Iterator[str]:
        if value is not None:
            yield from inner(value, where)

    return check


def record(required: Mapping[str, Shape], optional: Mapping[str, Shape], *, closed: bool = True) -> Shape:
    """An object with these keys; closed = a key that is not listed is wrong."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where or 'body'}: expected an object"
            return
        prefix = f"{where}." if where else ""
        for key in required:
            if key not in value:
                yield f"{prefix}{key}: is required"
        for key, item in value.items():
            shape = required.get(key) or optional.get(key)
            if shape is not None:
                yield from shape(item, f"{prefix}{key}")
            elif closed:
                yield f"{prefix}{key}: unknown property"

    return check
