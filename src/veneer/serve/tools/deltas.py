"""Parse an answer into text and tool calls while the model writes it. Pieces of text and of calls
(deltas) are returned as soon as they are certain.

    parser.feed("Let me see. <tool_c")   → TextDelta("Let me see.")
    parser.feed('all>{"name": "f", ')    → CallDelta(0, id="call_1f…", name="f")
    parser.feed('"arguments": {"a": ')   → CallDelta(0, arguments='{"a": ')

If a notation has JSON arguments, the arguments of a call are the model's text, unchanged. From
other notations, they are converted to JSON. If the answer ends within a call, they may be
incomplete.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class TextDelta:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of call number ``index``: its beginning, with ``id`` and ``name``, or more of its
    arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Call:
    """A call, with all its arguments as text. The text is JSON, unless the model wrote invalid JSON
    or the answer ended within the call."""

    id: str
    name: str
    arguments: str


Delta = TextDelta | CallDelta
NewId = Callable[[str], str]


def call_id(prefix: str) -> str:
    """A random call id that begins with ``prefix``."""
    return f"{prefix}_{secrets.token_hex(12)}"


def short_id(prefix: str) -> str:
    """A random call id of nine letters and digits, which Mistral's templates demand."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class CallParser:
    """A parser of one answer. ``parameters``: by tool name, the JSON schema of a tool's parameters.
    ``prefix``: the beginning of the ids of calls. ``new_id``: a function that makes an id from the
    prefix; None takes the class's function.

    A parser is a state machine. A subclass has a method ``_step_STATE`` for each of its states. It
    parses the beginning of ``_buffer``, the text that is not parsed yet, and passes text to
    ``_emit_text`` and calls to ``_emit_call`` and ``_emit_arguments``."""

    #: tags that may be special tokens and whose text the parser needs in the answer
    markers: ClassVar[tuple[str, ...]] = ()
    new_id: ClassVar[NewId] = staticmethod(call_id)
    first_state: ClassVar[str] = "text"
    #: the tag that ends a text and begins a call ("": none does), and the state after it
    call_tag: ClassVar[str] = ""
    after_call_tag: ClassVar[str]
    #: other tags that end a text; they are left out of the answer
    other_tags: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        prefix: str = "call",
        new_id: NewId | None = None,
    ) -> None:
        self._parameters, self._id_prefix = parameters or {}, prefix
        self._new_id = new_id or type(self).new_id
        self._buffer, self._held_space, self._state = "", "", self.first_state
        self._deltas: list[Delta] = []
        self.call_count = 0  # calls so far

    def feed(self, text: str) -> list[Delta]:
        """Add text to the answer; return the deltas that are now certain."""
        self._buffer += text
        while self._step(at_end=False):
            pass
        return self._take_deltas()

    def end(self) -> list[Delta]:
        """Return the remaining deltas, at the end of the answer."""
        while self._step(at_end=True):
            pass
        if not self.call_count:
            self._deltas.append(TextDelta(self._held_space))
        self._held_space = ""
        return self._take_deltas()

    def finish_reason(self, engine_reason: str | None) -> str | None:
        """The ``finish_reason`` of OpenAI's API. ``engine_reason``: why the engine ended the
        answer, such as "stop" or "length"; None while the answer goes on."""
        return "tool_calls" if engine_reason == "stop" and self.call_count else engine_reason

    def _step(self, *, at_end: bool) -> bool:
        """Parse the beginning of the buffer. Return False if nothing more can be parsed before more
        text arrives. ``at_end``: no more text arrives, so all of the buffer must be parsed."""
        return getattr(self, f"_step_{self._state}")(at_end=at_end)

    def _step_text(self, *, at_end: bool) -> bool:
        """Emit the text up to the next tag, and go on to the state that the tag begins."""
        tags = (self.call_tag, *self.other_tags) if self.call_tag else ()
        position, tag = self._find_tag(tags, at_end=at_end)
        self._emit_text(self._consume(position))
        self._consume(len(tag))
        if not tag:
            return False
        if tag == self.call_tag:
            self._state = self.after_call_tag
        return True

    def _emit_text(self, text: str) -> None:
        """Emit text. White space at its end is held back, because white space before and between
        calls belongs to the notation of calls."""
        text = self._held_space + text
        stripped = text.rstrip()
        self._held_space = text[len(stripped) :]
        self._deltas.append(TextDelta(stripped))

    def _emit_call(self, name: str, id: str | None = None) -> None:
        self._deltas.append(CallDelta(self.call_count, id or self._new_id(self._id_prefix), name))
        self._held_space = ""
        self.call_count += 1

    def _emit_arguments(self, arguments: str) -> None:
        self._deltas.append(CallDelta(self.call_count - 1, arguments=arguments))

    def _find_tag(self, tags: Sequence[str], *, at_end: bool) -> tuple[int, str]:
        """The position of the first tag in the buffer, and the tag. If the buffer has no tag: the
        length of the text that cannot belong to a tag, and ""."""
        tag_positions = [(self._buffer.find(tag), tag) for tag in tags]
        first_tag = min((pair for pair in tag_positions if pair[0] >= 0), default=None)
        if first_tag is not None:
            return first_tag
        return len(self._buffer) - (0 if at_end else partial_tag_length(self._buffer, tags)), ""

    def _consume(self, length: int) -> str:
        """Remove and return the first ``length`` characters of the buffer."""
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = merge_deltas(self._deltas), []
        return deltas


def partial_tag_length(text: str, tags: Iterable[str]) -> int:
    """The number of characters at the end of a text that may be the beginning of a tag."""
    lengths = (
        length
        for tag in tags
        for length in range(min(len(tag) - 1, len(text)), 0, -1)
        if text.endswith(tag[:length])
    )
    return max(lengths, default=0)


def merge_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """Join neighbouring deltas of text, and of the arguments of one call, and drop empty deltas."""
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if isinstance(delta, TextDelta):
            if not delta.text:
                continue
            if isinstance(last, TextDelta):
                merged[-1] = TextDelta(last.text + delta.text)
                continue
        elif delta.name is None:
            if not delta.arguments:
                continue
            if isinstance(last, CallDelta) and last.name is None and last.index == delta.index:
                merged[-1] = replace(last, arguments=last.arguments + delta.arguments)
                continue
        merged.append(delta)
    return merged


def join_deltas(deltas: Iterable[Delta]) -> list[str | Call]:
    """The texts and calls of a complete answer, in the order of the answer."""
    segments: list[str | Call] = []
    for delta in merge_deltas(deltas):
        last = segments[-1] if segments else None
        if isinstance(delta, TextDelta):
            segments.append(delta.text)
        elif delta.name is not None:
            segments.append(Call(delta.id or "", delta.name, delta.arguments))
        elif isinstance(last, Call):
            segments[-1] = replace(last, arguments=last.arguments + delta.arguments)
    return segments
