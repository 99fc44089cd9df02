"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv:2402.01306) on single answers that
are labelled good or bad.

    r = log π(y) - log π₀(y)
    z = max(0, mean of r over prompts with another row's answer), without gradient
    loss = 1 - σ(β · (r - z)) if y is good, 1 - σ(β · (z - r)) if it is bad

y: an answer; π: the base with the adapter; π₀: the reference policy, as defined in `dpo.py`. The
formula of z estimates the KL divergence of π from π₀ on mismatched pairs: each prompt of a batch
with the answer of the row before it. A batch therefore needs two rows. Measures: the share of
answers whose reward β · r has the right sign, positive for good and negative for bad answers
(`accuracy`), and the mean of β · r, with the sign changed for bad answers (`reward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, DataError
from veneer.train import data
from veneer.train.tasks._base import Rows, RowSegment, TaskLoss, reference, register
from veneer.train.tasks._preferences import CausalTask, answer_log_probabilities
from veneer.train.tokens import IGNORED


@register
class Kto(CausalTask):
    required_columns = ("prompt", "completion", "label")
    loss_unit = "answer"
    measures = ("accuracy", "reward")
    compares_rows = True

    def encode(self, records: data.Records) -> Rows:
        if self.config.batch_size < 2:
            raise ConfigError(
                "kto with batch_size 1", "at least 2: others' answers measure the drift", "raise it"
            )
        is_good = [
            _parse_label(row["label"], f"{records.source}, {location}")
            for row, location in zip(records.rows, records.locations, strict=True)
        ]
        prompt_completions = [
            {column: row[column] for column in ("prompt", "completion")} for row in records.rows
        ]
        examples = self.tokenise_answers(records, prompt_completions)
        rows = [
            {
                "ids": example["input_ids"],
                "labels": example["labels"],
                "start": next(i for i, label in enumerate(example["labels"]) if label != IGNORED),
                "good": is_good[index],
            }
            for example, index in zip(examples.rows, examples.record_indices, strict=True)
        ]
        head_token_counts = [2 * sum(label != IGNORED for label in row["labels"]) for row in rows]
        lengths = [2 * len(row["ids"]) for row in rows]
        return Rows(
            rows,
            lengths,
            examples.record_indices,
            head_token_counts,
            examples.dropped,
            examples.truncated,
        )

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
        """The batch of b rows as 2b sequences of s tokens, [2b, s]: first each prompt with its own
        answer, then each prompt with the answer of the row before it (the first row with that of
        the last)."""
        token_limit, pairs = self.max_length(), []
        for prompt_row, answer_row in [
            *zip(rows, rows, strict=True),
            *zip(rows, [rows[-1], *rows[:-1]], strict=True),
        ]:
            prompt_ids = prompt_row["ids"][: prompt_row["start"]]
            answer_ids, answer_labels = (
                answer_row[name][answer_row["start"] :] for name in ("ids", "labels")
            )
            ids = [*prompt_ids, *answer_ids][:token_limit]
            pairs.append((ids, [*[IGNORED] * len(prompt_ids), *answer_labels][:token_limit]))
        return {**self.collate_pairs(pairs), "good": torch.tensor([row["good"] for row in rows])}

    def needs_reference(self) -> bool:
        return True

    def count_items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["good"])

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        is_good = batch["good"]
        inputs = {name: value for name, value in batch.items() if name != "good"}
        matched_inputs = {name: value[: len(is_good)] for name, value in inputs.items()}
        mismatched_inputs = {name: value[len(is_good) :] for name, value in inputs.items()}
        with reference(model):
            reference_log_p = answer_log_probabilities(model, inputs)
        with torch.no_grad():
            mismatched_log_ratios = (
                answer_log_probabilities(model, mismatched_inputs) - reference_log_p[len(is_good) :]
            )
        log_ratios = (
            answer_log_probabilities(model, matched_inputs) - reference_log_p[: len(is_good)]
        )
        signs = torch.where(is_good.to(log_ratios.device), 1.0, -1.0).to(log_ratios.dtype)
        signed_rewards = (self.beta * log_ratios * signs).detach()
        measure_sums = {"accuracy": (signed_rewards > 0).sum(), "reward": signed_rewards.sum()}
        return TaskLoss(
            losses(
                log_ratios, mismatched_log_ratios, is_good.to(log_ratios.device), self.beta
            ).sum(),
            len(is_good),
            measure_sums,
        )


def losses(
    log_ratios: Tensor, mismatched_log_ratios: Tensor, is_good: Tensor, beta: float
) -> Tensor:
    """The loss of each of b answers, [b].

    Args:
        log_ratios: log π - log π₀ of the answers, [b].
        mismatched_log_ratios: log π - log π₀ of b answers to other rows' prompts, [b]. Their mean
            estimates the KL divergence of π from π₀.
        is_good: whether each answer is good, [b].
    """
    # a batch of one row, at the end of the data, has no other answer; z is then 0
    shifted_log_ratios = log_ratios - (
        mismatched_log_ratios.mean().clamp(min=0).detach()
        if len(mismatched_log_ratios) > 1
        else 0.0
    )
    return 1 - torch.sigmoid(beta * torch.where(is_good, shifted_log_ratios, -shifted_log_ratios))


def _parse_label(label: Any, row_location: str) -> bool:
    """Whether a label calls the answer good: a boolean, 0 or 1, or one of these as text. Raises
    `DataError` for any other value. `row_location`: where the row is in the data, for the error."""
    values_by_spelling = {"true": True, "false": False, "1": True, "0": False}
    is_good = values_by_spelling.get(label.strip().lower()) if isinstance(label, str) else label
    if isinstance(is_good, bool) or is_good in (0, 1):
        return bool(is_good)
    raise DataError(
        f"{row_location}: label is {label!r}",
        "true for a good answer, false for a bad one",
        "fix that row",
    )
