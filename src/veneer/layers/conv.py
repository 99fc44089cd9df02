"""``nn.Conv1d``, ``Conv2d``, ``Conv3d``: weight [out, in/g, *k], every stride, padding and padding mode, dilation,
groups.

    ΔW[g] = scale · B[g] @ A[g]        A: [g, r, in/g · |k|]   B: [g, out/g, r]

A convolution is linear in its weight, so its bottleneck is the same convolution with A as the weight (A has g · r
outputs in g groups, and inherits stride, padding, padding mode and dilation from the module), followed by a 1 × 1
convolution with B. A change of a grouped weight is grouped itself; PEFT's is not (its A spans all groups), which is
why that can't be merged.

In a file A is [g·r, in/g, *k] and B [out, r, 1, …]: PEFT's layout wherever g = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.kernels import conv
from veneer.layers._base import Dims, Layer, register
from veneer.lowrank import LowRank


class _Conv(Layer):
    """What the three convolutions share; ``spatial`` is the number of their spatial axes."""

    spatial: int

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        out, in_, *kernel = shape
        return Dims(module.groups, out // module.groups, in_ * torch.Size(kernel).numel())

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return module._conv_forward(x, weight, bias)

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        A, B = self._as_weights(low, module.weight.shape)
        h = module._conv_forward(x, A, None)  # [N, g·r, *spatial]
        change = self._pointwise(h, B * low.scale, groups=module.groups)  # [N, out, *spatial]
        return change if y is None else y + change

    def fused(
        self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, drops: float
    ) -> Tensor | None:
        plain = x.numel() > conv.SMALL and module.groups == 1 and module.padding_mode == "zeros"
        whole = x.dim() == self.spatial + 2 and conv.lies(x) is not None and conv.lies(weight) is not None
        if not (plain and whole) or isinstance(module.padding, str):
            return None
        geometry = conv.Geometry(module.stride, module.padding, module.dilation)
        return conv.conv(geometry, low.scale, x, weight, bias, low.A[0], low.B[0], drops)

    def _as_weights(self, low: LowRank, shape: torch.Size) -> tuple[Tensor, Tensor]:
        _, in_, *kernel = shape
        A = low.A.reshape(-1, in_, *kernel)  # [g·r, in/g, *k]
        B = low.B.reshape(-1, low.rank, *[1] * self.spatial)  # [out, r, 1, …]
        return A, B

    def _pointwise(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[self.spatial - 1]
        return convolution(x, weight, groups=groups)

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * self.spatial)

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        # The rows of ΔW's input are the patches under the kernel: a convolution with the identity as its kernel.
        x, (groups, _, in_) = args[0], self.dims(module, module.weight.shape)
        patch = torch.eye(in_, dtype=x.dtype, device=x.device).reshape(in_, *module.weight.shape[1:])
        patches = module._conv_forward(x, patch.repeat(groups, *[1] * (self.spatial + 1)), None)
        batched = patches if patches.dim() == self.spatial + 2 else patches[None]
        return batched.movedim(1, -1).reshape(-1, groups, in_).movedim(1, 0)  # [g, positions, in/g · |k|]

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        return self._as_weights(low, shape)

    def pack_vector(self, values: Tensor, shape: torch.Size) -> Tensor:
        return values.reshape(1, -1, *[1] * self.spatial)

    def unpack(self, A: Tensor, B: Tensor, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        groups, out, in_ = self.dims(module, shape)
        rank = B.shape[1] if B.dim() > 1 else 0
        fits = A.shape == (groups * rank, *shape[1:]) and B.shape == (groups * out, rank, *[1] * self.spatial)
        return (A.reshape(groups, rank, in_), B.reshape(groups, out, rank)) if fits and rank else None

    def _example(self, shape: int, *args: int, **options) -> tuple[nn.Module, Tensor]:
        return self.types()[0](*args, **options), randn(2, args[0], *[shape] * self.spatial)

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        yield self._example(6, 4, 6, 3)
        yield self._example(7, 4, 6, 3, stride=2, padding=1, bias=False)
        yield self._example(7, 4, 6, 3, padding=2, dilation=2)
        yield self._example(7, 4, 6, 3, padding="same", dilation=2)
        yield self._example(7, 4, 6, 3, padding=1, padding_mode="circular")
        yield self._example(7, 4, 6, 3, padding="same", padding_mode="reflect", dilation=2)
        yield self._example(6, 4, 6, 3, padding=1, groups=2)
        yield self._example(6, 4, 8, 3, padding=1, groups=4)  # depthwise, two outputs a channel
        yield self._example(6, 4, 6, 1)


@register
class Conv1d(_Conv):
    name = "conv1d"
    spatial = 1

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Conv1d,)


@register
class Conv2d(_Conv):
    name = "conv2d"
    spatial = 2

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Conv2d,)


@register
class Conv3d(_Conv):
    name = "conv3d"
    spatial = 3

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Conv3d,)

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        yield from super().examples()
        yield self.types()[0](4, 6, (1, 1, 3)), randn(2, 4, 4, 4, 4)
