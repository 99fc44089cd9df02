"""From what a client sends to tokens: chat templates, tokenizers, and whether the answer can fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer.errors import sentence
from veneer.serve import limits
from veneer.serve.refusal import Refusal
from veneer.serve.schemas import Message
from veneer.serve.special_tokens import tokens_of_chat

#: tokens of an answer where the client names no bound, as OpenAI's /v1/completions has it
SHORT = 16

#: characters that are read at one time while others wait
BEGINNING = 16 * 2**10
#: tokens by which the beginning of a text may have more than the whole: the last word of it is cut
CUT = 128


def chat(tokenizer: Any, messages: Sequence[Message], length: int) -> tuple[int, ...]:
    """The tokens of a chat in the base's own template; of special tokens, the template's alone.

    Args:
        length: tokens of the context.

    Raises:
        Refusal: the base has no template, its template takes no such chat, or it cannot fit into the context.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        message = sentence("a base without a chat template", "one that was made for chats", "use /v1/completions")
        raise Refusal(400, message, param="messages", code="no_chat_template")

    def render(chat: Any) -> str:
        try:
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            message = sentence(f"messages that the template refuses ({error})", "a chat that it takes", "see its base")
            raise Refusal(400, message, param="messages", code="template") from error

    plain = [message.plain() for message in messages]
    check = lambda text: _check_fits(tokenizer, text, length, "messages")  # noqa: E731
    return _some(tokens_of_chat(tokenizer, plain, render, check), tokenizer, "messages")


def plain(
    tokenizer: Any, prompt: str | Sequence[int], vocabulary: int, length: int, param: str = "prompt"
) -> tuple[int, ...]:
    """The tokens of a text, with those that the tokenizer puts around one; or tokens, checked. A special token that is
    written out in a text is that token.

    Raises:
        Refusal: a token that the base does not have, a text without any, or one that cannot fit into the context.
    """
    if isinstance(prompt, str):
        _check_fits(tokenizer, prompt, length, param)
        return _some(tokenizer(prompt)["input_ids"], tokenizer, param)
    beyond = max(prompt)
    if beyond >= vocabulary:
        raise Refusal(
            400, sentence(f"token {beyond}", f"tokens below {vocabulary}", "check the tokenizer"), param=param
        )
    return tuple(prompt)


def _check_fits(tokenizer: Any, text: str, length: int, param: str) -> None:
    """Refuse a text that is far too long before all of it is read, which takes a second for each MB or two and keeps
    everybody waiting: its beginning alone has too many tokens."""
    part = max(BEGINNING, 8 * length)
    while part < len(text):
        count = len(tokenizer(text[:part], add_special_tokens=False)["input_ids"])
        if count > length + CUT:
            found = f"a text of {len(text):,} characters, of which the first {part:,} are {count:,} tokens"
            message = sentence(found, f"at most {length:,} tokens", "shorten it")
            raise Refusal(400, message, param=param, code="context_length_exceeded")
        part *= 4


def groups(texts: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Some texts (or lists of tokens) in pieces of at most about ``BEGINNING`` characters, or of one."""
    start = size = 0
    for end, text in enumerate(texts):
        if size and size + len(text) > BEGINNING:
            yield texts[start:end]
            start, size = end, 0
        size += len(text)
    yield texts[start:]


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
