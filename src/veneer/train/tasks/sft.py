"""Supervised fine-tuning on chats, prompts with completions, or texts. The trainer is based on
trl's `SFTTrainer` (`sft_trainer.py`). It also supports packing and a cache of hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from veneer.models.load import padding_token
from veneer.models.sampling_defaults import base_end_tokens
from veneer.train import data, prepare, tokens
from veneer.train.causal import must_keep_packed_examples_apart
from veneer.train.loss import token_loss
from veneer.train.prepare import Prepared
from veneer.train.tasks._base import (
    Base,
    Rows,
    RowSegment,
    Task,
    TaskLoss,
    register,
    short_row_index,
    token_batch,
)
from veneer.train.tokens import IGNORED


@register
class Sft(Task):
    loss_unit = "token"
    uses_single_forward = True

    def prepare(self) -> Prepared:
        return prepare.prepare(
            self.config, self.records, self.encode, self.max_length(), self._make_dataset
        )

    def _make_dataset(self, rows: Rows, max_tokens: int) -> Any:
        """The rows as the tokenised `datasets.Dataset` that `trl.SFTTrainer` expects. With
        `packing`, several short rows become one row of at most `max_tokens` tokens."""
        from datasets import Dataset

        columns = {name: [row[name] for row in rows.rows] for name in ("input_ids", "labels")}
        dataset = Dataset.from_dict(columns)
        return prepare.pack(dataset, max_tokens) if self.config.packing else dataset

    def read(self, source: str, split: str) -> data.Records:
        config = self.config
        columns = data.Columns(
            config.messages_column,
            config.prompt_column,
            config.completion_column,
            config.text_column,
        )
        return data.read(source, columns, split=split)

    def encode(self, records: data.Records) -> Rows:
        config = self.config
        return tokens.tokenise(
            records,
            self.processor,
            max_length=self.max_length(),
            too_long=config.too_long,
            completion_only=config.completion_only,
            end_ids=base_end_tokens(config.base, self.processor),
        )

    def load(self) -> Base:
        """Load the base as `Task.load` does. With `packing`, also raise `ConfigError` if the base
        mixes the examples of a packed row. A forward pass tests this, because a model may accept
        the positions of packed examples and ignore them."""
        base = super().load()
        if self.config.packing:
            must_keep_packed_examples_apart(base.model, self.config.base)
        return base

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        return self.token_segments("", row["input_ids"], row["labels"])

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return token_batch(
            [row["input_ids"] for row in rows],
            [row["labels"] for row in rows],
            padding_token(self.processor),
        )

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        loss_sums = token_loss(model, batch, accuracy=not model.training)
        return TaskLoss(loss_sums.total, int(loss_sums.items), {"accuracy": loss_sums.correct})

    def count_items(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        short_row = prepared.train[short_row_index(prepared.train.lengths)]
        ids = torch.tensor([short_row["input_ids"][:64]], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def largest_batch(self, prepared: Prepared) -> tuple[int, int]:
        if not self.config.packing:
            return super().largest_batch(prepared)
        train_rows, batch_tokens = prepared.train, prepared.max_length * self.config.batch_size
        return batch_tokens, round(
            batch_tokens * train_rows.head_token_count / sum(train_rows.lengths)
        )

    def describe_size(self, rows: Rows) -> str:
        return (
            f"{len(rows):,} examples, {sum(rows.lengths):,} tokens, {rows.head_token_count:,} of"
            " them learnt"
        )
