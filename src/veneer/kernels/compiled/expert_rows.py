"""Rows in segments, one a matrix of a stack, and the thin products of each with that matrix's A and
B, by numba.

    change       y_s = scale · B_e A_e x_s                                  x: [S, in]    A: [E, r, in]
    gradients    dx_s = scale · A_eᵀ B_eᵀ dy_s                              dy: [S, out]   B: [E, out, r]
                 dA_e = Σ_s scale · (B_eᵀ dy_s) x_sᵀ     dB_e = Σ_s scale · dy_s (A_e x_s)ᵀ

A and B of a matrix are taken once, by their strides, into float32 and with the rank first, and the
sums of their gradients are kept there until its last row; so no copy of a stack is made, whichever
way it lies. ``gradients`` reads x and dy once and computes the rank-r activations again. torch's
products of a segment cost microseconds each, of 64 segments more than what they compute.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled import bf16_dot, mixed_rows
from veneer.kernels.compiled.mixed_rows import DTYPES
from veneer.kernels.compiled.numba_ops import at, compiled, narrow, wide
from veneer.kernels.compiled.thin_blocks import BLOCK, add, dots, dots_one

_STORED = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
_PLACE = np.empty(0, np.int64)


def able(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the loops are for x and these factors."""
    return x.is_cpu and x.dtype in DTYPES and A.dtype in DTYPES and A.dtype is B.dtype


def _table(where: Any) -> tuple[int, int]:
    """(address, length) of the matrices and the bounds of their rows, [n, 3]; made once for all
    stacks that are read with these segments. The address is 0 for one matrix that all rows meet."""
    if where is None:
        return 0, 1
    if not where.loop:
        where.loop.append(np.array(where.bounds, np.int64))
    return where.loop[0].ctypes.data, len(where.bounds)


def _lies(factor: Tensor, rank_first: bool) -> tuple[int, int, int, int]:
    """Where a factor [E, r, n] or [r, n] lies ([E, n, r], [n, r] if not ``rank_first``): its
    address, and how far matrices, ranks and numbers are apart."""
    *before, next_rank, next_number = factor.stride()
    apart = (next_rank, next_number) if rank_first else (next_number, next_rank)
    return factor.data_ptr(), before[0] if before else 0, *apart


def change(x: Tensor, A: Tensor, B: Tensor, scale: float, where: Any, given: bool = True) -> Tensor:
    """y [S, out] of x [S, in], A [E, r, in] and B [E, out, r]; zero in rows that meet no matrix.
    Without ``where``, A and B are those of one matrix. ``given``: as they stand, else in each
    other's place and transposed."""
    x = x.contiguous()
    if (
        x.dtype is A.dtype is torch.bfloat16
        and where is not None
        and where.rows >= len(A)
        and bf16_dot.able()
    ):
        return _by_pairs(x, A, B, scale, where) if given else _by_pairs(x, B.mT, A.mT, scale, where)
    rows, in_ = x.shape
    rank, out = A.shape[-2], B.shape[-2] if given else A.shape[-1]
    y = x.new_empty(rows, out)
    first, second = (
        (_lies(A, True), _lies(B, False)) if given else (_lies(B, False), _lies(A, True))
    )
    _change(
        x.data_ptr(), y.data_ptr(), first, second, rows, rank, in_, out, scale, *_table(where), _STORED[x.dtype],
        _STORED[A.dtype],
    )  # fmt: skip
    return y


def _by_pairs(x: Tensor, A: Tensor, B: Tensor, scale: float, where: Any) -> Tensor:
    """``change`` of bfloat16 throughout, with a matrix for an adapter of ``mixed_rows``."""
    _table(where)
    table, down, up = where.loop[0], A.contiguous(), B.mT.contiguous()
    count, places = len(table), np.arange(len(table))
    groups = np.stack([table[:, 1], table[:, 2], places, places + 1], 1)
    addresses = np.empty((count, 3), np.int64)
    for column, factor in enumerate((down, up)):
        addresses[:, column] = (
            table[:, 0] * (factor.stride(0) * factor.element_size()) + factor.data_ptr()
        )
    addresses[:, 2] = down.shape[1]
    rows = np.arange(where.rows), groups, np.full(count, scale, np.float32)
    y = mixed_rows.change(x[: where.rows], up.shape[2], rows, addresses, down.dtype)
    lacks = len(x) - where.rows
    return torch.cat([y, y.new_zeros(lacks, y.shape[1])]) if lacks else y


def gradients(
    x: Tensor, picks: Tensor | None, dy: Tensor, A: Tensor, B: Tensor, scale: float, where: Any, need_x: bool,
    need_factors: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx [S, in] as ``change`` gives it, that of A, that of B), None for what is not needed. The
    rows are x [S, in], or the rows ``picks`` [S] of x."""
    dy = dy.contiguous()
    if not need_factors:
        return change(dy, A, B, scale, where, False), None, None
    x = x.contiguous()
    (rows, out), in_ = dy.shape, x.shape[1]
    dx = x.new_empty(rows, in_) if need_x else None
    make = torch.empty_like if where is None else torch.zeros_like  # as not every matrix may be met
    dA, dB = make(A), make(B)
    picks = None if picks is None else picks.contiguous()
    _gradients(
        x.data_ptr(), 0 if picks is None else picks.data_ptr(), dy.data_ptr(), 0 if dx is None else dx.data_ptr(),
        _lies(A, True), _lies(B, False), _lies(dA, True), _lies(dB, False), len(x), rows, A.shape[-2], in_, out, scale,
        *_table(where), _STORED[x.dtype], _STORED[A.dtype],
    )  # fmt: skip
    return dx, dA, dB


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


@numba.njit
def _matrix(lies, e, rank, count, like):
    """The numbers of matrix e from its first one on, and how far ranks and numbers are apart."""
    place, next_matrix, next_rank, next_number = lies
    length = (rank - 1) * next_rank + (count - 1) * next_number + 1
    numbers = numba.carray(at(place + e * next_matrix * like.itemsize, like), (length,))
    return numbers, next_rank, next_number


@numba.njit(fastmath={"contract"})
def _take(to, lies, e, like):
    """Matrix e [r, n] of a factor, in float32."""
    rank, count = to.shape
    numbers, next_rank, next_number = _matrix(lies, e, rank, count, like)
    if next_number == 1:
        for k in range(rank):
            row = numbers[k * next_rank : k * next_rank + count]
            for j in range(count):
                to[k, j] = wide(row[j])
    else:
        for k in range(rank):
            for j in range(count):
                to[k, j] = wide(numbers[k * next_rank + j * next_number])


@numba.njit(fastmath={"contract"})
def _put(lies, e, own, like):
    """``_take`` the other way."""
    rank, count = own.shape
    numbers, next_rank, next_number = _matrix(lies, e, rank, count, like)
    if next_number == 1:
        for k in range(rank):
            row = numbers[k * next_rank : k * next_rank + count]
            for j in range(count):
                row[j] = narrow(own[k, j], row[j])
    else:
        for j in range(count):
            for k in range(rank):
                place = k * next_rank + j * next_number
                numbers[place] = narrow(own[k, j], numbers[place])


@numba.njit
def _segment(table, g, rows):
    """Matrix, first row and the one after the last; all rows and the first matrix if there is no
    table."""
    if len(table) == 0:
        return 0, 0, rows
    return table[g, 0], table[g, 1], table[g, 2]


@numba.njit(fastmath={"contract"})
def _scaled(to, by_rank, scale):
    """``to`` times ``scale``, and the same transposed."""
    for i in range(len(to)):
        for k in range(to.shape[1]):
            to[i, k] *= scale
            by_rank[k, i] = to[i, k]


@compiled
def _change(x_at, y_at, A_lies, B_lies, rows, rank, in_, out, scale, table_at, count, like, factor):
    xs, ys = numba.carray(at(x_at, like), (rows, in_)), numba.carray(at(y_at, like), (rows, out))
    table = numba.carray(at(table_at, _PLACE), (count if table_at else 0, 3))
    A, B = np.empty((rank, in_), np.float32), np.empty((rank, out), np.float32)
    x, y, h = (
        np.empty((BLOCK, in_), np.float32),
        np.empty((BLOCK, out), np.float32),
        np.empty((BLOCK, rank), np.float32),
    )
    strength, done = np.float32(scale), 0
    lone = A_lies[2:] == (in_, 1) and B_lies[2:] == (1, rank)
    for g in range(count):
        e, start, end = _segment(table, g, rows)
        if (
            lone and end - start == 1
        ):  # a token of a mixture: each number is read once, where it lies
            _widened(x[:1], xs[start:end])
            dots_one(
                h[0],
                x[0],
                numba.carray(at(A_lies[0] + e * A_lies[1] * factor.itemsize, factor), (rank, in_)),
            )
            h[:1] *= strength
            dots_one(
                y[0],
                h[0],
                numba.carray(at(B_lies[0] + e * B_lies[1] * factor.itemsize, factor), (out, rank)),
            )
            _narrowed(ys[start:end], y[:1])
            done = end
            continue
        _take(A, A_lies, e, factor)
        _take(B, B_lies, e, factor)
        for first in range(start, end, BLOCK):
            n = min(BLOCK, end - first)
            _widened(x[:n], xs[first : first + n])
            dots(h, x, A, 0, n)
            h[:n] *= strength
            y[:n] = np.float32(0)
            add(y, h, B, 0, n, 0, rank)
            _narrowed(ys[first : first + n], y[:n])
        done = end
    y[0] = np.float32(0)
    for s in range(done, rows):
        _narrowed(ys[s : s + 1], y[:1])


@compiled
def _gradients(
    x_at, picks_at, dy_at, dx_at, A_lies, B_lies, dA_lies, dB_lies, among, rows, rank, in_, out, scale, table_at, count,
    like, factor,
):  # fmt: skip
    xs, dys = numba.carray(at(x_at, like), (among, in_)), numba.carray(at(dy_at, like), (rows, out))
    picks = numba.carray(at(picks_at, _PLACE), (rows if picks_at else 0,))
    dxs = numba.carray(at(dx_at, like), (rows if dx_at else 0, in_))
    table = numba.carray(at(table_at, _PLACE), (count if table_at else 0, 3))
    A, dA, B, dB = (
        np.empty((rank, in_), np.float32), np.empty((rank, in_), np.float32),
        np.empty((rank, out), np.float32), np.empty((rank, out), np.float32),
    )  # fmt: skip
    x, dy, dx = (
        np.empty((BLOCK, in_), np.float32),
        np.empty((BLOCK, out), np.float32),
        np.empty((BLOCK, in_), np.float32),
    )
    h, u = np.empty((BLOCK, rank), np.float32), np.empty((BLOCK, rank), np.float32)
    hs, us = np.empty((rank, BLOCK), np.float32), np.empty((rank, BLOCK), np.float32)
    strength = np.float32(scale)
    for g in range(count):
        e, start, end = _segment(table, g, rows)
        _take(A, A_lies, e, factor)
        _take(B, B_lies, e, factor)
        dA[:] = np.float32(0)
        dB[:] = np.float32(0)
        for first in range(start, end, BLOCK):
            n = min(BLOCK, end - first)
            if picks_at:
                for i in range(n):
                    row = picks[first + i]
                    row += among if row < 0 else 0
                    _widened(x[i : i + 1], xs[row : row + 1])
            else:
                _widened(x[:n], xs[first : first + n])
            _widened(dy[:n], dys[first : first + n])
            dots(h, x, A, 0, n)
            dots(u, dy, B, 0, n)
            _scaled(h[:n], hs, strength)
            _scaled(u[:n], us, strength)
            add(dA, us, x, 0, rank, 0, n)
            add(dB, hs, dy, 0, rank, 0, n)
            if dx_at:
                dx[:n] = np.float32(0)
                add(dx, u, A, 0, n, 0, rank)
                _narrowed(dxs[first : first + n], dx[:n])
        _put(dA_lies, e, dA, factor)
        _put(dB_lies, e, dB, factor)
