"""Detokenise a stream: give out text as soon as it is certain, never half a character and nothing
that may become a stop string.

A token is a few bytes, and a character may need several tokens: until all have arrived, decoding
ends in the replacement character U+FFFD. A text that ends in the first letters of a stop string is
held back until the next token decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

#: how decoding shows bytes that are no character (yet). At most three bytes of a character can wait
#: for its last byte
UNKNOWN, MOST = "\ufffd", 3

#: the number of prompt tokens that are decoded together with the answer, because some tokenizers
#: drop a space at the beginning of a text
BEFORE = 6


class Detokenizer:
    """Decoding with one tokenizer; the texts of single tokens are cached."""

    def __init__(self, tokenizer: Any) -> None:
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        backend = getattr(
            tokenizer, "backend_tokenizer", None
        )  # a fast one, without the layers of Python around it
        self._decode: Callable[..., str] = decode if backend is None else backend.decode
        #: the text of one token, special tokens by name; U+FFFD for a part of a character
        self.text: Callable[[int], str] = cache(
            lambda token: decode([token], skip_special_tokens=False)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._decode(list(ids), skip_special_tokens=True)


class Text:
    """The text of one answer to the token ids ``prompt``, which the strings ``stop`` end.
    ``markers``: special tokens, by id, whose text is a part of it. ``stopped_by`` is the stop
    string that ended it."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        markers: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer, self._stop = detokenizer, tuple(word for word in stop if word)
        self._markers = markers or {}
        self.stopped_by: str | None = None
        self._ids = list(
            prompt[-BEFORE:]
        )  # decoded with each new token: a few tokens of context, then new tokens
        self._context = len(self._ids)
        self._shown = detokenizer.decode(self._ids)  # the part of their text that was given out
        self._held = ""  # decoded text that may be the beginning of a stop string
        if self._shown.endswith(
            UNKNOWN
        ):  # the prompt ends within a character: do not begin the answer with the rest of it
            self._ids, self._context, self._shown = [], 0, ""

    def add(self, token: int, *, watched: bool = True) -> tuple[str, bool]:
        """Add a token; return the text that is certain now, and whether a stop string ends it. Only
        text of ``watched`` tokens is searched for stop strings."""
        if token in self._markers:
            new = self._decode_certain(final=True) + self._markers[token]
            self._ids, self._context, self._shown = [], 0, ""
            return self._give(new, final=False) if watched else (new, False)
        self._ids.append(token)
        new = self._decode_certain(final=False)
        return self._give(new, final=False) if watched else (new, False)

    def end(self) -> str:
        """The rest of the text once no token follows, including incomplete characters and
        beginnings of stop strings."""
        return self._give(self._decode_certain(final=True), final=True)[0]

    def _decode_certain(self, *, final: bool) -> str:
        """The new text of the current tokens, without an incomplete character at its end."""
        full_text, shown = self._detokenizer.decode(self._ids), self._shown
        out = len(shown)
        if not full_text.startswith(
            shown
        ):  # the following bytes changed how earlier incomplete bytes are decoded
            out = next(
                (i for i, (a, b) in enumerate(zip(full_text, shown, strict=False)) if a != b),
                len(full_text),
            )
        new = full_text[out:]
        waiting = 0 if final else min(len(new) - len(new.rstrip(UNKNOWN)), MOST)
        if new and not waiting:  # these tokens become the context of the next ones
            del self._ids[: self._context]
            self._context = len(self._ids)
            self._shown = self._detokenizer.decode(self._ids)
            return new
        self._shown = full_text[: len(full_text) - waiting]
        return new[: len(new) - waiting]

    def _give(self, new: str, *, final: bool) -> tuple[str, bool]:
        """Give out what is certain of the held text followed by ``new``."""
        if not self._stop:
            return new, False
        text = self._held + new
        stop_position = min(
            (position for position in map(text.find, self._stop) if position >= 0), default=-1
        )
        if stop_position >= 0:
            ends = (word for word in self._stop if text.startswith(word, stop_position))
            self.stopped_by = next(ends)
            return text[:stop_position], True
        # hold back letters at the end with which a stop string begins
        sizes = (
            n
            for word in self._stop
            for n in range(min(len(word), len(text) + 1))
            if text.endswith(word[:n])
        )
        keep = 0 if final else max(sizes)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
