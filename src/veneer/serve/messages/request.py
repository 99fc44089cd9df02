"""The schema of request bodies of ``/v1/messages``, and their conversion to requests of OpenAI's
chat API.

The result of a tool call is a block of a user's message in this API, and a separate message in a
chat request:

    {"role": "user", "content": [{"type": "tool_result", …}, {"type": "text", …}]}
    becomes {"role": "tool", …}, {"role": "user", …}
"""

from __future__ import annotations

import json
from abc import ABC
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from veneer.errors import sentence
from veneer.serve import limits
from veneer.serve.body_rules import Name, Strict
from veneer.serve.chat_messages import (
    FunctionCall,
    FunctionName,
    Message,
    NamedChoice,
    TextPart,
    Tool,
    ToolCall,
    ToolName,
    check_history,
    check_tools,
)
from veneer.serve.refusal import CUSTOM_ERROR_TYPE, value_error
from veneer.serve.sampling_fields import CommonSamplingFields
from veneer.serve.schemas import ChatRequest, ModelRequest, Stops

Texts = (
    str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=limits.PARTS)]
)


class ToolUse(Strict):
    """A tool call in an earlier answer."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


class ToolResult(Strict):
    """The result of a tool call. ``is_error`` has no effect: the content describes the error."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=limits.PARTS)] = ""
    is_error: bool = False


def _block_type(value: Any) -> Any:
    """The type of a content block, which is a dictionary before validation and a model instance
    after it; None if it has no type."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


_UNKNOWN_BLOCK = sentence(
    "a block of another type in messages", "text, tool_use or tool_result", "leave it out"
)
Block = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ToolResult, Tag("tool_result")],
    Discriminator(
        _block_type, custom_error_type=CUSTOM_ERROR_TYPE, custom_error_message=_UNKNOWN_BLOCK
    ),
]


class Turn(Strict):
    """A message of the conversation."""

    role: Literal["user", "assistant"]
    content: (
        str | Annotated[list[Block], Field(fail_fast=True, min_length=1, max_length=limits.PARTS)]
    )

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        block_types = {block.type for block in self.content if not isinstance(block, str)}
        misplaced_types = block_types & {"tool_result" if self.role == "assistant" else "tool_use"}
        if misplaced_types:
            raise value_error(
                f"a block of {misplaced_types.pop()} in a message of {self.role}",
                "tool_use of an assistant, tool_result of a user",
                "change it",
            )
        return self

    def messages(self) -> list[Message]:
        """This message as messages of a chat request. Each result of a tool call becomes a message
        of its own, before the message with the user's text."""
        blocks = self.content
        if isinstance(blocks, str):
            return [_chat_message(self.role, blocks)]
        text = "".join(block.text for block in blocks if isinstance(block, TextPart))
        if self.role == "assistant":
            calls = [_chat_tool_call(block) for block in blocks if isinstance(block, ToolUse)]
            return [_chat_message("assistant", text, tool_calls=calls)]
        results = [
            _chat_message("tool", block.content, tool_call_id=block.tool_use_id)
            for block in blocks
            if isinstance(block, ToolResult)
        ]
        return [*results, *([_chat_message("user", text)] if text or not results else [])]


class ClientTool(Strict):
    """A function that the model may call and that the client runs."""

    type: Literal["custom"] = "custom"
    name: ToolName
    description: str = ""
    parameters: Annotated[dict[str, Any], Field(alias="input_schema")]
    strict: bool | None = None


class Choice(Strict):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False


class ToolNameChoice(FunctionName):
    type: Literal["tool"]
    disable_parallel_tool_use: bool = False


class Conversation(ModelRequest, ABC):
    """The fields of a request that make up its prompt. ``adapters`` is an addition to Anthropic's
    API."""

    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1, max_length=limits.MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[ClientTool], Field(fail_fast=True, max_length=limits.TOOLS)] = []
    tool_choice: Annotated[Choice | ToolNameChoice, Field(discriminator="type")] | None = None

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise value_error(
                "a last message of the assistant, whose text the answer would go on with",
                "a message of the user",
                "put it last",
                "messages",
            )
        chat = self.chat()
        check_tools(chat.tools, chat.tool_choice, False, "messages")
        return self

    def chat(self) -> ChatRequest:
        """This request as a request of the chat API. Its fields have been validated, so its objects
        are constructed without validation, except that ``check_history`` checks the tool results.
        ``ClientTool`` has the fields of ``Function``, so its instances are used as such in the chat
        request."""
        system_messages = [] if self.system is None else [_chat_message("system", self.system)]
        messages = [
            *system_messages,
            *(message for turn in self.messages for message in turn.messages()),
        ]
        # this also sets the called function's name in each message with a tool's result
        check_history(messages, "messages")
        tool_choice = self.tool_choice
        chat_choice: Any = None if tool_choice is None else tool_choice.type
        if isinstance(tool_choice, ToolNameChoice):
            chat_choice = NamedChoice.model_construct(type="function", function=tool_choice)
        elif chat_choice == "any":
            chat_choice = "required"
        return ChatRequest.model_construct(
            model=self.model,
            adapters=self.adapters,
            messages=messages,
            tools=[Tool.model_construct(type="function", function=tool) for tool in self.tools],
            tool_choice=chat_choice,
            parallel_tool_calls=tool_choice is None or not tool_choice.disable_parallel_tool_use,
        )


class CountRequest(Conversation):
    """A body of ``/v1/messages/count_tokens``."""


class MessagesRequest(Conversation, CommonSamplingFields):
    """A body of ``/v1/messages``. ``seed`` is an addition to Anthropic's API."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Stops = []
    stream: bool = False

    def chat(self) -> ChatRequest:
        """This request as a request of the chat API, with its sampling fields and ``stream``."""
        fields = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stream")
        field_values = {name: getattr(self, name) for name in fields}
        stop_sequences = self.stop_sequences or None
        return super().chat().model_copy(update={**field_values, "stop": stop_sequences})


def _chat_message(role: str, content: str | list[TextPart], **fields: Any) -> Message:
    """A chat message with the given fields, which are not validated again."""
    return Message.model_construct(role=role, content=content, **fields)


def _chat_tool_call(block: ToolUse) -> ToolCall:
    """The tool call of a block, as a tool call of a chat message."""
    arguments = json.dumps(block.input, ensure_ascii=False)
    function = FunctionCall.model_construct(name=block.name, arguments=arguments)
    return ToolCall.model_construct(id=block.id, function=function)
