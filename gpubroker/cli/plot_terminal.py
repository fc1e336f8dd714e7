"""A history as a picture in the terminal: dots of braille, a letter at each line's end, axes with units.

Letters and colours say the same: it is readable without colour. The columns are time, each two dots wide; the
rows are dollars, each four dots high.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from string import ascii_lowercase

from rich.text import Text

from gpubroker.cli.plot_history import Line

_STYLES = ("cyan", "yellow", "green", "magenta", "red", "blue", "white")
_HEIGHT = 16
# The dots of a braille character, by row and column: bits of its code point.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_TICKS = 4


def picture(lines: Sequence[Line], title: str, bucket_s: int, width: int) -> Text:
    """All of it, no wider than `width`; for lines that have a price somewhere."""
    prices = [usd for line in lines for usd in line.usd if usd is not None]
    moments = [begin.timestamp() for line in lines for begin in line.begins]
    most, first, last = max(prices) * 1.05 or 1.0, min(moments), max(moments)
    axis = [f"${most * (_HEIGHT - row - 0.5) / _HEIGHT:.2f}" for row in range(_HEIGHT)]
    margin = max(map(len, axis)) + 2
    columns = width - margin - 4
    cells: list[list[tuple[int, str]]] = [[(_BLANK, "")] * columns for _ in range(_HEIGHT)]

    def place(at: float, usd: float) -> tuple[int, int]:
        """In dots from the left and from the top."""
        x = 0.0 if last == first else (at - first) / (last - first)
        return round(x * (2 * columns - 1)), min(4 * _HEIGHT - 1, int((1 - usd / most) * 4 * _HEIGHT))

    ends = dict[int, tuple[str, str]]()
    for number, line in enumerate(lines):
        style = _STYLES[number % len(_STYLES)]
        end_row = _HEIGHT - 1
        for x, y in _dots(line, bucket_s, place):
            bits, _ = cells[y // 4][x // 2]
            cells[y // 4][x // 2] = (bits | _BITS[y % 4][x % 2], style)
            end_row = y // 4
        ends[_free(end_row, ends)] = (ascii_lowercase[number], style)
    drawn = Text(f"{title}\n")
    for row, found in enumerate(cells):
        label = axis[row] if row % _TICKS == 0 else ""
        drawn.append(f"{label:>{margin - 2}} {'┤' if label else '│'}")
        for bits, style in found:
            drawn.append(chr(bits), style)
        letter, style = ends.get(row, ("", ""))
        drawn.append(f" {letter}\n", style)
    drawn.append(f"{'':{margin - 1}}└{'─' * columns}\n")
    drawn.append(f"{'':{margin}}{_times(first, last, columns)}\n")
    for number, line in enumerate(lines):
        name = f"{line.provider or 'all'} {line.market}".replace("_", "-").strip()
        drawn.append(f"{'':{margin}}{ascii_lowercase[number]} {name}\n", _STYLES[number % len(_STYLES)])
    drawn.rstrip()
    return drawn


def _dots(
    line: Line, bucket_s: int, place: Callable[[float, float], tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Of its points, and of what joins two that follow each other without a gap."""
    points = [
        (begin.timestamp(), usd) for begin, usd in zip(line.begins, line.usd, strict=True) if usd is not None
    ]
    yield from (place(*point) for point in points[:1])
    for before, after in pairwise(points):
        (x0, y0), (x1, y1) = place(*before), place(*after)
        if after[0] - before[0] <= bucket_s:
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            yield from (
                (round(x0 + (x1 - x0) * k / steps), round(y0 + (y1 - y0) * k / steps))
                for k in range(1, steps)
            )
        yield x1, y1


def _free(row: int, taken: Container[int]) -> int:
    """The nearest row that no letter is in."""
    return min((one for one in range(_HEIGHT) if one not in taken), key=lambda one: abs(one - row))


def _times(first: float, last: float, columns: int) -> str:
    """The first, the middle and the last moment, below the axis."""
    form = "%d %b %H:%M" if last - first < 4 * 86400 else "%d %b %Y"
    left, middle, right = (
        datetime.fromtimestamp(at, UTC).strftime(form) for at in (first, (first + last) / 2, last)
    )
    room = columns - len(left) - len(middle) - len(right) - len(" UTC")
    return f"{left}{'':{max(1, room // 2)}}{middle}{'':{max(1, room - room // 2)}}{right} UTC"
