"""The report of a sweep as one self-contained HTML page, made from the contents of `sweep.json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

import yaml

from veneer.tools.report.charts import COLOUR_COUNT, Points, lines, table
from veneer.tools.report.report_page import document
from veneer.train.callbacks import format_duration
from veneer.train.sweep.conclusions import describe_edge, describe_repetition
from veneer.train.sweep.sweep_record import ENDED, FAILED, FINISHED, format_changes

#: the contents of `sweep.json`, or an object in it
Facts = Mapping[str, Any]

#: approximate number of points of a training curve, each the mean loss of consecutive steps
CURVE_POINTS = 60


def page(facts: Facts) -> str:
    """The HTML text of the report. ``facts``: the contents of `sweep.json`."""
    candidates = sorted(facts["candidates"], key=_ranking_key)
    sweep_settings = facts["sweep"]
    introduction = (
        f"{facts['base']} on {facts['data']}, {facts['steps']:,} steps. Tried:"
        f" {', '.join(sweep_settings['axes'])} ({facts['sampler']}). "
    )
    if facts["rungs"]:
        introduction += f"The weaker ended after steps {', '.join(map(str, facts['rungs']))}"
        if sweep_settings["judged_by"] == "training":
            introduction += (
                ", judged by their mean loss in training over the latter half of the steps up to"
                " there, which is their last loss here"
            )
        introduction += ". "
    introduction += (
        f"Losses are means a {facts['item']}, in nats, on the rows held out unless it says"
        " otherwise."
    )
    sections = (
        _winner_section(facts),
        _curves_section(candidates),
        _quality_section(candidates),
        _spread_section(facts),
        _candidates_section(candidates, sweep_settings),
    )
    footer = f"{escape(facts['output'])}. <code>sweep.json</code> has the same numbers."
    return document(
        f"Sweep of {len(candidates)} candidates",
        introduction,
        _summary_cards(facts, candidates),
        sections,
        footer,
    )


def _ranking_key(candidate: Facts) -> tuple[bool, float]:
    """The sort key of a candidate: candidates that trained for all steps come first. Within both
    groups, a lower loss comes first, and a candidate without a loss last."""
    return candidate["status"] != FINISHED, (
        float("inf") if candidate["loss"] is None else candidate["loss"]
    )


def _summary_cards(facts: Facts, candidates: Sequence[Facts]) -> Iterator[tuple[str, str]]:
    best_candidate = candidates[0]
    yield f"{best_candidate['loss']:.4f}", f"loss of the winner, {best_candidate['name']}"
    yield f"{best_candidate['parameters']:,}", "numbers that it trains"
    status_counts = {
        status: sum(candidate["status"] == status for candidate in candidates)
        for status in (FINISHED, ENDED, FAILED)
    }
    yield (
        str(status_counts[FINISHED]),
        "ran to the end"
        + "".join(
            f", {status_counts[status]} {status}"
            for status in (ENDED, FAILED)
            if status_counts[status]
        ),
    )
    yield (
        format_duration(facts["cpu_seconds"]),
        f"of CPU time, in {format_duration(facts['seconds'])}",
    )


def _winner_section(facts: Facts) -> str:
    best_candidate = next(
        candidate for candidate in facts["candidates"] if candidate["name"] == facts["best"]
    )
    config_yaml = yaml.safe_dump(dict(facts["config"]), sort_keys=False, allow_unicode=True)
    edges_html = "".join(f"<p><b>{escape(describe_edge(edge))}</b></p>" for edge in facts["edges"])
    return (
        f"<h2>The winner: {escape(format_changes(best_candidate['changes']))}</h2>"
        f"<p>Its adapter is in {escape(facts['folder'])}.</p>{edges_html}"
        f"<p>{escape(describe_repetition(facts['alone']))} This trains it alone:</p>"
        f"<pre>{escape(shlex.join(facts['command']))}</pre>"
        f"<details><summary>Its configuration</summary><pre>{escape(config_yaml)}</pre></details>"
    )


def _curves_section(candidates: Sequence[Facts]) -> str:
    drawn_candidates = [candidate for candidate in candidates if candidate["measured"]]
    held_out_curves = [
        [(step, measures["loss"]) for step, measures in candidate["evaluations"]]
        for candidate in drawn_candidates
    ]
    training_curves = [_average_steps(candidate["losses"]) for candidate in drawn_candidates]
    loss_limit = _loss_axis_limit([candidate["measured"] for candidate in drawn_candidates])
    charts = []
    for y_label, curves in (
        ("loss on the rows held out", held_out_curves),
        ("loss in training", training_curves),
    ):
        labelled_curves = [
            (candidate, curve)
            for candidate, curve in zip(drawn_candidates, curves, strict=True)
            if curve
        ]
        if (
            max((len(curve) for _, curve in labelled_curves), default=0) < 2
            and curves is held_out_curves
        ):
            continue  # a single evaluation, at the end, gives no curve
        labelled_curves = [
            (candidate, [(step, min(loss, loss_limit)) for step, loss in curve])
            for candidate, curve in labelled_curves
        ]
        points_by_label = {
            f"{candidate['name']}: {format_changes(candidate['changes'])}": curve
            for candidate, curve in labelled_curves[:COLOUR_COUNT]
        }
        faint_curves = [curve for _, curve in labelled_curves[COLOUR_COUNT:]]
        chart = lines(points_by_label, x="step", y=y_label, bottom=None, faint=faint_curves)
        charts.append(f"<figure>{chart}</figure>")
    colour_note = (
        f" The best {COLOUR_COUNT} have colours." if len(drawn_candidates) > COLOUR_COUNT else ""
    )
    return (
        f"<h2>Curves</h2><p>Cut at {loss_limit:.3g}.{colour_note}</p><div"
        f' class="pair">{"".join(charts)}</div>'
    )


def _loss_axis_limit(curves: Sequence[Points]) -> float:
    """The upper end of the loss axis: 110 % of the median first loss, or more if the best last loss
    is near that. Higher losses are drawn at the limit, because a diverging candidate would
    otherwise flatten the curves of all others."""
    first_losses = [curve[0][1] for curve in curves]
    best_loss = min(curve[-1][1] for curve in curves)
    return max(sorted(first_losses)[len(first_losses) // 2] * 1.1, best_loss + 0.1)


def _average_steps(losses: Sequence[float]) -> list[tuple[float, float]]:
    """Average a training curve to about `CURVE_POINTS` points: (last step, mean loss) of each group
    of consecutive steps. `losses`: the loss of each step, from step 1."""
    steps_per_point = max(1, len(losses) // CURVE_POINTS)
    loss_groups = [losses[i : i + steps_per_point] for i in range(0, len(losses), steps_per_point)]
    return [
        (min((index + 1) * steps_per_point, len(losses)), mean(group_losses))
        for index, group_losses in enumerate(loss_groups)
    ]


def _quality_section(candidates: Sequence[Facts]) -> str:
    label_by_status = {FINISHED: "ran to the end", ENDED: "ended early, where it ended"}
    points_by_label = {
        label: [
            (candidate["parameters"] / 1e3, candidate["loss"])
            for candidate in candidates
            if candidate["status"] == status
        ]
        for status, label in label_by_status.items()
    }
    points_by_label = {label: points for label, points in points_by_label.items() if points}
    best_loss = candidates[0]["loss"]
    loss_limit = max(
        best_loss * 1.5, *(loss for _, loss in points_by_label[label_by_status[FINISHED]])
    )
    points_by_label = {
        label: [(x, min(loss, loss_limit)) for x, loss in points]
        for label, points in points_by_label.items()
    }
    chart = lines(
        points_by_label,
        x="trainable parameters, in thousands",
        y="last loss",
        bottom=None,
        dots=True,
    )
    return f"<h2>Quality against trainable parameters</h2><figure>{chart}</figure>"


def _spread_section(facts: Facts) -> str:
    if not facts["spread"]:
        return ""
    rows = [
        [
            format_changes(group["changes"]) or "as configured",
            str(len(group["losses"])),
            f"{group['mean']:.4f}",
            f"{group['deviation']:.4f}",
            f"{min(group['losses']):.4f}",
            f"{max(group['losses']):.4f}",
        ]
        for group in sorted(facts["spread"], key=lambda group: group["mean"])
    ]
    headings = ["settings", ">seeds", ">mean", ">deviation", ">lowest", ">highest"]
    note = (
        "Candidates that ran to the end and differ in their seeds alone. What differs by less is"
        " chance."
    )
    return f"<h2>Spread over seeds</h2><p>{note}</p>{table(headings, rows)}"


def _candidates_section(candidates: Sequence[Facts], sweep_settings: Facts) -> str:
    axes = [*sweep_settings["axes"]]
    headings = ["candidate", *axes, ">numbers", ">steps", ">loss", ""]
    rows = [
        [
            candidate["name"],
            *(format_changes({"": candidate["changes"].get(axis, "")}).strip() for axis in axes),
            f"{candidate['parameters']:,}" if candidate["parameters"] else "–",
            str(len(candidate["losses"])),
            "–" if candidate["loss"] is None else f"{candidate['loss']:.4f}",
            candidate["status"],
        ]
        for candidate in candidates
    ]
    notes_html = "".join(
        f"<p>{escape(candidate['name'])}: {escape(candidate['note'])}</p>"
        for candidate in candidates
        if candidate["note"]
    )
    return f"<h2>All candidates</h2>{table(headings, rows)}{notes_html}"
