"""What people ask of the price history, in their words, as the Query that history.py answers.

cli/history.py and frame.py share it: a command and a notebook that ask alike are answered alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar, cast

from gpubroker.errors import ConfigError
from gpubroker.prices import history
from gpubroker.prices.daily import Where
from gpubroker.prices.fastread import Run
from gpubroker.prices.history import Dimension, Point, Query, Stat
from gpubroker.prices.rows import DAY_S, HOUR_S, moment
from gpubroker.units import parse_duration_s

Data = Literal["own", "imported"]
USUAL_STATS: tuple[Stat, ...] = ("min", "p50", "max")
USUAL_BY: tuple[Dimension, ...] = ("provider", "market")
# Finer points than days for a range that is shorter than this.
_FEW_DAYS = 4
_Name = TypeVar("_Name", bound=str)


def query(
    where: Where,
    *,
    since: str,
    until: str | None,
    now: datetime,
    resample_s: int | None = None,
    by: Sequence[Dimension] = USUAL_BY,
    stats: Sequence[Stat] = USUAL_STATS,
) -> Query:
    """From `since` to `until` (None = now), each so long ago (7d) or a day (2026-10-01).

    Without `resample_s` by days, and by hours where the range is short; it begins with a whole one. Raises
    ConfigError.
    """
    last = now if until is None else _moment(until, now, "--until")
    first = _moment(since, now, "--since")
    if first >= last:
        raise ConfigError(f"--since {since}: that is not before --until")
    begin, end = int(first.timestamp()), int(min(last, now).timestamp()) + (until is None)
    bucket_s = resample_s or (DAY_S if end - begin > _FEW_DAYS * DAY_S else HOUR_S)
    return Query(
        where=where,
        begin=begin - begin % min(bucket_s, DAY_S),
        end=end,
        bucket_s=bucket_s,
        by=by,
        stats=stats,
    )


def _moment(text: str, now: datetime, name: str) -> datetime:
    try:
        return datetime.strptime(text.strip(), "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        pass
    try:
        return now - timedelta(seconds=parse_duration_s(text))
    except ConfigError:
        raise ConfigError(
            f"{name}: {text[:40]!r} is neither so long ago (7d) nor a day (2026-10-01)"
        ) from None


def answer(run: Run, asked: Query, data: Data | None = None) -> tuple[list[Point], Data]:
    """By our own polls; by imported histories where those say nothing, or where they are asked for."""
    if data != "imported" and (found := history.own(run, asked)):
        return found, "own"
    return ([], "own") if data == "own" else (history.imported(run, asked), "imported")


def thinned(late: Mapping[str, int], asked: Query) -> str:
    """From when on an answer is whole, in words, by what history.since says of it; "" = from its begin.

    Of a time that is thinned no figure is made up from what is left of it.
    """
    if not late:
        return ""
    day = moment(max(late.values()))
    what = "parts of a day" if asked.goes_by_days else "hours, twap and available"
    return (
        f"Of the time before {day:%Y-%m-%d} only whole days are kept ({', '.join(sorted(late))}; gpubroker db"
        f" compact): {what} are not in this, --resample 1d with prices alone is."
    )


def column(stat: Stat) -> str:
    """Its name with its unit."""
    return {"n": "observations", "available": "available_share"}.get(stat, f"{stat}_usd_per_gpu_hour")


def one_of(names: str | Sequence[str], known: Collection[_Name], what: str) -> tuple[_Name, ...]:
    """One name or several, as a tuple. Raises ConfigError for one that is not known."""
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if name not in known:
            raise ConfigError(f"{what}: {name!r} is not one of {', '.join(known)}")
    return cast("tuple[_Name, ...]", found)
