"""Weights W + ΔW that are made when somebody reads them and again in backward, and held in between
by nobody.

Here a module's table of parameters makes the tensor at each read; what autograd saves of it is a
note of how to make it again; and the gradient of the weight goes into that of the few adapter
parameters before the next one comes.

Rejected: writing W + ΔW into the weights for the time of a pass (whoever is interrupted loses the
base), and a tensor subclass that is made by each operation (what a forward does with its type, or
below Python, would fail).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from veneer.attach.change import Change
from veneer.attach.dtypes import at_least_float32
from veneer.lowrank import LowRank

Make = Callable[[], Tensor]


class _Note(NamedTuple):
    """In place of a saved tensor: how to make it, and its size, strides and offset in what is
    made."""

    make: Make
    place: tuple[torch.Size, tuple[int, ...], int]


class Recomputed:
    """Makes ``gain ⊙ (W + ΔW)`` of changes, and remembers of which change a tensor is as long as
    that lives."""

    def __init__(self) -> None:
        self.living: dict[int, tuple[torch.dtype, Make]] = {}
        self.latest: tuple[int, Tensor] | None = None

    def read(self, change: Change, weight: Any) -> Tensor:
        """The changed weight, in the dtype of ``weight`` and differentiable in the change's
        parameters."""
        if self.latest is not None and self.latest[0] == id(change):
            return self.latest[1]  # a forward that asks for its dtype first
        self.latest = None
        made: Any = _Changed.apply(change, weight, *change.parameters())
        if made.numel():
            place = made.untyped_storage().data_ptr()
            self.living[place] = made.dtype, lambda: values(change, weight)
            weakref.finalize(made, self.living.pop, place, None).atexit = False
        self.latest = id(change), made
        return made

    def saving(self) -> saved_tensors_hooks:
        """Within it, autograd saves no tensor of ``read``."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Note:
        if type(tensor) is not Tensor or not self.living:
            return tensor
        dtype, make = self.living.get(tensor.untyped_storage().data_ptr(), (None, None))
        if make is None or dtype != tensor.dtype:
            return tensor
        return _Note(make, (tensor.shape, tensor.stride(), int(tensor.storage_offset())))

    def _unpack(self, saved: Tensor | _Note) -> Tensor:
        self.latest = None
        return saved if isinstance(saved, Tensor) else saved.make().as_strided(*saved.place)


class Reads(dict[str, Any]):
    """A module's table of parameters, in which some are made by each read, of what lies there then:
    ``made`` takes it. Where weights are ``spread`` over processes, that is what FSDP2 has gathered
    and put there. Otherwise what somebody writes is what he reads."""

    def __init__(
        self, own: dict[str, Any], made: dict[str, Callable[[Any], Tensor]], spread: bool = False
    ) -> None:
        super().__init__(own)
        self.made, self.spread = made, spread

    def __getitem__(self, name: str) -> Any:
        make, held = self.made.get(name), super().__getitem__(name)
        return held if make is None else make(held)

    def __setitem__(self, name: str, value: Any) -> None:
        if not self.spread:
            self.made.pop(name, None)
        super().__setitem__(name, value)

    def __iter__(self) -> Iterator[str]:  # without it, dict(self) would copy what lies below
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (that is this)

    def values(self) -> Any:
        return (self[name] for name in self)

    def items(self) -> Any:
        return ((name, self[name]) for name in self)

    def kept(self) -> Kept:
        return Kept(self)


class Kept:
    """The same parameters for whoever keeps what it reads (a recurrence's list): later reads give
    that same tensor."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self.reads:
            return default
        self.reads[name] = value = self.reads[name]
        return value


@torch.no_grad()
def values(change: Change, weight: Any) -> Tensor:
    """``change.changed_weight`` in the dtype of the weight, computed in at least float32 and in the memory
    of ΔW."""
    low, gain = change.resolve(weight)
    sum_ = _sum(change, weight, low)
    if gain is not None:
        sum_.mul_(change.layer.spread(gain.to(sum_.dtype), change.dims, sum_.shape))
    return sum_.to(change.storage.dtype(weight))


@torch.no_grad()
def _sum(change: Change, weight: Any, low: LowRank) -> Tensor:
    dense = change.storage.dense(weight)
    return change.layer.fold(low.delta(at_least_float32(dense.dtype)), dense.shape).add_(dense)


class _Changed(torch.autograd.Function):
    """``values``, of which nothing is saved: backward asks for the change anew. With s = gain,
    spread over the weight, and G the gradient of s ⊙ (W + ΔW), those of its parts are ∂ΔW = s ⊙ G
    and ∂s = G ⊙ (W + ΔW); how both depend on the parameters, autograd knows."""

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
                get_gradient_edge(one)
                for one in (delta, scale)
                if one is not None and one.requires_grad
            ]
            low, there = LowRank(low.A.detach(), low.B.detach(), low.scale), delta.requires_grad
            del delta  # whose memory the gradient may have
        given, parts = gradient.to(wide), []
        if scale is not None and scale.requires_grad:
            parts.append(_sum(change, weight, low).mul_(given).sum_to_size(scale.shape))
        if there:
            parts.insert(0, given if scale is None else given * scale.detach())
        del given
        trained = [value for value in change.parameters() if value.requires_grad]
        found = iter(torch.autograd.grad(edges, trained, parts, allow_unused=True))
        return (
            None,
            None,
            *(next(found) if number.requires_grad else None for number in change.parameters()),
        )
