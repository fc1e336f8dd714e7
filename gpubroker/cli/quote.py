"""`gpubroker quote`: the bill of a job on every market, cheapest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import click
from rich.padding import Padding
from rich.text import Text

from gpubroker import config
from gpubroker.cli.ask import ask_from, pricing_for, rows_for
from gpubroker.cli.options import Duration, filter_options, format_option, work_options
from gpubroker.cli.render import age, console, dollars, iso, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import NoFeasibleOffer
from gpubroker.money import usd_text
from gpubroker.plan.rank import Ask, LeftOut, Quote, best_of_each, list_price_text, rank, row_id
from gpubroker.plan.sentence import advice
from gpubroker.prices import market

_CSV = (
    "provider", "sku", "gpu", "form_factor", "gpu_count", "market", "preemptible", "region", "zone", "cloud",
    "stock", "usd_per_hour", "total_usd", "as_of", "source", "live", "stale",
)  # fmt: skip

# Lines that every bill has; the table names only what comes on top.
_ALWAYS = ("compute", "start-up")


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker quote --gpu h100 --hours 8
  gpubroker quote --gpu a100-80gb --count 4 --hours 24 --market spot --egress-gb 200
  gpubroker quote --min-vram 48 --hours 2 --format json""",
)
@filter_options
@work_options
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="Rows of the table; json and csv hold all.",
)
@click.option("--max-age", type=Duration(), help="Refresh prices older than this first.  [default: 30m]")
@click.option("--offline", is_flag=True, help="Never ask a vendor: stored prices and the price book.")
@click.option("--explain", is_flag=True, help="Show every line's arithmetic and all that was left out.")
@format_option("table", "json", "csv")
def quote(*, top: int, max_age: int | None, offline: bool, explain: bool, output: str, **asked: Any) -> None:
    """What a job costs on every market: compute by billing unit, start-up, preemptions, disk and transfer.

    Uses prices polled within --max-age, refreshes older ones in at most 4 seconds, and falls back to dated
    list prices; every row says how old its price is.
    """
    settings = config.load()
    clock = SystemClock()
    ask = ask_from(asked, settings)
    pricing = pricing_for(ask, settings, preemption_rate=asked["preemption_rate"])
    max_age_s = settings.max_age_s if max_age is None else max_age
    rows = rows_for(ask, settings, max_age_s=max_age_s, offline=offline, clock=clock)
    view, superseded = rows.view, rows.superseded
    ranking = rank(rows.priced, ask, pricing)
    unread = [LeftOut(provider=name, id=skip.id, reason=skip.reason) for name, skip in view.skipped]
    left_out = [*superseded, *ranking.left_out]

    now = clock.now()
    stale_before = now - timedelta(seconds=max_age_s)
    if output == "json":
        problems = [*view.problems, *view.gaps]
        print_json(_json(ask, ranking.quotes, [*unread, *left_out], problems, stale_before))
    elif output == "csv":
        records = (_record(q, stale_before) for q in ranking.quotes)
        print_csv(_CSV, ([record[name] for name in _CSV] for record in records))
    elif ranking.quotes:
        shown = best_of_each(ranking.quotes, top)
        _print_table(shown, ranking.quotes, ask, stale_before, now)
        if explain:
            _explain(shown, ranking.quotes, [*unread, *left_out])
        else:
            _summarise(left_out)
    if output != "json":
        for problem in (*view.problems, *(view.gaps if explain else ())):
            say(f"{problem.provider}: {problem.reason}")
    if not ranking.quotes:
        near = Counter(item.reason for item in ranking.left_out).most_common(4)
        why = "; ".join(f"{n} left out: {reason}" for reason, n in near) or "no price is known for it"
        raise NoFeasibleOffer(f"nothing fits: {why}")


def _print_table(
    shown: Sequence[Quote], quotes: Sequence[Quote], ask: Ask, stale_before: datetime, now: datetime
) -> None:
    made = table(
        "#", "provider", "GPU", "market", "region", "$/h", "total", "plus", "price",
        right=("#", "$/h", "total"), whole=("provider", "market", "region", "price"),
    )  # fmt: skip
    place = {id(q): i for i, q in enumerate(quotes, 1)}
    for q in shown:
        made.add_row(
            str(place[id(q)]),
            q.offer.provider,
            _gpu_text(q, ask.gpu_count),
            q.offer.market.replace("_", "-"),
            q.offer.zone or q.offer.region or q.offer.cloud or "any",
            dollars(q.offer.usd_per_hour),
            dollars(q.bill.total_usd),
            ", ".join(line.item for line in q.bill.lines if line.item not in _ALWAYS),
            _price_age(q, stale_before, now),
        )
    out = console()
    out.print(made)
    more = any(q.offer.gpu_count > ask.gpu_count for q in shown)
    note = f" * has more GPUs than the {ask.gpu_count} asked: all of it is paid." if more else ""
    out.print(f"Totals are compute and start-up, plus what the row says.{note}", style="dim")
    out.print()
    out.print(advice(quotes, ask, now))


def _summarise(left_out: Sequence[LeftOut]) -> None:
    """The commonest reasons in one line."""
    if not left_out:
        return
    most = Counter(item.reason.partition(":")[0] for item in left_out).most_common(3)
    rest = len(left_out) - sum(n for _, n in most)
    parts = [f"{n} {reason}" for reason, n in most] + ([f"{rest} for other reasons"] if rest else [])
    console().print(f"Left out: {'; '.join(parts)}. --explain lists them.")


def _gpu_text(q: Quote, asked: int) -> str:
    offer = q.offer
    form = "" if offer.form_factor == "unstated" else f" {offer.form_factor}"
    return f"{offer.gpu_count}x {offer.gpu}{form}{'*' if offer.gpu_count > asked else ''}"


def _price_age(q: Quote, stale_before: datetime, now: datetime) -> str:
    if not q.priced.live:
        return list_price_text(q.priced)
    stale = ", stale" if _is_stale(q, stale_before) else ""
    stock = "" if q.has_stock else ", none free"
    return f"{age(q.priced.as_of, now)} old{stale}{stock}"


def _is_stale(q: Quote, stale_before: datetime) -> bool:
    return q.priced.as_of is None or q.priced.as_of < stale_before


def _explain(shown: Sequence[Quote], quotes: Sequence[Quote], left_out: Sequence[LeftOut]) -> None:
    """Every line's arithmetic, then all that was left out, alike ones together."""
    out = console()
    place = {id(q): i for i, q in enumerate(quotes, 1)}
    for q in shown:
        what = f"{_gpu_text(q, q.offer.gpu_count)} {q.offer.market.replace('_', '-')}"
        head = f"{place[id(q)]}. {q.offer.provider} {what}, {row_id(q.offer)}: {dollars(q.bill.total_usd)}"
        out.print(Text(f"\n{head}", style="bold"))
        for line in q.bill.lines:
            text = f"{line.item:<12} ${usd_text(line.usd):>12}  {line.how}  [{line.source}]"
            out.print(Padding(Text(text), (0, 0, 0, 2)))
    if left_out:
        out.print("\nLeft out:")
    groups: dict[tuple[str, str], Counter[str]] = {}
    for item in left_out:
        groups.setdefault((item.provider, item.reason), Counter())[item.id] += 1
    for (provider, reason), ids in groups.items():
        some = ", ".join(f"{name} (x{n})" if n > 1 else name for name, n in ids.items())
        out.print(Padding(Text(f"{provider}: {reason}: {some}"), (0, 0, 0, 2)))


def _json(
    ask: Ask,
    quotes: Sequence[Quote],
    left_out: Sequence[LeftOut],
    problems: Sequence[market.Problem],
    stale_before: datetime,
) -> dict[str, Any]:
    return {
        "asked": {
            "gpu": [g.text for g in ask.gpus],
            "gpu_count": ask.gpu_count,
            "hours": f"{ask.work.hours:f}",
            "market": list(ask.markets),
            "provider": list(ask.providers),
            "region": list(ask.regions),
            "min_vram_gib": ask.min_vram_gib,
            "verified_only": ask.verified_only,
            "disk_gb": f"{ask.work.disk_gb:f}",
            "egress_gb": f"{ask.work.egress_gb:f}",
            "ingress_gb": f"{ask.work.ingress_gb:f}",
        },
        "quotes": [_record(q, stale_before) for q in quotes],
        "skipped": [{"provider": i.provider, "id": i.id, "reason": i.reason} for i in left_out],
        "problems": [{"provider": p.provider, "reason": p.reason} for p in problems],
    }


def _record(q: Quote, stale_before: datetime) -> dict[str, Any]:
    offer = q.offer
    return {
        "provider": offer.provider,
        "sku": offer.sku,
        "gpu": offer.gpu,
        "form_factor": offer.form_factor,
        "gpu_count": offer.gpu_count,
        "vram_gib": offer.vram_gib,
        "market": offer.market,
        "preemptible": offer.preemptible,
        "region": offer.region,
        "zone": offer.zone,
        "cloud": offer.cloud,
        "machine_id": offer.machine_id,
        "host_id": offer.host_id,
        "listing_id": offer.listing_id,
        "verified": offer.verified,
        "reliability": None if offer.reliability is None else f"{offer.reliability:f}",
        "stock": offer.stock,
        "usd_per_hour": usd_text(offer.usd_per_hour),
        "total_usd": usd_text(q.bill.total_usd),
        "lines": [
            {"item": line.item, "usd": usd_text(line.usd), "how": line.how, "source": line.source}
            for line in q.bill.lines
        ],
        "as_of": iso(q.priced.as_of),
        "source": q.priced.source if q.priced.live else f"{list_price_text(q.priced)}: {q.priced.source}",
        "live": q.priced.live,
        "stale": _is_stale(q, stale_before),
    }
