"""`gpubroker run`: a job on rented nodes, from a terminal that stays open, through preemptions to its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.ask import ask_from, knowledge_from, pricing_for, rows_for
from gpubroker.cli.job import job_record
from gpubroker.cli.options import Amount, filter_options, format_option, work_options
from gpubroker.cli.plan import ask_of, known_of, read_job, refuse_both
from gpubroker.cli.render import print_json, say
from gpubroker.cli.watching import tell, tick_until_over
from gpubroker.config import Settings
from gpubroker.doors import Clock, Shell, SystemClock
from gpubroker.errors import ConfigError, NoFeasibleOffer, Unreachable
from gpubroker.jobspec import JobSpec, job_from
from gpubroker.plan.bill import bill_for
from gpubroker.plan.rank import Ask, Pricing, Quote, rank
from gpubroker.plan.sentence import name_of
from gpubroker.prices.database import Database
from gpubroker.prices.market import open_context
from gpubroker.provider import Compute, NodeView
from gpubroker.run.computes import computes
from gpubroker.run.payload import StoreKeys
from gpubroker.run.records import Caps, Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Candidate, Job, Outcome, Supervisor

_TICK_S = 5.0
_CONNECT_S = 20.0
_RECENT_S = 300
_JOB_FAILED = 6
# A bid above the lowest that runs, where no history says better.
_BID_MARGIN = Decimal("1.2")
_RENTED = ("spot", "on_demand", "serverless")


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
            spec, job_id = _resumed(records, resume, clock)
            ask, known = ask_of(spec, settings), known_of(spec)
        else:
            spec, ask, known = _asked(context, words, asked, settings, clock)
            # Whoever resumes it may be elsewhere by then.
            spec = spec.model_copy(update={"folder": str(Path(spec.folder).absolute())})
            job_id = ""
        found, without = computes(provider_context, ask.providers or None)
        market = _Market(ask, known, settings, clock, found)
        if dry_run:
            _show(market)
            return
        if not found:
            raise ConfigError("no provider can rent: " + "; ".join(f"{n}: {r}" for n, r in without.items()))
        job_id = job_id or records.add_job(spec.name, spec.model_dump_json())
        job = _job(job_id, spec, out, settings)
        _refuse_missing(records, job_id, found, without)
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=Renting(records, found, clock),
            computes=found,
            candidates=market.candidates,
            connect=_connect,
            clock=clock,
            say=lambda text: tell(f"[{clock.now():%H:%M:%S}] {text}"),
            log=_print_log if output == "table" else _log_to_stderr,
        )
        say(f"{job_id}: artifacts will be in {job.out}")
        outcome = _alone(store.database, supervisor, clock, is_resumed=resume is not None)
        _report(job_id, outcome, records, output, clock)


def _alone(database: Database, supervisor: Supervisor, clock: Clock, *, is_resumed: bool) -> Outcome:
    """To the job's end, as the only process that runs it."""
    job_id = supervisor.job.id
    with database.hold(f"job {job_id}") as is_ours:
        if not is_ours:
            raise ConfigError(f"{job_id} is run by another gpubroker now: stop that one, or wait for it")
        if is_resumed:
            supervisor.records.reopen(job_id)
        try:
            return tick_until_over(supervisor, clock, _TICK_S)
        except KeyboardInterrupt:
            tell(f"to go on: gpubroker run --resume {job_id}")
            raise click.Abort from None


def _asked(
    context: click.Context, words: tuple[str, ...], asked: dict[str, Any], settings: Settings, clock: Clock
) -> tuple[JobSpec, Ask, Any]:
    """The job by file or by options, and how it is priced."""
    if len(words) == 1 and words[0].endswith(".toml"):
        refuse_both(context, {"words", "out", "resume", "dry_run", "output"})
        spec = read_job(Path(words[0]), clock.now())
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


def _resumed(records: Records, job_id: str, clock: Clock) -> tuple[JobSpec, str]:
    kept = records.job(job_id)
    if kept is None:
        raise ConfigError(f"--resume: no job is called {job_id[:60]!r}")
    state, reason, spec = kept
    is_over = state not in ("running", "stopped") and all(a.ended_at for a in records.attempts(job_id))
    if is_over:
        raise ConfigError(f"--resume: {job_id} is {state}{f': {reason}' if reason else ''}")
    # A deadline that has passed by now must not keep the job from being read.
    return JobSpec.model_validate_json(spec, context={"now": clock.now().replace(year=1970)}), job_id


def _refuse_missing(
    records: Records, job_id: str, found: Mapping[str, Compute], without: Mapping[str, str]
) -> None:
    """A job may have a node at a vendor whose key is not set here."""
    for attempt in records.open_attempts():
        if attempt.job_id == job_id and attempt.provider not in found:
            why = without.get(attempt.provider, "not among the providers that were asked for")
            raise ConfigError(f"{job_id} has a node at {attempt.provider}, which cannot be asked: {why}")


def _job(job_id: str, spec: JobSpec, out: Path | None, settings: Settings) -> Job:
    missing = [name for name in spec.secrets if name not in os.environ]
    if missing:
        raise ConfigError(f"secrets: {missing[0]} is not set in your environment")
    private, public = _keys(job_id)
    return Job(
        id=job_id,
        spec=spec,
        folder=Path(spec.folder),
        out=out or Path("gpubroker-out") / job_id,
        secrets={name: os.environ[name] for name in spec.secrets},
        store=_store(spec),
        private_key=private,
        public_key=public,
        caps=Caps(usd_per_day=settings.usd_per_day, usd_per_job=spec.limits.budget_usd),
    )


def _keys(job_id: str) -> tuple[str, str]:
    """The job's own SSH key, kept where only the user reads it, for a supervisor that comes after."""
    from platformdirs import user_data_path

    from gpubroker.run.shell import make_key, public_of

    folder = user_data_path("gpubroker") / "jobs" / job_id
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "key"
    if path.exists():
        private = path.read_text(encoding="utf-8")
        return private, public_of(private)
    private, public = make_key()
    part = folder / f"key.{os.getpid()}"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(private)
    part.rename(path)  # whole or not there
    return private, public


def _store(spec: JobSpec) -> StoreKeys | None:
    """Keys made for the store, by name: the account's own never go onto a node."""
    where = spec.checkpoint.store
    if not where or ("://" not in where and "/" not in where):
        return None
    if not where.startswith("s3://"):
        return StoreKeys(where=str(Path(where).expanduser().absolute()))
    names = ("GPUBROKER_STORE_ACCESS_KEY_ID", "GPUBROKER_STORE_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"checkpoint.store: {missing[0]} is not set: a key that may read and write {where} and nothing"
            " else, for it goes onto the node"
        )
    return StoreKeys(
        where=where,
        endpoint=os.environ.get("GPUBROKER_STORE_URL") or None,
        region=os.environ.get("GPUBROKER_STORE_REGION", "us-east-1"),
        access_key=os.environ[names[0]],
        secret_key=os.environ[names[1]],
    )


class _Market:
    """What could be rented now, the cheapest bill first; asked again at each attempt."""

    def __init__(
        self, ask: Ask, known: Any, settings: Settings, clock: Clock, rentable: dict[str, Compute]
    ) -> None:
        self._ask, self._known, self._settings, self._clock = ask, known, settings, clock
        self._rentable = rentable

    def candidates(self, is_fresh: bool) -> Iterator[Candidate]:
        """Only what was seen at the vendor, now or lately: a list price cannot be rented."""
        for quote, pricing in self.quotes(0 if is_fresh else _RECENT_S):
            yield _candidate(quote, pricing, self._rentable[quote.offer.provider])

    def quotes(self, max_age_s: int) -> Iterator[tuple[Quote, Pricing]]:
        """In order of their bills."""
        rows = rows_for(
            self._ask,
            self._settings,
            max_age_s=max_age_s,
            offline=False,
            clock=self._clock,
        )
        pricing = pricing_for(self._ask, self._settings, rows.view.exposures, self._known)
        for quote in rank(rows.priced, self._ask, pricing).quotes:
            offer = quote.offer
            if (
                quote.priced.live
                and quote.has_stock
                and offer.market in _RENTED
                and offer.provider in self._rentable
            ):
                yield quote, pricing


def _candidate(quote: Quote, pricing: Pricing, compute: Compute) -> Candidate:
    offer = quote.offer
    bid = None
    if offer.market == "spot" and compute.capabilities.takes_bids:
        bid = (offer.usd_per_hour * _BID_MARGIN).quantize(Decimal("0.000001"))
        offer = replace(offer, usd_per_hour=bid)
    return Candidate(
        offer=offer,
        usd_per_hour=_usd_per_hour(replace(quote, priced=replace(quote.priced, offer=offer)), pricing),
        bid_usd_per_hour=bid,
        name=name_of(quote),
    )


def _usd_per_hour(quote: Quote, pricing: Pricing) -> Decimal:
    """All that is billed by the hour, read off the bill: what ten more hours add to it."""
    offer = replace(quote.offer, billing_increment_s=1, minimum_s=0)
    course = quote.bill.course
    longer = replace(course, useful_h=course.useful_h + 10)
    totals = [
        bill_for(offer, quote.work, pricing.fees, one, price_source="").total_usd for one in (course, longer)
    ]
    return ((totals[1] - totals[0]) / 10).quantize(Decimal("0.000001"))


def _connect(compute: Compute, node: NodeView, key: str, host_key: str | None) -> tuple[Shell, str | None]:
    if not compute.capabilities.has_ssh:
        shell = compute.shell(node, _CONNECT_S)
        if shell is None:
            raise Unreachable("node", "connect", "its vendor gives no shell")
        return shell, None
    from gpubroker.run import shell as ssh

    if node.ssh is None:
        raise Unreachable("node", "connect", "its vendor does not say yet where SSH is")
    connected = ssh.connect(node.ssh, key, host_key=host_key, deadline_s=_CONNECT_S)
    return connected, connected.host_key


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


def _show(market: _Market) -> None:
    from itertools import islice

    from gpubroker.cli.render import console, dollars, table

    made = table("#", "offer", "$/h", "expected bill", right=("#", "$/h", "expected bill"))
    found = list(islice(market.quotes(_RECENT_S), 10))
    if not found:
        raise NoFeasibleOffer("nothing can be rented now: gpubroker quote with the same options says why")
    for number, (quote, _) in enumerate(found, 1):
        made.add_row(
            str(number), name_of(quote), dollars(quote.offer.usd_per_hour), dollars(quote.bill.total_usd)
        )
    console().print(made)
