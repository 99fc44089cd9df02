"""Dropout that draws the indices of the dropped entries instead of a random number for each entry,
which is faster on a CPU for a small probability p.

Let λ = -ln(1 - p). A Poisson number of indices, λ per entry on average, is drawn with replacement.
Each entry is then drawn a Poisson(λ) number of times, independently of all others (Kingman 1993,
"Poisson Processes", section 5.1), so it is not drawn at all with probability exp(-λ) = 1 - p. This
is exactly the distribution of independent dropout, and takes only about p random numbers per entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_C: Any = torch._C

#: the largest p for which drawing indices is faster than drawing a random number for each entry
MAX_INDEXED_PROBABILITY = 0.3


def new_seed() -> int:
    """A random seed for ``draw_entries`` or ``keep_mask``, from torch's default generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def draw_entries(entry_count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Indices (int64) of the entries to drop, of a tensor with ``entry_count`` entries: each is
    dropped with probability p, independently of the others. The indices are not sorted, and an
    index may occur several times. The same ``seed`` gives the same indices."""
    generator = torch.Generator(device).manual_seed(seed)
    if p > MAX_INDEXED_PROBABILITY:
        return (torch.rand(entry_count, generator=generator, device=device) < p).nonzero()[:, 0]
    expected_draw_count = torch.tensor(
        -math.log1p(-p) * entry_count, dtype=torch.float64, device=device
    )
    draw_count = int(torch.poisson(expected_draw_count, generator=generator))
    return torch.randint(max(entry_count, 1), (draw_count,), generator=generator, device=device)


def keep_mask(shape: Sequence[int], p: float, seed: int, device: torch.device) -> Tensor:
    """A boolean mask of this shape, by which to multiply a tensor: each entry is False (dropped)
    with probability p, else True. The same ``seed`` gives the same mask."""
    is_kept = torch.empty(shape, dtype=torch.bool, device=device)
    if is_kept.is_meta:  # torch has no generator for the meta device, and a meta mask has no values
        return is_kept
    return is_kept.bernoulli_(1 - p, generator=torch.Generator(device).manual_seed(seed))


def draw_dropped(x: Tensor, p: float, seed: int) -> Tensor | None:
    """The dropped entries of x, in the form that ``zero_entries`` takes: flat indices on a CPU; on
    other devices a ``keep_mask``, because the number of indices is random, so the host would have
    to wait for the device to learn it. None if p is 0."""
    if not p:
        return None
    if not x.is_cpu:
        return keep_mask((x.numel(),), p, seed, x.device)
    return draw_entries(x.numel(), p, seed, x.device)


def zero_entries(x: Tensor, dropped: Tensor) -> Tensor:
    """A copy of x with zeros at the dropped entries. ``dropped`` holds their flat indices (int64),
    or is a boolean mask that is False at them (``keep_mask``). Differentiable in x."""
    if dropped.dtype is torch.bool:
        return x * dropped.view(x.shape)
    return x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with the distribution of ``F.dropout(x, p)``, by drawing the indices of the dropped
    entries. ``F.dropout`` itself is used in compiled graphs, where the number of indices cannot
    vary; under ``torch.func``, which has its own rules for random numbers; and on devices other
    than the CPU."""
    if (
        not x.is_cpu
        or torch.compiler.is_compiling()
        or _C._functorch.peek_interpreter_stack() is not None
    ):
        return F.dropout(x, p)
    return zero_entries(x, draw_entries(x.numel(), p, new_seed(), x.device)) / (1 - p)
