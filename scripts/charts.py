"""Charts as SVG files for the pages in docs/: lines, and ranges in panels below each other. They
are readable on light and on dark pages, and have the same bytes on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from veneer.tools.report.charts import (
    COLOUR_COUNT,
    HEIGHT,
    LEFT_MARGIN,
    WIDTH,
    Points,
    line_elements,
)

#: line colours of SVG files, visible on white and on black
FILE_COLOURS = (
    "#c8691f",
    "#3d86b8",
    "#2f9a55",
    "#cf4a4e",
    "#857d70",
    "#8a63b0",
    "#b08a1f",
    "#2d9a96",
)
#: height of a line of text or a range, in SVG units
ROW_HEIGHT = 18
#: a chart of ranges, in SVG units: its width, the left margin (for names), and the right margin
RANGE_WIDTH, RANGE_LEFT_MARGIN, RANGE_RIGHT_MARGIN = 640, 240, 20
_TEXT_STYLE = "text { font: 12px system-ui, sans-serif; fill: #8a8479; }"


def lines_file(series: Mapping[str, Points], *, x: str, y: str, **options: Any) -> str:
    """The text of an SVG file with a chart of several lines and its legend. ``options``: further
    arguments of ``line_elements``."""
    elements = line_elements(series, x=x, y=y, **options)
    if not elements:
        raise ValueError(
            f"Found: no point in {', '.join(series)}. Expected: one. Do: leave the chart out."
        )
    legend = [*series] if len(series) > 1 else []
    for number, name in enumerate(legend):
        top = HEIGHT + ROW_HEIGHT * number + 6
        elements.append(
            f'<line class="s{number % COLOUR_COUNT}" x1="{LEFT_MARGIN}" x2="{LEFT_MARGIN + 22}"'
            f' y1="{top}" y2="{top}"/>'
        )
        elements.append(f'<text x="{LEFT_MARGIN + 30}" y="{top + 4}">{escape(name)}</text>')
    style = (
        f"{_TEXT_STYLE} .axis {{ stroke: #8a847955; }}"
        " polyline, path { fill: none; stroke-width: 1.75; }"
        " circle { fill: currentColor; stroke: none; }"
        f" line {{ stroke-width: 1.75; }} line.axis {{ stroke-width: 1; }} {_colour_style()}"
    )
    title = f"{y} by {x}: {', '.join(series)}"
    return _svg_file(WIDTH, HEIGHT + ROW_HEIGHT * len(legend), title, style, elements)


def ranges_file(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], *, x: str) -> str:
    """The text of an SVG file with panels below each other. A panel has a row for each name: a line
    from the least to the greatest value, and a dot at the middle one. ``panels``: (middle, least,
    greatest) by name, by panel title. The x axis starts at 0 and is the same in all panels."""
    axis_end = max(
        (greatest for ranges in panels.values() for _, _, greatest in ranges.values()), default=0
    )
    scale = (RANGE_WIDTH - RANGE_LEFT_MARGIN - RANGE_RIGHT_MARGIN) / (axis_end or 1)
    elements, top = [], 0
    for title, ranges in panels.items():
        elements.append(f'<text class="title" x="4" y="{top + 16}">{escape(title)}</text>')
        top += ROW_HEIGHT + 6
        bottom = top + ROW_HEIGHT * len(ranges)
        for share in (0, 0.25, 0.5, 0.75, 1):
            grid_x = RANGE_LEFT_MARGIN + axis_end * share * scale
            elements.append(
                f'<line class="axis" x1="{grid_x:.1f}" x2="{grid_x:.1f}" y1="{top}"'
                f' y2="{bottom}"/><text x="{grid_x:.1f}" y="{bottom + 14}"'
                f' text-anchor="middle">{_tick_text(axis_end * share)}</text>'
            )
        for number, (name, (middle, least, greatest)) in enumerate(ranges.items()):
            centre = top + ROW_HEIGHT * number + ROW_HEIGHT / 2
            css_class = f"s{number % COLOUR_COUNT}"
            x1, middle_x, x2 = (
                RANGE_LEFT_MARGIN + number_in_range * scale
                for number_in_range in (least, middle, greatest)
            )
            elements.append(
                f'<text x="{RANGE_LEFT_MARGIN - 8}" y="{centre + 4}"'
                f' text-anchor="end">{escape(name)}</text>'
                f'<line class="{css_class}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{centre}"'
                f' y2="{centre}"/>'
                f'<circle class="{css_class}" cx="{middle_x:.1f}" cy="{centre}"'
                ' r="4"/>'
            )
        top = bottom + ROW_HEIGHT + 10
    elements.append(
        f'<text x="{(RANGE_LEFT_MARGIN + RANGE_WIDTH) / 2}" y="{top + 6}"'
        f' text-anchor="middle">{escape(x)}</text>'
    )
    style = (
        f"{_TEXT_STYLE} .title {{ font-weight: 600; }} .axis {{ stroke: #8a847955; }}"
        " line { stroke-width: 2.5; } line.axis { stroke-width: 1; }"
        f" circle {{ fill: currentColor; }} {_colour_style()}"
    )
    return _svg_file(RANGE_WIDTH, top + 14, f"{x}: {', '.join(panels)}", style, elements)


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _colour_style() -> str:
    return " ".join(
        f".s{number} {{ stroke: {colour}; color: {colour}; }}"
        for number, colour in enumerate(FILE_COLOURS)
    )


def _svg_file(width: float, height: float, label: str, style: str, elements: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<style>{style}</style>{''.join(elements)}</svg>\n"
    )
