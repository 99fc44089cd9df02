"""The pydantic fields of request bodies that control sampling, the form of the answer and the chat
template. They have the names of vLLM's API; some of them are also in OpenAI's.

The classes of whole request bodies in ``schemas.py`` inherit these fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from veneer.fileio.untrusted import parse
from veneer.serve import limits
from veneer.serve.refusal import value_error
from veneer.serve.requests import Grammar

#: the most entries of ``structured_outputs``; an object with more is refused before it is validated
MAX_STRUCTURED_FIELDS = 16

#: vLLM's older names of fields, with the field of ``structured_outputs`` that replaced each:
#: {"guided_json": "json", …}
GUIDED = {f"guided_{form}": form for form in ("json", "regex", "choice", "grammar")}


def limit_entries(max_entries: int, entry_noun: str, do: str = "leave some out") -> BeforeValidator:
    """A pydantic validator that refuses an object with more than ``max_entries`` entries. It runs
    before the entries are validated, so that a huge object costs little time. For the error's text,
    ``entry_noun`` says what the entries are, and ``do`` what the client can do."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > max_entries:
            raise value_error(f"{len(value):,} {entry_noun}", f"at most {max_entries:,}", do)
        return value

    return BeforeValidator(check)


def _limit_template_arguments(value: Any) -> Any:
    """Refuse ``chat_template_kwargs`` of more than ``limits.TEMPLATE_KWARGS`` bytes of JSON."""
    byte_count = len(json.dumps(value)) if isinstance(value, dict) else 0
    if byte_count > limits.TEMPLATE_KWARGS:
        raise value_error(
            f"{byte_count:,} bytes in chat_template_kwargs",
            f"at most {limits.TEMPLATE_KWARGS:,}",
            "leave some out",
        )
    return value


def _refuse_zero(value: int) -> int:
    if value == 0:
        raise value_error(
            "truncate_prompt_tokens 0",
            "-1, or at least 1",
            "leave it out, or send the number of tokens to keep",
        )
    return value


def _refuse_unprintable(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise value_error(
            "a request_id with other characters",
            "letters, digits and signs of ASCII, without a space",
            "choose another",
        )
    return value


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Truncation = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_refuse_zero)]
BadWord = Annotated[str, Field(min_length=1, max_length=limits.BAD_WORD)]
GrammarText = Annotated[str, Field(min_length=1, max_length=limits.GRAMMAR)]


class TemplateFields(BaseModel):
    """The fields that become arguments of the chat template; messages and tools are fields of the
    classes that inherit these."""

    add_generation_prompt: bool | None = None  # None: true unless ``continue_final_message``
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_limit_template_arguments)] = {}

    @model_validator(mode="after")
    def _check_generation_prompt(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise value_error(
                "continue_final_message and add_generation_prompt, both true",
                "at most one of them",
                "set add_generation_prompt = false",
                "continue_final_message",
            )
        return self

    def template_arguments(self) -> dict[str, Any]:
        """The keyword arguments for the tokenizer's ``apply_chat_template``."""
        adds_prompt = not self.continue_final_message and self.add_generation_prompt is not False
        return {
            **self.chat_template_kwargs,
            "add_generation_prompt": adds_prompt,
            "continue_final_message": self.continue_final_message,
        }


class StructuredOutputs(BaseModel):
    """vLLM's field ``structured_outputs``: a constraint that the answer must match. Exactly one of
    ``json``, ``json_object``, ``regex``, ``choice`` and ``grammar`` must be set. vLLM's other
    fields are accepted only with values that have no effect."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: GrammarText | None = None
    choice: (
        Annotated[list[GrammarText], Field(fail_fast=True, min_length=1, max_length=limits.OPTIONS)]
        | None
    ) = None
    grammar: GrammarText | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_fallback: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_constraint(self) -> Self:
        constraints = {
            "json": self.json_,
            "json_object": self.json_object or None,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        sent_names = [name for name, value in constraints.items() if value is not None]
        if len(sent_names) != 1:
            raise value_error(
                f"{' and '.join(sent_names) or 'nothing'} in structured_outputs",
                f"one of {', '.join(constraints)}",
                "send one form of the answer",
                "structured_outputs",
            )
        if isinstance(self.json_, str):
            try:
                schema = parse(self.json_.encode())
            except ValueError:
                schema = None
            if not isinstance(schema, dict):
                raise value_error(
                    "a text that is no JSON schema",
                    "an object",
                    "check structured_outputs.json",
                    "structured_outputs",
                )
            self.json_ = schema
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None if the constraint is a ``Grammar``."""
        return {"type": "object"} if self.json_object else self.json_  # pyright: ignore

    def grammar_of_answer(self) -> Grammar | None:
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        return None if self.grammar is None else Grammar("grammar", self.grammar)


class CommonSamplingFields(BaseModel):
    """The sampling fields that all APIs for answers have. None: the base's own value."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class SamplingFields(CommonSamplingFields):
    """vLLM's sampling fields. A field that keeps its default value has no effect."""

    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    logit_bias: Annotated[
        dict[TokenText, Bias], limit_entries(limits.BIASES, "tokens in logit_bias")
    ] = {}
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    stop_token_ids: Annotated[
        list[TokenId], Field(fail_fast=True, max_length=limits.STOP_TOKENS)
    ] = []
    ignore_eos: bool = False
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=limits.BAD_WORDS)] = []
    allowed_token_ids: (
        Annotated[
            list[TokenId], Field(fail_fast=True, min_length=1, max_length=limits.ALLOWED_TOKENS)
        ]
        | None
    ) = None
    structured_outputs: Annotated[
        StructuredOutputs | None,
        limit_entries(MAX_STRUCTURED_FIELDS, "fields in structured_outputs", "send one form"),
    ] = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=limits.ALTERNATIVES)] | None = None
    truncate_prompt_tokens: Truncation | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: (
        Annotated[
            str,
            Field(min_length=1, max_length=limits.REQUEST_ID),
            AfterValidator(_refuse_unprintable),
        ]
        | None
    ) = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0

    @model_validator(mode="before")
    @classmethod
    def _rename_guided(cls, data: Any) -> Any:
        """Turn a field with one of vLLM's older names (``GUIDED``) into a field of
        ``structured_outputs``. A body may have only one of them."""
        sent_names = [
            name for name in GUIDED if isinstance(data, dict) and data.get(name) is not None
        ]
        if not sent_names:
            return data
        if len(sent_names) > 1 or data.get("structured_outputs") is not None:
            second_name = [*sent_names[1:], "structured_outputs"][0]
            raise value_error(
                f"{sent_names[0]} beside {second_name}", "one of them", "send one", sent_names[0]
            )
        other_fields = {name: value for name, value in data.items() if name not in GUIDED}
        return {
            **other_fields,
            "structured_outputs": {GUIDED[sent_names[0]]: data[sent_names[0]]},
        }

    def sampling_options(self, bad_words: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """The values of these fields as keyword arguments of ``requests.Sampling``. ``bad_words``:
        the token sequences of the words in the field ``bad_words``."""
        return {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_p": self.min_p,
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
            "min_tokens": self.min_tokens,
            "stop_tokens": frozenset(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "bad_words": tuple(bad_words),
            "allowed_tokens": self._allowed_tokens,
            "grammar": self.grammar_of_answer(),
        }

    @cached_property
    def _allowed_tokens(self) -> frozenset[int] | None:
        # made once, since a request may have 64 answers and 32,768 allowed tokens
        return None if self.allowed_token_ids is None else frozenset(self.allowed_token_ids)

    def grammar_of_answer(self) -> Grammar | None:
        """The constraint on the answer; None without a constraint, or if it is a JSON schema."""
        structured_outputs = self.structured_outputs
        return None if structured_outputs is None else structured_outputs.grammar_of_answer()
