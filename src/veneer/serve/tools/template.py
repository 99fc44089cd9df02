"""Detect what a chat template shows of tools: some templates show none, some show tools but no
calls.

A test chat is rendered, with a tool and a call whose name and argument occur nowhere else, and the
result is searched for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from veneer.errors import sentence
from veneer.fileio.untrusted import parse
from veneer.serve.refusal import Refusal

NAME, ARGUMENT = "veneer_probe", "veneer_argument"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "a",
        "parameters": {"type": "object", "properties": {"b": {"type": "string"}}},
    },
}
#: the id has nine letters, as Mistral's templates demand it
CALL: dict[str, Any] = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": NAME, "arguments": {"b": ARGUMENT}},
}
USER = {"role": "user", "content": "a"}
CALLED: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "d", "tool_call_id": CALL["id"], "name": NAME},
]
#: chats with tools that show which tokens a template puts around tools and calls
FRAMED = ([USER], CALLED, [{"role": "system", "content": "a"}, *CALLED, USER])

#: errors that a template may raise for a chat that it does not support
ERRORS = (TemplateError, TypeError, ValueError, KeyError)


@dataclass(frozen=True)
class TemplateTools:
    """Whether a chat template shows tools, and calls of earlier turns."""

    tools: bool
    calls: bool


#: cache by tokenizer: (its chat template, what that template shows)
_SHOWN_BY_TEMPLATE: WeakKeyDictionary[Any, tuple[str, TemplateTools]] = WeakKeyDictionary()


def template_tools(tokenizer: Any) -> TemplateTools:
    """What the chat template of a tokenizer shows of tools, from the cache if it is unchanged."""
    template = str(tokenizer.chat_template)
    cached = _SHOWN_BY_TEMPLATE.get(tokenizer)
    if cached is None or cached[0] != template:
        chats = product((CALLED, CALLED[:2]), (None, [TOOL]))
        shown = TemplateTools(
            tools=_shows(tokenizer, NAME, [USER], [TOOL]),
            calls=any(_shows(tokenizer, ARGUMENT, chat, tools) for chat, tools in chats),
        )
        cached = _SHOWN_BY_TEMPLATE[tokenizer] = (template, shown)
    return cached[1]


def _shows(tokenizer: Any, word: str, chat: Sequence[Any], tools: Sequence[Any] | None) -> bool:
    with suppress(*ERRORS):
        return word in tokenizer.apply_chat_template(
            list(chat), tools=tools, tokenize=False, add_generation_prompt=True
        )
    return False


def check_template(tokenizer: Any, *, tools: bool, calls: bool) -> None:
    """``Refusal``: the template leaves out the tools of a request, or the calls of its history."""
    if not (tools or calls):
        return
    shown = template_tools(tokenizer)
    if tools and not shown.tools:
        message = sentence(
            "tools, and a base whose chat template does not show them to the model",
            "a base whose template has tools",
            'leave them out, send tool_choice "none", or serve another base',
        )
        raise Refusal(400, message, param="tools", code="template_without_tools")
    if calls and not shown.calls:
        message = sentence(
            "calls of tools in messages, and a base whose chat template does not show them",
            "a base whose template has tools",
            "leave them out, or serve another base",
        )
        raise Refusal(400, message, param="messages", code="template_without_tools")


def template_arguments(text: str) -> Any:
    """The arguments of a call as templates want them: a JSON object as a mapping. A text that is no
    JSON object, which a model may have written, stays a text."""
    try:
        value = parse(text or "{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
