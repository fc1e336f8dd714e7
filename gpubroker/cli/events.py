"""`gpubroker events`: the story, a line each; -f goes on as it happens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import get_args

import click

from gpubroker import config
from gpubroker.cli.jobs import event_record
from gpubroker.cli.options import Duration, format_option
from gpubroker.cli.render import plain, print_csv, print_json
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.market import open_context
from gpubroker.run.events import Event, Events, Kind
from gpubroker.run.records import Records

_CSV = ("at", "job", "kind", "text")
_SHOWN = 100
_AGAIN_S = 1.0


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker events
  gpubroker events job-1a2b3c -f
  gpubroker events --since 1d --kind preempted --kind failed --format json""",
)
@click.argument("job_id", metavar="[JOB]", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as more happens, until Ctrl-C.")
@click.option("--since", type=Duration(), help=f"All of so long: 7d, 12h.  [default: the last {_SHOWN}]")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(get_args(Kind)),
    metavar="KIND",
    help="preempted, failed, budget … Repeat for several.",
)
@format_option("table", "json", "csv")
def events(
    *, job_id: str | None, follow: bool, since: int | None, kinds: tuple[str, ...], output: str
) -> None:
    """What happened to jobs and nodes and why, of one job or of all, the oldest first.

    Times are UTC. With -f, JSON is one object a line.
    """
    clock = SystemClock()
    with open_context(config.load(), os.environ, clock) as (store, _):
        if job_id is not None and Records(store.database, clock).row(job_id) is None:
            raise ConfigError(f"no job is called {job_id[:60]!r}")
        story, begin = Events(store.database, clock), None
        if since is not None:
            begin = clock.now() - timedelta(seconds=since)
        shown = (
            story.last(_SHOWN, job_id=job_id, kinds=kinds)
            if begin is None
            else list(_after(story, 0, job_id=job_id, kinds=kinds, since=begin))
        )
        if not follow and output == "json":
            print_json({"events": [event_record(event) for event in shown]})
            return
        if output == "csv":
            print_csv(_CSV, [])
        _print(shown, output)
        position = max((event.id for event in shown), default=0)
        while follow:
            clock.sleep(_AGAIN_S)
            shown = list(_after(story, position, job_id=job_id, kinds=kinds, since=begin))
            _print(shown, output)
            position = max((event.id for event in shown), default=position)


def _after(story: Events, position: int, **asked: object) -> Iterator[Event]:
    """All of them, however many."""
    while found := story.after(position, **asked):  # type: ignore[arg-type]
        yield from found
        position = found[-1].id


def _print(found: Iterable[Event], output: str) -> None:
    for event in found:
        if output == "json":
            click.echo(json.dumps(event_record(event), ensure_ascii=False))
        elif output == "csv":
            record = event_record(event)
            print_csv([record[name] or "" for name in _CSV], [])
        else:
            click.echo(event_line(event))


def event_line(event: Event) -> str:
    """For people; what is of no one job has a dash."""
    return f"{event.at:%Y-%m-%d %H:%M:%S}  {event.job_id or '-'}  {event.kind}  {plain(event.text)}".rstrip()
