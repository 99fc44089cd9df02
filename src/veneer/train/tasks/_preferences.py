"""What the tasks on answers share: rows of a prompt with an answer or two, and the log-probability
of each answer.

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
from veneer.train.tasks._base import Base, Rows, Shown, Task, TaskLoss, pad_of, token_batch
from veneer.train.tokens import IGNORED


class Causal(Task):
    """A task of a causal language model."""

    def load(self) -> Base:
        base = super().load()
        must_not_see_later_tokens(base.model, self.config.base)
        return base

    def answers(self, records: data.Records, rows: list[dict[str, Any]]) -> tokens.Examples:
        """Rows of a prompt and a completion (texts or chats), or of a text, as tokens; the answer
        is labelled."""
        kind = "prompt" if "prompt" in rows[0] else "text"
        checked = [
            row_shape.check_texts_or_chats(row, f"{records.source}, {place}")
            for row, place in zip(rows, records.places, strict=True)
        ]
        part = replace(records, kind=kind, rows=checked)
        options: Any = {"max_length": self.max_length(), "too_long": self.config.too_long}
        return tokens.tokenise(part, self.processor, **options)

    def batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        ids, labels = zip(*pairs, strict=True)
        return token_batch(ids, labels, pad_of(self.processor))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "use_cache": False,
        }


class Preference(Causal):
    """A task on pairs of answers, of which one is the better."""

    parts, optional, item = ("chosen", "rejected"), ("prompt",), "pair"
    measures = ("accuracy", "margin")

    def encode(self, records: data.Records) -> Rows:
        rows = [with_prompt(row) for row in records.rows]
        sides = [
            self.answers(records, [row[side] for row in rows]) for side in ("chosen", "rejected")
        ]
        where = [{index: i for i, index in enumerate(side.index)} for side in sides]
        kept = [index for index in sides[0].index if index in where[1]]
        if not kept:
            problem = f"no pair of {records.source} whose answers are both short enough"
            raise DataError(problem, "at least one", "raise max_length")
        made, lengths, learnt = [], [], []
        for index in kept:
            numbers = [place[index] for place in where]
            own = [
                (side.input_ids[i], side.labels[i]) for side, i in zip(sides, numbers, strict=True)
            ]
            made.append({"chosen": own[0], "rejected": own[1]})
            lengths.append(2 * max(len(ids) for ids, _ in own))
            learnt.append(sum(label != IGNORED for _, labels in own for label in labels))
        return Rows(
            made,
            lengths,
            kept,
            learnt,
            len(records) - len(kept),
            max(side.truncated for side in sides),
        )

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        """What both sides begin with is the prompt."""
        sides = [list(zip(*row[side], strict=True)) for side in ("chosen", "rejected")]
        start = 0
        while (
            start < min(map(len, sides))
            and sides[0][start] == sides[1][start]
            and sides[0][start][1] == IGNORED
        ):
            start += 1
        prompt = (
            self.stretches("prompt", *(part[:start] for part in row["chosen"])) if start else []
        )
        return prompt + [
            part
            for side in ("chosen", "rejected")
            for part in self.stretches(side, *(part[start:] for part in row[side]))
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.batch([row[side] for side in ("chosen", "rejected") for row in rows])

    def items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["input_ids"]) // 2

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss: ...


def with_prompt(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The two answers of a row, each with its prompt; without one, it is what two chats begin with
    alike."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = row["prompt"]
    elif isinstance(chosen, list) and isinstance(rejected, list):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    else:
        return {"chosen": {"text": chosen}, "rejected": {"text": rejected}}
    return {
        "chosen": {"prompt": prompt, "completion": chosen},
        "rejected": {"prompt": prompt, "completion": rejected},
    }


def summed(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """log p of each row's answer, [rows]: the sum over its tokens."""
    return log_probabilities(model, batch).sum(dim=1)


def judged(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The measures of pairs from the rewards of their answers, [b] each."""
    margin = (chosen - rejected).detach()
    return {"accuracy": (margin > 0).sum(), "margin": margin.sum()}
