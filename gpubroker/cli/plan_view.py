"""How a plan looks: the table of strategies, why the first one, and what would do where none does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
from rich.padding import Padding
from rich.text import Text

from gpubroker.cli.quote import flip_record
from gpubroker.cli.render import age, console, dollars_of, hours_of, iso, table
from gpubroker.money import round_usd, usd_text
from gpubroker.plan.breakeven import Flip
from gpubroker.plan.rank import Ask, Pricing, Quote, price_source
from gpubroker.plan.sentence import caution, name_of
from gpubroker.plan.simulate import Quantiles
from gpubroker.plan.strategy import Limits, Strategy
from gpubroker.prices.market import Problem
from gpubroker.run.risk import risks

_AS_NEAR = 1.02
CSV = (
    "kind", "text", "expected_usd", "p50_usd", "p90_usd", "p99_usd", "finish_p50_h", "finish_p90_h",
    "finish_p99_h", "preemptions", "bid_usd_per_hour", "checkpoint_every_s", "switch_h_before_deadline",
    "deadline_chance", "budget_chance", "chance", "keeps_limits",
)  # fmt: skip


def show(found: Sequence[Strategy], ask: Ask, limits: Limits, pricing: Pricing, now: datetime) -> None:
    """The table and one sentence."""
    has_limits = limits.deadline_h is not None or limits.budget_usd is not None
    made = table(
        "#", "strategy", "expect", "p90", "done p50", "p90", *["keeps limits"][: int(has_limits)], "prices",
        right=("#", "expect", "p90", "done p50", "keeps limits"),
    )  # fmt: skip
    for number, s in enumerate(found, 1):
        usd, finish = s.usd_quantiles, s.finish_quantiles
        made.add_row(
            str(number),
            headline(s),
            dollars_of(s.usd_mean),
            dollars_of(usd.p90),
            hours_of(finish.p50),
            hours_of(finish.p90),
            *[_percent(s.chances(limits)[2])][: int(has_limits)],
            _price_age(s, now),
        )
    out = console()
    out.print(made)
    if pricing.assumption:
        out.print(f"Hours are those of each card: {pricing.assumption}", style="dim")
    out.print()
    if found[0].keeps(limits):
        out.print(why(found, ask, limits, now))
    for risk in risks(leg.offer.provider for s in found for leg in s.legs):
        out.print(risk, style="dim")
    if not ask.work.checkpoints.store and any(s.kind == "spot" for s in found):
        out.print(
            "Checkpoints stay with the node's provider: with --checkpoint-at cloudflare-r2, or another "
            "store, a job can go on anywhere.",
            style="dim",
        )


def headline(s: Strategy) -> str:
    """The strategy in a few words."""
    text = name_of(s.first) + ("" if s.bid is None else f", bid ${s.bid.usd_per_hour.normalize():f}")
    if s.others:
        text += "".join(f", or {_place(q, s.first)}" for q in s.others)
    if s.fallback is not None:
        text += f"; fallback: {name_of(s.fallback)}"
    return text


def _place(quote: Quote, first: Quote) -> str:
    name = name_of(quote)
    return name.removeprefix(f"{first.offer.provider} ")


def why(found: Sequence[Strategy], ask: Ask, limits: Limits, now: datetime) -> str:
    """One sentence: what to do, what it costs, and against what."""
    best = found[0]
    text = f"Take {headline(best)}: {dollars_of(best.usd_mean)} expected for {ask.work_text}"
    if limits.deadline_h is not None or limits.budget_usd is not None:
        text += f", {_percent(best.chances(limits)[2])} to keep {_limits_text(limits)}"
    firm = next((s for s in found[1:] if s.keeps(limits) and s.kind == "on demand"), None)
    if firm is not None and firm is not best:
        text += f"; {name_of(firm.first)} would cost {dollars_of(firm.usd_mean)}"
    elif len(found) > 1 and best.kind == "on demand":
        rest = [s for s in found[1:] if s.kind not in ("on demand", "own GPU")]
        if rest and not rest[0].keeps(limits):
            text += f"; {headline(rest[0])} keeps it in {_percent(rest[0].chances(limits)[2])} of runs only"
    return f"{text}.{caution(best.legs, now)}"


def _price_age(s: Strategy, now: datetime) -> str:
    """Of the price that was seen the longest ago; one from a list is the older the less it is dated."""
    listed = [q.priced.as_of for q in s.legs if not q.priced.live]
    dated = [as_of for as_of in listed or [q.priced.as_of for q in s.legs] if as_of is not None]
    if listed:
        return f"listed {age(min(dated), now)} ago" if len(dated) == len(listed) else "listed, undated"
    return f"{age(min(dated), now)} old" if dated else ""


def explain(found: Sequence[Strategy], limits: Limits) -> None:
    """What each strategy rests on."""
    out = console()
    for number, s in enumerate(found, 1):
        out.print(Text(f"\n{number}. {headline(s)}", style="bold"))
        for text in _details(s, limits):
            out.print(Padding(Text(text), (0, 0, 0, 2)))


def _details(s: Strategy, limits: Limits) -> Iterable[str]:
    usd, finish = s.usd_quantiles, s.finish_quantiles
    yield f"cost p50 {dollars_of(usd.p50)}, p90 {dollars_of(usd.p90)}, p99 {dollars_of(usd.p99)}"
    yield f"done after p50 {hours_of(finish.p50)}, p90 {hours_of(finish.p90)}, p99 {hours_of(finish.p99)}"
    if s.bid is not None:
        yield f"bid ${s.bid.usd_per_hour:f}/h: {s.bid.basis}"
        lost = s.bid.outbid
        yield (
            f"being outbid costs {dollars_of(lost.usd)} each time, {lost.rework_h:.2f} h of work "
            f"and a wait of {lost.wait_h:.1f} h"
        )
    if s.first.risk.per_hour:
        every = s.first.bill.course.interval_h
        saves = "" if every is None else f"; a checkpoint every {every * 60:.0f} min"
        yield f"{s.preemptions:.2g} preemptions expected: {s.first.risk.source}{saves}"
    if s.fallback is not None and s.switch_h is not None:
        yield (
            f"on demand at the latest {s.switch_h:.1f} h before the deadline if nothing is saved by then; "
            f"{_percent(s.fallback_chance)} of runs get there"
        )
    if s.first.pace:
        yield s.first.pace
    for name, chance in zip(("deadline", "budget"), s.chances(limits), strict=False):
        if chance is not None:
            yield f"{_percent(chance)} keep the {name}"


def what_would_do(found: Sequence[Strategy], limits: Limits) -> str:
    """Nothing keeps the limits: which limit would be kept, with the confidence asked for."""
    share = f"{limits.confidence:.0%}"
    text = f"no strategy keeps {_limits_text(limits)} with {share}"
    ways = []
    if limits.deadline_h is not None:
        soonest, at_h = _least(found, "finish_h", limits, "usd", limits.budget_usd)
        if soonest is not None:
            ways.append(f"a deadline of {at_h:.1f} h ({headline(soonest)})")
    if limits.budget_usd is not None:
        cheapest, usd = _least(found, "usd", limits, "finish_h", limits.deadline_h)
        if cheapest is not None:
            ways.append(f"a budget of {dollars_of(usd)} ({headline(cheapest)})")
    if not ways and limits.deadline_h is not None and limits.budget_usd is not None:
        soonest, at_h = _least(found, "finish_h", limits, "usd", None)
        if soonest is not None:
            usd = float(np.quantile(soonest.usd, limits.confidence, method="inverted_cdf"))
            ways.append(f"{at_h:.1f} h and {dollars_of(usd)} ({headline(soonest)})")
    more = "; more or faster GPUs may, too (--count, --work 8h@h100-sxm)" if limits.deadline_h else ""
    return f"{text}; what would do: {' or '.join(ways) or 'another card or market'}{more}"


def _least(
    found: Sequence[Strategy], what: str, limits: Limits, other: str, most: float | None
) -> tuple[Strategy | None, float]:
    """The strategy with the least quantile of `what` among those that keep the other limit."""
    found_at: list[tuple[float, Strategy]] = []
    for s in found:
        kept = getattr(s, other) <= (np.inf if most is None else most)
        values = np.where(kept, getattr(s, what), np.inf)
        found_at.append((float(np.quantile(values, limits.confidence, method="inverted_cdf")), s))
    least = min(at for at, _ in found_at)
    if not np.isfinite(least):
        return None, least
    # Of those that come as near, the cheapest.
    near = [(s.usd_mean, at, s) for at, s in found_at if at <= least * _AS_NEAR]
    _, at, best = min(near, key=lambda one: one[:2])
    return best, at


def record(
    found: Sequence[Strategy],
    ask: Ask,
    limits: Limits,
    flips: Sequence[Flip],
    problems: Sequence[Problem],
    now: datetime,
) -> dict[str, Any]:
    """The whole plan for JSON. Money is a decimal string."""
    return {
        "asked": {
            "work": ask.work_text,
            "gpu": [g.text for g in ask.gpus],
            "gpu_count": ask.gpu_count,
            "deadline_h": limits.deadline_h,
            "budget_usd": None if limits.budget_usd is None else usd_text(Decimal(limits.budget_usd)),
            "confidence": limits.confidence,
        },
        "feasible": found[0].keeps(limits),
        "advice": why(found, ask, limits, now) if found[0].keeps(limits) else what_would_do(found, limits),
        "strategies": [_strategy_record(s, limits) for s in found],
        "flips": [flip_record(flip) for flip in flips],
        "problems": [{"provider": p.provider, "reason": p.reason} for p in problems],
    }


def _strategy_record(s: Strategy, limits: Limits) -> dict[str, Any]:
    in_time, in_budget, both = s.chances(limits)
    every_h = s.first.bill.course.interval_h
    return {
        "kind": s.kind,
        "text": headline(s),
        "first": _leg(s.first),
        "others": [_leg(q) for q in s.others],
        "fallback": None if s.fallback is None else _leg(s.fallback),
        "switch_h_before_deadline": s.switch_h,
        "fallback_chance": s.fallback_chance,
        "bid_usd_per_hour": None if s.bid is None else usd_text(s.bid.usd_per_hour),
        "bid_basis": None if s.bid is None else s.bid.basis,
        "checkpoint_every_s": None if every_h is None else round(float(every_h) * 3600),
        "preemptions": s.preemptions if np.isfinite(s.preemptions) else None,
        "expected_usd": _usd_text(s.usd_mean),
        **{f"{name}_usd": _usd_text(value) for name, value in _named(s.usd_quantiles).items()},
        **{f"finish_{name}_h": value for name, value in _named(s.finish_quantiles).items()},
        "deadline_chance": in_time,
        "budget_chance": in_budget,
        "chance": both,
        "keeps_limits": s.keeps(limits),
        "lines": [
            {"item": line.item, "usd": usd_text(line.usd), "how": line.how, "source": line.source}
            for line in s.first.bill.lines
        ],
    }


def csv_rows(found: Sequence[Strategy], limits: Limits) -> Iterable[Sequence[Any]]:
    """The figures of each strategy, in the order of CSV."""
    for s in found:
        values = _strategy_record(s, limits)
        yield [values[name] for name in CSV]


def _leg(quote: Quote) -> Mapping[str, Any]:
    offer = quote.offer
    return {
        "provider": offer.provider,
        "sku": offer.sku,
        "gpu": offer.gpu,
        "form_factor": offer.form_factor,
        "gpu_count": offer.gpu_count,
        "market": offer.market,
        "region": offer.region,
        "zone": offer.zone,
        "machine_id": offer.machine_id,
        "listing_id": offer.listing_id,
        "usd_per_hour": usd_text(offer.usd_per_hour),
        "as_of": iso(quote.priced.as_of),
        "source": price_source(quote.priced),
        "live": quote.priced.live,
    }


def _named(q: Quantiles) -> dict[str, float | None]:
    return {
        name: v if np.isfinite(v) else None for name, v in (("p50", q.p50), ("p90", q.p90), ("p99", q.p99))
    }


def _limits_text(limits: Limits) -> str:
    parts = [] if limits.deadline_h is None else [f"a deadline of {limits.deadline_h:.1f} h"]
    parts += [] if limits.budget_usd is None else [f"a budget of {dollars_of(limits.budget_usd)}"]
    return " and ".join(parts) or "no limit"


def _usd_text(value: float | None) -> str | None:
    return None if value is None or not np.isfinite(value) else usd_text(round_usd(Decimal(repr(value))))


def _percent(share: float) -> str:
    """Never 100% for what can fail, nor 0% for what can succeed."""
    if 0.995 <= share < 1:
        return ">99%"
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"
