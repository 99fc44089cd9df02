"""What a merge into 16 bits loses of an adapter: rounded to nearest, and faithfully."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from experiments import smollm2
from experiments.experiment import Cell, Claim, Experiment, Run, table

WAYS = ("nearest", "faithful")
ABOUT = """
An adapter is merged into bfloat16 weights, whose spacing is up to 2⁻⁷ of a number: a change much
smaller than that is lost where each number is rounded to its nearest.
`veneer merge --rounding faithful` rounds up or down so that the errors cancel on what the adapter
reads ([why](../decisions/merging.md#16-bit-merges-round-so-that-the-change-survives)). Early
adapters of small rates are the hard case, so here are letters → phonemes on SmolLM2-135M, rank 8 on
all linear layers, after few steps of 16 words at several rates.

Kept: the share of ΔW in W′ − W after rounding (the slope of one on the other), the median over 210
weights. Gain kept: of what the adapter takes off the base's loss on 100 words that did not train,
how much the merged model takes off; computed in float32, so that the weights alone differ. Decided
before the run: it holds if, at each rate, faithful keeps 99 % of the change and of the gain, and
nearest at some rate keeps less than 90 % of both.
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [{"smoke": True, "rate": 1e-2, "steps": 1, "batch": 4, "seed": 0}]
    return [{"rate": rate, "steps": 15, "batch": 16, "seed": 0} for rate in (1e-4, 1e-3)]


def run(cell: Cell) -> dict[str, Any]:
    import copy

    from demo.pronounce import write_rows

    import veneer
    from veneer.train.config import make_config
    from veneer.train.run import fit

    with smollm2.place(cell) as (folder, base):
        learnt, _, judging = smollm2.words(cell)
        settings = {
            "base": base,
            "data": str(write_rows(folder / "train.jsonl", learnt)),
            "output": folder / "run",
        }
        settings |= {
            "rank": 8,
            "alpha": 16,
            "learning_rate": cell["rate"],
            "schedule": "constant",
            "warmup": 0.0,
        }
        settings |= {
            "batch_size": cell["batch"],
            "max_steps": cell["steps"],
            "save_every": cell["steps"],
        }
        settings |= {"seed": cell["seed"], "attention": "eager", "precision": "bf16"}
        result = fit(make_config(settings), quiet=True)
        held = smollm2.examples(judging[:100], result.tokenizer, folder)

        def exact(adapter: str | None) -> float:
            copied = copy.deepcopy(result.model).float()
            with veneer.use(copied, adapter):
                return smollm2.loss(copied, held)

        name = result.handle.name
        found: dict[str, Any] = {"base": exact(None), "adapter": exact(name)}
        for way in WAYS:
            report = result.handle.merge(rounding=way)
            found[way] = smollm2.loss(copy.deepcopy(result.model).float(), held)
            found[f"{way} kept"] = statistics.median(layer.retention for layer in report.layers)
            found["size"] = statistics.median(layer.change for layer in report.layers)
            result.handle.unmerge()
    return found


def _gain(run: Run, way: str) -> float:
    return (run["base"] - run[way]) / (run["base"] - run["adapter"])


def tables(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        told = [f"{run[way]:.4f}" for way in ("base", "adapter", *WAYS)]
        kept = [f"{run[f'{way} kept']:.1%}" for way in WAYS] + [
            f"{_gain(run, way):.1%}" for way in WAYS
        ]
        rows.append((f"{run['rate']:g}", f"{run['size']:.1e}", *told, *kept))
    head = ["rate", "‖ΔW‖ / ‖W‖", "loss: base", "adapter", *(f"merged, {way}" for way in WAYS)]
    head += [f"kept, {way}" for way in WAYS] + [f"gain kept, {way}" for way in WAYS]
    return table(head, rows)


def claims(runs: Sequence[Run]) -> list[Claim]:
    worst = {way: min(runs, key=lambda run: _gain(run, way)) for way in WAYS}
    least = {way: min(run[f"{way} kept"] for run in runs) for way in WAYS}
    gain = {way: _gain(worst[way], way) for way in WAYS}
    found = ", ".join(
        f"{way}: {least[way]:.1%} of the change and {gain[way]:.1%} of the gain" for way in WAYS
    )
    held = (
        min(least["faithful"], gain["faithful"]) >= 0.99
        and max(least["nearest"], gain["nearest"]) < 0.9
    )
    what = "a faithful 16-bit merge keeps what rounding to nearest loses"
    return [Claim(what, "Veneer", f"at worst, {found}", held)]


EXPERIMENT = Experiment(
    title="Rounding a merge to 16 bits", about=ABOUT, cells=cells, run=run, tables=tables, claims=claims,
    data=smollm2.lacking,
)  # fmt: skip
