"""Parsers of calls whose arguments are JSON.

    hermes        <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    llama3_json   {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
    mistral       [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}], [TOOL_CALLS]f[ARGS]{"a": 1}
    deepseek_v3   <｜tool▁call▁begin｜>function<｜tool▁sep｜>f ```json {…} ```<｜tool▁call▁end｜>
    deepseek_v31  <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>

Each character is read at most twice, even if the text arrives in many pieces. Parsing must be fast,
because it runs in the event loop that all requests share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, ClassVar

from veneer.serve.tools.deltas import CallParser, NewId, short_id

#: the largest length of a header (the text between a tag and the arguments, with the tool's name),
#: in characters
MAX_HEADER_CHARS = 512


class ValueScanner:
    """Finds the end of a JSON value in a text that arrives in pieces. It examines only quotes and
    brackets: the text between them need not be valid JSON."""

    def __init__(self) -> None:
        self._bracket_depth, self._in_string, self._after_backslash = 0, False, False

    def scan(self, text: str, start: int = 0) -> tuple[int, bool]:
        """Scan ``text``, the next piece, from ``start`` on. Return the position after its last
        character that belongs to the value, and whether the value ends there."""
        for position in range(start, len(text)):
            character = text[position]
            if self._in_string:
                if self._after_backslash:
                    self._after_backslash = False
                elif character == "\\":
                    self._after_backslash = True
                elif character == '"':
                    self._in_string = False
                    if not self._bracket_depth:
                        return position + 1, True
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._bracket_depth += 1
            elif character in "}]":
                self._bracket_depth -= 1
                if self._bracket_depth <= 0:  # below 0: the enclosing object ends
                    return position + (self._bracket_depth == 0), True
            elif not self._bracket_depth and (character == "," or character.isspace()):
                return position, True
        return len(text), False


class JsonCall:
    """A parser of one call {"name": …, "arguments": …} whose text arrives in pieces. ``on_name`` is
    called with the name, ``on_arguments`` with each piece of the arguments.

    Attributes:
        has_name: whether the name was read.
        is_complete: whether the object has ended.
        has_failed: whether the text is no such object.
        text: what was read up to the name, which becomes text if the object is no call."""

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, on_name: Callable[[str], None], on_arguments: Callable[[str], None]) -> None:
        self._on_name, self._on_arguments = on_name, on_arguments
        self.has_name = self.is_complete = self.has_failed = False
        self.text = ""
        self._expected = "{"
        self._key, self._value = "", ""
        self._early_arguments = ""  # arguments that came before the name
        self._has_arguments = False
        self._streams_value = False  # whether ``on_arguments`` gets the current value in pieces
        self._scanner: ValueScanner | None = None

    def read(self, text: str) -> int:
        """Read text; return the number of its characters that belong to the object."""
        position = 0
        while position < len(text) and not (self.is_complete or self.has_failed):
            if self._scanner is None and text[position].isspace():
                position += 1
            elif self._expected in ("key", "value"):
                position = self._read_value(text, position)
            else:
                self._read_punctuation(text[position])
                position += not self.has_failed
        if not self.has_name:
            self.text += text[:position]
        return position

    def _read_punctuation(self, character: str) -> None:
        next_states = {"{": {"{": "key"}, ":": {":": "value"}, ",": {",": "key", "}": "end"}}
        next_expected = next_states[self._expected].get(character)
        if next_expected is None:
            self.has_failed = True
        elif next_expected == "end":
            self._end()
        else:
            self._expected = next_expected

    def _read_value(self, text: str, position: int) -> int:
        """Read characters of a key or value from ``position`` on; return the next position."""
        if self._scanner is None:
            character = text[position]
            if self._expected == "key" and character == "}":
                self._end()
                return position + 1
            if character in "}]:," or (self._expected == "key" and character != '"'):
                self.has_failed = True
                return position
            self._scanner, self._value = ValueScanner(), ""
            # emit arguments as they come, but a string only at its end, to parse its escapes
            is_arguments = self._expected == "value" and self._key in self.ARGUMENTS
            self._streams_value = is_arguments and self.has_name and character != '"'
        end_position, has_ended = self._scanner.scan(text, position)
        piece = text[position:end_position]
        if self._streams_value:
            self._has_arguments = True
            self._on_arguments(piece)
        else:
            self._value += piece
        if has_ended:
            self._scanner = None
            self._end_value()
        return end_position

    def _end_value(self) -> None:
        if self._expected == "key":
            self._key, self._expected = _parse_string(self._value) or "", ":"
            return
        self._expected = ","
        if self._key == "name" and not self.has_name:
            name = _parse_string(self._value)
            if not name:
                self.has_failed = True
                return
            self.has_name = True
            self._on_name(name)
            self._on_arguments(self._early_arguments)
            self._has_arguments = self._has_arguments or bool(self._early_arguments)
        elif self._key in self.ARGUMENTS and self._value:
            arguments = _parse_string(self._value) if self._value[0] == '"' else self._value
            arguments = self._value if arguments is None else arguments
            if self.has_name:
                self._has_arguments = True
                self._on_arguments(arguments)
            else:
                self._early_arguments = arguments

    def _end(self) -> None:
        self.is_complete, self.has_failed = self.has_name, not self.has_name
        if self.has_name and not self._has_arguments:
            self._on_arguments("{}")


def _parse_string(text: str) -> str | None:
    """The text of a JSON string; None if the JSON is invalid or no string."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class JsonCallParser(CallParser):
    """The base of parsers of calls with JSON arguments. In the state "object", a call is an object
    with name and arguments (``JsonCall``). In the state "header", it is a text with the name, and
    then the arguments."""

    #: the states after an object that is a complete call, and after an object that has a tool's
    #: name but is invalid or incomplete behind it
    after_object: ClassVar[str]
    after_broken_object: ClassVar[str] = "text"
    #: matches the text between the tag and the arguments, with groups for the name and, in some
    #: notations, the id
    header: ClassVar[re.Pattern[str]]
    after_arguments: ClassVar[str] = "text"
    #: the tag that ends a call, and the tag that comes next if the model has left that one out
    close_tags: ClassVar[tuple[str, str]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._call: JsonCall | None = None
        self._scanner = ValueScanner()

    def _step_object(self, *, at_end: bool) -> bool:
        call = self._call = self._call or JsonCall(self._emit_call, self._emit_arguments)
        self._consume(call.read(self._buffer))
        if not (call.is_complete or call.has_failed or at_end):
            return False
        self._call = None
        self._state = self.after_object if call.is_complete else self.after_broken_object
        if not call.has_name:  # the object is no call, so it is text
            self._emit_text(self.call_tag + call.text)
            self._state = "text"
        return True

    def _step_header(self, *, at_end: bool) -> bool:
        position = self._buffer.find("{", 0, MAX_HEADER_CHARS)
        if position < 0 and len(self._buffer) < MAX_HEADER_CHARS and not at_end:
            return False
        match = self.header.fullmatch(self._buffer[: max(position, 0)])
        if match is None:  # the tag begins no call, so it is text
            self._emit_text(self.call_tag)
            self._state = "text"
            return True
        self._consume(match.end())
        self._emit_call(*match.groups())
        self._scanner, self._state = ValueScanner(), "arguments"
        return True

    def _step_arguments(self, *, at_end: bool) -> bool:
        end_position, has_ended = self._scanner.scan(self._buffer)
        self._emit_arguments(self._consume(end_position))
        if has_ended:
            self._state = self.after_arguments
        return has_ended

    def _step_close(self, *, at_end: bool) -> bool:
        """Skip the rest of a call and the tag that ends it."""
        position, tag = self._find_tag(self.close_tags, at_end=at_end)
        self._consume(position + (len(tag) if tag == self.close_tags[0] else 0))
        if tag or at_end:
            self._state = "text"
        return bool(tag)


class Hermes(JsonCallParser):
    """The notation of Hermes 2 Pro, Qwen 2.5 and Qwen 3: a JSON object between two tags."""

    call_tag, after_call_tag = "<tool_call>", "object"
    after_object = after_broken_object = "close"
    close_tags = ("</tool_call>", call_tag)
    markers = (call_tag, "</tool_call>")


class Llama3Json(JsonCallParser):
    """The notation of Llama 3.1 to 3.3: the answer is an object, or objects separated by ";"."""

    PYTHON = "<|python_tag|>"
    markers = (PYTHON,)
    first_state = after_object = "start"

    def _step_start(self, *, at_end: bool) -> bool:
        """Find out whether an object follows. Otherwise the rest of the answer is text."""
        text = self._buffer.lstrip()
        if self.call_count:
            text = text.lstrip("; \n")
        if text.startswith(self.PYTHON):
            self._buffer = text[len(self.PYTHON) :]
            return True
        if text.startswith("{"):
            self._buffer, self._state = text, "object"
            return True
        if self.PYTHON.startswith(text) and not at_end:
            return False
        self._state = "text"
        return True


class Mistral(JsonCallParser):
    """The notations of Mistral. After the special token [TOOL_CALLS] comes a list of objects, or in
    models since 2025 the name and the arguments of one call."""

    call_tag, after_call_tag = "[TOOL_CALLS]", "open"
    markers = (call_tag, "[CALL_ID]", "[ARGS]")
    new_id: ClassVar[NewId] = staticmethod(short_id)
    after_object = "list"
    header = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*")

    def _step_open(self, *, at_end: bool) -> bool:
        """After the special token: find out which of the two notations follows."""
        text = self._buffer.lstrip()
        if not text:
            self._state = "text" if at_end else "open"
            return False
        if text[0] in "[{":
            self._buffer = text[1:] if text[0] == "[" else text
            self._state = "list"
        else:
            self._state = "header"
        return True

    def _step_list(self, *, at_end: bool) -> bool:
        text = self._buffer.lstrip(", \n\r\t")
        if text.startswith("{"):
            self._buffer, self._state = text, "object"
            return True
        if text or at_end:
            self._buffer, self._state = text.removeprefix("]"), "text"
            return bool(self._buffer)
        return False


class DeepSeek(JsonCallParser):
    """The notation of DeepSeek: calls between special tokens, each with a header before its
    arguments."""

    BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL_END, SEPARATOR = "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
    call_tag, after_call_tag = "<｜tool▁call▁begin｜>", "header"
    other_tags = (BEGIN, END)
    after_arguments = "close"
    close_tags = (CALL_END, END)
    markers = (BEGIN, END, call_tag, CALL_END, SEPARATOR)


class DeepSeekV3(DeepSeek):
    """The notation of DeepSeek V3 and R1: the arguments are a Markdown code block."""

    header = re.compile(rf"\s*\w+\s*{DeepSeek.SEPARATOR}\s*([\w.-]+)\s*```json\s*")


class DeepSeekV31(DeepSeek):
    """The notation of DeepSeek V3.1: the arguments follow the separator."""

    header = re.compile(rf"\s*([\w.-]+)\s*{DeepSeek.SEPARATOR}\s*")
