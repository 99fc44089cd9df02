"""The contract of a variant: which parameters an adapter has, how they start, and how they become
(LowRank, gain).

    init(start) -> {"A": [g, r, in], "B": [g, out, r], …}
    resolve(parameters, scale, base) -> (LowRank, gain [g · out], or None for 1)
    y = gain ⊙ (op(x; W) + op(x; ΔW)) + bias

A variant is a value, and knows no layer and no storage: it sees the frozen weight only as a dense
[g, out, in], and only if it asks. The base is never written. How to add one: CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.registry import Registry

#: returns the frozen weight as a dense [g, out, in]: of at least float32 for ``init``, in its own
#: dtype for ``resolve``
Base = Callable[[], Tensor]

#: the parameters of an adapter by name, and what they resolve to: ΔW, and the gain [g · out] or
#: None for 1
Parameters = Mapping[str, Tensor]
Resolved = tuple[LowRank, Tensor | None]

#: what ``Variant.needs`` may name
CALIBRATION = ("inputs", "gradient", "original")


def _missing() -> Tensor:
    raise AssertionError("attach gathers what a variant's `needs` names before it calls init")


@dataclass(frozen=True)
class InitContext:
    """The values that a variant may use to initialise its parameters.

    Fields:
        groups, out, in_, rank: the sizes of ΔW and of the bottleneck.
        fan_in: how many inputs meet in one row of A.
        base: the frozen weight, [g, out, in].
        inputs: Σ xᵀx over the inputs x of the layer in the batches, [g, in, in], float64.
        gradient: the gradient of the loss by the weight over the batches, [g, out, in], float64.
        original: the weight before it was quantised, [g, out, in], float32.
    """

    groups: int
    out: int
    in_: int
    rank: int
    fan_in: int
    base: Base = _missing
    inputs: Base = _missing
    gradient: Base = _missing
    original: Base = _missing


@dataclass(frozen=True)
class Variant:
    """One way to train a low-rank change.

    Fields:
        name, paper: the name in ``LoraConfig(variant=…)``, and where it comes from.
        default_alpha: of ``LoraConfig(alpha=None)``.
        scale: (alpha, rank) -> the factor of B @ A.
        init: (start) -> the parameters, float32, on the current default device.
        resolve: (parameters, scale, base) -> (LowRank, gain [g · out] or None), differentiable in
            the parameters. The LowRank may have another rank than the config's.
        frozen: names of parameters that are not trained: they are buffers.
        derived: names of frozen parameters that the sizes alone determine: no file holds them.
        needs: what of ``CALIBRATION`` init asks for; ``attach`` then wants ``batches=`` or
            ``original=``.
        exact_start: the attached model equals its base before the first step.
        peft: fields of ``adapter_config.json`` that say this variant; None if it has no form that
            PEFT could read.
        peft_keys: parameters besides A and B that PEFT knows: our name -> PEFT's key after the
            module's path.
    """

    name: str
    paper: str
    default_alpha: float
    scale: Callable[[float, int], float]
    init: Callable[[InitContext], dict[str, Tensor]]
    resolve: Callable[[Parameters, float, Base], Resolved]
    frozen: frozenset[str] = frozenset()
    derived: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    exact_start: bool = True
    peft: Mapping[str, Any] | None = field(default_factory=dict)
    peft_keys: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return variant_named, (self.name,)


VARIANTS: Registry[Variant] = Registry("variant")


def variant_named(name: str):
    """The registered variant of this name; a pickle holds this call, so that a copy is the one
    instance."""
    return VARIANTS[name]


def register(variant: Variant, **other: Any) -> Variant:
    """Put a variant into the registry: this one, or one that is like it but for ``other``
    fields."""
    variant = replace(variant, **other) if other else variant
    return VARIANTS.add(variant.name, variant)


def kaiming_uniform(start: InitContext) -> Tensor:
    """A [g, r, in] from U(±1/√fan_in): Kaiming with a = √5, as ``nn.Linear`` starts (He et al.
    2015, arXiv:1502.01852)."""
    bound = 1 / math.sqrt(start.fan_in)
    return torch.empty(start.groups, start.rank, start.in_).uniform_(-bound, bound)
