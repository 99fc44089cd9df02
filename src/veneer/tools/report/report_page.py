"""Render a report as one self-contained HTML page: no scripts, no network; for phones, desktops and
paper, in light and dark mode.

The input is ``Report.to_dict()``, with the measurements of ``veneer inspect`` under "losses":

    losses   {"data": {source, tokens} | None, "general": {…} | None, "note": text | None, "rows":
             [row, …]}
    row      {"what": "base" | "adapter" | "rank" | "repaired" | "weaker", "at": rank, factor or
             weight | None,
              "removed": share of the change | None, "data": loss | None, "general": loss | None}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from veneer.tools.report.charts import heat_map, lines, table

Facts = Mapping[str, Any]

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def page(facts: Facts) -> str:
    """The HTML page of a report; ``facts``: see the module's docstring."""
    about = facts["about"]
    base = facts["base"] or about["base"] or "an unnamed base"
    introduction = (
        f"{about['variant']}, rank {about['rank']}, alpha {about['alpha']:g},"
        f" {about['parameters']:,} numbers, on "
    )
    introduction += f"{base}. " + (
        "" if about["verified"] else "Written by another library: nothing to verify it by. "
    )
    introduction += (
        "" if facts["base"] else "Without --base nothing is said of the base's own weights. "
    )
    introduction += (
        f"Trained in full and not looked at here: {', '.join(facts['in_full'])}."
        if facts["in_full"]
        else ""
    )
    sections = "".join(
        f"<section>{section}</section>"
        for section in (
            _rank_section(facts),
            _location_section(facts),
            *_optional_sections(facts),
            _layer_table(facts),
        )
    )
    name = Path(facts["adapter"]).name
    footer = (
        f"{escape(facts['adapter'])}. Singular values are of ΔW = scale · B A, in float64 from the"
        " factors; <code>veneer inspect --json</code> has the same numbers."
    )
    return document(f"A look inside {name}", introduction, _cards(facts), sections, footer)


def document(
    title: str, lead: str, cards: Iterable[tuple[str, str]], sections: str, footer: str
) -> str:
    """An HTML document. ``cards``: (number, caption); ``sections`` and ``footer`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f'<div class="cards">{"".join(map(_card, cards))}</div>{sections}'
        f"<footer>{footer}</footer></body></html>\n"
    )


def _card(card: tuple[str, str]) -> str:
    return f'<div class="card"><b>{escape(card[0])}</b><span>{escape(card[1])}</span></div>'


def _cards(facts: Facts) -> Iterator[tuple[str, str]]:
    layers = facts["layers"]
    used = median(layer["used"] for layer in layers)
    yield f"{used:.0%}", "of the allotted rank in use (effective rank, median weight)"
    yield str(facts["next_rank"]), "rank to use next"
    if facts["base"] and all(layer["relative"] is not None for layer in layers):
        yield (
            f"{median(layer['relative'] for layer in layers):.2%}",
            "‖W′ − W‖ / ‖W‖, median weight",
        )
    if facts["leading"]:
        intruders, control = (sum(layer["intruders"][side] for layer in layers) for side in (0, 1))
        yield f"{intruders}", f"intruder dimensions; random changes of the same size have {control}"
    rows = {
        row["what"]: row
        for row in facts.get("losses", {}).get("rows", ())
        if row["what"] in ("base", "adapter")
    }
    for name, caption in (("data", "loss on the data"), ("general", "loss on general text")):
        if rows and rows["adapter"][name] is not None:
            yield (
                f"{rows['base'][name]:.3f} → {rows['adapter'][name]:.3f}",
                f"{caption}: base → adapter",
            )


def _rank_section(facts: Facts) -> str:
    kinds: dict[str, list[Any]] = {}
    for layer in facts["layers"]:
        if layer["norm"]:
            kinds.setdefault(layer["kind"], []).append(layer["spectrum"])
    series = {kind: _mean_spectrum(spectra) for kind, spectra in kinds.items()}
    lost = [(cut["rank"], cut["lost"]) for cut in facts["cuts"]]
    largest = facts["cuts"][-1]["rank"]
    rows = {
        row["at"] or largest: row
        for row in facts.get("losses", {}).get("rows", ())
        if row["what"] in ("rank", "adapter")
    }
    measured = any(row["data"] is not None for row in rows.values())
    heads = [
        ">rank",
        ">lost, of ‖ΔW‖",
        ">kept, of ‖ΔW‖²",
        *([">loss on the data"] if measured else []),
    ]
    cells = []
    for cut in facts["cuts"]:
        loss = rows.get(cut["rank"], {}).get("data")
        cells.append([str(cut["rank"]), f"{cut['lost']:.1%}", f"{1 - cut['lost'] ** 2:.1%}"])
        cells[-1] += [_format_loss(loss)] if measured else []
    note = (
        "Truncated after training, which says what is spare; training at a smaller rank may do"
        " better than that."
    )
    spectrum = lines(series, x="singular value", y="share of the largest", top=1.0)
    loss_by_rank = lines({"lost": lost}, x="rank", y="lost, of ‖ΔW‖")
    return (
        "<h2>How much of its rank is in use</h2><p>Singular values of ΔW, the largest 1, mean over"
        f" weights of a kind. Next: rank {facts['next_rank']}; {escape(facts['why'])}. {note}</p>"
        f"<div class='pair'><figure>{spectrum}</figure><figure>{loss_by_rank}</figure></div>"
        f"{table(heads, cells)}"
        + _layer_heat_map(
            facts,
            "used",
            "Effective rank as a share of the allotted one, by block and kind",
            "{:.0%}",
            most=1.0,
        )
    )


def _mean_spectrum(spectra: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    longest = max(map(len, spectra))
    shares = [
        [*(value / spectrum[0] for value in spectrum), *[0.0] * (longest - len(spectrum))]
        for spectrum in spectra
    ]
    return [(number, mean(column)) for number, column in enumerate(zip(*shares, strict=True), 1)]


def _location_section(facts: Facts) -> str:
    relative = bool(facts["base"]) and all(
        layer["relative"] is not None for layer in facts["layers"]
    )
    relative_map = (
        _layer_heat_map(facts, "relative", "‖W′ − W‖ / ‖W‖", "{:.2%}") if relative else ""
    )
    total = sum(layer["norm"] ** 2 for layer in facts["layers"])
    shares: dict[str, float] = {}
    for layer in facts["layers"]:
        shares[layer["kind"]] = shares.get(layer["kind"], 0.0) + layer["norm"] ** 2
    ordered = sorted(shares.items(), key=lambda kind_share: -kind_share[1])
    shares_text = (
        ", ".join(f"{kind} {share / total:.0%}" for kind, share in ordered)
        if total
        else "nowhere: every change is 0"
    )
    norm_map = _layer_heat_map(facts, "norm", "‖ΔW‖ by block and kind", "{:.2g}")
    return (
        f"<h2>Where the change went</h2><p>Of ‖ΔW‖², by kind: {escape(shares_text)}.</p>"
        f'<div class="pair">{norm_map}{relative_map}</div>'
    )


def _optional_sections(facts: Facts) -> Iterator[str]:
    if facts["other"] is not None:
        yield _similarity_section(facts)
    if facts["leading"]:
        yield _forgetting_section(facts)
    elif facts.get("losses"):
        yield f"<h2>Losses</h2>{_loss_table(facts)}"


def _similarity_section(facts: Facts) -> str:
    both = [
        layer
        for layer in facts["layers"]
        if layer["shared"] and layer["shared"]["read"] is not None
    ]
    exclusive_changes = [
        f"{len(facts[key])} weights are changed {adapter_name}"
        for key, adapter_name in (
            ("only_here", "by this one alone"),
            ("only_other", "by the other alone"),
        )
        if facts[key]
    ]
    heading = f"<h2>Beside {escape(Path(facts['other']).name)}</h2>"
    exclusive = escape("; ".join(exclusive_changes))
    if not both:
        return f"{heading}<p>They change no weight in common. {exclusive}</p>"
    series = {}
    for name, side in (("reads from", "read"), ("writes to", "written")):
        longest = min(len(layer["shared"][f"angles_{side}"]) for layer in both)
        angles = [layer["shared"][f"angles_{side}"][:longest] for layer in both]
        series[name] = [
            (number, mean(column)) for number, column in enumerate(zip(*angles, strict=True), 1)
        ]
    maps = []
    for side, name in (("read", "reads from"), ("written", "writes to")):
        chance = mean(layer["shared"][f"chance_{side}"] for layer in both)
        caption = f"φ of the space that ΔW {name}; two random spaces: {chance:.3f}"
        maps.append(
            _layer_heat_map(
                {"layers": both},
                lambda layer, side=side: layer["shared"][side],
                caption,
                "{:.2f}",
                most=1.0,
            )
        )
    cosine = median(layer["shared"]["cosine"] for layer in both)
    return (
        f"{heading}<p>φ is 1 where one space lies within the other, 0 where they share no direction"
        f" (Hu et al. 2021, section 7.2). Median cosine of ΔW and ΔW′: {cosine:.3f}."
        f" {exclusive}</p>"
        f"<figure>{lines(series, x='principal angle', y='degrees, mean', top=90.0)}</figure>"
        f'<div class="pair">{"".join(maps)}</div>'
    )


def _forgetting_section(facts: Facts) -> str:
    layers = [layer for layer in facts["layers"] if layer["intruders"] is not None]
    looked_at = sum(len(layer["cosines"]) for layer in layers)
    intruders, control = (sum(layer["intruders"][side] for layer in layers) for side in (0, 1))
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
        f" {facts['threshold']:g} with it (Shuttleworth et al. 2024). Of {looked_at} leading ones,"
        f" {facts['leading']} a weight, {intruders} are; of random changes with the same singular"
        f" values, {control}. The base's leading directions outlive a change that is small beside"
        " them."
    )
    explanation += (
        ""
        if intruders > control
        else " It has no more intruders than chance makes: they do not tell what was forgotten."
    )
    caption, examined_facts = "Intruders by block and kind", {"layers": layers}
    intruder_map = (
        _layer_heat_map(examined_facts, lambda layer: layer["intruders"][0], caption, "{:.3g}")
        if intruders
        else ""
    )
    return (
        f"<h2>Forgetting</h2><p>{explanation}</p><div"
        f' class="pair"><figure>{chart}</figure>{intruder_map}</div>{_loss_table(facts)}'
    )


def _distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """The cumulative distribution of ``values`` at 41 points from 0 to 1."""
    return [
        (step / 40, sum(value <= step / 40 for value in values) / len(values)) for step in range(41)
    ]


def _loss_table(facts: Facts) -> str:
    losses = facts.get("losses")
    if not losses:
        return "<p>Give --base with --data or --general to measure what this does to the loss.</p>"
    names = [name for name in ("data", "general") if losses[name]]
    captions = {"data": "loss on the data", "general": "loss on general text"}
    heads = ["model", ">taken off", *(f">{captions[name]}" for name in names)]
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
            *(_format_loss(row[name]) for name in names),
        ]
        for row in losses["rows"]
        if row["what"] in model_labels
    ]
    sources = "; ".join(
        f"{captions[name]}: {losses[name]['source']}, {losses[name]['tokens']:,} tokens"
        for name in names
    )
    repaired = any(row["what"] == "repaired" for row in losses["rows"])
    note = "Below a repair, its control: as much taken off the change, evenly. " if repaired else ""
    note = f"{note}Measured: {sources}. {losses['note'] or ''}"
    return f"<p>Mean loss a token, in nats. {escape(note)}</p>{table(heads, rows)}"


def _layer_table(facts: Facts) -> str:
    has_base, has_intruders = bool(facts["base"]), bool(facts["leading"])
    heads = ["weight", ">rank", ">effective", ">for 90 %", ">for 99 %", ">‖ΔW‖"]
    heads += [
        *([">‖W′−W‖/‖W‖"] if has_base else []),
        *([">intruders", ">random"] if has_intruders else []),
    ]
    rows = []
    for layer in facts["layers"]:
        row = [
            layer["path"],
            str(layer["rank"]),
            f"{layer['effective_rank']:.1f}",
            str(layer["rank_90"]),
        ]
        row += [str(layer["rank_99"]), f"{layer['norm']:.3g}"]
        row += (
            ["∞" if layer["relative"] is None else f"{layer['relative']:.2%}"] if has_base else []
        )
        row += [str(layer["intruders"][side]) for side in (0, 1)] if has_intruders else []
        rows.append(row)
    return f"<details><summary>All {len(rows)} weights</summary>{table(heads, rows)}</details>"


def _layer_heat_map(
    facts: Facts,
    value: str | Callable[[Any], float],
    caption: str,
    form: str,
    most: float | None = None,
) -> str:
    """``heat_map`` of the layers; several weights of one kind in a block are averaged."""
    get_value = value if callable(value) else lambda layer: layer[value]
    cells: dict[tuple[int | None, str], list[float]] = {}
    for layer in facts["layers"]:
        cells.setdefault((layer["block"], layer["kind"]), []).append(get_value(layer))
    return heat_map(
        {block_and_kind: mean(values) for block_and_kind, values in cells.items()},
        caption=caption,
        form=form.format,
        most=most,
    )


def _format_loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
