"""From what a client sends to tokens: chat templates, tokenizers, and whether the answer can fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import sentence
from veneer.serve import limits
from veneer.serve.refusal import Refusal
from veneer.serve.schemas import Message

#: tokens of an answer where the client names no bound, as OpenAI's /v1/completions has it
SHORT = 16


def chat(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The tokens of a chat in the base's own template.

    Raises:
        Refusal: the base has no template, or its template takes no such chat.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        message = sentence("a base without a chat template", "one that was made for chats", "use /v1/completions")
        raise Refusal(400, message, param="messages", code="no_chat_template")
    plain = [message.plain() for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        message = sentence(f"messages that the template refuses ({error})", "a chat that it takes", "see its base")
        raise Refusal(400, message, param="messages", code="template") from error
    return _some(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer, "messages")


def plain(tokenizer: Any, prompt: str | Sequence[int], vocabulary: int, param: str = "prompt") -> tuple[int, ...]:
    """The tokens of a text, with those that the tokenizer puts around one; or tokens, checked.

    Raises:
        Refusal: a token that the base does not have, or a text without any.
    """
    if isinstance(prompt, str):
        return _some(tokenizer(prompt)["input_ids"], tokenizer, param)
    beyond = max(prompt)
    if beyond >= vocabulary:
        raise Refusal(
            400, sentence(f"token {beyond}", f"tokens below {vocabulary}", "check the tokenizer"), param=param
        )
    return tuple(prompt)


def _some(tokens: Sequence[int], tokenizer: Any, param: str) -> tuple[int, ...]:
    start = getattr(tokenizer, "bos_token_id", None)
    if tokens:
        return tuple(tokens)
    if start is None:
        raise Refusal(400, sentence("a prompt without a token", "at least one", "send some text"), param=param)
    return (start,)


def room(prompts: Sequence[tuple[int, ...]], asked: int | None, length: int, *, short: bool) -> int:
    """How many tokens each answer may have.

    Args:
        asked: what the client says; None: what is left of the context, or ``SHORT`` of it.
        length: tokens of the context, prompt and answer together.

    Raises:
        Refusal: they do not fit into the context.
    """
    longest = max(map(len, prompts))
    left = length - longest
    if left < 1 or (asked or 1) > left:
        found = f"a prompt of {longest} tokens and an answer of {asked or 'at least 1'}"
        message = sentence(found, f"at most {length} tokens together", "shorten the prompt, or ask for fewer")
        raise Refusal(400, message, param="messages" if not short else "prompt", code="context_length_exceeded")
    return asked or (min(SHORT, left) if short else left)


def check_schema(schema: Mapping[str, Any] | None) -> None:
    """Refuse a JSON schema that is too large to be compiled for a stranger."""
    if schema is None:
        return
    size = len(json.dumps(schema))
    if size > limits.SCHEMA or _depth(schema) > limits.SCHEMA_DEPTH:
        found = (
            f"a schema of {size:,} bytes"
            if size > limits.SCHEMA
            else f"a schema of more than {limits.SCHEMA_DEPTH} levels"
        )
        expected = f"at most {limits.SCHEMA:,} bytes and {limits.SCHEMA_DEPTH} levels"
        raise Refusal(400, sentence(found, expected, "simplify it"), param="response_format")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)
