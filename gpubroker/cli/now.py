"""`gpubroker now`: is it cheap right now?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import format_option
from gpubroker.cli.past import where_options
from gpubroker.cli.render import console, dollars, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.money import from_micros
from gpubroker.prices import daily
from gpubroker.prices.cheapest import Priced, Rhythm, Standing, Step, rhythm, standing, steps
from gpubroker.prices.fastread import Run
from gpubroker.prices.history import for_one
from gpubroker.prices.opening import answer
from gpubroker.prices.rows import DAY_S
from gpubroker.prices.steps import held

_DAYS = (7, 30, 90)
# Of the time: at most so much of it was cheaper, or all but so much.
_CHEAP, _DEAR = 0.25, 0.75
# Fewer days say nothing.
_LEAST_DAYS = 3
_RIGHT = ("now", *(f"{days} d" for days in _DAYS), "median")
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    provider: str
    market: str
    usd_micros: int | None  # None = there is none now
    standings: dict[int, Standing | None]  # by days
    rhythm: Rhythm
    is_polled: bool = True  # by ourselves; False = all of it is a vendor's record

    @property
    def verdict(self) -> str:
        """By the longest time that says something, and only where nine of ten such times would say it too."""
        if self.usd_micros is None:
            return "none is offered now" if self.is_polled else "not polled"
        known = [s for s in self.standings.values() if s is not None and s.seen_days >= _LEAST_DAYS]
        if not known:
            return "too few days"
        low, high = known[-1].between
        if high <= _CHEAP:
            return "cheap"
        if low >= _DEAR:
            return "dear"
        return "usual" if _CHEAP < low and high < _DEAR else "not sure"


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker now --gpu h100
  gpubroker now --gpu 4090 --market spot --provider vast --format json""",
)
@where_options
@format_option("table", "json")
def now(
    *,
    where: daily.Where,
    output: str,
) -> None:
    """Is it cheap right now? The cheapest offer against the cheapest of 7, 30 and 90 days before.

    The shares are of the time in which the cheapest cost less than it does now; `sure` is between what the
    last of them would be for nine of ten such times. By our own polls and, before the first of them, what
    gpubroker backfill brought; in $ for one GPU and one hour.
    """
    settings, clock = config.load(), SystemClock()
    end = int(clock.now().timestamp()) + 1
    lines = answer(settings.db_url, clock, lambda run: _lines(run, where, end))
    if not lines:
        raise ConfigError("nothing was seen of that: gpubroker poll asks for prices, best from cron")
    if output == "json":
        print_json({"lines": [_record(line) for line in lines]})
    else:
        _print(lines)


def _lines(run: Run, where: daily.Where, end: int) -> list[_Line]:
    begin = end - max(_DAYS) * DAY_S
    known, spans = daily.products(run, where), defaultdict[tuple[str, str], list[Priced]](list)
    for span, product in daily.spans_within(run, where, known, begin, end):
        usd = for_one(span.usd_micros, product.gpu_count)
        until = end if span.until_at is None else span.until_at
        spans[product.provider, product.market].append(Priced(usd, span.first_at, until))
    # Before our own first look, the vendor's record of what it asked for.
    ours = {key: min(one.first_at for one in mine) for key, mine in spans.items()}
    for one in held(run, where, begin, end):
        key = (one.product.provider, one.product.market)
        until = min(one.until_at, ours.get(key, end))
        spans[key].append(Priced(for_one(one.usd_micros, one.product.gpu_count), one.first_at, until))
    found = []
    for (provider, market), mine in sorted(spans.items()):
        made = steps(mine, begin, end)
        usd_now = made[-1].usd_micros
        found.append(
            _Line(
                provider=provider,
                market=market,
                usd_micros=usd_now,
                standings={days: _standing(made, usd_now, days, end) for days in _DAYS},
                rhythm=rhythm(made, begin, end),
                is_polled=(provider, market) in ours,
            )
        )
    return found


def _standing(made: Sequence[Step], usd_now: int | None, days: int, end: int) -> Standing | None:
    return None if usd_now is None else standing(made, usd_now, days, end)


def _print(lines: Sequence[_Line]) -> None:
    shares = [f"{days} d" for days in _DAYS]
    columns = ("provider", "market", "now", *shares, "sure", "median", "it is", "cheapest at")
    made = table(*columns, right=_RIGHT, whole=("sure",))
    for line in lines:
        known = [found for found in line.standings.values() if found is not None]
        made.add_row(
            line.provider,
            line.market.replace("_", "-"),
            "-" if line.usd_micros is None else dollars(from_micros(line.usd_micros)),
            *(
                "-" if (found := line.standings[days]) is None else f"{found.cheaper_share:.0%}"
                for days in _DAYS
            ),
            _sure(known[-1]) if known else "-",
            dollars(from_micros(known[-1].median_usd_micros)) if known else "-",
            line.verdict,
            _best(line.rhythm),
        )
    console().print(made)
    if any(line.usd_micros is None and not line.is_polled for line in lines):
        say("What it costs now is not known of what was not polled: gpubroker poll asks.")
    say("Share of the time in which the cheapest cost less than now; $ for one GPU-hour, hours in UTC.")


def _sure(found: Standing) -> str:
    low, high = (round(100 * share) for share in found.between)
    return f"{low}-{high}% in {found.seen_days} d"


def _best(found: Rhythm) -> str:
    """The hour and the weekday that cost least, where they differ."""
    hours = [f"{hour:02d}h" for hour in range(24)]
    parts = []
    for values, names in ((found.by_hour, hours), (found.by_weekday, _WEEKDAYS)):
        known = [(value, name) for value, name in zip(values, names, strict=True) if value is not None]
        if known and min(known)[0] < max(known)[0] * 0.99:
            parts.append(f"{min(known)[1]} {min(known)[0] - 1:+.0%}")
    return ", ".join(parts)


def _record(line: _Line) -> dict[str, Any]:
    return {
        "provider": line.provider,
        "market": line.market,
        "usd_per_gpu_hour": None if line.usd_micros is None else f"{from_micros(line.usd_micros):f}",
        "verdict": line.verdict,
        "against": [
            {
                "days": days,
                "seen_days": found.seen_days,
                "cheaper_share": round(found.cheaper_share, 4),
                "cheaper_share_90": [round(share, 4) for share in found.between],
                "median_usd_per_gpu_hour": f"{from_micros(found.median_usd_micros):f}",
            }
            for days, found in line.standings.items()
            if found is not None
        ],
        "by_hour_utc": line.rhythm.by_hour,
        "by_weekday": dict(zip(_WEEKDAYS, line.rhythm.by_weekday, strict=True)),
    }
