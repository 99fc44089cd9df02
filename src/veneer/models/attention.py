"""Attention as plain matrix products, for models of transformers, in calls for which torch's fused
kernel is slower.

Products are faster on a CPU in training on short rows in bfloat16 (see
``kernels/cpu_attention.py``). ``use_products`` registers an attention function with transformers.
The function uses products in calls for which they are faster, and transformers' own "sdpa" in all
others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from veneer.attach import compares_attention
from veneer.errors import sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["use_products"]

#: the arguments by which transformers describes several sequences that are packed into one row: the
#: position at which each sequence begins, and the length of the longest
PACKING_ARGUMENTS = ("cu_seq_lens_q", "max_length_q")
#: the name under which Veneer's attention function is registered with transformers
PRODUCTS = "veneer_products"


def use_products(model: PreTrainedModel) -> None:
    """Let a model compute attention as plain matrix products (``kernels.cpu_attention``) in calls
    for which products are faster, and as transformers' "sdpa" in all others.

    Raises:
        ValueError: transformers does not support choosing the model's attention, or the model
            depends on the name "sdpa", for example to omit the mask of a sparse attention.
    """
    if compares_attention(model):
        problem = (
            f'a {type(model).__name__}, whose code asks whether its attention is called "sdpa"'
        )
        raise ValueError(
            sentence(problem, "one that treats every attention alike", 'keep attention="sdpa"')
        )
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PRODUCTS, _attention_function())
    ALL_MASK_ATTENTION_FUNCTIONS.register(PRODUCTS, sdpa_mask)
    model.set_attn_implementation(PRODUCTS)


@functools.cache
def _attention_function() -> Callable[..., tuple[Any, None]]:
    """The attention function for transformers. It takes the query [b, h, s, d], and key and value
    [b, kv, k, d], and returns [b, s, h, d], for b rows, h query heads, kv key heads, s queries and
    k keys of width d."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from veneer.kernels import cpu_attention

    def attend(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, None]:
        row_starts, max_length = (kwargs.pop(name, None) for name in PACKING_ARGUMENTS)
        has_shared_mask = kwargs.get("position_bias") is None and (
            attention_mask is None or attention_mask.shape[1] == 1
        )
        if has_shared_mask and cpu_attention.is_packed(
            query, key, attention_mask, row_starts, max_length
        ):
            packing = cpu_attention.Packed(row_starts, max_length)
            query, key, value = (packing.unpack(tensor) for tensor in (query, key, value))
            options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
            mask = packing.row_masks(attention_mask)
            output, _ = attend(module, query, key, value, mask, **options)
            return packing.pack(output), None
        if has_shared_mask and cpu_attention.is_faster(query, key):
            has_causal_mask = bool(
                getattr(module, "is_causal", True) if is_causal is None else is_causal
            )
            bias = cpu_attention.bias_of(attention_mask, has_causal_mask, query, key)
            output = cpu_attention.attend_by_products(query, key, value, bias, scaling, dropout)
            return output.transpose(1, 2), None
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    return attend
