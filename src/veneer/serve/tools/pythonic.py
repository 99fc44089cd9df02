"""Calls that are written in Python, such as ``[get_weather(city="Bern", days=3), get_time()]``
(Llama 3.2 and 4, ToolACE).

An answer is either a list of calls or text. The parser returns a call when the call is complete.
The values of its arguments are parsed as Python, but never run. If a value is not a literal, the
call is returned as text.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from veneer.serve.tools.deltas import CallParser

_NAME = re.compile(r"[\w.-]+")
_OPENING = re.compile(rf"\[\s*{_NAME.pattern}\(")
#: matches a text that may become the opening of a list of calls when more text arrives: nothing, or
#: a bracket and the beginning of a tool's name
_PARTIAL_OPENING = re.compile(rf"(\[\s*({_NAME.pattern})?)?")
#: matches the name of an argument. It need not be a name in Python, because a JSON schema may have
#: properties such as "from", "user-id", "$top" and "max results". A quote belongs to a string, and
#: one of the characters ! < > : before "=" belongs to an operator, as in f(a >= 1).
_ARGUMENT_NAME = re.compile(r"[^\"'\n]*[^\"'\s!<>:]")
#: matches a string, a comma or a bracket in the text of a call
_STRING_OR_PUNCTUATION = re.compile(
    r"\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}"
    r"|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|[,()\[\]{}]",
    re.DOTALL,
)
_JSON_NAMES = {"true": True, "false": False, "null": None}


class Pythonic(CallParser):
    """A parser of an answer that is either a list of calls, written in Python, or text."""

    START_TAG, END_TAG = "<|python_start|>", "<|python_end|>"
    markers = (START_TAG, END_TAG)
    first_state = "start"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._position, self._bracket_depth, self._quote = 0, 0, ""

    def _step_start(self, *, at_end: bool) -> bool:
        """At the beginning of the answer: find out whether the answer is a list of calls or
        text."""
        text = self._buffer.lstrip().removeprefix(self.START_TAG).lstrip()
        if _OPENING.match(text):
            self._consume(len(self._buffer) - len(text) + 1)
            self._state = "call"
            return True
        may_open = _PARTIAL_OPENING.fullmatch(text) or self.START_TAG.startswith(text)
        if may_open and not at_end:
            return False
        self._state = "text"
        return True

    def _step_call(self, *, at_end: bool) -> bool:
        """Scan quotes and brackets up to the comma after a call, or up to the bracket that ends the
        list."""
        while self._position < len(self._buffer):
            character = self._buffer[self._position]
            self._position += 1
            if self._quote:
                if character == "\\":
                    self._position += 1
                elif character == self._quote:
                    self._quote = ""
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._bracket_depth += 1
            elif character in ")]}":
                self._bracket_depth -= 1
            ends_call = character == "," and not self._bracket_depth and not self._quote
            if self._bracket_depth < 0 or ends_call:
                self._end_call("end" if self._bracket_depth < 0 else "call")
                return True
        if at_end:
            self._end_call("text")
        return at_end

    def _end_call(self, next_state: str) -> None:
        """Emit the call that ends before ``_position``; if it is not valid, emit it as text, and
        treat the rest of the answer as text. ``next_state``: "call" if another call follows, "end"
        after the last one, or "text" if the answer has ended within the call."""
        source = self._buffer[: self._position - (next_state != "text")].strip()
        name_and_arguments = None if next_state == "text" else _parse_call(source)
        if name_and_arguments is not None:
            self._emit_call(name_and_arguments[0])
            self._emit_arguments(name_and_arguments[1])
        elif source:
            self._emit_text("" if self.call_count else "[")
            next_state = "text"
        if next_state != "text":
            self._consume(self._position)
        self._state = next_state
        self._position, self._bracket_depth, self._quote = 0, 0, ""

    def _step_end(self, *, at_end: bool) -> bool:
        """After the list: skip the tag that may follow it."""
        text = self._buffer.lstrip()
        if text != self.END_TAG and self.END_TAG.startswith(text) and not at_end:
            return False
        self._buffer, self._state = text.removeprefix(self.END_TAG), "text"
        return True


def _parse_call(source: str) -> tuple[str, str] | None:
    """The name and the arguments (a JSON object, as text) of one call that is written in Python;
    None if ``source`` is not a call whose arguments are keyword arguments with literal values."""
    name, bracket, _ = source.partition("(")
    if not bracket or not _NAME.fullmatch(name.strip()):
        return None
    argument_texts = _split_arguments(source, len(name))
    if argument_texts is None:
        return None
    try:
        arguments = dict(map(_parse_argument, argument_texts))
        if len(arguments) < len(argument_texts):  # a name occurs twice
            return None
        # the JSON is ASCII: a string may have half of a surrogate pair, which UTF-8 cannot encode
        return name.strip(), json.dumps(arguments, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _split_arguments(source: str, start: int) -> list[str] | None:
    """The texts of the arguments of a call, which are separated by commas. ``start``: the index in
    ``source`` of the bracket that opens them. None if the last character of ``source`` does not
    close this bracket, as in ``f(a=1).g(b=2)``."""
    argument_texts: list[str] = []
    argument_start, bracket_depth = start + 1, 0
    for match in _STRING_OR_PUNCTUATION.finditer(source, start):
        if match[0] in ("(", "[", "{"):
            bracket_depth += 1
        elif match[0] in (")", "]", "}"):
            bracket_depth -= 1
        if not bracket_depth or (bracket_depth == 1 and match[0] == ","):
            argument_texts.append(source[argument_start : match.start()])
            argument_start = match.end()
        if not bracket_depth:
            break
    if bracket_depth or argument_start < len(source):
        return None
    if not argument_texts[-1].strip():  # there are no arguments, or a comma follows the last one
        argument_texts.pop()
    return argument_texts


def _parse_argument(text: str) -> tuple[str, Any]:
    """The name and the value of one argument, ``name=value``. Raises ``SyntaxError`` or
    ``ValueError`` if ``text`` has another form, or if its value is not a literal."""
    name, _, value_text = text.partition("=")
    name = name.strip()
    if not value_text.strip() or not _ARGUMENT_NAME.fullmatch(name):
        raise ValueError("an argument without a name or without a value")
    # the brackets allow a value of several lines, as the brackets of the call do
    return name, _literal(ast.parse(f"({value_text})", mode="eval").body)


def _literal(node: ast.expr) -> Any:
    """The value of a Python literal, or of ``true``, ``false`` or ``null``: models write these
    words of JSON too, which are names in Python. Raises ``ValueError`` for any other expression."""
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
