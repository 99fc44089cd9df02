"""Drawings as SVG files that stand alone: readable on light and on dark pages, the same bytes on
every machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from veneer.tools.report.charts import COLOURS, HEIGHT, LEFT, WIDTH, Points
from veneer.tools.report.charts import lines as chart

#: a colour a line, which shows on white and on black
INKS = ("#c8691f", "#3d86b8", "#2f9a55", "#cf4a4e", "#857d70", "#8a63b0", "#b08a1f", "#2d9a96")
ROW = 18
#: of a panel of a heat map, and the room above and beside it
SIDE, ABOVE, BESIDE = 200, 44, 40
#: of a chart of ranges: its width, and the room for names at the left and for half a number
RANGE_WIDTH, RANGE_LEFT, RANGE_EDGE = 640, 240, 20
TEXT_STYLE = "text { font: 12px system-ui, sans-serif; fill: #8a8479; }"


def lines(series: Mapping[str, Points], *, x: str, y: str, **more: Any) -> str:
    """A chart of lines (or dots), its key below it. `more`: what `veneer.tools.report.charts.lines`
    takes."""
    drawn = re.search(r"<svg [^>]*>(.*)</svg>", chart(series, x=x, y=y, **more), re.DOTALL)
    if drawn is None:
        raise ValueError(
            f"Found: no point above 0 in {', '.join(series)}. Expected: one. Do: leave log_y out."
        )
    keys = [*series] if len(series) > 1 else []
    parts = [drawn[1]]
    for number, name in enumerate(keys):
        at = HEIGHT + ROW * number + 6
        parts.append(
            f'<line class="s{number % COLOURS}" x1="{LEFT}" x2="{LEFT + 22}" y1="{at}" y2="{at}"/>'
        )
        parts.append(f'<text x="{LEFT + 30}" y="{at + 4}">{escape(name)}</text>')
    height = HEIGHT + ROW * len(keys)
    style = (
        f"{TEXT_STYLE} .axis {{ stroke: #8a847955; }} "
        "polyline, path { fill: none; stroke-width: 1.75; } circle { fill: currentColor; stroke: none; } "
        f"line {{ stroke-width: 1.75; }} line.axis {{ stroke-width: 1; }} {_inks()}"
    )
    return _drawing(WIDTH, height, f"{y} by {x}: {', '.join(series)}", style, parts)


def heat_maps(
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    ticks: Sequence[int],
    x: str,
    y: str,
    value: str,
) -> str:
    """Grids of numbers in [0, 1] side by side, the first row at the bottom; the darker, the nearer
    to 1. `ticks`: what rows and columns stand for, as many as the longer has. `value`: what a
    number is."""
    parts, left = [], 0
    for title, grid in panels.items():
        rows, columns = len(grid), len(grid[0])
        wide, high = SIDE / columns, SIDE / rows
        parts.append(f'<text x="{left + BESIDE}" y="16">{escape(title)}</text>')
        parts.append(f'<text x="{left + 4}" y="{ABOVE - 8}">{escape(y)}</text>')
        for row, own in enumerate(grid):
            up = ABOVE + SIDE - (row + 1) * high
            for column, number in enumerate(own):
                place = f'x="{left + BESIDE + column * wide:.1f}" y="{up:.1f}" width="{wide:.2f}" height="{high:.2f}"'
                shade = max(0.0, min(1.0, number))
                parts.append(f'<rect {place} fill-opacity="{shade:.2f}"/>')
            if rows <= 8 or row % 3 == 0 or row == rows - 1:
                parts.append(
                    f'<text x="{left + BESIDE - 6}" y="{up + high / 2 + 4:.1f}" text-anchor="end">{ticks[row]}</text>'
                )
        for column in range(columns):
            if columns <= 8 or column % 3 == 0 or column == columns - 1:
                middle = left + BESIDE + (column + 0.5) * wide
                parts.append(
                    f'<text x="{middle:.1f}" y="{ABOVE + SIDE + 16}" text-anchor="middle">{ticks[column]}</text>'
                )
        parts.append(
            f'<rect class="frame" x="{left + BESIDE}" y="{ABOVE}" width="{SIDE}" height="{SIDE}"/>'
            f'<text x="{left + BESIDE + SIDE / 2}" y="{ABOVE + SIDE + 34}" text-anchor="middle">{escape(x)}</text>'
        )
        left += BESIDE + SIDE + 20
    height = ABOVE + SIDE + 44
    style = (
        f"{TEXT_STYLE} rect {{ fill: {INKS[0]}; }} rect.frame {{ fill: none; stroke: #8a847955; }}"
    )
    return _drawing(left, height, f"{value} by {y} and {x}: {', '.join(panels)}", style, parts)


def ranges(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], *, x: str) -> str:
    """Panels below each other, a line for each name: its middle as a dot, from its least to its
    most. The axis, which all panels share, begins at 0."""
    highest = max((most for values in panels.values() for _, _, most in values.values()), default=0)
    scale = (RANGE_WIDTH - RANGE_LEFT - RANGE_EDGE) / (highest or 1)
    parts, top = [], 0
    for title, values in panels.items():
        parts.append(f'<text class="title" x="4" y="{top + 16}">{escape(title)}</text>')
        top += ROW + 6
        bottom = top + ROW * len(values)
        for share in (0, 0.25, 0.5, 0.75, 1):
            across = RANGE_LEFT + highest * share * scale
            parts.append(
                f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{top}" y2="{bottom}"/>'
                f'<text x="{across:.1f}" y="{bottom + 14}" text-anchor="middle">{highest * share:.3g}</text>'
            )
        for number, (name, (middle, least, most)) in enumerate(values.items()):
            line = top + ROW * number + ROW / 2
            colour = f"s{number % COLOURS}"
            ends = f'x1="{RANGE_LEFT + least * scale:.1f}" x2="{RANGE_LEFT + most * scale:.1f}"'
            parts.append(
                f'<text x="{RANGE_LEFT - 8}" y="{line + 4}" text-anchor="end">{escape(name)}</text>'
                f'<line class="{colour}" {ends} y1="{line}" y2="{line}"/>'
                f'<circle class="{colour}" cx="{RANGE_LEFT + middle * scale:.1f}" cy="{line}" r="4"/>'
            )
        top = bottom + ROW + 10
    parts.append(
        f'<text x="{(RANGE_LEFT + RANGE_WIDTH) / 2}" y="{top + 6}" text-anchor="middle">{escape(x)}</text>'
    )
    style = (
        f"{TEXT_STYLE} .title {{ font-weight: 600; }} .axis {{ stroke: #8a847955; }} "
        f"line {{ stroke-width: 2.5; }} line.axis {{ stroke-width: 1; }} circle {{ fill: currentColor; }} {_inks()}"
    )
    return _drawing(RANGE_WIDTH, top + 14, f"{x}: {', '.join(panels)}", style, parts)


def _inks() -> str:
    return " ".join(
        f".s{number} {{ stroke: {ink}; color: {ink}; }}" for number, ink in enumerate(INKS)
    )


def _drawing(width: float, height: float, label: str, style: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label, quote=True)}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )
