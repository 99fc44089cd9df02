"""The training service: its parts, and the sessions of its clients.

The client of a session sends a heartbeat every ten seconds. If it has been silent for ``VANISHED``
seconds or has finished the session, its resources are freed: its runs write their states and leave
the memory, and its samples are cancelled. It may come back, because every accepted request is on
the disk.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, SelectionError, VeneerError, sentence
from veneer.fileio.hashing import digest
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.training.checkpoint_source import CheckpointSource
from veneer.serve.training.curve import Curve, read_curve
from veneer.serve.training.operations import Operations, has_tied_head
from veneer.serve.training.quotas import over_quota
from veneer.serve.training.run_trainer import Trainer, Turn
from veneer.serve.training.samples import Samples
from veneer.serve.training.store import Checkpoint, Store
from veneer.serve.training.worker import MISSING, Worker

log = logging.getLogger("veneer.serve.training")

#: seconds after which the resources of a silent client are freed, and between two checks
VANISHED, LOOK = 120.0, 10.0
#: seconds for which a run waits for a missing request while later ones have arrived: the SDK
#: repeats a request for five minutes
OVERDUE = 330.0
#: how many unnamed weights of a run are never deleted, and after how many seconds without use the
#: others are
UNNAMED, UNUSED = 8, 3600.0
#: seconds for which the address of a file is valid
FILES = 3600.0
#: how many curves to cache of runs that no client of this server has used
CURVES = 512


@dataclass(eq=False)
class Training:
    """The parts of a training service; ``close`` ends it."""

    base: str  # its name for clients
    tokenizer: str | None  # the folder or hub id from which clients load the tokenizer
    model: Any
    bank: Any
    engine: Any
    turn: Turn
    store: Store
    timeout: float = 600.0
    resident: int = 50
    worker: Worker = field(init=False)
    operations: Operations = field(init=False)
    samples: Samples = field(init=False)
    checkpoints: CheckpointSource = field(init=False)
    #: writes to the index, because the event loop must not wait for the disk
    disk: ThreadPoolExecutor = field(init=False)
    #: curves of runs that have no line: (run, state, next request) -> curve
    curves: Callable[[str, int, int], Curve] = field(init=False)

    def __post_init__(self) -> None:
        embedding = self.model.get_input_embeddings().weight
        self.store.require_base(self.base, digest(embedding.detach()))
        vocabulary = embedding.shape[0]
        trainer = Trainer(self.model, self.bank, self.turn)
        self.worker = Worker(
            trainer,
            self.store,
            length=self.engine.length,
            vocabulary=vocabulary,
            resident=self.resident,
        )
        self.operations = Operations(self.worker, trainer, self.store, self.bank, self.base)
        self.checkpoints = CheckpointSource(self.store)
        self.samples = Samples(self.engine, self.bank, self.worker, self.timeout)
        self.disk = ThreadPoolExecutor(1, "veneer-journal")
        self.curves = lru_cache(CURVES)(
            lambda run, state, following: read_curve(self.store, run, state)
        )
        self._heartbeats: dict[str, float] = {}  # by session
        #: when a checkpoint was last sampled from, the least recent first
        self._last_uses: OrderedDict[str, float] = OrderedDict()
        #: by run: the number of the missing request, and since when it is missing
        self._gaps: dict[str, tuple[int, float]] = {}
        self._files: dict[str, tuple[Path, float]] = {}
        self._lock = threading.Lock()  # guards heartbeats, last uses and files
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look, name="veneer-sessions", daemon=True)

    @property
    def has_tied_head(self) -> bool:
        return has_tied_head(self.model)

    def start(self) -> None:
        self.worker.start()
        self._watch.start()

    def close(self) -> None:
        self._stop.set()
        if self._watch.is_alive():
            self._watch.join()
        self.worker.close()
        self.disk.shutdown()
        self.store.close()

    async def write(self, work: Callable[..., Any], *args: Any) -> Any:
        """Write to the index, in the thread for it. ``Refusal``: the disk failed."""
        return await self._await_disk(
            asyncio.get_running_loop().run_in_executor(self.disk, work, *args)
        )

    async def change_checkpoints(self, work: Callable[[], Any]) -> Any:
        """Save, copy or delete checkpoints in the training thread, so that a row of the index and
        its files always belong to the same change. ``Refusal``: the disk failed."""
        return await self._await_disk(asyncio.shield(asyncio.wrap_future(self.worker.do(work))))

    async def _await_disk(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except (sqlite3.Error, OSError) as error:
            problem = f"a folder that cannot be written ({error})"
            raise Refusal(
                503,
                problem,
                "one that can",
                "try again, or tell whoever runs the server",
                code="disk",
            ) from error

    def record_heartbeat(self, session: str) -> None:
        with self._lock:
            self._heartbeats[session] = time.monotonic()

    def register_checkpoint(self, path: str) -> str:
        """Register a checkpoint with the bank if necessary; return its name there."""
        folder = self.checkpoints.resolve(path).path
        if path not in self.bank:
            self.bank.register(path, folder)
        self.record_use(path)
        return path

    def record_use(self, name: str) -> None:
        """Record that an adapter of the bank is sampled from. If the bank holds more than
        ``resident`` of them, the least recently used ones leave its memory; they are read again
        when they are needed."""
        with self._lock:
            self._last_uses[name] = time.monotonic()
            self._last_uses.move_to_end(name)
            excess = len(self._last_uses) - self.resident
            least_recent = [self._last_uses.popitem(last=False)[0] for _ in range(excess)]
        for unused in least_recent:
            try:
                if unused in self.bank:
                    self.bank.register(unused, self.folder_of(unused), replace=True)
            except (VeneerError, OSError):  # must not fail the call that uses ``name``
                log.exception("the samples of %s cannot be read again", unused)
                with suppress(SelectionError):  # it was deleted meanwhile
                    self.bank.remove(unused)

    def folder_of(self, name: str) -> Path:
        """The adapter folder of a name tinker://…: of a checkpoint, or of a run as it is now."""
        return self.checkpoints.resolve(name).path

    async def reserve_tokens(self, key: Key, most: int) -> Callable[[int], None]:
        """Count the most tokens that a call for samples can use. The returned function replaces
        that count by the number of tokens that were used, when it is first called. ``Refusal``: the
        tokens exceed the key's quota."""
        if not key.owner:
            return lambda used: None
        await self.write(self._reserve, key, most)

        reservation = iter([most])

        def charge(used: int) -> None:
            if next(reservation, None) is None:
                return
            done = self.disk.submit(self.store.settle_tokens, key.owner, most, used)
            done.add_done_callback(
                partial(_log_failure, f"{used} tokens of {key.owner} were not counted")
            )

        return charge

    def _reserve(self, key: Key, most: int) -> None:
        problem = over_quota(self.store, key.owner, "tokens", key.tokens, most)
        if problem is not None:
            raise Refusal(403, problem, code="quota")
        self.store.reserve_tokens(key.owner, most)

    def address(self, folder: Path) -> str:
        """A secret token by which a folder's files can be downloaded for ``FILES`` seconds."""
        moment, token = time.monotonic(), secrets.token_urlsafe(24)
        with self._lock:
            self._files = {
                token: entry for token, entry in self._files.items() if entry[1] > moment
            }
            self._files[token] = folder, moment + FILES
        return token

    def file(self, token: str, name: str) -> Path | None:
        entry = self._files.get(token)
        if entry is None or entry[1] < time.monotonic():
            return None
        names = {
            str(file.relative_to(entry[0])): file for file in entry[0].rglob("*") if file.is_file()
        }
        return names.get(name)

    def leave(self, session: str) -> None:
        """Move the runs of a session whose client has left out of memory."""
        runs = {row["id"] for row in self.store.runs(None, session)}

        def let_runs_go() -> None:
            for run in runs:
                line = self.worker.lines.get(run)
                if line is not None and line.current is None and not line.waiting:
                    self.worker.memory.let_go(line)

        self.worker.do(let_runs_go).add_done_callback(
            partial(_log_failure, f"the runs of session {session} are still in memory")
        )

    def _look(self) -> None:
        while not self._stop.wait(LOOK):
            try:
                self.sweep()
            except Exception:
                log.exception("a check of the sessions failed")

    def sweep(self) -> None:
        """Free the resources of vanished clients; answer missing requests; delete expired
        checkpoints and unused weights without a name."""
        moment = time.monotonic()
        self._fill_gaps(moment)
        with self._lock:
            vanished = [
                session for session, last in self._heartbeats.items() if moment - last > VANISHED
            ]
            for session in vanished:
                del self._heartbeats[session]
        for session in vanished:
            self.samples.leave_soon(session)
            self.leave(session)
        self.worker.do(self._delete_old_checkpoints).add_done_callback(
            partial(_log_failure, "old checkpoints are still there")
        )

    def _delete_old_checkpoints(self) -> None:
        """Delete expired and unused checkpoints. The training thread calls it, so that a checkpoint
        which is saved again meanwhile is not deleted."""
        unused = self._unused_checkpoints(time.monotonic())
        for checkpoint in [*self.store.expired_checkpoints(), *unused]:
            try:
                self.operations.delete(checkpoint)
            except (VeneerError, OSError, sqlite3.Error):  # go on with the others
                log.exception("%s could not be deleted", checkpoint.path)
            else:
                with self._lock:
                    self._last_uses.pop(checkpoint.path, None)

    def _fill_gaps(self, moment: float) -> None:
        """Answer requests that have been missing for too long with an error, so that the requests
        after them are computed."""
        gaps: dict[str, tuple[int, float]] = {}
        for line in list(self.worker.lines.values()):
            first, after = line.next, min(list(line.waiting), default=0)
            if after <= first:
                continue
            gaps[line.run] = self._gaps.get(line.run, (first, moment))
            if gaps[line.run][0] != first:
                gaps[line.run] = first, moment
            if moment - gaps[line.run][1] < OVERDUE:
                continue
            log.warning(
                "%s: requests %d to %d did not come: it goes on without them",
                line.run,
                first,
                after - 1,
            )
            for number in range(first, after):
                problem = f"no request {number} for {OVERDUE:g} s, though later ones came"
                error = sentence(problem, "each number once", "send it again, with the next number")
                self.worker.queue.accept(
                    line.run, number, MISSING, json.dumps({"error": error}).encode()
                )
        self._gaps = gaps

    def _unused_checkpoints(self, moment: float) -> list[Checkpoint]:
        """Unnamed weights beyond the newest ``UNNAMED`` of each run, not used for ``UNUSED``
        seconds."""
        checkpoints_by_run: dict[str, list[Checkpoint]] = {}
        for row in self.store.hidden_checkpoints():  # the newest first
            checkpoint = Checkpoint(row["run"], row["kind"], row["name"])
            checkpoints_by_run.setdefault(row["run"], []).append(checkpoint)
        old = [
            checkpoint
            for checkpoints in checkpoints_by_run.values()
            for checkpoint in checkpoints[UNNAMED:]
        ]
        with self._lock:
            return [
                checkpoint
                for checkpoint in old
                if moment - self._last_uses.setdefault(checkpoint.path, moment) > UNUSED
            ]


def _log_failure(message: str, done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        log.error(message, exc_info=error)


def training_of(service: Any) -> Training:
    """The training service of a server that has one."""
    return next(
        extension.training
        for extension in service.extensions
        if isinstance(getattr(extension, "training", None), Training)
    )


def open_training(
    folder: str | Path,
    service: Any,
    model: Any,
    turn: Turn,
    *,
    tokenizer: str | None,
    resident: int = 50,
) -> Training:
    """Create the training service of a running ``service``, with its runs in ``folder``.
    ``ConfigError``: the model is an encoder, or the folder holds something else."""
    if service.engine is None:
        raise ConfigError(
            "an encoder to train",
            "a causal language model",
            "serve another base, or leave out --train",
        )
    store = Store(folder)
    try:
        training = Training(
            service.base,
            tokenizer,
            model,
            service.bank,
            service.engine,
            turn,
            store,
            service.timeout,
            resident,
        )
    except BaseException:
        store.close()
        raise
    training.start()
    return training
