"""Values between the API and the engine, and the errors of handing one in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import AdapterError, BankFullError, SelectionError, VeneerError

# : why a request ended: a stop string or the end-of-text token, its limit of tokens, its client,
# its time, a failure
Finish = Literal["stop", "length", "cancelled", "timeout", "error"]

#: what kind of failure it was, where it has a cause outside the server
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

    # at most so many; the engine's ``length`` may end the answer before. 0 asks for the
    # log-probabilities of the prompt alone
    max_tokens: int
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely token each time
    top_p: float = (
        1.0  # from the smallest set of tokens with this much probability (after ``top_k``)
    )
    top_k: int = 0  # from so many most likely tokens; 0 is off
    seed: int | None = (
        None  # the same one gives the same tokens, in float32 also in another batch; None draws one
    )
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    # : how many alternatives are told with the sampled token; None tells no probabilities at all.
    # They are those of the
    #: model, before temperature, top_k, top_p and schema
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None  # a JSON schema that the answer follows
    ignore_eos: bool = False  # go on after the end-of-text token
    stop_tokens: frozenset[int] = frozenset()  # tokens that end the answer, and are the last of it
    grammar: Grammar | None = None  # another form that the answer follows
    # how many alternatives are told with each token of the prompt; None tells nothing of it
    prompt_logprobs: int | None = None
    min_p: float = 0.0  # from the tokens with this much of the largest probability
    presence_penalty: float = 0.0  # taken from the logit of each token of the answer so far
    frequency_penalty: float = 0.0  # the same, for each time that it is there
    repetition_penalty: float = 1.0  # divides the logits of tokens of prompt and answer, if above 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits
    min_tokens: int = 0  # before which nothing ends the answer but its grammar
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that the answer does not hold
    allowed_tokens: frozenset[int] | None = None  # those that may be sampled; None: all
    #: special tokens, by id, whose text is a part of the answer's text; of others it is left out
    markers: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One answer that is asked for."""

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
