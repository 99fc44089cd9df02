"""Base classes of the tasks that train on answers to prompts: `CausalTask` for kto and grpo, and
its subclass `PreferenceTask` for dpo, orpo and reward, whose rows have a chosen and a rejected
answer.

In a preference task, b rows with the columns chosen, rejected (and prompt) become one batch
[2b, s]: first the b chosen answers, then the b rejected ones, each after its prompt and padded to s
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from veneer.errors import DataError
from veneer.models.load import padding_token
from veneer.models.sampling_defaults import base_end_tokens
from veneer.train import data, row_shape, tokens
from veneer.train.loss import log_probabilities
from veneer.train.tasks._base import Rows, RowSegment, Task, token_batch
from veneer.train.tokens import IGNORED


class CausalTask(Task):
    """Base class of the tasks that train on prompts with answers: kto, grpo, dpo and orpo, whose
    model writes answers, and ``reward``, whose model scores them."""

    sparse_columns = (row_shape.TOOLS,)

    @property
    def beta(self) -> float:
        """The coefficient β in the losses of dpo, kto and orpo; by default 0.1, as in their
        papers."""
        return 0.1 if self.config.beta is None else self.config.beta

    def tokenise_answers(self, records: data.Records, rows: list[dict[str, Any]]) -> Rows:
        """Tokenise prompts with answers. The tokens of the completion, or of the text, get labels.
        Rows that are too long are truncated or dropped, or raise `DataError`, as
        `config.too_long` says.

        Args:
            records: the records from which `rows` were made, for the locations in errors.
            rows: by record, {"prompt", "completion"} (texts or chats) or {"text"}.

        Raises:
            DataError: a record has tools and is no chat; also the errors of `tokens.tokenise`.
        """
        row_kind = "prompt" if "prompt" in rows[0] else "text"
        shaped_rows = []
        for row, record, location in zip(rows, records.rows, records.locations, strict=True):
            row_location = f"{records.source}, {location}"
            shaped_row = row_shape.check_texts_or_chats(row, row_location)
            if record.get(row_shape.TOOLS) not in (None, [], "[]", ""):
                if any(isinstance(value, str) for value in shaped_row.values()):
                    raise DataError(
                        f"{row_location} holds {row_shape.TOOLS} beside texts",
                        "a chat: lists of messages",
                        f"write it as messages, or remove the column {row_shape.TOOLS}",
                    )
                row_shape.add_tools(shaped_row, record[row_shape.TOOLS], row_location)
            shaped_rows.append(shaped_row)
        answer_records = replace(records, kind=row_kind, rows=shaped_rows)
        return tokens.tokenise(
            answer_records,
            self.processor,
            max_length=self.max_length(),
            too_long=self.config.too_long,
            end_ids=base_end_tokens(self.config.base, self.processor)
            if self.generates_text()
            else None,
        )

    def collate_pairs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """The batch of rows that are given as (token ids, labels), padded to the longest row."""
        ids, labels = zip(*pairs, strict=True)
        return token_batch(ids, labels, padding_token(self.processor))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "use_cache": False,
        }


class PreferenceTask(CausalTask):
    """Base class of the tasks whose rows hold a pair of answers, a chosen and a rejected one."""

    required_columns, optional_columns, loss_unit = ("chosen", "rejected"), ("prompt",), "pair"
    measures = ("accuracy", "margin")

    def encode(self, records: data.Records) -> Rows:
        rows = [answers_with_prompt(row) for row in records.rows]
        answer_examples = [
            self.tokenise_answers(records, [row[column] for row in rows])
            for column in ("chosen", "rejected")
        ]
        indices_by_record = [
            {index: i for i, index in enumerate(examples.record_indices)}
            for examples in answer_examples
        ]
        retained_indices = [
            index for index in answer_examples[0].record_indices if index in indices_by_record[1]
        ]
        if not retained_indices:
            raise DataError(
                f"no pair of {records.source} whose answers are both short enough",
                "at least one",
                "raise max_length",
            )
        encoded_rows, lengths, head_token_counts = [], [], []
        for index in retained_indices:
            pair_indices = [example_indices[index] for example_indices in indices_by_record]
            labelled_answers = [
                (examples[i]["input_ids"], examples[i]["labels"])
                for examples, i in zip(answer_examples, pair_indices, strict=True)
            ]
            encoded_rows.append({"chosen": labelled_answers[0], "rejected": labelled_answers[1]})
            lengths.append(2 * max(len(ids) for ids, _ in labelled_answers))
            head_token_counts.append(
                sum(label != IGNORED for _, labels in labelled_answers for label in labels)
            )
        return Rows(
            encoded_rows,
            lengths,
            retained_indices,
            head_token_counts,
            len(records) - len(retained_indices),
            max(examples.truncated for examples in answer_examples),
        )

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        """The prompt, if the row has one, and the two answers. The prompt is the longest common
        prefix of both token sequences that has no labels."""
        labelled_tokens = [
            list(zip(*row[column], strict=True)) for column in ("chosen", "rejected")
        ]
        prompt_length = 0
        while (
            prompt_length < min(map(len, labelled_tokens))
            and labelled_tokens[0][prompt_length] == labelled_tokens[1][prompt_length]
            and labelled_tokens[0][prompt_length][1] == IGNORED
        ):
            prompt_length += 1
        prompt = (
            self.token_segments("prompt", *(values[:prompt_length] for values in row["chosen"]))
            if prompt_length
            else []
        )
        return prompt + [
            segment
            for column in ("chosen", "rejected")
            for segment in self.token_segments(
                column, *(values[prompt_length:] for values in row[column])
            )
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.collate_pairs(
            [row[column] for column in ("chosen", "rejected") for row in rows]
        )

    def count_items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["input_ids"]) // 2


def answers_with_prompt(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The chosen and the rejected answer of a row, each as {"prompt", "completion"}. If the row has
    no prompt and its answers are chats, the prompt is the messages with which both begin. If it has
    no prompt and its answers are texts, each answer is {"text"}."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = row["prompt"]
    elif isinstance(chosen, list) and isinstance(rejected, list):
        shared_count = 0  # number of messages with which both chats begin
        while (
            shared_count < min(len(chosen), len(rejected)) - 1
            and chosen[shared_count] == rejected[shared_count]
        ):
            shared_count += 1
        prompt, chosen, rejected = (
            chosen[:shared_count],
            chosen[shared_count:],
            rejected[shared_count:],
        )
    else:
        return {"chosen": {"text": chosen}, "rejected": {"text": rejected}}
    return {
        "chosen": {"prompt": prompt, "completion": chosen},
        "rejected": {"prompt": prompt, "completion": rejected},
    }


def answer_log_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The log-probability of each row's answer, [rows]: the sum over the answer's tokens, which are
    the tokens with a label in `batch`. Differentiable."""
    return log_probabilities(model, batch).sum(dim=1)


def pair_measures(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """The measures accuracy (the chosen answer has the higher reward) and margin (the difference of
    the rewards), each summed over the b pairs of a batch. Arguments: the rewards of the answers,
    [b] each; in orpo and ``reward``, mean log-probabilities and scores take their place."""
    margins = (chosen_rewards - rejected_rewards).detach()
    return {"accuracy": (margins > 0).sum(), "margin": margins.sum()}
