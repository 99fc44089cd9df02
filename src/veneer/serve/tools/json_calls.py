"""Parsers of calls whose arguments are JSON.

    hermes        <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    llama3_json   {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
    mistral       [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}], [TOOL_CALLS]f[ARGS]{"a": 1}
    deepseek_v3   <｜tool▁call▁begin｜>function<｜tool▁sep｜>f ```json {…} ```<｜tool▁call▁end｜>
    deepseek_v31  <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>

A parser keeps its state between the pieces of an answer, so it does not parse an argument again
when the next piece arrives. Parsing must be fast, because it runs in the event loop that all
requests share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from veneer.serve.tools.deltas import CallParser, NewId, short_id

#: the largest length, in characters, of a header (the text between a call's opening tag and its
#: arguments, which contains the tool's name). If no arguments begin within this length, the tag
#: begins no call.
MAX_HEADER_CHARS = 512


class ValueScanner:
    """Finds the end of a JSON value whose text arrives in pieces. It only examines quotes,
    brackets, commas and white space; it does not check that the value is valid JSON."""

    def __init__(self) -> None:
        self._bracket_depth, self._in_string, self._after_backslash = 0, False, False

    def scan(self, text: str, start: int = 0) -> tuple[int, bool]:
        """Scan ``text``, the next piece of the text, from the index ``start`` on. Return the index
        after its last character that belongs to the value, and whether the value ends there."""
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
                if self._bracket_depth <= 0:  # below 0: the bracket ends the enclosing object
                    return position + (self._bracket_depth == 0), True
            elif not self._bracket_depth and (character == "," or character.isspace()):
                return position, True
        return len(text), False


class CallObjectReader:
    """Reads the JSON object of one call, {"name": …, "arguments": …}, whose text arrives in pieces.

    Args:
        on_name: called with the tool's name when it has been read.
        on_arguments: called after ``on_name``, with each piece of the arguments' text.
        tool_names: an object with another name is no call; None accepts any name.

    Attributes:
        has_name: whether the name was read.
        is_complete: whether the object has ended.
        has_failed: whether the text is not the object of a call.
        text_up_to_name: the text that was read before the name was known. If the object turns out
            to be no call, this text belongs to the answer's text.
    """

    ARGUMENTS_KEYS = ("arguments", "parameters")

    def __init__(
        self,
        on_name: Callable[[str], None],
        on_arguments: Callable[[str], None],
        tool_names: Collection[str] | None = None,
    ) -> None:
        self._on_name, self._on_arguments, self._tool_names = on_name, on_arguments, tool_names
        self.has_name = self.is_complete = self.has_failed = False
        self.text_up_to_name = ""
        #: what must come next: "{", "key", ":", "value", or "," (which stands for "," or "}")
        self._expected_token = "{"
        self._key, self._value_text = "", ""
        self._early_arguments = ""  # arguments that came before the name
        self._has_arguments = False
        self._streams_value = False  # whether ``on_arguments`` gets the current value in pieces
        self._scanner: ValueScanner | None = None

    def read(self, text: str) -> int:
        """Read ``text``, the next piece; return how many of its characters belong to the object.
        Fewer than all means that the object has ended or ``has_failed``."""
        position = 0
        while position < len(text) and not (self.is_complete or self.has_failed):
            if self._scanner is None and text[position].isspace():
                position += 1
            elif self._expected_token in ("key", "value"):
                position = self._read_value(text, position)
            else:
                self._read_punctuation(text[position])
                position += not self.has_failed
        if not self.has_name:
            self.text_up_to_name += text[:position]
        return position

    def _read_punctuation(self, character: str) -> None:
        """Read the brace, colon or comma that is expected next; any other character makes the
        object invalid (``has_failed``)."""
        transitions = {"{": {"{": "key"}, ":": {":": "value"}, ",": {",": "key", "}": "end"}}
        next_token = transitions[self._expected_token].get(character)
        if next_token is None:
            self.has_failed = True
        elif next_token == "end":
            self._end()
        else:
            self._expected_token = next_token

    def _read_value(self, text: str, position: int) -> int:
        """Read characters of a key or value from the index ``position`` on; return the next
        index."""
        if self._scanner is None:
            character = text[position]
            if self._expected_token == "key" and character == "}":
                self._end()
                return position + 1
            if character in "}]:," or (self._expected_token == "key" and character != '"'):
                self.has_failed = True
                return position
            self._scanner, self._value_text = ValueScanner(), ""
            # pass on arguments as they arrive, except arguments that are a JSON string: its escapes
            # can only be decoded when it is complete
            is_arguments = self._expected_token == "value" and self._key in self.ARGUMENTS_KEYS
            self._streams_value = is_arguments and self.has_name and character != '"'
        end_position, has_ended = self._scanner.scan(text, position)
        piece = text[position:end_position]
        if self._streams_value:
            self._has_arguments = True
            self._on_arguments(piece)
        else:
            self._value_text += piece
        if has_ended:
            self._scanner = None
            self._end_value()
        return end_position

    def _end_value(self) -> None:
        """Process a key or value that is complete: pass on the name, or arguments that were not
        passed on in pieces."""
        if self._expected_token == "key":
            self._key, self._expected_token = _parse_string(self._value_text) or "", ":"
            return
        self._expected_token = ","
        if self._key == "name" and not self.has_name:
            name = _parse_string(self._value_text)
            if not name or (self._tool_names is not None and name not in self._tool_names):
                self.has_failed = True
                return
            self.has_name = True
            self._on_name(name)
            self._on_arguments(self._early_arguments)
            self._has_arguments = self._has_arguments or bool(self._early_arguments)
        elif self._key in self.ARGUMENTS_KEYS and self._value_text:
            arguments = (
                _parse_string(self._value_text) if self._value_text[0] == '"' else self._value_text
            )
            arguments = self._value_text if arguments is None else arguments
            if self.has_name:
                self._has_arguments = True
                self._on_arguments(arguments)
            else:
                self._early_arguments = arguments

    def _end(self) -> None:
        """End the object. It is a call if it has a name; a call without arguments gets the
        arguments {}."""
        self.is_complete, self.has_failed = self.has_name, not self.has_name
        if self.has_name and not self._has_arguments:
            self._on_arguments("{}")


def _parse_string(text: str) -> str | None:
    """The value of the JSON string ``text``. None if the JSON is invalid, or if its value is not a
    string or cannot be encoded as UTF-8 (it has half of a surrogate pair)."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()  # raises UnicodeEncodeError, a ValueError
            return value
    except (ValueError, RecursionError):
        pass
    return None


class JsonCallParser(CallParser):
    """The base class of parsers of calls with JSON arguments. A notation uses one of two forms: in
    the state "object", a call is a JSON object with its name and arguments (``CallObjectReader``);
    in the state "header", a call is a text that contains its name, followed by the JSON object of
    its arguments."""

    #: the state after an object that is a complete call, and the state after an object that names a
    #: tool but is invalid or incomplete after the name
    state_after_object: ClassVar[str]
    state_after_broken_object: ClassVar[str] = "text"
    #: matches the text between the opening tag and the arguments, with a group for the tool's name
    #: and, in some notations, a second group for the call's id
    header_pattern: ClassVar[re.Pattern[str]]
    state_after_arguments: ClassVar[str] = "text"
    #: the tag that ends a call, then the tags that may follow it: if the model omits the first, the
    #: call ends at the next of the others
    close_tags: ClassVar[tuple[str, ...]]
    #: whether an object is text if its name is none of the request's tools, since any other JSON
    #: object of an answer may have a name too
    requires_known_tool = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._object_reader: CallObjectReader | None = None
        self._scanner = ValueScanner()

    def _step_object(self, *, at_end: bool) -> bool:
        reader = self._object_reader = self._object_reader or CallObjectReader(
            self._emit_call,
            self._emit_arguments,
            self._parameter_schemas if self.requires_known_tool else None,
        )
        self._consume(reader.read(self._buffer))
        if not (reader.is_complete or reader.has_failed or at_end):
            return False
        self._object_reader = None
        self._state = (
            self.state_after_object if reader.is_complete else self.state_after_broken_object
        )
        if not reader.has_name:  # without a name the object is no call, so emit it as text
            self._emit_text(self.call_tag + reader.text_up_to_name)
            self._state = "text"
        return True

    def _step_header(self, *, at_end: bool) -> bool:
        """Parse the text up to the arguments, and begin a call with the name that it contains."""
        position = self._buffer.find("{", 0, MAX_HEADER_CHARS)
        if position < 0 and len(self._buffer) < MAX_HEADER_CHARS and not at_end:
            return False
        match = self.header_pattern.fullmatch(self._buffer[: max(position, 0)])
        if match is None:  # the tag begins no call, so emit it as text
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
            self._state = self.state_after_arguments
        return has_ended

    def _step_close(self, *, at_end: bool) -> bool:
        """Skip the text up to the end of a call, and the tag that ends the call."""
        position, tag = self._find_tag(self.close_tags, at_end=at_end)
        self._consume(position + (len(tag) if tag == self.close_tags[0] else 0))
        if tag or at_end:
            self._state = "text"
        return bool(tag)


class Hermes(JsonCallParser):
    """The notation of Hermes 2 Pro, Qwen 2.5 and Qwen 3: each call is a JSON object between two
    tags."""

    call_tag, state_after_call_tag = "<tool_call>", "object"
    state_after_object = state_after_broken_object = "close"
    close_tags = ("</tool_call>", call_tag)
    markers = (call_tag, "</tool_call>")


class Llama3Json(JsonCallParser):
    """The notation of Llama 3.1 to 3.3: an answer that begins with a JSON object that names a tool
    is a call, or several calls separated by ";". Any other answer is text."""

    PYTHON_TAG = "<|python_tag|>"
    markers = (PYTHON_TAG,)
    first_state = state_after_object = "start"
    requires_known_tool = True

    def _step_start(self, *, at_end: bool) -> bool:
        """At the beginning of the answer or after a call: find out whether a call's object follows.
        If none does, the rest of the answer is text."""
        text = self._buffer.lstrip()
        if self.call_count:
            text = text.lstrip("; \n")
        if text.startswith(self.PYTHON_TAG):
            self._buffer = text[len(self.PYTHON_TAG) :]
            self.requires_known_tool = False  # the tag says that a call follows
            return True
        if text.startswith("{"):
            self._buffer, self._state = text, "object"
            return True
        if self.PYTHON_TAG.startswith(text) and not at_end:
            return False
        self._state = "text"
        return True


class Mistral(JsonCallParser):
    """The two notations of Mistral. After the special token [TOOL_CALLS] comes a list of JSON
    objects or, in models since 2025, the name and the arguments of one call."""

    call_tag, state_after_call_tag = "[TOOL_CALLS]", "open"
    markers = (call_tag, "[CALL_ID]", "[ARGS]")
    new_id: ClassVar[NewId] = staticmethod(short_id)
    state_after_object = "list"
    header_pattern = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*")

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
        """Find the next object of the list, or the end of the list."""
        text = self._buffer.lstrip(", \n\r\t")
        if text.startswith("{"):
            self._buffer, self._state = text, "object"
            return True
        if text or at_end:
            self._buffer, self._state = text.removeprefix("]"), "text"
            return bool(self._buffer)
        return False


class DeepSeek(JsonCallParser):
    """The base class for DeepSeek's notations: calls between special tokens, each with a text that
    contains the tool's name (a header) before its arguments."""

    CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL_END, SEPARATOR = "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
    call_tag, state_after_call_tag = "<｜tool▁call▁begin｜>", "header"
    other_tags = (CALLS_BEGIN, CALLS_END)
    state_after_arguments = "close"
    close_tags = (CALL_END, CALLS_END, call_tag)
    markers = (CALLS_BEGIN, CALLS_END, call_tag, CALL_END, SEPARATOR)


class DeepSeekV3(DeepSeek):
    """The notation of DeepSeek V3 and R1: the arguments are a Markdown code block."""

    header_pattern = re.compile(rf"\s*\w+\s*{DeepSeek.SEPARATOR}\s*([\w.-]+)\s*```json\s*")


class DeepSeekV31(DeepSeek):
    """The notation of DeepSeek V3.1: the arguments follow the separator."""

    header_pattern = re.compile(rf"\s*([\w.-]+)\s*{DeepSeek.SEPARATOR}\s*")
