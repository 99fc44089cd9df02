"""Detect whether a chat template shows the model the tools of a request, and the tool calls in
earlier messages. Some templates show neither, and some show only the tools.

To find out, test chats with a tool and a call are rendered. The tool's name and the call's argument
occur nowhere else in a chat, so the template shows the tool or the call if the rendered text
contains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import product
from typing import Any

from jinja2 import TemplateError

from veneer.fileio.untrusted import parse
from veneer.serve.refusal import Refusal

#: the name of the tool in the test chats, and the argument of its call
PROBE_NAME, PROBE_ARGUMENT = "veneer_probe", "veneer_argument"
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "a",
        "parameters": {"type": "object", "properties": {"b": {"type": "string"}}},
    },
}
#: a call of ``PROBE_TOOL``; its id has nine letters, because Mistral's templates refuse other
#: lengths
PROBE_CALL: dict[str, Any] = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": PROBE_NAME, "arguments": {"b": PROBE_ARGUMENT}},
}
USER_MESSAGE = {"role": "user", "content": "a"}
CHAT_WITH_CALL: list[dict[str, Any]] = [
    USER_MESSAGE,
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "content": "d", "tool_call_id": PROBE_CALL["id"], "name": PROBE_NAME},
]
#: test chats with all roles of messages and with a call. Their rendered texts contain the tokens
#: that a template puts around messages, tools and calls; ``serve/prompts.py`` renders the chats to
#: find these tokens.
FRAMED_CHATS = (
    [USER_MESSAGE],
    CHAT_WITH_CALL,
    [{"role": "system", "content": "a"}, *CHAT_WITH_CALL, USER_MESSAGE],
)

#: errors that rendering may raise if the template does not support the messages or tools of a chat
RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError)


@lru_cache(maxsize=1)
def template_support(tokenizer: Any, template: str) -> tuple[bool, bool]:
    """(Whether the chat template of ``tokenizer`` shows the model the tools of a request, whether
    it shows the tool calls in earlier messages). ``template``: the text of this template; it is an
    argument only so that the cache has no entry for a tokenizer whose template has been replaced.
    """
    chats = product((CHAT_WITH_CALL, CHAT_WITH_CALL[:2]), (None, [PROBE_TOOL]))
    return (
        _shows(tokenizer, PROBE_NAME, [USER_MESSAGE], [PROBE_TOOL]),
        any(_shows(tokenizer, PROBE_ARGUMENT, chat, tools) for chat, tools in chats),
    )


def _shows(tokenizer: Any, probe: str, chat: Sequence[Any], tools: Sequence[Any] | None) -> bool:
    """Whether the text that the chat template makes of ``chat`` and ``tools`` contains ``probe``.
    False if the template does not support them."""
    with suppress(*RENDER_ERRORS):
        return probe in tokenizer.apply_chat_template(
            list(chat), tools=tools, tokenize=False, add_generation_prompt=True
        )
    return False


def check_template(tokenizer: Any, *, has_tools: bool, has_calls: bool) -> None:
    """Check that the chat template shows the model all that a request contains.

    Args:
        has_tools: whether the request has tools.
        has_calls: whether its messages have tool calls.

    Raises:
        Refusal: the template does not show them.
    """
    if not (has_tools or has_calls):
        return
    shows_tools, shows_calls = template_support(tokenizer, str(tokenizer.chat_template))
    if has_tools and not shows_tools:
        raise Refusal(
            400,
            "tools, and a base whose chat template does not show them to the model",
            "a base whose template has tools",
            'leave them out, send tool_choice "none", or serve another base',
            param="tools",
            code="template_without_tools",
        )
    if has_calls and not shows_calls:
        raise Refusal(
            400,
            "calls of tools in messages, and a base whose chat template does not show them",
            "a base whose template has tools",
            "leave them out, or serve another base",
            param="messages",
            code="template_without_tools",
        )


def template_arguments(text: str) -> Any:
    """The arguments of a call in the form that chat templates expect: a mapping if ``text`` is a
    JSON object or empty. Otherwise, since a model may have written invalid JSON, ``text``
    itself."""
    try:
        value = parse(text or "{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
