"""Quality against trainable numbers: tables 2 to 4 of Hu et al. 2021, on slots of SNIPS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from scripts import charts

from experiments import snips, training
from experiments.study import (
    HU,
    SEEDS,
    Cell,
    Claim,
    Experiment,
    Run,
    Tuned,
    differences,
    exceeds,
    mean,
    show,
)

STEPS, BATCH, RANK, ALPHA, INNER, WITHIN = 120, 16, 8, 16, 16, 0.01
TABLES = f"{HU}, tables 2 to 4"
FULL, HEAD, BIASES, LAYERS = "full fine-tuning", "head only", "biases", "adapter layers"
ALL, QV = "LoRA, all linear layers", "LoRA, query and value"
PLAN = Tuned(
    arms={
        FULL: {"method": "full"},
        HEAD: {"method": "head"},
        BIASES: {"method": "bias"},
        LAYERS: {"method": "adapters"},
        QV: {"method": "lora", "targets": ["query", "value"]},
        ALL: {"method": "lora", "targets": "all-linear"},
    },
    rates={
        FULL: [2.5e-4, 5e-4, 1e-3],
        HEAD: [1e-2, 2e-2, 4e-2],
        BIASES: [5e-3, 1e-2, 2e-2],
        LAYERS: [5e-3, 1e-2, 2e-2],
        QV: [2.5e-3, 5e-3, 1e-2],
        ALL: [2.5e-3, 5e-3, 1e-2],
    },
    shared={"steps": STEPS, "batch": BATCH},
    score="span F1",
    sign=-1.0,
)
ABOUT = f"""
Tables 2 to 4 of {HU} set the quality of full fine-tuning, biases alone (BitFit), adapter layers and
LoRA beside the numbers that each trains: RoBERTa and DeBERTa on GLUE, GPT-2 on E2E. Here: the slots
of SNIPS sentences ([Coucke et al. 2018](https://arxiv.org/abs/1805.10190)), 72 labels, with
MiniLM-L6 (22.7 million parameters) and a new linear head, which each method trains as well. 13,273
sentences to train on, 511 aside, 694 test sentences that training has not seen. {STEPS} steps of
{BATCH} sentences, a seventh of a pass; float32, no dropout.

All methods have the same loop: AdamW without weight decay, one rate for all that a method trains,
which rises over the first tenth of the steps and then falls to 0, gradients clipped to a norm of 1,
the same sentences in the same order for a seed, sentences of like length together. The rate is
chosen by the span F1 of the sentences aside; results are the span F1 of the test sentences with
{len(SEEDS)} other seeds. LoRA has rank {RANK} and alpha {ALPHA}; adapter layers are those of
[Houlsby et al. 2019](https://arxiv.org/abs/1902.00751), two a block, {INNER} wide, with the layer
norms.
"""
EARLIER = """
The page had 300 and 600 steps of 32 sentences and five seeds. "LoRA is as good as full fine-tuning,
within 0.01" did not hold in three forms, and then held in a fourth (rank 64, a rate for the head,
600 steps: 0.0099 ± 0.0051 apart), after some fourteen settings of rank, alpha and rates had been
tried with seeds 0 and 1, which were among the five that it was reported on. That claim is gone:
here a setting is reported on seeds that chose nothing. Bars of this project (a span F1 of 0.87,
0.15 above the head alone) are gone as well. "LoRA is no worse than adapter layers" held (0.898
beside 0.869).
"""


@cache
def load_task(toy: bool) -> snips.Tagging:
    return snips.load_tagging(toy)


def run(cell: Cell) -> dict[str, Any]:
    import torch

    import veneer

    task = load_task("toy" in cell)
    torch.manual_seed(cell["seed"])
    model = task.make_model().train()
    lora = None
    if "targets" in cell:
        lora = veneer.LoraConfig(
            rank=RANK, alpha=ALPHA, targets=cell["targets"], train_also="classifier"
        )
    numbers = training.make_trainable(
        model, cell["method"], head=("classifier",), lora=lora, inner=INNER
    )
    lengths = [len(row.ids) for row in task.train]
    training.train(
        training.trainable(model),
        training.draw_batches(len(task.train), cell["batch"], cell["seed"], lengths),
        lambda rows: task.loss(model, rows),
        steps=cell["steps"],
        rate=cell["rate"],
    )
    choosing = cell["seed"] not in SEEDS
    f1 = task.f1(model.eval(), task.aside if choosing else task.test)
    return {"numbers": numbers, "f1": f1, "aside": -f1}


def compare(runs: Sequence[Run], baseline: str, limit: float, text: str) -> Claim:
    """LoRA on all linear layers is more than `limit` above another method."""
    lora, peer = PLAN.results(ALL, runs), PLAN.results(baseline, runs)
    gaps = differences(lora, peer, "f1")
    evidence = f"{mean(lora, 'f1'):.3f} beside {mean(peer, 'f1'):.3f}, {show(gaps, sign='+')}"
    return Claim(text, TABLES, evidence, exceeds(gaps, limit))


def claims(runs: Sequence[Run]) -> list[Claim]:
    return [
        compare(runs, FULL, -WITHIN, f"LoRA is as good as full fine-tuning, within {WITHIN}"),
        compare(runs, BIASES, 0.0, "LoRA is better than biases alone"),
        compare(runs, LAYERS, 0.0, "LoRA is better than adapter layers of half its numbers"),
        compare(runs, QV, 0.0, "LoRA on all layers is better than on query and value, at one rank"),
    ]


def draw(runs: Sequence[Run]) -> dict[str, str]:
    quality = {
        arm: [(math.log10(mean(results, "numbers")), mean(results, "f1"))]
        for arm in PLAN.arms
        if mean(results := PLAN.results(arm, runs), "numbers")
    }
    labels = {"x": "log10 of trained numbers", "y": "span F1"}
    return {"f1": charts.lines_file(quality, **labels, dots=True, bottom=None)}


EXPERIMENT = Experiment(
    title="Quality against trainable numbers",
    about=ABOUT,
    plan=PLAN,
    run=run,
    columns={"f1": "span F1"},
    claims=claims,
    plots=draw,
    toy={"steps": 3},
    earlier=EARLIER,
    full=("glue.yaml",),
    missing_data=snips.missing_data,
)
