"""The values that the API and the engine exchange, and the errors of submitting a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import AdapterError, BankFullError, SelectionError, VeneerError

#: why a request ended: at a stop string or end token, at its limit of tokens, cancelled by its
#: client, at its timeout, or by a failure
Finish = Literal["stop", "length", "cancelled", "timeout", "error"]

#: the kind of a failure whose cause is outside the server
Cause = Literal[
    "bad_adapter",
    "model_not_found",
    "out_of_memory",
    "bad_request",
    "grammar_limit",
    "no_token_left",
]


@dataclass(frozen=True)
class Grammar:
    """A form of the answer that is no JSON schema. ``text`` of a choice: its texts, as a list in
    JSON; of a grammar: GBNF or Lark; "lark" is one of the server's own."""

    kind: Literal["regex", "choice", "grammar", "lark"]
    text: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled."""

    # most tokens of the answer; the engine's ``length`` may end it before. 0: only score the prompt
    max_tokens: int
    temperature: float = 1.0  # divides the logits; 0 always takes the most likely token
    top_p: float = (
        1.0  # sample from the smallest set of tokens with this probability (after ``top_k``)
    )
    top_k: int = 0  # sample from so many most likely tokens; 0 is off
    seed: int | None = (
        None  # equal seeds give equal tokens, in float32 in any batch; None: a random seed
    )
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    #: number of alternatives returned with each sampled token; None returns no log-probabilities.
    #: They are the model's, before temperature, top_k, top_p and schema
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None  # a JSON schema that the answer follows
    ignore_eos: bool = False  # go on after the end-of-text token
    stop_tokens: frozenset[int] = frozenset()  # tokens that end the answer and are its last token
    grammar: Grammar | None = None  # another constraint of the answer
    # number of alternatives returned with each token of the prompt; None: do not score it
    prompt_logprobs: int | None = None
    min_p: float = 0.0  # sample from tokens with this share of the largest probability
    presence_penalty: float = 0.0  # subtracted from the logits of tokens of the answer so far
    frequency_penalty: float = 0.0  # the same, times their number of occurrences
    repetition_penalty: float = 1.0  # divides the logits of tokens of prompt and answer, if above 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits
    min_tokens: int = 0  # fewest tokens before anything but a grammar ends the answer
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the answer must not contain
    allowed_tokens: frozenset[int] | None = None  # those that may be sampled; None: all
    #: text of special tokens, by id, that belongs to the answer's text; others are left out
    markers: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    prompt: tuple[int, ...]  # token ids, at least one
    blend: Mapping[str, float]  # adapters by name with their weights; empty is the base alone
    sampling: Sampling
    timeout: float  # seconds from submit to the last token
    id: str  # a name for logs
    #: the name of the API key that asks; "" where there are no keys. Rows are shared between them
    #: first
    owner: str = ""
    #: with the same salt, requests of different keys share cached prefixes; None shares them within
    #: the key alone
    cache_salt: str | None = None
    priority: int = 0  # a lower one goes first, among the owner's requests for the same adapter


@dataclass(frozen=True)
class Token:
    """A sampled token, or one of the prompt. ``logprob`` and ``top`` (id, text, logprob; the most
    likely first) where they were asked for; nothing is before the first token of a prompt, so it
    has none. ``rank``: of a prompt's token among all, from 1."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Piece:
    """The part of an answer that became certain since the piece before: its text and its tokens.
    Texts joined are the answer's text, without a stop string; tokens joined are all that were
    generated; a token without certain text comes with an empty one. The last piece alone has
    ``finish``, and one that says "error" has words and, if it is known, a cause. ``cached``: tokens
    of the prompt that were not computed, since they were in the cache. ``prompt``: its tokens, in
    one piece, where ``Sampling.prompt_logprobs`` asks for them. ``stop``: the stop string that
    ended the answer."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    cause: Cause | None = None
    cached: int = 0
    prompt: tuple[Token, ...] = ()
    stop: str | None = None


class RequestError(VeneerError, ValueError):
    """A request that cannot be answered as it is: a prompt that does not fit, a schema that is not
    understood."""


class GrammarLimitError(RequestError):
    """A schema or grammar that needs more than the limits of its matcher."""


class Busy(VeneerError, RuntimeError):  # noqa: N818
    """The queue is full, or the engine is draining. ``retry_after``: seconds after which there may
    be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


CAUSES: dict[type[VeneerError], Cause] = {
    AdapterError: "bad_adapter",  # it cannot be loaded
    SelectionError: "model_not_found",  # it was unloaded meanwhile
    BankFullError: "out_of_memory",
    GrammarLimitError: "grammar_limit",
    RequestError: "bad_request",  # it turned out to be none
}


def cause_of(error: BaseException) -> Cause | None:
    """The cause of a failure; None for one that is the server's own."""
    return next((cause for kind, cause in CAUSES.items() if isinstance(error, kind)), None)
