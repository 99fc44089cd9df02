"""The general kind: any module with parameters that has no kind of its own, such as stacked
experts, learned positions, or a layer of a user's model.

    weight [out, in]       one low-rank change of this size; leading axes of size 1 are ignored
    weight [E, out, in]    a stack of E matrices, each with its own low-rank change

The module's own forward runs on W + ΔW, the weight plus its low-rank change, so nothing needs to be
known of how the module computes. Vectors (norms, scales) are trained at their full shape.
``LoraConfig(bias=…)`` says whether biases are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.layers._base import GENERAL_KIND_NAME, Dims, Layer, register
from veneer.lowrank import LowRank


class Experts(nn.Module):
    """A stack of linear layers, as in mixture-of-experts models, for the examples. x is [E, tokens,
    in]."""

    def __init__(self, expert_count: int, out: int, in_: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(randn(expert_count, out, in_) / in_**0.5)
        self.bias = nn.Parameter(randn(expert_count, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(torch.baddbmm(self.bias[:, None], x, self.proj.mT))


class Positions(nn.Module):
    """A module for the examples: it adds learned positions [1, length, width] to its input and
    multiplies the sum by a learned scale [width]."""

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
    name = GENERAL_KIND_NAME

    def types(self) -> tuple[type[nn.Module], ...]:
        return ()  # ``kind_of`` uses this kind if no other kind matches

    def weights(self, module: Any) -> tuple[str, ...]:
        return tuple(name for name, axis_count in _axis_counts(module).items() if axis_count > 1)

    def vectors(self, module: Any) -> tuple[str, ...]:
        return tuple(name for name, axis_count in _axis_counts(module).items() if axis_count <= 1)

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        sizes = without_unit_axes(shape)
        if len(sizes) == 3:
            return Dims(*sizes)
        return Dims(1, sizes[0], torch.Size(sizes[1:]).numel())

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        sizes = without_unit_axes(shape)
        output_sizes = sizes[:2] if len(sizes) == 3 else sizes[:1]
        return values.reshape(*output_sizes, *[1] * (len(sizes) - len(output_sizes)))

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        # PEFT's A is [E·r, in]. Its B is [out, r·E]; along the second axis, the index of the expert
        # varies fastest. If the module's stack is [E, in, out], PEFT swaps in and out.
        low = low.T if is_transposed_stack(module, shape) else low
        return low.A.flatten(0, 1), low.B.permute(1, 2, 0).flatten(1)

    def unpack(
        self, A: Tensor, B: Tensor, module: Any, shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        groups, out, in_ = self.dims(module, shape)
        is_transposed = is_transposed_stack(module, shape)
        out, in_ = (in_, out) if is_transposed else (out, in_)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % groups:
            return None
        if (B.shape[0], A.shape[1]) != (out, in_):
            return None
        A, B = A.reshape(groups, -1, in_), B.reshape(out, -1, groups).permute(2, 0, 1)
        return (B.mT, A.mT) if is_transposed else (A, B)

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        yield Experts(3, 5, 4), randn(3, 2, 4)
        yield Positions(6, 4), randn(2, 6, 4)


def is_transposed_stack(module: Any, shape: torch.Size) -> bool:
    """Whether a weight with this ``shape`` is a stack [E, in, out] instead of [E, out, in]: it has
    three axes, and the module has the attribute ``is_transposed`` of transformers' experts."""
    return len(without_unit_axes(shape)) == 3 and bool(getattr(module, "is_transposed", False))


def _axis_counts(module: Any) -> dict[str, int]:
    """{name: number of axes, without leading axes of size 1} of a module's own floating-point
    parameters. Biases and lazy parameters are omitted."""
    return {
        name: len(without_unit_axes(parameter.shape))
        for name, parameter in module._parameters.items()
        if parameter is not None
        and "bias" not in name
        and parameter.is_floating_point()
        and not nn.parameter.is_lazy(parameter)
    }
