"""Render a report as one HTML page without scripts or network access, for phones, desktops and
paper, in light and dark mode.

The input ``facts`` is ``Report.to_dict()``. ``veneer inspect`` adds the losses that it measured on
"data" (examples of the adapter's task) and on "general" text, under the key "losses":

    losses   {"data": {"source": file name, "tokens": count} | None, "general": the same fields,
              "note": a text, such as why losses are missing | None, "rows": [row, …]}
    row      {"what": which model was measured, "at": its setting | None,
              "removed": ‖removed part of the change‖ / ‖change‖, for all weights together | None,
              "data": mean loss per token in nats | None, "general": the same | None}

    what         the model                                                       at
    "base"       without the adapter                                             None
    "adapter"    with the adapter                                                None
    "rank"       with the adapter truncated to a lower rank                      the rank
    "repaired"   with its intruder dimensions (leading singular vectors of the   their factor
                 changed weight that resemble none of the base weight) scaled
    "weaker"     with all of ΔW scaled, as a control                             the factor of ΔW
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from veneer.tools.report.charts import heat_map, lines, table

#: the JSON values of a report: ``Report.to_dict()``, possibly with "losses"
Facts = Mapping[str, Any]

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def page(facts: Facts) -> str:
    """The HTML page of a report. ``facts``: ``Report.to_dict()``, possibly with the key "losses"
    that the module's docstring describes."""
    adapter_facts = facts["about"]
    base_name = facts["base"] or adapter_facts["base"] or "an unnamed base"
    full_names = ", ".join(facts["in_full"])
    introduction = (
        f"{adapter_facts['variant']}, rank {adapter_facts['rank']},"
        f" alpha {adapter_facts['alpha']:g}, {adapter_facts['parameters']:,} numbers, on"
        f" {base_name}. "
        + (
            ""
            if adapter_facts["verified"]
            else "Written by another library: nothing to verify it by. "
        )
        + ("" if facts["base"] else "Without --base nothing is said of the base's own weights. ")
        + (f"Trained in full and not looked at here: {full_names}." if full_names else "")
    )
    sections = (
        _rank_section(facts),
        _location_section(facts),
        *_optional_sections(facts),
        _layer_table(facts),
    )
    name = Path(facts["adapter"]).name
    footer_html = (
        f"{escape(facts['adapter'])}. Singular values are of ΔW = scale · B A, in float64 from the"
        " factors; <code>veneer inspect --json</code> has the same numbers."
    )
    return document(
        f"A look inside {name}", introduction, _key_numbers(facts), sections, footer_html
    )


def document(
    title: str,
    introduction: str,
    cards: Iterable[tuple[str, str]],
    sections: Iterable[str],
    footer_html: str,
) -> str:
    """An HTML document with the style sheet of reports.

    Args:
        introduction: the text below the title; it is escaped, like the title and the cards.
        cards: (number, caption) of each box at the top.
        sections: the HTML of each section; an empty text adds no section.
        footer_html: the HTML of the footer.
    """
    body = "".join(f"<section>{section}</section>" for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(introduction)}</p>"
        f'<div class="cards">{"".join(map(_card, cards))}</div>{body}'
        f"<footer>{footer_html}</footer></body></html>\n"
    )


def _card(card: tuple[str, str]) -> str:
    return f'<div class="card"><b>{escape(card[0])}</b><span>{escape(card[1])}</span></div>'


def _key_numbers(facts: Facts) -> Iterator[tuple[str, str]]:
    layers = facts["layers"]
    median_use = median(layer["used"] for layer in layers)
    yield f"{median_use:.0%}", "of the allotted rank in use (effective rank, median weight)"
    yield str(facts["next_rank"]), "rank to use next"
    if facts["base"] and all(layer["relative"] is not None for layer in layers):
        yield (
            f"{median(layer['relative'] for layer in layers):.2%}",
            "‖W′ − W‖ / ‖W‖, median weight",
        )
    if facts["leading"]:
        intruder_count, control_count = (
            sum(layer["intruders"][index] for layer in layers) for index in (0, 1)
        )
        yield (
            f"{intruder_count}",
            f"intruder dimensions; random changes of the same size have {control_count}",
        )
    rows_by_model = {
        row["what"]: row
        for row in facts.get("losses", {}).get("rows", ())
        if row["what"] in ("base", "adapter")
    }
    for source, caption in (("data", "loss on the data"), ("general", "loss on general text")):
        if rows_by_model and rows_by_model["adapter"][source] is not None:
            yield (
                f"{rows_by_model['base'][source]:.3f} → {rows_by_model['adapter'][source]:.3f}",
                f"{caption}: base → adapter",
            )


def _rank_section(facts: Facts) -> str:
    spectra_by_kind: dict[str, list[Any]] = {}
    for layer in facts["layers"]:
        if layer["norm"]:
            spectra_by_kind.setdefault(layer["kind"], []).append(layer["spectrum"])
    series = {kind: _mean_spectrum(spectra) for kind, spectra in spectra_by_kind.items()}
    lost_norm_points = [(cut["rank"], cut["lost"]) for cut in facts["cuts"]]
    largest_rank = facts["cuts"][-1]["rank"]
    loss_by_rank = {
        row["at"] or largest_rank: row["data"]
        for row in facts.get("losses", {}).get("rows", ())
        if row["what"] in ("rank", "adapter")
    }
    has_losses = any(loss is not None for loss in loss_by_rank.values())
    headings = [
        ">rank",
        ">lost, of ‖ΔW‖",
        ">kept, of ‖ΔW‖²",
        *([">loss on the data"] if has_losses else []),
    ]
    table_rows = [
        [
            str(cut["rank"]),
            f"{cut['lost']:.1%}",
            f"{1 - cut['lost'] ** 2:.1%}",
            *([_format_loss(loss_by_rank.get(cut["rank"]))] if has_losses else []),
        ]
        for cut in facts["cuts"]
    ]
    note = (
        "Truncated after training, which says what is spare; training at a smaller rank may do"
        " better than that."
    )
    spectrum_chart = lines(series, x="singular value", y="share of the largest", top=1.0)
    cut_chart = lines({"lost": lost_norm_points}, x="rank", y="lost, of ‖ΔW‖")
    return (
        "<h2>How much of its rank is in use</h2><p>Singular values of ΔW, the largest 1, mean over"
        f" weights of a kind. Next: rank {facts['next_rank']}; {escape(facts['why'])}. {note}</p>"
        f"<div class='pair'><figure>{spectrum_chart}</figure><figure>{cut_chart}</figure></div>"
        f"{table(headings, table_rows)}"
        + _layer_heat_map(
            facts,
            "used",
            "Effective rank as a share of the allotted one, by block and kind",
            "{:.0%}",
            darkest=1.0,
        )
    )


def _mean_spectrum(spectra: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The mean of several spectra (singular values in descending order), as points of a chart: (i,
    mean of σᵢ / σ₁ over the spectra) for i = 1, 2, …. Spectra of lower rank are padded with 0."""
    length = max(map(len, spectra))
    padded_shares = [
        [*(sigma / spectrum[0] for sigma in spectrum), *[0.0] * (length - len(spectrum))]
        for spectrum in spectra
    ]
    return [
        (number, mean(shares_at_number))
        for number, shares_at_number in enumerate(zip(*padded_shares, strict=True), 1)
    ]


def _location_section(facts: Facts) -> str:
    has_relative = bool(facts["base"]) and all(
        layer["relative"] is not None for layer in facts["layers"]
    )
    relative_heat_map = (
        _layer_heat_map(facts, "relative", "‖W′ − W‖ / ‖W‖", "{:.2%}") if has_relative else ""
    )
    total_energy = sum(layer["norm"] ** 2 for layer in facts["layers"])
    energy_by_kind: dict[str, float] = {}
    for layer in facts["layers"]:
        energy_by_kind[layer["kind"]] = energy_by_kind.get(layer["kind"], 0.0) + layer["norm"] ** 2
    sorted_energies = sorted(energy_by_kind.items(), key=lambda kind_energy: -kind_energy[1])
    shares_text = (
        ", ".join(f"{kind} {energy / total_energy:.0%}" for kind, energy in sorted_energies)
        if total_energy
        else "nowhere: every change is 0"
    )
    norm_heat_map = _layer_heat_map(facts, "norm", "‖ΔW‖ by block and kind", "{:.2g}")
    return (
        f"<h2>Where the change went</h2><p>Of ‖ΔW‖², by kind: {escape(shares_text)}.</p>"
        f'<div class="pair">{norm_heat_map}{relative_heat_map}</div>'
    )


def _optional_sections(facts: Facts) -> Iterator[str]:
    if facts["other"] is not None:
        yield _similarity_section(facts)
    if facts["leading"]:
        yield _forgetting_section(facts)
    elif facts.get("losses"):
        yield f"<h2>Losses</h2>{_loss_table(facts)}"


def _similarity_section(facts: Facts) -> str:
    shared_layers = [
        layer
        for layer in facts["layers"]
        if layer["shared"] and layer["shared"]["read"] is not None
    ]
    exclusive_texts = [
        f"{len(facts[key])} weights are changed {adapter_name}"
        for key, adapter_name in (
            ("only_here", "by this one alone"),
            ("only_other", "by the other alone"),
        )
        if facts[key]
    ]
    heading = f"<h2>Beside {escape(Path(facts['other']).name)}</h2>"
    exclusive_text = escape("; ".join(exclusive_texts))
    if not shared_layers:
        if any(layer["shared"] for layer in facts["layers"]):
            reason = "In each weight that both have, the change of one of them is zero."
        else:
            reason = "They change no weight in common."
        return f"{heading}<p>{reason} {exclusive_text}</p>"
    series = {}
    for verb, side in (("reads from", "read"), ("writes to", "written")):
        angle_count = min(len(layer["shared"][f"angles_{side}"]) for layer in shared_layers)
        angles = [layer["shared"][f"angles_{side}"][:angle_count] for layer in shared_layers]
        series[verb] = [
            (angle_number, mean(column))
            for angle_number, column in enumerate(zip(*angles, strict=True), 1)
        ]
    heat_maps = []
    for side, verb in (("read", "reads from"), ("written", "writes to")):
        chance_similarity = mean(layer["shared"][f"chance_{side}"] for layer in shared_layers)
        caption = f"φ of the space that ΔW {verb}; two random spaces: {chance_similarity:.3f}"
        heat_maps.append(
            _layer_heat_map(
                {"layers": shared_layers},
                lambda layer, side=side: layer["shared"][side],
                caption,
                "{:.2f}",
                darkest=1.0,
            )
        )
    cosine = median(layer["shared"]["cosine"] for layer in shared_layers)
    return (
        f"{heading}<p>φ is 1 where one space lies within the other, 0 where they share no direction"
        f" (Hu et al. 2021, section 7.2). Median cosine of ΔW and ΔW′: {cosine:.3f}."
        f" {exclusive_text}</p>"
        f"<figure>{lines(series, x='principal angle', y='degrees, mean', top=90.0)}</figure>"
        f'<div class="pair">{"".join(heat_maps)}</div>'
    )


def _forgetting_section(facts: Facts) -> str:
    layers = facts["layers"]
    vector_count = sum(len(layer["cosines"]) for layer in layers)
    intruder_count, control_count = (
        sum(layer["intruders"][index] for layer in layers) for index in (0, 1)
    )
    series = {
        name: _distribution([cosine for layer in layers for cosine in layer[key]])
        for name, key in (
            ("this adapter", "cosines"),
            ("random changes of the same singular values", "control"),
        )
    }
    chart = lines(
        series,
        x="highest cosine with a singular vector of W",
        y="share of vectors below",
        top=1.0,
        mark=facts["threshold"],
    )
    explanation = (
        "A singular vector of W′ is an intruder if no singular vector of W has a cosine of"
        f" {facts['threshold']:g} with it (Shuttleworth et al. 2024). Of {vector_count} leading"
        f" ones, {facts['leading']} a weight, {intruder_count} are; of random changes with the same"
        f" singular values, {control_count}. The base's leading directions outlive a change that is"
        " small beside them."
    )
    if intruder_count <= control_count:
        explanation += (
            " It has no more intruders than chance makes: they do not tell what was forgotten."
        )
    caption = "Intruders by block and kind"
    intruder_map = (
        _layer_heat_map(facts, lambda layer: layer["intruders"][0], caption, "{:.3g}")
        if intruder_count
        else ""
    )
    return (
        f"<h2>Forgetting</h2><p>{explanation}</p>"
        f'<div class="pair"><figure>{chart}</figure>{intruder_map}</div>{_loss_table(facts)}'
    )


def _distribution(cosines: Sequence[float]) -> list[tuple[float, float]]:
    """The cumulative distribution of ``cosines`` as points of a chart: (x, share of the cosines
    that are at most x) at 41 values x from 0 to 1."""
    return [
        (step / 40, sum(cosine <= step / 40 for cosine in cosines) / len(cosines))
        for step in range(41)
    ]


def _loss_table(facts: Facts) -> str:
    losses = facts.get("losses")
    if not losses:
        return "<p>Give --base with --data or --general to measure what this does to the loss.</p>"
    sources = [source for source in ("data", "general") if losses[source]]
    captions = {"data": "loss on the data", "general": "loss on general text"}
    headings = ["model", ">taken off", *(f">{captions[source]}" for source in sources)]
    model_labels = {
        "base": "base",
        "adapter": "with the adapter",
        "repaired": "intruders × {:g}",
        "weaker": "ΔW × {:.3g}, evenly",
    }
    rows = [
        [
            model_labels[row["what"]].format(row["at"] if row["at"] is not None else ""),
            "" if row["removed"] is None else f"{row['removed']:.1%}",
            *(_format_loss(row[source]) for source in sources),
        ]
        for row in losses["rows"]
        if row["what"] in model_labels
    ]
    sources_text = "; ".join(
        f"{captions[source]}: {losses[source]['source']}, {losses[source]['tokens']:,} tokens"
        for source in sources
    )
    has_repairs = any(row["what"] == "repaired" for row in losses["rows"])
    note = (
        "Below a repair, its control: as much taken off the change, evenly. " if has_repairs else ""
    )
    note = f"{note}Measured: {sources_text}. {losses['note'] or ''}"
    return f"<p>Mean loss a token, in nats. {escape(note)}</p>{table(headings, rows)}"


def _layer_table(facts: Facts) -> str:
    has_base, has_intruders = bool(facts["base"]), bool(facts["leading"])
    headings = [
        "weight",
        ">rank",
        ">effective",
        ">for 90 %",
        ">for 99 %",
        ">‖ΔW‖",
        *([">‖W′−W‖/‖W‖"] if has_base else []),
        *([">intruders", ">random"] if has_intruders else []),
    ]
    rows = [
        [
            layer["path"],
            str(layer["rank"]),
            f"{layer['effective_rank']:.1f}",
            str(layer["rank_90"]),
            str(layer["rank_99"]),
            f"{layer['norm']:.3g}",
            *(
                ["∞" if layer["relative"] is None else f"{layer['relative']:.2%}"]
                if has_base
                else []
            ),
            *(map(str, layer["intruders"]) if has_intruders else []),
        ]
        for layer in facts["layers"]
    ]
    return f"<details><summary>All {len(rows)} weights</summary>{table(headings, rows)}</details>"


def _layer_heat_map(
    facts: Facts,
    quantity: str | Callable[[Any], float],
    caption: str,
    number_format: str,
    darkest: float | None = None,
) -> str:
    """A heat map, as HTML, of a quantity by block and kind of layer, averaged over layers with the
    same block and kind.

    Args:
        quantity: a key of the entries in ``facts["layers"]``, or a function of an entry.
        number_format: a format string for a number, such as "{:.0%}".
        darkest: the number that gets the darkest cell; None: the largest number.
    """
    measure = quantity if callable(quantity) else lambda layer: layer[quantity]
    numbers_by_cell: dict[tuple[int | None, str], list[float]] = {}
    for layer in facts["layers"]:
        numbers_by_cell.setdefault((layer["block"], layer["kind"]), []).append(measure(layer))
    return heat_map(
        {cell: mean(numbers) for cell, numbers in numbers_by_cell.items()},
        caption=caption,
        format_number=number_format.format,
        darkest=darkest,
    )


def _format_loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"
