"""The requests that have a row of the KV cache. Choose the prompts of which a step of the engine
computes tokens, and the requests that lose their rows (preemption) if memory runs out.

add → filling → (its prompt is computed) → running → remove
             widen: no memory for a next token → the request that started last is preempted
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from veneer.serve.memory import Memory
from veneer.serve.prefill_budget import MAX_TOKENS_TOGETHER, PrefillBudget
from veneer.serve.request_state import RequestState
from veneer.serve.scheduler import PROMPT_TOKEN_COST, Scheduler, fit_budget

#: Requests that arrive together are a burst. In a burst, running requests wait for the prompts of
#: the others, but only while they have at most this many tokens. It is not 0, because the first
#: ones to arrive may get tokens before the others are there.
BURST_TOKENS = 4
#: seconds since its start for which a request waits for others, and seconds after the start of the
#: first running request in which the others of its burst are submitted
BURST_SECONDS, ARRIVAL_SECONDS = 15.0, 1.0


class Batch:
    """Requests with rows in ``memory``: ``filling`` (prefill) and ``running`` (decode). Only the
    engine's thread calls the methods. ``lock`` guards the scheduler; ``notify(event, *values)``
    calls the engine's observer."""

    def __init__(
        self,
        memory: Memory,
        prefill_budget: PrefillBudget,
        scheduler: Scheduler[RequestState],
        lock: AbstractContextManager[Any],
        notify: Callable[..., None],
    ) -> None:
        self.memory, self._prefill_budget, self._scheduler, self._lock = (
            memory,
            prefill_budget,
            scheduler,
            lock,
        )
        self._notify = notify
        self._start_numbers = itertools.count()
        self.filling: list[RequestState] = []
        self.running: list[RequestState] = []

    def __len__(self) -> int:
        return len(self.filling) + len(self.running)

    @property
    def max_shared_prompt_tokens(self) -> int:
        """The most prompt tokens that are computed in one call with the running rows. There are
        fewer if the requests use several adapters, because the bank groups the tokens of a call by
        adapter and pads each group to the size of the largest."""
        blends = {state.blend_key for state in (*self.filling, *self.running) if state.blend_key}
        return min(MAX_TOKENS_TOGETHER, 2 * MAX_TOKENS_TOGETHER // max(1, len(blends)))

    def add(self, state: RequestState) -> bool:
        """Give a request a row, and return whether there was memory for it. The request begins to
        run at once if keys and values of all of its tokens were cached."""
        if not self.memory.start(state):
            return False
        if state.start_number < 0:
            state.start_number, state.cached = next(self._start_numbers), state.length
            moment, blend = time.monotonic(), state.request.blend
            state.started_at = moment
            self._notify("started", blend, moment - state.submitted_at)
            self._notify("looked_up", blend, len(state.ids), state.cached)
            with self._lock:
                self._scheduler.began(moment)
        if state.length == len(state.ids):
            self._run(state)
        else:
            self.filling.append(state)
        return True

    def remove(self, state: RequestState) -> None:
        """Free the row of a request, if it has one."""
        self.memory.release(state)
        for states in (self.filling, self.running):
            if state in states:
                states.remove(state)

    def choose_prompts(self) -> list[RequestState]:
        """Choose the prompts of which this step computes tokens, as many as ``prefill_budget.py``
        allows. ``prefill_end`` of each returned request is set to the index at which its tokens of
        this step end. Requests of the API key and the adapter that were served least come first.
        Prompts whose log-probabilities the client asks for (``is_scored``) have calls of their
        own."""
        if not self.filling:
            return []
        with self._lock:
            order = self._scheduler.by_service(self.filling)
        rows, budget = len(self.running), self._prefill_budget
        if self.is_burst():  # compute the first prompt with prompts of similar length: less padding
            size = len(order[0].ids) - order[0].length
            rows, order = 0, sorted(order, key=lambda s: abs(len(s.ids) - s.length - size))
        scored = order[0].is_scored
        tokens = (
            budget.scored_tokens(rows, len(order))
            if scored
            else budget.tokens(rows, len(order), self.max_shared_prompt_tokens)
        )
        if not tokens:
            return []
        order = [state for state in order if state.is_scored == scored]
        counts = [min(state.call_end(state.length) - state.length, tokens) for state in order]
        chosen = fit_budget(counts, tokens)
        for number in chosen:
            order[number].prefill_end = order[number].length + counts[number]
        states = [order[number] for number in chosen]
        unchosen = [state for state in self.filling if state not in states]
        self.filling = [*unchosen, *states]
        return states

    def is_burst(self) -> bool:
        """Whether the prompts are computed before the next tokens of the running requests. Requests
        that arrived together all end sooner if they decode in the same calls. So this is true if
        some of the prompts arrived with the running requests, these have only their first tokens,
        and no prompt needs more than one call. It is never true with a ``gap``, a fixed limit."""
        budget = self._prefill_budget
        if not self.filling or budget.gap is not None:
            return False
        latest = time.monotonic() - BURST_SECONDS
        started = [state.started_at or 0.0 for state in self.running]
        arrival = min(started, default=math.inf) + ARRIVAL_SECONDS
        return (
            any(s.submitted_at <= arrival and s.limit > 1 for s in self.filling)
            and all(
                len(s.ids) - s.length
                <= (budget.max_scored_tokens if s.is_scored else budget.max_prompt_tokens)
                for s in self.filling
            )
            and all(state.generated <= BURST_TOKENS for state in self.running)
            and all(moment > latest for moment in started)
        )

    def note_filled(self, states: Sequence[RequestState], finite: Sequence[bool]) -> list[int]:
        """Record that tokens of these prompts were computed. Requests whose prompts are complete
        begin to run; their indices are returned. Only keys and values of prompts whose logits are
        ``finite`` are cached for other requests."""
        complete: list[int] = []
        for number, state in enumerate(states):
            with self._lock:
                self._scheduler.charge(
                    state, PROMPT_TOKEN_COST * (state.prefill_end - state.length)
                )
            state.length = state.prefill_end
            if finite[number]:
                self.memory.save(state)
            if state.length == len(state.ids):
                complete.append(number)
                self.filling.remove(state)
                self._run(state)
        return complete

    def _run(self, state: RequestState) -> None:
        """Let a request run: all of its tokens have keys and values in its row."""
        self.running.append(state)
        if not state.generated:
            self._notify("tokens", state.request.blend, state.length, 0)

    def sort_running(self) -> list[RequestState]:
        """The running requests in the order of their rows."""
        self.running.sort(key=lambda state: state.row.position if state.row else (0, 0))
        return list(self.running)

    def widen(self) -> Iterator[RequestState]:
        """Make room for the next token of each running request. If memory runs out, preempt the
        requests that started last, the latest first. Yield each of them at once, so that the caller
        has put it back even if the next attempt raises an error."""
        for state in sorted(self.running, key=lambda state: state.start_number):
            while not self.memory.widen(state):
                last = max([*self.filling, *self.running], key=lambda state: state.start_number)
                self.remove(last)
                last.length = 0
                self._notify("preempted", last.request.blend)
                yield last
