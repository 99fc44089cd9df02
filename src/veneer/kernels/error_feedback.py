"""Round a weight so that its rounding errors cancel in chosen directions: those in which the
adapter reads its input, or writes its output.

    V = gain ⊙ (W + ΔW), exact      W': each element is one of V's two neighbours in a 16-bit dtype,
                                    or on the grid of a quantised weight
    E = W' - V
    minimise  ‖E Fᵀ‖² + λ ‖E‖²      F [k, in]: the k directions to protect, for example A's rows

Rounding to nearest loses a ΔW that is small compared with the distance between two neighbours, and
the error E is then mainly a fraction of -ΔW. But the adapter adds B (A x) to the output, so the
error matters mainly for inputs x along the rows of A: only the k values of E Fᵀ in each row must be
small. A row has many more elements than k, and each can be rounded up or down. The columns are
therefore rounded one after the other, and each element up or down, whichever leaves the smaller
residual R = E Fᵀ of its row. This is error feedback, as in sigma-delta converters. (GPTQ, Frantar
et al. 2022, arXiv:2210.17323, instead corrects an error by changing the following columns and
rounds these to nearest, which would lose corrections as small as ΔW.) λ is the weight of ‖E‖², so
that a slightly smaller residual does not cost a large error.

    e = mid - copysign(half, t)     t = fᵀ R + mid (‖f‖² + λ)
    e: the error of an element      f: the column of F for the element's column
    mid ± half: the two neighbours of V, minus V: the two possible errors

Rows are independent, so a column is rounded by vector operations over all rows. Columns are
processed in chunks, and a chunk in blocks. The Gram matrix FᵀF of a chunk updates the residuals, so
that most of the work is matrix products. All arithmetic is float64, so that V's neighbours are
exact. Another order of summation (another machine or number of threads) changes about one choice in
10¹².

For inputs orthogonal to A's rows, the error of the output is 1.6 times as large as with rounding to
nearest at ‖ΔW‖ = 10⁻³ ‖W‖ (three times at 10⁻⁴), and three quarters as large as with stochastic
rounding (``benchmarks/results/before/merge_fidelity.json``). Protecting B's columns instead of A's
rows (the transposed problem) is no better on a real model, so it is used only for embeddings, whose
inputs are indices without directions. F from measured inputs (``directions_to_protect``) gives by
far the best result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.kernels.grid import Grid
from veneer.kernels.threads import map_on_threads, threads_for
from veneer.lowrank import LowRank

#: on a CPU, the columns of a chunk and of a block. Matrix products update the residuals of the
#: later blocks of a chunk; within a block, they are updated after each column
CHUNK, BLOCK = 32, 8
#: the most columns of a chunk and of a block on a GPU, where each column takes two launches, and
#: each chunk some twenty more
DEVICE_CHUNK, DEVICE_BLOCK = 128, 32
#: the most rows, and the most bytes of a weight, that a thread rounds at once
ROWS, ROW_BYTES = 1 << 11, 1 << 23
#: the most threads that round a weight
MAX_THREADS = 2
#: how many directions of measured inputs are protected, and the number of subspace iterations that
#: compute them, each of which adds about half a decimal digit of precision
INPUT_DIRECTIONS, ITERATIONS = 16, 6
#: λ (the weight of ‖E‖²), divided by the mean squared norm of a column of F
RELATIVE_LAMBDA = 0.05
#: a mask of the bits of a float64 that hold its exponent
EXPONENT_BITS = 0x7FF0000000000000


def basis(A: Float[Tensor, "g r in_"], relative_cutoff: float = 1e-10) -> Float[Tensor, "g k in_"]:
    """An orthonormal basis of the space that the rows of A (float64) span, as the rows of the
    result. If the rank of A is below r, the last rows are zero. Singular values of A up to
    ``relative_cutoff`` times the largest count as zero."""
    Q, upper = torch.linalg.qr(A.mT)  # [g, in, k], [g, k, r]
    vectors, singular_values, _ = torch.linalg.svd(upper, full_matrices=False)
    is_spanned = singular_values > relative_cutoff * singular_values[:, :1]
    return (Q @ (vectors * is_spanned[:, None])).mT


def directions_to_protect(
    A: Float[Tensor, "g r in_"], inputs: Float[Tensor, "g in_ in_"] | None
) -> Float[Tensor, "g k in_"]:
    """F [g, k, in], the directions in which the rounding errors of a weight should cancel: an
    orthonormal basis of A's rows, and, if ``inputs`` is not None, the ``INPUT_DIRECTIONS`` leading
    eigenvectors of ``inputs``. Each eigenvector is scaled by the square root of its eigenvalue,
    relative to the largest.

    Args:
        inputs: Σ xᵀx over measured inputs x of the layer.
    """
    basis_of_A = basis(A)
    if inputs is None:
        return basis_of_A
    moment = inputs.double()
    columns_by_energy = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    largest_columns = columns_by_energy[:, :INPUT_DIRECTIONS]
    vectors = moment.gather(2, largest_columns[:, None].expand(-1, moment.shape[1], -1))
    for _ in range(ITERATIONS):
        vectors = moment @ torch.linalg.qr(vectors)[0]
    vectors = torch.linalg.qr(vectors)[0]
    variances, rotation = torch.linalg.eigh(vectors.mT @ moment @ vectors)
    direction_scales = (variances / variances[:, -1:].clamp_min(1e-300)).clamp(0, 1).sqrt()
    return torch.cat([basis_of_A, ((vectors @ rotation) * direction_scales[:, None]).mT], 1)


def round_with_feedback(
    weight: Float[Tensor, "g out in_"],
    low: LowRank,
    gain: Tensor | None,
    protected_directions: Float[Tensor, "g k in_"],
    out: Float[Tensor, "g out in_"],
    grid: Grid | None = None,
) -> float:
    """Fill ``out`` with V = ``gain ⊙ (weight + ΔW)``, rounded by error feedback: each element to
    one of its two neighbours, so that the rounding errors of a row cancel in the protected
    directions (see the docstring of this file). All elements must round to finite numbers. g is the
    number of matrices in the weight, 1 for a linear layer.

    Args:
        low: the factors of ΔW, in float64.
        gain: [g, out, 1] or [g, 1, in] in float64, or None. With a gain, the change V - W of a row
            is not spanned by A's rows alone, so V - W is protected as one more direction.
        protected_directions: F, from ``directions_to_protect``, in float64.
        grid: the grid of a quantised weight, whose numbers ``out`` gets. If None, ``out`` gets
            numbers of its 16-bit dtype.

    Returns:
        ⟨V - W, E⟩ for the rounding error E = out - V.
    """
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, weight.shape[1], -1)
    wide_dtype = torch.promote_types(weight.dtype, out.dtype)
    pieces, columns_in_chunk, columns_in_block = _row_pieces(weight, wide_dtype)

    def round_piece(piece: tuple[slice, slice], _: None) -> float:
        groups, rows = piece
        # [g, k, in], [g, r, in], [g, r, out]
        F, A, B = protected_directions[groups], low.A[groups], (low.B[groups] * low.scale).mT
        column_order = F.square().sum(1).argsort(dim=1, descending=True, stable=True)  # [g, in]
        F, A = (tensor.gather(2, column_order[:, None].expand_as(tensor)) for tensor in (F, A))
        weight_columns = _transpose_into(weight[piece]).to(wide_dtype)  # [g, in, rows]
        ordered_gain = gain
        # a gain of rows becomes [g, 1, out]; a gain of columns [g, in, 1], in the order of columns
        if gain is not None:
            ordered_gain = (
                gain[groups, rows].mT
                if gain.shape[2] == 1
                else gain[groups].mT.gather(1, column_order[:, :, None])
            )
        find_neighbours_of_columns = _neighbour_finder(out.dtype, grid, piece)
        change_times_error = _RowRounder(
            weight_columns,
            column_order,
            F,
            A,
            B[:, :, rows],
            ordered_gain,
            find_neighbours_of_columns,
            columns_in_chunk,
            columns_in_block,
        ).run()
        _transpose_into(weight_columns.to(out.dtype), out[piece])
        return change_times_error

    threads = threads_for(weight, MAX_THREADS)
    return sum(map_on_threads(pieces, lambda: None, round_piece, threads))


def _row_pieces(
    weight: Tensor, wide_dtype: torch.dtype
) -> tuple[list[tuple[slice, slice]], int, int]:
    """Divide a weight [g, out, in] into pieces that are rounded at once.

    Returns the pieces, each a slice of groups and a slice of rows, and the numbers of columns in a
    chunk and in a block. On a CPU, a piece fits into the cache. On a GPU, pieces are larger, so
    that the number of launches does not depend on the number of rows; the buffers of a piece are
    then about as large as the weight. ``wide_dtype`` is the dtype in which a piece is held."""
    groups, rows, columns = weight.shape
    row_bytes = columns * wide_dtype.itemsize
    if weight.is_cpu:
        row_count = max(1, min(rows, ROWS, ROW_BYTES // row_bytes))
        group_count = max(1, min(ROWS // row_count, ROW_BYTES // (row_count * row_bytes)))
        columns_in_chunk, columns_in_block = CHUNK, BLOCK
    else:
        buffer_ratio = max(row_bytes / (5 * CHUNK * 8), 0.25)
        row_count, group_count = -(-rows // max(1, round(1 / buffer_ratio))), groups
        columns_in_chunk, columns_in_block = (
            CHUNK * max(1, min(DEVICE_CHUNK // CHUNK, int(buffer_ratio))),
            DEVICE_BLOCK,
        )
    pieces = [
        (slice(group, group + group_count), slice(row, row + row_count))
        for group in range(0, groups, group_count)
        for row in range(0, rows, row_count)
    ]
    return pieces, columns_in_chunk, columns_in_block


def _transpose_into(matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy ``matrix.mT`` of ``matrix`` [g, m, n] into ``out`` [g, n, m], or into a new tensor if
    ``out`` is None, and return it. A single group is copied as a matrix, for which torch has a fast
    transposing copy."""
    out = matrix.new_empty(matrix.mT.shape) if out is None else out
    if len(matrix) == 1:
        out[0].copy_(matrix[0].T)
    else:
        out.copy_(matrix.mT)
    return out


#: a function of (flat column indices, values [g, count, rows], buffer, mid, half) that fills
#: ``mid`` and ``half`` as ``find_neighbours`` does, and may overwrite the buffer
_FindNeighbours = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _neighbour_finder(
    dtype: torch.dtype, grid: Grid | None, piece: tuple[slice, slice]
) -> _FindNeighbours:
    """The function that finds the two numbers next to each value to which it may be rounded: on
    ``grid`` in the rows and groups of ``piece``, or in the 16-bit ``dtype`` if ``grid`` is None."""
    if grid is None:
        return lambda _, values, buffer, mid, half: find_neighbours(
            values, dtype, buffer, mid, half
        )
    # transposed to [g · in, rows], the layout of ``_RowRounder.weight``, so that a column is a row
    columns_grid = grid.map_tensors(lambda tensor: _transpose_into(tensor[piece]).flatten(0, 1))

    def find_neighbours_of_columns(
        column_indices: Tensor, values: Tensor, _: Tensor, mid: Tensor, half: Tensor
    ) -> None:
        columns_grid.map_tensors(
            lambda tensor: tensor.index_select(0, column_indices).view(values.shape)
        ).find_neighbours(values, mid, half)

    return find_neighbours_of_columns


class _RowRounder:
    """Rounds V = gain ⊙ (W + B A) for some rows of some groups by error feedback, column after
    column in ``column_order``. The columns of F (the directions in which the errors E should
    cancel) with the largest norms come first, so that the last columns can correct the residual
    finely.

    Fields:
        weight: [g · in, rows], W before ``run`` and the rounded V afterwards. A row of this tensor
            is a column of W.
        residual: R = E Fᵀ of the columns that are rounded already, [g, k, rows].
        change_norm: ‖V - W‖ of each row, [g, 1, rows]. Only with a gain.
        change_error: for each row, ⟨V - W, E⟩ / ‖V - W‖, [g, 1, rows]. Only with a gain.
        mids, halves, slopes: one view [g, 1, rows] of the buffers for each column of a chunk. The
            error of an element is mid - half or mid + half. Its slope t, half the derivative of the
            objective at error mid, decides which: half gets the sign of t, and the error becomes
            mid - half.
        changes: with a gain, one such view for each column of a chunk: V - W, divided by
            ``change_norm``.
    """

    def __init__(
        self,
        weight_columns: Tensor,
        column_order: Tensor,
        F: Tensor,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        find_neighbours_of_columns: _FindNeighbours,
        columns_in_chunk: int,
        columns_in_block: int,
    ) -> None:
        self.F, self.A, self.B, self.gain, self.find_neighbours_of_columns = (
            F,
            A,
            B,
            gain,
            find_neighbours_of_columns,
        )
        self.columns_in_chunk, self.columns_in_block = columns_in_chunk, columns_in_block
        self.group_count, self.column_count, self.row_count = weight_columns.shape
        # as rows of one matrix: the columns of a group follow those of the previous group
        self.weight = weight_columns.view(-1, self.row_count)
        self.column_order = (
            column_order
            + self.column_count
            * torch.arange(self.group_count, device=column_order.device)[:, None]
        )
        self.penalty = (
            RELATIVE_LAMBDA * F.square().sum() / (self.group_count * self.column_count)
        )  # λ of the objective
        self.residual = F.new_zeros(self.group_count, F.shape[1], self.row_count)
        chunk_width = min(columns_in_chunk, self.column_count)
        self.minus_lower = F.new_ones(chunk_width, chunk_width).tril(-1).neg_()
        self.buffers = F.new_empty(
            4 if gain is None else 5, self.group_count, chunk_width, self.row_count
        ).unbind()
        self.slopes, self.mids, self.halves, *self.changes = (
            buffer.unsqueeze(2).unbind(1) for buffer in self.buffers[1:]
        )

    def run(self) -> float:
        """Round all columns of ``weight`` in place. Returns ⟨V - W, E⟩, the inner product of the
        exact change (V = gain ⊙ (W + B A)) with the rounding errors E."""
        starts = range(0, self.column_count, self.columns_in_chunk)
        chunks = [
            slice(start, min(start + self.columns_in_chunk, self.column_count)) for start in starts
        ]
        if self.gain is not None:
            squares = (self._exact_values(columns)[1].square() for columns in chunks)
            squared_norm = sum(square.sum(1, keepdim=True) for square in squares)
            self.change_norm = torch.as_tensor(squared_norm).sqrt()
            self.change_error = torch.zeros_like(self.change_norm)
        for columns in chunks:
            self._round_chunk(columns)
        if self.gain is not None:
            return float((self.change_error * self.change_norm).sum())
        rank = min(self.A.shape[1:])
        A_times_error = (self.F[:, :rank] @ self.A.mT).mT @ self.residual[:, :rank]  # A Eᵀ
        return float((self.B * A_times_error).sum())

    def _column_index(self, columns: slice) -> Tensor:
        """The indices of the rows of ``weight`` that hold these columns of ``column_order``."""
        return self.column_order[:, columns].reshape(-1)

    def _exact_values(self, columns: slice) -> tuple[Tensor, Tensor]:
        """(V, V - W) for these columns, each a view [g, count, rows] of the buffers. Without a
        gain, the second is not set."""
        values, *_, change = (buffer[:, : columns.stop - columns.start] for buffer in self.buffers)
        values.copy_(self.weight.index_select(0, self._column_index(columns)).view(values.shape))
        if self.gain is not None:
            change.copy_(values)
        values.baddbmm_(self.A[:, :, columns].mT, self.B)
        if self.gain is not None:
            values *= self.gain if self.gain.shape[1] == 1 else self.gain[:, columns]
            torch.sub(values, change, out=change)
        return values, change

    def _round_chunk(self, columns: slice) -> None:
        count = columns.stop - columns.start
        values, change = self._exact_values(columns)
        slope, mid, half = (buffer[:, :count] for buffer in self.buffers[1:4])
        F = self.F[:, :, columns]
        self.find_neighbours_of_columns(self._column_index(columns), values, slope, mid, half)
        coupling = F.mT @ F
        torch.mul(mid, coupling.diagonal(dim1=1, dim2=2)[:, :, None] + self.penalty, out=slope)
        if self.gain is not None:
            change /= self.change_norm + (self.change_norm == 0)
            slope += mid * change.square()
        coupling *= self.minus_lower[:count, :count]
        # the slope t, with R as if the error of all elements of the chunk were mid
        slope.baddbmm_(F.mT, self.residual).baddbmm_(coupling, mid, alpha=-1)
        for start in range(0, count, self.columns_in_block):
            end = min(start + self.columns_in_block, count)
            self._round_block(start, coupling[:, start:end, start:end, None], slope[:, start:end])
            if end < count:
                slope[:, end:].baddbmm_(coupling[:, end:, start:end], half[:, start:end])
        chunk_error = mid.sub_(half)
        self.residual.baddbmm_(F, chunk_error)
        self.weight.index_copy_(
            0,
            self._column_index(columns),
            values.add_(chunk_error).to(self.weight.dtype).reshape(-1, self.row_count),
        )

    def _round_block(self, first: int, coupling: Tensor, slope: Tensor) -> None:
        """Round the columns of a block one after the other: give each element of ``halves`` the
        sign with which mid - half is the chosen error, and update the slopes of later columns.

        Args:
            first: the block's first column in the chunk.
            coupling: [g, b, b, 1] for the b columns of the block: -⟨f, f'⟩ for the columns f and f'
                of F that belong to a later and an earlier column of the block, else 0.
            slope: [g, b, rows], the slopes of the block's elements, updated in place.
        """
        for column, factor in enumerate(coupling.unbind(2), first):
            half = self.halves[column]
            if self.gain is not None:
                self.slopes[column].addcmul_(self.changes[0][column], self.change_error)
            torch.copysign(half, self.slopes[column], out=half)
            slope.addcmul_(factor, half)
            if self.gain is not None:
                self.change_error.addcmul_(self.changes[0][column], self.mids[column] - half)


def find_neighbours(
    values: Tensor, dtype: torch.dtype, step: Tensor, mid: Tensor, half: Tensor
) -> None:
    """Find the two numbers of a 16-bit ``dtype`` next to each of the float64 ``values``.

    Writes half of their signed difference to ``half``, and their mean minus the value to ``mid``;
    both are 0 for a value that ``dtype`` can represent. ``values`` are clamped in place to finite
    numbers of ``dtype``. ``step`` is a buffer, which is overwritten."""
    dtype_info = torch.finfo(dtype)
    values.clamp_(-dtype_info.max, dtype_info.max)
    torch.bitwise_and(values.view(torch.int64), EXPONENT_BITS, out=step.view(torch.int64))
    step.clamp_(min=dtype_info.smallest_normal).mul_(dtype_info.eps)
    torch.div(values, step, out=mid).frac_()
    torch.sign(mid, out=half).mul_(step).mul_(0.5)
    torch.addcmul(half, mid, step, value=-1, out=mid)
