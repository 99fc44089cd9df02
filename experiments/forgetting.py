"""LoRA forgets less than full fine-tuning: at the same loss on the task?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from experiments import loop, plots, smollm2
from experiments.experiment import Cell, Claim, Experiment, Run, table

SOURCE = "[Biderman et al. 2024](https://arxiv.org/abs/2405.09673), section 4.2 and 4.3"
RATES = {"lora": (1e-3, 3e-3), "full": (1e-4, 3e-4)}
ABOUT = """
Biderman et al. 2024 find that LoRA learns less and forgets less than full fine-tuning; whether it forgets less at the
same gain is their section 4.3. Here SmolLM2-135M learns letters → phonemes (the task of `make demo`), by
LoRA of rank 8 and alpha 16 on all linear layers, its base in bfloat16, and by full fine-tuning, float32 weights under
autocast to bfloat16. The same loop, rows, order and steps for both: 60 steps of 8 words, AdamW, linear warm-up and
decay, two rates each, ten times lower for full fine-tuning. The loss on 100 held-out words and that on general text
(1,536 tokens each of Python's language reference, licence texts and descriptions of data sets) are taken on the way, so
that both can be compared at the same loss of the task, whatever the rate.

Decided before the run: LoRA forgets less if, at each task loss that both reach, interpolated between the points of the
rate that forgets least there, its loss on general text is the lower one.
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [
            {"smoke": True, "method": name, "rate": 1e-3, "steps": 2, "batch": 4, "seed": 0}
            for name in RATES
        ]
    return [
        {"method": name, "rate": rate, "steps": 60, "batch": 8, "seed": 0}
        for name, rates in RATES.items() for rate in rates
    ]  # fmt: skip


def run(cell: Cell) -> dict[str, Any]:
    import torch

    import veneer
    from veneer import models
    from veneer.train.evaluate import collate

    full = cell["method"] == "full"
    with smollm2.place(cell) as (folder, name):
        base = models.load_base(name, attention="eager", precision="fp32" if full else "bf16")
        model, (learnt, _, judging) = base.model, smollm2.words(cell)
        learnt = smollm2.examples(learnt, base.tokenizer, folder)
        held, general = (
            smollm2.examples(judging[:100], base.tokenizer, folder),
            smollm2.general(cell, base.tokenizer),
        )
        torch.manual_seed(cell["seed"])
        trainable = loop.begin(model, cell["method"], lora=veneer.LoraConfig(rank=8, alpha=16))
        points: list[tuple[int, float, float]] = []

        def cast() -> Any:
            return torch.autocast("cpu", torch.bfloat16) if full else contextlib.nullcontext()

        def look(step: int) -> None:
            model.eval()
            with cast():
                texts = [smollm2.loss(model, text) for text in general.values()]
                points.append((step, smollm2.loss(model, held), sum(texts) / len(texts)))
            model.train()

        def loss(rows: list[int]) -> Any:
            with cast():
                return model(**collate(learnt, rows), use_cache=False).loss

        def watched(batches: Iterable[list[int]]) -> Iterator[list[int]]:
            for step, batch in enumerate(batches):
                if step in (0, cell["steps"] // 4, cell["steps"] // 2):
                    look(step)
                yield batch

        batches = loop.batches_of(len(learnt), cell["batch"], cell["seed"])
        loop.train(
            loop.trained(model), watched(batches), loss, steps=cell["steps"], rate=cell["rate"]
        )
        look(cell["steps"])
    return {"points": points, "trainable": trainable}


def tables(runs: Sequence[Run]) -> str:
    rows = [
        (run["method"], f"{run['rate']:g}", f"{run['trainable']:,}", step, f"{task:.3f}", f"{general:.3f}",
         f"{general - run['points'][0][2]:+.3f}")
        for run in runs for step, task, general in run["points"]
    ]  # fmt: skip
    return table(
        ("method", "rate", "numbers trained", "step", "task", "general text", "forgotten"), rows
    )


def _least(runs: Sequence[Run], method: str, task: float) -> float | None:
    """The least that `method` forgets on its way to this loss of the task, or None if it does not
    get there."""
    found = []
    for run in runs:
        if run["method"] == method:
            start = run["points"][0][2]
            for before, after in zip(run["points"][1:], run["points"][2:], strict=False):
                if after[1] <= task <= before[1]:
                    share = (before[1] - task) / max(before[1] - after[1], 1e-9)
                    found.append(before[2] + share * (after[2] - before[2]) - start)
    return min(found, default=None)


def _compared(runs: Sequence[Run]) -> list[tuple[float, float, float]]:
    """(task, what LoRA forgot, what full fine-tuning forgot) at the task losses that were met by
    either."""
    found = []
    for task in sorted({point[1] for run in runs for point in run["points"][1:]}, reverse=True):
        lora, full = _least(runs, "lora", task), _least(runs, "full", task)
        if lora is not None and full is not None:
            found.append((task, lora, full))
    return found


def claims(runs: Sequence[Run]) -> list[Claim]:
    met = _compared(runs)
    said = (
        "; ".join(f"at {task:.2f}: {lora:+.2f} beside {full:+.2f}" for task, lora, full in met)
        or "no common loss"
    )
    held = all(lora < full for _, lora, full in met) if met else None
    what = "LoRA forgets less than full fine-tuning, at the same loss of the task"
    return [
        Claim(what, SOURCE, f"rise of the loss on general text, LoRA beside full: {said}", held)
    ]


def drawn(runs: Sequence[Run]) -> dict[str, str]:
    series = {
        f"{run['method']}, rate {run['rate']:g}": [
            (task, general) for _, task, general in run["points"][1:]
        ]
        for run in runs
    }
    return {
        "trade": plots.lines(series, x="loss of the task", y="loss on general text", bottom=None)
    }


EXPERIMENT = Experiment(
    title="Forgetting: LoRA and full fine-tuning", about=ABOUT, cells=cells, run=run, tables=tables, claims=claims,
    plots=drawn, data=smollm2.lacking,
)  # fmt: skip
