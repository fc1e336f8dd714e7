"""`gpubroker poll`: ask the providers and store what they say, once or on a schedule."""

from __future__ import annotations

import os
import signal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli import alerting
from gpubroker.cli.options import Duration, GpuName, format_option, refuse_unknown
from gpubroker.cli.render import console, print_csv, print_json, say, table
from gpubroker.doors import SystemClock
from gpubroker.errors import BrokerError, ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.model import OfferQuery
from gpubroker.prices.market import open_context
from gpubroker.prices.poll import FAILED, PollResult, poll
from gpubroker.provider import names as installed

_COLUMNS = ("provider", "state", "fetched", "kept", "skipped", "opened", "closed", "took_s", "reason")


@click.command(
    name="poll",
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker poll
  gpubroker poll --provider vast --provider aws
  gpubroker poll --every 5m""",
)
@click.option("--provider", "providers", multiple=True, help="Only this one. Repeat for several.")
@click.option("--gpu", "gpus", type=GpuName(), multiple=True, help="Only this GPU. Repeat for several.")
@click.option("--any-host", is_flag=True, help="Hosts that the vendor has not verified, too.")
@click.option("--every", type=Duration(), help="Go on, polling this often: 5m, 1h.")
@click.option("--timeout", type=Duration(), default="5m", help="For a whole round.  [default: 5m]")
@format_option("table", "json", "csv")
def poll_command(
    *,
    providers: tuple[str, ...],
    gpus: tuple[GpuRequest, ...],
    any_host: bool,
    every: int | None,
    timeout: int,
    output: str,
) -> None:
    """Ask every provider for its prices, side by side, and store them.

    A provider that fails or hangs costs only itself; the exit code is 4 when one did. Then alerts are looked
    at (gpubroker alert), and what has happened is sent to where [notify] in the config says.
    """
    settings = config.load()
    refuse_unknown(providers)
    if every is not None and every < 30:
        raise ConfigError("--every: less than 30s would only meet the vendors' rate limits")
    wanted = list(providers) or [name for name in installed() if name not in settings.disabled_providers]
    query = OfferQuery(
        gpus=frozenset().union(*(g.names for g in gpus)) if gpus else None, verified_only=not any_host
    )
    with open_context(settings, os.environ, SystemClock()) as (store, context):
        notifier = alerting.messenger(settings, store, context.clock, say)

        def one_round() -> list[PollResult]:
            with _progress(wanted) as on_result:
                results = poll(store, context, wanted, query, timeout, on_result=on_result)
            _print(results, output)
            alerting.look(settings, store, context.clock, results, say)
            if notifier is not None:
                alerting.tell(notifier, say)
            return results

        if every is not None:
            _run_every(every, one_round)
        elif any(result.state in FAILED for result in one_round()):
            raise click.exceptions.Exit(4)


def _run_every(seconds: int, work: Any) -> None:
    """Until interrupted. The schedule lives in memory only: the truth is in the database."""
    from apscheduler.schedulers.blocking import BlockingScheduler

    scheduler = BlockingScheduler(timezone="UTC")

    def safely() -> None:
        try:
            work()
        except BrokerError as error:
            say(f"gpubroker: {error}")

    def stop(signum: int, frame: object) -> None:
        if not scheduler.running:  # in the first round, before the schedule starts
            raise SystemExit(0)
        scheduler.shutdown(wait=False)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    safely()
    scheduler.add_job(safely, "interval", seconds=seconds, max_instances=1, coalesce=True)
    say(f"polling every {seconds} s; Ctrl-C ends it")
    scheduler.start()


class _progress:  # noqa: N801  used as a with statement
    """A line per provider as it comes in; a bar on a terminal."""

    def __init__(self, wanted: list[str]) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console(stderr=True), transient=True,
        )  # fmt: skip
        self._tasks = {name: self._bar.add_task(name, total=1) for name in wanted}

    def __enter__(self) -> Any:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self._on_result

    def __exit__(self, *exc: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()

    def _on_result(self, result: PollResult) -> None:
        text = (
            f"{result.provider}: {result.kept} offers"
            if result.state == "ok"
            else f"{result.provider}: {result.state}"
        )
        self._bar.update(self._tasks[result.provider], completed=1, description=text)


def _row(result: PollResult) -> dict[str, Any]:
    return {
        "provider": result.provider,
        "state": result.state,
        "fetched": result.fetched,
        "kept": result.kept,
        "skipped": len(result.skipped),
        "opened": result.opened,
        "closed": result.closed,
        "took_s": round(result.took_s, 3),
        "reason": result.reason,
    }


def _print(results: list[PollResult], output: str) -> None:
    rows = [_row(result) for result in results]
    if output == "json":
        print_json(
            {
                "polls": [
                    row
                    | {
                        "notes": list(result.notes),
                        "skips": [{"id": s.id, "reason": s.reason} for s in result.skipped],
                    }
                    for row, result in zip(rows, results, strict=True)
                ]
            }
        )
        return
    if output == "csv":
        print_csv(_COLUMNS, ([row[name] for name in _COLUMNS] for row in rows))
        return
    out = console()
    made = table(
        "provider", "state", "fetched", "kept", "skipped", "new", "ended", "s", "why",
        right=("fetched", "kept", "skipped", "new", "ended", "s"),
    )  # fmt: skip
    for result in results:
        made.add_row(
            result.provider,
            result.state,
            str(result.fetched),
            str(result.kept),
            str(len(result.skipped)),
            str(result.opened),
            str(result.closed),
            f"{result.took_s:.1f}",
            result.reason,
        )
    out.print(made)
    for result in results:
        for note in result.notes:
            say(f"{result.provider}: {note}")
        for reason, ids in _grouped(result).items():
            some = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
            say(f"{result.provider}: skipped {some}: {reason}")


def _grouped(result: PollResult) -> dict[str, list[str]]:
    """reason -> ids, so that a hundred rows with one flaw are one line."""
    groups: dict[str, list[str]] = {}
    for skip in result.skipped:
        groups.setdefault(skip.reason, []).append(skip.id)
    return groups
