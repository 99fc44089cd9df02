"""Requests of runs in each run's order, and what their promises come to.

accept → the store → the line of its run → at the head, when all before it are answered → answer →
promise
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Container
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from veneer.errors import sentence
from veneer.serve.requests import Busy
from veneer.serve.training.curve import Curve, Rate
from veneer.serve.training.store import Store
from veneer.serve.training.trainer import Pass
from veneer.serve.training.wire import Answer

#: requests of one run that wait, and their bytes
MOST_WAITING, MOST_BYTES = 1024, 64 * 2**20


class Promise(Future[Answer]):
    """The answer to a request, which nobody who waits for it can cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._awaitable: asyncio.Future[Answer] | None = None

    def awaitable(self) -> asyncio.Future[Answer]:
        """The promise for the event loop, which calls this. A client may ask a thousand times
        before the answer is there: all of these wait for the same future, since one for each would
        stay until then."""
        if self._awaitable is None or self._awaitable.get_loop() is not asyncio.get_running_loop():
            self._awaitable = asyncio.wrap_future(self)
        return self._awaitable


class Asked(NamedTuple):
    """A request of a run."""

    seq: int
    kind: str
    body: bytes


@dataclass(eq=False)
class Line:
    """A run's requests. ``next``: the number of the one whose turn it is. ``spent``: seconds of
    computing since its state was written. ``curve``: of its losses, once one is added to it.
    ``failed``: why it takes nothing any more but a checkpoint to load. ``since``: when its next
    request began to wait for room in memory. ``again``: when that is tried again, after a
    failure."""

    run: str
    name: str  # of the run's adapter on the model
    owner: str
    next: int
    state: int
    failed: str | None = None
    waiting: dict[int, Asked] = field(default_factory=dict)
    current: Pass | None = None
    spent: float = 0.0
    used: float = 0.0
    curve: Curve | None = None
    rate: Rate = field(default_factory=Rate)
    since: float | None = None
    again: float = 0.0

    @property
    def head(self) -> Asked | None:
        return self.waiting.get(self.next) if self.current is None else None


class Queue:
    """The lines of runs that have requests which wait, or are in memory (``runs``, by the names of
    their adapters). The line of any other run is made from the store when it is used, so that a
    turn costs nothing for runs at rest. ``wake`` guards all of this, and is notified when there is
    something to do."""

    def __init__(self, store: Store, runs: Container[str]) -> None:
        self.store, self._runs = store, runs
        self.wake = threading.Condition()
        self.lines: dict[str, Line] = {}
        self.named: dict[str, Line] = {}  # the same by the names of the runs' adapters
        self.busy: dict[str, Line] = {}  # those with something to do now
        self.promises: dict[tuple[str, int], Promise] = {}
        self._idle: deque[Line] = deque()  # that were looked at, and may be dropped
        for run in store.waiting_runs():
            line = self.line(run)
            for row in store.requests_after(run, line.next - 1):
                if not row["done"]:
                    self._add(line, Asked(row["seq"], row["kind"], row["body"]))

    # any thread

    def accept(self, run: str, seq: int | None, kind: str, body: bytes) -> int:
        """Write a request down, and queue it; its number. The same number again is the same
        request. ``Busy``: too much of its run waits, or too many numbers are missing before it; the
        one whose turn it is always has room."""
        with self.wake:
            line = self.line(run)
            number = max([line.next - 1, *line.waiting]) + 1 if seq is None else seq
            new = number >= line.next and number not in line.waiting
            held = sum(len(request.body) for request in line.waiting.values())
            full = number - line.next >= MOST_WAITING or (held and held + len(body) > MOST_BYTES)
            if new and number > line.next and full:
                problem = f"request {number} of a run whose next is {line.next}, with {held:,} bytes that wait"
                expected = f"less than {MOST_WAITING} ahead, with {MOST_BYTES:,} bytes"
                raise Busy(sentence(problem, expected, "wait for those before it"), 1.0)
        added = new and self.store.add_request(run, number, kind, body)
        with self.wake:
            line = self.line(run)  # which may have been dropped meanwhile
            if added:
                self._add(line, Asked(number, kind, body))
                self.wake.notify_all()
            else:
                self._idle.append(line)
        return number

    def promise(self, run: str, seq: int) -> Promise | None:
        """The answer to a request; None for one that is not known, or long gone."""
        with self.wake:
            promise = self.promises.get((run, seq))
        if promise is not None:
            return promise
        row = self.store.request(run, seq)
        if row is None or not row["done"]:
            return None
        done = Promise()
        done.set_result(Answer(row["answer"], bool(row["binary"])))
        return done

    def line(self, run: str) -> Line:
        with self.wake:
            if run not in self.lines:
                row = self.store.run(run)
                assert row is not None
                name, first = f"run{row['number']}", self.store.next_seq(run)
                line = Line(
                    run, name, row["owner"], first, row["state"], self.store.failure_of(run)
                )
                self.lines[run] = self.named[name] = line
            return self.lines[run]

    def _add(self, line: Line, asked: Asked) -> None:
        line.waiting[asked.seq] = asked
        self.promises[line.run, asked.seq] = Promise()
        self._sort(line)

    def _sort(self, line: Line) -> None:
        if line.current is not None or line.head is not None:
            self.busy[line.run] = line
        else:
            self.busy.pop(line.run, None)

    def active(self) -> list[Line]:
        """The lines with something to do now."""
        now = time.monotonic()
        with self.wake:
            return [line for line in self.busy.values() if line.again <= now]

    # the worker's thread

    def answer(self, line: Line, seq: int, answer: Answer) -> None:
        """A request is over, and its answer is in the store."""
        with self.wake:
            line.waiting.pop(seq, None)
            line.next = seq + 1
            promise = self.promises.pop((line.run, seq), None)
            self._sort(line)
        self.drop(line)
        if promise is not None:
            promise.set_result(answer)

    def drop(self, line: Line) -> None:
        """Forget the line of a run at rest. The worker's thread alone may: dropped by another one
        while the run comes back, it would be a second line of that run."""
        with self.wake:
            rests = not line.waiting and line.current is None and line.name not in self._runs
            if rests and self.lines.get(line.run) is line:
                del self.lines[line.run], self.named[line.name]

    def drop_idle(self) -> None:
        while self._idle:
            self.drop(self._idle.popleft())
