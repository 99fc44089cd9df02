"""Tool calls that a request demands by ``tool_choice``. A JSON schema constrains the answer, so
that any model produces a valid call.

    a named tool   {"a": 1}                                     only the arguments
    any tool       [{"name": "f", "parameters": {"a": 1}}, …]   one or more calls

This notation, which is the same as vLLM's, differs from the notation of the model's family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.serve.tools.deltas import CallParser
from veneer.serve.tools.json_calls import JsonCall, JsonCallParser

#: the largest number of calls in one answer. Without a limit, a small model may write calls until
#: the answer has its largest length.
MAX_CALLS = 16

Schema = Mapping[str, Any]


def arguments_schema(parameters: Schema | None) -> dict[str, Any]:
    """The schema of a tool's arguments. Unless ``parameters`` says otherwise, only its properties
    are allowed, because a small model would invent others."""
    schema = dict(parameters or {"properties": {}})
    if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys():
        return schema
    schema.setdefault("type", "object")
    if "properties" in schema and "patternProperties" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def calls_schema(tools: Sequence[tuple[str, Schema | None]], max_calls: int) -> dict[str, Any]:
    """The schema of a list of at most ``max_calls`` calls. ``tools``: for each tool, its name and
    the schema of its parameters. References in these schemas are rewritten, because the schemas
    become parts of the schema of the list."""
    definitions = {
        f"tool_{number}": _rebase_references(arguments_schema(parameters), f"#/$defs/tool_{number}")
        for number, (_, parameters) in enumerate(tools)
    }
    choices = [
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
    calls = {"type": "array", "minItems": 1, "maxItems": max_calls, "items": {"anyOf": choices}}
    return {"$defs": definitions, **calls}


def _rebase_references(schema: Any, root: str) -> Any:
    """A copy of a schema, or of a part of one, in which each reference "#…" is changed to
    ``root`` + "…"."""
    if isinstance(schema, list):
        return [_rebase_references(child, root) for child in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + child.removeprefix("#")
        if key == "$ref" and isinstance(child, str) and child.startswith("#")
        else _rebase_references(child, root)
        for key, child in schema.items()
    }


class NamedCall(CallParser):
    """A parser of an answer that consists of the arguments of one tool."""

    def __init__(self, name: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._name = name

    def _step(self, *, at_end: bool) -> bool:
        if not self.call_count and (self._buffer or at_end):
            self._emit_call(self._name)
        if self._buffer:
            self._emit_arguments(self._consume(len(self._buffer)))
        return False


class ListedCalls(JsonCallParser):
    """A parser of an answer that is a list of calls."""

    def _step(self, *, at_end: bool) -> bool:
        if self._call is None:
            self._buffer = self._buffer.lstrip("[, \n\r\t")
            if self._buffer.startswith("{"):
                self._call = JsonCall(self._emit_call, self._emit_arguments)
                return True
            self._consume(len(self._buffer))  # the end of the list
            return False
        self._consume(self._call.read(self._buffer))
        if not (self._call.is_complete or self._call.has_failed):
            return False
        self._call = None
        return True
