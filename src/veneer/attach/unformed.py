"""W + ΔW of a stack of matrices, as a tensor that is not formed: what the view of a module of
experts computes with.

    W [E, m, n]     ΔW[e] = scale · B[e] A[e]     W[i], W[ids], W.mT, W.chunk(2, 1)     a part of it, not formed either
    x @ (W + ΔW)[i]   =   x W[i] + scale · (x B[i]) A[i]                                linear, bmm, grouped_mm, …

A call of a mixture uses a few matrices of each stack, or all of them with a few rows each; to form
W + ΔW of them all costs more than the call. ``Unformed`` is a tensor for whoever asks (class,
shape, dtype, device, gradient), without memory. The products that a forward reads stacks with
(``experts.py``) are the base's own on W and the low-rank part of the rows that there are. **Every
other operation gets W + ΔW, formed**, so that a forward that nobody has foreseen is right, and as
slow as it would be without this:

- below Python (``__torch_dispatch__``) and in autograd functions too: an ``Unformed`` is the output
  of a node whose backward carries the gradient of W + ΔW on to A and B;
- but in 16 bits, where the view of a module is widened to float32 so that a small ΔW survives:
  there the operation raises ``CannotStandError``, and the call runs again on a widened view. So
  does a write in place.

Rejected: W's own memory behind it. Who takes its address would compute with W and lose the adapter
without a word; without memory that is an error, but on a processor, where the address is asked for
its alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from veneer.attach.dtypes import at_least_float32
from veneer.lowrank import LowRank

#: what a part of a stack is: all of it, one matrix, or these matrices [S]
Index = int | Tensor | None

#: torch's function, or the qualified name of a library's -> what does the same with an
#: ``Unformed``: (the function,
#: its arguments) -> a result, or ``NotImplemented``
OPERATIONS: dict[Any, Callable[..., Any]] = {}


class CannotStandError(Exception):
    """An operation that needs W + ΔW, which may not be formed here."""


@dataclass(eq=False)
class Stack:
    """A frozen stack and its change.

    Fields:
        W, A, B: [E, m, n], [E, r, n] and [E, m, r].
        formable: whether W + ΔW may be formed in the dtype of W.
        call: what the stacks of one call share: where the rows of each expert are.
        source: the input of the call, of whose rows the stacks' inputs may consist.
        pieces: (W, A, B) of each matrix, once one is asked for while gradients are recorded.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    scale: float
    formable: bool
    call: dict[int, Any]
    source: Tensor | None = None
    pieces: Sequence[tuple[Tensor, Tensor, Tensor]] = ()

    def part(self, index: Index, flipped: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) of these matrices; transposed, W.mT with Bᵀ for A and Aᵀ for B, if
        ``flipped``."""
        W, A, B = self.W, self.A, self.B
        if isinstance(index, int):
            if self.trains:  # the gradients of all matrices are one tensor; of a subscript each would be a whole one
                if not self.pieces:
                    self.pieces = [*zip(W.unbind(), A.unbind(), B.unbind(), strict=True)]
                W, A, B = self.pieces[index]
            else:
                W, A, B = W[index], A[index], B[index]
        elif index is not None:
            W, A, B = (one.index_select(0, index) for one in (W, A, B))
        return (W.mT, B.mT, A.mT) if flipped else (W, A, B)

    @property
    def trains(self) -> bool:
        """Whether what is computed with it now has a gradient for A or B."""
        return torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)

    def sliced(self, part: slice) -> Stack:
        return self._with(self.W[part], self.A[part], self.B[part])

    def narrowed(self, axis: int, first: int, size: int) -> Stack:
        """Outputs (axis 1) or inputs (axis 2) of all matrices."""
        A, B = (
            (self.A, self.B.narrow(1, first, size))
            if axis == 1
            else (self.A.narrow(2, first, size), self.B)
        )
        return self._with(self.W.narrow(axis, first, size), A, B)

    def _with(self, W: Tensor, A: Tensor, B: Tensor) -> Stack:
        return Stack(W, A, B, self.scale, self.formable, self.call, self.source)

    def formed(self, index: Index, flipped: bool) -> Tensor:
        """W + ΔW of these matrices, differentiable in A and B."""
        if not self.formable:
            raise CannotStandError
        W, A, B = self.part(index, False)
        wide = at_least_float32(W.dtype)
        low = LowRank(A, B, self.scale) if W.dim() == 3 else LowRank(A[None], B[None], self.scale)
        dense = (W.to(wide) + low.delta(wide).view(W.shape)).to(W.dtype)
        return dense.mT if flipped else dense


class Unformed(Tensor):
    """W + ΔW of a ``Stack`` or of a part of it. Made by ``stand_in``."""

    stack: Stack
    index: Index
    flipped: bool
    # the class's own attributes would each pass through ``__torch_function__``
    shape: Any
    dtype: Any
    device: Any
    ndim: Any

    def formed(self) -> Tensor:
        return self.stack.formed(self.index, self.flipped)

    def oriented(self, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) of what it stands for, or of that transposed."""
        return self.stack.part(self.index, self.flipped != transposed)

    def at(self, index: Index) -> Unformed:
        return stand_in(self.stack, index, self.flipped)

    def transposed(self) -> Unformed:
        return stand_in(self.stack, self.index, not self.flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        known = OPERATIONS.get(func) or OPERATIONS.get(getattr(func, "_qualified_op_name", None))
        found = NotImplemented if known is None else known(func, *args, **kwargs)
        if found is not NotImplemented:
            return found
        if _writes(func, kwargs):
            raise CannotStandError
        return func(*_formed(args), **_formed(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.no_grad():
            args, kwargs = _formed(args), _formed(kwargs or {})
        return func(*args, **kwargs)


def _formed(tree: Any) -> Any:
    return pytree.tree_map_only(Unformed, Unformed.formed, tree)


def _writes(func: Any, kwargs: Any) -> bool:
    """Whether a function writes into one of its arguments, by its name."""
    name = getattr(func, "__name__", "")
    private = name.startswith("__")
    return (name.endswith("_") and not private) or name in WRITING or kwargs.get("out") is not None


WRITING = {
    "__set__", "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
}  # fmt: skip


def stand_in(stack: Stack, index: Index = None, flipped: bool = False) -> Unformed:
    """A tensor that stands for W + ΔW of these matrices, transposed if ``flipped``."""
    return (
        _apply(stack, index, flipped, stack.A, stack.B)
        if stack.trains
        else _bare(stack, index, flipped)
    )


def _bare(stack: Stack, index: Index, flipped: bool) -> Unformed:
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
    made: Any = Tensor._make_wrapper_subclass(
        Unformed, shape, strides=strides, dtype=dtype, device=device
    )
    own = made.__dict__
    own["stack"], own["index"], own["flipped"] = stack, index, flipped
    own["_shape"], own["_dtype"], own["_device"], own["_ndim"] = (
        torch.Size(shape),
        dtype,
        device,
        len(shape),
    )
    return made


for _name in ("shape", "dtype", "device", "ndim"):
    setattr(Unformed, _name, property(attrgetter(f"_{_name}")))


class _Carried(torch.autograd.Function):
    """The node whose output an ``Unformed`` is. The products that are known do not pass through
    it."""

    @staticmethod
    def forward(
        ctx: Any, stack: Stack, index: Index, flipped: bool, A: Tensor, B: Tensor
    ) -> Unformed:
        ctx.scale, ctx.index, ctx.flipped = stack.scale, index, flipped
        ctx.save_for_backward(A, B)
        return _bare(stack, index, flipped)

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
        own = A.index_select(0, index).to(G.dtype), B.index_select(0, index).to(G.dtype)
        dA, dB = own[1].mT @ G, G @ own[0].mT
        found = (
            torch.zeros_like(one).index_add(0, index, by.to(one.dtype))
            for one, by in ((A, dA), (B, dB))
        )
        return None, None, None, *found


# without the Python calls for ``torch.func``, whose transforms never come here (``eager``)
_apply = cast(Any, super(torch.autograd.Function, _Carried)).apply


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


#: what an ``Unformed`` knows of itself
METADATA: frozenset[Any] = frozenset(
    {
        *_getters("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda",
                  "is_cpu", "is_sparse", "is_quantized", "is_meta", "is_nested", "itemsize", "nbytes"),
        Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__,
        Tensor.is_contiguous, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device,
        Tensor.storage_offset, Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor,
    }
)  # fmt: skip
