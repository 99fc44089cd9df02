"""The contract of a variant: which numbers are trained, how they start, and how they become (LowRank, gain).

    init(dims…) -> {"A": [g, r, in], "B": [g, out, r], …}
    resolve(numbers, scale, base) -> (LowRank, gain [g · out], or None for 1)
    y = gain ⊙ (op(x; W) + op(x; ΔW)) + bias

A variant is a value, and knows no layer and no storage: it sees the frozen weight only as a dense [g, out, in], and
only if it asks. To add one: a file here that calls ``register(Variant(...))``. The tests find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.registry import Registry

#: returns the frozen weight as a dense [g, out, in] of at least float32
Base = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to train a low-rank change.

    Fields:
        name, paper: the name in ``LoraConfig(variant=…)``, and where it comes from.
        default_alpha: of ``LoraConfig(alpha=None)``.
        scale: (alpha, rank) -> the factor of B @ A.
        init: (groups, out, in, rank, fan_in, base) -> the trained numbers, float32, on the current default device.
        resolve: (numbers, scale, base) -> (LowRank, gain [g · out] or None), differentiable in the numbers.
        peft: fields of ``adapter_config.json`` that say this variant; None if PEFT has no such thing.
    """

    name: str
    paper: str
    default_alpha: float
    scale: Callable[[float, int], float]
    init: Callable[[int, int, int, int, int, Base], dict[str, Tensor]]
    resolve: Callable[[Mapping[str, Tensor], float, Base], tuple[LowRank, Tensor | None]]
    peft: Mapping[str, Any] | None = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return variant_named, (self.name,)


VARIANTS: Registry[Variant] = Registry("variant")


def variant_named(name: str):
    """The registered variant of this name; a pickle holds this call, so that a copy is the one instance."""
    return VARIANTS[name]


def register(variant: Variant) -> Variant:
    return VARIANTS.add(variant.name, variant)


def kaiming_uniform(groups: int, rank: int, in_: int, fan_in: int) -> Tensor:
    """A [g, r, in] from U(±1/√fan_in): Kaiming with a = √5, as ``nn.Linear`` starts (He et al. 2015,
    arXiv:1502.01852)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(groups, rank, in_).uniform_(-bound, bound)
