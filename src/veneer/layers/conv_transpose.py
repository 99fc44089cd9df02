"""``nn.ConvTranspose1d``, ``2d``, ``3d``: weight [in, out/g, *k], with every option.

    ΔW[g] = scale · B[g] @ A[g]        A: [g, r, in/g · |k|]   B: [g, out/g, r]

A is a transposed convolution to r channels a group, with the layer's own stride and padding; B a 1 × 1 convolution
after it. So an output of ΔW is a channel, as in every convolution, and not a channel at a place of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.layers._base import Dims, Layer, register
from veneer.lowrank import LowRank

_TYPES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POINTWISE = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


class _ConvTranspose(Layer):
    """What the three share; ``spatial`` is the number of their spatial axes."""

    spatial: int
    out_axis = 1

    def types(self) -> tuple[type[nn.Module], ...]:
        return (_TYPES[self.spatial - 1],)

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        in_, out, *kernel = shape
        return Dims(module.groups, out, in_ // module.groups * torch.Size(kernel).numel())

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        in_, out = shape[:2]
        groups = delta.shape[0]
        return delta.reshape(groups, out, in_ // groups, -1).transpose(1, 2).reshape(shape)

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        groups, out, _ = dims
        return weight.reshape(groups, weight.shape[0] // groups, out, -1).transpose(1, 2).reshape(dims)

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        groups, out, _ = dims
        channels = values.reshape(groups, 1, out).expand(groups, shape[0] // groups, out)
        return channels.reshape(shape[0], out, *[1] * self.spatial)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = module.stride, module.padding, module.output_padding, module.groups, module.dilation
        return _TRANSPOSED[self.spatial - 1](x, weight, bias, *options)

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        B = (low.B * low.scale).reshape(-1, low.rank, *[1] * self.spatial)
        change = _POINTWISE[self.spatial - 1](self._bottleneck(module, x, low.A), B, groups=module.groups)
        return change if y is None else y + change

    def _bottleneck(self, module: Any, x: Tensor, A: Tensor) -> Tensor:
        """The layer with A [g, r, in/g · |k|] as its weight: [N, g · r, *spatial]."""
        in_, _, *kernel = module.weight.shape
        groups, rank, _ = A.shape
        weight = A.reshape(groups, rank, in_ // groups, -1).transpose(1, 2).reshape(in_, rank, *kernel)
        return self.op(module, x, weight, None)

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        # The patches that meet at each output, as in a convolution: a bottleneck that is the identity.
        x, (groups, _, in_) = args[0], self.dims(module, module.weight.shape)
        patches = self._bottleneck(module, x, torch.eye(in_, dtype=x.dtype, device=x.device).expand(groups, in_, in_))
        batched = patches if patches.dim() == self.spatial + 2 else patches[None]
        return batched.movedim(1, -1).reshape(-1, groups, in_).movedim(1, 0)  # [g, positions, in/g · |k|]

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * self.spatial)

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        def example(*args: int, **options: Any) -> tuple[nn.Module, Tensor]:
            return self.types()[0](*args, **options), randn(2, args[0], *[4] * self.spatial)

        yield example(4, 6, 3)
        yield example(4, 6, 3, stride=2, padding=1, output_padding=1)
        yield example(4, 6, 3, dilation=2, padding=1, bias=False)
        yield example(4, 6, 2, groups=2, stride=2)
        yield example(4, 4, 3, groups=4)


@register
class ConvTranspose1d(_ConvTranspose):
    name = "conv_transpose1d"
    spatial = 1


@register
class ConvTranspose2d(_ConvTranspose):
    name = "conv_transpose2d"
    spatial = 2


@register
class ConvTranspose3d(_ConvTranspose):
    name = "conv_transpose3d"
    spatial = 3
