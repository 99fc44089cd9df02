"""``nn.Embedding``, y = W[ids] with a weight [V, d], and ``nn.EmbeddingBag``, which computes sums,
means or maxima of such rows. V is the size of the vocabulary, d the width of a row.

An embedding is a linear map of one-hot inputs, with in = V and out = d: ΔW[id] = (B @ A)[:, id].
So op(ids; ΔW) is a lookup in A, followed by a product with B. It also follows that

- dropout sets the update of whole tokens to zero, because indices cannot be dropped;
- A's Kaiming fan-in is 1, not V, because one input is active at a time (with V the update would
  start √V times too small);
- ΔW's column for ``padding_idx`` is zero, because that row of the weight never changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.layers._base import Dims, Layer, register
from veneer.lowrank import LowRank


class _Lookup(Layer):
    out_axis = 1
    file_keys = ("lora_embedding_A", "lora_embedding_B")
    drops_input = False

    def apply_forward_rewrite(self, module: Any, weight: Tensor) -> Tensor:
        """The weight in which every row with a norm above ``max_norm`` is scaled down to
        ``max_norm``. Forward scales each row that it reads in this way, in place."""
        if module.max_norm is None:
            return weight
        norms = torch.linalg.vector_norm(weight, module.norm_type, dim=1, keepdim=True)
        return torch.where(
            norms > module.max_norm, weight * (module.max_norm / (norms + 1e-7)), weight
        )

    def fan_in(self, dims: Dims) -> int:
        return 1

    def frozen_input(self, module: Any) -> int | None:
        return module.padding_idx

    def bind(self, view: Any, values: Any) -> None:
        view.sparse = False  # autograd cannot pass a sparse gradient on to A and B


@register
class Embedding(_Lookup):
    name = "embedding"
    by_position = True

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Embedding,)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(
            x,
            weight,
            module.padding_idx,
            module.max_norm,
            module.norm_type,
            module.scale_grad_by_freq,
        )

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        hidden = F.embedding(x, low.A[0].mT)  # [*, r]
        output_change = F.linear(hidden, low.B[0] * low.scale)  # [*, d]
        return output_change if y is None else y + output_change

    def factors(self, module: Any) -> bool:
        # With scale_grad_by_freq, torch divides the gradient of each row by how often its index
        # occurs. B has no rows for indices, so its gradient cannot be divided in this way. With
        # max_norm, y is not linear in the weight.
        return not module.scale_grad_by_freq and module.max_norm is None

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        return F.one_hot(args[0].reshape(1, -1), module.num_embeddings).to(module.weight.dtype)

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        ids = torch.tensor([[0, 3, 3], [8, 1, 0]])
        yield nn.Embedding(9, 5), ids
        yield nn.Embedding(9, 5, padding_idx=3), ids
        yield nn.Embedding(9, 5, scale_grad_by_freq=True), ids
        yield nn.Embedding(9, 5, max_norm=1.0), ids
        yield nn.Embedding(9, 5, sparse=True), ids


@register
class EmbeddingBag(_Lookup):
    name = "embedding_bag"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.EmbeddingBag,)

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        # The forward with the identity matrix as weight returns the sum or mean of the one-hot
        # vectors of each bag. A maximum is not linear in the weight, so in mode "max" the one-hot
        # vectors of all indices are returned.
        ids, (offsets, sample_weights) = args[0], (*args[1:], None, None)[:2]
        identity = torch.eye(
            module.num_embeddings, dtype=module.weight.dtype, device=module.weight.device
        )
        if module.mode == "max":
            return identity[ids.reshape(1, -1)]
        return F.embedding_bag(
            ids,
            identity,
            offsets,
            mode=module.mode,
            per_sample_weights=sample_weights,
            include_last_offset=module.include_last_offset,
            padding_idx=module.padding_idx,
        )[None]

    def take(
        self, module: Any, args: tuple, kwargs: dict, row_indices: Tensor, batch_size: int
    ) -> tuple[tuple, dict]:
        arguments = (
            dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
        )
        ids, offsets = arguments["input"], arguments.get("offsets")
        sample_weights = arguments.get("per_sample_weights")
        if offsets is None:
            return super().take(module, args, kwargs, row_indices, batch_size)
        if len(offsets) - module.include_last_offset != batch_size:
            raise LookupError
        bag_ends = (
            offsets[1:]
            if module.include_last_offset
            else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
        )
        bag_positions = [
            torch.arange(int(offsets[row]), int(bag_ends[row]), device=ids.device)
            for row in row_indices
        ]
        new_bounds = torch.tensor([0, *map(len, bag_positions)], device=ids.device).cumsum(0)
        positions = torch.cat(bag_positions)
        new_offsets = new_bounds if module.include_last_offset else new_bounds[:-1]
        return (
            ids[positions],
            new_offsets.to(offsets.dtype),
            None if sample_weights is None else sample_weights[positions],
        ), {}

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        bags, offsets = torch.tensor([[0, 3, 3], [8, 1, 0]]), torch.tensor([0, 2])
        flat_ids, sample_weights = (
            torch.tensor([0, 3, 3, 8, 1]),
            torch.tensor([0.5, -1.0, 2.0, 1.5, 0.3]),
        )
        yield nn.EmbeddingBag(9, 5), bags
        yield nn.EmbeddingBag(9, 5, mode="sum", padding_idx=3), (flat_ids, offsets)
        yield nn.EmbeddingBag(9, 5, mode="sum"), (flat_ids, offsets, sample_weights)
        yield nn.EmbeddingBag(9, 5, mode="max"), bags
        yield nn.EmbeddingBag(9, 5, mode="sum", sparse=True), bags
        yield nn.EmbeddingBag(9, 5, max_norm=1.0), bags
