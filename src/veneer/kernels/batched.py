"""Linear layers on a batch whose rows use different adapters: x ΔWᵀ for each row, [N, out].

**Few tokens** (decoding): rows are grouped by their adapter, each group padded to the largest, and
all
groups are computed by two batched products:

    h = A xᵀ            A: [S, r, in]   x, grouped: [S, n, in]   h: [S, r, n]
    Δ = hᵀ B            B: [S, r, out]                           Δ: [S, n, out]

On a CPU, adapter parameters are float32 whatever the base's dtype is, because batched products of
thin matrices take several times as long in 16 bits. A row that blends k adapters is in k groups.

**Many tokens** (prompts): each run of neighbouring rows with the same adapters is multiplied with
their factors.

**On a device**, a launch is expensive and copying thin factors is cheap. Each row is multiplied
with
its own factors, which one launch stacks for the call and which are freed afterwards:

    Δ = (x Aᵀ) B        x: [N, t, in]   A: [N, r, in]   B: [N, r, out]

Measured and rejected, for 16 rows, 8 adapters of rank 8 and a layer of 576 × 576 on one core, for
which groups take 15 µs and the layer itself 246 µs in float32: all adapters side by side with a
mask over the ranks (48 µs), one product per adapter (3 to 5 µs each), gathering each row's factors
(copies every adapter once per row; Chen et al. 2023, "Punica", arXiv:2310.18547, gathers in a
custom kernel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from veneer.kernels import device, fused


@dataclass(frozen=True, eq=False)
class Grouping:
    """How the rows of a call are arranged in groups, and how results are arranged back.

    Fields:
        first, groups: the range of lanes that are used.
        order: [S · n], the row of each place; None if the rows are in order already.
        weights: [S, 1, n], the weight of each place, 0 for padding; None if all are 1.
        result_rows: for each row, the place of its result, [N] (None: in order), and a mask of rows
            without a result, [N, 1] of bool (None: no such row). If there are several entries, a
            row's result is their sum.
    """

    first: int
    groups: int
    order: Tensor | None
    weights: Tensor | None
    result_rows: tuple[tuple[Tensor | None, Tensor | None], ...]


def gather_rows(x: Tensor, grouping: Grouping) -> Tensor:
    """Arrange x [N, in] in groups, [S, n, in]."""
    x = x if grouping.order is None else x.index_select(0, grouping.order)
    return x.view(grouping.groups, -1, x.shape[1])


def project_down(x: Tensor, A: Tensor, grouping: Grouping) -> Tensor:
    """h [S, r, n] for x in groups [S, n, in]."""
    h = torch.bmm(A, x.mT)
    return h if grouping.weights is None else h.mul_(grouping.weights)


def project_up(h: Tensor, B: Tensor, grouping: Grouping, total: Tensor | None = None) -> Tensor:
    """hᵀ B of each row, [N, out]; added to ``total``, the result of another grouping, if given."""
    changes = torch.bmm(h.mT, B).view(-1, B.shape[2])
    for index, without_result in grouping.result_rows:
        change = changes if index is None else changes.index_select(0, index)
        if without_result is not None:  # multiplying by 0 would keep a NaN of another row
            change = change.masked_fill(without_result, 0.0)
        total = change if total is None else total.add_(change)
    assert total is not None
    return total


def by_rows(x: Tensor, A: Tensor, B: Tensor, weights: Tensor | None) -> Tensor:
    """Δ [N · t, out] for x [N · t, in]; the ranks of a row are multiplied by its weights [N, 1,
    r]."""
    h = torch.bmm(x.view(len(A), -1, x.shape[1]), A.mT)
    h = h if weights is None else h.mul_(weights)
    return torch.bmm(h, B).view(len(x), -1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float | Tensor,
    zeros: Tensor,
) -> Tensor:
    """x Wᵀ + scale · (x A_nᵀ) B_nᵀ + bias [N, *, out], with factors of its own for each row n;
    differentiable in all but W.

    Args:
        x: [N, *, in], on a device.
        A, B: [r_n, in] and [out, r_n] of each row, of one dtype. Rows may share a tensor.
        scale: of all rows, or [N, 1, 1].
        zeros: a tensor of zeros of the dtype of A and B, as large as the largest of these.
    """
    recorded, rows, most = (
        torch.is_grad_enabled(),
        x.reshape(len(A), -1, x.shape[-1]),
        max(map(len, A)),
    )
    joined = []
    for factors in (A, [factor.mT for factor in B]):
        width = factors[0].shape[1]
        padding = zeros[: most * width].view(most, width)
        pieces = [
            piece for factor in factors for piece in (factor, padding[len(factor) :]) if len(piece)
        ]
        joined.append(torch.cat(pieces).view(len(factors), most, width))
    downs, ups = (
        [factor.to(x.dtype) for factor in joined]
        if recorded
        else cast(Any, device.same_dtype(joined, x.dtype))
    )
    h = torch.bmm(rows, downs.mT)
    h, alpha = (h * scale, 1) if isinstance(scale, Tensor) else (h, scale)
    delta = torch.baddbmm(h.detach().view(-1)[:1], h, ups, beta=0, alpha=alpha).view(
        -1, weight.shape[0]
    )
    tokens = rows.reshape(-1, x.shape[-1])
    if not recorded:
        y = fused.add_product(delta, tokens, weight, bias)
    elif bias is None:
        # in place, autograd would copy the tensor of which this is a view
        y = torch.addmm(delta, tokens, weight.mT)
    else:
        y = torch.addmm(delta + bias, tokens, weight.mT)
    return y.view(*x.shape[:-1], weight.shape[0])


#: a run of rows with the same adapters: (first row, row after the last, ((A [r, in], B [r, out],
#: weight), …))
Run = tuple[int, int, Sequence[tuple[Tensor, Tensor, float]]]


def by_runs(x: Tensor, out: int, runs: Sequence[Run], tokens: int) -> Tensor:
    """Δ [N, out] of rows of ``tokens`` each."""
    change = x.new_empty(x.shape[0], out)
    for first, after, uses in runs:
        x_rows, y_rows = x[first * tokens : after * tokens], change[first * tokens : after * tokens]
        if not uses:
            y_rows.zero_()
        for number, (A, B, weight) in enumerate(uses):
            h = fused.thin(A, x_rows)  # [r, T]
            if weight != 1:
                h *= weight
            if number:
                y_rows.addmm_(h.mT, B)
            else:
                torch.mm(h.mT, B, out=y_rows)
    return change
