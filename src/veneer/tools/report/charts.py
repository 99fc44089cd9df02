"""Drawings of the report: lines as SVG, numbers by block and kind as a table with shaded cells.

Nothing here needs a script or the network. A chart is as wide as its column, on a phone and on
paper; its letters are drawn for a width of 25 rem. Colours are those of the style sheet, so that
light and dark are one drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, EDGE = 400, 250, 40, 36, 26, 10
#: how many colours the style sheet has for lines
COLOURS = 8

Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points], *, x: str, y: str, log_y: bool = False, top: float | None = None,
    mark: float | None = None, bottom: float | None = 0.0, faint: Sequence[Points] = (), dots: bool = False,
) -> str:  # fmt: skip
    """A chart of several lines, and the key below it. ``x``, ``y``: what the axes say. ``bottom``,
    ``top``: the ends of the y axis, if no value is beyond the first; None: those of the values.
    ``mark``: where a dashed vertical line stands. With ``log_y`` points at 0 are left out.
    ``faint``: lines behind the others, which have no key. ``dots``: points instead of lines."""
    series = {
        name: [point for point in points if not log_y or point[1] > 0]
        for name, points in series.items()
    }
    points = [point for own in (*series.values(), *faint) for point in own]
    if not points:
        return "<p>Nothing to draw: every value is 0.</p>"
    xs = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    low = low if log_y or bottom is None else min(bottom, low)
    high = high if log_y or top is None else top
    if low == high and bottom is None:  # one value: in the middle
        low, high = low - (abs(low) / 20 or 1), high + (abs(high) / 20 or 1)
    scale = _scale(math.log10(low), math.log10(high)) if log_y else _scale(low, high)

    def place(point: tuple[float, float]) -> str:
        value = math.log10(point[1]) if log_y else point[1]
        return f"{LEFT + across(point[0]) * (WIDTH - LEFT - EDGE):.1f},{_up(scale(value)):.1f}"

    across = _scale(*xs)
    drawn = [_axes(scale, log_y, xs, across, x, y)]
    if mark is not None and xs[0] <= mark <= xs[1]:
        at = LEFT + across(mark) * (WIDTH - LEFT - EDGE)
        drawn.append(
            f'<line class="s4" stroke="currentColor" stroke-dasharray="4 4" x1="{at:.1f}"'
            f' x2="{at:.1f}" '
        )
        drawn.append(f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    drawn += [f'<polyline class="axis" points="{" ".join(map(place, own))}"/>' for own in faint]
    for number, own in enumerate(series.values()):
        if not dots:
            drawn.append(
                f'<polyline class="s{number % COLOURS}" points="{" ".join(map(place, own))}"/>'
            )
            continue
        for left, up in (place(point).split(",") for point in own):
            drawn.append(f'<circle class="s{number % COLOURS}" cx="{left}" cy="{up}" r="4"/>')
    keys = "".join(
        f'<span class="s{number % COLOURS}">{escape(name)}</span>'
        for number, name in enumerate(series)
    )
    title = escape(f"{y} by {x}: {', '.join(series)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{title}">{"".join(drawn)}</svg><div'
        f' class="key">{keys if len(series) > 1 else ""}</div>'
    )


def _axes(
    up: Callable[[float], float],
    log_y: bool,
    xs: tuple[float, float],
    across: Callable[[float], float],
    x: str,
    y: str,
) -> str:
    drawn = []
    shares = (0, 0.25, 0.5, 0.75, 1)
    digits = next(
        count
        for count in (2, 3, 4, 5)
        if count == 5 or len({f"{_at(up, s):.{count}g}" for s in shares}) == 5
    )
    for share in shares:
        value = _at(up, share)
        said = f"{10**value:.1g}" if log_y else f"{value:.{digits}g}"
        drawn.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{_up(share):.1f}"'
            f' y2="{_up(share):.1f}"/>'
        )
        drawn.append(
            f'<text x="{LEFT - 6}" y="{_up(share) + 4:.1f}" text-anchor="end">{said}</text>'
        )
    # ranks, numbers of singular values
    whole = all(float(value).is_integer() for value in xs) and xs[0] >= 1
    ticks = (
        _whole_ticks(*xs)
        if whole
        else [xs[0] + (xs[1] - xs[0]) * share for share in (0, 0.25, 0.5, 0.75, 1)]
    )
    for value in ticks:
        at = LEFT + across(value) * (WIDTH - LEFT - EDGE)
        anchor = "middle" if at < WIDTH - 3 * EDGE else "end"  # within the drawing
        x_at = at if anchor == "middle" else WIDTH
        drawn.append(
            f'<text x="{x_at:.1f}" y="{HEIGHT - BOTTOM + 15}"'
            f' text-anchor="{anchor}">{_tick(value)}</text>'
        )
    drawn.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x)}</text>'
    )
    drawn.append(f'<text x="4" y="14">{escape(y)}</text>')
    return "".join(drawn)


def _tick(value: float) -> str:
    """Three digits, or all of a larger number: without an exponent, which is wider than the
    number."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _whole_ticks(low: float, high: float) -> list[float]:
    step = max(1, math.ceil((high - low) / (8 if high < 1000 else 4)))  # long numbers are wide
    return [low + step * number for number in range(int((high - low) // step) + 1)]


def _scale(low: float, high: float) -> Callable[[float], float]:
    """value -> its share of the way from ``low`` to ``high``; 0.5 where they are one."""
    return (lambda value: (value - low) / (high - low)) if high > low else (lambda value: 0.5)


def _at(scale: Callable[[float], float], share: float) -> float:
    """The value at a share of the way: the scale is linear."""
    zero, one = scale(0.0), scale(1.0)
    return (share - zero) / (one - zero) if one != zero else 0.0


def _up(share: float) -> float:
    return TOP + (1 - share) * (HEIGHT - BOTTOM - TOP)


def heat_map(
    cells: Mapping[tuple[int | None, str], float],
    *,
    caption: str,
    form: Callable[[float], str],
    most: float | None = None,
) -> str:
    """Numbers by (block, kind): a row a block, a column a kind; the darker, the nearer to ``most``
    (default: the largest). A cell of several weights has their mean: whoever calls has made it."""
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
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table. A head that begins with ">" is that of a column of numbers."""
    classes = [' class="number"' if head.startswith(">") else "" for head in heads]
    head = "".join(
        f"<th{c}>{escape(head.removeprefix('>'))}</th>"
        for head, c in zip(heads, classes, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{c}>{escape(cell)}</td>' for cell, c in zip(row, classes, strict=True))}</tr>"
        for row in rows
    )
    return (
        "<div"
        f' class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
