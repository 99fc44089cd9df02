"""Parse an answer into text and tool calls while the model writes it. Each piece of text or of a
call (a delta) is returned as soon as later text cannot change it.

    parser.feed("Let me see. <tool_c")   → TextDelta("Let me see.")
    parser.feed('all>{"name": "f", ')    → CallDelta(0, id="call_1f…", name="f")
    parser.feed('"arguments": {"a": ')   → CallDelta(0, arguments='{"a": ')

If a notation has JSON arguments, the arguments of a call are the model's text, unchanged, so they
may be invalid JSON. Arguments in another notation are converted to JSON. If the answer ends within
a call, its arguments may be incomplete.
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
    """A piece of the answer's text that is outside of calls."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of the call with the number ``index``, from 0 on. The first piece of a call has
    ``id`` and ``name``. In later pieces both are None, and ``arguments`` continues the
    arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Call:
    """A complete call. ``arguments`` is the JSON text of an object, unless the model wrote invalid
    JSON or the answer ended within the call."""

    id: str
    name: str
    arguments: str


Delta = TextDelta | CallDelta
#: a function that makes a new call id from the id's prefix
NewId = Callable[[str], str]


def random_id(prefix: str) -> str:
    """A new id of a call or another object: ``prefix``, "_" and 24 random hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


def short_id(prefix: str) -> str:
    """A random call id of nine letters and digits, as Mistral's chat templates demand. ``prefix``
    is ignored, because an id with a prefix would be too long."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class CallParser:
    """The base class of parsers. An instance parses one answer.

    A parser is a state machine. A subclass has a method ``_step_STATE`` for each of its states. The
    method parses the beginning of ``_buffer``, the text that is not parsed yet. It passes text to
    ``_emit_text``, the name of a call to ``_emit_call``, and arguments to ``_emit_arguments``.

    Args:
        parameter_schemas: for each tool's name, the JSON schema of its parameters; only needed for
            notations in which arguments are not JSON.
        id_prefix: the beginning of the ids of calls.
        new_id: a function that makes a call's id from the prefix; None takes the class's function.
    """

    #: tags that are special tokens in some tokenizers. Decoding must not leave them out of the
    #: answer's text, because the parser finds calls by them.
    markers: ClassVar[tuple[str, ...]] = ()
    new_id: ClassVar[NewId] = staticmethod(random_id)
    first_state: ClassVar[str] = "text"
    #: the tag that ends a text and begins a call, and the state after this tag. "": no tag ends a
    #: text, so the rest of the answer is text.
    call_tag: ClassVar[str] = ""
    state_after_call_tag: ClassVar[str]
    #: other tags that may occur in a text; they are removed from the answer
    other_tags: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        parameter_schemas: Mapping[str, Mapping[str, Any]] | None = None,
        id_prefix: str = "call",
        new_id: NewId | None = None,
    ) -> None:
        self._parameter_schemas, self._id_prefix = parameter_schemas or {}, id_prefix
        self._new_id = new_id or type(self).new_id
        self._buffer, self._held_whitespace, self._state = "", "", self.first_state
        self._deltas: list[Delta] = []
        self.call_count = 0  # number of calls that have begun

    def feed(self, text: str) -> list[Delta]:
        """Add ``text`` to the answer; return the deltas that later text cannot change."""
        self._buffer += text
        while self._step(at_end=False):
            pass
        return self._take_deltas()

    def end(self) -> list[Delta]:
        """Return the remaining deltas. Call this once, when the answer has ended."""
        while self._step(at_end=True):
            pass
        if not self.call_count:
            self._deltas.append(TextDelta(self._held_whitespace))
        self._held_whitespace = ""
        return self._take_deltas()

    def finish_reason(self, engine_reason: str | None) -> str | None:
        """The ``finish_reason`` of OpenAI's API: "tool_calls" if the answer has calls and was not
        cut off, otherwise ``engine_reason``, which is why the engine ended the answer ("stop",
        "length", …), or None while the answer goes on."""
        return "tool_calls" if engine_reason == "stop" and self.call_count else engine_reason

    def _step(self, *, at_end: bool) -> bool:
        """Parse the beginning of the buffer. Return False if nothing more can be parsed until more
        text arrives. ``at_end``: the answer has ended, so all of the buffer must be parsed."""
        return getattr(self, f"_step_{self._state}")(at_end=at_end)

    def _step_text(self, *, at_end: bool) -> bool:
        """Emit the text up to the next tag and remove the tag. If it is ``call_tag``, change to the
        state ``state_after_call_tag``."""
        tags = (self.call_tag, *self.other_tags) if self.call_tag else ()
        position, tag = self._find_tag(tags, at_end=at_end)
        self._emit_text(self._consume(position))
        self._consume(len(tag))
        if not tag:
            return False
        if tag == self.call_tag:
            self._state = self.state_after_call_tag
        return True

    def _emit_text(self, text: str) -> None:
        """Emit text. White space at its end is held back until more text follows. If a call follows
        instead, this white space belongs to the notation of calls, so it is dropped."""
        text = self._held_whitespace + text
        stripped_text = text.rstrip()
        self._held_whitespace = text[len(stripped_text) :]
        self._deltas.append(TextDelta(stripped_text))

    def _emit_call(self, name: str, id: str | None = None) -> None:
        """Begin a new call. ``id``: the id that the model wrote; None makes a new one."""
        self._deltas.append(CallDelta(self.call_count, id or self._new_id(self._id_prefix), name))
        self._held_whitespace = ""
        self.call_count += 1

    def _emit_arguments(self, arguments: str) -> None:
        """Add text to the arguments of the last call."""
        self._deltas.append(CallDelta(self.call_count - 1, arguments=arguments))

    def _find_tag(self, tags: Sequence[str], *, at_end: bool) -> tuple[int, str]:
        """The position of the first of ``tags`` in the buffer, and this tag. If the buffer has none
        of them: how many characters of the buffer cannot belong to a tag that is incomplete yet,
        and ""."""
        matches = [(self._buffer.find(tag), tag) for tag in tags]
        first_match = min((pair for pair in matches if pair[0] >= 0), default=None)
        if first_match is not None:
            return first_match
        return len(self._buffer) - (0 if at_end else partial_tag_length(self._buffer, tags)), ""

    def _consume(self, length: int) -> str:
        """Remove and return the first ``length`` characters of the buffer."""
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = merge_deltas(self._deltas), []
        return deltas


def partial_tag_length(text: str, tags: Iterable[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of one of ``tags``, whose
    rest has not arrived yet; 0 if none."""
    lengths = (
        length
        for tag in tags
        for length in range(min(len(tag) - 1, len(text)), 0, -1)
        if text.endswith(tag[:length])
    )
    return max(lengths, default=0)


def merge_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """Join each two neighbouring deltas if both are text, or both are arguments of the same call,
    and drop empty deltas."""
    merged_deltas: list[Delta] = []
    filled_deltas = (
        delta
        for delta in deltas
        if (delta.text if isinstance(delta, TextDelta) else delta.name or delta.arguments)
    )
    for delta in filled_deltas:
        last_delta = merged_deltas[-1] if merged_deltas else None
        if isinstance(delta, TextDelta) and isinstance(last_delta, TextDelta):
            merged_deltas[-1] = TextDelta(last_delta.text + delta.text)
        elif (
            isinstance(delta, CallDelta)
            and isinstance(last_delta, CallDelta)
            and delta.name is last_delta.name is None
            and delta.index == last_delta.index
        ):
            arguments = last_delta.arguments + delta.arguments
            merged_deltas[-1] = replace(last_delta, arguments=arguments)
        else:
            merged_deltas.append(delta)
    return merged_deltas


def join_deltas(deltas: Iterable[Delta]) -> list[str | Call]:
    """The texts and calls of a complete answer, in their order in the answer. ``deltas``: all
    deltas that the parser returned for it."""
    segments: list[str | Call] = []
    for delta in merge_deltas(deltas):
        last_segment = segments[-1] if segments else None
        if isinstance(delta, TextDelta):
            segments.append(delta.text)
        elif delta.name is not None:
            segments.append(Call(delta.id or "", delta.name, delta.arguments))
        elif isinstance(last_segment, Call):
            segments[-1] = replace(last_segment, arguments=last_segment.arguments + delta.arguments)
    return segments
