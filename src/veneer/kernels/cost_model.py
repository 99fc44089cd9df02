"""Predict which way to compute an adapted layer is cheapest.

- factored: ``op(x; W) + op(x; ΔW)``: T · r · (in + out) more multiplications for T tokens.
- materialised: ``op(x; W + ΔW)``: out · in · r more multiplications and one more matrix of W's size
  to
  write, whatever the number of tokens. W + ΔW is formed in at least float32, because a 16-bit sum
  would lose a small ΔW.

The cost model counts multiply-adds and moved numbers. A moved number of an activation costs
``MOVED`` multiply-adds, one of a weight ``FETCHED``: a thin product does little arithmetic on each
number that it reads, so reading dominates its cost, and a weight is not in the cache, unlike the
output of the previous layer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

FACTORED = "factored"
MATERIALISED = "materialised"

#: the cost of moving one float32 number of an activation, or of a weight, in multiply-adds; fitted
#: on a CPU core
MOVED, FETCHED = 12.0, 50.0


@dataclass(frozen=True)
class Costs:
    """The cost that an adapter adds to one linear layer, in multiply-adds (including moved numbers,
    see ``MOVED``).

    ``factored`` and ``materialised`` are the costs of the two paths; ``layer`` is the layer's own
    cost, for comparison.
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
    """The costs of one call [tokens, in] -> [tokens, out], with its backward if ``training``."""

    def thin(width: int, moved: int = 1) -> float:
        """The cost of a product with A or B, whose other side is [tokens, width]."""
        return tokens * width * (rank + moved * MOVED)

    layer = tokens * in_ * out * (2 if training else 1)
    form = in_ * out * (rank + 2 * FETCHED)  # read W, write W + ΔW
    # B h is written, and read when x Wᵀ is added to it
    factored, materialised = thin(in_) + thin(out, 2), form
    if training:
        both = 2 * thin(out) + thin(in_)  # Bᵀ dyᵀ and the gradients of B and A
        factored += both + thin(in_, 2)  # added to the gradient of x
        # h is computed again, because forward did not compute it
        materialised += both + thin(in_) + form
    return Costs(tokens, layer, factored, materialised if dtype.itemsize >= 4 else math.inf)


@functools.cache
def forms_above(out: int, in_: int, rank: int, dtype: torch.dtype) -> float:
    """The number of tokens above which a training step is cheaper with W + ΔW formed; infinity if
    it never is, or if forming would lose precision. Training and inference use the same number, so
    that both round equally."""
    if dtype.itemsize < 4:
        return math.inf
    none, per_token = (costs(out, in_, rank, tokens, dtype, True) for tokens in (0, 1))
    # both costs are linear in the tokens
    slope = per_token.factored - (per_token.materialised - none.materialised)
    return none.materialised / slope
