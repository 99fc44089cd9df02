"""Runs in memory: at most ``capacity`` of them, the others on the disk.

When another run needs room, the least recently used run is evicted: its state is written to the
disk, and its memory is freed. A run is loaded again from its last state, and from the requests
after that state, which are computed again. Runs continue in the same way after the server was
killed.
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
from veneer.serve.training.active_runs import ActiveRun, Queue
from veneer.serve.training.curve import Curve, read_curve, state_folder
from veneer.serve.training.run_trainer import DivergenceError, Pass, Trainer
from veneer.serve.training.store import SUCCEEDED, Store

log = logging.getLogger("veneer.serve.training")


def log_failure(text: str, error: Exception) -> None:
    """Log an error of an operation that will be tried again. The traceback is logged too, except
    for an error of the disk, which recurs at each try while the disk is full."""
    is_disk_error = isinstance(error, (OSError, sqlite3.Error))
    log.error("%s: %s", text, error, exc_info=None if is_disk_error else error)


#: seconds of computing after which a run's state is written, so that a restart repeats only about
#: this much of a run's work
STATE_SECONDS = 30.0
#: the kind of a request for a forward pass, with or without a backward pass
PASS = "pass"
#: kinds of requests that change a run's weights or gradients, so loading a run computes them again
REPLAYED_KINDS = (PASS, "step", "load")

#: an operation: (run, the fields of the request's body) -> the answer, for JSON
Operation = Callable[[ActiveRun, Mapping[str, Any]], Any]


class RunMemory:
    """The runs in memory. Only the training thread may call it. ``capacity``: the largest number of
    runs; ``operations``: by the kind of request, the function that computes it; ``make_pass``:
    parses the body of a pass."""

    def __init__(
        self,
        trainer: Trainer,
        store: Store,
        queue: Queue,
        capacity: int,
        operations: Mapping[str, Operation],
        make_pass: Callable[[ActiveRun, bytes], Pass],
    ) -> None:
        self._trainer, self._store, self._queue = trainer, store, queue
        self.capacity = capacity
        self._operations, self._make_pass = operations, make_pass

    def __contains__(self, active_run: ActiveRun) -> bool:
        return active_run.adapter_name in self._trainer.runs

    def resident_runs(self) -> list[ActiveRun]:
        """The runs in memory."""
        active_runs = map(self._queue.runs_by_adapter.get, self._trainer.runs)
        return [active_run for active_run in active_runs if active_run is not None]

    def has_room(self, active_run: ActiveRun) -> bool:
        """Whether a run is in memory, or could be loaded now."""
        residents = self.resident_runs()
        return (
            active_run in residents
            or len(residents) < self.capacity
            or any(resident.current_pass is None for resident in residents)
        )

    def ensure_loaded(self, active_run: ActiveRun) -> None:
        """Load a run into memory unless it is there, in the state after all its answered requests.
        ``TrainingError``: the run has failed."""
        self.curve(active_run)
        if active_run in self and active_run.unsaved_seconds > STATE_SECONDS:
            self.write_state_if_due(active_run)
        if active_run.failure is not None:
            raise TrainingError(active_run.failure)
        if active_run in self:
            return
        self.make_room()
        row, started = self._store.existing_run(active_run.run_id), time.monotonic()
        try:
            if row["state"] >= 0:
                folder = state_folder(self._store, active_run.run_id, row["state"])
                self._trainer.load(active_run.adapter_name, folder, optimizer=True)
            else:
                config = LoraConfig.from_dict(json.loads(row["config"]))
                self._trainer.begin(active_run.adapter_name, config, row["seed"])
            for request in self._store.requests_after(active_run.run_id, row["state"]):
                has_succeeded = (
                    request["done"] == SUCCEEDED and request["seq"] < active_run.next_seq
                )
                if has_succeeded and request["kind"] in REPLAYED_KINDS:
                    self._replay(active_run, request["kind"], request["body"])
        except DivergenceError as error:  # an earlier release accepted such a step
            self.mark_failed(active_run, str(error))
            raise
        except BaseException:  # a run that is loaded or replayed in part must not continue
            self.drop(active_run)
            raise
        active_run.unsaved_seconds = time.monotonic() - started

    def _replay(self, active_run: ActiveRun, request_kind: str, body: bytes) -> None:
        """Compute a request again that has succeeded before."""
        if request_kind != PASS:
            self._operations[request_kind](active_run, json.loads(body))
            return
        training_pass = self._make_pass(active_run, body)
        if training_pass.backward:
            while not training_pass.is_over:
                self._trainer.compute([training_pass])
            if training_pass.error is not None:  # although it succeeded the first time
                raise training_pass.error

    def make_room(self) -> None:
        """Evict runs until one more fits. ``BankFullError``: none can be evicted, because each run
        in memory has a pass that is being computed."""
        while True:
            residents = self.resident_runs()
            if len(residents) < self.capacity:
                return
            idle_runs = [resident for resident in residents if resident.current_pass is None]
            if not idle_runs:
                raise BankFullError(
                    f"{len(residents)} runs that are computed now",
                    f"at most {self.capacity} in memory",
                    "try again",
                )
            self.evict(min(idle_runs, key=lambda idle_run: idle_run.last_used))

    def evict(self, active_run: ActiveRun) -> None:
        """Write a run's state to the disk and free its memory."""
        if active_run in self:
            self.write_state_if_due(active_run)
        self.drop(active_run)
        self._queue.drop(active_run)

    def drop(self, active_run: ActiveRun) -> None:
        """Free the memory of a run without writing its state."""
        if active_run in self:
            self._trainer.end(active_run.adapter_name)

    def mark_failed(self, active_run: ActiveRun, reason: str) -> None:
        """Mark a run as failed: its memory is freed, its requests stay on the disk, and each answer
        gives the reason until a checkpoint is loaded into the run."""
        self.drop(active_run)
        if active_run.failure is not None:
            return
        active_run.failure = reason
        log.warning("%s has failed: %s", active_run.run_id, reason)
        try:
            self._store.record_failure(active_run.run_id, reason)
        except (sqlite3.Error, OSError):  # after a restart, the same failure is detected again
            log.exception("%s: its failure could not be written", active_run.run_id)

    def write_state_if_due(self, active_run: ActiveRun) -> None:
        """Write a run's state, unless the saved state is current. Do not write it while the run has
        gradients that wait for an optimizer step either: a state holds no gradients, so the passes
        that computed them would be lost.

        If the disk is full, the run does not fail, because its requests are kept and can be
        computed again. If its weights are too large for an adapter folder, it fails."""
        run_id, adapter_name = active_run.run_id, active_run.adapter_name
        is_current = active_run.next_seq - 1 <= active_run.state_seq
        if is_current or self._trainer.has_pending_gradients(adapter_name):
            return
        try:
            self.write_state(active_run)
        except AdapterError:
            log.exception("%s: its state cannot be written", run_id)
            reason = sentence(
                "a run whose numbers cannot be kept",
                "numbers that an adapter folder can hold",
                "load a checkpoint into it, or begin a new run",
            )
            self.mark_failed(active_run, reason)
        except Exception as error:
            problem = "its state could not be written; its requests are kept until it can"
            log_failure(f"{run_id}: {problem}", error)
            active_run.unsaved_seconds = 0.0  # try again after ``STATE_SECONDS`` of computing

    def write_state(self, active_run: ActiveRun) -> None:
        """Write the state of a run after its last answered request, then delete the previous
        state."""
        seq, previous_seq = active_run.next_seq - 1, active_run.state_seq
        folder = state_folder(self._store, active_run.run_id, seq)
        self._trainer.save(active_run.adapter_name, folder, None)
        self.curve(active_run).write(folder)
        self._store.set_state(active_run.run_id, seq)
        active_run.state_seq, active_run.unsaved_seconds = seq, 0.0
        if 0 <= previous_seq != seq:
            previous_folder = state_folder(self._store, active_run.run_id, previous_seq)
            shutil.rmtree(previous_folder, ignore_errors=True)

    def curve(self, active_run: ActiveRun) -> Curve:
        """The loss curve of a run, which is read from the disk at the first call."""
        if active_run.curve is None:
            active_run.curve = read_curve(self._store, active_run.run_id, active_run.state_seq)
        return active_run.curve
