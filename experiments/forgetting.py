"""Does LoRA forget less than full fine-tuning, at the same loss of the task?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from scripts import charts

from experiments import training, words
from experiments.study import (
    SEEDS,
    Cell,
    Claim,
    Experiment,
    Run,
    Tuned,
    differences,
    exceeds,
    show,
    show_runs,
)

SOURCE = "[Biderman et al. 2024](https://arxiv.org/abs/2405.09673), section 4.3"
LORA, FULL = "LoRA, rank 8", "full fine-tuning"
STEPS, BATCH, EVERY, TARGET = 40, 8, 8, 2.0
#: a rate counts if its last loss aside is this much below the target, so that its results reach it
MARGIN = 0.15
#: added to the loss of a run that does not reach the target, so that it scores behind all that do
UNREACHED = 100.0
PLAN = Tuned(
    arms={LORA: {"method": "lora"}, FULL: {"method": "full"}},
    rates={LORA: [2.5e-4, 5e-4, 1e-3], FULL: [2.5e-5, 5e-5, 1e-4]},
    shared={"steps": STEPS, "batch": BATCH, "every": EVERY, "target": TARGET},
    score=f"forgetting (–: {TARGET - MARGIN:g} is not reached)",
    worst=UNREACHED,
)
ABOUT = f"""
Biderman et al. 2024 find that LoRA learns less and forgets less than full fine-tuning; their
section 4.3 asks whether it forgets less at the same gain. Here SmolLM2-135M learns letters →
phonemes (the task of `make demo`) by LoRA of rank 8 and alpha 16 on all linear layers, with the
base in bfloat16, and by full fine-tuning of float32 weights under autocast to bfloat16. Both have
the same loop, rows, order and {STEPS} steps of {BATCH} words: AdamW without weight decay, a rate
that rises over a tenth of the steps and then falls to 0, gradients clipped to a norm of 1.

Every {EVERY} steps two losses are taken: of the phonemes of 40 words that did not train, and of 768
tokens of general text (Python's language reference, licence texts, descriptions of data sets).
Forgetting is the rise of the second when the first falls to {TARGET:g}, interpolated between the
two points around it. The rate of each method is the one that forgets least on words and texts
aside, of the rates that come to {TARGET - MARGIN:g} or less there within {STEPS} steps; results are
of other words, other texts and {len(SEEDS)} other seeds. The claim holds if full fine-tuning
forgets more, by the interval of the differences between runs of the same seed.
"""
EARLIER = """
The page had "did not hold": at the same loss LoRA forgot +1.03 beside +0.17 of full fine-tuning.
LoRA had been tried at two high rates, 1e-3 and 3e-3, and with one seed. Outside readers then found,
with one seed each, that LoRA at 3e-4 forgets +0.22 beside +0.17 at the same loss, and at 1e-4 with
more steps +0.15 beside about +0.21, and +0.11 beside +0.14: the claim turns round with the rate.
"""


def run(cell: Cell) -> dict[str, Any]:
    import torch

    import veneer
    from veneer import models
    from veneer.train.evaluate import collate

    full, choosing = cell["method"] == "full", cell["seed"] not in SEEDS
    with words.workplace(cell) as (folder, name):
        base = models.load_base(name, attention="eager", precision="fp32" if full else "bf16")
        model: Any = base.model
        train_words, aside_words, test_words = words.load_words(cell)
        examples = words.tokenise_words(train_words, base.tokenizer, folder)
        held_out = (aside_words if choosing else test_words)[:40]
        held_out = words.tokenise_words(held_out, base.tokenizer, folder)
        first = 0 if choosing else 2
        texts = words.general_text(cell, base.tokenizer, first=first, rows=2)
        torch.manual_seed(cell["seed"])
        lora = veneer.LoraConfig(rank=8, alpha=16)
        count = training.make_trainable(model, cell["method"], lora=lora)
        points: list[tuple[int, float, float]] = []

        def autocast() -> Any:
            return torch.autocast("cpu", torch.bfloat16) if full else contextlib.nullcontext()

        def measure(step: int) -> None:
            model.eval()
            with autocast():
                task = words.loss_of(model, held_out)
                points.append((step, task, words.general_loss(model, texts)))
            model.train()

        def loss(rows: list[int]) -> Any:
            with autocast():
                return model(**collate(examples, rows), use_cache=False).loss

        def measured_batches(batches: Iterable[list[int]]) -> Iterator[list[int]]:
            for step, batch in enumerate(batches):
                if step % cell["every"] == 0:
                    measure(step)
                yield batch

        batches = training.draw_batches(len(examples), cell["batch"], cell["seed"])
        training.train(
            training.trainable(model),
            measured_batches(batches),
            loss,
            steps=cell["steps"],
            rate=cell["rate"],
        )
        measure(cell["steps"])
    rise = rise_at(points, cell["target"])
    last = points[-1][1]
    counts = rise is not None and last <= cell["target"] - MARGIN
    aside = rise if counts else UNREACHED + last
    return {"points": points, "numbers": count, "rise": rise, "aside": aside}


def rise_at(points: Sequence[tuple[int, float, float]], target: float) -> float | None:
    """How far the loss on general text has risen when the loss of the task first falls to `target`;
    None if it never does."""
    for before, after in pairwise(points):
        if after[1] <= target:
            share = (before[1] - target) / max(before[1] - after[1], 1e-9)
            share = min(max(share, 0.0), 1.0)
            return before[2] + share * (after[2] - before[2]) - points[0][2]
    return None


def select_reached(arm: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in PLAN.results(arm, runs) if run["rise"] is not None]


def claims(runs: Sequence[Run]) -> list[Claim]:
    text = f"LoRA forgets less than full fine-tuning, at a task loss of {TARGET:g}"
    lora, full = (select_reached(arm, runs) for arm in (LORA, FULL))
    gaps = differences(full, lora, "rise")
    if not gaps:
        return [Claim(text, SOURCE, "no seed with which both reach it", exceeds(gaps))]
    evidence = (
        f"rise of the loss on general text: LoRA {show_runs(lora, 'rise')}, full"
        f" {show_runs(full, 'rise')}; full less LoRA {show(gaps, sign='+')}"
    )
    return [Claim(text, SOURCE, evidence, exceeds(gaps))]


def draw(runs: Sequence[Run]) -> dict[str, str]:
    series = {
        f"{arm}, seed {run['seed']}": [(task, general) for _, task, general in run["points"][1:]]
        for arm in PLAN.arms
        for run in PLAN.results(arm, runs)
    }
    labels = {"x": "loss of the task", "y": "loss on general text"}
    return {"trade": charts.lines_file(series, **labels, bottom=None)}


EXPERIMENT = Experiment(
    title="Forgetting: LoRA and full fine-tuning",
    about=ABOUT,
    plan=PLAN,
    run=run,
    columns={"rise": f"forgotten at {TARGET:g}"},
    claims=claims,
    plots=draw,
    toy={"steps": 2, "batch": 4, "every": 1, "target": 5.5},
    earlier=EARLIER,
    missing_data=words.missing_data,
)
