"""Tool calls that a request demands by ``tool_choice``. A JSON schema constrains the answer, so
that any model produces a valid call, even one that was not trained to call tools.

    demanded       the answer
    a named tool   {"a": 1}                                     only the arguments of the call
    any tool       [{"name": "f", "parameters": {"a": 1}}, …]   one or more calls

This notation is also vLLM's. It differs from the notation in which the model was trained to write
calls, so these answers have parsers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.serve.tools.deltas import CallParser
from veneer.serve.tools.json_calls import CallObjectReader, JsonCallParser

#: the largest number of calls in one answer. Without this limit, a small model may write calls
#: until the answer reaches its maximum number of tokens.
MAX_CALLS = 16

Schema = Mapping[str, Any]


def arguments_schema(parameters_schema: Schema | None) -> dict[str, Any]:
    """The schema of a tool's arguments: ``parameters_schema``, the client's schema (None: the tool
    has no parameters), with ``additionalProperties`` false if it lists its properties and does not
    set this field. Otherwise a small model would invent arguments."""
    schema = dict(parameters_schema or {"properties": {}})
    if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys():
        return schema
    schema.setdefault("type", "object")
    if "properties" in schema and "patternProperties" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def calls_schema(tools: Sequence[tuple[str, Schema | None]], max_calls: int) -> dict[str, Any]:
    """The schema of a list of one to ``max_calls`` calls. ``tools``: for each tool, its name and
    the schema of its parameters. The tools' schemas become entries of "$defs" in the list's schema,
    so their references, such as "#/$defs/x", are rewritten."""
    definitions = {
        f"tool_{number}": _rebase_references(
            arguments_schema(parameters_schema), f"#/$defs/tool_{number}"
        )
        for number, (_, parameters_schema) in enumerate(tools)
    }
    call_schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "parameters": {"$ref": f"#/$defs/tool_{number}"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, (name, _) in enumerate(tools)
    ]
    list_schema = {
        "type": "array",
        "minItems": 1,
        "maxItems": max_calls,
        "items": {"anyOf": call_schemas},
    }
    return {"$defs": definitions, **list_schema}


def _rebase_references(schema: Any, reference_prefix: str) -> Any:
    """A copy of a schema, or of a part of one, in which the "#" at the beginning of each reference
    ("$ref") is replaced by ``reference_prefix``, the new position of the schema."""
    if isinstance(schema, list):
        return [_rebase_references(child, reference_prefix) for child in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: reference_prefix + child.removeprefix("#")
        if key == "$ref" and isinstance(child, str) and child.startswith("#")
        else _rebase_references(child, reference_prefix)
        for key, child in schema.items()
    }


class NamedCall(CallParser):
    """A parser of an answer that consists of the JSON arguments of one call, of the tool
    ``tool_name``."""

    def __init__(self, tool_name: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tool_name = tool_name

    def _step(self, *, at_end: bool) -> bool:
        if not self.call_count and (self._buffer or at_end):
            self._emit_call(self._tool_name)
        if self._buffer:
            self._emit_arguments(self._consume(len(self._buffer)))
        return False


class ListedCalls(JsonCallParser):
    """A parser of an answer that is a JSON list of calls, [{"name": …, "parameters": …}, …]."""

    def _step(self, *, at_end: bool) -> bool:
        if self._object_reader is None:
            self._buffer = self._buffer.lstrip("[, \n\r\t")
            if self._buffer.startswith("{"):
                self._object_reader = CallObjectReader(self._emit_call, self._emit_arguments)
                return True
            self._consume(len(self._buffer))  # the bracket that ends the list
            return False
        self._consume(self._object_reader.read(self._buffer))
        if not (self._object_reader.is_complete or self._object_reader.has_failed):
            return False
        self._object_reader = None
        return True
