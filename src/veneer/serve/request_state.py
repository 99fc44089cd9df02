"""The state of a request in the engine, from the queue to its last piece, and what ends its
answer: an end token, a stop string or its length."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.attach import find_starts
from veneer.models.decode.slots import Row
from veneer.serve.prefixes import Namespace
from veneer.serve.prompt_scores import PromptScore
from veneer.serve.requests import Cause, Finish, Piece, Request, RequestError, Token
from veneer.serve.sampling import SampledToken, Sampler
from veneer.serve.scheduler import counted_as, key_of
from veneer.serve.text import Detokenizer, Text

log = logging.getLogger("veneer.serve")

Deliver = Callable[[Piece], None]
Wake = Callable[[], None]


class RequestState:
    """The state of a request in the engine. Only the engine's thread changes it, except that any
    thread may ``cancel`` it.

    Args:
        deliver: called with each piece of the answer.
        limit: the most tokens of the answer.
        wake: wakes the engine's thread.
    """

    def __init__(
        self,
        request: Request,
        deliver: Deliver,
        sampler: Sampler,
        detokenizer: Detokenizer,
        limit: int,
        wake: Wake,
    ) -> None:
        self.request, self.sampler, self.limit = request, sampler, limit
        self.blend_key, self.counted_adapter, self.owner, self.priority = (
            key_of(request.blend),
            counted_as(request.blend),
            request.owner,
            request.priority,
        )
        sampling = request.sampling
        alternatives = sampling.prompt_logprobs
        self.score = (
            None
            if alternatives is None
            else PromptScore(request.prompt, alternatives, detokenizer.text)
        )
        self.text = Text(detokenizer, request.prompt, sampling.stop, sampling.shown_special_tokens)
        self.submitted_at = time.monotonic()
        self.started_at: float | None = None  # when prefill began for the first time
        self.sampled_at = 0.0  # when its latest token was sampled
        self.deadline = self.submitted_at + request.timeout
        # ``has_left_queue``: the scheduler's queue; ``done``: its last piece has been delivered
        self.cancelled = self.has_left_queue = self.done = False
        self.lease_future: Any = None  # once its adapters are requested
        self.lease: Any = None
        self.acts_from: float = 0  # index of the first token on which its adapters act
        self.namespace: Namespace | None = None  # within which its computed tokens are cached
        # the number of requests that got a row before it; -1 before it got one
        self.start_number = -1
        self.row: Row | None = None  # from the start of its prefill
        self.ids = list(request.prompt)  # the prompt, then the sampled tokens
        self.length = 0  # tokens whose keys and values are in the row
        self.prefill_end = 0  # what ``length`` will be after the prefill of this step
        self.generated = 0
        self.cached = 0  # tokens of its prompt that were in the cache
        self.prompt_logits: Tensor | None = None  # [vocabulary], of the last token of its prompt
        self._deliver, self._detokenizer, self._wake = deliver, detokenizer, wake
        self._undelivered_tokens: list[Token] = []
        # sampled text that is not delivered yet; whether a stop string ended it
        self._undelivered_text, self._stopped = "", False

    @property
    def is_scored(self) -> bool:
        """Whether its prompt still has tokens to score, so that a call must return the logits of
        all of its tokens, not only of the last."""
        return self.score is not None and not self.score.done

    def cancel(self) -> None:
        """Ask the engine, from any thread, to end the request. Its last piece says "cancelled",
        unless it ended before."""
        self.cancelled = True
        self._wake()

    def take_lease(self, lease: Any) -> None:
        """Keep the lease of its loaded adapters. An adapter with invocation tokens acts from their
        last occurrence in the prompt on, or never if the prompt lacks them. ``RequestError``: a
        blend of several adapters contains such an adapter."""
        adapters = [adapter for adapter, weight in getattr(lease, "uses", ()) if weight]
        tokens = next(filter(None, (adapter.invocation_tokens for adapter in adapters)), ())
        if tokens and len(adapters) > 1:
            names = ", ".join(repr(name) for name in lease.adapter_weights)
            raise RequestError(
                f"a blend of {names}, of which one has invocation tokens",
                "adapters that act on every token",
                "ask for one of them",
            )
        start = find_starts(torch.tensor([self.request.prompt]), tokens)[0] if tokens else 0
        self.acts_from = math.inf if start is None else start
        self.lease = lease

    @property
    def acting_lease(self) -> Any:
        """The lease of the adapters that act on the next token to compute; None if that token is
        before ``acts_from``, where the base acts alone."""
        return self.lease if self.length >= self.acts_from else None

    def call_end(self, length: int) -> int:
        """The index up to which one call may compute its tokens from index ``length`` on. A call
        uses the same adapters for all tokens of a row, so it cannot go beyond ``acts_from`` if it
        begins before that."""
        size = len(self.ids)
        return size if length >= self.acts_from else int(min(size, self.acts_from))

    def accept(self, sampled: SampledToken, eos: frozenset[int]) -> Finish | None:
        """Add a sampled token. If the answer goes on, deliver the token with the text that is now
        certain, which may be empty, and return None. Otherwise return why the answer ends; ``end``
        then delivers the token. ``eos``: ids of the tokens that end a text."""
        token, text_of = sampled.token, self._detokenizer.text
        assert token is not None
        self.ids.append(token)
        self.generated += 1
        top = tuple((id, text_of(id), logprob) for id, logprob in sampled.top)
        self._undelivered_tokens.append(Token(token, text_of(token), sampled.logprob, top))
        grammar_is_complete = self.sampler.accept(token)
        sampling = self.request.sampling
        if token in sampling.stop_tokens or (token in eos and not sampling.ignore_eos):
            return "stop"
        watched = self.generated > sampling.min_tokens
        self._undelivered_text, self._stopped = self.text.add(token, watched=watched)
        if self._stopped or grammar_is_complete:
            return "stop"
        if self.generated >= self.limit:
            return "length"
        self._send()
        return None

    def send_prompt(self) -> None:
        """Deliver the prompt's tokens with their log-probabilities, once all are computed."""
        assert self.score is not None
        self._send(prompt=tuple(self.score.tokens))

    def end(self, finish: Finish, error: str | None = None, cause: Cause | None = None) -> None:
        """Deliver the last piece, with the reason ``finish`` and all text that was held back."""
        if not self._stopped and finish != "error":
            try:
                self._undelivered_text += self.text.end()
            except Exception as problem:
                log.exception("request %s: the end of its text cannot be decoded", self.request.id)
                finish, error = "error", f"{type(problem).__name__}: {problem}"
        self._send(finish, error, cause)

    def _send(
        self,
        finish: Finish | None = None,
        error: str | None = None,
        cause: Cause | None = None,
        prompt: tuple[Token, ...] = (),
    ) -> None:
        text, self._undelivered_text = self._undelivered_text, ""
        tokens, self._undelivered_tokens = tuple(self._undelivered_tokens), []
        self.done = self.done or finish is not None
        try:
            stop = self.text.stopped_by if finish == "stop" else None
            self._deliver(Piece(text, tokens, finish, error, cause, self.cached, prompt, stop))
        except Exception:
            log.exception(
                "request %s: its client could not be given a piece; it is cancelled",
                self.request.id,
            )
            self.cancelled = True


def last_tokens_of(states: Sequence[RequestState]) -> tuple[list[Any], list[int], list[int]]:
    """(rows, last tokens, numbers of computed tokens) of running requests, for a decode call."""
    return (
        [state.row for state in states],
        [state.ids[-1] for state in states],
        [state.length for state in states],
    )
