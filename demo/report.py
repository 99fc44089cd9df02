"""report.html: one page, no network, readable on a laptop and on a phone."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

CSS = """
:root { --ink: #1c2733; --muted: #5b6b7b; --line: #dfe5ea; --accent: #0b6e62; --soft: #eef5f3; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 62rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: .4rem 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; color: var(--muted); max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0; }
.card { background: var(--soft); border-radius: .6rem; padding: .8rem .9rem; }
.card b { display: block; font-size: 1.55rem; color: var(--accent); line-height: 1.2; }
.card span { font-size: .86rem; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; padding: .42rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.phonemes { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .86rem; overflow-wrap: anywhere; }
.right { color: #0b6e62; } .wrong { color: #a3332f; }
.plot { width: 100%; height: 22rem; } .tall { height: 46rem; }
@media (max-width: 560px) {
  body { padding: .9rem; }
  th, td { padding: .36rem .3rem; font-size: .84rem; }
  td.phonemes { font-size: .74rem; }
  .plot { height: 17rem; } .tall { height: 34rem; }
}
footer { margin: 2.5rem 0 1rem; color: var(--muted); font-size: .88rem; overflow-wrap: anywhere; }
"""

_LAYOUT: dict[str, Any] = {
    "margin": {"l": 48, "r": 10, "t": 10, "b": 44},
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1c2733"},
    "plot_bgcolor": "#fff",
    "paper_bgcolor": "#fff",
    "legend": {"orientation": "h", "y": 1.08, "x": 0},
    "dragmode": False,
}


def loss_curve(losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> go.Figure:
    """Loss of each step, its running mean, and the held-out loss."""
    steps = list(range(1, len(losses) + 1))
    window = max(1, len(losses) // 25)
    means = [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]
    figure = go.Figure(layout=_LAYOUT)
    figure.add_scatter(
        x=steps,
        y=list(losses),
        mode="lines",
        name="each batch",
        line={"color": "#c4d2dc", "width": 1},
    )
    figure.add_scatter(
        x=steps,
        y=means,
        mode="lines",
        name=f"mean of {window}",
        line={"color": "#0b6e62", "width": 2.5},
    )
    figure.add_scatter(
        x=[step for step, _ in held_out], y=[loss for _, loss in held_out], mode="lines+markers", name="held-out words",
        line={"color": "#b5651d", "dash": "dot"}, marker={"size": 8},
    )  # fmt: skip
    figure.update_xaxes(title="step", gridcolor="#eef1f4")
    figure.update_yaxes(title="loss (nats per token)", gridcolor="#eef1f4", rangemode="tozero")
    return figure


def where(norms: Mapping[str, float]) -> go.Figure:
    """‖ΔW‖ by block and by kind of layer."""
    cells: dict[tuple[int, str], float] = {}
    for path, norm in norms.items():
        block = re.search(r"\.(\d+)\.", path)
        cells[int(block[1]) if block else -1, path.rpartition(".")[2]] = norm
    blocks = sorted({block for block, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    figure = go.Figure(layout=_LAYOUT)
    figure.add_heatmap(
        x=kinds, y=blocks, z=[[cells.get((block, kind)) for kind in kinds] for block in blocks], colorscale="Teal",
        colorbar={"title": "‖ΔW‖", "thickness": 12}, hovertemplate="block %{y}, %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(title="block", dtick=2)
    figure.update_xaxes(tickangle=-45)
    return figure


def write(
    path: Path,
    *,
    title: str,
    lead: str,
    cards: Sequence[tuple[str, str]],
    results: Sequence[tuple[str, float, float]],
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    samples: Sequence[tuple[str, str, str, str]],
    norms: Mapping[str, float],
    footer: str,
) -> Path:
    """Write the page.

    Args:
        cards: (figure, what it is), the numbers to see first.
        results: (who, phoneme error rate, share exact).
        samples: (word, before, after, dictionary).
        norms: ‖ΔW‖ by layer path.
    """
    rows = "".join(
        f"<tr><td>{html.escape(who)}</td><td class=number>{rate:.3f}</td><td class=number>{exact:.1%}</td></tr>"
        for who, rate, exact in results
    )
    shown = "".join(
        f"<tr><td>{html.escape(word)}</td><td class='phonemes wrong'>{html.escape(before)}</td>"
        f"<td class='phonemes {'right' if after == truth else 'wrong'}'>{html.escape(after)}</td>"
        f"<td class=phonemes>{html.escape(truth)}</td></tr>"
        for word, before, after, truth in samples
    )
    boxes = "".join(
        f"<div class=card><b>{html.escape(figure)}</b><span>{html.escape(what)}</span></div>"
        for figure, what in cards
    )
    body = f"""<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,
    initial-scale=1">
<title>{html.escape(title)}</title><style>{CSS}</style><script>{get_plotlyjs()}</script></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p><div class=cards>{boxes}</div>
<h2>Held-out words</h2><p>Phoneme error rate (lower is better) and share of words without an error.</p>
<div class=scroll><table><thead><tr><th>model</th><th class=number>phoneme error rate</th><th class=number>words
exact</th></tr></thead> <tbody>{rows}</tbody></table></div> <h2>Before and after</h2><p>Words that the model never saw
in training. Green is exactly what the dictionary says.</p> <div class=scroll><table><thead><tr><th>word</th><th>base,
8 examples</th><th>adapter</th><th>dictionary</th></tr></thead> <tbody>{shown}</tbody></table></div>
<h2>Loss</h2>{_div(loss_curve(losses, held_out), "plot")} <h2>Where the change went</h2><p>Frobenius norm of ΔW =
scale · B·A for every adapted layer: rows are blocks, columns kinds of layer.</p> {_div(where(norms), "plot tall")}
<footer>{html.escape(footer)}</footer></body></html>"""
    path.write_text(body, encoding="utf-8")
    return path


def _div(figure: go.Figure, classes: str) -> str:
    inner = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        default_height="100%",
        config={"displayModeBar": False, "responsive": True},
    )
    return f'<div class="{classes}">{inner}</div>'
