"""The price history as a pandas frame, for notebooks: `gpubroker.history(...)`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gpubroker import config
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.gpus import parse_request
from gpubroker.model import market_of
from gpubroker.money import from_micros
from gpubroker.prices import asked
from gpubroker.prices.asked import Data, column, one_of
from gpubroker.prices.fastread import Run
from gpubroker.prices.history import DIMENSIONS, STATS, Point, Query, Stat
from gpubroker.prices.history import since as since_when
from gpubroker.prices.opening import answer
from gpubroker.prices.wanted import Wanted
from gpubroker.units import parse_duration_s

if TYPE_CHECKING:
    import pandas as pd

Names = str | Sequence[str]


def history(
    gpu: Names,
    *,
    provider: Names = (),
    market: Names = (),
    region: Names = (),
    count: int | None = None,
    since: str = "30d",
    until: str | None = None,
    resample: str | None = None,
    stats: Names = asked.USUAL_STATS,
    by: Names = asked.USUAL_BY,
    data: Data | None = None,
    db_url: str | None = None,
) -> pd.DataFrame:
    """What a GPU cost over time: one row a time and group, as `gpubroker history --format csv`.

    Columns: `begin` (UTC), those of `by`, and of each of `stats` one: `p50_usd_per_gpu_hour` in $ for one GPU
    and one hour, `available_share` of the polls, `observations`. A figure that nothing was seen for is NaN.

    >>> gpubroker.history("h100", since="90d", stats=("p50", "available"))

    `gpu`, `provider`, `market` and `region` as on the command line, one or several; `since` and `until` "30d"
    or "2026-10-01"; `resample` "1h". `data`: "own" or "imported"; None = our own polls where there are any.
    Raises gpubroker.errors.ConfigError for what is not understood, where nothing was ever polled, and without
    pandas.
    """
    if find_spec("pandas") is None:
        raise ConfigError("gpubroker.history needs pandas: pip install 'gpubroker[pandas]'")
    settings, clock = config.load(), SystemClock()
    wanted = Wanted(
        gpus=tuple(parse_request(one) for one in _several(gpu)),
        providers=tuple(one.lower() for one in _several(provider)),
        markets=tuple(market_of(one) for one in _several(market)),
        regions=tuple(_several(region)),
        count=count,
    )
    query = asked.query(
        wanted.where,
        since=since,
        until=until,
        now=clock.now(),
        resample_s=None if resample is None else parse_duration_s(resample, "resample"),
        by=one_of(by, DIMENSIONS, "by"),
        stats=one_of(stats, STATS, "stats"),
    )

    def found(run: Run) -> tuple[list[Point], dict[str, int]]:
        points, _ = asked.answer(run, query, data)
        return points, {} if data == "imported" else since_when(run, query)

    points, late = answer(db_url or settings.db_url, clock, found)
    if told := asked.thinned(late, query):
        warnings.warn(told, stacklevel=2)
    return _frame(points, query)


def _several(names: Names) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _frame(points: Sequence[Point], query: Query) -> pd.DataFrame:
    import pandas as pd

    begins = pd.DatetimeIndex([point.begin for point in points], tz="UTC")
    columns: dict[str, Any] = {"begin": begins}
    for name in (name for name in DIMENSIONS if name in query.by):
        columns[name] = [getattr(point.group, name) for point in points]
    for stat in query.stats:
        columns[column(stat)] = [_value(stat, point) for point in points]
    made = pd.DataFrame(columns)
    return made.astype({"observations": "int64"} if "n" in query.stats else {})


def _value(stat: Stat, point: Point) -> float:
    found = point.figures.get(stat)
    if found is None:
        return 0 if stat == "n" else float("nan")
    return float(found) if stat in ("n", "available") else float(from_micros(int(found)))
