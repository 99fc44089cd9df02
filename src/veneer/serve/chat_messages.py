"""The schemas of chat messages, tool calls and tools in request bodies. ``body_rules.py`` has the
rules that hold for all bodies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from veneer.serve import limits
from veneer.serve.body_rules import Name, Strict
from veneer.serve.refusal import raise_first_error, value_error
from veneer.serve.tools.template import template_arguments

ToolName = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_.-]{{1,{limits.TOOL_NAME}}}$")]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: Name
    arguments: str = ""


class ToolCall(Strict):
    """A tool call in an earlier assistant message. ``index`` is accepted and ignored, because a
    client that copies the call from a streamed answer sends it."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def template_dict(self) -> dict[str, Any]:
        """This call as the dictionary that the chat template of the tokenizer gets."""
        arguments = template_arguments(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Function(Strict):
    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call. The arguments of a call must follow the function's JSON
    schema (``parameters``) if the function is ``strict``, or if the request forces a call."""

    type: Literal["function"]
    function: Function

    def template_dict(self) -> dict[str, Any]:
        """This tool as the dictionary that the chat template of the tokenizer gets."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        description = {"name": function.name, "description": function.description}
        return {"type": self.type, "function": {**description, "parameters": parameters}}


class FunctionName(Strict):
    name: Name


class NamedChoice(Strict):
    type: Literal["function"]
    function: FunctionName


ToolList = Annotated[list[Tool], Field(fail_fast=True, max_length=limits.TOOLS)]


class Message(Strict):
    """One message of a chat. "developer" is OpenAI's newer name of the role "system"."""

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
    def _add_empty_content(cls, data: Any) -> Any:
        """Set the content of a message with tool calls to "" if it is missing or null. Clients
        leave out the content of a message that only calls tools, or send null."""
        if isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": ""}
        return data

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        raise_first_error(
            (
                self.tool_calls and self.role != "assistant",
                f"tool_calls in a message of {self.role}",
                "an assistant's",
                "leave it out",
            ),
            (
                (self.tool_call_id is None) == (self.role == "tool"),
                f"{'no' if self.role == 'tool' else 'a'} tool_call_id in a message of {self.role}",
                "one in a message of tool",
                "change it",
            ),
        )
        return self

    @property
    def text(self) -> str:
        """The content as one string, with the text parts joined."""
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(block.text for block in self.content)
        )

    def template_dict(self) -> dict[str, Any]:
        """This message as the dictionary that the chat template of the tokenizer gets."""
        extra_fields: dict[str, Any] = {"name": self.name} if self.name else {}
        if self.tool_calls:
            extra_fields["tool_calls"] = [call.template_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            extra_fields["tool_call_id"] = self.tool_call_id
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
            **extra_fields,
        }


def check_history(messages: Sequence[Message], param: str) -> None:
    """Check that each message with a tool's result names a call of an earlier message; otherwise
    raise a validation error for the field ``param``. Also set the ``name`` of such a message to the
    called function's, which some chat templates need."""
    function_names: dict[str, str] = {}
    for message in messages:
        function_names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in function_names:
                raise value_error(
                    f"a tool's result for the call {message.tool_call_id[:80]!r}",
                    "a call of an earlier message",
                    "send that message too",
                    param,
                )
            message.name = message.name or function_names[message.tool_call_id]


def check_tools(
    tools: Sequence[Tool], choice: str | NamedChoice | None, has_format: bool, param: str
) -> None:
    """Raise a validation error for tools that have equal names, for a ``choice`` that names no tool
    or requires one where there is none, and for tools beside a field that sets the format of the
    answer. ``param``: the name of that field; ``has_format``: whether the request has it."""
    tool_names = [tool.function.name for tool in tools]
    duplicate_name = next((name for name, count in Counter(tool_names).items() if count > 1), None)
    chosen_name = choice.function.name if isinstance(choice, NamedChoice) else ""
    raise_first_error(
        (
            duplicate_name is not None,
            f"two tools named {duplicate_name!r}",
            "names that differ",
            "rename one",
            "tools",
        ),
        (
            chosen_name and chosen_name not in tool_names,
            f"tool_choice {chosen_name[:80]!r}, which is no tool of the request",
            "a name in tools",
            "check the spelling",
            "tool_choice",
        ),
        (
            choice == "required" and not tool_names,
            "tool_choice 'required' without tools",
            "both",
            "add tools",
            "tool_choice",
        ),
        (
            has_format and tool_names and choice != "none",
            f"{param} beside tools that may be called",
            "one of them",
            'leave one out, or send tool_choice "none"',
            param,
        ),
    )
