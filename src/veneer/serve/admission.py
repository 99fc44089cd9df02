"""Take requests from the queue and load their adapters. As many are taken as there are free rows
of the KV cache, plus a few.

    queue  --Admission.admit-->  loading  →  loaded  --Batch.add-->  a row

A request whose adapters are loaded has a lease on them, which keeps them in memory.

While the adapters of a request are loading, no other request for the same adapters is admitted.
Otherwise all requests for these adapters would get leases when the load ends. They would overtake
requests that the scheduler puts before them, and would occupy memory without having rows.

While a load waits for memory that leases occupy, only requests for the base alone are admitted.
Otherwise new leases could always replace those that end, and the load would never get its memory.
Leases of long answers may outlast this wait. The request is then queued again, and admitted when
its adapters fit beside those that are leased, or when the leases that outlasted the wait have
ended: until then, a second wait would be in vain and stop the others once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from veneer.errors import BankFullError
from veneer.serve.request_state import RequestState
from veneer.serve.requests import RequestError, error_kind_of
from veneer.serve.scheduler import BlendKey, Scheduler

log = logging.getLogger("veneer.serve")

#: the most requests whose adapters are loaded although no row is free for them yet
MAX_LOADED_AHEAD = 4


class Admission:
    """The requests that have left the queue and have no row yet. Only the engine's thread calls
    the methods.

    Args:
        bank: loads the adapters; None serves the base model alone.
        lock: guards the scheduler.
        max_rows: the most requests that run at a time; each has a row of the KV cache.
        wake: is called as ``wake()``, from any thread, when adapters have been loaded.
        end: is called as ``end(state, "error", message, error_kind)`` to end a request.
    """

    def __init__(
        self,
        bank: Any,
        scheduler: Scheduler[RequestState],
        lock: AbstractContextManager[Any],
        max_rows: int,
        wake: Callable[[], None],
        end: Callable[..., None],
    ) -> None:
        self.admitted: list[RequestState] = []  # their adapters are loading or loaded
        self._bank, self._scheduler, self._lock, self._max_rows = bank, scheduler, lock, max_rows
        self._wake, self._end = wake, end
        self._leased: set[RequestState] = set()
        # blends (adapters with weights) that found no memory, with ``BankFullError.needed_bytes``
        # and the requests that had leases then. Requests for such a blend are admitted again once
        # it fits, or once none of these leases remains, since waiting may help then
        self._blends_without_memory: dict[BlendKey, tuple[int, frozenset[RequestState]]] = {}

    @property
    def loaded(self) -> list[RequestState]:
        return [state for state in self.admitted if state.lease is not None]

    def admit(self, running_count: int) -> None:
        """Start to load the adapters of the next requests, and give requests whose adapters are
        loaded their leases, which keep the adapters in memory. ``running_count``: number of rows
        that are in use."""
        for state in [each for each in self.admitted if each.lease is None]:
            self._take_loaded_lease(state, running_count)
        if not (running_count or self.admitted):  # no release will come after which a blend may fit
            self._blends_without_memory.clear()
        loading_blends = {state.blend_key for state in self.admitted if state.lease is None}
        while (
            len(self.loaded) < self._max_rows - running_count + MAX_LOADED_AHEAD
            and len(loading_blends) < self._max_rows
        ):
            is_crowded = (
                self._bank is not None and self._bank.crowded and (running_count or self.loaded)
            )
            with self._lock:
                # if a load waits for memory, exclude all blends: only requests for the base remain
                waiting_blends = (
                    {
                        state.blend_key
                        for state in self._scheduler.waiting_requests()
                        if state.blend_key
                    }
                    if is_crowded
                    else set()
                )
                state = self._scheduler.take(
                    self._blends_without_memory.keys() | loading_blends | waiting_blends
                )
            if state is None:
                break
            state.has_left_queue = True
            self.admitted.append(state)
            try:
                state.lease_future = (
                    _base_lease_future()
                    if self._bank is None
                    else self._bank.acquire(state.request.blend)
                )
            except Exception as error:
                self._handle_load_error(state, error, running_count)
                continue
            self._take_loaded_lease(state, running_count)
            if state.lease_future is not None and state.lease is None:
                loading_blends.add(state.blend_key)
                state.lease_future.add_done_callback(lambda _: self._wake())

    def remove(self, state: RequestState) -> None:
        if state in self.admitted:
            self.admitted.remove(state)

    def put_back(self, state: RequestState) -> None:
        """Admit a request again, before all others, after it lost its row for lack of memory
        (preemption). It has kept its lease."""
        self.admitted.insert(0, state)

    def release(self, state: RequestState) -> None:
        """Release a request's lease: now, or once its adapters are loaded if they are loading.
        Requests whose adapters found no memory may be admitted again."""
        future, state.lease_future, state.lease = state.lease_future, None, None
        self._leased.discard(state)
        if future is None:
            return

        def release_loaded(future: Any) -> None:
            if not future.cancelled() and future.exception() is None:
                future.result().release()

        future.add_done_callback(release_loaded)  # runs at once if the future is done
        if self._blends_without_memory:
            self._forget_blends_to_retry()

    def _forget_blends_to_retry(self) -> None:
        leased = [entry for entry in self._bank.status() if entry.users and not entry.pinned]
        for blend_key, (needed_bytes, blockers) in [*self._blends_without_memory.items()]:
            names = {name for name, _ in blend_key}
            leased_bytes = sum(entry.bytes for entry in leased if entry.name not in names)
            fits = needed_bytes + leased_bytes <= self._bank.capacity
            if fits or blockers.isdisjoint(self._leased):
                del self._blends_without_memory[blend_key]

    def _take_loaded_lease(self, state: RequestState, running_count: int) -> None:
        if not state.lease_future.done():
            return
        if error := state.lease_future.exception():
            self._handle_load_error(state, error, running_count)
            return
        try:
            state.take_lease(state.lease_future.result())
            self._leased.add(state)
        except RequestError as error:
            self._handle_load_error(state, error, running_count)

    def _handle_load_error(
        self, state: RequestState, error: BaseException, running_count: int
    ) -> None:
        """Handle a request whose adapters could not be loaded or combined. If it lacks memory that
        other requests' leases occupy, queue it again; otherwise end it with the error."""
        self.admitted.remove(state)
        needed_bytes = error.needed_bytes if isinstance(error, BankFullError) else None
        if needed_bytes is not None and (running_count or self.admitted):
            self._blends_without_memory[state.blend_key] = needed_bytes, frozenset(self._leased)
            state.lease_future, state.has_left_queue = None, False
            with self._lock:
                self._scheduler.push_back(state)
            return
        log.warning("request %s: its adapters cannot be had: %s", state.request.id, error)
        self._end(state, "error", str(error), error_kind_of(error))


def _base_lease_future() -> Future[Any]:
    # A server without a bank has nothing to load. This future stands in for ``Bank.acquire``'s: it
    # is done, and its result is a lease on no adapter.
    future: Future[Any] = Future()
    future.set_result(SimpleNamespace(release=lambda: None))
    return future
