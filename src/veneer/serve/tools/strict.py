"""The grammar of answers that may call strict tools. Text is free, but a call that has begun must
follow the schema of its tool.

    hermes   text <tool_call> {"name": "f", "arguments": ⟨the schema of f⟩} </tool_call> text …

Calls have the notation of the model's family, in which the model was trained to write calls. A call
must name a tool of the request. The arguments of a tool that is not strict may be any object.
Keywords of a schema that llguidance does not know are ignored, since a client may use all of JSON
schema. In Qwen 3 Coder's notation, an argument that is a string is constrained only by its enum.

A tag that is a special token is written in the grammar as a token id. Another tag is text: the text
before it ends where the tag first occurs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from veneer.serve.grammars import LAYOUT
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

#: options of llguidance for a JSON schema within the grammar: "lenient" ignores unknown keywords,
#: and "coerce_one_of" treats oneOf as anyOf
JSON_OPTIONS = {**LAYOUT, "lenient": True, "coerce_one_of": True}
#: options for arguments that are parsed as Python: their strings may contain only the escapes that
#: mean the same in JSON and Python
PYTHON_OPTIONS = {**JSON_OPTIONS, "json_allowed_escapes": '"\\nrtbf'}
TERMINALS = r"""
TEXT: /(.|\n)*/
WS: /[ \r\n\t]{0,8}/
"""


def strict_grammar(
    parser_class: type[CallParser],
    parameters: Mapping[str, Schema],
    strict: Collection[str],
    markers: Mapping[int, str],
) -> Grammar:
    """The grammar of answers in the notation that ``parser_class`` parses. ``parameters``: by
    tool name, the schema of the tool's parameters, which is enforced for the tools in ``strict``.
    ``markers``: by token id, the tags that are special tokens."""
    writer = _GrammarWriter(parameters, strict, {text: id for id, text in markers.items()})
    rules = _NOTATIONS[parser_class](writer)
    return Grammar("lark", "%llguidance {}\n" + rules + TERMINALS)


class _GrammarWriter:
    """Writes rules of a grammar (in llguidance's Lark format) for the tools of a request."""

    def __init__(
        self,
        parameters: Mapping[str, Schema],
        strict: Collection[str],
        special_ids: Mapping[str, int],
    ) -> None:
        self.names, self._parameters = list(parameters), parameters
        self._strict, self._special_ids = strict, special_ids

    def tag(self, text: str) -> str:
        """A tag as an element of the grammar: a special token, or a literal."""
        return f"<[{self._special_ids[text]}]>" if text in self._special_ids else json.dumps(text)

    def between_texts(self, parser_class: type[CallParser], call: str) -> str:
        """Rules of an answer that is text, in which the rule ``call`` follows each tag that begins
        a call. Other tags that are special tokens may occur in the text."""
        tag = parser_class.call_tag
        free_tokens = " | ".join(
            self.tag(free_tag)
            for free_tag in parser_class.other_tags
            if free_tag in self._special_ids
        )
        text_prefix = f"(TEXT ({free_tokens}))* " if free_tokens else ""
        rules = f"start: (head call)* {text_prefix}TEXT\ncall: {call}\n"
        if tag in self._special_ids:
            return rules + f"head: {text_prefix}TEXT {self.tag(tag)}\n"
        tag_rule = f"text_and_tag[lazy]: TEXT {self.tag(tag)}\n"
        return rules + f"head: {text_prefix}text_and_tag\n" + tag_rule

    def tool_choice(self, write: Callable[[str, int], str]) -> str:
        """A choice among the tools. ``write`` gets a tool's name and number, and returns the tool's
        alternative."""
        return " | ".join(write(name, number) for number, name in enumerate(self.names))

    def argument_rules(self) -> str:
        """Rules ``arguments_0``, ``arguments_1``, …: the arguments of each tool, as an object."""
        return "".join(
            f"arguments_{number}: {_json_rule(self.schema(name) or {'type': 'object'})}\n"
            for number, name in enumerate(self.names)
        )

    def object_rules(self) -> str:
        """The rule ``object``, a call as an object with name and arguments, and the rules that it
        uses."""
        pairs = self.tool_choice(
            lambda name, number: (
                f'{json.dumps(json.dumps(name))} WS "," WS ARGUMENTS WS ":" WS arguments_{number}'
            )
        )
        keys = " | ".join(json.dumps(f'"{key}"') for key in ("arguments", "parameters"))
        opening = '"{" WS "\\"name\\"" WS ":" WS'
        return f'object: {opening} ({pairs}) WS "}}"\nARGUMENTS: {keys}\n{self.argument_rules()}'

    def schema(self, name: str) -> dict[str, Any] | None:
        """The schema of a tool's arguments; None if the tool is not strict."""
        return arguments_schema(self._parameters[name]) if name in self._strict else None

    def properties(self, name: str) -> list[tuple[str, dict[str, Any], bool]] | None:
        """(name, schema, whether it is required) of each of a tool's parameters; None if the
        parameters are not constrained."""
        schema = self.schema(name)
        properties = None if schema is None else schema.get("properties")
        if schema is None or not isinstance(properties, dict):
            return None
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required", ())
        return [
            (key, {**value, **definitions} if isinstance(value, dict) else {}, key in required)
            for key, value in properties.items()
        ]


def _json_rule(schema: Mapping[str, Any], options: Mapping[str, Any] = JSON_OPTIONS) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _hermes(writer: _GrammarWriter) -> str:
    call = f"WS object WS {writer.tag(Hermes.close_tags[0])}"
    return writer.between_texts(Hermes, call) + writer.object_rules()


def _llama3_json(writer: _GrammarWriter) -> str:
    python_tag = f"({writer.tag(Llama3Json.PYTHON)} WS)?"
    return (
        f'start: WS {python_tag} object (WS ";" WS object)* WS | FREE\n'
        "FREE: /[ \\r\\n\\t]*([^ \\r\\n\\t{](.|\\n)*)?/\n" + writer.object_rules()
    )


def _mistral(writer: _GrammarWriter) -> str:
    id_tag, arguments_tag = writer.tag("[CALL_ID]"), writer.tag("[ARGS]")
    named_calls = writer.tool_choice(
        lambda name, number: (
            f"{json.dumps(name)} WS ({id_tag} ID)? ({arguments_tag})? WS arguments_{number}"
        )
    )
    object_list = '"[" WS object (WS "," WS object)* WS "]"'
    rules = writer.between_texts(Mistral, f"WS {object_list} | WS ({named_calls})")
    return rules + writer.object_rules() + "ID: /[A-Za-z0-9]{9}/\n"


def _deepseek_v3(writer: _GrammarWriter) -> str:
    return _deepseek(writer, '"function" {separator} {name} WS "```json" WS {arguments} WS "```"')


def _deepseek_v31(writer: _GrammarWriter) -> str:
    return _deepseek(writer, "{name} {separator} WS {arguments}")


def _deepseek(writer: _GrammarWriter, call_template: str) -> str:
    separator = writer.tag(DeepSeek.SEPARATOR)
    calls = writer.tool_choice(
        lambda name, number: call_template.format(
            name=json.dumps(name), separator=separator, arguments=f"arguments_{number}"
        )
    )
    call = f"WS ({calls}) WS {writer.tag(DeepSeek.CALL_END)}"
    return writer.between_texts(DeepSeek, call) + writer.argument_rules()


def _qwen3_xml(writer: _GrammarWriter) -> str:
    call = writer.tool_choice(
        lambda name, number: f'{json.dumps(name + ">")} WS parameters_{number} "</function>"'
    )
    rules = [writer.between_texts(Qwen3Xml, call)]
    for number, name in enumerate(writer.names):
        properties = writer.properties(name)
        if properties is None:
            rules.append(f'parameters_{number}: ("<parameter=" NAME ">" up_to_end WS)*\n')
            continue
        values = [
            f"({json.dumps(f'<parameter={key}>')} {_xml_value_rule(schema)} WS)"
            + ("" if required else "?")
            for key, schema, required in properties
        ]
        rules.append(f"parameters_{number}: {' '.join(values) or _EMPTY}\n")
    rules.append('NAME: /[^<>\\s]+/\nup_to_end[lazy]: /(.|\\n)*/ "</parameter>"\n')
    return "".join(rules)


def _xml_value_rule(schema: Mapping[str, Any]) -> str:
    """The expression for the value of an argument and the closing tag after it."""
    target = follow_reference(schema, schema)
    choices = target.get("enum") if isinstance(target, Mapping) else None
    types = json_types(schema, schema)
    if isinstance(choices, list) and choices and all(isinstance(text, str) for text in choices):
        texts = " | ".join(map(json.dumps, choices))
        return f'"\\n"? ({texts}) "\\n"? "</parameter>"'  # the line breaks that the parser removes
    if not types or "string" in types:
        return "up_to_end"
    return f'WS {_json_rule(schema)} WS "</parameter>"'


def _pythonic(writer: _GrammarWriter) -> str:
    calls = writer.tool_choice(
        lambda name, number: f'{json.dumps(name)} "(" WS arguments_{number} WS ")"'
    )
    start, end = writer.tag(Pythonic.START), writer.tag(Pythonic.END)
    rules = [
        f'start: WS ({start} WS)? "[" WS call (WS "," WS call)* WS "]" ({end})? WS | FREE\n',
        f"call: {calls}\n",
        "FREE: /[ \\r\\n\\t]*([^ \\r\\n\\t\\[](.|\\n)*)?/\n",
        "NAME: /[A-Za-z_][A-Za-z0-9_]*/\n",
        f'any: NAME "=" ("True" | "False" | "None" | {_json_rule({}, PYTHON_OPTIONS)})\n',
    ]
    for number, name in enumerate(writer.names):
        properties = writer.properties(name)
        if properties is None:
            rules.append(f'arguments_{number}: (any (WS "," WS any)*)?\n')
        else:
            rules += _keyword_rules(f"arguments_{number}", properties)
    return "".join(rules)


def _keyword_rules(rule: str, properties: Sequence[tuple[str, dict[str, Any], bool]]) -> list[str]:
    """Rules of keyword arguments in the order of ``properties``, with commas between the arguments
    that are present. Both ``{rule}_first_i`` and ``{rule}_more_i`` stand for argument i and the
    arguments after it. ``first`` is used if no argument precedes them, and ``more``, which begins
    with a comma, if one does."""
    count = len(properties)
    rules = [f"{rule}: {rule}_first_0\n"]
    rules += [f"{rule}_{state}_{count}: {_EMPTY}\n" for state in ("first", "more")]
    for index, (key, schema, required) in enumerate(properties):
        value = _json_rule(schema, PYTHON_OPTIONS)
        argument = f"{json.dumps(key + '=')} {value} {rule}_more_{index + 1}"
        for state, comma in (("first", ""), ("more", 'WS "," WS ')):
            alternative = "" if required else f" | {rule}_{state}_{index + 1}"
            rules.append(f"{rule}_{state}_{index}: {comma}{argument}{alternative}\n")
    return rules


_EMPTY = '""'
_NOTATIONS: dict[type[CallParser], Callable[[_GrammarWriter], str]] = {
    Hermes: _hermes,
    Llama3Json: _llama3_json,
    Mistral: _mistral,
    DeepSeekV3: _deepseek_v3,
    DeepSeekV31: _deepseek_v31,
    Qwen3Xml: _qwen3_xml,
    Pythonic: _pythonic,
}
