"""The thread that trains: requests of each run in their order, passes of many runs in one batch.

    accept → journal → line of the run → at the head: an operation, or a pass → batch (trainer) →
    answer

A run is in memory while it is used; of more than ``resident`` the one that was used longest ago
writes its state and goes. It comes back from that state and the requests after it, which is also
how a server that was killed goes on. A request that needs room waits at the head of its run's line
while all runs in memory are computed.

What fails of a run is that run's: a state that cannot be written now is computed again from its
requests, and a run whose numbers no state can hold is marked as failed. It takes nothing any more
but a checkpoint to load.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from veneer.config import LoraConfig
from veneer.errors import (
    AdapterError,
    BankFullError,
    DataError,
    TrainingError,
    VeneerError,
    sentence,
)
from veneer.serve.requests import Busy
from veneer.serve.scheduler import Shares
from veneer.serve.training.curve import LOSS, Batch, Curve, read_curve, state_folder
from veneer.serve.training.lines import Asked, Line, Promise, Queue
from veneer.serve.training.losses import checked, checked_settings
from veneer.serve.training.store import Store
from veneer.serve.training.trainer import Adam, DivergenceError, Pass, Trainer
from veneer.serve.training.wire import (
    Answer,
    failure,
    has_backward,
    pass_output,
    read_header,
    read_pass,
)

log = logging.getLogger("veneer.serve.training")

#: seconds of computing after which a state is written: what a restart computes again is less
STATE_AFTER = 30.0
# : how long a batch waits for runs that were in the last one: a part of its time, at most so many
# seconds
LINGER, MOST_LINGER = 0.25, 0.05
# : seconds after a failure of the thread itself, such as a full disk, and after one to write a
# run's answer
PAUSE = 1.0
#: deaths of the process while it did one request alone, after which that is not tried again
DEATHS = 3
PASS, REFUSED = "pass", "refused"
# : what is refused and concerns the next step: a pass with a backward, and a number that did not
# come
REFUSED_PASS, MISSING = "refused_pass", "missing"
#: what is computed again from the requests after a state
REPLAYED = (PASS, "step", "load")
#: what is done without the run in memory, and what of it needs no room there
ROOMLESS = ("unload", REFUSED, REFUSED_PASS, MISSING)
UNMADE = ("load", "create", *ROOMLESS)
#: runs of which it is known when they were last published as they were then
PUBLISHED = 512


def _concerns_step(asked: Asked) -> bool:
    """Whether the next step is not what its client meant when this request fails."""
    return asked.kind in (REFUSED_PASS, MISSING) or (
        asked.kind == PASS and has_backward(asked.body)
    )


#: an operation on a run: (line, what was asked) -> what its promise comes to
Operation = Callable[[Line, Mapping[str, Any]], Any]


class Worker:
    """One thread, the only one that calls the trainer. ``operations``: what a request of a kind
    does, but for passes. ``length``, ``vocabulary``: of the base."""

    def __init__(
        self, trainer: Trainer, store: Store, *, length: int, vocabulary: int, resident: int = 50
    ) -> None:
        self.trainer, self.store, self.resident = trainer, store, resident
        self.length, self.vocabulary = length, vocabulary
        self.operations: dict[str, Operation] = {"step": self._step}
        self.queue = Queue(store, trainer.runs)
        self.lines = self.queue.lines
        self.published: dict[
            str, int
        ] = {}  # the next request of a run, as samples of it as it is now were drawn
        self.steps = self.tokens = 0  # that were made, and trained on, by this server
        self.batch: Batch | None = None  # the last one
        self._wake = self.queue.wake
        self._others: deque[tuple[Callable[[], Any], Future[Any], str | None]] = deque()
        self._shares, self._ended, self._last = Shares(), dict[str, float](), 0.0
        self._closing = False
        #: runs whose first request may be what ended the server before
        self._suspects = [line for line in self.lines.values() if line.head is not None]
        self._thread = threading.Thread(target=self._loop, name="veneer-training", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after what is computed now. What waits is on the disk."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for line in self._held():
            self._write_state(line)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    # any thread

    def accept(self, run: str, seq: int | None, kind: str, body: bytes) -> int:
        """See ``Queue.accept``."""
        return self.queue.accept(run, seq, kind, body)

    def promise(self, run: str, seq: int) -> Promise | None:
        """See ``Queue.promise``."""
        return self.queue.promise(run, seq)

    def do(self, work: Callable[[], Any], run: str | None = None) -> Future[Any]:
        """Let the thread do something between two batches; for ``run``, when that is in memory or
        has room there."""
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        with self._wake:
            if self._closing:
                done.set_exception(_closing())
            else:
                self._others.append((work, done, run))
                self._wake.notify_all()
        return done

    # the worker's thread

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._others or self.queue.active()):
                    self._wake.wait(
                        PAUSE if self.queue.busy else None
                    )  # those that are busy had a failure
                if self._closing:
                    break
            try:
                self.turn()
            except Exception:
                log.exception("a turn of the training thread failed")
                time.sleep(PAUSE)
        self._do_others()  # somebody waits for each
        for _, done, _ in self._others:  # also where there is no room
            done.set_exception(_closing())

    def _each(self, lines: Iterable[Line], work: Callable[[Line], Any]) -> None:
        """Do something for each of some lines. What fails of one, such as to write its answer down,
        is tried again after a while, and leaves the others alone."""
        for line in lines:
            try:
                work(line)
            except Exception:
                log.exception("%s: a request could not be answered", line.run)
                line.again = time.monotonic() + PAUSE

    def _do_others(self) -> None:
        self.queue.drop_idle()
        for _ in range(len(self._others)):
            work, done, run = self._others.popleft()
            if run is not None and not self._room(self.queue.line(run)):
                self._others.append((work, done, run))
                continue
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

    def turn(self) -> None:
        """Other work; then what may have ended the server before, or operations at the heads of
        lines and one batch."""
        self._do_others()
        if self._suspects:
            self._alone(self._suspects.pop())
            return
        self._do_operations()
        self._end_passes()
        self._admit()
        self._linger()
        passes = self._in_turn()
        if passes:
            self._compute(passes)

    def _alone(self, line: Line) -> None:
        """Do the first request of a run that waited when the server began, apart from those of
        others: what ends the process again and again is known then, and given up."""
        asked = line.head
        if asked is None:
            return
        if (
            asked.kind not in UNMADE
        ):  # to have the run back takes longer than most requests, and is no fault of theirs
            try:
                self.ensure(line)
            except Exception:
                return  # it fails again, and is answered, in its turn among the others
        if self.store.begin(line.run, asked.seq) > DEATHS:
            log.error(
                "%s: request %d ended the server %d times: given up", line.run, asked.seq, DEATHS
            )
            found = f"a request during which the server's process ended {DEATHS} times"
            told = sentence(
                found, "one for which it has the memory", "ask for fewer or shorter rows at a time"
            )
            body, kind = (
                json.dumps({"error": told}).encode(),
                REFUSED_PASS if _concerns_step(asked) else REFUSED,
            )
            asked = asked._replace(kind=kind, body=body)
        if asked.kind != PASS:
            self._answer(line, asked, lambda: self._operate(line, asked))
            return
        self._begin(line)
        while line.current is not None and not self._closing:
            self._compute([line.current])
            self._do_others()
        if line.current is not None:  # told to close, which is no death
            self.store.spare(line.run, asked.seq)

    def _operate(self, line: Line, asked: Asked) -> Answer:
        given = json.loads(asked.body)
        if asked.kind in (REFUSED, REFUSED_PASS, MISSING):
            raise DataError(given["error"])
        self._curve(line)
        if asked.kind not in UNMADE:
            self.ensure(line)
        line.used = time.monotonic()
        answer = Answer(json.dumps(self.operations[asked.kind](line, given)).encode())
        if asked.kind == "load" and line.failed is not None:
            self.store.recover(line.run)
            line.failed = None
        return answer

    def _answer(self, line: Line, asked: Asked, work: Callable[[], Answer]) -> None:
        """Do what is asked, write the answer down, and go on to the next."""
        done = 1
        try:
            answer = work()
        except DivergenceError as error:
            self._fail(line, str(error))
            answer, done = failure(error), 2
        except (VeneerError, ArithmeticError, MemoryError) as error:
            log.info("%s: request %d failed: %s", line.run, asked.seq, error)
            answer, done = failure(error), 2
        except Exception as error:
            log.exception("%s: request %d failed", line.run, asked.seq)
            answer, done = failure(error, own=True), 2
            if (
                asked.kind in REPLAYED and line.name in self.trainer.runs
            ):  # in memory it may be done in part
                self.trainer.end(line.name)
        if done == 2 and asked.seq == 0:
            self.store.unload(line.run)  # it did not begin
        self._finalize(line, asked.seq, answer, done)
        if asked.kind == "step" and done == 1:
            self._curve(line).stepped()
            self.steps += 1
        if asked.kind == "load" and done == 1:
            self._curve(line).loaded()
            self._write_state(line)  # what was loaded may be deleted

    def _finalize(self, line: Line, seq: int, answer: Answer, done: int) -> None:
        if done == 2 and _concerns_step(line.waiting[seq]):
            done = 3
        try:
            self.store.answer(line.run, seq, done, answer.binary, answer.body)
        except Exception:  # what is in memory is ahead of the disk: it is done again, from there
            if line.name in self.trainer.runs:
                self.trainer.end(line.name)
            raise
        self.queue.answer(line, seq, answer)

    def _do_operations(self) -> None:
        """Operations at the heads of lines: of runs in memory first, which leave no gradient that
        waits for a step if they make room for others, then of those that have waited longest for
        it."""

        def operate(line: Line) -> None:
            asked = line.head
            if asked is not None and asked.kind != PASS and self._has_room(line, asked.kind):
                self._answer(line, asked, lambda: self._operate(line, asked))

        lines = sorted(self.queue.active(), key=lambda line: line.since or math.inf)
        self._each(sorted(lines, key=lambda line: line.name not in self.trainer.runs), operate)

    def _admit(self) -> None:
        """Passes at the heads of lines begin: first those that have waited longest for room."""
        self._each(
            sorted(self.queue.active(), key=lambda line: line.since or math.inf), self._begin
        )

    def _begin(self, line: Line) -> None:
        asked = line.head
        if asked is None or asked.kind != PASS or not self._has_room(line, PASS):
            return
        try:
            made = self._made(line, asked.body)
            self.ensure(line)
        except Exception as error:
            own = not isinstance(error, VeneerError)
            if own:
                log.exception("%s: request %d failed", line.run, asked.seq)
            self._finalize(line, asked.seq, failure(error, own), 2)
            if line.owner:  # whose key paid for it
                self.store.count_tokens(line.owner, -read_header(asked.body).tokens)
            return
        line.current, line.used = made, time.monotonic()
        self._shares.enter(line.owner)

    def _made(self, line: Line, body: bytes) -> Pass:
        asked = read_pass(body)
        settings = checked_settings(asked.loss, asked.settings)
        data = [
            checked(one, asked.loss, number, self.vocabulary, self.length)
            for number, one in enumerate(asked.data)
        ]
        return Pass(line.name, data, asked.loss, settings, asked.backward, line.owner)

    def _linger(self) -> None:
        """Wait a little for runs that shared the last batch: else who comes a moment later is
        alone, for ever."""
        with self._wake:
            fresh = [line for line in self.queue.active() if line.current]
            if not fresh or any(
                len(line.current.left) < len(line.current.data) for line in fresh if line.current
            ):
                return
        deadline = time.monotonic() + min(MOST_LINGER, LINGER * self._last)
        while (left := deadline - time.monotonic()) > 0:
            with self._wake:
                here = {line.run for line in self.queue.active()}
                since = time.monotonic() - 2 * self._last - MOST_LINGER
                late = {run for run, when in self._ended.items() if when > since}
                if self._closing or not late - here:
                    break
                self._wake.wait(left)
            self._do_operations()
            self._admit()

    def _in_turn(self) -> list[Pass]:
        """The passes that run, those of the owner that was served least first."""
        passes = [line.current for line in self.queue.active() if line.current is not None]
        if not passes:
            return []
        first = self._shares.least({one.owner for one in passes})
        self._shares.turn(first)
        return sorted(passes, key=lambda one: one.owner != first)

    def _compute(self, passes: list[Pass]) -> None:
        began = time.monotonic()
        before = {id(one): one.left for one in passes}
        tokens = self.trainer.compute(passes)
        ended = time.monotonic()
        self._last = ended - began
        shared = [one for one in passes if len(one.left) != len(before[id(one)]) or one.error]
        self.batch = Batch(tuple(self.queue.named[one.run].run for one in shared), ended)
        for one in shared:
            line = self.queue.named[one.run]
            rows = set(before[id(one)]) - set(one.left)
            line.rate.add(began, ended, sum(len(one.data[row].tokens) for row in rows))
            line.spent += self._last / len(shared)
            self._shares.charge(one.owner, tokens / len(shared))
        self._end_passes()

    def _end_passes(self) -> None:
        """Of those that are computed: also of one that could not be ended with its batch, as the
        disk failed."""

        def end(line: Line) -> None:
            if line.current is not None and line.current.over:
                self._end(line, line.current)

        self._each(self.queue.active(), end)

    def _end(self, line: Line, one: Pass) -> None:
        seq = line.next
        if one.error is None:
            found: list[Any] = one.logprobs
            answer, done = Answer(pass_output(found, {LOSS: one.total}), True), 1
        else:
            answer, done = (
                failure(one.error, not isinstance(one.error, VeneerError | MemoryError)),
                2,
            )
        self._shares.leave(line.owner)
        self._ended[line.run] = time.monotonic()
        if len(self._ended) > 256:
            self._ended = dict(list(self._ended.items())[-128:])
        line.current = None
        self._finalize(line, seq, answer, done)
        if done == 1 and one.backward:
            self._curve(line).passed(one.total, one.loss, one.data)
            self.tokens += sum(len(datum.tokens) for datum in one.data)

    def _step(self, line: Line, given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "metrics": {
                **self.trainer.step(line.name, Adam(**given)),
                **self.store.failures(line.run),
            }
        }

    # runs in memory

    def _held(self) -> list[Line]:
        """The lines of runs in memory."""
        return [line for line in map(self.queue.named.get, self.trainer.runs) if line is not None]

    def _room(self, line: Line) -> bool:
        """Whether a run is in memory or there is room for it."""
        held = self._held()
        return line in held or len(held) < self.resident or any(one.current is None for one in held)

    def _has_room(self, line: Line, kind: str) -> bool:
        """Whether a request of a run can be done now: it needs no room in memory, or there is
        some."""
        needs = kind not in ROOMLESS and (line.failed is None or kind == "load")
        if needs and not self._room(line):
            line.since = line.since or time.monotonic()
            return False
        line.since = None
        return True

    def ensure(self, line: Line) -> None:
        """Have a run in memory, as it is after all its requests that are done. ``TrainingError``:
        it has failed."""
        self._curve(line)
        if line.name in self.trainer.runs and line.spent > STATE_AFTER:
            self._write_state(line)
        if line.failed is not None:
            raise TrainingError(line.failed)
        if line.name in self.trainer.runs:
            return
        self.make_room()
        row, began = self.store.run(line.run), time.monotonic()
        assert row is not None
        if row["state"] >= 0:
            self.trainer.load(
                line.name, state_folder(self.store, line.run, row["state"]), optimizer=True
            )
        else:
            self.trainer.begin(
                line.name, LoraConfig.from_dict(json.loads(row["config"])), row["seed"]
            )
        try:
            for asked in self.store.requests_after(line.run, row["state"]):
                if asked["done"] == 1 and asked["kind"] in REPLAYED and asked["seq"] < line.next:
                    self._replay(line, asked["kind"], asked["body"])
        except DivergenceError as error:  # what an earlier release acknowledged
            self._fail(line, str(error))
            raise
        except BaseException:  # it would go on from a part of what was acknowledged
            if line.name in self.trainer.runs:
                self.trainer.end(line.name)
            raise
        line.spent = time.monotonic() - began

    def _replay(self, line: Line, kind: str, body: bytes) -> None:
        if kind != PASS:
            self.operations[kind](line, json.loads(body))
            return
        made = self._made(line, body)
        if made.backward:
            while not made.over:
                self.trainer.compute([made])
            if made.error is not None:  # it went well once
                raise made.error

    def make_room(self) -> None:
        """Let runs go until one more may come. ``BankFullError``: all of them are in use."""
        while True:
            held = self._held()
            if len(held) < self.resident:
                return
            idle = [one for one in held if one.current is None]
            if not idle:
                found = f"{len(held)} runs that are computed now"
                raise BankFullError(found, f"at most {self.resident} in memory", "try again")
            self.let_go(min(idle, key=lambda one: one.used))

    def let_go(self, line: Line) -> None:
        """Keep a run on the disk alone."""
        if line.name in self.trainer.runs:
            self._write_state(line)
        if line.name in self.trainer.runs:  # it has not failed
            self.trainer.end(line.name)
        self.queue.drop(line)

    def _fail(self, line: Line, reason: str) -> None:
        """A run is of no use any more: its memory is free, its requests stay on the disk, and its
        owner is told by each answer until a checkpoint is loaded into it."""
        if line.name in self.trainer.runs:
            self.trainer.end(line.name)
        if line.failed is not None:
            return
        line.failed = reason
        log.warning("%s has failed: %s", line.run, reason)
        try:
            self.store.fail(line.run, reason)
        except (sqlite3.Error, OSError):  # the next server finds out by itself
            log.exception("%s: that it has failed could not be written", line.run)

    def _write_state(self, line: Line) -> None:
        """Unless there is none newer, or gradients wait for a step: they are computed again. So is
        all that a disk does not take now. Numbers that no folder may hold are the run's failure."""
        if line.next - 1 <= line.state or self.trainer.pending(line.name):
            return
        try:
            self.state(line)
        except AdapterError:
            log.exception("%s: its state cannot be written", line.run)
            found, do = (
                "a run whose numbers cannot be kept",
                "load a checkpoint into it, or begin a new run",
            )
            self._fail(line, sentence(found, "numbers that an adapter folder can hold", do))
        except Exception:
            log.exception(
                "%s: its state could not be written; its requests are kept until it can", line.run
            )
            line.spent = 0.0  # it is tried again after as much computing

    def state(self, line: Line, seq: int | None = None) -> None:
        """Write a run's state, as it is after its request ``seq`` (None: the last one that is
        done)."""
        seq = line.next - 1 if seq is None else seq
        folder, before = state_folder(self.store, line.run, seq), line.state
        self.trainer.save(line.name, folder, None)
        self._curve(line).write(folder)
        self.store.stated(line.run, seq)
        line.state, line.spent = seq, 0.0
        if 0 <= before != seq:
            shutil.rmtree(state_folder(self.store, line.run, before), ignore_errors=True)

    def _curve(self, line: Line) -> Curve:
        if line.curve is None:
            line.curve = read_curve(self.store, line.run, line.state)
        return line.curve


def _closing() -> Busy:
    return Busy(sentence("a server that is shutting down", "one that trains", "try later"), 5.0)
