"""Many adapters in one batch of a linear layer.

    y = x Wᵀ + bias + ((x Aᵀ) ⊙ M) B
    x: [N, in]   W: [out, in]   A: [H, in]   B: [H, out]   M: [N, H]

The adapters lie below each other in A and B: each has some of the H *lanes*, as many as its rank, and a row's M is its
weight there and 0 elsewhere. So ranks may differ, a row may blend several adapters or use none, and a batch costs two
products and one multiplication, however its rows are mixed. Each adapter's numbers are read once: at few tokens, where
reading is what a layer costs, that is all that any method must do.

With many tokens the zeros cost more than the calls that they save. There each run of equal rows is multiplied with its
own lanes alone. ``most`` says where one becomes dearer than the other.

ΔW's part comes first and x Wᵀ is added to it within its own product, as in ``fused.py``, so that 16-bit outputs are
rounded with the change in them.

Rejected: a batched product of gathered factors, [N, r, in] (Chen et al. 2023, "Punica", arXiv:2310.18547, gathers in
a kernel of its own): on a CPU it copies each adapter once a row, and ``bmm`` in bfloat16 takes several times as long as
one product of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels import fused

#: (first row, the row after the last, ((lanes, their weight), …)): rows that use the same
Run = tuple[int, int, tuple[tuple[slice, float], ...]]

#: what a product of its own costs, in multiply-adds of a large one: the call, and that it is thin
CALL = 2e6


def lanes(x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """(x Aᵀ) ⊙ M, [N, H]. A may be those of several layers, [L · H, in]; then [N, L · H]."""
    h = x @ A.mT
    if mask is None:
        return h
    if h.shape[1] == mask.shape[1]:
        return h.mul_(mask)
    return h.view(len(h), -1, mask.shape[1]).mul_(mask[:, None]).view(h.shape)


def by_runs(x: Tensor, A: Tensor, B: Tensor, runs: Sequence[Run], tokens: int) -> Tensor:
    """((x Aᵀ) ⊙ M) B [N, out], of rows that are ``tokens`` long each: N = rows · tokens."""
    part = x.new_empty(x.shape[0], B.shape[1])
    for first, after, uses in runs:
        own, into = x[first * tokens : after * tokens], part[first * tokens : after * tokens]
        if not uses:
            into.zero_()
        for number, (at, strength) in enumerate(uses):
            h = fused.thin(A[at], own)  # [r, T]
            if strength != 1:
                h *= strength
            if number:
                into.addmm_(h.mT, B[at])
            else:
                torch.mm(h.mT, B[at], out=into)
    return part


def most(lanes: int, runs: Sequence[Run], out: int, in_: int) -> float:
    """The number of rows of x up to which the mask is the faster."""
    calls = sum(2 * len(uses) for _, _, uses in runs)
    rows = sum(after - first for first, after, _ in runs)
    used = sum((after - first) * (at.stop - at.start) for first, after, uses in runs for at, _ in uses) / rows
    return calls * CALL / max((lanes - used) * (out + in_), 1)
