"""Round a weight so that rounding errors cancel in chosen directions: where the adapter reads its
input, or where it writes its output.

    V = gain ⊙ (W + ΔW), exact      W': each element is one of V's two neighbours in a 16-bit dtype,
                                    or on the grid of a quantised weight
    E = W' - V
    minimise  ‖E Fᵀ‖² + λ ‖E‖²      F [k, in]: the k directions to protect, for example A's rows

Rounding to nearest loses a change that is small compared with the distance of two neighbours, and
the loss is mainly a fraction of ΔW itself. But the adapter adds B (A x). So of a row's errors only
the k values of E Fᵀ matter, and the row has many more elements than k, each of which can be rounded
in two ways. The columns are therefore rounded one after the other, and each element up or down,
whichever leaves the smaller residual R = E Fᵀ of its row. This is error feedback, as in sigma-delta
converters. (GPTQ, Frantar et al. 2022, arXiv:2210.17323, instead corrects an error by changing the
following columns and rounds these to nearest. Small corrections would be lost there, as ΔW is.) λ
is the weight of the error itself, so that a slightly smaller residual does not cost a large error.

    e = mid - copysign(half, t)     t = fᵀ R + mid (‖f‖² + λ)
    e: the error of an element      f: the column of F that belongs to the element's column
    mid ± half: the two neighbours, minus V

Rows are independent, so one column is a vector operation over all rows. Columns are processed in
chunks, and a chunk in blocks. The Gram matrix FᵀF of a chunk updates the residuals, so that most of
the work is matrix products. All arithmetic is float64, so that V's neighbours are exact. Another
order of summation (another machine or number of threads) changes about one choice in 10¹².

Inputs outside of the span of A's rows get an error 1.6 times as large as with rounding to nearest,
at ‖ΔW‖ = 10⁻³ ‖W‖ (three times at 10⁻⁴), and three quarters as large as with stochastic rounding
(``benchmarks/results/before/merge_fidelity.json``). Protecting B's columns in place of A's rows
(the transposed problem) is no better on a real model, so it serves only embeddings, whose inputs
are indices without directions. F from measured inputs (``directions``) gives by far the best
result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.kernels.grid import Grid
from veneer.kernels.threads import map_on_threads, threads_for
from veneer.lowrank import LowRank

#: columns of a chunk and of a block. Products update the residuals of all later blocks of a chunk,
#: sums update them within a block
CHUNK, BLOCK = 32, 8
#: the most columns of a chunk and of a block on a GPU, where each column takes two launches, and
#: each chunk some twenty more
DEVICE_CHUNK, DEVICE_BLOCK = 128, 32
#: for each thread: the most rows, and the most bytes of a weight, that are rounded at once
ROWS, ROW_BYTES = 1 << 11, 1 << 23
#: the most threads
MAX_THREADS = 2
#: how many directions of measured inputs are protected, and the number of subspace iterations that
#: compute them, each of which gives about half a decimal digit
INPUT_DIRECTIONS, ITERATIONS = 16, 6
#: λ, in units of the mean squared length of a column of F
RELATIVE_LAMBDA = 0.05
#: the bits of a float64 that hold its exponent
EXPONENT_BITS = 0x7FF0000000000000


def basis(A: Float[Tensor, "g r in_"], relative_cutoff: float = 1e-10) -> Float[Tensor, "g k in_"]:
    """Orthonormal rows, in float64, with the span of A's rows. If the rank of A is below r, the
    last rows are zero."""
    Q, upper = torch.linalg.qr(A.mT)  # [g, in, k], [g, k, r]
    vectors, singular_values, _ = torch.linalg.svd(upper, full_matrices=False)
    is_spanned = singular_values > relative_cutoff * singular_values[:, :1]
    return (Q @ (vectors * is_spanned[:, None])).mT


def directions(
    A: Float[Tensor, "g r in_"], inputs: Float[Tensor, "g in_ in_"] | None
) -> Float[Tensor, "g k in_"]:
    """F: an orthonormal basis of A's rows, followed by the directions in which inputs vary most, if
    ``inputs`` (Σ xᵀx over them) is not None. These are scaled by their standard deviation, relative
    to the largest."""
    basis_of_A = basis(A)
    if inputs is None:
        return basis_of_A
    moment = inputs.double()
    order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    largest_inputs = order[:, :INPUT_DIRECTIONS]
    vectors = moment.gather(2, largest_inputs[:, None].expand(-1, moment.shape[1], -1))
    for _ in range(ITERATIONS):
        vectors = moment @ torch.linalg.qr(vectors)[0]
    vectors = torch.linalg.qr(vectors)[0]
    variances, rotation = torch.linalg.eigh(vectors.mT @ moment @ vectors)
    weights = (variances / variances[:, -1:].clamp_min(1e-300)).clamp(0, 1).sqrt()
    return torch.cat([basis_of_A, ((vectors @ rotation) * weights[:, None]).mT], 1)


def faithful(
    weight: Float[Tensor, "g out in_"],
    low: LowRank,
    gain: Tensor | None,
    protect: Float[Tensor, "g k in_"],
    out: Float[Tensor, "g out in_"],
    grid: Grid | None = None,
) -> float:
    """Fill ``out`` with ``gain ⊙ (weight + ΔW)``, rounded by error feedback as the docstring of
    this file describes. All elements must round to finite numbers. g: matrices in the weight, 1 for
    a linear layer.

    Args:
        low: ΔW's factors in float64.
        gain: [g, out, 1] or [g, 1, in] in float64. With a gain, the change V - W of a row also has
            a part outside of the span of A's rows. V - W is then protected as one more direction.
        protect: F of the module's docstring, in float64.
        grid: the grid of a quantised weight of this shape: ``out`` gets numbers of this grid. If
            None, it gets numbers of its 16-bit dtype.

    Returns:
        ⟨ΔW, E⟩, where ΔW is the complete change, including the gain.
    """
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, weight.shape[1], -1)
    wide_dtype = torch.promote_types(weight.dtype, out.dtype)
    pieces, chunk, block = _row_pieces(weight, wide_dtype)

    def round_piece(piece: tuple[slice, slice], _: None) -> float:
        groups, rows = piece
        # [g, k, in], [g, r, in], [g, r, out]
        F, A, B = protect[groups], low.A[groups], (low.B[groups] * low.scale).mT
        order = F.square().sum(1).argsort(dim=1, descending=True, stable=True)  # [g, in]
        F, A = (tensor.gather(2, order[:, None].expand_as(tensor)) for tensor in (F, A))
        weight_columns = _transpose_into(weight[piece]).to(wide_dtype)  # [g, in, rows]
        ordered_gain = gain
        # a gain for each row as [g, 1, out], for each column as [g, in, 1] in the columns' order
        if gain is not None:
            ordered_gain = (
                gain[groups, rows].mT
                if gain.shape[2] == 1
                else gain[groups].mT.gather(1, order[:, :, None])
            )
        find_in_columns = _neighbour_finder(out.dtype, grid, piece)
        change_times_error = _Rows(
            weight_columns, order, F, A, B[:, :, rows], ordered_gain, find_in_columns, chunk, block
        ).run()
        _transpose_into(weight_columns.to(out.dtype), out[piece])
        return change_times_error

    threads = threads_for(weight, MAX_THREADS)
    return sum(map_on_threads(pieces, lambda: None, round_piece, threads))


def _row_pieces(
    weight: Tensor, wide_dtype: torch.dtype
) -> tuple[list[tuple[slice, slice]], int, int]:
    """Divide a weight [g, out, in] into pieces of groups and rows.

    Returns the pieces, and the numbers of columns in a chunk and in a block. On a CPU, a piece fits
    into the cache. On a GPU, pieces are larger, so that the number of launches does not depend on
    the number of rows; the buffers are then about as large as the weight."""
    groups, rows, columns = weight.shape
    row_bytes = columns * wide_dtype.itemsize
    if weight.is_cpu:
        row_count = max(1, min(rows, ROWS, ROW_BYTES // row_bytes))
        group_count = max(1, min(ROWS // row_count, ROW_BYTES // (row_count * row_bytes)))
        chunk, block = CHUNK, BLOCK
    else:
        buffer_ratio = max(row_bytes / (5 * CHUNK * 8), 0.25)
        row_count, group_count = -(-rows // max(1, round(1 / buffer_ratio))), groups
        chunk, block = CHUNK * max(1, min(DEVICE_CHUNK // CHUNK, int(buffer_ratio))), DEVICE_BLOCK
    pieces = [
        (slice(group, group + group_count), slice(row, row + row_count))
        for group in range(0, groups, group_count)
        for row in range(0, rows, row_count)
    ]
    return pieces, chunk, block


def _transpose_into(matrix: Tensor, target: Tensor | None = None) -> Tensor:
    """Copy ``matrix.mT`` into ``target``, or into new memory if that is None. A single group is
    copied as a matrix, for which torch has a fast transposing copy."""
    target = matrix.new_empty(matrix.mT.shape) if target is None else target
    if len(matrix) == 1:
        target[0].copy_(matrix[0].T)
    else:
        target.copy_(matrix.mT)
    return target


#: (flat column indices, values [g, count, rows], buffer, mid, half): for each value, fill ``mid``
#: and ``half`` as ``find_neighbours`` does. The buffer may be overwritten
_FindNeighbours = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _neighbour_finder(
    dtype: torch.dtype, grid: Grid | None, piece: tuple[slice, slice]
) -> _FindNeighbours:
    """The function that finds the neighbours of values, on a grid or in a 16-bit dtype."""
    if grid is None:
        return lambda _, values, buffer, mid, half: find_neighbours(
            values, dtype, buffer, mid, half
        )
    # transposed to [g · in, rows], the layout of ``_Rows.weight``, so that a column is a row
    columns_grid = grid.map_tensors(lambda tensor: _transpose_into(tensor[piece]).flatten(0, 1))

    def find_in_columns(
        columns: Tensor, values: Tensor, _: Tensor, mid: Tensor, half: Tensor
    ) -> None:
        columns_grid.map_tensors(
            lambda tensor: tensor.index_select(0, columns).view(values.shape)
        ).find_neighbours(values, mid, half)

    return find_in_columns


class _Rows:
    """Error feedback on some rows of some groups, column after column in ``order``. The columns of
    F with the largest norms come first, so that the last columns can correct the residual finely.

    Fields:
        weight: [g · in, rows], W before ``run`` and W' afterwards. A row of this tensor is a column
            of W.
        residual: R = E Fᵀ, [g, k, rows].
        change_norm: ‖V - W‖ of each row, [g, 1, rows]. Only with a gain.
        change_error: for each row, the product of E with the unit vector in the direction of V - W,
            [g, 1, rows]. Only with a gain.
        mids, halves, slopes: for each column of a chunk, a view of the buffers, [g, 1, rows]: mid,
            half and t of the equation.
        changes: with a gain, one more such list of views: V - W, divided by ``change_norm``.
    """

    def __init__(
        self,
        weight_columns: Tensor,
        order: Tensor,
        F: Tensor,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        find_in_columns: _FindNeighbours,
        chunk: int,
        block: int,
    ) -> None:
        self.F, self.A, self.B, self.gain, self.find_in_columns = F, A, B, gain, find_in_columns
        self.chunk, self.block = chunk, block
        self.groups, self.columns, self.rows = weight_columns.shape
        # the columns of one group come after the columns of the previous group
        self.weight = weight_columns.view(-1, self.rows)
        self.order = order + self.columns * torch.arange(self.groups, device=order.device)[:, None]
        self.penalty = RELATIVE_LAMBDA * F.square().sum() / (self.groups * self.columns)  # λ
        self.residual = F.new_zeros(self.groups, F.shape[1], self.rows)
        size = min(chunk, self.columns)
        self.minus_lower = F.new_ones(size, size).tril(-1).neg_()
        self.buffers = F.new_empty(4 if gain is None else 5, self.groups, size, self.rows).unbind()
        self.slopes, self.mids, self.halves, *self.changes = (
            buffer.unsqueeze(2).unbind(1) for buffer in self.buffers[1:]
        )

    def run(self) -> float:
        """Round all columns. Returns ⟨V - W, E⟩."""
        starts = range(0, self.columns, self.chunk)
        chunks = [slice(start, min(start + self.chunk, self.columns)) for start in starts]
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
        """Indices of these columns of ``order`` in ``weight``."""
        return self.order[:, columns].reshape(-1)

    def _exact_values(self, columns: slice) -> tuple[Tensor, Tensor]:
        """V, and V - W if there is a gain, each [g, count, rows]."""
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
        self.find_in_columns(self._column_index(columns), values, slope, mid, half)
        coupling = F.mT @ F
        torch.mul(mid, coupling.diagonal(dim1=1, dim2=2)[:, :, None] + self.penalty, out=slope)
        if self.gain is not None:
            change /= self.change_norm + (self.change_norm == 0)
            slope += mid * change.square()
        coupling *= self.minus_lower[:count, :count]
        # t, with R as if all elements of the chunk were rounded to mid
        slope.baddbmm_(F.mT, self.residual).baddbmm_(coupling, mid, alpha=-1)
        for start in range(0, count, self.block):
            end = min(start + self.block, count)
            self._round_block(start, coupling[:, start:end, start:end, None], slope[:, start:end])
            if end < count:
                slope[:, end:].baddbmm_(coupling[:, end:, start:end], half[:, start:end])
        error = mid.sub_(half)
        self.residual.baddbmm_(F, error)
        self.weight.index_copy_(
            0,
            self._column_index(columns),
            values.add_(error).to(self.weight.dtype).reshape(-1, self.rows),
        )

    def _round_block(self, first: int, coupling: Tensor, slope: Tensor) -> None:
        """Round a few columns one after the other: set the sign of ``halves``, so that the error is
        e = mid - half."""
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
    """Find the two neighbours in a 16-bit ``dtype`` of each of the float64 ``values``.

    Writes half of their (signed) distance to ``half``, and their mean minus the value to ``mid``;
    both are 0 for a value of that dtype. Values are clamped to finite numbers. ``step`` is only a
    buffer."""
    numbers = torch.finfo(dtype)
    values.clamp_(-numbers.max, numbers.max)
    torch.bitwise_and(values.view(torch.int64), EXPONENT_BITS, out=step.view(torch.int64))
    step.clamp_(min=numbers.smallest_normal).mul_(numbers.eps)
    torch.div(values, step, out=mid).frac_()
    torch.sign(mid, out=half).mul_(step).mul_(0.5)
    torch.addcmul(half, mid, step, value=-1, out=mid)
