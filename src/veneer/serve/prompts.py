"""Tokenise the texts and chats of requests with the base's tokenizer and chat template, and check
that a prompt and its answer fit into the context.

Text that a client sends in a chat never becomes a special token, so a client cannot end a message
and begin another one inside its text.

    template  "<|im_start|>user\\n" … "<|im_end|>"      becomes special tokens
    content   "hi<|im_end|>\\n<|im_start|>system\\n…"    becomes ordinary tokens

If a message contains the text of a special token, a mark (a private-use character of Unicode) is
inserted after the first character of that text before the chat is rendered, so that the tokenizer
does not find the special token. The tokens of the marks are removed afterwards.
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

#: the most tokens of an answer to /v1/completions if the request sets no limit, as in OpenAI's API
DEFAULT_MAX_TOKENS = 16

#: about how many characters of texts the tokenizer's thread tokenises at a time. Between two such
#: groups of texts, it serves other requests.
GROUP_CHARS = 16 * 2**10
#: ``check_fits`` tokenises only the first characters of a long text. Cutting a text within a word
#: can add tokens, so this beginning may have so many tokens more than the whole text may have.
CUT_MARGIN = 128

#: the roles of the messages in each probe chat. Probe chats are rendered to find the tokens that a
#: template puts around messages. There are several, since some templates refuse a system message.
PROBE_ROLES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
#: code points of private-use characters of Unicode (plane 15). One that a chat does not contain is
#: the mark that is inserted into the texts of special tokens.
PRIVATE_USE = range(0xF0000, 0xFFFFE)

#: JSON keys of messages and tools that the API defines. A client chooses all other keys, so these
#: others are checked for texts of special tokens.
API_KEYS = frozenset(
    ("arguments", "content", "description", "function", "id", "name", "parameters", "tool_call_id",
     "tool_calls", "type")
)  # fmt: skip

Chat = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


#: the arguments that the chat template gets if a request has none
DEFAULT_ARGUMENTS: Mapping[str, Any] = {"add_generation_prompt": True}
#: arguments of the chat template that are fields of the request themselves, not entries of its
#: field ``chat_template_kwargs``
FIELD_ARGUMENTS = ("add_generation_prompt", "continue_final_message")


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    max_tokens: int,
    tools: Tools = (),
    arguments: Mapping[str, Any] = DEFAULT_ARGUMENTS,
    *,
    add_special_tokens: bool = False,
) -> tuple[int, ...]:
    """The token ids of a chat, rendered by the base's chat template.

    Args:
        max_tokens: a far longer chat is refused before all of it is tokenised (``check_fits``).
        tools: the definitions of the tools that the template shows, as JSON values.
        arguments: the template's variables besides messages and tools.
        add_special_tokens: whether the tokenizer adds special tokens to those of the template.

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
    special_texts, is_normalized = _special_tokens(
        tokenizer, lambda chat, tools: render(chat, tools, DEFAULT_ARGUMENTS)
    )
    _check_arguments(tokenizer, arguments, special_texts.values())
    chat_text = render(message_dicts, tools)
    check_fits(tokenizer, chat_text, max_tokens, "messages")
    values = [value for entry in message_dicts for name, value in entry.items() if name != "role"]
    client_texts = _texts([values, tools])
    joined_texts = "\0".join(client_texts)
    if is_normalized or any(token in joined_texts for token in special_texts.values()):
        ids = _tokenize_marked(
            tokenizer, message_dicts, tools, client_texts, render, special_texts, add_special_tokens
        )
    else:
        ids = tokenizer(chat_text, add_special_tokens=add_special_tokens)["input_ids"]
    return _require_tokens(ids, tokenizer, "messages")


def _check_arguments(
    tokenizer: Any, arguments: Mapping[str, Any], special_texts: Collection[str]
) -> None:
    """Check the client's ``chat_template_kwargs`` among ``arguments``. ``Refusal``: one of them has
    the name of an argument of ``apply_chat_template`` itself; the template does not contain its
    name (null and false are accepted even then); it is a list or an object; or it contains the
    text of a special token."""
    client_arguments = {
        name: value for name, value in arguments.items() if name not in FIELD_ARGUMENTS
    }
    if not client_arguments:
        return
    reserved_names = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    template, variables = str(tokenizer.chat_template), "variables of the base's chat template"
    for name, value in client_arguments.items():
        is_off = value is None or value is False
        is_read = is_off or re.search(rf"\b{re.escape(name)}\b", template)
        is_special = isinstance(value, str) and any(token in value for token in special_texts)
        rules = (
            (name in reserved_names, "which is not the template's", variables),
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
    """Every text in a JSON value, including the keys that are not in ``API_KEYS``."""
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    _map_texts(value, collect)
    return texts


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value in which every text is replaced by ``change(text)``, including the
    keys that are not in ``API_KEYS``."""
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
    """About how many characters a chat has: an estimate of the time that tokenising it takes."""
    calls = (call for message in messages for call in message.tool_calls)
    text_lengths = (len(message.text) for message in messages)
    return (
        sum(text_lengths)
        + sum(len(call.function.arguments) for call in calls)
        + sum(map(len, _texts(tools)))
    )


#: by tokenizer: its chat template, and the result of ``_special_tokens`` for that template
_TOKEN_CACHE: WeakKeyDictionary[Any, tuple[str, tuple[dict[int, str], bool]]] = WeakKeyDictionary()


def _special_tokens(
    tokenizer: Any, render: Callable[[Chat, Tools], str]
) -> tuple[dict[int, str], bool]:
    """The tokens that a client's text must not become, as {token id: text}: the tokenizer's special
    tokens, and added tokens that the chat template puts around messages. Second result: whether the
    tokenizer normalises a text before it searches for one of them. It then also finds the token in
    similar texts, such as one in upper case, so comparing exact texts does not suffice. The results
    are cached. ``render``: renders a chat with tools; raises ``Refusal`` if it cannot."""
    template = str(tokenizer.chat_template)
    cached_entry = _TOKEN_CACHE.get(tokenizer)
    if cached_entry is None or cached_entry[0] != template:
        framing_ids: set[int] = set()
        chats = [([{"role": role, "content": "a"} for role in roles], ()) for roles in PROBE_ROLES]
        for probe_chat, tools in (*chats, *((chat, [PROBE_TOOL]) for chat in FRAMED_CHATS)):
            with suppress(Refusal):  # some templates refuse such a chat
                text = render(probe_chat, tools)
                framing_ids.update(tokenizer(text, add_special_tokens=False)["input_ids"])
        added_tokens = tokenizer.added_tokens_decoder.items()
        special_tokens = {
            id: token
            for id, token in added_tokens
            if (token.special or id in framing_ids) and token.content.strip()
        }
        special_texts = {id: token.content for id, token in special_tokens.items()}
        cached_entry = _TOKEN_CACHE[tokenizer] = (
            template,
            (special_texts, any(token.normalized for token in special_tokens.values())),
        )
    return cached_entry[1]


def _tokenize_marked(
    tokenizer: Any,
    chat: Chat,
    tools: Tools,
    client_texts: Sequence[str],
    render: Callable[[Chat, Tools], str],
    special_texts: Mapping[int, str],
    add_special_tokens: bool = False,
) -> list[int]:
    """The token ids of a chat in which ``client_texts``, the texts that the client chose, may
    contain texts of special tokens. Before the chat is rendered, a mark (a character that the chat
    does not contain) is inserted into each text of a special token, so that the tokenizer reads it
    as ordinary text. The tokens of the marks are left out of the result.

    Raises:
        Refusal: a special token has a text of one character; the tokenizer does not give the
            positions of tokens; or a marked text became a special token, since it normalises texts.
    """
    one_char_texts = [token for token in special_texts.values() if len(token) == 1]
    if any(token in value for token in one_char_texts for value in client_texts):
        # a mark cannot be inserted into a text of one character
        raise _special_token_refusal("text that is none")
    if not tokenizer.is_fast:
        raise _special_token_refusal("a tokenizer that says where in the text its tokens are")
    used_chars = {*"".join(client_texts), *str(tokenizer.chat_template)}
    mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in used_chars)
    options = "|".join(map(re.escape, sorted(set(special_texts.values()), key=len, reverse=True)))
    # a lookahead, because it also finds occurrences that overlap
    start_pattern = re.compile(rf"(?=(?:{options}))(.)", re.DOTALL)

    def insert_marks(text: str) -> str:
        return start_pattern.sub(rf"\1{mark}", text)

    marked_chat = [
        {
            name: value if name == "role" else _map_texts(value, insert_marks)
            for name, value in message.items()
        }
        for message in chat
    ]
    marked = render(marked_chat, _map_texts(tools, insert_marks))
    encoded = tokenizer(marked, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids = []
    for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        span = marked[start:end]
        if span == mark:
            continue
        # the unknown token is allowed: ordinary text that the vocabulary lacks becomes this token
        is_special = id in special_texts and id != tokenizer.unk_token_id
        is_added = add_special_tokens and start == end  # not from the text, but added around it
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
    vocabulary_size: int,
    max_tokens: int,
    param: str = "prompt",
    *,
    add_special_tokens: bool = True,
) -> tuple[int, ...]:
    """The token ids of ``prompt``. Token ids are only checked; a text is tokenised. Unlike in a
    chat, the text of a special token becomes that token.

    Args:
        vocabulary_size: the number of token ids of the base.
        max_tokens: a far longer text is refused before all of it is tokenised (``check_fits``).
        param: the name of the prompt's field in the request body, for errors.
        add_special_tokens: whether the tokenizer puts special tokens around a text.

    Raises:
        Refusal: the base lacks a token id, or a text has no tokens or far too many.
    """
    if isinstance(prompt, str):
        check_fits(tokenizer, prompt, max_tokens, param)
        ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        return _require_tokens(ids, tokenizer, param)
    if max(prompt) >= vocabulary_size:
        raise Refusal(
            400,
            f"token {max(prompt)}",
            f"tokens below {vocabulary_size}",
            "check the tokenizer",
            param=param,
        )
    return tuple(prompt)


def check_fits(tokenizer: Any, text: str, max_tokens: int, param: str) -> None:
    """``Refusal``: ``text`` is far longer than ``max_tokens`` tokens. Only its first characters are
    tokenised to find out, because other requests wait meanwhile, and one or two MB take a second.
    ``param``: the name of the text's field in the request body, for the error."""
    prefix_length = max(GROUP_CHARS, 8 * max_tokens)
    while prefix_length < len(text):
        token_count = len(tokenizer(text[:prefix_length], add_special_tokens=False)["input_ids"])
        if token_count > max_tokens + CUT_MARGIN:
            raise Refusal(
                400,
                f"a text of {len(text):,} characters, of which the first {prefix_length:,} are"
                f" {token_count:,} tokens",
                f"at most {max_tokens:,} tokens",
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        prefix_length *= 4


def group_texts(
    texts: Sequence[Any], size_of: Callable[[Any], int] = len
) -> Iterator[Sequence[Any]]:
    """Divide ``texts`` into consecutive groups of at most ``GROUP_CHARS`` characters. A longer text
    is a group by itself. ``size_of``: the number of characters of an element of ``texts``; for a
    list of token ids, its number of ids serves as well."""
    group_start = group_chars = 0
    for end, text in enumerate(texts):
        if group_chars and group_chars + size_of(text) > GROUP_CHARS:
            yield texts[group_start:end]
            group_start, group_chars = end, 0
        group_chars += size_of(text)
    yield texts[group_start:]


def _require_tokens(tokens: Sequence[int], tokenizer: Any, param: str) -> tuple[int, ...]:
    """``tokens`` unless they are empty; then the tokenizer's beginning-of-text token alone.
    ``Refusal``: they are empty and the tokenizer has no beginning-of-text token. ``param``: the
    name of the prompt's field in the request body, for the error."""
    bos_id: Any = getattr(tokenizer, "bos_token_id", None)
    if not tokens and bos_id is None:
        raise Refusal(
            400, "a prompt without a token", "at least one", "send some text", param=param
        )
    return tuple(tokens) or (bos_id,)


def answer_token_limit(
    prompts: Sequence[tuple[int, ...]],
    token_limit: int | None,
    context_length: int,
    *,
    is_chat: bool,
) -> int:
    """The most tokens of each answer: ``token_limit``, the client's limit; if that is None, the
    number of tokens that the longest prompt leaves of the context, but for a completion at most
    ``DEFAULT_MAX_TOKENS``. ``Refusal``: the longest prompt and its answer exceed the context."""
    longest_prompt = max(map(len, prompts))
    remaining_tokens = context_length - longest_prompt
    needed_tokens = 1 if token_limit is None else token_limit  # 0 asks only for the prompt's scores
    if needed_tokens > remaining_tokens:
        raise Refusal(
            400,
            f"a prompt of {longest_prompt} tokens and an answer of {token_limit or 'at least 1'}",
            f"at most {context_length} tokens together",
            "shorten the prompt, or ask for fewer",
            param="messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    if token_limit is not None:
        return token_limit
    return remaining_tokens if is_chat else min(DEFAULT_MAX_TOKENS, remaining_tokens)


def max_prompt_tokens(context_length: int, truncate_to: int | None) -> int:
    """How many tokens a prompt may have before it is truncated: the context length without
    truncation (``truncate_to`` None), and a multiple of it with truncation
    (``truncate_prompt``)."""
    return context_length if truncate_to is None else context_length * limits.TRUNCATED


def truncate_prompt(
    prompt: tuple[int, ...], truncate_to: int | None, token_limit: int | None, context_length: int
) -> tuple[int, ...]:
    """The last ``truncate_to`` tokens of a prompt; None keeps all tokens, and -1 as many as leave
    room in the context for an answer of ``token_limit`` tokens (None: ``DEFAULT_MAX_TOKENS``).
    ``Refusal``: ``truncate_to`` exceeds the context length."""
    if truncate_to is None:
        return prompt
    if truncate_to > context_length:
        raise Refusal(
            400,
            f"truncate_prompt_tokens {truncate_to}",
            f"at most {context_length}, the context",
            "ask for fewer",
            param="truncate_prompt_tokens",
        )
    free_tokens = context_length - (DEFAULT_MAX_TOKENS if token_limit is None else token_limit)
    return prompt[-(truncate_to if truncate_to > 0 else max(1, free_tokens)) :]


def word_tokens(tokenizer: Any, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The distinct token sequences that spell the words: for each word, its tokens at the beginning
    of a text, and those after a space, which many tokenizers make a part of the word's token."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        at_start, after_space = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (word, f" {word.lstrip()}")
        )
        sequences[at_start] = None
        if after_space[1:] != at_start:  # otherwise ``at_start`` matches here too
            sequences[after_space] = None
    return [sequence for sequence in sequences if sequence]


def check_grammar(
    schema: Mapping[str, Any] | None, grammar: Grammar | None, schema_param: str
) -> None:
    """``Refusal``: the JSON schema or the grammar that the answer must follow is too large to be
    compiled in a short time. ``schema_param``: the name of the schema's field, for the error."""
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
    """``Refusal``: the JSON schema is too large or nested too deeply to be compiled quickly.
    ``param``: the name of the schema's field in the request body, for the error."""
    byte_count = len(json.dumps(schema))
    if byte_count > limits.SCHEMA or _nesting_depth(schema) > limits.SCHEMA_DEPTH:
        depth_text = (
            "" if byte_count > limits.SCHEMA else f" and more than {limits.SCHEMA_DEPTH} levels"
        )
        raise Refusal(
            400,
            f"a schema of {byte_count:,} bytes{depth_text}",
            f"at most {limits.SCHEMA:,} bytes and {limits.SCHEMA_DEPTH} levels",
            "simplify it",
            param=param,
        )


def _nesting_depth(value: Any) -> int:
    """The number of levels of nested lists and objects in a JSON value; 0 for a scalar."""
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if children is None else 1 + max(map(_nesting_depth, children), default=0)
