"""What vast.ai's answers look like: pure translation of hosts and rentals into its rows, and its filters.

Host, prices -> offer_row -> matches, in_order -> POST /bundles/
Rental       -> instance_row -> matches -> GET /instances/

Units are the vendor's: MB, GB and month, USD per hour for the whole offer. Facts: vast's OpenAPI description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from functools import cmp_to_key
from typing import Any

from gpubroker.testcloud.world import Host, Rental, State

OPERATORS = ("eq", "neq", "gt", "gte", "lt", "lte", "in", "notin")
HOURS_IN_MONTH = 30 * 24
_MICRO = Decimal("0.000001")
# Stored on the contract itself: the instance list filters and sorts by these alone.
STORED_COLUMNS = frozenset(
    (
        "id",
        "label",
        "actual_status",
        "intended_status",
        "cur_state",
        "next_state",
        "gpu_name",
        "verification",
        "machine_id",
        "host_id",
        "is_bid",
        "start_date",
        "image_uuid",
    )
)
_SEARCH_ONLY = frozenset(("verified", "datacenter", "ubuntu_version", "disable_bundling"))


class BadQuery(ValueError):
    """A filter or an order that the server does not understand; the text is its answer."""


def money(value: Decimal) -> Decimal:
    """USD to the micro-dollar."""
    return value.quantize(_MICRO)


def disk_usd_per_hour(host: Host, disk_gb: Decimal | int) -> Decimal:
    """What a disk of this size costs beside a running GPU."""
    return Decimal(disk_gb) * Decimal(host.facts["storage_cost"]) / HOURS_IN_MONTH


def whole_gb(disk_gb: Decimal | int) -> int:
    """A disk is made in whole GB."""
    return int(Decimal(disk_gb).to_integral_value(rounding=ROUND_CEILING))


def hardware(host: Host) -> dict[str, Any]:
    """What an offer and an instance both say of the machine."""
    facts = host.facts
    up, down = Decimal(facts["inet_up_cost"]), Decimal(facts["inet_down_cost"])
    return {
        "bundle_id": facts["machine_id"] * 7 + 11,
        "machine_id": facts["machine_id"],
        "host_id": facts["host_id"],
        "hosting_type": facts["hosting_type"],
        "gpu_name": host.sku,
        "gpu_arch": "nvidia",
        "num_gpus": host.gpu_count,
        "gpu_frac": Decimal(1),
        "gpu_ram": facts["gpu_ram"],
        "gpu_lanes": 16,
        "gpu_mem_bw": Decimal("900.0"),
        "bw_nvlink": Decimal("300.0") if host.form_factor == "SXM" else Decimal(0),
        "gpu_display_active": False,
        "gpu_max_power": 450,
        "gpu_max_temp": 90,
        "compute_cap": facts["compute_cap"],
        "cuda_max_good": facts["cuda_max_good"],
        "driver_version": facts["driver_version"],
        "driver_vers": int("".join(f"{int(part):03d}" for part in facts["driver_version"].split("."))),
        "cpu_arch": "amd64",
        "cpu_name": "Imaginary EPYC 7000",
        "cpu_cores": facts["cpu_cores"],
        "cpu_cores_effective": facts["cpu_cores_effective"],
        "cpu_ghz": Decimal("2.45"),
        "cpu_ram": facts["cpu_ram"],
        "has_avx": 1,
        "disk_name": "imaginary nvme",
        "disk_bw": facts["disk_bw"],
        "pci_gen": Decimal(4),
        "pcie_bw": Decimal("24.5"),
        "mobo_name": "IMAGINARY-2026",
        "os_version": "22.04",
        "inet_up": facts["inet_up"],
        "inet_down": facts["inet_down"],
        "inet_up_cost": up,
        "inet_down_cost": down,
        "internet_up_cost_per_tb": up * 1000,
        "internet_down_cost_per_tb": down * 1000,
        "direct_port_count": facts["direct_port_count"],
        "static_ip": facts["static_ip"],
        "geolocation": facts["geolocation"],
        "geolocode": facts["machine_id"] % 10000,
        "reliability": facts["reliability2"],
        "reliability2": facts["reliability2"],
        "expected_reliability": facts["reliability2"],
        "reliability_mult": facts["reliability2"],
        "verification": facts["verification"],
        "vericode": int(facts["verification"] == "verified"),
        "is_vm_deverified": False,
        "vms_enabled": False,
        "resource_type": "gpu",
        "cluster_id": None,
        "hostname": None,
        "logo": "/static/logos/vastai_small2.png",
        "webpage": None,
        "external": False,
        "storage_cost": facts["storage_cost"],
        "dlperf": facts["dlperf"],
        "total_flops": facts["dlperf"] * 2,
        "credit_discount_max": Decimal("0.2"),
        "time_remaining": "",
        "time_remaining_isbid": "",
    }


def _prices(host: Host, base: Decimal, disk_gb: Decimal | int) -> dict[str, Any]:
    disk = disk_usd_per_hour(host, disk_gb)
    total = base + disk
    speed = host.facts["dlperf"]
    parts = {
        "gpuCostPerHour": money(base),
        "diskHour": money(disk),
        "totalHour": money(total),
        "discountTotalHour": Decimal(0),
        "discountedTotalPerHour": money(total),
    }
    return {
        "dph_base": money(base),
        "dph_total": money(total),
        "dph_total_adj": money(total),
        "storage_total_cost": money(disk),
        "dlperf_per_dphtotal": money(speed / total) if total else Decimal(0),
        "flops_per_dphtotal": money(speed * 2 / total) if total else Decimal(0),
        "score": money(speed * Decimal(str(host.facts["reliability2"])) / max(total, _MICRO)),
        "vram_costperhour": money(base / (host.facts["gpu_ram"] * host.gpu_count)),
        "search": parts,
        "instance": dict(parts),
    }


def offer_row(
    host: Host,
    *,
    kind: str,
    ask_id: int,
    min_bid: Decimal | None,
    allocated_gb: Decimal,
    rented: bool,
    now_s: float,
) -> dict[str, Any]:
    """One offer as the search answers it; `kind` is ondemand, bid or reserved."""
    base = min_bid if kind == "bid" and min_bid is not None else host.usd_per_hour
    row = hardware(host) | _prices(host, base, allocated_gb)
    row |= {
        "id": ask_id,
        "ask_contract_id": ask_id,
        "rn": 1,
        "bundled_results": None,
        "gpu_ids": [],
        "gpu_total_ram": host.facts["gpu_ram"] * host.gpu_count,
        "disk_space": host.facts["disk_space"],
        "min_bid": min_bid,
        "is_bid": kind == "bid",
        "rentable": True,
        "rented": rented,
        "start_date": Decimal(int(now_s) - 86400),
        "end_date": Decimal(int(now_s) + host.facts["duration_s"]),
        "duration": Decimal(host.facts["duration_s"]),
        "public_ipaddr": "127.0.0.1",
        "discount_rate": Decimal("0.15"),
        "discounted_hourly": money(base * Decimal("0.85")),
        "discounted_dph_total": money(row["dph_total"] * Decimal("0.85")),
        "avail_vol_ask_id": None,
        "avail_vol_dph": None,
        "avail_vol_size": None,
        "nw_disk_min_bw": None,
        "nw_disk_max_bw": None,
        "nw_disk_avg_bw": None,
    }
    return row


def status_of(rental: Rental, state: State) -> dict[str, Any]:
    """The four states of an instance. Stopped by its user, outbid and never started all look alike."""
    if state == "stopped":
        waits = (
            "running" if rental.wish.get("wanted") == "running" and not rental.wish["is_bid"] else "stopped"
        )
        ran = any(event.kind == "running" for event in rental.events)
        actual = "exited" if ran else "created"
        return {
            "actual_status": actual,
            "intended_status": waits,
            "cur_state": "stopped",
            "next_state": waits,
            "status_msg": rental.wish.get("status_msg"),
        }
    return {
        "actual_status": "running" if state == "running" else "loading",
        "intended_status": "running",
        "cur_state": "running",
        "next_state": "running",
        "status_msg": None,
    }


def instance_row(
    rental: Rental, state: State, *, min_bid: Decimal | None, tag: str, now_s: float
) -> dict[str, Any]:
    """One instance as both lists answer it."""
    host, wish = rental.host, rental.wish
    started_s = rental.events[0].at_s
    running = state == "running" and rental.node is not None
    port = rental.node.ssh_port if rental.node is not None else int(wish.get("last_port", 1))
    row = hardware(host) | _prices(host, rental.usd_per_hour, rental.disk_gb) | status_of(rental, state)
    row |= {
        "id": int(rental.id),
        "label": tag or None,
        "template_id": None,
        "template_hash_id": wish.get("template_hash_id"),
        "template_name": None,
        "image_uuid": wish["image"],
        "image_args": wish.get("args") or [],
        "image_runtype": wish["runtype"],
        "extra_env": [f"{name}={value}" for name, value in wish["env"].items()],
        "onstart": wish.get("onstart") or "",
        "jupyter_token": "0" * 64,
        "local_ipaddrs": "127.0.0.1 \n",
        # Whitespace around it, as the vendor has it.
        "public_ipaddr": "127.0.0.1 ",
        "ssh_host": "127.0.0.1",
        "ssh_idx": "0",
        "ssh_port": port,
        "machine_dir_ssh_port": port,
        "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]} if running else None,  # noqa: S104
        "direct_port_start": -1,
        "direct_port_end": -1,
        "start_date": started_s,
        "end_date": started_s + host.facts["duration_s"],
        "uptime_mins": int((now_s - rental.since_s) / 60) if running else None,
        "duration": host.facts["duration_s"] - (now_s - started_s),
        "is_bid": wish["is_bid"],
        "min_bid": min_bid if min_bid is not None else host.usd_per_hour,
        "rentable": False,
        "disk_space": rental.disk_gb,
        "disk_util": -1,
        "disk_usage": -1,
        "cpu_util": Decimal(0),
        "gpu_util": Decimal(0) if running else None,
        "gpu_temp": Decimal(40) if running else None,
        "gpu_totalram": host.facts["gpu_ram"] * host.gpu_count,
        "mem_limit": None,
        "mem_usage": None,
        "vmem_usage": None,
        "credit_balance": None,
        "credit_discount": None,
        "client_run_time": Decimal(1),
        "host_run_time": Decimal(1),
        "country_code": host.region,
    }
    return row


def check_filters(filters: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Raises BadQuery for a column or an operator that does not exist."""
    known = frozenset(columns)
    for column, condition in filters.items():
        if column not in known:
            raise BadQuery(f"Error in query parameters: {column} is not a valid search key")
        if not isinstance(condition, dict):
            raise BadQuery(f"Error in query parameters: {column} must be an object of operators")
        for operator, operand in condition.items():
            if operator not in OPERATORS:
                raise BadQuery(f"Error in query parameters: {operator} is not a valid operator")
            if operator in ("in", "notin") and not isinstance(operand, list):
                raise BadQuery(f"Error in query parameters: {column} {operator} needs a list")


def search_columns(row: Mapping[str, Any]) -> frozenset[str]:
    """What a search may name: what its rows have, and a few words that are no fields of the answer."""
    return frozenset(row) | _SEARCH_ONLY


def matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    """Whether a row passes all of them."""
    return all(
        _holds(_field(row, column), operator, operand)
        for column, condition in filters.items()
        for operator, operand in condition.items()
    )


def in_order(
    rows: list[dict[str, Any]], order: list[tuple[str, str]], *, after: list[Any] | None = None
) -> list[dict[str, Any]]:
    """Sorted by (column, asc or desc), null last. `after`: only the rows behind one with these values."""

    def compare(one: list[Any], other: list[Any]) -> int:
        for (_, direction), a, b in zip(order, one, other, strict=True):
            if a == b:
                continue
            if a is None or b is None:
                return 1 if a is None else -1
            try:
                less = a < b
            except TypeError:
                less = str(a) < str(b)
            return (-1 if less else 1) * (-1 if direction == "desc" else 1)
        return 0

    def values(row: dict[str, Any]) -> list[Any]:
        return [row[column] for column, _ in order]

    key = cmp_to_key(compare)
    ordered = sorted(rows, key=lambda row: key(values(row)))
    return ordered if after is None else [row for row in ordered if compare(values(row), after) > 0]


def _field(row: Mapping[str, Any], column: str) -> Any:
    if column == "verified":
        return row["verification"] == "verified"
    if column == "datacenter":
        return row["hosting_type"] == 1
    if column == "ubuntu_version":
        return row["os_version"]
    if column == "geolocation":
        return str(row["geolocation"])[-2:]
    return row.get(column)


def _holds(value: Any, operator: str, operand: Any) -> bool:
    if operator in ("in", "notin"):
        return any(_same(value, choice) for choice in operand) == (operator == "in")
    if operator in ("eq", "neq"):
        return _same(value, operand) == (operator == "eq")
    one, other = _comparable(value), _comparable(operand)
    if one is None or other is None or isinstance(one, str) != isinstance(other, str):
        return False
    outcome: bool = {
        "gt": lambda: one > other,
        "gte": lambda: one >= other,
        "lt": lambda: one < other,
        "lte": lambda: one <= other,
    }[operator]()
    return outcome


def _same(value: Any, operand: Any) -> bool:
    if isinstance(value, bool) or isinstance(operand, bool):
        return str(value).lower() == str(operand).lower()
    one, other = _comparable(value), _comparable(operand)
    # A number in a string is that number: the vendor's own client sends {"num_gpus": {"eq": "1"}}.
    return one == other or (value is not None and str(value) == str(operand))


def _comparable(value: Any) -> Any:
    """A Decimal for what is a number, the text for other text, None for what compares with nothing."""
    if value is None or isinstance(value, list | dict):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return str(value)
    return number if number.is_finite() else str(value)
