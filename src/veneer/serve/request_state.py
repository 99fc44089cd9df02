"""The state of a request in the engine, from the queue until its answer has ended. Its class
decides when the answer ends: at an end token, at a stop string, when its grammar is complete, or at
its length limit."""

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
from veneer.serve.requests import BlendError, ErrorKind, Finish, Piece, Request, Token
from veneer.serve.sampling import SampledToken, Sampler
from veneer.serve.scheduler import counted_as, key_of
from veneer.serve.text import Detokenizer, Text

log = logging.getLogger("veneer.serve")

#: gets each piece of an answer; called by the engine's thread
Deliver = Callable[[Piece], None]
#: wakes the engine's thread
Wake = Callable[[], None]


class RequestState:
    """The state of a request in the engine. Only the engine's thread changes it, except that any
    thread may ``cancel`` it.

    Args:
        deliver: called with each piece of the answer. If it raises an error, the request is
            cancelled.
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
        # whether it was cancelled; whether it is no longer in the scheduler's queue; whether its
        # last piece has been delivered
        self.cancelled = self.has_left_queue = self.done = False
        self.lease_future: Any = None  # gives the lease when its adapters are loaded
        self.lease: Any = None  # keeps its adapters in memory until it is released
        self.acts_from: float = 0  # index of the first token on which its adapters act
        self.namespace: Namespace | None = None  # its namespace in the prefix cache
        # the number of requests that got a row before this one; -1 before it got a row
        self.start_number = -1
        self.row: Row | None = None  # its row of the KV cache, from the start of its prefill
        self.ids = list(request.prompt)  # the prompt, then the sampled tokens
        self.length = 0  # number of tokens whose keys and values are in the row
        self.prefill_end = 0  # the value that ``length`` gets after the prefill of this step
        self.generated = 0  # number of sampled tokens
        self.cached = 0  # number of prompt tokens that were in the prefix cache
        self.prompt_logits: Tensor | None = None  # [vocabulary], of the prompt's last token
        self._deliver, self._detokenizer, self._wake = deliver, detokenizer, wake
        self._undelivered_tokens: list[Token] = []
        # sampled text that is not delivered yet; whether a stop string ended the answer
        self._undelivered_text, self._stopped = "", False

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not all computed yet. If so,
        the forward call must return the logits of all of its tokens, not only of the last."""
        return self.score is not None and not self.score.done

    def cancel(self) -> None:
        """Ask the engine to end the request. Any thread may call this. The ``finish`` of the last
        piece is then "cancelled", unless the answer ended before."""
        self.cancelled = True
        self._wake()

    def take_lease(self, lease: Any) -> None:
        """Keep the lease of its loaded adapters, and set ``acts_from``. An adapter with invocation
        tokens (activated LoRA) acts from the last occurrence of these tokens in the prompt on, or
        never if the prompt does not contain them. ``BlendError``: such an adapter is blended with
        others."""
        adapters = [adapter for adapter, weight in getattr(lease, "uses", ()) if weight]
        invocation_tokens = next(
            filter(None, (adapter.invocation_tokens for adapter in adapters)), ()
        )
        if invocation_tokens and len(adapters) > 1:
            names = ", ".join(repr(name) for name in lease.adapter_weights)
            raise BlendError(
                f"a blend of {names}, of which one has invocation tokens",
                "adapters that act on every token",
                "ask for one of them",
            )
        invocation_start = (
            find_starts(torch.tensor([self.request.prompt]), invocation_tokens)[0]
            if invocation_tokens
            else 0
        )
        self.acts_from = math.inf if invocation_start is None else invocation_start
        self.lease = lease

    @property
    def acting_lease(self) -> Any:
        """The lease of the adapters with which the next token must be computed; None if that token
        is before ``acts_from`` and is computed by the base alone."""
        return self.lease if self.length >= self.acts_from else None

    def call_end(self, length: int) -> int:
        """The index before which a forward call that begins at token ``length`` must end. A call
        uses the same adapters for all tokens of a row, so a call that begins before ``acts_from``
        must not go beyond it."""
        token_count = len(self.ids)
        return token_count if length >= self.acts_from else int(min(token_count, self.acts_from))

    def accept(self, sampled: SampledToken, eos: frozenset[int]) -> Finish | None:
        """Add a sampled token. If the answer goes on, deliver the token, with the text that no
        later token can change (it may be empty), and return None. If the answer ends, return the
        reason; the caller then calls ``end``, which delivers the token.

        Args:
            eos: ids of the tokens that end a text.

        Raises:
            RequestError: the grammar cannot go on after the token (``Sampler.accept``).
        """
        token, text_of = sampled.token, self._detokenizer.text
        assert token is not None
        self.ids.append(token)
        self.generated += 1
        alternatives = tuple((id, text_of(id), logprob) for id, logprob in sampled.top)
        self._undelivered_tokens.append(Token(token, text_of(token), sampled.logprob, alternatives))
        grammar_is_complete = self.sampler.accept(token)
        sampling = self.request.sampling
        if token in sampling.stop_tokens or (token in eos and not sampling.ignore_eos):
            return "stop"
        is_searched = self.generated > sampling.min_tokens
        self._undelivered_text, self._stopped = self.text.add(token, watched=is_searched)
        if self._stopped or grammar_is_complete:
            return "stop"
        if self.generated >= self.limit:
            return "length"
        self._send()
        return None

    def send_prompt(self) -> None:
        """Deliver the prompt's tokens with their log-probabilities in one piece. Call it when they
        are all computed."""
        assert self.score is not None
        self._send(prompt=tuple(self.score.tokens))

    def end(
        self, finish: Finish, error: str | None = None, error_kind: ErrorKind | None = None
    ) -> None:
        """Deliver the last piece: the reason ``finish``, and the text that was held back because it
        could have been the beginning of a stop string. ``error``, ``error_kind``: if ``finish`` is
        "error", the message and its kind."""
        if not self._stopped and finish != "error":
            try:
                self._undelivered_text += self.text.end()
            except Exception as decode_error:
                log.exception("request %s: the end of its text cannot be decoded", self.request.id)
                finish, error = "error", f"{type(decode_error).__name__}: {decode_error}"
        self._send(finish, error, error_kind)

    def _send(
        self,
        finish: Finish | None = None,
        error: str | None = None,
        error_kind: ErrorKind | None = None,
        prompt: tuple[Token, ...] = (),
    ) -> None:
        text, self._undelivered_text = self._undelivered_text, ""
        tokens, self._undelivered_tokens = tuple(self._undelivered_tokens), []
        self.done = self.done or finish is not None
        try:
            stop = self.text.stopped_by if finish == "stop" else None
            self._deliver(Piece(text, tokens, finish, error, error_kind, self.cached, prompt, stop))
        except Exception:
            log.exception(
                "request %s: its client could not be given a piece; it is cancelled",
                self.request.id,
            )
            self.cancelled = True


def last_tokens_of(states: Sequence[RequestState]) -> tuple[list[Any], list[int], list[int]]:
    """The arguments of a decode call for running requests: (their rows of the KV cache, their last
    tokens, which the call computes, and the numbers of tokens that their rows already contain)."""
    return (
        [state.row for state in states],
        [state.ids[-1] for state in states],
        [state.length for state in states],
    )
