"""`gpubroker logs`: a job's own output, as its supervisor wrote it down; -f follows it to the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from gpubroker import config
from gpubroker.cli.events import event_line
from gpubroker.cli.render import print_bytes, say
from gpubroker.cli.watching import tell
from gpubroker.doors import Clock, SystemClock
from gpubroker.errors import ConfigError
from gpubroker.prices.market import open_context
from gpubroker.run.events import Events
from gpubroker.run.kept import load, log_files
from gpubroker.run.looks import job_folder
from gpubroker.run.records import Attempt, JobRow, Records

_AGAIN_S = 1.0
_CHUNK_BYTES = 1 << 20
# How a job ended, as an exit code.
CODES = {"done": 0, "over_budget": 5, "failed": 6}


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker logs job-1a2b3c
  gpubroker logs job-1a2b3c -f
  gpubroker logs job-1a2b3c --attempt 2""",
)
@click.argument("job_id", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on to the job's end, from node to node.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of this node alone, as job show counts them.")
def logs(*, job_id: str, follow: bool, attempt: int | None) -> None:
    """What a job has printed on all its nodes; what happened to it goes to standard error.

    With -f the exit code is the job's: 0 done, 5 over budget, 6 failed, 1 cancelled or stopped. A job of
    `gpubroker run` prints in its terminal.
    """
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, _):
        records = Records(store.database, clock)
        row = records.row(job_id)
        if row is None:
            raise ConfigError(f"no job is called {job_id[:60]!r}")
        folder = job_folder(settings.jobs_dir, job_id)
        if not row.unattended and not log_files(folder):
            raise ConfigError(
                f"{job_id} is a job of gpubroker run: its output is in its terminal, then in job.log"
            )
        if not folder.exists():
            load(folder)  # says where it is not
        output = Output(folder)
        if attempt is not None:
            output.only = _epoch(attempt, job_id, records.attempts(job_id))
        if follow:
            _follow(output, row, records, Events(store.database, clock), clock)
            return
        if output.print_new() == 0:
            which = f" by attempt {attempt}" if attempt else ""
            say(f"{job_id} is {row.state}, and nothing is printed{which}")


class Output:
    """Of one job: what its files hold and was not printed yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._printed_bytes: dict[int, int] = {}
        self.only: int | None = None  # the epoch of one attempt; None = of all

    def print_new(self) -> int:
        """How many bytes there were."""
        files = log_files(self._folder)
        if self.only is not None:
            files = {epoch: path for epoch, path in files.items() if epoch == self.only}
        return sum(self._print(epoch, path) for epoch, path in files.items())

    def _print(self, epoch: int, path: Path) -> int:
        begin = self._printed_bytes.get(epoch, 0)
        with path.open("rb") as file:
            file.seek(begin)
            while data := file.read(_CHUNK_BYTES):
                print_bytes(data)
            self._printed_bytes[epoch] = file.tell()
        return self._printed_bytes[epoch] - begin


def _follow(output: Output, row: JobRow, records: Records, story: Events, clock: Clock) -> None:
    """Until the job is over, or the one attempt is. The state is read before the output: all is shown."""
    told = story.newest_id()
    while True:
        state, reason = records.state(row.id)
        over = state != "running" or _is_over(output.only, records.attempts(row.id))
        output.print_new()
        for event in story.after(told, job_id=row.id):
            tell(event_line(event))
            told = event.id
        if over:
            break
        clock.sleep(_AGAIN_S)
    if state != "running":
        tell(f"{row.id} is {state}{f': {reason}' if reason else ''}")
        if code := CODES.get(state, 1):
            raise click.exceptions.Exit(code)


def _is_over(only: int | None, attempts: Sequence[Attempt]) -> bool:
    return any(a.epoch == only and a.ended_at is not None for a in attempts)


def _epoch(number: int, job_id: str, attempts: Sequence[Attempt]) -> int:
    """What was refused was no attempt of the job's."""
    nodes = [attempt.epoch for attempt in attempts if attempt.node_id is not None]
    if number > len(nodes):
        raise ConfigError(f"--attempt: {job_id} has had {len(nodes)} node{'s' * (len(nodes) != 1)}")
    return nodes[number - 1]
