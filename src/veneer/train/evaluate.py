"""Evaluation of a model on examples: loss, perplexity, token accuracy, exact match of
completions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from veneer.context import evaluation_mode
from veneer.errors import DataError
from veneer.train.config import make_config
from veneer.train.data import TOOLS, Records
from veneer.train.generate import generate
from veneer.train.loss import token_loss
from veneer.train.tasks import TASKS, Rows, Task
from veneer.train.tasks._base import RECORDED_FIELDS, extract_settings, move_batch, token_batch


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Fields:
        loss: mean negative log-likelihood in nats of the tokens with a label.
        accuracy: share of these tokens that are the most likely token.
        tokens: number of tokens with a label.
        examples: number of examples.
    """

    loss: float
    accuracy: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(model: Any, examples: Rows, *, batch_size: int = 8) -> Evaluation:
    """Evaluate a causal language model on the rows of the task sft, in evaluation mode. Afterwards
    each module has its previous mode."""
    row_order = sorted(range(len(examples)), key=examples.lengths.__getitem__, reverse=True)
    total_loss, token_count, correct_count = 0.0, 0, 0
    with evaluation_mode(model):
        for start in range(0, len(row_order), batch_size):
            row_indices = row_order[start : start + batch_size]
            result = token_loss(model, collate(examples, row_indices, model.device), accuracy=True)
            total_loss += float(result.total)
            token_count += int(result.items)
            correct_count += int(result.correct)
    return Evaluation(
        total_loss / max(token_count, 1),
        correct_count / max(token_count, 1),
        token_count,
        len(examples),
    )


@torch.no_grad()
def evaluate_task(task: Task, model: Any, rows: Rows, *, batch_size: int = 8) -> dict[str, float]:
    """The "loss" and the measures of a task other than sft, as means over the items of all rows,
    and the number of "items". An item is one term of the loss, such as a label or a pair of answers
    (`TaskLoss.items`)."""
    row_order = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)
    total_loss, item_count, measure_sums = 0.0, 0, dict[str, float]()
    with evaluation_mode(model):
        for start in range(0, len(row_order), batch_size):
            batch = task.collate([rows[i] for i in row_order[start : start + batch_size]])
            loss = task.loss(model, move_batch(model.device, batch))
            total_loss, item_count = total_loss + float(loss.total), item_count + loss.items
            measure_sums = {
                name: measure_sums.get(name, 0.0) + float(value)
                for name, value in loss.sums.items()
            }
    means = {
        name: value / max(item_count, 1)
        for name, value in {"loss": total_loss, **measure_sums}.items()
    }
    return {**means, "items": item_count}


def task_from_record(
    record: Mapping[str, Any], base: str, data: str, load_options: Mapping[str, Any], **fields: Any
) -> Task:
    """Create the task that trained an adapter, for an evaluation on other data.

    Args:
        record: the task record in the adapter's metadata (`Task.record`); {"name": …} if the
            metadata has none.
        base, data: as in `TrainConfig`: the base model, and the file or data set to evaluate on.
        load_options: keyword arguments of `models.load_head`.
        fields: fields of `TrainConfig` that override those of the record, unless they are None.

    Raises:
        ConfigError: the record or `fields` are not a valid configuration.
    """
    config_fields = {name: value for name, value in record.items() if name in RECORDED_FIELDS}
    config_fields |= {name: value for name, value in fields.items() if value is not None}
    task_name = record.get("name", "sft")
    config_fields |= {"task": task_name, "base": base, "data": data, "output": "."}
    task_config = make_config(config_fields, "what the adapter says of its task")
    return TASKS[task_name](task_config, extract_settings(record), load_options)


def collate(examples: Rows, row_indices: list[int], device: Any = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, [b, s] each, of the b examples at `row_indices`, padded
    on the right to the s tokens of the longest."""
    ids = [examples[i]["input_ids"] for i in row_indices]
    labels = [examples[i]["labels"] for i in row_indices]
    return move_batch(device, token_batch(ids, labels, 0))


def exact_match_rate(
    model: Any, tokenizer: Any, records: Records, *, max_new_tokens: int = 64, batch_size: int = 16
) -> float:
    """The share of the rows, each a prompt with a completion, whose greedy continuation equals the
    completion, except for surrounding whitespace; 0 without rows. Raises `DataError` for rows with
    tools or tool calls, because answers are compared as text."""
    for row, location in zip(records.rows, records.locations, strict=True):
        completion = row["completion"]
        if row.get(TOOLS) or (
            isinstance(completion, list) and any("tool_calls" in message for message in completion)
        ):
            raise DataError(
                f"{records.source}, {location}: tools, or calls of them, among what should be"
                " exactly right",
                "texts, which can be compared",
                "leave out --exact, or remove that row",
            )
    prompts = [row["prompt"] for row in records.rows]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    completions = [row["completion"] for row in records.rows]
    expected_answers = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    return sum(
        answer.strip() == expected.strip()
        for answer, expected in zip(answers, expected_answers, strict=True)
    ) / max(len(records), 1)
