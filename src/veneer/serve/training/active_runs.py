"""The waiting requests of runs, each run's in order, and the promises of their answers.

accepted request → written to the store → waiting requests of its run
                 → the run's next request, when all requests before it are answered
                 → answer → promise
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Container
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from veneer.errors import sentence
from veneer.serve.requests import Busy
from veneer.serve.training.curve import Curve, TokenRate
from veneer.serve.training.run_trainer import Pass
from veneer.serve.training.store import Store
from veneer.serve.training.wire import Answer

#: the largest number of waiting requests of one run, and the most bytes of their bodies
MAX_WAITING_REQUESTS, MAX_WAITING_BYTES = 1024, 64 * 2**20


class Promise(Future[Answer]):
    """The future answer to a request. Clients that wait for it cannot cancel it."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._asyncio_future: asyncio.Future[Answer] | None = None

    def awaitable(self) -> asyncio.Future[Answer]:
        """A future of the running event loop. All calls share one future: a client may ask a
        thousand times before the answer exists, and a future for each call would stay in memory
        until then."""
        if (
            self._asyncio_future is None
            or self._asyncio_future.get_loop() is not asyncio.get_running_loop()
        ):
            self._asyncio_future = asyncio.wrap_future(self)
        return self._asyncio_future


class RunRequest(NamedTuple):
    """A request of a run. ``seq``: its number among the run's requests, from 0 on; ``kind``: such
    as "pass", "step" or "save"."""

    seq: int
    kind: str
    body: bytes


@dataclass(eq=False)
class ActiveRun:
    """A run that has waiting requests or is in memory.

    Fields:
        adapter_name: name of the run's adapter on the model.
        owner: name of the API key.
        next_seq: number of the next request to compute.
        state_seq: number of the last request in the saved state, or -1.
        failure: why the run accepts nothing but a checkpoint to load; None if it has not failed.
        waiting_requests: the accepted requests without an answer, by number.
        current_pass: the pass that is being computed.
        unsaved_seconds: seconds of computing since the run's state was last saved.
        last_used: time of the last computation for the run (``time.monotonic``), or when its
            current pass began.
        last_pass_ended: when the run's last pass ended.
        curve: the run's losses; None until they are read.
        rate: how many tokens of the run are computed per second.
        waiting_since: when the next request began to wait for room in memory, or infinity.
        retry_time: when to try again after an answer could not be written.
    """

    run_id: str
    adapter_name: str
    owner: str
    next_seq: int
    state_seq: int
    failure: str | None = None
    waiting_requests: dict[int, RunRequest] = field(default_factory=dict)
    current_pass: Pass | None = None
    unsaved_seconds: float = 0.0
    last_used: float = 0.0
    last_pass_ended: float = -math.inf
    curve: Curve | None = None
    rate: TokenRate = field(default_factory=TokenRate)
    waiting_since: float = math.inf
    retry_time: float = 0.0

    @property
    def next_request(self) -> RunRequest | None:
        """The request number ``next_seq``. None if it has not arrived, or if it is a pass that is
        already being computed."""
        return self.waiting_requests.get(self.next_seq) if self.current_pass is None else None


class Queue:
    """The active runs, and the promises of their requests.

    ``resident_adapters``: names of the adapters of runs in memory. An ``ActiveRun`` is created from
    the store when its run is first used, and dropped when the run is idle and not in memory, so
    that idle runs take no memory. ``wake`` guards all fields, and is notified when there is work
    for the training thread."""

    def __init__(self, store: Store, resident_adapters: Container[str]) -> None:
        self.store, self._resident_adapters = store, resident_adapters
        self.wake = threading.Condition()
        self.active_runs: dict[str, ActiveRun] = {}  # by run id
        self.runs_by_adapter: dict[str, ActiveRun] = {}  # the same runs by adapter name
        self.busy_runs: dict[str, ActiveRun] = {}  # runs with a request that can be computed
        self.promises: dict[tuple[str, int], Promise] = {}  # by run id and request number
        #: runs to which ``accept`` added no request, so that they may be idle
        self._idle_runs: deque[ActiveRun] = deque()
        for run in store.waiting_runs():
            active_run = self.active_run(run)
            for row in store.requests_after(run, active_run.next_seq - 1):
                if not row["done"]:
                    self._add_request(active_run, RunRequest(row["seq"], row["kind"], row["body"]))

    # any thread may call these

    def accept(self, run: str, seq: int | None, kind: str, body: bytes) -> int:
        """Write a request to the store and queue it; return its number. Nothing happens if a
        request with this number was accepted before. ``seq``: the number, or None for the number
        after all others. ``Busy``: the number is ``MAX_WAITING_REQUESTS`` or more ahead of the
        run's next one, or too many bytes of the run wait. The next request is always accepted."""
        with self.wake:
            active_run = self.active_run(run)
            waiting = active_run.waiting_requests
            number = max([active_run.next_seq - 1, *waiting]) + 1 if seq is None else seq
            is_new = number >= active_run.next_seq and number not in waiting
            waiting_bytes = sum(len(request.body) for request in waiting.values())
            is_full = number - active_run.next_seq >= MAX_WAITING_REQUESTS or (
                waiting_bytes and waiting_bytes + len(body) > MAX_WAITING_BYTES
            )
            if is_new and number > active_run.next_seq and is_full:
                problem = (
                    f"request {number} of a run whose next is {active_run.next_seq}, with"
                    f" {waiting_bytes:,} bytes that wait"
                )
                expected = (
                    f"less than {MAX_WAITING_REQUESTS} ahead, with {MAX_WAITING_BYTES:,} bytes"
                )
                raise Busy(sentence(problem, expected, "wait for those before it"), 1.0)
        is_added = is_new and self.store.add_request(run, number, kind, body)
        with self.wake:
            active_run = self.active_run(run)  # the previous one may have been dropped meanwhile
            if is_added:
                self._add_request(active_run, RunRequest(number, kind, body))
                self.wake.notify_all()
            else:
                self._idle_runs.append(active_run)
        return number

    def promise(self, run: str, seq: int) -> Promise | None:
        """The promise of a request's answer; None if the request is unknown or was deleted."""
        with self.wake:
            promise = self.promises.get((run, seq))
        if promise is not None:
            return promise
        row = self.store.request(run, seq)
        if row is None or not row["done"]:
            return None
        answered = Promise()
        answered.set_result(Answer(row["answer"], bool(row["binary"])))
        return answered

    def active_run(self, run: str) -> ActiveRun:
        """The ``ActiveRun`` of a run id, created from the store if the run is not active yet."""
        with self.wake:
            if run not in self.active_runs:
                row = self.store.existing_run(run)
                adapter_name, next_seq = f"run{row['number']}", self.store.next_seq(run)
                failure = self.store.failure_of(run)
                active_run = ActiveRun(
                    run, adapter_name, row["owner"], next_seq, row["state"], failure
                )
                self.active_runs[run] = self.runs_by_adapter[adapter_name] = active_run
            return self.active_runs[run]

    def _add_request(self, active_run: ActiveRun, request: RunRequest) -> None:
        active_run.waiting_requests[request.seq] = request
        self.promises[active_run.run_id, request.seq] = Promise()
        self._update_busy(active_run)

    def _update_busy(self, active_run: ActiveRun) -> None:
        if active_run.current_pass is not None or active_run.next_request is not None:
            self.busy_runs[active_run.run_id] = active_run
        else:
            self.busy_runs.pop(active_run.run_id, None)

    def ready_runs(self) -> list[ActiveRun]:
        """The busy runs, except those that wait to write an answer again (``retry_time``)."""
        now = time.monotonic()
        with self.wake:
            return [
                active_run for active_run in self.busy_runs.values() if active_run.retry_time <= now
            ]

    # only the worker's thread calls these

    def finish_request(self, active_run: ActiveRun, seq: int, answer: Answer) -> None:
        """Advance a run to the request after ``seq``, and resolve the promise of ``seq``. The
        answer is in the store already."""
        with self.wake:
            active_run.waiting_requests.pop(seq, None)
            active_run.next_seq = seq + 1
            promise = self.promises.pop((active_run.run_id, seq), None)
            self._update_busy(active_run)
        self.drop(active_run)
        if promise is not None:
            promise.set_result(answer)

    def drop(self, active_run: ActiveRun) -> None:
        """Forget a run if it is idle and not in memory. Only the training thread may call it: if
        another thread dropped the run while it is being loaded, the run would get a second
        ``ActiveRun``."""
        with self.wake:
            is_idle = (
                not active_run.waiting_requests
                and active_run.current_pass is None
                and active_run.adapter_name not in self._resident_adapters
            )
            if is_idle and self.active_runs.get(active_run.run_id) is active_run:
                del self.active_runs[active_run.run_id]
                del self.runs_by_adapter[active_run.adapter_name]

    def drop_idle(self) -> None:
        """Drop the idle runs among those to which ``accept`` added no request."""
        while self._idle_runs:
            self.drop(self._idle_runs.popleft())
