"""A service that trains: what belongs together, and who is still there.

A session's client says every ten seconds that it is there. One that has been silent for
``VANISHED`` seconds, or has finished, holds nothing any more: its runs write their states and leave
the memory, its samples are cancelled. It may come back: all that it was promised is on the disk.
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
from veneer.serve.training.operations import Operations, tied
from veneer.serve.training.quotas import over_quota
from veneer.serve.training.samples import Samples
from veneer.serve.training.store import Place, Store
from veneer.serve.training.trainer import Trainer, Turn
from veneer.serve.training.worker import MISSING, Worker

log = logging.getLogger("veneer.serve.training")

#: seconds after which a silent client is gone, and between two looks
VANISHED, LOOK = 120.0, 10.0
# : seconds for which a run waits for a number while later ones are there: the SDK sends a request
# again for five minutes
OVERDUE = 330.0
# : unnamed weights of a run that stay whether they are used or not, and seconds after their last
# use that others do
UNNAMED, UNUSED = 8, 3600.0
#: seconds that an address of a file is good for
FILES = 3600.0
#: curves that are remembered of runs which no client of this server has used
CURVES = 512


@dataclass(eq=False)
class Training:
    """The parts of a training service; ``close`` ends it."""

    base: str  # the name by which clients ask for it
    tokenizer: str | None  # what clients load its tokenizer by
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
    disk: ThreadPoolExecutor = field(
        init=False
    )  # for what writes: the event loop waits for no disk
    curves: Callable[[str, int, int], Curve] = field(
        init=False
    )  # of runs at rest: (run, state, next request)

    def __post_init__(self) -> None:
        self.store.of_base(self.base, digest(self.model.get_input_embeddings().weight.detach()))
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
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
        self._seen: dict[str, float] = {}
        self._used: OrderedDict[str, float] = (
            OrderedDict()
        )  # when a checkpoint was last sampled from
        self._gaps: dict[
            str, tuple[int, float]
        ] = {}  # by run: the number that is missing, and since when
        self._files: dict[str, tuple[Path, float]] = {}
        self._lock = threading.Lock()  # of these
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look, name="veneer-sessions", daemon=True)

    @property
    def tied(self) -> bool:
        return tied(self.model)

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

    async def written(self, work: Callable[..., Any], *args: Any) -> Any:
        """Write to the index, in its thread. ``Refusal``: it cannot be written now."""
        return await self._on_disk(
            asyncio.get_running_loop().run_in_executor(self.disk, work, *args)
        )

    async def changed(self, work: Callable[[], Any]) -> Any:
        """Change checkpoints, in the training thread as all such changes are: a row and
        its files are of one save, copy or deletion. ``Refusal``: it cannot be written now."""
        return await self._on_disk(asyncio.shield(asyncio.wrap_future(self.worker.do(work))))

    async def _on_disk(self, work: Awaitable[Any]) -> Any:
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

    def seen(self, session: str) -> None:
        with self._lock:
            self._seen[session] = time.monotonic()

    def used(self, path: str) -> str:
        """The bank's name for samples of a checkpoint."""
        folder = self.checkpoints.resolve(path).path
        if path not in self.bank:
            self.bank.register(path, folder)
        self.keep(path)
        return path

    def keep(self, name: str) -> None:
        """It is used now. Of what the bank holds beside runs, the least used one goes from memory;
        it is read again for whoever waits for it."""
        with self._lock:
            self._used[name] = time.monotonic()
            self._used.move_to_end(name)
            excess = [
                self._used.popitem(last=False)[0] for _ in range(len(self._used) - self.resident)
            ]
        for old in excess:
            try:
                if old in self.bank:
                    self.bank.register(old, self.folder_of(old), replace=True)
            except (VeneerError, OSError):  # the one who uses ``name`` has nothing to do with it
                log.exception("the samples of %s cannot be read again", old)
                with suppress(SelectionError):  # it was deleted
                    self.bank.remove(old)

    def folder_of(self, name: str) -> Path:
        """The adapter that samples of a name tinker://… are drawn from: of a checkpoint, or of a
        run as it is now."""
        return self.checkpoints.resolve(name).path

    async def reserve_tokens(self, key: Key, most: int) -> Callable[[int], None]:
        """Count the tokens that a call for samples may take at most. Call the returned
        function with the number that it took; the first call counts. ``Refusal``: they are past the key's
        quota."""
        if not key.owner:
            return lambda used: None
        await self.written(self._reserve, key, most)

        unused = iter([most])

        def charge(used: int) -> None:
            if next(unused, None) is None:
                return
            done = self.disk.submit(self.store.settle_tokens, key.owner, most, used)
            done.add_done_callback(
                partial(_logged, f"{used} tokens of {key.owner} were not counted")
            )

        return charge

    def _reserve(self, key: Key, most: int) -> None:
        problem = over_quota(self.store, key.owner, "tokens", key.tokens, most)
        if problem is not None:
            raise Refusal(403, problem, code="quota")
        self.store.reserve_tokens(key.owner, most)

    def address(self, folder: Path) -> str:
        """A name, hard to guess, by which a folder's files can be had for a while."""
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
        """A session's client is gone: its runs leave the memory."""
        runs = {row["id"] for row in self.store.runs(None, session)}

        def go() -> None:
            for run in runs:
                line = self.worker.lines.get(run)
                if line is not None and line.current is None and not line.waiting:
                    self.worker.let_go(line)

        self.worker.do(go).add_done_callback(
            partial(_logged, f"the runs of session {session} are still in memory")
        )

    def _look(self) -> None:
        while not self._stop.wait(LOOK):
            try:
                self.sweep()
            except Exception:
                log.exception("a look at the sessions failed")

    def sweep(self) -> None:
        """Free what vanished clients hold; go on where numbers do not come; delete what has
        expired, and weights without a name that nobody uses."""
        moment = time.monotonic()
        self._fill_gaps(moment)
        with self._lock:  # clients are seen meanwhile
            vanished = [session for session, when in self._seen.items() if moment - when > VANISHED]
            for session in vanished:
                del self._seen[session]
        for session in vanished:
            self.samples.leave_soon(session)
            self.leave(session)
        self.worker.do(self._delete_old).add_done_callback(
            partial(_logged, "old checkpoints are still there")
        )

    def _delete_old(self) -> None:
        """The training thread's: what has expired by then, and was not saved anew."""
        for checkpoint in [*self.store.expired(), *self._unused(time.monotonic())]:
            try:
                self.operations.delete(checkpoint)
            except (VeneerError, OSError, sqlite3.Error):  # of one; the others are deleted
                log.exception("%s could not be deleted", checkpoint.path)
            else:
                with self._lock:
                    self._used.pop(checkpoint.path, None)

    def _fill_gaps(self, moment: float) -> None:
        """Answer numbers that did not come for too long, as errors that say so: those after them go
        on."""
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
                problem, expected = (
                    f"no request {number} for {OVERDUE:g} s, though later ones came",
                    "each number once",
                )
                error = sentence(problem, expected, "send it again, with the next number")
                self.worker.accept(line.run, number, MISSING, json.dumps({"error": error}).encode())
        self._gaps = gaps

    def _unused(self, moment: float) -> list[Place]:
        checkpoints_of_run: dict[str, list[Place]] = {}
        for row in self.store.unnamed():  # the newest first
            checkpoint = Place(row["run"], row["kind"], row["name"])
            checkpoints_of_run.setdefault(row["run"], []).append(checkpoint)
        old = [
            checkpoint
            for checkpoints in checkpoints_of_run.values()
            for checkpoint in checkpoints[UNNAMED:]
        ]
        with self._lock:
            return [
                checkpoint
                for checkpoint in old
                if moment - self._used.setdefault(checkpoint.path, moment) > UNUSED
            ]


def _logged(failure: str, done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        log.error(failure, exc_info=error)


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
    """The training service beside what a service serves. ``ConfigError``: an encoder, a folder that
    is not its own."""
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
