"""Plots as SVG files that stand alone: readable on light and on dark pages, the same bytes on every
machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from veneer.tools.report.charts import COLOURS, HEIGHT, LEFT, WIDTH, Points
from veneer.tools.report.charts import lines as line_chart

#: line colours that show on white and on black
INKS = ("#c8691f", "#3d86b8", "#2f9a55", "#cf4a4e", "#857d70", "#8a63b0", "#b08a1f", "#2d9a96")
ROW = 18
#: a chart of ranges: its width, and the room for names at the left and half a label at the right
RANGE_WIDTH, RANGE_LEFT, RANGE_EDGE = 640, 240, 20
TEXT_STYLE = "text { font: 12px system-ui, sans-serif; fill: #8a8479; }"


def lines(series: Mapping[str, Points], *, x: str, y: str, **options: Any) -> str:
    """A chart of lines or dots with a legend below it. `options` are those of
    `veneer.tools.report.charts.lines`."""
    drawing = re.search(
        r"<svg [^>]*>(.*)</svg>", line_chart(series, x=x, y=y, **options), re.DOTALL
    )
    if drawing is None:
        raise ValueError(
            f"Found: no point above 0 in {', '.join(series)}. Expected: one. Do: leave log_y out."
        )
    legend = [*series] if len(series) > 1 else []
    elements = [drawing[1]]
    for number, name in enumerate(legend):
        top = HEIGHT + ROW * number + 6
        elements.append(
            f'<line class="s{number % COLOURS}" x1="{LEFT}" x2="{LEFT + 22}" y1="{top}"'
            f' y2="{top}"/>'
        )
        elements.append(f'<text x="{LEFT + 30}" y="{top + 4}">{escape(name)}</text>')
    height = HEIGHT + ROW * len(legend)
    style = (
        f"{TEXT_STYLE} .axis {{ stroke: #8a847955; }}"
        " polyline, path { fill: none; stroke-width: 1.75; }"
        " circle { fill: currentColor; stroke: none; }"
        f" line {{ stroke-width: 1.75; }} line.axis {{ stroke-width: 1; }} {_colour_style()}"
    )
    return _svg(WIDTH, height, f"{y} by {x}: {', '.join(series)}", style, elements)


def ranges(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], *, x: str) -> str:
    """Panels below each other with a line for each name: its middle as a dot, and the range from
    the least to the most. The axis starts at 0 and is the same in all panels."""
    highest = max((most for values in panels.values() for _, _, most in values.values()), default=0)
    scale = (RANGE_WIDTH - RANGE_LEFT - RANGE_EDGE) / (highest or 1)
    elements, top = [], 0
    for title, values in panels.items():
        elements.append(f'<text class="title" x="4" y="{top + 16}">{escape(title)}</text>')
        top += ROW + 6
        bottom = top + ROW * len(values)
        for share in (0, 0.25, 0.5, 0.75, 1):
            across = RANGE_LEFT + highest * share * scale
            elements.append(
                f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{top}"'
                f' y2="{bottom}"/><text x="{across:.1f}" y="{bottom + 14}"'
                f' text-anchor="middle">{highest * share:.3g}</text>'
            )
        for number, (name, (middle, least, most)) in enumerate(values.items()):
            centre = top + ROW * number + ROW / 2
            colour = f"s{number % COLOURS}"
            ends = f'x1="{RANGE_LEFT + least * scale:.1f}" x2="{RANGE_LEFT + most * scale:.1f}"'
            elements.append(
                f'<text x="{RANGE_LEFT - 8}" y="{centre + 4}"'
                f' text-anchor="end">{escape(name)}</text>'
                f'<line class="{colour}" {ends} y1="{centre}" y2="{centre}"/>'
                f'<circle class="{colour}" cx="{RANGE_LEFT + middle * scale:.1f}" cy="{centre}"'
                ' r="4"/>'
            )
        top = bottom + ROW + 10
    elements.append(
        f'<text x="{(RANGE_LEFT + RANGE_WIDTH) / 2}" y="{top + 6}"'
        f' text-anchor="middle">{escape(x)}</text>'
    )
    style = (
        f"{TEXT_STYLE} .title {{ font-weight: 600; }} .axis {{ stroke: #8a847955; }}"
        " line { stroke-width: 2.5; } line.axis { stroke-width: 1; }"
        f" circle {{ fill: currentColor; }} {_colour_style()}"
    )
    return _svg(RANGE_WIDTH, top + 14, f"{x}: {', '.join(panels)}", style, elements)


def _colour_style() -> str:
    return " ".join(
        f".s{number} {{ stroke: {ink}; color: {ink}; }}" for number, ink in enumerate(INKS)
    )


def _svg(width: float, height: float, label: str, style: str, elements: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<style>{style}</style>{''.join(elements)}</svg>\n"
    )
