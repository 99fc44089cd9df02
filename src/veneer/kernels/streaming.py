"""Rounding W + ΔW to nearest in one loop over the numbers, by numba: memory is read once and written once.

    Δ = Σₖ (scale · B)[row, k] · A[k, column]        v = W + Δ        W' = bf16(either end of the interval around v)

Arithmetic and proof are those of ``kernels.rounding``: float32, and an interval around v whose two ends must round
alike. Where they do not, the place is noted for the caller, who computes it in float64. So the bits are the
definition's, whichever of the two paths has run.

What the compiler may do: contract a product and a sum into one operation, which rounds once where the bound allows
for twice. What it may not: reorder. It would cancel v against the ends of its interval. The sums of the report alone
are free of order (``plus``), as they could not run on vectors otherwise.

A block of ``WIDE`` columns stays in the nearest cache with its part of A, and the rows pass through it. torch does the
same in 15 operations on a tile, each a pass through the second cache: 5 to 9 ns of a core for a number at rank 8, where
this takes 1.3. Rejected: C, which must be built for every system; torch.compile, which wants a C++ compiler where it
runs.

Importing this module loads numba (half a second, 100 MiB); only ``rounding`` does, for weights that are worth it.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from veneer.kernels.compiled import NAN, SHIFT, as_float, bf16, compiled, plus, wide

#: columns of a block: with 8 rows of A it takes 16 KiB of the nearest cache
WIDE = 512
#: products that are added to a number at once; ranks are filled up to a multiple of it, by zeros
PRODUCTS = 8
#: 1 + 2⁻²², as ``rounding`` has it
FARTHER = np.float32(1 + 2.0**-22)


@numba.njit(fastmath={"contract"})
def _change(into, B, A, row, first, count):
    """``into[:count]`` = Σₖ B[row, k] · A[k, first : first + count]"""
    last = first + count
    for j in range(count):
        into[j] = np.float32(0)  # not the first product: that may be -0
    for k in range(0, B.shape[1], PRODUCTS):
        b0, b1, b2, b3 = B[row, k], B[row, k + 1], B[row, k + 2], B[row, k + 3]
        b4, b5, b6, b7 = B[row, k + 4], B[row, k + 5], B[row, k + 6], B[row, k + 7]
        a0, a1, a2, a3 = A[k, first:last], A[k + 1, first:last], A[k + 2, first:last], A[k + 3, first:last]
        a4, a5, a6, a7 = A[k + 4, first:last], A[k + 5, first:last], A[k + 6, first:last], A[k + 7, first:last]
        for j in range(count):
            into[j] = (
                into[j] + b0 * a0[j] + b1 * a1[j] + b2 * a2[j] + b3 * a3[j]
                + b4 * a4[j] + b5 * a5[j] + b6 * a6[j] + b7 * a7[j]
            )  # fmt: skip


@numba.njit(fastmath={"contract"})
def _round(old, change, bound, new, marks, sums):
    """Fill ``new``, and ``marks`` with something else than 0 where it is in doubt; returns whether any is. ``sums``
    gets ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and ⟨W, W⟩."""
    doubt = np.uint32(0)
    realised = moved = base = np.float32(0)
    for j in range(len(old)):
        W, delta = wide(old[j]), change[j]
        v = W + delta
        end = v * FARTHER + np.float32(np.copysign(bound, v))
        rounded = bf16(v - (end - v))
        rounded = np.uint32(rounded if v == v else NAN)
        differs = bf16(end) ^ rounded
        new[j], marks[j] = np.uint16(rounded), np.uint16(differs)
        doubt |= differs
        step = as_float(rounded << SHIFT) - W
        realised, moved, base = plus(realised, delta * step), plus(moved, step * step), plus(base, W * W)
    sums[0] += realised
    sums[1] += moved
    sums[2] += base
    return doubt != 0


def _slab(old, old_group, old_row, new, new_group, new_row, B, A, bound, places, sums):
    """Some rows of some groups. ``old`` and ``new`` are the memory from the first number to the last, with the distance
    from group to group and from row to row; ``places`` gets where the result is in doubt, counted within the slab;
    returns how many."""
    groups, rows, _ = B.shape
    columns = A.shape[2]
    change, marks = np.empty(WIDE, np.float32), np.empty(WIDE, np.uint16)
    found = 0
    for group in range(groups):
        for first in range(0, columns, WIDE):
            count = min(WIDE, columns - first)
            for row in range(rows):
                _change(change, B[group], A[group], row, first, count)
                start = group * old_group + row * old_row + first
                into = group * new_group + row * new_row + first
                own, made = old[start : start + count], new[into : into + count]
                if _round(own, change, bound[group, row], made, marks, sums):
                    for j in range(count):
                        if marks[j]:
                            places[found] = (group * rows + row) * columns + first + j
                            found += 1
    return found


_LOOP = compiled(_slab)


def able(old: Tensor, new: Tensor) -> bool:
    """Whether the loop is for weights of these dtypes that lie in memory like this."""
    dense = all(one.stride(2) == 1 or one.shape[2] == 1 for one in (old, new))
    return dense and new.dtype == torch.bfloat16 and old.dtype in (torch.bfloat16, torch.float32)


def padded(factor: Tensor, axis: int) -> Tensor:
    """A or B in float32 with a rank that the loop takes."""
    shape = list(factor.shape)
    shape[axis] = -shape[axis] % PRODUCTS
    return torch.cat([factor, factor.new_zeros(shape)], axis).contiguous()


class Loop:
    """The loop, and what one thread keeps from slab to slab."""

    def __init__(self, slab: int) -> None:
        self.places = np.empty(slab, np.int64)  # memory is taken where it is written: hardly anywhere

    def fold(self, old: Tensor, B: Tensor, A: Tensor, bound: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Round a slab into ``new``; returns the sums [3] in float64, and the places in the slab that are in doubt."""
        sums = np.zeros(3)
        found = _LOOP(
            *_memory(old), *_memory(new), B.numpy(), A.numpy(), bound.contiguous()[:, :, 0].numpy(), self.places, sums
        )
        return torch.from_numpy(sums), torch.from_numpy(self.places[:found].copy())


def _memory(one: Tensor) -> tuple[Any, int, int]:
    """From the first number of [g, rows, columns] to the last, and how far groups and rows are apart."""
    (groups, rows, columns), (group, row, _) = one.shape, one.stride()
    flat = one.as_strided(((groups - 1) * group + (rows - 1) * row + columns,), (1,))
    return (flat if one.dtype == torch.float32 else flat.view(torch.uint16)).numpy(), group, row
