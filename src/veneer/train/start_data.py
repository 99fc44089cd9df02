"""What a variant starts from in a training run: the first rows of its training data.

EVA and CorDA look at the inputs of each layer, LoRA-GA at the gradient of each weight. A row is a
batch, so that no padding is among the inputs; the loss is the model's own, a mean over the labels
of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from veneer.errors import ConfigError
from veneer.train.tasks import Task
from veneer.train.tokens import IGNORED, Examples
from veneer.variants import VARIANTS

#: how many rows
ROWS = 64


def start_data(task: Task, rows: Any, model: Any) -> dict[str, Any]:
    """The arguments of ``attach`` that the task's variant asks for: ``batches``, or none. What is
    no part of the training data (LoftQ's original weights) is for the caller to give.
    ``ConfigError``: it starts from the gradient of a loss that is not the model's own."""
    variant = task.config.variant
    needs = VARIANTS[variant].needs & {"inputs", "gradient"}
    if not needs:
        return {}
    if isinstance(rows, Examples):
        return {"batches": list(_batches(rows, model.device, "gradient" in needs))}
    if "gradient" in needs:
        problem = f"variant {variant!r} for task {task.name!r}, whose loss is not the model's own"
        raise ConfigError(
            problem, "task sft", "choose a variant that starts from inputs, such as eva"
        )
    first = (task.inputs(task.collate([row])) for row in rows.rows[:ROWS])
    return {
        "batches": [
            {name: _on(value, model.device) for name, value in batch.items()} for batch in first
        ]
    }


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _batches(examples: Examples, device: torch.device, learns: bool) -> Iterator[dict[str, Any]]:
    """The first ``ROWS`` rows from which something is learnt, as arguments of the model, in the
    order of the data."""
    learnt = (
        row
        for row, labels in enumerate(examples.labels)
        if any(label != IGNORED for label in labels[1:])
    )
    for row in islice(learnt, ROWS):
        ids = torch.tensor([examples.input_ids[row]], device=device)
        labels = {"labels": torch.tensor([examples.labels[row]], device=device)} if learns else {}
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
            **labels,
        }
