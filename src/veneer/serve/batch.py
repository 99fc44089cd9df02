"""The requests that have a row of the KV cache. In each step of the engine, ``Batch`` chooses which
prompts are computed, and which requests lose their rows (preemption) if memory runs out.

    add → filling (prefill) → its prompt is complete → running (decode) → remove
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

#: Requests that arrive together are a burst. In a burst, running requests wait until the prompts of
#: the others are computed, but only while each has generated at most this many tokens. The number
#: is not 0, because the first requests may get tokens before the others are submitted.
BURST_TOKENS = 4
#: BURST_SECONDS: a running request waits for other prompts of its burst only so long after its
#: start. ARRIVAL_SECONDS: the longest time between the start of the first running request and the
#: submission of a request of the same burst.
BURST_SECONDS, ARRIVAL_SECONDS = 15.0, 1.0


class Batch:
    """Requests with rows in ``memory`` (the KV cache): ``filling`` (prefill) and ``running``
    (decode). Only the engine's thread calls the methods. ``lock`` guards the scheduler;
    ``notify(event, *values)`` calls the engine's observer."""

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
        """The most prompt tokens that one forward call computes beside the next tokens of running
        requests. The number is smaller if requests use several adapters, because the bank groups
        the tokens of a call by adapter and pads each group to the size of the largest."""
        blends = {state.blend_key for state in (*self.filling, *self.running) if state.blend_key}
        return min(MAX_TOKENS_TOGETHER, 2 * MAX_TOKENS_TOGETHER // max(1, len(blends)))

    def add(self, state: RequestState) -> bool:
        """Give a request a row, and return whether there was memory for it. The request begins to
        decode at once if keys and values of all of its tokens were cached."""
        if not self.memory.start(state):
            return False
        if state.start_number < 0:
            state.start_number, state.cached = next(self._start_numbers), state.length
            now, blend = time.monotonic(), state.request.blend
            state.started_at = now
            self._notify("started", blend, now - state.submitted_at)
            self._notify("looked_up", blend, len(state.ids), state.cached)
            with self._lock:
                self._scheduler.began(now)
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
        """Choose the prompts of which this step computes tokens; the prefill budget sets the number
        of tokens. ``prefill_end`` of each returned request is set to the index at which its tokens
        of this step end. Requests of the API key and the adapter that were served the fewest tokens
        come first. Prompts whose log-probabilities the client asks for (``is_scored``) need calls
        of their own, so the result has either only such prompts or none."""
        if not self.filling:
            return []
        with self._lock:
            candidates = self._scheduler.by_service(self.filling)
        running_count, budget = len(self.running), self._prefill_budget
        if self.is_burst():
            # running requests wait, so plan as if none ran. Compute the first prompt with prompts
            # of similar length, for less padding
            first_length = len(candidates[0].ids) - candidates[0].length
            running_count, candidates = (
                0,
                sorted(candidates, key=lambda s: abs(len(s.ids) - s.length - first_length)),
            )
        is_scored = candidates[0].is_scored
        token_budget = budget.tokens(
            running_count, len(candidates), self.max_shared_prompt_tokens, scored=is_scored
        )
        if not token_budget:
            return []
        candidates = [state for state in candidates if state.is_scored == is_scored]
        token_counts = [
            min(state.call_end(state.length) - state.length, token_budget) for state in candidates
        ]
        chosen_indices = fit_budget(token_counts, token_budget)
        for index in chosen_indices:
            candidates[index].prefill_end = candidates[index].length + token_counts[index]
        states = [candidates[index] for index in chosen_indices]
        unchosen = [state for state in self.filling if state not in states]
        self.filling = [*unchosen, *states]
        return states

    def is_burst(self) -> bool:
        """Whether the prompts are computed before the running requests decode further. Requests
        that arrived together all end sooner if they decode in the same calls. So the result is true
        if some of the prompts arrived with the running requests, each running request has generated
        at most ``BURST_TOKENS`` tokens and started less than ``BURST_SECONDS`` ago, and no prompt
        needs more than one call. It is false if the prefill budget has a ``gap``, which limits the
        time that running requests wait for prompts."""
        budget = self._prefill_budget
        if not self.filling or budget.gap is not None:
            return False
        earliest_start = time.monotonic() - BURST_SECONDS
        start_times = [state.started_at or 0.0 for state in self.running]
        last_arrival = min(start_times, default=math.inf) + ARRIVAL_SECONDS
        return (
            any(s.submitted_at <= last_arrival and s.limit > 1 for s in self.filling)
            and all(
                len(s.ids) - s.length
                <= (budget.max_scored_tokens if s.is_scored else budget.max_prompt_tokens)
                for s in self.filling
            )
            and all(state.generated <= BURST_TOKENS for state in self.running)
            and all(start_time > earliest_start for start_time in start_times)
        )

    def note_filled(self, states: Sequence[RequestState], finite: Sequence[bool]) -> list[int]:
        """Record that tokens of these prompts were computed. Requests whose prompts are complete
        begin to decode; their indices in ``states`` are returned. ``finite``: whether the logits of
        each prompt are finite. If not, its keys and values are not cached for other requests."""
        complete_indices: list[int] = []
        for index, state in enumerate(states):
            with self._lock:
                self._scheduler.charge(
                    state, PROMPT_TOKEN_COST * (state.prefill_end - state.length)
                )
            state.length = state.prefill_end
            if finite[index]:
                self.memory.save(state)
            if state.length == len(state.ids):
                complete_indices.append(index)
                self.filling.remove(state)
                self._run(state)
        return complete_indices

    def _run(self, state: RequestState) -> None:
        """Let a request decode: its row now has the keys and values of all of its tokens."""
        self.running.append(state)
        if not state.generated:  # its prompt was not counted yet
            self._notify("tokens", state.request.blend, state.length, 0)

    def sort_running(self) -> list[RequestState]:
        """Sort ``running`` by the positions of the rows in memory, and return a copy of it."""
        self.running.sort(key=lambda state: state.row.position if state.row else (0, 0))
        return list(self.running)

    def widen(self) -> Iterator[RequestState]:
        """Make room for the next token of each running request, as the caller iterates. If memory
        runs out, free the row of the request that started last (preemption), as often as needed.
        Yield each preempted request at once, so that the caller has queued it again before the next
        attempt, which may raise an error."""
        for state in sorted(self.running, key=lambda state: state.start_number):
            while not self.memory.widen(state):
                preempted = max(
                    [*self.filling, *self.running], key=lambda state: state.start_number
                )
                self.remove(preempted)
                preempted.length = 0
                self._notify("preempted", preempted.request.blend)
                yield preempted
