"""`gpubroker cancel`: a job that nobody wants any more saves itself and ends, or is ended here."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from gpubroker import config
from gpubroker.cli.render import say
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError
from gpubroker.jobspec import kept_job
from gpubroker.prices.market import open_context
from gpubroker.provider import ProviderContext
from gpubroker.run import kept
from gpubroker.run.computes import computes
from gpubroker.run.leases import alive
from gpubroker.run.looks import job_folder
from gpubroker.run.records import JobRow, Records
from gpubroker.run.renting import Renting

_FAILED = 4
_WHY = "by hand"


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker cancel job-1a2b3c
  gpubroker cancel job-1a2b3c job-4d5e6f --now""",
)
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True)
@click.option(
    "--now", "is_now", is_flag=True, help="Do not wait for a save: end its nodes at once, from here."
)
def cancel(*, job_ids: tuple[str, ...], is_now: bool) -> None:
    """The supervisor asks the job to save itself, then ends it.

    Where no supervisor is there its nodes are ended from here, at once. Exits with 4 when something may still
    bill.
    """
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, context):
        records = Records(store.database, clock)
        rows = [_row(records, job_id) for job_id in dict.fromkeys(job_ids)]
        is_supervised = bool(alive(store.database))
        left: list[str] = []
        for row in rows:
            if row.state not in ("running", "stopped") and not _is_open(records, row.id):
                say(f"{row.id} is {row.state.replace('_', ' ')} already")
            elif is_supervised and not is_now and row.state == "running":
                asked = records.want(row.id, "cancelled", _WHY)
                again = "" if asked else " already"
                say(
                    f"{row.id} is asked to save itself{again}: gpubroker events {row.id} -f shows how it ends"
                )
            else:
                left += _end(records, row, context, clock)
                if not is_supervised and not _is_open(records, row.id):  # else the supervisor does
                    kept.forget(job_folder(settings.jobs_dir, row.id))
    if left:
        say(
            f"MAY STILL BILL: {'; '.join(left)}. A supervisor goes on ending it, and so does gpubroker cancel"
        )
        raise click.exceptions.Exit(_FAILED)


def _row(records: Records, job_id: str) -> JobRow:
    """Raises ConfigError for what is not the supervisor's."""
    row, found = records.row(job_id), records.job(job_id)
    if row is None or found is None:
        raise ConfigError(f"no job is called {job_id[:60]!r}")
    if kept_job(found[2]).box:
        raise ConfigError(f"{job_id} is a box: gpubroker down ends it")
    if not row.unattended:
        raise ConfigError(
            f"{job_id} is a job of gpubroker run: Ctrl-C in its terminal ends it; if that is gone,"
            f" gpubroker job resume {job_id} makes it the supervisor's"
        )
    return row


def _end(records: Records, row: JobRow, context: ProviderContext, clock: Clock) -> Sequence[str]:
    """What may still bill. Nothing more is rented for a job that is over, so that comes first."""
    records.end_job(row.id, "cancelled", _WHY)
    providers = {a.provider for a in records.open_attempts() if a.job_id == row.id}
    found, without = computes(context, providers)
    left = Renting(records, found, clock).end_all(row.id, "cancelled", lambda attempt: None)
    told = [f"{provider} {node} ({without.get(provider, why)})" for (provider, node), why in left.items()]
    say(f"{row.id} is cancelled")
    return told


def _is_open(records: Records, job_id: str) -> bool:
    return any(attempt.job_id == job_id for attempt in records.open_attempts())
