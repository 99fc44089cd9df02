"""Calls in the notation of Qwen 3 Coder, in which arguments are text between tags:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Bern
    </parameter>
    </function>
    </tool_call>

The value of an argument is text. It is converted to JSON if the schema of the tool's parameters
asks for a number, a boolean, a list or an object. Otherwise it stays a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from veneer.fileio.untrusted import parse
from veneer.serve.tools.deltas import CallParser

#: the number of references ("$ref" to another "$ref") in a row from which on a schema is ignored
MAX_REFERENCES = 8


class Qwen3Xml(CallParser):
    """A parser for Qwen 3 Coder and models with the same notation."""

    FUNCTION_END, PARAMETER, PARAMETER_END = "</function>", "<parameter=", "</parameter>"
    NAME: ClassVar[re.Pattern[str]] = re.compile(r"\s*([^<>\s]+)\s*>")
    call_tag, after_call_tag = "<function=", "function"
    markers = other_tags = ("<tool_call>", "</tool_call>")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tool_name = self._argument_name = ""
        self._value_pieces: list[str] = []
        self._argument_count = 0  # number of arguments of the current call

    def _step_function(self, *, at_end: bool) -> bool:
        name = self._read_name(at_end=at_end)
        if name == "":
            return False
        if name is None:
            self._emit_text(self.call_tag)
            self._state = "text"
            return True
        self._tool_name, self._argument_count, self._state = name, 0, "inside"
        self._emit_call(name)
        self._emit_arguments("{")
        return True

    def _step_inside(self, *, at_end: bool) -> bool:
        """Read up to the next parameter, or to the end of the call."""
        position, tag = self._find_tag((self.PARAMETER, self.FUNCTION_END), at_end=at_end)
        self._consume(position + len(tag))
        if tag == self.PARAMETER:
            self._state = "parameter"
        elif tag:
            self._emit_arguments("}")
            self._state = "text"
        return bool(tag)

    def _step_parameter(self, *, at_end: bool) -> bool:
        name = self._read_name(at_end=at_end)
        if name == "":
            return False
        self._argument_name, self._value_pieces = name or "", []
        self._state = "inside" if name is None else "value"
        return True

    def _step_value(self, *, at_end: bool) -> bool:
        tags = (self.PARAMETER_END, self.PARAMETER, self.FUNCTION_END)
        position, tag = self._find_tag(tags, at_end=at_end)
        self._value_pieces.append(self._consume(position))
        if not tag:
            return False
        if tag == self.PARAMETER_END:
            self._consume(len(tag))
        # a line break before the value and one after it belong to the notation
        text = "".join(self._value_pieces).removeprefix("\n").removesuffix("\n")
        tool_schema = self._parameters.get(self._tool_name, {})
        properties = tool_schema.get("properties", {})
        schema = properties.get(self._argument_name) if isinstance(properties, dict) else None
        value = json_value(text, schema, tool_schema)
        comma = ", " if self._argument_count else ""
        name_and_value = (
            json.dumps(content, ensure_ascii=False) for content in (self._argument_name, value)
        )
        self._emit_arguments(comma + ": ".join(name_and_value))
        self._argument_count, self._state = self._argument_count + 1, "inside"
        return True

    def _read_name(self, *, at_end: bool) -> str | None:
        """Read the name in an opening tag. Return "" if the tag may be incomplete, None if it
        has no name."""
        if ">" not in self._buffer and not at_end:
            return ""
        match = self.NAME.match(self._buffer)
        if match is None:
            return None
        self._consume(match.end())
        return match[1]


def json_value(text: str, schema: Any, root: Any = None) -> Any:
    """The text of an argument, converted to the JSON value that its schema asks for. It is returned
    unchanged if it is no JSON value, or if the schema allows a string or names no type. ``root``:
    the schema in which references are looked up."""
    types = json_types(schema, root)
    if not types or "string" in types:
        return None if "null" in types and text.strip() == "null" else text
    try:
        return parse(text.strip().lower() if types <= {"boolean", "null"} else text)
    except ValueError:
        return text


def json_types(schema: Any, root: Any = None, visited: set[int] | None = None) -> set[str]:
    """The JSON types that a schema names, itself or in its anyOf and oneOf. ``visited``: ids of the
    schemas that were examined before, since references may lead back to them."""
    schema, visited = follow_reference(schema, root), set() if visited is None else visited
    if not isinstance(schema, Mapping) or id(schema) in visited:
        return set()
    visited.add(id(schema))
    type_field = schema.get("type")
    types = {type_field} if isinstance(type_field, str) else set()
    if isinstance(type_field, list):
        types = {name for name in type_field if isinstance(name, str)}
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for choice in choices if isinstance(choices, list) else ():
            types |= json_types(choice, root, visited)
    return types


def follow_reference(schema: Any, root: Any) -> Any:
    """The schema itself, or the schema within ``root`` that its reference points to. None if the
    reference points to nothing, or there are ``MAX_REFERENCES`` or more references in a row."""
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for key in reference.removeprefix("#/").split("/"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return None
