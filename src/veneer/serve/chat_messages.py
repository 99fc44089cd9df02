"""Messages of chats, calls of tools in them and tools, as bodies have them; ``body_rules.py`` has
the rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from veneer.serve import limits
from veneer.serve.body_rules import Name, Strict
from veneer.serve.refusal import wrong
from veneer.serve.tools.template import template_arguments

ToolName = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_.-]{{1,{limits.TOOL_NAME}}}$")]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: Name
    arguments: str = ""


class ToolCall(Strict):
    """A call of an earlier turn, as an answer had it; a stream's has an ``index`` too."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        arguments = template_arguments(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Function(Strict):
    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call. A call of one that is ``strict`` follows its schema; a
    call that is forced always does."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        described = {"name": function.name, "description": function.description}
        return {"type": self.type, "function": {**described, "parameters": parameters}}


class FunctionName(Strict):
    name: Name


class NamedChoice(Strict):
    type: Literal["function"]
    function: FunctionName


ToolList = Annotated[list[Tool], Field(fail_fast=True, max_length=limits.TOOLS)]


class Message(Strict):
    """One message of a chat. "developer" is what OpenAI calls "system" now."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        str
        | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=limits.PARTS)]
    )
    name: Annotated[str, Field(max_length=limits.NAME)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=limits.TOOLS)] = []
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _give_calls_a_content(cls, data: Any) -> Any:
        """A message that only calls has no content, or null."""
        if isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": ""}
        return data

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise wrong(f"tool_calls in a message of {self.role}", "an assistant's", "leave it out")
        if (self.tool_call_id is None) == (self.role == "tool"):
            article = "no" if self.role == "tool" else "a"
            problem = f"{article} tool_call_id in a message of {self.role}"
            raise wrong(problem, "one in a message of tool", "change it")
        return self

    @property
    def text(self) -> str:
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(text_part.text for text_part in self.content)
        )

    def plain(self) -> dict[str, Any]:
        more: dict[str, Any] = {"name": self.name} if self.name else {}
        if self.tool_calls:
            more["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            more["tool_call_id"] = self.tool_call_id
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
            **more,
        }


def check_history(messages: Sequence[Message], param: str) -> None:
    """Each result of a tool names the call that it answers; a template may want the tool's name,
    which is filled in."""
    names: dict[str, str] = {}
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                problem = f"a tool's result for the call {message.tool_call_id[:80]!r}"
                raise wrong(problem, "a call of an earlier message", "send that message too", param)
            message.name = message.name or names[message.tool_call_id]


def check_tools(
    tools: Sequence[Tool], choice: str | NamedChoice | None, formatted: bool, param: str
) -> None:
    """Refuse tools, or a choice among them, that contradict each other or the format of the answer.
    ``formatted``: the field ``param`` demands one."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise wrong(f"two tools named {twice!r}", "names that differ", "rename one", "tools")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        problem = f"tool_choice {choice.function.name[:80]!r}, which is no tool of the request"
        raise wrong(problem, "a name in tools", "check the spelling", "tool_choice")
    if choice == "required" and not names:
        raise wrong("tool_choice 'required' without tools", "both", "add tools", "tool_choice")
    if formatted and names and choice != "none":
        problem = f"{param} beside tools that may be called"
        raise wrong(problem, "one of them", 'leave one out, or send tool_choice "none"', param)
