"""What RunPod has charged for pods: GPU, CPU and disk together.

settle -> RunPodUsage.usage -> GET /v2/billing/pods?podId=... by the hour, one request a pod -> parse_billing

The hour that runs is not over, and so is not complete.
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


def parse_billing(rows: list[Any], pod_id: str) -> Decimal | None:
    """USD over all hours, rounded once; None where no record is this pod's. Raises PayloadChanged."""
    refuse_drift("runpod", _BILLING, rows, "$.records", _REQUIRED)
    amounts = [row.get("totalAmount") for row in rows if isinstance(row, dict) and row.get("podId") == pod_id]
    usd = [figure(amount) for amount in amounts]
    if any(one is None or one < 0 for one in usd):
        wrong = next(a for a, one in zip(amounts, usd, strict=True) if one is None or one < 0)
        raise PayloadChanged("runpod", _BILLING, "$.records[].totalAmount", f"{kind(wrong)}, not an amount")
    return round_usd(sum((one for one in usd if one is not None), Decimal(0))) if usd else None


class RunPodUsage:
    """The part of RunPod that is Usage."""

    _context: ProviderContext

    def _door(self, deadline_s: float) -> Door:
        raise NotImplementedError

    def usage(self, node_ids: Collection[str], since: datetime, deadline_s: float) -> UsageReport:
        """See Usage."""
        now, door = self._context.clock.now(), self._door(deadline_s)
        period = {"startTime": _hour(since), "endTime": _hour(now)}
        usd = {}
        for pod_id in sorted(node_ids):
            params = {**period, "bucketSize": "hour", "podId": pod_id}
            answer = door.answer(_BILLING, door.send(_BILLING, "GET", _PATH, _ASKS, params=params))
            found = parse_billing(rows_at("runpod", _BILLING, answer, "records"), pod_id)
            if found is not None:
                usd[pod_id] = found
        return UsageReport(usd=usd, complete_until=now.replace(minute=0, second=0, microsecond=0))


def _hour(moment: datetime) -> str:
    """The hour that it is in, as the API writes times."""
    return f"{moment:%Y-%m-%dT%H:00:00Z}"
