"""The runs (LoRA adapters that are trained) in memory: at most ``capacity`` of them, the others are
on the disk.

When another run needs room, the least recently used run is evicted: its state (adapter, optimizer,
loss curve) is written to the disk, and its memory is freed. To load a run again, its last saved
state is read, and the requests after that state are computed again. Runs continue in the same way
after the server was killed.
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


def log_failure(text: str, error: BaseException) -> None:
    """Log an error for whoever runs the server. ``text``: what failed. The traceback is logged too,
    except for an error of the disk, because a full disk would log it at each try."""
    is_disk_error = isinstance(error, (OSError, sqlite3.Error))
    log.error("%s: %s", text, error, exc_info=None if is_disk_error else error)


#: seconds of computing for a run after which its state is written, so that a restart must compute
#: only about this much again
STATE_SECONDS = 30.0
#: the kind of a request for a forward pass, with or without a backward pass
PASS = "pass"
#: kinds of requests that change a run's weights or gradients. When a run is loaded, those after its
#: saved state are computed again.
REPLAYED_KINDS = (PASS, "step", "load")

#: a function that computes a request: (run, the fields of the request's body) -> the fields of the
#: answer, for JSON
Operation = Callable[[ActiveRun, Mapping[str, Any]], Any]


class RunMemory:
    """The runs in memory. Only the training thread may call the methods.

    Args:
        capacity: the largest number of runs in memory.
        operations: by the kind of request, the function that computes it, except for passes.
        make_pass: parses the body of a pass (a forward, and a backward if requested) of a run.
    """

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
        """Whether the run is in memory."""
        return active_run.adapter_name in self._trainer.runs

    def resident_runs(self) -> list[ActiveRun]:
        """The runs in memory."""
        active_runs = map(self._queue.runs_by_adapter.get, self._trainer.runs)
        return [active_run for active_run in active_runs if active_run is not None]

    def has_room(self, active_run: ActiveRun) -> bool:
        """Whether a run is in memory, or could be loaded now: there is free room, or a run without
        a pass that is being computed, which can be evicted."""
        resident_runs = self.resident_runs()
        return (
            active_run in resident_runs
            or len(resident_runs) < self.capacity
            or any(resident.current_pass is None for resident in resident_runs)
        )

    def ensure_loaded(self, active_run: ActiveRun) -> None:
        """Load a run into memory unless it is there: read its saved state, and compute again the
        successful requests after that state. Other runs may be evicted. If the run is in memory and
        has been computed for ``STATE_SECONDS``, its state is written.

        Raises:
            TrainingError: the run has failed.
            BankFullError: each run in memory has a pass that is being computed.
        """
        self.curve(active_run)
        if active_run in self and active_run.unsaved_seconds > STATE_SECONDS:
            self.write_state_if_due(active_run)
        if active_run.failure is not None:
            raise TrainingError(active_run.failure)
        if active_run in self:
            return
        self.make_room()
        run_row, load_started = self._store.existing_run(active_run.run_id), time.monotonic()
        replayed_rows = [
            row
            for row in self._store.requests_after(active_run.run_id, run_row["state"])
            if row["done"] == SUCCEEDED
            and row["seq"] < active_run.next_seq
            and row["kind"] in REPLAYED_KINDS
        ]
        try:
            if run_row["state"] >= 0:
                saved_state_folder = state_folder(self._store, active_run.run_id, run_row["state"])
                self._trainer.load(active_run.adapter_name, saved_state_folder, optimizer=True)
            elif not replayed_rows or replayed_rows[0]["kind"] != "load":
                # a load makes the adapter itself; its variant may have no start without data
                config = LoraConfig.from_dict(json.loads(run_row["config"]))
                self._trainer.begin(active_run.adapter_name, config, run_row["seed"])
            for row in replayed_rows:
                self._replay(active_run, row["kind"], row["body"])
        except DivergenceError as error:
            # A replayed step makes weights that are too large to be saved. It succeeded before only
            # because earlier releases of Veneer did not check them.
            self.mark_failed(active_run, str(error))
            raise
        except BaseException:
            # Requests must not be computed with a run that is loaded or replayed only in part.
            self.drop(active_run)
            raise
        active_run.unsaved_seconds = time.monotonic() - load_started

    def _replay(self, active_run: ActiveRun, request_kind: str, body: bytes) -> None:
        """Compute a request of a run again that has succeeded before, for its changes of the
        weights and gradients; its answer is discarded. A pass without a backward changes nothing,
        and is skipped. An error of the computation is raised."""
        if request_kind != PASS:
            self._operations[request_kind](active_run, json.loads(body))
            return
        training_pass = self._make_pass(active_run, body)
        if training_pass.backward:
            while not training_pass.is_over:
                self._trainer.compute([training_pass])
            if training_pass.error is not None:
                raise training_pass.error

    def make_room(self) -> None:
        """Evict the least recently used runs until one more fits. ``BankFullError``: none can be
        evicted, because each run in memory has a pass that is being computed."""
        while True:
            resident_runs = self.resident_runs()
            if len(resident_runs) < self.capacity:
                return
            idle_runs = [resident for resident in resident_runs if resident.current_pass is None]
            if not idle_runs:
                raise BankFullError(
                    f"{len(resident_runs)} runs that are computed now",
                    f"at most {self.capacity} in memory",
                    "try again",
                )
            self.evict(min(idle_runs, key=lambda idle_run: idle_run.last_used))

    def evict(self, active_run: ActiveRun) -> None:
        """Write a run's state to the disk and free its memory, if it is in memory. If the run has
        gradients for its next optimizer step, or the disk fails, the state is not written, and the
        requests since the last state are computed again when the run is loaded."""
        if active_run in self:
            self.write_state_if_due(active_run)
        self.drop(active_run)
        self._queue.drop(active_run)

    def drop(self, active_run: ActiveRun) -> None:
        """Free the memory of a run without writing its state. The requests since the last saved
        state are computed again when the run is loaded."""
        if active_run in self:
            self._trainer.end(active_run.adapter_name)

    def mark_failed(self, active_run: ActiveRun, reason: str) -> None:
        """Mark a run as failed: free its memory, and record the reason on the disk. Its requests
        are then answered with this reason until a checkpoint is loaded into the run. If the run has
        failed before, the first reason is kept."""
        self.drop(active_run)
        if active_run.failure is not None:
            return
        active_run.failure = reason
        log.warning("%s has failed: %s", active_run.run_id, reason)
        try:
            self._store.record_failure(active_run.run_id, reason)
        except (sqlite3.Error, OSError) as error:
            # Only log the error: after a restart, the failure is detected again by computing the
            # same requests.
            log_failure(f"{active_run.run_id}: its failure could not be written", error)

    def write_state_if_due(self, active_run: ActiveRun) -> None:
        """Write the state of a run in memory, except in two cases. If no request was answered since
        the saved state, that state is current. If the run has gradients for its next optimizer
        step, a state could not hold them, and the passes that computed them would be lost.

        Errors are logged, not raised. If the disk is full, the run continues, because its requests
        are kept and can be computed again. If its weights are too large to be saved, it is marked
        as failed."""
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
        """Write the state of a run (adapter, optimizer, loss curve) after its last answered
        request, record the number of this request in the store, then delete the earlier states, and
        what a killed process left of them.
        ``AdapterError``: the weights are too large to be saved. If an error is raised, also by the
        disk, the previous state stays."""
        seq = active_run.next_seq - 1
        new_folder = state_folder(self._store, active_run.run_id, seq)
        self._trainer.save(active_run.adapter_name, new_folder, None)
        self.curve(active_run).write(new_folder)
        self._store.set_state(active_run.run_id, seq)
        active_run.state_seq, active_run.unsaved_seconds = seq, 0.0
        for folder in new_folder.parent.glob("*state-*"):
            if folder != new_folder:
                shutil.rmtree(folder, ignore_errors=True)

    def curve(self, active_run: ActiveRun) -> Curve:
        """The loss curve of a run. The first call reads it from the disk and keeps it in
        ``active_run``."""
        if active_run.curve is None:
            active_run.curve = read_curve(self._store, active_run.run_id, active_run.state_seq)
        return active_run.curve
