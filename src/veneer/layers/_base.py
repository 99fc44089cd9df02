"""The contract of a kind of layer: the only place that knows how a weight is used.

    y = op(x; W) + bias        update(x) = op(x; ΔW)        ΔW: [g, out, in] folded into the weight's own shape

A kind says how large its ΔW is (``dims``), how ΔW lies in the weight (``fold`` and ``unfold``), how the layer runs on
a given weight (``op``) and how ``op(x; ΔW)`` is computed through the bottleneck (``update``). It knows no variant and
no storage.

To add a kind: a file here, a final subclass of ``Layer``, ``@register``. Its ``examples`` put it into the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.lowrank import LowRank
from veneer.registry import Registry


class Dims(NamedTuple):
    """The size of a change: ``groups`` products of [out, rank] and [rank, in]."""

    groups: int
    out: int
    in_: int

    @property
    def max_rank(self) -> int:
        return min(self.out, self.in_)


class Layer(ABC):
    """One kind of layer. Final subclasses only, without state: the registry holds one instance of each."""

    name: str
    #: the axis of the weight that counts outputs
    out_axis: int = 0
    #: the weight's name in the module
    weight: str = "weight"
    #: keys of A and B in a PEFT file, after the module's path
    file_keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    #: False where inputs are indices: dropout then drops whole tokens of the update, as it would on their one-hot rows
    drops_input: bool = True

    def __reduce__(self) -> tuple[Any, ...]:
        return layer_named, (self.name,)

    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes of this kind. Their subclasses are of this kind too."""

    @abstractmethod
    def dims(self, module: Any) -> Dims: ...

    @abstractmethod
    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The class's own forward, on ``weight`` and ``bias`` in place of the module's."""

    @abstractmethod
    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        """``y + op(x; ΔW)`` through the bottleneck (``op(x; ΔW)`` alone if y is None), in the dtype of x."""

    @abstractmethod
    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """Small modules of this kind with an input each, one for every option that changes the arithmetic."""

    def refuses(self, module: Any) -> str | None:
        """Why this module cannot carry an adapter, or None."""
        return None

    def factors(self, module: Any) -> bool:
        """Whether ``update`` equals ``op(x; ΔW)`` for this module, gradients included, whatever its options are."""
        return True

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        """ΔW [g, out, in] in the weight's shape."""
        return delta.reshape(shape)

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        """A tensor of the weight's shape as [g, out, in]: the inverse of ``fold``."""
        return weight.reshape(dims)

    def fan_in(self, dims: Dims) -> int:
        """How many inputs meet in one row of A, for its Kaiming initialisation."""
        return dims.in_

    def mask_init(self, module: Any, A: Tensor) -> Tensor:
        """A fresh A [g, r, in] with zeros for what must not change."""
        return A

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        """A vector over outputs, [g · out], shaped to broadcast over y."""
        return values

    def pack(self, low: LowRank, module: Any) -> tuple[Tensor, Tensor]:
        """A and B in the shapes of a PEFT file."""
        return low.A[0], low.B[0]

    def unpack(self, A: Tensor, B: Tensor, module: Any) -> tuple[Tensor, Tensor] | None:
        """A [g, r, in] and B [g, out, r] from the shapes of a PEFT file; None if those do not fit this layer."""
        dims = self.dims(module)
        fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and (B.shape[0], A.shape[1]) == (dims.out, dims.in_)
        return (A[None], B[None]) if fits else None


LAYERS: Registry[Layer] = Registry("layer kind")


def layer_named(name: str):
    """The registered layer of this name; a pickle holds this call, so that a copy is the one instance."""
    return LAYERS[name]


def register(kind: type[Layer]) -> type[Layer]:
    """Class decorator: put one instance into the registry. The kinds that are registered last are asked first."""
    LAYERS.add(kind.name, kind())
    return kind


def kind_of(module: Any) -> Layer | None:
    """The kind of a module; a user's own kind comes before ours, as it was registered later."""
    return next((kind for kind in reversed(tuple(LAYERS)) if isinstance(module, kind.types())), None)


def factors(kind: Layer, module: Any, base: type[nn.Module]) -> bool:
    """Whether the factored form is right for ``module``: its class runs the forward that ``kind.op`` mirrors, not one
    of its own."""
    return any(base.forward is stock.forward for stock in kind.types()) and kind.factors(module)
