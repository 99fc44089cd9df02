"""``nn.EmbeddingBag``: sums, means or maxima over bags of rows of W [V, d], with offsets and per-sample weights.

The change is an embedding's (in = V, out = d). The module's own forward runs on W + ΔW, whatever its mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.layers._base import Dims, Layer, register
from veneer.layers.embedding import bounded


@register
class EmbeddingBag(Layer):
    name = "embedding_bag"
    out_axis = 1
    file_keys = ("lora_embedding_A", "lora_embedding_B")
    drops_input = False

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.EmbeddingBag,)

    def dims(self, module: Any, shape: torch.Size) -> Dims:
        vocabulary, width = shape
        return Dims(1, width, vocabulary)

    def fold(self, delta: Tensor, shape: torch.Size) -> Tensor:
        return delta[0].mT

    def unfold(self, weight: Tensor, dims: Dims) -> Tensor:
        return weight.mT[None]

    def fan_in(self, dims: Dims) -> int:
        return 1

    def frozen_input(self, module: Any) -> int | None:
        return module.padding_idx

    def apply_forward_rewrite(self, module: Any, weight: Tensor) -> Tensor:
        return bounded(module, weight)

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        # The forward on the identity: each bag as the sum or mean of its one-hot rows; of a maximum, the rows alone.
        ids, (offsets, weights) = args[0], (*args[1:], None, None)[:2]
        identity = torch.eye(module.num_embeddings, dtype=module.weight.dtype, device=module.weight.device)
        if module.mode == "max":
            return identity[ids.reshape(1, -1)]
        last, padding = module.include_last_offset, module.padding_idx
        options = {"mode": module.mode, "include_last_offset": last, "padding_idx": padding}
        return F.embedding_bag(ids, identity, offsets, per_sample_weights=weights, **options)[None]

    def bind(self, seen: Any, values: Any) -> None:
        seen.sparse = False  # a sparse gradient cannot flow on into A and B

    def take(self, module: Any, args: tuple, kwargs: dict, rows: Tensor, count: int) -> tuple[tuple, dict]:
        offsets = kwargs.get("offsets", args[1] if len(args) > 1 else None)
        if offsets is None:
            return super().take(module, args, kwargs, rows, count)
        if len(offsets) - module.include_last_offset != count:
            raise LookupError
        names = ("input", "offsets", "per_sample_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, weights = given["input"], given.get("per_sample_weights")
        ends = offsets[1:] if module.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
        spans = [torch.arange(int(offsets[row]), int(ends[row]), device=ids.device) for row in rows]
        lengths = torch.tensor([0, *(len(span) for span in spans)], device=ids.device).cumsum(0)
        where = torch.cat(spans)
        starts = lengths if module.include_last_offset else lengths[:-1]
        return (ids[where], starts.to(offsets.dtype), None if weights is None else weights[where]), {}

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        bags, offsets = torch.tensor([[0, 3, 3], [8, 1, 0]]), torch.tensor([0, 2])
        flat, weights = torch.tensor([0, 3, 3, 8, 1]), torch.tensor([0.5, -1.0, 2.0, 1.5, 0.3])
        yield nn.EmbeddingBag(9, 5), bags
        yield nn.EmbeddingBag(9, 5, mode="sum", padding_idx=3), (flat, offsets)
        yield nn.EmbeddingBag(9, 5, mode="sum"), (flat, offsets, weights)
        yield nn.EmbeddingBag(9, 5, mode="max"), bags
        yield nn.EmbeddingBag(9, 5, mode="sum", sparse=True), bags
        yield nn.EmbeddingBag(9, 5, max_norm=1.0), bags
