"""The waiting requests of runs, each run's in order, and the promises of their answers.

accept → the store → the line of its run → its head, when all requests before it are answered →
answer → promise
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
from veneer.serve.training.run_trainer import Pass
from veneer.serve.training.store import Store
from veneer.serve.training.wire import Answer

#: the most waiting requests of one run, and the most bytes of their bodies
MOST_WAITING, MOST_BYTES = 1024, 64 * 2**20


class Promise(Future[Answer]):
    """The future answer to a request. Clients that wait for it cannot cancel it."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._awaitable: asyncio.Future[Answer] | None = None

    def awaitable(self) -> asyncio.Future[Answer]:
        """A future of the running event loop. All calls share one future: a client may ask a
        thousand times before the answer exists, and a future for each call would stay in memory
        until then."""
        if self._awaitable is None or self._awaitable.get_loop() is not asyncio.get_running_loop():
            self._awaitable = asyncio.wrap_future(self)
        return self._awaitable


class RunRequest(NamedTuple):
    """A request of a run, with its number in the run."""

    seq: int
    kind: str
    body: bytes


@dataclass(eq=False)
class Line:
    """The waiting requests of one run.

    Fields:
        name: of the run's adapter on the model.
        next: number of the next request to compute.
        state: number of the last request in the saved state, or -1.
        failed: why the run accepts nothing but a checkpoint to load; None if it has not failed.
        current: the pass that is being computed.
        spent: seconds of computing since the state was written.
        used: when the run was last used.
        curve: its losses, once they are needed.
        since: when its next request began to wait for room in memory.
        again: when a request whose answer could not be written is tried again.
    """

    run: str
    name: str
    owner: str
    next: int
    state: int
    failed: str | None = None
    waiting: dict[int, RunRequest] = field(default_factory=dict)
    current: Pass | None = None
    spent: float = 0.0
    used: float = 0.0
    curve: Curve | None = None
    rate: Rate = field(default_factory=Rate)
    since: float | None = None
    again: float = 0.0

    @property
    def head(self) -> RunRequest | None:
        return self.waiting.get(self.next) if self.current is None else None


class Queue:
    """The lines of runs that have waiting requests or are in memory (``runs``, by the names of
    their adapters). The line of any other run is created from the store when it is used, so that
    idle runs cost nothing in a turn. ``wake`` guards all of this, and is notified when there is
    work."""

    def __init__(self, store: Store, runs: Container[str]) -> None:
        self.store, self._runs = store, runs
        self.wake = threading.Condition()
        self.lines: dict[str, Line] = {}
        self.named: dict[str, Line] = {}  # the same by the names of the runs' adapters
        self.busy: dict[str, Line] = {}  # lines with a request that can be computed
        self.promises: dict[tuple[str, int], Promise] = {}
        self._idle: deque[Line] = deque()  # lines that were only read and may be dropped
        for run in store.waiting_runs():
            line = self.line(run)
            for row in store.requests_after(run, line.next - 1):
                if not row["done"]:
                    self._add(line, RunRequest(row["seq"], row["kind"], row["body"]))

    # any thread

    def accept(self, run: str, seq: int | None, kind: str, body: bytes) -> int:
        """Write a request to the store and queue it; return its number. A number that was accepted
        before is the same request. ``Busy``: too many requests or bytes of its run wait, or too
        many numbers before it are missing. The run's next request is always accepted."""
        with self.wake:
            line = self.line(run)
            number = max([line.next - 1, *line.waiting]) + 1 if seq is None else seq
            new = number >= line.next and number not in line.waiting
            size = sum(len(request.body) for request in line.waiting.values())
            full = number - line.next >= MOST_WAITING or (size and size + len(body) > MOST_BYTES)
            if new and number > line.next and full:
                problem = (
                    f"request {number} of a run whose next is {line.next}, with {size:,} bytes that"
                    " wait"
                )
                expected = f"less than {MOST_WAITING} ahead, with {MOST_BYTES:,} bytes"
                raise Busy(sentence(problem, expected, "wait for those before it"), 1.0)
        added = new and self.store.add_request(run, number, kind, body)
        with self.wake:
            line = self.line(run)  # the previous one may have been dropped meanwhile
            if added:
                self._add(line, RunRequest(number, kind, body))
                self.wake.notify_all()
            else:
                self._idle.append(line)
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

    def _add(self, line: Line, request: RunRequest) -> None:
        line.waiting[request.seq] = request
        self.promises[line.run, request.seq] = Promise()
        self._update_busy(line)

    def _update_busy(self, line: Line) -> None:
        if line.current is not None or line.head is not None:
            self.busy[line.run] = line
        else:
            self.busy.pop(line.run, None)

    def active(self) -> list[Line]:
        """The busy lines that do not wait for another try."""
        moment = time.monotonic()
        with self.wake:
            return [line for line in self.busy.values() if line.again <= moment]

    # the worker's thread

    def answer(self, line: Line, seq: int, answer: Answer) -> None:
        """Advance the line after a request, and give its promise the answer, which is in the
        store already."""
        with self.wake:
            line.waiting.pop(seq, None)
            line.next = seq + 1
            promise = self.promises.pop((line.run, seq), None)
            self._update_busy(line)
        self.drop(line)
        if promise is not None:
            promise.set_result(answer)

    def drop(self, line: Line) -> None:
        """Drop the line of an idle run. Only the worker's thread may call it: if another thread
        dropped the line while the run is loaded, the run would get a second line."""
        with self.wake:
            is_idle = not line.waiting and line.current is None and line.name not in self._runs
            if is_idle and self.lines.get(line.run) is line:
                del self.lines[line.run], self.named[line.name]

    def drop_idle(self) -> None:
        while self._idle:
            self.drop(self._idle.popleft())
