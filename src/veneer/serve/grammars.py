"""Forms that answers follow, by llguidance: JSON schemas, regular expressions, choices, grammars.

    form → grammar (compiled once a request) → matcher → the tokens that may come next

A matcher has limits, so that no client's grammar can hold up the others. A grammar that needs more
than these is its client's, and is told so.
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

#: The whitespace that a schema allows between two parts of a JSON text: nothing, a space, or a line
#: break with its indentation. llguidance's default is any amount, and a small model that has
#: nothing else to say fills its answer with it. None at all would forbid the ", " and the line
#: breaks that models were trained to write.
LAYOUT: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\r?\n[ \t]{0,24}",
    "item_separator": ",",
    "key_separator": ":",
}
#: of an answer's tokens, the share that may be such whitespace and nothing else; and so many in any
SHARE, FEWEST = 4, 8

#: why a matcher stops at one of its limits, and the words of llguidance where it says no more
STOPPED = ("ParserTooComplex", "LexerTooComplex")
_LIMIT = re.compile(
    r"max is \d|\blimit|\bfuel\b|too (?:many|large|complex|big)|exceed", re.IGNORECASE
)


class Layout:
    """Ends the whitespace of one JSON answer, of which tokens between its parts may be ``most``.
    ``blank``: the tokens that are nothing else, [vocabulary] of bool."""

    def __init__(self, blank: Tensor, text_of: Callable[[int], str], most: int) -> None:
        self.blank, self._text_of, self._most = blank, text_of, most
        self._in_string = self._escaped = False
        self._count = 0

    def accept(self, token: int) -> None:
        """Go on behind a token of a text that is JSON so far."""
        if not self._in_string and token < len(self.blank) and self.blank[token]:
            self._count += 1
        for char in self._text_of(token):
            if self._escaped:
                self._escaped = False
            elif char == '"':
                self._in_string = not self._in_string
            else:
                self._escaped = self._in_string and char == "\\"

    @property
    def full(self) -> bool:
        """Whether no more whitespace may come here. It is nowhere required."""
        return not self._in_string and self._count >= self._most


class Schemas:
    """Matchers of grammars for one tokenizer. ``vocabulary`` is the number of logits, ``eos`` the
    tokens that end a text."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._ll_tokenizer: Any = None
        # which tokens are whitespace alone, and the text of each
        self._texts: tuple[Tensor, Callable[[int], str]] | None = None

    def layout(self, max_tokens: int) -> Layout:
        """A bound on the whitespace of an answer of at most so many tokens."""
        if self._texts is None:
            text_of = Detokenizer(self._tokenizer).text
            spaces = [text_of(token).isspace() for token in range(len(self._tokenizer))]
            self._texts = torch.tensor(spaces[: self._vocabulary]), text_of
        return Layout(*self._texts, max(FEWEST, max_tokens // SHARE))

    def matcher(self, schema: Mapping[str, Any] | Grammar) -> Any:
        """A new matcher; it takes some milliseconds, and about a second for the first one.
        ``RequestError``: a schema or grammar that is not understood, a tokenizer of another kind,
        or llguidance is not installed."""
        is_grammar = isinstance(schema, Grammar) and schema.kind != "lark"  # of tools' schemas
        noun = "a grammar" if is_grammar else "a schema"
        try:
            import llguidance.hf
        except ImportError as error:
            expected = "the library that keeps answers to schemas"
            raise RequestError(
                f"{noun}, and no llguidance", expected, "pip install 'veneer[serve]'"
            ) from error
        if self._ll_tokenizer is None:
            do = "ask without a schema"
            if not self._eos:
                raise RequestError(
                    "a base without an end-of-text token", "one, to end what a schema describes", do
                )
            try:
                self._ll_tokenizer = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocabulary, eos_token=self._eos
                )
            except Exception as error:
                problem = (
                    f"a {type(self._tokenizer).__name__} that llguidance does not read ({error})"
                )
                raise RequestError(problem, "a fast tokenizer", do) from error
        try:
            if isinstance(schema, Grammar):
                compiled = llguidance.grammar_from(schema.kind, schema.text)
            else:
                compiled = llguidance.LLMatcher.grammar_from_json_schema(
                    json.dumps(schema), overrides=LAYOUT
                )
        except (TypeError, ValueError, RecursionError) as error:
            raise _bad_grammar(noun, "that is not understood", error) from error
        matcher = llguidance.LLMatcher(self._ll_tokenizer, compiled, log_level=0)
        if matcher.is_error():
            raise error_of(matcher, "that is not understood", noun)
        return matcher


def allowed_tokens(matcher: Any, logits: Tensor) -> Tensor:
    """Which tokens a grammar allows next, [vocabulary] of bool. ``RequestError``: it goes no
    further."""
    bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    if matcher.is_error():
        raise error_of(matcher, "that an answer cannot follow")
    bit_positions, size = torch.arange(8, dtype=torch.uint8), logits.shape[-1]
    allowed = ((bits[:, None] >> bit_positions) & 1).bool().view(-1)[:size]
    return F.pad(allowed, (0, size - len(allowed))).to(
        logits.device
    )  # there may be logits of no token


def error_of(matcher: Any, problem: str, noun: str = "a schema") -> RequestError:
    """The error of a matcher that has stopped with one."""
    why = matcher.get_error().partition("\n")[0][:500]
    if matcher.stop_reason() in STOPPED or _LIMIT.search(why):
        excess = f"{noun} that needs more than the limits of its matcher ({why})"
        return GrammarLimitError(excess, "one within llguidance's limits", "simplify it")
    return _bad_grammar(noun, problem, why)


def _bad_grammar(noun: str, problem: str, why: Any) -> RequestError:
    expected = f"{noun.replace('a schema', 'a JSON schema')} of what llguidance supports"
    return RequestError(f"{noun} {problem} ({str(why)[:500]})", expected, "simplify it")
