"""The loop: requests come and go at every step.

    schedule → prefill → decode → sample → deliver

One thread computes. A step is at most one call for new prompts, of at most ``prefill`` tokens, and one call for a token
of each running row; so a running row never waits for more than one such call. A prompt that is longer is computed in
pieces, beside the running rows, and joins them when it is whole.

    submit → queue (scheduler: fair) → its adapters are loaded → prompt → row among the running → end

Transformers' own continuous batching was measured and not taken, for the reasons in
``docs/decisions/060-the-server-has-an-engine-of-its-own.md``.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BankFullError, sentence
from veneer.serve.forward import Forward, context
from veneer.serve.request_state import Deliver, RequestState, Ticket
from veneer.serve.requests import Busy, Cause, Finish, Request, RequestError, cause_of
from veneer.serve.sampling import Choice, Sampler, Schemas, choose
from veneer.serve.scheduler import PROMPT, Key, Scheduler, fitting
from veneer.serve.slots import Slots
from veneer.serve.text import Detokenizer

log = logging.getLogger("veneer.serve")

#: requests whose adapters are loaded although no row is free for them yet
AHEAD = 4

#: seconds without work after which memory that is free is given back to the system
IDLE = 2.0

#: tokens after which the observer is told of a row's
TOLD = 16


class Engine:
    """Answers requests with one model, many at a time, each with adapters of its own.

    Args:
        model: a causal language model of transformers. It is put into eval mode; while the engine is open its attention
            is the engine's in the engine's calls. Let nothing else call it in training mode.
        tokenizer: of the model.
        bank: the adapters; None serves the base alone.
        rows: requests that run at a time.
        length: tokens of a prompt and its answer together; the model's own limit, if that is less.
        prefill: tokens of prompts that are computed in one call.
        queue: requests that wait.
        observer: is told what happens: queued(mix), started(mix, waited), first_token(mix, seconds), tokens(mix,
            prompt, generated), finished(mix, reason, seconds). Called by the engine's thread, queued by the client's.

    Raises:
        ConfigError: an architecture that cannot be served (see ``Forward``).
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Any = None, rows: int = 16, length: int = 2048, prefill: int = 512,
        queue: int = 256, observer: Any = None,
    ) -> None:  # fmt: skip
        most = context(model.config)
        self.length, self.prefill, self.rows = min(length, most or length), prefill, rows
        self._bank, self._observer, self._words = bank, observer, Detokenizer(tokenizer)
        self._forward = Forward(model.eval())
        try:
            self._forward.prove(self.length, lambda count: self._selected([None] * count))
        except BaseException:
            self._forward.close()
            raise
        self._slots, self._aside = self._new_slots()
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._eos = _ends(model, tokenizer)
        self._schemas = Schemas(tokenizer, self._forward.logits, sorted(self._eos))

        self._wake = threading.Condition()  # guards what follows; notified when there is something to do or to know
        self._scheduler: Scheduler[RequestState] = Scheduler(queue)
        self._poked = self._draining = self._closing = False
        self._live = 0
        self._thread: threading.Thread | None = None

        # the engine's thread alone has these
        self._admitted: list[RequestState] = []  # whose adapters are loading or loaded
        self._long: RequestState | None = None  # whose prompt is computed in pieces
        self._running: list[RequestState] = []  # row by row
        self._called: list[RequestState] = []  # for whom a call is made
        self._worked = False  # since memory was last given back
        self._without: set[Key] = set()  # mixes for which there is no memory before a lease is given back

    # ------------------------------------------------------------------------------------------ for clients

    def start(self) -> None:
        """Begin to compute."""
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request, from any thread. ``deliver`` is called with each piece, in the engine's thread, and must
        return at once; the last piece, and no other, has ``finish``.

        Raises:
            RequestError: a prompt that is empty, too long or of unknown tokens; a schema that is not understood.
            Busy: the queue is full, or the engine is draining.
        """
        entry = RequestState(request, deliver, self._chooser(request), self._words, self._limit(request))
        with self._wake:
            if self._draining:
                raise Busy("Found: an engine that ends. Expected: one that runs. Do: try another server.", 5.0)
            self._scheduler.add(entry)
            self._live += 1
            self._tell("queued", request.mix)
            self._poked = True
            self._wake.notify_all()
        return Ticket(entry, self._poke)

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait, at most so long, until all others are over; whether they are."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: not self._live, timeout=seconds)

    def close(self) -> None:
        """Stop. What has not ended is cancelled; the model is given back as it was."""
        with self._wake:
            self._draining = self._closing = True
        self._poke()
        if self._thread is not None:
            self._thread.join()
        else:
            self._abandon("cancelled")
        self._forward.close()

    @property
    def running(self) -> int:
        """Requests that are computed."""
        return len(self._running) + (self._long is not None)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row or for their adapters."""
        return self._scheduler.waiting + len(self._admitted)

    @property
    def ready(self) -> bool:
        """Whether requests are taken and computed."""
        return self._thread is not None and self._thread.is_alive() and not self._draining

    def _chooser(self, request: Request) -> Sampler:
        schema = request.sampling.schema
        return Sampler(request.sampling, None if schema is None else self._schemas.matcher(schema))

    def _limit(self, request: Request) -> int:
        """Tokens that may be generated."""
        size = len(request.prompt)
        if not 0 < size < self.length:
            raise RequestError(
                sentence(f"a prompt of {size} tokens", f"1 to {self.length - 1}, and room for an answer", "shorten it")
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self._vocabulary:
            raise RequestError(
                sentence(
                    "a token that the model does not have", f"ids from 0 to {self._vocabulary - 1}", "use its tokenizer"
                )
            )
        if request.sampling.max_tokens < 1:
            raise RequestError(sentence("an answer of no tokens", "max_tokens of at least 1", "ask for more"))
        return min(request.sampling.max_tokens, self.length - size)

    def _poke(self) -> None:
        with self._wake:
            self._poked = True
            self._wake.notify_all()

    # ------------------------------------------------------------------------------------------ the loop

    def step(self) -> None:
        """One turn of the loop; ``start`` has a thread do nothing else."""
        self._worked = True
        self._dismiss(time.monotonic())
        self._admit()
        self._compute(self._next_prompts(), self._fill)
        self._compute(list(self._running), self._decode)

    def _run(self) -> None:
        finish: Finish = "error"
        try:
            with torch.inference_mode():
                while self._work():
                    self._step_or_restart()
            finish = "cancelled"
        finally:  # also where the thread itself fails: nobody waits for ever
            with self._wake:
                self._draining = True
            self._abandon(finish)

    def _work(self) -> bool:
        """Sleep until there is something to do; False when the engine closes."""
        with self._wake:
            if not self._running and self._long is None and not self._loaded():
                while not (self._poked or self._closing):
                    waiting = [*self._admitted, *self._scheduler.entries()]
                    until = min((one.deadline for one in waiting), default=math.inf) - time.monotonic()
                    if until <= 0:
                        break
                    pause = min(until, IDLE if self._worked else math.inf)
                    if not self._wake.wait(None if pause == math.inf else pause) and self._worked:
                        self._worked = False
                        give_back()
            self._poked = False
            return not self._closing

    def _step_or_restart(self) -> None:
        """A step; one that fails between its calls ends all that ran, and the slots are made anew."""
        try:
            self.step()
        except Exception as error:
            log.exception("a step of the engine failed; what ran is ended")
            running, self._running, self._long = {*self._running, self._long, *self._called}, [], None
            self._slots, self._aside = self._new_slots()
            for entry in running:
                if entry is not None:
                    entry.row = None
                    self._end(entry, "error", f"{type(error).__name__}: {error}")

    def _loaded(self) -> list[RequestState]:
        """Whose adapters are there."""
        return [entry for entry in self._admitted if entry.lease is not None]

    def _dismiss(self, now: float) -> None:
        """End what was cancelled, and what is late."""
        with self._wake:
            waiting = self._scheduler.entries()
        for entry in [*waiting, *self._admitted, *self._running, *([self._long] if self._long else [])]:
            finish = entry.leaves(now)
            if finish is not None:
                self._end(entry, finish)

    def _admit(self) -> None:
        """Ask for the adapters of those who are next, and see whose are there.

        Of a mix that is being loaded nobody else is admitted: its requests would take the places of others, and hold
        in memory what the load may be waiting for. And while a load waits for memory, no mix of adapters is admitted
        beside those that hold it: their requests would follow one another for ever.
        """
        for entry in [one for one in self._admitted if one.lease is None]:
            self._receive(entry)
        loading = {one.key for one in self._admitted if one.lease is None}
        while len(self._loaded()) < self.rows - self.running + AHEAD and len(loading) < self.rows:
            crowded = self._bank is not None and self._bank.crowded and (self.running or self._loaded())
            with self._wake:
                others = {one.key for one in self._scheduler.entries() if one.key} if crowded else set()
                entry = self._scheduler.take(self._without | loading | others)
            if entry is None:
                break
            entry.taken = True
            self._admitted.append(entry)
            try:
                entry.future = _at_once(_NO_BANK) if self._bank is None else self._bank.acquire(entry.request.mix)
            except Exception as error:
                self._refuse(entry, error)
                continue
            self._receive(entry)
            if entry.future is not None and entry.lease is None:
                loading.add(entry.key)
                entry.future.add_done_callback(lambda _: self._poke())

    def _receive(self, entry: RequestState) -> None:
        """The lease of an admitted entry, if it has arrived."""
        if entry.future.done():
            error = entry.future.exception()
            if error is None:
                entry.lease = entry.future.result()
            else:
                self._refuse(entry, error)

    def _refuse(self, entry: RequestState, error: BaseException) -> None:
        """An entry whose adapters cannot be had: now, if others hold the memory; else it ends."""
        self._admitted.remove(entry)
        held = self.running or self._admitted
        if held and isinstance(error, BankFullError):
            self._without.add(entry.key)
            entry.future, entry.taken = None, False
            with self._wake:
                self._scheduler.push_back(entry)
            return
        log.warning("request %s: its adapters cannot be had: %s", entry.request.id, error)
        self._end(entry, "error", str(error), cause_of(error))

    def _next_prompts(self) -> list[RequestState]:
        """Whose prompts are computed now: a piece of a long one, or some that fit into one call."""
        if self._long is not None:
            return [self._long]
        ready = self._loaded()[: self.rows - len(self._running)]
        if not ready:
            return []
        if len(ready[0].request.prompt) > self.prefill:
            group = ready[:1]
            self._long = ready[0]
        else:
            short = [one for one in ready if len(one.request.prompt) <= self.prefill]
            group = [short[i] for i in fitting([len(one.request.prompt) for one in short], self.prefill)]
        now = time.monotonic()
        for entry in group:
            self._admitted.remove(entry)
            self._tell("started", entry.request.mix, now - entry.submitted)
            with self._wake:
                self._scheduler.began(now)
        return group

    # ------------------------------------------------------------------------------------------ calls

    def _compute(self, entries: list[RequestState], call: Callable[[list[RequestState]], Tensor | None]) -> None:
        """One call of the model for some entries, and what follows from it. A failure ends these entries alone."""
        if not entries:
            return
        self._called = entries
        try:
            with self._selected([entry.lease for entry in entries]):
                logits = call(entries)
            choices = [] if logits is None else choose(logits, [entry.chooser for entry in entries])
        except Exception as error:
            log.exception("a call for %d requests failed", len(entries))
            self._slots.clear(len(self._running), len(entries))
            for entry in entries:
                self._end(entry, "error", f"{type(error).__name__}: {error}")
            choices = []
        for entry, choice in zip(entries, choices, strict=False):  # none, where a prompt is not whole yet
            self._accept(entry, choice)
        self._called = []

    def _selected(self, leases: Sequence[Any]) -> AbstractContextManager[Any]:
        return nullcontext() if self._bank is None else self._bank.rows(leases)

    def _fill(self, entries: list[RequestState]) -> Tensor | None:
        """Prompts, of which the first tokens are chosen; they run from now on. None: a long one is not whole yet."""
        if entries[0] is self._long:
            logits = self._fill_long(entries[0])
        else:
            prompts = [entry.request.prompt for entry in entries]
            logits = self._forward.fill(self._slots, len(self._running), prompts)
        if logits is not None:
            for entry in entries:
                entry.length, entry.row = len(entry.request.prompt), len(self._running)
                self._running.append(entry)
                self._count(entry, PROMPT * entry.length)
                self._tell("tokens", entry.request.mix, entry.length, 0)
        return logits

    def _fill_long(self, entry: RequestState) -> Tensor | None:
        """The next piece of a long prompt."""
        prompt, start = entry.request.prompt, entry.length
        piece = prompt[start : start + self.prefill]
        logits = self._forward.fill(self._aside, 0, [piece], start)
        entry.length += len(piece)
        if entry.length < len(prompt):
            return None
        self._slots.adopt(len(self._running), self._aside, entry.length)
        self._long = None
        return logits

    def _decode(self, entries: list[RequestState]) -> Tensor:
        """The next token of each running row."""
        tokens, lengths = [entry.last for entry in entries], [entry.length for entry in entries]
        logits = self._forward.decode(self._slots, tokens, lengths)
        for entry in entries:
            entry.length += 1
        return logits

    def _accept(self, entry: RequestState, choice: Choice) -> None:
        """Deliver a row's next token, and end the row where its answer ends."""
        if choice.token is None:
            self._end(entry, "error", choice.error)
            return
        if not entry.generated:
            self._tell("first_token", entry.request.mix, time.monotonic() - entry.submitted)
        self._count(entry, 1)
        entry.untold += 1
        try:
            finish = entry.accept(choice, self._eos)
        except RequestError as error:  # a schema that turns out to be too much
            self._end(entry, "error", str(error), cause_of(error))
            return
        except Exception as error:
            log.exception("request %s: a token could not be taken", entry.request.id)
            self._end(entry, "error", f"{type(error).__name__}: {error}")
            return
        if finish is not None:
            self._end(entry, finish)
        elif entry.untold >= TOLD:
            self._tell_tokens(entry)

    # ------------------------------------------------------------------------------------------ ends

    def _end(self, entry: RequestState, finish: Finish, error: str | None = None, cause: Cause | None = None) -> None:
        """An entry is over, wherever it is: its row, its lease and its place are free, and its client knows."""
        if entry.done:
            return
        if entry.row is not None:
            self._leave(entry)
        if entry is self._long:
            self._aside.clear(0, 1)
            self._long = None
        if entry in self._admitted:
            self._admitted.remove(entry)
        self._release(entry)
        self._tell_tokens(entry)
        with self._wake:
            if entry.taken:
                self._scheduler.ended(entry)
            else:
                self._scheduler.remove(entry)
        entry.end(finish, error, cause)  # who sees the last piece finds the place free
        with self._wake:
            self._live -= 1
            self._poked = True  # what it held may be what another waits for
            self._wake.notify_all()
        self._tell("finished", entry.request.mix, finish, time.monotonic() - entry.submitted)

    def _leave(self, entry: RequestState) -> None:
        """Free a running row; the last one takes its place."""
        row, last = entry.row, self._running[-1]
        assert row is not None
        self._slots.leave(row, len(self._running) - 1)
        self._running[row], last.row = last, row
        self._running.pop()
        entry.row = None

    def _release(self, entry: RequestState) -> None:
        """Give the lease back: now, or when it arrives."""
        future, entry.future, entry.lease = entry.future, None, None
        if future is None:
            return

        def release(future: Any) -> None:
            if not future.cancelled() and future.exception() is None:
                future.result().release()

        future.add_done_callback(release)  # at once, if it is there
        self._without.clear()

    def _abandon(self, finish: Finish) -> None:
        """End everything."""
        with self._wake:
            waiting = self._scheduler.entries()
        for entry in [*self._running, *([self._long] if self._long else []), *self._admitted, *waiting]:
            self._end(entry, finish, "the engine stopped" if finish == "error" else None)

    def _new_slots(self) -> tuple[Slots, Slots]:
        """Slots of the running rows, and of the long prompt."""
        device = self._forward.device
        return Slots(self.rows, self.length, device), Slots(1, self.length, device)

    # ------------------------------------------------------------------------------------------ what is told

    def _count(self, entry: RequestState, tokens: float) -> None:
        with self._wake:
            self._scheduler.charge(entry, tokens)

    def _tell_tokens(self, entry: RequestState) -> None:
        if entry.untold:
            self._tell("tokens", entry.request.mix, 0, entry.untold)
            entry.untold = 0

    def _tell(self, what: str, *values: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, what)(*values)
        except Exception:
            log.exception("the engine's observer failed at %r", what)


class _NoBank:
    """Stands for a lease where there is no bank."""

    def release(self) -> None:
        """There is nothing to give back."""


_NO_BANK = _NoBank()


def _at_once(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def give_back() -> None:
    """Let the C library give memory that nothing uses back to the system, where it can be told to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else () if ids is None else (ids,))
    return frozenset(found)
