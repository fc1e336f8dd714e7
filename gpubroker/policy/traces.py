"""Spot traces: read from files in the format spot-trace-csv-1, and laid side by side as the world of one job.

The format: `manifest.json` with one record a trace; `NAME.csv.gz` with the header
`seconds,available,price_usd_per_hour`, one row a step; an empty price means the manifest's default.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

from gpubroker.errors import ConfigError

FORMAT = "spot-trace-csv-1"
MANIFEST = "manifest.json"
_HEADER = ["seconds", "available", "price_usd_per_hour"]
_MOST_STEPS = 2_000_000
_MOST_USD_PER_HOUR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One zone: whether a spot node could be held for all of each step, and at what price."""

    name: str
    group: str  # traces of one group are time-aligned zones of one pool
    zone: str
    step_s: int
    on_demand_usd_per_hour: float
    available: tuple[bool, ...]
    spot_usd_per_hour: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The zones of one job side by side, step by step, with the sums that let a replay stride."""

    name: str
    step_s: int
    on_demand_usd_per_hour: float  # of the cheapest zone
    zones: tuple[str, ...]
    available: tuple[tuple[bool, ...], ...]  # by step, then zone
    price: tuple[tuple[float, ...], ...]  # $/h by step, then zone
    usd_before: tuple[tuple[float, ...], ...]  # by zone, then step: what all earlier steps would have cost
    unchanged: tuple[int, ...]  # by step: steps until any zone's availability changes, at least 1

    @property
    def step_h(self) -> float:
        """The same as policies see it."""
        return self.step_s / 3600

    def __len__(self) -> int:
        return len(self.available)


def timeline(traces: Sequence[Trace], name: str | None = None) -> Timeline:
    """Of one trace, or of the traces of one group, cut to the shortest. Raises ConfigError."""
    first = traces[0]
    if any(t.step_s != first.step_s for t in traces):
        raise ConfigError(f"{first.group}: the zones of one group must have the same step")
    length = min(len(t.available) for t in traces)
    available = tuple(zip(*(t.available[:length] for t in traces), strict=True))
    unchanged = [1] * length
    for k in range(length - 2, -1, -1):
        if available[k] == available[k + 1]:
            unchanged[k] = unchanged[k + 1] + 1
    return Timeline(
        name=name or (first.name if len(traces) == 1 else first.group),
        step_s=first.step_s,
        on_demand_usd_per_hour=min(t.on_demand_usd_per_hour for t in traces),
        zones=tuple(t.zone for t in traces),
        available=available,
        price=tuple(zip(*(t.spot_usd_per_hour[:length] for t in traces), strict=True)),
        usd_before=tuple(
            tuple(accumulate((p * first.step_s / 3600 for p in t.spot_usd_per_hour[:length]), initial=0.0))
            for t in traces
        ),
        unchanged=tuple(unchanged),
    )


def groups(traces: Iterable[Trace]) -> list[Timeline]:
    """One timeline for every group of at least two zones, in the order of their first trace."""
    by_group: dict[str, list[Trace]] = {}
    for trace in traces:
        by_group.setdefault(trace.group, []).append(trace)
    return [timeline(zones, group) for group, zones in by_group.items() if len(zones) > 1]


def read_traces(paths: Iterable[Path]) -> list[Trace]:
    """Every trace of these directories' manifests, and of these files. Raises ConfigError naming the file.

    A file is described by the manifest beside it.
    """
    traces: list[Trace] = []
    for path in paths:
        folder = path if path.is_dir() else path.parent
        records = _manifest(folder / MANIFEST)
        if not path.is_dir():
            records = [r for r in records if r.get("file") == path.name]
            if not records:
                raise ConfigError(f"{path}: {folder / MANIFEST} has no record of this file")
        traces += [_read(folder, record) for record in records]
    return traces


def _manifest(path: Path) -> list[Mapping[str, Any]]:
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {type(error).__name__}") from error
    records = manifest.get("traces") if isinstance(manifest, dict) else None
    if not isinstance(records, list) or manifest.get("format") != FORMAT or not records:
        raise ConfigError(f"{path}: not a manifest of {FORMAT} with traces")
    if not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{path}: a trace's record is not an object")
    return records


def _read(folder: Path, record: Mapping[str, Any]) -> Trace:
    where = folder / MANIFEST
    name = _text(where, record, "name")
    path = folder / Path(_text(where, record, "file")).name
    try:
        blob = path.read_bytes()
        text = (gzip.decompress(blob) if blob[:2] == b"\x1f\x8b" else blob).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{path}: {reason}") from error
    step_s = record.get("step_seconds")
    if not isinstance(step_s, int) or isinstance(step_s, bool) or not 1 <= step_s <= 86400:
        raise ConfigError(f"{where}: {name}: step_seconds {step_s!r} is not between 1 and 86400")
    default = record.get("default_spot_price")
    available, prices = parse_steps(
        text,
        step_s=step_s,
        default_usd_per_hour=None if default is None else _price(f"{where}: {name}", default),
        source=str(path),
    )
    return Trace(
        name=name,
        group=str(record.get("group") or name),
        zone=str(record.get("zone") or name),
        step_s=step_s,
        on_demand_usd_per_hour=_on_demand(f"{where}: {name}", record.get("on_demand_price")),
        available=available,
        spot_usd_per_hour=prices,
    )


def _text(where: Path, record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: a trace without {key}")
    return value


def parse_steps(
    text: str, *, step_s: int, default_usd_per_hour: float | None, source: str
) -> tuple[tuple[bool, ...], tuple[float, ...]]:
    """Availability and $/h of each step. Raises ConfigError naming the source and the line."""
    rows = csv.reader(text.splitlines())
    if next(rows, None) != _HEADER:
        raise ConfigError(f"{source}: the header is not {','.join(_HEADER)}")
    available: list[bool] = []
    prices: list[float] = []
    try:
        for number, row in enumerate(rows, start=2):
            where = f"{source}:{number}"
            if len(row) != len(_HEADER):
                raise ConfigError(f"{where}: {len(row)} columns instead of {len(_HEADER)}")
            seconds, flag, price = row
            if seconds != str(len(available) * step_s):
                raise ConfigError(
                    f"{where}: seconds is {seconds[:20]!r}, the step is {len(available) * step_s}"
                )
            if flag not in ("0", "1"):
                raise ConfigError(f"{where}: available is {flag[:20]!r}, not 0 or 1")
            if not price and default_usd_per_hour is None:
                raise ConfigError(f"{where}: no price, and the manifest has no default")
            available.append(flag == "1")
            prices.append(_price(where, price) if price else default_usd_per_hour or 0.0)
            if len(available) > _MOST_STEPS:
                raise ConfigError(f"{source}: more than {_MOST_STEPS} steps")
    except csv.Error as error:
        raise ConfigError(f"{source}: {error}") from error
    if not available:
        raise ConfigError(f"{source}: no steps")
    return tuple(available), tuple(prices)


def _on_demand(where: str, value: Any) -> float:
    """Everything is measured by it, so it is above zero."""
    if value is None:
        raise ConfigError(f"{where}: on_demand_price is missing")
    price = _price(where, value)
    if price <= 0:
        raise ConfigError(f"{where}: on_demand_price {value!r} is not above 0")
    return price


def _price(where: str, value: Any) -> float:
    try:
        price = float("nan" if value is None or isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        price = float("nan")
    if not isfinite(price) or not 0 <= price <= _MOST_USD_PER_HOUR:
        raise ConfigError(f"{where}: {str(value)[:20]!r} is not a price")
    return price
