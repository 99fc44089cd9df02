"""Runs in memory: at most ``capacity`` of them, the others on the disk.

The least recently used run writes its state and leaves when another one needs room. A run comes
back from its last state and the requests after that state, which are computed again. This is also
how runs continue after the server was killed.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any

from veneer.config import LoraConfig
from veneer.errors import AdapterError, BankFullError, TrainingError, sentence
from veneer.serve.training.curve import Curve, read_curve, state_folder
from veneer.serve.training.lines import Line, Queue
from veneer.serve.training.run_trainer import DivergenceError, Pass, Trainer
from veneer.serve.training.store import Store

log = logging.getLogger("veneer.serve.training")

#: seconds of computing after which a state is written: a restart repeats less than this
STATE_AFTER = 30.0
PASS = "pass"
#: kinds of requests that change a run's weights or gradients: they are repeated after a state
REPLAYED = (PASS, "step", "load")

#: an operation on a run: (its line, the fields of the request) -> the JSON of the answer
Operation = Callable[[Line, Mapping[str, Any]], Any]


class RunMemory:
    """The runs in memory. ``operations``: by the kind of a request. ``make_pass``: from the body of
    a pass. The worker's thread alone calls it."""

    def __init__(
        self,
        trainer: Trainer,
        store: Store,
        queue: Queue,
        capacity: int,
        operations: Mapping[str, Operation],
        make_pass: Callable[[Line, bytes], Pass],
    ) -> None:
        self._trainer, self._store, self._queue = trainer, store, queue
        self.capacity = capacity
        self._operations, self._make_pass = operations, make_pass

    def __contains__(self, line: Line) -> bool:
        return line.name in self._trainer.runs

    def lines(self) -> list[Line]:
        """The lines of the runs in memory."""
        lines = map(self._queue.named.get, self._trainer.runs)
        return [line for line in lines if line is not None]

    def has_room(self, line: Line) -> bool:
        """Whether a run is in memory, or could be loaded now."""
        resident = self.lines()
        return (
            line in resident
            or len(resident) < self.capacity
            or any(other.current is None for other in resident)
        )

    def ensure(self, line: Line) -> None:
        """Load a run into memory, in the state after all its answered requests. ``TrainingError``:
        the run has failed."""
        self.curve(line)
        if line in self and line.spent > STATE_AFTER:
            self.write_state_if_due(line)
        if line.failed is not None:
            raise TrainingError(line.failed)
        if line in self:
            return
        self.make_room()
        row, began = self._store.run(line.run), time.monotonic()
        assert row is not None
        if row["state"] >= 0:
            folder = state_folder(self._store, line.run, row["state"])
            self._trainer.load(line.name, folder, optimizer=True)
        else:
            config = LoraConfig.from_dict(json.loads(row["config"]))
            self._trainer.begin(line.name, config, row["seed"])
        try:
            for request in self._store.requests_after(line.run, row["state"]):
                is_done = request["done"] == 1 and request["seq"] < line.next
                if is_done and request["kind"] in REPLAYED:
                    self._replay(line, request["kind"], request["body"])
        except DivergenceError as error:  # an earlier release accepted such a step
            self.fail(line, str(error))
            raise
        except BaseException:  # a partly replayed run must not continue
            self.drop(line)
            raise
        line.spent = time.monotonic() - began

    def _replay(self, line: Line, kind: str, body: bytes) -> None:
        if kind != PASS:
            self._operations[kind](line, json.loads(body))
            return
        training_pass = self._make_pass(line, body)
        if training_pass.backward:
            while not training_pass.over:
                self._trainer.compute([training_pass])
            if training_pass.error is not None:  # although it succeeded the first time
                raise training_pass.error

    def make_room(self) -> None:
        """Move runs to the disk until one more fits. ``BankFullError``: all of them are in use."""
        while True:
            resident = self.lines()
            if len(resident) < self.capacity:
                return
            idle = [line for line in resident if line.current is None]
            if not idle:
                problem = f"{len(resident)} runs that are computed now"
                raise BankFullError(problem, f"at most {self.capacity} in memory", "try again")
            self.let_go(min(idle, key=lambda line: line.used))

    def let_go(self, line: Line) -> None:
        """Move a run to the disk."""
        if line in self:
            self.write_state_if_due(line)
        self.drop(line)
        self._queue.drop(line)

    def drop(self, line: Line) -> None:
        """Free the memory of a run without writing its state."""
        if line in self:
            self._trainer.end(line.name)

    def fail(self, line: Line, reason: str) -> None:
        """Mark a run as failed: its memory is freed, its requests stay on the disk, and each answer
        gives the reason until a checkpoint is loaded into the run."""
        self.drop(line)
        if line.failed is not None:
            return
        line.failed = reason
        log.warning("%s has failed: %s", line.run, reason)
        try:
            self._store.fail(line.run, reason)
        except (sqlite3.Error, OSError):  # the next server will detect the failure itself
            log.exception("%s: its failure could not be written", line.run)

    def write_state_if_due(self, line: Line) -> None:
        """Write a run's state unless the last one is current or gradients wait for a step, which
        would be computed again. A full disk is no failure: the requests are kept and computed
        again. Weights that no adapter folder can hold make the run fail."""
        if line.next - 1 <= line.state or self._trainer.pending(line.name):
            return
        try:
            self.write_state(line)
        except AdapterError:
            log.exception("%s: its state cannot be written", line.run)
            do = "load a checkpoint into it, or begin a new run"
            problem = "a run whose numbers cannot be kept"
            self.fail(line, sentence(problem, "numbers that an adapter folder can hold", do))
        except Exception:
            log.exception(
                "%s: its state could not be written; its requests are kept until it can", line.run
            )
            line.spent = 0.0  # try again after as much computing

    def write_state(self, line: Line, seq: int | None = None) -> None:
        """Write the state of a run after its request ``seq``; None is the last one that is done."""
        seq = line.next - 1 if seq is None else seq
        folder, previous = state_folder(self._store, line.run, seq), line.state
        self._trainer.save(line.name, folder, None)
        self.curve(line).write(folder)
        self._store.set_state(line.run, seq)
        line.state, line.spent = seq, 0.0
        if 0 <= previous != seq:
            shutil.rmtree(state_folder(self._store, line.run, previous), ignore_errors=True)

    def curve(self, line: Line) -> Curve:
        if line.curve is None:
            line.curve = read_curve(self._store, line.run, line.state)
        return line.curve
