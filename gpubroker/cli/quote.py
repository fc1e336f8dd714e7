"""`gpubroker quote`: the bill of a job on every market, cheapest first."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from gpubroker import config
from gpubroker.cli.ask import ask_from, knowledge_from, pricing_for, rows_for
from gpubroker.cli.options import Duration, filter_options, format_option, work_options
from gpubroker.cli.render import iso, print_csv, print_json, say
from gpubroker.doors import SystemClock
from gpubroker.errors import NoFeasibleOffer
from gpubroker.money import usd_text
from gpubroker.plan.breakeven import Flip, flips
from gpubroker.plan.rank import Ask, LeftOut, Pricing, Quote, best_of_each, price_source, rank
from gpubroker.prices import market

if TYPE_CHECKING:
    from gpubroker.plan.simulate import Distribution

_CSV = (
    "provider", "sku", "gpu", "form_factor", "gpu_count", "market", "preemptible", "region", "zone", "cloud",
    "stock", "usd_per_hour", "total_usd", "p50_usd", "p90_usd", "p99_usd", "finish_p90_h", "as_of", "source",
    "live", "stale",
)  # fmt: skip
# Rows of json and csv that have a distribution.
_SPREAD_ROWS = 10


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker quote --gpu h100 --hours 8
  gpubroker quote --gpu a100-80gb --count 4 --hours 24 --market spot --egress-gb 200
  gpubroker quote --gpu h100 --hours 40 --checkpoint-gb 30 --checkpoint-at cloudflare-r2 --explain
  gpubroker quote --min-vram 48 --work 8h@h100-sxm --format json""",
)
@filter_options
@work_options
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="Rows of the table, each vendor's best among them; json and csv hold all.",
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
    # It builds tens of thousands of small objects and ends: the collector would walk them again and again.
    gc.disable()
    settings = config.load()
    clock = SystemClock()
    ask = ask_from(asked, settings)
    max_age_s = settings.max_age_s if max_age is None else max_age
    rows = rows_for(ask, settings, max_age_s=max_age_s, offline=offline, clock=clock)
    pricing = pricing_for(ask, settings, rows.view.exposures, knowledge_from(asked))
    ranking = rank(rows.priced, ask, pricing)
    unread = [LeftOut(provider=name, id=skip.id, reason=skip.reason) for name, skip in rows.view.skipped]
    left_out = [*rows.superseded, *ranking.left_out]

    now = clock.now()
    stale_before = now - timedelta(seconds=max_age_s)
    if output == "json":
        problems = [*rows.view.problems, *rows.view.gaps]
        print_json(_json(ask, ranking.quotes, [*unread, *left_out], problems, stale_before, pricing))
    elif output == "csv":
        records = _records(ranking.quotes, stale_before, pricing)
        print_csv(_CSV, ([record[name] for name in _CSV] for record in records))
    elif ranking.quotes:
        from gpubroker.cli import quote_view

        shown = best_of_each(ranking.quotes, top)
        spreads = _spreads(shown, pricing)
        quote_view.print_table(shown, ranking.quotes, spreads, ask, pricing, stale_before, now)
        if explain:
            quote_view.explain(shown, ranking.quotes, spreads, [*unread, *left_out])
            quote_view.print_flips(flips(ranking.quotes, pricing))
        else:
            quote_view.summarise(left_out)
    if output != "json":
        for problem in (*rows.view.problems, *(rows.view.gaps if explain else ())):
            say(f"{problem.provider}: {problem.reason}")
    if not ranking.quotes:
        near = Counter(item.reason for item in ranking.left_out).most_common(4)
        why = "; ".join(f"{n} left out: {reason}" for reason, n in near) or "no price is known for it"
        raise NoFeasibleOffer(f"nothing fits: {why}")


def _spreads(quotes: Iterable[Quote], pricing: Pricing) -> dict[int, Distribution]:
    """Distributions by id() of a quote; numpy is imported here."""
    from gpubroker.plan.spread import spread_of

    return {id(q): spread_of(q, pricing) for q in quotes}


def _json(
    ask: Ask,
    quotes: Sequence[Quote],
    left_out: Sequence[LeftOut],
    problems: Sequence[market.Problem],
    stale_before: datetime,
    pricing: Pricing,
) -> dict[str, Any]:
    work, saves = ask.work, ask.work.checkpoints
    return {
        "asked": {
            "gpu": [g.text for g in ask.gpus],
            "gpu_count": ask.gpu_count,
            "hours": None if ask.amount else f"{work.hours:f}",
            "work": ask.amount or None,
            "assumption": pricing.assumption or None,
            "market": list(ask.markets),
            "provider": list(ask.providers),
            "region": list(ask.regions),
            "min_vram_gib": ask.min_vram_gib,
            "verified_only": ask.verified_only,
            "disk_gb": f"{work.disk_gb:f}",
            "egress_gb": f"{work.egress_gb:f}",
            "ingress_gb": f"{work.ingress_gb:f}",
            "data_at": work.data_store,
            "volume_gb": f"{work.volume_gb:f}",
            "checkpoint_gb": f"{saves.gb:f}",
            "checkpoint_save_s": f"{saves.pause_s:f}",
            "checkpoint_every_s": None if saves.every_s is None else f"{saves.every_s:f}",
            "checkpoint_at": saves.store,
        },
        "quotes": list(_records(quotes, stale_before, pricing)),
        "skipped": [{"provider": i.provider, "id": i.id, "reason": i.reason} for i in left_out],
        "problems": [{"provider": p.provider, "reason": p.reason} for p in problems],
        "flips": [flip_record(flip) for flip in flips(quotes, pricing)],
    }


def flip_record(flip: Flip) -> dict[str, str]:
    """One break-even for JSON."""
    offer = flip.winner.offer
    return {
        "what": flip.what,
        "now": f"{flip.now:f}",
        "at": f"{flip.at:.6f}",
        "provider": offer.provider,
        "sku": offer.sku,
        "market": offer.market,
        "region": offer.region,
    }


def _records(quotes: Sequence[Quote], stale_before: datetime, pricing: Pricing) -> Iterable[dict[str, Any]]:
    """One record a quote; the first rows carry a distribution, the others null."""
    spreads = _spreads(quotes[:_SPREAD_ROWS], pricing)
    for q in quotes:
        yield {**_record(q, stale_before), **_spread_record(spreads.get(id(q)))}


def _spread_record(spread: Distribution | None) -> Mapping[str, str | None]:
    """Null for a row that has none, and for a figure that is not finite."""

    def text(value: float, digits: int) -> str | None:
        return f"{value:.{digits}f}" if math.isfinite(value) else None

    names = ("p50", "p90", "p99")
    if spread is None:
        return dict.fromkeys((*(f"{name}_usd" for name in names), *(f"finish_{name}_h" for name in names)))
    return {
        **{f"{name}_usd": text(getattr(spread.usd, name), 6) for name in names},
        **{f"finish_{name}_h": text(getattr(spread.finish_h, name), 4) for name in names},
    }


def _record(q: Quote, stale_before: datetime) -> dict[str, Any]:
    from gpubroker.cli.quote_view import is_stale

    offer, course = q.offer, q.bill.course
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
        "hours": f"{q.work.hours:f}",
        "pace": q.pace,
        "preemptions_per_hour": f"{q.risk.per_hour:.6g}",
        "preemptions_source": q.risk.source,
        "preemptions": f"{course.preemptions:f}",
        "checkpoint_every_s": None if course.interval_h is None else f"{course.interval_h * 3600:.0f}",
        "as_of": iso(q.priced.as_of),
        "source": price_source(q.priced),
        "live": q.priced.live,
        "stale": is_stale(q, stale_before),
    }
