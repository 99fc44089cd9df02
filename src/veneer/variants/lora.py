"""LoRA: ΔW = alpha / rank · B @ A. Hu et al. 2021, arXiv:2106.09685."""

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


def init(start: InitContext) -> dict[str, Tensor]:
    """A Kaiming, B zero: the attached model equals its base until the first step."""
    return {"A": kaiming_uniform(start), "B": torch.zeros(start.groups, start.out, start.rank)}


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
