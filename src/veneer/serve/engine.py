"""The engine's loop: in each step, waiting requests get rows of the KV cache, prompts are computed
(prefill), and each running row gets a token (decode). Requests may start and end at every step
(continuous batching).

    schedule → prefill → decode → sample → deliver

One thread calls the model. A step is at most one call for prompts (prefill) and one call for a
token of each running row (decode). While rows run, a step computes no more prompt tokens than
``prefill_budget.py`` allows, so a long prompt takes several steps. A few prompt tokens are computed
in the decode call.

    submit → queue (fair scheduler) → adapters loaded → row (within the memory budget), which begins
    with a cached prefix → prefill → decode → end

If there is no memory for the next token of a row, the request that started last loses its row
(preemption). Its tokens are kept and computed again later; its client sees a pause.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from veneer.errors import listing, sentence
from veneer.models.decode.forward import Forward, context_limit
from veneer.models.sampling_defaults import end_tokens
from veneer.serve.admission import Admission
from veneer.serve.batch import Batch
from veneer.serve.grammars import MatcherFactory
from veneer.serve.memory import Memory, free_bytes, max_row_tokens, return_unused_memory
from veneer.serve.prefill_budget import PrefillBudget
from veneer.serve.processors import processors_of
from veneer.serve.prompt_scores import scored_per_call, take_scores
from veneer.serve.request_state import Deliver, RequestState, last_tokens_of
from veneer.serve.requests import Busy, ErrorKind, Finish, Request, RequestError, error_kind_of
from veneer.serve.sampling import NOT_FINITE, SampledToken, Sampler, sample
from veneer.serve.scheduler import Scheduler
from veneer.serve.text import Detokenizer

log = logging.getLogger("veneer.serve")

#: seconds after which unused memory is returned to the system, and after which cached prefixes that
#: no request used are dropped
IDLE_SECONDS, PREFIX_IDLE_SECONDS = 2.0, 300.0

#: (requests whose next tokens are sampled, their logits [requests, vocabulary]; None if none)
Computed = tuple[list[RequestState], Tensor | None]


class Engine:
    """Answers many requests at a time with one model, each with its own adapters.

    Args:
        model: a causal language model of transformers. It is put into eval mode. While the engine
            is open, its calls replace the model's attention. No other code may call the model in
            training mode.
        tokenizer: the model's tokenizer.
        bank: loads and applies the adapters; None serves the base alone.
        rows, queue: the most requests that run at a time, and the most that wait.
        length: the most tokens of a prompt and its answer together. The model's limit and
            ``cache_memory`` may reduce it.
        prefill: the most prompt tokens of one call.
        observer: is told what happens, by the engine's thread. Its methods, where ``seconds`` are
            those since submission: started(blend, seconds), looked_up(blend, prompt tokens, cached
            ones), first_token(blend, seconds), next_token(blend, seconds since the token before),
            tokens(blend, prompt tokens, generated ones), preempted(blend), finished(blend, reason,
            seconds).
        model_lock: a lock that the engine holds during each step, so that code that holds it can
            change the model's layers.
        cache_memory: the most bytes of keys and values, of rows and cached prefixes together; None
            is half of the free memory.
        prefix_cache: whether requests reuse keys and values of common prefixes.
        gap: seconds of a step that prompts may take while rows run; None follows the time of the
            decode calls (see ``PrefillBudget``).

    Raises:
        ConfigError: an architecture that cannot be served (see ``Forward``), or a ``cache_memory``
            that holds no row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Any = None,
        rows: int = 16,
        length: int = 2048,
        prefill: int = 512,
        queue: int = 256,
        observer: Any = None,
        model_lock: AbstractContextManager[Any] | None = None,
        *,
        cache_memory: int | None = None,
        prefix_cache: bool = True,
        gap: float | None = None,
    ) -> None:
        max_context = context_limit(model.config)
        self.length, self.rows = min(length, max_context or length), rows
        self._bank, self._observer, self._detokenizer = bank, observer, Detokenizer(tokenizer)
        self._model_lock = nullcontext() if model_lock is None else model_lock
        self._forward = Forward(model.eval())
        try:
            self._forward.compare_logits(self.length, lambda n: self._select_adapters([None] * n))
            device = self._forward.device
            self.cache_memory = free_bytes(device) // 2 if cache_memory is None else cache_memory
            self.length = max_row_tokens(self._forward.forms, self.cache_memory, self.length)
        except BaseException:
            self._forward.close()
            raise
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        eos = self._eos = end_tokens(model, tokenizer)
        self._matcher_factory = MatcherFactory(tokenizer, self._forward.logit_count, sorted(eos))

        # guards the attributes below; notified when they change
        self._wake = threading.Condition()
        self._scheduler: Scheduler[RequestState] = Scheduler(queue)
        self._is_woken = self._draining = self._closing = False
        self._open_count = 0  # number of requests that have not ended
        self._thread: threading.Thread | None = None

        # used by the engine's thread only
        self._admission = Admission(bank, self._scheduler, self._wake, rows, self._poke, self._end)
        scored = scored_per_call(prefill, self._forward.logit_count)
        self._prefill_budget, self._prefix_cache = PrefillBudget(gap, prefill, scored), prefix_cache
        self._batch = self._new_batch()
        self._requests_in_call: list[RequestState] = []  # requests of the current forward call
        self._stepped_since_trim = False  # whether a step ran since unused memory was last returned

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> RequestState:
        """Queue a request, from any thread; the returned state can ``cancel`` it. The engine's
        thread calls ``deliver`` with each piece of the answer. ``deliver`` must return at once.
        Only the last piece has ``finish``. ``RequestError``: the prompt or a sampling setting is
        invalid. ``Busy``: the queue is full, or the engine is draining."""
        sampling, prompt_length = request.sampling, len(request.prompt)
        max_tokens = sampling.max_tokens
        is_only_scored = max_tokens == 0 and sampling.prompt_logprobs is not None
        if not 0 < prompt_length <= self.length - (not is_only_scored):
            raise RequestError(
                f"a prompt of {prompt_length} tokens",
                f"1 to {self.length - 1}, and room for an answer",
                "shorten it",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self._vocabulary:
            raise RequestError(
                "a token that the model does not have",
                f"ids from 0 to {self._vocabulary - 1}",
                "use its tokenizer",
            )
        if max_tokens < 1 and not is_only_scored:
            raise RequestError("an answer of no tokens", "max_tokens of at least 1", "ask for more")
        answer_limit = min(max_tokens, self.length - prompt_length)
        grammar = sampling.schema if sampling.grammar is None else sampling.grammar
        sampler = Sampler(
            sampling,
            None if grammar is None else self._matcher_factory.matcher(grammar),
            processors_of(
                sampling, request.prompt, self._eos, self._forward.logit_count, self._forward.device
            ),
            None if sampling.schema is None else self._matcher_factory.layout(answer_limit),
        )
        state = RequestState(request, deliver, sampler, self._detokenizer, answer_limit, self._poke)
        with self._wake:
            if self._draining:
                raise Busy(
                    sentence("an engine that ends", "one that runs", "try another server"), 5.0
                )
            self._scheduler.add(state)
            self._open_count += 1
            self._poke()
        return state

    def drain(self, seconds: float) -> bool:
        """Refuse new requests, wait up to ``seconds`` for open ones; return whether all ended."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: not self._open_count, timeout=seconds)

    def close(self) -> None:
        """Stop the engine, cancel open requests and restore the model."""
        with self._wake:
            self._draining = self._closing = True
            self._poke()
        if self._thread is not None:
            self._thread.join()
        else:
            self._end_all("cancelled")
        self._forward.close()

    @property
    def running(self) -> int:
        return len(self._batch)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row or for their adapters."""
        return self._scheduler.waiting + len(self._admission.admitted)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, of rows and cached prefixes."""
        return self._batch.memory.nbytes

    @property
    def ready(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._draining

    def _poke(self) -> None:
        with self._wake:
            self._is_woken = True
            self._wake.notify_all()

    def step(self) -> None:
        """Run one step of the loop. The thread of ``start`` repeats it while there is work."""
        self._stepped_since_trim, step_start = True, time.monotonic()
        for state in self._open_states():
            if state.cancelled or step_start >= state.deadline:
                self._end(state, "cancelled" if state.cancelled else "timeout")
        self._batch.memory.trim(IDLE_SECONDS, PREFIX_IDLE_SECONDS)
        self._admission.admit(self.running)
        self._start_requests()
        self._widen_rows()
        filling = self._batch.choose_prompts()
        token_count = sum(state.prefill_end - state.length for state in filling)
        is_scored, is_burst = bool(filling) and filling[0].is_scored, self._batch.is_burst()
        can_share = self._batch.running and 0 < token_count <= self._batch.max_shared_prompt_tokens
        shares_call = can_share and not (is_scored or is_burst)
        if shares_call and self._compute_together(filling, token_count):
            return
        if filling:
            longest_chunk = max(state.prefill_end - state.length for state in filling)
            seconds = self._compute(filling, self._fill)
            self._prefill_budget.note_fill(len(filling) * longest_chunk, seconds, scored=is_scored)
            self._widen_rows()
        if self._batch.running and not self._batch.is_burst():
            running = self._batch.sort_running()
            self._prefill_budget.note_decode(len(running), self._compute(running, self._decode))

    def _run(self) -> None:
        finish: Finish = "error"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step_or_restart()
            finish = "cancelled"
        finally:  # also after a failure of the thread, so that no client waits forever
            with self._wake:
                self._draining = True
            self._end_all(finish)

    def _wait_for_work(self) -> bool:
        """Sleep until a step has work, and free unused memory meanwhile. False if the engine
        closes."""
        with self._wake:
            while not (self._is_woken or self.running or self._admission.loaded):
                deadline = min((state.deadline for state in self._open_states()), default=math.inf)
                if deadline <= time.monotonic():
                    break
                expiry_seconds = self._batch.memory.expires_in(PREFIX_IDLE_SECONDS)
                trim_seconds = IDLE_SECONDS if self._stepped_since_trim else expiry_seconds
                max_sleep = threading.TIMEOUT_MAX if trim_seconds is None else trim_seconds
                is_notified = self._wake.wait(min(deadline - time.monotonic(), max_sleep))
                if not is_notified and trim_seconds is not None:
                    self._stepped_since_trim = False
                    self._batch.memory.trim(0, PREFIX_IDLE_SECONDS)
                    return_unused_memory()
            self._is_woken = False
            return not self._closing

    def _step_or_restart(self) -> None:
        """Run a step. An error in a call of the model ends only the call's requests. After any
        other error, end all requests that have rows, and allocate new memory for rows."""
        try:
            with self._model_lock:
                self.step()
        except Exception as error:
            log.exception("a step of the engine failed; what ran is ended")
            states = {*self._batch.filling, *self._batch.running, *self._requests_in_call}
            self._batch = self._new_batch()
            for state in states:
                state.row = None
                self._end(state, "error", f"{type(error).__name__}: {error}")

    def _open_states(self) -> list[RequestState]:
        with self._wake:
            waiting = self._scheduler.waiting_requests()
        batch = self._batch
        return [*batch.running, *batch.filling, *self._admission.admitted, *waiting]

    def _start_requests(self) -> None:
        """Give rows to requests whose adapters are loaded, while there are rows and memory. A
        request with the same first tokens as one in prefill waits, to reuse its keys and values."""
        for state in self._admission.loaded:
            if self.running >= self.rows:
                return
            try:
                if self._batch.memory.waits_for(state, self._batch.filling):
                    continue
                if not self._batch.add(state):
                    return
            except Exception as error:
                self._end_failed([state], error, "no row could be made")
                continue
            self._admission.remove(state)
            if state.prompt_logits is not None and state.length == len(state.ids):
                self._sample([state], state.prompt_logits[None])

    def _compute(
        self, states: list[RequestState], call: Callable[[list[RequestState]], Computed]
    ) -> float:
        """Run one forward call for ``states`` and sample their next tokens; return the seconds that
        both took. If it fails, only these requests end."""
        self._requests_in_call, start = states, time.monotonic()
        try:
            with self._select_adapters([state.acting_lease for state in states]):
                sampled_states, logits = call(states)
        except Exception as error:
            self._end_failed(states, error)
        else:
            if logits is not None:
                self._sample(sampled_states, logits)
        self._requests_in_call = []
        return time.monotonic() - start

    def _sample(self, states: list[RequestState], logits: Tensor) -> None:
        """Sample the next tokens of requests from logits [requests, vocabulary]."""
        for state, state_logits in zip(states, logits, strict=True):
            if self._prefix_cache and state.prompt_logits is None:  # kept for equal prompts
                state.prompt_logits = state_logits.clone()
        try:
            sampled_tokens = sample(logits, [state.sampler for state in states])
        except Exception as error:
            self._end_failed(states, error)
            return
        for state, sampled in zip(states, sampled_tokens, strict=True):
            self._accept(state, sampled)

    def _end_failed(
        self, states: list[RequestState], error: Exception, problem: str = "a call failed"
    ) -> None:
        ids_text = listing(state.request.id for state in states)
        log.error("%s; requests that end: %s", problem, ids_text, exc_info=error)
        for state in states:
            self._end(state, "error", f"{type(error).__name__}: {error}")

    def _compute_together(self, filling: list[RequestState], token_count: int) -> bool:
        """Run one forward call for the next tokens of running requests and for ``token_count``
        tokens of prompts (``filling``). If it fails, return False without ending any request."""
        running, start = self._batch.sort_running(), time.monotonic()
        states = [*running, *filling]
        self._requests_in_call = states
        leases = [state.acting_lease for state in running]
        for state in filling:
            leases += [state.acting_lease] * (state.prefill_end - state.length)
        chunks: list[Any] = [(s.row, s.length, s.ids[s.length : s.prefill_end]) for s in filling]
        last_tokens, slots = last_tokens_of(running), self._batch.memory.slots
        try:
            with self._select_adapters(leases):
                logits = self._forward.together(slots, *last_tokens, chunks)
            finite = torch.isfinite(logits[len(running) :].amax(-1)).tolist()
        except Exception:
            log.warning("a call for rows and prompts failed; each is computed alone", exc_info=True)
            return False
        for state in running:
            state.length += 1
        filled_rows = [len(running) + index for index in self._batch.note_filled(filling, finite)]
        sampled_indices = [*range(len(running)), *filled_rows]
        logits = logits[sampled_indices] if filled_rows else logits[: len(running)]
        self._sample([states[index] for index in sampled_indices], logits)
        self._prefill_budget.note_together(token_count, time.monotonic() - start)
        self._requests_in_call = []
        return True

    def _select_adapters(self, leases: Sequence[Any]) -> AbstractContextManager[Any]:
        return nullcontext() if self._bank is None else self._bank.rows(leases, invoked=True)

    def _fill(self, states: list[RequestState]) -> Computed:
        """Compute prompts, or chunks of them. Requests whose prompts are complete begin to decode;
        they are returned with the logits from which their next tokens are sampled."""
        rows: list[Any] = [state.row for state in states]
        chunks = [state.ids[state.length : state.prefill_end] for state in states]
        starts, slots = [state.length for state in states], self._batch.memory.slots
        scores = [state.score for state in states if state.score and state.is_scored]
        options = {"of_all_tokens": True} if scores else {}
        logits = self._forward.fill(slots, rows, chunks, starts, **options)
        finite = torch.isfinite(logits.amax(-1))
        if scores:
            logits, finite = take_scores(scores, starts, list(map(len, chunks)), logits, finite)
        is_finite = finite.tolist()
        complete_indices = self._batch.note_filled(states, is_finite)
        for index, state in enumerate(states if scores else ()):
            if not is_finite[index]:
                self._end(state, "error", NOT_FINITE.error, NOT_FINITE.error_kind)
            elif index in complete_indices:
                state.send_prompt()
                if not state.limit:  # the client asked only for the prompt's scores
                    self._end(state, "length")
        complete_indices = [index for index in complete_indices if not states[index].done]
        if len(complete_indices) < len(states):
            logits = logits[complete_indices] if complete_indices else None
        return [states[index] for index in complete_indices], logits

    def _widen_rows(self) -> None:
        """Make room for the next token of each running request. Requests that lose their rows
        (preemption) wait for new rows, in which they are computed again."""
        for state in self._batch.widen():
            self._admission.put_back(state)

    def _decode(self, states: list[RequestState]) -> Computed:
        logits = self._forward.decode(self._batch.memory.slots, *last_tokens_of(states))
        for state in states:
            state.length += 1
        return states, logits

    def _accept(self, state: RequestState, sampled: SampledToken) -> None:
        if sampled.token is None:
            self._end(state, "error", sampled.error, sampled.error_kind)
            return
        previous, state.sampled_at = state.sampled_at, time.monotonic()
        event, start = (
            ("next_token", previous) if state.generated else ("first_token", state.submitted_at)
        )
        self._notify_observer(event, state.request.blend, state.sampled_at - start)
        with self._wake:
            self._scheduler.charge(state, 1)
        self._notify_observer("tokens", state.request.blend, 0, 1)
        try:
            finish = state.accept(sampled, self._eos)
        except RequestError as error:  # the grammar needs more than the matcher's limits
            self._end(state, "error", str(error), error_kind_of(error))
        except Exception as error:
            self._end_failed([state], error, "a token could not be taken")
        else:
            if finish is not None:
                self._end(state, finish)

    def _end(
        self,
        state: RequestState,
        finish: Finish,
        error: str | None = None,
        error_kind: ErrorKind | None = None,
    ) -> None:
        """End a request, wherever it is: free its row, its lease on adapters and its place in the
        queue, and deliver its last piece. Does nothing if the request has ended."""
        if state.done:
            return
        if state.generated and finish != "error":
            # cache the answer, too, because the next turn of a chat begins with it
            self._batch.memory.finish(state)
        self._batch.remove(state)
        self._admission.remove(state)
        self._admission.release(state)
        with self._wake:
            (self._scheduler.ended if state.has_left_queue else self._scheduler.remove)(state)
        # only after the place is freed: a client may send its next request upon its last piece
        state.end(finish, error, error_kind)
        with self._wake:
            self._open_count -= 1
            self._poke()  # another request may wait for its memory
        self._notify_observer(
            "finished", state.request.blend, finish, time.monotonic() - state.submitted_at
        )

    @torch.inference_mode()  # rows are inference tensors: change them only in this mode
    def _end_all(self, finish: Finish) -> None:
        for state in self._open_states():
            self._end(state, finish, "the engine stopped" if finish == "error" else None)

    def _new_batch(self) -> Batch:
        memory = Memory(
            self.rows,
            self.length,
            self._forward.device,
            self._forward.forms,
            self.cache_memory,
            prefix_cache=self._prefix_cache,
        )
        return Batch(
            memory, self._prefill_budget, self._scheduler, self._wake, self._notify_observer
        )

    def _notify_observer(self, event: str, *values: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*values)
        except Exception:
            log.exception("the engine's observer failed at %r", event)
