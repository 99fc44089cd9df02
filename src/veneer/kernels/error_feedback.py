"""Round a weight so that the errors cancel where the adapter reads, or where it writes.

    V = gain ⊙ (W + ΔW), exact      W': rounded to a 16-bit dtype, or to a quantised weight's grid;
                                    each value is one of V's two neighbours
    E = W' - V
    minimise  ‖E Fᵀ‖² + λ ‖E‖²      F [k, in]: the directions to protect, A's rows and given ones

Rounding to nearest loses a change that is small against the grid's step and does not reach the next
tie, and the lost part has the shape of ΔW itself. But the adapter adds B (A x): of a row's errors,
only the k values E Fᵀ matter, and a row has many more roundings to choose than that. So the columns
are rounded one after the other, each value up or down, whichever leaves the smaller residual
R = E Fᵀ of its row. This is error feedback, as in sigma-delta converters. (GPTQ, Frantar et al.
2022, arXiv:2210.17323, instead corrects an error by changing the following columns and rounds these
to nearest: small corrections would be lost as ΔW is.) λ weights the plain error, which avoids large
errors for a small gain.

    e = mid - copysign(half, t)     t = fᵀ R + mid (‖f‖² + λ)
    f: the column of F      mid ± half: the bounds of the cell minus V

Rows are independent: a column is one vector operation over all of them. Within a chunk of columns,
the Gram matrix FᵀF of the chunk updates the residuals, in blocks, so that most of the work is
matrix products. All arithmetic is float64, so that V's neighbours are exact; another order of
summation (another machine or number of threads) changes about one choice in 10¹².

Inputs outside of the span of A's rows get an error 1.6 times that of nearest at ‖ΔW‖ = 10⁻³ ‖W‖
(three times at 10⁻⁴), three quarters of that of stochastic rounding
(``benchmarks/results/before/merge_fidelity.json``). B's columns in place of A's rows (the
transposed problem) are no better on a real model, so they serve only embeddings, whose inputs are
indices without directions. Measured inputs give by far the best result, if available.
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
    """Return orthonormal rows with the span of A's rows, float64. If the rank of A is below r, the
    remaining rows are zero."""
    Q, upper = torch.linalg.qr(A.mT)  # [g, in, k], [g, k, r]
    vectors, sizes, _ = torch.linalg.svd(upper, full_matrices=False)
    spanned = sizes > cutoff * sizes[:, :1]
    return (Q @ (vectors * spanned[:, None])).mT


def directions(
    A: Float[Tensor, "g r in_"], inputs: Float[Tensor, "g in_ in_"] | None
) -> Float[Tensor, "g k in_"]:
    """Return F: an orthonormal basis of A's rows, followed by the directions in which ``inputs``
    (Σ xᵀx) vary most, each scaled by its standard deviation relative to the largest."""
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
    """Fill ``out`` with ``gain ⊙ (weight + ΔW)``, rounded by error feedback (see the module). All
    values must round to finite numbers.

    Args:
        low: ΔW's factors in float64.
        gain: [g, out, 1] or [g, 1, in] in float64. It changes a row in a direction outside of the
            span of A's rows; the row's complete change is then protected as a further direction.
        protect: F in float64.
        grid: the values that ``out`` may take, for a quantised weight of this shape; by default
            those of its 16-bit dtype.

    Returns:
        ⟨ΔW, E⟩, where ΔW is the complete change, including the gain.
    """
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, weight.shape[1], -1)
    wide_dtype = torch.promote_types(weight.dtype, out.dtype)
    pieces, chunk, block = _row_pieces(weight, wide_dtype)

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
        columns_first = _transpose_into(weight[piece]).to(wide_dtype)  # [g, in, rows]
        factor = gain
        # a gain for each row as [g, 1, out], for each column as [g, in, 1] in the columns' order
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


def _row_pieces(
    weight: Tensor, wide_dtype: torch.dtype
) -> tuple[list[tuple[slice, slice]], int, int]:
    """Divide a weight [g, out, in] into pieces of groups and rows.

    Returns the pieces, and the numbers of columns in a chunk and in a block. On a CPU, a piece fits
    into the cache. On a device, the number of launches does not depend on the number of rows, and
    the buffers are about as large as the weight."""
    groups, rows, columns = weight.shape
    row_bytes = columns * wide_dtype.itemsize
    if weight.is_cpu:
        high = max(1, min(rows, ROWS, HELD // row_bytes))
        many = max(1, min(ROWS // high, HELD // (high * row_bytes)))
        chunk, block = CHUNK, BLOCK
    else:
        share = max(row_bytes / (5 * CHUNK * 8), 0.25)
        high, many = -(-rows // max(1, round(1 / share))), groups
        chunk, block = CHUNK * max(1, min(DEVICE_CHUNK // CHUNK, int(share))), DEVICE_BLOCK
    pieces = [
        (slice(group, group + many), slice(row, row + high))
        for group in range(0, groups, many)
        for row in range(0, rows, high)
    ]
    return pieces, chunk, block


def _transpose_into(matrix: Tensor, target: Tensor | None = None) -> Tensor:
    """Copy ``matrix.mT`` into ``target``, or into new memory. torch has a fast copy for a
    transposed matrix of the same dtype."""
    target = matrix.new_empty(matrix.mT.shape) if target is None else target
    if len(matrix) == 1:
        target[0].copy_(matrix[0].T)
    else:
        target.copy_(matrix.mT)
    return target


#: (positions, values [g, count, rows], buffer, mid, half): fill ``mid`` and ``half`` with the cells
#: of the values; the buffer may be overwritten
_Cells = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _cells(dtype: torch.dtype, grid: Grid | None, piece: tuple[slice, slice]) -> _Cells:
    if grid is None:
        return lambda _, value, free, mid, half: neighbours(value, dtype, free, mid, half)
    # [g · in, rows], as ``_Rows.stored``
    columns_grid = grid.map_tensors(lambda tensor: _transpose_into(tensor[piece]).flatten(0, 1))

    def cells(positions: Tensor, value: Tensor, _: Tensor, mid: Tensor, half: Tensor) -> None:
        columns_grid.map_tensors(
            lambda tensor: tensor.index_select(0, positions).view(value.shape)
        ).cells(value, mid, half)

    return cells


class _Rows:
    """Error feedback on some rows of some groups, column after column in ``order``: the longest
    columns of F first, so that the last columns can correct the residual finely."""

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
        # [g · in, rows]: the columns of each group below those of the previous group
        self.stored = columns_first.view(-1, self.rows)
        self.order = order + self.columns * torch.arange(self.groups, device=order.device)[:, None]
        self.plain = PLAIN * F.square().sum() / (self.groups * self.columns)
        self.residual = F.new_zeros(self.groups, F.shape[1], self.rows)
        width = min(chunk, self.columns)
        self.lower = F.new_ones(width, width).tril(-1).neg_()
        self.buffers = F.new_empty(4 if gain is None else 5, self.groups, width, self.rows).unbind()
        # [g, 1, rows], one a column
        self.slopes, self.mids, self.halves, *self.changes = (
            buffer.unsqueeze(2).unbind(1) for buffer in self.buffers[1:]
        )

    def run(self) -> float:
        starts = range(0, self.columns, self.chunk)
        chunks = [slice(start, min(start + self.chunk, self.columns)) for start in starts]
        if self.gain is not None:
            size = sum(self._exact(columns)[1].square().sum(1, keepdim=True) for columns in chunks)
            self.size = torch.as_tensor(size).sqrt()  # [g, 1, rows]
            self.overlap = torch.zeros_like(self.size)
        for columns in chunks:
            self._chunk(columns)
        if self.gain is not None:
            return float((self.overlap * self.size).sum())
        rank = min(self.A.shape[1:])
        image = (self.F[:, :rank] @ self.A.mT).mT @ self.residual[:, :rank]  # A Eᵀ
        return float((self.B * image).sum())

    def _column_index(self, columns: slice) -> Tensor:
        return self.order[:, columns].reshape(-1)

    def _exact(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Return V, and V - W if there is a gain, each [g, count, rows]."""
        value, *_, change = (buffer[:, : columns.stop - columns.start] for buffer in self.buffers)
        value.copy_(self.stored.index_select(0, self._column_index(columns)).view(value.shape))
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
        slope, mid, half = (buffer[:, :count] for buffer in self.buffers[1:4])
        F = self.F[:, :, columns]
        self.cells(self._column_index(columns), value, slope, mid, half)
        coupling = F.mT @ F
        torch.mul(mid, coupling.diagonal(dim1=1, dim2=2)[:, :, None] + self.plain, out=slope)
        if self.gain is not None:
            change /= self.size + (self.size == 0)
            slope += mid * change.square()
        coupling *= self.lower[:count, :count]
        # as if all values were rounded to the middle of their cells
        slope.baddbmm_(F.mT, self.residual).baddbmm_(coupling, mid, alpha=-1)
        for first in range(0, count, self.block):
            last = min(first + self.block, count)
            self._block(first, coupling[:, first:last, first:last, None], slope[:, first:last])
            if last < count:
                slope[:, last:].baddbmm_(coupling[:, last:, first:last], half[:, first:last])
        error = mid.sub_(half)
        self.residual.baddbmm_(F, error)
        self.stored.index_copy_(
            0,
            self._column_index(columns),
            value.add_(error).to(self.stored.dtype).reshape(-1, self.rows),
        )

    def _block(self, first: int, coupling: Tensor, slope: Tensor) -> None:
        """Round a few columns one after the other: give ``halves`` the sign with which
        e = mid - half."""
        for column, factor in enumerate(coupling.unbind(2), first):
            half = self.halves[column]
            if self.gain is not None:
                self.slopes[column].addcmul_(self.changes[0][column], self.overlap)
            torch.copysign(half, self.slopes[column], out=half)
            slope.addcmul_(factor, half)
            if self.gain is not None:
                self.overlap.addcmul_(self.changes[0][column], self.mids[column] - half)


def neighbours(value: Tensor, dtype: torch.dtype, step: Tensor, mid: Tensor, half: Tensor) -> None:
    """Compute the cell of the dtype's grid that contains each float64 ``value``.

    ``half`` gets half of its width (with either sign), ``mid`` its middle minus the value; both are
    0 for a value on the grid. Values are clamped to finite numbers. ``step`` is overwritten."""
    digits, smallest = GRID[dtype]
    largest = torch.finfo(dtype).max
    value.clamp_(-largest, largest)
    torch.bitwise_and(value.view(torch.int64), EXPONENT, out=step.view(torch.int64))
    step.clamp_(min=2.0**smallest).mul_(2.0**-digits)
    torch.div(value, step, out=mid).frac_()
    torch.sign(mid, out=half).mul_(step).mul_(0.5)
    torch.addcmul(half, mid, step, value=-1, out=mid)
