"""Round W + ΔW to nearest in one loop, compiled by numba, that reads and writes memory once.

    Δ = Σₖ (scale · B)[row, k] · A[k, column]
    v = W + Δ        W' = bf16(either end of the interval around v)

The arithmetic and its proof are those of ``kernels.rounding``. Doubtful values of a block (those
whose interval contains a rounding boundary) are computed in float64 directly after the block.

The compiler may contract a product and a sum into one operation: this rounds once, and the bound
allows for two roundings. It must not reorder sums, because it would cancel v against the ends of
its interval. Only the sums of the report may be reordered (``_plus``), so that they are vectorised.
Integers are 32-bit words in LLVM's terms, because numba widens each integer sum to 64 bits, which
halves the width of the vectors.

Rows are processed in memory order, in blocks of ``WIDE`` columns; A stays in the second-level
cache. Rejected: C, which must be built for every system; torch.compile, which needs a C++ compiler
at run time.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

#: the bits of a bfloat16 NaN
NAN = np.uint16(0x7FC0)
WORD = ir.IntType(32)
#: columns of a block: beginning and ending a block costs as much as a hundred numbers
WIDE = 4096
#: how many words of marks are tested together, and the marks in them
LOOK = 4
LINE = 4 * LOOK
#: how many products are added at once; ranks are padded with zeros to a multiple of it
PRODUCTS = 8
#: 4 · 2⁻²⁴, as in ``rounding``
FARTHER = np.float32(2.0**-22)


def _compile(loop: Any) -> Any:
    """``loop``, compiled once for each machine and signature; it runs without the GIL."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # numba has no folder for its cache
        return numba.njit(**options)(loop)


def _raise_half(builder: Any, value: Any) -> Any:
    """The bits of a float32 plus the rounding increment, so that their upper half is the nearest
    bfloat16, ties to even."""
    bits = builder.bitcast(value, WORD)
    odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
    return builder.add(builder.add(bits, WORD(0x7FFF)), odd)


@intrinsic
def _as_float(context: Any, bits: Any):
    """Reinterpret 32 bits as a float32."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _as_bits(context: Any, value: Any):
    """Reinterpret a float32 as 32 bits."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], WORD)


@intrinsic
def _plus(context: Any, first: Any, second: Any):
    """A float32 sum that the compiler may reorder."""

    def code(_, builder: Any, __, args: Any):
        return builder.fadd(*args, flags=("reassoc", "contract"))

    return types.float32(types.float32, types.float32), code


@intrinsic
def _wide(context: Any, stored: Any):
    """A stored number (float32, or the bits of a bfloat16) as float32."""

    def code(_, builder: Any, __, args: Any):
        if stored == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], WORD), WORD(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(stored), code


@intrinsic
def _raise_float(context: Any, value: Any):
    """The bits of a float32 plus the rounding increment, so that their upper half is the nearest
    bfloat16, ties to even."""
    return types.uint32(types.float32), lambda _, builder, __, args: _raise_half(builder, args[0])


@intrinsic
def _differs(context: Any, first: Any, second: Any):
    """Bitwise exclusive or."""
    return types.uint32(types.uint32, types.uint32), lambda _, builder, __, args: builder.xor(*args)


@intrinsic
def _or(context: Any, first: Any, second: Any):
    """Bitwise or."""
    return first(first, first), lambda _, builder, __, args: builder.or_(*args)


@intrinsic
def _upper(context: Any, bits: Any):
    """The upper half of 32 bits."""

    def code(_, builder: Any, __, args: Any):
        return builder.trunc(builder.lshr(args[0], WORD(16)), ir.IntType(16))

    return types.uint16(types.uint32), code


@intrinsic
def _upper_as_float(context: Any, bits: Any):
    """The float32 whose upper 16 bits are those of ``bits``, with zeros below."""

    def code(_, builder: Any, __, args: Any):
        return builder.bitcast(builder.and_(args[0], WORD(0xFFFF0000)), ir.FloatType())

    return types.float32(types.uint32), code


@numba.njit(fastmath={"contract"})
def _change(into, B, A, row, first, count):
    """``into[:count]`` = Σₖ B[row, k] · A[k, first : first + count] over all k but the last
    ``PRODUCTS``. If there are no others, ``into`` stays zero, its initial value."""
    if B.shape[1] == PRODUCTS:
        return
    last = first + count
    for j in range(count):
        into[j] = np.float32(0)
    for k in range(0, B.shape[1] - PRODUCTS, PRODUCTS):
        b0, b1, b2, b3 = B[row, k], B[row, k + 1], B[row, k + 2], B[row, k + 3]
        b4, b5, b6, b7 = B[row, k + 4], B[row, k + 5], B[row, k + 6], B[row, k + 7]
        a0, a1, a2, a3 = (
            A[k, first:last],
            A[k + 1, first:last],
            A[k + 2, first:last],
            A[k + 3, first:last],
        )
        a4, a5, a6, a7 = (
            A[k + 4, first:last],
            A[k + 5, first:last],
            A[k + 6, first:last],
            A[k + 7, first:last],
        )
        for j in range(count):
            into[j] = (
                into[j]
                + b0 * a0[j]
                + b1 * a1[j]
                + b2 * a2[j]
                + b3 * a3[j]
                + b4 * a4[j]
                + b5 * a5[j]
                + b6 * a6[j]
                + b7 * a7[j]
            )


@numba.njit(fastmath={"contract"})
def _round(old, change, B, A, row, first, bound, new, marks, sums):
    """Fill ``new``, and ``marks`` with a non-zero value where it is doubtful; return whether any
    is. ``change`` holds all products but the last; ``sums`` gets ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and
    ⟨W, W⟩."""
    k, last = B.shape[1] - PRODUCTS, first + len(old)
    b0, b1, b2, b3 = B[row, k], B[row, k + 1], B[row, k + 2], B[row, k + 3]
    b4, b5, b6, b7 = B[row, k + 4], B[row, k + 5], B[row, k + 6], B[row, k + 7]
    a0, a1, a2, a3 = (
        A[k, first:last],
        A[k + 1, first:last],
        A[k + 2, first:last],
        A[k + 3, first:last],
    )
    a4, a5, a6, a7 = (
        A[k + 4, first:last],
        A[k + 5, first:last],
        A[k + 6, first:last],
        A[k + 7, first:last],
    )
    doubt = np.uint32(0)
    retained = step_energy = weight_energy = np.float32(0)
    for j in range(len(old)):
        W = _wide(old[j])
        delta = (  # begin with zero, not with the first product, which may be -0
            change[j]
            + b0 * a0[j]
            + b1 * a1[j]
            + b2 * a2[j]
            + b3 * a3[j]
            + b4 * a4[j]
            + b5 * a5[j]
            + b6 * a6[j]
            + b7 * a7[j]
        )
        v = W + delta
        error = np.float32(abs(v) * FARTHER + bound)
        upper, lower = _raise_float(v + error), _raise_float(v - error)
        differs = _differs(upper, lower)
        doubt = _or(doubt, differs)
        new[j], marks[j] = _upper(upper), _upper(differs)
        step = _upper_as_float(upper) - W
        retained, step_energy, weight_energy = (
            _plus(retained, delta * step),
            _plus(step_energy, step * step),
            _plus(weight_energy, W * W),
        )
    sums[0] += retained
    sums[1] += step_energy
    sums[2] += weight_energy
    # a NaN, for which the marks are meaningless
    if retained != retained or step_energy != step_energy:
        marks[: len(old)] = NAN
        return True
    return _upper(doubt) != 0


@numba.njit
def _nearest(value):
    """The bits of the bfloat16 nearest to a float64, ties to even, through a float32 that is
    rounded to odd, so that rounding twice equals rounding once (Boldo & Melquiond 2008, "Emulation
    of FMA and correctly rounded sums")."""
    if value != value:
        return NAN
    nearest = np.float32(value)
    bits = _as_bits(nearest)
    if np.float64(nearest) != value:
        if abs(np.float64(nearest)) > abs(value):
            bits = np.uint32(bits - np.uint32(1))
        bits = np.uint32(bits | np.uint32(1))
    return _upper(_raise_float(_as_float(bits)))


@numba.njit
def _recompute_marked(old, words, B, A, scale, row, first, new, sums):
    """Compute the marked values in float64; return their number. Marks are rare, so four of them
    are tested as one of the ``words``, and ``LOOK`` words together."""
    count = 0
    for begin in range(0, len(words), LOOK):
        marked_words = np.uint64(0)
        for word in range(begin, begin + LOOK):
            marked_words |= words[word]
        if marked_words:
            for word in range(begin, begin + LOOK):
                marked, j = words[word], 4 * word
                while marked:
                    if marked & np.uint64(0xFFFF):
                        _exact(old, B, A, scale, row, first, j, new, sums)
                        count += 1
                    marked, j = marked >> np.uint64(16), j + 1
    return count


@numba.njit
def _exact(old, B, A, scale, row, first, j, new, sums):
    change = 0.0
    for k in range(B.shape[1]):
        change += B[row, k] * A[first + j, k]
    change *= scale
    before, new[j] = _wide(new[j]), _nearest(np.float64(_wide(old[j])) + change)
    sums[0] += change * (np.float64(_wide(new[j])) - np.float64(before))


@_compile
def _slab(
    old, old_group, old_row, new, new_group, new_row, B, A, bound, wide_B, wide_A, scale, sums
):
    """Round some rows of some groups. ``old`` and ``new`` are memory from the first number to the
    last, with the strides of groups and rows; the wide factors are float64, B without its scale.
    Returns the number of doubtful values."""
    groups, rows, _ = B.shape
    columns = A.shape[2]
    change, marks = np.zeros(WIDE, np.float32), np.zeros(WIDE, np.uint16)
    words, doubtful = marks.view(np.uint64), 0
    for group in range(groups):
        for row in range(rows):
            for first in range(0, columns, WIDE):
                count = min(WIDE, columns - first)
                _change(change, B[group], A[group], row, first, count)
                start = group * old_group + row * old_row + first
                new_start = group * new_group + row * new_row + first
                old_block, new_block, error = (
                    old[start : start + count],
                    new[new_start : new_start + count],
                    bound[group, row],
                )
                if _round(
                    old_block, change, B[group], A[group], row, first, error, new_block, marks, sums
                ):
                    lines = -(-count // LINE)
                    marks[count : LINE * lines] = 0
                    marked = words[: LOOK * lines]
                    doubtful += _recompute_marked(
                        old_block,
                        marked,
                        wide_B[group],
                        wide_A[group],
                        scale,
                        row,
                        first,
                        new_block,
                        sums,
                    )
    return doubtful


def supports(old: Tensor, new: Tensor) -> bool:
    """Whether the loop supports weights of these dtypes and memory layouts."""
    dense = all(weight.stride(2) == 1 or weight.shape[2] == 1 for weight in (old, new))
    return dense and new.dtype == torch.bfloat16 and old.dtype in (torch.bfloat16, torch.float32)


def pad_rank(factor: Tensor, axis: int) -> Tensor:
    """A or B in float32, with the rank padded for the loop."""
    shape = list(factor.shape)
    shape[axis] = -shape[axis] % PRODUCTS
    return torch.cat([factor, factor.new_zeros(shape)], axis).contiguous()


def round_slab(
    old: Tensor,
    B: Tensor,
    A: Tensor,
    bound: Tensor,
    wide_B: Tensor,
    wide_A: Tensor,
    scale: float,
    new: Tensor,
) -> Tensor:
    """Round a slab into ``new``; return the sums [3] in float64.

    Args:
        B, A: float32 and ``padded``; B multiplied by its scale.
        wide_B, wide_A: the original factors in float64, A transposed to [g, in, r] because a
            doubtful value reads a column.
    """
    sums, factors = (
        np.zeros(3),
        [factor.contiguous().numpy() for factor in (B, A, bound[:, :, 0], wide_B, wide_A)],
    )
    _slab(*_memory(old), *_memory(new), *factors, float(scale), sums)
    return torch.from_numpy(sums)


def _memory(matrix: Tensor) -> tuple[Any, int, int]:
    """The memory of [g, rows, columns] from the first number to the last, and the strides of groups
    and rows."""
    (groups, rows, columns), (group, row, _) = matrix.shape, matrix.stride()
    flat = matrix.as_strided(((groups - 1) * group + (rows - 1) * row + columns,), (1,))
    return (flat if matrix.dtype == torch.float32 else flat.view(torch.uint16)).numpy(), group, row
