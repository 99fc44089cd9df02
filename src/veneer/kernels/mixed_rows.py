"""The low-rank term x ΔWᵀ of rows that use different adapters, in one loop compiled by numba.

    Δ[row] = Σ_p weight_p · (x[row] A_pᵀ) B_p        p: an adapter that the row uses
    x: [N, in]   A: [R, in]   B: [R, out]            R: the ranks of all adapters, one after another

The loop is for the few tokens of a decoding step. Torch would need several operations for each
layer, each of which wakes its threads, and A and B in float32; the loop reads 16-bit factors as
they are. Rows of the same adapter are computed one after another, while its factors are in the
cache. Numbers are summed in float32 and rounded once. Each row is computed alone, so that a NaN in
one row does not reach another.

The loop runs on one thread: the work of a layer takes about as long as waking another thread, and
two pools of threads, torch's and numba's, would slow each other.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from veneer.kernels.numba_loops import compile_loop, to_float32, to_stored

#: how many ranks the loop computes together. The factors of each adapter are padded with zeros, so
#: that its rank is a multiple of this number
RANKS_TOGETHER = 8


class RowPairs(NamedTuple):
    """Which adapters each row uses, as numpy arrays for the loop. A pair is one row with one of its
    adapters; a row that blends several adapters has several pairs.

    Fields:
        order: [N], the row indices in the order in which the loop computes the rows.
        first_pair: [N + 1], the index of the first pair of each row. The pairs of row n end before
            ``first_pair[n + 1]``.
        first_rank, after_rank: for each pair, the first row of its adapter in the joined A [R, in]
            and B [R, out], and the row after its last.
        weights: for each pair, the factor of the adapter's term in the sum of the row.
    """

    order: Any
    first_pair: Any
    first_rank: Any
    after_rank: Any
    weights: Any


def make_pairs(
    adapters_by_row: Sequence[Sequence[tuple[int, float]]],
    rank_bounds: Sequence[tuple[int, int]],
    tokens_per_row: int,
) -> RowPairs:
    """The ``RowPairs`` of a batch of sequences. The compiled loop works on tokens: each token of a
    sequence is a row of ``RowPairs`` that uses the adapters of the sequence.

    Args:
        adapters_by_row: for each sequence of the batch, (index of the adapter, factor of its term)
            of each adapter that the sequence uses.
        rank_bounds: for each adapter, the half-open range (first, stop) of its ranks in the joined
            A [R, in] and B [R, out].
        tokens_per_row: the number of tokens in each sequence.
    """
    pairs_of_token = [
        pairs_of_row for pairs_of_row in adapters_by_row for _ in range(tokens_per_row)
    ]
    pairs = [pair for pairs_of_row in pairs_of_token for pair in pairs_of_row]
    adapters_of_token = [
        [adapter for adapter, _ in pairs_of_row] for pairs_of_row in pairs_of_token
    ]
    ranks = np.array([rank_bounds[adapter] for adapter, _ in pairs], np.int64).reshape(-1, 2)
    return RowPairs(
        np.array(sorted(range(len(pairs_of_token)), key=adapters_of_token.__getitem__), np.int64),
        np.cumsum([0, *map(len, pairs_of_token)], dtype=np.int64),
        np.ascontiguousarray(ranks[:, 0]),
        np.ascontiguousarray(ranks[:, 1]),
        np.array([weight for _, weight in pairs], np.float32),
    )


def multiply_pairs(x: Tensor, A: Any, B: Any, pairs: RowPairs) -> Tensor:
    """Δ [N, out], the low-rank term of each row of x [N, in], in the dtype of x. A [R, in] and B
    [R, out] are numpy arrays made by ``to_array``, in which the ranks of all adapters follow each
    other. x, A and B are bfloat16 or float32, in main memory and without gradients."""
    delta = x.new_empty(x.shape[0], B.shape[1])
    _multiply(to_array(x.contiguous()), A, B, *pairs, to_array(delta))
    return delta


def to_array(matrix: Tensor) -> Any:
    """A view of a bfloat16 or float32 tensor as a numpy array for the loop, without a copy: float32
    as it is, bfloat16 as uint16, because numpy has no bfloat16."""
    return (matrix if matrix.dtype is torch.float32 else matrix.view(torch.uint16)).numpy()


@compile_loop("reassoc", "contract")
def _multiply(x, A, B, order, first_pair, first_rank, after_rank, weights, delta):
    x_row, sums = np.empty(x.shape[1], np.float32), np.empty(delta.shape[1], np.float32)
    for row in order:
        for j in range(len(x_row)):
            x_row[j] = to_float32(x[row, j])
        for j in range(len(sums)):
            sums[j] = np.float32(0)
        for pair in range(first_pair[row], first_pair[row + 1]):
            for k in range(first_rank[pair], after_rank[pair], RANKS_TOGETHER):
                a0, a1, a2, a3 = A[k], A[k + 1], A[k + 2], A[k + 3]
                a4, a5, a6, a7 = A[k + 4], A[k + 5], A[k + 6], A[k + 7]
                h0 = h1 = h2 = h3 = h4 = h5 = h6 = h7 = np.float32(0)
                for j in range(len(x_row)):
                    h0 += x_row[j] * to_float32(a0[j])
                    h1 += x_row[j] * to_float32(a1[j])
                    h2 += x_row[j] * to_float32(a2[j])
                    h3 += x_row[j] * to_float32(a3[j])
                    h4 += x_row[j] * to_float32(a4[j])
                    h5 += x_row[j] * to_float32(a5[j])
                    h6 += x_row[j] * to_float32(a6[j])
                    h7 += x_row[j] * to_float32(a7[j])
                weight = weights[pair]
                h0, h1, h2, h3 = h0 * weight, h1 * weight, h2 * weight, h3 * weight
                h4, h5, h6, h7 = h4 * weight, h5 * weight, h6 * weight, h7 * weight
                b0, b1, b2, b3 = B[k], B[k + 1], B[k + 2], B[k + 3]
                b4, b5, b6, b7 = B[k + 4], B[k + 5], B[k + 6], B[k + 7]
                for j in range(len(sums)):
                    sums[j] += (
                        h0 * to_float32(b0[j])
                        + h1 * to_float32(b1[j])
                        + h2 * to_float32(b2[j])
                        + h3 * to_float32(b3[j])
                        + h4 * to_float32(b4[j])
                        + h5 * to_float32(b5[j])
                        + h6 * to_float32(b6[j])
                        + h7 * to_float32(b7[j])
                    )
        for j in range(len(sums)):
            delta[row, j] = to_stored(delta[row, j], sums[j])
