"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290): of two answers, one is
the better.

    loss = -log σ(β · ((log π(chosen) - log π₀(chosen)) - (log π(rejected) - log π₀(rejected))))

π is the base with the adapter, π₀ the base alone: the same weights, with no adapter selected. log π
of an answer is the sum over its tokens. Measures: the share of pairs whose chosen answer gained
more, and by how much (times β).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from veneer.train.tasks._base import TaskLoss, reference, register
from veneer.train.tasks._preferences import Preference, judged, summed

BETA = 0.1  # the paper's


@register
class Dpo(Preference):
    def refers(self) -> bool:
        return True

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        with reference(model):
            before = summed(model, batch)
        beta = BETA if self.config.beta is None else self.config.beta
        chosen, rejected = rewards(summed(model, batch), before, beta)
        return TaskLoss(-logsigmoid(chosen - rejected).sum(), len(chosen), judged(chosen, rejected))


def rewards(now: Tensor, before: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β · (log π - log π₀) of the chosen and of the rejected answers, [b] each, from those of all,
    [2b]."""
    chosen, rejected = (beta * (now - before)).chunk(2)
    return chosen, rejected
