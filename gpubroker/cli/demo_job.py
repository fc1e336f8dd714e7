"""The second part of `gpubroker demo`: a real job that loses its node three times and still ends right.

The same supervisor as `gpubroker run`, on this machine's vendors, whose clock now runs twenty times as fast.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpubroker import config
from gpubroker.cli.ask import NOTHING_SAID
from gpubroker.cli.plan import ask_of
from gpubroker.cli.render import console, dollars, table
from gpubroker.cli.renting import Market, job_of, store_of
from gpubroker.doors import Clock
from gpubroker.jobspec import JobSpec, job_from
from gpubroker.money import SECONDS_PER_HOUR
from gpubroker.prices.market import open_context
from gpubroker.run.computes import computes
from gpubroker.run.contact import connector, keys_of
from gpubroker.run.looks import job_folder
from gpubroker.run.records import Attempt, Records
from gpubroker.run.renting import Renting
from gpubroker.run.supervise import Outcome, Supervisor, closing

if TYPE_CHECKING:
    from gpubroker.testcloud.client import RunningCloud

SPEED = 20
_STEPS, _PAUSE_S, _SAVE_EVERY_S = 3000, 0.015, 1.5
_LOST_AT = (0.2, 0.45, 0.7)  # shares of the training at which a node is taken
_TICK_S = 0.5
_GPU = "4090"
_BUCKET = "demo"
_FAILED = 6
_TOLD = re.compile(rb"begins at (\d+)|step (\d+) loss ([\d.]+)")


@dataclass(slots=True)
class Scene:
    """What the person sees: the nodes so far, the training, and the last things that happened."""

    clock: Clock
    began_s: float
    said: deque[str] = field(default_factory=lambda: deque(maxlen=9))
    step: int = 0
    loss: str = ""
    heard_s: float | None = None  # when this node's job was last heard; None = it has just begun
    trained_s: float = 0.0  # between words of one node's job, so without start-ups
    trained_steps: int = 0
    first_start_s: float = 0.0  # from the vendor's yes to the first step
    lost_at: dict[int, int] = field(default_factory=dict)  # attempt id -> the step it had reached
    attempts: Sequence[Attempt] = ()

    def say(self, text: str) -> None:
        """One more thing that happened."""
        passed_s = self.clock.monotonic_s() - self.began_s
        self.said.append(f"{passed_s:5.1f} s  {text}")

    def hear(self, _: Attempt, log: bytes) -> None:
        """The job's own words."""
        found = list(_TOLD.finditer(log))
        if not found:
            return
        if any(one[1] for one in found):
            self.first_start_s = self.first_start_s or self._rented_for_s()
            self.step, self.heard_s = int(next(one[1] for one in found if one[1])), None
        before, now_s = self.step, self.clock.monotonic_s()
        steps = [one for one in found if one[2]]
        if not steps:
            return
        self.step, self.loss = int(steps[-1][2]), steps[-1][3].decode()
        if self.heard_s is not None:
            self.trained_s += now_s - self.heard_s
            self.trained_steps += self.step - before
        self.heard_s = now_s

    def _rented_for_s(self) -> float:
        now = self.clock.now()
        return next(((now - a.running_at).total_seconds() for a in self.attempts if a.running_at), 0.0)

    def __rich__(self) -> Group:
        """Drawn again and again."""
        bar = Table.grid(padding=(0, 2))
        for _ in range(3):
            bar.add_column(no_wrap=True)
        words = f"step {self.step:,} of {_STEPS:,}" + (f", loss {self.loss}" if self.loss else "")
        bar.add_row("training", ProgressBar(total=_STEPS, completed=self.step, width=30), words)
        events = (Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in self.said)
        return Group(self._nodes(), Text(), bar, Text(), *events)

    def _nodes(self) -> Table:
        made = table("#", "vendor", "market", "$/h", "node", "what became of it", right=("#", "$/h"))
        rented = [a for a in self.attempts if a.node_id is not None]
        for number, attempt in enumerate(rented, 1):
            made.add_row(
                str(number),
                attempt.provider,
                attempt.market.replace("_", "-"),
                dollars(attempt.usd_per_hour),
                str(attempt.node_id)[:20],
                self._fate(attempt),
            )
        return made

    def _fate(self, attempt: Attempt) -> str:
        if attempt.ended_at is None:
            return "running" if attempt.running_at else "starting"
        at = self.lost_at.get(attempt.id)
        return attempt.end_reason.partition(":")[0] + (f" at step {at:,}" if at else "")


def run(cloud: RunningCloud, vendors: Sequence[str], clock: Clock) -> None:
    """Train, lose three nodes, compare. Exits 6 when the result is not the right one."""
    from gpubroker.testcloud import demo_training

    cloud.set_speed(SPEED)
    console().print(
        f"\nNow a job: {_STEPS:,} steps of training on one RTX 4090. Its node will be taken three times.\n"
    )
    expected = demo_training.whole(_STEPS)
    settings = config.load()
    with (
        tempfile.TemporaryDirectory() as home,
        open_context(settings, os.environ, clock) as (store, context),
    ):
        folder = Path(home, "job")
        folder.mkdir()
        shutil.copy(str(demo_training.__file__), folder / "train.py")
        spec = _spec(folder, vendors, clock)
        os.environ.update(cloud.make_bucket(_BUCKET))
        records = Records(store.database, clock)
        found, _ = computes(context, vendors)
        scene = Scene(clock=clock, began_s=clock.monotonic_s())
        market = Market(
            ask_of(spec, settings),
            NOTHING_SAID,
            settings,
            clock,
            found,
            tell=scene.say,
            on_ask=lambda names: None,  # a word on the terminal would tear the picture
        )
        job_id = records.add_job(spec.name, spec.model_dump_json())
        keys = keys_of(job_folder(settings.jobs_dir, job_id))
        job = job_of(
            job_id,
            spec,
            keys,
            folder=folder,
            out=Path(home, "back"),
            store=store_of(spec, None),
            settings=settings,
        )
        supervisor = Supervisor(
            job=job,
            records=records,
            renting=Renting(records, found, clock),
            computes=found,
            candidates=lambda _: market.candidates(True),  # listings live for seconds at this speed
            connect=connector(keys),
            clock=clock,
            say=scene.say,
            log=scene.hear,
            reach=settings.reach,
        )
        with Live(scene, console=console(), refresh_per_second=4):
            outcome = _to_the_end(supervisor, scene, cloud)
        weights = Path(home, "back", "out", "weights")
        is_right = outcome.state == "done" and weights.is_file() and weights.read_text() == expected
        _sum_up(scene, cloud.bill(), _on_demand_usd_per_hour(market), is_right=is_right)
    if not is_right:
        raise click.exceptions.Exit(_FAILED)


def _spec(folder: Path, vendors: Sequence[str], clock: Clock) -> JobSpec:
    told = {
        "name": "demo",
        "command": f"exec python3 train.py {_STEPS} {_PAUSE_S}",
        "folder": str(folder),
        "env": {"GPUBROKER_CHECKPOINT_EVERY_S": str(_SAVE_EVERY_S)},
        "gpu": {"name": [_GPU]},
        "work": {"hours": "0.25"},
        "limits": {"budget_usd": "20"},
        "where": {"providers": list(vendors)},
        "checkpoint": {"store": f"s3://{_BUCKET}/checkpoints"},
        "artifacts": {"paths": ["out"]},
    }
    return job_from(told, clock.now(), "demo")


def _to_the_end(supervisor: Supervisor, scene: Scene, cloud: RunningCloud) -> Outcome:
    """Tick, and take the node away when it is time. Whatever happens, nothing stays rented."""
    left = list(_LOST_AT)
    with closing(supervisor):
        try:
            while (outcome := supervisor.tick()) is None:
                _look(supervisor, scene)
                if left and scene.step >= left[0] * _STEPS and _take(scene, cloud):
                    left.pop(0)
                supervisor.clock.sleep(_TICK_S)
            _look(supervisor, scene)
            return outcome
        except BaseException:
            supervisor.stop("interrupted")
            raise


def _look(supervisor: Supervisor, scene: Scene) -> None:
    scene.attempts = supervisor.records.attempts(supervisor.job.id)
    for attempt in scene.attempts:
        if attempt.ended_at is not None and attempt.end_reason != "done":
            scene.lost_at.setdefault(attempt.id, scene.step)


def _take(scene: Scene, cloud: RunningCloud) -> bool:
    running = [a for a in scene.attempts if a.ended_at is None and a.running_at is not None]
    for attempt in running:
        scene.say(f"the demo takes {attempt.provider} {attempt.node_id} away, as its vendor would")
        cloud.preempt(str(attempt.node_id))
    return bool(running)


def _on_demand_usd_per_hour(market: Market) -> Decimal | None:
    """The cheapest that nobody takes away; None = nobody has one."""
    prices = [q.offer.usd_per_hour for q, _ in market.quotes(0) if not q.offer.preemptible]
    return min(prices, default=None)


def _sum_up(
    scene: Scene, bill: Mapping[str, Mapping[str, str]], on_demand: Decimal | None, *, is_right: bool
) -> None:
    out = console()
    tags = {attempt.tag for attempt in scene.attempts}
    paid = sum((Decimal(usd) for of in bill.values() for tag, usd in of.items() if tag in tags), Decimal(0))
    lost = sum(attempt.end_reason.startswith("preempted") for attempt in scene.attempts)
    same = "the same, bit for bit, as without any interruption"
    out.print(f"\nThe node was lost {lost} times; the weights are {same if is_right else 'NOT ' + same}.")
    passed_min = (scene.clock.monotonic_s() - scene.began_s) * SPEED / 60
    out.print(f"The vendors' bill for {passed_min:.0f} minutes of their clock: {_cents(paid)}.")
    without = None if on_demand is None else _uninterrupted_usd(scene, on_demand)
    if without:
        share = (1 - paid / without) * 100
        less = f"{share:.0f}% less" if share > 0 else f"{-share:.0f}% more"
        out.print(
            f"On demand, started once and never interrupted, it would have been {_cents(without)}:"
            f" this was {less}."
        )


def _uninterrupted_usd(scene: Scene, usd_per_hour: Decimal) -> Decimal:
    """One start as long as the first one's, and every step at the pace that was measured."""
    if not scene.trained_steps:
        return Decimal(0)
    training_s = scene.trained_s / scene.trained_steps * _STEPS
    billed_s = Decimal(str(training_s + scene.first_start_s))
    return usd_per_hour * billed_s * SPEED / SECONDS_PER_HOUR


def _cents(usd: Decimal) -> str:
    return f"{usd * 100:.1f} cents"
