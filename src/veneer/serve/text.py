"""Tokens → text, as it becomes certain: no half character, and nothing that may turn out to be a
stop string.

A token is a few bytes, and a character may take several tokens: until they are there, decoding
shows the replacement character U+FFFD at the end. And a text that ends in the first letters of a
stop string waits for the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

# : what decoding shows for bytes that are no character (yet); at most three bytes of one can be
# waiting for the rest
UNKNOWN, MOST = "\ufffd", 3

# : tokens of the prompt before which the answer is decoded: some tokenizers drop a space at the
# very beginning
BEFORE = 6


class Detokenizer:
    """Decoding with one tokenizer; the texts of single tokens are remembered."""

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
        """Text of ids, special tokens left out."""
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
        )  # what is decoded with each new token: a few tokens of context, then news
        self._context = len(self._ids)
        self._shown = detokenizer.decode(self._ids)  # the part of their text that is out
        self._held = ""  # text that is decoded, and may be a part of a stop string
        if self._shown.endswith(
            UNKNOWN
        ):  # the prompt ends within a character: the answer does not begin with its rest
            self._ids, self._context, self._shown = [], 0, ""

    def add(self, token: int, *, watched: bool = True) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string ends it. Stop strings are looked for
        in the text of tokens that are ``watched``."""
        if token in self._markers:
            new = self._decode_certain(final=True) + self._markers[token]
            self._ids, self._context, self._shown = [], 0, ""
            return self._give(new, final=False) if watched else (new, False)
        self._ids.append(token)
        new = self._decode_certain(final=False)
        return self._give(new, final=False) if watched else (new, False)

    def end(self) -> str:
        """The rest of the text when no token follows: also bytes that are no character, and
        beginnings of stop strings."""
        return self._give(self._decode_certain(final=True), final=True)[0]

    def _decode_certain(self, *, final: bool) -> str:
        """The text of the tokens at hand that is not out yet, without the beginning of a character
        at its end."""
        full_text, shown = self._detokenizer.decode(self._ids), self._shown
        out = len(shown)
        if not full_text.startswith(
            shown
        ):  # bytes that had been no character read otherwise with those that follow
            out = next(
                (i for i, (a, b) in enumerate(zip(full_text, shown, strict=False)) if a != b),
                len(full_text),
            )
        new = full_text[out:]
        waiting = 0 if final else min(len(new) - len(new.rstrip(UNKNOWN)), MOST)
        if new and not waiting:  # these tokens are the context of the next ones
            del self._ids[: self._context]
            self._context = len(self._ids)
            self._shown = self._detokenizer.decode(self._ids)
            return new
        self._shown = full_text[: len(full_text) - waiting]
        return new[: len(new) - waiting]

    def _give(self, new: str, *, final: bool) -> tuple[str, bool]:
        """The certain beginning of the held text and the new one."""
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
        # letters at the end of the text with which a stop string begins
        sizes = (
            n
            for word in self._stop
            for n in range(min(len(word), len(text) + 1))
            if text.endswith(word[:n])
        )
        keep = 0 if final else max(sizes)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
