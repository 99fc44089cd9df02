"""Shared by tasks on answers (dpo, orpo, kto, grpo, reward): rows of a prompt with one or two
answers, and the log-probability of each answer.

chosen, rejected (and prompt)   →   [2b, s]: the chosen answers of a batch, then the rejected ones
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from veneer.errors import DataError
from veneer.train import data, row_shape, tokens
from veneer.train.causal import must_not_see_later_tokens
from veneer.train.loss import log_probabilities
from veneer.train.tasks._base import (
    Base,
    Rows,
    RowSegment,
    Task,
    TaskLoss,
    padding_token,
    token_batch,
)
from veneer.train.tokens import IGNORED


class Causal(Task):
    """Base class of tasks that train a causal language model on answers."""

    def load(self) -> Base:
        base = super().load()
        must_not_see_later_tokens(base.model, self.config.base)
        return base

    def tokenise_answers(
        self, records: data.Records, rows: list[dict[str, Any]]
    ) -> tokens.Examples:
        """Tokenise rows of a prompt and a completion (texts or chats), or of a text. The answer's
        tokens are the labels."""
        kind = "prompt" if "prompt" in rows[0] else "text"
        shaped_rows = [
            row_shape.check_texts_or_chats(row, f"{records.source}, {location}")
            for row, location in zip(rows, records.locations, strict=True)
        ]
        answer_records = replace(records, kind=kind, rows=shaped_rows)
        options: Any = {"max_length": self.max_length(), "too_long": self.config.too_long}
        return tokens.tokenise(answer_records, self.processor, **options)

    def batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        ids, labels = zip(*pairs, strict=True)
        return token_batch(ids, labels, padding_token(self.processor))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "use_cache": False,
        }


class Preference(Causal):
    """Base class of tasks on pairs of answers, a chosen and a rejected one."""

    required_columns, optional_columns, item = ("chosen", "rejected"), ("prompt",), "pair"
    measures = ("accuracy", "margin")

    def encode(self, records: data.Records) -> Rows:
        rows = [with_prompt(row) for row in records.rows]
        sides = [
            self.tokenise_answers(records, [row[side] for row in rows])
            for side in ("chosen", "rejected")
        ]
        row_numbers = [{index: i for i, index in enumerate(side.index)} for side in sides]
        kept_indices = [index for index in sides[0].index if index in row_numbers[1]]
        if not kept_indices:
            problem = f"no pair of {records.source} whose answers are both short enough"
            raise DataError(problem, "at least one", "raise max_length")
        encoded_rows, lengths, learnt = [], [], []
        for index in kept_indices:
            positions = [position_of_index[index] for position_of_index in row_numbers]
            answers = [
                (side.input_ids[i], side.labels[i])
                for side, i in zip(sides, positions, strict=True)
            ]
            encoded_rows.append({"chosen": answers[0], "rejected": answers[1]})
            lengths.append(2 * max(len(ids) for ids, _ in answers))
            learnt.append(sum(label != IGNORED for _, labels in answers for label in labels))
        return Rows(
            encoded_rows,
            lengths,
            kept_indices,
            learnt,
            len(records) - len(kept_indices),
            max(side.truncated for side in sides),
        )

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        """The prompt is the unlabelled prefix that both sides share."""
        sides = [list(zip(*row[side], strict=True)) for side in ("chosen", "rejected")]
        prompt_length = 0
        while (
            prompt_length < min(map(len, sides))
            and sides[0][prompt_length] == sides[1][prompt_length]
            and sides[0][prompt_length][1] == IGNORED
        ):
            prompt_length += 1
        prompt = (
            self.token_segments("prompt", *(segment[:prompt_length] for segment in row["chosen"]))
            if prompt_length
            else []
        )
        return prompt + [
            segment
            for side in ("chosen", "rejected")
            for segment in self.token_segments(
                side, *(segment[prompt_length:] for segment in row[side])
            )
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.batch([row[side] for side in ("chosen", "rejected") for row in rows])

    def items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["input_ids"]) // 2

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss: ...


def with_prompt(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The two answers of a row, each with its prompt. If the row has no prompt, the messages that
    both chats begin with are the prompt; two texts have none."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = row["prompt"]
    elif isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        return {"chosen": {"text": chosen}, "rejected": {"text": rejected}}
    return {
        "chosen": {"prompt": prompt, "completion": chosen},
        "rejected": {"prompt": prompt, "completion": rejected},
    }


def answer_log_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """log p of each row's answer, [rows]: a sum over its tokens."""
    return log_probabilities(model, batch).sum(dim=1)


def pair_measures(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Accuracy and margin, summed over pairs, from the rewards of their answers, [b] each."""
    margin = (chosen - rejected).detach()
    return {"accuracy": (margin > 0).sum(), "margin": margin.sum()}
