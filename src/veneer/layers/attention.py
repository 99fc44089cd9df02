"""``nn.MultiheadAttention``: its in-projection, which is one weight [3E, E], or a weight each for
queries, keys and values. E is ``embed_dim``.

The out-projection is a linear layer among its submodules, and a target of its own. The forward of
``nn.MultiheadAttention`` reads the weight of the out-projection directly, without calling it
(``attach/source/weight_readers.py``). The rows ``in_proj_weight[:E]`` compute the queries;
``LoraConfig(slices=…)`` can change these rows alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, randn

from veneer.layers._base import Layer, join_outputs, register

#: the weights if queries, keys and values have separate weights
_SEPARATE_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
#: the names of forward's arguments, in order
_FORWARD_ARGUMENTS = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


@register
class Attention(Layer):
    name = "attention"
    weight = "in_proj_weight"
    linear = True

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.MultiheadAttention,)

    def weights(self, module: Any) -> tuple[str, ...]:
        return (self.weight,) if module._qkv_same_embed_dim else _SEPARATE_WEIGHTS

    def below(self, module: Any) -> tuple[str, ...]:
        return ("out_proj",)

    def inputs(self, module: Any, weight_name: str, args: tuple) -> Tensor:
        if weight_name == "out_proj.weight":
            tensors = [self._out_proj_input(module, args)]
        else:
            tensors = (
                args[:3]
                if weight_name == self.weight
                else [args[_SEPARATE_WEIGHTS.index(weight_name)]]
            )
        return torch.cat([x.reshape(1, -1, x.shape[-1]) for x in tensors], dim=1)

    def _out_proj_input(self, module: Any, args: tuple) -> Tensor:
        """The input of the out-projection: the output of a view of the module, in which the
        out-projection is the identity."""
        embed_dim, query = module.embed_dim, args[0]
        identity: Any = nn.utils.skip_init(
            nn.Linear, embed_dim, embed_dim, device=query.device, dtype=query.dtype
        )
        nn.init.eye_(identity.weight)
        nn.init.zeros_(identity.bias)
        view = object.__new__(type(module))
        view.__dict__.update(module.__dict__, _modules={**module._modules, "out_proj": identity})
        return type(module).forward(view, *args)[0]

    def take(
        self, module: Any, args: tuple, kwargs: dict, row_indices: Tensor, batch_size: int
    ) -> tuple[tuple, dict]:
        # further arguments, which a subclass may have
        subclass_args = args[len(_FORWARD_ARGUMENTS) :]
        arguments = dict(zip(_FORWARD_ARGUMENTS, args, strict=False)) | kwargs
        batch_axis = 0 if module.batch_first else 1
        for name in _FORWARD_ARGUMENTS[:3]:
            if arguments[name].dim() != 3 or arguments[name].shape[batch_axis] != batch_size:
                raise LookupError
            arguments[name] = arguments[name].index_select(
                batch_axis, row_indices.to(arguments[name].device)
            )
        padding_mask = arguments.get("key_padding_mask")
        if padding_mask is not None:
            arguments["key_padding_mask"] = padding_mask.index_select(
                0, row_indices.to(padding_mask.device)
            )
        mask = arguments.get("attn_mask")
        if mask is not None and mask.dim() == 3:  # [batch · heads, target, source]
            head_indices = torch.arange(module.num_heads, device=row_indices.device)
            mask_rows = (row_indices[:, None] * module.num_heads + head_indices).reshape(-1)
            arguments["attn_mask"] = mask.index_select(0, mask_rows.to(mask.device))
        return (*(arguments[name] for name in _FORWARD_ARGUMENTS[: len(args)]), *subclass_args), {
            name: arguments[name] for name in kwargs
        }

    def put(self, module: Any, outputs: list[Any], order: Tensor) -> Any:
        return join_outputs(
            outputs,
            order,
            lambda tensor_index: 1 if tensor_index == 0 and not module.batch_first else 0,
        )

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        x, mask = randn(4, 3, 8), torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
        yield nn.MultiheadAttention(8, 2), (x, x, x)
        yield nn.MultiheadAttention(8, 2, batch_first=True, bias=False), (x, x, x)
        yield nn.MultiheadAttention(8, 2, kdim=6, vdim=5), (x, randn(4, 3, 6), randn(4, 3, 5))
        yield nn.MultiheadAttention(8, 2, add_bias_kv=True), (x, x, x, None, True, mask)
