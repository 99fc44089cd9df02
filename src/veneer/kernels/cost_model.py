"""Which of the ways to compute an adapted layer is cheapest.

- factored: ``op(x; W) + op(x; ΔW)``: T · r · (in + out) more multiplications for T tokens.
- materialised: ``op(x; W + ΔW)``: out · in · r more multiplications, and one more matrix of W's
  size to write, however many tokens there are. It forms W + ΔW in at least float32, as a 16-bit sum
  would lose a small ΔW.

The cost model counts multiply-adds and numbers moved, and takes one moved number of an activation
for as dear as ``MOVED`` multiply-adds, and one of a weight for ``FETCHED``: a thin product does
little arithmetic on each number that it reads, so its cost is that of reading, and a weight, unlike
what the layer before has just written, is in no cache.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

FACTORED = "factored"
MATERIALISED = "materialised"

#: multiply-adds in the time of moving one float32 number of an activation, or of a weight; fitted
#: on a CPU core
MOVED, FETCHED = 12.0, 50.0


@dataclass(frozen=True)
class Costs:
    """The cost that an adapter adds to one linear layer, in multiply-adds (moved numbers included,
    see ``MOVED``).

    ``factored`` and ``materialised`` are those of the two paths, ``layer`` is the layer's own cost,
    for scale.
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
        """A product with A or B, whose other side is [tokens, width]."""
        return tokens * width * (rank + moved * MOVED)

    layer = tokens * in_ * out * (2 if training else 1)
    form = in_ * out * (rank + 2 * FETCHED)  # W is read, W + ΔW written
    # B h is written, and read as x Wᵀ is added to it
    factored, materialised = thin(in_) + thin(out, 2), form
    if training:
        both = 2 * thin(out) + thin(in_)  # Bᵀ dyᵀ and the gradients of B and A
        factored += both + thin(in_, 2)  # and into the gradient of x
        materialised += both + thin(in_) + form  # h, which forward did not need
    return Costs(tokens, layer, factored, materialised if dtype.itemsize >= 4 else math.inf)


@functools.cache
def forms_above(out: int, in_: int, rank: int, dtype: torch.dtype) -> float:
    """The number of tokens above which a training step is cheaper with W + ΔW formed: infinity
    where it never is, or is never right. One number for training and inference, so that both round
    alike."""
    if dtype.itemsize < 4:
        return math.inf
    none, per_token = (costs(out, in_, rank, tokens, dtype, True) for tokens in (0, 1))
    # both are linear in the tokens
    slope = per_token.factored - (per_token.materialised - none.materialised)
    return none.materialised / slope
