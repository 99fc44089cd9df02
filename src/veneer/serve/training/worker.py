"""The thread that trains. It computes the requests of each run in their order, and passes of many
runs in one batch.

    accepted request → journal → waiting requests of its run → the run's next request:
        an operation, which is computed alone, or a pass, which joins a batch → answer

A run is one LoRA adapter that a client trains. A pass is a request for a forward, and a backward if
requested. An operation is any other request, such as an optimizer step or a save. The journal is
the table of requests on the disk (store.py). A run is loaded into memory when it is used
(run_memory.py). While every run in memory has a pass that is being computed, none can be evicted,
so a request of another run waits.

A failure of one run does not stop the others. A run's state (adapter, optimizer, loss curve) is
saved to the disk from time to time; if it cannot be written, nothing is lost, because the run can
be computed again from its requests. A run whose weights are too large to be saved is marked as
failed, and accepts nothing but a checkpoint to load.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from veneer.errors import DataError, VeneerError, sentence
from veneer.serve.requests import Busy
from veneer.serve.scheduler import Shares
from veneer.serve.training.active_runs import ActiveRun, Queue, RunRequest
from veneer.serve.training.curve import LOSS_METRIC, Batch
from veneer.serve.training.losses import check_datum, complete_settings
from veneer.serve.training.run_memory import PASS, REPLAYED_KINDS, Operation, RunMemory, log_failure
from veneer.serve.training.run_trainer import Adam, DivergenceError, Pass, Trainer
from veneer.serve.training.store import FAILED, FAILED_STEP_INPUT, SUCCEEDED, Store
from veneer.serve.training.wire import Answer, failure_answer, pass_output, read_header, read_pass

log = logging.getLogger("veneer.serve.training")

#: how long a batch waits for passes of runs whose last pass ended recently, so that these runs
#: share a batch again: a fraction of the last batch's duration, and a maximum in seconds
WAIT_SHARE, MAX_WAIT_SECONDS = 0.25, 0.05
#: seconds that the training thread sleeps after an error that belongs to no request, and seconds
#: until an answer that could not be written (for example, to a full disk) is computed again
PAUSE_SECONDS = 1.0
#: how many times the process may die while it computes one request alone after a restart. Then the
#: request is answered with an error, because it would probably kill the process again.
MAX_DEATHS = 3
#: kinds of requests that only have an error as their answer, given when all earlier requests of the
#: run are answered. A refused pass with a backward, and a number for which no request came, are
#: kinds of their own, because the run's next optimizer step reports them in its metrics.
REFUSED, REFUSED_PASS, MISSING = "refused", "refused_pass", "missing"
#: kinds of requests that can be computed without room for their run in memory
KINDS_WITHOUT_ROOM = ("unload", REFUSED, REFUSED_PASS, MISSING)
#: kinds of requests for which the run need not be loaded first: they create the run, replace its
#: weights, or do not use them
KINDS_WITHOUT_RUN = ("load", "create", *KINDS_WITHOUT_ROOM)


def _affects_step(request: RunRequest) -> bool:
    """Whether the run's next optimizer step lacks gradients if this request fails: the request is a
    pass with a backward (refused or not), or never arrived and may have been one."""
    return request.kind in (REFUSED_PASS, MISSING) or (
        request.kind == PASS and read_header(request.body).backward
    )


class Worker:
    """The training thread. No other thread may call the trainer.

    Args:
        context_length: the largest number of tokens in a sequence of the base model.
        vocabulary_size: the number of token ids of the base model.
        max_resident: the largest number of runs in memory.

    Attributes:
        operations: by the kind of request, the functions that compute requests other than passes
            (forward, and backward if requested) and refused requests. Other modules may add to it.
    """

    def __init__(
        self,
        trainer: Trainer,
        store: Store,
        *,
        context_length: int,
        vocabulary_size: int,
        max_resident: int,
    ) -> None:
        self.trainer, self.store = trainer, store
        self.context_length, self.vocabulary_size = context_length, vocabulary_size
        self.operations: dict[str, Operation] = {"step": self._step_optimizer}
        self.queue = Queue(store, trainer.runs)
        self.active_runs = self.queue.active_runs
        self.memory = RunMemory(
            trainer, store, self.queue, max_resident, self.operations, self._make_pass
        )
        #: by run id: the number of the run's next request when ``live.publish`` last put its
        #: weights into the bank
        self.published: dict[str, int] = {}
        self.steps = self.tokens = 0  # optimizer steps and trained tokens since the server started
        self.batch: Batch | None = None  # the last batch that was computed
        self._wake = self.queue.wake
        #: calls of ``submit``: (function, future of its result, id of the run that must be in
        #: memory or have room there before the function is called, or None)
        self._tasks: deque[tuple[Callable[[], Any], Future[Any], str | None]] = deque()
        #: by API key: how many tokens were computed for it, to serve the least served key first
        self._key_shares = Shares()
        self._batch_seconds = 0.0  # duration of the last batch
        self._closing = False
        #: runs that had waiting requests when the server started. The first of these requests may
        #: have killed the previous process, so it is computed alone (``_run_suspect``).
        self._suspects = [
            active_run
            for active_run in self.active_runs.values()
            if active_run.next_request is not None
        ]
        self._thread = threading.Thread(target=self._loop, name="veneer-training", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the running batch, and write the states of the runs in memory. Requests
        without an answer stay on the disk, and the next server computes them."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for active_run in self.memory.resident_runs():
            self.memory.write_state_if_due(active_run)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, function: Callable[[], Any], run_id: str | None = None) -> Future[Any]:
        """Call a function on the worker's thread between two batches; return the future of its
        result or error. With ``run_id``, the call waits until that run is in memory or has
        room there. If the server shuts down first, the future gets the error ``Busy``. Any thread
        may call this method."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._wake:
            if self._closing:
                future.set_exception(_closing_error())
            else:
                self._tasks.append((function, future, run_id))
                self._wake.notify_all()
        return future

    # only the worker's thread calls the methods below

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._tasks or self.queue.ready_runs()):
                    # A run that is busy but not ready has an answer that could not be written. Wake
                    # after a pause, to compute and write this answer again.
                    self._wake.wait(PAUSE_SECONDS if self.queue.busy_runs else None)
                if self._closing:
                    break
            try:
                self.run_once()
            except Exception:
                log.exception("a turn of the training thread failed")
                time.sleep(PAUSE_SECONDS)
        self._run_tasks()
        for _, future, _ in self._tasks:  # calls whose runs have no room in memory
            future.set_exception(_closing_error())

    def _call_for_each(
        self, active_runs: Iterable[ActiveRun], function: Callable[[ActiveRun], Any]
    ) -> None:
        """Call a function for each run. If a call fails, for example because an answer cannot be
        written, the run's request is tried again later, and the other runs continue."""
        for active_run in active_runs:
            try:
                function(active_run)
            except Exception as error:
                log_failure(f"{active_run.run_id}: a request could not be answered", error)
                active_run.retry_time = time.monotonic() + PAUSE_SECONDS

    def _run_tasks(self) -> None:
        """Call the functions that were passed to ``submit``, except those whose run has no room in
        memory now; these are kept for the next round."""
        self.queue.drop_idle()
        for _ in range(len(self._tasks)):
            function, future, run_id = self._tasks.popleft()
            if run_id is not None and not self.memory.has_room(self.queue.active_run(run_id)):
                self._tasks.append((function, future, run_id))
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def run_once(self) -> None:
        """Call the functions that were passed to ``submit``, then compute one round of requests.

        After a restart, each round computes only the first waiting request of one run, because this
        request may have killed the previous process. When each run that waited at the start has had
        its round, a round computes the operations (all requests but passes) that are next in their
        runs, and one batch of passes (forward, and backward if requested)."""
        self._run_tasks()
        if self._suspects:
            self._run_suspect(self._suspects.pop())
            return
        self._run_operations()
        self._end_passes()
        self._begin_passes()
        self._wait_for_recent_runs()
        passes = self._ordered_passes()
        if passes:
            self._compute_batch(passes)

    def _run_suspect(self, active_run: ActiveRun) -> None:
        """Compute the first waiting request of a run alone, after the server has started: if the
        process dies again, this request was the cause. If the process has died ``MAX_DEATHS`` times
        in this function during the same request, answer the request with an error."""
        request = active_run.next_request
        if request is None:
            return
        # Load the run before the attempt is counted: a failure to load is not the request's fault.
        if request.kind not in KINDS_WITHOUT_RUN:
            try:
                self.memory.ensure_loaded(active_run)
            except Exception as error:  # a later round fails too, and answers the request
                log.warning("%s: not loaded before its request: %s", active_run.run_id, error)
                return
        if self.store.count_attempt(active_run.run_id, request.seq) > MAX_DEATHS:
            log.error(
                "%s: request %d ended the server %d times: given up",
                active_run.run_id,
                request.seq,
                MAX_DEATHS,
            )
            error_text = sentence(
                f"a request during which the server's process ended {MAX_DEATHS} times",
                "one for which it has the memory",
                "ask for fewer or shorter rows at a time",
            )
            request = request._replace(
                kind=REFUSED_PASS if _affects_step(request) else REFUSED,
                body=json.dumps({"error": error_text}).encode(),
            )
        if request.kind != PASS:
            self._answer_request(active_run, request)
            return
        self._begin_pass(active_run)
        while active_run.current_pass is not None and not self._closing:
            self._compute_batch([active_run.current_pass])
            self._run_tasks()
        # the server was closed during the pass: the process did not die because of this request
        if active_run.current_pass is not None:
            self.store.uncount_attempt(active_run.run_id, request.seq)

    def _run_operation(self, active_run: ActiveRun, request: RunRequest) -> Answer:
        fields = json.loads(request.body)
        if request.kind in (REFUSED, REFUSED_PASS, MISSING):
            raise DataError(fields["error"])
        self.memory.curve(active_run)
        if request.kind not in KINDS_WITHOUT_RUN:
            self.memory.ensure_loaded(active_run)
        active_run.last_used = time.monotonic()
        answer = Answer(json.dumps(self.operations[request.kind](active_run, fields)).encode())
        if request.kind == "load" and active_run.failure is not None:
            self.store.clear_failure(active_run.run_id)
            active_run.failure = None
        return answer

    def _answer_request(self, active_run: ActiveRun, request: RunRequest) -> None:
        """Compute the answer to a request that is no pass, store it, and advance the run to its
        next request. An error of the computation becomes the answer; an error of the store is
        raised."""
        status = SUCCEEDED
        try:
            answer = self._run_operation(active_run, request)
        except DivergenceError as error:
            self.memory.mark_failed(active_run, str(error))
            answer, status = failure_answer(error), FAILED
        except (VeneerError, ArithmeticError, MemoryError) as error:
            log.info("%s: request %d failed: %s", active_run.run_id, request.seq, error)
            answer, status = failure_answer(error), FAILED
        except Exception as error:
            log_failure(f"{active_run.run_id}: request {request.seq} failed", error)
            answer, status = failure_answer(error, is_bug=True), FAILED
            # The request may have changed the run in part, so load the run from the disk again.
            if request.kind in REPLAYED_KINDS:
                self.memory.drop(active_run)
        if status == FAILED and request.seq == 0:
            # Request 0 creates the run. The run does not exist, so it must not count in the quota.
            self.store.mark_unloaded(active_run.run_id)
        self._store_answer(active_run, request.seq, answer, status)
        if request.kind == "step" and status == SUCCEEDED:
            self.memory.curve(active_run).add_step()
            self.steps += 1
        if request.kind == "load" and status == SUCCEEDED:
            self.memory.curve(active_run).drop_passes()
            # Write the state now: to compute the load again after a restart would need the loaded
            # checkpoint, which may be deleted by then.
            self.memory.write_state_if_due(active_run)

    def _store_answer(self, active_run: ActiveRun, seq: int, answer: Answer, status: int) -> None:
        """Write the answer to request number ``seq`` to the store, then give it to the clients that
        wait for it. ``status``: ``SUCCEEDED`` or ``FAILED``. If the store fails, the run is dropped
        from memory and the error is raised."""
        if status == FAILED and _affects_step(active_run.waiting_requests[seq]):
            status = FAILED_STEP_INPUT
        try:
            self.store.store_answer(active_run.run_id, seq, status, answer.binary, answer.body)
        except Exception:
            # The run in memory includes a request without a stored answer, which will be computed
            # again. Drop the run, so that it is loaded in the state before this request.
            self.memory.drop(active_run)
            raise
        self.queue.finish_request(active_run, seq, answer)

    def _run_operations(self) -> None:
        """Compute the operations (all requests but passes) that are next in their runs.

        Runs in memory come first: their optimizer steps consume pending gradients, after which
        their states can be saved, so that they can be evicted to make room. The other runs follow
        in the order in which they began to wait for room."""

        def run_if_ready(active_run: ActiveRun) -> None:
            request = active_run.next_request
            if (
                request is not None
                and request.kind != PASS
                and self._has_room(active_run, request.kind)
            ):
                self._answer_request(active_run, request)

        ordered_runs = sorted(
            self.queue.ready_runs(), key=lambda run: (run not in self.memory, run.waiting_since)
        )
        self._call_for_each(ordered_runs, run_if_ready)

    def _begin_passes(self) -> None:
        """Begin the passes (forward, and backward if requested) that are next in their runs. Runs
        that have waited longest for room in memory come first."""
        ordered_runs = sorted(self.queue.ready_runs(), key=lambda run: run.waiting_since)
        self._call_for_each(ordered_runs, self._begin_pass)

    def _begin_pass(self, active_run: ActiveRun) -> None:
        """If a run's next request is a pass (a forward, and a backward if requested) and the run
        has room in memory, load the run and set ``current_pass``, so that the pass joins the next
        batches. If the pass is invalid or the run cannot be loaded, answer it with an error."""
        request = active_run.next_request
        if request is None or request.kind != PASS or not self._has_room(active_run, PASS):
            return
        try:
            training_pass = self._make_pass(active_run, request.body)
            self.memory.ensure_loaded(active_run)
        except Exception as error:
            is_bug = not isinstance(error, VeneerError)
            if is_bug:
                log_failure(f"{active_run.run_id}: request {request.seq} failed", error)
            self._store_answer(active_run, request.seq, failure_answer(error, is_bug), FAILED)
            if active_run.owner:  # uncount the tokens, which were counted when it was accepted
                self.store.count_tokens(active_run.owner, -read_header(request.body).token_count)
            return
        active_run.current_pass, active_run.last_used = training_pass, time.monotonic()
        self._key_shares.enter(active_run.owner)

    def _make_pass(self, active_run: ActiveRun, body: bytes) -> Pass:
        pass_request = read_pass(body)
        loss_settings = complete_settings(pass_request.loss, pass_request.settings)
        data = [
            check_datum(datum, pass_request.loss, index, self.vocabulary_size, self.context_length)
            for index, datum in enumerate(pass_request.data)
        ]
        return Pass(
            active_run.adapter_name,
            data,
            pass_request.loss,
            loss_settings,
            pass_request.backward,
            active_run.owner,
        )

    def _wait_for_recent_runs(self) -> None:
        """Wait up to ``MAX_WAIT_SECONDS`` for the next passes of runs whose last pass ended
        recently. Otherwise a run whose requests come slightly later would be computed alone each
        time. Do not wait if no pass has begun, or if one is computed in part."""
        passes = [
            active_run.current_pass
            for active_run in self.queue.ready_runs()
            if active_run.current_pass
        ]
        if not passes or any(
            len(training_pass.remaining) < len(training_pass.data) for training_pass in passes
        ):
            return
        wait_seconds = min(MAX_WAIT_SECONDS, WAIT_SHARE * self._batch_seconds)
        deadline = time.monotonic() + wait_seconds
        while (remaining_seconds := deadline - time.monotonic()) > 0:
            with self._wake:
                cutoff_time = time.monotonic() - 2 * self._batch_seconds - MAX_WAIT_SECONDS
                recent_runs = {
                    active_run
                    for active_run in self.active_runs.values()
                    if active_run.last_pass_ended > cutoff_time
                }
                if self._closing or recent_runs.issubset(self.queue.ready_runs()):
                    break
                self._wake.wait(remaining_seconds)
            self._run_operations()
            self._begin_passes()

    def _ordered_passes(self) -> list[Pass]:
        """The passes that have begun, in the order in which they may join the next batch. The
        passes of the API key for which the fewest tokens were computed come first, then those of
        all other keys. Within each of these two groups, the passes that began or were last in a
        batch the longest time ago come first. Counts as a turn of the first key."""
        passes = [
            active_run.current_pass
            for active_run in sorted(self.queue.ready_runs(), key=lambda run: run.last_used)
            if active_run.current_pass is not None
        ]
        if not passes:
            return []
        next_owner = self._key_shares.least({training_pass.owner for training_pass in passes})
        self._key_shares.turn(next_owner)
        return sorted(passes, key=lambda training_pass: training_pass.owner != next_owner)

    def _compute_batch(self, passes: list[Pass]) -> None:
        """Compute one batch, and answer the passes that it completes. The batch's duration and its
        tokens are divided equally among its runs: the duration counts as unsaved work of each run,
        and the tokens count for the API key of each run."""
        start_time = time.monotonic()
        tokens_by_adapter = self.trainer.compute(passes)
        end_time = time.monotonic()
        self._batch_seconds = end_time - start_time
        active_runs = [self.queue.runs_by_adapter[name] for name in tokens_by_adapter]
        self.batch = Batch(tuple(active_run.run_id for active_run in active_runs), end_time)
        token_count = sum(tokens_by_adapter.values())
        for active_run in active_runs:
            active_run.last_used = end_time
            active_run.rate.add(start_time, end_time, tokens_by_adapter[active_run.adapter_name])
            active_run.unsaved_seconds += self._batch_seconds / len(active_runs)
            self._key_shares.charge(active_run.owner, token_count / len(active_runs))
        self._end_passes()

    def _end_passes(self) -> None:
        """Answer the passes whose data are all computed or that have failed."""

        def end_if_computed(active_run: ActiveRun) -> None:
            if active_run.current_pass is not None and active_run.current_pass.is_over:
                self._end_pass(active_run, active_run.current_pass)

        self._call_for_each(self.queue.ready_runs(), end_if_computed)

    def _end_pass(self, active_run: ActiveRun, training_pass: Pass) -> None:
        """Store the answer to a pass that is computed or has failed. If it succeeded and had a
        backward, add it to the loss curve."""
        seq, error = active_run.next_seq, training_pass.error
        if error is None:
            logprobs: list[Any] = training_pass.logprobs
            output = pass_output(logprobs, {LOSS_METRIC: training_pass.loss_sum})
            answer, status = Answer(output, True), SUCCEEDED
        else:
            is_bug = not isinstance(error, VeneerError | MemoryError)
            answer, status = failure_answer(error, is_bug), FAILED
        self._key_shares.leave(active_run.owner)
        active_run.last_pass_ended = time.monotonic()
        active_run.current_pass = None
        self._store_answer(active_run, seq, answer, status)
        if status == SUCCEEDED and training_pass.backward:
            data = training_pass.data
            curve = self.memory.curve(active_run)
            curve.add_pass(training_pass.loss_sum, training_pass.loss, data)
            self.tokens += sum(len(datum.tokens) for datum in data)

    def _step_optimizer(self, active_run: ActiveRun, fields: Mapping[str, Any]) -> dict[str, Any]:
        metrics = self.trainer.step(active_run.adapter_name, Adam(**fields))
        return {"metrics": {**metrics, **self.store.failure_metrics(active_run.run_id)}}

    def _has_room(self, active_run: ActiveRun, request_kind: str) -> bool:
        """Whether a request of a run can be computed now: its kind needs no room in memory, or the
        run has room there. Requests of a failed run, except "load", need no room, since they are
        answered with an error. If there is no room, record since when the run waits."""
        needs_room = request_kind not in KINDS_WITHOUT_ROOM and (
            active_run.failure is None or request_kind == "load"
        )
        if needs_room and not self.memory.has_room(active_run):
            active_run.waiting_since = min(active_run.waiting_since, time.monotonic())
            return False
        active_run.waiting_since = math.inf
        return True


def _closing_error() -> Busy:
    return Busy(sentence("a server that is shutting down", "one that trains", "try later"), 5.0)
