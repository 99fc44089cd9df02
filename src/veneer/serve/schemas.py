"""The pydantic models of the request bodies of completions, chats, embeddings, and of loading and
unloading adapters: their fields, with types and bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from veneer.kernels.draws import sample_seed
from veneer.models.sampling_defaults import SamplingDefaults
from veneer.serve import limits
from veneer.serve.body_rules import Name, Strict
from veneer.serve.chat_messages import (
    Message,
    NamedChoice,
    Tool,
    ToolList,
    check_history,
    check_tools,
)
from veneer.serve.refusal import describe_value, raise_first_error, value_error
from veneer.serve.requests import Sampling
from veneer.serve.sampling_fields import SamplingFields, TemplateFields, TokenId, limit_entries
from veneer.serve.tools.forced import MAX_CALLS, arguments_schema, calls_schema

T = TypeVar("T")


def _input_check(field: str, max_inputs: int) -> Callable[[Any], Any]:
    """A pydantic validator for ``field``, "prompt" or "input", which may be a text, a list of
    texts, a list of token ids or a list of such lists, with at most ``max_inputs`` texts or lists.
    It runs before pydantic's own validation, so that the error names all four types. (Pydantic
    would list an error for each type, of which ``body_refusal`` reports only one.)"""
    expected = (
        f"a text, a list of 1 to {max_inputs} texts, a list of token ids, or a list of 1 to"
        f" {max_inputs} such lists"
    )
    type_nouns = {str: "texts", int: "numbers", list: "lists"}

    def check(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise value_error(f"{describe_value(value)} in {field}", expected, "send one of them")
        element_types = {type(element) for element in value}
        if len(element_types) > 1 or not element_types <= type_nouns.keys():
            found_nouns = sorted(
                {type_nouns.get(element_type, "something else") for element_type in element_types}
            )
            raise value_error(
                f"a list of {' and '.join(found_nouns)} in {field}",
                expected,
                "send items of one kind",
            )
        if element_types != {int} and len(value) > max_inputs:
            inputs_noun = "texts" if element_types == {str} else "lists of tokens"
            raise value_error(
                f"{len(value):,} {inputs_noun} in {field}",
                f"at most {max_inputs}",
                "send several requests",
            )
        return value

    return check


def as_list(value: Any) -> Any:
    """The inputs as a list: a text or a list of token ids becomes a list with this one element."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


def _check_stops(value: Any) -> Any:
    """Refuse a value of ``stop`` that is neither a text nor a list of at most ``limits.STOPS``
    texts."""
    is_short_list = isinstance(value, list) and len(value) <= limits.STOPS
    is_text_list = is_short_list and all(isinstance(stop, str) for stop in value)
    if not (isinstance(value, str) or is_text_list):
        raise value_error(
            f"{len(value):,} items in stop"
            if isinstance(value, list) and not is_short_list
            else f"{describe_value(value)} in stop",
            f"a text, or a list of at most {limits.STOPS} texts",
            "send fewer, or others",
        )
    return value


Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=limits.STOPS)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=2**20)]
Weight = Annotated[float, Field(ge=-limits.WEIGHT, le=limits.WEIGHT)]
Blend = Annotated[
    dict[Name, Weight],
    limit_entries(limits.BLEND, "adapters in a blend"),
    Field(min_length=1, max_length=limits.BLEND),
]


def _first_set(*values: T | None) -> T:
    """The first value that is not None; one must not be None."""
    return next(value for value in values if value is not None)


class StreamOptions(Strict):
    """OpenAI's stream options, and vLLM's ``continuous_usage_stats``, with which each chunk of the
    stream contains the numbers of tokens so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="after")
    def _check_usage(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise value_error(
                "continuous_usage_stats without include_usage",
                "both, or neither",
                "add include_usage = true",
                "stream_options",
            )
        return self


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


class ModelRequest(Strict):
    """The fields that name what computes the answer. ``adapters``, a blend (weights by adapter
    name), is Veneer's own field."""

    model: Name
    adapters: Blend | None = None


class GenerationRequest(ModelRequest, SamplingFields, ABC):
    """The fields that chats and completions share. ``top_k`` and ``cache_salt`` are vLLM's."""

    n: Annotated[int, Field(ge=1, le=limits.CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Annotated[Stop | Stops | None, BeforeValidator(_check_stops)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=limits.NAME)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _check_generation_fields(self) -> Self:
        is_text = self.response_format is None or isinstance(self.response_format, TextFormat)
        token_limit = self.token_limit()
        raise_first_error(
            (
                self.stream_options is not None and not self.stream,
                "stream_options without stream",
                "both, or neither",
                "add stream = true",
                "stream_options",
            ),
            (
                self.stream and self.prompt_logprobs is not None,
                "prompt_logprobs with stream",
                "one of them",
                "leave out stream",
                "prompt_logprobs",
            ),
            (
                self.structured_outputs is not None and not is_text,
                "structured_outputs beside response_format",
                "one of them",
                "send one",
                "structured_outputs",
            ),
            (
                token_limit == 0 and self.prompt_alternative_count() is None,
                "the number 0 in max_tokens",
                "at least 1, or 0 with echo or prompt_logprobs",
                "ask for more",
                "max_tokens",
            ),
            (
                token_limit is not None and self.min_tokens > token_limit,
                f"min_tokens {self.min_tokens} and max_tokens {token_limit}",
                "at most max_tokens",
                "change one of them",
                "min_tokens",
            ),
        )
        return self

    def sampling(
        self,
        max_tokens: int,
        answer_index: int,
        defaults: SamplingDefaults,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> Sampling:
        """The sampling settings of one answer.

        Args:
            max_tokens: the most tokens of the answer.
            answer_index: the answer's index among all answers of the request, which are ``n`` for
                each prompt. Each index has a seed of its own, made from the field ``seed``.
            defaults: the base's values for fields that the client leaves out.
            bad_words: the token sequences of the words in the field ``bad_words``.
        """
        return Sampling(
            max_tokens,
            temperature=_first_set(self.temperature, defaults.temperature, 1.0),
            top_p=max(_first_set(self.top_p, defaults.top_p, 1.0), 1e-6),
            top_k=max(_first_set(self.top_k, defaults.top_k, 0), 0),
            seed=None if self.seed is None else sample_seed(self.seed, answer_index),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=self.alternative_count(),
            schema=self.schema_of_answer(),
            prompt_logprobs=self.prompt_alternative_count(),
            **self.sampling_options(bad_words),
        )

    @abstractmethod
    def alternative_count(self) -> int | None:
        """The number of most likely tokens to return with each token of the answer; None: return no
        log-probabilities."""

    def token_limit(self) -> int | None:
        """The client's limit on the tokens of an answer; None if it sets none."""
        return self.max_tokens

    def prompt_alternative_count(self) -> int | None:
        """The number of most likely tokens to return with each token of the prompt; None: do not
        score the prompt."""
        return self.prompt_logprobs

    def schema_param(self) -> str:
        """The name of the field with the JSON schema that the answer must follow, for errors."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None if it need not follow one."""
        if self.structured_outputs is not None:
            return self.structured_outputs.schema_of_answer()
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, ObjectFormat) else None


class ChatRequest(GenerationRequest, TemplateFields):
    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=limits.MESSAGES)
    ]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=limits.ALTERNATIVES)] = 0
    tools: ToolList = []
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _check_chat_fields(self) -> Self:
        if self.echo and self.messages[-1].role != "assistant":
            raise value_error(
                "echo, and a last message that is not the assistant's",
                "one that the answer goes on from",
                "leave out echo",
                "echo",
            )
        check_history(self.messages, "messages")
        has_format = not isinstance(self.response_format, TextFormat | None)
        param = "response_format" if has_format else "structured_outputs"
        has_format = has_format or self.structured_outputs is not None
        check_tools(self.tools, self.tool_choice, has_format, param)
        token_limits = (self.max_tokens, self.max_completion_tokens)
        raise_first_error(
            (
                self.top_logprobs and not self.logprobs,
                "top_logprobs without logprobs",
                "both, or neither",
                "add logprobs = true",
                "top_logprobs",
            ),
            (
                None not in token_limits and self.max_tokens != self.max_completion_tokens,
                f"max_tokens {self.max_tokens} beside max_completion_tokens"
                f" {self.max_completion_tokens}",
                "one of them",
                "leave out max_tokens, the older name",
                "max_tokens",
            ),
        )
        return self

    @property
    def forced_tool(self) -> str | None:
        """The name of the tool that the answer must call; "" if it must call any one of the tools;
        None if it may be a text."""
        if isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call; empty if ``tool_choice`` is "none"."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def strict_tools(self) -> list[str]:
        """The names of the tools with ``strict``: if the answer calls one, its arguments must match
        the tool's schema. Empty if a call is forced, since ``schema_of_answer`` then applies to
        the whole answer."""
        functions = [tool.function for tool in self.callable_tools()]
        is_forced = self.forced_tool is not None
        return [function.name for function in functions if function.strict and not is_forced]

    def schema_param(self) -> str:
        return super().schema_param() if self.forced_tool is None else "tools"

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None if it need not follow one. If a call is
        forced, the schema of the named tool's arguments, or of a list of calls."""
        if self.forced_tool is None:
            return super().schema_of_answer()
        schemas = [(tool.function.name, tool.function.parameters) for tool in self.tools]
        if self.forced_tool:
            return arguments_schema(dict(schemas)[self.forced_tool])
        return calls_schema(schemas, MAX_CALLS if self.parallel_tool_calls else 1)

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternative_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=limits.PROMPTS)],
        BeforeValidator(_input_check("prompt", limits.PROMPTS)),
        AfterValidator(as_list),
    ]
    logprobs: Annotated[int, Field(ge=0, le=limits.ALTERNATIVES)] | None = None
    add_special_tokens: bool = True

    def alternative_count(self) -> int | None:
        return self.logprobs

    def prompt_alternative_count(self) -> int | None:
        echo_count = self.logprobs if self.echo else None
        if echo_count is None and self.echo and self.max_tokens == 0:
            echo_count = 0  # with no answer, only the prompt's scores are computed
        asked_counts = [count for count in (self.prompt_logprobs, echo_count) if count is not None]
        return max(asked_counts, default=None)


class EmbeddingRequest(ModelRequest):
    input: Annotated[
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)],
        BeforeValidator(_input_check("input", limits.INPUTS)),
        AfterValidator(as_list),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class LoadRequest(Strict):
    """The body of a request to load an adapter: vLLM's fields, and ``pin``. ``lora_path`` may be
    left out if the name is served already, or if the source has an adapter of this name. ``pin``:
    whether the adapter stays in memory, None for no change. ``load_inplace``: whether to replace
    an adapter that has this name."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    load_inplace: bool = False
    pin: bool | None = None


class UnloadRequest(Strict):
    lora_name: Name
