"""Weights W + ΔW that are computed when they are read, recomputed in backward, and not stored in
between.

A ``ComputedParameters`` takes the place of a module's ``_parameters`` and computes the tensor at
each read. Instead of the tensor, autograd saves a function that computes it again. Backward turns
the gradient of each weight into gradients of the small adapter parameters before it reaches the
next weight. So only about one W + ΔW and one gradient of it exist at a time.

Rejected: writing W + ΔW into the weights during a pass, because an interrupt would lose the base.
Also a tensor subclass that each operation would recompute, because a forward that tests the
tensor's type would fail, and so would C++ code that reads the tensor's memory.
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

#: a function that computes a tensor
ComputeTensor = Callable[[], Tensor]


class _SavedRecipe(NamedTuple):
    """The data that autograd saves in place of a tensor, from which backward computes it again.

    Fields:
        compute: returns a tensor whose storage has the contents that the storage of the saved
            tensor had.
        geometry: the shape, the strides and the offset of the saved tensor in this storage, in
            elements.
    """

    compute: ComputeTensor
    geometry: tuple[torch.Size, tuple[int, ...], int]


class Recomputed:
    """Computes ``gain ⊙ (W + ΔW)`` (gain: a factor for each output, as in DoRA), and records from
    which change each tensor was computed.

    Fields:
        live_weights: (dtype, function that computes the tensor again) of each computed tensor that
            still exists, by the address of its storage.
        latest: (``id`` of the change, tensor) of the last read; None if nothing is kept. A second
            read of the weight in a row returns this tensor.
    """

    def __init__(self) -> None:
        self.live_weights: dict[int, tuple[torch.dtype, ComputeTensor]] = {}
        self.latest: tuple[int, Tensor] | None = None

    def read(self, change: Change, weight: Any) -> Tensor:
        """``gain ⊙ (W + ΔW)`` for the stored ``weight`` W, in its dtype and differentiable in the
        change's parameters."""
        if self.latest is not None and self.latest[0] == id(change):
            return self.latest[1]  # forwards often read a weight twice: its dtype, then its values
        self.latest = None
        changed_weight: Any = _ChangedWeight.apply(change, weight, *change.parameters())
        if changed_weight.numel():
            address = changed_weight.untyped_storage().data_ptr()
            self.live_weights[address] = (
                changed_weight.dtype,
                lambda: compute_weight(change, weight),
            )
            weakref.finalize(changed_weight, self.live_weights.pop, address, None).atexit = False
        self.latest = id(change), changed_weight
        return changed_weight

    def recipe_hooks(self) -> saved_tensors_hooks:
        """A context manager in which autograd does not save tensors that ``read`` has returned,
        nor views of them. It saves how to compute them again, which needs far less memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _SavedRecipe:
        if type(tensor) is not Tensor or not self.live_weights:
            return tensor
        storage_address = tensor.untyped_storage().data_ptr()
        dtype, compute_again = self.live_weights.get(storage_address, (None, None))
        if compute_again is None or dtype != tensor.dtype:
            return tensor
        return _SavedRecipe(
            compute_again, (tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        )

    def _unpack(self, saved: Tensor | _SavedRecipe) -> Tensor:
        self.latest = None
        return saved if isinstance(saved, Tensor) else saved.compute().as_strided(*saved.geometry)


class ComputedParameters(dict[str, Any]):
    """A replacement for ``module._parameters``, in which some parameters are computed at each read.

    Args:
        parameters: the stored parameters, by name.
        compute_functions: for each computed parameter, by name, the function that computes it from
            the stored parameter.
        is_spread: whether FSDP2 has sharded the weights. It then assigns the gathered parameters to
            this dict, as inputs for ``compute_functions``. Otherwise a parameter that is assigned
            is no longer computed.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        compute_functions: dict[str, Callable[[Any], Tensor]],
        is_spread: bool = False,
    ) -> None:
        super().__init__(parameters)
        self.compute_functions, self.is_spread = compute_functions, is_spread

    def __getitem__(self, name: str) -> Any:
        compute_value, stored_parameter = (
            self.compute_functions.get(name),
            super().__getitem__(name),
        )
        return stored_parameter if compute_value is None else compute_value(stored_parameter)

    def __setitem__(self, name: str, value: Any) -> None:
        if not self.is_spread:
            self.compute_functions.pop(name, None)
        super().__setitem__(name, value)

    def __iter__(self) -> Iterator[str]:  # makes dict(self) call __getitem__, not copy stored items
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is dict.get)

    def values(self) -> Any:
        return (self[name] for name in self)

    def items(self) -> Any:
        return ((name, self[name]) for name in self)


class ParametersComputedOnce:
    """Reads the parameters of a ``ComputedParameters`` and stores each result in it, so that later
    reads return the same tensor. It serves modules that keep a list of the tensors that they have
    read, such as recurrent layers, whose list and attributes must hold the same tensors."""

    def __init__(self, parameters: ComputedParameters) -> None:
        self.parameters = parameters

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self.parameters:
            return default
        self.parameters[name] = value = self.parameters[name]
        return value


@torch.no_grad()
def compute_weight(change: Change, weight: Any) -> Tensor:
    """``gain ⊙ (W + ΔW)`` in the dtype of the weight, without a graph. It is computed in at least
    float32, in place in the memory of ΔW, and then rounded."""
    low_rank, gain = change.resolve(weight)
    changed_weight = _add_delta(change, weight, low_rank)
    if gain is not None:
        spread_gain = change.layer.spread(
            gain.to(changed_weight.dtype), change.dims, changed_weight.shape
        )
        changed_weight.mul_(spread_gain)
    return changed_weight.to(change.storage.dtype(weight))


@torch.no_grad()
def _add_delta(change: Change, weight: Any, low_rank: LowRank) -> Tensor:
    """W + ΔW in at least float32, in the shape of the weight, without the change's gain."""
    dense = change.storage.dense(weight)
    return change.layer.fold(low_rank.delta(at_least_float32(dense.dtype)), dense.shape).add_(dense)


class _ChangedWeight(torch.autograd.Function):
    """``compute_weight`` as an autograd function that saves no tensor: backward computes ΔW and the
    gain from the adapter parameters again.

    Let s be the gain, broadcast to the shape of the weight, and G the gradient with respect to
    s ⊙ (W + ΔW). The gradient with respect to ΔW is s ⊙ G, and with respect to s it is
    G ⊙ (W + ΔW). From these two, autograd computes the gradients of the adapter parameters.
    """

    @staticmethod
    def forward(ctx: Any, change: Change, weight: Any, *parameters: Tensor) -> Tensor:
        ctx.change, ctx.weight = change, weight
        return compute_weight(change, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        change, weight, shape = ctx.change, ctx.weight, gradient.shape
        wide_dtype = at_least_float32(gradient.dtype)
        with torch.enable_grad():
            low_rank, gain = change.resolve(weight)
            dense_delta = change.layer.fold(low_rank.delta(wide_dtype), shape)
            if gain is None:
                spread_gain = None
            else:
                spread_gain = change.layer.spread(gain.to(wide_dtype), change.dims, shape)
            edges = [
                get_gradient_edge(factor)
                for factor in (dense_delta, spread_gain)
                if factor is not None and factor.requires_grad
            ]
            low_rank = LowRank(low_rank.A.detach(), low_rank.B.detach(), low_rank.scale)
            trains_delta = dense_delta.requires_grad
            del dense_delta  # its memory can hold the gradient
        wide_gradient, edge_gradients = gradient.to(wide_dtype), []
        if spread_gain is not None and spread_gain.requires_grad:
            weight_sum = _add_delta(change, weight, low_rank)
            edge_gradients.append(weight_sum.mul_(wide_gradient).sum_to_size(spread_gain.shape))
            del weight_sum
        if trains_delta:
            edge_gradients.insert(
                0, wide_gradient if spread_gain is None else wide_gradient * spread_gain.detach()
            )
        del wide_gradient
        trained = [parameter for parameter in change.parameters() if parameter.requires_grad]
        gradients = iter(torch.autograd.grad(edges, trained, edge_gradients, allow_unused=True))
        return (
            None,
            None,
            *(
                next(gradients) if parameter.requires_grad else None
                for parameter in change.parameters()
            ),
        )
