"""The interface of a variant of LoRA: which parameters an adapter has, their initial values, and
how they become a low-rank change ΔW and a gain.

    init(context) -> {"A": [g, r, in], "B": [g, out, r], …}
    resolve(parameters, scale, base) -> (LowRank, gain [g · out], or None for a gain of 1)
    y = gain ⊙ (op(x; W) + op(x; ΔW)) + bias

g is the number of matrices in the weight (1 for a linear layer, several for a stack of experts or a
grouped convolution), and r the rank. op is the operation of the layer, such as x Wᵀ. A variant is
an immutable object that does not depend on the kind of layer or the storage of the weight. It can
read the frozen weight W as a dense [g, out, in], but it never writes it. CONTRIBUTING.md says how
to add a variant.
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

#: a function that returns a dense tensor [g, out, in]. As ``base``, it returns the frozen weight:
#: in at least float32 for ``init``, and in its own dtype for ``resolve``
Base = Callable[[], Tensor]

#: the parameters of one adapter of one layer, by name
Parameters = Mapping[str, Tensor]
#: ΔW, and the gain [g · out] or None for a gain of 1
Resolved = tuple[LowRank, Tensor | None]

#: the names that ``Variant.needs`` may contain: fields of ``InitContext`` whose data ``attach``
#: must collect first
CALIBRATION = ("inputs", "gradient", "original")


def _missing() -> Tensor:
    raise AssertionError("attach gathers what a variant's `needs` names before it calls init")


@dataclass(frozen=True)
class InitContext:
    """The values from which a variant may initialise the parameters of one layer's adapter.

    Fields:
        groups, out, in_, rank: g, out, in and r in the shapes of A [g, r, in] and B [g, out, r].
        fan_in: the number of inputs of the layer that a row of A reads, for Kaiming initialisation.
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
    """A variant of LoRA: one way to parametrise and initialise the low-rank change of a weight.

    Fields:
        name: the name in ``LoraConfig(variant=…)``.
        paper: the publication, or another source.
        default_alpha: alpha if ``LoraConfig(alpha=None)``.
        scale: a function (alpha, rank) -> the number that multiplies B @ A.
        init: a function (context) -> the initial parameters, float32, on torch's default device.
        resolve: a function (parameters, scale, base) -> (LowRank, gain [g · out] or None for a gain
            of 1), differentiable in the parameters. The rank of the LowRank may differ from the
            config's.
        frozen: names of the parameters that are not trained; they become buffers.
        derived: names of frozen parameters that are determined by the sizes alone, so that adapter
            files do not contain them.
        needs: the data of ``CALIBRATION`` that init uses; ``attach`` then requires ``batches=`` or
            ``original=``.
        exact_start: whether a model with a new adapter computes the same as its base.
        peft: the fields of PEFT's ``adapter_config.json`` that select this variant, with their
            values; None if PEFT cannot load the variant.
        peft_keys: for each parameter besides A and B that PEFT's adapter files contain, its name
            here and its key there, without the path of the module.
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

    @property
    def makes_up_for_quantization(self) -> bool:
        """Whether the adapter begins with what the quantisation of its base has lost, so that it
        fits the quantised base alone: in the original weights this would count twice."""
        return "original" in self.needs

    def __reduce__(self) -> tuple[Any, ...]:
        return variant_named, (self.name,)


VARIANTS: Registry[Variant] = Registry("variant")


def variant_named(name: str):
    """The registered variant of this name. A pickled ``Variant`` is stored as a call of this
    function, so that unpickling gives the registered instance."""
    return VARIANTS[name]


def register(variant: Variant, **field_changes: Any) -> Variant:
    """Register ``variant`` under its name, or, if there are ``field_changes``, a copy of it in
    which they replace fields. Returns the registered variant."""
    variant = replace(variant, **field_changes) if field_changes else variant
    return VARIANTS.add(variant.name, variant)


def kaiming_uniform(context: InitContext) -> Tensor:
    """A new A [g, r, in], float32, uniform in ±1/√fan_in: Kaiming initialisation with a = √5, as in
    ``nn.Linear`` (He et al. 2015, arXiv:1502.01852)."""
    bound = 1 / math.sqrt(context.fan_in)
    return torch.empty(context.groups, context.rank, context.in_).uniform_(-bound, bound)
