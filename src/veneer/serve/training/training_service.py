"""The training service: it connects the store, the training thread and the samples, and frees the
resources of clients that have left.

The client of a session sends a heartbeat every ten seconds. If the client has been silent for
``SILENT_SECONDS`` or has finished the session, the session's resources are freed: its runs are
saved and leave the memory, and its samples are cancelled. The client may continue later, because
every accepted request is on the disk.
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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from veneer.errors import SelectionError, VeneerError, sentence
from veneer.fileio.hashing import digest
from veneer.serve.access import Key
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Busy
from veneer.serve.training.curve import Curve, read_curve
from veneer.serve.training.operations import Operations, adapter_folder
from veneer.serve.training.quotas import check_quota
from veneer.serve.training.run_trainer import FairLock, Trainer
from veneer.serve.training.samples import Samples
from veneer.serve.training.store import Checkpoint, Store
from veneer.serve.training.worker import MISSING, Worker

log = logging.getLogger("veneer.serve.training")

#: seconds after which the resources of a silent client are freed, and seconds between two checks
SILENT_SECONDS, CHECK_SECONDS = 120.0, 10.0
#: seconds for which a run waits for a missing request after later requests have arrived. The SDK
#: repeats a request that failed for five minutes, so the request may still arrive within this time.
MISSING_SECONDS = 330.0
#: Of each run's unnamed checkpoints, the newest ``MAX_UNNAMED`` are kept. The others are deleted
#: after ``UNUSED_SECONDS`` without use.
MAX_UNNAMED, UNUSED_SECONDS = 8, 3600.0
#: seconds for which the URL of a checkpoint's file is valid
FILE_URL_SECONDS = 3600.0
#: how many loss curves are cached of runs that are not active
CACHED_CURVES = 512


class Training:
    """The training service of a running ``service``. ``start`` starts its threads; ``close`` ends
    them. ``tokenizer``: the folder or hub id from which clients load the tokenizer;
    ``max_resident``: the largest number of runs in memory."""

    def __init__(
        self,
        service: Any,
        model: Any,
        model_lock: FairLock,
        store: Store,
        *,
        tokenizer: str | None,
        max_resident: int,
    ) -> None:
        self.base, self.bank, self.engine = service.base, service.bank, service.engine
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.max_resident = max_resident
        embedding = model.get_input_embeddings().weight
        store.require_base(self.base, digest(embedding.detach()))
        self.worker = Worker(
            Trainer(model, self.bank, model_lock),
            store,
            context_length=self.engine.length,
            vocabulary_size=embedding.shape[0],
            max_resident=max_resident,
        )
        self.operations = Operations(self.worker, self.bank, self.base)
        self.samples = Samples(self.engine, self.bank, self.worker, service.timeout)
        #: a thread that writes to the store's index, so that the event loop need not wait for the
        #: disk
        self.index_thread = ThreadPoolExecutor(1, "veneer-journal")
        #: cached curves of runs that are not active: (run id, number of the last request in the
        #: saved state, number of the next request) -> curve
        self.cached_curve: Callable[[str, int, int], Curve] = lru_cache(CACHED_CURVES)(
            lambda run, state_seq, next_seq: read_curve(self.store, run, state_seq)
        )
        self._heartbeats: dict[str, float] = {}  # by session: time of the last heartbeat
        #: names in the bank of at most ``max_resident`` sampled adapters, the least recent first
        self._recent_adapters: OrderedDict[str, None] = OrderedDict()
        #: by name in the bank: when the adapter was last sampled from
        self._last_uses: dict[str, float] = {}
        #: by run id: the number of the missing request, and since when it has been missing
        self._missing_requests: dict[str, tuple[int, float]] = {}
        #: by download token: the folder, and the time after which the token is invalid
        self._files: dict[str, tuple[Path, float]] = {}
        self._lock = threading.Lock()  # guards heartbeats, uses of adapters and files
        self._stop = threading.Event()
        self._session_thread = threading.Thread(
            target=self._check_sessions, name="veneer-sessions", daemon=True
        )

    def start(self) -> None:
        self.worker.start()
        self._session_thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._session_thread.is_alive():
            self._session_thread.join()
        self.worker.close()
        self.index_thread.shutdown()
        self.store.close()

    async def write(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that writes to the store's index, in the thread for such writes.
        ``Refusal``: the disk failed."""
        return await self._await_disk(
            asyncio.get_running_loop().run_in_executor(self.index_thread, function, *args)
        )

    async def change_checkpoints(self, function: Callable[[], Any]) -> Any:
        """Call a function that changes checkpoints, in the training thread, so that the row and the
        files of a checkpoint always change together. ``Refusal``: the disk failed."""
        future = asyncio.wrap_future(self.worker.submit(function))
        return await self._await_disk(asyncio.shield(future))

    async def _await_disk(self, writing: Awaitable[Any]) -> Any:
        try:
            return await writing
        except (sqlite3.Error, OSError) as error:
            raise Refusal(
                503,
                f"a folder that cannot be written ({error})",
                "one that can",
                "try again, or tell whoever runs the server",
                code="disk",
            ) from error

    def record_heartbeat(self, session: str) -> None:
        with self._lock:
            self._heartbeats[session] = time.monotonic()

    def register_checkpoint(self, path: str) -> str:
        """Register a checkpoint with the bank unless it is registered already. Returns its name in
        the bank, which is its path."""
        folder = self.folder_of(path)
        if path not in self.bank:
            self.bank.register(path, folder)
        self.record_use(path)
        return path

    def record_use(self, name: str) -> None:
        """Record that an adapter of the bank is sampled from. Of the adapters recorded here, only
        the ``max_resident`` that were used last stay in the bank's memory. The others are read
        again from the disk when they are needed."""
        with self._lock:
            self._last_uses[name] = time.monotonic()
            self._recent_adapters[name] = None
            self._recent_adapters.move_to_end(name)
            excess = len(self._recent_adapters) - self.max_resident
            least_recent = [self._recent_adapters.popitem(last=False)[0] for _ in range(excess)]
        for unused in least_recent:
            try:
                if unused in self.bank:
                    self.bank.register(unused, self.folder_of(unused), replace=True)
            except (VeneerError, OSError):  # must not fail the call that uses ``name``
                log.exception("the samples of %s cannot be read again", unused)
                with suppress(SelectionError):  # the adapter was deleted meanwhile
                    self.bank.remove(unused)

    def folder_of(self, name: str) -> Path:
        """The adapter folder of a name tinker://…, as ``adapter_folder`` finds it."""
        return adapter_folder(self.store, name)

    async def reserve_tokens(self, key: Key, max_tokens: int) -> Callable[[int], None]:
        """Reserve ``max_tokens``, the most that a call for samples can use, in the key's quota of
        the day. The returned function takes the number of tokens that the call has used; its first
        call replaces the reservation by this number. ``Refusal``: the tokens exceed the quota."""
        if not key.owner:
            return lambda used: None
        await self.write(self._reserve, key, max_tokens)

        reservations = iter([max_tokens])

        def charge(used: int) -> None:
            if next(reservations, None) is None:
                return
            settling = self.index_thread.submit(
                self.store.settle_tokens, key.owner, max_tokens, used
            )
            settling.add_done_callback(
                partial(_log_failure, f"{used} tokens of {key.owner} were not counted")
            )

        return charge

    def _reserve(self, key: Key, max_tokens: int) -> None:
        check_quota(self.store, key, "tokens", max_tokens)
        self.store.reserve_tokens(key.owner, max_tokens)

    def new_file_token(self, folder: Path) -> str:
        """A new secret token with which a folder's files can be downloaded for a limited time."""
        now, token = time.monotonic(), secrets.token_urlsafe(24)
        with self._lock:
            self._files = {token: entry for token, entry in self._files.items() if entry[1] > now}
            self._files[token] = folder, now + FILE_URL_SECONDS
        return token

    def find_file(self, token: str, name: str) -> Path | None:
        """The path of a file in the folder that a download token gives access to; None if the token
        is invalid or there is no such file."""
        entry = self._files.get(token)
        if entry is None or entry[1] < time.monotonic():
            return None
        files_by_name = {
            str(file.relative_to(entry[0])): file for file in entry[0].rglob("*") if file.is_file()
        }
        return files_by_name.get(name)

    def evict_session(self, session: str) -> None:
        """Cancel the samples of a session and move its runs to the disk, because its client has
        left. Any thread may call this."""
        self.samples.cancel_session(session)
        runs = {row["id"] for row in self.store.runs(None, session)}

        def evict_idle_runs() -> None:
            for run in runs:
                active_run = self.worker.active_runs.get(run)
                if (
                    active_run is not None
                    and active_run.current_pass is None
                    and not active_run.waiting_requests
                ):
                    self.worker.memory.evict(active_run)

        self.worker.submit(evict_idle_runs).add_done_callback(
            partial(_log_failure, f"the runs of session {session} are still in memory")
        )

    def _check_sessions(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            try:
                self.clean_up()
            except Exception:
                log.exception("a check of the sessions failed")

    def clean_up(self) -> None:
        """Free the resources of silent clients, answer requests that never arrived with an error,
        and delete checkpoints that are expired, or unnamed and unused."""
        now = time.monotonic()
        self._answer_missing_requests(now)
        with self._lock:
            silent_sessions = [
                session
                for session, last_heartbeat in self._heartbeats.items()
                if now - last_heartbeat > SILENT_SECONDS
            ]
            for session in silent_sessions:
                del self._heartbeats[session]
        for session in silent_sessions:
            self.evict_session(session)
        self.worker.submit(self._delete_old_checkpoints).add_done_callback(
            partial(_log_failure, "old checkpoints are still there")
        )

    def _delete_old_checkpoints(self) -> None:
        """Delete expired and unused checkpoints. Only the training thread calls this, so that a
        checkpoint which is saved again meanwhile is not deleted."""
        unused = self._unused_checkpoints(time.monotonic())
        for checkpoint in [*self.store.expired_checkpoints(), *unused]:
            try:
                self.operations.delete(checkpoint)
            except (VeneerError, OSError, sqlite3.Error):  # continue with the other checkpoints
                log.exception("%s could not be deleted", checkpoint.path)
            else:
                with self._lock:
                    self._recent_adapters.pop(checkpoint.path, None)

    def _answer_missing_requests(self, now: float) -> None:
        """Answer requests that have been missing for ``MISSING_SECONDS`` with an error, so that the
        requests after them are computed."""
        missing_requests: dict[str, tuple[int, float]] = {}
        for active_run in list(self.worker.active_runs.values()):
            first_missing = active_run.next_seq
            first_waiting = min(list(active_run.waiting_requests), default=0)
            run_id = active_run.run_id
            missing = self._missing_requests.get(run_id, (first_missing, now))
            if first_waiting <= first_missing:
                if missing[0] > first_missing:  # the numbers before it are not answered yet
                    missing_requests[run_id] = missing
                continue
            if missing[0] != first_missing:
                missing = first_missing, now
            missing_requests[run_id] = missing
            if now - missing[1] < MISSING_SECONDS:
                continue
            log.warning(
                "%s: requests %d to %d did not come: it goes on without them",
                run_id,
                first_missing,
                first_waiting - 1,
            )
            for number in range(first_missing, first_waiting):
                error = sentence(
                    f"no request {number} for {MISSING_SECONDS:g} s, though later ones came",
                    "each number once",
                    "send it again, with the next number",
                )
                body = json.dumps({"error": error}).encode()
                try:
                    self.worker.queue.accept(run_id, number, MISSING, body)
                except Busy:  # the next check answers it, when the numbers before it are answered
                    missing_requests[run_id] = number, missing[1]
                    break
        self._missing_requests = missing_requests

    def _unused_checkpoints(self, now: float) -> list[Checkpoint]:
        """The unnamed checkpoints that were not used for ``UNUSED_SECONDS``, except the newest
        ``MAX_UNNAMED`` of each run. A checkpoint without a recorded use counts as used now."""
        checkpoints_by_run: dict[str, list[Checkpoint]] = {}
        for row in self.store.hidden_checkpoints():  # the newest come first
            checkpoint = Checkpoint(row["run"], row["kind"], row["name"])
            checkpoints_by_run.setdefault(row["run"], []).append(checkpoint)
        with self._lock:
            # uses of other adapters are dropped here, so that the record is bounded
            self._last_uses = {
                checkpoint.path: self._last_uses.get(checkpoint.path, now)
                for checkpoints in checkpoints_by_run.values()
                for checkpoint in checkpoints
            }
            return [
                checkpoint
                for checkpoints in checkpoints_by_run.values()
                for checkpoint in checkpoints[MAX_UNNAMED:]
                if now - self._last_uses[checkpoint.path] > UNUSED_SECONDS
            ]


def _log_failure(message: str, future: Future[None]) -> None:
    if (error := future.exception()) is not None:
        log.error(message, exc_info=error)


def training_of(service: Any) -> Training:
    """The training service of a server that has one."""
    return next(
        extension.training
        for extension in service.extensions
        if isinstance(getattr(extension, "training", None), Training)
    )
