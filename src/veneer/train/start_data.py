"""Calibration data for variants that compute their initial values from it: the first rows of a
run's training data.

EVA and CorDA use the inputs of each layer, LoRA-GA the gradient of each weight. Each row is a batch
of its own, so that the inputs contain no padding. The loss is the model's own, a mean over the
labels of the row.
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

#: number of rows
ROWS = 64


def start_data(task: Task, rows: Any, model: Any) -> dict[str, Any]:
    """The arguments of ``attach`` that the task's variant needs: ``batches``, or nothing. The
    caller provides arguments that do not come from the data, such as LoftQ's original weights.
    Raises ``ConfigError`` for a variant that needs gradients and a task whose loss is not the
    model's own."""
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
    """The first ``ROWS`` rows that have a label, as arguments of the model, in the order of the
    data."""
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
