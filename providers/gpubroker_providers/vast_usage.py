"""What vast.ai has charged for instances: GPU, disk and transfer together.

settle -> VastUsage.usage -> GET /api/v0/charges/ (500 a page) -> parse_charges -> UsageReport

A row is a contract, `source` is "instance-" and its id. By the vendor's document an amount has three
decimals. It does not say how late charges are: ten minutes are assumed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from gpubroker.errors import PayloadChanged
from gpubroker.money import parse_usd
from gpubroker.provider import ProviderContext, UsageReport
from gpubroker_providers._nodes import Door, Slot
from gpubroker_providers._vendor import plain_text, refuse_drift, rows_at

_CHARGES = "show charges"
_ASKS = Slot("charges", 1.0)
_PAGE, _MOST_PAGES = 500, 100
_LATE = timedelta(minutes=10)
_REQUIRED = ("source", "amount")


def parse_charges(rows: list[Any], node_ids: Collection[str]) -> dict[str, Decimal]:
    """By instance, of those asked about; several rows of one are added up. Raises PayloadChanged."""
    refuse_drift("vast", _CHARGES, rows, "$.results", _REQUIRED)
    usd: dict[str, Decimal] = {}
    for row in rows:
        node_id = _instance_of(row)
        if node_id in node_ids:
            usd[node_id] = usd.get(node_id, Decimal(0)) + _amount(row)
    return usd


def _instance_of(row: object) -> str:
    source = row.get("source") if isinstance(row, dict) else None
    return source.removeprefix("instance-") if isinstance(source, str) else ""


def _amount(row: dict[str, Any]) -> Decimal:
    try:
        return parse_usd(row.get("amount"), allow_zero=True)
    except ValueError as error:
        where = f"$.results[{plain_text(row.get('source'))}].amount"
        raise PayloadChanged("vast", _CHARGES, where, str(error)) from error


class VastUsage:
    """The part of Vast that is Usage."""

    _context: ProviderContext

    def _door(self, deadline_s: float) -> Door:
        raise NotImplementedError

    def usage(self, node_ids: Collection[str], since: datetime, deadline_s: float) -> UsageReport:
        """See Usage."""
        now = self._context.clock.now()
        rows = list(self._charges(since - timedelta(days=1), now + timedelta(days=1), deadline_s))
        return UsageReport(usd=parse_charges(rows, node_ids), complete_until=now - _LATE)

    def _charges(self, since: datetime, until: datetime, deadline_s: float) -> Iterable[Any]:
        """Whole days more than asked for: a day may begin by another clock."""
        days = {"gte": int(since.timestamp()), "lte": int(until.timestamp())}
        filters = json.dumps({"day": days, "type": {"in": ["instance"]}})
        door, params = self._door(deadline_s), {"select_filters": filters, "limit": str(_PAGE)}
        for _ in range(_MOST_PAGES):
            answer = door.send(_CHARGES, "GET", "/api/v0/charges/", _ASKS, params=params)
            payload = door.answer(_CHARGES, answer)
            yield from rows_at("vast", _CHARGES, payload, "results")
            token = payload.get("next_token")
            if not token:
                return
            if token == params.get("after_token"):
                raise PayloadChanged("vast", _CHARGES, "$.next_token", "the same one again")
            params = {**params, "after_token": str(token)}
        raise PayloadChanged("vast", _CHARGES, "$.next_token", f"no end after {_MOST_PAGES} pages")
