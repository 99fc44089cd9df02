"""The parsers of tool calls by the names that vLLM gives them, and detection of the parser from a
chat template."""

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

#: pairs (texts, name of a parser): if a chat template contains all the texts of a pair, the model
#: writes calls in the notation of that parser. The first pair that matches is taken, so a pair with
#: more texts stands before a pair with a part of them.
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
    """Check the value of the option --tool-call-parser; None, no value, is valid. Raises
    ``ConfigError`` if no parser has this name."""
    if name is not None and name not in PARSERS:
        raise ConfigError(
            f"--tool-call-parser {name!r}{nearest(name, PARSERS)}",
            f"one of {listing(PARSERS, 20)}",
            "check the spelling",
        )


def detect_parser(template: Any) -> str | None:
    """The name of the parser (a key of ``PARSERS``) for the notation of calls that a chat template
    uses; None if the template has no known notation. ``template``: a tokenizer's
    ``chat_template``, which is a text, a mapping from names to texts, or None."""
    if isinstance(template, Mapping):
        template = template.get("tool_use") or template.get("default")
    template_text = str(template or "")
    parser_names = (
        parser_name
        for signs, parser_name in TEMPLATE_SIGNS
        if all(sign in template_text for sign in signs)
    )
    return next(parser_names, None)


@dataclass(frozen=True)
class CallReading:
    """How to parse tool calls from the answers to one request.

    Fields:
        new_parser: creates a parser, which parses one answer.
        markers: {token id: text} of the special tokens that decoding must not leave out, because
            the parser finds calls by them.
        grammar: the grammar that the answers must follow; None unless a tool is strict (a strict
            tool's arguments must follow its schema).
    """

    new_parser: Callable[[], CallParser]
    markers: Mapping[int, str] = field(default_factory=dict)
    grammar: Grammar | None = None


def call_reading(
    parameters_by_tool: Mapping[str, Any],
    forced_tool: str | None,
    tokenizer: Any,
    parser_option: str | None,
    id_prefix: str,
    strict_tools: Collection[str] = (),
) -> CallReading:
    """Choose how to parse tool calls from the answers to a request.

    Args:
        parameters_by_tool: for each tool's name, the JSON schema of its parameters.
        forced_tool: the name of the tool that the answer must call; "" if it must call any tool;
            None if it need not call one. A forced call has a notation of its own (forced.py), so
            every base can write it.
        parser_option: the server's option --tool-call-parser; None detects the parser from the
            tokenizer's chat template.
        id_prefix: the beginning of the ids of calls.
        strict_tools: names of the tools whose arguments must follow their schemas.

    Raises:
        Refusal: no call is forced, and the notation in which the base writes calls is not known, or
            no grammar can be written for the schema of a strict tool (``strict_grammar``).
    """
    parser_name = parser_option or detect_parser(tokenizer.chat_template)
    parser_class = None if parser_name is None else PARSERS[parser_name]
    if forced_tool is not None:
        forced_parser = ListedCalls if forced_tool == "" else partial(NamedCall, forced_tool)
        new_id = CallParser.new_id if parser_class is None else parser_class.new_id
        return CallReading(partial(forced_parser, parameters_by_tool, id_prefix, new_id))
    if parser_class is None:
        raise Refusal(
            400,
            "tools, and a base whose notation of calls is not known",
            "one of " + listing(PARSERS, 20),
            "have the server started with --tool-call-parser, or force a call by tool_choice",
            param="tools",
            code="no_tool_parser",
        )
    markers = _special_markers(tokenizer, parser_class.markers)
    grammar = (
        strict_grammar(parser_class, parameters_by_tool, strict_tools, markers)
        if strict_tools
        else None
    )
    return CallReading(partial(parser_class, parameters_by_tool, id_prefix), markers, grammar)


def _special_markers(tokenizer: Any, markers: tuple[str, ...]) -> dict[int, str]:
    """{token id: text} of those ``markers`` (tags of a notation of calls) that are special tokens
    of the tokenizer. Decoding leaves special tokens out unless it is told to keep them."""
    added_tokens_by_id = tokenizer.added_tokens_decoder.items()
    return {
        id: token.content
        for id, token in added_tokens_by_id
        if token.special and token.content in markers
    }
