"""`gpubroker watch`: jobs, nodes and money at a glance, again every few seconds. Reads the database alone.

look -> Scene -> picture (pure: a scene in so many columns and lines) -> Live, until q or Ctrl-C
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

import click
from rich.console import Group, RenderableType
from rich.text import Text

from gpubroker import config
from gpubroker.cli.jobs import ago, where
from gpubroker.cli.render import WIDTH, console, dollars, fitted, plain, span
from gpubroker.config import Settings
from gpubroker.doors import Clock, SystemClock
from gpubroker.prices.database import Database
from gpubroker.prices.market import open_context
from gpubroker.run.events import Event, Events
from gpubroker.run.leases import alive
from gpubroker.run.overview import Standing, look, rate_of
from gpubroker.run.records import Attempt, Records

_AGAIN_S = 2.0
# A job that is over is seen for a while.
_SHOWN_AFTER = timedelta(hours=1)
_MOST_EVENTS = 50
_LINES = 40  # where nobody looks
_COLORS = {"running": "green", "starting": "cyan", "waiting": "yellow", "stopping": "yellow", "done": "green"}
_FLEXIBLE = ("job", "on", "GPU", "node", "of job")
_ORDER = ("running", "stopping", "starting", "waiting", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is to be seen at one moment."""

    now: datetime
    jobs: Sequence[Standing]
    nodes: Sequence[Attempt]  # that may be billing, those of boxes too
    events: Sequence[Event]  # the oldest first
    supervisors: int
    usd_today: Decimal
    usd_per_day: Decimal | None  # None = no such cap

    @property
    def usd_per_hour(self) -> Decimal:
        """Of all open nodes."""
        return sum((rate_of(node) for node in self.nodes), Decimal(0))


@click.command(context_settings={"max_content_width": 100}, epilog="Example: gpubroker watch")
def watch() -> None:
    """Jobs with what they do, have not saved yet and cost, open nodes, and the last events. q leaves.

    `left` is what the first of a job's limits leaves: its deadline, budget or hours. `due` is when its next
    checkpoint is to be expected. Where standard output is no terminal it is printed once.
    """
    settings, clock = config.load(), SystemClock()
    with open_context(settings, os.environ, clock) as (store, _):
        out = console()
        if not out.is_terminal:
            out.print(picture(_scene(store.database, settings, clock), WIDTH, _LINES))
            return
        _live(store.database, settings, clock)


def _live(database: Database, settings: Settings, clock: Clock) -> None:
    from rich.live import Live

    out = console()
    with _keys() as is_left, Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            scene = _scene(database, settings, clock)
            live.update(picture(scene, out.width, out.height, "q leaves"), refresh=True)
            if is_left(_AGAIN_S):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so long for a q; Ctrl-C is another way out. Without a keyboard it only waits."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield lambda seconds: _waited(seconds, [])
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield lambda seconds: _waited(seconds, [number])
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _waited(seconds: float, keyboards: list[int]) -> bool:
    """Whether to leave. Another key shows the newest at once."""
    try:
        ready, _, _ = select.select(keyboards, [], [], seconds)
        return any(os.read(number, 100).lower() in (b"q", b"") for number in ready)
    except KeyboardInterrupt:
        return True


def _scene(database: Database, settings: Settings, clock: Clock) -> Scene:
    now, records = clock.now(), Records(database, clock)
    return Scene(
        now=now,
        jobs=look(database, over_since=now - _SHOWN_AFTER),
        nodes=records.open_attempts(),
        events=Events(database, clock).last(_MOST_EVENTS),
        supervisors=len(alive(database)),
        usd_today=records.usd_today(now),
        usd_per_day=settings.usd_per_day,
    )


def picture(scene: Scene, columns: int, lines: int, hint: str = "") -> RenderableType:
    """As much as there is room for: jobs first, a quarter each for nodes and events or what jobs leave."""
    room = max(3, lines - 8)  # without heads, the empty lines between, and the line that the cursor is on
    events = min(len(scene.events), max(1, room // 4))
    nodes = min(len(scene.nodes), max(1, room // 4))
    jobs = min(len(scene.jobs), room - events - nodes)
    nodes = min(len(scene.nodes), room - events - jobs)
    events = min(len(scene.events), room - jobs - nodes)
    parts: list[RenderableType] = [_head(scene, columns, hint), "", _jobs(scene, jobs, columns)]
    if nodes:
        parts += ["", _nodes(scene, nodes, columns)]
    if events:
        parts += ["", *(_event(event, scene.now, columns) for event in scene.events[-events:])]
    return Group(*parts)


def _head(scene: Scene, columns: int, hint: str) -> Text:
    cap = "" if scene.usd_per_day is None else f" of {dollars(scene.usd_per_day)}"
    count = scene.supervisors
    who = f"{count} supervisor{'s' * (count != 1)}" if count else "NO SUPERVISOR"
    line = Text(f"{scene.now:%H:%M:%S} UTC   ", no_wrap=True, overflow="ellipsis")
    line.append(who, style="" if count else "bold red")
    line.append(f"   {dollars(scene.usd_per_hour)}/h   today {dollars(scene.usd_today)}{cap}", style="bold")
    line.append(f"   {hint}", style="dim")
    line.truncate(columns)
    return line


def _jobs(scene: Scene, most: int, columns: int) -> RenderableType:
    if not scene.jobs:
        return Text("No job: gpubroker submit job.toml", style="dim")
    wide = columns >= WIDTH
    names = ["job", "state", "on", *(["GPU"] if wide else []), "unsaved", "due", "left", "$/h", "cost", "of"]
    rows = []
    ordered = sorted(scene.jobs, key=lambda one: _ORDER.index(one.stage) if one.stage in _ORDER else 9)
    for one in ordered[:most]:
        unsaved_s, left, budget = one.unsaved_s(scene.now), one.left_s(scene.now), one.spec.limits.budget_usd
        rate = rate_of(one.node)
        cells = [
            Text(plain(one.row.id)),
            Text(one.stage.replace("_", " "), style=_COLORS.get(one.stage, "red")),
            Text(plain(where(one))),
            *([Text(plain(one.gpu))] if wide else []),
            Text("" if unsaved_s is None else span(unsaved_s)),
            Text(_due(one.due_at, scene.now)),
            Text("" if left is None else _left(*left, wide=wide), style=_urgent(left)),
            Text(dollars(rate) if rate else ""),
            Text(dollars(one.usd(scene.now))),
            Text("" if budget is None else dollars(budget)),
        ]
        rows.append(cells)
    right = ("unsaved", "due", "left", "$/h", "cost", "of")
    made = fitted(names, rows, flexible=_FLEXIBLE, right=right, width=columns)
    more = len(scene.jobs) - most
    return Group(made, Text(f"and {more} more: gpubroker jobs", style="dim")) if more > 0 else made


def _due(due_at: datetime | None, now: datetime) -> str:
    if due_at is None:
        return ""
    left_s = (due_at - now).total_seconds()
    return f"in {span(left_s)}" if left_s > 0 else f"{span(-left_s)} ago"


def _left(seconds: float, which: str, *, wide: bool) -> str:
    if seconds <= 0:
        return f"none, {which}" if wide else "none"
    return f"{span(seconds)} {which}" if wide else span(seconds)


def _urgent(left: tuple[float, str] | None) -> str:
    return "red" if left is not None and left[0] < 3600 else ""


def _nodes(scene: Scene, most: int, columns: int) -> RenderableType:
    wide = columns >= WIDTH
    rows = [
        [
            Text(plain(f"{node.provider} {node.node_id or node.tag}")),
            Text(plain(node.job_id)),
            *([Text(f"{node.gpu_count}x {node.gpu}")] if wide else []),
            Text(ago(node.running_at or node.intended_at, scene.now)),
            Text(dollars(rate_of(node))),
            Text(dollars(node.usd_so_far(scene.now))),
        ]
        for node in scene.nodes[:most]
    ]
    names = ["node", "of job", *(["GPU"] if wide else []), "since", "$/h", "so far"]
    return fitted(names, rows, flexible=_FLEXIBLE, right=("$/h", "so far"), width=columns)


def _event(event: Event, now: datetime, columns: int) -> Text:
    line = Text(f"{event.at:%H:%M:%S} ", style="dim")
    line.append(f"{plain(event.job_id or '-', 24)} {event.kind} ", style="bold")
    line.append(plain(event.text))
    line.truncate(columns, overflow="ellipsis")
    return line
