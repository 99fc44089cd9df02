"""The table of docs/serving.md that has each field of vLLM's completions beside what this server
does with it, read off the bodies that it takes."""

from __future__ import annotations

import json

from veneer.serve.body_rules import HARMLESS, NEUTRAL
from veneer.serve.sampling_fields import GUIDED
from veneer.serve.schemas import ChatRequest, CompletionRequest

#: the fields of both bodies of vLLM 0.28, then those of one, and those of its older versions
VLLM = [
    "model", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "user",
    "max_tokens", "logprobs", "echo", "frequency_penalty", "presence_penalty", "logit_bias",
    "response_format", "use_beam_search", "top_k", "min_p", "repetition_penalty", "watermarking",
    "length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
    "truncation_side", "allowed_token_ids", "prompt_logprobs", "logprob_token_ids", "bad_words",
    "add_special_tokens", "structured_outputs", "priority", "request_id", "session_id",
    "return_tokens_as_token_ids", "return_token_ids", "routed_experts_prompt_start",
    "return_token_offsets", "return_mm_kwargs", "cache_salt", "kv_transfer_params",
    "ec_transfer_params", "vllm_xargs", "repetition_detection", "thinking_token_budget",
    "stream_interval",
]  # fmt: skip
VLLM_CHAT = [
    "messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "reasoning_effort",
    "include_reasoning", "parallel_tool_calls", "add_generation_prompt", "continue_final_message",
    "documents", "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs",
    "return_prompt_text",
]  # fmt: skip
VLLM_TEXT = ["prompt", "suffix", "prompt_embeds"]
VLLM_OLDER = [*GUIDED, "guided_decoding_backend", "guided_whitespace_pattern", "best_of"]


def status_of(name: str, taken: set[str]) -> str:
    """What the server does with a field, of which it takes some."""
    if name in taken or name in GUIDED:
        return "supported"
    if name in NEUTRAL:
        values = " or ".join(f"`{json.dumps(value)}`" for value in NEUTRAL[name])
        return f"accepted at {values}"
    return "no effect" if name in HARMLESS else "refused"


def rows() -> list[tuple[str, str, str]]:
    """(field, where vLLM has it, what the server does with it)."""
    chat, text = set(ChatRequest.model_fields), set(CompletionRequest.model_fields)
    groups = (
        (VLLM, "both", chat & text),
        (VLLM_CHAT, "chat", chat),
        (VLLM_TEXT, "completions", text),
        (VLLM_OLDER, "both, once", chat & text),
    )
    return [
        (name, place, status_of(name, taken))
        for names, place, taken in groups
        for name in sorted(names)
    ]


def table() -> str:
    lines = ["| field | of vLLM's | here |", "|---|---|---|"]
    lines += [f"| `{name}` | {place} | {status} |" for name, place, status in rows()]
    own = sorted(
        {*ChatRequest.model_fields, *CompletionRequest.model_fields}
        - {*VLLM, *VLLM_CHAT, *VLLM_TEXT}
    )
    return "\n".join([*lines, *[f"| `{name}` | – | supported |" for name in own]])
