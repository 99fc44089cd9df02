"""Charts for reports and the demo, as HTML fragments: lines as SVG, heat maps as tables with shaded
cells. A page with them needs neither scripts nor the network.

The page must contain the style sheet ``page.css``. It sets the colours in light and dark mode, and
makes a chart as wide as the column in which it stands, up to a maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

#: size of a line chart in SVG units, and the margins between its edges and the axes
WIDTH, HEIGHT, LEFT_MARGIN, BOTTOM_MARGIN, TOP_MARGIN, RIGHT_MARGIN = 400, 250, 40, 36, 26, 10
#: the number of line colours in the style sheet
COLOUR_COUNT = 8
#: (x, y) of the points of a line
Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], *, x: str, y: str, **options: Any) -> str:
    """A chart of lines as HTML, with a legend below it if there are several lines. If there is no
    point to draw, a paragraph that says so.

    Args:
        series: points (x, y) of each line, by its name in the legend.
        x, y: labels of the axes.
        options: further arguments of ``line_elements``.
    """
    elements = line_elements(series, x=x, y=y, **options)
    if not elements:
        return "<p>Nothing to draw: every value is 0.</p>"
    legend = "".join(
        f'<span class="s{line_index % COLOUR_COUNT}">{escape(name)}</span>'
        for line_index, name in enumerate(series)
    )
    title = escape(f"{y} by {x}: {', '.join(series)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{title}">{"".join(elements)}</svg>'
        f'<div class="key">{legend if len(series) > 1 else ""}</div>'
    )


def line_elements(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    top: float | None = None,
    mark: float | None = None,
    bottom: float | None = 0.0,
    faint: Sequence[Points] = (),
    dots: bool = False,
) -> list[str]:
    """The SVG elements of a chart of lines; an empty list if there is no point to draw.

    Args:
        series: points (x, y) of each line, by its name in the legend.
        x, y: labels of the axes.
        bottom, top: the y values at the lower and upper end of the y axis. None takes the lowest,
            or the highest, y value of all points. Points below ``bottom`` extend the axis, but
            points above ``top`` do not.
        mark: the x value of a dashed vertical line; None draws none.
        faint: the points (x, y) of lines that are drawn in grey in the background, without a
            legend.
        dots: whether to draw circles at the points of ``series`` instead of lines.
    """
    points = [point for line_points in (*series.values(), *faint) for point in line_points]
    if not points:
        return []
    x_limits = min(point[0] for point in points), max(point[0] for point in points)
    y_min, y_max = min(point[1] for point in points), max(point[1] for point in points)
    y_min = y_min if bottom is None else min(bottom, y_min)
    y_max = y_max if top is None else top
    if y_min == y_max and bottom is None:  # widen the axis, so that the value lies in its middle
        y_min, y_max = y_min - (abs(y_min) / 20 or 1), y_max + (abs(y_max) / 20 or 1)
    x_scale, y_scale = _scale(*x_limits), _scale(y_min, y_max)

    def svg_point(point: tuple[float, float]) -> str:
        svg_x = LEFT_MARGIN + x_scale(point[0]) * (WIDTH - LEFT_MARGIN - RIGHT_MARGIN)
        return f"{svg_x:.1f},{_y_position(y_scale(point[1])):.1f}"

    elements = [_draw_axes(y_scale, x_limits, x_scale, x, y)]
    if mark is not None and x_limits[0] <= mark <= x_limits[1]:
        mark_x = LEFT_MARGIN + x_scale(mark) * (WIDTH - LEFT_MARGIN - RIGHT_MARGIN)
        elements.append(
            f'<line class="s4" stroke="currentColor" stroke-dasharray="4 4" x1="{mark_x:.1f}"'
            f' x2="{mark_x:.1f}" y1="{TOP_MARGIN}" y2="{HEIGHT - BOTTOM_MARGIN}"/>'
        )
    elements += [_polyline("axis", map(svg_point, line_points)) for line_points in faint]
    for line_index, line_points in enumerate(series.values()):
        svg_points = [svg_point(point) for point in line_points]
        css_class = f"s{line_index % COLOUR_COUNT}"
        elements += _circles(css_class, svg_points) if dots else [_polyline(css_class, svg_points)]
    return elements


def _polyline(css_class: str, svg_points: Iterable[str]) -> str:
    return f'<polyline class="{css_class}" points="{" ".join(svg_points)}"/>'


def _circles(css_class: str, svg_points: Iterable[str]) -> list[str]:
    centres = (point.split(",") for point in svg_points)
    return [f'<circle class="{css_class}" cx="{x}" cy="{y}" r="4"/>' for x, y in centres]


def _draw_axes(
    y_scale: Callable[[float], float],
    x_limits: tuple[float, float],
    x_scale: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> str:
    elements = []
    axis_shares = (0, 0.25, 0.5, 0.75, 1)
    digit_count = next(
        count
        for count in (2, 3, 4, 5)
        if count == 5
        or len({f"{_value_at(y_scale, share):.{count}g}" for share in axis_shares}) == 5
    )
    for share in axis_shares:
        elements.append(
            f'<line class="axis" x1="{LEFT_MARGIN}" x2="{WIDTH - RIGHT_MARGIN}"'
            f' y1="{_y_position(share):.1f}" y2="{_y_position(share):.1f}"/>'
        )
        elements.append(
            f'<text x="{LEFT_MARGIN - 6}" y="{_y_position(share) + 4:.1f}" text-anchor="end">'
            f"{_value_at(y_scale, share):.{digit_count}g}</text>"
        )
    # if x counts something, such as ranks, a tick between two integers would have no meaning
    is_integer_axis = all(float(value).is_integer() for value in x_limits) and x_limits[0] >= 1
    tick_values = (
        _integer_ticks(*x_limits)
        if is_integer_axis
        else [x_limits[0] + (x_limits[1] - x_limits[0]) * share for share in axis_shares]
    )
    for x_value in tick_values:
        tick_x = LEFT_MARGIN + x_scale(x_value) * (WIDTH - LEFT_MARGIN - RIGHT_MARGIN)
        # a centred label near the right edge would be cut off
        anchor = "middle" if tick_x < WIDTH - 3 * RIGHT_MARGIN else "end"
        label_x = tick_x if anchor == "middle" else WIDTH
        elements.append(
            f'<text x="{label_x:.1f}" y="{HEIGHT - BOTTOM_MARGIN + 15}"'
            f' text-anchor="{anchor}">{_format_tick(x_value)}</text>'
        )
    elements.append(
        f'<text x="{(LEFT_MARGIN + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    elements.append(f'<text x="4" y="14">{escape(y_label)}</text>')
    return "".join(elements)


def _format_tick(value: float) -> str:
    """The label of a tick: the value with three significant digits. A value from 1000 to 10⁷ is
    written as an integer with all digits, because three digits and an exponent would be wider."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _integer_ticks(low: float, high: float) -> list[float]:
    """Values for ticks at equal distances from ``low``, an integer, up to at most ``high``: no more
    than 9, or no more than 5 from ``high`` = 1000 on."""
    step_count = 8 if high < 1000 else 4  # labels of large numbers are wide, so use fewer ticks
    step = max(1, math.ceil((high - low) / step_count))
    return [low + step * index for index in range(int((high - low) // step) + 1)]


def _scale(low: float, high: float) -> Callable[[float], float]:
    """A linear function that maps ``low`` to 0 and ``high`` to 1. If ``low`` equals ``high``, it
    maps every value to 0.5."""
    return (lambda value: (value - low) / (high - low)) if high > low else (lambda value: 0.5)


def _value_at(scale: Callable[[float], float], share: float) -> float:
    """The value that ``scale``, a result of ``_scale``, maps to ``share``; 0.0 if ``scale`` maps
    every value to 0.5."""
    value_at_0, slope = scale(0.0), scale(1.0)
    return (share - value_at_0) / (slope - value_at_0) if slope != value_at_0 else 0.0


def _y_position(share: float) -> float:
    """The y coordinate, in SVG units, of the point at ``share`` of the length of the y axis, from 0
    at its lower end to 1 at its upper end."""
    return TOP_MARGIN + (1 - share) * (HEIGHT - BOTTOM_MARGIN - TOP_MARGIN)


def heat_map(
    cells: Mapping[tuple[int | None, str], float],
    *,
    caption: str,
    format_number: Callable[[float], str],
    darkest: float | None = None,
) -> str:
    """An HTML table of numbers with a row for each transformer block and a column for each kind of
    layer. The larger a number, the darker its cell.

    Args:
        cells: at least one number, by (block, kind), such as (0, "q_proj"); block None is for
            layers outside the blocks.
        caption: the text above the table.
        format_number: returns the text of a number.
        darkest: the number at which a cell is darkest; None: the largest number.
    """
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells}, key=lambda block: -1 if block is None else block)
    darkest = max(cells.values()) if darkest is None else darkest
    header_cells = "".join(f"<th>{escape(kind).replace('_', '_<wbr>')}</th>" for kind in kinds)
    rows = []
    for block in blocks:
        row_cells = []
        for kind in kinds:
            number = cells.get((block, kind))
            shade = 0.0 if number is None or not darkest else max(0.0, min(1.0, number / darkest))
            row_cells.append(
                "<td></td>"
                if number is None
                else f'<td style="--v:{shade:.3f}">{format_number(number)}</td>'
            )
        rows.append(f"<tr><th>{'–' if block is None else block}</th>{''.join(row_cells)}</tr>")
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll"><table class="map">'
        f"<thead><tr><th></th>{header_cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</div></figure>"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table. The texts of ``headings`` and ``rows`` are escaped. A heading that begins with
    ">" is shown without it, and its column is aligned to the right, for numbers."""
    cell_attributes = [' class="number"' if heading.startswith(">") else "" for heading in headings]
    header_cells = "".join(
        f"<th{attribute}>{escape(heading.removeprefix('>'))}</th>"
        for heading, attribute in zip(headings, cell_attributes, strict=True)
    )
    cells_by_row = [
        "".join(
            f"<td{attribute}>{escape(text)}</td>"
            for text, attribute in zip(row, cell_attributes, strict=True)
        )
        for row in rows
    ]
    body = "".join(f"<tr>{cells}</tr>" for cells in cells_by_row)
    return (
        f'<div class="scroll"><table><thead><tr>{header_cells}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )
