"""The products with which forwards read a stack of matrices, on W + ΔW that is not formed
(``unformed.py``).

    F.linear(x, W[i])   x @ W[i]                     one matrix: the fused kernel of linear layers
    bmm(x, W)   baddbmm(b, x, W.mT)   x @ W          all of them: the low-rank part, onto which x W comes
    bmm(x, W[ids])   bmm(W[ids], x)                  a matrix for each row; on a processor W[ids] is not gathered
    grouped_mm(x, W.mT, offs=…)                      rows in the order of their matrices (``kernels/grouped.py``)

``stand_ins`` says for which calls of which modules.
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
from veneer.attach.change import Change
from veneer.attach.dtypes import is_float, no_autocast
from veneer.attach.state import LayerState
from veneer.attach.unformed import OPERATIONS, Stack, Unformed, stand_in
from veneer.kernels import eager, fused, grouped, reference
from veneer.layers._base import GENERAL
from veneer.lowrank import LowRank

_C: Any = torch._C

#: layers whose forward needs W + ΔW formed, where it may not be
_FORMING: weakref.WeakSet[LayerState] = weakref.WeakSet()


# ----------------------------------------------------------------------------------------------
# which calls


def stand_ins(
    part: Any, module: nn.Module, layer_state: LayerState, inputs: Any, formable: bool
) -> dict[str, Tensor] | None:
    """What stands for the changed weights of a module in this call, by name, or None if they must
    be formed.

    Args:
        inputs: the arguments of the call.
        formable: whether W + ΔW may be formed in the weights' own dtype after all.
    """
    if not eager() or _C._get_tracing_state() is not None:
        return None
    if layer_state in _FORMING or context.current.path == "materialised":
        return None
    leaves = _tensors(*inputs)
    if not all(type(leaf) is Tensor or type(leaf) is nn.Parameter for leaf in leaves):
        return None
    changes = part.stacks(module)
    if not changes:
        return None
    call: dict[int, Any] = {}
    source = next((leaf for leaf in leaves if is_float(leaf)), None)
    return {
        name: stand_in(Stack(weight, low.A, low.B, low.scale, formable, call, source))
        for name, (weight, low) in changes.items()
    }


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors in a call's arguments."""
    leaves: Any = [*args, *kwargs.values()]
    if not all(leaf is None or isinstance(leaf, Tensor | int | float) for leaf in leaves):
        leaves = pytree.tree_leaves(leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def form_from_now_on(layer_state: LayerState) -> None:
    """This layer's forward does what nothing can stand for."""
    _FORMING.add(layer_state)


def is_stack(change: Change, weight: Any) -> bool:
    """Whether a change is of a plain frozen stack of matrices."""
    return (
        type(weight) is nn.Parameter
        and weight.dim() == 3
        and not weight.requires_grad
        and weight.layout is torch.strided
        and change.layer.name == GENERAL
        and change.storage.name == "plain"
        and tuple(change.dims) == tuple(weight.shape)
    )


def dropped(change: Change, low: LowRank) -> LowRank:
    """The change with the dropout that ``Change.changed`` applies to stacks: of whole inputs."""
    if not (change.training and change.dropout):
        return low
    kept = F.dropout(low.A.new_ones(low.A.shape[0], 1, low.A.shape[2]), change.dropout)
    return LowRank(low.A * kept, low.B, low.scale)


# ----------------------------------------------------------------------------------------------
# parts of a stack


def _operation(*functions: Any) -> Callable[[Any], Any]:
    def register(run: Any) -> Any:
        OPERATIONS.update((function, run) for function in functions if function is not None)
        return run

    return register


@_operation(Tensor.__getitem__)
def _getitem(_: Any, weight: Unformed, index: Any) -> Any:
    if not isinstance(weight, Unformed) or weight.index is not None:
        return NotImplemented
    if type(index) is int:
        return _chosen(weight, index)
    if isinstance(index, slice):
        return stand_in(weight.stack.sliced(index), None, weight.flipped)
    if (
        not isinstance(index, Tensor)
        or isinstance(index, Unformed)
        or index.dtype not in (torch.int64, torch.int32)
    ):
        return NotImplemented
    if index.dim() > 1:
        return NotImplemented
    return weight.at(index) if index.dim() else _chosen(weight, int(index))


def _chosen(weight: Unformed, number: int) -> Unformed:
    count = weight.stack.W.shape[0]
    if not -count <= number < count:
        raise IndexError(f"index {number} is out of bounds for dimension 0 with size {count}")
    return weight.at(number % count)


@_operation(torch.index_select, Tensor.index_select)
def _index_select(_: Any, weight: Any, dim: int, index: Tensor) -> Any:
    known = (
        isinstance(weight, Unformed)
        and weight.index is None
        and dim in (0, -3)
        and index.dim() == 1
    )
    return weight.at(index) if known else NotImplemented


@_operation(torch.unbind, Tensor.unbind, Tensor.__iter__)
def _unbind(func: Any, weight: Unformed, dim: int = 0) -> Any:
    if weight.index is not None or dim not in (0, -3):
        return NotImplemented
    parts = tuple(weight.at(number) for number in range(len(weight.stack.W)))
    return iter(parts) if func is Tensor.__iter__ else parts


@_operation(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes)
def _transpose(_: Any, weight: Unformed, dim0: int, dim1: int) -> Any:
    axes = {dim0 % weight.ndim, dim1 % weight.ndim}
    return weight.transposed() if axes == {weight.ndim - 2, weight.ndim - 1} else NotImplemented


@_operation(torch.permute, Tensor.permute)
def _permute(_: Any, weight: Unformed, *dims: Any) -> Any:
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order, usual = [dim % weight.ndim for dim in dims], list(range(weight.ndim))
    return weight.transposed() if order == [*usual[:-2], usual[-1], usual[-2]] else NotImplemented


@_operation(Tensor.mT.__get__)  # pyright: ignore[reportAttributeAccessIssue]
def _mt(_: Any, weight: Unformed) -> Any:
    return weight.transposed()


@_operation(Tensor.T.__get__, torch.t, Tensor.t)  # pyright: ignore[reportAttributeAccessIssue]
def _t(_: Any, weight: Unformed) -> Any:
    return weight.transposed() if weight.ndim == 2 else NotImplemented


@_operation(Tensor.contiguous)
def _contiguous(_: Any, weight: Unformed, **how: Any) -> Any:
    return NotImplemented if how else weight


@_operation(Tensor.to)
def _to(_: Any, weight: Any, *how: Any, **named: Any) -> Any:
    if not isinstance(weight, Unformed) or named.keys() - {"dtype", "device", "non_blocking"}:
        return NotImplemented
    wanted = [*how, named.get("dtype"), named.get("device")]
    wanted = [value for value in wanted if value is not None]
    if any(isinstance(value, Tensor | int) for value in wanted):
        return NotImplemented
    same = all(
        (
            value == weight.dtype
            if isinstance(value, torch.dtype)
            else torch.device(value) == weight.device
        )
        for value in wanted
    )
    return weight if same else NotImplemented


@_operation(Tensor.data_ptr)
def _data_ptr(_: Any, weight: Unformed) -> Any:
    return weight.stack.W.data_ptr() if weight.device.type == "cpu" else NotImplemented


@_operation(torch.chunk, Tensor.chunk)
def _chunk(_: Any, weight: Unformed, chunks: int, dim: int = 0) -> Any:
    size = weight.shape[dim]
    return _pieces(weight, -(-size // chunks), dim)


@_operation(torch.split, Tensor.split)
def _split(_: Any, weight: Unformed, split_size: Any, dim: int = 0) -> Any:
    return _pieces(weight, split_size, dim)


def _pieces(weight: Unformed, sizes: Any, dim: int) -> Any:
    """Along the outputs or inputs of all matrices."""
    dim %= weight.ndim
    if dim < weight.ndim - 2 or isinstance(weight.index, Tensor):
        return NotImplemented
    length = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - first) for first in range(0, length, sizes)]
    axis = dim - weight.ndim + 3  # of the stack
    axis = 3 - axis if weight.flipped else axis
    made, first = [], 0
    for size in sizes:
        made.append(
            stand_in(weight.stack.narrowed(axis, first, size), weight.index, weight.flipped)
        )
        first += size
    return tuple(made)


# ----------------------------------------------------------------------------------------------
# products


@_operation(F.linear, _C._nn.linear)
def _linear(_: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not _is(weight, 2) or _is(input):
        return NotImplemented
    return _matrix(input, weight, False, bias)


@_operation(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm,
            Tensor.bmm)  # fmt: skip
def _matmul(func: Any, input: Any, other: Any) -> Any:
    if func is Tensor.__rmatmul__:
        input, other = other, input
    if _is(input) and _is(other):
        return NotImplemented
    if _is(other):
        if other.ndim == 2:
            return _matrix(input, other, True)
        rows = _rows(input, other)
        return NotImplemented if rows is None else _batched(rows, other, True)
    if input.ndim == 2:
        if other.ndim > 2:
            return NotImplemented
        return (
            _matrix(other, input, False) if other.ndim == 1 else _matrix(other.mT, input, False).mT
        )
    rows = _rows(other.mT, input) if other.ndim > 1 else None
    return NotImplemented if rows is None else _batched(rows, input, False).mT


def _rows(x: Tensor, weight: Unformed) -> Tensor | None:
    """x as [E, t, in], the rows of each matrix."""
    count = weight.shape[0]
    if x.ndim < 2 or x.ndim > 3 or (x.ndim == 3 and x.shape[0] not in (1, count)):
        return None
    return x.expand(count, *x.shape[-2:])


@_operation(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(_: Any, input: Any, batch1: Any, batch2: Any, **how: Any) -> Any:
    if how or _is(input):
        return NotImplemented
    y = _matmul(torch.bmm, batch1, batch2)
    return y if y is NotImplemented else y + input.to(y.dtype)


@_operation(torch.addmm, Tensor.addmm)
def _addmm(_: Any, input: Any, mat1: Any, mat2: Any, **how: Any) -> Any:
    if how or _is(input) or not _is(mat2, 2) or _is(mat1):
        return NotImplemented
    return (
        _matrix(mat1, mat2, True, input)
        if input.ndim == 1
        else _matrix(mat1, mat2, True) + input.to(mat1.dtype)
    )


@_operation(getattr(torch, "_grouped_mm", None))
def _grouped_mm(
    func: Any, input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if bias is not None or out_dtype is not None:
        return NotImplemented
    return _grouped(input, weight, offs, lambda x, W, ends: func(x, W, offs=ends))


@_operation("transformers::grouped_mm_fallback")
def _transformers_grouped_mm(func: Any, input: Any, weight: Any, offs: Any) -> Any:
    return _grouped(input, weight, offs, func)


def _is(value: Any, axes: int = 0) -> bool:
    return isinstance(value, Unformed) and (not axes or value.ndim == axes)


def _autocast(x: Tensor) -> bool:
    return _C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def _matrix(x: Tensor, weight: Unformed, transposed: bool, bias: Tensor | None = None) -> Tensor:
    """x Mᵀ + bias of a matrix M [out, in], or x M + bias if ``transposed``."""
    W, A, B = weight.oriented(transposed)
    scale = weight.stack.scale
    if x.dtype == W.dtype and x.ndim > 1 and not _autocast(x):
        recorded = torch.is_grad_enabled() and (
            x.requires_grad or A.requires_grad or B.requires_grad
        )
        # of which a call has many, with few rows each
        if recorded and x.ndim == 2 and bias is None and x.is_cpu:
            return grouped.linear(x, W, A, B, scale, None, weight.stack.source)
        return (fused.linear if recorded else fused.linear_without_graph)(scale, x, W, bias, A, B)
    y = F.linear(x, W, bias)
    low = LowRank(A, B, scale) if _autocast(x) else LowRank(A.to(x.dtype), B.to(x.dtype), scale)
    return reference.matmul_update(x, low.A, low.B, scale, y)


def _batched(x: Tensor, weight: Unformed, transposed: bool) -> Tensor:
    """x [S, t, in] times the matrices [S, out, in] transposed, or [S, in, out] if ``transposed``:
    [S, t, out]."""
    stack = weight.stack
    if isinstance(weight.index, Tensor) and _by_rows(x, weight):
        order, back, where = _rows_by_id(stack, weight.index)
        W, A, B = stack.part(None, weight.flipped != transposed)
        rows = x[:, 0] if order is None else x[:, 0].index_select(0, order)
        y = grouped.linear(rows, W, A, B, stack.scale, where)
        return (y if back is None else y.index_select(0, back))[:, None]
    W, A, B = weight.oriented(transposed)
    if not _autocast(x):
        A, B = A.to(x.dtype), B.to(x.dtype)
    h = torch.bmm(x, A.mT) * stack.scale
    part = torch.bmm(h, B.mT)
    return torch.bmm(x, W.mT) + part if _autocast(x) else torch.baddbmm(part, x, W.mT)


def _by_rows(x: Tensor, weight: Unformed) -> bool:
    """Whether each row of x with a matrix of its own can be put to the others of that matrix."""
    return x.is_cpu and x.shape[1] == 1 and x.dtype == weight.dtype and not _autocast(x)


def _rows_by_id(stack: Stack, ids: Tensor) -> tuple[Tensor | None, Tensor | None, grouped.Segments]:
    """(order of the rows by matrix, the way back, the segments), once for all stacks of a call."""
    known = stack.call.get(id(ids))
    if known is None:
        count = len(stack.W)
        order, where = grouped.by_id(
            [number + count if number < 0 else number for number in ids.tolist()], count
        )
        way = torch.tensor(order) if order != list(range(len(order))) else None
        known = stack.call[id(ids)] = ids, (way, None if way is None else way.argsort(), where)
    return known[1]


def _grouped(x: Any, weight: Any, ends: Any, product: Callable[..., Tensor]) -> Any:
    """Rows x [S, in] in the order of the matrices [E, in, out], of which each has those up to its
    place in ``ends``."""
    if (
        not _is(weight, 3)
        or weight.index is not None
        or type(x) is not Tensor
        or ends is None
        or x.ndim != 2
    ):
        return NotImplemented
    if x.dtype != weight.dtype or ends.shape != (weight.shape[0],):
        return NotImplemented
    stack = weight.stack
    W, A, B = weight.oriented(True)
    with no_autocast(x) if _autocast(x) else nullcontext():  # as the base's product has it
        if not x.is_cpu:
            return grouped.elsewhere(x, W, A, B, stack.scale, ends, product)
        known = stack.call.get(id(ends))
        if known is None:
            known = stack.call[id(ends)] = ends, grouped.segments(ends.tolist(), len(x))
        return grouped.linear(x, W, A, B, stack.scale, known[1], stack.source)
