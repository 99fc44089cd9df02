"""The grammar of answers that may call strict tools (tools whose arguments must follow their
schema). Text is not constrained, but a call that has begun must follow the schema of its tool.

    hermes   text <tool_call> {"name": "f", "arguments": ⟨the schema of f⟩} </tool_call> text …

Calls have the notation of the model's family, in which the model was trained to write calls. A call
must name a tool of the request. The arguments of a tool that is not strict may be any object.
Schema keywords that llguidance does not know are ignored, because clients send schemas with any
keyword of JSON Schema. In Qwen 3 Coder's notation, an argument that is a string is constrained only
by its enum.

In the grammar, a tag that is a special token is a token id. A tag that is not a special token is
text, and the answer's text before it ends where the tag first occurs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from veneer.serve.grammars import LAYOUT
from veneer.serve.refusal import Refusal, describe_value
from veneer.serve.requests import Grammar
from veneer.serve.tools.deltas import CallParser
from veneer.serve.tools.forced import Schema, arguments_schema
from veneer.serve.tools.json_calls import (
    DeepSeek,
    DeepSeekV3,
    DeepSeekV31,
    Hermes,
    Llama3Json,
    Mistral,
)
from veneer.serve.tools.pythonic import Pythonic
from veneer.serve.tools.xml_calls import Qwen3Xml, follow_reference, json_types

#: llguidance's options for the JSON schemas within the grammar: "lenient" ignores keywords that it
#: does not know, and "coerce_one_of" treats oneOf as anyOf
JSON_OPTIONS = {**LAYOUT, "lenient": True, "coerce_one_of": True}
#: options for arguments in the notation of Python calls. The grammar writes them as JSON, but they
#: are parsed as Python, so their strings may contain only the escapes that mean the same in both.
PYTHON_OPTIONS = {**JSON_OPTIONS, "json_allowed_escapes": '"\\nrtbf'}
#: rules that every grammar of this file uses: any text, and up to 8 characters of white space
TERMINALS = r"""
TEXT: /(.|\n)*/
WS: /[ \r\n\t]{0,8}/
"""


def strict_grammar(
    parser_class: type[CallParser],
    parameters_by_tool: Mapping[str, Schema],
    strict_tools: Collection[str],
    markers: Mapping[int, str],
) -> Grammar:
    """The grammar of answers in the notation that ``parser_class`` parses.

    Args:
        parameters_by_tool: for each tool's name, the JSON schema of its parameters.
        strict_tools: names of the tools for which this schema is enforced.
        markers: {token id: text} of the notation's tags that are special tokens.

    Raises:
        Refusal: the field "required" of a strict tool's schema is invalid. This function reads it
            only for notations whose arguments are not a JSON object.
    """
    writer = _GrammarWriter(
        parameters_by_tool, strict_tools, {text: id for id, text in markers.items()}
    )
    rules = _RULE_WRITERS[parser_class](writer)
    return Grammar("lark", "%llguidance {}\n" + rules + TERMINALS)


class _GrammarWriter:
    """Writes rules of a grammar, in llguidance's variant of Lark's format, for the tools of a
    request. ``special_ids``: {tag: token id} of the notation's tags that are special tokens; the
    other arguments are those of ``strict_grammar``."""

    def __init__(
        self,
        parameters_by_tool: Mapping[str, Schema],
        strict_tools: Collection[str],
        special_ids: Mapping[str, int],
    ) -> None:
        self.tool_names, self._parameters_by_tool = list(parameters_by_tool), parameters_by_tool
        self._strict_tools, self._special_ids = strict_tools, special_ids

    def tag_symbol(self, tag: str) -> str:
        """The expression of the grammar for a tag: a token id if the tag is a special token,
        otherwise a string literal."""
        return f"<[{self._special_ids[tag]}]>" if tag in self._special_ids else json.dumps(tag)

    def text_and_call_rules(self, parser_class: type[CallParser], call_expression: str) -> str:
        """Rules of an answer that is text, in which each tag that begins a call (``call_tag``) is
        followed by a call. ``call_expression``: the expression for a call without this tag. Those
        ``other_tags`` of the parser that are special tokens may occur in the text."""
        call_tag = parser_class.call_tag
        free_tokens = " | ".join(
            self.tag_symbol(free_tag)
            for free_tag in parser_class.other_tags
            if free_tag in self._special_ids
        )
        text_prefix = f"(TEXT ({free_tokens}))* " if free_tokens else ""
        rules = f"start: (head call)* {text_prefix}TEXT\ncall: {call_expression}\n"
        if call_tag in self._special_ids:
            return rules + f"head: {text_prefix}TEXT {self.tag_symbol(call_tag)}\n"
        tag_rule = f"text_and_tag[lazy]: TEXT {self.tag_symbol(call_tag)}\n"
        return rules + f"head: {text_prefix}text_and_tag\n" + tag_rule

    def tool_alternatives(self, write_alternative: Callable[[str, int], str]) -> str:
        """An expression that matches any one of the tools. ``write_alternative`` gets a tool's name
        and its number in the request, and returns the expression for this tool."""
        return " | ".join(
            write_alternative(name, number) for number, name in enumerate(self.tool_names)
        )

    def argument_rules(self) -> str:
        """Rules ``arguments_0``, ``arguments_1``, …: for each tool, by its number in the request, a
        JSON object of arguments."""
        return "".join(
            f"arguments_{number}: {_json_rule(self.strict_schema(name) or {'type': 'object'})}\n"
            for number, name in enumerate(self.tool_names)
        )

    def object_rules(self) -> str:
        """The rule ``object``, which matches the JSON object of a call, {"name": …, "arguments":
        …}, and the rules that this rule uses."""
        pairs = self.tool_alternatives(
            lambda name, number: (
                f'{json.dumps(json.dumps(name))} WS "," WS ARGUMENTS WS ":" WS arguments_{number}'
            )
        )
        keys = " | ".join(json.dumps(f'"{key}"') for key in ("arguments", "parameters"))
        opening = '"{" WS "\\"name\\"" WS ":" WS'
        return f'object: {opening} ({pairs}) WS "}}"\nARGUMENTS: {keys}\n{self.argument_rules()}'

    def strict_schema(self, tool_name: str) -> dict[str, Any] | None:
        """The schema of a tool's arguments; None if the tool is not strict, so that its arguments
        may be any object."""
        return (
            arguments_schema(self._parameters_by_tool[tool_name])
            if tool_name in self._strict_tools
            else None
        )

    def strict_properties(self, tool_name: str) -> list[tuple[str, dict[str, Any], bool]] | None:
        """For each parameter of a strict tool: (name, schema, whether it is required). None if the
        tool is not strict or its schema lists no properties, so that the grammar cannot constrain
        them. ``Refusal``: see ``_required_names``."""
        schema = self.strict_schema(tool_name)
        properties = None if schema is None else schema.get("properties")
        if schema is None or not isinstance(properties, dict):
            return None
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required_names = _required_names(schema, tool_name)
        return [
            (
                key,
                {**value, **definitions} if isinstance(value, dict) else {},
                key in required_names,
            )
            for key, value in properties.items()
        ]


def _required_names(schema: Mapping[str, Any], tool_name: str) -> list[str]:
    """The names of the parameters that a tool's schema requires; none if it has no field
    "required", or null there. ``Refusal``: the field is not a list of texts."""
    required_names = schema.get("required")
    if required_names is None:
        return []
    if not isinstance(required_names, list) or not all(
        isinstance(name, str) for name in required_names
    ):
        raise Refusal(
            400,
            f"{describe_value(required_names)} in 'required' of the parameters of {tool_name!r}",
            "a list of texts, which are names of parameters",
            "change it",
            param="tools",
        )
    return required_names


def _json_rule(schema: Mapping[str, Any], options: Mapping[str, Any] = JSON_OPTIONS) -> str:
    """The expression for JSON that follows ``schema``."""
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _hermes_rules(writer: _GrammarWriter) -> str:
    call_expression = f"WS object WS {writer.tag_symbol(Hermes.close_tags[0])}"
    return writer.text_and_call_rules(Hermes, call_expression) + writer.object_rules()


def _llama3_json_rules(writer: _GrammarWriter) -> str:
    python_tag = f"({writer.tag_symbol(Llama3Json.PYTHON_TAG)} WS)?"
    return (
        f'start: WS {python_tag} object (WS ";" WS object)* WS | FREE\n'
        "FREE: /[ \\r\\n\\t]*([^ \\r\\n\\t{](.|\\n)*)?/\n" + writer.object_rules()
    )


def _mistral_rules(writer: _GrammarWriter) -> str:
    id_tag, arguments_tag = writer.tag_symbol("[CALL_ID]"), writer.tag_symbol("[ARGS]")
    named_calls = writer.tool_alternatives(
        lambda name, number: (
            f"{json.dumps(name)} WS ({id_tag} ID)? ({arguments_tag})? WS arguments_{number}"
        )
    )
    object_list = '"[" WS object (WS "," WS object)* WS "]"'
    rules = writer.text_and_call_rules(Mistral, f"WS {object_list} | WS ({named_calls})")
    return rules + writer.object_rules() + "ID: /[A-Za-z0-9]{9}/\n"


def _deepseek_rules(writer: _GrammarWriter, call_template: str) -> str:
    separator = writer.tag_symbol(DeepSeek.SEPARATOR)
    call_alternatives = writer.tool_alternatives(
        lambda name, number: call_template.format(
            name=json.dumps(name), separator=separator, arguments=f"arguments_{number}"
        )
    )
    call_expression = f"WS ({call_alternatives}) WS {writer.tag_symbol(DeepSeek.CALL_END)}"
    return writer.text_and_call_rules(DeepSeek, call_expression) + writer.argument_rules()


def _qwen3_xml_rules(writer: _GrammarWriter) -> str:
    call_expression = writer.tool_alternatives(
        lambda name, number: f'{json.dumps(name + ">")} WS parameters_{number} "</function>"'
    )
    rules = [writer.text_and_call_rules(Qwen3Xml, call_expression)]
    for number, name in enumerate(writer.tool_names):
        properties = writer.strict_properties(name)
        if properties is None:
            rules.append(f'parameters_{number}: ("<parameter=" NAME ">" up_to_end WS)*\n')
            continue
        parameter_rules = [
            f"({json.dumps(f'<parameter={key}>')} {_xml_value_rule(schema)} WS)"
            + ("" if required else "?")
            for key, schema, required in properties
        ]
        rules.append(f"parameters_{number}: {' '.join(parameter_rules) or _EMPTY_TEXT}\n")
    rules.append("NAME: /[^<>\\s]([^<>\\n]*[^<>\\s])?/\n")
    rules.append('up_to_end[lazy]: /(.|\\n)*/ "</parameter>"\n')
    return "".join(rules)


def _xml_value_rule(schema: Mapping[str, Any]) -> str:
    """The expression for an argument's value and the closing tag after it."""
    resolved_schema = follow_reference(schema, schema)
    enum_values = resolved_schema.get("enum") if isinstance(resolved_schema, Mapping) else None
    allowed_types = json_types(schema, schema)
    if (
        isinstance(enum_values, list)
        and enum_values
        and all(isinstance(text, str) for text in enum_values)
    ):
        alternatives = " | ".join(map(json.dumps, enum_values))
        # the parser removes a line break before the value and one after it
        return f'"\\n"? ({alternatives}) "\\n"? "</parameter>"'
    if not allowed_types or "string" in allowed_types:
        return "up_to_end"
    return f'WS {_json_rule(schema)} WS "</parameter>"'


def _pythonic_rules(writer: _GrammarWriter) -> str:
    call_alternatives = writer.tool_alternatives(
        lambda name, number: f'{json.dumps(name)} "(" WS arguments_{number} WS ")"'
    )
    begin, end = writer.tag_symbol(Pythonic.START_TAG), writer.tag_symbol(Pythonic.END_TAG)
    rules = [
        f'start: WS ({begin} WS)? "[" WS call (WS "," WS call)* WS "]" ({end})? WS | FREE\n',
        f"call: {call_alternatives}\n",
        "FREE: /[ \\r\\n\\t]*([^ \\r\\n\\t\\[](.|\\n)*)?/\n",
        "NAME: /[^\"'=,()\\[\\]{}\\s!<>:]+/\n",
        f'any: NAME "=" ("True" | "False" | "None" | {_json_rule({}, PYTHON_OPTIONS)})\n',
    ]
    for number, name in enumerate(writer.tool_names):
        properties = writer.strict_properties(name)
        if properties is None:
            rules.append(f'arguments_{number}: (any (WS "," WS any)*)?\n')
        else:
            rules += _keyword_rules(f"arguments_{number}", properties)
    return "".join(rules)


def _keyword_rules(
    rule_name: str, properties: Sequence[tuple[str, dict[str, Any], bool]]
) -> list[str]:
    """Rules for keyword arguments, f(a=1, b=2), in the order of ``properties``, which are (name,
    schema, whether it is required). Each optional argument may be left out, and the arguments that
    are present are separated by commas.

    ``{rule_name}_first_i`` and ``{rule_name}_more_i`` both match argument i and the arguments after
    it. "first" is used if no argument precedes them, and "more", which begins with a comma, if one
    does."""
    count = len(properties)
    rules = [f"{rule_name}: {rule_name}_first_0\n"]
    rules += [f"{rule_name}_{variant}_{count}: {_EMPTY_TEXT}\n" for variant in ("first", "more")]
    for index, (key, schema, required) in enumerate(properties):
        value_rule = _json_rule(schema, PYTHON_OPTIONS)
        argument_rule = f"{json.dumps(key + '=')} {value_rule} {rule_name}_more_{index + 1}"
        for variant, comma in (("first", ""), ("more", 'WS "," WS ')):
            alternative = "" if required else f" | {rule_name}_{variant}_{index + 1}"
            rules.append(f"{rule_name}_{variant}_{index}: {comma}{argument_rule}{alternative}\n")
    return rules


#: the empty text, as an expression of the grammar
_EMPTY_TEXT = '""'
#: for each parser of a notation, the function that writes the rules of this notation
_RULE_WRITERS: dict[type[CallParser], Callable[[_GrammarWriter], str]] = {
    Hermes: _hermes_rules,
    Llama3Json: _llama3_json_rules,
    Mistral: _mistral_rules,
    DeepSeekV3: lambda writer: _deepseek_rules(
        writer, '"function" {separator} {name} WS "```json" WS {arguments} WS "```"'
    ),
    DeepSeekV31: lambda writer: _deepseek_rules(writer, "{name} {separator} WS {arguments}"),
    Qwen3Xml: _qwen3_xml_rules,
    Pythonic: _pythonic_rules,
}
