"""The rules for all request bodies. A field that the schema of a body does not have is refused by
name, unless it has no effect on the answer.

    null        means the same as an absent field everywhere, since OpenAI's clients send it
    HARMLESS    fields with no effect on the answer, such as the user's name: dropped
    NEUTRAL     unsupported fields, each with the values at which it has no effect: dropped if they
                have such a value

Types are strict ("1" is no number) and every size has a bound (``limits.py``). Validation of a list
stops at the first invalid element: a body can have hundreds of thousands of them, and an error for
each would block the event loop for seconds.
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
    # fields of /v1/responses and /v1/messages
    "background": (False,), "truncation": ("disabled",),
    "include": ([], ["reasoning.encrypted_content"]), "reasoning": ({},), "top_logprobs": (0,),
    "thinking": ({"type": "disabled"},), "mcp_servers": ([],),
    # vLLM's fields, with vLLM's defaults
    "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,),
    "detokenize": (True,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "truncation_side": ("left",), "watermarking": (False,),
    "include_reasoning": (True,), "documents": ([],), "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},), "vllm_xargs": ({},), "kv_transfer_params": ({},),
    "ec_transfer_params": ({},), "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,), "return_prompt_text": (False,), "return_mm_kwargs": (True,),
    "thinking_token_budget": (-1,), "stream_interval": (1,),
}  # fmt: skip

#: the most unknown fields of one object that are reported as errors
MAX_UNKNOWN = 8

Name = Annotated[str, Field(min_length=1, max_length=limits.NAME)]


def _has_no_effect(name: str, value: Any) -> bool:
    """Whether the field ``name``, which the schema lacks, has no effect on the answer with this
    value, so that it can be dropped."""
    if value is None or name in HARMLESS:
        return True
    # True == 1 in Python, so also compare whether the values are booleans
    return any(
        value == neutral_value and isinstance(value, bool) == isinstance(neutral_value, bool)
        for neutral_value in NEUTRAL.get(name, ())
    )


def limit_unknown_fields(
    data: dict[str, Any],
    field_names: Container[str],
    is_harmless: Callable[[str, Any], bool] = lambda name, value: False,
) -> dict[str, Any]:
    """A copy of the JSON object ``data`` for validation. Of the fields that are not in
    ``field_names``, it has only the first ``MAX_UNKNOWN`` for which ``is_harmless(name, value)`` is
    false: validation reports an error for each of them, and errors for thousands of fields would
    take seconds."""
    unknown_names = (
        name
        for name, value in data.items()
        if name not in field_names and not is_harmless(name, value)
    )
    reported_names = {*islice(unknown_names, MAX_UNKNOWN)}
    return {
        name: value for name, value in data.items() if name in field_names or name in reported_names
    }


class Strict(BaseModel):
    """The base class of schemas, each for one JSON object of a request body. It applies the rules
    of this module."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        field_names = {field.alias or name for name, field in cls.model_fields.items()}
        sent_fields = {
            name: value
            for name, value in data.items()
            if name not in field_names or value is not None
        }
        return limit_unknown_fields(sent_fields, field_names, _has_no_effect)
