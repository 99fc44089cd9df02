"""Embeddings: texts that belong together come to lie close.

    anchor, positive (, negative)    ranking: -log softmax over the batch of 20 · cos(anchor, ·) at its own positive
                                     (multiple negatives: Henderson et al., 2017, arXiv:1705.00652)
    anchor, positive, label          cosine: (cos(anchor, positive) - label)²

The others' positives, and all negatives, are what an anchor's own positive is told apart from, so a
batch should be as large as memory allows. Pooling and normalisation are those of the base's
sentence-transformers files. The measure of ranking is the share of anchors whose nearest text is
their own; of cosine, |cos - label|.
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
from veneer.models.load import Base
from veneer.train import data
from veneer.train.tasks._base import (
    Rows,
    Shown,
    Task,
    TaskLoss,
    limited,
    pad_of,
    padded,
    register,
    texts_of,
)

SCALE = 20.0  # of cosines, as sentence-transformers has it


@register
class Embed(Task):
    parts, optional, auto = ("anchor", "positive"), ("negative", "label"), "AutoModel"
    measures, item = ("accuracy", "error"), "pair"
    compares_rows = True

    def open(self) -> Any:
        self.processor = models.load_tokenizer(self.config.base)
        return self.processor

    def load(self) -> Base:
        self.encoder = models.load_encoder(self.config.base, **self.loading)
        return Base(self.encoder.model, self.processor, self.config.base)

    def encode(self, records: data.Records) -> Rows:
        cosine = "label" in records.rows[0]
        if cosine and "negative" in records.rows[0]:
            problem = f"{records.source} has both `negative` and `label`"
            raise DataError(
                problem, "one of them", "remove one, or name the columns to read with --columns"
            )
        sides = [part for part in ("anchor", "positive", "negative") if part in records.rows[0]]
        ids = [self.processor(texts_of(records, part))["input_ids"] for part in sides]
        rows: list[dict[str, Any]] = [
            {"ids": [list(side[i]) for side in ids]} for i in range(len(records))
        ]
        if cosine:
            for row, record, place in zip(rows, records.rows, records.places, strict=True):
                row["label"] = _score(record["label"], f"{records.source}, {place}")
        limit = self.max_length()
        longest = [max(map(len, row["ids"])) for row in rows]

        def cut(row: dict[str, Any]) -> dict[str, Any]:  # encoders end with a token of their own
            short = [
                own if len(own) <= limit else [*own[: limit - 1], own[-1]] for own in row["ids"]
            ]
            return {**row, "ids": short}

        kept, rows, count = limited(records, rows, longest, self.config, limit, cut)
        lengths = [len(sides) * max(map(len, row["ids"])) for row in rows]
        return Rows(rows, lengths, kept, dropped=len(records) - len(rows), truncated=count)

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        sides = zip(("anchor", "positive", "negative"), row["ids"], strict=False)
        near = (
            ("cosine", f"{row['label']:g}")
            if "label" in row
            else ("nearest", "positive, of all in the batch")
        )
        return [
            *(Shown(False, side, self.processor.decode(ids)) for side, ids in sides),
            Shown(True, *near),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """[sides · b, s]: all anchors, all positives, all negatives."""
        ids = [row["ids"][side] for side in range(len(rows[0]["ids"])) for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0)
        scores = torch.tensor([row.get("label", float("nan")) for row in rows])
        return {
            "input_ids": padded(ids, pad_of(self.processor)),
            "attention_mask": mask,
            "labels": scores,
        }

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        hidden = model(**self.inputs(batch)).last_hidden_state
        mask = batch["attention_mask"].to(hidden.device)
        vectors = pool(hidden, mask, self.encoder.pooling, self.encoder.normal)
        scores = batch["labels"].to(vectors.device, vectors.dtype)
        if bool(scores.isnan().any()):
            anchors, others = vectors[: len(scores)], vectors[len(scores) :]
            each, nearest = ranking_losses(anchors, others)
            own = torch.arange(len(scores), device=nearest.device)
            return TaskLoss(each.sum(), len(scores), {"accuracy": (nearest == own).sum()})
        anchors, others = vectors.chunk(2)
        cosines = cosine_similarity(anchors, others)
        apart = (cosines - scores).abs()
        return TaskLoss(apart.square().sum(), len(scores), {"error": apart.detach().sum()})


def ranking_losses(anchors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """([b] losses, [b] which of the others is nearest) of anchors [b, h] and others [k · b, h],
    positives first."""
    scores = SCALE * normalize(anchors, dim=-1) @ normalize(others, dim=-1).mT  # [b, k · b]
    own = torch.arange(len(anchors), device=scores.device)
    return cross_entropy(scores, own, reduction="none"), scores.detach().argmax(dim=-1)


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if not -1 <= score <= 1:
        raise DataError(f"{where}: label is {value!r}", "a cosine of -1 to 1", "scale the labels")
    return score
