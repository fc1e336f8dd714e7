"""`gpubroker backtest`: what policies would have cost on spot traces, beside the best that could be done."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpubroker.cli.options import Amount, GpuName, format_option
from gpubroker.cli.render import console, print_csv, print_json, say, table
from gpubroker.doors import ProcessDied, in_processes
from gpubroker.errors import ConfigError
from gpubroker.gpus import GpuRequest
from gpubroker.policy.backtest import (
    NAMED,
    Case,
    Grid,
    Row,
    Standing,
    draw,
    policy_class,
    run_cases,
    standings,
    with_optima,
)
from gpubroker.policy.traces import Timeline, Trace, groups, read_traces, timeline

if TYPE_CHECKING:
    from rich.progress import Progress

_MOST_RUNS = 1_000_000
_CHUNK = 16  # cases at a time: adaptive takes a second for some
_FEW_CASES = 64  # not worth a second process
_MOST_HOURS = 8760
_LEAST_INTERVAL_H = Decimal("0.01")
_MOST_GAP_S = 2 * 3600  # without a look at the market: longer, and nothing is taken for available
_CSV = (
    "trace_or_group", "deadline_h", "work_over_deadline", "restart_delay_h", "start_step", "policy",
    "cost_over_on_demand", "offline_optimum_over_on_demand", "missed", "preemptions", "launches",
    "on_demand_h", "spot_h", "lost_h", "end_h",
)  # fmt: skip


class Amounts(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them, each once."""

    name = "numbers"

    def __init__(self, amount: Amount) -> None:
        self._amount = amount

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """See click."""
        if isinstance(value, tuple):
            return value
        parts = [self._amount.convert(part.strip(), param, ctx) for part in str(value).split(",")]
        return tuple(sorted({float(part) for part in parts}))


class Names(click.ParamType[tuple[str, ...]]):
    """Policies with commas between them, each once."""

    name = "policies"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """See click."""
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))


_SHARE = Amount(above=0, most=1)
_HOURS = Amount(above=0, most=_MOST_HOURS)
_PAUSE = Amount(least=0, most=_MOST_HOURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Periodic:
    """The options that mean something with periodic checkpoints only. None: not given."""

    interval_h: Decimal | None
    cost_h: Decimal | None
    grace_h: Decimal | None

    def check(self, checkpoint: str) -> dict[str, float]:
        """As fields of a Grid. Raises ConfigError."""
        if checkpoint == "instant":
            if any(value is not None for value in asdict(self).values()):
                raise ConfigError("--ckpt-interval-hours and its kin go with --checkpoint periodic")
            return {}
        if self.interval_h is None:
            raise ConfigError("--checkpoint periodic needs --ckpt-interval-hours")
        if self.interval_h < _LEAST_INTERVAL_H:
            raise ConfigError(f"--ckpt-interval-hours {self.interval_h} is less than {_LEAST_INTERVAL_H}")
        return {
            "ckpt_interval_h": float(self.interval_h),
            "ckpt_cost_h": float(self.cost_h or 0),
            "grace_h": float(self.grace_h or 0),
        }


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
The format of traces: docs/traces.md. Examples:
  gpubroker backtest --traces ../shared/traces --starts 4
  gpubroker backtest --traces traces --mode multi --policy greedy,mine:Policy --plot out.png
  gpubroker backtest --history h100-sxm --deadline-hours 24""",
)
@click.option(
    "--traces",
    "paths",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A directory with manifest.json, or a trace beside one. Repeat for several.",
)
@click.argument("more", nargs=-1, type=click.Path(exists=True, path_type=Path), metavar="[FILE]...")
@click.option(
    "--history", type=GpuName(), help="The spot offers of this GPU in our own price store, instead."
)
@click.option("--count", type=click.IntRange(1, 1024), default=1, help="GPUs an offer, with --history; 1.")
@click.option("--step-minutes", type=click.IntRange(1, 1440), default=10, help="With --history; 10.")
@click.option(
    "--policy",
    "policies",
    type=Names(),
    default=",".join(NAMED),
    metavar="NAME,...",
    help=f"{', '.join(NAMED)}, or module:Class. All of these unless told.",
)
@click.option(
    "--work-over-deadline",
    "shares",
    type=Amounts(_SHARE),
    default=".3,.5,.6,.7,.8,.9,.95",
    metavar="X,...",
    show_default=True,
    help="Hours of work over hours until the deadline.",
)
@click.option(
    "--deadline-hours",
    "deadlines",
    type=Amounts(_HOURS),
    default="24,48,70",
    metavar="H,...",
    show_default=True,
)
@click.option(
    "--restart-hours",
    "restarts",
    type=Amounts(_PAUSE),
    default=".02,.1,.2",
    metavar="H,...",
    show_default=True,
    help="Billed without progress at every launch.",
)
@click.option(
    "--starts",
    type=click.IntRange(1, 1_000_000),
    default=4,
    show_default=True,
    help="Random starts for each trace and deadline.",
)
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(("single", "multi")),
    default="single",
    show_default=True,
    help="Each trace alone, or each group of zones as one market.",
)
@click.option(
    "--checkpoint",
    type=click.Choice(("instant", "periodic")),
    default="instant",
    show_default=True,
    help="Saved at the preemption itself, or every so often.",
)
@click.option("--ckpt-interval-hours", "interval", type=_HOURS, help="Work between checkpoints (periodic).")
@click.option("--ckpt-cost-hours", "cost", type=_PAUSE, help="Without progress at each (periodic); 0.")
@click.option("--grace-hours", "grace", type=_PAUSE, help="Notice before a preemption (periodic); 0.")
@click.option(
    "--optima",
    type=click.IntRange(0, _MOST_RUNS),
    default=1000,
    show_default=True,
    help="Runs that are held against their exact optimum at most, drawn at random: 20 a second and core.",
)
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes; every core unless told.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also draw cost against tightness by policy: .png, .svg or .pdf.",
)
@format_option("table", "json", "csv")
def backtest(
    *,
    paths: tuple[Path, ...],
    more: tuple[Path, ...],
    history: GpuRequest | None,
    count: int,
    step_minutes: int,
    policies: tuple[str, ...],
    shares: tuple[float, ...],
    deadlines: tuple[float, ...],
    restarts: tuple[float, ...],
    starts: int,
    seed: int,
    mode: str,
    checkpoint: str,
    interval: Decimal | None,
    cost: Decimal | None,
    grace: Decimal | None,
    optima: int,
    jobs: int | None,
    plot: Path | None,
    output: str,
) -> None:
    """Replay policies over spot traces.

    Cost is over on-demand from start to end, and over the best plan of one who knows the future (who saves
    instantly, whatever --checkpoint). CSV has one line a run.
    """
    periodic = _Periodic(interval_h=interval, cost_h=cost, grace_h=grace).check(checkpoint)
    _find(policies)
    if plot is not None:
        from gpubroker.cli.plot import check

        check(plot)
    lines = _timelines(_traces((*paths, *more), history, count, step_minutes * 60), mode)
    grid = Grid(
        works_over_deadline=shares,
        deadlines_h=deadlines,
        restarts_h=restarts,
        starts=starts,
        seed=seed,
        checkpoint="periodic" if checkpoint == "periodic" else "instant",
        **periodic,
    )
    runs = len(lines) * len(deadlines) * len(shares) * len(restarts) * starts * len(policies)
    if runs > _MOST_RUNS:
        raise ConfigError(f"{runs:,} runs are more than {_MOST_RUNS:,}: ask for fewer starts")
    rows = _run(lines, with_optima(draw(lines, grid), optima, seed), policies, jobs or _cores())
    standing = standings(rows)
    if output == "json":
        print_json(_record(lines, grid, mode, rows, standing))
    elif output == "csv":
        print_csv(_CSV, map(_csv_row, rows))
    else:
        _print_table(standing)
    _say_infeasible(rows)
    if plot is not None:
        from gpubroker.cli.plot import draw_costs

        draw_costs(standing, plot)


def _find(policies: Sequence[str]) -> None:
    """Before hours of runs. A module may lie where the command is run, as with python -m."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    for name in policies:
        policy_class(name)


def _traces(paths: Sequence[Path], history: GpuRequest | None, count: int, step_s: int) -> list[Trace]:
    if bool(paths) == (history is not None):
        raise ConfigError("give either --traces DIR or FILE..., or --history GPU")
    return read_traces(paths) if history is None else _own_history(history, count, step_s)


def _own_history(request: GpuRequest, count: int, step_s: int) -> list[Trace]:
    from gpubroker import config
    from gpubroker.doors import SystemClock
    from gpubroker.policy.history import ListedSpan, traces_of
    from gpubroker.prices.spot_history import looks, past_offers
    from gpubroker.prices.store import Store

    with Store.open(config.load().db_url, SystemClock()) as store:
        store.migrate()
        offers, looks_s = past_offers(store, request.names, count), looks(store, request.names)
    spans = [
        ListedSpan(
            offer=offer.offer_id,
            provider=offer.provider,
            zone=offer.zone or offer.region,
            is_spot=offer.market == "spot",
            usd_per_hour=offer.usd_micros / 1e6,
            first_s=offer.first_at,
            until_s=offer.until_at,
        )
        for offer in offers
        if request.form_factor in (None, offer.form_factor)
    ]
    return traces_of(spans, looks_s, name=request.text, step_s=step_s, most_gap_s=_MOST_GAP_S)


def _timelines(traces: Sequence[Trace], mode: str) -> list[Timeline]:
    lines = [timeline([trace]) for trace in traces] if mode == "single" else groups(traces)
    if not lines:
        raise ConfigError("no two of these traces are of one group, as --mode multi needs")
    return lines


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(lines: list[Timeline], cases: list[Case], policies: Sequence[str], jobs: int) -> list[Row]:
    chunks = [cases[at : at + _CHUNK] for at in range(0, len(cases), _CHUNK)]
    rows: list[Row] = []
    with _bar() as bar:
        task = bar.add_task("runs", total=len(cases) * len(policies))
        work = _serial if jobs == 1 or len(cases) <= _FEW_CASES else _parallel
        for found in work(lines, chunks, policies, jobs):
            rows += found
            bar.advance(task, len(found))
    return rows


def _bar() -> Progress:
    from gpubroker.cli.bars import progress

    return progress(tells_left=True)


def _serial(
    lines: list[Timeline], chunks: list[list[Case]], policies: Sequence[str], jobs: int
) -> Iterator[list[Row]]:
    _begin(lines, policies)
    return map(_chunk, chunks)


def _parallel(
    lines: list[Timeline], chunks: list[list[Case]], policies: Sequence[str], jobs: int
) -> Iterator[list[Row]]:
    """In the order of the chunks. Processes, because the work is Python: threads would share one core."""
    try:
        yield from in_processes(_chunk, chunks, jobs=jobs, begin=_begin, with_args=(lines, policies))
    except ProcessDied as error:
        raise ConfigError("a process of the backtest died: out of memory? Try --jobs 1") from error


_begun: tuple[list[Timeline], Sequence[str]] = ([], ())


def _begin(lines: list[Timeline], policies: Sequence[str]) -> None:
    """In each process, once: the traces are too large to go with every chunk."""
    global _begun  # noqa: PLW0603
    _begun = (lines, policies)


def _chunk(cases: list[Case]) -> list[Row]:
    lines, policies = _begun
    with redirect_stdout(sys.stderr):  # what a policy prints must not end up in our JSON
        return run_cases(lines, cases, policies)


def _say_infeasible(rows: Sequence[Row]) -> None:
    count = sum(row.case.wants_optimum and row.optimum_over_on_demand is None for row in rows)
    if count:
        say(f"{count} of {len(rows)} runs could be in time by no plan: they have no optimum.")


def _record(
    lines: Sequence[Timeline], grid: Grid, mode: str, rows: Sequence[Row], standing: Iterable[Standing]
) -> dict[str, Any]:
    return {
        "asked": {"mode": mode, "traces": [line.name for line in lines], **asdict(grid)},
        "runs": len(rows),
        "policies": [one.record() for one in standing],
    }


def _csv_row(row: Row) -> tuple[Any, ...]:
    setting, run = row.case.setting, row.run
    best = row.optimum_over_on_demand
    return (
        row.line,
        setting.deadline_h,
        row.case.work_over_deadline,
        setting.restart_delay_h,
        row.case.start,
        row.policy,
        f"{row.over_on_demand:.9f}",
        "" if best is None else f"{best:.9f}",
        int(run.is_missed),
        run.preemptions,
        run.launches,
        *(f"{hours:.6f}" for hours in (run.on_demand_h, run.spot_h, run.lost_h, run.end_h)),
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_table(standing: Sequence[Standing]) -> None:
    shares = [f"{share:g}" for share, _ in standing[0].columns]
    numbers = ("on-demand", "optimum", *shares, "late", "stops")
    made = table("policy", *numbers, right=numbers, whole=("policy",))
    for one in standing:
        overall = one.overall
        made.add_row(
            one.policy,
            _ratio(overall.over_on_demand),
            _ratio(overall.over_optimum),
            *(_ratio(column.over_optimum) for _, column in one.columns),
            str(overall.missed),
            f"{overall.preemptions:.2f}",
        )
    console().print(made)
    overall = standing[0].overall
    say(
        f"{overall.runs} runs a policy, {overall.compared} of them beside their optimum. Mean cost over "
        "on-demand,\nover the optimum, and over the optimum by work/deadline; late: missed deadlines; "
        "stops: preemptions."
    )
