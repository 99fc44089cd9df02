"""The two thin products of a low-rank change in compiled loops, four by four: a number that is read
meets four others.

    dots    H[i, k] = x_i · a_k            x: [T, n]   A: [r, n]    H: [T, r]
    add     Y[i] += Σₖ H[i, k] · b_k       H: [T, r]   B: [r, n]    Y: [T, n]

The gradients are the same two: of B, ``add`` of tokens onto ranks, with H transposed. Sums are
float32 and of free order; A and B may be bfloat16 (``compiled.wide``).
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import numba
import numpy as np

from veneer.kernels.compiled.numba_ops import plus, wide

BLOCK = 4


@numba.njit(fastmath={"contract"})
def _dots_4x4(h, x, A, k, count):
    """Four tokens' products with four rows of A."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = np.float32(0)
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    a0, a1, a2, a3 = A[k], A[k + 1], A[k + 2], A[k + 3]
    for j in range(count):
        v0, v1, v2, v3 = x0[j], x1[j], x2[j], x3[j]
        w0, w1, w2, w3 = wide(a0[j]), wide(a1[j]), wide(a2[j]), wide(a3[j])
        s00, s01, s02, s03 = (
            plus(s00, v0 * w0),
            plus(s01, v0 * w1),
            plus(s02, v0 * w2),
            plus(s03, v0 * w3),
        )
        s10, s11, s12, s13 = (
            plus(s10, v1 * w0),
            plus(s11, v1 * w1),
            plus(s12, v1 * w2),
            plus(s13, v1 * w3),
        )
        s20, s21, s22, s23 = (
            plus(s20, v2 * w0),
            plus(s21, v2 * w1),
            plus(s22, v2 * w2),
            plus(s23, v2 * w3),
        )
        s30, s31, s32, s33 = (
            plus(s30, v3 * w0),
            plus(s31, v3 * w1),
            plus(s32, v3 * w2),
            plus(s33, v3 * w3),
        )
    h[0, k], h[0, k + 1], h[0, k + 2], h[0, k + 3] = s00, s01, s02, s03
    h[1, k], h[1, k + 1], h[1, k + 2], h[1, k + 3] = s10, s11, s12, s13
    h[2, k], h[2, k + 1], h[2, k + 2], h[2, k + 3] = s20, s21, s22, s23
    h[3, k], h[3, k + 1], h[3, k + 2], h[3, k + 3] = s30, s31, s32, s33


@numba.njit(fastmath={"contract"})
def _dots_4x1(h, x, A, k, count):
    s0 = s1 = s2 = s3 = np.float32(0)
    x0, x1, x2, x3, a = x[0], x[1], x[2], x[3], A[k]
    for j in range(count):
        w = wide(a[j])
        s0, s1, s2, s3 = (
            plus(s0, x0[j] * w),
            plus(s1, x1[j] * w),
            plus(s2, x2[j] * w),
            plus(s3, x3[j] * w),
        )
    h[0, k], h[1, k], h[2, k], h[3, k] = s0, s1, s2, s3


@numba.njit(fastmath={"contract"})
def _dots_1x4(h, x, A, k, count):
    s0 = s1 = s2 = s3 = np.float32(0)
    a0, a1, a2, a3 = A[k], A[k + 1], A[k + 2], A[k + 3]
    for j in range(count):
        v = x[j]
        s0, s1 = plus(s0, v * wide(a0[j])), plus(s1, v * wide(a1[j]))
        s2, s3 = plus(s2, v * wide(a2[j])), plus(s3, v * wide(a3[j]))
    h[k], h[k + 1], h[k + 2], h[k + 3] = s0, s1, s2, s3


@numba.njit(fastmath={"contract"})
def _dots_1x1(h, x, A, k, count):
    s, a = np.float32(0), A[k]
    for j in range(count):
        s = plus(s, x[j] * wide(a[j]))
    h[k] = s


@numba.njit(fastmath={"contract"})
def _add_4x4(y, h, B, k, count, weight):
    """Add four rows of B, times their h, to four tokens."""
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    b0, b1, b2, b3 = B[k], B[k + 1], B[k + 2], B[k + 3]
    h00, h01, h02, h03 = (
        weight * h[0, k],
        weight * h[0, k + 1],
        weight * h[0, k + 2],
        weight * h[0, k + 3],
    )
    h10, h11, h12, h13 = (
        weight * h[1, k],
        weight * h[1, k + 1],
        weight * h[1, k + 2],
        weight * h[1, k + 3],
    )
    h20, h21, h22, h23 = (
        weight * h[2, k],
        weight * h[2, k + 1],
        weight * h[2, k + 2],
        weight * h[2, k + 3],
    )
    h30, h31, h32, h33 = (
        weight * h[3, k],
        weight * h[3, k + 1],
        weight * h[3, k + 2],
        weight * h[3, k + 3],
    )
    for j in range(count):
        w0, w1, w2, w3 = wide(b0[j]), wide(b1[j]), wide(b2[j]), wide(b3[j])
        y0[j] = y0[j] + h00 * w0 + h01 * w1 + h02 * w2 + h03 * w3
        y1[j] = y1[j] + h10 * w0 + h11 * w1 + h12 * w2 + h13 * w3
        y2[j] = y2[j] + h20 * w0 + h21 * w1 + h22 * w2 + h23 * w3
        y3[j] = y3[j] + h30 * w0 + h31 * w1 + h32 * w2 + h33 * w3


@numba.njit(fastmath={"contract"})
def _add_4x1(y, h, B, k, count, weight):
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    b = B[k]
    h0, h1, h2, h3 = weight * h[0, k], weight * h[1, k], weight * h[2, k], weight * h[3, k]
    for j in range(count):
        w = wide(b[j])
        y0[j] += h0 * w
        y1[j] += h1 * w
        y2[j] += h2 * w
        y3[j] += h3 * w


@numba.njit(fastmath={"contract"})
def _add_1x4(y, h, B, k, count, weight):
    b0, b1, b2, b3 = B[k], B[k + 1], B[k + 2], B[k + 3]
    h0, h1, h2, h3 = weight * h[k], weight * h[k + 1], weight * h[k + 2], weight * h[k + 3]
    for j in range(count):
        y[j] = y[j] + h0 * wide(b0[j]) + h1 * wide(b1[j]) + h2 * wide(b2[j]) + h3 * wide(b3[j])


@numba.njit(fastmath={"contract"})
def _add_1x1(y, h, B, k, count, weight):
    b, h0 = B[k], weight * h[k]
    for j in range(count):
        y[j] += h0 * wide(b[j])


@numba.njit(fastmath={"contract"})
def dots_four(h, x, A):
    """Four tokens with all rows of A."""
    rank, count = A.shape
    whole = rank - rank % BLOCK
    for k in range(0, whole, BLOCK):
        _dots_4x4(h, x, A, k, count)
    for k in range(whole, rank):
        _dots_4x1(h, x, A, k, count)


@numba.njit(fastmath={"contract"})
def dots_one(h, x, A):
    rank, count = A.shape
    whole = rank - rank % BLOCK
    for k in range(0, whole, BLOCK):
        _dots_1x4(h, x, A, k, count)
    for k in range(whole, rank):
        _dots_1x1(h, x, A, k, count)


@numba.njit(fastmath={"contract"})
def add_four(y, h, B, start, end, weight):
    """Rows ``start`` up to ``end`` of B, times their h and ``weight``, onto four rows of y."""
    count, whole = B.shape[1], end - (end - start) % BLOCK
    for k in range(start, whole, BLOCK):
        _add_4x4(y, h, B, k, count, weight)
    for k in range(whole, end):
        _add_4x1(y, h, B, k, count, weight)


@numba.njit(fastmath={"contract"})
def add_one(y, h, B, start, end, weight):
    count, whole = B.shape[1], end - (end - start) % BLOCK
    for k in range(start, whole, BLOCK):
        _add_1x4(y, h, B, k, count, weight)
    for k in range(whole, end):
        _add_1x1(y, h, B, k, count, weight)


@numba.njit(fastmath={"contract"})
def dots(H, x, A, first, last):
    """H of tokens ``first`` up to ``last`` with all rows of A."""
    quick = last - (last - first) % BLOCK
    for i in range(first, quick, BLOCK):
        dots_four(H[i : i + BLOCK], x[i : i + BLOCK], A)
    for i in range(quick, last):
        dots_one(H[i], x[i], A)


@numba.njit(fastmath={"contract"})
def add(Y, H, B, top, bottom, start, end):
    """Rows ``start`` up to ``end`` of B, times their H, onto rows ``top`` up to ``bottom`` of Y."""
    weight, quick = np.float32(1), bottom - (bottom - top) % BLOCK
    for i in range(top, quick, BLOCK):
        add_four(Y[i : i + BLOCK], H[i : i + BLOCK], B, start, end, weight)
    for i in range(quick, bottom):
        add_one(Y[i], H[i], B, start, end, weight)


@numba.njit
def take(own, count, order, place, token, tokens):
    """The next ``count`` tokens of the rows in ``order``, each of so many ``tokens``, into ``own``;
    returns the place in ``order`` and the token in its row that come then."""
    for i in range(count):
        own[i] = order[place] * tokens + token
        token += 1
        if token == tokens:
            place, token = place + 1, 0
    return place, token
