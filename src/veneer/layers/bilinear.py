"""``nn.Bilinear``: y[o] = x1ᵀ W[o] x2 + bias[o], weight [out, in1, in2].

The layer is linear in the outer product of its inputs, so ΔW is one matrix [out, in1 · in2].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.layers._base import Dims, Layer, register


@register
class Bilinear(Layer):
    name = "bilinear"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Bilinear,)

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        out, first_in, second_in = shape
        return Dims(1, out, first_in * second_in)

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        first_input, second_input = args
        return (first_input[..., :, None] * second_input[..., None, :]).reshape(
            1, -1, first_input.shape[-1] * second_input.shape[-1]
        )

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        yield nn.Bilinear(4, 3, 5), (randn(2, 4), randn(2, 3))
        yield nn.Bilinear(3, 3, 4, bias=False), (randn(2, 6, 3), randn(2, 6, 3))
