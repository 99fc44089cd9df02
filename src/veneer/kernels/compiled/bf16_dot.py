"""``mixed_rows`` for bfloat16 throughout, by the processor's own products of pairs of bfloat16
numbers (AVX512-BF16).

One instruction multiplies 32 pairs of numbers and adds them to 16 sums in float32. So A meets x as
both lie; B meets h two rows at a time, h rounded to bfloat16 as any 16-bit product takes it; and y
is rounded once, by an instruction of its own. That is a quarter of the instructions of widening
every number first.

    down    h[t, k] = x_t · a_k                          four tokens by four rows, 32 columns at a time
    up      y[t, j] = Σₚ h[t, p] b_p[j] + h[t, p'] b_p'[j]      four tokens by 64 columns, over all pairs of rows

numba has no vectors, so these two are written in LLVM's language, by llvmlite.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from veneer.kernels.compiled.numba_ops import at, compiled, narrow, wide
from veneer.kernels.compiled.switch import on
from veneer.kernels.compiled.thin_blocks import BLOCK, take

#: columns that one instruction takes of A and x, and makes of y
PAIRED, MADE = 32, 16
_LIKE = np.empty(0, np.uint16)


def able() -> bool:
    """Whether these products are turned on, and this processor and LLVM have them."""
    return on("bf16_dot") and _supported()


@functools.cache
def _supported() -> bool:
    features = binding.get_host_cpu_features()
    there = features.get("avx512bf16") and features.get("avx512f")
    return bool(there) and binding.llvm_version_info >= (16,)  # which takes operands as bfloat16


class _BFloat(ir.Type):
    """What llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I64, _I32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_SUMS, _PAIRS, _STORED = (
    ir.VectorType(_F32, 16),
    ir.VectorType(_I32, 16),
    ir.VectorType(ir.IntType(16), 16),
)
_OPERAND, _ROUNDED = ir.VectorType(_BFloat(), 32), ir.VectorType(_BFloat(), 16)
_NONE = ir.Constant(_SUMS, [0.0] * 16)


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **how: Any) -> Any:
    kind = ir.FunctionType(result, [one.type for one in arguments])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, name), arguments, **how
    )


def _dot(builder: Any, sums: Any, one: Any, other: Any) -> Any:
    operands = [builder.bitcast(pairs, _OPERAND) for pairs in (one, other)]
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, [sums, *operands])


def _load(builder: Any, place: Any, kind: Any) -> Any:
    found = builder.load(builder.inttoptr(place, kind.as_pointer()))
    found.align = 2
    return found


def _store(builder: Any, value: Any, place: Any) -> None:
    builder.store(value, builder.inttoptr(place, value.type.as_pointer())).align = 2


def _sums(builder: Any, count: int) -> list[Any]:
    """Vectors of sums, which LLVM keeps in registers."""
    found = [cgutils.alloca_once(builder, _SUMS) for _ in range(count)]
    for one in found:
        builder.store(_NONE, one)
    return found


def _down(tokens: int, rows: int) -> Any:
    """Into h [tokens, rows] of float32, whose tokens are ``step`` bytes apart, the sums over 32 ·
    ``count`` columns. Of four addresses of tokens the first ``tokens`` count; A's rows are
    ``next_row`` bytes apart."""

    def code(context: Any, builder: Any, _: Any, args: Any) -> Any:
        xs, (A, next_row, count, h, step) = args[:BLOCK], args[BLOCK:]
        sums = _sums(builder, tokens * rows)
        with cgutils.for_range(builder, count) as loop:
            along = builder.mul(loop.index, _I64(2 * PAIRED))
            of_x = [_load(builder, builder.add(x, along), _PAIRS) for x in xs[:tokens]]
            row_at = [builder.add(A, builder.mul(next_row, _I64(k))) for k in range(rows)]
            of_A = [_load(builder, builder.add(row, along), _PAIRS) for row in row_at]
            for number, one in enumerate(sums):
                found = _dot(builder, builder.load(one), of_x[number // rows], of_A[number % rows])
                builder.store(found, one)
        for number, one in enumerate(sums):
            whole = [ir.Constant(_F32, -0.0), builder.load(one)]
            found = _call(
                builder, "llvm.vector.reduce.fadd.v16f32", _F32, whole, fastmath=("reassoc",)
            )
            token = builder.add(h, builder.mul(step, _I64(number // rows)))
            _store(builder, found, builder.add(token, _I64(4 * (number % rows))))
        return context.get_dummy_value()

    @intrinsic
    def tile(
        context: Any,
        x0: Any,
        x1: Any,
        x2: Any,
        x3: Any,
        A: Any,
        next_row: Any,
        count: Any,
        h: Any,
        step: Any,
    ):
        return types.void(*[types.int64] * 9), code

    return tile


def _up(tokens: int, vectors: int) -> Any:
    """Into 16 · ``vectors`` columns of y from ``column`` on, of the first ``tokens`` of four, the
    sums over ``count`` pairs: ``rows`` are the addresses of two rows of B for each, ``h`` two
    bfloat16 numbers for each of four tokens."""

    def code(context: Any, builder: Any, _: Any, args: Any) -> Any:
        ys, (rows, h, count, column) = args[:BLOCK], args[BLOCK:]
        sums, along = _sums(builder, tokens * vectors), builder.mul(column, _I64(2))
        with cgutils.for_range(builder, count) as loop:
            of_pair = builder.mul(loop.index, _I64(16))
            one, other = (
                _load(builder, builder.add(builder.add(rows, of_pair), _I64(8 * side)), _I64)
                for side in (0, 1)
            )
            strengths = []
            for t in range(tokens):
                word = _load(builder, builder.add(builder.add(h, of_pair), _I64(4 * t)), _I32)
                lone = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), word, _I32(0))
                strengths.append(builder.shuffle_vector(lone, lone, ir.Constant(_PAIRS, [0] * 16)))
            for part in range(vectors):
                ahead = builder.add(along, _I64(2 * MADE * part))
                low, high = (
                    builder.zext(_load(builder, builder.add(row, ahead), _STORED), _PAIRS)
                    for row in (one, other)
                )
                pairs = builder.or_(low, builder.shl(high, ir.Constant(_PAIRS, [16] * 16)))
                for t in range(tokens):
                    place = sums[t * vectors + part]
                    builder.store(_dot(builder, builder.load(place), strengths[t], pairs), place)
        for number, one in enumerate(sums):
            found = _call(
                builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _ROUNDED, [builder.load(one)]
            )
            place = builder.add(
                builder.add(ys[number // vectors], along), _I64(2 * MADE * (number % vectors))
            )
            _store(builder, builder.bitcast(found, _STORED), place)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        context: Any, y0: Any, y1: Any, y2: Any, y3: Any, rows: Any, h: Any, count: Any, column: Any
    ):
        return types.void(*[types.int64] * 8), code

    return tile


_DOWN_4x4, _DOWN_4x1, _DOWN_1x4, _DOWN_1x1 = _down(4, 4), _down(4, 1), _down(1, 4), _down(1, 1)
_UP_4x4, _UP_4x1, _UP_1x4, _UP_1x1 = _up(4, 4), _up(4, 1), _up(1, 4), _up(1, 1)


@numba.njit
def _numbers(place, count):
    return numba.carray(at(place, _LIKE), (count,))


@numba.njit(fastmath={"contract"})
def _narrowed(h, x, count, A_at, rank, in_, weight):
    """h [count, rank] of tokens at x and all rows of A, times ``weight``."""
    h_at, step, row, whole = h.ctypes.data, h.strides[0], 2 * in_, in_ // PAIRED
    k = 0
    while k < rank:
        rows = BLOCK if k + BLOCK <= rank else 1
        A, into = A_at + k * row, h_at + 4 * k
        if count == BLOCK and rows == BLOCK:
            _DOWN_4x4(x[0], x[1], x[2], x[3], A, row, whole, into, step)
        elif count == BLOCK:
            _DOWN_4x1(x[0], x[1], x[2], x[3], A, row, whole, into, step)
        elif rows == BLOCK:
            _DOWN_1x4(x[0], x[0], x[0], x[0], A, row, whole, into, step)
        else:
            _DOWN_1x1(x[0], x[0], x[0], x[0], A, row, whole, into, step)
        k += rows
    for i in range(count):
        for k in range(rank):
            a, own, s = _numbers(A_at + k * row, in_), _numbers(x[i], in_), h[i, k]
            for j in range(whole * PAIRED, in_):
                s += wide(own[j]) * wide(a[j])
            h[i, k] = s * weight


@numba.njit(fastmath={"contract"})
def _widened(y, count, rows, h, pairs, out):
    """y of tokens at these addresses, from all pairs."""
    rows_at, h_at, column = rows.ctypes.data, h.ctypes.data, 0
    while column + MADE <= out:
        many = column + BLOCK * MADE <= out
        if count == BLOCK and many:
            _UP_4x4(y[0], y[1], y[2], y[3], rows_at, h_at, pairs, column)
        elif count == BLOCK:
            _UP_4x1(y[0], y[1], y[2], y[3], rows_at, h_at, pairs, column)
        elif many:
            _UP_1x4(y[0], y[0], y[0], y[0], rows_at, h_at, pairs, column)
        else:
            _UP_1x1(y[0], y[0], y[0], y[0], rows_at, h_at, pairs, column)
        column += BLOCK * MADE if many else MADE
    for i in range(count):
        own = _numbers(y[i], out)
        for j in range(column, out):
            s = np.float32(0)
            for p in range(pairs):
                one, other = _numbers(rows[p, 0], out), _numbers(rows[p, 1], out)
                s += wide(h[p, i, 0]) * wide(one[j]) + wide(h[p, i, 1]) * wide(other[j])
            own[j] = narrow(s, own[j])


@compiled
def change(x_at, y_at, tokens, in_, out, order, groups, weights, table):
    rank = pairs = 0
    for g in range(len(groups)):
        ranks = table[groups[g, 2] : groups[g, 3], 2]
        rank, pairs = (
            max(rank, ranks.max() if len(ranks) else 0),
            max(pairs, ((ranks + 1) // 2).sum()),
        )
    h, halves = np.empty((BLOCK, rank), np.float32), np.zeros((pairs, BLOCK, 2), np.uint16)
    rows, zeros = np.empty((pairs, 2), np.int64), np.zeros(out, np.uint16)
    own, x, y = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for g in range(len(groups)):
        first, after, p = groups[g, 2], groups[g, 3], 0
        for e in range(first, after):
            for k in range(0, table[e, 2], 2):
                rows[p, 0] = table[e, 1] + 2 * k * out
                rows[p, 1] = rows[p, 0] + 2 * out if k + 1 < table[e, 2] else zeros.ctypes.data
                p += 1
        place, token, left = groups[g, 0], 0, (groups[g, 1] - groups[g, 0]) * tokens
        while left:
            count = BLOCK if left >= BLOCK else 1
            left -= count
            place, token = take(own, count, order, place, token, tokens)
            for i in range(count):
                x[i], y[i] = x_at + 2 * own[i] * in_, y_at + 2 * own[i] * out
            p = 0
            for e in range(first, after):
                rank = table[e, 2]
                _narrowed(h, x, count, table[e, 0], rank, in_, weights[e])
                for k in range(0, rank, 2):
                    for i in range(count):
                        halves[p, i, 0] = narrow(h[i, k], halves[p, i, 0])
                        halves[p, i, 1] = (
                            narrow(h[i, k + 1], halves[p, i, 1]) if k + 1 < rank else np.uint16(0)
                        )
                    p += 1
            _widened(y, count, rows, halves, p, out)
