"""What a narrow adapter made its base forget, and how much of it a repair of intruder dimensions
brings back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import phonemes, plots, smollm2
from experiments.experiment import Cell, Claim, Experiment, Run, table

PAPER = "[Shuttleworth et al. 2024](https://arxiv.org/abs/2410.21228)"
#: (cosine below which a direction is an intruder, what is left of its singular value)
REPAIRS = ((0.5, 0.5), (0.5, 0.0), (0.7, 0.5), (0.9, 0.5))
#: the run whose adapter is repaired
ADAPTER: Cell = {
    "seed": 0,
    "recipe": {
        "rank": 8, "alpha": 16, "learning_rate": 3e-3, "schedule": "cosine", "warmup": 0.05, "batch_size": 8,
        "max_steps": 400,
    },
}  # fmt: skip
EVENLY = (0.95, 0.9, 0.75, 0.5, 0.25)
ABOUT = """
The adapter has learnt letters → phonemes (the task of `make demo`) with `veneer train`: SmolLM2-135M, rank 8
and alpha 16 on all linear layers, 400 steps of 8 words at a peak rate of 3e-3, seed 0; its phoneme error rate over 500
held-out words is 0.208. Forgetting is the rise of the loss on general text, which is three kinds of 1,536 tokens each:
Python's language reference
(`pydoc_data.topics`), licence texts of installed packages, and scikit-learn's descriptions of its data sets. The task's
loss is that of the phonemes of 100 words that did not train.

A repair is `veneer compose --repair`: of the 10 leading left singular vectors of each W + ΔW, those of which W has no
like (a cosine below the threshold to each of its own) keep the factor of their singular value. Beside each stands a
control: for each direction that the repair scales down, one of as much taken off in a random direction. And the change
made smaller evenly, s · ΔW, as a curve: a repair is worth its name where it lies below that curve.

Decided before the run: it holds if some repair wins back at least half of the rise of the loss on general text while
the task's loss rises by at most 2 %.
"""


def cells(smoke: bool) -> list[Cell]:
    return phonemes.cells(True)[:1] if smoke else [ADAPTER]


def run(cell: Cell) -> dict[str, Any]:
    import veneer
    from veneer import models
    from veneer.tools.compose import compose
    from veneer.tools.compose.repair import repair

    with smollm2.place(cell) as (folder, base_name):
        adapter = phonemes.adapter(cell, folder, base_name)
        base = models.load_base(base_name, attention="eager")
        judging = smollm2.words(cell)[2][:100]
        held, general = (
            smollm2.examples(judging, base.tokenizer, folder),
            smollm2.general(cell, base.tokenizer),
        )

        def losses(path: Path | None) -> dict[str, float]:
            handle = None if path is None else veneer.load(base.model, path)
            found = {kind: smollm2.loss(base.model, text) for kind, text in general.items()}
            found = {
                "task": smollm2.loss(base.model, held),
                "general": sum(found.values()) / len(found),
                **found,
            }
            if handle is not None:
                handle.detach()
            return found

        rows: list[dict[str, Any]] = [{"what": "base", "scale": 0.0, **losses(None)}]
        rows.append({"what": "evenly", "scale": 1.0, **losses(adapter)})
        for scale in EVENLY:
            path = compose([adapter], folder / f"evenly-{scale}", weights=[scale]).path
            rows.append({"what": "evenly", "scale": scale, **losses(path)})
        found = [*_intruders(adapter, base.model)]
        for threshold, factor in REPAIRS:
            chosen = [_below(one, threshold) for one in found]
            count = sum(one.count for one in chosen)
            controls = [_random(one, seed) for seed, one in enumerate(chosen)]
            for what, own in (("repair", chosen), ("random", controls)) if count else ():
                name = folder / f"{what}-{threshold}-{factor}"
                report = repair(adapter, name, base=base.model, factor=factor, found=own)
                setting = {
                    "threshold": threshold,
                    "factor": factor,
                    "count": count,
                    "removed": report.removed,
                }
                rows.append({"what": what, **setting, **losses(name)})
    cosines = sorted(cosine for one in found for cosine in one.cosines)
    control = sorted(cosine for one in found for cosine in one.control)
    size = math.hypot(*(one.distance for one in found)) / math.hypot(*(one.norm for one in found))
    below = {str(at): (_count(cosines, at), _count(control, at)) for at in (0.5, 0.7, 0.9)}
    return {"rows": rows, "size": size, "looked_at": len(cosines), "below": below}


def _intruders(adapter: Path, model: Any) -> Iterator[Any]:
    """Every leading direction of each weight: which of them count is asked afterwards, for each
    threshold."""
    from veneer.adapter_files.folder import read
    from veneer.tools.compose.frozen_weights import FrozenWeights
    from veneer.tools.intruders import find_intruders

    return find_intruders(read(adapter), FrozenWeights(model), threshold=1.0, control=True)


def _count(cosines: Sequence[float], threshold: float) -> int:
    return sum(cosine < threshold for cosine in cosines)


def _below(one: Any, threshold: float) -> Any:
    """What was found of a weight, with the directions below the threshold alone."""
    import torch

    near, parts = (
        torch.tensor(one.cosines, dtype=torch.float64).split(
            len(one.cosines) // len(one.intruders)
        ),
        [],
    )
    for cosines, triples in zip(near, one.intruders, strict=True):
        # `intruders` has those below 1 alone; a cosine of 1 is no intruder at any threshold
        parts.append(triples.select(cosines[cosines < 1.0] < threshold))
    return replace(one, intruders=tuple(parts))


def _random(one: Any, seed: int) -> Any:
    """As many directions of the same singular values, at random."""
    import torch

    draw = torch.Generator().manual_seed(seed)

    def like(sides: Any) -> Any:
        return torch.linalg.qr(torch.randn(sides.shape, generator=draw, dtype=sides.dtype))[0]

    return replace(
        one,
        intruders=tuple(
            triples._replace(U=like(triples.U), V=like(triples.V)) for triples in one.intruders
        ),
    )


def _shares(run: Run, row: dict[str, Any]) -> tuple[float, float]:
    """What a row wins back of the rise of the loss on general text, and by how much the task's loss
    rises."""
    base, whole = run["rows"][:2]
    rise = whole["general"] - base["general"]
    return (whole["general"] - row["general"]) / rise, row["task"] / whole["task"] - 1


def _named(row: dict[str, Any]) -> str:
    if row["what"] == "base":
        return "the base"
    if row["what"] == "evenly":
        return "the adapter" if row["scale"] == 1 else f"{row['scale']:g} · ΔW"
    said = f"{row['count']} directions, cosine < {row['threshold']:g}, × {row['factor']:g}"
    return f"repair: {said}" if row["what"] == "repair" else f"control, at random: {said}"


def tables(runs: Sequence[Run]) -> str:
    (run,) = runs
    kinds = [name for name in run["rows"][0] if name not in ("what", "scale", "task", "general")]
    rows = []
    for row in run["rows"]:
        won, lost = _shares(run, row)
        off = f"{row['removed']:.1%}" if "removed" in row else f"{1 - row['scale']:.0%}"
        told = [f"{row[name]:.3f}" for name in ("task", "general", *kinds)]
        rows.append((_named(row), off, *told, f"{won:.0%}", f"{lost:+.1%}"))
    head = ("", "taken off ΔW", "task", "general", *kinds, "won back", "task loses")
    below = [(f"below {at}", own, control) for at, (own, control) in run["below"].items()]
    said = (
        f"‖W′ − W‖ / ‖W‖ over all weights is {run['size']:.3f}. "
        f"Of {run['looked_at']} leading singular vectors of W′:"
    )
    spectrum = table(
        ("largest cosine to a singular vector of W", "the adapter", "random change, same spectrum"),
        below,
    )
    return f"{table(head, rows)}\n\n{said}\n\n{spectrum}"


def claims(runs: Sequence[Run]) -> list[Claim]:
    (run,) = runs
    repaired = [row for row in run["rows"] if row["what"] == "repair"]
    kept = [row for row in repaired if _shares(run, row)[1] <= 0.02]
    best = max(kept, key=lambda row: _shares(run, row)[0], default=None)
    won = 0.0 if best is None else _shares(run, best)[0]
    said = (
        f"{won:.0%} at most, by {_named(best)}"
        if best
        else "nothing: no repair keeps the task within 2 %"
    )
    own, control = run["below"]["0.5"]
    said_of = f"{own} of {run['looked_at']} directions; a random change of the same spectrum has {control}"
    even = [row for row in run["rows"] if row["what"] == "evenly" and _shares(run, row)[1] <= 0.02]
    plain = max((_shares(run, row)[0] for row in even), default=0.0)
    return [
        Claim(
            "scaling intruder dimensions down wins back half of what was forgotten, for 2 % of the task's loss", PAPER,
            f"{said}; evenly smaller, within the same 2 %: {plain:.0%}", won >= 0.5,
        ),
        Claim("LoRA's change has intruder dimensions, more than chance", PAPER, said_of, own > control),
    ]  # fmt: skip


def drawn(runs: Sequence[Run]) -> dict[str, str]:
    """Around the adapter itself: what loses the task is left out."""
    (run,) = runs
    most = 2 * run["rows"][1]["task"]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in run["rows"]:
        if row["task"] <= most:
            what = {"evenly": "s · ΔW", "repair": "repairs", "random": "controls at random"}.get(
                row["what"], "the base"
            )
            series.setdefault(what, []).append((row["task"], row["general"]))
    return {
        "trade": plots.lines(
            series, x="loss of the task", y="loss on general text", bottom=None, dots=True
        )
    }


EXPERIMENT = Experiment(
    title="Forgetting, and its repair", about=ABOUT, cells=cells, run=run, tables=tables, claims=claims, plots=drawn,
    data=smollm2.lacking,
)  # fmt: skip
