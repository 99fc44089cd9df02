"""``transformers.pytorch_utils.Conv1D`` (GPT-2): a linear layer whose weight lies transposed, [in, out].

The class is looked up where it has been imported already: a model that holds one has imported transformers, and
``import veneer`` must not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.kernels import reference
from veneer.layers._base import Dims, Layer, register
from veneer.lowrank import LowRank


@register
class Conv1D(Layer):
    name = "conv1d_transformers"
    out_axis = 1
    linear = True
    product = True

    def types(self) -> tuple[type[nn.Module], ...]:
        module = sys.modules.get("transformers.pytorch_utils")
        return (module.Conv1D,) if module else ()

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        in_, out = shape
        return Dims(1, out, in_)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        return reference.matmul_update(x, low.A[0], low.B[0], low.scale, y)

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        return delta[0].mT

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        return weight.mT[None]

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        return args[0].reshape(1, -1, args[0].shape[-1])

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        for cls in self.types():
            yield cls(5, 7), randn(3, 4, 7)
