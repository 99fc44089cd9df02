"""Drawings as SVG files that stand alone: readable on light and on dark pages, the same bytes on every machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from veneer.tools.report.charts import COLOURS, HEIGHT, LEFT, WIDTH, Points
from veneer.tools.report.charts import lines as chart

#: a colour a line, which shows on white and on black
INKS = ("#c8691f", "#3d86b8", "#2f9a55", "#cf4a4e", "#857d70", "#8a63b0", "#b08a1f", "#2d9a96")
ROW = 18


def lines(series: Mapping[str, Points], *, x: str, y: str, **more: Any) -> str:
    """A chart of lines (or dots), its key below it. `more`: what `veneer.tools.report.charts.lines` takes."""
    drawn = re.search(r"<svg [^>]*>(.*)</svg>", chart(series, x=x, y=y, **more), re.DOTALL)
    if drawn is None:
        raise ValueError(f"Found: no point above 0 in {', '.join(series)}. Expected: one. Do: leave log_y out.")
    keys = [*series] if len(series) > 1 else []
    parts = [drawn[1]]
    for number, name in enumerate(keys):
        at = HEIGHT + ROW * number + 6
        parts.append(f'<line class="s{number % COLOURS}" x1="{LEFT}" x2="{LEFT + 22}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT + 30}" y="{at + 4}">{escape(name)}</text>')
    height = HEIGHT + ROW * len(keys)
    inks = " ".join(f".s{number} {{ stroke: {ink}; color: {ink}; }}" for number, ink in enumerate(INKS))
    style = (
        "text { font: 12px system-ui, sans-serif; fill: #8a8479; } .axis { stroke: #8a847955; } "
        "polyline, path { fill: none; stroke-width: 1.75; } circle { fill: currentColor; stroke: none; } "
        f"line {{ stroke-width: 1.75; }} line.axis {{ stroke-width: 1; }} {inks}"
    )
    label = escape(f"{y} by {x}: {', '.join(series)}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{label}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )
