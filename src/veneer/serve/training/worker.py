"""The thread that trains: requests of each run in their order, passes of many runs in one batch.

    accept → journal → line of the run → at the head: an operation, or a pass → batch (trainer) →
    answer

Each run that is used is in memory (run_memory.py). A request that needs room there waits at the
head of its run's line while all runs in memory are computed.

A failure concerns one run only. A state that cannot be written now is computed again from its
requests. A run whose weights no state can hold is marked as failed, and accepts nothing but a
checkpoint to load.
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
from veneer.serve.training.curve import LOSS, Batch
from veneer.serve.training.lines import Line, Queue, RunRequest
from veneer.serve.training.losses import check_datum, complete_settings
from veneer.serve.training.run_memory import PASS, REPLAYED, Operation, RunMemory
from veneer.serve.training.run_trainer import Adam, DivergenceError, Pass, Trainer
from veneer.serve.training.store import Store
from veneer.serve.training.wire import (
    Answer,
    failure,
    has_backward,
    pass_output,
    read_header,
    read_pass,
)

log = logging.getLogger("veneer.serve.training")

#: how long a batch waits for runs of the last batch: a share of that batch's seconds, and a maximum
#: in seconds
LINGER, MOST_LINGER = 0.25, 0.05
#: seconds to wait after an error of the thread itself, such as a full disk, and before an answer
#: that could not be written is tried again
PAUSE = 1.0
#: how many times the process may die during one request before that request is given up
DEATHS = 3
#: kinds of refused requests, which are answered in the run's order. A refused pass with a backward
#: and a missing number also change the meaning of the next step.
REFUSED, REFUSED_PASS, MISSING = "refused", "refused_pass", "missing"
#: kinds that need no room in memory, and kinds for which the run is not loaded first
NEED_NO_ROOM = ("unload", REFUSED, REFUSED_PASS, MISSING)
NEED_NO_RUN = ("load", "create", *NEED_NO_ROOM)
#: how many runs to remember with the request after which they were last published
PUBLISHED = 512


def _affects_step(request: RunRequest) -> bool:
    """Whether the next step is not what the client intended if this request fails."""
    return request.kind in (REFUSED_PASS, MISSING) or (
        request.kind == PASS and has_backward(request.body)
    )


class Worker:
    """One thread, the only one that calls the trainer. ``operations``: by the kind of a request,
    except passes. ``length``, ``vocabulary``: of the base."""

    def __init__(
        self, trainer: Trainer, store: Store, *, length: int, vocabulary: int, resident: int = 50
    ) -> None:
        self.trainer, self.store = trainer, store
        self.length, self.vocabulary = length, vocabulary
        self.operations: dict[str, Operation] = {"step": self._step}
        self.queue = Queue(store, trainer.runs)
        self.lines = self.queue.lines
        self.memory = RunMemory(
            trainer, store, self.queue, resident, self.operations, self._make_pass
        )
        #: by run: its next request when its weights were last published for samples
        self.published: dict[str, int] = {}
        self.steps = self.tokens = 0  # by this server: steps, and tokens that were trained on
        self.batch: Batch | None = None  # the last one
        self._wake = self.queue.wake
        self._tasks: deque[tuple[Callable[[], Any], Future[Any], str | None]] = deque()
        self._shares = Shares()
        self._last_passes: dict[str, float] = {}  # by run: when its last pass ended
        self._batch_seconds = 0.0
        self._closing = False
        #: runs whose first request may have ended the previous server
        self._suspects = [line for line in self.lines.values() if line.head is not None]
        self._thread = threading.Thread(target=self._loop, name="veneer-training", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the running batch. Waiting requests are on the disk."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for line in self.memory.lines():
            self.memory.write_state_if_due(line)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    # any thread

    def do(self, work: Callable[[], Any], run: str | None = None) -> Future[Any]:
        """Run a function on the worker's thread between two batches; with ``run``, once that run is
        in memory or has room there."""
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        with self._wake:
            if self._closing:
                done.set_exception(_closing_error())
            else:
                self._tasks.append((work, done, run))
                self._wake.notify_all()
        return done

    # the worker's thread

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._tasks or self.queue.active()):
                    # A line that is busy but not active has an answer that could not be written,
                    # which is tried again after a pause.
                    self._wake.wait(PAUSE if self.queue.busy else None)
                if self._closing:
                    break
            try:
                self.turn()
            except Exception:
                log.exception("a turn of the training thread failed")
                time.sleep(PAUSE)
        self._do_tasks()
        for _, done, _ in self._tasks:  # tasks that wait for room in memory
            done.set_exception(_closing_error())

    def _for_each(self, lines: Iterable[Line], work: Callable[[Line], Any]) -> None:
        """Call a function for each line. A line whose call fails, for example because its answer
        cannot be written, is tried again later; the other lines go on."""
        for line in lines:
            try:
                work(line)
            except Exception:
                log.exception("%s: a request could not be answered", line.run)
                line.again = time.monotonic() + PAUSE

    def _do_tasks(self) -> None:
        self.queue.drop_idle()
        for _ in range(len(self._tasks)):
            work, done, run = self._tasks.popleft()
            if run is not None and not self.memory.has_room(self.queue.line(run)):
                self._tasks.append((work, done, run))
                continue
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

    def turn(self) -> None:
        """Run the tasks of ``do``. Then replay, one at a time, requests that may have ended the
        previous server; without any, run the operations at the heads of lines and one batch."""
        self._do_tasks()
        if self._suspects:
            self._try_suspect(self._suspects.pop())
            return
        self._do_operations()
        self._end_passes()
        self._begin_passes()
        self._linger()
        passes = self._ordered_passes()
        if passes:
            self._compute(passes)

    def _try_suspect(self, line: Line) -> None:
        """Run the first waiting request of a run alone, after the server has started. If the
        process dies during it again and again, the request is given up."""
        request = line.head
        if request is None:
            return
        # load the run before the attempt is counted: the request is not to blame for failures here
        if request.kind not in NEED_NO_RUN:
            try:
                self.memory.ensure(line)
            except Exception:
                return  # it fails again and is answered in its regular turn
        if self.store.begin(line.run, request.seq) > DEATHS:
            log.error(
                "%s: request %d ended the server %d times: given up", line.run, request.seq, DEATHS
            )
            message = sentence(
                f"a request during which the server's process ended {DEATHS} times",
                "one for which it has the memory",
                "ask for fewer or shorter rows at a time",
            )
            request = request._replace(
                kind=REFUSED_PASS if _affects_step(request) else REFUSED,
                body=json.dumps({"error": message}).encode(),
            )
        if request.kind != PASS:
            self._answer(line, request, lambda: self._operate(line, request))
            return
        self._begin(line)
        while line.current is not None and not self._closing:
            self._compute([line.current])
            self._do_tasks()
        if line.current is not None:  # the server was closed, which is no death
            self.store.uncount_begin(line.run, request.seq)

    def _operate(self, line: Line, request: RunRequest) -> Answer:
        fields = json.loads(request.body)
        if request.kind in (REFUSED, REFUSED_PASS, MISSING):
            raise DataError(fields["error"])
        self.memory.curve(line)
        if request.kind not in NEED_NO_RUN:
            self.memory.ensure(line)
        line.used = time.monotonic()
        answer = Answer(json.dumps(self.operations[request.kind](line, fields)).encode())
        if request.kind == "load" and line.failed is not None:
            self.store.recover(line.run)
            line.failed = None
        return answer

    def _answer(self, line: Line, request: RunRequest, work: Callable[[], Answer]) -> None:
        """Run a request, write its answer, and advance the line."""
        done = 1
        try:
            answer = work()
        except DivergenceError as error:
            self.memory.fail(line, str(error))
            answer, done = failure(error), 2
        except (VeneerError, ArithmeticError, MemoryError) as error:
            log.info("%s: request %d failed: %s", line.run, request.seq, error)
            answer, done = failure(error), 2
        except Exception as error:
            log.exception("%s: request %d failed", line.run, request.seq)
            answer, done = failure(error, is_bug=True), 2
            if request.kind in REPLAYED:  # it may have changed the run in part
                self.memory.drop(line)
        if done == 2 and request.seq == 0:
            self.store.unload(line.run)  # the run did not begin
        self._finalize(line, request.seq, answer, done)
        if request.kind == "step" and done == 1:
            self.memory.curve(line).add_step()
            self.steps += 1
        if request.kind == "load" and done == 1:
            self.memory.curve(line).drop_passes()
            self.memory.write_state_if_due(line)  # the checkpoint may be deleted later

    def _finalize(self, line: Line, seq: int, answer: Answer, done: int) -> None:
        if done == 2 and _affects_step(line.waiting[seq]):
            done = 3
        try:
            self.store.answer(line.run, seq, done, answer.binary, answer.body)
        except Exception:  # the run in memory is ahead of the disk: load it again from there
            self.memory.drop(line)
            raise
        self.queue.answer(line, seq, answer)

    def _do_operations(self) -> None:
        """Run the operations at the heads of lines. Runs in memory are first: they then have no
        gradients that wait for a step when others need their room. The others follow in the order
        in which they began to wait for room."""

        def operate(line: Line) -> None:
            request = line.head
            if request is not None and request.kind != PASS and self._has_room(line, request.kind):
                self._answer(line, request, lambda: self._operate(line, request))

        lines = sorted(self.queue.active(), key=lambda line: line.since or math.inf)
        self._for_each(sorted(lines, key=lambda line: line not in self.memory), operate)

    def _begin_passes(self) -> None:
        """Begin the passes at the heads of lines, the longest waiting for room first."""
        lines = sorted(self.queue.active(), key=lambda line: line.since or math.inf)
        self._for_each(lines, self._begin)

    def _begin(self, line: Line) -> None:
        request = line.head
        if request is None or request.kind != PASS or not self._has_room(line, PASS):
            return
        try:
            training_pass = self._make_pass(line, request.body)
            self.memory.ensure(line)
        except Exception as error:
            is_bug = not isinstance(error, VeneerError)
            if is_bug:
                log.exception("%s: request %d failed", line.run, request.seq)
            self._finalize(line, request.seq, failure(error, is_bug), 2)
            if line.owner:  # give the tokens back to the key
                self.store.count_tokens(line.owner, -read_header(request.body).tokens)
            return
        line.current, line.used = training_pass, time.monotonic()
        self._shares.enter(line.owner)

    def _make_pass(self, line: Line, body: bytes) -> Pass:
        request = read_pass(body)
        settings = complete_settings(request.loss, request.settings)
        data = [
            check_datum(datum, request.loss, number, self.vocabulary, self.length)
            for number, datum in enumerate(request.data)
        ]
        return Pass(line.name, data, request.loss, settings, request.backward, line.owner)

    def _linger(self) -> None:
        """Wait a little for runs of the last batch. Otherwise a run whose requests come slightly
        later would be computed alone each time."""
        with self._wake:
            current = [line.current for line in self.queue.active() if line.current]
        if not current or any(len(one_pass.remaining) < len(one_pass.data) for one_pass in current):
            return
        deadline = time.monotonic() + min(MOST_LINGER, LINGER * self._batch_seconds)
        while (remaining := deadline - time.monotonic()) > 0:
            with self._wake:
                active_runs = {line.run for line in self.queue.active()}
                since = time.monotonic() - 2 * self._batch_seconds - MOST_LINGER
                recent_runs = {run for run, moment in self._last_passes.items() if moment > since}
                if self._closing or recent_runs <= active_runs:
                    break
                self._wake.wait(remaining)
            self._do_operations()
            self._begin_passes()

    def _ordered_passes(self) -> list[Pass]:
        """The running passes. Those of the owner that was served least are first."""
        passes = [line.current for line in self.queue.active() if line.current is not None]
        if not passes:
            return []
        first = self._shares.least({training_pass.owner for training_pass in passes})
        self._shares.turn(first)
        return sorted(passes, key=lambda training_pass: training_pass.owner != first)

    def _compute(self, passes: list[Pass]) -> None:
        """Compute one batch, and charge its time and tokens to the runs and owners in it."""
        began = time.monotonic()
        rows_before = {training_pass.run: training_pass.remaining for training_pass in passes}
        tokens = self.trainer.compute(passes)
        ended = time.monotonic()
        self._batch_seconds = ended - began
        computed = [
            training_pass
            for training_pass in passes
            if len(training_pass.remaining) != len(rows_before[training_pass.run])
            or training_pass.error
        ]
        runs = tuple(self.queue.named[training_pass.run].run for training_pass in computed)
        self.batch = Batch(runs, ended)
        for training_pass in computed:
            line = self.queue.named[training_pass.run]
            rows = set(rows_before[training_pass.run]) - set(training_pass.remaining)
            line.rate.add(began, ended, sum(len(training_pass.data[row].tokens) for row in rows))
            line.spent += self._batch_seconds / len(computed)
            self._shares.charge(training_pass.owner, tokens / len(computed))
        self._end_passes()

    def _end_passes(self) -> None:
        """Answer the passes that are computed, including earlier ones whose answer could not be
        written because the disk failed."""

        def end(line: Line) -> None:
            if line.current is not None and line.current.over:
                self._end(line, line.current)

        self._for_each(self.queue.active(), end)

    def _end(self, line: Line, training_pass: Pass) -> None:
        seq, error = line.next, training_pass.error
        if error is None:
            logprobs: list[Any] = training_pass.logprobs
            output = pass_output(logprobs, {LOSS: training_pass.total})
            answer, done = Answer(output, True), 1
        else:
            is_bug = not isinstance(error, VeneerError | MemoryError)
            answer, done = failure(error, is_bug), 2
        self._shares.leave(line.owner)
        self._last_passes[line.run] = time.monotonic()
        if len(self._last_passes) > 256:
            self._last_passes = dict(list(self._last_passes.items())[-128:])
        line.current = None
        self._finalize(line, seq, answer, done)
        if done == 1 and training_pass.backward:
            data = training_pass.data
            self.memory.curve(line).add_pass(training_pass.total, training_pass.loss, data)
            self.tokens += sum(len(datum.tokens) for datum in data)

    def _step(self, line: Line, fields: Mapping[str, Any]) -> dict[str, Any]:
        metrics = self.trainer.step(line.name, Adam(**fields))
        return {"metrics": {**metrics, **self.store.failures(line.run)}}

    def _has_room(self, line: Line, kind: str) -> bool:
        """Whether a request of a run can be computed now: it needs no room in memory, or has it."""
        needs_room = kind not in NEED_NO_ROOM and (line.failed is None or kind == "load")
        if needs_room and not self.memory.has_room(line):
            line.since = line.since or time.monotonic()
            return False
        line.since = None
        return True


def _closing_error() -> Busy:
    return Busy(sentence("a server that is shutting down", "one that trains", "try later"), 5.0)
