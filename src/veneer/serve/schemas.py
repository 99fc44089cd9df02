"""The bodies that clients may send, and nothing else: a field that is not here is refused by name,
never ignored.

    null        is the same as absent, everywhere, as OpenAI's clients send it
    HARMLESS    fields that say who asks or how to file it: dropped
    NEUTRAL     fields that are not supported, with the value at which they ask for nothing: dropped at that value

Types are strict ("1" is no number) and every size has a bound (``limits.py``). Checking stops at
the first thing that is wrong in a list: a body holds hundreds of thousands of them, and an error
for each would take seconds of the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from veneer.kernels.draws import sample_seed
from veneer.models.sampling_defaults import SamplingDefaults
from veneer.serve import limits
from veneer.serve.refusal import kind, wrong
from veneer.serve.requests import Sampling
from veneer.serve.tools.forced import MOST_CALLS, arguments_schema, calls_schema
from veneer.serve.tools.template import template_arguments

T = TypeVar("T")

HARMLESS = {
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls", "include_obfuscation", "lora_int_id",
    "cache_control",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "logit_bias": ({},),
    "best_of": (1,), "suffix": ("",), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "modalities": (["text"],), "refusal": ("",),
    "annotations": ([],), "service_tier": ("auto", "default", "standard_only"),
    "is_3d_lora_weight": (False,), "background": (False,), "truncation": ("disabled",),
    "include": ([], ["reasoning.encrypted_content"]), "reasoning": ({},), "top_logprobs": (0,),
    "thinking": ({"type": "disabled"},), "mcp_servers": ([],),
}  # fmt: skip

#: unknown fields of one object that are looked at
UNKNOWN = 8


def _few(value: Any) -> Any:
    """A mapping is counted before anything in it is looked at."""
    if isinstance(value, dict) and len(value) > limits.BLEND:
        raise wrong(
            f"{len(value):,} adapters in a blend", f"at most {limits.BLEND}", "leave some out"
        )
    return value


def _prompts(field: str, most: int) -> Callable[[Any], Any]:
    """A check of the form of ``prompt`` or ``input``, which is one of four, in words that know all
    of them."""
    expected = f"a text, a list of 1 to {most} texts, a list of token ids, or a list of 1 to {most} such lists"
    nouns = {str: "texts", int: "numbers", list: "lists"}

    def check(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise wrong(f"{kind(value)} in {field}", expected, "send one of them")
        kinds = {type(item) for item in value}
        if len(kinds) > 1 or not kinds <= nouns.keys():
            names = sorted({nouns.get(json_type, "something else") for json_type in kinds})
            raise wrong(
                f"a list of {' and '.join(names)} in {field}", expected, "send items of one kind"
            )
        if kinds != {int} and len(value) > most:
            problem = (
                f"{len(value):,} {'texts' if kinds == {str} else 'lists of tokens'} in {field}"
            )
            raise wrong(problem, f"at most {most}", "send several requests")
        return value

    return check


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


def _stops(value: Any) -> Any:
    few = isinstance(value, list) and len(value) <= limits.STOPS
    if not (isinstance(value, str) or (few and all(isinstance(stop, str) for stop in value))):
        problem = (
            f"{len(value):,} items in stop"
            if isinstance(value, list) and not few
            else f"{kind(value)} in stop"
        )
        raise wrong(
            problem, f"a text, or a list of at most {limits.STOPS} texts", "send fewer, or others"
        )
    return value


Name = Annotated[str, Field(min_length=1, max_length=limits.NAME)]
ToolName = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_.-]{{1,{limits.TOOL_NAME}}}$")]
Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=limits.STOPS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=2**20)]
Weight = Annotated[float, Field(ge=-limits.WEIGHT, le=limits.WEIGHT)]
Blend = Annotated[
    dict[Name, Weight], BeforeValidator(_few), Field(min_length=1, max_length=limits.BLEND)
]


def _asks_nothing(name: str, value: Any) -> bool:
    if value is None or name in HARMLESS:
        return True
    # a bool equals a number, and would pass for one
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in NEUTRAL.get(name, ())
    )


def _first(*values: T | None) -> T:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def few_unknown(
    data: dict[str, Any],
    field_names: Container[str],
    harmless: Callable[[str, Any], bool] = lambda name, value: False,
) -> dict[str, Any]:
    """An object of a body without its ``harmless`` fields, and with few of those that are unknown:
    an error for each of them would take seconds."""
    unknown = (
        name
        for name, value in data.items()
        if name not in field_names and not harmless(name, value)
    )
    shown = {*islice(unknown, UNKNOWN)}
    return {name: value for name, value in data.items() if name in field_names or name in shown}


class Strict(BaseModel):
    """The rules of the page's top, for one object of a body."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        field_names = {field.alias or name for name, field in cls.model_fields.items()}
        sent_fields = {
            name: value
            for name, value in data.items()
            if name not in field_names or value is not None
        }
        return few_unknown(sent_fields, field_names, _asks_nothing)


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
    """A function that the model may call. ``strict`` has no effect of its own: a call that is
    forced always follows its schema."""

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
            found = "no tool_call_id" if self.role == "tool" else "a tool_call_id"
            raise wrong(
                f"{found} in a message of {self.role}", "one in a message of tool", "change it"
            )
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
    """What tools and the choice among them may not be together. ``formatted``: the answer shall
    follow a schema, as the field ``param`` says."""
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


class StreamOptions(Strict):
    include_usage: bool = False


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=limits.NAME)] = "answer"
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Asked(Strict, ABC):
    """The fields that both kinds of completion have in common. ``adapters``, ``top_k`` and
    ``ignore_eos`` are not OpenAI's."""

    model: Name
    adapters: Blend | None = None
    n: Annotated[int, Field(ge=1, le=limits.CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Stop | Stops | None, BeforeValidator(_stops)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong(
                "stream_options without stream",
                "both, or neither",
                "add stream = true",
                "stream_options",
            )
        return self

    def sampling(self, max_tokens: int, choice: int, base: SamplingDefaults) -> Sampling:
        """How answer number ``choice`` of the call is drawn; each has a seed of its own. ``base``:
        of the fields that the client leaves out."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = None if self.seed is None else sample_seed(self.seed, choice)
        temperature = _first(self.temperature, base.temperature, 1.0)
        top_p, top_k = _first(self.top_p, base.top_p, 1.0), _first(self.top_k, base.top_k, 0)
        return Sampling(
            max_tokens, temperature, max(top_p, 1e-6), max(top_k, 0), seed, stop, self.alternatives(),
            self.schema_of_answer(), self.ignore_eos,
        )  # fmt: skip

    @abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives beside each token are asked for; None for no probabilities at
        all."""

    def schema_of_answer(self) -> dict[str, Any] | None:
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, ObjectFormat) else None


class ChatRequest(Asked):
    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=limits.MESSAGES)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=limits.ALTERNATIVES)] = 0
    tools: ToolList = []
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_calls(self) -> Self:
        check_history(self.messages, "messages")
        formatted = not isinstance(self.response_format, TextFormat | None)
        check_tools(self.tools, self.tool_choice, formatted, "response_format")
        return self

    @property
    def forced_tool(self) -> str | None:
        """The tool that must be called; "" for any of them, None where none must."""
        if isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    def callable_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    def schema_of_answer(self) -> dict[str, Any] | None:
        if self.forced_tool is None:
            return super().schema_of_answer()
        pairs = [(tool.function.name, tool.function.parameters) for tool in self.tools]
        if self.forced_tool:
            return arguments_schema(dict(pairs)[self.forced_tool])
        return calls_schema(pairs, MOST_CALLS if self.parallel_tool_calls else 1)

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong(
                "top_logprobs without logprobs",
                "both, or neither",
                "add logprobs = true",
                "top_logprobs",
            )
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            problem = f"max_tokens {self.max_tokens} beside max_completion_tokens {self.max_completion_tokens}"
            raise wrong(
                problem, "one of them", "leave out max_tokens, the older name", "max_tokens"
            )
        return self

    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Asked):
    prompt: Annotated[
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=limits.PROMPTS)],
        BeforeValidator(_prompts("prompt", limits.PROMPTS)),
        AfterValidator(_as_list),
    ]
    logprobs: Annotated[int, Field(ge=0, le=limits.ALTERNATIVES)] | None = None
    echo: bool = False

    def alternatives(self) -> int | None:
        return self.logprobs


class EmbeddingRequest(Strict):
    model: Name
    adapters: Blend | None = None
    input: Annotated[
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)],
        BeforeValidator(_prompts("input", limits.INPUTS)),
        AfterValidator(_as_list),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class LoadRequest(Strict):
    """As vLLM's, and ``pin``. ``lora_path`` may be left out for a name that is known already."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    load_inplace: bool = False
    pin: bool | None = None


class UnloadRequest(Strict):
    lora_name: Name
