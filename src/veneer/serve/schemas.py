"""The bodies that clients may send, by the rules of ``body_rules.py``."""

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
from veneer.serve.refusal import kind, wrong
from veneer.serve.requests import Sampling
from veneer.serve.sampling_fields import SamplingFields, TemplateFields
from veneer.serve.tools.forced import MOST_CALLS, arguments_schema, calls_schema

T = TypeVar("T")


def _limit_blend(value: Any) -> Any:
    """Refuse a blend of too many adapters before its entries are validated."""
    if isinstance(value, dict) and len(value) > limits.BLEND:
        raise wrong(
            f"{len(value):,} adapters in a blend", f"at most {limits.BLEND}", "leave some out"
        )
    return value


def _prompts(field: str, most: int) -> Callable[[Any], Any]:
    """A check of the form of ``prompt`` or ``input``, which is one of four, in words that know all
    of them."""
    expected = (
        f"a text, a list of 1 to {most} texts, a list of token ids, or a list of 1 to {most} such"
        " lists"
    )
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


Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=limits.STOPS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=2**20)]
Weight = Annotated[float, Field(ge=-limits.WEIGHT, le=limits.WEIGHT)]
Blend = Annotated[
    dict[Name, Weight], BeforeValidator(_limit_blend), Field(min_length=1, max_length=limits.BLEND)
]


def _first(*values: T | None) -> T:
    """The first that is not None."""
    return next(value for value in values if value is not None)


class StreamOptions(Strict):
    """``continuous_usage_stats``: vLLM's, the usage so far with each chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="after")
    def _check_usage(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise wrong(
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


class Asked(Strict, SamplingFields, ABC):
    """The fields that both kinds of completion have in common. ``adapters``, ``top_k`` and
    ``cache_salt`` are not OpenAI's."""

    model: Name
    adapters: Blend | None = None
    n: Annotated[int, Field(ge=1, le=limits.CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Stop | Stops | None, BeforeValidator(_stops)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=limits.NAME)] | None = None
    echo: bool = False

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

    @model_validator(mode="after")
    def _check_sampling_fields(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            do = "leave out stream"
            raise wrong("prompt_logprobs with stream", "one of them", do, "prompt_logprobs")
        is_text = self.response_format is None or isinstance(self.response_format, TextFormat)
        if self.structured_outputs is not None and not is_text:
            problem = "structured_outputs beside response_format"
            raise wrong(problem, "one of them", "send one", "structured_outputs")
        most = self.token_limit()
        if most == 0 and self.prompt_alternative_count() is None:
            expected = "at least 1, or 0 with echo or prompt_logprobs"
            raise wrong("the number 0 in max_tokens", expected, "ask for more", "max_tokens")
        if most is not None and self.min_tokens > most:
            problem = f"min_tokens {self.min_tokens} and max_tokens {most}"
            raise wrong(problem, "at most max_tokens", "change one of them", "min_tokens")
        return self

    def sampling(
        self,
        max_tokens: int,
        choice: int,
        base: SamplingDefaults,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> Sampling:
        """How answer ``choice`` of the call is sampled; each answer has its own seed. ``base``:
        defaults of the fields that the client leaves out. ``bad_words``: the tokens of that
        field."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = None if self.seed is None else sample_seed(self.seed, choice)
        temperature = _first(self.temperature, base.temperature, 1.0)
        top_p, top_k = _first(self.top_p, base.top_p, 1.0), _first(self.top_k, base.top_k, 0)
        return Sampling(
            max_tokens,
            temperature,
            max(top_p, 1e-6),
            max(top_k, 0),
            seed,
            stop,
            self.alternative_count(),
            self.schema_of_answer(),
            prompt_logprobs=self.prompt_alternative_count(),
            **self.sampling_options(bad_words),
        )

    @abstractmethod
    def alternative_count(self) -> int | None:
        """The number of alternatives for each token; None for no log-probabilities."""

    def token_limit(self) -> int | None:
        """The client's limit of tokens of an answer."""
        return self.max_tokens

    def prompt_alternative_count(self) -> int | None:
        """The number of alternatives for each token of the prompt; None if the prompt is not
        scored."""
        return self.prompt_logprobs

    def schema_of_answer(self) -> dict[str, Any] | None:
        if self.structured_outputs is not None:
            return self.structured_outputs.schema_of_answer()
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, ObjectFormat) else None


class ChatRequest(Asked, TemplateFields):
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
    def _check_echo(self) -> Self:
        if self.echo and self.messages[-1].role != "assistant":
            raise wrong(
                "echo, and a last message that is not the assistant's",
                "one that the answer goes on from",
                "leave out echo",
                "echo",
            )
        return self

    @model_validator(mode="after")
    def _check_calls(self) -> Self:
        check_history(self.messages, "messages")
        formatted = not isinstance(self.response_format, TextFormat | None)
        param = "response_format" if formatted else "structured_outputs"
        formatted = formatted or self.structured_outputs is not None
        check_tools(self.tools, self.tool_choice, formatted, param)
        return self

    @property
    def forced_tool(self) -> str | None:
        """The tool that must be called; "" for any of them, None where none must."""
        if isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    def callable_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def strict_tools(self) -> list[str]:
        """The tools of which a call that the model need not write follows its schema."""
        functions = [tool.function for tool in self.callable_tools()]
        forced = self.forced_tool is not None
        return [function.name for function in functions if function.strict and not forced]

    def schema_of_answer(self) -> dict[str, Any] | None:
        if self.forced_tool is None:
            return super().schema_of_answer()
        pairs = [(tool.function.name, tool.function.parameters) for tool in self.tools]
        if self.forced_tool:
            return arguments_schema(dict(pairs)[self.forced_tool])
        return calls_schema(pairs, MOST_CALLS if self.parallel_tool_calls else 1)

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

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
            problem = (
                f"max_tokens {self.max_tokens} beside max_completion_tokens"
                f" {self.max_completion_tokens}"
            )
            raise wrong(
                problem, "one of them", "leave out max_tokens, the older name", "max_tokens"
            )
        return self

    def alternative_count(self) -> int | None:
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
    add_special_tokens: bool = True

    def alternative_count(self) -> int | None:
        return self.logprobs

    def prompt_alternative_count(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        if echoed is None and self.echo and self.max_tokens == 0:
            echoed = 0  # nothing else of it is computed
        counts = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return max(counts, default=None)


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
