"""Tokenise the texts and chats of requests, by chat templates and tokenizers, and check that prompt
and answer fit into the context.

A client's text never becomes a special token of a chat, so it cannot end its turn and begin another
one.

    template  "<|im_start|>user\\n" … "<|im_end|>"      special tokens
    content   "hi<|im_end|>\\n<|im_start|>system\\n…"    the same letters, as ordinary tokens

If a message contains the text of a special token, a private-use character is inserted after its
first letter before the chat is rendered, and the tokens of that character are removed again.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from veneer.errors import sentence
from veneer.serve import limits
from veneer.serve.chat_messages import Message
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Grammar
from veneer.serve.tools.template import ERRORS, FRAMED, TOOL, check_template

#: most tokens of an answer if the request sets no limit, as in OpenAI's /v1/completions
SHORT = 16

#: characters that are tokenised in one go; between two such pieces the texts of other requests get
#: their turn
BEGINNING = 16 * 2**10
#: how many more tokens the beginning of a text may have than the same part of the full text, since
#: its last word is cut
CUT = 128

#: chats that show with which tokens a template frames a turn; some take no system message
PROBES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
#: the characters from which an unused one is chosen: private use, plane 15
PRIVATE = range(0xF0000, 0xFFFFE)

#: keys of messages and tools that the API defines, not the client
KEYS = frozenset(
    ("arguments", "content", "description", "function", "id", "name", "parameters", "tool_call_id",
     "tool_calls", "type")
)  # fmt: skip

Chat = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


#: template arguments that apply unless a request sets them
ARGUMENTS: Mapping[str, Any] = {"add_generation_prompt": True}
#: template arguments that have their own field in the request
FIELDS = ("add_generation_prompt", "continue_final_message")


def chat(
    tokenizer: Any,
    messages: Sequence[Message],
    length: int,
    tools: Tools = (),
    arguments: Mapping[str, Any] = ARGUMENTS,
    *,
    add_special_tokens: bool = False,
) -> tuple[int, ...]:
    """The tokens of a chat in the base's own template; of special tokens, the template's alone.
    ``arguments``: what the template is given beside messages and tools. ``Refusal``: the base has
    no template, its template takes no such chat, leaves out its tools or does not read an argument,
    it cannot fit into the context, which is ``length`` tokens, or a special token in a content
    cannot be read as ordinary text."""
    if not getattr(tokenizer, "chat_template", None):
        message = sentence(
            "a base without a chat template", "one that was made for chats", "use /v1/completions"
        )
        raise Refusal(400, message, param="messages", code="no_chat_template")

    check_template(
        tokenizer, tools=bool(tools), calls=any(message.tool_calls for message in messages)
    )

    def render(chat: Chat, tools: Tools, arguments: Mapping[str, Any] = arguments) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(chat), tools=list(tools) or None, tokenize=False, **arguments
            )
        except ERRORS as error:
            message = sentence(
                f"messages that the template refuses ({error})",
                "a chat that it takes",
                "see its base",
            )
            raise Refusal(400, message, param="messages", code="template") from error

    plain = [message.plain() for message in messages]
    special, normalized = _special_tokens(
        tokenizer, lambda chat, tools: render(chat, tools, ARGUMENTS)
    )
    _check_arguments(tokenizer, arguments, special.values())
    text = render(plain, tools)
    check_fits(tokenizer, text, length, "messages")
    values = [value for message in plain for name, value in message.items() if name != "role"]
    sent = list(_texts([values, tools]))
    joined = "\0".join(sent)
    if normalized or any(token in joined for token in special.values()):
        ids = _apart(tokenizer, plain, tools, sent, render, special, add_special_tokens)
    else:
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return _some(ids, tokenizer, "messages")


def _check_arguments(
    tokenizer: Any, arguments: Mapping[str, Any], special: Collection[str]
) -> None:
    """Refuse arguments of a template that are the tokenizer's own, that the template does not read
    (but for those that ask for nothing), that are no plain values, or that hold the text of a
    special token."""
    sent = {name: value for name, value in arguments.items() if name not in FIELDS}
    if not sent:
        return
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    template = str(tokenizer.chat_template)
    for name, value in sent.items():
        problem, expected = "", "variables of the base's chat template"
        if name in reserved:
            problem = "which is not the template's"
        elif value not in (None, False) and not re.search(rf"\b{re.escape(name)}\b", template):
            problem = "which the template does not read"
        elif isinstance(value, list | dict):
            problem, expected = "a list or an object", "a text, a number, true or false"
        elif isinstance(value, str) and any(token in value for token in special):
            problem, expected = "which holds the text of a special token", "text that is none"
        if problem:
            problem = f"{name[:100]!r} in chat_template_kwargs, {problem}"
            raise Refusal(400, problem, expected, "leave it out", param="chat_template_kwargs")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, including the client's own keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (key for key in value if key not in KEYS)
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same value, with ``change`` applied to its texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if key in KEYS else change(key): _with_texts(child, change)
            for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_texts(child, change) for child in value]
    return value


def chat_size(messages: Sequence[Message], tools: Tools) -> int:
    """The approximate number of characters of a chat for the tokenizer."""
    calls = (call for message in messages for call in message.tool_calls)
    texts = (len(message.text) for message in messages)
    return (
        sum(texts)
        + sum(len(call.function.arguments) for call in calls)
        + sum(map(len, _texts(tools)))
    )


#: cache by tokenizer: (its chat template, the result of ``_special_tokens``)
_KNOWN: WeakKeyDictionary[Any, tuple[str, tuple[dict[int, str], bool]]] = WeakKeyDictionary()


def _special_tokens(
    tokenizer: Any, render: Callable[[Chat, Tools], str]
) -> tuple[dict[int, str], bool]:
    """Texts that may come from the template alone, by id: of tokens that the tokenizer calls
    special and of those that its template puts around turns; and whether some are also found in
    texts that only look like theirs (in another case, say)."""
    template = str(tokenizer.chat_template)
    special_tokens = _KNOWN.get(tokenizer)
    if special_tokens is None or special_tokens[0] != template:
        framing: set[int] = set()
        chats = [([{"role": role, "content": "a"} for role in roles], ()) for roles in PROBES]
        for probe, tools in (*chats, *((probe, [TOOL]) for probe in FRAMED)):
            with suppress(Refusal):  # this template rejects such turns
                text = render(probe, tools)
                framing.update(tokenizer(text, add_special_tokens=False)["input_ids"])
        added = tokenizer.added_tokens_decoder.items()
        some = {
            id: token
            for id, token in added
            if (token.special or id in framing) and token.content.strip()
        }
        texts = {id: token.content for id, token in some.items()}
        special_tokens = _KNOWN[tokenizer] = (
            template,
            (texts, any(token.normalized for token in some.values())),
        )
    return special_tokens[1]


def _apart(
    tokenizer: Any,
    chat: Chat,
    tools: Tools,
    sent: Sequence[str],
    render: Callable[[Chat, Tools], str],
    special: Mapping[int, str],
    add_special_tokens: bool = False,
) -> list[int]:
    """The ids of a chat in which a client ``sent`` the texts of special tokens, as ordinary
    tokens."""
    if any(token in value for token in special.values() if len(token) == 1 for value in sent):
        raise _refusal("text that is none")  # it is a single letter, so nothing can be inserted
    if not tokenizer.is_fast:
        raise _refusal("a tokenizer that says where in the text its tokens are")
    used = {*"".join(sent), *str(tokenizer.chat_template)}
    mark = next(chr(code) for code in PRIVATE if chr(code) not in used)
    texts = "|".join(map(re.escape, sorted(set(special.values()), key=len, reverse=True)))
    starts = re.compile(rf"(?=(?:{texts}))(.)", re.DOTALL)  # every occurrence, even if two overlap

    def split(text: str) -> str:
        return starts.sub(rf"\1{mark}", text)

    marked = [
        {
            name: value if name == "role" else _with_texts(value, split)
            for name, value in message.items()
        }
        for message in chat
    ]
    text = render(marked, _with_texts(tools, split))
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids = []
    for id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        span = text[start:end]
        if span == mark:
            continue
        strange = (
            id in special and id != tokenizer.unk_token_id
        )  # which is any letter that is not known
        added = add_special_tokens and start == end  # by the tokenizer, around the text
        if strange and not added and span.strip() != special[id].strip():
            raise _refusal("text that is none and does not look like one")
        ids.append(id)
    return ids


def _refusal(expected: str) -> Refusal:
    problem = "the text of a special token in a message"
    return Refusal(400, problem, expected, "leave it out", param="messages", code="special_token")


def plain(
    tokenizer: Any,
    prompt: str | Sequence[int],
    vocabulary: int,
    length: int,
    param: str = "prompt",
    *,
    add_special_tokens: bool = True,
) -> tuple[int, ...]:
    """The tokens of a text, with those that the tokenizer puts around one; or tokens, checked. A
    special token that is written out in a text is that token. ``Refusal``: a token that the base
    does not have, a text without any, or one that cannot fit into the context."""
    if isinstance(prompt, str):
        check_fits(tokenizer, prompt, length, param)
        ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        return _some(ids, tokenizer, param)
    if max(prompt) >= vocabulary:
        raise Refusal(
            400,
            f"token {max(prompt)}",
            f"tokens below {vocabulary}",
            "check the tokenizer",
            param=param,
        )
    return tuple(prompt)


def check_fits(tokenizer: Any, text: str, length: int, param: str) -> None:
    """Refuse a text that is far too long by the tokens of its beginning, before all of it is
    tokenised: that takes a second for each MB or two and delays all other requests."""
    prefix_length = max(BEGINNING, 8 * length)
    while prefix_length < len(text):
        count = len(tokenizer(text[:prefix_length], add_special_tokens=False)["input_ids"])
        if count > length + CUT:
            problem = (
                f"a text of {len(text):,} characters, of which the first {prefix_length:,} are"
                f" {count:,} tokens"
            )
            message = sentence(problem, f"at most {length:,} tokens", "shorten it")
            raise Refusal(400, message, param=param, code="context_length_exceeded")
        prefix_length *= 4


def groups(texts: Sequence[Any], size_of: Callable[[Any], int] = len) -> Iterator[Sequence[Any]]:
    """Divide texts (or lists of tokens) into groups of about ``BEGINNING`` characters, or of one
    text."""
    start = size = 0
    for end, text in enumerate(texts):
        if size and size + size_of(text) > BEGINNING:
            yield texts[start:end]
            start, size = end, 0
        size += size_of(text)
    yield texts[start:]


def _some(tokens: Sequence[int], tokenizer: Any, param: str) -> tuple[int, ...]:
    start: Any = getattr(tokenizer, "bos_token_id", None)
    if not tokens and start is None:
        raise Refusal(
            400, "a prompt without a token", "at least one", "send some text", param=param
        )
    return tuple(tokens) or (start,)


def room(
    prompts: Sequence[tuple[int, ...]], token_limit: int | None, length: int, *, short: bool
) -> int:
    """How many tokens each answer may have: ``token_limit`` of the client, or the rest of the
    context, or at most ``SHORT`` of it. ``Refusal``: prompt and answer do not fit into the context
    together, which is ``length`` tokens."""
    longest = max(map(len, prompts))
    remaining = length - longest
    fewest = 1 if token_limit is None else token_limit  # 0: only the prompt is scored
    if fewest > remaining:
        problem = f"a prompt of {longest} tokens and an answer of {token_limit or 'at least 1'}"
        message = sentence(
            problem, f"at most {length} tokens together", "shorten the prompt, or ask for fewer"
        )
        raise Refusal(
            400,
            message,
            param="messages" if not short else "prompt",
            code="context_length_exceeded",
        )
    if token_limit is not None:
        return token_limit
    return min(SHORT, remaining) if short else remaining


def readable(length: int, truncate: int | None) -> int:
    """How many tokens a prompt may have before it is cut, with a context of ``length``."""
    return length if truncate is None else length * limits.TRUNCATED


def cut(
    prompt: tuple[int, ...], truncate: int | None, token_limit: int | None, length: int
) -> tuple[int, ...]:
    """The last ``truncate`` tokens of a prompt; with -1, as many as leave room for the answer.
    ``Refusal``: more of them than the context has."""
    if truncate is None:
        return prompt
    if truncate > length:
        expected = f"at most {length}, the context"
        raise Refusal(
            400,
            f"truncate_prompt_tokens {truncate}",
            expected,
            "ask for fewer",
            param="truncate_prompt_tokens",
        )
    room = length - (SHORT if token_limit is None else token_limit)
    return prompt[-(truncate if truncate > 0 else max(1, room)) :]


def word_tokens(tokenizer: Any, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The token sequences of each word, at the beginning of a text and after a space."""
    runs: dict[tuple[int, ...], None] = {}
    for word in words:
        first, inner = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (word, f" {word.lstrip()}")
        )
        runs[first] = None
        if inner[1:] != first:  # else the run of the word alone is the end of this one
            runs[inner] = None
    return [run for run in runs if run]


def check_grammar(schema: Mapping[str, Any] | None, grammar: Grammar | None) -> None:
    """Refuse a JSON schema, or a choice, that is too large to compile for a client."""
    if grammar is not None and len(grammar.text) > limits.SCHEMA:
        problem = f"a {grammar.kind} of {len(grammar.text):,} bytes"
        expected = f"at most {limits.SCHEMA:,} bytes"
        raise Refusal(400, problem, expected, "simplify it", param="structured_outputs")
    check_schema(schema)


def check_schema(schema: Mapping[str, Any] | None) -> None:
    """Refuse a JSON schema that is too large to compile for a client."""
    size = len(json.dumps(schema))
    if size > limits.SCHEMA or _depth(schema) > limits.SCHEMA_DEPTH:
        deep = "" if size > limits.SCHEMA else f" and more than {limits.SCHEMA_DEPTH} levels"
        expected = f"at most {limits.SCHEMA:,} bytes and {limits.SCHEMA_DEPTH} levels"
        raise Refusal(
            400,
            f"a schema of {size:,} bytes{deep}",
            expected,
            "simplify it",
            param="response_format",
        )


def _depth(value: Any) -> int:
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)
