"""Predict which path of an adapted linear layer is cheapest for a number of tokens.

- factored: ``op(x; W) + op(x; ΔW)``, with op the layer's operation, takes T · r · (in + out) more
  multiplications than the layer alone, for T tokens and rank r.
- materialised: ``op(x; W + ΔW)`` takes out · in · r more multiplications and writes one more matrix
  of W's size, whatever the number of tokens. W + ΔW is computed in at least float32, because a
  16-bit sum would lose a small ΔW.

Costs are counted in multiply-adds. Reading or writing a number counts as ``ACTIVATION_COST``
multiply-adds for an activation and ``WEIGHT_COST`` for a weight. Memory traffic must be counted,
because a product with A or B does little arithmetic on each number that it reads. A weight costs
more than an activation, because it must be read from main memory, while the output of the previous
layer is still in the cache.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

FACTORED = "factored"
MATERIALISED = "materialised"

#: the cost of reading or writing one float32 number of an activation, and of a weight, as a number
#: of multiply-adds; fitted to times measured on a CPU core
ACTIVATION_COST, WEIGHT_COST = 12.0, 50.0


@dataclass(frozen=True)
class Costs:
    """The costs of one call of an adapted linear layer, in multiply-adds. Memory traffic counts as
    multiply-adds too, see ``ACTIVATION_COST``.

    Fields:
        tokens: the number of tokens of the call.
        layer: the cost of the layer without an adapter, for comparison.
        factored: the additional cost of computing x Wᵀ + x ΔWᵀ.
        materialised: the additional cost of computing x (W + ΔW)ᵀ.
    """

    tokens: int
    layer: float
    factored: float
    materialised: float

    @property
    def choice(self) -> str:
        return MATERIALISED if self.materialised < self.factored else FACTORED

    def __str__(self) -> str:
        costs = ((FACTORED, self.factored), (MATERIALISED, self.materialised))
        shares = (f"{name} +{cost / self.layer:.1%}" for name, cost in costs)
        return f"{', '.join(shares)} of the layer's own cost -> {self.choice}"


def costs(out: int, in_: int, rank: int, tokens: int, dtype: torch.dtype, training: bool) -> Costs:
    """The costs of one call of a linear layer with weight [out, in], for an input [tokens, in] and
    an adapter of this ``rank``; with backward if ``training``. The materialised cost is infinite
    for a 16-bit ``dtype``, in which W + ΔW would lose precision."""

    def thin_cost(width: int, pass_count: int = 1) -> float:
        """The cost of a product of A or B with a tensor [tokens, width], which is read or written
        ``pass_count`` times."""
        return tokens * width * (rank + pass_count * ACTIVATION_COST)

    layer_cost = tokens * in_ * out * (2 if training else 1)
    forming_cost = in_ * out * (rank + 2 * WEIGHT_COST)  # read W, write W + ΔW
    # h Bᵀ is written, and read again when x Wᵀ is added to it, so it counts two passes
    factored_cost, materialised_cost = thin_cost(in_) + thin_cost(out, 2), forming_cost
    if training:
        # the products u = Bᵀ dyᵀ, h dy (gradient of B) and u x (gradient of A)
        factor_gradient_cost = 2 * thin_cost(out) + thin_cost(in_)
        factored_cost += factor_gradient_cost + thin_cost(in_, 2)  # u A, added to the gradient of x
        # Forward did not compute h = A x, so backward computes it, for the gradient of B. W + ΔW is
        # formed again for the gradient of x.
        materialised_cost += factor_gradient_cost + thin_cost(in_) + forming_cost
    return Costs(
        tokens, layer_cost, factored_cost, materialised_cost if dtype.itemsize >= 4 else math.inf
    )


@functools.cache
def max_factored_tokens(out: int, in_: int, rank: int, dtype: torch.dtype) -> float:
    """The number of tokens above which a training step of a layer with weight [out, in] is cheaper
    with W + ΔW than with separate products with A and B. Infinite for a 16-bit ``dtype``, in which
    W + ΔW would lose precision. Inference uses this number too, so that training and inference
    round equally."""
    if dtype.itemsize < 4:
        return math.inf
    zero_tokens, one_token = (costs(out, in_, rank, tokens, dtype, True) for tokens in (0, 1))
    # Both costs are linear in the number of tokens, and the factored cost is 0 for 0 tokens. They
    # are therefore equal at (materialised cost for 0 tokens) / (difference of the two slopes).
    extra_cost_per_token = one_token.factored - (one_token.materialised - zero_tokens.materialised)
    return zero_tokens.materialised / extra_cost_per_token
