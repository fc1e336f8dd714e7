"""`gpubroker sweep` and `gpubroker stop-all`: what bills although nobody wants it, and ending everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import Lower, format_option
from gpubroker.cli.render import console, dollars, iso, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.market import open_context
from gpubroker.provider import names
from gpubroker.run.computes import computes
from gpubroker.run.leases import forsaken
from gpubroker.run.looks import is_forsaken, job_folder
from gpubroker.run.records import Records
from gpubroker.run.renting import Renting, Stray

_CSV = ("provider", "node", "tag", "status", "reason", "usd_per_hour", "created_at", "ended")
_FAILED = 4

provider_option = click.option(
    "--provider", "providers", type=Lower(), multiple=True, help="Only this one. Repeat for several."
)


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker sweep
  gpubroker sweep --end
  gpubroker sweep --end --yes
  gpubroker sweep --volumes
  gpubroker sweep --format json""",
)
@provider_option
@click.option("--end", "is_ending", is_flag=True, help="End them, rather than only list them.")
@click.option("--volumes", is_flag=True, help="Volumes that no unfinished job names, instead of nodes.")
@click.option("--yes", is_flag=True, help="With --end: do not ask.")
@format_option("table", "json", "csv")
def sweep(*, providers: tuple[str, ...], is_ending: bool, volumes: bool, yes: bool, output: str) -> None:
    """Nodes with gpubroker's tag that bill and that no running job knows: leaked, whoever leaked them.

    Those of a job whose `gpubroker run` has died are among them once nobody has looked after it for the
    config's renew_within: until then `gpubroker run --resume`, or a supervisor, finds them at work. So is a
    box that is past its time and did not end itself. Looks at every vendor that you have an account with, in
    AWS's case in the regions of your config. Run it from cron with --end --yes; --end also deletes the SSH
    keys and security groups that launches left in your accounts and that nothing needs. Exits with 4 when a
    vendor did not answer or would not end a node. Volumes are seen with --volumes only, and none is deleted
    before you have said so.
    """
    if volumes:
        from gpubroker.cli.volume import sweep_volumes

        sweep_volumes(providers, output, is_ending=is_ending, yes=yes)
        return
    with _renting(providers) as (renting, problems, is_nobodys):
        listed, silent = renting.list_all(renting.providers)
        renting.settle_doubts(listed)
        renting.settle_boxes(listed)
        found = renting.strays(listed, is_nobodys)
        if is_ending and found and not yes:
            words = f"End {_nodes(found)} now, which bill {_burn(found)}?"
            click.confirm(words, abort=True, err=True)
        left = renting.sweep(found) if is_ending else []
        if is_ending:
            renting.forget(_gone(found, left), "swept: nobody looked after it")
        swept, unswept = renting.sweep_leftovers(listed) if is_ending else ([], {})
    ended = {id(stray) for stray in found if is_ending} - {id(stray) for stray in left}
    told = {**problems, **silent, **unswept}
    _print(found, ended, told, listed, output, is_ending=is_ending, swept=swept)
    if silent or left or unswept:
        raise click.exceptions.Exit(_FAILED)


@click.command(
    name="stop-all", context_settings={"max_content_width": 100}, epilog="Example: gpubroker stop-all --yes"
)
@provider_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@format_option("table", "json", "csv")
def stop_all(*, providers: tuple[str, ...], yes: bool, output: str) -> None:
    """End everything with gpubroker's tag that bills, now: nodes of running jobs, and leaked ones.

    Jobs stop; gpubroker run --resume, or gpubroker job resume, goes on with one. With --provider a job may
    move to another vendor. Exits with 4 when something may still bill.
    """
    with _renting(providers) as (renting, problems, _):
        listed, silent = renting.list_all(renting.providers)
        found = [
            Stray(provider=name, node=node)
            for name, nodes in listed.items()
            for node in nodes
            if node.status != "gone"
        ]
        if found and not yes:
            click.confirm(f"End {_nodes(found)} now, which bill {_burn(found)}?", abort=True, err=True)
        if not providers:
            renting.stop_jobs("stop-all")
        left = renting.sweep(found)
        renting.forget(_gone(found, left), "stop-all")
    ended = {id(stray) for stray in found} - {id(stray) for stray in left}
    _print(found, ended, {**problems, **silent}, listed, output, is_ending=True)
    if silent or left:
        raise click.exceptions.Exit(_FAILED)


def _gone(found: Iterable[Stray], left: Iterable[Stray]) -> set[tuple[str, str]]:
    """Those that were ended, as (provider, id)."""
    return {(s.provider, s.node.id) for s in found} - {(s.provider, s.node.id) for s in left}


def _nodes(found: list[Stray]) -> str:
    return f"{len(found)} node{'s' * (len(found) != 1)}"


def _burn(found: list[Stray]) -> str:
    """What they bill by the hour, as far as their vendors say."""
    rates = [stray.node.usd_per_hour for stray in found]
    known = sum((rate for rate in rates if rate is not None), Decimal(0))
    return f"{'at least ' * (None in rates)}{dollars(known)}/h"


@contextmanager
def _renting(
    providers: tuple[str, ...],
) -> Iterator[tuple[Renting, dict[str, str], Callable[[str], bool]]]:
    """Over all providers with an account; of those that were named, why one is not among them.

    The third says whether nobody has looked after a job for as long as makes its own node give up.
    """
    known = names()
    for name in providers:
        if name not in known:
            raise ConfigError(f"no provider is called {name!r}; installed: {', '.join(known)}")
    clock, settings = SystemClock(), config.load()
    with open_context(settings, os.environ, clock) as (store, context):
        found, without = computes(context, providers or None)
        told = {name: f"not looked at: {reason}" for name, reason in without.items()}
        within_s, now = settings.renew_within_s, clock.now()
        unsupervised = forsaken(store.database, timedelta(seconds=within_s))

        def is_nobodys(job_id: str) -> bool:
            folder = job_folder(settings.jobs_dir, job_id)
            return job_id in unsupervised or is_forsaken(folder, now, within_s)

        yield Renting(Records(store.database, clock), found, clock), told, is_nobodys


def _print(
    found: list[Stray],
    ended: set[int],
    problems: Mapping[str, str],
    looked_at: Iterable[str],
    output: str,
    *,
    is_ending: bool,
    swept: Iterable[tuple[str, str]] = (),
) -> None:
    rows = [_record(stray, id(stray) in ended) for stray in found]
    if output == "json":
        told = [{"provider": name, "reason": reason} for name, reason in problems.items()]
        deleted = [{"provider": name, "what": what} for name, what in swept]
        print_json({"nodes": rows, "deleted": deleted, "problems": told})
        return
    if output == "csv":
        print_csv(_CSV, ([row[name] for name in _CSV] for row in rows))
    elif not found:
        say(f"Nothing to {'end' if is_ending else 'tell'} at {', '.join(looked_at) or 'any vendor'}.")
    else:
        made = table("provider", "node", "tag", "status", "$/h", "since", "", right=("$/h",))
        for stray in found:
            node = stray.node
            rate = "?" if node.usd_per_hour is None else dollars(node.usd_per_hour)
            state = "ended" if id(stray) in ended else "NOT ENDED" if is_ending else "bills"
            since = iso(node.created_at) or "?"
            made.add_row(stray.provider, node.id, node.tag, node.status, rate, since, state)
        console().print(made)
        if not is_ending:
            say(f"{_burn(found)} in all; gpubroker sweep --end ends them.")
    for name, what in swept:
        say(f"{name}: deleted {what}")
    for name, reason in problems.items():
        say(f"{name}: {reason}")


def _record(stray: Stray, is_ended: bool) -> dict[str, Any]:
    node = stray.node
    return {
        "provider": stray.provider,
        "node": node.id,
        "tag": node.tag,
        "status": node.status,
        "reason": node.reason,
        "usd_per_hour": None if node.usd_per_hour is None else f"{node.usd_per_hour:f}",
        "created_at": iso(node.created_at),
        "ended": is_ended,
    }
