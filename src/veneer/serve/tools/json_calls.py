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
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from veneer.serve.tools.deltas import CallParser, NewId, short_id

#: the largest number of characters between a tag and the arguments, which contain the tool's name
MAX_HEADER = 512


def match_header(
    pattern: re.Pattern[str], text: str, *, at_end: bool
) -> re.Match[str] | str | None:
    """Match the header, the text before the first "{". Return "" if the header may be incomplete,
    and None if it does not match."""
    position = text.find("{", 0, MAX_HEADER)
    if position < 0 and len(text) < MAX_HEADER and not at_end:
        return ""
    return pattern.fullmatch(text[: max(position, 0)])


class ValueScanner:
    """Finds the end of a JSON value in a text that arrives in pieces. It examines only quotes and
    brackets: the text between them need not be valid JSON."""

    def __init__(self) -> None:
        self._bracket_depth, self._in_string, self._after_backslash = 0, False, False

    def scan(self, text: str, start: int = 0) -> tuple[int, bool]:
        """Return the position after the value's last character in ``text``, and whether the value
        ends there."""
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
        text: the text that was read before the name was known."""

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, on_name: Callable[[str], None], on_arguments: Callable[[str], None]) -> None:
        self._on_name, self._on_arguments = on_name, on_arguments
        self.has_name = self.is_complete = self.has_failed = False
        self.text = ""
        self._expected = "{"
        self._key, self._value = "", ""
        self._early_arguments = ""  # arguments that came before the name
        self._has_arguments = False
        self._streams_value = False  # whether pieces of the current value are emitted as they come
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


class ObjectCallParser(CallParser):
    """The base of parsers of calls that are objects with name and arguments (``JsonCall``)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._call: JsonCall | None = None

    def _start_object(self) -> None:
        self._call = JsonCall(self._emit_call, self._emit_arguments)

    def _read_object(self, prefix: str, *, at_end: bool) -> JsonCall | None:
        """Read the current call, which follows ``prefix``; return it when it has ended, else None.
        If the object turns out to be no call, it becomes text."""
        call = self._call
        assert call is not None
        self._consume(call.read(self._buffer))
        if not (call.is_complete or call.has_failed or at_end):
            return None
        if not call.has_name:
            self._emit_text(prefix + call.text)
        self._call = None
        return call


class Hermes(ObjectCallParser):
    """The notation of Hermes 2 Pro, Qwen 2.5 and Qwen 3: a JSON object between two tags."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._awaits_close_tag = False

    def _step(self, *, at_end: bool) -> bool:
        if self._awaits_close_tag:
            return self._read_close(at_end=at_end)
        if self._call is None:
            position, tag = self._find_tag((self.OPEN,), at_end=at_end)
            self._emit_text(self._consume(position))
            if tag:
                self._consume(len(tag))
                self._start_object()
            return bool(tag)
        call = self._read_object(self.OPEN, at_end=at_end)
        if call is None:
            return False
        self._awaits_close_tag = call.has_name
        return True

    def _read_close(self, *, at_end: bool) -> bool:
        """Read up to the tag that ends a call, or up to the next call if that tag is missing."""
        position, tag = self._find_tag((self.CLOSE, self.OPEN), at_end=at_end)
        self._consume(position + (len(tag) if tag == self.CLOSE else 0))
        self._awaits_close_tag = not (tag or at_end)
        return bool(tag)


class Llama3Json(ObjectCallParser):
    """The notation of Llama 3.1 to 3.3: the answer is an object, or several with ";" between."""

    PYTHON = "<|python_tag|>"
    markers: ClassVar[tuple[str, ...]] = (PYTHON,)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_text = False

    def _step(self, *, at_end: bool) -> bool:
        if self._is_text:
            self._emit_text(self._consume(len(self._buffer)))
            return False
        if self._call is not None:
            return self._read_call(at_end=at_end)
        text = self._buffer.lstrip()
        if self.calls:
            text = text.lstrip("; \n")
        if text.startswith(self.PYTHON):
            self._buffer = text[len(self.PYTHON) :]
            return True
        if text.startswith("{"):
            self._buffer = text
            self._start_object()
            return True
        if self.PYTHON.startswith(text) and not at_end:
            return False
        self._is_text = True
        return True

    def _read_call(self, *, at_end: bool) -> bool:
        call = self._read_object("", at_end=at_end)
        if call is None:
            return False
        self._is_text = not call.is_complete
        return True


class Mistral(ObjectCallParser):
    """The notation of Mistral: a list of objects after a special token, or since 2025 the name and
    the arguments of a call."""

    OPEN = "[TOOL_CALLS]"
    markers: ClassVar[tuple[str, ...]] = (OPEN, "[CALL_ID]", "[ARGS]")
    new_id: ClassVar[NewId] = staticmethod(short_id)
    HEADER = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state, self._open_tag = "text", ""
        self._scanner = ValueScanner()

    def _step(self, *, at_end: bool) -> bool:
        return getattr(self, f"_step_{self._state}")(at_end=at_end)

    def _step_text(self, *, at_end: bool) -> bool:
        position, tag = self._find_tag((self.OPEN,), at_end=at_end)
        self._emit_text(self._consume(position))
        if tag:
            self._open_tag = self._consume(len(tag))
            self._state = "open"
        return bool(tag)

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
            self._buffer, self._state = text, "call"
            self._start_object()
            return True
        if text or at_end:
            self._buffer, self._state = text.removeprefix("]"), "text"
            return bool(self._buffer)
        return False

    def _step_call(self, *, at_end: bool) -> bool:
        call = self._read_object(self._open_tag, at_end=at_end)
        if call is None:
            return False
        self._state = "list" if call.is_complete else "text"
        return True

    def _step_header(self, *, at_end: bool) -> bool:
        header = match_header(self.HEADER, self._buffer, at_end=at_end)
        if header == "":
            return False
        if not isinstance(header, re.Match):  # the special token begins no call, so it is text
            self._emit_text(self._open_tag)
            self._state = "text"
            return True
        self._consume(header.end())
        self._emit_call(header[1], header[2])
        self._scanner, self._state = ValueScanner(), "arguments"
        return True

    def _step_arguments(self, *, at_end: bool) -> bool:
        end_position, has_ended = self._scanner.scan(self._buffer)
        self._emit_arguments(self._consume(end_position))
        if has_ended:
            self._state = "text"
        return has_ended


class DeepSeek(CallParser):
    """The notation of DeepSeek: calls between special tokens, each with a header before its
    arguments."""

    BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, CALL_END, SEPARATOR = (
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    )
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, CALL, CALL_END, SEPARATOR)
    HEADER: ClassVar[re.Pattern[str]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state = "text"
        self._scanner = ValueScanner()

    def _step(self, *, at_end: bool) -> bool:
        return getattr(self, f"_step_{self._state}")(at_end=at_end)

    def _step_text(self, *, at_end: bool) -> bool:
        tags: Sequence[str] = (self.BEGIN, self.CALL, self.END)
        position, tag = self._find_tag(tags, at_end=at_end)
        self._emit_text(self._consume(position))
        self._consume(len(tag))
        if tag == self.CALL:
            self._state = "header"
        return bool(tag)

    def _step_header(self, *, at_end: bool) -> bool:
        header = match_header(self.HEADER, self._buffer, at_end=at_end)
        if header == "":
            return False
        if not isinstance(header, re.Match):
            self._emit_text(self.CALL)
            self._state = "text"
            return True
        self._consume(header.end())
        self._emit_call(header[1])
        self._scanner, self._state = ValueScanner(), "arguments"
        return True

    def _step_arguments(self, *, at_end: bool) -> bool:
        end_position, has_ended = self._scanner.scan(self._buffer)
        self._emit_arguments(self._consume(end_position))
        if has_ended:
            self._state = "close"
        return has_ended

    def _step_close(self, *, at_end: bool) -> bool:
        position, tag = self._find_tag((self.CALL_END, self.END), at_end=at_end)
        self._consume(position + len(tag))
        if tag or at_end:
            self._state = "text"
        return bool(tag)


class DeepSeekV3(DeepSeek):
    """The notation of DeepSeek V3 and R1: the arguments are a Markdown code block."""

    HEADER = re.compile(rf"\s*\w+\s*{DeepSeek.SEPARATOR}\s*([\w.-]+)\s*```json\s*")


class DeepSeekV31(DeepSeek):
    """The notation of DeepSeek V3.1: the arguments follow the separator."""

    HEADER = re.compile(rf"\s*([\w.-]+)\s*{DeepSeek.SEPARATOR}\s*")
