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
    inks = " ".join(
        f".s{number} {{ stroke: {ink}; color: {ink}; }}" for number, ink in enumerate(INKS)
    )
    style = (
        "text { font: 12px system-ui, sans-serif; fill: #8a8479; } .axis { stroke: #8a847955; } "
        "polyline, path { fill: none; stroke-width: 1.75; } circle { fill: currentColor; stroke: none; } "
        f"line {{ stroke-width: 1.75; }} line.axis {{ stroke-width: 1; }} {inks}"
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
        "text { font: 12px system-ui, sans-serif; fill: #8a8479; } "
        f"rect {{ fill: {INKS[0]}; }} rect.frame {{ fill: none; stroke: #8a847955; }}"
    )
    return _drawing(left, height, f"{value} by {y} and {x}: {', '.join(panels)}", style, parts)


def _drawing(width: float, height: float, label: str, style: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label, quote=True)}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )
