"""The bar of work that takes minutes: on a terminal's standard error, and nowhere else."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gpubroker.cli.render import console


def progress(*, tells_left: bool = False) -> Progress:
    """What is done, of how much, and how long it has taken, or will take. Gone when it is over."""
    out = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn() if tells_left else TimeElapsedColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )
