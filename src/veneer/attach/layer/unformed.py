"""W + ΔW of a stack of matrices as a tensor whose values are not computed. A module of experts runs
on a view that holds such a tensor in place of its weight.

    W [E, m, n]     ΔW[e] = scale · B[e] A[e]           E matrices, such as the experts of a layer
    A [E, r, n]     B [E, m, r]                         r: the rank
    W[i], W[ids], W.mT, W.chunk(2, 1)                   slices, whose values are not computed either
    x @ (W + ΔW)[i] = x W[i] + scale · (x B[i]) A[i]    linear, bmm, grouped_mm, …

A call of a mixture of experts uses a few matrices of each stack, or multiplies each matrix with a
few rows. Forming W + ΔW of all matrices would take longer than the call itself. An ``Unformed`` has
the shape, dtype, device and gradient of W + ΔW, but no memory. Products of it (``experts.py``) are
computed as the base's product with W plus the low-rank update.
**For every other operation, W + ΔW is formed.** So every forward computes the right output. A
forward with an unexpected operation is only as slow as it would be without ``Unformed``:

- Operations that are called below Python (``__torch_dispatch__``) and in autograd functions form
  W + ΔW too. An ``Unformed`` is the output of an autograd node whose backward passes the gradient
  of W + ΔW on to A and B.
- In 16 bits W + ΔW is not formed, because a small ΔW would be lost. The operation raises
  ``CannotFormError``, and the call runs again on a view whose weights are widened to float32. An
  operation that writes in place raises the error too.

Rejected: an ``Unformed`` with W's memory. Code that takes the address of the tensor would silently
compute with W. Without memory such code fails. An exception is a CPU, where code asks for the
address to check its alignment.
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

#: the selected matrices of a stack: all (None), one (its index), or several (their indices [S])
Index = int | Tensor | None

#: a function of torch, or the qualified name of an operator -> its implementation for an
#: ``Unformed``. The implementation is called with the function and its arguments. It returns
#: ``NotImplemented`` for arguments that it does not support.
OPERATIONS: dict[Any, Callable[..., Any]] = {}


class CannotFormError(Exception):
    """An operation needs the values of W + ΔW in a call in which they must not be formed, because
    16 bits would lose a small ΔW; or it writes to W + ΔW in place."""


@dataclass(eq=False)
class Stack:
    """A frozen stack of E matrices and its low-rank change.

    Fields:
        W, A, B: [E, m, n], [E, r, n] and [E, m, r].
        can_form: whether W + ΔW may be formed in the dtype of W.
        call_state: a cache that the stacks of one call share: how the rows are grouped by expert,
            by the experts of the rows.
        call_input: the input of the module's call. If the input of a product consists of rows of
            this tensor, this tensor can be saved for backward instead.
        unbound: (W, A, B) of each matrix. Empty until a matrix is selected while gradients are
            recorded.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    scale: float
    can_form: bool
    call_state: dict[tuple, Any]
    call_input: Tensor | None = None
    unbound: Sequence[tuple[Tensor, Tensor, Tensor]] = ()

    def factors(self, index: Index, is_transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) of the matrices ``index``. If ``is_transposed``, (Wᵀ, Bᵀ, Aᵀ), which are the
        factors of the transposed matrices."""
        W, A, B = self.W, self.A, self.B
        if isinstance(index, int):
            # Unbind all matrices once: the backward of ``unbind`` creates one gradient of the
            # stack's size for all of them; that of a subscript would create one for each matrix.
            if self.needs_gradient:
                if not self.unbound:
                    self.unbound = [*zip(W.unbind(), A.unbind(), B.unbind(), strict=True)]
                W, A, B = self.unbound[index]
            else:
                W, A, B = W[index], A[index], B[index]
        elif index is not None:
            W, A, B = (stacked.index_select(0, index) for stacked in (W, A, B))
        return (W.mT, B.mT, A.mT) if is_transposed else (W, A, B)

    @property
    def needs_gradient(self) -> bool:
        """Whether autograd records operations now, and A or B requires a gradient."""
        return torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)

    def slice_matrices(self, bounds: slice) -> Stack:
        """A stack with only the matrices in ``bounds``."""
        return self._with_factors(self.W[bounds], self.A[bounds], self.B[bounds])

    def narrow_matrices(self, axis: int, first: int, size: int) -> Stack:
        """A stack with only some outputs (axis 1) or inputs (axis 2) of all matrices: ``size`` of
        them from ``first`` on."""
        A, B = (
            (self.A, self.B.narrow(1, first, size))
            if axis == 1
            else (self.A.narrow(2, first, size), self.B)
        )
        return self._with_factors(self.W.narrow(axis, first, size), A, B)

    def _with_factors(self, W: Tensor, A: Tensor, B: Tensor) -> Stack:
        return Stack(W, A, B, self.scale, self.can_form, self.call_state, self.call_input)

    def form_matrices(self, index: Index, is_transposed: bool) -> Tensor:
        """W + ΔW of the matrices ``index``, differentiable in A and B; transposed if
        ``is_transposed``. Raises a CannotFormError if ``can_form`` is False."""
        if not self.can_form:
            raise CannotFormError
        W, A, B = self.factors(index, False)
        wide_dtype = at_least_float32(W.dtype)
        low_rank = (
            LowRank(A, B, self.scale) if W.dim() == 3 else LowRank(A[None], B[None], self.scale)
        )
        dense = (W.to(wide_dtype) + low_rank.delta(wide_dtype).view(W.shape)).to(W.dtype)
        return dense.mT if is_transposed else dense


class Unformed(Tensor):
    """A tensor that stands for W + ΔW of a ``Stack``, or of some of its matrices. The values are
    computed only if an operation needs them. ``make_unformed`` creates it.

    Fields:
        index: the selected matrices of ``stack``.
        is_transposed: whether the matrices are transposed.
    """

    stack: Stack
    index: Index
    is_transposed: bool
    # Redefined as properties below, because a read of an attribute of ``Tensor`` would go through
    # ``__torch_function__``.
    shape: Any
    dtype: Any
    device: Any
    ndim: Any

    def form_values(self) -> Tensor:
        """This tensor as an ordinary tensor with the values of W + ΔW."""
        return self.stack.form_matrices(self.index, self.is_transposed)

    def factors(self, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) of this tensor's matrices, or of their transposes if ``transposed``."""
        return self.stack.factors(self.index, self.is_transposed != transposed)

    def take_matrices(self, index: Index) -> Unformed:
        """The ``Unformed`` of the matrices ``index`` of the stack. The caller may write to a tensor
        before a product uses the matrices. So on a CPU a copy of it is kept (negative indices
        counted from the start), by which the product groups its rows; elsewhere, where products
        gather W, A and B, they are gathered now."""
        stack = self.stack
        if isinstance(index, Tensor) and not index.is_cpu:
            stack, index = stack._with_factors(*stack.factors(index, False)), None
        elif isinstance(index, Tensor):
            index = torch.where(index < 0, index + len(stack.W), index)
        return make_unformed(stack, index, self.is_transposed)

    def transpose_matrices(self) -> Unformed:
        return make_unformed(self.stack, self.index, not self.is_transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        implementation = OPERATIONS.get(func)
        implementation = implementation or OPERATIONS.get(getattr(func, "_qualified_op_name", None))
        result = NotImplemented if implementation is None else implementation(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        if _writes_in_place(func, kwargs):
            raise CannotFormError
        return func(*_form_all(args), **_form_all(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.no_grad():
            args, kwargs = _form_all(args), _form_all(kwargs or {})
        return func(*args, **kwargs)


def _form_all(tree: Any) -> Any:
    """Replace each ``Unformed`` in a tree of arguments by its values."""
    return pytree.tree_map_only(Unformed, Unformed.form_values, tree)


def _writes_in_place(func: Any, kwargs: Any) -> bool:
    """Whether a torch function writes into one of its arguments, judged by its name and by the
    argument ``out``."""
    name = getattr(func, "__name__", "")
    is_dunder = name.startswith("__")
    ends_in_place = name.endswith("_") and not is_dunder
    return ends_in_place or name in WRITING_METHODS or kwargs.get("out") is not None


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
#: methods that write into a tensor although their names do not end with one underscore
WRITING_METHODS = {"__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)}


def make_unformed(stack: Stack, index: Index = None, is_transposed: bool = False) -> Unformed:
    """An ``Unformed`` of the matrices ``index``, transposed if ``is_transposed``. It has an
    autograd node if gradients are recorded for A or B."""
    return (
        _apply_node(stack, index, is_transposed, stack.A, stack.B)
        if stack.needs_gradient
        else _create_unformed(stack, index, is_transposed)
    )


def _create_unformed(stack: Stack, index: Index, is_transposed: bool) -> Unformed:
    """An ``Unformed`` of the matrices ``index`` without an autograd node. It is a wrapper subclass:
    torch gets its shape and strides, but allocates no memory."""
    W = stack.W
    shape, strides = W.shape, W.stride()
    if isinstance(index, int):
        shape, strides = shape[1:], strides[1:]
    elif index is not None:
        shape, strides = (len(index), *shape[1:]), (shape[1] * shape[2], shape[2], 1)
    if is_transposed:
        shape, strides = (
            (*shape[:-2], shape[-1], shape[-2]),
            (*strides[:-2], strides[-1], strides[-2]),
        )
    dtype, device = W.dtype, W.device
    unformed: Any = Tensor._make_wrapper_subclass(
        Unformed, shape, strides=strides, dtype=dtype, device=device
    )
    attributes = unformed.__dict__
    attributes["stack"], attributes["index"], attributes["is_transposed"] = (
        stack,
        index,
        is_transposed,
    )
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
    """The autograd node that outputs an ``Unformed``. If W + ΔW was formed, its backward turns the
    gradient of W + ΔW into those of A and B. Products in ``OPERATIONS`` do not use it: each creates
    a node of its own."""

    @staticmethod
    def forward(
        ctx: Any, stack: Stack, index: Index, is_transposed: bool, A: Tensor, B: Tensor
    ) -> Unformed:
        ctx.scale, ctx.index, ctx.is_transposed = stack.scale, index, is_transposed
        ctx.save_for_backward(A, B)
        return _create_unformed(stack, index, is_transposed)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, B = ctx.saved_tensors
        index = ctx.index
        scaled_dW = (dW.mT if ctx.is_transposed else dW).to(at_least_float32(A.dtype)) * ctx.scale
        if index is None:
            return (
                None,
                None,
                None,
                (B.to(scaled_dW.dtype).mT @ scaled_dW).to(A.dtype),
                (scaled_dW @ A.to(scaled_dW.dtype).mT).to(B.dtype),
            )
        if isinstance(index, int):
            scaled_dW, index = scaled_dW[None], torch.tensor([index], device=scaled_dW.device)
        selected_A = A.index_select(0, index).to(scaled_dW.dtype)
        selected_B = B.index_select(0, index).to(scaled_dW.dtype)
        dA, dB = selected_B.mT @ scaled_dW, scaled_dW @ selected_A.mT
        gradients = (
            torch.zeros_like(factor).index_add(0, index, update.to(factor.dtype))
            for factor, update in ((A, dA), (B, dB))
        )
        return None, None, None, *gradients


# The ``apply`` of the base class of ``Function``, which is faster. The method of ``Function`` only
# adds support for ``torch.func``, under which no ``Unformed`` is made (``kernels.is_eager``).
_apply_node = cast(Any, super(torch.autograd.Function, _UnformedNode)).apply


_METADATA_ATTRIBUTES = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn",
    "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "is_nested", "itemsize",
    "nbytes",
)  # fmt: skip

#: functions and attributes that an ``Unformed`` supports without forming W + ΔW
METADATA: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _METADATA_ATTRIBUTES),
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
