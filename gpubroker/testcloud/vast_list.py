"""The instance list of the test cloud's vast.ai: its filters, its order and its pages of 25.

vast.py -> rows -> page_of -> rows of the page, the token of the next one
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from gpubroker.testcloud.vast_rows import STORED_COLUMNS, BadQuery, check_filters, in_order, matches

PAGE = 25


def page_of(
    rows: list[dict[str, Any]], query: Callable[..., str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str | None]:
    """(this page, all that match, the token of the next page). Raises BadQuery.

    `query(name, default)` gives the request's parameters.
    """
    filters = decoded(query("select_filters", "{}"))
    order_by = decoded(query("order_by", "[]"))
    if not isinstance(filters, dict) or not isinstance(order_by, list):
        raise BadQuery("Error in query parameters: not JSON")
    check_filters(filters, STORED_COLUMNS)
    order = []
    for entry in order_by:
        column = entry.get("col") if isinstance(entry, dict) else None
        if not isinstance(column, str) or column not in STORED_COLUMNS:
            raise BadQuery(f"Error in query parameters: {column} is not a valid sort key")
        order.append((column, "desc" if entry.get("dir") == "desc" else "asc"))
    order.append(("id", "asc"))
    limit = whole(query("limit", str(PAGE)), signed=True)
    if limit is None:
        raise BadQuery("Error in query parameters: limit is not a number")
    size = min(PAGE, limit) if limit > 0 else 5
    found = [row for row in rows if matches(row, filters)]
    token = query("after_token")
    rest = in_order(found, order, after=_values_of(token, order) if token else None)
    if len(rest) <= size:
        return rest, found, None
    return rest[:size], found, _token_of(rest[size - 1], order)


def whole(text_: str, *, signed: bool = False) -> int | None:
    """A number in a path or a query; None = it is none."""
    return int(text_) if re.fullmatch(r"-?[0-9]{1,15}" if signed else "[0-9]{1,15}", text_) else None


def decoded(text_: str) -> Any:
    """A query parameter that is JSON; None = it is not."""
    try:
        return json.loads(text_, parse_float=Decimal, parse_constant=_refuse)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _token_of(row: Mapping[str, Any], order: list[tuple[str, str]]) -> str:
    values = {column: row[column] for column, _ in order}
    return base64.b64encode(json.dumps({"values": values}).encode()).decode()


def _values_of(token: str, order: list[tuple[str, str]]) -> list[Any]:
    try:
        values = json.loads(base64.b64decode(token, validate=True))["values"]
        found = [values[column] for column, _ in order]
    except (binascii.Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadQuery("Error in query parameters: invalid after_token") from error
    if not isinstance(found[-1], int) or any(isinstance(value, list | dict) for value in found):
        raise BadQuery("Error in query parameters: invalid after_token")
    return found
