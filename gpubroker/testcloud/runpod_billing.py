"""RunPod's billing reports in the test cloud: one record a pod or volume, over the whole time asked about.

bill.py -> pod_report, volume_report, account_report -> runpod.py

The amounts are bill.py's, from the first moment until now; buckets and time ranges are echoed, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from gpubroker.testcloud import bill
from gpubroker.testcloud.world import Rental

_POD = ("totalAmount", "gpuAmount", "cpuAmount", "diskAmount")
_VOLUME = ("totalAmount", "standardAmount", "highPerformanceAmount")
_ACCOUNT = (
    "totalAmount",
    "podGpuAmount",
    "podCpuAmount",
    "podDiskAmount",
    "serverlessGpuAmount",
    "serverlessCpuAmount",
    "serverlessDiskAmount",
    "serverlessFeeAmount",
    "storageStandardAmount",
    "storageHighPerformanceAmount",
    "endpointAmount",
    "clusterGpuAmount",
    "clusterDiskAmount",
    "clusterNetworkingAmount",
)


def pod_report(rentals: Iterable[Rental], query: Mapping[str, Any], now_s: float) -> dict[str, Any]:
    """GET /v2/billing/pods."""
    period = _period(query)
    records = [{**period, "podId": rental.id, **_pod_amounts(rental, now_s)} for rental in rentals]
    return _report(records, query, _POD, uniquePodCount=len(records))


def volume_report(
    volumes: Iterable[tuple[str, str, Sequence[tuple[float, int]]]], query: Mapping[str, Any], now_s: float
) -> dict[str, Any]:
    """GET /v2/billing/network-volumes; a volume is (id, tier, sizes)."""
    period = _period(query)
    records = [
        {**period, "networkVolumeId": volume_id, **_volume_amounts(tier, sizes, now_s)}
        for volume_id, tier, sizes in volumes
    ]
    return _report(records, query, _VOLUME, uniqueNetworkVolumeCount=len(records))


def account_report(
    pods: Mapping[str, Any], volumes: Mapping[str, Any], query: Mapping[str, Any]
) -> dict[str, Any]:
    """GET /v2/billing, from the two others."""
    pod, volume = pods["metadata"]["totals"], volumes["metadata"]["totals"]
    amounts = dict.fromkeys(_ACCOUNT, Decimal(0)) | {
        "totalAmount": pod["totalAmount"] + volume["totalAmount"],
        "podGpuAmount": pod["gpuAmount"],
        "podDiskAmount": pod["diskAmount"],
        "storageStandardAmount": volume["standardAmount"],
        "storageHighPerformanceAmount": volume["highPerformanceAmount"],
    }
    return _report([{**_period(query), **amounts}], query, _ACCOUNT)


def _pod_amounts(rental: Rental, now_s: float) -> dict[str, Decimal]:
    gpu = sum((line.usd for line in bill.lines(rental, now_s) if line.item == "gpu"), Decimal(0))
    total = bill.total(rental, now_s)
    return {"totalAmount": total, "gpuAmount": gpu, "cpuAmount": Decimal(0), "diskAmount": total - gpu}


def _volume_amounts(tier: str, sizes: Sequence[tuple[float, int]], now_s: float) -> dict[str, Decimal]:
    usd, nothing = bill.network_volume(sizes, now_s), Decimal(0)
    standard = tier == "STANDARD"
    return {
        "totalAmount": usd,
        "standardAmount": usd if standard else nothing,
        "highPerformanceAmount": nothing if standard else usd,
    }


def _period(query: Mapping[str, Any]) -> dict[str, str]:
    return {"startTime": query["startTime"], "endTime": query["endTime"]}


def _report(
    records: list[dict[str, Any]], query: Mapping[str, Any], amounts: tuple[str, ...], **counts: int
) -> dict[str, Any]:
    totals = {key: sum((record[key] for record in records), Decimal(0)) for key in amounts}
    metadata = {"query": dict(query), "recordCount": len(records), **counts, "totals": totals}
    return {"records": records, "metadata": metadata}
