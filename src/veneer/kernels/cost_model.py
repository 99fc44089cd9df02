"""Predict which path of an adapted linear layer is cheapest for a number of tokens.

- factored: ``op(x; W) + op(x; ΔW)`` takes T · r · (in + out) more multiplications than the layer
  alone, for T tokens and rank r.
- materialised: ``op(x; W + ΔW)`` takes out · in · r more multiplications and writes one more matrix
  of W's size, whatever the number of tokens. W + ΔW is computed in at least float32, because a
  16-bit sum would lose a small ΔW.

Costs are counted in multiply-adds. Reading or writing a number costs as much as ``ACTIVATION_COST``
multiply-adds for an activation and ``WEIGHT_COST`` for a weight: a product with A or B does little
arithmetic on each number that it reads, so its cost is mostly reading. A weight costs more, because
it is not in the cache, unlike the output of the previous layer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

FACTORED = "factored"
MATERIALISED = "materialised"

#: the cost in multiply-adds of reading or writing one float32 number: of an activation, and of a
#: weight; fitted on a CPU core
ACTIVATION_COST, WEIGHT_COST = 12.0, 50.0


@dataclass(frozen=True)
class Costs:
    """The cost that an adapter adds to one linear layer, in multiply-adds. Memory traffic counts as
    multiply-adds too, see ``ACTIVATION_COST``.

    ``factored`` and ``materialised`` are the additional costs of the two paths. ``layer`` is the
    cost of the layer without an adapter, for comparison.
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
    """The costs of one call from [tokens, in] to [tokens, out], with backward if ``training``."""

    def thin_cost(width: int, passes: int = 1) -> float:
        """The cost of a product of A or B with a tensor [tokens, width], which is read or written
        ``passes`` times."""
        return tokens * width * (rank + passes * ACTIVATION_COST)

    layer = tokens * in_ * out * (2 if training else 1)
    forming_cost = in_ * out * (rank + 2 * WEIGHT_COST)  # read W, write W + ΔW
    # B h is written, and read when x Wᵀ is added to it
    factored, materialised = thin_cost(in_) + thin_cost(out, 2), forming_cost
    if training:
        # Bᵀ dyᵀ and the gradients of B and A
        factor_gradients = 2 * thin_cost(out) + thin_cost(in_)
        factored += factor_gradients + thin_cost(in_, 2)  # added to the gradient of x
        # forward did not compute h = A x, so backward computes it for the gradient of B
        materialised += factor_gradients + thin_cost(in_) + forming_cost
    return Costs(tokens, layer, factored, materialised if dtype.itemsize >= 4 else math.inf)


@functools.cache
def max_factored_tokens(out: int, in_: int, rank: int, dtype: torch.dtype) -> float:
    """The number of tokens above which a training step is cheaper with W + ΔW computed. Infinity if
    it never is, or if W + ΔW would lose precision. Inference uses this number too, so that training
    and inference round equally."""
    if dtype.itemsize < 4:
        return math.inf
    zero_tokens, one_token = (costs(out, in_, rank, tokens, dtype, True) for tokens in (0, 1))
    # both costs are linear in the number of tokens
    slope = one_token.factored - (one_token.materialised - zero_tokens.materialised)
    return zero_tokens.materialised / slope
