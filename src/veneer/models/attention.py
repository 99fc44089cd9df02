"""Attention as plain matrix products, for transformers' models, in calls for which torch's fused
kernel is slower.

These are calls on a CPU with short rows in 16 bits, or with a causal mask (see
``kernels/cpu_attention.py``). ``use_products`` registers an attention function with transformers
that chooses for each call, and otherwise uses transformers' own "sdpa".
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

#: arguments that describe rows packed into one: where each begins, and the length of the longest
LENGTHS = ("cu_seq_lens_q", "max_length_q")
#: transformers' name for Veneer's attention
PRODUCTS = "veneer_products"


def use_products(model: PreTrainedModel) -> None:
    """Let a model compute attention as plain matrix products (``kernels.attention``) in the calls
    for which these are faster, and as transformers' "sdpa" in all others.

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

    ALL_ATTENTION_FUNCTIONS.register(PRODUCTS, _attention())
    ALL_MASK_ATTENTION_FUNCTIONS.register(PRODUCTS, sdpa_mask)
    model.set_attn_implementation(PRODUCTS)


@functools.cache
def _attention() -> Callable[..., tuple[Any, None]]:
    """The attention function for transformers: query [b, h, s, d], key and value [b, kv, k, d] ->
    [b, s, h, d]."""
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
        starts, longest = (kwargs.pop(name, None) for name in LENGTHS)
        has_shared_mask = kwargs.get("position_bias") is None and (
            attention_mask is None or attention_mask.shape[1] == 1
        )
        if has_shared_mask and cpu_attention.is_packed(query, key, attention_mask, starts, longest):
            rows = cpu_attention.Packed(starts, longest)
            query, key, value = (rows.unpack(tensor) for tensor in (query, key, value))
            options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
            return (
                rows.pack(
                    attend(module, query, key, value, rows.row_masks(attention_mask), **options)[0]
                ),
                None,
            )
        if query.shape[2] > 1 and has_shared_mask:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            pure_causal = causal and attention_mask is None
            if cpu_attention.is_faster(query, key, pure_causal and not dropout):
                if pure_causal and not dropout:
                    return cpu_attention.causal(query, key, value, scaling).transpose(1, 2), None
                bias = (
                    None
                    if pure_causal
                    else cpu_attention.bias_of(attention_mask, causal, query, key)
                )
                output = cpu_attention.products(
                    query, key, value, bias, scaling, dropout, causal=pure_causal
                )
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
