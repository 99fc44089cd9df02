"""LoRA: ΔW = alpha / rank · B @ A (Hu et al. 2021, arXiv:2106.09685). Most other variants are
registered as copies of ``LORA`` in which some fields are replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import (
    Base,
    InitContext,
    Parameters,
    Resolved,
    Variant,
    kaiming_uniform,
    register,
)

__all__ = ["LORA"]


def init(context: InitContext) -> dict[str, Tensor]:
    """Kaiming-uniform A [g, r, in], and B [g, out, r] of zeros, so that ΔW is zero before
    training."""
    B = torch.zeros(context.groups, context.out, context.rank)
    return {"A": kaiming_uniform(context), "B": B}


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    return LowRank(parameters["A"], parameters["B"], scale), None


LORA = register(
    Variant(
        name="lora",
        paper="Hu et al. 2021, arXiv:2106.09685",
        default_alpha=32,
        scale=lambda alpha, rank: alpha / rank,
        init=init,
        resolve=resolve,
    )
)
