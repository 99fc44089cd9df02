"""The report of a sweep as one HTML page that stands alone, drawn from what `sweep.json` holds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

import yaml

from veneer.tools.report.charts import COLOURS, Points, lines, table
from veneer.tools.report.page import document
from veneer.train.callbacks import duration
from veneer.train.sweep.conclusions import alone_words, edge_words
from veneer.train.sweep.record import ENDED, FAILED, FINISHED, words

Facts = Mapping[str, Any]

#: points of a curve of training losses, each the mean of a stretch
POINTS = 60


def page(facts: Facts) -> str:
    candidates = sorted(facts["candidates"], key=_rank)
    sweep = facts["sweep"]
    lead = (
        f"{facts['base']} on {facts['data']}, {facts['steps']:,} steps. Tried:"
        f" {', '.join(sweep['axes'])}"
    )
    lead += f" ({facts['sampler']}). "
    if facts["rungs"]:
        lead += f"The weaker ended after steps {', '.join(map(str, facts['rungs']))}"
        if sweep["judged_by"] == "training":
            lead += (
                ", judged by their mean loss in training over the latter half of the steps up to"
                " there"
            )
            lead += ", which is their last loss here"
        lead += ". "
    lead += (
        f"Losses are means a {facts['item']}, in nats, on the rows held out unless it says"
        " otherwise."
    )
    sections = [
        _winner(facts),
        _curves(candidates),
        _quality(candidates),
        _spread(facts),
        _all(candidates, sweep),
    ]
    parts = "".join(f"<section>{part}</section>" for part in sections if part)
    footer = f"{escape(facts['output'])}. <code>sweep.json</code> has the same numbers."
    return document(
        f"Sweep of {len(candidates)} candidates", lead, _cards(facts, candidates), parts, footer
    )


def _rank(one: Facts) -> tuple[bool, float]:
    """Those that ran to their end first, the best one before others."""
    return one["status"] != FINISHED, float("inf") if one["loss"] is None else one["loss"]


def _cards(facts: Facts, candidates: Sequence[Facts]) -> Iterator[tuple[str, str]]:
    best = candidates[0]
    yield f"{best['loss']:.4f}", f"loss of the winner, {best['name']}"
    yield f"{best['parameters']:,}", "numbers that it trains"
    count = {
        status: sum(one["status"] == status for one in candidates)
        for status in (FINISHED, ENDED, FAILED)
    }
    yield (
        str(count[FINISHED]),
        "ran to the end" + "".join(f", {count[s]} {s}" for s in (ENDED, FAILED) if count[s]),
    )
    yield duration(facts["cpu_seconds"]), f"of CPU time, in {duration(facts['seconds'])}"


def _winner(facts: Facts) -> str:
    best = next(one for one in facts["candidates"] if one["name"] == facts["best"])
    text = yaml.safe_dump(dict(facts["config"]), sort_keys=False, allow_unicode=True)
    return (
        f"<h2>The winner: {escape(words(best['changes']))}</h2><p>Its adapter is in"
        f" {escape(facts['folder'])}.</p>{''.join(f'<p><b>{escape(edge_words(edge))}</b></p>' for edge in facts['edges'])}<p>{escape(alone_words(facts['alone']))}"
        " This trains it"
        f" alone:</p><pre>{escape(shlex.join(facts['command']))}</pre><details><summary>Its"
        f" configuration</summary><pre>{escape(text)}</pre></details>"
    )


def _named(one: Facts) -> str:
    return f"{one['name']}: {words(one['changes'])}"


def _curves(candidates: Sequence[Facts]) -> str:
    measured = [one for one in candidates if one["measured"]]
    held = [[(step, told["loss"]) for step, told in one["evaluations"]] for one in measured]
    trained = [_smoothed(one["losses"]) for one in measured]
    top, charts = _ceiling([one["measured"] for one in measured]), []
    for y, curves in (("loss on the rows held out", held), ("loss in training", trained)):
        named = [(one, own) for one, own in zip(measured, curves, strict=True) if own]
        if max((len(own) for _, own in named), default=0) < 2 and curves is held:
            continue  # measured at the end alone: no curve
        named = [(one, [(x, min(value, top)) for x, value in own]) for one, own in named]
        series = {_named(one): own for one, own in named[:COLOURS]}
        faint = [own for _, own in named[COLOURS:]]
        charts.append(f"<figure>{lines(series, x='step', y=y, bottom=None, faint=faint)}</figure>")
    more = f" The best {COLOURS} have colours." if len(measured) > COLOURS else ""
    return f'<h2>Curves</h2><p>Cut at {top:.3g}.{more}</p><div class="pair">{"".join(charts)}</div>'


def _ceiling(curves: Sequence[Points]) -> float:
    """Losses above it are drawn there: those of a rate that is far too high would leave the others
    one line."""
    firsts, best = [own[0][1] for own in curves], min(own[-1][1] for own in curves)
    return max(sorted(firsts)[len(firsts) // 2] * 1.1, best + 0.1)


def _smoothed(losses: Sequence[float]) -> list[tuple[float, float]]:
    width = max(1, len(losses) // POINTS)
    stretches = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [
        (min((number + 1) * width, len(losses)), mean(own)) for number, own in enumerate(stretches)
    ]


def _quality(candidates: Sequence[Facts]) -> str:
    names = {FINISHED: "ran to the end", ENDED: "ended early, where it ended"}
    series = {
        said: [
            (one["parameters"] / 1e3, one["loss"]) for one in candidates if one["status"] == status
        ]
        for status, said in names.items()
    }
    series = {said: points for said, points in series.items() if points}
    best = candidates[0]["loss"]
    top = max(best * 1.5, *(loss for _, loss in series[names[FINISHED]]))
    series = {said: [(x, min(loss, top)) for x, loss in points] for said, points in series.items()}
    chart = lines(
        series, x="trainable parameters, in thousands", y="last loss", bottom=None, dots=True
    )
    return f"<h2>Quality against trainable parameters</h2><figure>{chart}</figure>"


def _spread(facts: Facts) -> str:
    if not facts["spread"]:
        return ""
    rows = [
        [words(one["changes"]) or "as configured", str(len(one["losses"])), f"{one['mean']:.4f}",
         f"{one['deviation']:.4f}", f"{min(one['losses']):.4f}", f"{max(one['losses']):.4f}"]
        for one in sorted(facts["spread"], key=lambda one: one["mean"])
    ]  # fmt: skip
    heads = ["settings", ">seeds", ">mean", ">deviation", ">lowest", ">highest"]
    note = (
        "Candidates that ran to the end and differ in their seeds alone. What differs by less is"
        " chance."
    )
    return f"<h2>Spread over seeds</h2><p>{note}</p>{table(heads, rows)}"


def _all(candidates: Sequence[Facts], sweep: Facts) -> str:
    axes = [*sweep["axes"]]
    heads = ["candidate", *axes, ">numbers", ">steps", ">loss", ""]
    rows = [
        [
            one["name"], *(words({"": one["changes"].get(name, "")}).strip() for name in axes),
            f"{one['parameters']:,}" if one["parameters"] else "–", str(len(one["losses"])),
            "–" if one["loss"] is None else f"{one['loss']:.4f}", one["status"],
        ]
        for one in candidates
    ]  # fmt: skip
    notes = "".join(
        f"<p>{escape(one['name'])}: {escape(one['note'])}</p>" for one in candidates if one["note"]
    )
    return f"<h2>All candidates</h2>{table(heads, rows)}{notes}"
