"""Convolutions over 1 to 3 axes with every option: ``nn.Conv1d`` …, weight [out, in/g, *k],
``nn.ConvTranspose1d`` …, weight [in, out/g, *k].

    ΔW[g] = scale · B[g] @ A[g]        A: [g, r, in/g · |k|]   B: [g, out/g, r]

g is the number of groups of the convolution, *k the sizes of its kernel, and |k| their product. A
convolution is linear in its weight. So its update is the same convolution with A as the weight
(g · r outputs in g groups, and the module's other options), followed by a 1 × 1 convolution with B.
The change of a grouped weight has g groups too, so it can be merged. PEFT's change of a grouped
weight has an A that spans all groups, so PEFT cannot merge it.

In a PEFT file, A is [g·r, in/g, *k] and B is [out, r, 1, …]. This is PEFT's own layout if g = 1;
PEFT has no layout for transposed convolutions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.kernels import fused_conv
from veneer.layers._base import LAYERS, Dims, Layer
from veneer.lowrank import LowRank

_POINTWISE = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


class _Convolution(Layer):
    """The code that all convolutions share. ``spatial``: the number of spatial axes, 1 to 3.
    ``module_class``: the class of modules that this kind is for."""

    def __init__(self, name: str, spatial: int, module_class: type[nn.Module]) -> None:
        self.name, self.spatial, self._module_class = name, spatial, module_class

    def types(self) -> tuple[type[nn.Module], ...]:
        return (self._module_class,)

    @abstractmethod
    def bottleneck(self, module: Any, x: Tensor, A: Tensor) -> Tensor:
        """The layer's output without bias if A [g, r, in/g · |k|] is its weight: [batch, g · r,
        *sizes of the spatial axes]. |k| is the number of elements of the kernel."""

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        B = (low.B * low.scale).reshape(-1, low.rank, *[1] * self.spatial)  # [out, r, 1, …]
        output_change = _POINTWISE[self.spatial - 1](
            self.bottleneck(module, x, low.A), B, groups=module.groups
        )
        return output_change if y is None else y + output_change

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        # ΔW multiplies the patch of x under the kernel at each output position. A convolution whose
        # weight is the identity matrix returns these patches.
        x, (groups, _, in_) = args[0], self.dims(module, module.weight.shape)
        patches = self.bottleneck(
            module, x, torch.eye(in_, dtype=x.dtype, device=x.device).expand(groups, in_, in_)
        )
        batched_patches = patches if patches.dim() == self.spatial + 2 else patches[None]
        # [g, positions, in/g · |k|]
        return batched_patches.movedim(1, -1).reshape(-1, groups, in_).movedim(1, 0)

    def per_output(self, module: Any, values: Tensor, y: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * self.spatial)

    def _example(
        self, input_size: int, *module_args: int, **options: Any
    ) -> tuple[nn.Module, Tensor]:
        return self._module_class(*module_args, **options), randn(
            2, module_args[0], *[input_size] * self.spatial
        )


class Conv(_Convolution):
    def dims(self, module: Any, shape: torch.Size) -> Dims:
        return Dims(module.groups, shape[0] // module.groups, shape[1:].numel())

    def factors(self, module: Any) -> bool:
        """Whether the module has torch's ``_conv_forward``, not one of a subclass (such as weight
        standardisation, which is not linear in the weight) or of the instance."""
        method = getattr(module._conv_forward, "__func__", None)
        return method is getattr(self._module_class, "_conv_forward", None)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return module._conv_forward(x, weight, bias)

    def bottleneck(self, module: Any, x: Tensor, A: Tensor) -> Tensor:
        return module._conv_forward(x, A.reshape(-1, *module.weight.shape[1:]), None)

    def fused(
        self,
        module: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: LowRank,
        dropout: float,
    ) -> Tensor | None:
        has_plain_options = module.groups == 1 and module.padding_mode == "zeros"
        is_supported = (
            has_plain_options
            and x.numel() > fused_conv.SMALL_INPUT_SIZE
            and x.dim() == self.spatial + 2
            and fused_conv.is_channels_last(x) is not None
            and fused_conv.is_channels_last(weight) is not None
        )
        if not is_supported or isinstance(module.padding, str):
            return None
        geometry = fused_conv.Geometry(module.stride, module.padding, module.dilation)
        return fused_conv.conv(geometry, low.scale, x, weight, bias, low.A[0], low.B[0], dropout)

    def pack(self, low: LowRank, module: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
        return low.A.reshape(-1, *shape[1:]), low.B.reshape(-1, low.rank, *[1] * self.spatial)

    def pack_vector(self, values: Tensor, shape: torch.Size) -> Tensor:
        return values.reshape(1, -1, *[1] * self.spatial)

    def unpack(
        self, A: Tensor, B: Tensor, module: Any, shape: torch.Size
    ) -> tuple[Tensor, Tensor] | None:
        if A.shape[1:] != shape[1:] or B.shape[2:] != (1,) * self.spatial:
            return None
        return super().unpack(A.flatten(1), B.flatten(1), module, shape)

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        yield self._example(6, 4, 6, 3)
        yield self._example(7, 4, 6, 3, stride=2, padding=1, bias=False)
        yield self._example(7, 4, 6, 3, padding=2, dilation=2)
        yield self._example(7, 4, 6, 3, padding="same", dilation=2)
        yield self._example(7, 4, 6, 3, padding=1, padding_mode="circular")
        yield self._example(7, 4, 6, 3, padding="same", padding_mode="reflect", dilation=2)
        yield self._example(6, 4, 6, 3, padding=1, groups=2)
        yield self._example(6, 4, 8, 3, padding=1, groups=4)  # depthwise, two outputs per channel
        yield self._example(6, 4, 6, 1)
        if self.spatial == 3:
            yield nn.Conv3d(4, 6, (1, 1, 3)), randn(2, 4, 4, 4, 4)


class ConvTranspose(_Convolution):
    out_axis = 1

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        return Dims(module.groups, shape[1], shape[0] // module.groups * shape[2:].numel())

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        groups, out, _ = delta.shape
        return delta.reshape(groups, out, shape[0] // groups, -1).transpose(1, 2).reshape(shape)

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        groups, out, _ = dims
        return (
            weight.reshape(groups, weight.shape[0] // groups, out, -1).transpose(1, 2).reshape(dims)
        )

    def spread(self, values: Tensor, dims: Dims, shape: torch.Size) -> Tensor:
        groups, out, _ = dims
        channels = values.reshape(groups, 1, out).expand(groups, shape[0] // groups, out)
        return channels.reshape(shape[0], out, *[1] * self.spatial)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _TRANSPOSED[self.spatial - 1](
            x,
            weight,
            bias,
            module.stride,
            module.padding,
            module.output_padding,
            module.groups,
            module.dilation,
        )

    def bottleneck(self, module: Any, x: Tensor, A: Tensor) -> Tensor:
        in_, _, *kernel = module.weight.shape
        return self.op(module, x, self.fold(A, torch.Size((in_, A.shape[1], *kernel))), None)

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        yield self._example(4, 4, 6, 3)
        yield self._example(4, 4, 6, 3, stride=2, padding=1, output_padding=1)
        yield self._example(4, 4, 6, 3, dilation=2, padding=1, bias=False)
        yield self._example(4, 4, 6, 2, groups=2, stride=2)
        yield self._example(4, 4, 4, 3, groups=4)


for spatial, conv_class in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
    LAYERS.add(f"conv{spatial}d", Conv(f"conv{spatial}d", spatial, conv_class))
for spatial, transposed_class in enumerate(
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1
):
    kind_name = f"conv_transpose{spatial}d"
    LAYERS.add(kind_name, ConvTranspose(kind_name, spatial, transposed_class))
