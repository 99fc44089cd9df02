"""W + ΔW of a stack of matrices as a tensor whose values are not computed. The view of a module of
experts computes with it.

    W [E, m, n]     ΔW[e] = scale · B[e] A[e]
    W[i], W[ids], W.mT, W.chunk(2, 1)                   slices, whose values are not computed either
    x @ (W + ΔW)[i] = x W[i] + scale · (x B[i]) A[i]    linear, bmm, grouped_mm, …

A call of a mixture of experts uses a few matrices of each stack, or all of them with a few rows
each. Forming W + ΔW for all of them costs more than the call. ``Unformed`` has the class, shape,
dtype, device and gradient of a tensor, but no memory. The products with which a forward reads
stacks (``experts.py``) are computed as the base's product with W plus the low-rank update of the
rows.
**Every other operation gets W + ΔW, formed.** So every forward is right, and one with unexpected
operations is as slow as it would be without ``Unformed``:

- The same holds below Python (``__torch_dispatch__``) and in autograd functions: an ``Unformed`` is
  the output of a node whose backward passes the gradient of W + ΔW on to A and B.
- In 16 bits W + ΔW is not formed, as a small ΔW would be lost. The operation raises
  ``CannotStandError``, and the call runs again on a view that is widened to float32. A write in
  place raises it too.

Rejected: an ``Unformed`` with W's memory. Code that takes its address would silently compute with
W. Without memory that is an error, except on a CPU, where code asks for the address to check its
alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from veneer.lowrank import LowRank
from veneer.precision import at_least_float32

#: a selection of a stack's matrices: None for all, the index of one, or the indices of several [S]
Index = int | Tensor | None

#: a function of torch, or the qualified name of an operator -> its implementation for an
#: ``Unformed``, which takes the function and its arguments, and may return ``NotImplemented``
OPERATIONS: dict[Any, Callable[..., Any]] = {}


class CannotStandError(Exception):
    """An operation needs W + ΔW, which may not be formed here."""


@dataclass(eq=False)
class Stack:
    """A frozen stack and its change.

    Fields:
        W, A, B: [E, m, n], [E, r, n] and [E, m, r].
        formable: whether W + ΔW may be formed in the dtype of W.
        call: state that the stacks of one call share: the positions of each expert's rows.
        source: the input of the call; the inputs of the stacks may consist of its rows.
        pieces: (W, A, B) of each matrix; empty until one is selected while gradients are recorded.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    scale: float
    formable: bool
    call: dict[int, Any]
    source: Tensor | None = None
    pieces: Sequence[tuple[Tensor, Tensor, Tensor]] = ()

    def factors(self, index: Index, flipped: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) of these matrices; transposed, W.mT with Bᵀ for A and Aᵀ for B, if
        ``flipped``."""
        W, A, B = self.W, self.A, self.B
        if isinstance(index, int):
            # The gradient of ``unbind`` is one tensor; that of each subscript would be as large.
            if self.trains:
                if not self.pieces:
                    self.pieces = [*zip(W.unbind(), A.unbind(), B.unbind(), strict=True)]
                W, A, B = self.pieces[index]
            else:
                W, A, B = W[index], A[index], B[index]
        elif index is not None:
            W, A, B = (stacked.index_select(0, index) for stacked in (W, A, B))
        return (W.mT, B.mT, A.mT) if flipped else (W, A, B)

    @property
    def trains(self) -> bool:
        """Whether results that are computed now have a gradient for A or B."""
        return torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)

    def slice_matrices(self, bounds: slice) -> Stack:
        """The stack of a slice of the matrices."""
        return self._with(self.W[bounds], self.A[bounds], self.B[bounds])

    def narrow_matrices(self, axis: int, first: int, size: int) -> Stack:
        """The stack with only some outputs (axis 1) or inputs (axis 2) of all matrices."""
        A, B = (
            (self.A, self.B.narrow(1, first, size))
            if axis == 1
            else (self.A.narrow(2, first, size), self.B)
        )
        return self._with(self.W.narrow(axis, first, size), A, B)

    def _with(self, W: Tensor, A: Tensor, B: Tensor) -> Stack:
        return Stack(W, A, B, self.scale, self.formable, self.call, self.source)

    def form(self, index: Index, flipped: bool) -> Tensor:
        """W + ΔW of these matrices, differentiable in A and B."""
        if not self.formable:
            raise CannotStandError
        W, A, B = self.factors(index, False)
        wide = at_least_float32(W.dtype)
        low = LowRank(A, B, self.scale) if W.dim() == 3 else LowRank(A[None], B[None], self.scale)
        dense = (W.to(wide) + low.delta(wide).view(W.shape)).to(W.dtype)
        return dense.mT if flipped else dense


class Unformed(Tensor):
    """W + ΔW of a ``Stack``, or of some of its matrices. Created by ``stand_in``."""

    stack: Stack
    index: Index
    flipped: bool
    # as attributes of ``Tensor``, each would pass through ``__torch_function__``
    shape: Any
    dtype: Any
    device: Any
    ndim: Any

    def form(self) -> Tensor:
        """The values W + ΔW."""
        return self.stack.form(self.index, self.flipped)

    def factors(self, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) of its matrices, or of their transposes."""
        return self.stack.factors(self.index, self.flipped != transposed)

    def take_matrices(self, index: Index) -> Unformed:
        return stand_in(self.stack, index, self.flipped)

    def transpose_matrices(self) -> Unformed:
        return stand_in(self.stack, self.index, not self.flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        operation = OPERATIONS.get(func)
        operation = operation or OPERATIONS.get(getattr(func, "_qualified_op_name", None))
        result = NotImplemented if operation is None else operation(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        if _writes(func, kwargs):
            raise CannotStandError
        return func(*_form_all(args), **_form_all(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.no_grad():
            args, kwargs = _form_all(args), _form_all(kwargs or {})
        return func(*args, **kwargs)


def _form_all(tree: Any) -> Any:
    """Replace each ``Unformed`` in a tree of arguments by its values."""
    return pytree.tree_map_only(Unformed, Unformed.form, tree)


def _writes(func: Any, kwargs: Any) -> bool:
    """Whether a function writes into one of its arguments, judged by its name."""
    name = getattr(func, "__name__", "")
    private = name.startswith("__")
    return (name.endswith("_") and not private) or name in WRITING or kwargs.get("out") is not None


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
#: methods that write into a tensor, besides those with a trailing underscore
WRITING = {"__set__", "__setitem__", *(f"__i{name}__" for name in _IN_PLACE)}


def stand_in(stack: Stack, index: Index = None, flipped: bool = False) -> Unformed:
    """A tensor that stands for W + ΔW of the selected matrices, transposed if ``flipped``."""
    return (
        _apply(stack, index, flipped, stack.A, stack.B)
        if stack.trains
        else _create(stack, index, flipped)
    )


def _create(stack: Stack, index: Index, flipped: bool) -> Unformed:
    """An ``Unformed`` without a gradient."""
    W = stack.W
    shape, strides = W.shape, W.stride()
    if isinstance(index, int):
        shape, strides = shape[1:], strides[1:]
    elif index is not None:
        shape, strides = (len(index), *shape[1:]), (shape[1] * shape[2], shape[2], 1)
    if flipped:
        shape, strides = (
            (*shape[:-2], shape[-1], shape[-2]),
            (*strides[:-2], strides[-1], strides[-2]),
        )
    dtype, device = W.dtype, W.device
    unformed: Any = Tensor._make_wrapper_subclass(
        Unformed, shape, strides=strides, dtype=dtype, device=device
    )
    attributes = unformed.__dict__
    attributes["stack"], attributes["index"], attributes["flipped"] = stack, index, flipped
    attributes["_shape"], attributes["_dtype"], attributes["_device"], attributes["_ndim"] = (
        torch.Size(shape),
        dtype,
        device,
        len(shape),
    )
    return unformed


for _name in ("shape", "dtype", "device", "ndim"):
    setattr(Unformed, _name, property(attrgetter(f"_{_name}")))


class _UnformedNode(torch.autograd.Function):
    """The autograd node that outputs an ``Unformed``. The products of ``OPERATIONS`` have nodes of
    their own."""

    @staticmethod
    def forward(
        ctx: Any, stack: Stack, index: Index, flipped: bool, A: Tensor, B: Tensor
    ) -> Unformed:
        ctx.scale, ctx.index, ctx.flipped = stack.scale, index, flipped
        ctx.save_for_backward(A, B)
        return _create(stack, index, flipped)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, B = ctx.saved_tensors
        index = ctx.index
        G = (gradient.mT if ctx.flipped else gradient).to(at_least_float32(A.dtype)) * ctx.scale
        if index is None:
            return (
                None,
                None,
                None,
                (B.to(G.dtype).mT @ G).to(A.dtype),
                (G @ A.to(G.dtype).mT).to(B.dtype),
            )
        if isinstance(index, int):
            G, index = G[None], torch.tensor([index], device=G.device)
        selected_A = A.index_select(0, index).to(G.dtype)
        selected_B = B.index_select(0, index).to(G.dtype)
        dA, dB = selected_B.mT @ G, G @ selected_A.mT
        gradients = (
            torch.zeros_like(factor).index_add(0, index, update.to(factor.dtype))
            for factor, update in ((A, dA), (B, dB))
        )
        return None, None, None, *gradients


# Skips the Python calls of ``apply`` for ``torch.func``, whose transforms never get here.
_apply = cast(Any, super(torch.autograd.Function, _UnformedNode)).apply


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


#: functions and attributes that an ``Unformed`` answers without forming W + ΔW
METADATA: frozenset[Any] = frozenset(
    {
        *_getters(
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "requires_grad",
            "is_leaf",
            "grad_fn",
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_quantized",
            "is_meta",
            "is_nested",
            "itemsize",
            "nbytes",
        ),
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.stride,
        Tensor.__len__,
        Tensor.is_contiguous,
        Tensor.element_size,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.get_device,
        Tensor.storage_offset,
        Tensor.__hash__,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        torch.is_tensor,
    }
)
