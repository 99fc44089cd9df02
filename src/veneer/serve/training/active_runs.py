"""The waiting requests of runs (LoRA adapters that are trained), each run's in order, and the
promises (futures) of their answers.

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

#: the largest number of waiting requests of one run, and the most bytes of all their bodies
MAX_WAITING_REQUESTS, MAX_WAITING_BYTES = 1024, 64 * 2**20


class Promise(Future[Answer]):
    """The future answer to a request. It cannot be cancelled, so a client that disconnects while it
    waits does not take the answer from other clients."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._asyncio_future: asyncio.Future[Answer] | None = None

    def awaitable(self) -> asyncio.Future[Answer]:
        """A future of the running event loop with the same answer. All calls return one future,
        since a client may ask a thousand times before the answer exists, and a future for each call
        would stay in memory until then."""
        if (
            self._asyncio_future is None
            or self._asyncio_future.get_loop() is not asyncio.get_running_loop()
        ):
            self._asyncio_future = asyncio.wrap_future(self)
        return self._asyncio_future


class RunRequest(NamedTuple):
    """A request of a run. ``seq``: its number among the run's requests, from 0 on; ``kind``: such
    as "pass" (forward, and backward if requested), "step" or "save"; ``body``: protobuf for a pass,
    else JSON."""

    seq: int
    kind: str
    body: bytes


@dataclass(eq=False)
class ActiveRun:
    """A run that has waiting requests or is in memory.

    Fields:
        adapter_name: name of the run's adapter on the model.
        owner: name of the API key; "" on a server without keys.
        next_seq: number of the next request to compute. All requests before it are answered.
        state_seq: number of the last request that the state saved on the disk includes; -1 if no
            state is saved.
        failure: why the run accepts nothing but a checkpoint to load; None if it has not failed.
        waiting_requests: the accepted requests without an answer, by number.
        current_pass: the pass (forward, and backward if requested) that is being computed, or None.
        unsaved_seconds: seconds of computing since the run's state was last saved.
        last_used: when the run was last computed, or its current pass began.
        last_pass_ended: when the run's last pass ended; -infinity if there was none.
        curve: the run's loss curve; None until it is read from the disk.
        rate: how many tokens of the run are computed per second.
        waiting_since: when the next request began to wait for room in memory; infinity if it does
            not wait.
        retry_time: an answer of the run could not be written, and no request of the run is computed
            before this time; 0 if there was no such error.

    Times are those of ``time.monotonic``.
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
        """The request with the number ``next_seq``. None if it has not arrived, or if it is a pass
        that is already being computed."""
        return self.waiting_requests.get(self.next_seq) if self.current_pass is None else None


class Queue:
    """The active runs (those that have waiting requests or are in memory), and the promises of the
    answers to their requests.

    An ``ActiveRun`` is created from the store when its run is first used, and dropped when the run
    has no waiting requests and is not in memory, so that idle runs take no memory. The lock
    ``wake`` guards all fields. It is notified when there is work for the training thread.

    ``resident_adapters``: names of the adapters of runs in memory, which the trainer changes. A new
    queue contains the requests in ``store`` that have no answer."""

    def __init__(self, store: Store, resident_adapters: Container[str]) -> None:
        self.store, self._resident_adapters = store, resident_adapters
        self.wake = threading.Condition()
        self.active_runs: dict[str, ActiveRun] = {}  # by run id
        self.runs_by_adapter: dict[str, ActiveRun] = {}  # the same runs by adapter name
        #: runs with a request that is being computed, or that can be computed now
        self.busy_runs: dict[str, ActiveRun] = {}
        self.promises: dict[tuple[str, int], Promise] = {}  # by run id and request number
        #: runs that ``accept`` may have made active without adding a request to them. Only the
        #: training thread may drop them again (``drop_idle``).
        self._idle_runs: deque[ActiveRun] = deque()
        for run_id in store.waiting_runs():
            active_run = self.active_run(run_id)
            for row in store.requests_after(run_id, active_run.next_seq - 1):
                if not row["done"]:
                    self._add_request(active_run, RunRequest(row["seq"], row["kind"], row["body"]))

    # any thread may call the methods from here to ``ready_runs``

    def accept(self, run_id: str, seq: int | None, kind: str, body: bytes) -> int:
        """Write a request to the store and queue it; return its number. If a request with this
        number was accepted before, nothing changes.

        Args:
            seq: the number of the request in its run; None: the number after all others.
            kind: the kind of request, such as "pass" or "step".

        Raises:
            Busy: the number is ``MAX_WAITING_REQUESTS`` or more ahead of the number of the run's
                next request, or the run's waiting requests have too many bytes. The next request
                itself is always accepted, so that the run can continue.
        """
        with self.wake:
            active_run = self.active_run(run_id)
            waiting_requests = active_run.waiting_requests
            assigned_seq = (
                max([active_run.next_seq - 1, *waiting_requests]) + 1 if seq is None else seq
            )
            is_new = assigned_seq >= active_run.next_seq and assigned_seq not in waiting_requests
            waiting_bytes = sum(len(request.body) for request in waiting_requests.values())
            is_full = assigned_seq - active_run.next_seq >= MAX_WAITING_REQUESTS or (
                waiting_bytes and waiting_bytes + len(body) > MAX_WAITING_BYTES
            )
            if is_new and assigned_seq > active_run.next_seq and is_full:
                problem_text = (
                    f"request {assigned_seq} of a run whose next is {active_run.next_seq}, with"
                    f" {waiting_bytes:,} bytes that wait"
                )
                expected_text = (
                    f"less than {MAX_WAITING_REQUESTS} ahead, with {MAX_WAITING_BYTES:,} bytes"
                )
                raise Busy(sentence(problem_text, expected_text, "wait for those before it"), 1.0)
        is_added = is_new and self.store.add_request(run_id, assigned_seq, kind, body)
        with self.wake:
            # The training thread may have dropped the first ``ActiveRun`` while the store wrote.
            active_run = self.active_run(run_id)
            if is_added:
                self._add_request(active_run, RunRequest(assigned_seq, kind, body))
                self.wake.notify_all()
            else:
                self._idle_runs.append(active_run)
        return assigned_seq

    def promise(self, run_id: str, seq: int) -> Promise | None:
        """The promise of the answer to request number ``seq`` of a run. For an answered request, it
        is a new promise that already has the answer from the store. None: the request is unknown or
        its answer was deleted."""
        with self.wake:
            promise = self.promises.get((run_id, seq))
        if promise is not None:
            return promise
        request_row = self.store.request(run_id, seq)
        if request_row is None or not request_row["done"]:
            return None
        answered_promise = Promise()
        answered_promise.set_result(Answer(request_row["answer"], bool(request_row["binary"])))
        return answered_promise

    def active_run(self, run_id: str) -> ActiveRun:
        """The ``ActiveRun`` of a run, created from the store if the run is not active yet. The run
        must exist in the store."""
        with self.wake:
            if run_id not in self.active_runs:
                run_row = self.store.existing_run(run_id)
                adapter_name, next_seq = f"run{run_row['number']}", self.store.next_seq(run_id)
                failure = self.store.failure_of(run_id)
                active_run = ActiveRun(
                    run_id, adapter_name, run_row["owner"], next_seq, run_row["state"], failure
                )
                self.active_runs[run_id] = self.runs_by_adapter[adapter_name] = active_run
            return self.active_runs[run_id]

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
        """The runs with a request that can be computed now: the busy runs, except those whose last
        answer could not be written and is tried again later (``retry_time``)."""
        now = time.monotonic()
        with self.wake:
            return [
                active_run for active_run in self.busy_runs.values() if active_run.retry_time <= now
            ]

    # only the training thread may call the methods below

    def finish_request(self, active_run: ActiveRun, seq: int, answer: Answer) -> None:
        """Advance a run to the request after number ``seq``, drop the run if it is now idle and not
        in memory, and give the answer to the clients that wait for request ``seq``. The caller has
        written the answer to the store."""
        with self.wake:
            active_run.waiting_requests.pop(seq, None)
            active_run.next_seq = seq + 1
            promise = self.promises.pop((active_run.run_id, seq), None)
            self._update_busy(active_run)
        self.drop(active_run)
        if promise is not None:
            promise.set_result(answer)

    def drop(self, active_run: ActiveRun) -> None:
        """Forget the ``ActiveRun`` of a run if the run has no waiting requests and is not in
        memory. Only the training thread may call this method: if another thread dropped the run
        while it is being loaded, the run would get a second ``ActiveRun``."""
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
        """Forget the runs to which ``accept`` added no request, unless they have other waiting
        requests or are in memory."""
        while self._idle_runs:
            self.drop(self._idle_runs.popleft())
