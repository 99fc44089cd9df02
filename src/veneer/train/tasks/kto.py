"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv:2402.01306): answers that are good
or bad, not pairs.

    r = log π(y) - log π₀(y)      z = max(0, mean of r over prompts with another row's answer), without gradient
    loss = 1 - σ(β · (r - z)) if y is good, 1 - σ(β · (z - r)) if it is bad

The answers of a batch, moved by one row, are the mismatched ones, so a batch needs two rows.
Measures: the share of answers whose reward β · r has the sign that their label says, and the mean
of β · r with that sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, DataError
from veneer.train import data
from veneer.train.tasks._base import Rows, Shown, TaskLoss, reference, register
from veneer.train.tasks._preferences import Causal, summed
from veneer.train.tokens import IGNORED

BETA = 0.1  # the paper's


@register
class Kto(Causal):
    parts, item, measures = ("prompt", "completion", "label"), "answer", ("accuracy", "reward")
    compares_rows = True

    def encode(self, records: data.Records) -> Rows:
        if self.config.batch_size < 2:
            raise ConfigError(
                "kto with batch_size 1", "at least 2: others' answers measure the drift", "raise it"
            )
        good = [
            _good(row["label"], f"{records.source}, {place}") for row, place in _placed(records)
        ]
        bare = [{part: row[part] for part in ("prompt", "completion")} for row in records.rows]
        examples = self.answers(records, bare)
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

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        prompt, completion = (
            self.processor.decode(ids)
            for ids in (row["ids"][: row["start"]], row["ids"][row["start"] :])
        )
        label = "good" if row["good"] else "bad"
        return [
            Shown(False, "prompt", prompt),
            Shown(True, "completion", completion),
            Shown(True, "label", label),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """[2b, s]: the rows, then each prompt with the answer of the row before it."""
        limit, made = self.max_length(), []
        for prompt, answer in [
            *zip(rows, rows, strict=True),
            *zip(rows, [rows[-1], *rows[:-1]], strict=True),
        ]:
            head, tail = prompt["ids"][: prompt["start"]], answer["ids"][answer["start"] :]
            ids = [*head, *tail][:limit]
            made.append((ids, [*[IGNORED] * len(head), *tail][:limit]))
        return {**self.batch(made), "good": torch.tensor([row["good"] for row in rows])}

    def refers(self) -> bool:
        return True

    def items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["good"])

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        good = batch["good"]
        inputs = {name: value for name, value in batch.items() if name != "good"}
        own = {name: value[: len(good)] for name, value in inputs.items()}
        others = {name: value[len(good) :] for name, value in inputs.items()}
        with reference(model):
            before = summed(model, inputs)
        with torch.no_grad():
            drift = summed(model, others) - before[len(good) :]
        reward = summed(model, own) - before[: len(good)]
        beta = BETA if self.config.beta is None else self.config.beta
        sign = torch.where(good.to(reward.device), 1.0, -1.0).to(reward.dtype)
        gain = (beta * reward * sign).detach()
        sums = {"accuracy": (gain > 0).sum(), "reward": gain.sum()}
        return TaskLoss(losses(reward, drift, good.to(reward.device), beta).sum(), len(good), sums)


def losses(reward: Tensor, drift: Tensor, good: Tensor, beta: float) -> Tensor:
    """[b] from log π - log π₀ of the answers and of the mismatched ones, [b] each, and which
    answers are good."""
    # a row that is left alone at the end of the data has nobody's answer but its own
    apart = reward - (drift.mean().clamp(min=0).detach() if len(drift) > 1 else 0.0)
    return 1 - torch.sigmoid(beta * torch.where(good, apart, -apart))


def _placed(records: data.Records) -> Any:
    return zip(records.rows, records.places, strict=True)


def _good(label: Any, where: str) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}
    value = words.get(label.strip().lower()) if isinstance(label, str) else label
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise DataError(
        f"{where}: label is {label!r}",
        "true for a good answer, false for a bad one",
        "fix that row",
    )
