"""Many adapters in one batch of linear layers, in one loop over the tokens, by numba: each row's x
ΔWᵀ, [N, out].

    h = A x        y = Σ weight · hᵀ B        A: [r, in]   B: [r, out]   of each adapter that the row uses

Rows that use the same stand together. Four of their tokens at a time meet each number of A and of
B, which are read where they lie, by address: nothing is gathered, padded or laid out. Sums are
float32, and y is rounded to the dtype of x once.

Where all is bfloat16 and the processor multiplies it itself, ``bf16_dot`` takes the place of the
loop here. Rejected: numba's own threads, beside those of torch.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled import bf16_dot
from veneer.kernels.compiled.numba_ops import at, compiled, narrow, wide
from veneer.kernels.compiled.thin_blocks import BLOCK, add_four, add_one, dots_four, dots_one, take

DTYPES = (torch.float32, torch.bfloat16)
_STORED = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}


# : order: [N] rows, those that use the same beside each other (int64); groups: [G, 4] of such rows,
# the first place in
# : ``order`` and the one after the last, and the same of their adapters in ``weights`` (int64);
# weights: [E] float32
Rows = tuple[Any, Any, Any]


def rows(groups: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Rows:
    """Of (rows, weights of the adapters that they use) for each group."""
    order, bounds, weights = [], [], []
    for own, strengths in groups:
        bounds.append(
            (len(order), len(order) + len(own), len(weights), len(weights) + len(strengths))
        )
        order.extend(own)
        weights.extend(strengths)
    return (
        np.array(order, np.int64),
        np.array(bounds, np.int64).reshape(-1, 4),
        np.array(weights, np.float32),
    )


def table(factors: Sequence[tuple[Tensor, Tensor] | None]) -> Any:
    """The addresses and rank of each A [r, in] and B [r, out], [E, 3]; None changes nothing.
    Whoever has the table keeps the tensors, which are contiguous."""
    rows = [
        (one[0].data_ptr(), one[1].data_ptr(), len(one[0])) if one else (0, 0, 0) for one in factors
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def change(x: Tensor, out: int, rows: Rows, table: Any, factors: torch.dtype) -> Tensor:
    """Each token's change, [N · tokens, out] in the dtype of x.

    Args:
        x: [N · tokens, in], contiguous, float32 or bfloat16, on the processor.
        factors: the dtype of A and B, one of the same two.
    """
    y = x.new_empty(x.shape[0], out)
    tokens = x.shape[0] // len(rows[0])
    sizes = x.data_ptr(), y.data_ptr(), tokens, x.shape[1], out
    if x.dtype is factors is torch.bfloat16 and bf16_dot.able():
        bf16_dot.change(*sizes, *rows, table)
    else:
        _loop(*sizes, *rows, table, _STORED[x.dtype], _STORED[factors])
    return y


@numba.njit(fastmath={"contract"})
def _begin(x, y, stored):
    for j in range(len(x)):
        x[j] = wide(stored[j])
    for j in range(len(y)):
        y[j] = np.float32(0)


@numba.njit(fastmath={"contract"})
def _end(stored, y):
    for j in range(len(y)):
        stored[j] = narrow(y[j], stored[j])


@compiled
def _loop(x_at, y_at, tokens, in_, out, order, groups, weights, table, like, factor):
    xs = numba.carray(at(x_at, like), (len(order) * tokens, in_))
    ys = numba.carray(at(y_at, like), (len(order) * tokens, out))
    rank = 0
    for e in range(len(table)):
        rank = max(rank, table[e, 2])
    x, y = np.empty((BLOCK, in_), np.float32), np.empty((BLOCK, out), np.float32)
    h = np.empty((BLOCK, rank), np.float32)
    own = np.empty(BLOCK, np.int64)  # of which tokens x and y are
    for g in range(len(groups)):
        place, token, left = groups[g, 0], 0, (groups[g, 1] - groups[g, 0]) * tokens
        while left:
            count = BLOCK if left >= BLOCK else 1
            left -= count
            place, token = take(own, count, order, place, token, tokens)
            for i in range(count):
                _begin(x[i], y[i], xs[own[i]])
            for e in range(groups[g, 2], groups[g, 3]):
                A = numba.carray(at(table[e, 0], factor), (table[e, 2], in_))
                B = numba.carray(at(table[e, 1], factor), (table[e, 2], out))
                if count == BLOCK:
                    dots_four(h, x, A)
                    add_four(y, h, B, 0, table[e, 2], weights[e])
                else:
                    dots_one(h[0], x[0], A)
                    add_one(y[0], h[0], B, 0, table[e, 2], weights[e])
            for i in range(count):
                _end(ys[own[i]], y[i])
