"""The training service: it connects the store, the training thread and the samples, and frees the
resources of clients that have left.

A run is one LoRA adapter that a client trains; a client's runs belong to its session. The client
sends a heartbeat every ten seconds. If the client has been silent for ``SILENT_SECONDS`` or has
finished the session, the session's resources are freed: its runs are written to the disk and leave
the memory, and its samples are cancelled. The client may continue later, because every accepted
request is on the disk.
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
from veneer.serve.training.run_memory import log_failure
from veneer.serve.training.run_trainer import FairLock, Trainer
from veneer.serve.training.samples import Samples
from veneer.serve.training.store import Checkpoint, Store
from veneer.serve.training.wire import disk_failure
from veneer.serve.training.worker import MISSING, Worker

log = logging.getLogger("veneer.serve.training")

#: seconds without a heartbeat after which the resources of a client are freed, and seconds between
#: two checks for such clients
SILENT_SECONDS, CHECK_SECONDS = 120.0, 10.0
#: seconds for which a run waits for a request number that is missing, once a later request has
#: arrived. It is longer than five minutes, for which the SDK repeats a request that failed.
MISSING_SECONDS = 330.0
#: Of each run's unnamed checkpoints (saved only to sample from), the newest ``MAX_UNNAMED`` are
#: kept. The others are deleted ``UNUSED_SECONDS`` after samples were last drawn from them.
MAX_UNNAMED, UNUSED_SECONDS = 8, 3600.0
#: seconds for which the URL of a checkpoint's file is valid
FILE_URL_SECONDS = 3600.0
#: how many loss curves are cached, of runs that are neither in memory nor have waiting requests
CACHED_CURVES = 512


class Training:
    """The training service of a server. ``start`` starts its threads; ``close`` ends them.

    Args:
        service: the running server (``veneer.serve.service.Service``).
        model: its base model, with input embeddings.
        model_lock: held by the engine and by the trainer while they use the model.
        tokenizer_source: the folder or hub id from which clients load the tokenizer.
        max_resident: the largest number of runs in memory, and of sampled adapters in the bank.

    Raises:
        ConfigError: the runs in the store were trained on another base model.
    """

    def __init__(
        self,
        service: Any,
        model: Any,
        model_lock: FairLock,
        store: Store,
        *,
        tokenizer_source: str | None,
        max_resident: int,
    ) -> None:
        self.base, self.bank, self.engine = service.base, service.bank, service.engine
        self.model, self.tokenizer_source, self.store = model, tokenizer_source, store
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
        self.operations = Operations(self.worker, self.bank, self.base, self.record_use)
        self.samples = Samples(self.engine, self.bank, self.worker, service.timeout)
        #: has one thread, which writes to the store's index for the routes, so that the event loop
        #: need not wait for the disk
        self.index_executor = ThreadPoolExecutor(1, "veneer-journal")
        #: (run id, number of the last request in the saved state, number of the next request) ->
        #: loss curve, for runs without an ``ActiveRun``. The numbers change whenever the curve may
        #: have changed, so a cached curve is never outdated.
        self.cached_curve: Callable[[str, int, int], Curve] = lru_cache(CACHED_CURVES)(
            lambda run_id, state_seq, next_seq: read_curve(self.store, run_id, state_seq)
        )
        self._heartbeats: dict[str, float] = {}  # by session: time of the last heartbeat
        #: adapters of the bank from which samples were drawn, at most ``max_resident``: their
        #: names, the least recently used first. The dict is an ordered set.
        self._recent_adapters: OrderedDict[str, None] = OrderedDict()
        #: by name in the bank: when samples were last requested from the adapter (``monotonic``)
        self._last_uses: dict[str, float] = {}
        #: by run id: the first request number that is missing, and since when (``monotonic``)
        self._missing_requests: dict[str, tuple[int, float]] = {}
        #: by download token: the folder, and the time after which the token is invalid
        self._folders_by_token: dict[str, tuple[Path, float]] = {}
        self._lock = threading.Lock()  # guards heartbeats, uses of adapters, download tokens
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
        self.index_executor.shutdown()
        self.store.close()

    async def write(self, write_function: Callable[..., Any], *function_args: Any) -> Any:
        """Call a function that writes to the store's index (its SQLite file) in the thread for such
        writes, so that the event loop need not wait for the disk; return the function's result.
        ``Refusal`` (503): the disk failed. Other errors of the function are raised unchanged."""
        return await self._await_disk(
            asyncio.get_running_loop().run_in_executor(
                self.index_executor, write_function, *function_args
            )
        )

    async def change_checkpoints(self, function: Callable[[], Any]) -> Any:
        """Let the training thread call a function that changes checkpoints; return its result. No
        other thread changes checkpoints, so no other change comes between the change of a
        checkpoint's database row and the change of its files. ``Refusal`` (503): the disk failed.
        If the caller is cancelled, the function is called nevertheless."""
        future = asyncio.wrap_future(self.worker.submit(function))
        return await self._await_disk(asyncio.shield(future))

    async def _await_disk(self, writing: Awaitable[Any]) -> Any:
        """Await a write. ``Refusal`` (503), instead of the error of SQLite or the system: the disk
        failed, and the client should try again."""
        try:
            return await writing
        except (sqlite3.Error, OSError) as error:
            raise Refusal(503, *disk_failure(error), code="disk") from error

    def record_heartbeat(self, session_id: str) -> None:
        with self._lock:
            self._heartbeats[session_id] = time.monotonic()

    def register_checkpoint(self, path: str) -> str:
        """Register a checkpoint with the bank, from whose adapters the engine samples, unless it is
        registered already, and record its use. Returns its name in the bank, which is its ``path``
        (tinker://RUN/KIND/NAME). ``SelectionError``: there is no such checkpoint."""
        folder = adapter_folder(self.store, path)
        if path not in self.bank:
            self.bank.register(path, folder)
        self.record_use(path)
        return path

    def record_use(self, bank_name: str) -> None:
        """Record that samples are drawn from an adapter of the bank, or can be from now on. Only
        the ``max_resident`` adapters that were recorded last may stay in the bank's memory. The
        bank forgets the weights of the others, and reads them from the disk when they are needed
        again."""
        with self._lock:
            self._last_uses[bank_name] = time.monotonic()
            self._recent_adapters[bank_name] = None
            self._recent_adapters.move_to_end(bank_name)
            excess_count = len(self._recent_adapters) - self.max_resident
            least_recent_names = [
                self._recent_adapters.popitem(last=False)[0] for _ in range(excess_count)
            ]
        for unused_name in least_recent_names:
            try:
                if unused_name in self.bank:
                    folder = adapter_folder(self.store, unused_name)
                    self.bank.register(unused_name, folder, replace=True)
            except (VeneerError, OSError):
                # Only log the error, because the call for samples from ``bank_name`` does not need
                # this other adapter.
                log.exception("the samples of %s cannot be read again", unused_name)
                with suppress(SelectionError):  # the adapter was deleted meanwhile
                    self.bank.remove(unused_name)

    async def reserve_tokens(self, key: Key, max_tokens: int) -> Callable[[int], None]:
        """Reserve ``max_tokens``, the most that a call for samples can use, in the key's quota of
        the day (UTC). Call the returned function with the number of tokens that were used when the
        samples have ended: it replaces the reservation by this number, and its further calls do
        nothing. ``Refusal`` (403): the tokens exceed the quota."""
        if not key.owner:
            return lambda used_tokens: None
        await self.write(self._reserve, key, max_tokens)

        # gives one item, to the first call of ``charge``; taking an item is atomic
        reservations = iter([max_tokens])

        def charge(used_tokens: int) -> None:
            if next(reservations, None) is None:
                return
            settle_future = self.index_executor.submit(
                self.store.settle_tokens, key.owner, max_tokens, used_tokens
            )
            settle_future.add_done_callback(
                partial(_log_future_error, f"{used_tokens} tokens of {key.owner} were not counted")
            )

        return charge

    def _reserve(self, key: Key, max_tokens: int) -> None:
        check_quota(self.store, key, "tokens", max_tokens)
        self.store.reserve_tokens(key.owner, max_tokens)

    def new_file_token(self, folder: Path) -> str:
        """A new secret token with which the files of a folder can be downloaded without an API key
        for ``FILE_URL_SECONDS``."""
        now, token = time.monotonic(), secrets.token_urlsafe(24)
        with self._lock:
            self._folders_by_token = {
                token: entry for token, entry in self._folders_by_token.items() if entry[1] > now
            }
            self._folders_by_token[token] = folder, now + FILE_URL_SECONDS
        return token

    def find_file(self, token: str, relative_path: str) -> Path | None:
        """The path of a file in the folder of a download token (``new_file_token``). None: the
        token is unknown or has expired, or the folder has no file ``relative_path``."""
        folder_and_expiry = self._folders_by_token.get(token)
        if folder_and_expiry is None or folder_and_expiry[1] < time.monotonic():
            return None
        files_by_name = {
            str(file.relative_to(folder_and_expiry[0])): file
            for file in folder_and_expiry[0].rglob("*")
            if file.is_file()
        }
        return files_by_name.get(relative_path)

    def evict_session(self, session_id: str) -> None:
        """Cancel the samples of a session whose client has left, and let the training thread write
        the session's idle runs to the disk and free their memory later. A run with requests that
        wait or are computed stays in memory. Any thread may call this method."""
        self.samples.cancel_session(session_id)
        run_ids = {row["id"] for row in self.store.runs(None, session_id)}

        def evict_idle_runs() -> None:
            for run_id in run_ids:
                active_run = self.worker.active_runs.get(run_id)
                if (
                    active_run is not None
                    and active_run.current_pass is None
                    and not active_run.waiting_requests
                ):
                    self.worker.memory.evict(active_run)

        self.worker.submit(evict_idle_runs).add_done_callback(
            partial(_log_future_error, f"the runs of session {session_id} are still in memory")
        )

    def _check_sessions(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            try:
                self.clean_up()
            except Exception as error:
                log_failure("a check of the sessions failed", error)

    def clean_up(self) -> None:
        """Free the resources of silent clients, queue errors in place of requests that never
        arrived, and let the training thread delete the checkpoints that have expired, or are
        unnamed and unused."""
        now = time.monotonic()
        self._answer_missing_requests(now)
        with self._lock:
            silent_session_ids = [
                session_id
                for session_id, last_heartbeat in self._heartbeats.items()
                if now - last_heartbeat > SILENT_SECONDS
            ]
            for session_id in silent_session_ids:
                del self._heartbeats[session_id]
        for session_id in silent_session_ids:
            self.evict_session(session_id)
        self.worker.submit(self._delete_old_checkpoints).add_done_callback(
            partial(_log_future_error, "old checkpoints are still there")
        )

    def _delete_old_checkpoints(self) -> None:
        """Delete the checkpoints that have expired, or are unnamed and unused. Only the training
        thread may call this method: in another thread, a checkpoint could be saved anew after it
        was found to be expired, and then be deleted."""
        unused_checkpoints = self._unused_checkpoints(time.monotonic())
        for checkpoint in [*self.store.expired_checkpoints(), *unused_checkpoints]:
            try:
                self.operations.delete(checkpoint)
            except (VeneerError, OSError, sqlite3.Error) as error:  # continue with the others
                log_failure(f"{checkpoint.path} could not be deleted", error)
            else:
                with self._lock:
                    self._recent_adapters.pop(checkpoint.path, None)

    def _answer_missing_requests(self, now: float) -> None:
        """For each request number that has been missing for ``MISSING_SECONDS`` although later
        requests of its run have arrived, queue a request that fails, so that the later requests are
        computed. ``now``: ``time.monotonic``."""
        missing_requests: dict[str, tuple[int, float]] = {}
        for active_run in list(self.worker.active_runs.values()):
            first_missing_seq = active_run.next_seq
            first_waiting_seq = min(list(active_run.waiting_requests), default=0)
            run_id = active_run.run_id
            missing_entry = self._missing_requests.get(run_id, (first_missing_seq, now))
            if first_waiting_seq <= first_missing_seq:
                # The entry is for a later number, at which the queue was full (see below). The
                # numbers before it are queued but not answered yet, so keep the entry.
                if missing_entry[0] > first_missing_seq:
                    missing_requests[run_id] = missing_entry
                continue
            if missing_entry[0] != first_missing_seq:
                missing_entry = first_missing_seq, now
            missing_requests[run_id] = missing_entry
            if now - missing_entry[1] < MISSING_SECONDS:
                continue
            log.warning(
                "%s: requests %d to %d did not come: it goes on without them",
                run_id,
                first_missing_seq,
                first_waiting_seq - 1,
            )
            for seq in range(first_missing_seq, first_waiting_seq):
                error = sentence(
                    f"no request {seq} for {MISSING_SECONDS:g} s, though later ones came",
                    "each number once",
                    "send it again, with the next number",
                )
                body = json.dumps({"error": error}).encode()
                try:
                    self.worker.queue.accept(run_id, seq, MISSING, body)
                except Busy:
                    # The queue is full. The next check continues at this number, when the numbers
                    # before it are answered.
                    missing_requests[run_id] = seq, missing_entry[1]
                    break
        self._missing_requests = missing_requests

    def _unused_checkpoints(self, now: float) -> list[Checkpoint]:
        """The unnamed checkpoints from which no samples were drawn for ``UNUSED_SECONDS``, except
        the newest ``MAX_UNNAMED`` of each run. A checkpoint without a recorded use, such as any
        checkpoint after a restart of the server, counts as used now. ``now``: ``time.monotonic``.
        """
        checkpoints_by_run: dict[str, list[Checkpoint]] = {}
        for row in self.store.hidden_checkpoints():  # the newest come first
            checkpoint = Checkpoint(row["run"], row["kind"], row["name"])
            checkpoints_by_run.setdefault(row["run"], []).append(checkpoint)
        with self._lock:
            # Keep only the uses of unnamed checkpoints that exist, so that ``_last_uses`` does not
            # grow without limit.
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


def _log_future_error(text: str, future: Future[None]) -> None:
    """``log_failure`` of the error of a future that is done; do nothing if it succeeded."""
    if (error := future.exception()) is not None:
        log_failure(text, error)


def training_of(service: Any) -> Training:
    """The training service of a server. ``StopIteration``: the server has none, which cannot happen
    in a route of the training service."""
    return next(
        extension.training
        for extension in service.extensions
        if isinstance(getattr(extension, "training", None), Training)
    )
