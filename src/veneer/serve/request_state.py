"""A request on its way through the engine, and the ticket that its client holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from veneer.serve.requests import Cause, Finish, Piece, Request, Token
from veneer.serve.sampling import Choice, Sampler
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
        last: the token that was chosen last, which the next step computes.
        done: its finishing piece is delivered.
    """

    __slots__ = (
        "_deliver", "_new", "_pending", "_stopped", "_words", "cancelled", "chooser", "deadline", "done", "flow",
        "future", "generated", "key", "last", "lease", "length", "limit", "owner", "request", "row", "submitted",
        "taken", "text", "untold",
    )  # fmt: skip

    def __init__(self, request: Request, deliver: Deliver, chooser: Sampler, words: Detokenizer, limit: int) -> None:
        self.request, self.chooser, self.limit = request, chooser, limit
        self.key, self.flow, self.owner = key_of(request.mix), counted_as(request.mix), request.owner
        self.text = Text(words, request.prompt, request.sampling.stop)
        self.submitted = time.monotonic()
        self.deadline = self.submitted + request.timeout
        self.cancelled = self.taken = self.done = False
        self.future: Any = None
        self.lease: Any = None
        self.row: int | None = None
        self.length = self.generated = self.last = self.untold = 0
        self._deliver, self._words = deliver, words
        self._pending: list[Token] = []
        self._new, self._stopped = "", False  # text and tokens that are chosen and not delivered

    def leaves(self, now: float) -> Finish | None:
        """Why it ends without anything being computed, if it does."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if now >= self.deadline else None

    def accept(self, choice: Choice, eos: frozenset[int]) -> Finish | None:
        """Take the next token; deliver what became certain, unless the answer ends: why it does."""
        token, sampling = choice.token, self.request.sampling
        assert token is not None
        self.last = token
        self.generated += 1
        self._pending.append(self._token(choice))
        over = self.chooser.accept(token)
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

    def _token(self, choice: Choice) -> Token:
        assert choice.token is not None
        if choice.logprob is None:
            return Token(choice.token, self._words.text(choice.token))
        top = tuple((id, self._words.text(id), logprob) for id, logprob in choice.top)
        return Token(choice.token, self._words.text(choice.token), choice.logprob, top)


class Ticket:
    """A submitted request, in its client's hands."""

    def __init__(self, entry: RequestState, wake: Callable[[], None]) -> None:
        self._entry, self._wake = entry, wake

    def cancel(self) -> None:
        """End it soon, from any thread: its last piece says "cancelled", unless it ended before."""
        self._entry.cancelled = True
        self._wake()
