"""Constrain answers to a JSON schema, a regular expression, a list of choices or a grammar, with
llguidance.

    constraint → grammar (compiled for each answer) → matcher → the tokens that may come next

A matcher is the state of llguidance's parser for one answer. Matchers have limits, so that no
client's grammar can hold up other requests. A client whose grammar exceeds a limit gets an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.serve.requests import Grammar, GrammarLimitError, RequestError
from veneer.serve.text import Detokenizer

#: The whitespace that is allowed between the elements of a JSON text: nothing, a space, or a line
#: break with its indentation. llguidance allows any amount by default, and a small model can then
#: fill its answer with whitespace. Models were trained to write ", " and line breaks, so forbidding
#: all whitespace would change their answers.
LAYOUT: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\r?\n[ \t]{0,24}",
    "item_separator": ",",
    "key_separator": ":",
}
#: max(MIN_BLANK, n // BLANK_DIVISOR) tokens of an answer of at most n tokens may be only whitespace
BLANK_DIVISOR, MIN_BLANK = 4, 8

#: A matcher has exceeded a limit if its stop reason is one of these, or if its error message
#: matches the pattern.
LIMIT_REASONS = ("ParserTooComplex", "LexerTooComplex")
_LIMIT_MESSAGE = re.compile(
    r"max is \d|\blimit|\bfuel\b|too (?:many|large|complex|big)|exceed", re.IGNORECASE
)


class Layout:
    """Limits the whitespace of one JSON answer: at most ``max_blank`` tokens between the elements
    of the JSON text may be only whitespace. ``is_blank``: which tokens are only whitespace,
    [vocabulary] of bool. ``text_of``: gives the text of a token id."""

    def __init__(self, is_blank: Tensor, text_of: Callable[[int], str], max_blank: int) -> None:
        self.is_blank, self._text_of, self._max_blank = is_blank, text_of, max_blank
        self._in_string = self._escaped = False
        self._blank_count = 0

    def accept(self, token: int) -> None:
        """Count the next ``token`` of the answer, if it is only whitespace outside of JSON strings.
        Call this for all tokens, in order, so that the beginnings and ends of strings are
        tracked."""
        if not self._in_string and token < len(self.is_blank) and self.is_blank[token]:
            self._blank_count += 1
        for char in self._text_of(token):
            if self._escaped:
                self._escaped = False
            elif char == '"':
                self._in_string = not self._in_string
            else:
                self._escaped = self._in_string and char == "\\"

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached, so that the next token must not be only whitespace. The
        answer can go on without whitespace, since JSON requires it nowhere."""
        return not self._in_string and self._blank_count >= self._max_blank


class MatcherFactory:
    """Makes matchers of schemas and grammars for one tokenizer. ``logit_count``: the number of the
    model's logits. ``eos_ids``: the ids of the tokens that end a text."""

    def __init__(self, tokenizer: Any, logit_count: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._logit_count, self._eos_ids = tokenizer, logit_count, list(eos_ids)
        self._ll_tokenizer: Any = None
        # which tokens are whitespace alone, and a function that gives the text of a token
        self._layout_arguments: tuple[Tensor, Callable[[int], str]] | None = None

    def layout(self, max_tokens: int) -> Layout:
        """A ``Layout``, which limits the whitespace of an answer of at most ``max_tokens``
        tokens."""
        if self._layout_arguments is None:
            text_of = Detokenizer(self._tokenizer).text
            are_blank = [text_of(token).isspace() for token in range(len(self._tokenizer))]
            self._layout_arguments = torch.tensor(are_blank[: self._logit_count]), text_of
        return Layout(*self._layout_arguments, max(MIN_BLANK, max_tokens // BLANK_DIVISOR))

    def matcher(self, constraint: Mapping[str, Any] | Grammar) -> Any:
        """A new matcher (the state of llguidance's parser) for one answer. Making one takes some
        milliseconds, the first one about a second. ``RequestError``: llguidance does not understand
        the schema or grammar, does not support the tokenizer, or is not installed."""
        # "lark" grammars are written by the server from the schemas of tools: errors say "schema"
        is_grammar = isinstance(constraint, Grammar) and constraint.kind != "lark"
        constraint_noun = "a grammar" if is_grammar else "a schema"
        try:
            import llguidance.hf
        except ImportError as error:
            raise RequestError(
                f"{constraint_noun}, and no llguidance",
                "the library that keeps answers to schemas",
                "pip install 'veneer[serve]'",
            ) from error
        if self._ll_tokenizer is None:
            advice = "ask without a schema"
            if not self._eos_ids:
                raise RequestError(
                    "a base without an end-of-text token",
                    "one, to end what a schema describes",
                    advice,
                )
            try:
                self._ll_tokenizer = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._logit_count, eos_token=self._eos_ids
                )
            except Exception as error:
                raise RequestError(
                    f"a {type(self._tokenizer).__name__} that llguidance does not read ({error})",
                    "a fast tokenizer",
                    advice,
                ) from error
        try:
            if isinstance(constraint, Grammar):
                compiled_grammar = llguidance.grammar_from(constraint.kind, constraint.text)
            else:
                compiled_grammar = llguidance.LLMatcher.grammar_from_json_schema(
                    json.dumps(constraint), overrides=LAYOUT
                )
        except (TypeError, ValueError, RecursionError) as error:
            raise _bad_grammar(constraint_noun, "that is not understood", error) from error
        matcher = llguidance.LLMatcher(self._ll_tokenizer, compiled_grammar, log_level=0)
        if matcher.is_error():
            raise error_of(matcher, "that is not understood", constraint_noun)
        return matcher


def allowed_tokens(matcher: Any, logits: Tensor) -> Tensor:
    """The tokens that a grammar allows next, [vocabulary] of bool, with the size and on the device
    of ``logits``. ``RequestError``: the grammar allows no continuation, or exceeds
    the limits of llguidance."""
    bitmask = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    if matcher.is_error():
        raise error_of(matcher, "that an answer cannot follow")
    bit_positions, logit_count = torch.arange(8, dtype=torch.uint8), logits.shape[-1]
    allowed = ((bitmask[:, None] >> bit_positions) & 1).bool().view(-1)[:logit_count]
    # a model may have more logits than its tokenizer has tokens
    return F.pad(allowed, (0, logit_count - len(allowed))).to(logits.device)


def error_of(matcher: Any, problem: str, noun: str = "a schema") -> RequestError:
    """The error to raise for a matcher that has failed. ``noun``: what the message calls the
    constraint. ``problem``: what the message says of it, unless the matcher exceeded a limit."""
    reason = matcher.get_error().partition("\n")[0][:500]
    if matcher.stop_reason() in LIMIT_REASONS or _LIMIT_MESSAGE.search(reason):
        return GrammarLimitError(
            f"{noun} that needs more than the limits of its matcher ({reason})",
            "one within llguidance's limits",
            "simplify it",
        )
    return _bad_grammar(noun, problem, reason)


def _bad_grammar(noun: str, problem: str, reason: Any) -> RequestError:
    return RequestError(
        f"{noun} {problem} ({str(reason)[:500]})",
        f"{noun.replace('a schema', 'a JSON schema')} of what llguidance supports",
        "simplify it",
    )
