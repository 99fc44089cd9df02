"""Answers that may call tools of which some are strict: a grammar in which text is free, and a call
that has begun keeps to its tool's schema.

    hermes   text <tool_call> {"name": "f", "arguments": ⟨the schema of f⟩} </tool_call> text …

The notation is the family's own, so a model goes on as it was trained to. A call names a tool of
the request; the arguments of a tool that is not strict are any object. Keywords of a schema that
llguidance does not know are left out, as a client may send all of JSON schema here. In Qwen 3
Coder's notation a text is bound by its enum alone.

Tags that are special tokens stand in a grammar by their ids; others are text, which ends where the
first of them is complete.
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

OPTIONS = {**LAYOUT, "lenient": True, "coerce_one_of": True}
#: escapes that JSON and Python read alike
PYTHON_OPTIONS = {**OPTIONS, "json_allowed_escapes": '"\\nrtbf'}
TERMINALS = r"""
TEXT: /(.|\n)*/
WS: /[ \r\n\t]{0,8}/
"""


def strict_grammar(
    family: type[CallParser],
    parameters: Mapping[str, Schema],
    strict: Collection[str],
    markers: Mapping[int, str],
) -> Grammar:
    """The grammar of answers in the notation of a parser's ``family``. ``parameters``: schemas of
    the tools' parameters by name, of which those of the tools in ``strict`` are held; ``markers``:
    the tags that are special tokens, by id."""
    writer = _Writer(parameters, strict, {text: id for id, text in markers.items()})
    rules = _NOTATIONS[family](writer)
    return Grammar("lark", "%llguidance {}\n" + rules + TERMINALS)


class _Writer:
    """Parts of a grammar for some tools."""

    def __init__(
        self, parameters: Mapping[str, Schema], strict: Collection[str], special: Mapping[str, int]
    ) -> None:
        self.names, self._parameters = list(parameters), parameters
        self._strict, self._special = strict, special

    def tag(self, text: str) -> str:
        return f"<[{self._special[text]}]>" if text in self._special else json.dumps(text)

    def between_texts(self, tag: str, call: str, free_tags: Sequence[str] = ()) -> str:
        """Rules of an answer in which ``call`` follows each ``tag``. Special tokens of
        ``free_tags`` may stand in the text."""
        marks = " | ".join(self.tag(mark) for mark in free_tags if mark in self._special)
        before = f"(TEXT ({marks}))* " if marks else ""
        rules = f"start: (head call)* {before}TEXT\ncall: {call}\n"
        if tag in self._special:
            return rules + f"head: {before}TEXT {self.tag(tag)}\n"
        return rules + f"head: {before}text_and_tag\ntext_and_tag[lazy]: TEXT {self.tag(tag)}\n"

    def each_tool(self, write: Callable[[str, int], str]) -> str:
        """A choice among the tools; ``write`` takes a tool's name and number."""
        return " | ".join(write(name, number) for number, name in enumerate(self.names))

    def arguments(self) -> str:
        """Rules for the arguments of each tool, as an object."""
        return "".join(
            f"arguments_{number}: {_json(self.schema(name) or {'type': 'object'})}\n"
            for number, name in enumerate(self.names)
        )

    def object_rule(self) -> str:
        """Rules of ``object``, a call as an object."""
        pairs = self.each_tool(
            lambda name, number: (
                f'{json.dumps(json.dumps(name))} WS "," WS ARGUMENTS WS ":" WS arguments_{number}'
            )
        )
        keys = " | ".join(json.dumps(f'"{key}"') for key in ("arguments", "parameters"))
        opening = '"{" WS "\\"name\\"" WS ":" WS'
        return f'object: {opening} ({pairs}) WS "}}"\nARGUMENTS: {keys}\n{self.arguments()}'

    def schema(self, name: str) -> dict[str, Any] | None:
        """The schema of a tool's arguments; None where it is not held."""
        return arguments_schema(self._parameters[name]) if name in self._strict else None

    def properties(self, name: str) -> list[tuple[str, dict[str, Any], bool]] | None:
        """(name, schema, whether it is required) of each of a tool's parameters; None where they
        are not held."""
        schema = self.schema(name)
        properties = None if schema is None else schema.get("properties")
        if schema is None or not isinstance(properties, dict):
            return None
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required", ())
        return [
            (key, {**value, **shared} if isinstance(value, dict) else {}, key in required)
            for key, value in properties.items()
        ]


def _json(schema: Mapping[str, Any], options: Mapping[str, Any] = OPTIONS) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _hermes(writer: _Writer) -> str:
    call = f"WS object WS {writer.tag(Hermes.CLOSE)}"
    return writer.between_texts(Hermes.OPEN, call) + writer.object_rule()


def _llama3_json(writer: _Writer) -> str:
    python = f"({writer.tag(Llama3Json.PYTHON)} WS)?"
    return (
        f'start: WS {python} object (WS ";" WS object)* WS | FREE\n'
        "FREE: /[ \\r\\n\\t]*([^ \\r\\n\\t{](.|\\n)*)?/\n" + writer.object_rule()
    )


def _mistral(writer: _Writer) -> str:
    call_id, arguments = writer.tag("[CALL_ID]"), writer.tag("[ARGS]")
    named = writer.each_tool(
        lambda name, number: (
            f"{json.dumps(name)} WS ({call_id} ID)? ({arguments})? WS arguments_{number}"
        )
    )
    listed = '"[" WS object (WS "," WS object)* WS "]"'
    rules = writer.between_texts(Mistral.OPEN, f"WS {listed} | WS ({named})")
    return rules + writer.object_rule() + "ID: /[A-Za-z0-9]{9}/\n"


def _deepseek_v3(writer: _Writer) -> str:
    separator = writer.tag(DeepSeek.SEPARATOR)
    return _deepseek(
        writer,
        lambda name, number: (
            f'"function" {separator} {json.dumps(name)} WS "```json" WS arguments_{number} WS "```"'
        ),
    )


def _deepseek_v31(writer: _Writer) -> str:
    separator = writer.tag(DeepSeek.SEPARATOR)
    return _deepseek(
        writer,
        lambda name, number: f"{json.dumps(name)} {separator} WS arguments_{number}",
    )


def _deepseek(writer: _Writer, write: Callable[[str, int], str]) -> str:
    call = f"WS ({writer.each_tool(write)}) WS {writer.tag(DeepSeek.CALL_END)}"
    free_tags = (DeepSeek.BEGIN, DeepSeek.END)
    return writer.between_texts(DeepSeek.CALL, call, free_tags) + writer.arguments()


def _qwen3_xml(writer: _Writer) -> str:
    call = writer.each_tool(
        lambda name, number: f'{json.dumps(name + ">")} WS parameters_{number} "</function>"'
    )
    free_tags = (Qwen3Xml.OPEN, Qwen3Xml.CLOSE)
    rules = [writer.between_texts(Qwen3Xml.FUNCTION, call, free_tags)]
    for number, name in enumerate(writer.names):
        properties = writer.properties(name)
        if properties is None:
            rules.append(f'parameters_{number}: ("<parameter=" NAME ">" up_to_end WS)*\n')
            continue
        values = [
            f"({json.dumps(f'<parameter={key}>')} {_xml_value(schema)} WS){'' if required else '?'}"
            for key, schema, required in properties
        ]
        rules.append(f"parameters_{number}: {' '.join(values) or _EMPTY}\n")
    rules.append('NAME: /[^<>\\s]+/\nup_to_end[lazy]: /(.|\\n)*/ "</parameter>"\n')
    return "".join(rules)


def _xml_value(schema: Mapping[str, Any]) -> str:
    """A parameter's text and the tag behind it."""
    target = follow_reference(schema, schema)
    choices = target.get("enum") if isinstance(target, Mapping) else None
    types = json_types(schema, schema)
    if isinstance(choices, list) and choices and all(isinstance(text, str) for text in choices):
        texts = " | ".join(map(json.dumps, choices))
        return f'"\\n"? ({texts}) "\\n"? "</parameter>"'  # as much as the parser takes away
    if not types or "string" in types:
        return "up_to_end"
    return f'WS {_json(schema)} WS "</parameter>"'


def _pythonic(writer: _Writer) -> str:
    calls = writer.each_tool(
        lambda name, number: f'{json.dumps(name)} "(" WS arguments_{number} WS ")"'
    )
    start, end = writer.tag(Pythonic.START), writer.tag(Pythonic.END)
    rules = [
        f'start: WS ({start} WS)? "[" WS call (WS "," WS call)* WS "]" ({end})? WS | FREE\n',
        f"call: {calls}\n",
        "FREE: /[ \\r\\n\\t]*([^ \\r\\n\\t\\[](.|\\n)*)?/\n",
        "NAME: /[A-Za-z_][A-Za-z0-9_]*/\n",
        f'any: NAME "=" ("True" | "False" | "None" | {_json({}, PYTHON_OPTIONS)})\n',
    ]
    for number, name in enumerate(writer.names):
        properties = writer.properties(name)
        if properties is None:
            rules.append(f'arguments_{number}: (any (WS "," WS any)*)?\n')
        else:
            rules += _keyword_rules(f"arguments_{number}", properties)
    return "".join(rules)


def _keyword_rules(rule: str, properties: Sequence[tuple[str, dict[str, Any], bool]]) -> list[str]:
    """Rules of keyword arguments in their order, with commas between those that are there:
    ``first``, where none is there yet, and ``more``, from each of them on."""
    count = len(properties)
    rules = [f"{rule}: {rule}_first_0\n"]
    rules += [f"{rule}_{state}_{count}: {_EMPTY}\n" for state in ("first", "more")]
    for index, (key, schema, required) in enumerate(properties):
        pair = f"{json.dumps(key + '=')} {_json(schema, PYTHON_OPTIONS)} {rule}_more_{index + 1}"
        for state, comma in (("first", ""), ("more", 'WS "," WS ')):
            absent = "" if required else f" | {rule}_{state}_{index + 1}"
            rules.append(f"{rule}_{state}_{index}: {comma}{pair}{absent}\n")
    return rules


_EMPTY = '""'
_NOTATIONS: dict[type[CallParser], Callable[[_Writer], str]] = {
    Hermes: _hermes,
    Llama3Json: _llama3_json,
    Mistral: _mistral,
    DeepSeekV3: _deepseek_v3,
    DeepSeekV31: _deepseek_v31,
    Qwen3Xml: _qwen3_xml,
    Pythonic: _pythonic,
}
