"""The rules of all bodies that clients may send: a field that a body does not have is refused by
name, never ignored.

    null        is the same as absent, everywhere, as OpenAI's clients send it
    HARMLESS    fields that say who asks or how to file it: dropped
    NEUTRAL     fields that are not supported, with the value at which they ask for nothing: dropped
                at that value

Types are strict ("1" is no number) and every size has a bound (``limits.py``). Checking stops at
the first thing that is wrong in a list: a body holds hundreds of thousands of them, and an error
for each would take seconds of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from veneer.serve import limits

HARMLESS = {
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls", "include_obfuscation", "lora_int_id",
    "cache_control",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "suffix": ("",), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "service_tier": ("auto", "default", "standard_only"), "annotations": ([],), "refusal": ("",),
    "is_3d_lora_weight": (False,),
    # of /v1/responses and /v1/messages
    "background": (False,), "truncation": ("disabled",),
    "include": ([], ["reasoning.encrypted_content"]), "reasoning": ({},), "top_logprobs": (0,),
    "thinking": ({"type": "disabled"},), "mcp_servers": ([],),
    # vLLM's fields at vLLM's defaults
    "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,),
    "detokenize": (True,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "truncation_side": ("left",), "watermarking": (False,),
    "include_reasoning": (True,), "documents": ([],), "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},), "vllm_xargs": ({},), "kv_transfer_params": ({},),
    "ec_transfer_params": ({},), "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,), "return_prompt_text": (False,), "return_mm_kwargs": (True,),
    "thinking_token_budget": (-1,), "stream_interval": (1,),
}  # fmt: skip

#: unknown fields of one object that are looked at
UNKNOWN = 8

Name = Annotated[str, Field(min_length=1, max_length=limits.NAME)]


def _asks_nothing(name: str, value: Any) -> bool:
    if value is None or name in HARMLESS:
        return True
    # a bool equals a number, and would pass for one
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in NEUTRAL.get(name, ())
    )


def few_unknown(
    data: dict[str, Any],
    field_names: Container[str],
    harmless: Callable[[str, Any], bool] = lambda name, value: False,
) -> dict[str, Any]:
    """An object of a body without its ``harmless`` fields, and with few of those that are unknown:
    an error for each of them would take seconds."""
    unknown = (
        name
        for name, value in data.items()
        if name not in field_names and not harmless(name, value)
    )
    shown = {*islice(unknown, UNKNOWN)}
    return {name: value for name, value in data.items() if name in field_names or name in shown}


class Strict(BaseModel):
    """The rules of the page's top, for one object of a body."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        field_names = {field.alias or name for name, field in cls.model_fields.items()}
        sent_fields = {
            name: value
            for name, value in data.items()
            if name not in field_names or value is not None
        }
        return few_unknown(sent_fields, field_names, _asks_nothing)
