"""Many adapters in one batch of linear layers, in one loop over the tokens, by numba: each row's x ΔWᵀ, [N, out].

    h = A x        y = Σ weight · hᵀ B        A: [r, in]   B: [r, out]   of each adapter that the row uses

Rows that use the same stand together. Four of their tokens at a time meet each number of A and of B, which are read
where they lie, by address: nothing is gathered, padded or laid out. Sums are float32, and y is rounded to the dtype of
x once.

For 16 rows of one token, 8 adapters of rank 8 and a bfloat16 layer of 576 × 576 on one core this takes 10 µs, the
layer itself 43, and the two batched products of ``kernels.batched`` with what moves rows for them about 100: torch's
operations take 3 to 5 µs each, whatever they do. Rejected: numba's own threads, beside those of torch.

Importing this module loads numba, as ``kernels.compiled`` says.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled import at, compiled, narrow, plus, wide

DTYPES = (torch.float32, torch.bfloat16)
#: tokens that meet a number of a factor at once, and numbers that meet a token at once
TOKENS = RANKS = 4
_STORED = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}


class Rows(NamedTuple):
    """Which rows use the same, and how strongly.

    Fields:
        order: [N] rows, those that use the same beside each other. int64.
        groups: [G, 4] of such rows: the first place in ``order`` and the one after the last, and the same of the
            adapters that they use in ``weights``. int64.
        weights: [E] float32.
    """

    order: Any
    groups: Any
    weights: Any


def rows(groups: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Rows:
    """Of (rows, weights of the adapters that they use) for each group."""
    order, bounds, weights = [], [], []
    for own, strengths in groups:
        bounds.append((len(order), len(order) + len(own), len(weights), len(weights) + len(strengths)))
        order.extend(own)
        weights.extend(strengths)
    return Rows(np.array(order, np.int64), np.array(bounds, np.int64).reshape(-1, 4), np.array(weights, np.float32))


def table(factors: Sequence[tuple[Tensor, Tensor] | None]) -> Any:
    """The addresses and rank of each A [r, in] and B [r, out], [E, 3]; None changes nothing. Whoever has the table
    keeps the tensors, which are contiguous."""
    none = (0, 0, 0)
    return np.array(
        [none if one is None else (one[0].data_ptr(), one[1].data_ptr(), len(one[0])) for one in factors], np.int64
    ).reshape(-1, 3)


def change(x: Tensor, out: int, rows: Rows, table: Any, factors: torch.dtype) -> Tensor:
    """Each token's change, [N · tokens, out] in the dtype of x.

    Args:
        x: [N · tokens, in], contiguous, float32 or bfloat16, on the processor.
        factors: the dtype of A and B, one of the same two.
    """
    y = x.new_empty(x.shape[0], out)
    tokens = x.shape[0] // len(rows.order)
    _LOOP(x.data_ptr(), y.data_ptr(), tokens, x.shape[1], out, *rows, table, _STORED[x.dtype], _STORED[factors])
    return y


@numba.njit(fastmath={"contract"})
def _down_4x4(h, x, A, k, count):
    """Four tokens' products with four rows of A."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = np.float32(0)
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    a0, a1, a2, a3 = A[k], A[k + 1], A[k + 2], A[k + 3]
    for j in range(count):
        v0, v1, v2, v3 = x0[j], x1[j], x2[j], x3[j]
        w0, w1, w2, w3 = wide(a0[j]), wide(a1[j]), wide(a2[j]), wide(a3[j])
        s00, s01, s02, s03 = plus(s00, v0 * w0), plus(s01, v0 * w1), plus(s02, v0 * w2), plus(s03, v0 * w3)
        s10, s11, s12, s13 = plus(s10, v1 * w0), plus(s11, v1 * w1), plus(s12, v1 * w2), plus(s13, v1 * w3)
        s20, s21, s22, s23 = plus(s20, v2 * w0), plus(s21, v2 * w1), plus(s22, v2 * w2), plus(s23, v2 * w3)
        s30, s31, s32, s33 = plus(s30, v3 * w0), plus(s31, v3 * w1), plus(s32, v3 * w2), plus(s33, v3 * w3)
    h[0, k], h[0, k + 1], h[0, k + 2], h[0, k + 3] = s00, s01, s02, s03
    h[1, k], h[1, k + 1], h[1, k + 2], h[1, k + 3] = s10, s11, s12, s13
    h[2, k], h[2, k + 1], h[2, k + 2], h[2, k + 3] = s20, s21, s22, s23
    h[3, k], h[3, k + 1], h[3, k + 2], h[3, k + 3] = s30, s31, s32, s33


@numba.njit(fastmath={"contract"})
def _down_4x1(h, x, A, k, count):
    s0 = s1 = s2 = s3 = np.float32(0)
    x0, x1, x2, x3, a = x[0], x[1], x[2], x[3], A[k]
    for j in range(count):
        w = wide(a[j])
        s0, s1, s2, s3 = plus(s0, x0[j] * w), plus(s1, x1[j] * w), plus(s2, x2[j] * w), plus(s3, x3[j] * w)
    h[0, k], h[1, k], h[2, k], h[3, k] = s0, s1, s2, s3


@numba.njit(fastmath={"contract"})
def _down_1x4(h, x, A, k, count):
    s0 = s1 = s2 = s3 = np.float32(0)
    a0, a1, a2, a3 = A[k], A[k + 1], A[k + 2], A[k + 3]
    for j in range(count):
        v = x[j]
        s0, s1 = plus(s0, v * wide(a0[j])), plus(s1, v * wide(a1[j]))
        s2, s3 = plus(s2, v * wide(a2[j])), plus(s3, v * wide(a3[j]))
    h[k], h[k + 1], h[k + 2], h[k + 3] = s0, s1, s2, s3


@numba.njit(fastmath={"contract"})
def _down_1x1(h, x, A, k, count):
    s, a = np.float32(0), A[k]
    for j in range(count):
        s = plus(s, x[j] * wide(a[j]))
    h[k] = s


@numba.njit(fastmath={"contract"})
def _up_4x4(y, h, B, k, count, weight):
    """Add four rows of B, times their h, to four tokens."""
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    b0, b1, b2, b3 = B[k], B[k + 1], B[k + 2], B[k + 3]
    h00, h01, h02, h03 = weight * h[0, k], weight * h[0, k + 1], weight * h[0, k + 2], weight * h[0, k + 3]
    h10, h11, h12, h13 = weight * h[1, k], weight * h[1, k + 1], weight * h[1, k + 2], weight * h[1, k + 3]
    h20, h21, h22, h23 = weight * h[2, k], weight * h[2, k + 1], weight * h[2, k + 2], weight * h[2, k + 3]
    h30, h31, h32, h33 = weight * h[3, k], weight * h[3, k + 1], weight * h[3, k + 2], weight * h[3, k + 3]
    for j in range(count):
        w0, w1, w2, w3 = wide(b0[j]), wide(b1[j]), wide(b2[j]), wide(b3[j])
        y0[j] = y0[j] + h00 * w0 + h01 * w1 + h02 * w2 + h03 * w3
        y1[j] = y1[j] + h10 * w0 + h11 * w1 + h12 * w2 + h13 * w3
        y2[j] = y2[j] + h20 * w0 + h21 * w1 + h22 * w2 + h23 * w3
        y3[j] = y3[j] + h30 * w0 + h31 * w1 + h32 * w2 + h33 * w3


@numba.njit(fastmath={"contract"})
def _up_4x1(y, h, B, k, count, weight):
    y0, y1, y2, y3, b = y[0], y[1], y[2], y[3], B[k]
    h0, h1, h2, h3 = weight * h[0, k], weight * h[1, k], weight * h[2, k], weight * h[3, k]
    for j in range(count):
        w = wide(b[j])
        y0[j] += h0 * w
        y1[j] += h1 * w
        y2[j] += h2 * w
        y3[j] += h3 * w


@numba.njit(fastmath={"contract"})
def _up_1x4(y, h, B, k, count, weight):
    b0, b1, b2, b3 = B[k], B[k + 1], B[k + 2], B[k + 3]
    h0, h1, h2, h3 = weight * h[k], weight * h[k + 1], weight * h[k + 2], weight * h[k + 3]
    for j in range(count):
        y[j] = y[j] + h0 * wide(b0[j]) + h1 * wide(b1[j]) + h2 * wide(b2[j]) + h3 * wide(b3[j])


@numba.njit(fastmath={"contract"})
def _up_1x1(y, h, B, k, count, weight):
    b, h0 = B[k], weight * h[k]
    for j in range(count):
        y[j] += h0 * wide(b[j])


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


@numba.njit(fastmath={"contract"})
def _four(y, h, x, A, B, weight):
    rank, in_, out = A.shape[0], A.shape[1], B.shape[1]
    whole = rank - rank % RANKS
    for k in range(0, whole, RANKS):
        _down_4x4(h, x, A, k, in_)
    for k in range(whole, rank):
        _down_4x1(h, x, A, k, in_)
    for k in range(0, whole, RANKS):
        _up_4x4(y, h, B, k, out, weight)
    for k in range(whole, rank):
        _up_4x1(y, h, B, k, out, weight)


@numba.njit(fastmath={"contract"})
def _one(y, h, x, A, B, weight):
    rank, in_, out = A.shape[0], A.shape[1], B.shape[1]
    whole = rank - rank % RANKS
    for k in range(0, whole, RANKS):
        _down_1x4(h, x, A, k, in_)
    for k in range(whole, rank):
        _down_1x1(h, x, A, k, in_)
    for k in range(0, whole, RANKS):
        _up_1x4(y, h, B, k, out, weight)
    for k in range(whole, rank):
        _up_1x1(y, h, B, k, out, weight)


def _change(x_at, y_at, tokens, in_, out, order, groups, weights, table, like, factor):
    xs = numba.carray(at(x_at, like), (len(order) * tokens, in_))
    ys = numba.carray(at(y_at, like), (len(order) * tokens, out))
    rank = 0
    for e in range(len(table)):
        rank = max(rank, table[e, 2])
    x, y, h = (
        np.empty((TOKENS, in_), np.float32),
        np.empty((TOKENS, out), np.float32),
        np.empty((TOKENS, rank), np.float32),
    )
    own = np.empty(TOKENS, np.int64)  # of which tokens x and y are
    for g in range(len(groups)):
        place, token, left = groups[g, 0], 0, (groups[g, 1] - groups[g, 0]) * tokens
        while left:
            count = TOKENS if left >= TOKENS else 1
            left -= count
            for i in range(count):
                own[i] = order[place] * tokens + token
                token += 1
                if token == tokens:
                    place, token = place + 1, 0
                _begin(x[i], y[i], xs[own[i]])
            for e in range(groups[g, 2], groups[g, 3]):
                A = numba.carray(at(table[e, 0], factor), (table[e, 2], in_))
                B = numba.carray(at(table[e, 1], factor), (table[e, 2], out))
                if count == TOKENS:
                    _four(y, h, x, A, B, weights[e])
                else:
                    _one(y[0], h[0], x[0], A, B, weights[e])
            for i in range(count):
                _end(ys[own[i]], y[i])


_LOOP = compiled(_change)
