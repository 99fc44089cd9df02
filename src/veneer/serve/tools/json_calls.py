"""Parsers of calls whose arguments are JSON.

    hermes        <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    llama3_json   {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
    mistral       [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}], [TOOL_CALLS]f[ARGS]{"a": 1}
    deepseek_v3   <｜tool▁call▁begin｜>function<｜tool▁sep｜>f ```json {…} ```<｜tool▁call▁end｜>
    deepseek_v31  <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>

Each character is read once or twice, however many pieces the text arrives in, because parsing runs
in the event loop of all requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from veneer.serve.tools.deltas import CallParser, NewId, short_id

#: most characters between a tag and the arguments: the name, and words around it
LONGEST_HEADER = 512


def match_header(pattern: re.Pattern[str], text: str, *, final: bool) -> re.Match[str] | str | None:
    """The header before the first "{" of a text; "" while it may be incomplete, None for none."""
    position = text.find("{", 0, LONGEST_HEADER)
    if position < 0 and len(text) < LONGEST_HEADER and not final:
        return ""
    return pattern.fullmatch(text[: max(position, 0)])


class ValueScanner:
    """Find the end of a JSON value in a text that arrives in pieces. Only quotes and brackets are
    followed; the text between them need not be valid JSON."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def scan(self, text: str, start: int = 0) -> tuple[int, bool]:
        """The position after the last character of the value so far, and whether the value ends
        there."""
        for position in range(start, len(text)):
            mark = text[position]
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif mark == "\\":
                    self._escaped = True
                elif mark == '"':
                    self._quoted = False
                    if not self._depth:
                        return position + 1, True
            elif mark == '"':
                self._quoted = True
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
                if self._depth <= 0:  # below 0: the enclosing object ends
                    return position + (self._depth == 0), True
            elif not self._depth and (mark == "," or mark.isspace()):
                return position, True
        return len(text), False


class JsonCall:
    """One object {"name": …, "arguments": …}, read while its text comes. ``begin`` is called with
    the name, ``add`` with each part of the arguments.

    Attributes:
        begun: its name is known.
        done: it is complete.
        failed: it is no such object.
        text: what was read until its name was known."""

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, begin: Callable[[str], None], add: Callable[[str], None]) -> None:
        self._begin, self._add = begin, add
        self.begun = self.done = self.failed = False
        self.text = ""
        self._expected = "{"
        self._key, self._value = "", ""
        self._early = ""  # arguments that came before the name
        self._some = self._streams = False  # there are arguments; this value is passed on
        self._scanner: ValueScanner | None = None

    def read(self, text: str) -> int:
        """Read text; return how many of its characters belong to the object."""
        position = 0
        while position < len(text) and not (self.done or self.failed):
            if self._scanner is None and text[position].isspace():
                position += 1
            elif self._expected in ("key", "value"):
                position = self._read_value(text, position)
            else:
                self._read_mark(text[position])
                position += not self.failed
        if not self.begun:
            self.text += text[:position]
        return position

    def _read_mark(self, mark: str) -> None:
        following = {"{": {"{": "key"}, ":": {":": "value"}, ",": {",": "key", "}": "end"}}
        state = following[self._expected].get(mark)
        if state is None:
            self.failed = True
        elif state == "end":
            self._end()
        else:
            self._expected = state

    def _read_value(self, text: str, position: int) -> int:
        """Read a part of a key or value from ``position`` on; return the position after it."""
        if self._scanner is None:
            mark = text[position]
            if self._expected == "key" and mark == "}":
                self._end()
                return position + 1
            if mark in "}]:," or (self._expected == "key" and mark != '"'):
                self.failed = True
                return position
            self._scanner, self._value = ValueScanner(), ""
            # arguments are passed on as they come; as a string they are escaped, and wait
            is_arguments = self._expected == "value" and self._key in self.ARGUMENTS
            self._streams = is_arguments and self.begun and mark != '"'
        stop, ended = self._scanner.scan(text, position)
        piece = text[position:stop]
        if self._streams:
            self._some = True
            self._add(piece)
        else:
            self._value += piece
        if ended:
            self._scanner = None
            self._end_value()
        return stop

    def _end_value(self) -> None:
        if self._expected == "key":
            self._key, self._expected = _string(self._value) or "", ":"
            return
        self._expected = ","
        if self._key == "name" and not self.begun:
            name = _string(self._value)
            if not name:
                self.failed = True
                return
            self.begun = True
            self._begin(name)
            self._add(self._early)
            self._some = self._some or bool(self._early)
        elif self._key in self.ARGUMENTS and self._value:
            arguments = _string(self._value) if self._value[0] == '"' else self._value
            arguments = self._value if arguments is None else arguments
            if self.begun:
                self._some = True
                self._add(arguments)
            else:
                self._early = arguments

    def _end(self) -> None:
        self.done, self.failed = self.begun, not self.begun
        if self.begun and not self._some:
            self._add("{}")


def _string(text: str) -> str | None:
    """The text of a JSON string; None if it is not one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class ObjectCallParser(CallParser):
    """Parser of calls that are whole objects (``JsonCall``)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._call: JsonCall | None = None

    def _begin_call(self) -> None:
        self._call = JsonCall(self._begin, self._add)

    def _read_object(self, prefix: str, *, final: bool) -> JsonCall | None:
        """Read the current call, which follows ``prefix``; return it once it has ended. If it turns
        out to be no call, it becomes text."""
        call = self._call
        assert call is not None
        self._drop(call.read(self._buffer))
        if not (call.done or call.failed or final):
            return None
        if not call.begun:
            self._say(prefix + call.text)
        self._call = None
        return call


class Hermes(ObjectCallParser):
    """Hermes 2 Pro, Qwen 2.5, Qwen 3: a call is a JSON object between two tags."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._closing = False

    def _step(self, *, final: bool) -> bool:
        if self._closing:
            return self._read_close(final=final)
        if self._call is None:
            position, tag = self._find((self.OPEN,), final=final)
            self._say(self._drop(position))
            if tag:
                self._drop(len(tag))
                self._begin_call()
            return bool(tag)
        call = self._read_object(self.OPEN, final=final)
        if call is None:
            return False
        self._closing = call.begun
        return True

    def _read_close(self, *, final: bool) -> bool:
        """Read up to the tag that ends a call; without one, up to the next call."""
        position, tag = self._find((self.CLOSE, self.OPEN), final=final)
        self._drop(position + (len(tag) if tag == self.CLOSE else 0))
        self._closing = not (tag or final)
        return bool(tag)


class Llama3Json(ObjectCallParser):
    """Llama 3.1 to 3.3: the answer is an object, or several of them with ";" between."""

    PYTHON = "<|python_tag|>"
    markers: ClassVar[tuple[str, ...]] = (PYTHON,)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._reads_text = False

    def _step(self, *, final: bool) -> bool:
        if self._reads_text:
            self._say(self._drop(len(self._buffer)))
            return False
        if self._call is not None:
            return self._read_call(final=final)
        text = self._buffer.lstrip()
        if self.calls:
            text = text.lstrip("; \n")
        if text.startswith(self.PYTHON):
            self._buffer = text[len(self.PYTHON) :]
            return True
        if text.startswith("{"):
            self._buffer = text
            self._begin_call()
            return True
        if self.PYTHON.startswith(text) and not final:
            return False
        self._reads_text = True
        return True

    def _read_call(self, *, final: bool) -> bool:
        call = self._read_object("", final=final)
        if call is None:
            return False
        self._reads_text = not call.done
        return True


class Mistral(ObjectCallParser):
    """Mistral: a list of objects behind a special token, or since 2025 a name and its
    arguments."""

    OPEN = "[TOOL_CALLS]"
    markers: ClassVar[tuple[str, ...]] = (OPEN, "[CALL_ID]", "[ARGS]")
    new_id: ClassVar[NewId] = staticmethod(short_id)
    HEADER = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state, self._raw = "text", ""
        self._scanner = ValueScanner()

    def _step(self, *, final: bool) -> bool:
        return getattr(self, f"_step_{self._state}")(final=final)

    def _step_text(self, *, final: bool) -> bool:
        position, tag = self._find((self.OPEN,), final=final)
        self._say(self._drop(position))
        if tag:
            self._raw = self._drop(len(tag))
            self._state = "open"
        return bool(tag)

    def _step_open(self, *, final: bool) -> bool:
        """Behind the special token: which of the two notations follows."""
        text = self._buffer.lstrip()
        if not text:
            self._state = "text" if final else "open"
            return False
        if text[0] in "[{":
            self._buffer = text[1:] if text[0] == "[" else text
            self._state = "list"
        else:
            self._state = "header"
        return True

    def _step_list(self, *, final: bool) -> bool:
        text = self._buffer.lstrip(", \n\r\t")
        if text.startswith("{"):
            self._buffer, self._state = text, "call"
            self._begin_call()
            return True
        if text or final:
            self._buffer, self._state = text.removeprefix("]"), "text"
            return bool(self._buffer)
        return False

    def _step_call(self, *, final: bool) -> bool:
        call = self._read_object(self._raw, final=final)
        if call is None:
            return False
        self._state = "list" if call.done else "text"
        return True

    def _step_header(self, *, final: bool) -> bool:
        header = match_header(self.HEADER, self._buffer, final=final)
        if header == "":
            return False
        if not isinstance(header, re.Match):  # what looked like a call is text
            self._say(self._raw)
            self._state = "text"
            return True
        self._drop(header.end())
        self._begin(header[1], header[2])
        self._scanner, self._state = ValueScanner(), "arguments"
        return True

    def _step_arguments(self, *, final: bool) -> bool:
        stop, ended = self._scanner.scan(self._buffer)
        self._add(self._drop(stop))
        if ended:
            self._state = "text"
        return ended


class DeepSeek(CallParser):
    """DeepSeek: calls between special tokens, each with a header before its arguments."""

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

    def _step(self, *, final: bool) -> bool:
        return getattr(self, f"_step_{self._state}")(final=final)

    def _step_text(self, *, final: bool) -> bool:
        tags: Sequence[str] = (self.BEGIN, self.CALL, self.END)
        position, tag = self._find(tags, final=final)
        self._say(self._drop(position))
        self._drop(len(tag))
        if tag == self.CALL:
            self._state = "header"
        return bool(tag)

    def _step_header(self, *, final: bool) -> bool:
        header = match_header(self.HEADER, self._buffer, final=final)
        if header == "":
            return False
        if not isinstance(header, re.Match):
            self._say(self.CALL)
            self._state = "text"
            return True
        self._drop(header.end())
        self._begin(header[1])
        self._scanner, self._state = ValueScanner(), "arguments"
        return True

    def _step_arguments(self, *, final: bool) -> bool:
        stop, ended = self._scanner.scan(self._buffer)
        self._add(self._drop(stop))
        if ended:
            self._state = "close"
        return ended

    def _step_close(self, *, final: bool) -> bool:
        position, tag = self._find((self.CALL_END, self.END), final=final)
        self._drop(position + len(tag))
        if tag or final:
            self._state = "text"
        return bool(tag)


class DeepSeekV3(DeepSeek):
    """DeepSeek V3 and R1: the arguments stand in a block of code."""

    HEADER = re.compile(rf"\s*\w+\s*{DeepSeek.SEPARATOR}\s*([\w.-]+)\s*```json\s*")


class DeepSeekV31(DeepSeek):
    """DeepSeek V3.1."""

    HEADER = re.compile(rf"\s*([\w.-]+)\s*{DeepSeek.SEPARATOR}\s*")
