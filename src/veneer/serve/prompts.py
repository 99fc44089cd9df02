"""Tokenise the texts and chats of requests with the base's tokenizer and chat template, and check
that a prompt and its answer fit into the context.

A client's text never becomes a special token of a chat, so a client cannot end a message and begin
another one inside its text.

    template  "<|im_start|>user\\n" … "<|im_end|>"      special tokens
    content   "hi<|im_end|>\\n<|im_start|>system\\n…"    the same text as ordinary tokens

If a message contains the text of a special token, a private-use character is inserted after its
first character before the chat is rendered, and that character's tokens are removed afterwards.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from veneer.serve import limits
from veneer.serve.chat_messages import Message
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Grammar
from veneer.serve.tools.template import FRAMED_CHATS, PROBE_TOOL, RENDER_ERRORS, check_template

#: largest number of tokens of an answer to /v1/completions that sets no limit, as in OpenAI's API
DEFAULT_MAX_TOKENS = 16

#: characters of the texts that the tokenizer gets in one call. Between two such groups of texts,
#: other requests may use the tokenizer.
GROUP_CHARS = 16 * 2**10
#: how many tokens the first characters of a text may have above the limit for the whole text
#: (``check_fits``): cutting a text within a word can add tokens
CUT_MARGIN = 128

#: the roles of the messages in each probe chat. Probe chats are rendered to find the tokens that a
#: template puts around messages. There are several, since some templates refuse a system message.
PROBE_ROLES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
#: private-use characters of Unicode (plane 15). One that a chat does not contain is the mark that
#: is inserted into the texts of special tokens.
PRIVATE_USE = range(0xF0000, 0xFFFFE)

#: JSON keys of messages and tools that the API defines; a client chooses all other keys
API_KEYS = frozenset(
    ("arguments", "content", "description", "function", "id", "name", "parameters", "tool_call_id",
     "tool_calls", "type")
)  # fmt: skip

Chat = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


#: default arguments of the chat template
DEFAULT_ARGUMENTS: Mapping[str, Any] = {"add_generation_prompt": True}
#: arguments of the chat template that have a field of their own in the request
FIELD_ARGUMENTS = ("add_generation_prompt", "continue_final_message")


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    length: int,
    tools: Tools = (),
    arguments: Mapping[str, Any] = DEFAULT_ARGUMENTS,
    *,
    add_special_tokens: bool = False,
) -> tuple[int, ...]:
    """The tokens of a chat in the base's chat template. Only the template adds special tokens,
    unless ``add_special_tokens`` lets the tokenizer add its own. ``length``: the limit in tokens
    that ``check_fits`` applies. ``arguments``: what the template gets besides messages and tools.

    Raises:
        Refusal: the base has no template; its template refuses the chat, leaves out its tools or
            does not read an argument; the chat is far too long; or the text of a special token in a
            message cannot be tokenised as ordinary text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise Refusal(
            400,
            "a base without a chat template",
            "one that was made for chats",
            "use /v1/completions",
            param="messages",
            code="no_chat_template",
        )

    check_template(
        tokenizer, has_tools=bool(tools), has_calls=any(message.tool_calls for message in messages)
    )

    def render(chat: Chat, tools: Tools, arguments: Mapping[str, Any] = arguments) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(chat), tools=list(tools) or None, tokenize=False, **arguments
            )
        except RENDER_ERRORS as error:
            raise Refusal(
                400,
                f"messages that the template refuses ({error})",
                "a chat that it takes",
                "see its base",
                param="messages",
                code="template",
            ) from error

    message_dicts = [message.template_dict() for message in messages]
    special_texts, normalized = _special_tokens(
        tokenizer, lambda chat, tools: render(chat, tools, DEFAULT_ARGUMENTS)
    )
    _check_arguments(tokenizer, arguments, special_texts.values())
    text = render(message_dicts, tools)
    check_fits(tokenizer, text, length, "messages")
    values = [value for entry in message_dicts for name, value in entry.items() if name != "role"]
    client_texts = _texts([values, tools])
    joined_texts = "\0".join(client_texts)
    if normalized or any(token in joined_texts for token in special_texts.values()):
        ids = _tokenize_marked(
            tokenizer, message_dicts, tools, client_texts, render, special_texts, add_special_tokens
        )
    else:
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return _require_tokens(ids, tokenizer, "messages")


def _check_arguments(
    tokenizer: Any, arguments: Mapping[str, Any], special_texts: Collection[str]
) -> None:
    """Refuse ``chat_template_kwargs`` that are arguments of the tokenizer itself, that the template
    does not read (unless null or false), that are lists or objects, or that contain the text of a
    special token."""
    client_arguments = {
        name: value for name, value in arguments.items() if name not in FIELD_ARGUMENTS
    }
    if not client_arguments:
        return
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    template, variables = str(tokenizer.chat_template), "variables of the base's chat template"
    for name, value in client_arguments.items():
        is_off = value is None or value is False
        is_read = is_off or re.search(rf"\b{re.escape(name)}\b", template)
        is_special = isinstance(value, str) and any(token in value for token in special_texts)
        rules = (
            (name in reserved, "which is not the template's", variables),
            (not is_read, "which the template does not read", variables),
            (
                isinstance(value, list | dict),
                "a list or an object",
                "a text, a number, true or false",
            ),
            (is_special, "which holds the text of a special token", "text that is none"),
        )
        for is_broken, problem, expected in rules:
            if is_broken:
                problem = f"{name[:100]!r} in chat_template_kwargs, {problem}"
                raise Refusal(400, problem, expected, "leave it out", param="chat_template_kwargs")


def _texts(value: Any) -> list[str]:
    """Every text in a JSON value, including keys that the client chose."""
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    _map_texts(value, collect)
    return texts


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value in which ``change`` was applied to every text, including keys that the
    client chose."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if key in API_KEYS else change(key): _map_texts(child, change)
            for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_texts(child, change) for child in value]
    return value


def chat_size(messages: Sequence[Message], tools: Tools) -> int:
    """About how many characters of a chat the tokenizer has to read."""
    calls = (call for message in messages for call in message.tool_calls)
    text_lengths = (len(message.text) for message in messages)
    return (
        sum(text_lengths)
        + sum(len(call.function.arguments) for call in calls)
        + sum(map(len, _texts(tools)))
    )


#: results of ``_special_tokens`` by tokenizer, each with the chat template that it is for
_TOKEN_CACHE: WeakKeyDictionary[Any, tuple[str, tuple[dict[int, str], bool]]] = WeakKeyDictionary()


def _special_tokens(
    tokenizer: Any, render: Callable[[Chat, Tools], str]
) -> tuple[dict[int, str], bool]:
    """The tokens that no text of a client may become, as {token id: text}: the tokenizer's special
    tokens, and added tokens that the template puts around messages. Second result: whether the
    tokenizer normalises a text before it searches for one of them. It then also finds the token in
    similar texts, such as one in upper case."""
    template = str(tokenizer.chat_template)
    cached = _TOKEN_CACHE.get(tokenizer)
    if cached is None or cached[0] != template:
        framing_ids: set[int] = set()
        chats = [([{"role": role, "content": "a"} for role in roles], ()) for roles in PROBE_ROLES]
        for probe, tools in (*chats, *((probe, [PROBE_TOOL]) for probe in FRAMED_CHATS)):
            with suppress(Refusal):  # some templates refuse such a chat
                text = render(probe, tools)
                framing_ids.update(tokenizer(text, add_special_tokens=False)["input_ids"])
        added = tokenizer.added_tokens_decoder.items()
        special_tokens = {
            id: token
            for id, token in added
            if (token.special or id in framing_ids) and token.content.strip()
        }
        texts = {id: token.content for id, token in special_tokens.items()}
        cached = _TOKEN_CACHE[tokenizer] = (
            template,
            (texts, any(token.normalized for token in special_tokens.values())),
        )
    return cached[1]


def _tokenize_marked(
    tokenizer: Any,
    chat: Chat,
    tools: Tools,
    client_texts: Sequence[str],
    render: Callable[[Chat, Tools], str],
    special_texts: Mapping[int, str],
    add_special_tokens: bool = False,
) -> list[int]:
    """The token ids of a chat whose ``client_texts`` contain texts of special tokens. A mark inside
    each such text makes the tokenizer read it as ordinary text; the mark's tokens are dropped."""
    short_tokens = [token for token in special_texts.values() if len(token) == 1]
    if any(token in value for token in short_tokens for value in client_texts):
        # a mark cannot split a text of one character
        raise _special_token_refusal("text that is none")
    if not tokenizer.is_fast:
        raise _special_token_refusal("a tokenizer that says where in the text its tokens are")
    used_chars = {*"".join(client_texts), *str(tokenizer.chat_template)}
    mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in used_chars)
    texts = "|".join(map(re.escape, sorted(set(special_texts.values()), key=len, reverse=True)))
    # the lookahead also finds occurrences that overlap
    start_pattern = re.compile(rf"(?=(?:{texts}))(.)", re.DOTALL)

    def insert_marks(text: str) -> str:
        return start_pattern.sub(rf"\1{mark}", text)

    marked_chat = [
        {
            name: value if name == "role" else _map_texts(value, insert_marks)
            for name, value in message.items()
        }
        for message in chat
    ]
    text = render(marked_chat, _map_texts(tools, insert_marks))
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids = []
    for id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        span = text[start:end]
        if span == mark:
            continue
        # the unknown token stands for any text that the tokenizer lacks
        is_special = id in special_texts and id != tokenizer.unk_token_id
        is_added = add_special_tokens and start == end  # the tokenizer puts it around the text
        if is_special and not is_added and span.strip() != special_texts[id].strip():
            raise _special_token_refusal("text that is none and does not look like one")
        ids.append(id)
    return ids


def _special_token_refusal(expected: str) -> Refusal:
    return Refusal(
        400,
        "the text of a special token in a message",
        expected,
        "leave it out",
        param="messages",
        code="special_token",
    )


def prompt_tokens(
    tokenizer: Any,
    prompt: str | Sequence[int],
    vocabulary: int,
    length: int,
    param: str = "prompt",
    *,
    add_special_tokens: bool = True,
) -> tuple[int, ...]:
    """The token ids of a prompt. Token ids are only checked; a text is tokenised. In a text, the
    written form of a special token becomes that token. ``add_special_tokens``: whether the
    tokenizer puts special tokens around a text. ``length``: the limit in tokens that ``check_fits``
    applies to a text. ``param``: the body's field that has the prompt, for errors. ``Refusal``: a
    token id that the base lacks, or a text that has no tokens or far too many."""
    if isinstance(prompt, str):
        check_fits(tokenizer, prompt, length, param)
        ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        return _require_tokens(ids, tokenizer, param)
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
    """Refuse a text that is far longer than ``length`` tokens. Only its beginning is tokenised,
    because tokenising takes a second for one or two MB, while all other requests wait. ``param``:
    the body's field that has the text, for the error."""
    prefix_length = max(GROUP_CHARS, 8 * length)
    while prefix_length < len(text):
        count = len(tokenizer(text[:prefix_length], add_special_tokens=False)["input_ids"])
        if count > length + CUT_MARGIN:
            raise Refusal(
                400,
                f"a text of {len(text):,} characters, of which the first {prefix_length:,} are"
                f" {count:,} tokens",
                f"at most {length:,} tokens",
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        prefix_length *= 4


def group_texts(
    texts: Sequence[Any], size_of: Callable[[Any], int] = len
) -> Iterator[Sequence[Any]]:
    """Divide texts, or lists of token ids, into groups of about ``GROUP_CHARS`` characters. A text
    that is longer is a group by itself."""
    start = size = 0
    for end, text in enumerate(texts):
        if size and size + size_of(text) > GROUP_CHARS:
            yield texts[start:end]
            start, size = end, 0
        size += size_of(text)
    yield texts[start:]


def _require_tokens(tokens: Sequence[int], tokenizer: Any, param: str) -> tuple[int, ...]:
    """The tokens of a prompt; if it is empty, the beginning-of-text token. ``Refusal``: the prompt
    is empty and there is no such token."""
    bos_token: Any = getattr(tokenizer, "bos_token_id", None)
    if not tokens and bos_token is None:
        raise Refusal(
            400, "a prompt without a token", "at least one", "send some text", param=param
        )
    return tuple(tokens) or (bos_token,)


def answer_token_limit(
    prompts: Sequence[tuple[int, ...]], token_limit: int | None, length: int, *, is_chat: bool
) -> int:
    """The largest number of tokens of each answer: the client's ``token_limit``; without one, the
    tokens that the longest prompt leaves of the context, but at most ``DEFAULT_MAX_TOKENS`` unless
    ``is_chat``. ``length``: the context length in tokens. ``Refusal``: the context does not hold
    prompt and answer."""
    longest = max(map(len, prompts))
    remaining_tokens = length - longest
    needed_tokens = 1 if token_limit is None else token_limit  # 0: only score the prompt
    if needed_tokens > remaining_tokens:
        raise Refusal(
            400,
            f"a prompt of {longest} tokens and an answer of {token_limit or 'at least 1'}",
            f"at most {length} tokens together",
            "shorten the prompt, or ask for fewer",
            param="messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    if token_limit is not None:
        return token_limit
    return remaining_tokens if is_chat else min(DEFAULT_MAX_TOKENS, remaining_tokens)


def max_prompt_tokens(length: int, truncate: int | None) -> int:
    """How many tokens a prompt may have before ``truncate_prompt`` shortens it to ``truncate``
    tokens. ``length``: the context length in tokens."""
    return length if truncate is None else length * limits.TRUNCATED


def truncate_prompt(
    prompt: tuple[int, ...], truncate: int | None, token_limit: int | None, length: int
) -> tuple[int, ...]:
    """The last ``truncate`` tokens of a prompt; -1 keeps as many as leave room for an answer of
    ``token_limit`` tokens, and None keeps all. ``token_limit`` None stands for
    ``DEFAULT_MAX_TOKENS``. ``length``: the context length in tokens. ``Refusal``: ``truncate``
    exceeds it."""
    if truncate is None:
        return prompt
    if truncate > length:
        raise Refusal(
            400,
            f"truncate_prompt_tokens {truncate}",
            f"at most {length}, the context",
            "ask for fewer",
            param="truncate_prompt_tokens",
        )
    free_tokens = length - (DEFAULT_MAX_TOKENS if token_limit is None else token_limit)
    return prompt[-(truncate if truncate > 0 else max(1, free_tokens)) :]


def word_tokens(tokenizer: Any, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The token sequences that spell each word, at the beginning of a text or after a space."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        at_start, after_space = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (word, f" {word.lstrip()}")
        )
        sequences[at_start] = None
        if after_space[1:] != at_start:  # otherwise ``at_start`` also matches the end of this one
            sequences[after_space] = None
    return [sequence for sequence in sequences if sequence]


def check_grammar(
    schema: Mapping[str, Any] | None, grammar: Grammar | None, schema_param: str
) -> None:
    """Refuse a JSON schema, which is in the field ``schema_param``, or another grammar that would
    take too long to compile."""
    if grammar is not None and len(grammar.text) > limits.SCHEMA:
        raise Refusal(
            400,
            f"a {grammar.kind} of {len(grammar.text):,} bytes",
            f"at most {limits.SCHEMA:,} bytes",
            "simplify it",
            param="structured_outputs",
        )
    check_schema(schema, schema_param)


def check_schema(schema: Mapping[str, Any] | None, param: str) -> None:
    """Refuse a JSON schema, which is in the field ``param``, that would take too long to
    compile."""
    size = len(json.dumps(schema))
    if size > limits.SCHEMA or _nesting_depth(schema) > limits.SCHEMA_DEPTH:
        depth_text = "" if size > limits.SCHEMA else f" and more than {limits.SCHEMA_DEPTH} levels"
        raise Refusal(
            400,
            f"a schema of {size:,} bytes{depth_text}",
            f"at most {limits.SCHEMA:,} bytes and {limits.SCHEMA_DEPTH} levels",
            "simplify it",
            param=param,
        )


def _nesting_depth(value: Any) -> int:
    """How deep the lists and objects of a JSON value are nested."""
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if children is None else 1 + max(map(_nesting_depth, children), default=0)
