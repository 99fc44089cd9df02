"""Detokenise a stream of tokens. Text is returned as soon as it is certain: never half a character,
and no text that may become a stop string.

A token is a few bytes, and a character may need several tokens. Until all of them have arrived,
the decoded text ends in the replacement character U+FFFD. Text whose end is the beginning of a stop
string is held back until the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

#: the character that decoding shows for a byte without a complete character, and how many of these
#: at the end of a text may still become one: a character has at most four bytes
UNKNOWN, MAX_INCOMPLETE = "\ufffd", 3

#: number of prompt tokens that are decoded together with the answer, because some tokenizers
#: drop a space at the beginning of a text
CONTEXT_TOKENS = 6


class Detokenizer:
    """Decodes with one tokenizer, and caches the texts of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        # the backend of a fast tokenizer decodes without the layers of Python around it
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode: Callable[..., str] = decode if backend is None else backend.decode
        #: the text of a token id; special tokens have their names, parts of a character U+FFFD
        self.text: Callable[[int], str] = cache(
            lambda token: decode([token], skip_special_tokens=False)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._decode(list(ids), skip_special_tokens=True)


class Text:
    """The text of one answer, built token by token.

    Args:
        prompt: the token ids of the prompt.
        stop: strings that end the answer.
        shown_special_tokens: texts, by id, of the special tokens that appear in the answer's text.

    Attributes:
        stopped_by: the stop string that ended the answer.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        shown_special_tokens: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer, self._stop = detokenizer, tuple(word for word in stop if word)
        self._shown_special_tokens = shown_special_tokens or {}
        self.stopped_by: str | None = None
        # a few tokens of context, then new tokens: all are decoded again with each new token
        self._ids = _context_of(detokenizer, prompt)
        self._context_count = len(self._ids)
        # the text of ``_ids``, as far as it was returned or precedes the answer
        self._returned_text = detokenizer.decode(self._ids)
        self._held_text = ""  # decoded text that may be the beginning of a stop string

    def add(self, token: int, *, watched: bool = True) -> tuple[str, bool]:
        """Add a token. Returns the text that is certain now, and whether a stop string ended it.
        Only the text of ``watched`` tokens is searched for stop strings."""
        if token in self._shown_special_tokens:
            new_text = self._decode_certain(is_final=True) + self._shown_special_tokens[token]
            self._ids, self._context_count, self._returned_text = [], 0, ""
        else:
            self._ids.append(token)
            new_text = self._decode_certain(is_final=False)
        return self._hold_back(new_text, is_final=False) if watched else (new_text, False)

    def end(self) -> str:
        """Return the text that was held back, because no token follows: incomplete characters and
        beginnings of stop strings."""
        return self._hold_back(self._decode_certain(is_final=True), is_final=True)[0]

    def _decode_certain(self, *, is_final: bool) -> str:
        """The text that the current tokens add. An incomplete character at its end is left out,
        unless ``is_final``: then no token follows that could complete it."""
        full_text = self._detokenizer.decode(self._ids)
        if not full_text.startswith(self._returned_text):
            # A decoder with byte fallback shows each byte of a run of byte tokens as unknown, also
            # the bytes of the context, until the run is valid. Decode the new tokens alone.
            del self._ids[: self._context_count]
            self._context_count, self._returned_text = 0, ""
            full_text = self._detokenizer.decode(self._ids)
        new_text = full_text[len(self._returned_text) :]
        unknown_count = len(new_text) - len(new_text.rstrip(UNKNOWN))
        incomplete = 0 if is_final else min(unknown_count, MAX_INCOMPLETE)
        if new_text and not incomplete:  # these tokens become the context of the next ones
            del self._ids[: self._context_count]
            self._context_count = len(self._ids)
            self._returned_text = self._detokenizer.decode(self._ids)
            return new_text
        self._returned_text = full_text[: len(full_text) - incomplete]
        return new_text[: len(new_text) - incomplete]

    def _hold_back(self, new_text: str, *, is_final: bool) -> tuple[str, bool]:
        """Return the certain part of the held text and ``new_text``, and whether a stop string
        ended it."""
        if not self._stop:
            return new_text, False
        text = self._held_text + new_text
        stop_position = min(
            (position for position in map(text.find, self._stop) if position >= 0), default=-1
        )
        if stop_position >= 0:
            stop_words = (word for word in self._stop if text.startswith(word, stop_position))
            self.stopped_by = next(stop_words)
            return text[:stop_position], True
        # hold back an end of the text that is the beginning of a stop string
        lengths = (
            length
            for word in self._stop
            for length in range(min(len(word), len(text) + 1))
            if text.endswith(word[:length])
        )
        held_length = 0 if is_final else max(lengths)
        self._held_text = text[len(text) - held_length :]
        return text[: len(text) - held_length], False


def _context_of(detokenizer: Detokenizer, prompt: Sequence[int]) -> list[int]:
    """The last ``CONTEXT_TOKENS`` tokens of a prompt, or a few more if the first of them lies
    within a character: a decoder with byte fallback would show all bytes next to it as unknown.
    [] if the prompt itself ends within a character, which the answer must not contain."""
    counts = range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_INCOMPLETE + 1)
    contexts = (list(prompt[-count:]) for count in counts)
    return next((ids for ids in contexts if not detokenizer.decode(ids).endswith(UNKNOWN)), [])
