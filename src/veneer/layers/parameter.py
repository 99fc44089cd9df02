"""Any module with parameters of its own: stacked experts, learned positions, a layer that nobody
has described.

    [out, in]        one change of that size; leading axes of size 1 do not count
    [E, out, in]     a stack of E matrices, each with a change of its own: g = E

The module's own forward runs on W + ΔW, so nothing needs to be known of it. Vectors (norms, scales)
are trained at their full shape. Its biases are left to ``LoraConfig(bias=…)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.layers._base import GENERAL, Dims, Layer, register
from veneer.lowrank import LowRank


class Experts(nn.Module):
    """A stack of linear layers as mixture-of-experts models hold them; x: [E, tokens, in]. For the
    examples."""

    def __init__(self, experts: int, out: int, in_: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(randn(experts, out, in_) / in_**0.5)
        self.bias = nn.Parameter(randn(experts, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(torch.baddbmm(self.bias[:, None], x, self.proj.mT))


class Positions(nn.Module):
    """Learned positions, [1, length, width], and a scale. For the examples."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(randn(1, length, width))
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table) * self.gamma


def without_unit_axes(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its leading axes of size 1."""
    sizes = tuple(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


@register
class Parameters(Layer):
    name = GENERAL

    def types(self) -> tuple[type[nn.Module], ...]:
        return ()  # asked last, whatever the module is: see kind_of

    def weights(self, module: Any) -> tuple[str, ...]:
        return tuple(name for name, axes in _matrix_axes(module).items() if axes > 1)

    def vectors(self, module: Any) -> tuple[str, ...]:
        return tuple(name for name, axes in _matrix_axes(module).items() if axes <= 1)

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        sizes = without_unit_axes(shape)
        if len(sizes) == 3:
            return Dims(*sizes)
        return Dims(1, sizes[0], torch.Size(sizes[1:]).numel())

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        sizes = without_unit_axes(shape)
        lead = sizes[:2] if len(sizes) == 3 else sizes[:1]
        return values.reshape(*lead, *[1] * (len(sizes) - len(lead)))

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        # PEFT: A [E·r, in], B [out, r·E] with the expert counting fastest; in and out swap for
        # modules that say so.
        low = low.T if swapped_stack(module, shape) else low
        return low.A.flatten(0, 1), low.B.permute(1, 2, 0).flatten(1)

    def unpack(
        self, A: Tensor, B: Tensor, module: Any, shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        groups, out, in_ = self.dims(module, shape)
        swapped = swapped_stack(module, shape)
        out, in_ = (in_, out) if swapped else (out, in_)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % groups:
            return None
        if (B.shape[0], A.shape[1]) != (out, in_):
            return None
        A, B = A.reshape(groups, -1, in_), B.reshape(out, -1, groups).permute(2, 0, 1)
        return (B.mT, A.mT) if swapped else (A, B)

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        yield Experts(3, 5, 4), randn(3, 2, 4)
        yield Positions(6, 4), randn(2, 6, 4)


def swapped_stack(module: Any, shape: torch.Size) -> bool:
    """Whether a stack lies as [E, in, out], as experts of transformers say by this attribute."""
    return len(without_unit_axes(shape)) == 3 and bool(getattr(module, "is_transposed", False))


def _matrix_axes(module: Any) -> dict[str, int]:
    """How many axes count in each of a module's own parameters, by name, biases left out."""
    return {
        name: len(without_unit_axes(p.shape))
        for name, p in module._parameters.items()
        if p is not None
        and "bias" not in name
        and p.is_floating_point()
        and not nn.parameter.is_lazy(p)
    }
