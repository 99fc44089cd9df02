"""The schema of request bodies of ``/v1/responses``, and their conversion to requests of OpenAI's
chat API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from veneer.errors import sentence
from veneer.serve import limits
from veneer.serve.body_rules import Name, Strict
from veneer.serve.chat_messages import (
    Message,
    NamedChoice,
    Tool,
    ToolCall,
    ToolName,
    check_history,
    check_tools,
)
from veneer.serve.refusal import CUSTOM_ERROR_TYPE, value_error
from veneer.serve.sampling_fields import CommonSamplingFields
from veneer.serve.schemas import (
    ChatRequest,
    JsonSchema,
    ModelRequest,
    ObjectFormat,
    SchemaFormat,
    TextFormat,
)

#: fields that refer to data which a server would have to store after an earlier request. This
#: server stores none, so it refuses the fields.
STORAGE_FIELDS = ("previous_response_id", "conversation")


class ContentPart(Strict):
    """A text that the client wrote or copied from an earlier answer. ``annotations`` and
    ``logprobs``, which such an answer has, have no effect."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Content = (
    str | Annotated[list[ContentPart], Field(fail_fast=True, min_length=1, max_length=limits.PARTS)]
)


class CopyableItem(Strict):
    """An input item. ``id`` and ``status`` have no effect; they are accepted because an item that
    is copied from an earlier answer has them."""

    id: str | None = None
    status: str | None = None


class InputMessage(CopyableItem):
    """A message. ``phase`` has no effect either."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    phase: str | None = None


class InputCall(CopyableItem):
    """A tool call in an earlier answer."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str = ""


class InputResult(CopyableItem):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Content


def _item_type(value: Any) -> Any:
    """The type of an input item, which is a dictionary before validation and a model instance after
    it. An item without a type is a message."""
    item_type = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "message" if item_type is None else item_type


_UNKNOWN_ITEM = sentence(
    "an item of another type in input",
    "message, function_call or function_call_output",
    "leave it out",
)
InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(
        _item_type, custom_error_type=CUSTOM_ERROR_TYPE, custom_error_message=_UNKNOWN_ITEM
    ),
]


class FlatTool(Strict):
    """A function that the model may call. Unlike in chat requests, its fields are not in a nested
    object ``function``."""

    type: Literal["function"]
    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Strict):
    type: Literal["function"]
    name: Name


class FlatSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextConfig(Strict):
    format: (
        Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponsesStreamOptions(Strict):
    """OpenAI's stream options of this API, none of which changes the answer of this server."""


class ResponsesRequest(ModelRequest, CommonSamplingFields):
    """A body of ``/v1/responses``. ``adapters``, ``top_k`` and ``seed`` are additions to OpenAI's
    API."""

    input: (
        str
        | Annotated[
            list[InputItem], Field(fail_fast=True, min_length=1, max_length=limits.MESSAGES)
        ]
    )
    instructions: str | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=limits.TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_storage(cls, data: Any) -> Any:
        """Refuse the fields of ``STORAGE_FIELDS`` with an error that says what to send instead.
        Without this check they would be refused as unknown fields."""
        for name in STORAGE_FIELDS if isinstance(data, dict) else ():
            if data.get(name) is not None:
                raise value_error(
                    f"{name}, and a server that keeps no conversation",
                    "the whole conversation in input",
                    "send it there",
                    name,
                )
        return data

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        if self.store:
            raise value_error(
                "store true, and a server that keeps no response",
                "false",
                "leave it out, and keep the response yourself",
                "store",
            )
        chat = self.chat()
        has_format = not isinstance(chat.response_format, TextFormat | None)
        check_tools(chat.tools, chat.tool_choice, has_format, "text")
        return self

    def messages(self) -> list[Message]:
        """The messages of the chat request. There, a tool call is part of an assistant's message,
        so a call is added to the assistant's message before it. If another message or none comes
        before it, an empty assistant's message is created."""
        messages: list[Message] = []

        def add(role: str, content: str | list[ContentPart], **fields: Any) -> None:
            messages.append(Message.model_construct(role=role, content=content, **fields))

        if self.instructions:
            add("system", self.instructions)
        if isinstance(self.input, str):
            add("user", self.input)
            return messages
        for input_item in self.input:
            if isinstance(input_item, InputMessage):
                add(input_item.role, input_item.content)
            elif isinstance(input_item, InputResult):
                add("tool", input_item.output, tool_call_id=input_item.call_id)
            else:
                if not messages or messages[-1].role != "assistant":
                    add("assistant", "", tool_calls=[])
                call = ToolCall.model_construct(id=input_item.call_id, function=input_item)
                messages[-1].tool_calls.append(call)
        return messages

    def chat(self) -> ChatRequest:
        """This request as a request of the chat API. Its fields have been validated, so its objects
        are constructed without validation, except that ``check_history`` checks the tool results.
        ``FlatTool``, ``InputCall`` and ``FlatChoice`` have the fields of ``Function``,
        ``FunctionCall`` and ``FunctionName``, so their instances are used as such in the chat
        request."""
        messages = self.messages()
        # this also sets the called function's name in each message with a tool's result
        check_history(messages, "input")
        answer_format: Any = None if self.text is None else self.text.format
        if isinstance(answer_format, FlatSchemaFormat):
            answer_format = SchemaFormat.model_construct(
                type="json_schema", json_schema=answer_format
            )
        tool_choice: Any = self.tool_choice
        if isinstance(tool_choice, FlatChoice):
            tool_choice = NamedChoice.model_construct(type="function", function=tool_choice)
        return ChatRequest.model_construct(
            model=self.model,
            adapters=self.adapters,
            messages=messages,
            tools=[Tool.model_construct(type="function", function=tool) for tool in self.tools],
            tool_choice=tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=answer_format,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_tokens=self.max_output_tokens,
            stream=self.stream,
        )
