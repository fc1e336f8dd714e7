"""How things look: tables that fit 100 columns, colour only on a terminal, ages and money for people."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from gpubroker.money import round_usd

if TYPE_CHECKING:
    # rich is imported where something is drawn: JSON and CSV do without.
    from rich.console import Console, JustifyMethod
    from rich.table import Table
    from rich.text import Text

WIDTH = 100
_NARROWEST = 4


def console(*, stderr: bool = False) -> Console:
    """A console that is exactly 100 columns wide where nobody looks, and as wide as the terminal else."""
    from rich.console import Console

    # No markup: a vendor's "[red]" is text.
    out = Console(stderr=stderr, highlight=False, markup=False)
    if not out.is_terminal:
        out = Console(stderr=stderr, highlight=False, markup=False, width=WIDTH, color_system=None)
    return out


def table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """An empty table in the house style.

    Columns in `right` hold numbers and never wrap; those in `whole` do only where the terminal is narrower
    than 100 columns.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    is_narrow = console().width < WIDTH
    for name in columns:
        keep = name in right or (name in whole and not is_narrow)
        made.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=keep,
            min_width=None if keep else min(len(name), 4),
        )
    return made


def fitted(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    flexible: Sequence[str],
    right: Sequence[str],
    width: int,
) -> Table:
    """A table of one line a row, no wider than `width`: only the flexible columns are cut, the widest first.

    Half a figure is a wrong one.
    """
    from rich.table import Table

    wide = [max((row[at].cell_len for row in rows), default=0) for at in range(len(columns))]
    wide = [max(one, len(name)) for one, name in zip(wide, columns, strict=True)]
    may = [at for at, name in enumerate(columns) if name in flexible]
    while sum(wide) + len(columns) - 1 > width:
        widest = max(may, key=lambda at: wide[at])
        if wide[widest] <= _NARROWEST:
            break
        wide[widest] -= 1
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name, cells in zip(columns, wide, strict=True):
        justify: JustifyMethod = "right" if name in right else "left"
        made.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis", width=cells)
    for row in rows:
        made.add_row(*row)
    return made


def print_json(value: Any) -> None:
    """To standard output, alone."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """With a header row."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)


def say(text: str) -> None:
    """A message for the person, on standard error."""
    click.echo(text, err=True)


def plain(text: str, most: int | None = None) -> str:
    """One line that a terminal only shows: what a vendor or a node says may hold any character."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if most is None or len(line) <= most else f"{line[: most - 1]}…"


def span(seconds: float) -> str:
    """How long, in one unit or two: 45s, 12m, 3h 05m, 2d 4h."""
    left = max(0, round(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m"
    if left < 86400:
        return f"{left // 3600}h {left % 3600 // 60:02d}m"
    return f"{left // 86400}d {left % 86400 // 3600}h"


def print_bytes(data: bytes) -> None:
    """A job's own output, as it is and at once."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def dollars(amount: Decimal) -> str:
    """$ with cents; whole from $100,000, four places below ten cents, where cents hide the difference."""
    if amount >= 100_000:
        return f"${amount:,.0f}"
    return f"${amount:,.2f}" if amount >= Decimal("0.10") or amount == 0 else f"${amount:.4f}"


def dollars_of(value: float) -> str:
    """A statistic as money; a dash where it is not finite (too many preemptions to draw to the end)."""
    return dollars(round_usd(Decimal(repr(value)))) if math.isfinite(value) else "-"


def hours_of(value: float) -> str:
    """A statistic in hours; a dash where it is not finite."""
    return f"{value:.1f} h" if math.isfinite(value) else "-"


def age(moment: datetime | None, now: datetime) -> str:
    """How old, in one unit."""
    if moment is None:
        return "never"
    seconds = max(0, int((now - moment).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def iso(moment: datetime | None) -> str | None:
    """ISO 8601 UTC with a Z, for JSON."""
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
