"""Weights W + ΔW that are computed when they are read, recomputed in backward, and not stored in
between.

A module's table of parameters (``ComputedParameters``) computes the tensor at each read. Autograd
saves a note of how to compute it again instead of the tensor. Backward turns the gradient of each
weight into gradients of the small adapter parameters before it reaches the next weight.

Rejected: writing W + ΔW into the weights for the time of a pass (an interrupt would lose the base),
and a tensor subclass that each operation would recompute (a forward that looks at the type, or code
below Python, would fail).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from veneer.attach.layer.change import Change
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32

#: computes a tensor
Make = Callable[[], Tensor]


class _SavedRecipe(NamedTuple):
    """Stands for a saved tensor: a function that computes its storage, and the tensor's size,
    strides and offset in it."""

    make: Make
    geometry: tuple[torch.Size, tuple[int, ...], int]


class Recomputed:
    """Computes ``gain ⊙ (W + ΔW)``, and remembers which change each living tensor was computed
    from."""

    def __init__(self) -> None:
        self.living: dict[int, tuple[torch.dtype, Make]] = {}
        self.latest: tuple[int, Tensor] | None = None

    def read(self, change: Change, weight: Any) -> Tensor:
        """The changed weight, in the dtype of ``weight`` and differentiable in the change's
        parameters."""
        if self.latest is not None and self.latest[0] == id(change):
            return self.latest[1]  # a forward may read the dtype first
        self.latest = None
        changed: Any = _Changed.apply(change, weight, *change.parameters())
        if changed.numel():
            address = changed.untyped_storage().data_ptr()
            self.living[address] = changed.dtype, lambda: values(change, weight)
            weakref.finalize(changed, self.living.pop, address, None).atexit = False
        self.latest = id(change), changed
        return changed

    def saving(self) -> saved_tensors_hooks:
        """A block in which autograd saves no tensor that ``read`` returned."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _SavedRecipe:
        if type(tensor) is not Tensor or not self.living:
            return tensor
        dtype, make = self.living.get(tensor.untyped_storage().data_ptr(), (None, None))
        if make is None or dtype != tensor.dtype:
            return tensor
        return _SavedRecipe(make, (tensor.shape, tensor.stride(), int(tensor.storage_offset())))

    def _unpack(self, saved: Tensor | _SavedRecipe) -> Tensor:
        self.latest = None
        return saved if isinstance(saved, Tensor) else saved.make().as_strided(*saved.geometry)


class ComputedParameters(dict[str, Any]):
    """A module's table of parameters, some of which are computed at each read.

    ``compute`` maps such a name to a function of the stored parameter. A parameter that is assigned
    is no longer computed, unless the weights are ``spread`` over processes: then FSDP2 assigns the
    gathered parameters, which are the input of ``compute``.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        compute: dict[str, Callable[[Any], Tensor]],
        spread: bool = False,
    ) -> None:
        super().__init__(parameters)
        self.compute, self.spread = compute, spread

    def __getitem__(self, name: str) -> Any:
        make, stored = self.compute.get(name), super().__getitem__(name)
        return stored if make is None else make(stored)

    def __setitem__(self, name: str, value: Any) -> None:
        if not self.spread:
            self.compute.pop(name, None)
        super().__setitem__(name, value)

    def __iter__(self) -> Iterator[str]:  # without it, dict(self) would copy the stored parameters
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is dict.get)

    def values(self) -> Any:
        return (self[name] for name in self)

    def items(self) -> Any:
        return ((name, self[name]) for name in self)

    def computed_once(self) -> ParametersComputedOnce:
        return ParametersComputedOnce(self)


class ParametersComputedOnce:
    """The same parameters for a module that stores what it reads (the list of weights of a
    recurrent layer): each is computed once, and later reads give the same tensor."""

    def __init__(self, parameters: ComputedParameters) -> None:
        self.parameters = parameters

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self.parameters:
            return default
        self.parameters[name] = value = self.parameters[name]
        return value


@torch.no_grad()
def values(change: Change, weight: Any) -> Tensor:
    """``change.changed_weight`` in the dtype of the weight, computed in at least float32 and in
    the memory of ΔW."""
    low, gain = change.resolve(weight)
    changed = _add_delta(change, weight, low)
    if gain is not None:
        changed.mul_(change.layer.spread(gain.to(changed.dtype), change.dims, changed.shape))
    return changed.to(change.storage.dtype(weight))


@torch.no_grad()
def _add_delta(change: Change, weight: Any, low: LowRank) -> Tensor:
    """W + ΔW in at least float32."""
    dense = change.storage.dense(weight)
    return change.layer.fold(low.delta(at_least_float32(dense.dtype)), dense.shape).add_(dense)


class _Changed(torch.autograd.Function):
    """``values`` as an autograd function that saves no tensor: backward resolves the change again.

    With s the gain, spread over the weight, and G the gradient of s ⊙ (W + ΔW): ∂ΔW = s ⊙ G and
    ∂s = G ⊙ (W + ΔW). Autograd continues from there to the adapter parameters.
    """

    @staticmethod
    def forward(ctx: Any, change: Change, weight: Any, *parameters: Tensor) -> Tensor:
        ctx.change, ctx.weight = change, weight
        return values(change, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        change, weight, shape = ctx.change, ctx.weight, gradient.shape
        wide = at_least_float32(gradient.dtype)
        with torch.enable_grad():
            low, gain = change.resolve(weight)
            delta = change.layer.fold(low.delta(wide), shape)
            scale = None if gain is None else change.layer.spread(gain.to(wide), change.dims, shape)
            edges = [
                get_gradient_edge(factor)
                for factor in (delta, scale)
                if factor is not None and factor.requires_grad
            ]
            low, trains_delta = (
                LowRank(low.A.detach(), low.B.detach(), low.scale),
                delta.requires_grad,
            )
            del delta  # so that the gradient can reuse its memory
        wide_gradient, edge_gradients = gradient.to(wide), []
        if scale is not None and scale.requires_grad:
            changed = _add_delta(change, weight, low)
            edge_gradients.append(changed.mul_(wide_gradient).sum_to_size(scale.shape))
            del changed
        if trains_delta:
            edge_gradients.insert(
                0, wide_gradient if scale is None else wide_gradient * scale.detach()
            )
        del wide_gradient
        trained = [value for value in change.parameters() if value.requires_grad]
        gradients = iter(torch.autograd.grad(edges, trained, edge_gradients, allow_unused=True))
        return (
            None,
            None,
            *(
                next(gradients) if parameter.requires_grad else None
                for parameter in change.parameters()
            ),
        )
