"""How well a model predicts examples: loss, perplexity, share of tokens right, share of completions
exactly right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from veneer.errors import DataError
from veneer.train.config import make_config
from veneer.train.data import TOOLS, Records
from veneer.train.generate import generate
from veneer.train.loss import token_loss
from veneer.train.tasks import TASKS, Rows, Task
from veneer.train.tasks._base import RECORDED, settings_in
from veneer.train.tokens import IGNORED, Examples


@dataclass(frozen=True)
class Evaluation:
    """`loss`: mean negative log-likelihood in nats over `tokens` labelled tokens; `accuracy`: share
    of them that are the most likely one."""

    loss: float
    accuracy: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(model: Any, examples: Examples, *, batch_size: int = 8) -> Evaluation:
    order = sorted(range(len(examples)), key=examples.lengths.__getitem__, reverse=True)
    total, items, correct, training = 0.0, 0, 0, model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            result = token_loss(model, collate(examples, rows, model.device), accuracy=True)
            total += float(result.total)
            items += int(result.items)
            correct += int(result.correct)
    finally:
        model.train(training)
    return Evaluation(total / max(items, 1), correct / max(items, 1), items, len(examples))


@torch.no_grad()
def evaluate_task(task: Task, model: Any, rows: Rows, *, batch_size: int = 8) -> dict[str, float]:
    """The loss and the measures of any task but sft: means over the items of all rows, and how many
    items there are."""
    order = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)
    total, items, sums, training = 0.0, 0, dict[str, float](), model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = task.collate([rows[i] for i in order[start : start + batch_size]])
            found = task.loss(model, to(model.device, batch))
            total, items = total + float(found.total), items + found.items
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.sums.items()}
    finally:
        model.train(training)
    means = {name: value / max(items, 1) for name, value in {"loss": total, **sums}.items()}
    return {**means, "items": items}


def task_of(
    record: Mapping[str, Any], base: str, data: str, loading: Mapping[str, Any], **fields: Any
) -> Task:
    """The task of an adapter's record (`Task.record`; {"name": …} for one without), on other data.
    ``loading``: as `load_base` takes it; ``fields``: of `TrainConfig`, over those of the record;
    None leaves the record's. Raises `ConfigError`."""
    config = {name: value for name, value in record.items() if name in RECORDED}
    config |= {name: value for name, value in fields.items() if value is not None}
    name = record.get("name", "sft")
    config |= {"task": name, "base": base, "data": data, "output": "."}
    made = make_config(config, "what the adapter says of its task")
    return TASKS[name](made, settings_in(record), loading)


def to(device: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def collate(examples: Examples, rows: list[int], device: Any = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [b, s] of the examples at `rows`, padded on the
    right."""
    width = max(examples.lengths[i] for i in rows)
    ids, labels = [examples.input_ids[i] for i in rows], [examples.labels[i] for i in rows]
    parts = {
        "input_ids": (ids, 0),
        "attention_mask": ([[1] * len(row) for row in ids], 0),
        "labels": (labels, IGNORED),
    }
    return {
        name: torch.tensor([row + [fill] * (width - len(row)) for row in lists], device=device)
        for name, (lists, fill) in parts.items()
    }


def exact(
    model: Any, tokenizer: Any, rows: Records, *, max_new_tokens: int = 64, batch_size: int = 16
) -> float:
    """Share of prompt/completion rows whose greedy continuation is the completion, surrounding
    spaces aside. Raises `DataError` for tools and calls of them: what is written is compared as
    text."""
    for row, place in zip(rows.rows, rows.places, strict=True):
        answer = row["completion"]
        if row.get(TOOLS) or (
            isinstance(answer, list) and any("tool_calls" in message for message in answer)
        ):
            problem = (
                f"{rows.source}, {place}: tools, or calls of them, among what should be exactly"
                " right"
            )
            raise DataError(
                problem, "texts, which can be compared", "leave out --exact, or remove that row"
            )
    prompts = [row["prompt"] for row in rows.rows]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    completions = [row["completion"] for row in rows.rows]
    wanted = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return sum(
        answer.strip() == want.strip() for answer, want in zip(answers, wanted, strict=True)
    ) / max(len(rows), 1)
