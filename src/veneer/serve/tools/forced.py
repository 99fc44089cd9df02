"""Calls that a request demands: the answer follows a schema, so that any model calls as it must.

    a named tool   {"a": 1}                                     the arguments alone
    any tool       [{"name": "f", "parameters": {"a": 1}}, …]   one call or several

Neither is the notation of the model's family. It is what vLLM has models write here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.serve.tools.deltas import CallParser
from veneer.serve.tools.json_calls import JsonCall

#: calls of one answer: without a bound, a small model goes on until its tokens are spent
MOST_CALLS = 16

Schema = Mapping[str, Any]


def arguments_schema(parameters: Schema | None) -> dict[str, Any]:
    """The schema of a tool's arguments. A tool takes the parameters that it names, unless it says
    otherwise: a small model would invent others."""
    schema = dict(parameters or {"properties": {}})
    if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys():
        return schema
    schema.setdefault("type", "object")
    if "properties" in schema and "patternProperties" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def calls_schema(tools: Sequence[tuple[str, Schema | None]], most: int) -> dict[str, Any]:
    """The schema of a list of at most ``most`` calls of these tools, (name, parameters) each. The
    tools' own references are rewritten, since they lie deeper here."""
    definitions = {
        f"tool_{number}": _rebase(arguments_schema(parameters), f"#/$defs/tool_{number}")
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
    calls = {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": choices}}
    return {"$defs": definitions, **calls}


def _rebase(value: Any, root: str) -> Any:
    """A schema whose references to itself hold below ``root``."""
    if isinstance(value, list):
        return [_rebase(child, root) for child in value]
    if not isinstance(value, dict):
        return value
    return {
        key: root + child.removeprefix("#")
        if key == "$ref" and isinstance(child, str) and child.startswith("#")
        else _rebase(child, root)
        for key, child in value.items()
    }


class NamedCall(CallParser):
    """An answer that is the arguments of one tool."""

    def __init__(self, name: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._name = name

    def _step(self, *, final: bool) -> bool:
        if not self.calls and (self._buffer or final):
            self._begin(self._name)
        if self._buffer:
            self._add(self._drop(len(self._buffer)))
        return False


class ListedCalls(CallParser):
    """An answer that is a list of calls."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._call: JsonCall | None = None

    def _step(self, *, final: bool) -> bool:
        if self._call is None:
            self._buffer = self._buffer.lstrip("[, \n\r\t")
            if self._buffer.startswith("{"):
                self._call = JsonCall(self._begin, self._add)
                return True
            self._drop(len(self._buffer))  # the list's end
            return False
        self._drop(self._call.read(self._buffer))
        if not (self._call.done or self._call.failed):
            return False
        self._call = None
        return True
