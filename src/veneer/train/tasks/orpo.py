"""Odds-ratio preference optimisation (Hong et al., 2024, arXiv:2403.07691): the sum of a supervised
loss and a preference loss, without a reference model.

    loss = -log p(chosen) - β · log σ(log odds(chosen) - log odds(rejected))
    odds(y) = p(y) / (1 - p(y))

log p of an answer is the mean over its tokens. As in the paper, the first term covers the chosen
answer alone; trl's term includes the prompt. Measures: the share of pairs whose chosen answer has
the higher mean log p (`accuracy`), and the difference of the two means (`margin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from veneer.train.loss import log_probabilities
from veneer.train.tasks._base import TaskLoss, register
from veneer.train.tasks._preferences import PreferenceTask, pair_measures
from veneer.train.tokens import IGNORED


@register
class Orpo(PreferenceTask):
    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        label_counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
        chosen_log_p, rejected_log_p = (
            log_probabilities(model, batch).sum(dim=1) / label_counts
        ).chunk(2)
        total_loss = (
            -chosen_log_p - self.beta * log_sigmoid_odds_ratio(chosen_log_p, rejected_log_p)
        ).sum()
        return TaskLoss(total_loss, len(chosen_log_p), pair_measures(chosen_log_p, rejected_log_p))


def log_sigmoid_odds_ratio(chosen_log_p: Tensor, rejected_log_p: Tensor) -> Tensor:
    """log σ(log odds(chosen) - log odds(rejected)) of b pairs, [b]. Arguments: the mean
    log-probabilities of the tokens of their answers, [b] each."""
    return logsigmoid(
        (chosen_log_p - rejected_log_p)
        - (_log_complement(chosen_log_p) - _log_complement(rejected_log_p))
    )


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p ≤ 0, accurate both for p near 1 and for p near 0."""
    smallest_normal = torch.finfo(log_p.dtype).tiny
    is_likely = log_p > -0.6931471805599453  # log 1/2
    unlikely_log_p = torch.where(is_likely, log_p.new_tensor(-1.0), log_p)
    likely_log_p = torch.where(is_likely, log_p.clamp(max=-smallest_normal), log_p.new_tensor(-0.5))
    return torch.where(
        is_likely, torch.log(-torch.expm1(likely_log_p)), torch.log1p(-torch.exp(unlikely_log_p))
    )
