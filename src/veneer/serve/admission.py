"""Take the next requests from the queue, as many as there are free rows and a few more, and load
their adapters.

    queue  --Admission.admit-->  loading  →  loaded  --Batch.add-->  a row

A request whose adapters are loaded has a lease on them, which keeps them in memory.

While the adapters of a request are loading, no other request for the same adapters is admitted.
Otherwise all of these would get leases at once, before others whose turn it is, and would occupy
memory without having rows.

While a load waits for memory that leases occupy, only requests for the base alone are admitted.
Otherwise new leases could follow one another for ever, and the load would never get its memory.
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
        bank: the adapters; None serves the base alone.
        lock: guards the scheduler.
        rows: the most requests that run at a time.
        wake: is called as ``wake()``, from any thread, when adapters have been loaded.
        end: is called as ``end(state, "error", message, error_kind)`` to end a request.
    """

    def __init__(
        self,
        bank: Any,
        scheduler: Scheduler[RequestState],
        lock: AbstractContextManager[Any],
        rows: int,
        wake: Callable[[], None],
        end: Callable[..., None],
    ) -> None:
        self.admitted: list[RequestState] = []  # their adapters are loading or loaded
        self._bank, self._scheduler, self._lock, self._rows = bank, scheduler, lock, rows
        self._wake, self._end = wake, end
        # blends whose adapters found no memory; they are tried again when a lease is released
        self._blends_without_memory: set[BlendKey] = set()

    @property
    def loaded(self) -> list[RequestState]:
        return [state for state in self.admitted if state.lease is not None]

    def admit(self, running: int) -> None:
        """Start to load the adapters of the next requests, and give leases to requests whose
        adapters are loaded. ``running``: number of rows that are in use."""
        for state in [each for each in self.admitted if each.lease is None]:
            self._take_loaded_lease(state, running)
        loading_blends = {state.blend_key for state in self.admitted if state.lease is None}
        while (
            len(self.loaded) < self._rows - running + MAX_LOADED_AHEAD
            and len(loading_blends) < self._rows
        ):
            is_crowded = self._bank is not None and self._bank.crowded and (running or self.loaded)
            with self._lock:
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
                    self._blends_without_memory | loading_blends | waiting_blends
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
                self._refuse(state, error, running)
                continue
            self._take_loaded_lease(state, running)
            if state.lease_future is not None and state.lease is None:
                loading_blends.add(state.blend_key)
                state.lease_future.add_done_callback(lambda _: self._wake())

    def remove(self, state: RequestState) -> None:
        if state in self.admitted:
            self.admitted.remove(state)

    def put_back(self, state: RequestState) -> None:
        """Put a request that lost its row (preempted) before all others. It keeps its lease."""
        self.admitted.insert(0, state)

    def release(self, state: RequestState) -> None:
        """Release a request's lease, now or as soon as its adapters are loaded."""
        future, state.lease_future, state.lease = state.lease_future, None, None
        if future is None:
            return

        def release(future: Any) -> None:
            if not future.cancelled() and future.exception() is None:
                future.result().release()

        future.add_done_callback(release)  # called at once if the future is done
        self._blends_without_memory.clear()

    def _take_loaded_lease(self, state: RequestState, running: int) -> None:
        if not state.lease_future.done():
            return
        if error := state.lease_future.exception():
            self._refuse(state, error, running)
            return
        try:
            state.take_lease(state.lease_future.result())
        except RequestError as error:
            self._refuse(state, error, running)

    def _refuse(self, state: RequestState, error: BaseException, running: int) -> None:
        """Handle a request whose adapters could not be loaded or blended. If leases of other
        requests occupy the memory, queue it again; otherwise end it with the error."""
        self.admitted.remove(state)
        if (running or self.admitted) and isinstance(error, BankFullError):
            self._blends_without_memory.add(state.blend_key)
            state.lease_future, state.has_left_queue = None, False
            with self._lock:
                self._scheduler.push_back(state)
            return
        log.warning("request %s: its adapters cannot be had: %s", state.request.id, error)
        self._end(state, "error", str(error), error_kind_of(error))


def _base_lease_future() -> Future[Any]:
    # like a future of ``Bank.acquire`` that is done, with a lease on no adapter
    future: Future[Any] = Future()
    future.set_result(SimpleNamespace(release=lambda: None))
    return future
