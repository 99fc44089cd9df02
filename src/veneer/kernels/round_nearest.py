"""Round W + ΔW to bfloat16, to nearest, in one loop that is compiled by numba and reads and writes
memory once.

    Δ = Σₖ (scale · B)[row, k] · A[k, column]
    v = W + Δ in float32        W': the element of the result

The exact W + ΔW lies in an interval around v, whose width is proved in ``kernels.rounding``. If
both ends of the interval round to the same bfloat16, it is W'. Otherwise the element is doubtful.
The doubtful elements of a block are computed in float64 directly after the block.

The compiler may contract a product and a sum into one operation, which rounds once, where the bound
of the error allows for two roundings. The compiler must not reorder the sums that give v and the
ends of its interval, because the bound does not allow for it. Only the sums for the report may be
reordered, so that they are vectorised (``_reorderable_sum``).

Rows are processed in memory order, in blocks of ``BLOCK_COLUMNS`` columns. A stays in the
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

#: columns of a block. Starting and ending a block takes as long as a hundred elements do
BLOCK_COLUMNS = 4096
#: how many 64-bit words of marks are tested together. A mark (16 bits for each element of a block,
#: not zero if the element is doubtful) takes a quarter of a word
WORDS_TOGETHER = 4
#: the number of marks in ``WORDS_TOGETHER`` words
MARKS_TOGETHER = 4 * WORDS_TOGETHER
#: how many products are added at once; ranks are padded with zeros to a multiple of it
PRODUCTS_TOGETHER = 8
#: 4 · 2⁻²⁴. The ends of the interval that holds the exact value are v ± (|v| · RELATIVE_ERROR + the
#: bound of the error of ΔW); see ``rounding``
RELATIVE_ERROR = np.float32(2.0**-22)


@intrinsic
def _as_float(_typing_context: Any, bits_type: Any):
    """Reinterpret the bits of a uint32 as a float32."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _as_bits(_typing_context: Any, value_type: Any):
    """Reinterpret the bits of a float32 as a uint32."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], INT32)


@intrinsic
def _reorderable_sum(_typing_context: Any, first_type: Any, second_type: Any):
    """The sum of two float32, which the compiler may reorder with other sums of this function."""

    def generate_code(_, builder: Any, __, args: Any):
        return builder.fadd(*args, flags=("reassoc", "contract"))

    return types.float32(types.float32, types.float32), generate_code


@intrinsic
def _xor(_typing_context: Any, first_type: Any, second_type: Any):
    """Bitwise exclusive or."""
    return types.uint32(types.uint32, types.uint32), lambda _, builder, __, args: builder.xor(*args)


@intrinsic
def _or(_typing_context: Any, first_type: Any, second_type: Any):
    """Bitwise or."""
    return first_type(first_type, first_type), lambda _, builder, __, args: builder.or_(*args)


@intrinsic
def _upper_as_float(_typing_context: Any, word_type: Any):
    """The float32 whose upper 16 bits are those of a uint32, and whose lower 16 bits are zero."""

    def generate_code(_, builder: Any, __, args: Any):
        return builder.bitcast(builder.and_(args[0], INT32(0xFFFF0000)), ir.FloatType())

    return types.float32(types.uint32), generate_code


@numba.njit(fastmath={"contract"})
def _sum_products(partial_sums, B, A, row, first_column, count):
    """Fill ``partial_sums[:count]`` with Σₖ B[row, k] · A[k, first_column : first_column + count]
    over all k but the last ``PRODUCTS_TOGETHER``, which ``_round`` adds. If there are no other k,
    ``partial_sums`` keeps its initial value, which is zero."""
    if B.shape[1] == PRODUCTS_TOGETHER:
        return
    last = first_column + count
    for j in range(count):
        partial_sums[j] = np.float32(0)
    for k in range(0, B.shape[1] - PRODUCTS_TOGETHER, PRODUCTS_TOGETHER):
        b0, b1, b2, b3 = B[row, k], B[row, k + 1], B[row, k + 2], B[row, k + 3]
        b4, b5, b6, b7 = B[row, k + 4], B[row, k + 5], B[row, k + 6], B[row, k + 7]
        a0, a1, a2, a3 = (
            A[k, first_column:last],
            A[k + 1, first_column:last],
            A[k + 2, first_column:last],
            A[k + 3, first_column:last],
        )
        a4, a5, a6, a7 = (
            A[k + 4, first_column:last],
            A[k + 5, first_column:last],
            A[k + 6, first_column:last],
            A[k + 7, first_column:last],
        )
        for j in range(count):
            partial_sums[j] = (
                partial_sums[j]
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
def _round(
    weight_block, partial_sums, B, A, row, first_column, error_bound, rounded_block, marks, sums
):
    """Round W + ΔW for the elements of one row whose columns start at ``first_column``.

    Writes the bfloat16 bits W' to ``rounded_block``, and to ``marks`` a non-zero value for doubtful
    elements, whose W' must be recomputed in float64: those for which the ends of the interval that
    holds the exact value round to different numbers. Adds ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and ⟨W, W⟩
    to ``sums``. Returns whether any element is doubtful.

    Args:
        weight_block: W of these elements, float32 or bfloat16 bits.
        partial_sums: ΔW of these elements without the last ``PRODUCTS_TOGETHER`` products.
        B, A: [rows, r], times the scale, and [r, columns], float32.
        error_bound: the bound of float32's error in ΔW for this row.
    """
    k, last = B.shape[1] - PRODUCTS_TOGETHER, first_column + len(weight_block)
    b0, b1, b2, b3 = B[row, k], B[row, k + 1], B[row, k + 2], B[row, k + 3]
    b4, b5, b6, b7 = B[row, k + 4], B[row, k + 5], B[row, k + 6], B[row, k + 7]
    a0, a1, a2, a3 = (
        A[k, first_column:last],
        A[k + 1, first_column:last],
        A[k + 2, first_column:last],
        A[k + 3, first_column:last],
    )
    a4, a5, a6, a7 = (
        A[k + 4, first_column:last],
        A[k + 5, first_column:last],
        A[k + 6, first_column:last],
        A[k + 7, first_column:last],
    )
    all_differences = np.uint32(0)
    realised_sum = moved_sum = base_sum = np.float32(0)
    for j in range(len(weight_block)):
        W = to_float32(weight_block[j])
        delta = (  # begins with partial_sums[j], never -0, so that delta is never -0
            partial_sums[j]
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
        interval_radius = np.float32(abs(v) * RELATIVE_ERROR + error_bound)
        upper, lower = to_bfloat16_bits(v + interval_radius), to_bfloat16_bits(v - interval_radius)
        difference = _xor(upper, lower)
        all_differences = _or(all_differences, difference)
        rounded_block[j], marks[j] = upper_half(upper), upper_half(difference)
        step = _upper_as_float(upper) - W
        realised_sum = _reorderable_sum(realised_sum, delta * step)
        moved_sum = _reorderable_sum(moved_sum, step * step)
        base_sum = _reorderable_sum(base_sum, W * W)
    sums[0] += realised_sum
    sums[1] += moved_sum
    sums[2] += base_sum
    # With a NaN among the elements, the marks are meaningless, so all elements are marked.
    if realised_sum != realised_sum or moved_sum != moved_sum:
        marks[: len(weight_block)] = NAN_BITS
        return True
    return upper_half(all_differences) != 0


@numba.njit
def _nearest(value):
    """The bits of the bfloat16 nearest to a float64 ``value``, ties to even. The value is rounded
    to float32 first, but "to odd": an inexact result gets 1 as its last bit, so that rounding twice
    equals rounding once (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums")."""
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
def _recompute_marked(
    weight_block, mark_words, B, A, scale, row, first_column, rounded_block, sums
):
    """Compute the elements of a block that are marked as doubtful again, in float64, by ``_exact``.
    Returns their number. ``mark_words`` holds the 16-bit marks of the elements, four in each 64-bit
    word. Marks are rare, so ``WORDS_TOGETHER`` words are tested together."""
    marked_count = 0
    for first_word in range(0, len(mark_words), WORDS_TOGETHER):
        marked_words = np.uint64(0)
        for word in range(first_word, first_word + WORDS_TOGETHER):
            marked_words |= mark_words[word]
        if marked_words:
            for word in range(first_word, first_word + WORDS_TOGETHER):
                marks_left, j = mark_words[word], 4 * word
                while marks_left:
                    if marks_left & np.uint64(0xFFFF):
                        _exact(weight_block, B, A, scale, row, first_column, j, rounded_block, sums)
                        marked_count += 1
                    marks_left, j = marks_left >> np.uint64(16), j + 1
    return marked_count


@numba.njit
def _exact(weight_block, B, A, scale, row, first_column, j, rounded_block, sums):
    """Compute element j of a block in float64, write it to ``rounded_block``, and correct ⟨ΔW,
    W' - W⟩ in ``sums[0]``. B [rows, r] and the transposed A [columns, r] are float64, without the
    scale."""
    delta = 0.0
    for k in range(B.shape[1]):
        delta += B[row, k] * A[first_column + j, k]
    delta *= scale
    previous_value = to_float32(rounded_block[j])
    rounded_block[j] = _nearest(np.float64(to_float32(weight_block[j])) + delta)
    sums[0] += delta * (np.float64(to_float32(rounded_block[j])) - np.float64(previous_value))


@compile_loop("contract")
def _slab(
    weight_memory,
    weight_group_stride,
    weight_row_stride,
    rounded_memory,
    rounded_group_stride,
    rounded_row_stride,
    B,
    A,
    error_bounds,
    wide_B,
    wide_A,
    scale,
    sums,
):
    """Round W + ΔW for all rows of a slab, which is some rows of some groups of a weight.

    Args:
        weight_memory, rounded_memory: W and the result as flat memory, with the strides of groups
            and rows in elements.
        B, A: [g, rows, r], times ``scale``, and [g, r, columns], float32, padded by ``pad_rank``.
        error_bounds: the bound of float32's error in ΔW, [g, rows].
        wide_B, wide_A: [g, rows, r] and [g, columns, r], float64, without the scale.
        sums: float64 [3], to which ``_round`` adds.

    Returns the number of doubtful elements, which were computed again in float64.
    """
    group_count, row_count, _ = B.shape
    column_count = A.shape[2]
    partial_sums, marks = np.zeros(BLOCK_COLUMNS, np.float32), np.zeros(BLOCK_COLUMNS, np.uint16)
    mark_words, doubtful_count = marks.view(np.uint64), 0
    for group in range(group_count):
        for row in range(row_count):
            for first_column in range(0, column_count, BLOCK_COLUMNS):
                count = min(BLOCK_COLUMNS, column_count - first_column)
                _sum_products(partial_sums, B[group], A[group], row, first_column, count)
                weight_start = group * weight_group_stride + row * weight_row_stride + first_column
                rounded_start = (
                    group * rounded_group_stride + row * rounded_row_stride + first_column
                )
                weight_block, rounded_block, error_bound = (
                    weight_memory[weight_start : weight_start + count],
                    rounded_memory[rounded_start : rounded_start + count],
                    error_bounds[group, row],
                )
                if _round(
                    weight_block,
                    partial_sums,
                    B[group],
                    A[group],
                    row,
                    first_column,
                    error_bound,
                    rounded_block,
                    marks,
                    sums,
                ):
                    tested_line_count = -(-count // MARKS_TOGETHER)
                    marks[count : MARKS_TOGETHER * tested_line_count] = 0
                    block_words = mark_words[: WORDS_TOGETHER * tested_line_count]
                    doubtful_count += _recompute_marked(
                        weight_block,
                        block_words,
                        wide_B[group],
                        wide_A[group],
                        scale,
                        row,
                        first_column,
                        rounded_block,
                        sums,
                    )
    return doubtful_count


def supports(weight: Tensor, rounded_weight: Tensor) -> bool:
    """Whether the loop can round ``weight`` [g, out, in] plus a change into ``rounded_weight``: the
    last axis of both is contiguous, and they have dtypes that the loop supports."""
    is_dense = all(
        tensor.stride(2) == 1 or tensor.shape[2] == 1 for tensor in (weight, rounded_weight)
    )
    return (
        is_dense
        and rounded_weight.dtype == torch.bfloat16
        and weight.dtype in (torch.bfloat16, torch.float32)
    )


def pad_rank(factor: Tensor, axis: int) -> Tensor:
    """``factor``, A or B, with the rank on ``axis`` padded with zeros to a multiple of
    ``PRODUCTS_TOGETHER``; contiguous."""
    shape = list(factor.shape)
    shape[axis] = -shape[axis] % PRODUCTS_TOGETHER
    return torch.cat([factor, factor.new_zeros(shape)], axis).contiguous()


def round_slab(
    weight: Tensor,
    B: Tensor,
    A: Tensor,
    error_bounds: Tensor,
    wide_B: Tensor,
    wide_A: Tensor,
    scale: float,
    rounded_weight: Tensor,
) -> Tensor:
    """Write W', the ``weight`` W [g, rows, in] plus ΔW rounded to nearest, to ``rounded_weight``.
    Returns ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and ⟨W, W⟩ as a float64 tensor [3].

    Args:
        B, A: [g, rows, r], times ``scale``, and [g, r, in], float32, padded by ``pad_rank``.
        error_bounds: the bound of float32's error in ΔW for each row, float32 [g, rows, 1].
        wide_B, wide_A: the factors in float64, without the scale. A is transposed to [g, in, r],
            because a doubtful element reads a column of A.
    """
    sums = np.zeros(3)
    factors = [
        factor.contiguous().numpy() for factor in (B, A, error_bounds[:, :, 0], wide_B, wide_A)
    ]
    _slab(*_memory(weight), *_memory(rounded_weight), *factors, float(scale), sums)
    return torch.from_numpy(sums)


def _memory(tensor: Tensor) -> tuple[Any, int, int]:
    """The memory of a tensor [g, rows, columns] as a flat numpy array, from its first element to
    its last (bfloat16 as uint16), and the strides of groups and rows in elements."""
    (groups, rows, columns), (group_stride, row_stride, _) = tensor.shape, tensor.stride()
    flat_memory = tensor.as_strided(
        ((groups - 1) * group_stride + (rows - 1) * row_stride + columns,), (1,)
    )
    return (
        (flat_memory if tensor.dtype == torch.float32 else flat_memory.view(torch.uint16)).numpy(),
        group_stride,
        row_stride,
    )
