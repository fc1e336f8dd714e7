"""The picture of a history: prices over time, a line a provider and market, and how often there was one.

Colours say the provider, dashes the market: readable in grey and with every colour vision. Needs the extra
`plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpubroker.cli import plot

KINDS = (*plot.KINDS, ".html")
_DASHES = {"spot": "-", "on_demand": "--", "serverless": ":", "reserved": "-."}
_MOST_LINES = len(plot.COLOURS)  # more of them nobody tells apart
_MARKED = 40  # points; more of them say where they are by the line


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One provider and market; None = nothing was seen."""

    provider: str
    market: str
    begins: Sequence[datetime]
    usd: Sequence[float | None]  # for one GPU-hour
    available: Sequence[int | Fraction | None]  # share of polls


def fewest(lines: Sequence[Line]) -> list[Line]:
    """As many as can be told apart: the cheapest on average, in the order in which they came."""

    def mean(line: Line) -> float:
        found = [usd for usd in line.usd if usd is not None]
        return sum(found) / len(found) if found else float("inf")

    return sorted(sorted(lines, key=mean)[:_MOST_LINES], key=lines.index)


def check(path: Path) -> None:
    """Before anything is read. Raises ConfigError."""
    plot.check(path, KINDS)


def draw(lines: Sequence[Line], title: str, bucket_s: int, path: Path) -> None:
    """Two panels over one axis of time. Raises ConfigError where it cannot be kept."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    figure = plot.blank(11, 6.2)
    has_shares = any(share is not None for line in lines for share in line.available)
    # Axes take moments, which their types do not say.
    shape: dict[str, Any] = {"nrows": 2, "sharex": True, "height_ratios": (3, 1)} if has_shares else {}
    panels: Any = figure.subplots(**shape, squeeze=False)[:, 0]
    providers = sorted({line.provider for line in lines})
    for line in lines:
        style: dict[str, Any] = {
            "color": plot.COLOURS[providers.index(line.provider) % len(plot.COLOURS)],
            "linestyle": _DASHES.get(line.market, "-"),
            "linewidth": 1.8,
        }
        begins, usd = _with_gaps(line.begins, line.usd, bucket_s)
        mark = "o" if len(line.begins) <= _MARKED else None
        name = f"{line.provider or 'all'} {line.market}".replace("_", "-").strip()
        panels[0].plot(begins, usd, label=name, marker=mark, markersize=3, **style)
        if has_shares:
            begins, found = _with_gaps(line.begins, line.available, bucket_s)
            panels[1].step(begins, found, where="post", **style)
    panels[0].set_title(title)
    panels[0].set_ylabel("$ for one GPU-hour")
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("${x:.2f}"))
    panels[0].set_ylim(bottom=0)
    if has_shares:
        panels[1].set_ylabel("polls that\nfound one")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1))
        panels[1].set_ylim(-0.05, 1.05)
    locator = AutoDateLocator()  # type: ignore[no-untyped-call]
    panels[-1].xaxis.set_major_locator(locator)
    panels[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    panels[-1].set_xlabel("UTC")
    for axes in panels:
        plot.tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    plot.keep(figure, title, path)


def _with_gaps(
    begins: Sequence[datetime], values: Sequence[float | Fraction | None], bucket_s: int
) -> tuple[list[datetime], list[float]]:
    """A line breaks where nothing was seen."""
    when, what = list[datetime](), list[float]()
    for begin, value in zip(begins, values, strict=True):
        if when and (begin - when[-1]).total_seconds() > bucket_s:
            when.append(when[-1] + timedelta(seconds=bucket_s))
            what.append(float("nan"))
        when.append(begin)
        what.append(float("nan") if value is None else float(value))
    return when, what
