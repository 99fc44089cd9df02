"""report.html: one page, no network, readable on a laptop and on a phone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from veneer.tools.report.charts import heat_map, lines, table
from veneer.tools.report.report_page import document


def loss_curve(losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> str:
    """The running mean of the loss of the steps, the loss of each in the background, and the
    held-out loss."""
    window = max(1, len(losses) // 25)
    means = []
    for step in range(1, len(losses) + 1):
        latest = losses[max(0, step - window) : step]
        means.append((step, sum(latest) / len(latest)))
    return lines(
        {f"mean of {window} batches": means, "held-out words": held_out},
        x="step",
        y="loss (nats per token)",
        faint=[list(enumerate(losses, 1))],
    )


def norms_by_block(norms: Mapping[str, float]) -> str:
    """‖ΔW‖ by block and by kind of layer."""
    cells: dict[tuple[int | None, str], float] = {}
    for path, norm in norms.items():
        block = re.search(r"\.(\d+)\.", path)
        cells[int(block[1]) if block else None, path.rpartition(".")[2]] = norm
    return heat_map(cells, caption="‖ΔW‖", format_number="{:.2f}".format)


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
        cards: (number, caption), the numbers to see first.
        results: (model, phoneme error rate, share exact).
        samples: (word, before, after, dictionary).
        norms: ‖ΔW‖ by layer path.
    """
    scores = table(
        ["model", ">phoneme error rate", ">words exact"],
        [(model, f"{rate:.3f}", f"{exact:.1%}") for model, rate, exact in results],
    )
    words = table(
        ["word", "base, 8 examples", "adapter", "right", "dictionary"],
        [
            (word, before, after, "✓" if after == truth else "✗", truth)
            for word, before, after, truth in samples
        ],
    )
    sections = {
        "Held-out words": (
            "Phoneme error rate (lower is better) and share of words without an error.",
            scores,
        ),
        "Before and after": (
            "Words that the model never saw in training, and whether the adapter says exactly what"
            " the dictionary says.",
            words,
        ),
        "Loss": (
            "Each batch, a running mean, and the words held out.",
            loss_curve(losses, held_out),
        ),
        "Where the change went": (
            "Frobenius norm of ΔW = scale · B·A for every adapted layer: rows are blocks, columns"
            " kinds of layer.",
            norms_by_block(norms),
        ),
    }
    body = [
        f"<h2>{heading}</h2><p>{text}</p>{content}" for heading, (text, content) in sections.items()
    ]
    path.write_text(document(title, lead, cards, body, escape(footer)), encoding="utf-8")
    return path
