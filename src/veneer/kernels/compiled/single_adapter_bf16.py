"""The change of one adapter for bfloat16 rows, without a graph, from its factors as a module has
them.

    y_t = s · B (A x_t)        x: [T, in]   A: [r, in]   B: [out, r]   y: [T, out]

A few tokens are computed in float32; many take the processor's own products of bfloat16 numbers
(``bf16_dot``), for which the factors are rounded to bfloat16 first.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from veneer.kernels.compiled import bf16_dot
from veneer.kernels.compiled.numba_ops import at, compiled, narrow, wide
from veneer.kernels.compiled.thin_blocks import add_one, dots_one

#: tokens from which on the processor's products take less time
MANY = 64
HALF = np.uint16(0)
_STORED = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}


def able(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether this is for x [T, in] and factors [r, in] and [out, r]: each of them contiguous, on
    the processor and of a dtype that it knows, and tokens few, or the processor one that has the
    products."""
    here = x.is_cpu and x.dtype is torch.bfloat16 and A.dtype is B.dtype and A.dtype in _STORED
    whole = x.is_contiguous() and A.is_contiguous() and B.is_contiguous()
    return here and whole and (x.shape[0] < MANY or bf16_dot.able())


def change(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """[T, out], rounded to bfloat16 once."""
    y = x.new_empty(x.shape[0], len(B))
    loop = _few if x.shape[0] < MANY else _many
    sizes = *x.shape, len(B), A.data_ptr(), B.data_ptr(), len(A)
    loop(x.data_ptr(), y.data_ptr(), *sizes, scale, _STORED[A.dtype])
    return y


@compiled
def _few(x_at, y_at, tokens, in_, out, A_at, B_at, rank, scale, factor):
    A, given, weight = (
        carray(at(A_at, factor), (rank, in_)),
        carray(at(B_at, factor), (out, rank)),
        np.float32(scale),
    )
    x, h, y = np.empty(in_, np.float32), np.empty(rank, np.float32), np.empty(out, np.float32)
    B = np.empty((rank, out), np.float32)
    for k in range(rank):
        row = B[k]
        for j in range(out):
            row[j] = wide(given[j, k])
    for t in range(tokens):
        own, into = (
            carray(at(x_at, HALF), (tokens, in_))[t],
            carray(at(y_at, HALF), (tokens, out))[t],
        )
        for j in range(in_):
            x[j] = wide(own[j])
        for j in range(out):
            y[j] = np.float32(0)
        dots_one(h, x, A)
        add_one(y, h, B, 0, rank, weight)
        for j in range(out):
            into[j] = narrow(y[j], HALF)


@compiled
def _many(x_at, y_at, tokens, in_, out, A_at, B_at, rank, scale, factor):
    given, other = carray(at(A_at, factor), (rank, in_)), carray(at(B_at, factor), (out, rank))
    A, B = np.empty((rank, in_), np.uint16), np.empty((rank, out), np.uint16)
    for k in range(rank):
        a, b, from_a = A[k], B[k], given[k]
        for j in range(in_):
            a[j] = narrow(wide(from_a[j]), HALF)
        for j in range(out):
            b[j] = narrow(wide(other[j, k]), HALF)
    _multiplied(x_at, y_at, tokens, A, B, np.float32(scale))


@numba.njit
def _multiplied(x_at, y_at, tokens, A, B, scale):
    """A and B are arguments, as numba would free what nobody needs but for its address."""
    order, groups, weights = np.zeros(1, np.int64), np.array([[0, 1, 0, 1]]), np.array([scale])
    table = np.array([[np.int64(A.ctypes.data), np.int64(B.ctypes.data), np.int64(len(A))]])
    bf16_dot.change(x_at, y_at, tokens, A.shape[1], B.shape[1], order, groups, weights, table)
