"""The picture of survival: which share of offers and prices is still there at which age. Needs `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpubroker.cli import plot
from gpubroker.cli.plot_history import KINDS
from gpubroker.prices.survival import Curve

_DASHES = {"offer": "-", "price": ":"}
_MOST_LINES = 2 * len(plot.COLOURS)


def check(path: Path) -> None:
    """Before anything is read. Raises ConfigError."""
    plot.check(path, KINDS)


def draw(lines: Sequence[tuple[str, str, Curve]], title: str, path: Path) -> None:
    """(name, offer or price, curve) each, with its 90% band. Raises ConfigError where it cannot be kept."""
    from matplotlib.ticker import PercentFormatter

    figure = plot.blank(11, 5.6)
    axes: Any = figure.subplots()
    shown = sorted((line for line in lines if line[2].ended), key=lambda line: -line[2].number)[:_MOST_LINES]
    names = sorted({name for name, _, _ in shown})
    least_h = min((curve.steps[0].age_s for _, _, curve in shown), default=3600) / 3600 / 2
    for name, of, curve in sorted(shown, key=lambda line: line[:2]):
        ages_h = [least_h, *(step.age_s / 3600 for step in curve.steps)]
        ages_h.append(max(ages_h[-1], curve.followed_s / 3600))
        alive, low, high = zip(
            (1.0, 1.0, 1.0), *((step.alive, step.low, step.high) for step in curve.steps), strict=True
        )
        colour = plot.COLOURS[names.index(name) % len(plot.COLOURS)]
        axes.step(
            ages_h,
            (*alive, alive[-1]),
            where="post",
            color=colour,
            linestyle=_DASHES[of],
            linewidth=1.8,
            label=f"{name}: {of}s ({curve.number:,})",
        )
        axes.fill_between(
            ages_h, (*low, low[-1]), (*high, high[-1]), step="post", color=colour, alpha=0.15, linewidth=0
        )
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_xlim(left=least_h)
    axes.set_xlabel("hours since it was listed, or since the price began")
    axes.xaxis.set_major_formatter(lambda hours, _: f"{hours:g}")
    axes.set_ylabel("still there (band: 90%)")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.02)
    plot.tidy(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    plot.keep(figure, title, path)
