"""Charts of reports, of the demo and of the pages in docs: lines and ranges as SVG, heat maps as
tables with shaded cells. They need neither scripts nor the network.

    lines, heat_map, table      parts of a page with the style sheet ``page.css``, which sets the
                                colours, so one drawing serves light and dark mode. A chart is as
                                wide as its column, on a phone and on paper
    lines_file, ranges_file     SVG files that stand alone, readable on light and on dark pages, the
                                same bytes on every machine
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, EDGE = 400, 250, 40, 36, 26, 10
#: the number of line colours in the style sheet
COLOURS = 8
#: line colours of files, which show on white and on black
INKS = ("#c8691f", "#3d86b8", "#2f9a55", "#cf4a4e", "#857d70", "#8a63b0", "#b08a1f", "#2d9a96")
ROW = 18
#: a chart of ranges: its width, and the room for names at the left and half a label at the right
RANGE_WIDTH, RANGE_LEFT, RANGE_EDGE = 640, 240, 20
_TEXT_STYLE = "text { font: 12px system-ui, sans-serif; fill: #8a8479; }"

Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], *, x: str, y: str, **options: Any) -> str:
    """A chart of several lines with a legend below it. ``options`` are those of
    ``_line_elements``."""
    elements = _line_elements(series, x=x, y=y, **options)
    if not elements:
        return "<p>Nothing to draw: every value is 0.</p>"
    legend = "".join(
        f'<span class="s{number % COLOURS}">{escape(name)}</span>'
        for number, name in enumerate(series)
    )
    title = escape(f"{y} by {x}: {', '.join(series)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{title}">{"".join(elements)}</svg><div'
        f' class="key">{legend if len(series) > 1 else ""}</div>'
    )


def lines_file(series: Mapping[str, Points], *, x: str, y: str, **options: Any) -> str:
    """``lines`` as the text of a file, with the legend in the drawing."""
    elements = _line_elements(series, x=x, y=y, **options)
    if not elements:
        raise ValueError(
            f"Found: no point above 0 in {', '.join(series)}. Expected: one. Do: leave log_y out."
        )
    legend = [*series] if len(series) > 1 else []
    for number, name in enumerate(legend):
        top = HEIGHT + ROW * number + 6
        elements.append(
            f'<line class="s{number % COLOURS}" x1="{LEFT}" x2="{LEFT + 22}" y1="{top}"'
            f' y2="{top}"/>'
        )
        elements.append(f'<text x="{LEFT + 30}" y="{top + 4}">{escape(name)}</text>')
    style = (
        f"{_TEXT_STYLE} .axis {{ stroke: #8a847955; }}"
        " polyline, path { fill: none; stroke-width: 1.75; }"
        " circle { fill: currentColor; stroke: none; }"
        f" line {{ stroke-width: 1.75; }} line.axis {{ stroke-width: 1; }} {_colour_style()}"
    )
    title = f"{y} by {x}: {', '.join(series)}"
    return _svg_file(WIDTH, HEIGHT + ROW * len(legend), title, style, elements)


def _line_elements(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    log_y: bool = False,
    top: float | None = None,
    mark: float | None = None,
    bottom: float | None = 0.0,
    faint: Sequence[Points] = (),
    dots: bool = False,
) -> list[str]:
    """The SVG elements of a chart of lines; none if there is no point to draw.

    Args:
        series: points (x, y) of each line, by its name in the legend.
        x, y: labels of the axes.
        log_y: use a logarithmic y axis; points with y = 0 are dropped.
        bottom, top: limits of the y axis; None takes the extremes of the values. Values below
            ``bottom`` extend the axis.
        mark: x of a dashed vertical line.
        faint: lines in the background, without a legend.
        dots: draw points instead of lines.
    """
    series = {
        name: [point for point in points if not log_y or point[1] > 0]
        for name, points in series.items()
    }
    points = [point for line_points in (*series.values(), *faint) for point in line_points]
    if not points:
        return []
    xs = min(p[0] for p in points), max(p[0] for p in points)
    y_min, y_max = min(p[1] for p in points), max(p[1] for p in points)
    y_min = y_min if log_y or bottom is None else min(bottom, y_min)
    y_max = y_max if log_y or top is None else top
    if y_min == y_max and bottom is None:  # centre a single value
        y_min, y_max = y_min - (abs(y_min) / 20 or 1), y_max + (abs(y_max) / 20 or 1)
    y_scale = _scale(math.log10(y_min), math.log10(y_max)) if log_y else _scale(y_min, y_max)

    def svg_point(point: tuple[float, float]) -> str:
        value = math.log10(point[1]) if log_y else point[1]
        x = LEFT + x_scale(point[0]) * (WIDTH - LEFT - EDGE)
        return f"{x:.1f},{_y_position(y_scale(value)):.1f}"

    x_scale = _scale(*xs)
    elements = [_axes(y_scale, log_y, xs, x_scale, x, y)]
    if mark is not None and xs[0] <= mark <= xs[1]:
        mark_x = LEFT + x_scale(mark) * (WIDTH - LEFT - EDGE)
        elements.append(
            f'<line class="s4" stroke="currentColor" stroke-dasharray="4 4" x1="{mark_x:.1f}"'
            f' x2="{mark_x:.1f}" '
        )
        elements.append(f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    elements += [_polyline("axis", map(svg_point, line_points)) for line_points in faint]
    for number, line_points in enumerate(series.values()):
        svg_points = [svg_point(point) for point in line_points]
        style = f"s{number % COLOURS}"
        elements += _circles(style, svg_points) if dots else [_polyline(style, svg_points)]
    return elements


def _polyline(style: str, svg_points: Iterable[str]) -> str:
    return f'<polyline class="{style}" points="{" ".join(svg_points)}"/>'


def _circles(style: str, svg_points: Iterable[str]) -> list[str]:
    centres = (point.split(",") for point in svg_points)
    return [f'<circle class="{style}" cx="{x}" cy="{y}" r="4"/>' for x, y in centres]


def _axes(
    y_scale: Callable[[float], float],
    log_y: bool,
    xs: tuple[float, float],
    x_scale: Callable[[float], float],
    x: str,
    y: str,
) -> str:
    elements = []
    shares = (0, 0.25, 0.5, 0.75, 1)
    digits = next(
        count
        for count in (2, 3, 4, 5)
        if count == 5 or len({f"{_value_at(y_scale, s):.{count}g}" for s in shares}) == 5
    )
    for share in shares:
        value = _value_at(y_scale, share)
        label = f"{10**value:.1g}" if log_y else f"{value:.{digits}g}"
        elements.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{_y_position(share):.1f}"'
            f' y2="{_y_position(share):.1f}"/>'
        )
        elements.append(
            f'<text x="{LEFT - 6}" y="{_y_position(share) + 4:.1f}" text-anchor="end">'
            f"{label}</text>"
        )
    # integer axes: ranks, indices of singular values
    integer_axis = all(float(value).is_integer() for value in xs) and xs[0] >= 1
    ticks = (
        _integer_ticks(*xs)
        if integer_axis
        else [xs[0] + (xs[1] - xs[0]) * share for share in (0, 0.25, 0.5, 0.75, 1)]
    )
    for value in ticks:
        tick_x = LEFT + x_scale(value) * (WIDTH - LEFT - EDGE)
        anchor = (
            "middle" if tick_x < WIDTH - 3 * EDGE else "end"
        )  # keep the last label within the drawing
        label_x = tick_x if anchor == "middle" else WIDTH
        elements.append(
            f'<text x="{label_x:.1f}" y="{HEIGHT - BOTTOM + 15}"'
            f' text-anchor="{anchor}">{_format_tick(value)}</text>'
        )
    elements.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x)}</text>'
    )
    elements.append(f'<text x="4" y="14">{escape(y)}</text>')
    return "".join(elements)


def _format_tick(value: float) -> str:
    """Three significant digits; large numbers in full, because an exponent would be wider."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _integer_ticks(low: float, high: float) -> list[float]:
    step = max(
        1, math.ceil((high - low) / (8 if high < 1000 else 4))
    )  # long numbers need more room
    return [low + step * number for number in range(int((high - low) // step) + 1)]


def _scale(low: float, high: float) -> Callable[[float], float]:
    """A linear map of ``low`` .. ``high`` to 0 .. 1; 0.5 everywhere if they are equal."""
    return (lambda value: (value - low) / (high - low)) if high > low else (lambda value: 0.5)


def _value_at(scale: Callable[[float], float], share: float) -> float:
    """The inverse of a linear ``scale``: the value that it maps to ``share``."""
    value_at_0, slope = scale(0.0), scale(1.0)
    return (share - value_at_0) / (slope - value_at_0) if slope != value_at_0 else 0.0


def _y_position(share: float) -> float:
    return TOP + (1 - share) * (HEIGHT - BOTTOM - TOP)


def heat_map(
    cells: Mapping[tuple[int | None, str], float],
    *,
    caption: str,
    form: Callable[[float], str],
    most: float | None = None,
) -> str:
    """Numbers by (block, kind) as a table with a row for each block and a column for each kind.
    Cells are darker the nearer they are to ``most`` (default: the largest number)."""
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells}, key=lambda block: -1 if block is None else block)
    most = max(cells.values()) if most is None else most
    head = "".join(f"<th>{escape(kind).replace('_', '_<wbr>')}</th>" for kind in kinds)
    rows = []
    for block in blocks:
        row = []
        for kind in kinds:
            value = cells.get((block, kind))
            shade = 0.0 if value is None or not most else max(0.0, min(1.0, value / most))
            row.append(
                "<td></td>" if value is None else f'<td style="--v:{shade:.3f}">{form(value)}</td>'
            )
        rows.append(f"<tr><th>{'–' if block is None else block}</th>{''.join(row)}</tr>")
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll"><table class="map">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "</figure>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table. A heading that begins with ">" marks a column of numbers."""
    classes = [' class="number"' if head.startswith(">") else "" for head in heads]
    head = "".join(
        f"<th{c}>{escape(head.removeprefix('>'))}</th>"
        for head, c in zip(heads, classes, strict=True)
    )
    body = ""
    for row in rows:
        cells = zip(row, classes, strict=True)
        body += f"<tr>{''.join(f'<td{c}>{escape(cell)}</td>' for cell, c in cells)}</tr>"
    return (
        "<div"
        f' class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def ranges_file(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], *, x: str) -> str:
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
        f"{_TEXT_STYLE} .title {{ font-weight: 600; }} .axis {{ stroke: #8a847955; }}"
        " line { stroke-width: 2.5; } line.axis { stroke-width: 1; }"
        f" circle {{ fill: currentColor; }} {_colour_style()}"
    )
    return _svg_file(RANGE_WIDTH, top + 14, f"{x}: {', '.join(panels)}", style, elements)


def _colour_style() -> str:
    return " ".join(
        f".s{number} {{ stroke: {ink}; color: {ink}; }}" for number, ink in enumerate(INKS)
    )


def _svg_file(width: float, height: float, label: str, style: str, elements: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-label="{escape(label, quote=True)}">'
        f"<style>{style}</style>{''.join(elements)}</svg>\n"
    )
