"""`gpubroker survival`: how long offers and their prices last, by our own polls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
from rich.text import Text

from gpubroker import config
from gpubroker.cli import plot_survival
from gpubroker.cli.options import Duration, format_option
from gpubroker.cli.past import where_options
from gpubroker.cli.render import console, fitted, print_csv, print_json, say
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.plan.hazard import figure
from gpubroker.prices import daily
from gpubroker.prices.fastread import Run
from gpubroker.prices.opening import answer
from gpubroker.prices.rows import DAY_S, HOUR_S, moment
from gpubroker.prices.seen import Kind
from gpubroker.prices.survival import (
    AtPrice,
    Curve,
    Stay,
    Watched,
    kaplan_meier,
    lasted,
    stays,
    typical_change,
    watched,
)

Of = Literal["offer", "price"]
_AGES_H = (1, 8, 24)
_SHARES = (0.25, 0.5, 0.75)
_NUMBERS = ("begun", "gone", "rate/h", "change", *(f"{hours} h" for hours in _AGES_H))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """How long one market's offers, or the prices of them, lasted."""

    provider: str
    market: str
    region: str  # "" = all of them
    of: Of
    curve: Curve
    rate: Watched
    change: float | None  # median share by which a price changed


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker survival --gpu h100
  gpubroker survival --gpu 4090 --provider vast --market spot --by-region
  gpubroker survival --gpu h100 --since 90d --plot survival.png
  gpubroker survival --gpu h100 --format json""",
)
@where_options
@click.option(
    "--since",
    "since_s",
    type=Duration(least_s=HOUR_S),
    default="30d",
    show_default=True,
    help="So long ago begins what is looked at.",
)
@click.option("--by-region", is_flag=True, help="A line for each region.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: x.png, .svg, .pdf or .html.")
@format_option("table", "json", "csv")
def survival(*, where: daily.Where, since_s: float, by_region: bool, plot: Path | None, output: str) -> None:
    """How long an offer lasts once it is listed, and how long its price does.

    By Kaplan and Meier's estimate over the offers that came since then: when half of them were gone, and
    which share was still there after 1, 8 and 24 hours. An offer that leaves the list was rented or
    withdrawn; a price ends when it changes (`change`: by how much, typically) or its offer goes. `rate/h` is
    how often that happened in an hour of being there, of all offers: the planner's hazard of spot machines
    uses it.
    """
    settings, clock = config.load(), SystemClock()
    if plot is not None:
        plot_survival.check(plot)
    end = int(clock.now().timestamp()) + 1
    begin = end - int(since_s)

    def found(run: Run) -> tuple[list[Line], dict[str, int]]:
        gone = daily.thinned(run)
        return list(_lines(run, where, begin, end, gone, by_region=by_region)), gone

    lines, gone = answer(settings.db_url, clock, found)
    lines.sort(key=lambda line: (line.provider, line.market, line.region, line.of))
    _say_thinned(gone, begin, {line.provider for line in lines})
    if not lines:
        raise ConfigError("nothing was seen of that: gpubroker poll asks for prices, best from cron")
    if plot is not None:
        plot_survival.draw(
            [(f"{line.provider} {line.market} {line.region}".strip(), line.of, line.curve) for line in lines],
            f"{' / '.join(sorted(where.gpus or ()))}: how long offers and prices last",
            plot,
        )
        say(f"{plot} is drawn.")
    elif output == "table":
        _print(lines, by_region=by_region)
    else:
        _print_records([_record(line) for line in lines], output)


def _say_thinned(gone: Mapping[str, int], begin: int, providers: set[str]) -> None:
    for provider, at in sorted(gone.items()):
        if at > begin and provider in providers:
            say(f"{provider} is known from {moment(at):%Y-%m-%d} on: gpubroker db compact thinned the rest.")


def _lines(
    run: Run, where: daily.Where, begin: int, end: int, gone: Mapping[str, int], *, by_region: bool
) -> Iterator[Line]:
    held = defaultdict[tuple[str, str, str], defaultdict[Kind, list[AtPrice]]](lambda: defaultdict(list))
    begins = {provider: max(begin, at) for provider, at in gone.items()}
    for row, product in daily.spans_within(run, where, daily.products(run, where), begin, end):
        key = (product.provider, product.market, product.region if by_region else "")
        one = AtPrice(row.offer_id, row.usd_micros, row.first_at, row.until_at)
        held[key][row.kind(product)].append(one)
    seen = {
        provider: daily.seen_by(run, provider, begins.get(provider, begin), end)
        for provider in {key[0] for key in held}
    }
    for (provider, market, region), kinds in held.items():
        since = begins.get(provider, begin)  # before it only days are kept
        change = typical_change(one for mine in kinds.values() for one in mine)
        for of in ("offer", "price"):
            found = list[Stay]()
            for kind, mine in kinds.items():
                if looks := seen[provider].moments(kind):
                    found += stays(mine, looks[0], of_price=of == "price")
            yield Line(
                provider=provider,
                market=market.replace("_", "-"),
                region=region,
                of=of,
                curve=kaplan_meier(lasted(found, since, end)),
                rate=watched(found, since, end),
                change=change if of == "price" else None,
            )


def _print(lines: Sequence[Line], *, by_region: bool) -> None:
    names = ("provider", "market", *(("region",) if by_region else ()), "of")
    columns = (*names, "begun", "half gone", "sure", *(f"{hours} h" for hours in _AGES_H), "rate/h", "change")
    rows = [[Text(cell) for cell in _cells(line, by_region=by_region)] for line in lines]
    width = console().width
    console().print(fitted(columns, rows, right=_NUMBERS, flexible=("region", "provider"), width=width))
    say("Since they were listed; `sure` holds nine of ten: the half. A dash: not watched for long enough.")


def _cells(line: Line, *, by_region: bool) -> Iterator[str]:
    middle, low, high = line.curve.gone_after_s(0.5)
    yield from (line.provider, line.market)
    if by_region:
        yield line.region or "-"
    yield from (line.of, f"{line.curve.number:,}", _after(middle))
    yield "-" if middle is None else f"{_after(low)}-{'' if high is None else _after(high)}"
    for hours in _AGES_H:
        step = line.curve.alive_at(hours * HOUR_S)
        yield "-" if step is None else f"{step.alive:.0%}"
    yield "-" if line.rate.per_hour is None else figure(line.rate.per_hour)
    yield "" if line.change is None else f"{line.change:.1%}"


def _after(seconds: int | None) -> str:
    """In one unit: a poll's interval is no finer."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 2 * DAY_S), ("h", 2 * HOUR_S)):
        if seconds >= length:
            return f"{seconds / length * 2:.3g}{unit}"
    return f"{seconds / 60:.3g}m"


def _record(line: Line) -> dict[str, Any]:
    curve = line.curve
    return {
        "provider": line.provider,
        "market": line.market.replace("-", "_"),
        "region": line.region,
        "of": line.of,
        "begun": curve.number,
        "gone": curve.ended,
        "followed_s": curve.followed_s,
        **{f"gone_{round(share * 100)}pct_after_s": curve.gone_after_s(share)[0] for share in _SHARES},
        "gone_50pct_after_s_90": list(curve.gone_after_s(0.5)[1:]),
        **{
            f"alive_{hours}h_share": None if (step := curve.alive_at(hours * HOUR_S)) is None else step.alive
            for hours in _AGES_H
        },
        "ends": line.rate.ends,
        "open_h": line.rate.open_s / HOUR_S,
        "ends_per_hour": line.rate.per_hour,
        "typical_change_share": line.change,
        "curve": [step._asdict() for step in curve.steps],
    }


def _print_records(records: Sequence[dict[str, Any]], output: str) -> None:
    if output == "json":
        print_json({"lines": records})
        return
    flat = [name for name, value in records[0].items() if not isinstance(value, list)]
    print_csv(flat, ([record[name] for name in flat] for record in records))
