"""The data classes that the HTTP API and the engine exchange, and the errors that the engine raises
for a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import AdapterError, BankFullError, SelectionError, VeneerError

#: why an answer ended: "stop" at a stop string, at an end token or when its grammar was complete,
#: "length" at its token limit, "cancelled" by ``RequestState.cancel``, "timeout" after
#: ``Request.timeout``, or "error" because of a failure
Finish = Literal["stop", "length", "cancelled", "timeout", "error"]

#: the kinds of failures that are not faults of the server itself
ErrorKind = Literal[
    "bad_adapter",
    "model_not_found",
    "out_of_memory",
    "bad_request",
    "bad_blend",
    "grammar_limit",
    "no_token_left",
]


@dataclass(frozen=True)
class Grammar:
    """A constraint that the whole answer must match, other than a JSON schema. The content of
    ``text`` depends on ``kind``: for "regex", the regular expression; for "choice", a JSON list of
    the allowed answers; for "grammar", the client's grammar in GBNF or Lark; for "lark", a grammar
    that the server made itself."""

    kind: Literal["regex", "choice", "grammar", "lark"]
    text: str


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are sampled, and what is returned with them."""

    # the most tokens of the answer, which also ends when the context is full. 0: compute only the
    # log-probabilities of the prompt
    max_tokens: int
    temperature: float = 1.0  # divides the logits; 0 always takes the most likely token
    # sample from the fewest most likely tokens whose probabilities add up to this, after top_k
    top_p: float = 1.0
    top_k: int = 0  # sample from the k most likely tokens; 0: from all tokens
    # equal seeds give equal tokens, except where a rounding difference between batches of
    # different sizes changes which token is drawn; None: a random seed
    seed: int | None = None
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    #: number of most likely tokens returned with each sampled token; None: return no
    #: log-probabilities. They are computed from the model's logits, before these are changed by
    #: any field of ``Sampling``
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None  # a JSON schema that the answer must follow
    ignore_eos: bool = False  # if true, an end-of-text token does not end the answer
    stop_tokens: frozenset[int] = frozenset()  # tokens that end the answer and are its last token
    grammar: Grammar | None = None  # another constraint than a JSON schema
    # number of most likely tokens returned with each token of the prompt; None: do not compute the
    # log-probabilities of the prompt
    prompt_logprobs: int | None = None
    min_p: float = 0.0  # drop tokens less likely than this fraction of the largest probability
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the answer so far
    # subtracted from a token's logit for each occurrence of the token in the answer so far
    frequency_penalty: float = 0.0
    # divides the positive logits, and multiplies the negative ones, of tokens that occur in the
    # prompt or in the answer so far
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token id
    min_tokens: int = 0  # until then, only a complete grammar ends the answer
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the answer must not contain
    allowed_tokens: frozenset[int] | None = None  # ids that may be sampled; None: all
    #: the special tokens that become part of the answer's text, as {token id: text}; the text
    #: leaves out all other special tokens
    shown_special_tokens: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    prompt: tuple[int, ...]  # token ids, at least one
    blend: Mapping[str, float]  # weights of adapters by name; empty: the base alone
    sampling: Sampling
    timeout: float  # seconds from submission to the last token
    id: str  # identifies the request in logs
    #: the name of the client's API key; "" on a server without keys. The scheduler gives each owner
    #: an equal share of the tokens, and divides an owner's share equally among adapters
    owner: str = ""
    #: requests with the same salt share cached prefixes, even if their API keys differ; None: only
    #: requests with the same API key share them
    cache_salt: str | None = None
    priority: int = 0  # of the owner's requests for the same adapter, the lowest runs first


@dataclass(frozen=True)
class Token:
    """A sampled token, or a token of the prompt.

    Fields:
        logprob: its log-probability, if the request asks for log-probabilities. None for the first
            token of a prompt, since no token precedes it.
        top: (id, text, log-probability) of the most likely tokens at its position, the most likely
            first; empty where ``logprob`` is None.
        rank: for a token of the prompt, 1 + the number of more likely tokens at its position.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Piece:
    """The text and tokens by which an answer grew since the previous piece.

    The texts of all pieces together are the answer's text, without a stop string that ended it.
    Their tokens are all generated tokens. If the text of a token depends on the next tokens, as for
    half a character, a piece has the token and a later piece its text.

    Attributes:
        finish: why the answer ended, in the last piece; None in all others.
        error: the message, if ``finish`` is "error".
        error_kind: the kind of the error; None if the server itself is at fault.
        cached: number of prompt tokens that were in the prefix cache.
        prompt: all tokens of the prompt, in one of the pieces, if ``Sampling.prompt_logprobs`` is
            set; empty in all others.
        stop: the stop string that ended the answer.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    cached: int = 0
    prompt: tuple[Token, ...] = ()
    stop: str | None = None


class RequestError(VeneerError, ValueError):
    """The request cannot be answered because of its own content: for example, its prompt exceeds
    the context, or its JSON schema is invalid."""


class BlendError(RequestError):
    """The adapters of the request's blend cannot act together."""


class GrammarLimitError(RequestError):
    """The request's schema or grammar exceeds the limits of llguidance, the library that computes
    which tokens match it."""


class Busy(VeneerError, RuntimeError):  # noqa: N818
    """The queue is full, or the engine is shutting down and takes no more requests.
    ``retry_after``: the seconds after which the client may try again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


#: the kinds of failures by error class. Subclasses stand before their base class, since the first
#: class that fits is taken.
ERROR_KINDS: dict[type[VeneerError], ErrorKind] = {
    AdapterError: "bad_adapter",  # the adapter cannot be loaded
    SelectionError: "model_not_found",  # the adapter was unloaded meanwhile
    BankFullError: "out_of_memory",
    BlendError: "bad_blend",
    GrammarLimitError: "grammar_limit",
    RequestError: "bad_request",
}


def error_kind_of(error: BaseException) -> ErrorKind | None:
    """The kind of a failure; None if the server itself is at fault."""
    return next(
        (
            error_kind
            for error_class, error_kind in ERROR_KINDS.items()
            if isinstance(error, error_class)
        ),
        None,
    )
