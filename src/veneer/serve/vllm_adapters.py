"""The adapters of a server that forwards requests to vLLM (``VllmAdapters``, the ``bank`` of its
``Service``). An adapter is loaded into vLLM when a request first needs it.

    adapter folder → verified copy → comparison of its base   → POST /v1/load_lora_adapter
    blend          → new adapter folder, composed from copies → POST /v1/load_lora_adapter

vLLM reads the files of an adapter again whenever it loads the adapter, and does not verify them. So
it gets copies in a folder that no other program writes to. Each loaded copy has a name in vLLM that
no client can guess. If an adapter is replaced by another of the same name, the new one gets another
copy with another name in vLLM. So requests that run keep the old copy, and vLLM's prefix cache,
whose keys contain the name in vLLM, never mixes the two.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.adapter_files import read
from veneer.adapter_files.file_names import copy_files
from veneer.bank.lease import Status
from veneer.errors import AdapterError, BankFullError, SelectionError, raise_all, sentence
from veneer.formats import peft
from veneer.serve.scheduler import BlendKey, key_of
from veneer.serve.vllm import ADVICE, MAX_CPU_ADAPTERS, reasons_against
from veneer.serve.vllm_resolver import BaseVerifier
from veneer.tools.compose import compose

log = logging.getLogger("veneer.serve")

#: sends a POST request to vLLM: (path, body) → (status, text)
Post = Callable[[str, Mapping[str, Any]], tuple[int, str]]


@dataclass
class RegisteredAdapter:
    """An adapter that requests may use. ``path``: its folder. ``copy_folder``: the verified copy
    for vLLM, None before it is needed. ``pinned``: whether it stays loaded in vLLM."""

    path: Path
    copy_folder: Path | None = None
    pinned: bool = False


@dataclass(eq=False)
class LoadedBlend:
    """An adapter, or a weighted sum of adapters (a blend), that vLLM has loaded under ``name``.
    ``key``: its adapters and weights (``key_of``). ``stale``: whether one of its adapters was
    replaced or removed since, so that new requests must not use it."""

    name: str
    key: BlendKey
    folder: Path  # from which vLLM reads it
    nbytes: int  # of its file of weights
    is_composed: bool = False  # whether ``folder`` holds a sum that was made for a blend
    users: int = 0  # number of requests that use it now
    used_at: float = field(default_factory=time.monotonic)
    stale: bool = False


class Lease:
    """The use of a loaded adapter or blend by one request; until ``release`` is called, it is not
    unloaded. ``name``: its name in vLLM, or None for the base."""

    def __init__(self, name: str | None, release: Callable[[], None] = lambda: None) -> None:
        self.name, self._release = name, release

    def release(self) -> None:
        release, self._release = self._release, lambda: None
        release()


class VllmAdapters:
    """The adapters of one vLLM process. Any thread may call the methods.

    Args:
        post: sends a POST request to vLLM.
        base: the folder of the base.
        folder: the folder in which copies are written.
        rank: the largest rank that vLLM accepts.
        budget: the most bytes of adapter files that vLLM may have loaded; None: no limit.
        verify_base: whether the base is compared with the hashes of the base's weights in the
            record of each adapter.
    """

    def __init__(
        self,
        post: Post,
        base: str,
        folder: Path,
        rank: int,
        budget: int | None = None,
        *,
        verify_base: bool = True,
    ) -> None:
        self._post, self._base, self._folder, self._max_rank = post, base, folder, rank
        self._max_bytes, self._base_verifier = budget, BaseVerifier() if verify_base else None
        self.on_event: Callable[[str, str, float], None] = lambda kind, name, seconds: None
        self._lock = threading.Lock()  # guards the two dictionaries; never held for long
        # held while adapters are copied and loaded, and while one is replaced or removed
        self._load_lock = threading.RLock()
        self._registered: dict[str, RegisteredAdapter] = {}
        self._loaded_blends: dict[BlendKey, LoadedBlend] = {}
        self._unique_numbers = itertools.count(1)
        self._name_secret = secrets.token_hex(8)

    def register(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Make an adapter folder available under a name, without loading it. An earlier adapter of
        the name is replaced, whatever ``replace`` is. If it was pinned, the new one is pinned too.
        ``AdapterError``: vLLM cannot load the adapter."""
        reasons = reasons_against(Path(path), self._max_rank)
        error_prefix = f"Adapter {name!r} in {path}"
        raise_all(AdapterError, error_prefix, [sentence(reason, *ADVICE) for reason in reasons])
        with self._load_lock:  # a load may be reading the copy of the earlier adapter
            with self._lock:
                old_entry = self._registered.get(name)
                self._registered[name] = RegisteredAdapter(
                    Path(path), pinned=old_entry is not None and old_entry.pinned
                )
            self._retire(name, old_entry)

    def add(self, path: str | Path, *, name: str, replace: bool = False) -> None:
        """Make an adapter folder available under a name, and load it into vLLM. An earlier adapter
        of the name is replaced, whatever ``replace`` is. If loading fails, the error is raised and
        the earlier adapter remains."""
        with self._load_lock:
            old_entry = self._registered.get(name)
            is_pinned = old_entry is not None and old_entry.pinned
            copy_folder = self._copy(name, Path(path))
            entry = RegisteredAdapter(Path(path), copy_folder, is_pinned)
            try:
                loaded = self._load({name: 1.0}, {name: entry})
            except BaseException:
                shutil.rmtree(copy_folder, ignore_errors=True)
                raise
            with self._lock:
                self._registered[name] = entry
            self._retire(name, old_entry)
            with self._lock:
                self._loaded_blends[loaded.key] = loaded

    def remove(self, name: str) -> None:
        with self._load_lock:  # a load may be reading the copy
            with self._lock:
                old_entry = self._registered.pop(name, None)
            self._retire(name, old_entry)
        if old_entry is not None:
            self.on_event("remove", name, 0.0)

    def pin(self, name: str) -> None:
        lease = self.acquire({name: 1.0})
        try:
            self._entry_of(name).pinned = True
        finally:
            lease.release()

    def unpin(self, name: str) -> None:
        self._entry_of(name).pinned = False

    def throttle_loads(self) -> None:
        """Does nothing. ``Bank.throttle_loads`` keeps loads from slowing down the model's calls;
        here the model runs in another process."""

    def status(self) -> list[Status]:
        with self._lock:
            return [self._status(name, entry) for name, entry in self._registered.items()]

    def _status(self, name: str, entry: RegisteredAdapter) -> Status:
        loaded = self._loaded_blends.get(((name, 1.0),))
        nbytes = 0 if loaded is None else loaded.nbytes
        user_count = 0 if loaded is None else loaded.users
        return Status(
            name, entry.path, loaded is not None, nbytes, entry.pinned, user_count, None, None
        )

    def find(self, blend: Mapping[str, float]) -> Lease | None:
        """A lease on ``blend`` (weights by adapter name; empty or all 0: the base). None if it is
        not loaded, so that ``acquire`` must load it."""
        key = key_of({name: weight for name, weight in blend.items() if weight})
        if not key:
            return Lease(None)
        with self._lock:
            loaded = self._loaded_blends.get(key)
            return None if loaded is None else self._lease(loaded)

    def acquire(self, blend: Mapping[str, float]) -> Lease:
        """A lease on ``blend`` (weights by adapter name). If the blend is not loaded, it is loaded
        first, which takes seconds.

        Raises:
            SelectionError: an adapter of the blend is not registered.
            AdapterError: an adapter is damaged, made for another base, or vLLM refuses it.
            BankFullError: the adapters in use and those that are pinned leave no room.
            OSError: files cannot be read or written, or vLLM does not answer.
        """
        lease = self.find(blend)
        if lease is not None:
            return lease
        with self._load_lock:
            lease = self.find(blend)
            if lease is not None:
                return lease
            weights = {name: weight for name, weight in blend.items() if weight}
            entries = {name: self._entry_of(name) for name in weights}
            loaded = self._load(weights, entries)
            with self._lock:
                self._loaded_blends[loaded.key] = loaded
                return self._lease(loaded)

    def _entry_of(self, name: str) -> RegisteredAdapter:
        with self._lock:
            if name not in self._registered:
                raise SelectionError(f"no adapter {name!r}", "one that is registered", "add it")
            return self._registered[name]

    def _lease(self, loaded: LoadedBlend) -> Lease:
        loaded.users += 1
        loaded.used_at = time.monotonic()

        def release() -> None:
            with self._lock:
                loaded.users -= 1
                must_unload = loaded.stale and not loaded.users
            if must_unload:
                # in a thread, because vLLM may take long, and an event loop may call ``release``
                threading.Thread(target=self._unload, args=(loaded,), daemon=True).start()

        return Lease(loaded.name, release)

    def _load(
        self, weights: Mapping[str, float], entries: Mapping[str, RegisteredAdapter]
    ) -> LoadedBlend:
        """Load a blend into vLLM, after unloading others if there is no room for it. The caller
        adds the result to ``_loaded_blends``.

        Args:
            weights: the weights of the adapters by name.
            entries: the adapters by name. Copies of their folders are made if there are none.

        Raises:
            AdapterError, BankFullError, OSError: as in ``acquire``.
        """
        started_at, key = time.monotonic(), key_of(weights)
        event_label = next(iter(weights)) if len(weights) == 1 else "blend"
        is_single, folder = list(weights.values()) == [1.0], None
        try:
            for name, entry in entries.items():
                if entry.copy_folder is None:
                    entry.copy_folder = self._copy(name, entry.path)
            copies = {
                name: entry.copy_folder for name, entry in entries.items() if entry.copy_folder
            }
            folder = next(iter(copies.values())) if is_single else self._compose(weights, copies)
            nbytes = (folder / peft.TENSORS).stat().st_size
            vllm_name = f"veneer-{self._name_secret}-{next(self._unique_numbers)}"
            loaded = LoadedBlend(vllm_name, key, folder, nbytes, is_composed=not is_single)
            self._make_room(nbytes)
            body = {"lora_name": loaded.name, "lora_path": str(folder)}
            status, response_text = self._post("/v1/load_lora_adapter", body)
            if status != 200:
                problem = f"an adapter that vLLM refuses ({response_text[:500]})"
                raise AdapterError(problem, *ADVICE)
        except BaseException as error:
            if folder is not None and not is_single:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, AdapterError | OSError):
                self.on_event("fail", event_label, 0.0)
            raise
        self.on_event("load", event_label, time.monotonic() - started_at)
        log.info("Loaded %s into vLLM", dict(weights))
        return loaded

    def _copy(self, name: str, path: Path) -> Path:
        """Copy the folder ``path`` of the adapter ``name``, and return the copy. ``AdapterError``:
        the copy is damaged, vLLM cannot load it, or it was made for another base."""
        copy_folder = self._folder / f"copy-{next(self._unique_numbers)}"
        copy_folder.mkdir()
        try:
            copy_files(path, copy_folder)
            read(copy_folder)
            reasons = reasons_against(copy_folder, self._max_rank)
            raise_all(
                AdapterError, f"Adapter {name!r}", [sentence(reason, *ADVICE) for reason in reasons]
            )
            base_comparison = (
                "not compared"
                if self._base_verifier is None
                else self._base_verifier.check(self._base, copy_folder)
            )
        except BaseException:
            shutil.rmtree(copy_folder, ignore_errors=True)
            raise
        log.info("Adapter %r: base %s", name, base_comparison)
        return copy_folder

    def _compose(self, weights: Mapping[str, float], copies: Mapping[str, Path]) -> Path:
        """Write the weighted sum of adapters to a new adapter folder, and return that.
        ``AdapterError``: vLLM cannot load the sum, for example because its rank is too large.

        Args:
            weights: the weights by adapter name.
            copies: the folders with the verified copies of the adapters, by name.
        """
        sum_folder = self._folder / f"blend-{next(self._unique_numbers)}"
        compose([copies[name] for name in weights], sum_folder, weights=list(weights.values()))
        reasons = reasons_against(sum_folder, self._max_rank)
        if reasons:
            shutil.rmtree(sum_folder, ignore_errors=True)
            do = "blend fewer adapters, or write the blend with `veneer compose --rank`"
            problems = [sentence(reason, "a blend that vLLM can load", do) for reason in reasons]
            raise_all(AdapterError, "The blend cannot be served", problems)
        return sum_folder

    def _make_room(self, nbytes: int) -> None:
        """Unload adapters and blends, least recently used first, until there is room for another
        one of ``nbytes``. ``BankFullError``: there is no room, and all that are still loaded are in
        use or pinned."""
        while True:
            with self._lock:
                total_bytes = sum(loaded.nbytes for loaded in self._loaded_blends.values()) + nbytes
                has_free_slot = len(self._loaded_blends) < MAX_CPU_ADAPTERS
                if has_free_slot and (self._max_bytes is None or total_bytes <= self._max_bytes):
                    return
                pinned_keys = {
                    ((name, 1.0),) for name, entry in self._registered.items() if entry.pinned
                }
                idle_blends = [
                    loaded
                    for key, loaded in self._loaded_blends.items()
                    if not loaded.users and key not in pinned_keys
                ]
                if not idle_blends:
                    limit_text = (
                        f"{self._max_bytes:,}" if has_free_slot else f"{MAX_CPU_ADAPTERS} adapters"
                    )
                    raise BankFullError(
                        f"{total_bytes:,} bytes of adapters in use",
                        f"at most {limit_text}",
                        "try again later, or raise --memory",
                    )
                oldest = min(idle_blends, key=lambda loaded: loaded.used_at)
                del self._loaded_blends[oldest.key]
            self._unload(oldest)
            self.on_event("evict", oldest.key[0][0] if len(oldest.key) == 1 else "blend", 0.0)

    def _retire(self, name: str, old_entry: RegisteredAdapter | None) -> None:
        """After the adapter ``name`` was replaced or removed, mark all loaded blends that contain
        the old adapter as stale, so that no new request uses them. Each is unloaded as soon as no
        request uses it. ``old_entry``: the old adapter; its copy is deleted when vLLM does not need
        it."""
        with self._lock:
            stale_keys = [key for key in self._loaded_blends if name in dict(key)]
            stale_blends = [self._loaded_blends.pop(key) for key in stale_keys]
            for loaded in stale_blends:
                loaded.stale = True
            idle_blends = [loaded for loaded in stale_blends if not loaded.users]
        for loaded in idle_blends:
            self._unload(loaded)
        old_copy = None if old_entry is None else old_entry.copy_folder
        if old_copy is not None and all(loaded.folder != old_copy for loaded in stale_blends):
            shutil.rmtree(old_copy, ignore_errors=True)

    def _unload(self, loaded: LoadedBlend) -> None:
        try:
            status, response_text = self._post(
                "/v1/unload_lora_adapter", {"lora_name": loaded.name}
            )
        except OSError as error:
            status, response_text = 0, str(error)
        if status != 200:
            log.warning("vLLM did not unload an adapter: %s", response_text[:500])
        # the copy of a single adapter that was only evicted is kept, because a later request may
        # need it again
        if loaded.stale or loaded.is_composed:
            shutil.rmtree(loaded.folder, ignore_errors=True)
