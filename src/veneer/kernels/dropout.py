"""Dropout for a small probability: draw the entries that are dropped, not a random number for each.

A Poisson number of draws with replacement, with λ = -ln(1 - p) an entry, hits each entry a
Poisson(λ) number of times, independently of the others: it is missed with probability exp(-λ) = 1 -
p (Kingman 1993, "Poisson Processes", section
5.1). That is exactly the distribution of a mask of independent entries, from about p · count random
numbers.

The numbers of a matrix are drawn a few rows at a time, each such group with a Poisson number of its
own, so that a loop over rows (``compiled/thin_matmul.py``) meets the draws in its order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_C: Any = torch._C

#: above this probability a mask is cheaper than indices
SPARSE = 0.3
#: rows of a matrix in a group
ROWS = 4


def seed() -> int:
    """A seed for ``drawn``, from torch's default generator."""
    return int(torch.randint(2**62, (), device="cpu"))


class Dropped(NamedTuple):
    """Entries that are dropped of ``count`` numbers, which lie in groups of ``width``.

    Fields:
        places: int64, within the groups; group by group, in no order, some twice, and some of the
            last group may lie behind the numbers.
        ends: int64, for each group the number of places up to its last.
        width: numbers in a group.
        count: numbers in all.
    """

    places: Tensor
    ends: Tensor
    width: int
    count: int

    def entries(self) -> Tensor:
        """Their places among all numbers, in no order, some twice."""
        found = self.places
        if len(self.ends) > 1:
            firsts = torch.arange(len(self.ends), device=self.ends.device) * self.width
            sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
            found = found + firsts.repeat_interleave(sizes, output_size=len(found))
        return found if self.count % max(self.width, 1) == 0 else found[found < self.count]


def drawn(
    count: int, p: float, seed: int, device: torch.device, width: int | None = None
) -> Dropped:
    """What is dropped of ``count`` numbers: each with probability p, independently. One group
    without ``width``."""
    width = width or count
    groups = -(-count // width) if count else 0
    generator = torch.Generator(device).manual_seed(seed)
    if p > SPARSE:
        mask = torch.rand(groups, width, generator=generator, device=device) < p
        return Dropped(mask.nonzero()[:, 1].contiguous(), mask.sum(1).cumsum(0), width, count)
    means = torch.full((groups,), -math.log1p(-p) * width, dtype=torch.float64, device=device)
    ends = torch.poisson(means, generator=generator).long().cumsum(0)
    draws = int(ends[-1]) if groups else 0
    return Dropped(
        torch.randint(max(width, 1), (draws,), generator=generator, device=device),
        ends,
        width,
        count,
    )


def mask(shape: Sequence[int], p: float, seed: int, device: torch.device) -> Tensor:
    """True where a number of this shape is kept, with probability 1 - p; to be multiplied by."""
    kept = torch.empty(shape, dtype=torch.bool, device=device)
    if kept.is_meta:  # which draws nothing, and has no generator
        return kept
    return kept.bernoulli_(1 - p, generator=torch.Generator(device).manual_seed(seed))


def of_rows(x: Tensor, p: float, seed: int) -> Dropped:
    """What is dropped of x [T, n], in groups of ``ROWS`` rows."""
    return drawn(x.numel(), p, seed, x.device, ROWS * x.shape[1])


def entries(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """What is dropped of ``count`` numbers, for ``without``: entries, or on a device a mask of what
    is kept. There the number of entries could not be read without waiting for all that runs."""
    if device.type != "cpu":
        return mask((count,), p, seed, device)
    return drawn(count, p, seed, device).entries()


def without(x: Tensor, entries: Tensor) -> Tensor:
    """A copy of x, of any shape, with zeros in these entries, or where this mask is False;
    differentiable."""
    if entries.dtype is torch.bool:
        return x * entries.view(x.shape)
    return x.reshape(-1).index_fill(0, entries, 0).view(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)``, and that itself where a number of draws cannot vary (a compiled graph)
    or random numbers are under rules of their own (``torch.func``), and on a device."""
    if (
        not x.is_cpu
        or torch.compiler.is_compiling()
        or _C._functorch.peek_interpreter_stack() is not None
    ):
        return F.dropout(x, p)
    return without(x, drawn(x.numel(), p, seed(), x.device).entries()) / (1 - p)
