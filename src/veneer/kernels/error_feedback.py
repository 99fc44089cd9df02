"""Round a weight so that the errors cancel where the adapter reads, or where it writes.

    V = gain ⊙ (W + ΔW), exact      W' of a 16-bit type, or of the grid of a quantised one: each number one of V's two
                                    neighbours      E = W' - V
    minimise  ‖E Fᵀ‖² + λ ‖E‖²      F: [k, in], the directions to protect: those of A's rows, and given ones

A change that is small beside the grid's step is lost to nearest where it does not reach the next
tie, and that loss has the shape of ΔW itself. But what an adapter adds is B (A x): of all the
errors of a row of numbers, only the k numbers E Fᵀ stand against it, and there are many more
roundings to choose than that. So the columns are rounded one after the other, each number up or
down, whichever leaves the smaller residual R = E Fᵀ of its row: error feedback, as in sigma-delta
converters. (GPTQ, Frantar et al. 2022, arXiv:2210.17323, repairs an error by moving the columns
still to come, which are then rounded to nearest: small repairs would vanish as ΔW does.) λ weighs
the plain error, which keeps numbers from going far for little.

    e = mid - copysign(half, t)     t = fᵀ R + mid (‖f‖² + λ)     f: the column of F;  its cell, less V: mid ± half

Rows do not touch each other: a column is one vector operation over all of them. Within a chunk of
columns, residuals are brought forward by the Gram matrix FᵀF of the chunk, in blocks, so that most
of the work is matrix products. All is float64: V's neighbours are then V's own, and the order in
which a product is summed (by another machine, or count of threads) turns one choice in 10¹² or so.

Other inputs than those in the span of A's rows get an error 1.6 times that of nearest at ‖ΔW‖ =
10⁻³ ‖W‖ (three times at 10⁻⁴), three quarters of that of stochastic rounding
(``benchmarks/results/before/merge_fidelity.json``). B's columns in place of A's rows (the
transposed problem) pay no more on a real model, so they are for embeddings alone, whose inputs are
indices and have no directions. Measured inputs are best by far, if they can be had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.kernels.grid import Grid
from veneer.kernels.threads import spread, threads_for
from veneer.lowrank import LowRank

#: columns whose residuals are brought forward by products; those within a block by sums
CHUNK, BLOCK = 32, 8
#: the same on a device, at most: each column takes two launches, each chunk some twenty more
DEVICE_CHUNK, DEVICE_BLOCK = 128, 32
#: numbers in a column of a chunk, and bytes of columns that are held at once, at most: by each
#: worker
ROWS, HELD = 1 << 11, 1 << 23
WORKERS = 2
#: directions of the inputs, and how often they are refined (subspace iteration: every half of a
#: digit or so)
MORE, SWEEPS = 16, 6
#: λ, in mean squared lengths of a column of F
PLAIN = 0.05
#: bits of the fraction and the exponent of the smallest normal number
GRID = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}
EXPONENT = 0x7FF0000000000000


def basis(A: Float[Tensor, "g r in_"], cutoff: float = 1e-10) -> Float[Tensor, "g k in_"]:
    """Orthonormal rows that span those of A (float64); rows of zeros where A has a smaller rank
    than r."""
    Q, upper = torch.linalg.qr(A.mT)  # [g, in, k], [g, k, r]
    vectors, sizes, _ = torch.linalg.svd(upper, full_matrices=False)
    spanned = sizes > cutoff * sizes[:, :1]
    return (Q @ (vectors * spanned[:, None])).mT


def directions(
    A: Float[Tensor, "g r in_"], inputs: Float[Tensor, "g in_ in_"] | None
) -> Float[Tensor, "g k in_"]:
    """F: the span of A's rows, then the directions in which ``inputs`` (Σ xᵀx) vary most, as long
    as they vary there beside the first."""
    span = basis(A)
    if inputs is None:
        return span
    moment = inputs.double()
    largest = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)[:, :MORE]
    vectors = moment.gather(2, largest[:, None].expand(-1, moment.shape[1], -1))
    for _ in range(SWEEPS):
        vectors = moment @ torch.linalg.qr(vectors)[0]
    vectors = torch.linalg.qr(vectors)[0]
    sizes, turned = torch.linalg.eigh(vectors.mT @ moment @ vectors)
    weights = (sizes / sizes[:, -1:].clamp_min(1e-300)).clamp(0, 1).sqrt()
    return torch.cat([span, ((vectors @ turned) * weights[:, None]).mT], 1)


def faithful(
    weight: Float[Tensor, "g out in_"],
    low: LowRank,
    gain: Tensor | None,
    protect: Float[Tensor, "g k in_"],
    out: Float[Tensor, "g out in_"],
    grid: Grid | None = None,
) -> float:
    """Fill ``out`` with ``gain ⊙ (weight + ΔW)``, rounded as above; all of it must round to finite
    numbers.

    Args:
        low: in float64.
        gain: [g, out, 1] or [g, 1, in] in float64. What it changes of a row lies outside of A's
            rows: then the row's own change is a direction to protect too.
        protect: F in float64.
        grid: of a weight of this shape, whose numbers ``out`` gets; without, those of its 16-bit
            dtype.

    Returns:
        ⟨ΔW, E⟩, where ΔW is all that changes.
    """
    groups, rows, columns = weight.shape
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, rows, -1)
    held = torch.promote_types(weight.dtype, out.dtype)
    if weight.is_cpu:
        high = max(1, min(rows, ROWS, HELD // (columns * held.itemsize)))
        many = max(1, min(ROWS // high, HELD // (high * columns * held.itemsize)))
        chunk, block = CHUNK, BLOCK
    else:  # as many launches for every number of rows, in buffers of about the size of the weight
        share = max(columns * held.itemsize / (5 * CHUNK * 8), 0.25)
        high, many = -(-rows // max(1, round(1 / share))), groups
        chunk, block = CHUNK * max(1, min(DEVICE_CHUNK // CHUNK, int(share))), DEVICE_BLOCK
    pieces = [
        (slice(group, group + many), slice(row, row + high))
        for group in range(0, groups, many)
        for row in range(0, rows, high)
    ]

    def round_rows(piece: tuple[slice, slice], _: None) -> float:
        groups_of_piece, rows_of_piece = piece
        # [g, k, in], [g, r, in], [g, r, out]
        F, A, B = (
            protect[groups_of_piece],
            low.A[groups_of_piece],
            (low.B[groups_of_piece] * low.scale).mT,
        )
        order = F.square().sum(1).argsort(dim=1, descending=True, stable=True)  # [g, in]
        F, A = (tensor.gather(2, order[:, None].expand_as(tensor)) for tensor in (F, A))
        columns_first = _transpose_into(weight[piece]).to(held)  # [g, in, rows]
        factor = gain
        # one a row as [g, 1, out], one a column as [g, in, 1] in the order of the columns
        if gain is not None:
            factor = (
                gain[groups_of_piece, rows_of_piece].mT
                if gain.shape[2] == 1
                else gain[groups_of_piece].mT.gather(1, order[:, :, None])
            )
        cells = _cells(out.dtype, grid, piece)
        inner = _Rows(
            columns_first, order, F, A, B[:, :, rows_of_piece], factor, cells, chunk, block
        ).run()
        _transpose_into(columns_first.to(out.dtype), out[piece])
        return inner

    return sum(spread(pieces, lambda: None, round_rows, threads_for(weight, WORKERS)))


def _transpose_into(matrix: Tensor, target: Tensor | None = None) -> Tensor:
    """``one.mT`` in memory of its own. torch has a fast copy for this, of matrices of one type."""
    target = matrix.new_empty(matrix.mT.shape) if target is None else target
    if len(matrix) == 1:
        target[0].copy_(matrix[0].T)
    else:
        target.copy_(matrix.mT)
    return target


#: fill the last two with the cells of values [g, count, rows] at these places; the third is for
#: whatever it takes
_Cells = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _cells(dtype: torch.dtype, grid: Grid | None, piece: tuple[slice, slice]) -> _Cells:
    if grid is None:
        return lambda _, value, free, mid, half: neighbours(value, dtype, free, mid, half)
    # [g · in, rows], as ``_Rows.kept``
    columns_grid = grid.map_tensors(lambda tensor: _transpose_into(tensor[piece]).flatten(0, 1))

    def cells(positions: Tensor, value: Tensor, _: Tensor, mid: Tensor, half: Tensor) -> None:
        columns_grid.map_tensors(
            lambda tensor: tensor.index_select(0, positions).view(value.shape)
        ).cells(value, mid, half)

    return cells


class _Rows:
    """Some rows of some groups, from their first column to the last, in ``order``: the longest
    columns of F first, so that the last can trim the residual finely."""

    def __init__(
        self,
        columns_first: Tensor,
        order: Tensor,
        F: Tensor,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        cells: _Cells,
        chunk: int,
        block: int,
    ) -> None:
        self.F, self.A, self.B, self.gain, self.cells = F, A, B, gain, cells
        self.chunk, self.block = chunk, block
        self.groups, self.columns, self.rows = columns_first.shape
        # the columns of a group below those of the one before
        self.kept = columns_first.view(-1, self.rows)
        self.order = order + self.columns * torch.arange(self.groups, device=order.device)[:, None]
        self.plain = PLAIN * F.square().sum() / (self.groups * self.columns)
        self.residual = F.new_zeros(self.groups, F.shape[1], self.rows)
        wide = min(chunk, self.columns)
        self.lower = F.new_ones(wide, wide).tril(-1).neg_()
        self.buffers = F.new_empty(4 if gain is None else 5, self.groups, wide, self.rows).unbind()
        # [g, 1, rows], one a column
        self.tilts, self.mids, self.halves, *self.changes = (
            buffer.unsqueeze(2).unbind(1) for buffer in self.buffers[1:]
        )

    def run(self) -> float:
        starts = range(0, self.columns, self.chunk)
        chunks = [slice(start, min(start + self.chunk, self.columns)) for start in starts]
        if self.gain is not None:
            size = sum(self._exact(columns)[1].square().sum(1, keepdim=True) for columns in chunks)
            self.size = torch.as_tensor(size).sqrt()  # [g, 1, rows]
            self.along = torch.zeros_like(self.size)
        for columns in chunks:
            self._chunk(columns)
        if self.gain is not None:
            return float((self.along * self.size).sum())
        rank = min(self.A.shape[1:])
        image = (self.F[:, :rank] @ self.A.mT).mT @ self.residual[:, :rank]  # A Eᵀ
        return float((self.B * image).sum())

    def _column_index(self, columns: slice) -> Tensor:
        return self.order[:, columns].reshape(-1)

    def _exact(self, columns: slice) -> tuple[Tensor, Tensor]:
        """V, and V - W where there is a gain: [g, count, rows]."""
        value, *_, change = (buffer[:, : columns.stop - columns.start] for buffer in self.buffers)
        value.copy_(self.kept.index_select(0, self._column_index(columns)).view(value.shape))
        if self.gain is not None:
            change.copy_(value)
        value.baddbmm_(self.A[:, :, columns].mT, self.B)
        if self.gain is not None:
            value *= self.gain if self.gain.shape[1] == 1 else self.gain[:, columns]
            torch.sub(value, change, out=change)
        return value, change

    def _chunk(self, columns: slice) -> None:
        count = columns.stop - columns.start
        value, change = self._exact(columns)
        tilt, mid, half = (buffer[:, :count] for buffer in self.buffers[1:4])
        F = self.F[:, :, columns]
        self.cells(self._column_index(columns), value, tilt, mid, half)
        ahead = F.mT @ F
        torch.mul(mid, ahead.diagonal(dim1=1, dim2=2)[:, :, None] + self.plain, out=tilt)
        if self.gain is not None:
            change /= self.size + (self.size == 0)
            tilt += mid * change.square()
        ahead *= self.lower[:count, :count]
        # as if all went to the middle of their cells
        tilt.baddbmm_(F.mT, self.residual).baddbmm_(ahead, mid, alpha=-1)
        for first in range(0, count, self.block):
            last = min(first + self.block, count)
            self._block(first, ahead[:, first:last, first:last, None], tilt[:, first:last])
            if last < count:
                tilt[:, last:].baddbmm_(ahead[:, last:, first:last], half[:, first:last])
        error = mid.sub_(half)
        self.residual.baddbmm_(F, error)
        self.kept.index_copy_(
            0,
            self._column_index(columns),
            value.add_(error).to(self.kept.dtype).reshape(-1, self.rows),
        )

    def _block(self, first: int, ahead: Tensor, tilt: Tensor) -> None:
        """Choose a few columns, one after the other: their ``halves`` get the sign by which e = mid
        - half."""
        for column, factor in enumerate(ahead.unbind(2), first):
            half = self.halves[column]
            if self.gain is not None:
                self.tilts[column].addcmul_(self.changes[0][column], self.along)
            torch.copysign(half, self.tilts[column], out=half)
            tilt.addcmul_(factor, half)
            if self.gain is not None:
                self.along.addcmul_(self.changes[0][column], self.mids[column] - half)


def neighbours(value: Tensor, dtype: torch.dtype, step: Tensor, mid: Tensor, half: Tensor) -> None:
    """The cell of the grid in which each float64 ``value`` lies: half its width (with either sign),
    and its middle less the value; both 0 for a number of the grid. Values beyond the largest finite
    number become that. ``step`` is overwritten."""
    digits, smallest = GRID[dtype]
    largest = torch.finfo(dtype).max
    value.clamp_(-largest, largest)
    torch.bitwise_and(value.view(torch.int64), EXPONENT, out=step.view(torch.int64))
    step.clamp_(min=2.0**smallest).mul_(2.0**-digits)
    torch.div(value, step, out=mid).frac_()
    torch.sign(mid, out=half).mul_(step).mul_(0.5)
    torch.addcmul(half, mid, step, value=-1, out=mid)
