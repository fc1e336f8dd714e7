"""The first part of `gpubroker demo`: vendors on loopback whose market moves ten minutes a second, polled and
quoted live."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import pairwise

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gpubroker import config
from gpubroker.cli.ask import pricing_for
from gpubroker.cli.render import console, dollars, table
from gpubroker.doors import Clock
from gpubroker.gpus import GpuRequest
from gpubroker.model import OfferQuery
from gpubroker.plan.rank import Ask, Quote, rank
from gpubroker.plan.sentence import advice
from gpubroker.plan.work import Work
from gpubroker.prices.market import open_context
from gpubroker.prices.poll import poll

SPEED = 600
_HOURS = Decimal(8)
_ROUND_S = 30.0
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Course:
    """What the cheapest bill of one (provider, market) was, round by round; None = there was none."""

    totals: list[Decimal | None] = field(default_factory=list)
    last: Quote | None = None

    def spark(self) -> str:
        """The last rounds as a line of bars, each between the lowest and the highest seen."""
        seen = [total for total in self.totals if total is not None]
        if not seen:
            return ""
        low, high = min(seen), max(seen)
        step = (high - low) / (len(_BARS) - 1) or Decimal(1)
        return "".join(" " if t is None else _BARS[int((t - low) / step)] for t in self.totals[-30:])


def watch(gpu: GpuRequest, vendors: Sequence[str], seconds: int, clock: Clock) -> None:
    """Poll, quote and draw, for so many seconds."""
    settings = config.load()
    query = OfferQuery(gpus=gpu.names, markets=frozenset({"spot", "on_demand", "serverless"}), whole=False)
    ask = Ask(work=Work(hours=_HOURS), gpus=(gpu,))
    pricing = pricing_for(ask, settings, ())
    courses: dict[tuple[str, str], Course] = {}
    leaders: list[str] = []
    quotes: Sequence[Quote] = ()
    began_s = clock.monotonic_s()
    with open_context(settings, os.environ, clock) as (store, context), Live(console=console()) as live:
        while (passed_s := clock.monotonic_s() - began_s) < seconds:
            poll(store, context, vendors, query, _ROUND_S)
            quotes = rank(store.current(gpu.names), ask, pricing).quotes
            _note(courses, quotes)
            if quotes:
                leaders.append(f"{quotes[0].offer.provider} {quotes[0].offer.market}")
            live.update(_view(courses, quotes, ask, clock.now(), passed_s))
    _sum_up(courses, leaders)


def _note(courses: dict[tuple[str, str], Course], quotes: Sequence[Quote]) -> None:
    best: dict[tuple[str, str], Quote] = {}
    for quote in quotes:
        best.setdefault((quote.offer.provider, quote.offer.market), quote)
    rounds = max((len(course.totals) for course in courses.values()), default=0)
    for key in {*courses, *best}:
        course = courses.setdefault(key, Course(totals=[None] * rounds))
        course.last = best.get(key)
        course.totals.append(course.last.bill.total_usd if course.last else None)


def _view(
    courses: dict[tuple[str, str], Course], quotes: Sequence[Quote], ask: Ask, now: datetime, passed_s: float
) -> Group:
    made = table("provider", "market", "cheapest", "region", "$/h", "8 h", "its course", right=("$/h", "8 h"))
    for (provider, market), course in sorted(courses.items(), key=_cheapest_first):
        _row(made, provider, market, course)
    sim_h = passed_s * SPEED / 3600
    sentence = advice(quotes, ask, now) if quotes else "Nobody has one right now."
    return Group(
        made, Text(f"\n{sentence}"), Text(f"\n{sim_h:.1f} hours of the market have passed", style="dim")
    )


def _cheapest_first(item: tuple[tuple[str, str], Course]) -> tuple[bool, Decimal, tuple[str, str]]:
    key, course = item
    return course.last is None, course.last.bill.total_usd if course.last else Decimal(0), key


def _row(made: Table, provider: str, market: str, course: Course) -> None:
    quote = course.last
    if quote is None:
        made.add_row(provider, market.replace("_", "-"), "none now", "", "", "", course.spark())
        return
    offer = quote.offer
    made.add_row(
        provider,
        market.replace("_", "-"),
        f"{offer.gpu_count}x {offer.gpu} {offer.form_factor}",
        offer.zone or offer.region or offer.cloud,
        dollars(offer.usd_per_hour),
        dollars(quote.bill.total_usd),
        course.spark(),
    )


def _sum_up(courses: dict[tuple[str, str], Course], leaders: Sequence[str]) -> None:
    out = console()
    changes = sum(one != other for one, other in pairwise(leaders))
    out.print(f"\nIn {len(leaders)} rounds the cheapest bill changed hands {changes} times.")
    for (provider, market), course in sorted(courses.items()):
        seen = [total for total in course.totals if total is not None]
        if seen and min(seen) != max(seen):
            span = f"{dollars(min(seen))} to {dollars(max(seen))}"
            out.print(f"  {provider} {market.replace('_', '-')}: 8 h cost from {span}")
