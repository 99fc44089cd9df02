"""The loss of an adapter that is merged into 16 bits, to nearest and faithfully."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import words
from experiments.study import (
    SEEDS,
    Cell,
    Claim,
    Experiment,
    Fixed,
    Run,
    all_of,
    exceeds,
    show,
    table,
)

ROUNDINGS = ("nearest", "faithful")
STEPS, BATCH, RATE, KEPT_BY_FAITHFUL, LOST_BY_NEAREST = 12, 16, 1e-4, 0.99, 0.9
PLAN = Fixed([{"rate": RATE, "steps": STEPS, "batch": BATCH, "seed": seed} for seed in SEEDS])
ABOUT = f"""
An adapter is merged into bfloat16 weights, whose spacing is up to 2⁻⁷ of a number: a change much
smaller than that is lost where each number is rounded to its nearest. `veneer merge --rounding
faithful` rounds up or down so that the errors cancel on what the adapter reads
([why](../decisions/merging.md#16-bit-merges-round-so-that-the-change-survives)). Early adapters of
small rates are the hard case, so here are letters → phonemes on SmolLM2-135M, rank 8 on all linear
layers, after {STEPS} steps of {BATCH} words at {RATE:g}. Two roundings of one adapter are compared,
not two methods of training, so no rate is chosen.

Retention is the share of ΔW in W′ − W after rounding (the slope of the regression), the median over
210 weights. The kept gain is the share of what the adapter takes off the base's loss on 60 words
that did not train that the merged model takes off as well, computed in float32, so that the weights
alone differ. The claim holds if faithful rounding keeps {KEPT_BY_FAITHFUL:.0%} of both and nearest
keeps less than {LOST_BY_NEAREST:.0%} of both, by the intervals over the seeds.
"""
EARLIER = """
The claim held with one seed, at 1e-4 and 1e-3 after 15 steps (at worst, nearest kept 45.8 % of the
change and 66.2 % of the gain). At 1e-3 nearest kept 98.9 % of the change and all of the gain: there
is nothing to win.
"""


def run(cell: Cell) -> dict[str, Any]:
    from demo.pronounce import write_rows

    import veneer
    from veneer.train.config import make_config
    from veneer.train.run import fit

    with words.workplace(cell) as (folder, base):
        train_words, _, test_words = words.load_words(cell)
        settings = {
            "base": base,
            "data": str(write_rows(folder / "train.jsonl", train_words)),
            "output": folder / "run",
            "rank": 8,
            "alpha": 16,
            "learning_rate": cell["rate"],
            "schedule": "constant",
            "warmup": 0.0,
            "batch_size": cell["batch"],
            "max_steps": cell["steps"],
            "save_every": cell["steps"],
            "seed": cell["seed"],
            "attention": "eager",
            "precision": "bf16",
        }
        result = fit(make_config(settings), quiet=True)
        held_out = words.tokenise_words(test_words[:60], result.tokenizer, folder)

        def loss_in_float32(adapter: str | None) -> float:
            model = copy.deepcopy(result.model).float()
            with veneer.use(model, adapter):
                return words.loss_of(model, held_out)

        losses = {"base": loss_in_float32(None), "adapter": loss_in_float32(result.handle.name)}
        retention = {}
        for rounding in ROUNDINGS:
            report = result.handle.merge(rounding=rounding)
            losses[rounding] = words.loss_of(copy.deepcopy(result.model).float(), held_out)
            retention[rounding] = statistics.median(layer.retention for layer in report.layers)
            size = statistics.median(layer.change for layer in report.layers)
            result.handle.unmerge()
    return {"losses": losses, "retention": retention, "size": size}


def kept_gain(run: Run, rounding: str) -> float:
    losses = run["losses"]
    return (losses["base"] - losses[rounding]) / (losses["base"] - losses["adapter"])


def tables(runs: Sequence[Run]) -> str:
    rows = []
    for rounding in ROUNDINGS:
        numbers = (
            [run["losses"][rounding] for run in runs],
            [run["retention"][rounding] for run in runs],
            [kept_gain(run, rounding) for run in runs],
        )
        rows.append((f"merged, {rounding}", *map(show, numbers)))
    for name in ("base", "adapter"):
        rows.append((name, show([run["losses"][name] for run in runs]), "", ""))
    size = show([run["size"] for run in runs], 6)
    note = f"Mean ± half of the 95 % interval over {len(runs)} seeds; ‖ΔW‖ / ‖W‖ is {size}."
    return f"{table(('', 'loss', 'retention', 'kept gain'), rows)}\n\n{note}"


def claims(runs: Sequence[Run]) -> list[Claim]:
    shares = {
        rounding: (
            [run["retention"][rounding] for run in runs],
            [kept_gain(run, rounding) for run in runs],
        )
        for rounding in ROUNDINGS
    }
    verdicts = [exceeds(values, KEPT_BY_FAITHFUL) for values in shares["faithful"]]
    verdicts += [exceeds([LOST_BY_NEAREST - x for x in values]) for values in shares["nearest"]]
    evidence = "; ".join(
        f"{rounding}: {show(changes)} of the change and {show(gains)} of the gain"
        for rounding, (changes, gains) in shares.items()
    )
    text = "a faithful 16-bit merge keeps what rounding to nearest loses"
    return [Claim(text, "Veneer", evidence, all_of(verdicts))]


EXPERIMENT = Experiment(
    title="Rounding a merge to 16 bits",
    about=ABOUT,
    plan=PLAN,
    run=run,
    tables=tables,
    claims=claims,
    toy={"steps": 1, "batch": 4, "rate": 1e-2},
    earlier=EARLIER,
    missing_data=words.missing_data,
)
