"""Products of inputs with a stack of matrices W + ΔW, such as the weights of experts, without
forming W + ΔW. The stack is an ``Unformed`` tensor (``unformed.py``), called W in this table. This
file implements its operations:

    F.linear(x, W[i])   x @ W[i]               one matrix: the fused kernel of linear layers
    bmm(x, W)   baddbmm(b, x, W.mT)   x @ W    all matrices: the base's product plus x B A
    bmm(x, W[ids])   bmm(W[ids], x)            one matrix per row; on a CPU, W[ids] is not gathered
    grouped_mm(x, W.mT, offs=…)                rows sorted by their matrix (``kernels/grouped.py``)

``unformed_weights_of`` decides in which calls a module gets such tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach.layer.change import Change
from veneer.attach.layer.dtypes import is_float, no_autocast
from veneer.attach.layer.state import LayerState
from veneer.attach.layer.unformed import OPERATIONS, Stack, Unformed, make_unformed
from veneer.kernels import fused, grouped, is_eager, reference
from veneer.layers import GENERAL_KIND
from veneer.lowrank import LowRank

_C: Any = torch._C

#: layers whose forward has used an operation that raised ``CannotFormError``. They get no
#: ``Unformed`` weights any more: their W + ΔW is formed in every call.
LAYERS_THAT_FORM: weakref.WeakSet[LayerState] = weakref.WeakSet()


# ----------------------------------------------------------------------------------------------
# calls with unformed weights


def unformed_weights_of(
    layer_adapter: Any, module: nn.Module, layer_state: LayerState, inputs: Any, can_form: bool
) -> dict[str, Tensor] | None:
    """``Unformed`` tensors (W + ΔW whose values are not computed) for the changed weights of a
    module in this call, by name. None if W + ΔW must be formed instead.

    Args:
        inputs: the arguments of the call, (args, kwargs).
        can_form: whether an operation that an ``Unformed`` does not support may form W + ΔW in the
            dtype of the weight; else it raises ``CannotFormError``.
    """
    if not is_eager() or _C._get_tracing_state() is not None:
        return None
    if layer_state in LAYERS_THAT_FORM or context.current.path == "materialised":
        return None
    leaves = _tensor_arguments(*inputs)
    if not all(type(leaf) is Tensor or type(leaf) is nn.Parameter for leaf in leaves):
        return None
    stacks_by_name = layer_adapter.stacks(module)
    if not stacks_by_name:
        return None
    call_state: dict[tuple, Any] = {}
    call_input = next((leaf for leaf in leaves if is_float(leaf)), None)
    return {
        name: make_unformed(
            Stack(weight, low_rank.A, low_rank.B, low_rank.scale, can_form, call_state, call_input)
        )
        for name, (weight, low_rank) in stacks_by_name.items()
    }


def _tensor_arguments(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors among a call's arguments."""
    leaves: Any = [*args, *kwargs.values()]
    if not all(leaf is None or isinstance(leaf, Tensor | int | float) for leaf in leaves):
        leaves = pytree.tree_leaves(leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def is_stack(change: Change, weight: Any) -> bool:
    """Whether ``change`` changes a frozen stack [E, out, in] of matrices that is stored as a plain
    parameter, so that an ``Unformed`` can stand for it."""
    return (
        type(weight) is nn.Parameter
        and weight.dim() == 3
        and not weight.requires_grad
        and weight.layout is torch.strided
        and change.layer is GENERAL_KIND
        and change.storage.name == "plain"
        and tuple(change.dims) == tuple(weight.shape)
    )


def drop_inputs(change: Change, low_rank: LowRank) -> LowRank:
    """``low_rank``, the ΔW of a stack of matrices. In training mode, dropout sets whole input
    columns of each ΔW to zero, as in ``Change.changed_weight``."""
    if not (change.training and change.dropout):
        return low_rank
    mask = F.dropout(
        low_rank.A.new_ones(low_rank.A.shape[0], 1, low_rank.A.shape[2]), change.dropout
    )
    return LowRank(low_rank.A * mask, low_rank.B, low_rank.scale)


# ----------------------------------------------------------------------------------------------
# indexing and views of a stack


def _implements(*functions: Any) -> Callable[[Any], Any]:
    """A decorator that registers the implementation of these torch functions in ``OPERATIONS``.
    Functions that are None are skipped."""

    def register(implementation: Any) -> Any:
        OPERATIONS.update(
            (function, implementation) for function in functions if function is not None
        )
        return implementation

    return register


@_implements(Tensor.__getitem__)
def _getitem(_: Any, weight: Unformed, index: Any) -> Any:
    if not isinstance(weight, Unformed) or weight.index is not None:
        return NotImplemented
    if type(index) is int:
        return _select_matrix(weight, index)
    if isinstance(index, slice):
        return make_unformed(weight.stack.slice_matrices(index), None, weight.is_transposed)
    if (
        not isinstance(index, Tensor)
        or isinstance(index, Unformed)
        or index.dtype not in (torch.int64, torch.int32)
    ):
        return NotImplemented
    if index.dim() > 1:
        return NotImplemented
    return weight.take_matrices(index) if index.dim() else _select_matrix(weight, int(index))


def _select_matrix(weight: Unformed, index: int) -> Unformed:
    matrix_count = weight.stack.W.shape[0]
    if not -matrix_count <= index < matrix_count:
        raise IndexError(f"index {index} is out of bounds for dimension 0 with size {matrix_count}")
    return weight.take_matrices(index % matrix_count)


@_implements(torch.index_select, Tensor.index_select)
def _index_select(_: Any, weight: Any, dim: int, index: Tensor) -> Any:
    can_index = (
        isinstance(weight, Unformed)
        and weight.index is None
        and dim in (0, -3)
        and index.dim() == 1
    )
    return weight.take_matrices(index) if can_index else NotImplemented


@_implements(torch.unbind, Tensor.unbind, Tensor.__iter__)
def _unbind(func: Any, weight: Unformed, dim: int = 0) -> Any:
    if weight.index is not None or dim not in (0, -3):
        return NotImplemented
    matrices = tuple(weight.take_matrices(index) for index in range(len(weight.stack.W)))
    return iter(matrices) if func is Tensor.__iter__ else matrices


@_implements(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes)
def _transpose(_: Any, weight: Unformed, dim0: int, dim1: int) -> Any:
    axes = {dim0 % weight.ndim, dim1 % weight.ndim}
    return (
        weight.transpose_matrices()
        if axes == {weight.ndim - 2, weight.ndim - 1}
        else NotImplemented
    )


@_implements(torch.permute, Tensor.permute)
def _permute(_: Any, weight: Unformed, *dims: Any) -> Any:
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    axis_order, matrix_axes = [dim % weight.ndim for dim in dims], list(range(weight.ndim))
    return (
        weight.transpose_matrices()
        if axis_order == [*matrix_axes[:-2], matrix_axes[-1], matrix_axes[-2]]
        else NotImplemented
    )


@_implements(Tensor.mT.__get__)  # pyright: ignore[reportAttributeAccessIssue]
def _mt(_: Any, weight: Unformed) -> Any:
    return weight.transpose_matrices()


@_implements(Tensor.T.__get__, torch.t, Tensor.t)  # pyright: ignore[reportAttributeAccessIssue]
def _t(_: Any, weight: Unformed) -> Any:
    return weight.transpose_matrices() if weight.ndim == 2 else NotImplemented


@_implements(Tensor.contiguous)
def _contiguous(_: Any, weight: Unformed, **options: Any) -> Any:
    return NotImplemented if options else weight


@_implements(Tensor.to)
def _to(_: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, Unformed) or kwargs.keys() - {"dtype", "device", "non_blocking"}:
        return NotImplemented
    dtypes_and_devices = [*args, kwargs.get("dtype"), kwargs.get("device")]
    dtypes_and_devices = [
        dtype_or_device for dtype_or_device in dtypes_and_devices if dtype_or_device is not None
    ]
    if any(isinstance(dtype_or_device, Tensor | int) for dtype_or_device in dtypes_and_devices):
        return NotImplemented
    is_unchanged = all(
        (
            dtype_or_device == weight.dtype
            if isinstance(dtype_or_device, torch.dtype)
            else torch.device(dtype_or_device) == weight.device
        )
        for dtype_or_device in dtypes_and_devices
    )
    return weight if is_unchanged else NotImplemented


@_implements(Tensor.data_ptr)
def _data_ptr(_: Any, weight: Unformed) -> Any:
    return weight.stack.W.data_ptr() if weight.device.type == "cpu" else NotImplemented


@_implements(torch.chunk, Tensor.chunk)
def _chunk(func: Any, weight: Unformed, chunks: int, dim: int = 0) -> Any:
    return _split(func, weight, -(-weight.shape[dim] // chunks), dim)


@_implements(torch.split, Tensor.split)
def _split(_: Any, weight: Unformed, split_size: Any, dim: int = 0) -> Any:
    """Split all matrices along their outputs or inputs, into ``Unformed`` tensors."""
    dim %= weight.ndim
    if dim < weight.ndim - 2 or isinstance(weight.index, Tensor):
        return NotImplemented
    length = weight.shape[dim]
    sizes = split_size
    if isinstance(split_size, int):
        sizes = [min(split_size, length - start) for start in range(0, length, split_size)]
    axis = dim - weight.ndim + 3  # the axis of [E, out, in], if not transposed
    axis = 3 - axis if weight.is_transposed else axis
    slices, start = [], 0
    for size in sizes:
        narrowed = weight.stack.narrow_matrices(axis, start, size)
        slices.append(make_unformed(narrowed, weight.index, weight.is_transposed))
        start += size
    return tuple(slices)


# ----------------------------------------------------------------------------------------------
# products


@_implements(F.linear, _C._nn.linear)
def _linear(_: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not _is_unformed(weight, 2) or _is_unformed(input):
        return NotImplemented
    return _matrix_product(input, weight, False, bias)


@_implements(
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
)
def _matmul(func: Any, input: Any, other: Any) -> Any:
    if func is Tensor.__rmatmul__:
        input, other = other, input
    if _is_unformed(input) and _is_unformed(other):
        return NotImplemented
    if _is_unformed(other):
        if other.ndim == 2:
            return _matrix_product(input, other, True)
        rows = _rows_per_matrix(input, other)
        return NotImplemented if rows is None else _batched_product(rows, other, True)
    if input.ndim == 2:
        if other.ndim > 2:
            return NotImplemented
        return (
            _matrix_product(other, input, False)
            if other.ndim == 1
            else _matrix_product(other.mT, input, False).mT
        )
    rows = _rows_per_matrix(other.mT, input) if other.ndim > 1 else None
    return NotImplemented if rows is None else _batched_product(rows, input, False).mT


def _rows_per_matrix(x: Tensor, weight: Unformed) -> Tensor | None:
    """x as [E, t, in]: the t rows that each of the E matrices of ``weight`` multiplies. An x [t,
    in] or [1, t, in] is expanded, so that all matrices multiply the same rows. None for an x of
    another shape."""
    matrix_count = weight.shape[0]
    if x.ndim < 2 or x.ndim > 3 or (x.ndim == 3 and x.shape[0] not in (1, matrix_count)):
        return None
    return x.expand(matrix_count, *x.shape[-2:])


@_implements(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(_: Any, input: Any, batch1: Any, batch2: Any, **options: Any) -> Any:
    if options or _is_unformed(input):
        return NotImplemented
    y = _matmul(torch.bmm, batch1, batch2)
    return y if y is NotImplemented else y + input.to(y.dtype)


@_implements(torch.addmm, Tensor.addmm)
def _addmm(_: Any, input: Any, mat1: Any, mat2: Any, **options: Any) -> Any:
    if options or _is_unformed(input) or not _is_unformed(mat2, 2) or _is_unformed(mat1):
        return NotImplemented
    return (
        _matrix_product(mat1, mat2, True, input)
        if input.ndim == 1
        else _matrix_product(mat1, mat2, True) + input.to(mat1.dtype)
    )


@_implements(getattr(torch, "_grouped_mm", None))
def _grouped_mm(
    func: Any, input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if bias is not None or out_dtype is not None:
        return NotImplemented
    return _grouped_product(input, weight, offs, lambda x, W, ends: func(x, W, offs=ends))


@_implements("transformers::grouped_mm_fallback")
def _transformers_grouped_mm(func: Any, input: Any, weight: Any, offs: Any) -> Any:
    return _grouped_product(input, weight, offs, func)


def _is_unformed(value: Any, ndim: int = 0) -> bool:
    """Whether a value is an ``Unformed``, with ``ndim`` axes unless ``ndim`` is 0."""
    return isinstance(value, Unformed) and (not ndim or value.ndim == ndim)


def _has_autocast(x: Tensor) -> bool:
    return _C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def _matrix_product(
    x: Tensor, weight: Unformed, transposed: bool, bias: Tensor | None = None
) -> Tensor:
    """x Mᵀ + bias for the one matrix M = W + ΔW, [out, in], that ``weight`` stands for. If
    ``transposed``, x M + bias, with M [in, out]."""
    W, A, B = weight.factors(transposed)
    scale = weight.stack.scale
    if x.dtype == W.dtype and x.ndim > 1 and not _has_autocast(x):
        needs_graph = torch.is_grad_enabled() and (
            x.requires_grad or A.requires_grad or B.requires_grad
        )
        # A module of experts computes many such products, each for a few rows of its input. This
        # kernel can save that input for backward, once for all products, instead of each x.
        if needs_graph and x.ndim == 2 and bias is None and x.is_cpu:
            return grouped.linear(x, W, A, B, scale, None, weight.stack.call_input)
        return (fused.linear if needs_graph else fused.linear_without_graph)(
            scale, x, W, bias, A, B
        )
    y = F.linear(x, W, bias)
    low_rank = (
        LowRank(A, B, scale) if _has_autocast(x) else LowRank(A.to(x.dtype), B.to(x.dtype), scale)
    )
    return reference.matmul_update(x, low_rank.A, low_rank.B, scale, y)


def _batched_product(x: Tensor, weight: Unformed, transposed: bool) -> Tensor:
    """The batched product [S, t, out] of x [S, t, in] and the transposes of the S matrices [S, out,
    in] that ``weight`` stands for; or, if ``transposed``, of x and S matrices [S, in, out]. t is
    the number of rows of x for each matrix."""
    stack = weight.stack
    if (
        isinstance(weight.index, Tensor)
        and x.is_cpu
        and x.shape[1] == 1  # each row of x has its own matrix
        and x.dtype == weight.dtype
        and not _has_autocast(x)
    ):
        order, inverse, segments = _group_rows(stack, weight.index)
        W, A, B = stack.factors(None, weight.is_transposed != transposed)
        rows = x[:, 0] if order is None else x[:, 0].index_select(0, order)
        y = grouped.linear(rows, W, A, B, stack.scale, segments)
        return (y if inverse is None else y.index_select(0, inverse))[:, None]
    W, A, B = weight.factors(transposed)
    if not _has_autocast(x):
        A, B = A.to(x.dtype), B.to(x.dtype)
    h = torch.bmm(x, A.mT) * stack.scale
    update = torch.bmm(h, B.mT)
    return torch.bmm(x, W.mT) + update if _has_autocast(x) else torch.baddbmm(update, x, W.mT)


def _group_rows(stack: Stack, ids: Tensor) -> tuple[Tensor | None, Tensor | None, grouped.Segments]:
    """(order, inverse, segments) for ``ids``, the index of the matrix that each row uses: the order
    that sorts the rows by matrix, the inverse of that order, and the range of each matrix among the
    sorted rows. ``order`` and ``inverse`` are None if the rows are sorted already. The result is
    cached for all stacks of a call, by the values of ``ids``."""
    expert_of_row, matrix_count = ids.tolist(), len(stack.W)
    cache_key = matrix_count, tuple(expert_of_row)
    if cache_key not in stack.call_state:
        order, segments = grouped.sort_by_expert(expert_of_row, matrix_count)
        row_order = torch.tensor(order) if order != list(range(len(order))) else None
        inverse = None if row_order is None else row_order.argsort()
        stack.call_state[cache_key] = row_order, inverse, segments
    return stack.call_state[cache_key]


def _grouped_product(
    x: Any, weight: Any, row_ends: Any, base_product: Callable[..., Tensor]
) -> Any:
    """The product [S, out] of the rows x [S, in], sorted by matrix, with the matrices [E, in, out].

    Args:
        row_ends: for each matrix the index in x after its last row, [E].
        base_product: a function (x, W, row_ends) that computes the same product with W alone.

    Returns ``NotImplemented`` for arguments that the kernels do not support.
    """
    if (
        not _is_unformed(weight, 3)
        or weight.index is not None
        or type(x) is not Tensor
        or row_ends is None
        or x.ndim != 2
    ):
        return NotImplemented
    if x.dtype != weight.dtype or row_ends.shape != (weight.shape[0],):
        return NotImplemented
    stack = weight.stack
    W, A, B = weight.factors(True)
    with no_autocast(x) if _has_autocast(x) else nullcontext():  # the base's product ignores it
        if not x.is_cpu:
            return grouped.linear_on_device(x, W, A, B, stack.scale, row_ends, base_product)
        # by value: ``row_ends`` may be written in place between two products
        cache_key = tuple(row_ends.tolist()), len(x)
        segments = stack.call_state.get(cache_key)
        if segments is None:
            segments = stack.call_state[cache_key] = grouped.segments(cache_key[0], len(x))
        return grouped.linear(x, W, A, B, stack.scale, segments, stack.call_input)
