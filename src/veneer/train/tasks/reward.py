"""Train a reward model, which gives each text a score r, on pairs of answers: the chosen answer
shall get a higher score than the rejected one (Bradley and Terry, 1952).

    loss = -log σ(r(chosen) - r(rejected))

The base gets a new head with one output, which is trained in full. Measures: the share of pairs
whose chosen answer has the higher score (`accuracy`), and the difference of the scores (`margin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.functional import logsigmoid

from veneer.models.load import padding_token
from veneer.precision import at_least_float32
from veneer.train.tasks._base import Base, RowSegment, Task, TaskLoss, register
from veneer.train.tasks._preferences import PreferenceTask, pair_measures


@register
class Reward(PreferenceTask):
    auto_class = "AutoModelForSequenceClassification"
    evaluates_base = False  # the base has no trained head to compare with
    uses_single_forward = True

    def load(self) -> Base:
        model = self.load_model(num_labels=1, pad_token_id=padding_token(self.processor))
        model.config.use_cache = False
        return Base(model, self.processor, self.config.base)

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        segments = [segment._replace(is_trained=False) for segment in super().segments(row)]
        return [*segments, RowSegment(True, "score", "higher for chosen than for rejected")]

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return Task.inputs(self, batch)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        scores = model(**self.inputs(batch)).logits[:, 0]  # [2b]
        chosen_scores, rejected_scores = scores.to(at_least_float32(scores.dtype)).chunk(2)
        return TaskLoss(
            -logsigmoid(chosen_scores - rejected_scores).sum(),
            len(chosen_scores),
            pair_measures(chosen_scores, rejected_scores),
        )
