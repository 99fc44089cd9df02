"""A request on its way through the engine, and the ticket that its client holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from veneer.serve.requests import Cause, Finish, Piece, Request, Token
from veneer.serve.sampling import SampledToken, Sampler
from veneer.serve.scheduler import counted_as, key_of
from veneer.serve.text import Detokenizer, Text

log = logging.getLogger("veneer.serve")

Deliver = Callable[[Piece], None]


class RequestState:
    """What the engine knows of a request. Its thread alone changes it, but for ``cancelled``.

    Attributes:
        limit: tokens that it may generate.
        future, lease: of its adapters, from when its turn is near.
        row: where it is among the running rows; None before.
        length: its tokens of which keys and values are kept.
        last: the token that was sampled last, which the next step computes.
        done: its finishing piece is delivered.
    """

    __slots__ = (
        "_deliver",
        "_detokenizer",
        "_new",
        "_pending",
        "_stopped",
        "cancelled",
        "deadline",
        "done",
        "flow",
        "future",
        "generated",
        "key",
        "last",
        "lease",
        "length",
        "limit",
        "owner",
        "request",
        "row",
        "sampler",
        "submitted",
        "taken",
        "text",
        "untold",
    )  # fmt: skip

    def __init__(
        self, request: Request, deliver: Deliver, sampler: Sampler, detokenizer: Detokenizer, limit: int
    ) -> None:
        self.request, self.sampler, self.limit = request, sampler, limit
        self.key, self.flow, self.owner = key_of(request.blend), counted_as(request.blend), request.owner
        self.text = Text(detokenizer, request.prompt, request.sampling.stop)
        self.submitted = time.monotonic()
        self.deadline = self.submitted + request.timeout
        self.cancelled = self.taken = self.done = False
        self.future: Any = None
        self.lease: Any = None
        self.row: int | None = None
        self.length = self.generated = self.last = self.untold = 0
        self._deliver, self._detokenizer = deliver, detokenizer
        self._pending: list[Token] = []
        self._new, self._stopped = "", False  # text and tokens that are sampled and not delivered

    def leaves(self, now: float) -> Finish | None:
        """Why it ends without anything being computed, if it does."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if now >= self.deadline else None

    def accept(self, sampled: SampledToken, eos: frozenset[int]) -> Finish | None:
        """Take the next token; deliver what became certain, unless the answer ends: why it does."""
        token, sampling = sampled.token, self.request.sampling
        assert token is not None
        self.last = token
        self.generated += 1
        self._pending.append(self._token(sampled))
        over = self.sampler.accept(token)
        if token in eos and not sampling.ignore_eos:
            return "stop"
        self._new, self._stopped = self.text.add(token)
        if self._stopped or over:
            return "stop"
        if self.generated >= self.limit:
            return "length"
        if self._new:
            self._send()
        return None

    def end(self, finish: Finish, error: str | None = None, cause: Cause | None = None) -> None:
        """Deliver what is left, with ``finish``: once, whatever happens."""
        if not self.done:
            if not self._stopped and finish != "error":
                try:
                    self._new += self.text.end()
                except Exception as problem:
                    log.exception("request %s: the end of its text cannot be decoded", self.request.id)
                    finish, error = "error", f"{type(problem).__name__}: {problem}"
            self._send(finish, error, cause)

    def _send(self, finish: Finish | None = None, error: str | None = None, cause: Cause | None = None) -> None:
        text, self._new = self._new, ""
        tokens, self._pending = tuple(self._pending), []
        self.done = self.done or finish is not None
        try:
            self._deliver(Piece(text, tokens, finish, error, cause))
        except Exception:
            log.exception("request %s: its client could not be given a piece; it is cancelled", self.request.id)
            self.cancelled = True

    def _token(self, sampled: SampledToken) -> Token:
        assert sampled.token is not None
        if sampled.logprob is None:
            return Token(sampled.token, self._detokenizer.text(sampled.token))
        top = tuple((id, self._detokenizer.text(id), logprob) for id, logprob in sampled.top)
        return Token(sampled.token, self._detokenizer.text(sampled.token), sampled.logprob, top)


class Ticket:
    """A submitted request, in its client's hands."""

    def __init__(self, state: RequestState, wake: Callable[[], None]) -> None:
        self._state, self._wake = state, wake

    def cancel(self) -> None:
        """End it soon, from any thread: its last piece says "cancelled", unless it ended before."""
        self._state.cancelled = True
        self._wake()
