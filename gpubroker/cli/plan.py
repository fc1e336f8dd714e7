"""`gpubroker plan`: which way to run a job keeps its deadline and budget for the least money."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli import plan_view
from gpubroker.cli.ask import Knowledge, ask_from, knowledge_from, pricing_for, rows_for
from gpubroker.cli.options import Amount, Duration, filter_options, format_option, work_options
from gpubroker.cli.render import print_csv, print_json, say
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError, NoFeasibleOffer
from gpubroker.jobspec import VOLUME, JobSpec, parse_job
from gpubroker.plan.bids import Bid
from gpubroker.plan.breakeven import flips
from gpubroker.plan.hazard import Span
from gpubroker.plan.rank import Ask, Pricing, Quote, rank
from gpubroker.plan.strategy import Limits, at_best_bid, strategies
from gpubroker.plan.work import Checkpoints, Work
from gpubroker.units import parse_deadline

_LARGEST_JOB_FILE = 100_000
# Providers whose spot market takes bids, and how many rows of it are bid for.
_TAKES_BIDS = frozenset({"vast"})
_MOST_BIDS = 6


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker plan job.toml
  gpubroker plan --gpu h100 --hours 40 --deadline 60h --budget-usd 120 --checkpoint-gb 30
      --checkpoint-save 40s --checkpoint-at cloudflare-r2
  gpubroker plan --min-vram 48 --work 8h@h100-sxm --deadline 2026-12-01T08:00Z --explain""",
)
@click.argument("job_file", metavar="[JOB.TOML]", required=False, type=click.Path(path_type=Path))
@filter_options
@work_options
@click.option("--deadline", help="36h from now, or 2026-12-01T08:00Z.")
@click.option("--budget-usd", type=Amount(above=0, most=1_000_000), help="The most it may cost.")
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 0.999),
    default=0.95,
    show_default=True,
    help="The chance to keep both that a strategy needs.",
)
@click.option("--max-age", type=Duration(), help="Refresh prices older than this first.  [default: 30m]")
@click.option("--offline", is_flag=True, help="Never ask a vendor: stored prices and the price book.")
@click.option("--top", type=click.IntRange(1, 100), default=8, show_default=True, help="Rows of the table.")
@click.option("--explain", is_flag=True, help="Show what each strategy rests on.")
@format_option("table", "json", "csv")
@click.pass_context
def plan(
    context: click.Context,
    /,
    *,
    job_file: Path | None,
    deadline: str | None,
    budget_usd: Decimal | None,
    confidence: float,
    max_age: int | None,
    offline: bool,
    top: int,
    explain: bool,
    output: str,
    **asked: Any,
) -> None:
    """Strategies for a job, the best first: spot, with or without fallback, on demand, serverless, your own.

    Each is drawn thousands of times: what to expect, what nine of ten runs cost, and the chance to keep the
    deadline and the budget. The job is a job.toml, or the same by options.
    """
    settings, clock = config.load(), SystemClock()
    now = clock.now()
    if job_file is not None:
        refuse_both(context, {"job_file", "confidence", "max_age", "offline", "top", "explain", "output"})
        job = read_job(job_file, now)
        ask, known, limits = ask_of(job, settings), known_of(job), _limits_of(job, now, confidence)
    else:
        ask, known = ask_from(asked, settings), knowledge_from(asked)
        ends = None if deadline is None else parse_deadline(deadline, now, "--deadline")
        limits = _limits(ends, budget_usd, now, confidence)
    max_age_s = settings.max_age_s if max_age is None else max_age
    rows = rows_for(ask, settings, max_age_s=max_age_s, offline=offline, clock=clock)
    pricing = pricing_for(ask, settings, rows.view.exposures, known)
    ranking = rank(rows.priced, ask, pricing)
    for problem in rows.view.problems:
        say(f"{problem.provider}: {problem.reason}")
    if not ranking.quotes:
        raise NoFeasibleOffer("nothing fits: `gpubroker quote` with the same options says why of each offer")
    quotes, bids = _with_bids(list(ranking.quotes), pricing, limits, settings, clock)
    found = strategies(quotes, bids, pricing, limits)
    if not found:
        raise NoFeasibleOffer("nobody has one free right now")
    if output == "json":
        print_json(plan_view.record(found, ask, limits, flips(quotes, pricing), rows.view.problems, now))
    elif output == "csv":
        print_csv(plan_view.CSV, plan_view.csv_rows(found, limits))
    else:
        plan_view.show(found[:top], ask, limits, pricing, now)
        if explain:
            plan_view.explain(found[:top], limits)
    if not found[0].keeps(limits):
        raise NoFeasibleOffer(plan_view.what_would_do(found, limits))


def refuse_both(context: click.Context, own: set[str]) -> None:
    """Raise UsageError for an option of the job beside a job file; `own` are the command's other options."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in own
        and context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"the job is in the file: {given[0]} belongs there")


def read_job(path: Path, now: datetime) -> JobSpec:
    """A job.toml. Raises ConfigError."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file")
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_JOB_FILE + 1)
        if len(text) > _LARGEST_JOB_FILE:
            raise ConfigError(f"{path}: larger than any job")
        return parse_job(text.decode(), now, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from None


def ask_of(job: JobSpec, settings: Settings) -> Ask:
    """What the job needs, as the planner asks for it."""
    work = Work(
        hours=job.work.hours or Decimal(1),
        disk_gb=job.disk,
        egress_gb=job.artifacts.size,
        ingress_gb=job.data.size,
        data_store=_store_of(job.data.at, "data.at"),
        egress_gb_this_month=settings.egress_gb_this_month,
        cpu_cores_per_gpu=settings.cpu_cores_per_gpu,
        ram_gib_per_gpu=settings.ram_gib_per_gpu,
        checkpoints=Checkpoints(
            gb=job.checkpoint.size,
            save_s=None if job.checkpoint.save_time is None else Decimal(job.checkpoint.save_time),
            every_s=None if job.checkpoint.every is None else Decimal(job.checkpoint.every),
            store=_store_of(job.checkpoint.store, "checkpoint.store"),
            generations=job.checkpoint.keep,
        ),
    )
    vram = job.gpu.min_vram
    return Ask(
        work=work,
        amount=job.work.amount or "",
        gpus=job.gpu.requests,
        gpu_count=job.gpu.count,
        markets=job.where.markets,
        providers=tuple(name.lower() for name in job.where.providers),
        regions=job.where.regions,
        min_vram_gib=None if vram is None else int(vram * 10**9 / 2**30),
        verified_only=job.where.verified_only,
    )


def _store_of(where: str, key: str) -> str:
    """Who charges for what leaves there: s3:// is AWS's, a volume is the node's own provider's."""
    if where.startswith(VOLUME):
        return ""
    scheme, found, _ = where.partition("://")
    if not found:
        return where.lower()
    owners = {"s3": "aws", "r2": "cloudflare-r2", "hf": "", "https": "", "http": ""}
    if scheme.lower() not in owners:
        raise ConfigError(f"{key}: {scheme[:20]!r} is not a kind of place that is known: {', '.join(owners)}")
    return owners[scheme.lower()]


def known_of(job: JobSpec) -> Knowledge:
    """How its work is converted."""
    return Knowledge(bound=job.work.bound, job=job.work.measured_as)


def _limits_of(job: JobSpec, now: datetime, confidence: float) -> Limits:
    return _limits(job.limits.deadline, job.limits.budget_usd, now, confidence)


def _limits(ends: datetime | None, budget_usd: Decimal | None, now: datetime, confidence: float) -> Limits:
    return Limits(
        deadline_h=None if ends is None else (ends - now).total_seconds() / 3600,
        budget_usd=None if budget_usd is None else float(budget_usd),
        confidence=confidence,
    )


def _with_bids(
    quotes: list[Quote], pricing: Pricing, limits: Limits, settings: Settings, clock: Clock
) -> tuple[list[Quote], dict[int, Bid]]:
    """The best spot rows that take bids, priced at the bid that suits the job; in order again."""
    wanted = [q for q in quotes if q.offer.provider in _TAKES_BIDS and q.offer.market == "spot"][:_MOST_BIDS]
    if not wanted:
        return quotes, {}
    bids: dict[int, Bid] = {}
    replaced: dict[int, Quote] = {}
    histories = _histories(wanted, settings, clock)
    for quote, history in zip(wanted, histories, strict=True):
        found = at_best_bid(
            quote, history, _on_demand_usd(quote, quotes), pricing, clock.now(), limits.deadline_h
        )
        if found is not None:
            replaced[id(quote)] = found[0]
            bids[id(found[0])] = found[1]
    again = [replaced.get(id(quote), quote) for quote in quotes]
    return sorted(again, key=lambda q: (not q.has_stock, q.bill.total_usd)), bids


def _on_demand_usd(spot: Quote, quotes: list[Quote]) -> Decimal:
    """On the same machine, or else the cheapest of its kind there; twice the bid where none is known."""
    same = [
        q.offer
        for q in quotes
        if q.offer.market == "on_demand"
        and (q.offer.provider, q.offer.gpu, q.offer.form_factor, q.offer.gpu_count)
        == (spot.offer.provider, spot.offer.gpu, spot.offer.form_factor, spot.offer.gpu_count)
    ]
    own = [o.usd_per_hour for o in same if o.machine_id and o.machine_id == spot.offer.machine_id]
    return min(own or [o.usd_per_hour for o in same], default=2 * spot.offer.usd_per_hour)


def _histories(wanted: list[Quote], settings: Settings, clock: Clock) -> list[list[Span]]:
    """What the store knows of each offer's price over time."""
    if not any(quote.priced.live for quote in wanted):
        return [[] for _ in wanted]
    from gpubroker.prices.store import Store

    with Store.open(settings.db_url, clock) as store:
        store.migrate()
        return [store.spans_of(q.offer) if q.priced.live else [] for q in wanted]
