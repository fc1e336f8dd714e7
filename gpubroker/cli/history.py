"""`gpubroker history`: what a GPU cost over time, as a table, as points and as a picture."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import Duration, format_option
from gpubroker.cli.past import where_options
from gpubroker.cli.render import console, dollars, iso, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.money import from_micros
from gpubroker.prices import asked
from gpubroker.prices.asked import Data, column
from gpubroker.prices.daily import Where
from gpubroker.prices.fastread import Run
from gpubroker.prices.history import DIMENSIONS, STATS, Dimension, Group, Point, Query, Stat
from gpubroker.prices.history import since as late
from gpubroker.prices.opening import answer
from gpubroker.prices.rows import DAY_S, moment

_HERE = Path("-")
_BARS = "▁▂▃▄▅▆▇█"
_TREND_WIDTH = 30


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker history --gpu h100
  gpubroker history --gpu h100-sxm --market spot --since 7d --resample 1h --stat p10 --stat p50
  gpubroker history --gpu a100-80gb --by region --format csv
  gpubroker history --gpu h100 --plot -
  gpubroker history --gpu h100 --since 90d --plot h100.png""",
)
@where_options
@click.option("--since", default="30d", show_default=True, help="So long ago, or a day: 7d, 2026-10-01.")
@click.option("--until", help="A day, which is not in it any more.  [default: now]")
@click.option(
    "--resample", type=Duration(least_s=60), help="A point every 1h, 1d, 7d.  [default: by the range]"
)
@click.option("--stat", "stats", type=click.Choice(STATS), multiple=True, help="Repeat for several.")
@click.option(
    "--by", type=click.Choice(DIMENSIONS), multiple=True, help="A line each.  [default: provider and market]"
)
@click.option(
    "--data",
    type=click.Choice(("own", "imported")),
    help="Our own polls, or `import-history`'s.  [default: own, else imported]",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: - (here), x.png, .svg, .pdf, .html.")
@format_option("table", "json", "csv")
def history(
    *,
    where: Where,
    since: str,
    until: str | None,
    resample: int | None,
    stats: tuple[Stat, ...],
    by: tuple[Dimension, ...],
    data: Data | None,
    plot: Path | None,
    output: str,
) -> None:
    """What a GPU cost over time, in $ for one GPU and one hour.

    Each offer counts once a poll. `available` is the share of polls that found one at all; `twap` counts each
    price for as long as it lasted. Days are UTC; the range begins with a whole day, or a whole --resample.
    """
    settings, clock = config.load(), SystemClock()
    if plot is not None:
        if stats and stats[0] in ("available", "n"):
            raise click.UsageError(f"--plot draws a price over time, and {stats[0]} is none")
        if plot != _HERE:
            from gpubroker.cli import plot_history

            plot_history.check(plot)
        stats, by = (*(stats or ("p50",))[:1], "available"), ()
    query = asked.query(
        where,
        since=since,
        until=until,
        now=clock.now(),
        resample_s=resample,
        by=by or asked.USUAL_BY,
        stats=stats or asked.USUAL_STATS,
    )

    def found(run: Run) -> tuple[list[Point], Data, dict[Group, Point], str]:
        points, source = asked.answer(run, query, data)
        whole = _whole(run, query, source) if output == "table" and plot is None else {}
        return points, source, whole, asked.thinned({} if data == "imported" else late(run, query), query)

    # As a quote: it builds many small objects and ends, and the collector would walk them again and again.
    gc.disable()
    points, source, whole, thinned = answer(settings.db_url, clock, found)
    if thinned:
        say(thinned)
    if not points:
        raise ConfigError(
            "nothing was seen of that: gpubroker poll asks for prices, gpubroker offers has what is"
        )
    if source == "imported":
        say("These are imported histories (gpubroker import-history, gpubroker backfill), not our own polls.")
    if plot is not None:
        _draw(points, query, plot)
        return
    if output == "table":
        _print(points, whole, query)
    else:
        _print_points(points, query, source, output)


def _whole(run: Run, query: Query, source: Data) -> dict[Group, Point]:
    """The same figures over all of the range."""
    points, _ = asked.answer(run, replace(query, bucket_s=None), source)
    return {point.group: point for point in points}


def _print(points: Sequence[Point], whole: dict[Group, Point], query: Query) -> None:
    """A line a group: its figures over the range, and how the first of them that is a price went."""
    trend: Stat = "p50" if "p50" in query.stats else query.stats[0]  # type: ignore[index]
    names = [name for name in Group._fields if name in query.by]
    made = table(*names, *query.stats, f"{trend} over time", "last", right=(*query.stats, "last"))
    for group, point in sorted(whole.items()):
        mine = [one for one in points if one.group == group and trend in one.figures]
        made.add_row(
            *(str(getattr(group, name) or "-").replace("_", "-") for name in names),
            *(_shown(stat, point.figures.get(stat)) for stat in query.stats),
            _bars([float(one.figures[trend]) for one in mine]),
            _shown(trend, mine[-1].figures[trend]) if mine else "-",
        )
    console().print(made)
    begin, end = (moment(at) for at in (query.begin, query.end))
    say(f"$ for one GPU-hour, from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC.")


def _draw(points: Sequence[Point], query: Query, path: Path) -> None:
    from gpubroker.cli import plot_history

    stat = query.stats[0]  # type: ignore[index]
    name = " / ".join(sorted(query.where.gpus or ()))
    lines = [
        plot_history.Line(
            provider=group.provider,
            market=group.market,
            begins=[one.begin for one in mine],
            usd=[None if (usd := one.figures.get(stat)) is None else int(usd) / 1e6 for one in mine],
            available=[one.figures.get("available") for one in mine],
        )
        for group in sorted({one.group for one in points})
        if (mine := [one for one in points if one.group == group])
    ]
    drawn, title, bucket_s = plot_history.fewest(lines), f"{name}: {stat} price", query.bucket_s or DAY_S
    if path == _HERE:
        from gpubroker.cli import plot_terminal

        width = console().width
        title = f"{title}, $ for one GPU-hour"
        console().print(plot_terminal.picture(drawn, title, bucket_s, width), soft_wrap=True)
    else:
        plot_history.draw(drawn, title, bucket_s, path)
        say(f"{path} is drawn.")
    if left_out := len(lines) - len(drawn):
        say(f"{left_out} dearer lines are left out: --provider and --market choose.")


def _bars(values: Sequence[float]) -> str:
    """A spark line, of means where there are more values than room."""
    if not values:
        return ""
    step = max(1, -(-len(values) // _TREND_WIDTH))
    parts = [values[at : at + step] for at in range(0, len(values), step)]
    means = [sum(part) / len(part) for part in parts]
    least, most = min(means), max(means)
    height = (most - least) or 1.0
    return "".join(_BARS[round((mean - least) / height * (len(_BARS) - 1))] for mean in means)


def _shown(stat: Stat, value: int | Fraction | None) -> str:
    if value is None:
        return "-"
    if stat == "n":
        return f"{int(value):,}"
    return f"{float(value):.0%}" if stat == "available" else dollars(from_micros(int(value)))


def _print_points(points: Sequence[Point], query: Query, source: str, output: str) -> None:
    names = [name for name in Group._fields if name in query.by]
    columns = ["begin", *names, *(column(stat) for stat in query.stats)]
    records = [_record(point, names, query) for point in points]
    if output == "csv":
        print_csv(columns, ([record[name] for name in columns] for record in records))
    else:
        print_json({"data": source, "resample_s": query.bucket_s, "points": records})


def _record(point: Point, names: Sequence[str], query: Query) -> dict[str, Any]:
    record: dict[str, Any] = {"begin": iso(point.begin)}
    record |= {name: getattr(point.group, name) for name in names}
    return record | {column(stat): _text(stat, point.figures.get(stat)) for stat in query.stats}


def _text(stat: Stat, value: int | Fraction | None) -> Any:
    if value is None:
        return None
    if stat == "n":
        return int(value)
    return f"{float(value):.6f}" if stat == "available" else f"{from_micros(int(value)):f}"
