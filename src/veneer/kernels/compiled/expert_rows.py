"""Rows in segments, one a matrix of a stack, and the thin products of each with that matrix's A and B, by numba.

    change       y_s = scale · B_e A_e x_s                                  x: [S, in]    A: [E, r, in]
    gradients    dx_s = scale · A_eᵀ B_eᵀ dy_s                              dy: [S, out]   B: [E, r, out]
                 dA_e = Σ_s scale · (B_e dy_s) x_sᵀ     dB_e = Σ_s scale · (A_e x_s) dy_sᵀ

``change`` is the loop of ``mixed_rows`` with an expert for an adapter. ``gradients`` reads x and dy once, computes the
rank-r activations again and keeps the sums of an expert in the processor's cache. torch's products of a segment cost
microseconds each, of 64 segments more than what they compute.

Importing this module loads numba, as ``kernels.compiled`` says.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled import mixed_rows
from veneer.kernels.compiled.mixed_rows import DTYPES, Rows
from veneer.kernels.compiled.numba_ops import at, compiled, narrow, wide
from veneer.kernels.compiled.thin_blocks import BLOCK, add, dots

Bounds = Sequence[tuple[int, int, int]]

_STORED = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
_WIDE, _PLACE = np.empty(0, np.float32), np.empty(0, np.int64)


def able(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the loops are for x and these factors."""
    return x.is_cpu and x.dtype in DTYPES and A.dtype in DTYPES and A.dtype is B.dtype


def change(x: Tensor, A: Tensor, B: Tensor, scale: float, bounds: Bounds) -> Tensor:
    """y [S, out] of x [S, in], A [E, r, in] and B [E, out, r]; what rows behind the last segment get is arbitrary."""
    table = np.array(bounds, np.int64)
    down, up, places = _chosen(A, B, table)
    groups = np.empty((len(table), 4), np.int64)
    groups[:, :2], groups[:, 2] = table[:, 1:], np.arange(len(table))
    groups[:, 3] = groups[:, 2] + 1
    addresses = np.empty((len(table), 3), np.int64)
    for column, factor in enumerate((down, up)):
        addresses[:, column] = factor.data_ptr() + places * (factor.stride(0) * factor.element_size())
    addresses[:, 2] = down.shape[1]
    covered = int(table[-1, 2])
    rows = Rows(np.arange(covered), groups, np.full(len(table), scale, np.float32))
    x = x.contiguous()
    y = mixed_rows.change(x[:covered] if covered < len(x) else x, up.shape[2], rows, addresses, down.dtype)
    return y if covered == len(x) else torch.cat([y, y.new_zeros(len(x) - covered, y.shape[1])])


def gradients(
    x: Tensor, dy: Tensor, A: Tensor, B: Tensor, scale: float, bounds: Bounds, need_x: bool, need_factors: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [S, in] as ``change`` gives it, that of A, that of B), None for what is not needed."""
    if not need_factors:
        return change(dy, B.mT, A.mT, scale, bounds), None, None
    table = np.array(bounds, np.int64)
    down, up = A.contiguous(), B.mT.contiguous()
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x) if need_x else None
    dA, dB = (torch.zeros(factor.shape, dtype=torch.float32) for factor in (down, up))
    tensors = (x, dy, down, up, dA, dB)
    _LOOP(
        *(one.data_ptr() for one in tensors), 0 if dx is None else dx.data_ptr(),
        len(x), len(down), down.shape[1], x.shape[1], dy.shape[1], scale,
        table.ctypes.data, len(table), _STORED[x.dtype], _STORED[down.dtype],
    )  # fmt: skip
    return dx, dA.to(A.dtype), dB.mT.to(B.dtype)


def _chosen(A: Tensor, B: Tensor, table: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """A and Bᵀ, contiguous, of the matrices that any row meets if these are few, and where each segment's lies."""
    if 2 * len(table) > len(A):
        return A.contiguous(), B.mT.contiguous(), table[:, 0]
    picks = torch.from_numpy(table[:, 0].copy())
    down, up = A.index_select(0, picks), B.mT.index_select(0, picks)
    return down.contiguous(), up.contiguous(), np.arange(len(table))


@numba.njit(fastmath={"contract"})
def _widened(to, stored):
    for i in range(len(to)):
        for j in range(to.shape[1]):
            to[i, j] = wide(stored[i, j])


@numba.njit(fastmath={"contract"})
def _narrowed(stored, rows):
    for i in range(len(rows)):
        for j in range(rows.shape[1]):
            stored[i, j] = narrow(rows[i, j], stored[i, j])


@numba.njit(fastmath={"contract"})
def _scaled(to, by_rank, scale):
    """``to`` times ``scale``, and the same transposed."""
    for i in range(len(to)):
        for k in range(to.shape[1]):
            to[i, k] *= scale
            by_rank[k, i] = to[i, k]


def _gradients(
    x_at, dy_at, A_at, B_at, dA_at, dB_at, dx_at, rows, experts, rank, in_, out, scale, table_at, count, like, factor
):
    xs, dys = numba.carray(at(x_at, like), (rows, in_)), numba.carray(at(dy_at, like), (rows, out))
    As, Bs = numba.carray(at(A_at, factor), (experts, rank, in_)), numba.carray(at(B_at, factor), (experts, rank, out))
    dAs, dBs = (
        numba.carray(at(dA_at, _WIDE), (experts, rank, in_)),
        numba.carray(at(dB_at, _WIDE), (experts, rank, out)),
    )
    dxs = numba.carray(at(dx_at, like), (rows if dx_at else 0, in_))
    table = numba.carray(at(table_at, _PLACE), (count, 3))
    strength = np.float32(scale)
    x, dy, dx = (
        np.empty((BLOCK, in_), np.float32),
        np.empty((BLOCK, out), np.float32),
        np.empty((BLOCK, in_), np.float32),
    )
    h, u = np.empty((BLOCK, rank), np.float32), np.empty((BLOCK, rank), np.float32)
    hs, us = np.empty((rank, BLOCK), np.float32), np.empty((rank, BLOCK), np.float32)
    for g in range(count):
        e = table[g, 0]
        A, B, dA, dB = As[e], Bs[e], dAs[e], dBs[e]
        for first in range(table[g, 1], table[g, 2], BLOCK):
            last = min(first + BLOCK, table[g, 2])
            n = last - first
            _widened(x[:n], xs[first:last])
            _widened(dy[:n], dys[first:last])
            dots(h, x, A, 0, n)
            dots(u, dy, B, 0, n)
            _scaled(h[:n], hs, strength)
            _scaled(u[:n], us, strength)
            add(dA, us, x, 0, rank, 0, n)
            add(dB, hs, dy, 0, rank, 0, n)
            if dx_at:
                dx[:n] = np.float32(0)
                add(dx, u, A, 0, n, 0, rank)
                _narrowed(dxs[first:last], dx[:n])


_LOOP = compiled(_gradients)
