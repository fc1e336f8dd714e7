"""What RunPod has charged for pods: GPU, CPU and disk together.

settle -> RunPodUsage.usage -> GET /v2/billing/pods by the hour, of all pods -> parse_billing

A request a pod would take longer than a report may, and pass the vendor's limit, after some hundred pods. The
hour that runs is not over, and so is not complete.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from decimal import Decimal
from typing import Any

from gpubroker.errors import PayloadChanged
from gpubroker.money import round_usd
from gpubroker.provider import ProviderContext, UsageReport
from gpubroker_providers._nodes import Door, Slot
from gpubroker_providers._vendor import figure, kind, refuse_drift, rows_at

_BILLING = "pod billing"
_PATH = "/v2/billing/pods"
_ASKS = Slot("billing", 0.2)
_REQUIRED = ("podId", "totalAmount")


def parse_billing(rows: list[Any], pod_ids: Collection[str]) -> dict[str, Decimal]:
    """USD by pod over all hours, of those asked about, rounded once. Raises PayloadChanged."""
    refuse_drift("runpod", _BILLING, rows, "$.records", _REQUIRED)
    usd: dict[str, Decimal] = {}
    for row in rows:
        pod_id = row.get("podId") if isinstance(row, dict) else None
        if isinstance(pod_id, str) and pod_id in pod_ids:
            usd[pod_id] = usd.get(pod_id, Decimal(0)) + _amount(row)
    return {pod_id: round_usd(one) for pod_id, one in usd.items()}


def _amount(row: dict[str, Any]) -> Decimal:
    amount = row.get("totalAmount")
    usd = figure(amount)
    if usd is None or usd < 0:
        raise PayloadChanged("runpod", _BILLING, "$.records[].totalAmount", f"{kind(amount)}, not an amount")
    return usd


class RunPodUsage:
    """The part of RunPod that is Usage."""

    _context: ProviderContext

    def _door(self, deadline_s: float) -> Door:
        raise NotImplementedError

    def usage(self, node_ids: Collection[str], since: datetime, deadline_s: float) -> UsageReport:
        """See Usage."""
        now, door = self._context.clock.now(), self._door(deadline_s)
        params = {"startTime": _hour(since), "endTime": _hour(now), "bucketSize": "hour"}
        answer = door.answer(_BILLING, door.send(_BILLING, "GET", _PATH, _ASKS, params=params))
        usd = parse_billing(rows_at("runpod", _BILLING, answer, "records"), node_ids)
        return UsageReport(usd=usd, complete_until=now.replace(minute=0, second=0, microsecond=0))


def _hour(moment: datetime) -> str:
    """The hour that it is in, as the API writes times."""
    return f"{moment:%Y-%m-%dT%H:00:00Z}"
