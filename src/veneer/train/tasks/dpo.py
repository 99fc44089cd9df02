"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290) on pairs of a chosen and
a rejected answer.

    loss = -log σ(β · ((log π(chosen) - log π₀(chosen)) - (log π(rejected) - log π₀(rejected))))

π is the base with the adapter. π₀ is the reference policy (`_base.reference`): the base without an
adapter, or with the initial state of the adapter if the run trains an existing one further. log π
of an answer is a sum over its tokens. The reward of an answer is β · (log π - log π₀). Measures:
the share of pairs whose chosen answer has the larger reward (`accuracy`), and the difference of the
rewards (`margin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.functional import logsigmoid

from veneer.train.tasks._base import TaskLoss, reference, register
from veneer.train.tasks._preferences import PreferenceTask, answer_log_probabilities, pair_measures


@register
class Dpo(PreferenceTask):
    def needs_reference(self) -> bool:
        return True

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        with reference(model):
            reference_log_p = answer_log_probabilities(model, batch)
        log_p = answer_log_probabilities(model, batch)
        # [b] each
        chosen_rewards, rejected_rewards = (self.beta * (log_p - reference_log_p)).chunk(2)
        return TaskLoss(
            -logsigmoid(chosen_rewards - rejected_rewards).sum(),
            len(chosen_rewards),
            pair_measures(chosen_rewards, rejected_rewards),
        )
