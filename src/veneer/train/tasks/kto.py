"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv:2402.01306) on single answers that
are labelled good or bad.

    r = log π(y) - log π₀(y)
    z = max(0, mean of r over prompts with another row's answer), without gradient
    loss = 1 - σ(β · (r - z)) if y is good, 1 - σ(β · (z - r)) if it is bad

Mismatched pairs are each prompt of a batch with the answer of the row before it, so a batch needs
two rows. Measures: the share of answers whose reward β · r is positive if good and negative if bad
(`accuracy`), and the mean of β · r for good and -β · r for bad ones (`reward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, DataError
from veneer.train import data
from veneer.train.tasks._base import Rows, RowSegment, TaskLoss, reference, register
from veneer.train.tasks._preferences import Causal, answer_log_probabilities
from veneer.train.tokens import IGNORED

BETA = 0.1  # the paper's


@register
class Kto(Causal):
    required_columns = ("prompt", "completion", "label")
    item = "answer"
    measures = ("accuracy", "reward")
    compares_rows = True

    def encode(self, records: data.Records) -> Rows:
        if self.config.batch_size < 2:
            raise ConfigError(
                "kto with batch_size 1", "at least 2: others' answers measure the drift", "raise it"
            )
        good = [
            _parse_label(row["label"], f"{records.source}, {location}")
            for row, location in _rows_with_locations(records)
        ]
        prompt_completions = [
            {column: row[column] for column in ("prompt", "completion")} for row in records.rows
        ]
        examples = self.tokenise_answers(records, prompt_completions)
        rows = [
            {
                "ids": ids,
                "start": next(i for i, label in enumerate(labels) if label != IGNORED),
                "good": good[index],
            }
            for ids, labels, index in zip(
                examples.input_ids, examples.labels, examples.index, strict=True
            )
        ]
        learnt = [2 * (len(row["ids"]) - row["start"]) for row in rows]
        lengths = [2 * len(row["ids"]) for row in rows]
        return Rows(rows, lengths, examples.index, learnt, examples.dropped, examples.truncated)

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        prompt, completion = (
            self.processor.decode(ids)
            for ids in (row["ids"][: row["start"]], row["ids"][row["start"] :])
        )
        label = "good" if row["good"] else "bad"
        return [
            RowSegment(False, "prompt", prompt),
            RowSegment(True, "completion", completion),
            RowSegment(True, "label", label),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """[2b, s]: the rows, then each prompt with the answer of the row before it."""
        limit, pairs = self.max_length(), []
        for prompt, answer in [
            *zip(rows, rows, strict=True),
            *zip(rows, [rows[-1], *rows[:-1]], strict=True),
        ]:
            head, tail = prompt["ids"][: prompt["start"]], answer["ids"][answer["start"] :]
            ids = [*head, *tail][:limit]
            pairs.append((ids, [*[IGNORED] * len(head), *tail][:limit]))
        return {**self.batch(pairs), "good": torch.tensor([row["good"] for row in rows])}

    def needs_reference(self) -> bool:
        return True

    def items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["good"])

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        good = batch["good"]
        inputs = {name: value for name, value in batch.items() if name != "good"}
        matched = {name: value[: len(good)] for name, value in inputs.items()}
        mismatched = {name: value[len(good) :] for name, value in inputs.items()}
        with reference(model):
            reference_log_p = answer_log_probabilities(model, inputs)
        with torch.no_grad():
            drift = answer_log_probabilities(model, mismatched) - reference_log_p[len(good) :]
        reward = answer_log_probabilities(model, matched) - reference_log_p[: len(good)]
        beta = BETA if self.config.beta is None else self.config.beta
        sign = torch.where(good.to(reward.device), 1.0, -1.0).to(reward.dtype)
        gain = (beta * reward * sign).detach()
        sums = {"accuracy": (gain > 0).sum(), "reward": gain.sum()}
        return TaskLoss(losses(reward, drift, good.to(reward.device), beta).sum(), len(good), sums)


def losses(reward: Tensor, drift: Tensor, good: Tensor, beta: float) -> Tensor:
    """The loss of each answer, [b].

    Args:
        reward: log π - log π₀ of the answers, [b].
        drift: the same of the mismatched answers, [b].
        good: whether each answer is good, [b].
    """
    # a single row at the end of the data has no other row's answer to be paired with
    gain = reward - (drift.mean().clamp(min=0).detach() if len(drift) > 1 else 0.0)
    return 1 - torch.sigmoid(beta * torch.where(good, gain, -gain))


def _rows_with_locations(records: data.Records) -> Any:
    return zip(records.rows, records.locations, strict=True)


def _parse_label(label: Any, location: str) -> bool:
    spellings = {"true": True, "false": False, "1": True, "0": False}
    is_good = spellings.get(label.strip().lower()) if isinstance(label, str) else label
    if isinstance(is_good, bool) or is_good in (0, 1):
        return bool(is_good)
    raise DataError(
        f"{location}: label is {label!r}",
        "true for a good answer, false for a bad one",
        "fix that row",
    )
