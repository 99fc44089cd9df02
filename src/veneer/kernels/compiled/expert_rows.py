"""Rows in segments, one a matrix of a stack, and the thin products of each with that matrix's A and B, by numba.

    change       y_s = scale · B_e A_e x_s                                  x: [S, in]    A: [E, r, in]
    gradients    dx_s = scale · A_eᵀ B_eᵀ dy_s                              dy: [S, out]   B: [E, r, out]
                 dA_e = Σ_s scale · (B_e dy_s) x_sᵀ     dB_e = Σ_s scale · (A_e x_s) dy_sᵀ

``change`` is the loop of ``mixed_rows`` with an expert for an adapter. ``gradients`` reads x and dy once, computes the
rank-r activations again and keeps the sums of an expert in the processor's cache. torch's products of a segment cost
microseconds each, of 64 segments more than what they compute.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled import mixed_rows
from veneer.kernels.compiled.mixed_rows import DTYPES
from veneer.kernels.compiled.numba_ops import at, compiled, narrow, wide
from veneer.kernels.compiled.thin_blocks import BLOCK, add, add_one, dots, dots_one

#: rows up to which each is multiplied by itself
FEW = 16

_STORED = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
_WIDE, _PLACE = np.empty(0, np.float32), np.empty(0, np.int64)


def able(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the loops are for x and these factors."""
    return x.is_cpu and x.dtype in DTYPES and A.dtype in DTYPES and A.dtype is B.dtype


class _Where(NamedTuple):
    """``grouped.Segments`` as the loops have them.

    Fields:
        table: [n, 3] matrices and bounds of their rows.
        rows: of ``mixed_rows``, without weights.
        picks: the matrices, if they are few among all; else None.
    """

    table: Any
    order: Any
    groups: Any
    picks: Tensor | None


def _where(where: Any, matrices: int) -> _Where:
    """Made once for all stacks that are read with these segments."""
    if not where.loop:
        table = np.array(where.bounds, np.int64)
        groups = np.empty((len(table), 4), np.int64)
        groups[:, :2], groups[:, 2] = table[:, 1:], np.arange(len(table))
        groups[:, 3] = groups[:, 2] + 1
        picks = torch.from_numpy(table[:, 0].copy()) if 2 * len(table) <= matrices else None
        where.loop.append(_Where(table, np.arange(where.rows), groups, picks))
    return where.loop[0]


def change(x: Tensor, A: Tensor, B: Tensor, scale: float, where: Any) -> Tensor:
    """y [S, out] of x [S, in], A [E, r, in] and B [E, out, r]; zero in rows that meet no matrix."""
    known = _where(where, len(A))
    if len(x) <= FEW and _whole(A) and _whole(B):
        return _of_few(x.contiguous(), A, B, scale, known.table)
    down, up = _chosen(A, B, known.picks)
    count, rank, width = len(known.table), down.shape[1], down.element_size()
    addresses = np.empty((count, 3), np.int64)
    places = known.groups[:, 2] if known.picks is not None else known.table[:, 0]
    addresses[:, 0] = places * (down.stride(0) * width) + down.data_ptr()
    addresses[:, 1] = places * (up.stride(0) * width) + up.data_ptr()
    addresses[:, 2] = rank
    rows = known.order, known.groups, np.full(count, scale, np.float32)
    x = x.contiguous()
    lacks = len(x) - where.rows
    y = mixed_rows.change(x[: where.rows] if lacks else x, up.shape[2], rows, addresses, down.dtype)
    return torch.cat([y, y.new_zeros(lacks, y.shape[1])]) if lacks else y


def _whole(factor: Tensor) -> bool:
    """Whether each matrix lies in one piece, perhaps transposed."""
    return factor.is_contiguous() or factor.mT.is_contiguous()


def _of_few(x: Tensor, A: Tensor, B: Tensor, scale: float, table: Any) -> Tensor:
    """``change`` of few rows, with each factor read where it is: copies of four experts' take longer."""
    rank, in_ = A.shape[1:]
    out = B.shape[1]
    y = x.new_empty(len(x), out)
    _few(
        x.data_ptr(), y.data_ptr(), A.data_ptr(), B.data_ptr(), len(x), rank, in_, out, scale,
        A.stride(2) == 1, B.stride(2) == 1, table.ctypes.data, len(table), _STORED[x.dtype], _STORED[A.dtype],
    )  # fmt: skip
    return y


def gradients(
    x: Tensor, dy: Tensor, A: Tensor, B: Tensor, scale: float, where: Any, need_x: bool, need_factors: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [S, in] as ``change`` gives it, that of A, that of B), None for what is not needed."""
    if not need_factors:
        return change(dy, B.mT, A.mT, scale, where), None, None
    table = _where(where, len(A)).table
    down, up = A.contiguous(), B.mT.contiguous()
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x) if need_x else None
    dA, dB = (torch.zeros(factor.shape, dtype=torch.float32) for factor in (down, up))
    tensors = (x, dy, down, up, dA, dB)
    _gradients(
        *(one.data_ptr() for one in tensors), 0 if dx is None else dx.data_ptr(),
        len(x), len(down), down.shape[1], x.shape[1], dy.shape[1], scale,
        table.ctypes.data, len(table), _STORED[x.dtype], _STORED[down.dtype],
    )  # fmt: skip
    return dx, dA.to(A.dtype), dB.mT.to(B.dtype)


def _chosen(A: Tensor, B: Tensor, picks: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and Bᵀ of these matrices (None: all), contiguous."""
    if picks is not None:  # what lies whole is picked faster
        A = A.index_select(0, picks) if A.is_contiguous() else A.mT.index_select(0, picks).mT
        B = B.index_select(0, picks) if B.is_contiguous() else B.mT.index_select(0, picks).mT
    return A.contiguous(), B.mT.contiguous()


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


@compiled
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


@compiled
def _few(x_at, y_at, A_at, B_at, rows, rank, in_, out, scale, A_by_rank, B_by_out, table_at, count, like, factor):
    xs, ys = numba.carray(at(x_at, like), (rows, in_)), numba.carray(at(y_at, like), (rows, out))
    table = numba.carray(at(table_at, _PLACE), (count, 3))
    x, y, h = np.empty((1, in_), np.float32), np.empty((1, out), np.float32), np.empty((1, rank), np.float32)
    strength, one, done = np.float32(scale), np.float32(1), 0
    for g in range(count):
        e = table[g, 0]
        A_e, B_e = A_at + e * rank * in_ * factor.itemsize, B_at + e * rank * out * factor.itemsize
        for s in range(table[g, 1], table[g, 2]):
            _widened(x, xs[s : s + 1])
            if A_by_rank:
                dots_one(h[0], x[0], numba.carray(at(A_e, factor), (rank, in_)))
            else:
                h[0] = np.float32(0)
                add_one(h[0], x[0], numba.carray(at(A_e, factor), (in_, rank)), 0, in_, one)
            for k in range(rank):
                h[0, k] *= strength
            if B_by_out:
                dots_one(y[0], h[0], numba.carray(at(B_e, factor), (out, rank)))
            else:
                y[0] = np.float32(0)
                add_one(y[0], h[0], numba.carray(at(B_e, factor), (rank, out)), 0, rank, one)
            _narrowed(ys[s : s + 1], y)
            done = s + 1
    for s in range(done, rows):
        y[0] = np.float32(0)
        _narrowed(ys[s : s + 1], y)
