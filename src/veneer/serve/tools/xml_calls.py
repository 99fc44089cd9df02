"""Calls in the notation of Qwen 3 Coder, in which arguments are text between tags:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Bern
    </parameter>
    </function>
    </tool_call>

The value of an argument is converted to JSON if the schema of the tool's parameters asks for a
number, a boolean, a list or an object. Otherwise it stays a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from veneer.fileio.untrusted import parse
from veneer.serve.tools.deltas import CallParser

#: a schema that is reached through this many references in a row ("$ref" to another "$ref") is
#: ignored, because the references may form a loop
MAX_REFERENCES = 8


class Qwen3Xml(CallParser):
    """A parser for Qwen 3 Coder and other models with the same notation of calls."""

    FUNCTION_END, PARAMETER_START, PARAMETER_END = "</function>", "<parameter=", "</parameter>"
    NAME_PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"\s*([^<>\s]+)\s*>")
    #: unlike the name of a tool, that of a parameter may contain spaces
    PARAMETER_NAME_PATTERN: ClassVar[re.Pattern[str]] = re.compile(
        r"\s*([^<>\s](?:[^<>\n]*[^<>\s])?)\s*>"
    )
    call_tag, state_after_call_tag = "<function=", "function"
    markers = other_tags = ("<tool_call>", "</tool_call>")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tool_name = self._argument_name = ""
        self._value_pieces: list[str] = []
        self._argument_count = 0  # number of arguments of the current call so far

    def _step_function(self, *, at_end: bool) -> bool:
        """After the tag "<function=": read the tool's name and begin a call. Without a valid name,
        the tag is text."""
        name = self._read_name(self.NAME_PATTERN, at_end=at_end)
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
        """Between the parameters of a call: skip the text up to the next parameter, or end the
        call."""
        position, tag = self._find_tag((self.PARAMETER_START, self.FUNCTION_END), at_end=at_end)
        self._consume(position + len(tag))
        if tag == self.PARAMETER_START:
            self._state = "parameter"
        elif tag:
            self._emit_arguments("}")
            self._state = "text"
        return bool(tag)

    def _step_parameter(self, *, at_end: bool) -> bool:
        """After the tag "<parameter=": read the name of the argument. Without a valid name, skip
        the parameter."""
        name = self._read_name(self.PARAMETER_NAME_PATTERN, at_end=at_end)
        if name == "":
            return False
        self._argument_name, self._value_pieces = name or "", []
        self._state = "inside" if name is None else "value"
        return True

    def _step_value(self, *, at_end: bool) -> bool:
        """Read the value of an argument up to a tag that ends it, and emit the argument."""
        tags = (self.PARAMETER_END, self.PARAMETER_START, self.FUNCTION_END)
        position, tag = self._find_tag(tags, at_end=at_end)
        self._value_pieces.append(self._consume(position))
        if not tag:
            return False
        if tag == self.PARAMETER_END:
            self._consume(len(tag))
        # a line break before the value and one after it belong to the notation
        text = "".join(self._value_pieces).removeprefix("\n").removesuffix("\n")
        tool_schema = self._parameter_schemas.get(self._tool_name, {})
        properties = tool_schema.get("properties", {})
        schema = properties.get(self._argument_name) if isinstance(properties, dict) else None
        value = json_value(text, schema, tool_schema)
        comma = ", " if self._argument_count else ""
        name_and_value = (
            json.dumps(item, ensure_ascii=False) for item in (self._argument_name, value)
        )
        self._emit_arguments(comma + ": ".join(name_and_value))
        self._argument_count, self._state = self._argument_count + 1, "inside"
        return True

    def _read_name(self, pattern: re.Pattern[str], *, at_end: bool) -> str | None:
        """Read the name of a tool or argument, and the ">" after it. Return "" if the ">" may not
        have arrived yet, and None if there is no valid name. ``pattern``: matches both, with a
        group for the name."""
        if ">" not in self._buffer and not at_end:
            return ""
        match = pattern.match(self._buffer)
        if match is None:
            return None
        self._consume(match.end())
        return match[1]


def json_value(text: str, schema: Any, root_schema: Any = None) -> Any:
    """The value of an argument as JSON data: ``text`` converted to a type that ``schema`` allows.
    It stays a string if it is not valid JSON, or if the schema names no type or allows a string
    (but "null" becomes None if the schema allows null too).
    ``root_schema``: the complete schema of the tool's parameters, in which references are looked
    up."""
    allowed_types = json_types(schema, root_schema)
    if not allowed_types or "string" in allowed_types:
        return None if "null" in allowed_types and text.strip() == "null" else text
    try:
        return parse(text.strip().lower() if allowed_types <= {"boolean", "null"} else text)
    except ValueError:
        return text


def json_types(
    schema: Any, root_schema: Any = None, visited_ids: set[int] | None = None
) -> set[str]:
    """The JSON types, such as "integer", that ``schema`` names in its field "type" or in the
    schemas of its anyOf and oneOf. ``root_schema``: the complete schema, in which references are
    looked up. ``visited_ids``: the ``id()`` of each schema that was examined before, so that
    references which lead back to it cause no endless recursion."""
    schema, visited_ids = (
        follow_reference(schema, root_schema),
        set() if visited_ids is None else visited_ids,
    )
    if not isinstance(schema, Mapping) or id(schema) in visited_ids:
        return set()
    visited_ids.add(id(schema))
    type_field = schema.get("type")
    allowed_types = {type_field} if isinstance(type_field, str) else set()
    if isinstance(type_field, list):
        allowed_types = {name for name in type_field if isinstance(name, str)}
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for choice in choices if isinstance(choices, list) else ():
            allowed_types |= json_types(choice, root_schema, visited_ids)
    return allowed_types


def follow_reference(schema: Any, root_schema: Any) -> Any:
    """``schema`` itself if it is not a reference ("$ref"); otherwise the schema within
    ``root_schema`` that the reference points to. None if the reference points to nothing, or if
    ``MAX_REFERENCES`` references in a row were followed."""
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root_schema
        for key in reference.removeprefix("#/").split("/"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return None
