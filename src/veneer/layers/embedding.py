"""``nn.Embedding``: y = W[ids], weight [V, d]. As a linear map it takes one-hot rows: in = V, out = d, ΔW[id] = (B @
A)[:, id].

So the bottleneck is a lookup in A and a product with B. What follows from the one-hot reading:

- dropout drops whole tokens of the update;
- one input is active at a time, so A's Kaiming fan-in is 1, not V (with V the update would start √V times too small);
- the row of ``padding_idx`` never changes: A's column for it is zero and receives no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.layers._base import Dims, Layer, register
from veneer.lowrank import LowRank


@register
class Embedding(Layer):
    name = "embedding"
    out_axis = 1
    file_keys = ("lora_embedding_A", "lora_embedding_B")
    drops_input = False

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Embedding,)

    def dims(self, module: Any) -> Dims:
        vocabulary, width = module.weight.shape
        return Dims(1, width, vocabulary)

    def refuses(self, module: Any) -> str | None:
        if module.max_norm is not None:
            return "max_norm rewrites the base's rows during forward, so the base would not stay as it is"
        return None

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight, module.padding_idx, None, 2.0, module.scale_grad_by_freq)

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        h = F.embedding(x, low.A[0].mT, module.padding_idx)  # [*, r]
        change = F.linear(h, low.B[0] * low.scale)  # [*, d]
        return change if y is None else y + change

    def factors(self, module: Any) -> bool:
        # Its gradient is divided by how often a row occurs, which a gradient of B alone cannot express.
        return not module.scale_grad_by_freq

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        return delta[0].mT

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        return weight.mT[None]

    def fan_in(self, dims: Dims) -> int:
        return 1

    def mask_init(self, module: Any, A: Tensor) -> Tensor:
        if module.padding_idx is not None:
            A = A.clone()
            A[:, :, module.padding_idx] = 0
        return A

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        ids = torch.tensor([[0, 3, 3], [8, 1, 0]])
        yield nn.Embedding(9, 5), ids
        yield nn.Embedding(9, 5, padding_idx=3), ids
        yield nn.Embedding(9, 5, scale_grad_by_freq=True), ids
