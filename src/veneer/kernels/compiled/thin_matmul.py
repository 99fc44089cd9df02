"""The thin products of a training step over a frozen layer, float32 on a processor, by
``thin_blocks``.

    forward     h = A x        part = hᵀ B + bias, onto which x Wᵀ comes   A: [R, in]   x: [T, in]   h: [R, T]
    backward    u = B dyᵀ      dB = h dy       in one pass over dy         B: [r, out]   dy: [T, out]
                part = uᵀ A    dA = u x        in one pass over x

h and u lie as [T, R], so that a token's numbers are beside each other. With dropout a loop copies a
few rows of x at a time, within the processor's nearest cache, and puts zeros where they are drawn.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled.numba_ops import at, compiled
from veneer.kernels.compiled.thin_blocks import BLOCK, add, dots
from veneer.kernels.dropout import ROWS, Dropped

_STORED, _PLACE = np.empty(0, np.float32), np.empty(0, np.int64)

assert ROWS == BLOCK  # a group of rows is what a loop takes at a time


def down(A: Tensor, x: Tensor, dropped: Dropped | None = None) -> Tensor:
    """A [R, n] times xᵀ, with x [T, n] without what is dropped: h [R, T]."""
    A, h = A.contiguous(), x.new_empty(x.shape[0], A.shape[0])
    _down(h.data_ptr(), x.data_ptr(), A.data_ptr(), *x.shape, A.shape[0], *_drawn(dropped))
    return h.mT


def up(h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """hᵀ B + bias [T, n] of h [r, T], B [r, n] and bias [n]."""
    bias = h.new_zeros(B.shape[1]) if bias is None else bias.contiguous()
    B, y = B.contiguous(), h.new_empty(h.shape[1], B.shape[1])
    _up(y.data_ptr(), h.data_ptr(), _step(h), B.data_ptr(), bias.data_ptr(), *y.shape, len(B))
    return y


def down_grown(B: Tensor, dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(u = B dyᵀ [r, T], h dy [r, n]) of B [r, n], dy [T, n] and h [r, T], in one pass over dy."""
    B, u = B.contiguous(), dy.new_empty(dy.shape[0], B.shape[0])
    dB = torch.empty_like(B)
    _down_grown(
        u.data_ptr(),
        dB.data_ptr(),
        dy.data_ptr(),
        B.data_ptr(),
        h.data_ptr(),
        _step(h),
        *dy.shape,
        len(B),
    )
    return u.mT, dB


def up_grown(
    u: Tensor, A: Tensor, x: Tensor, dropped: Dropped | None = None
) -> tuple[Tensor, Tensor]:
    """(uᵀ A [T, n], u x [R, n]) of u [R, T], A [R, n] and x [T, n], both without what is dropped,
    in one pass."""
    A = A.contiguous()
    part, dA = torch.empty_like(x), torch.empty_like(A)
    at_, sizes = (one.data_ptr() for one in (part, dA, u, A, x)), (_step(u), *x.shape, len(A))
    _up_grown(*at_, *sizes, *_drawn(dropped))
    return part, dA


def _drawn(dropped: Dropped | None) -> tuple[int, int, int]:
    """For the loops: where its places and ends lie, and how many groups there are."""
    if dropped is None:
        return 0, 0, 0
    return dropped.places.data_ptr(), dropped.ends.data_ptr(), len(dropped.ends)


def _step(h: Tensor) -> int:
    """Numbers from token to token. Of one token torch may say anything."""
    return max(h.stride(1), h.shape[0])


def able(x: Tensor | None, h: Tensor | None) -> bool:
    """Whether the loops are for x [T, n] and h [r, T]: float32, on a processor, each token's
    numbers together."""
    whole = x is None or (x.dtype is torch.float32 and x.is_cpu and x.is_contiguous())
    return whole and (h is None or (h.dtype is torch.float32 and h.is_cpu and h.stride(0) == 1))


@numba.njit
def _matrix(place, rows, columns):
    return numba.carray(at(place, _STORED), (rows, columns))


@numba.njit
def _copy(to, row):
    for j in range(len(to)):  # an assignment of slices takes as long as the products
        to[j] = row[j]


@numba.njit
def _drawings(places_at, ends_at, groups):
    ends = numba.carray(at(ends_at, _PLACE), (groups,))
    return numba.carray(at(places_at, _PLACE), (ends[-1] if groups else 0,)), ends


@numba.njit
def _clear(rows, drawn, group):
    """Zeros in what is drawn of the group of these rows."""
    flat, (places, ends) = rows.reshape(-1), drawn
    for i in range(ends[group - 1] if group else 0, ends[group]):
        if places[i] < len(flat):
            flat[places[i]] = np.float32(0)


@numba.njit
def _cleared(own, rows, drawn, group):
    """These rows, or a copy of them in ``own`` without what is drawn of them."""
    if not len(drawn[1]):
        return rows
    copy = own[: len(rows)]
    for i in range(len(rows)):
        _copy(copy[i], rows[i])
    _clear(copy, drawn, group)
    return copy


@compiled
def _down(h_at, x_at, A_at, tokens, count, rank, places_at, ends_at, groups):
    h, x, A = _matrix(h_at, tokens, rank), _matrix(x_at, tokens, count), _matrix(A_at, rank, count)
    drawn, own = (
        _drawings(places_at, ends_at, groups),
        np.empty((BLOCK if groups else 0, count), np.float32),
    )
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        dots(h[first:last], _cleared(own, x[first:last], drawn, first // BLOCK), A, 0, last - first)


@compiled
def _up(y_at, h_at, step, B_at, bias_at, tokens, count, rank):
    y, h, B = _matrix(y_at, tokens, count), _matrix(h_at, tokens, step), _matrix(B_at, rank, count)
    bias = _matrix(bias_at, 1, count)[0]
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        for i in range(first, last):
            _copy(y[i], bias)
        add(y, h, B, first, last, 0, rank)


@compiled
def _down_grown(u_at, dB_at, dy_at, B_at, h_at, step, tokens, count, rank):
    u, dB, dy = (
        _matrix(u_at, tokens, rank),
        _matrix(dB_at, rank, count),
        _matrix(dy_at, tokens, count),
    )
    B, h = _matrix(B_at, rank, count), _matrix(h_at, tokens, step).T
    dB[:] = np.float32(0)
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        dots(u, dy, B, first, last)
        add(dB, h, dy, 0, rank, first, last)


@compiled
def _up_grown(
    part_at, dA_at, u_at, A_at, x_at, step, tokens, count, rank, places_at, ends_at, groups
):
    part, dA, x = (
        _matrix(part_at, tokens, count),
        _matrix(dA_at, rank, count),
        _matrix(x_at, tokens, count),
    )
    A, u = _matrix(A_at, rank, count), _matrix(u_at, tokens, step)
    by_rank = u.T
    drawn, own = (
        _drawings(places_at, ends_at, groups),
        np.empty((BLOCK if groups else 0, count), np.float32),
    )
    dA[:] = np.float32(0)
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        part[first:last] = np.float32(0)
        add(part, u, A, first, last, 0, rank)
        if groups:
            _clear(part[first:last], drawn, first // BLOCK)
        read = _cleared(own, x[first:last], drawn, first // BLOCK)
        add(dA, by_rank[:, first:last], read, 0, rank, 0, last - first)
