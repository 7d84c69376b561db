"""Heat maps and forest plots as SVG text, made like the other charts: no script, no fonts, colors from the page.

Blue and orange only, which color-blind readers tell apart, and every cell says its number.
"""

import math
import textwrap
from collections.abc import Sequence

from markupsafe import Markup, escape

from medrl.report.text import UNKNOWN, points, visible

CELL_WIDTH, CELL_HEIGHT = 86, 46
LABEL_WIDTH, LINE_HEIGHT = 134, 14
GAP = 8
"""Pixels between cells and their means."""
STRONGEST = 0.6
"""Opacity of the fullest cell: the number on it stays readable."""

Matrix = Sequence[Sequence[float | None]]


def heat_width(columns: Sequence[str]) -> int:
    """Pixels that a heat map of these columns takes, with room for means beside them."""
    return LABEL_WIDTH + CELL_WIDTH * len(columns) + GAP


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Matrix,
    low: Matrix,
    high: Matrix,
    *,
    label: str,
    signed: bool = False,
    marked: Sequence[tuple[int, int]] = (),
    apart: tuple[int, int] | None = None,
) -> str:
    """Shares (0 to 1), or differences when ``signed``: a cell each, with value and 95 % interval in percent or points.

    Differences are scaled to the largest one. ``marked`` cells (row, column) get a frame: the trained domain.
    Rows and columns from ``apart`` on stand a little apart: means.
    """
    first_row, first_column = apart or (len(rows), len(columns))
    left = [LABEL_WIDTH + CELL_WIDTH * j + GAP * (j >= first_column) for j in range(len(columns))]
    known = [abs(value) for line in values for value in line if value is not None]
    top = max(known, default=0.0) or 1.0
    heads, sides = [_wrap(column, 14) for column in columns], [_wrap(row, 15) for row in rows]
    head_height = LINE_HEIGHT * max(map(len, heads), default=1) + 16
    width, height = heat_width(columns), head_height + CELL_HEIGHT * len(rows) + GAP * (len(rows) > first_row)
    body = []
    for j, (column, lines) in enumerate(zip(columns, heads, strict=True)):
        x, y = left[j] + CELL_WIDTH * 0.5, head_height - 10
        body.append(_lines("middle", column, lines, x, y - LINE_HEIGHT * (len(lines) - 1)))
    for i, (row, lines) in enumerate(zip(rows, sides, strict=True)):
        y = head_height + CELL_HEIGHT * i + GAP * (i >= first_row)
        body.append(_lines("heading end", row, lines, LABEL_WIDTH - 10, y + 27 - LINE_HEIGHT * (len(lines) - 1) / 2))
        for j in range(len(columns)):
            value, ends = values[i][j], (low[i][j], high[i][j])
            body.append(_cell(left[j], y, value, ends, top if signed else 1.0, signed, (i, j) in marked))
    return _svg(body, label, f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"', "chart heat")


def forest(rows: Sequence[tuple[str, str, float, float, float]], *, label: str) -> str:
    """Differences with their intervals about 0: (name, CSS class, value, low, high) from top to bottom."""
    reach = max((abs(end) for *_, low, high in rows for end in (low, high)), default=0.0) or 1.0
    step = _round_up(reach / 2)
    reach = max(reach, step)
    body, y = [], 0
    ticks = [step * k for k in range(-int(reach // step), int(reach // step) + 1)]
    height = 40 * len(rows)
    for tick in ticks:
        x = _position(tick, reach)
        body.append(f'<line class="{"zero" if tick == 0 else "grid"}" x1="{x}%" x2="{x}%" y1="0" y2="{height}"/>')
        body.append(f'<text class="middle" x="{x}%" y="{height + 16}">{points(tick, 0)}</text>')
    for name, css, value, low, high in rows:
        title = f"{points(value)} ({points(low)} to {points(high)})"
        body.append(f'<text class="heading" x="0" y="{y + 14}">{_name(name, 70)}</text>')
        body.append(
            f'<g class="{css}"><title>{title}</title>'
            f'<line class="whisker" x1="{_position(low, reach)}%" x2="{_position(high, reach)}%" '
            f'y1="{y + 26}" y2="{y + 26}"/>'
            f'<circle class="dot" cx="{_position(value, reach)}%" cy="{y + 26}" r="5"/></g>'
        )
        y += 40
    body.append(f'<text x="100%" y="{height + 32}" class="end axis">points, 95\u202f% interval</text>')
    return _svg(body, label, f'width="100%" height="{height + 36}"', "chart")


def _cell(
    x: float,
    y: float,
    value: float | None,
    ends: tuple[float | None, float | None],
    top: float,
    signed: bool,
    mark: bool,
) -> str:
    css = "down" if signed and value is not None and value < 0 else "up"
    opacity = 0.0 if value is None else round(STRONGEST * min(1.0, abs(value) / top), 3)
    frame = " mark" if mark else ""
    center = x + CELL_WIDTH / 2
    lines = [
        f'<rect class="cell {css}" x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
        f'fill-opacity="{opacity}" rx="4"/>'
    ]
    if frame:
        lines.append(
            f'<rect class="frame" x="{x + 2}" y="{y + 2}" width="{CELL_WIDTH - 4}" height="{CELL_HEIGHT - 4}" rx="4"/>'
        )
    shown = UNKNOWN if value is None else points(value) if signed else f"{100 * value:.1f}"
    lines.append(f'<text class="value middle" x="{center}" y="{y + 20}">{shown}</text>')
    if None not in ends:
        first, last = (points(end or 0.0, 0) if signed else f"{100 * (end or 0.0):.0f}" for end in ends)
        lines.append(f'<text class="range middle" x="{center}" y="{y + 36}">{first} to {last}</text>')
    return "".join(lines)


def _position(value: float, reach: float) -> float:
    return round(50 + 48 * value / reach, 2)


def _round_up(value: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(value))
    return next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= value * 0.999)


def _name(text: str, room: int) -> str:
    """As much of a name as there is room for; the whole of it where a pointer rests."""
    whole = visible(text).replace("\n", " ")
    short = whole if len(whole) <= room else whole[: room - 1] + "…"
    return f"<title>{escape(whole)}</title>{escape(short)}"


def _wrap(text: str, room: int) -> list[str]:
    """A name on up to three lines; what has no room there is cut off."""
    return textwrap.wrap(visible(text).replace("\n", " "), room, max_lines=3, placeholder="…") or [""]


def _lines(css: str, text: str, lines: Sequence[str], x: float, y: float) -> str:
    """These lines, the first at y; the whole name where a pointer rests."""
    spans = (f'<tspan x="{x}" y="{y + LINE_HEIGHT * i}">{escape(line)}</tspan>' for i, line in enumerate(lines))
    whole = visible(text).replace("\n", " ")
    return f'<text class="{css}"><title>{escape(whole)}</title>{"".join(spans)}</text>'


def _svg(body: Sequence[str], label: str, size: str, css: str) -> str:
    # Numbers of ours and names that have been escaped: the whole is safe to place in the page.
    return Markup(
        f'<svg class="{css}" role="img" aria-label="{escape(visible(label))}" {size}>' + "".join(body) + "</svg>"
    )
