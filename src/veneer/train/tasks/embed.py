"""Train text embeddings: texts that belong together get similar vectors.

    anchor, positive (, negative)    ranking: cross-entropy of the scores 20 · cos(anchor, text)
                                     over all positives and negatives of the batch; the target is
                                     the anchor's own positive (multiple negatives: Henderson et
                                     al., 2017, arXiv:1705.00652)
    anchor, positive, label          cosine: (cos(anchor, positive) - label)²

The columns of the data decide between the two losses. For ranking, a batch should be as large as
memory allows, because the texts of its other rows are the negatives of an anchor. Pooling and
normalisation are those of the base's sentence-transformers files. Measures: for ranking, the share
of anchors whose nearest text is their positive (`accuracy`); for cosine, |cos - label| (`error`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from veneer import models
from veneer.errors import DataError
from veneer.models.encoders import pool
from veneer.models.load import Base, padding_token
from veneer.train import data
from veneer.train.tasks._base import (
    Rows,
    RowSegment,
    Task,
    TaskLoss,
    apply_max_length,
    pad_rows,
    read_text_column,
    register,
    truncate_ids,
)

COSINE_SCALE = 20.0  # factor of cosines in the ranking loss; sentence-transformers' default


@register
class Embed(Task):
    required_columns = ("anchor", "positive")
    optional_columns = ("negative", "label")
    auto_class = "AutoModel"
    measures, loss_unit = ("accuracy", "error"), "pair"
    compares_rows = True

    def load(self) -> Base:
        self.encoder = models.load_encoder(self.config.base, **self.load_options)
        return Base(self.encoder.model, self.processor, self.config.base)

    def encode(self, records: data.Records) -> Rows:
        has_labels = "label" in records.rows[0]
        if has_labels and "negative" in records.rows[0]:
            raise DataError(
                f"{records.source} has both `negative` and `label`",
                "one of them",
                "remove one, or name the columns to read with --columns",
            )
        text_columns = [
            column for column in ("anchor", "positive", "negative") if column in records.rows[0]
        ]
        column_ids = [
            self.processor(read_text_column(records, column))["input_ids"]
            for column in text_columns
        ]
        rows: list[dict[str, Any]] = [
            {"ids": [list(ids[i]) for ids in column_ids]} for i in range(len(records))
        ]
        if has_labels:
            for row, record, location in zip(rows, records.rows, records.locations, strict=True):
                row["label"] = _parse_cosine(record["label"], f"{records.source}, {location}")
        token_limit = self.max_length()
        text_lengths = [max(map(len, row["ids"])) for row in rows]
        retained_indices, rows, truncated_count = apply_max_length(
            records,
            rows,
            text_lengths,
            self.config,
            token_limit,
            lambda row: {
                **row,
                "ids": [truncate_ids(ids, token_limit, self.processor) for ids in row["ids"]],
            },
        )
        lengths = [len(text_columns) * max(map(len, row["ids"])) for row in rows]
        return Rows(
            rows,
            lengths,
            retained_indices,
            dropped=len(records) - len(rows),
            truncated=truncated_count,
        )

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        column_ids = zip(("anchor", "positive", "negative"), row["ids"], strict=False)
        label_segment = (
            ("cosine", f"{row['label']:g}")
            if "label" in row
            else ("nearest", "positive, of all in the batch")
        )
        return [
            *(RowSegment(False, column, self.processor.decode(ids)) for column, ids in column_ids),
            RowSegment(True, *label_segment),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of b rows, with the texts along the first axis: all anchors, then all
        positives, then all negatives, if there are any. "labels" are the target cosines [b], or NaN
        for the ranking loss."""
        ids = [
            row["ids"][column_index] for column_index in range(len(rows[0]["ids"])) for row in rows
        ]
        attention_mask = pad_rows([[1] * len(row) for row in ids], 0)
        target_cosines = torch.tensor([row.get("label", float("nan")) for row in rows])
        return {
            "input_ids": pad_rows(ids, padding_token(self.processor)),
            "attention_mask": attention_mask,
            "labels": target_cosines,
        }

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        hidden_states = model(**self.inputs(batch)).last_hidden_state
        attention_mask = batch["attention_mask"].to(hidden_states.device)
        vectors = pool(hidden_states, attention_mask, self.encoder.pooling, self.encoder.normal)
        target_cosines = batch["labels"].to(vectors.device, vectors.dtype)
        if bool(target_cosines.isnan().any()):
            anchors, candidates = vectors[: len(target_cosines)], vectors[len(target_cosines) :]
            row_losses, nearest_indices = ranking_losses(anchors, candidates)
            targets = torch.arange(len(target_cosines), device=nearest_indices.device)
            return TaskLoss(
                row_losses.sum(),
                len(target_cosines),
                {"accuracy": (nearest_indices == targets).sum()},
            )
        anchors, candidates = vectors.chunk(2)
        cosines = cosine_similarity(anchors, candidates)
        distances = (cosines - target_cosines).abs()
        return TaskLoss(
            distances.square().sum(), len(target_cosines), {"error": distances.detach().sum()}
        )


def ranking_losses(anchors: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy loss of each of b anchors [b], index of its nearest candidate [b]).

    Args:
        anchors: vectors of h features, [b, h].
        candidates: k vectors for each anchor, [k · b, h]: first the positives, then any negatives,
            both in the order of the anchors.
    """
    # [b, k · b]
    scores = COSINE_SCALE * normalize(anchors, dim=-1) @ normalize(candidates, dim=-1).mT
    targets = torch.arange(len(anchors), device=scores.device)
    return cross_entropy(scores, targets, reduction="none"), scores.detach().argmax(dim=-1)


def _parse_cosine(value: Any, row_location: str) -> float:
    """The value of a row's column `label` as a number from -1 to 1. Raises `DataError` for any
    other value. `row_location`: where the row is in the data, for the error."""
    try:
        cosine = float(value)
    except (TypeError, ValueError):
        cosine = float("nan")
    if not -1 <= cosine <= 1:
        raise DataError(
            f"{row_location}: label is {value!r}", "a cosine of -1 to 1", "scale the labels"
        )
    return cosine
