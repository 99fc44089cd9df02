"""Linear layers: ``nn.Linear``, y = x Wᵀ + bias with a weight [out, in];
``transformers.pytorch_utils.Conv1D`` (GPT-2), the same with Wᵀ stored, [in, out]; and linear layers
of other libraries, such as quantised layers and PyTorch Geometric's.

The classes of other libraries are looked up only if they have been imported, because ``import
veneer`` must not import these libraries. A model that contains such a layer has imported its
library already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, randn

from veneer.kernels import reference
from veneer.layers._base import Layer, register
from veneer.lowrank import LowRank

#: (module, class name) of linear layers of other libraries that do not subclass ``nn.Linear``
OTHER_LINEAR_CLASSES = (
    ("hqq.core.quantize", "HQQLinear"),
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
    ("torch_geometric.nn.dense.linear", "Linear"),
)


class _Product(Layer):
    linear = True
    product = True
    by_position = True

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        return reference.matmul_update(x, low.A[0], low.B[0], low.scale, y)

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        return args[0].reshape(1, -1, args[0].shape[-1])


@register
class Conv1D(_Product):
    name = "conv1d_transformers"
    out_axis = 1

    def types(self) -> tuple[type[nn.Module], ...]:
        pytorch_utils = sys.modules.get("transformers.pytorch_utils")
        return (pytorch_utils.Conv1D,) if pytorch_utils else ()

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat_x = x.reshape(-1, x.shape[-1])  # [tokens, in]
        y = flat_x @ weight if bias is None else torch.addmm(bias, flat_x, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        for cls in self.types():
            yield cls(5, 7), randn(3, 4, 7)


@register
class Linear(_Product):
    name = "linear"

    def types(self) -> tuple[type[nn.Module], ...]:
        classes = (
            getattr(sys.modules.get(module_name), class_name, None)
            for module_name, class_name in OTHER_LINEAR_CLASSES
        )
        return (nn.Linear, *(cls for cls in classes if cls is not None))

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        yield nn.Linear(7, 5), randn(3, 4, 7)
        yield nn.Linear(6, 9, bias=False), randn(6)
