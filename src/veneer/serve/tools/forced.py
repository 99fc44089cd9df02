"""Tool calls that a request forces (``tool_choice``): a JSON schema constrains the answer, so that
any model produces a valid call.

    a named tool   {"a": 1}                                     the arguments alone
    any tool       [{"name": "f", "parameters": {"a": 1}}, …]   one call or several

The notation is not that of the model's family; vLLM uses the same one here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.serve.tools.deltas import CallParser
from veneer.serve.tools.json_calls import JsonCall

#: most calls of one answer: without a bound, a small model goes on until its tokens are used up
MOST_CALLS = 16

Schema = Mapping[str, Any]


def arguments_schema(parameters: Schema | None) -> dict[str, Any]:
    """The schema of a tool's arguments. Unless it says otherwise, no parameters besides the named
    ones are allowed: a small model would invent some."""
    schema = dict(parameters or {"properties": {}})
    if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys():
        return schema
    schema.setdefault("type", "object")
    if "properties" in schema and "patternProperties" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def calls_schema(tools: Sequence[tuple[str, Schema | None]], most: int) -> dict[str, Any]:
    """The schema of a list of at most ``most`` calls of these (name, parameters) tools. References
    within the tools' schemas are rewritten to their place in this one."""
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
    """A schema with its internal references rewritten to lie below ``root``."""
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
