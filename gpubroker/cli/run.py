"""`gpubroker run`: a job on rented nodes, from a terminal that stays open, through preemptions to its end."""

from __future__ import annotations

import os
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.ask import ask_from, knowledge_from
from gpubroker.cli.job import job_record
from gpubroker.cli.options import Amount, filter_options, format_option, work_options
from gpubroker.cli.plan import ask_of, known_of, read_job, refuse_both
from gpubroker.cli.render import print_json, say
from gpubroker.cli.renting import RECENT_S, Market, job_of, tick_until
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError, NoFeasibleOffer
from gpubroker.jobspec import JobSpec, job_from, kept_job
from gpubroker.plan.rank import Ask
from gpubroker.plan.sentence import name_of
from gpubroker.prices.market import open_context
from gpubroker.run.computes import computes
from gpubroker.run.contact import connector, keys_of
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Outcome, Supervisor

_JOB_FAILED = 6


@click.command(
    context_settings={"max_content_width": 100, "ignore_unknown_options": False},
    epilog="""\b
Examples:
  gpubroker run --gpu 4090 --hours 2 --max-usd 5 -- python train.py --epochs 3
  gpubroker run --gpu h100 --hours 8 --max-usd 40 --store s3://bucket/job --artifact out
      -- python train.py
  gpubroker run job.toml
  gpubroker run --resume job-1a2b3c""",
)
@click.argument("words", metavar="[JOB.TOML] [-- COMMAND...]", nargs=-1)
@filter_options
@work_options
@click.option("--name", default="job", show_default=True, help="What the job is called.")
@click.option("--max-usd", type=Amount(above=0, most=1_000_000), help="The most it may cost.")
@click.option("--folder", default=".", show_default=True, help="The folder that is sent to the node.")
@click.option("--setup", multiple=True, help="A command to run first on each node. Repeat for several.")
@click.option("--artifact", "artifacts", multiple=True, help="A path to bring back. Repeat for several.")
@click.option("--secret", "secrets", multiple=True, help="A variable of yours that the job needs, by name.")
@click.option("--store", default="", help="Where checkpoints go: s3://bucket/prefix, or a folder with local.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where artifacts go.  [default: gpubroker-out/JOB]"
)
@click.option("--resume", help="Go on with a job whose supervisor is gone, by its id.")
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

    The folder is sent as it is, artifacts come back. Ctrl-C ends what was rented. With --format json the
    last line is the job's record.
    """
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, provider_context):
        records = Records(store.database, clock)
        if resume is not None:
            spec, job_id = _resumed(records, resume)
            ask, known = ask_of(spec, settings), known_of(spec)
        else:
            spec, ask, known = _asked(context, words, asked, settings, clock)
            job_id = ""
        found, without = computes(provider_context, ask.providers or None)
        market = Market(ask, known, settings, clock, found)
        if dry_run:
            _show(market)
            return
        if not found:
            raise ConfigError("no provider can rent: " + "; ".join(f"{n}: {r}" for n, r in without.items()))
        renting = Renting(records, found, clock)
        renting.look_at_boxes()  # one that is over spends nothing of the day's cap any more
        job_id = job_id or records.add_job(spec.name, spec.model_dump_json())
        keys = keys_of(job_id)
        job = job_of(
            job_id,
            spec,
            keys,
            folder=Path(spec.folder),
            out=out or Path("gpubroker-out") / job_id,
            settings=settings,
        )
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=renting,
            computes=found,
            candidates=market.candidates,
            connect=connector(keys),
            clock=clock,
            say=lambda text: say(f"[{clock.now():%H:%M:%S}] {text}"),
            log=_print_log if output == "table" else _log_to_stderr,
        )
        say(f"{job_id}: artifacts will be in {job.out}")
        outcome = _to_the_end(supervisor, clock)
        _report(job_id, outcome, records, output, clock)


def _asked(
    context: click.Context, words: tuple[str, ...], asked: dict[str, Any], settings: Settings, clock: Clock
) -> tuple[JobSpec, Ask, Any]:
    """The job by file or by options, and how it is priced."""
    if len(words) == 1 and words[0].endswith(".toml"):
        refuse_both(context, {"words", "out", "resume", "dry_run", "output"})
        spec = read_job(Path(words[0]), clock.now())
        if spec.box:
            raise ConfigError(f"{words[0]}: box: gpubroker up rents boxes, gpubroker run runs a command")
        return spec, ask_of(spec, settings), known_of(spec)
    if not words:
        raise click.UsageError("say what to run: gpubroker run --gpu 4090 --hours 2 -- python train.py")
    ask = ask_from(asked, settings)
    spec = job_from(_table(words, asked), clock.now(), "options")
    return spec, ask, knowledge_from(asked)


def _table(words: tuple[str, ...], asked: dict[str, Any]) -> dict[str, Any]:
    """The options as a job.toml would have them."""
    seconds = {"every": asked["checkpoint_every"], "save_time": asked["checkpoint_save"]}
    return {
        "name": asked["name"],
        "command": list(words),
        "folder": asked["folder"],
        "setup": list(asked["setup"]),
        "secrets": list(asked["secrets"]),
        "disk": f"{asked['disk_gb']:f}GB",
        "gpu": {
            "name": [gpu.text for gpu in asked["gpus"]],
            "count": asked["count"],
            **({"min_vram": f"{asked['min_vram']}GiB"} if asked["min_vram"] else {}),
        },
        "work": {"hours": str(asked["hours"])} if asked["hours"] else {"amount": asked["amount"]},
        "limits": {"budget_usd": str(asked["max_usd"])} if asked["max_usd"] else {},
        "where": {
            "markets": list(asked["markets"]),
            "providers": list(asked["providers"]),
            "regions": list(asked["regions"]),
            "verified_only": asked["verified"],
        },
        "checkpoint": {
            "size": f"{asked['checkpoint_gb']:f}GB",
            "store": asked["store"],
            **{name: f"{value}s" for name, value in seconds.items() if value is not None},
        },
        "artifacts": {"paths": list(asked["artifacts"])},
    }


def _resumed(records: Records, job_id: str) -> tuple[JobSpec, str]:
    kept = records.job(job_id)
    if kept is None:
        raise ConfigError(f"--resume: no job is called {job_id[:60]!r}")
    state, reason, spec = kept
    if state != "running":
        raise ConfigError(f"--resume: {job_id} is {state}{f': {reason}' if reason else ''}")
    described = kept_job(spec)
    if described.box:
        raise ConfigError(f"--resume: {job_id} is a box: gpubroker ssh and gpubroker down go on with it")
    return described, job_id


def _to_the_end(supervisor: Supervisor, clock: Clock) -> Outcome:
    """Ctrl-C and SIGTERM end what was rented first."""
    try:
        outcome = tick_until(supervisor, clock)
    except KeyboardInterrupt:
        say(f"to go on: gpubroker run --resume {supervisor.job.id}")
        raise click.Abort from None
    assert outcome is not None  # noqa: S101  nothing else was enough
    return outcome


def _print_log(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


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
        raise click.exceptions.Exit(_JOB_FAILED)


def _show(market: Market) -> None:
    from itertools import islice

    from gpubroker.cli.render import console, dollars, table

    made = table("#", "offer", "$/h", "expected bill", right=("#", "$/h", "expected bill"))
    found = list(islice(market.quotes(RECENT_S), 10))
    if not found:
        raise NoFeasibleOffer("nothing can be rented now: gpubroker quote with the same options says why")
    for number, (quote, _) in enumerate(found, 1):
        made.add_row(
            str(number), name_of(quote), dollars(quote.offer.usd_per_hour), dollars(quote.bill.total_usd)
        )
    console().print(made)
