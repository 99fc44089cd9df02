"""Linear layers in a stack, with low-rank changes, where each row of x goes through one layer of
the stack: the experts of a mixture-of-experts model.

    y_s = x_s W_eᵀ + scale · (x_s A_eᵀ) B_eᵀ        s: a row   e: the expert of row s
    x: [S, in]   W: [E, out, in]   A: [E, r, in]   B: [E, out, r]

As in ``fused.py``, the change is computed first, and the product x W_eᵀ adds its result to the
change in place: 16-bit outputs are rounded once, including the change. Only x is saved for
backward. An expert without rows costs nothing.

On a CPU, the rows of each expert are a segment, and a few products compute one segment after
another (torch's grouped product is such a loop there too). Products with A and B are in float32: in
16 bits torch compiles a kernel for each shape, and an expert has another number of rows in each
step. On other devices, torch's grouped products are used, which need no synchronisation. They
cannot add to an existing tensor, so 16-bit outputs are rounded twice.

Rejected: gathering A and B for each row. In training, these copies take more memory than the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import has_amx, reference, without_autocast
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input
from veneer.kernels.switch import is_on
from veneer.precision import at_least_float32

#: alignment in bytes that torch's grouped products require of rows on a GPU
ALIGNMENT_BYTES = 16


class Segments(NamedTuple):
    """Which rows use which expert, as numbers on the host (not tensors).

    Fields:
        bounds: (expert, first row, row after the last) of each expert with rows, in the order of
            the rows.
        sizes: the number of rows of each expert in ``bounds``, and the number of rows without an
            expert, which come last.
        rows: the number of rows with an expert.
    """

    bounds: Sequence[tuple[int, int, int]]
    sizes: Sequence[int]
    rows: int


def segments(ends: Sequence[int], rows: int) -> Segments:
    """The segments of ``rows`` rows that are sorted by expert; ``ends[e]`` is the row after the
    last row of expert e."""
    bounds = [
        (expert, first, end)
        for expert, (first, end) in enumerate(itertools.pairwise([0, *ends]))
        if end > first
    ]
    used_rows = ends[-1] if ends else 0
    sizes = [end - first for _, first, end in bounds]
    return Segments(bounds, [*sizes, rows - used_rows], used_rows)


def sort_by_expert(ids: Sequence[int], experts: int) -> tuple[list[int], Segments]:
    """For row s with expert ids[s]: (the order that sorts the rows by expert, the segments of the
    sorted rows)."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    counts = [0] * experts
    for expert in ids:
        counts[expert] += 1
    return order, segments([*itertools.accumulate(counts)], len(ids))


def linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    row_segments: Segments | None,
    source: Tensor | None = None,
) -> Tensor:
    """y [S, out] in the dtype of x, zero for rows without an expert. Differentiable in x, A and B.
    For a CPU.

    Args:
        row_segments: None if all rows use one expert; then ``weight``, A and B are this expert's:
            [out, in], [r, in] and [out, r].
        source: a tensor whose rows x may consist of. If the autograd graph shows this, ``source``
            is saved for backward instead of x.
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
    """``linear`` on other devices. ``product`` is the grouped product that the model itself uses,
    called with rows, a stack [E, in, out] and the ``ends`` of ``segments``."""
    down, up = _aligned(A.to(x.dtype), 1), _aligned(B.to(x.dtype) * scale, 2)
    return product(x, weight.mT, ends) + product(product(x, down.mT, ends), up.mT, ends)


def _aligned(factor: Tensor, axis: int) -> Tensor:
    """A factor whose rank, on this axis, is padded with zeros to a multiple of the alignment."""
    multiple = ALIGNMENT_BYTES // factor.element_size()
    padding = -factor.shape[axis] % multiple
    return F.pad(factor, (0, padding) if axis == 2 else (0, 0, 0, padding)) if padding else factor


def definition(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, row_segments: Segments | None
) -> Tensor:
    """The definition that ``linear`` must equal, by operations with derivatives of any order."""
    if row_segments is None:
        return reference.matmul_update(x, A.to(x.dtype), B.to(x.dtype), scale, F.linear(x, weight))
    ys = [x.new_zeros(x.shape[0] - row_segments.rows, weight.shape[1])]
    blocks = zip(row_segments.bounds, x.split_with_sizes(row_segments.sizes), strict=False)
    for (expert, *_), rows in reversed([*blocks]):
        ys.insert(0, definition(rows, weight[expert], A[expert], B[expert], scale, None))
    return torch.cat(ys)


def _forward(
    scale: float, row_segments: Segments | None, x: Tensor, weight: Tensor, A: Tensor, B: Tensor
) -> Tensor:
    compute_dtype = at_least_float32(x.dtype)
    change = x.new_empty(x.shape[0], weight.shape[-2], dtype=compute_dtype)
    for x_rows, change_rows, (expert_A, expert_B) in _by_expert(
        row_segments, (x.to(compute_dtype), change), (A, B)
    ):
        h = x_rows @ expert_A.mT.to(compute_dtype)
        h *= scale
        torch.mm(h, expert_B.mT.to(compute_dtype), out=change_rows)
    return _add_product(change.to(x.dtype), x, weight, row_segments)


def _by_expert(
    row_segments: Segments | None, rows: tuple[Tensor, ...], stacks: tuple[Tensor, ...]
) -> Iterator[Any]:
    """For each expert with rows: its rows of each tensor in ``rows``, then the list of its
    matrices, one of each tensor in ``stacks``."""
    if row_segments is None:
        yield *rows, stacks
        return
    blocks = (tensor.split_with_sizes(row_segments.sizes) for tensor in rows)
    for (expert, *_), *expert_rows in zip(row_segments.bounds, *blocks, strict=False):
        yield *expert_rows, [stack[expert] for stack in stacks]


def _add_product(
    change: Tensor, x: Tensor, weight: Tensor, row_segments: Segments | None
) -> Tensor:
    """change + x W_eᵀ, in place; zero for rows without an expert."""
    if row_segments is None and x.shape[0] > 1:
        return change.addmm_(x, weight.mT)
    uses_vector_kernel = change.dtype is torch.bfloat16 and weight.stride(-1) == 1 and has_amx()
    if row_segments is None and not uses_vector_kernel:
        return change.addmm_(x, weight.mT)
    for rows, change_rows, (matrix,) in _by_expert(row_segments, (x, change), (weight,)):
        if uses_vector_kernel and len(rows) == 1:
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
            *saved, ctx.gate = input_to_save(x, row_segments is None)
            ctx.save_for_backward(*saved, None, weight, A, B)
        return _forward(scale, row_segments, x, weight, A, B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        first, second, third, index, weight, A, B = ctx.saved_tensors
        scale, row_segments = ctx.scale, ctx.row_segments
        need_x, _, need_A, need_B = ctx.needs_input_grad[3:]
        saved = SavedInput(first, second, third, ctx.gate)
        x = restore_input(saved, need_x) if index is None else first
        if torch.is_grad_enabled():

            def differentiable(x: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
                return [definition(x, weight, A, B, scale, row_segments)]

            x = x if index is None else x[index]
            needs = (need_x, need_A, need_B)
            dx, dA, dB = reference.gradients_of(differentiable, (x, A, B), needs, [dy], 0.0)
            return None, None, None, dx, None, dA, dB
        dy = dy.contiguous()
        dx, dA, dB = _low_rank_gradients(
            scale, row_segments, x, index, dy, A, B, need_x, need_A or need_B
        )
        if need_x:
            _add_product(dx, dy, weight.mT, row_segments)
        return None, None, None, dx, None, dA if need_A else None, dB if need_B else None


# This skips ``Function.apply``, which makes a dozen Python calls for the transforms of
# ``torch.func``: calls under a transform never reach this function (see ``is_eager``).
_apply = cast(Any, super(torch.autograd.Function, _Grouped)).apply


def _source_rows(x: Tensor, source: Tensor | None, any_size: bool) -> Tensor | None:
    """The indices (int64) for which x is ``source[indices]``, if the node of x in the autograd
    graph computed x so. Else None. Also None if x or ``source`` has been modified in place, or if
    ``source`` has as many rows as x or more and ``any_size`` is False."""
    node: Any = x.grad_fn
    if node is None or source is None or source.grad_fn is None or not is_on("saved_inputs"):
        return None
    if x._version or source._version or node.name() != "IndexBackward0":
        return None
    if node.next_functions[0][0] is not source.grad_fn:
        return None
    try:
        indices = node._saved_indices
    except RuntimeError:  # an earlier backward has freed the saved tensors
        return None
    is_gather = (
        len(indices) == 1
        and indices[0] is not None
        and indices[0].dim() == 1
        and (any_size or len(source) < len(x))
    )
    return (
        indices[0]
        if is_gather and indices[0].dtype == torch.int64 and source.shape[1:] == x.shape[1:]
        else None
    )


def _low_rank_gradients(
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
    """(scale · dy B A [S, in], gradient of A, gradient of B)."""
    dtype, compute_dtype = x.dtype, at_least_float32(x.dtype)
    x = x if index is None else x[index]
    x, dy, down, up = (tensor.to(compute_dtype) for tensor in (x, dy, A, B))
    dx = torch.empty_like(x)
    new_gradient = torch.zeros_like if need_factors else torch.empty_like
    gradients = new_gradient(down), new_gradient(up)
    for rows, dy_rows, dx_rows, (expert_A, expert_B, expert_dA, expert_dB) in _by_expert(
        row_segments, (x, dy, dx), (down, up, *gradients)
    ):
        u = dy_rows @ expert_B
        u *= scale
        if need_x:
            torch.mm(u, expert_A, out=dx_rows)
        if need_factors:
            h = rows @ expert_A.mT
            h *= scale
            torch.mm(u.mT, rows, out=expert_dA)
            torch.mm(dy_rows.mT, h, out=expert_dB)
    dx = dx.to(dtype) if need_x else None
    if not need_factors:
        return dx, None, None
    dA, dB = gradients
    return dx, dA.to(A.dtype), dB.to(B.dtype)
