"""`gpubroker calibrate`: what a finished run really did, so that unlike GPUs are compared by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import Amount, GpuName, format_option
from gpubroker.cli.render import age, console, iso, print_csv, print_json, table
from gpubroker.doors import SystemClock
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.plan.throughput import MOST_GPUS, Measurement, reference_card

_CSV = ("id", "job", "gpu", "form_factor", "gpu_count", "steps", "seconds", "steps_per_s", "measured_at")
_LONGEST_JOB = 100
_MOST_STEPS = 10**12
_MOST_S = 10**9


class JobName(click.ParamType[str]):
    """What a person calls a job: printable, not empty."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See click."""
        name = str(value).strip()
        if not name or len(name) > _LONGEST_JOB or not name.isprintable():
            self.fail(f"a job's name has 1 to {_LONGEST_JOB} printable characters", param, ctx)
        return name


@click.group(
    invoke_without_command=True,
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker calibrate --job sft-8b --gpu h100-sxm --steps 1200 --seconds 600
  gpubroker calibrate --job sft-8b --gpu 4090 --count 4 --steps 900 --seconds 611.5
  gpubroker calibrate ls""",
)
@click.option("--job", type=JobName(), help="What you call the job: measurements of one job are compared.")
@click.option("--gpu", type=GpuName(), help="The card that ran it: one, such as h100-sxm.")
@click.option(
    "--count",
    type=click.IntRange(1, MOST_GPUS),
    default=1,
    show_default=True,
    help="How many ran it together.",
)
@click.option("--steps", type=click.IntRange(1, _MOST_STEPS), help="Steps that the run made.")
@click.option(
    "--seconds", type=Amount(above=0, most=_MOST_S), help="How long they took, without the start-up."
)
@click.pass_context
def calibrate(
    context: click.Context,
    *,
    job: str | None,
    gpu: GpuRequest | None,
    count: int,
    steps: int | None,
    seconds: Decimal | None,
) -> None:
    """Record the steps and seconds of a finished run: they win over published figures of its card."""
    given = {"--job": job, "--gpu": gpu, "--steps": steps, "--seconds": seconds}
    if context.invoked_subcommand is not None:
        if any(value is not None for value in given.values()):
            raise click.UsageError(f"{context.invoked_subcommand} takes its own options, after its name")
        return
    if job is None or gpu is None or steps is None or seconds is None:
        missing = [name for name, value in given.items() if value is None]
        raise click.UsageError(
            f"a measurement needs {', '.join(missing)}; gpubroker calibrate ls lists what is kept"
        )
    if seconds < Decimal("0.001"):
        raise click.UsageError("--seconds is below a millisecond: too short to have been measured")
    card = reference_card(gpu.text)
    measurement = Measurement(
        job=job,
        gpu=card.name,
        form_factor=card.form_factor,
        gpu_count=count,
        steps=Decimal(steps),
        seconds=round(seconds, 3),
        measured_at=SystemClock().now(),
    )
    from gpubroker import measurements

    with _database() as database:
        number = measurements.record(database, measurement)
    cards = f"{count}x {card.name} {card.form_factor}"
    click.echo(f"{number}: {job}: {measurement.steps_per_s:.4g} steps/s on {cards}")


@calibrate.command(name="ls", epilog="Example: gpubroker calibrate ls --format json")
@click.option("--job", type=JobName(), help="Only of this job.")
@format_option("table", "json", "csv")
def ls(*, job: str | None, output: str) -> None:
    """What was recorded, by job.

    Of several runs on as many of the same card the newest counts.
    """
    from gpubroker import measurements

    with _database() as database:
        found = measurements.recorded(database, job)
    rows = [_record(kept.id, kept.measurement) for kept in found]
    if output == "json":
        print_json({"measurements": [dict(zip(_CSV, row, strict=True)) for row in rows]})
    elif output == "csv":
        print_csv(_CSV, rows)
    elif not found:
        click.echo("Nothing is recorded yet: gpubroker calibrate --help shows how.", err=True)
    else:
        now = SystemClock().now()
        made = table(
            "id",
            "job",
            "GPU",
            "steps/s",
            "steps",
            "seconds",
            "age",
            right=("id", "steps/s", "steps", "seconds", "age"),
        )
        for kept in found:
            m = kept.measurement
            cards = f"{m.gpu_count}x {m.gpu} {m.form_factor}".removesuffix(" unstated")
            rate, seconds = f"{m.steps_per_s:.4g}", f"{m.seconds.normalize():f}"
            made.add_row(str(kept.id), m.job, cards, rate, f"{m.steps:,f}", seconds, age(m.measured_at, now))
        console().print(made)


@calibrate.command(name="rm", epilog="Example: gpubroker calibrate rm 3 4")
@click.argument("ids", type=click.IntRange(1, 2**63 - 1), nargs=-1, required=True)
def rm(*, ids: tuple[int, ...]) -> None:
    """Forget measurements, by the ids that `ls` shows."""
    from gpubroker import measurements

    with _database() as database:
        known = {kept.id for kept in measurements.recorded(database)}
        strange = sorted(set(ids) - known)
        if strange:
            raise ConfigError(f"no measurement has the id {strange[0]}; gpubroker calibrate ls lists them")
        click.echo(f"{measurements.remove(database, sorted(set(ids)))} removed")


@contextmanager
def _database() -> Iterator[Any]:
    from gpubroker.prices.store import Store

    with Store.open(config.load().db_url, SystemClock()) as store:
        store.migrate()
        yield store.database


def _record(number: int, m: Measurement) -> Sequence[Any]:
    cards = (m.gpu, m.form_factor, m.gpu_count)
    return (number, m.job, *cards, int(m.steps), f"{m.seconds:f}", f"{m.steps_per_s:.6g}", iso(m.measured_at))
