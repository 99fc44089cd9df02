"""A reward model: one number for a text, higher for the better of two answers (Bradley and Terry,
1952).

    loss = -log σ(r(chosen) - r(rejected))

The head of one output is new, and trains in full. Measures: the share of pairs in the right order,
and their distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from veneer import models
from veneer.attach.dtypes import at_least_float32
from veneer.train.tasks._base import Base, Shown, Task, TaskLoss, pad_of, register
from veneer.train.tasks._preferences import Preference, judged


@register
class Reward(Preference):
    auto = "AutoModelForSequenceClassification"
    compares = False  # a new head tells nothing
    one_pass = True

    def open(self) -> Any:
        self.processor = models.load_tokenizer(self.config.base)
        return self.processor

    def load(self) -> Base:
        model = self.model(num_labels=1, pad_token_id=pad_of(self.processor))
        model.config.use_cache = False
        return Base(model, self.processor, self.config.base)

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        read = [part._replace(learnt=False) for part in super().shown(row)]
        return [*read, Shown(True, "score", "higher for chosen than for rejected")]

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return Task.inputs(self, batch)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        scores = model(**self.inputs(batch)).logits[:, 0]  # [2b]
        chosen, rejected = scores.to(at_least_float32(scores.dtype)).chunk(2)
        return TaskLoss(pair_losses(chosen, rejected).sum(), len(chosen), judged(chosen, rejected))


def pair_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[b] of rewards [b]."""
    return -logsigmoid(chosen - rejected)
