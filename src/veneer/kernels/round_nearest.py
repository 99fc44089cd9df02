"""Round W + ΔW to nearest in one loop, compiled by numba, that reads and writes memory once.

    Δ = Σₖ (scale · B)[row, k] · A[k, column]
    v = W + Δ        W' = the bfloat16 nearest to either end of the interval around v

``kernels.rounding`` describes the arithmetic and proves it. If the two ends round to different
numbers, the element is doubtful. The doubtful elements of a block are computed in float64 directly
after the block.

The compiler may contract a product and a sum into one operation. This rounds once, and the bound of
the error allows for two roundings. The compiler must not reorder the sums of v and of the ends of
its interval, because it would cancel v. Only the sums for the report may be reordered, so that they
are vectorised (``_reorderable_sum``).

Rows are processed in memory order, in blocks of ``BLOCK_COLUMNS`` columns; A stays in the
second-level cache.
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

from veneer.kernels.numba_loops import (
    INT32,
    NAN_BITS,
    compile_loop,
    to_bfloat16_bits,
    to_float32,
    upper_half,
)

#: columns of a block. The work at its beginning and end takes as long as a hundred elements
BLOCK_COLUMNS = 4096
#: a mark has 16 bits, so a 64-bit word holds four. This many words are tested together
WORDS_TOGETHER = 4
#: the marks in these words
MARKS_TOGETHER = 4 * WORDS_TOGETHER
#: how many products are added at once; ranks are padded with zeros to a multiple of it
PRODUCTS_TOGETHER = 8
#: 4 · 2⁻²⁴: an end of the interval is |v| (1 ± this) ± the bound, as in ``rounding``
RELATIVE_ERROR = np.float32(2.0**-22)


@intrinsic
def _as_float(context: Any, bits: Any):
    """Reinterpret 32 bits as a float32."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _as_bits(context: Any, value: Any):
    """Reinterpret a float32 as 32 bits."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], INT32)


@intrinsic
def _reorderable_sum(context: Any, first: Any, second: Any):
    """A float32 sum that the compiler may reorder."""

    def code(_, builder: Any, __, args: Any):
        return builder.fadd(*args, flags=("reassoc", "contract"))

    return types.float32(types.float32, types.float32), code


@intrinsic
def _xor(context: Any, first: Any, second: Any):
    """Bitwise exclusive or."""
    return types.uint32(types.uint32, types.uint32), lambda _, builder, __, args: builder.xor(*args)


@intrinsic
def _or(context: Any, first: Any, second: Any):
    """Bitwise or."""
    return first(first, first), lambda _, builder, __, args: builder.or_(*args)


@intrinsic
def _upper_as_float(context: Any, word: Any):
    """The float32 whose upper 16 bits are those of the integer ``word``, with zeros below."""

    def code(_, builder: Any, __, args: Any):
        return builder.bitcast(builder.and_(args[0], INT32(0xFFFF0000)), ir.FloatType())

    return types.float32(types.uint32), code


@numba.njit(fastmath={"contract"})
def _sum_products(target, B, A, row, first, count):
    """``target[:count]`` = Σₖ B[row, k] · A[k, first : first + count] over all k but the last
    ``PRODUCTS_TOGETHER``. Without such k, ``target`` keeps its initial value, which is zero."""
    if B.shape[1] == PRODUCTS_TOGETHER:
        return
    last = first + count
    for j in range(count):
        target[j] = np.float32(0)
    for k in range(0, B.shape[1] - PRODUCTS_TOGETHER, PRODUCTS_TOGETHER):
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
            target[j] = (
                target[j]
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
    """Fill ``new`` with the rounded elements of a block of a row. Doubtful elements get a non-zero
    value in ``marks``. Returns whether any element is doubtful.

    ``change`` holds the sum of all products but the last ``PRODUCTS_TOGETHER``. The function adds
    ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and ⟨W, W⟩ to ``sums``."""
    k, last = B.shape[1] - PRODUCTS_TOGETHER, first + len(old)
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
    all_differences = np.uint32(0)
    realised = moved = base = np.float32(0)
    for j in range(len(old)):
        W = to_float32(old[j])
        delta = (  # begin with change[j], which is never -0; a product may be -0
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
        error = np.float32(abs(v) * RELATIVE_ERROR + bound)
        upper, lower = to_bfloat16_bits(v + error), to_bfloat16_bits(v - error)
        difference = _xor(upper, lower)
        all_differences = _or(all_differences, difference)
        new[j], marks[j] = upper_half(upper), upper_half(difference)
        step = _upper_as_float(upper) - W
        realised = _reorderable_sum(realised, delta * step)
        moved = _reorderable_sum(moved, step * step)
        base = _reorderable_sum(base, W * W)
    sums[0] += realised
    sums[1] += moved
    sums[2] += base
    # with a NaN among the elements, the marks are meaningless
    if realised != realised or moved != moved:
        marks[: len(old)] = NAN_BITS
        return True
    return upper_half(all_differences) != 0


@numba.njit
def _nearest(value):
    """The bits of the bfloat16 nearest to a float64, ties to even. A float32 that is rounded to odd
    comes between, so that rounding twice equals rounding once (Boldo & Melquiond 2008, "Emulation
    of FMA and correctly rounded sums")."""
    if value != value:
        return NAN_BITS
    nearest = np.float32(value)
    bits = _as_bits(nearest)
    if np.float64(nearest) != value:
        if abs(np.float64(nearest)) > abs(value):
            bits = np.uint32(bits - np.uint32(1))
        bits = np.uint32(bits | np.uint32(1))
    return upper_half(to_bfloat16_bits(_as_float(bits)))


@numba.njit
def _recompute_marked(old, words, B, A, scale, row, first, new, sums):
    """Compute the marked elements of a block in float64. Returns their number. Marks are rare, so
    the four marks of a word are tested together, and ``WORDS_TOGETHER`` words together."""
    count = 0
    for first_word in range(0, len(words), WORDS_TOGETHER):
        marked_words = np.uint64(0)
        for word in range(first_word, first_word + WORDS_TOGETHER):
            marked_words |= words[word]
        if marked_words:
            for word in range(first_word, first_word + WORDS_TOGETHER):
                marked, j = words[word], 4 * word
                while marked:
                    if marked & np.uint64(0xFFFF):
                        _exact(old, B, A, scale, row, first, j, new, sums)
                        count += 1
                    marked, j = marked >> np.uint64(16), j + 1
    return count


@numba.njit
def _exact(old, B, A, scale, row, first, j, new, sums):
    """Compute element j of a block in float64, and correct ⟨ΔW, W' - W⟩ in ``sums``."""
    change = 0.0
    for k in range(B.shape[1]):
        change += B[row, k] * A[first + j, k]
    change *= scale
    previous = to_float32(new[j])
    new[j] = _nearest(np.float64(to_float32(old[j])) + change)
    sums[0] += change * (np.float64(to_float32(new[j])) - np.float64(previous))


@compile_loop("contract")
def _slab(
    old, old_group, old_row, new, new_group, new_row, B, A, bound, wide_B, wide_A, scale, sums
):
    """Round some rows of some groups. ``old`` and ``new`` are flat memory, from the first element
    to the last; ``old_group``, ``old_row``, ``new_group`` and ``new_row`` are the strides of groups
    and rows. B is multiplied by ``scale``. ``wide_B`` and ``wide_A`` are the factors in float64,
    without the scale. Returns the number of doubtful elements."""
    groups, rows, _ = B.shape
    columns = A.shape[2]
    change, marks = np.zeros(BLOCK_COLUMNS, np.float32), np.zeros(BLOCK_COLUMNS, np.uint16)
    words, doubtful = marks.view(np.uint64), 0
    for group in range(groups):
        for row in range(rows):
            for first in range(0, columns, BLOCK_COLUMNS):
                count = min(BLOCK_COLUMNS, columns - first)
                _sum_products(change, B[group], A[group], row, first, count)
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
                    line_count = -(-count // MARKS_TOGETHER)
                    marks[count : MARKS_TOGETHER * line_count] = 0
                    block_words = words[: WORDS_TOGETHER * line_count]
                    doubtful += _recompute_marked(
                        old_block,
                        block_words,
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
    """Whether the loop supports the dtypes and memory layouts of these weights [g, out, in]."""
    is_dense = all(weight.stride(2) == 1 or weight.shape[2] == 1 for weight in (old, new))
    return is_dense and new.dtype == torch.bfloat16 and old.dtype in (torch.bfloat16, torch.float32)


def pad_rank(factor: Tensor, axis: int) -> Tensor:
    """A or B, with the rank (on this axis) padded to a multiple of ``PRODUCTS_TOGETHER``."""
    shape = list(factor.shape)
    shape[axis] = -shape[axis] % PRODUCTS_TOGETHER
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
    """Round ``old`` + ΔW into ``new``. Returns the sums [3] of ``_round``, in float64.

    Args:
        B, A: float32, padded by ``pad_rank``; B is multiplied by ``scale``.
        bound: the bound of the error of each row, float32 [g, rows, 1].
        wide_B, wide_A: the factors in float64, without the scale. A is transposed to [g, in, r],
            because a doubtful element reads a column of A.
    """
    sums = np.zeros(3)
    factors = [factor.contiguous().numpy() for factor in (B, A, bound[:, :, 0], wide_B, wide_A)]
    _slab(*_memory(old), *_memory(new), *factors, float(scale), sums)
    return torch.from_numpy(sums)


def _memory(matrix: Tensor) -> tuple[Any, int, int]:
    """The memory of a tensor [g, rows, columns] from the first element to the last, and the strides
    of groups and rows."""
    (groups, rows, columns), (group, row, _) = matrix.shape, matrix.stride()
    flat = matrix.as_strided(((groups - 1) * group + (rows - 1) * row + columns,), (1,))
    return (flat if matrix.dtype == torch.float32 else flat.view(torch.uint16)).numpy(), group, row
