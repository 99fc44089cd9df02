"""Text and tool calls of an answer, given out as soon as they are certain while the model writes.

    parser.feed("Let me see. <tool_c")   → TextDelta("Let me see.")
    parser.feed('all>{"name": "f", ')    → CallDelta(0, id="call_1f…", name="f")
    parser.feed('"arguments": {"a": ')   → CallDelta(0, arguments='{"a": ')

Arguments are the model's text, unchanged: if a call is cut off, so are its arguments.
"""

from __future__ import annotations

import secrets
import string
from abc import ABC, abstractmethod
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
    """The beginning of call number ``index``, which has its ``id`` and ``name``, or more of its
    arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Call:
    """A complete call; ``arguments`` is the text that the model wrote, JSON if it wrote JSON."""

    id: str
    name: str
    arguments: str


Delta = TextDelta | CallDelta
NewId = Callable[[str], str]


def call_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def short_id(prefix: str) -> str:
    """An id as Mistral's templates demand it: nine letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class CallParser(ABC):
    """A parser of one answer. ``parameters``: the JSON schemas of the tools' parameters, by name;
    ``prefix``: how the ids of calls begin; ``new_id`` makes an id from it instead of the class's
    function.

    A subclass reads ``_buffer`` in ``_step``, and gives text to ``_say`` and calls to ``_begin``
    and ``_add``."""

    #: special tokens whose text the parser needs
    markers: ClassVar[tuple[str, ...]] = ()
    new_id: ClassVar[NewId] = staticmethod(call_id)

    def __init__(
        self,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        prefix: str = "call",
        new_id: NewId | None = None,
    ) -> None:
        self._parameters, self._prefix = parameters or {}, prefix
        self._new_id = new_id or type(self).new_id
        self._buffer, self._blank = "", ""
        self._deltas: list[Delta] = []
        self.calls = 0

    def feed(self, text: str) -> list[Delta]:
        """Add text, and return the deltas that it makes certain."""
        self._buffer += text
        while self._step(final=False):
            pass
        return self._take()

    def end(self) -> list[Delta]:
        """Return the remaining deltas; no text follows."""
        while self._step(final=True):
            pass
        if not self.calls:
            self._deltas.append(TextDelta(self._blank))
        self._blank = ""
        return self._take()

    def finish(self, finish: str | None) -> str | None:
        """OpenAI's ``finish_reason`` for the engine's reason ``finish``."""
        return "tool_calls" if finish == "stop" and self.calls else finish

    @abstractmethod
    def _step(self, *, final: bool) -> bool:
        """Read a part of the buffer. Returns False if nothing more can be read before further text
        comes; with ``final`` no text follows, and the buffer is empty then."""

    def _say(self, text: str) -> None:
        """Give out text. White space at its end is held back: before and between calls it belongs
        to their notation."""
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        self._deltas.append(TextDelta(shown))

    def _begin(self, name: str, id: str | None = None) -> None:
        self._deltas.append(CallDelta(self.calls, id or self._new_id(self._prefix), name))
        self._blank = ""
        self.calls += 1

    def _add(self, arguments: str) -> None:
        self._deltas.append(CallDelta(self.calls - 1, arguments=arguments))

    def _find(self, tags: Sequence[str], *, final: bool) -> tuple[int, str]:
        """The position of the first tag in the buffer, and the tag. If there is none, the length of
        the text that cannot belong to a tag, and ""."""
        positions = [(self._buffer.find(tag), tag) for tag in tags]
        first = min((pair for pair in positions if pair[0] >= 0), default=None)
        if first is not None:
            return first
        return len(self._buffer) - (0 if final else held_length(self._buffer, tags)), ""

    def _drop(self, length: int) -> str:
        """Remove and return the first ``length`` characters of the buffer."""
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _take(self) -> list[Delta]:
        deltas, self._deltas = merge(self._deltas), []
        return deltas


def held_length(text: str, tags: Iterable[str]) -> int:
    """The length of the end of a text that may be the beginning of a tag."""
    lengths = (
        length
        for tag in tags
        for length in range(min(len(tag) - 1, len(text)), 0, -1)
        if text.endswith(tag[:length])
    )
    return max(lengths, default=0)


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """Join neighbouring deltas of text, or of the arguments of one call, and drop empty ones."""
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
    """The texts and the calls of a complete answer, in their order."""
    texts: list[str | Call] = []
    for delta in deltas:
        last = texts[-1] if texts else None
        if isinstance(delta, TextDelta):
            if isinstance(last, str):
                texts[-1] = last + delta.text
            else:
                texts.append(delta.text)
        elif delta.name is not None:
            texts.append(Call(delta.id or "", delta.name, delta.arguments))
        elif isinstance(last, Call):
            texts[-1] = replace(last, arguments=last.arguments + delta.arguments)
    return texts
