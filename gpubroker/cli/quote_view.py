"""How a quote looks to a person: the table, the advice, and every line's arithmetic for --explain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal

from rich.padding import Padding
from rich.text import Text

from gpubroker.cli.render import age, console, dollars, dollars_of, hours_of, table
from gpubroker.money import usd_text
from gpubroker.plan.breakeven import Flip
from gpubroker.plan.preempt import daly_interval_h
from gpubroker.plan.rank import Ask, LeftOut, Pricing, Quote, row_id
from gpubroker.plan.sentence import advice, name_of
from gpubroker.plan.simulate import Distribution

# What a row says it costs beside compute: what is at least this share of its total.
_WORTH_SAYING = Decimal("0.02")
_FLIPS = {
    "egress_gb": "{:,.0f} GB leaving at the end",
    "hours": "{:,.2f} hours of work",
    "preemptions_per_hour": "{:.3g} preemptions an hour",
}
# Columns from which there is room to say it.
_WIDE = 124
_SHORT = {"preemptions": "preempt.", "billing unit": "unit", "cpu and ram": "cpu+ram"}


def print_table(
    shown: Sequence[Quote],
    quotes: Sequence[Quote],
    spreads: Mapping[int, Distribution],
    ask: Ask,
    pricing: Pricing,
    stale_before: datetime,
    now: datetime,
) -> None:
    """The rows of `shown` with their places among `quotes`; `spreads` by id() of a quote."""
    out = console()
    plus, hours = int(out.width >= _WIDE), int(bool(pricing.assumption))
    made = table(
        "#", "provider", "GPU", "market", "region", *["hours"][:hours], "$/h", "total", "p90", "price",
        *["plus"][:plus],
        right=("#", "hours", "$/h", "total", "p90"), whole=("provider", "market"),
    )  # fmt: skip
    place = {id(q): i for i, q in enumerate(quotes, 1)}
    for q in shown:
        made.add_row(
            str(place[id(q)]),
            q.offer.provider,
            gpu_text(q, ask.gpu_count),
            q.offer.market.replace("_", "-"),
            q.offer.zone or q.offer.region or q.offer.cloud or "any",
            *[f"{q.work.hours:.1f}"][:hours],
            dollars(q.offer.usd_per_hour),
            dollars(q.bill.total_usd),
            dollars_of(spreads[id(q)].usd.p90),
            _price_age(q, stale_before, now),
            *[", ".join(_extras(q))][:plus],
        )
    out.print(made)
    more = any(q.offer.gpu_count > ask.gpu_count for q in shown)
    note = f" * has more GPUs than the {ask.gpu_count} asked: all of it is paid." if more else ""
    out.print(
        f"total is what to expect, preemptions included; 9 of 10 runs cost at most p90.{note}", style="dim"
    )
    if ask.work.checkpoints.gb == 0 and any(q.offer.preemptible for q in shown):
        out.print(
            "No --checkpoint-gb was given: checkpoints are taken to cost 10 s and no transfer.", style="dim"
        )
    out.print()
    if pricing.assumption:
        out.print(f"Hours are those of each card: {pricing.assumption}", style="dim")
    out.print(advice(quotes, ask, now))


def _extras(q: Quote) -> list[str]:
    """Groups of lines that matter, the largest first."""
    groups: dict[str, Decimal] = {}
    for line in q.bill.lines:
        groups[line.group] = groups.get(line.group, Decimal(0)) + line.usd
    groups.pop("compute", None)
    least = _WORTH_SAYING * q.bill.total_usd
    return [
        _SHORT.get(name, name) for name in sorted(groups, key=lambda n: -groups[n]) if groups[name] >= least
    ]


def summarise(left_out: Sequence[LeftOut]) -> None:
    """The commonest reasons in one line."""
    if not left_out:
        return
    most = Counter(item.reason.partition(":")[0] for item in left_out).most_common(3)
    rest = len(left_out) - sum(n for _, n in most)
    parts = [f"{n} {reason}" for reason, n in most] + ([f"{rest} for other reasons"] if rest else [])
    console().print(f"Left out: {'; '.join(parts)}. --explain lists them.")


def explain(
    shown: Sequence[Quote],
    quotes: Sequence[Quote],
    spreads: Mapping[int, Distribution],
    left_out: Sequence[LeftOut],
) -> None:
    """Every line's arithmetic, then all that was left out, alike ones together."""
    out = console()
    place = {id(q): i for i, q in enumerate(quotes, 1)}
    for q in shown:
        what = f"{gpu_text(q, q.offer.gpu_count)} {q.offer.market.replace('_', '-')}"
        head = f"{place[id(q)]}. {q.offer.provider} {what}, {row_id(q.offer)}: {dollars(q.bill.total_usd)}"
        out.print(Text(f"\n{head}", style="bold"))
        for text in (*_facts(q, spreads[id(q)]), *_arithmetic(q)):
            out.print(Padding(Text(text), (0, 0, 0, 2)))
    if left_out:
        out.print("\nLeft out:")
    groups: dict[tuple[str, str], Counter[str]] = {}
    for item in left_out:
        groups.setdefault((item.provider, item.reason), Counter())[item.id] += 1
    for (provider, reason), ids in groups.items():
        some = ", ".join(f"{name} (x{n})" if n > 1 else name for name, n in ids.items())
        out.print(Padding(Text(f"{provider}: {reason}: {some}"), (0, 0, 0, 2)))


def print_flips(found: Sequence[Flip]) -> None:
    """What would change the answer."""
    out = console()
    out.print(
        "\nThe first row stops being the cheapest:" if found else "\nNothing tried changes the first row."
    )
    for flip in found:
        way = "from" if flip.at > flip.now else "down to"
        text = f"{way} {_FLIPS[flip.what].format(flip.at)} (now {_FLIPS[flip.what].format(flip.now)})"
        out.print(Padding(Text(f"{text}: {name_of(flip.winner)} wins"), (0, 0, 0, 2)))


def _facts(q: Quote, spread: Distribution) -> list[str]:
    """What the lines rest on, and how the total may turn out."""
    course = q.bill.course
    facts = [q.pace] if q.pace else []
    if q.risk.per_hour:
        facts.append(f"preemptions: {q.risk.source}; {course.preemptions:.2g} expected{_interval(q)}")
    usd, finish = spread.usd, spread.finish_h
    facts.append(
        f"cost p50 {dollars_of(usd.p50)}, p90 {dollars_of(usd.p90)}, p99 {dollars_of(usd.p99)}; "
        f"done after p50 {hours_of(finish.p50)}, p90 {hours_of(finish.p90)}, p99 {hours_of(finish.p99)}"
    )
    return facts


def _interval(q: Quote) -> str:
    """The interval that was reckoned with, beside the formula that people know."""
    interval_h, asked_s = q.bill.course.interval_h, q.work.checkpoints.every_s
    if interval_h is None:
        return ", none saved: it would cost more than it spares"
    text = f", a checkpoint every {interval_h * 60:.0f} min"
    if asked_s is not None:
        return f"{text}, as asked"
    daly_h = daly_interval_h(q.inputs.hazard_per_hour, q.inputs.checkpoint_h)
    why = ", fewer as they are charged for leaving" if q.inputs.interval_h is not None else ""
    return f"{text} (Daly's formula: {daly_h * 60:.0f} min{why})"


def _arithmetic(q: Quote) -> list[str]:
    width = max(len(line.item) for line in q.bill.lines)
    return [
        f"{line.item:<{width}} ${usd_text(line.usd):>12}  {line.how}  [{line.source}]"
        for line in q.bill.lines
    ]


def gpu_text(q: Quote, asked: int) -> str:
    """2x H100 SXM, with a star when it is more than was asked for."""
    offer = q.offer
    form = "" if offer.form_factor == "unstated" else f" {offer.form_factor}"
    return f"{offer.gpu_count}x {offer.gpu}{form}{'*' if offer.gpu_count > asked else ''}"


def _price_age(q: Quote, stale_before: datetime, now: datetime) -> str:
    if not q.priced.live:
        return f"listed {q.priced.as_of.date().isoformat() if q.priced.as_of else 'undated'}"
    stale = ", stale" if is_stale(q, stale_before) else ""
    stock = "" if q.has_stock else ", none free"
    return f"{age(q.priced.as_of, now)} old{stale}{stock}"


def is_stale(q: Quote, stale_before: datetime) -> bool:
    """Whether the price is older than was wished for."""
    return q.priced.as_of is None or q.priced.as_of < stale_before
