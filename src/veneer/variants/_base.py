"""The interface of a variant: which parameters an adapter has, their initial values, and how they
become a low-rank change and a gain.

    init(context) -> {"A": [g, r, in], "B": [g, out, r], …}
    resolve(parameters, scale, base) -> (LowRank, gain [g · out], or None for a gain of 1)
    y = gain ⊙ (op(x; W) + op(x; ΔW)) + bias

g is the number of matrices in the weight, 1 for a linear layer, and r the rank. op is the operation
of the layer, such as x Wᵀ. A variant is an immutable object that knows neither layers nor storages.
It can read the frozen weight as a dense [g, out, in], but it never writes the weight. How to add a
variant: CONTRIBUTING.md.
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

#: a function that returns a dense tensor [g, out, in], such as the frozen weight. The frozen weight
#: is at least float32 in ``init``, and has its own dtype in ``resolve``
Base = Callable[[], Tensor]

#: the parameters of an adapter by name
Parameters = Mapping[str, Tensor]
#: ΔW, and the gain [g · out] or None for a gain of 1
Resolved = tuple[LowRank, Tensor | None]

#: the fields of ``InitContext`` that ``Variant.needs`` may name: data that ``attach`` collects
CALIBRATION = ("inputs", "gradient", "original")


def _missing() -> Tensor:
    raise AssertionError("attach gathers what a variant's `needs` names before it calls init")


@dataclass(frozen=True)
class InitContext:
    """The values from which a variant may initialise its parameters.

    Fields:
        groups, out, in_, rank: g, out, in and r in the shapes of A [g, r, in] and B [g, out, r].
        fan_in: the number of inputs that reach a row of A, for Kaiming initialisation.
        base: returns the frozen weight, [g, out, in].
        inputs: returns Σ xᵀx over the layer's inputs x in the calibration batches, [g, in, in],
            float64.
        gradient: returns the gradient of the loss over the calibration batches with respect to the
            weight, [g, out, in], float64.
        original: returns the weight before it was quantised, [g, out, in], float32.
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
        name: the name in ``LoraConfig(variant=…)``.
        paper: the publication, or another source.
        default_alpha: alpha if ``LoraConfig(alpha=None)``.
        scale: a function (alpha, rank) -> the factor of B @ A.
        init: a function (context) -> the initial parameters, float32, on torch's default device.
        resolve: a function (parameters, scale, base) -> (LowRank, gain [g · out] or None for a gain
            of 1), differentiable in the parameters. The rank of the LowRank may differ from the
            config's.
        frozen: names of the parameters that are not trained; they become buffers.
        derived: names of frozen parameters that are determined by the sizes alone, so that adapter
            files do not contain them.
        needs: the data of ``CALIBRATION`` that init uses; ``attach`` then requires ``batches=`` or
            ``original=``.
        exact_start: whether the attached model equals its base before the first training step.
        peft: the fields of ``adapter_config.json`` that mean this variant; None if PEFT cannot read
            it in any form.
        peft_keys: {name: key in PEFT's file, without the module's path} of the parameters besides A
            and B that PEFT's files contain.
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
    """The registered variant of this name. A pickled variant holds this call, so that unpickling
    gives the registered instance."""
    return VARIANTS[name]


def register(variant: Variant, **changes: Any) -> Variant:
    """Register ``variant``, or a copy of it in which ``changes`` replace some fields."""
    variant = replace(variant, **changes) if changes else variant
    return VARIANTS.add(variant.name, variant)


def kaiming_uniform(context: InitContext) -> Tensor:
    """A [g, r, in], uniform in ±1/√fan_in: Kaiming initialisation with a = √5, as in ``nn.Linear``
    (He et al. 2015, arXiv:1502.01852)."""
    bound = 1 / math.sqrt(context.fan_in)
    return torch.empty(context.groups, context.rank, context.in_).uniform_(-bound, bound)
