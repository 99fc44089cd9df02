"""Detokenise a stream of tokens. Each text is returned as soon as no later token can change it, and
never contains half a character or the beginning of a stop string.

A token is a few bytes, and a character may need several tokens. Until all of them have arrived, the
decoded text ends in the replacement character U+FFFD, so this end is held back. If the text ends
with the beginning of a stop string, this end is held back too, until the next tokens show whether
the stop string follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

#: UNKNOWN: the character that decoding writes for a byte that is not part of a complete character.
#: MAX_INCOMPLETE: how many of them at the end of a text later tokens may still complete to a
#: character. It is 3, since a character has at most four bytes in UTF-8.
UNKNOWN, MAX_INCOMPLETE = "\ufffd", 3

#: how SentencePiece writes a space in its tokens, and a token that is a single byte
SPACE_SYMBOL, BYTE_SYMBOL = "▁", re.compile("<0x([0-9A-F]{2})>")
#: the byte for each character in the tokens of a byte-level tokenizer. Bytes that are no visible
#: characters of Latin-1 are the characters from U+0100 on.
VISIBLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHER_BYTES = sorted({*range(0x100)} - {*VISIBLE_BYTES})
BYTE_OF_CHARACTER = {chr(byte): byte for byte in VISIBLE_BYTES} | {
    chr(0x100 + index): byte for index, byte in enumerate(OTHER_BYTES)
}

#: how many tokens of the prompt are decoded before the first tokens of the answer. Without them,
#: some tokenizers would drop a space at the beginning of the answer.
CONTEXT_TOKENS = 6


class Detokenizer:
    """Decodes token ids with one tokenizer, and caches the texts of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        # the Rust backend of a fast tokenizer, because its Python wrapper would take more time
        rust_backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode: Callable[..., str] = decode if rust_backend is None else rust_backend.decode
        self._id_to_token: Callable[[int], str | None] = getattr(
            rust_backend, "id_to_token", lambda token: None
        )
        #: the text of a token id: for a special token its name, such as "<|im_end|>", and for a
        #: part of a character its bytes as surrogates (the error handler "surrogateescape")
        self.text: Callable[[int], str] = cache(self._token_text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._decode(list(ids), skip_special_tokens=True)

    def _token_text(self, token: int) -> str:
        text, symbols = self._decode([token], skip_special_tokens=False), self._id_to_token(token)
        if symbols is None or symbols == text:
            return text
        if match := BYTE_SYMBOL.fullmatch(symbols):
            return bytes.fromhex(match[1]).decode(errors="surrogateescape")
        if SPACE_SYMBOL in symbols and SPACE_SYMBOL not in text:
            return symbols.replace(SPACE_SYMBOL, " ")  # decoding drops a space at the beginning
        if UNKNOWN in text and set(symbols) <= BYTE_OF_CHARACTER.keys():
            return bytes(map(BYTE_OF_CHARACTER.__getitem__, symbols)).decode(
                errors="surrogateescape"
            )
        return text


class Text:
    """The text of one answer, built token by token.

    Args:
        prompt: the token ids of the prompt.
        stop: strings that end the answer.
        shown_special_tokens: {token id: text} of the special tokens that become part of the
            answer's text; it leaves out all others.

    Attributes:
        stopped_by: the stop string that ended the answer; None if none has.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        shown_special_tokens: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer, self._stop_strings = detokenizer, tuple(word for word in stop if word)
        self._shown_special_tokens = shown_special_tokens or {}
        self.stopped_by: str | None = None
        # a few tokens whose text was returned (the context), then the tokens after them. With each
        # new token, all of these are decoded again.
        self._ids = _context_of(detokenizer, prompt)
        self._context_count = len(self._ids)
        # the part of the text of ``_ids`` that was returned before, or belongs to the prompt
        self._returned_text = detokenizer.decode(self._ids)
        self._held_text = ""  # decoded text that may be the beginning of a stop string

    def add(self, token: int, *, watched: bool = True) -> tuple[str, bool]:
        """Add a token.

        Args:
            watched: whether the text of this token is searched for stop strings.

        Returns:
            (the new text that no later token can change, whether a stop string ended the answer)
        """
        if token in self._shown_special_tokens:
            new_text = self._decode_certain(is_final=True) + self._shown_special_tokens[token]
            self._ids, self._context_count, self._returned_text = [], 0, ""
        else:
            self._ids.append(token)
            new_text = self._decode_certain(is_final=False)
        return self._hold_back(new_text, is_final=False) if watched else (new_text, False)

    def end(self) -> str:
        """Return the text that was held back (an incomplete character, the beginning of a stop
        string), because no token follows that could change it."""
        return self._hold_back(self._decode_certain(is_final=True), is_final=True)[0]

    def _decode_certain(self, *, is_final: bool) -> str:
        """The text that the tokens since the last call add. An incomplete character at its end is
        left out, so that a later call returns it; with ``is_final``, no token follows that could
        complete it, so it is returned as U+FFFD."""
        full_text = self._detokenizer.decode(self._ids)
        if not full_text.startswith(self._returned_text):
            # A decoder with byte fallback writes U+FFFD for every byte of a run of byte tokens
            # until the run is valid UTF-8, so new bytes can change the text of bytes in the
            # context. Therefore decode the new tokens without the context.
            del self._ids[: self._context_count]
            self._context_count, self._returned_text = 0, ""
            full_text = self._detokenizer.decode(self._ids)
        new_text = full_text[len(self._returned_text) :]
        unknown_count = len(new_text) - len(new_text.rstrip(UNKNOWN))
        incomplete_count = 0 if is_final else min(unknown_count, MAX_INCOMPLETE)
        if new_text and not incomplete_count:  # the new tokens become the context of later ones
            del self._ids[: self._context_count]
            self._context_count = len(self._ids)
            self._returned_text = self._detokenizer.decode(self._ids)
            return new_text
        self._returned_text = full_text[: len(full_text) - incomplete_count]
        return new_text[: len(new_text) - incomplete_count]

    def _hold_back(self, new_text: str, *, is_final: bool) -> tuple[str, bool]:
        """Search the text that was held back, with ``new_text`` after it, for stop strings. Returns
        (the text that can be returned now, whether a stop string ended the answer). If the text
        ends with the beginning of a stop string, this end is held back unless ``is_final``."""
        if not self._stop_strings:
            return new_text, False
        text = self._held_text + new_text
        stop_position = min(
            (position for position in map(text.find, self._stop_strings) if position >= 0),
            default=-1,
        )
        if stop_position >= 0:
            found_strings = (
                stop_string
                for stop_string in self._stop_strings
                if text.startswith(stop_string, stop_position)
            )
            self.stopped_by = next(found_strings)
            return text[:stop_position], True
        # find the longest end of the text that is the beginning of a stop string, to hold it back
        matching_lengths = (
            length
            for stop_string in self._stop_strings
            for length in range(min(len(stop_string), len(text) + 1))
            if text.endswith(stop_string[:length])
        )
        held_length = 0 if is_final else max(matching_lengths)
        self._held_text = text[len(text) - held_length :]
        return text[: len(text) - held_length], False


def _context_of(detokenizer: Detokenizer, prompt: Sequence[int]) -> list[int]:
    """The tokens of a prompt to decode before those of its answer: the last ``CONTEXT_TOKENS``, or
    a few more if the first of these is in the middle of a character, because a decoder with byte
    fallback would then write U+FFFD for all bytes of the run. [] if the prompt itself ends in the
    middle of a character, since the rest of that character must not become part of the answer."""
    token_counts = range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_INCOMPLETE + 1)
    contexts = (list(prompt[-count:]) for count in token_counts)
    return next((ids for ids in contexts if not detokenizer.decode(ids).endswith(UNKNOWN)), [])
