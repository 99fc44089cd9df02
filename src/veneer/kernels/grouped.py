"""A stack of linear layers with low-rank changes, of which each row of x uses one: the experts of a
mixture-of-experts model.

    y_s = x_s W_eᵀ + scale · (x_s A_eᵀ) B_eᵀ        s: a row   e: the expert of row s
    x: [S, in]   W: [E, out, in]   A: [E, r, in]   B: [E, out, r]   S rows, E experts

As in ``fused.py``, the low-rank term is computed first, and the product x W_eᵀ adds its result to
it in place, so that 16-bit outputs are rounded once. Only x is saved for backward. An expert
without rows costs nothing.

On a CPU, the rows of each expert are neighbours (a segment), and a few products compute one segment
after another; torch's grouped product on a CPU is such a loop too. Products with A and B are in
float32: in 16 bits, torch would compile a kernel for each shape, and the number of rows of an
expert changes with each step. On other devices, torch's grouped products are used, for which the
host need not wait for the device. They cannot add to an existing tensor, so 16-bit outputs are
rounded twice.

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
from veneer.kernels.saved_inputs import (
    SavedInput,
    has_saved_tensor_hooks,
    input_to_save,
    restore_input,
)
from veneer.kernels.switch import is_on
from veneer.precision import at_least_float32

#: alignment in bytes that torch's grouped products require of rows on a GPU
ALIGNMENT_BYTES = 16


class Segments(NamedTuple):
    """Which rows use which expert, as Python numbers (not tensors). The rows of an expert are
    neighbours; rows without an expert come last.

    Fields:
        bounds: (expert, first row, row after the last) of each expert that has rows, in the order
            of the rows.
        sizes: the number of rows of each expert in ``bounds``, then the number of rows without an
            expert.
        rows: the number of rows with an expert.
    """

    bounds: Sequence[tuple[int, int, int]]
    sizes: Sequence[int]
    rows: int


def segments(ends: Sequence[int], row_count: int) -> Segments:
    """The ``Segments`` of ``row_count`` rows that are sorted by expert. ``ends[e]`` is the row
    after the last row of expert e."""
    bounds = [
        (expert, first, end)
        for expert, (first, end) in enumerate(itertools.pairwise([0, *ends]))
        if end > first
    ]
    used_rows = ends[-1] if ends else 0
    sizes = [end - first for _, first, end in bounds]
    return Segments(bounds, [*sizes, row_count - used_rows], used_rows)


def sort_by_expert(expert_of_row: Sequence[int], expert_count: int) -> tuple[list[int], Segments]:
    """(the row indices in the order that sorts the rows by expert, the ``Segments`` of the sorted
    rows), where row s uses the expert ``expert_of_row[s]`` of ``expert_count`` experts."""
    order = sorted(range(len(expert_of_row)), key=expert_of_row.__getitem__)
    counts = [0] * expert_count
    for expert in expert_of_row:
        counts[expert] += 1
    return order, segments([*itertools.accumulate(counts)], len(expert_of_row))


def linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    row_segments: Segments | None,
    source: Tensor | None = None,
) -> Tensor:
    """x_s W_eᵀ + scale · (x_s A_eᵀ) B_eᵀ for each row s of x, where e is the expert of the row:
    [S, out] in the dtype of x. Zero for rows without an expert. Differentiable in x, A and B. For a
    CPU.

    Args:
        x: [S, in].
        weight, A, B: of E experts, [E, out, in], [E, r, in] and [E, out, r]. If ``row_segments`` is
            None, of one expert: [out, in], [r, in] and [out, r].
        row_segments: the rows of each expert; None if all rows use the same expert.
        source: a tensor from which x may have been gathered, as x = source[indices]. If the
            autograd graph shows that it was, ``source`` is saved for backward instead of x.
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
    grouped_product: Callable[..., Tensor],
) -> Tensor:
    """The result of ``linear``, on devices other than the CPU, with 16-bit outputs rounded twice.

    Args:
        ends: for each expert, the row after its last row.
        grouped_product: the function that the model itself calls for its experts. Its arguments are
            rows [S, in], a stack [E, in, out] and ``ends``; it returns [S, out].
    """
    padded_A, padded_B = _aligned(A.to(x.dtype), 1), _aligned(B.to(x.dtype) * scale, 2)
    return grouped_product(x, weight.mT, ends) + grouped_product(
        grouped_product(x, padded_A.mT, ends), padded_B.mT, ends
    )


def _aligned(factor: Tensor, axis: int) -> Tensor:
    """``factor``, the A or B of all experts, with the rank on ``axis`` (1 or 2) padded with zeros
    to a multiple of ``ALIGNMENT_BYTES``."""
    multiple = ALIGNMENT_BYTES // factor.element_size()
    padding = -factor.shape[axis] % multiple
    return F.pad(factor, (0, padding) if axis == 2 else (0, 0, 0, padding)) if padding else factor


def definition(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, row_segments: Segments | None
) -> Tensor:
    """The result of ``linear`` without in-place operations, so that it can be differentiated any
    number of times: for gradients of gradients, and for tests."""
    if row_segments is None:
        return reference.matmul_update(x, A.to(x.dtype), B.to(x.dtype), scale, F.linear(x, weight))
    ys = [x.new_zeros(x.shape[0] - row_segments.rows, weight.shape[1])]
    row_blocks = zip(row_segments.bounds, x.split_with_sizes(row_segments.sizes), strict=False)
    for (expert, *_), rows in reversed([*row_blocks]):
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
    row_segments: Segments | None, row_tensors: tuple[Tensor, ...], stacks: tuple[Tensor, ...]
) -> Iterator[Any]:
    """Yield one tuple for each expert that has rows: views of its rows in each of ``row_tensors``,
    then the list of its matrices in each of ``stacks``. If ``row_segments`` is None, there is one
    expert: yield all rows, and ``stacks`` as they are."""
    if row_segments is None:
        yield *row_tensors, stacks
        return
    blocks = (tensor.split_with_sizes(row_segments.sizes) for tensor in row_tensors)
    for (expert, *_), *expert_rows in zip(row_segments.bounds, *blocks, strict=False):
        yield *expert_rows, [stack[expert] for stack in stacks]


def _add_product(
    change: Tensor, x: Tensor, weight: Tensor, row_segments: Segments | None
) -> Tensor:
    """change + x W_eᵀ, with W_e the weight of each row's expert, written to ``change`` [S, out],
    the low-rank terms of the rows, and returned. Rows without an expert become zero."""
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
        source_rows = _source_rows(x, source, row_segments is None)
        if source_rows is not None:
            ctx.gate = None
            ctx.save_for_backward(source, None, None, source_rows, weight, A, B)
        else:
            *saved, ctx.gate = input_to_save(x, row_segments is None)
            ctx.save_for_backward(*saved, None, weight, A, B)
        return _forward(scale, row_segments, x, weight, A, B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x_or_source, factor2, factor3, source_rows, weight, A, B = ctx.saved_tensors
        scale, row_segments = ctx.scale, ctx.row_segments
        need_x, _, need_A, need_B = ctx.needs_input_grad[3:]
        saved_input = SavedInput(x_or_source, factor2, factor3, ctx.gate)
        x = restore_input(saved_input, need_x) if source_rows is None else x_or_source
        if torch.is_grad_enabled():

            def outputs_of(x: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
                return [definition(x, weight, A, B, scale, row_segments)]

            x = x if source_rows is None else x[source_rows]
            needs_gradient = (need_x, need_A, need_B)
            dx, dA, dB = reference.gradients_of(outputs_of, (x, A, B), needs_gradient, [dy], 0.0)
            return None, None, None, dx, None, dA, dB
        dy = dy.contiguous()
        dx, dA, dB = _low_rank_gradients(
            scale, row_segments, x, source_rows, dy, A, B, need_x, need_A or need_B
        )
        if need_x:
            _add_product(dx, dy, weight.mT, row_segments)
        return None, None, None, dx, None, dA if need_A else None, dB if need_B else None


# ``apply`` of the C++ base class skips the dozen Python calls that ``Function.apply`` makes for the
# transforms of ``torch.func``. Calls under a transform never reach this function (see
# ``is_eager``).
_apply = cast(Any, super(torch.autograd.Function, _Grouped)).apply


def _source_rows(x: Tensor, source: Tensor | None, allows_any_size: bool) -> Tensor | None:
    """The indices (int64) with x = source[indices], if the autograd node of x shows that x was
    computed in this way and neither tensor has been modified in place; else None. If
    ``allows_any_size`` is False, also None unless ``source`` has fewer rows than x."""
    x_node: Any = x.grad_fn
    if x_node is None or source is None or source.grad_fn is None or not is_on("saved_inputs"):
        return None
    if x._version or source._version or x_node.name() != "IndexBackward0":
        return None
    if x_node.next_functions[0][0] is not source.grad_fn:
        return None
    if has_saved_tensor_hooks():
        return None
    try:
        indices = x_node._saved_indices
    except RuntimeError:  # an earlier backward has freed the saved tensors
        return None
    is_gather = (
        len(indices) == 1
        and indices[0] is not None
        and indices[0].dim() == 1
        and (allows_any_size or len(source) < len(x))
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
    source_rows,
    dy,
    A,
    B,
    need_x: bool,
    need_factors: bool,
) -> Any:
    """(dx, dA, dB): the gradient scale · dy B A [S, in] of x through the low-rank products, and the
    gradients of A and B, in the dtypes of x, A and B. dx is None unless ``need_x``; dA and dB are
    None unless ``need_factors``.

    ``source_rows``: None, or indices; then ``x`` is the tensor from which x was gathered, as
    x[source_rows]."""
    dtype, compute_dtype = x.dtype, at_least_float32(x.dtype)
    x = x if source_rows is None else x[source_rows]
    x, dy, wide_A, wide_B = (tensor.to(compute_dtype) for tensor in (x, dy, A, B))
    dx = torch.empty_like(x)
    allocate_gradient = torch.zeros_like if need_factors else torch.empty_like
    factor_gradients = allocate_gradient(wide_A), allocate_gradient(wide_B)
    for rows, dy_rows, dx_rows, (expert_A, expert_B, expert_dA, expert_dB) in _by_expert(
        row_segments, (x, dy, dx), (wide_A, wide_B, *factor_gradients)
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
    dA, dB = factor_gradients
    return dx, dA.to(A.dtype), dB.to(B.dtype)
