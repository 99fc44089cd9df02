"""Calls in Python's form: ``[get_weather(city="Bern", days=3), get_time()]`` (Llama 3.2 and 4,
ToolACE).

The answer is such a list or a text. A call is passed on when its closing bracket is there; it is
parsed as Python and never run. An argument that is no literal makes the call a text.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, ClassVar

from veneer.serve.tools.deltas import CallParser

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_OPENING = re.compile(rf"\[\s*{_NAME.pattern}\(")
#: what may still become an opening: a bracket, and the beginning of a name
_PARTIAL = re.compile(rf"(\[\s*({_NAME.pattern})?)?")
_JSON_NAMES = {"true": True, "false": False, "null": None}


class Pythonic(CallParser):
    """A list of calls, or text."""

    START, END = "<|python_start|>", "<|python_end|>"
    markers: ClassVar[tuple[str, ...]] = (START, END)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state = "start"
        self._position, self._depth, self._quote = 0, 0, ""

    def _step(self, *, final: bool) -> bool:
        return getattr(self, f"_step_{self._state}")(final=final)

    def _step_start(self, *, final: bool) -> bool:
        text = self._buffer.lstrip().removeprefix(self.START).lstrip()
        if _OPENING.match(text):
            self._drop(len(self._buffer) - len(text) + 1)
            self._state = "call"
            return True
        partial = _PARTIAL.fullmatch(text) or self.START.startswith(text)
        if partial and not final:
            return False
        self._state = "text"
        return True

    def _step_text(self, *, final: bool) -> bool:
        self._say(self._drop(len(self._buffer)))
        return False

    def _step_call(self, *, final: bool) -> bool:
        """Follow quotes and brackets up to the comma behind a call, or the end of the list."""
        while self._position < len(self._buffer):
            mark = self._buffer[self._position]
            self._position += 1
            if self._quote:
                if mark == "\\":
                    self._position += 1
                elif mark == self._quote:
                    self._quote = ""
            elif mark in "\"'":
                self._quote = mark
            elif mark in "([{":
                self._depth += 1
            elif mark in ")]}":
                self._depth -= 1
            if self._depth < 0 or (mark == "," and not self._depth and not self._quote):
                self._end_call("end" if self._depth < 0 else "call")
                return True
        if final:
            self._end_call("text")
        return final

    def _end_call(self, state: str) -> None:
        """Pass on the call before the mark at hand; without one, the text."""
        source = self._buffer[: self._position - (state != "text")].strip()
        call = None if state == "text" else _parse(source)
        if call is not None:
            self._begin(call[0])
            self._add(call[1])
        elif source:
            self._say("" if self.calls else "[")
            state = "text"
        if state != "text":
            self._drop(self._position)
        self._state = state
        self._position, self._depth, self._quote = 0, 0, ""

    def _step_end(self, *, final: bool) -> bool:
        text = self._buffer.lstrip()
        if text != self.END and self.END.startswith(text) and not final:
            return False
        self._buffer, self._state = text.removeprefix(self.END), "text"
        return True


def _parse(source: str) -> tuple[str, str] | None:
    """The name and the arguments, as JSON, of one call in Python's form; None for anything else."""
    name, bracket, _ = source.partition("(")
    if not bracket or not _NAME.fullmatch(name.strip()):
        return None
    try:
        # a tool's name may have hyphens and dots, a name of Python has none
        tree = ast.parse(f"f{source[len(name) :]}", mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            return None
        arguments = {keyword.arg: _literal(keyword.value) for keyword in tree.keywords}
        if None in arguments:  # f(**more)
            return None
        return name.strip(), json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal. JSON's ``true``, ``false`` and ``null`` are names in Python."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(child) for child in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("a dictionary within a dictionary, without a key")
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _literal(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)
