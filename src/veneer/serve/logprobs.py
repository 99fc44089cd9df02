"""Write the log-probabilities of tokens in the formats of OpenAI's API. The text of a token that is
a part of a character has its bytes as surrogates (``Detokenizer.text``); no answer shows these."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from veneer.serve.requests import Token

#: the maximal number of characters between the texts of two tokens in `token_offsets`
MAX_SKIPPED = 8

#: (token id, token text) → the text that an answer shows for the token
TokenNamer = Callable[[int, str], str]


def token_bytes(text: str) -> bytes:
    """The bytes of a token, from its text."""
    return text.encode("utf-8", "surrogateescape")


def shown_text(text: str) -> str:
    """How an answer shows the text of a token: a token that is a part of a character as OpenAI's
    API does, "bytes:\\xf0\\x9f"."""
    raw = token_bytes(text)
    is_whole = raw == text.encode(errors="replace")
    return text if is_whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def json_logprob(logprob: float | None) -> float:
    """A log-probability for JSON, which has no infinity. None (unknown) and values below -9999,
    such as that of probability 0, give -9999, as in OpenAI's API."""
    return -9999.0 if logprob is None or not logprob > -9999.0 else logprob


def token_offsets(text: str, tokens: Sequence[Token], start: int) -> list[int]:
    """Where ``tokens`` begin, in characters. A token without a text of its own (a special token,
    the first part of a character) begins where the next one does. Characters that are no token's
    text are skipped: the tokenizer may normalise a prompt, and a token's text may come late.

    Args:
        text: the text by which an answer grew with these tokens.
        start: the number of characters before it.
    """
    offsets, position = [], 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        characters = decoder.decode(token_bytes(token.text))
        if not text.startswith(characters, position):
            characters = characters.removeprefix(" ")  # SentencePiece omits a text's first space
        begin = text.find(characters, position, position + len(characters) + MAX_SKIPPED)
        offsets.append(start + max(begin, position))
        position = position if begin < 0 else begin + len(characters)
    return offsets


def chat_logprobs(tokens: Sequence[Token], token_name: TokenNamer) -> list[dict[str, Any]]:
    """Log-probabilities in the format of chats. ``token_name`` gives the shown text of a token."""

    def entry(id: int, text: str, logprob: float | None) -> dict[str, Any]:
        fields = {"token": token_name(id, text), "logprob": json_logprob(logprob)}
        return {**fields, "bytes": list(token_bytes(text))}

    return [
        {
            **entry(token.id, token.text, token.logprob),
            "top_logprobs": [entry(*alternative) for alternative in token.top],
        }
        for token in tokens
    ]


def text_logprobs(
    tokens: Sequence[Token],
    offsets: Sequence[int],
    alternative_count: int,
    token_name: TokenNamer,
) -> dict[str, Any]:
    """Log-probabilities in the format of completions, with ``alternative_count`` alternatives for
    each token, and the token itself if it is none of them. ``offsets``: where the tokens begin in
    the text."""
    alternatives: list[dict[str, float] | None] = []
    for token in tokens:
        logprobs: dict[str, float] = {}
        # of two tokens with equal text, keep the more likely one
        for id, text, logprob in token.top[:alternative_count]:
            logprobs.setdefault(token_name(id, text), json_logprob(logprob))
        logprobs.setdefault(token_name(token.id, token.text), json_logprob(token.logprob))
        alternatives.append(None if token.logprob is None else logprobs)
    return {
        "tokens": [token_name(token.id, token.text) for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else json_logprob(token.logprob) for token in tokens
        ],
        "top_logprobs": alternatives,
        "text_offset": [*offsets],
    }
