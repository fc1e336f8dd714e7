"""`gpubroker submit`: a job that a supervisor runs, with nobody there. `gpubroker job resume` is its twin.

checked as far as it can be -> kept on disk (run/kept.py) -> its row: from then on a supervisor may have it
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.ask import pricing_for, rows_for
from gpubroker.cli.asked import asked_job, job_options, volume_of
from gpubroker.cli.options import format_option
from gpubroker.cli.plan import ask_of, known_of
from gpubroker.cli.render import print_json, say
from gpubroker.cli.renting import RECENT_S, RENTED, check_store, secrets_of, store_of
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError, NoFeasibleOffer
from gpubroker.jobspec import JobSpec, kept_job
from gpubroker.plan.rank import Ask, rank
from gpubroker.prices.database import Database
from gpubroker.prices.market import open_context
from gpubroker.provider import Compute, ProviderContext
from gpubroker.run import kept
from gpubroker.run.computes import computes
from gpubroker.run.launching import NO_STORE
from gpubroker.run.leases import alive
from gpubroker.run.looks import job_folder
from gpubroker.run.payload import StoreKeys, script
from gpubroker.run.records import Records

# A job's description has no key for these: whoever runs it would price it without them.
_NOT_KEPT = {
    "volume_gb": "--volume-gb",
    "preemption_rate": "--preemptions-per-hour",
    "checkpoint_at": "--checkpoint-at",
}


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker submit job.toml
  gpubroker submit --gpu h100 --hours 8 --max-usd 40 --store s3://bucket/job --artifact out
      -- python train.py""",
)
@job_options
@format_option("table", "json")
@click.pass_context
def submit(
    context: click.Context, /, *, words: tuple[str, ...], out: Path | None, output: str, **asked: Any
) -> None:
    """Hand a job to the supervisor, which rents for it and sees it through while nobody watches.

    The folder is copied as it is now: what is edited later does not run. The job's secrets and the key of its
    store are kept in files that only you read, until it is over. Prints the job's id.
    """
    settings, clock = config.load(), SystemClock()
    for name, option in _NOT_KEPT.items():
        if asked[name]:
            raise click.UsageError(f"{option} is not kept with a job: gpubroker run takes it")
    with open_context(settings, os.environ, clock) as (store, provider_context):
        spec, ask, known = asked_job(context, words, asked, settings, clock)
        secrets, keys = _checked(spec, ask, known, provider_context)
        records = Records(store.database, clock)
        job_id = records.new_job_id(spec.name)
        kept.keep(
            job_folder(settings.jobs_dir, job_id),
            spec,
            secrets=secrets,
            store=keys,
            out=out or Path("gpubroker-out") / job_id,
            now=clock.now(),
        )
        records.add_job(spec.name, spec.model_dump_json(), unattended=True, job_id=job_id)
        tell_who_runs(job_id, store.database, output)


def resume_unattended(job_id: str, out: Path | None, output: str) -> None:
    """See `gpubroker job resume`."""
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, provider_context):
        records, folder = Records(store.database, clock), job_folder(settings.jobs_dir, job_id)
        row, found = records.row(job_id), records.job(job_id)
        if row is None or found is None:
            raise ConfigError(f"no job is called {job_id[:60]!r}")
        spec = kept_job(found[2])
        if spec.box:
            raise ConfigError(f"{job_id} is a box: gpubroker ssh and gpubroker down go on with it")
        if row.state not in ("running", "stopped"):
            raise ConfigError(f"{job_id} is {row.state}: {row.reason or 'there is nothing to go on with'}")
        with store.database.hold(f"job {job_id}") as is_free:
            if not is_free:
                raise ConfigError(f"{job_id} is run by a terminal now: Ctrl-C there leaves it")
            if not kept.is_kept(folder):
                if row.unattended:
                    kept.load(folder)  # says where it is not
                secrets, keys = _checked(spec, ask_of(spec, settings), known_of(spec), provider_context)
                out = out or Path("gpubroker-out") / job_id
                kept.keep(folder, spec, secrets=secrets, store=keys, out=out, now=clock.now())
            records.hand_over(job_id)
        tell_who_runs(job_id, store.database, output)


def tell_who_runs(job_id: str, database: Database, output: str) -> None:
    """The job's id, and whether anybody is there to run it."""
    is_supervised = bool(alive(database))
    if output == "json":
        print_json({"id": job_id, "supervised": is_supervised})
    else:
        click.echo(job_id)
    if is_supervised:
        say(f"A supervisor runs it: gpubroker logs -f {job_id} shows its output, gpubroker watch all jobs.")
    else:
        say("NO SUPERVISOR RUNS, so it waits: gpubroker supervise, or gpubroker service install for good.")


def _checked(
    spec: JobSpec, ask: Ask, known: Any, context: ProviderContext
) -> tuple[Mapping[str, str], StoreKeys | None]:
    """The job's secrets, and keys that its store takes. Raises ConfigError and NoFeasibleOffer."""
    script(spec)
    secrets, volume = secrets_of(spec), volume_of(spec, ask, context)
    if volume is not None:
        say(f"volume {volume.name} is at {volume.place}: only offers there are tried")
        ask = replace(ask, providers=(volume.provider,))
    _refuse_impossible(ask, known, context)
    keys = store_of(spec, volume)
    check_store(keys)
    if keys is None:
        say(NO_STORE)
    return secrets, keys


def _refuse_impossible(ask: Ask, known: Any, context: ProviderContext) -> None:
    """What nobody has now may come; what no vendor of ours has in its list never will."""
    found, without = computes(context, ask.providers or None)
    if not found:
        raise ConfigError("no provider can rent: " + "; ".join(f"{n}: {r}" for n, r in without.items()))
    if not _is_anywhere(ask, known, found, context.settings, context.clock):
        raise NoFeasibleOffer(
            f"{', '.join(sorted(found))}: no such node there; gpubroker quote with the same options says why"
        )


def _is_anywhere(
    ask: Ask, known: Any, found: Mapping[str, Compute], settings: Settings, clock: Clock
) -> bool:
    """At a vendor that is silent it may be."""
    ask = replace(ask, providers=tuple(sorted(found)))
    rows = rows_for(ask, settings, max_age_s=RECENT_S, offline=False, clock=clock)
    if rows.view.problems:
        return True
    ranking = rank(rows.priced, ask, pricing_for(ask, settings, rows.view.exposures, known))
    return any(quote.offer.market in RENTED for quote in ranking.quotes)
