"""The thread that trains: requests of each run in their order, passes of many runs in one batch.

    accept → journal → line of the run → at the head: an operation, or a pass → batch (trainer) → answer

A run is in memory while it is used; of more than ``resident`` the one that was used longest ago writes its state and
goes. It comes back from that state and the requests after it, which is also how a server that was killed goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from veneer.config import LoraConfig
from veneer.errors import BankFullError, DataError, VeneerError, sentence
from veneer.serve.requests import Busy
from veneer.serve.scheduler import Shares
from veneer.serve.training.curve import LOSS, Batch, Curve, Rate, read_curve, state_folder
from veneer.serve.training.losses import checked, checked_settings
from veneer.serve.training.store import Store
from veneer.serve.training.trainer import Adam, Pass, Trainer
from veneer.serve.training.wire import Answer, failure, has_backward, pass_output, read_header, read_pass

log = logging.getLogger("veneer.serve.training")

#: seconds of computing after which a state is written: what a restart computes again is less
STATE_AFTER = 30.0
#: how long a batch waits for runs that were in the last one: a part of its time, at most so many seconds
LINGER, MOST_LINGER = 0.25, 0.05
#: seconds after a failure of the thread itself, such as a full disk
PAUSE = 1.0
#: requests of one run that wait, and their bytes
MOST_WAITING, MOST_BYTES = 1024, 64 * 2**20
#: deaths of the process while it did one request alone, after which that is not tried again
DEATHS = 3
PASS, REFUSED = "pass", "refused"
#: what is refused and concerns the next step: a pass with a backward, and a number that did not come
REFUSED_PASS, MISSING = "refused_pass", "missing"
#: what is computed again from the requests after a state
REPLAYED = (PASS, "step", "load")
#: what is done without the run in memory
UNMADE = ("load", "create", "unload")


class Asked(NamedTuple):
    """A request of a run."""

    seq: int
    kind: str
    body: bytes


@dataclass(eq=False)
class Line:
    """A run's requests. ``next``: the number of the one whose turn it is. ``spent``: seconds of computing since its
    state was written. ``curve``: of its losses, once one is added to it. ``published``: the number before which samples
    of it as it is now were drawn."""

    run: str
    name: str  # of the run's adapter on the model
    owner: str
    next: int
    state: int
    waiting: dict[int, Asked] = field(default_factory=dict)
    current: Pass | None = None
    spent: float = 0.0
    used: float = 0.0
    curve: Curve | None = None
    rate: Rate = field(default_factory=Rate)
    published: int = -1

    @property
    def head(self) -> Asked | None:
        return self.waiting.get(self.next) if self.current is None else None


def _concerns_step(asked: Asked) -> bool:
    """Whether the next step is not what its client meant when this request fails."""
    return asked.kind in (REFUSED_PASS, MISSING) or (asked.kind == PASS and has_backward(asked.body))


#: an operation on a run: (line, what was asked) -> what its promise comes to
Operation = Callable[[Line, Mapping[str, Any]], Any]


class Worker:
    """One thread, the only one that calls the trainer. ``operations``: what a request of a kind does, but for passes.
    ``length``, ``vocabulary``: of the base."""

    def __init__(self, trainer: Trainer, store: Store, *, length: int, vocabulary: int, resident: int = 50) -> None:
        self.trainer, self.store, self.resident = trainer, store, resident
        self.length, self.vocabulary = length, vocabulary
        self.operations: dict[str, Operation] = {"step": self._step}
        self.lines: dict[str, Line] = {}
        self.promises: dict[tuple[str, int], Future[Answer]] = {}
        self.steps = self.tokens = 0  # that were made, and trained on, by this server
        self.batch: Batch | None = None  # the last one
        self._wake = threading.Condition()
        self._others: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._shares, self._ended, self._last = Shares(), dict[str, float](), 0.0
        self._closing = False
        for run in store.waiting_runs():
            line = self._line(run)
            for row in store.requests_after(run, line.next - 1):
                if not row["done"]:
                    self._queue(line, Asked(row["seq"], row["kind"], row["body"]))
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
        for line in self.lines.values():
            if line.name in self.trainer.runs:
                self._write_state(line)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    # any thread

    def accept(self, run: str, seq: int | None, kind: str, body: bytes) -> int:
        """Write a request down, and queue it; its number. The same number again is the same request. ``Busy``: too much
        of its run waits, or too many numbers are missing before it; the one whose turn it is always has room."""
        with self._wake:
            line = self._line(run)
            number = max([line.next - 1, *line.waiting]) + 1 if seq is None else seq
            new = number >= line.next and number not in line.waiting
            held = sum(len(one.body) for one in line.waiting.values())
            full = number - line.next >= MOST_WAITING or (held and held + len(body) > MOST_BYTES)
            if new and number > line.next and full:
                found = f"request {number} of a run whose next is {line.next}, with {held:,} bytes that wait"
                expected = f"less than {MOST_WAITING} ahead, with {MOST_BYTES:,} bytes"
                raise Busy(sentence(found, expected, "wait for those before it"), 1.0)
        if new and self.store.add_request(run, number, kind, body):
            with self._wake:
                self._queue(line, Asked(number, kind, body))
                self._wake.notify_all()
        return number

    def promise(self, run: str, seq: int) -> Future[Answer] | None:
        """The answer to a request; None for one that is not known, or long gone."""
        with self._wake:
            found = self.promises.get((run, seq))
        if found is not None:
            return found
        row = self.store.request(run, seq)
        if row is None or not row["done"]:
            return None
        done: Future[Answer] = Future()
        done.set_result(Answer(row["answer"], bool(row["binary"])))
        return done

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the thread do something between two batches."""
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        with self._wake:
            if self._closing:
                done.set_exception(
                    Busy(sentence("a server that is shutting down", "one that trains", "try later"), 5.0)
                )
            else:
                self._others.append((work, done))
                self._wake.notify_all()
        return done

    def line(self, run: str) -> Line:
        with self._wake:
            return self._line(run)

    def _line(self, run: str) -> Line:
        if run not in self.lines:
            row = self.store.run(run)
            assert row is not None
            name, first = f"run{row['number']}", self.store.next_seq(run)
            self.lines[run] = Line(run, name, row["owner"], first, row["state"])
        return self.lines[run]

    def _queue(self, line: Line, asked: Asked) -> None:
        line.waiting[asked.seq] = asked
        self.promises[line.run, asked.seq] = promise = Future()
        promise.set_running_or_notify_cancel()  # nobody who waits for it can cancel it

    # the worker's thread

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._others or self._active())
                if self._closing:
                    break
            try:
                self.turn()
            except Exception:
                log.exception("a turn of the training thread failed")
                time.sleep(PAUSE)
        self._do_others()  # somebody waits for each

    def _active(self) -> list[Line]:
        with self._wake:
            return [line for line in self.lines.values() if line.current is not None or line.head is not None]

    def _do_others(self) -> None:
        while self._others:
            work, done = self._others.popleft()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

    def turn(self) -> None:
        """Other work; then what may have ended the server before, or operations at the heads of lines and one batch."""
        self._do_others()
        if self._suspects:
            self._alone(self._suspects.pop())
            return
        for line in self._active():
            asked = line.head
            if asked is not None and asked.kind != PASS:
                self._answer(line, asked, lambda line=line, asked=asked: self._operate(line, asked))
        self._end_passes()
        self._admit(self._active())
        self._linger()
        passes = self._in_turn()
        if passes:
            self._compute(passes)

    def _alone(self, line: Line) -> None:
        """Do the first request of a run that waited when the server began, apart from those of others: what ends the
        process again and again is known then, and given up."""
        asked = line.head
        if asked is None:
            return
        if asked.kind not in UNMADE:  # to have the run back takes longer than most requests, and is no fault of theirs
            self.ensure(line)
        if self.store.begin(line.run, asked.seq) > DEATHS:
            log.error("%s: request %d ended the server %d times: given up", line.run, asked.seq, DEATHS)
            found = f"a request during which the server's process ended {DEATHS} times"
            told = sentence(found, "one for which it has the memory", "ask for fewer or shorter rows at a time")
            body, kind = json.dumps({"error": told}).encode(), REFUSED_PASS if _concerns_step(asked) else REFUSED
            asked = asked._replace(kind=kind, body=body)
        if asked.kind != PASS:
            self._answer(line, asked, lambda: self._operate(line, asked))
            return
        self._admit([line])
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
        return Answer(json.dumps(self.operations[asked.kind](line, given)).encode())

    def _answer(self, line: Line, asked: Asked, work: Callable[[], Answer]) -> None:
        """Do what is asked, write the answer down, and go on to the next."""
        done = 1
        try:
            answer = work()
        except (VeneerError, ArithmeticError, MemoryError) as error:
            log.info("%s: request %d failed: %s", line.run, asked.seq, error)
            answer, done = failure(error), 2
        except Exception as error:
            log.exception("%s: request %d failed", line.run, asked.seq)
            answer, done = failure(error, own=True), 2
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
        with self._wake:
            line.waiting.pop(seq, None)
            line.next = seq + 1
            promise = self.promises.pop((line.run, seq), None)
        if promise is not None:
            promise.set_result(answer)

    def _admit(self, lines: Iterable[Line]) -> None:
        """Passes at the heads of lines begin."""
        for line in lines:
            asked = line.head
            if asked is None or asked.kind != PASS or not self._room(line):
                continue
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
                continue
            line.current, line.used = made, time.monotonic()
            self._shares.enter(line.owner)

    def _made(self, line: Line, body: bytes) -> Pass:
        asked = read_pass(body)
        settings = checked_settings(asked.loss, asked.settings)
        data = [checked(one, asked.loss, number, self.vocabulary, self.length) for number, one in enumerate(asked.data)]
        return Pass(line.name, data, asked.loss, settings, asked.backward, line.owner)

    def _linger(self) -> None:
        """Wait a little for runs that shared the last batch: else who comes a moment later is alone, for ever."""
        with self._wake:
            fresh = [line for line in self._active() if line.current]
            if not fresh or any(len(line.current.left) < len(line.current.data) for line in fresh if line.current):
                return
        deadline = time.monotonic() + min(MOST_LINGER, LINGER * self._last)
        while (left := deadline - time.monotonic()) > 0:
            with self._wake:
                here = {line.run for line in self._active()}
                since = time.monotonic() - 2 * self._last - MOST_LINGER
                late = {run for run, when in self._ended.items() if when > since}
                if self._closing or not late - here:
                    break
                self._wake.wait(left)
            for line in self._active():
                if (asked := line.head) is not None and asked.kind != PASS:
                    self._answer(line, asked, lambda line=line, asked=asked: self._operate(line, asked))
            self._admit(self._active())

    def _in_turn(self) -> list[Pass]:
        """The passes that run, those of the owner that was served least first."""
        with self._wake:
            passes = [line.current for line in self.lines.values() if line.current is not None]
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
        by_name = {line.name: line for line in list(self.lines.values())}  # clients may add some
        shared = [one for one in passes if len(one.left) != len(before[id(one)]) or one.error]
        self.batch = Batch(tuple(by_name[one.run].run for one in shared), ended)
        for one in shared:
            line = by_name[one.run]
            rows = set(before[id(one)]) - set(one.left)
            line.rate.add(began, ended, sum(len(one.data[row].tokens) for row in rows))
            line.spent += self._last / len(shared)
            self._shares.charge(one.owner, tokens / len(shared))
        self._end_passes()

    def _end_passes(self) -> None:
        """Of those that are computed: also of one that could not be ended with its batch, as the disk failed."""
        for line in list(self.lines.values()):
            if line.current is not None and line.current.over:
                self._end(line, line.current)

    def _end(self, line: Line, one: Pass) -> None:
        seq = line.next
        if one.error is None:
            found: list[Any] = one.logprobs
            answer, done = Answer(pass_output(found, {LOSS: one.total}), True), 1
        else:
            answer, done = failure(one.error, not isinstance(one.error, VeneerError | MemoryError)), 2
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
        return {"metrics": {**self.trainer.step(line.name, Adam(**given)), **self.store.failures(line.run)}}

    # runs in memory

    def _room(self, line: Line) -> bool:
        """Whether a run is in memory or there is room for it."""
        held = [one for one in list(self.lines.values()) if one.name in self.trainer.runs]
        return line in held or len(held) < self.resident or any(one.current is None for one in held)

    def ensure(self, line: Line) -> None:
        """Have a run in memory, as it is after all its requests that are done."""
        self._curve(line)
        if line.name in self.trainer.runs:
            if line.spent > STATE_AFTER:
                self._write_state(line)
            return
        self.make_room()
        row, began = self.store.run(line.run), time.monotonic()
        assert row is not None
        if row["state"] >= 0:
            self.trainer.load(line.name, state_folder(self.store, line.run, row["state"]), optimizer=True)
        else:
            self.trainer.begin(line.name, LoraConfig.from_dict(json.loads(row["config"])), row["seed"])
        try:
            for asked in self.store.requests_after(line.run, row["state"]):
                if asked["done"] == 1 and asked["kind"] in REPLAYED and asked["seq"] < line.next:
                    self._replay(line, asked["kind"], asked["body"])
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
            held = [one for one in list(self.lines.values()) if one.name in self.trainer.runs]
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
            self.trainer.end(line.name)

    def _write_state(self, line: Line) -> None:
        """Unless there is none newer, or gradients wait for a step: they are computed again."""
        if line.next - 1 > line.state and not self.trainer.pending(line.name):
            self.state(line)

    def state(self, line: Line, seq: int | None = None) -> None:
        """Write a run's state, as it is after its request ``seq`` (None: the last one that is done)."""
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
