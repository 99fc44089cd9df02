"""Attention as plain matrix products, for transformers' models, in the calls in which torch's fused
kernel is slower.

On a CPU that is so for short rows in 16 bits, and under a causal mask (``kernels/attention.py``
says when). ``use_products`` registers an attention function with transformers that chooses call by
call, and else is transformers' own "sdpa".
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

#: what a model is told of the rows that were packed into one: where each begins, and the longest
LENGTHS = ("cu_seq_lens_q", "max_length_q")
#: the name under which transformers knows Veneer's attention
PRODUCTS = "veneer_products"


def use_products(model: PreTrainedModel) -> None:
    """Let a model compute attention as plain matrix products (``kernels.attention``) in the calls
    in which these are the faster way, and as transformers' "sdpa" in all others.

    Raises:
        ValueError: as transformers says, for a model whose attention cannot be chosen; or the model
            does something else with an attention of another name than "sdpa", such as leaving out
            the mask of a sparse one.
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

    from veneer.kernels import attention

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
        if has_shared_mask and attention.is_packed(query, key, attention_mask, starts, longest):
            rows = attention.Packed(starts, longest)
            query, key, value = (rows.apart(tensor) for tensor in (query, key, value))
            options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
            return (
                rows.together(
                    attend(module, query, key, value, rows.row_masks(attention_mask), **options)[0]
                ),
                None,
            )
        if query.shape[2] > 1 and has_shared_mask:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            pure_causal = causal and attention_mask is None
            if attention.pays(query, key, pure_causal and not dropout):
                if pure_causal and not dropout:
                    return attention.causal(query, key, value, scaling).transpose(1, 2), None
                bias = (
                    None if pure_causal else attention.bias_of(attention_mask, causal, query, key)
                )
                output = attention.products(
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
