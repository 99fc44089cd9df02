"""Detect whether a chat template shows the model the tools of a request and the calls of earlier
messages. Some templates show neither, and some show only the tools.

To find out, a test chat is rendered with a tool and a call. Their names occur nowhere else, so the
rendered text can be searched for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from jinja2 import TemplateError

from veneer.fileio.untrusted import parse
from veneer.serve.refusal import Refusal

PROBE_NAME, PROBE_ARGUMENT = "veneer_probe", "veneer_argument"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "a",
        "parameters": {"type": "object", "properties": {"b": {"type": "string"}}},
    },
}
#: a call of ``TOOL``; its id has nine letters, because Mistral's templates demand this
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
#: chats whose rendered text contains the tokens that a template puts around messages, tools and
#: calls. ``serve/prompts.py`` renders them to find these tokens.
FRAMED = (
    [USER_MESSAGE],
    CHAT_WITH_CALL,
    [{"role": "system", "content": "a"}, *CHAT_WITH_CALL, USER_MESSAGE],
)

#: errors that rendering a template may raise if the template does not support the chat
ERRORS = (TemplateError, TypeError, ValueError, KeyError)


@dataclass(frozen=True)
class TemplateTools:
    """Whether a chat template shows the model tools, and calls of earlier messages."""

    tools: bool
    calls: bool


@lru_cache(maxsize=1)
def template_tools(tokenizer: Any, template: str) -> TemplateTools:
    """What the chat template of a tokenizer shows. ``template``: the text of this chat template,
    by which the cache detects that the tokenizer got another template."""
    chats = product((CHAT_WITH_CALL, CHAT_WITH_CALL[:2]), (None, [TOOL]))
    return TemplateTools(
        tools=_shows(tokenizer, PROBE_NAME, [USER_MESSAGE], [TOOL]),
        calls=any(_shows(tokenizer, PROBE_ARGUMENT, chat, tools) for chat, tools in chats),
    )


def _shows(tokenizer: Any, probe: str, chat: Sequence[Any], tools: Sequence[Any] | None) -> bool:
    with suppress(*ERRORS):
        return probe in tokenizer.apply_chat_template(
            list(chat), tools=tools, tokenize=False, add_generation_prompt=True
        )
    return False


def check_template(tokenizer: Any, *, tools: bool, calls: bool) -> None:
    """Check that a chat template shows what a request has: ``tools``, and ``calls`` in earlier
    messages. ``Refusal``: the template does not show them."""
    if not (tools or calls):
        return
    support = template_tools(tokenizer, str(tokenizer.chat_template))
    if tools and not support.tools:
        raise Refusal(
            400,
            "tools, and a base whose chat template does not show them to the model",
            "a base whose template has tools",
            'leave them out, send tool_choice "none", or serve another base',
            param="tools",
            code="template_without_tools",
        )
    if calls and not support.calls:
        raise Refusal(
            400,
            "calls of tools in messages, and a base whose chat template does not show them",
            "a base whose template has tools",
            "leave them out, or serve another base",
            param="messages",
            code="template_without_tools",
        )


def template_arguments(text: str) -> Any:
    """The arguments of a call in the form that templates expect: a mapping, if ``text`` is a JSON
    object. Another text, which a model may have written, stays a text."""
    try:
        value = parse(text or "{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
