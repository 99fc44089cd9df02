"""Rows that are each multiplied with one matrix of a stack, and with the matrix's low-rank change:
the experts of a mixture.

    y_s = x_s W_eᵀ + scale · (x_s A_eᵀ) B_eᵀ        e: the matrix of row s
    x: [S, in]   W: [E, out, in]   A: [E, r, in]   B: [E, out, r]

As in ``fused.py``, the change is computed first and x W_eᵀ is added to it inside its own product,
so 16-bit outputs are rounded once, including the change; only x is saved. Matrices without rows
cost nothing.

On a CPU, the rows of each matrix are a segment, and each segment takes a few products; torch's
grouped product is such a loop there too. On other devices, torch's grouped products are used, which
need no synchronisation; they cannot add to an existing tensor, so 16-bit outputs are rounded twice.

Rejected: gathering A and B for each row. For a batch of training, this takes more memory than the
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import has_tiles, reference
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input
from veneer.kernels.switch import on

_C: Any = torch._C

#: alignment in bytes that torch's grouped products require of rows on a GPU
ALIGNED = 16


class Segments(NamedTuple):
    """Which rows use which matrix, known on the host.

    Fields:
        bounds: (matrix, first row, row after the last) of each matrix with rows, in the order of
            the rows.
        sizes: numbers of rows of these, and of the remaining rows without a matrix.
        rows: the number of rows with a matrix.
    """

    bounds: Sequence[tuple[int, int, int]]
    sizes: Sequence[int]
    rows: int


def segments(ends: Sequence[int], rows: int) -> Segments:
    """Segments of rows in the order of their matrices; ``ends[e]`` is the row after the last one of
    matrix e."""
    bounds, first = [], 0
    for matrix, end in enumerate(ends):
        if end > first:
            bounds.append((matrix, first, end))
            first = end
    return Segments(bounds, [end - start for _, start, end in bounds] + [rows - first], first)


def by_id(ids: Sequence[int], matrices: int) -> tuple[list[int], Segments]:
    """For rows in any order, row s with matrix ids[s]: (their order by matrix, the segments in that
    order)."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    ends = [0] * matrices
    for matrix in ids:
        ends[matrix] += 1
    for matrix in range(1, matrices):
        ends[matrix] += ends[matrix - 1]
    return order, segments(ends, len(ids))


def linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    row_segments: Segments | None,
    source: Tensor | None = None,
) -> Tensor:
    """y [S, out] in the dtype of x, zero for rows without a matrix; differentiable in x, A and B.
    On a CPU.

    Args:
        row_segments: None if all rows use one matrix; ``weight``, A and B are then that matrix's:
            [out, in], [r, in], [out, r].
        source: a tensor of which the rows of x may be copies; its rows are then saved instead of x.
    """
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _apply(scale, row_segments, source, x, weight, A, B)
    return _forward(scale, row_segments, x, weight, A, B)


def linear_on_device(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    ends: Tensor,
    product: Callable[..., Tensor],
) -> Tensor:
    """``linear`` on other devices. ``product``: the grouped product that the model uses for x and
    the stack [E, in, out]."""
    down, up = _aligned(A.to(x.dtype), 1), _aligned(B.to(x.dtype) * scale, 2)
    return product(x, weight.mT, ends) + product(product(x, down.mT, ends), up.mT, ends)


def _aligned(factor: Tensor, axis: int) -> Tensor:
    """A factor whose rank is padded to the alignment of grouped products."""
    step = ALIGNED // factor.element_size()
    missing = -factor.shape[axis] % step
    return F.pad(factor, (0, missing) if axis == 2 else (0, 0, 0, missing)) if missing else factor


def definition(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, row_segments: Segments | None
) -> Tensor:
    """The definition that ``linear`` must equal, by operations with derivatives of any order."""
    if row_segments is None:
        return reference.matmul_update(x, A.to(x.dtype), B.to(x.dtype), scale, F.linear(x, weight))
    ys = [x.new_zeros(x.shape[0] - row_segments.rows, weight.shape[1])]
    for (matrix, *_), piece in reversed(
        [*zip(row_segments.bounds, x.split_with_sizes(row_segments.sizes), strict=False)]
    ):
        ys.insert(0, definition(piece, weight[matrix], A[matrix], B[matrix], scale, None))
    return torch.cat(ys)


def _forward(
    scale: float, row_segments: Segments | None, x: Tensor, weight: Tensor, A: Tensor, B: Tensor
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[-2])
    down, up = A.to(x.dtype), B.to(x.dtype)
    for x_rows, y_rows, (expert_A, expert_B) in _pieces(row_segments, (x, y), (down, up)):
        h = x_rows @ expert_A.mT
        h *= scale
        torch.mm(h, expert_B.mT, out=y_rows)
    return _add_product(y, x, weight, row_segments)


def _pieces(
    row_segments: Segments | None, rows: tuple[Tensor, ...], stacks: tuple[Tensor, ...]
) -> Iterator[Any]:
    """For each matrix with rows: its rows of each tensor in ``rows``, and its matrix of each tensor
    in ``stacks``."""
    if row_segments is None:
        yield *rows, stacks
        return
    row_pieces = (tensor.split_with_sizes(row_segments.sizes) for tensor in rows)
    for (matrix, *_), *pieces in zip(row_segments.bounds, *row_pieces, strict=False):
        yield *pieces, [stack[matrix] for stack in stacks]


def _add_product(
    change: Tensor, x: Tensor, weight: Tensor, row_segments: Segments | None
) -> Tensor:
    """change + x W_eᵀ, in place; zero for rows without a matrix."""
    if row_segments is None and x.shape[0] > 1:
        return change.addmm_(x, weight.mT)
    vectors = change.dtype is torch.bfloat16 and weight.stride(-1) == 1 and has_tiles()
    if row_segments is None and not vectors:
        return change.addmm_(x, weight.mT)
    for rows, change_rows, (matrix,) in _pieces(row_segments, (x, change), (weight,)):
        if vectors and len(rows) == 1:
            change_rows[0].addmv_(matrix, rows[0])
        else:
            change_rows.addmm_(rows, matrix.mT)
    if row_segments is not None and row_segments.sizes[-1]:
        change[row_segments.rows :] = 0
    return change


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        row_segments: Segments | None,
        source: Tensor | None,
        x,
        weight,
        A,
        B,
    ):
        ctx.scale, ctx.row_segments = scale, row_segments
        index = _source_rows(x, source, row_segments is None)
        if index is not None:
            ctx.gate = None
            ctx.save_for_backward(source, None, None, index, weight, A, B)
        else:
            *made_of, ctx.gate = input_to_save(x, row_segments is None)
            ctx.save_for_backward(*made_of, None, weight, A, B)
        return _forward(scale, row_segments, x, weight, A, B)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # disabling autocast takes as long as a thin product, so test first
        if not _C._is_any_autocast_enabled():
            return _backward(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy)


# ``Function.apply`` makes a dozen Python calls for ``torch.func``, whose transforms never reach
# this function (see ``eager``).
_apply = cast(Any, super(torch.autograd.Function, _Grouped)).apply


def _source_rows(x: Tensor, source: Tensor | None, always: bool) -> Tensor | None:
    """The row indices with which x was gathered from ``source``, if autograd's node shows that;
    None unless ``source`` has fewer rows or ``always``."""
    node: Any = x.grad_fn
    if node is None or source is None or source.grad_fn is None or not on("saved_inputs"):
        return None
    if node.name() != "IndexBackward0" or node.next_functions[0][0] is not source.grad_fn:
        return None
    try:
        indices = node._saved_indices
    except RuntimeError:  # a backward has freed the saved tensors
        return None
    is_gather = (
        len(indices) == 1
        and indices[0] is not None
        and indices[0].dim() == 1
        and (always or len(source) < len(x))
    )
    return (
        indices[0]
        if is_gather and indices[0].dtype == torch.int64 and source.shape[1:] == x.shape[1:]
        else None
    )


def _backward(ctx: Any, dy: Tensor):
    first, second, third, index, weight, A, B = ctx.saved_tensors
    scale, row_segments = ctx.scale, ctx.row_segments
    need_x, _, need_A, need_B = ctx.needs_input_grad[3:]
    saved = SavedInput(first, second, third, ctx.gate)
    x = restore_input(saved, need_x) if index is None else first
    if torch.is_grad_enabled():
        x = x if index is None else x[index]
        return _differentiable(ctx, x, weight, A, B, dy)
    dy = dy.contiguous()
    dx, dA, dB = _thin_gradients(scale, row_segments, x, index, dy, A, B, need_x, need_A or need_B)
    if need_x:
        _add_product(dx, dy, weight.mT, row_segments)
    return None, None, None, dx, None, dA if need_A else None, dB if need_B else None


def _thin_gradients(
    scale: float,
    row_segments: Segments | None,
    x,
    index,
    dy,
    A,
    B,
    need_x: bool,
    need_factors: bool,
) -> Any:
    """(s dy B A [S, in], gradient of A, gradient of B)."""
    x = x if index is None else x[index]
    down, up = A.to(x.dtype), B.to(x.dtype)
    dx, make = torch.empty_like(x), torch.zeros_like if need_factors else torch.empty_like
    factors = make(down), make(up)
    for rows, dy_rows, dx_rows, (expert_A, expert_B, expert_dA, expert_dB) in _pieces(
        row_segments, (x, dy, dx), (down, up, *factors)
    ):
        u = dy_rows @ expert_B
        u *= scale
        if need_x:
            torch.mm(u, expert_A, out=dx_rows)
        if need_factors:
            h = rows @ expert_A.mT
            h *= scale
            expert_dA.copy_(u.mT @ rows)
            expert_dB.copy_(dy_rows.mT @ h)
    dx = dx if need_x else None
    if not need_factors:
        return dx, None, None
    dA, dB = factors
    return dx, dA.to(A.dtype), dB.to(B.dtype)


def _differentiable(ctx: Any, x, weight, A, B, dy):
    tensors = x, A, B = [tensor.view_as(tensor) for tensor in (x, A, B)]
    y = definition(x, weight, A, B, ctx.scale, ctx.row_segments)
    needs = [ctx.needs_input_grad[position] for position in (3, 5, 6)]
    differentiated = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    gradients = iter(
        torch.autograd.grad(y, differentiated, dy, create_graph=True, allow_unused=True)
    )
    dx, dA, dB = (next(gradients) if need else None for need in needs)
    return None, None, None, dx, None, dA, dB
