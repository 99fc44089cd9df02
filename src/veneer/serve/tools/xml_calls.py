"""Calls in the form of Qwen 3 Coder, whose arguments are text between tags:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Bern
    </parameter>
    </function>
    </tool_call>

A value is text. The schema of the tool's parameters says what it is to be in JSON; an argument that
its schema does not make a number, a boolean, a list or an object stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from veneer.fileio.untrusted import parse
from veneer.serve.tools.deltas import CallParser

#: references that are followed from one to the next
REFERENCES = 8


class Qwen3Xml(CallParser):
    """Qwen 3 Coder, and others that took its form."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    FUNCTION, FUNCTION_END = "<function=", "</function>"
    PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
    NAME: ClassVar[re.Pattern[str]] = re.compile(r"\s*([^<>\s]+)\s*>")
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state, self._name, self._argument = "text", "", ""
        self._value: list[str] = []
        self._count = 0  # arguments of the call at hand

    def _step(self, *, final: bool) -> bool:
        return getattr(self, f"_step_{self._state}")(final=final)

    def _step_text(self, *, final: bool) -> bool:
        position, tag = self._find((self.OPEN, self.CLOSE, self.FUNCTION), final=final)
        self._say(self._drop(position))
        self._drop(len(tag))
        if tag == self.FUNCTION:
            self._state = "function"
        return bool(tag)

    def _step_function(self, *, final: bool) -> bool:
        name = self._read_name(final=final)
        if name == "":
            return False
        if name is None:
            self._say(self.FUNCTION)
            self._state = "text"
            return True
        self._name, self._count, self._state = name, 0, "inside"
        self._begin(name)
        self._add("{")
        return True

    def _step_inside(self, *, final: bool) -> bool:
        """Between two parameters."""
        position, tag = self._find((self.PARAMETER, self.FUNCTION_END), final=final)
        self._drop(position + len(tag))
        if tag == self.PARAMETER:
            self._state = "parameter"
        elif tag:
            self._add("}")
            self._state = "text"
        return bool(tag)

    def _step_parameter(self, *, final: bool) -> bool:
        name = self._read_name(final=final)
        if name == "":
            return False
        self._argument, self._value = name or "", []
        self._state = "inside" if name is None else "value"
        return True

    def _step_value(self, *, final: bool) -> bool:
        tags = (self.PARAMETER_END, self.PARAMETER, self.FUNCTION_END)
        position, tag = self._find(tags, final=final)
        self._value.append(self._drop(position))
        if not tag:
            return False
        if tag == self.PARAMETER_END:
            self._drop(len(tag))
        # one line break on either side belongs to the notation
        text = "".join(self._value).removeprefix("\n").removesuffix("\n")
        root = self._parameters.get(self._name, {})
        schema = root.get("properties", {})
        schema = schema.get(self._argument) if isinstance(schema, dict) else None
        value = json_value(text, schema, root)
        comma = ", " if self._count else ""
        pair = (json.dumps(side, ensure_ascii=False) for side in (self._argument, value))
        self._add(comma + ": ".join(pair))
        self._count, self._state = self._count + 1, "inside"
        return True

    def _read_name(self, *, final: bool) -> str | None:
        """The name in an opening tag; "" while it may be incomplete, None for none."""
        if ">" not in self._buffer and not final:
            return ""
        match = self.NAME.match(self._buffer)
        if match is None:
            return None
        self._drop(match.end())
        return match[1]


def json_value(text: str, schema: Any, root: Any = None) -> Any:
    """A parameter's text as the JSON value that its schema asks for; as text where it is none.
    ``root``: the schema to which references are relative."""
    types = json_types(schema, root)
    if not types or "string" in types:
        return None if "null" in types and text.strip() == "null" else text
    try:
        value = parse(text.strip().lower() if types <= {"boolean", "null"} else text)
    except ValueError:
        return text
    return value


def json_types(schema: Any, root: Any = None, visited: set[int] | None = None) -> set[str]:
    """The JSON types that a schema allows, where it says so plainly. ``visited``: schemas that were
    looked at, since references may lead back to them."""
    schema, visited = follow_reference(schema, root), set() if visited is None else visited
    if not isinstance(schema, Mapping) or id(schema) in visited:
        return set()
    visited.add(id(schema))
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set()
    if isinstance(named, list):
        types = {name for name in named if isinstance(name, str)}
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for choice in choices if isinstance(choices, list) else ():
            types |= json_types(choice, root, visited)
    return types


def follow_reference(schema: Any, root: Any) -> Any:
    """The schema that a reference within ``root`` names, or that of a few references in a row."""
    for _ in range(REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for step in reference.removeprefix("#/").split("/"):
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return None
