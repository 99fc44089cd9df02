"""``nn.Embedding``: y = W[ids], weight [V, d]. As a linear map it takes one-hot rows: in = V, out = d, ΔW[id] = (B @
A)[:, id].

So the bottleneck is a lookup in A and a product with B. What follows from the one-hot reading:

- dropout drops whole tokens of the update;
- one input is active at a time, so A's Kaiming fan-in is 1, not V (with V the update would start √V times too small);
- the row of ``padding_idx`` never changes: ΔW's column for it is zero.

``max_norm`` scales rows of the weight down in place as they are read; here it scales those of W + ΔW, a tensor of the
call, and never the base's.
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

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        vocabulary, width = shape
        return Dims(1, width, vocabulary)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Never sparse: a sparse gradient cannot flow on into A and B.
        options = module.max_norm, module.norm_type, module.scale_grad_by_freq
        return F.embedding(x, weight, module.padding_idx, *options)

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        h = F.embedding(x, low.A[0].mT)  # [*, r]
        change = F.linear(h, low.B[0] * low.scale)  # [*, d]
        return change if y is None else y + change

    def factors(self, module: Any) -> bool:
        # A gradient that is divided by how often a row occurs is none of B alone; a row of bounded norm is not linear.
        return not module.scale_grad_by_freq and module.max_norm is None

    def apply_forward_rewrite(self, module: Any, weight: Tensor) -> Tensor:
        return bounded(module, weight)

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        return delta[0].mT

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        return weight.mT[None]

    def fan_in(self, dims: Dims) -> int:
        return 1

    def frozen_input(self, module: Any) -> int | None:
        return module.padding_idx

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        return F.one_hot(args[0].reshape(1, -1), module.num_embeddings).to(module.weight.dtype)

    def bind(self, seen: Any, values: Any) -> None:
        seen.sparse = False

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        ids = torch.tensor([[0, 3, 3], [8, 1, 0]])
        yield nn.Embedding(9, 5), ids
        yield nn.Embedding(9, 5, padding_idx=3), ids
        yield nn.Embedding(9, 5, scale_grad_by_freq=True), ids
        yield nn.Embedding(9, 5, max_norm=1.0), ids
        yield nn.Embedding(9, 5, sparse=True), ids


def bounded(module: Any, weight: Tensor) -> Tensor:
    """Rows scaled down to ``max_norm``, as the layer's forward does in place to each row that it reads."""
    if module.max_norm is None:
        return weight
    norms = torch.linalg.vector_norm(weight, module.norm_type, dim=1, keepdim=True)
    return torch.where(norms > module.max_norm, weight * (module.max_norm / (norms + 1e-7)), weight)
