"""The loop: requests come and go at every step.

    schedule → prefill → decode → sample → deliver

One thread computes. A step is at most one call for new prompts, of at most ``prefill`` tokens, and
one call for a token of each running row. A longer prompt is computed in pieces, beside the running
rows, and joins them when it is whole.

    submit → queue (scheduler: fair) → its adapters are loaded → prompt → row among the running →
    end
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from veneer.errors import sentence
from veneer.serve.admission import Admission
from veneer.serve.forward import Forward, context
from veneer.serve.grammars import Schemas
from veneer.serve.processors import processors_of
from veneer.serve.prompt_scores import PromptScorer
from veneer.serve.request_state import Deliver, RequestState
from veneer.serve.requests import Busy, Cause, Finish, Request, RequestError, cause_of
from veneer.serve.sampling import SampledToken, Sampler, sample
from veneer.serve.scheduler import PROMPT, Scheduler, fit_budget
from veneer.serve.slots import Slots
from veneer.serve.text import Detokenizer

log = logging.getLogger("veneer.serve")

#: seconds without work after which memory that is free is given back to the system
IDLE = 2.0


class Engine:
    """Answers requests with one model, many at a time, each with adapters of its own.

    Args:
        model: a causal language model of transformers. It is put into eval mode; while the engine
            is open its attention is the engine's in the engine's calls. Let nothing else call it in
            training mode.
        tokenizer: of the model.
        bank: the adapters; None serves the base alone.
        rows, queue: requests that run at a time, and that wait.
        length: tokens of a prompt and its answer together; the model's own limit, if that is less.
        prefill: tokens of prompts that are computed in one call.
        observer: is told what happens: queued(blend), started(blend, waited), first_token(blend,
            seconds), tokens(blend, prompt, generated), finished(blend, reason, seconds). Called by
            the engine's thread, queued by the client's.
        turn: a block around each step, for what must not change the model's layers meanwhile.

    Raises:
        ConfigError: an architecture that cannot be served (see ``Forward``).
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Any = None, rows: int = 16, length: int = 2048, prefill: int = 512,
        queue: int = 256, observer: Any = None, turn: AbstractContextManager[Any] | None = None,
    ) -> None:  # fmt: skip
        most = context(model.config)
        self.length, self.prefill, self.rows = min(length, most or length), prefill, rows
        self._bank, self._observer, self._detokenizer = bank, observer, Detokenizer(tokenizer)
        self._turn = nullcontext() if turn is None else turn
        self._forward = Forward(model.eval())
        try:
            self._forward.prove(self.length, lambda count: self._select_adapters([None] * count))
        except BaseException:
            self._forward.close()
            raise
        self._slots, self._aside = self._new_slots()
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        sources = (
            getattr(model, "generation_config", None),
            model.config.get_text_config(),
            tokenizer,
        )
        ends: list[Any] = [getattr(source, "eos_token_id", None) for source in sources]
        self._eos = frozenset(
            id
            for eos_id in ends
            for id in (eos_id if isinstance(eos_id, list | tuple) else [eos_id])
        ) - {None}
        self._schemas = Schemas(tokenizer, self._forward.logits, sorted(self._eos))
        self._scorer = PromptScorer(self._forward, prefill)

        self._wake = (
            threading.Condition()
        )  # guards what follows; notified when there is something to do or to know
        self._scheduler: Scheduler[RequestState] = Scheduler(queue)
        self._poked = self._draining = self._closing = False
        self._live = 0
        self._thread: threading.Thread | None = None

        # the engine's thread alone has these
        self._admission = Admission(bank, self._scheduler, self._wake, rows, self._poke, self._end)
        self._long: RequestState | None = None  # whose prompt is computed in pieces
        self._running: list[RequestState] = []  # row by row
        self._called: list[RequestState] = []  # for whom a call is made
        self._worked = False  # since memory was last given back

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> RequestState:
        """Queue a request, from any thread; what is returned can ``cancel`` it. ``deliver`` is
        called with each piece, in the engine's thread, and must return at once; the last piece, and
        no other, has ``finish``. ``RequestError``: a prompt that is empty, too long or of unknown
        tokens; a schema that is not understood. ``Busy``: the queue is full, or the engine is
        draining."""
        sampling, size, most = request.sampling, len(request.prompt), request.sampling.max_tokens
        scored_alone = most == 0 and sampling.prompt_logprobs is not None  # no answer needs room
        if not 0 < size <= self.length - (not scored_alone):
            expected = f"1 to {self.length - 1}, and room for an answer"
            raise RequestError(f"a prompt of {size} tokens", expected, "shorten it")
        if min(request.prompt) < 0 or max(request.prompt) >= self._vocabulary:
            expected = f"ids from 0 to {self._vocabulary - 1}"
            raise RequestError(
                "a token that the model does not have", expected, "use its tokenizer"
            )
        if most < 1 and not scored_alone:
            raise RequestError("an answer of no tokens", "max_tokens of at least 1", "ask for more")
        limit = min(most, self.length - size)
        grammar = sampling.schema if sampling.grammar is None else sampling.grammar
        sampler = Sampler(
            sampling,
            None if grammar is None else self._schemas.matcher(grammar),
            processors_of(
                sampling, request.prompt, self._eos, self._forward.logits, self._forward.device
            ),
            None if sampling.schema is None else self._schemas.layout(limit),
        )
        state = RequestState(request, deliver, sampler, self._detokenizer, limit, self._poke)
        with self._wake:
            if self._draining:
                raise Busy(
                    sentence("an engine that ends", "one that runs", "try another server"), 5.0
                )
            self._scheduler.add(state)
            self._live += 1
            self._notify_observer("queued", request.blend)
            self._poke()
        return state

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait, at most so long, until all others are over; whether they
        are."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: not self._live, timeout=seconds)

    def close(self) -> None:
        """Stop. Requests that have not ended are cancelled; the model is given back as it was."""
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
        return len(self._running) + (self._long is not None)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row or for their adapters."""
        return self._scheduler.waiting + len(self._admission.admitted)

    @property
    def ready(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._draining

    def _poke(self) -> None:
        with self._wake:
            self._poked = True
            self._wake.notify_all()

    def step(self) -> None:
        """One turn of the loop; ``start`` has a thread do nothing else."""
        self._worked, step_start = True, time.monotonic()
        for state in self._all():
            if state.cancelled or step_start >= state.deadline:
                self._end(state, "cancelled" if state.cancelled else "timeout")
        self._admission.admit(self.running)
        self._score_prompts()
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
            while not (self._poked or self.running or self._admission.loaded):
                until = (
                    min((state.deadline for state in self._all()), default=math.inf)
                    - time.monotonic()
                )
                if until <= 0:
                    break
                pause = min(until, IDLE if self._worked else threading.TIMEOUT_MAX)
                if not self._wake.wait(pause) and self._worked:
                    self._worked = False
                    give_back()
            self._poked = False
            return not self._closing

    def _step_or_restart(self) -> None:
        """A step; one that fails between its calls ends all that ran, and the slots are made
        anew."""
        try:
            with self._turn:
                self.step()
        except Exception as error:
            log.exception("a step of the engine failed; what ran is ended")
            running = {*self._running, *self._called, *filter(None, [self._long])}
            self._running, self._long = [], None
            self._slots, self._aside = self._new_slots()
            for state in running:
                state.row = None
                self._end(state, "error", f"{type(error).__name__}: {error}")

    def _all(self) -> list[RequestState]:
        with self._wake:
            waiting = self._scheduler.waiting_requests()
        return [*self._running, *filter(None, [self._long]), *self._admission.admitted, *waiting]

    def _next_prompts(self) -> list[RequestState]:
        """Choose the prompts to prefill next: one chunk of a long prompt, or several short ones
        within the token budget."""
        if self._long is not None:
            return [self._long]
        loaded = [
            state for state in self._admission.loaded if state.score is None or state.score.done
        ]
        ready = loaded[: self.rows - len(self._running)]
        if ready and len(ready[0].request.prompt) > self.prefill:
            group = ready[:1]
            self._long = ready[0]
        else:
            short = [state for state in ready if len(state.request.prompt) <= self.prefill]
            group = [
                short[i]
                for i in fit_budget([len(state.request.prompt) for state in short], self.prefill)
            ]
        admitted_at = time.monotonic()
        for state in group:
            self._admission.remove(state)
            self._notify_observer("started", state.request.blend, admitted_at - state.submitted)
            with self._wake:
                self._scheduler.began(admitted_at)
        return group

    def _compute(
        self, states: list[RequestState], call: Callable[[list[RequestState]], Tensor | None]
    ) -> None:
        """One call of the model for some requests, and what follows from it. A failure ends these
        alone."""
        if not states:
            return
        self._called = states
        try:
            with self._select_adapters([state.lease for state in states]):
                logits = call(states)
            sampled_tokens = (
                [] if logits is None else sample(logits, [state.sampler for state in states])
            )
        except Exception as error:
            log.exception("a call for %d requests failed", len(states))
            self._slots.clear(len(self._running), len(states))
            for state in states:
                self._end(state, "error", f"{type(error).__name__}: {error}")
            sampled_tokens = []
        for state, sampled in zip(
            states, sampled_tokens, strict=False
        ):  # none, where a prompt is not whole yet
            self._accept(state, sampled)
        self._called = []

    def _select_adapters(self, leases: Sequence[Any]) -> AbstractContextManager[Any]:
        return nullcontext() if self._bank is None else self._bank.rows(leases)

    def _score_prompts(self) -> None:
        """The next piece of prompts of which log-probabilities are asked for. An answer of one
        token, or of none, ends with its prompt; others wait for a row as if theirs were new."""
        group = self._scorer.next_group(self._admission.loaded)
        self._compute(group, self._scorer.compute)
        for state in group:
            if state.done or state.score is None or not state.score.done:
                continue
            state.send_prompt()
            size, blend, ended_at = len(state.request.prompt), state.request.blend, time.monotonic()
            self._charge(state, PROMPT * size)
            if state.limit > 1:
                continue
            self._notify_observer("started", blend, ended_at - state.submitted)
            self._notify_observer("tokens", blend, size, 0)
            with self._wake:
                self._scheduler.began(ended_at)
            if state.limit == 0:
                self._end(state, "length")
            else:
                self._compute([state], lambda states: states[0].score.last)  # pyright: ignore

    def _fill(self, states: list[RequestState]) -> Tensor | None:
        """Prompts, of which the first tokens are sampled; they run from now on. None: a long one is
        not whole yet."""
        prompts, row, long = (
            [state.request.prompt for state in states],
            len(self._running),
            self._long,
        )
        if long is None:
            logits = self._forward.fill(self._slots, row, prompts)
        else:  # the next piece
            start, long.length = long.length, min(long.length + self.prefill, len(prompts[0]))
            logits = self._forward.fill(self._aside, 0, [prompts[0][start : long.length]], start)
            if long.length < len(prompts[0]):
                return None
            self._slots.adopt(row, self._aside, long.length)
            self._long = None
        for state in states:
            state.length, state.row = len(state.request.prompt), len(self._running)
            self._running.append(state)
            self._charge(state, PROMPT * state.length)
            self._notify_observer("tokens", state.request.blend, state.length, 0)
        return logits

    def _decode(self, states: list[RequestState]) -> Tensor:
        logits = self._forward.decode(
            self._slots, [state.last for state in states], [state.length for state in states]
        )
        for state in states:
            state.length += 1
        return logits

    def _accept(self, state: RequestState, sampled: SampledToken) -> None:
        if sampled.token is None:
            self._end(state, "error", sampled.error, sampled.cause)
            return
        if not state.generated:
            self._notify_observer(
                "first_token", state.request.blend, time.monotonic() - state.submitted
            )
        self._charge(state, 1)
        self._notify_observer("tokens", state.request.blend, 0, 1)
        try:
            finish = state.accept(sampled, self._eos)
        except RequestError as error:  # a schema that turns out to be too much
            self._end(state, "error", str(error), cause_of(error))
        except Exception as error:
            log.exception("request %s: a token could not be taken", state.request.id)
            self._end(state, "error", f"{type(error).__name__}: {error}")
        else:
            if finish is not None:
                self._end(state, finish)

    def _end(
        self,
        state: RequestState,
        finish: Finish,
        error: str | None = None,
        cause: Cause | None = None,
    ) -> None:
        """A request is over, wherever it is: its row, its lease and its place are free, and its
        client knows."""
        if state.done:
            return
        if state.row is not None:
            row, last = state.row, self._running[-1]
            self._slots.leave(row, len(self._running) - 1)
            self._running[row], last.row = last, row  # the last one takes its place
            self._running.pop()
            state.row = None
        if state is self._long:
            self._aside.clear(0, 1)
            self._long = None
        self._admission.remove(state)
        self._admission.release(state)
        with self._wake:
            (self._scheduler.ended if state.taken else self._scheduler.remove)(state)
        state.end(finish, error, cause)  # who sees the last piece finds the place free
        with self._wake:
            self._live -= 1
            self._poke()  # what it held may be what another waits for
        self._notify_observer(
            "finished", state.request.blend, finish, time.monotonic() - state.submitted
        )

    @torch.inference_mode()  # in which the slots that these leave were made, or grew
    def _abandon(self, finish: Finish) -> None:
        for state in self._all():
            self._end(state, finish, "the engine stopped" if finish == "error" else None)

    def _new_slots(self) -> tuple[Slots, Slots]:
        device = self._forward.device
        return Slots(self.rows, self.length, device), Slots(1, self.length, device)

    def _charge(self, state: RequestState, tokens: float) -> None:
        with self._wake:
            self._scheduler.charge(state, tokens)

    def _notify_observer(self, event: str, *values: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*values)
        except Exception:
            log.exception("the engine's observer failed at %r", event)


def give_back() -> None:
    """Let the C library give memory that nothing uses back to the system, where it can be told to
    (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
