"""`gpubroker run`: a job on rented nodes, from a terminal that stays open, through preemptions to its end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.checkpoint import LONGEST_INTERVAL_S
from gpubroker.cli.asked import asked_job, job_options, volume_of
from gpubroker.cli.job import job_record
from gpubroker.cli.options import format_option
from gpubroker.cli.plan import ask_of, known_of
from gpubroker.cli.render import print_bytes, print_json, say
from gpubroker.cli.renting import RECENT_S, Market, check_store, job_of, store_of
from gpubroker.cli.watching import tell, tick_until
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError, NoFeasibleOffer, OverBudget
from gpubroker.jobspec import JobSpec, kept_job
from gpubroker.plan.rank import Pricing, Quote
from gpubroker.plan.sentence import name_of
from gpubroker.prices.database import Database
from gpubroker.prices.market import open_context
from gpubroker.provider import Compute
from gpubroker.run.computes import computes
from gpubroker.run.contact import connector, keys_of
from gpubroker.run.looks import job_folder
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Outcome, Supervisor

_JOB_FAILED, _OVER_BUDGET = 6, 5
_SHOWN = 10


@click.command(
    context_settings={"max_content_width": 100, "ignore_unknown_options": False},
    epilog="""\b
Examples:
  gpubroker run --gpu 4090 --hours 2 --max-usd 5 -- python train.py --epochs 3
  gpubroker run --gpu h100 --hours 8 --max-usd 40 --store s3://bucket/job --artifact out
      -- python train.py
  gpubroker run --gpu 4090 --hours 8 --store volume:data -- python train.py
  gpubroker run --gpu 4090 --hours 2 --preset vllm --model Qwen/Qwen3-8B -- --max-model-len 8192
  gpubroker run job.toml
  gpubroker run --resume job-1a2b3c""",
)
@job_options
@click.option("--resume", help="Go on with a job whose run was interrupted or killed, by its id.")
@click.option("--dry-run", is_flag=True, help="Show the offers it would try and what each would cost.")
@format_option("table", "json")
@click.pass_context
def run(
    context: click.Context,
    /,
    *,
    words: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    dry_run: bool,
    output: str,
    **asked: Any,
) -> None:
    """Rent the cheapest node that proves itself, run the command there, and see it through preemptions.

    The folder is sent as it is, artifacts come back. Ctrl-C, and closing the terminal, end what was rented;
    --resume goes on from the last checkpoint. With --format json the last line is the job's record.
    """
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, provider_context):
        records = Records(store.database, clock)
        if resume is not None:
            spec, job_id = _resumed(records, resume)
            ask, known = ask_of(spec, settings), known_of(spec)
        else:
            spec, ask, known = asked_job(context, words, asked, settings, clock)
            job_id = ""
        volume = volume_of(spec, ask, provider_context)
        if volume is not None:
            say(f"volume {volume.name} is at {volume.place}: only offers there are tried")
            ask = replace(ask, providers=(volume.provider,))
        found, without = computes(provider_context, ask.providers or None)
        market = Market(
            ask,
            known,
            settings,
            clock,
            found,
            volume=volume,
            deadline=spec.limits.deadline,
            attempts=lambda: records.attempts(job_id),
            tell=tell,
        )
        if dry_run:
            _show(spec, market, output)
            return
        if not found:
            raise ConfigError("no provider can rent: " + "; ".join(f"{n}: {r}" for n, r in without.items()))
        keep_to = store_of(spec, volume)
        check_store(keep_to)
        renting = Renting(records, found, clock)
        renting.look_at_boxes()  # one that is over spends nothing of the day's cap any more
        job_id = job_id or records.add_job(spec.name, spec.model_dump_json())
        keys = keys_of(job_folder(settings.jobs_dir, job_id))
        job = job_of(
            job_id,
            spec,
            keys,
            folder=Path(spec.folder),
            out=out or Path("gpubroker-out") / job_id,
            store=keep_to,
            settings=settings,
        )
        _refuse_missing(records, job_id, found, without)
        hear = print_bytes if output == "table" else _log_to_stderr
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=renting,
            computes=found,
            candidates=market.candidates,
            connect=connector(keys),
            clock=clock,
            say=lambda text: tell(f"[{clock.now():%H:%M:%S}] {text}"),
            log=lambda _, data: hear(data),
            renew_within_s=float(settings.renew_within_s),
            reach=settings.reach,
        )
        say(f"{job_id}: artifacts will be in {job.out}")
        outcome = _alone(store.database, supervisor, clock, keys.folder, is_resumed=resume is not None)
        _report(job_id, outcome, records, output, clock)


def _alone(
    database: Database, supervisor: Supervisor, clock: Clock, folder: Path, *, is_resumed: bool
) -> Outcome:
    """To the job's end, as the only process that runs it."""
    job_id = supervisor.job.id
    with database.hold(f"job {job_id}") as is_ours:
        if not is_ours:
            raise ConfigError(f"{job_id} is run by another gpubroker now: stop that one, or wait for it")
        if is_resumed:
            supervisor.records.reopen(job_id)
        try:
            outcome = tick_until(supervisor, clock, folder)
        except OverBudget as error:
            if error.until is None:  # the job's own
                supervisor.records.end_job(job_id, "over_budget", str(error))
            raise
        except KeyboardInterrupt:
            tell(f"to go on: gpubroker run --resume {job_id}")
            raise click.Abort from None
    assert outcome is not None  # noqa: S101  nothing else was enough
    return outcome


def _resumed(records: Records, job_id: str) -> tuple[JobSpec, str]:
    kept = records.job(job_id)
    if kept is None:
        raise ConfigError(f"--resume: no job is called {job_id[:60]!r}")
    state, reason, spec = kept
    row = records.row(job_id)
    if row is not None and row.unattended:
        raise ConfigError(f"--resume: {job_id} is the supervisor's: gpubroker job resume {job_id}")
    is_over = state not in ("running", "stopped") and all(a.ended_at for a in records.attempts(job_id))
    if is_over:
        raise ConfigError(f"--resume: {job_id} is {state}{f': {reason}' if reason else ''}")
    described = kept_job(spec)
    if described.box:
        raise ConfigError(f"--resume: {job_id} is a box: gpubroker ssh and gpubroker down go on with it")
    return described, job_id


def _refuse_missing(
    records: Records, job_id: str, found: Mapping[str, Compute], without: Mapping[str, str]
) -> None:
    """A job may have a node at a vendor whose key is not set here."""
    for attempt in records.open_attempts():
        if attempt.job_id == job_id and attempt.provider not in found:
            why = without.get(attempt.provider, "not among the providers that were asked for")
            raise ConfigError(f"{job_id} has a node at {attempt.provider}, which cannot be asked: {why}")


def _log_to_stderr(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def _report(job_id: str, outcome: Outcome, records: Records, output: str, clock: Clock) -> None:
    if output == "json":
        print_json(job_record(job_id, outcome.state, records, clock.now()))
    else:
        attempts = records.attempts(job_id)
        total = sum((a.usd_so_far(clock.now()) for a in attempts), Decimal(0))
        count = sum(a.node_id is not None for a in attempts)
        nodes = f"{count} node{'s' * (count != 1)}"
        say(f"{job_id} is {outcome.state} ({outcome.reason}): {nodes}, about ${total:.4f}")
    if outcome.state != "done":
        raise click.exceptions.Exit(_OVER_BUDGET if outcome.state == "over_budget" else _JOB_FAILED)


def _show(spec: JobSpec, market: Market, output: str) -> None:
    """What would be run, and the offers in the order in which they would be tried."""
    found = list(market.in_order(RECENT_S))
    if not found:
        raise NoFeasibleOffer(f"nothing can be rented now: {market.why_none()}")
    risks = sorted(market.risks({quote.offer.provider for quote, _, _ in found}))
    if output == "json":
        offers = [_offer_record(quote, note, spec) for quote, _, note in found]
        print_json({"command": _command_of(spec), "image": spec.image, "offers": offers, "risks": risks})
    else:
        say(f"would run{f' in {spec.image}' if spec.image else ''}: {_command_of(spec)}")
        _print_offers(found[:_SHOWN], spec)
    for text in filter(None, (market.left_out(), *risks)):
        say(text)


def _command_of(spec: JobSpec) -> str:
    return spec.command if isinstance(spec.command, str) else shlex.join(spec.command or ())


def _print_offers(found: Sequence[tuple[Quote, Pricing, str]], spec: JobSpec) -> None:
    from gpubroker.cli.render import console, dollars, table

    right = ("#", "$/h", "expected bill", "hours", "losses", "saves every")
    made = table("#", "offer", *right[1:], "", right=right)
    for number, (quote, _, note) in enumerate(found, 1):
        course = quote.bill.course
        made.add_row(
            str(number),
            name_of(quote),
            dollars(quote.offer.usd_per_hour),
            dollars(quote.bill.total_usd),
            f"{course.wall_h:.1f}",
            f"{course.preemptions:.1f}" if quote.offer.preemptible else "",
            f"{_interval_s(quote, spec) / 60:.0f} min",
            note,
        )
    console().print(made)


def _interval_s(quote: Quote, spec: JobSpec) -> int:
    """Between saves, as the job on the node has it: the user's, or the plan's up to the longest."""
    interval_h = quote.bill.course.interval_h
    if spec.checkpoint.every is not None:
        return spec.checkpoint.every
    planned_s = LONGEST_INTERVAL_S if interval_h is None else float(interval_h) * 3600
    return round(min(planned_s, LONGEST_INTERVAL_S))


def _offer_record(quote: Quote, note: str, spec: JobSpec) -> dict[str, Any]:
    offer, course = quote.offer, quote.bill.course
    return {
        "provider": offer.provider,
        "sku": offer.sku,
        "gpu": offer.gpu,
        "form_factor": offer.form_factor,
        "gpu_count": offer.gpu_count,
        "market": offer.market,
        "preemptible": offer.preemptible,
        "region": offer.zone or offer.region,
        "usd_per_hour": f"{offer.usd_per_hour:f}",
        "total_usd": f"{quote.bill.total_usd:f}",
        "wall_h": f"{course.wall_h:.4f}",
        "preemptions": f"{course.preemptions:.4f}",
        "interval_s": _interval_s(quote, spec),
        "note": note,
    }
