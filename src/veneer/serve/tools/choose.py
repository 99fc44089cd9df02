"""Parsers of tool calls by vLLM's names, and detection of the parser from a chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from veneer.errors import ConfigError, listing, nearest
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Grammar
from veneer.serve.tools.deltas import CallParser
from veneer.serve.tools.forced import ListedCalls, NamedCall
from veneer.serve.tools.json_calls import DeepSeekV3, DeepSeekV31, Hermes, Llama3Json, Mistral
from veneer.serve.tools.pythonic import Pythonic
from veneer.serve.tools.strict import strict_grammar
from veneer.serve.tools.xml_calls import Qwen3Xml

PARSERS: dict[str, type[CallParser]] = {
    "deepseek_v3": DeepSeekV3, "deepseek_v31": DeepSeekV31, "hermes": Hermes,
    "llama3_json": Llama3Json, "llama4_json": Llama3Json, "llama4_pythonic": Pythonic,
    "mistral": Mistral, "pythonic": Pythonic, "qwen3_coder": Qwen3Xml, "qwen3_xml": Qwen3Xml,
}  # fmt: skip

#: (texts, name of a parser): if a chat template contains all these texts, the model writes calls in
#: the notation of this parser. The first match counts.
TEMPLATE_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("[func_name1(params_name1=params_value1",), "pythonic"),
    (('{"name": function name, "parameters":',), "llama3_json"),
)


def check_parser(name: str | None) -> None:
    """Check the option --tool-call-parser. ``ConfigError``: no parser has this name."""
    if name is not None and name not in PARSERS:
        raise ConfigError(
            f"--tool-call-parser {name!r}{nearest(name, PARSERS)}",
            f"one of {listing(PARSERS, 20)}",
            "check the spelling",
        )


def detect_parser(template: Any) -> str | None:
    """The name of the parser for a chat template; None if the notation of calls is not known.
    ``template``: the text, or texts by name."""
    if isinstance(template, Mapping):
        template = template.get("tool_use") or template.get("default")
    template_text = str(template or "")
    names = (name for signs, name in TEMPLATE_SIGNS if all(sign in template_text for sign in signs))
    return next(names, None)


@dataclass(frozen=True)
class CallReading:
    """How to parse the answers to a request.

    ``new_parser``: creates a parser for one answer; ``markers``: by token id, the texts of special
    tokens that must stay in the decoded text, because the parser needs them; ``grammar``:
    constrains the answers if a tool is strict."""

    new_parser: Callable[[], CallParser]
    markers: Mapping[int, str] = field(default_factory=dict)
    grammar: Grammar | None = None


def call_reading(
    tools: Mapping[str, Any],
    forced: str | None,
    tokenizer: Any,
    parser: str | None,
    prefix: str,
    strict: Collection[str] = (),
) -> CallReading:
    """How to parse the answers to a request. ``tools``: by name, the schema of a tool's parameters.
    ``forced``: the name of the tool that must be called, "" for any tool, or None. ``parser``: the
    name of the parser that the server was started with, or None. ``prefix``: the beginning of the
    ids of calls. ``strict``: names of the tools whose calls must follow their schemas. ``Refusal``:
    no parser is known for the base."""
    parser_name = parser or detect_parser(tokenizer.chat_template)
    parser_class = None if parser_name is None else PARSERS[parser_name]
    if forced is not None:
        parser_type = ListedCalls if forced == "" else partial(NamedCall, forced)
        new_id = CallParser.new_id if parser_class is None else parser_class.new_id
        return CallReading(partial(parser_type, tools, prefix, new_id))
    if parser_class is None:
        raise Refusal(
            400,
            "tools, and a base whose notation of calls is not known",
            "one of " + listing(PARSERS, 20),
            "have the server started with --tool-call-parser, or force a call by tool_choice",
            param="tools",
            code="no_tool_parser",
        )
    markers = _marker_ids(tokenizer, parser_class.markers)
    grammar = strict_grammar(parser_class, tools, strict, markers) if strict else None
    return CallReading(partial(parser_class, tools, prefix), markers, grammar)


def _marker_ids(tokenizer: Any, markers: tuple[str, ...]) -> dict[int, str]:
    """By token id, the ``markers`` that are special tokens. Decoding would leave them out."""
    added_tokens = tokenizer.added_tokens_decoder.items()
    return {
        id: token.content
        for id, token in added_tokens
        if token.special and token.content in markers
    }
