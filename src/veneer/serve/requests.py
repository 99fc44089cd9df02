"""The data classes that the API and the engine exchange, and the errors of submitting a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import AdapterError, BankFullError, SelectionError, VeneerError

#: why an answer ended: "stop" at a stop string or an end token, "length" at its token limit,
#: "cancelled" by the client, "timeout" after ``Request.timeout``, or "error" by a failure
Finish = Literal["stop", "length", "cancelled", "timeout", "error"]

#: the causes of failures for which the server itself is not at fault
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
    """A constraint on the answer that is no JSON schema. ``text`` by ``kind``: for "regex" the
    expression, for "choice" a JSON list of the allowed answers, for "grammar" a grammar in GBNF or
    Lark, and for "lark" a grammar that the server wrote itself."""

    kind: Literal["regex", "choice", "grammar", "lark"]
    text: str


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are sampled, and what is returned with them."""

    # the most tokens of the answer, unless the context is full before. 0: only score the prompt
    max_tokens: int
    temperature: float = 1.0  # divides the logits; 0 always takes the most likely token
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability, after top_k
    top_k: int = 0  # sample from the k most likely tokens; 0: from all tokens
    # equal seeds give equal tokens, unless rounding errors decide a draw; None: a random seed
    seed: int | None = None
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    #: number of alternatives returned with each sampled token; None: return no log-probabilities.
    #: Log-probabilities are the model's, before temperature, top_k, top_p and schema
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None  # a JSON schema that the answer must follow
    ignore_eos: bool = False  # an end-of-text token does not end the answer
    stop_tokens: frozenset[int] = frozenset()  # tokens that end the answer and are its last token
    grammar: Grammar | None = None  # a constraint that is no JSON schema
    # number of alternatives returned with each token of the prompt; None: do not score it
    prompt_logprobs: int | None = None
    min_p: float = 0.0  # drop tokens below this fraction of the largest probability
    presence_penalty: float = 0.0  # subtracted from the logits of tokens of the answer so far
    frequency_penalty: float = 0.0  # subtracted for each occurrence of the token in the answer
    # divides the positive logits, and multiplies the negative ones, of tokens in prompt and answer
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token id
    min_tokens: int = 0  # before so many tokens, only a complete grammar ends the answer
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the answer must not contain
    allowed_tokens: frozenset[int] | None = None  # ids that may be sampled; None: all
    #: texts, by token id, of special tokens that the answer's text shows; it leaves out all others
    shown_special_tokens: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    prompt: tuple[int, ...]  # token ids, at least one
    blend: Mapping[str, float]  # weights of adapters by name; empty: the base alone
    sampling: Sampling
    timeout: float  # seconds from submission to the last token
    id: str  # identifies the request in logs
    #: the name of the client's API key, "" without keys. Rows of the batch are shared fairly among
    #: owners, before adapters
    owner: str = ""
    #: requests of different keys with the same salt share cached prefixes; None: only requests of
    #: the same key share them
    cache_salt: str | None = None
    priority: int = 0  # lower runs first, among the owner's requests for the same adapter


@dataclass(frozen=True)
class Token:
    """A sampled token, or a token of the prompt. ``logprob`` and ``top`` are set if the request
    asks for log-probabilities; ``top`` has (id, text, log-probability) of the most likely tokens,
    best first. The first token of a prompt has neither, since no token precedes it. ``rank``: a
    prompt token's rank among all tokens at its position, from 1."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Piece:
    """The text and tokens by which an answer grew since the previous piece.

    The texts of all pieces together are the answer's text, without a stop string; their tokens are
    all generated tokens. A token whose text is not certain yet, such as half a character, comes
    with an empty text. Only the last piece has ``finish``.

    Attributes:
        error: the message, if ``finish`` is "error".
        cause: the cause of the error, if known.
        cached: number of prompt tokens that were in the prefix cache.
        prompt: the tokens of the prompt, in one piece, if ``Sampling.prompt_logprobs`` is set.
        stop: the stop string that ended the answer.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    cause: Cause | None = None
    cached: int = 0
    prompt: tuple[Token, ...] = ()
    stop: str | None = None


class RequestError(VeneerError, ValueError):
    """The request itself makes an answer impossible: its prompt does not fit, or its schema is not
    understood."""


class GrammarLimitError(RequestError):
    """The request's schema or grammar exceeds the limits of llguidance's matchers."""


class Busy(VeneerError, RuntimeError):  # noqa: N818
    """The queue is full, or the engine is draining. ``retry_after``: seconds until the queue may
    have room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


CAUSES: dict[type[VeneerError], Cause] = {
    AdapterError: "bad_adapter",  # the adapter cannot be loaded
    SelectionError: "model_not_found",  # the adapter was unloaded meanwhile
    BankFullError: "out_of_memory",
    GrammarLimitError: "grammar_limit",
    RequestError: "bad_request",
}


def cause_of(error: BaseException) -> Cause | None:
    """The cause of a failure; None if the server itself is at fault."""
    return next(
        (cause for error_class, cause in CAUSES.items() if isinstance(error, error_class)), None
    )
