"""What all pictures share, and that of a backtest: cost against tightness, a line a policy.

Needs the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from gpubroker.errors import ConfigError
from gpubroker.policy.backtest import Standing

KINDS = (".png", ".svg", ".pdf")
# Dark to light and told apart by their marks too: readable in grey and with every colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2em}}svg{{max-width:100%;height:auto}}</style>
{svg}
</html>
"""
_FLAT = "on_demand"
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def check(path: Path, kinds: Sequence[str] = KINDS) -> None:
    """Before hours of work: whether the picture can be drawn and kept. Raises ConfigError."""
    if path.suffix.lower() not in kinds:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(kinds)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'gpubroker[plot]'") from error


def blank(width_in: float, height_in: float) -> Any:
    """A figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """A faint grid, and no frame where no axis is."""
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def keep(figure: Any, title: str, path: Path) -> None:
    """As the name's ending says. Raises ConfigError."""
    try:
        if path.suffix.lower() != ".html":
            figure.savefig(path, dpi=150)
            return
        svg = StringIO()
        figure.savefig(svg, format="svg")
        drawn = svg.getvalue()
        path.write_text(_PAGE.format(title=title, svg=drawn[drawn.index("<svg") :]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror or error}") from error


def draw_costs(standing: Sequence[Standing], path: Path) -> None:
    """Two panels: cost over the optimum and over on-demand, by work/deadline. Raises ConfigError."""
    figure = blank(11, 5.4)
    over_optimum, over_on_demand = figure.subplots(1, 2)
    # On-demand itself is far above the others and would press them flat.
    shown = [one for one in standing if one.policy != _FLAT] or standing
    for number, one in enumerate(shown):
        shares = [share for share, _ in one.columns]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": _MARKS[number % len(_MARKS)],
            "label": one.policy.replace("_", " "),
        }
        optimal = [column.over_optimum or float("nan") for _, column in one.columns]
        over_optimum.plot(shares, optimal, **style)
        over_on_demand.plot(shares, [column.over_on_demand for _, column in one.columns], **style)
    for axes, title in (
        (over_optimum, "cost over the offline optimum"),
        (over_on_demand, "cost over on-demand"),
    ):
        axes.set_title(title)
        axes.set_xlabel("work / deadline (tighter to the right)")
        tidy(axes)
    handles, labels = over_optimum.get_legend_handles_labels()
    title = f"means of {standing[0].overall.runs} runs each"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(shown), frameon=False, title=title)
    keep(figure, title, path)
