"""The history as points for files: what each GPU cost in each stretch of time, at each provider and place.

    history.own, a day at a time -> Point -> CSV, JSON Lines or Parquet

docs/export.md is the schema. A day's points are the same whenever they are asked for, once it is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO

from gpubroker.money import from_micros
from gpubroker.prices.asked import column
from gpubroker.prices.daily import Where, rolled
from gpubroker.prices.export import Begin, Kind, TextWriter, Writer
from gpubroker.prices.fastread import Run
from gpubroker.prices.history import STATS, Dimension, Point, Query, Stat, own
from gpubroker.prices.rows import DAY_S

BY: tuple[Dimension, ...] = ("gpu", "form_factor", "gpu_count", "provider", "market", "region")
COLUMNS = ("begin", "resample_s", *BY, *(column(stat) for stat in STATS))
# Of one file's row group.
_MOST = 1 << 15


def first_days(run: Run) -> dict[str, int]:
    """By provider: the day of its first poll, in days since 1970."""
    sql = "SELECT provider, min(observed_at) FROM polls WHERE observed_at IS NOT NULL GROUP BY provider"
    return {provider: int(at) // DAY_S for provider, at in run(sql, ())}


def days_over(run: Run) -> dict[str, int]:
    """By provider: the midnight up to which nothing changes any more, in seconds since 1970."""
    return {provider: day * DAY_S for provider, day in rolled(run).items()}


def by_day(
    run: Run, where: Where, resample_s: int, after: Mapping[str, int], until: Mapping[str, int]
) -> Iterator[tuple[int, Iterator[list[Point]]]]:
    """(day, its points in batches), for each provider after one second and up to another."""
    first = {
        provider: max(after.get(provider, 0) // DAY_S, day)
        for provider, day in first_days(run).items()
        if provider in until and (where.providers is None or provider in where.providers)
    }
    if not first:
        return
    for day in range(min(first.values()), -(-max(until.values()) // DAY_S)):
        mine = {name for name, begun in first.items() if begun <= day and day * DAY_S < until[name]}
        if mine:
            end = min((day + 1) * DAY_S, max(until[name] for name in mine))
            yield day, _batches(_points(run, replace(where, providers=mine), resample_s, day, end))


def _points(run: Run, where: Where, resample_s: int, day: int, end: int) -> list[Point]:
    return own(run, Query(where=where, begin=day * DAY_S, end=end, bucket_s=resample_s, by=BY, stats=STATS))


def _batches(points: list[Point]) -> Iterator[list[Point]]:
    for at in range(0, len(points), _MOST):
        yield points[at : at + _MOST]


def points_of(resample_s: int) -> Begin:
    """Files of points."""

    def begin(file: BinaryIO, kind: Kind, zipped: bool) -> Writer:
        if kind == "parquet":
            from gpubroker.prices.export_parquet import PointWriter

            return PointWriter(file, resample_s)
        return TextWriter(file, kind, zipped, COLUMNS, lambda point: _values(point, resample_s))

    return begin


def _values(point: Point, resample_s: int) -> list[Any]:
    begin = point.begin.strftime("%Y-%m-%dT%H:%M:%SZ")
    place = [getattr(point.group, name) for name in BY]
    return [begin, resample_s, *place, *(_value(stat, point) for stat in STATS)]


def _value(stat: Stat, point: Point) -> Any:
    found = point.figures.get(stat)
    if found is None:
        return None
    if stat == "n":
        return int(found)
    return round(float(found), 6) if stat == "available" else f"{from_micros(int(found)):f}"
