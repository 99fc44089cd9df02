"""The adapters in the vLLM behind this server, as the ``bank`` of its ``Service``. An adapter is
loaded into vLLM when a request first needs it.

    adapter folder → verified copy → proof of its base → POST /v1/load_lora_adapter
    blend          → folder composed of such copies     → POST /v1/load_lora_adapter

vLLM reads the files of an adapter again whenever it loads the adapter, and does not verify them. So
it gets copies that nobody else writes. Each copy has a name in vLLM that no client can guess. If
the adapter of a name is replaced, the new one gets another copy with another name in vLLM. Running
requests end with the old copy, and vLLM's prefix cache, whose keys contain the name in vLLM, never
mixes the two.
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
from veneer.serve.vllm_resolver import BaseProofs
from veneer.tools.compose import compose

log = logging.getLogger("veneer.serve")

#: sends a POST request to vLLM: (path, body) → (status, text)
Post = Callable[[str, Mapping[str, Any]], tuple[int, str]]


@dataclass
class RegisteredAdapter:
    """A registered adapter: its folder in the catalogue, and the copy of the folder for vLLM."""

    path: Path
    copy: Path | None = None
    pinned: bool = False


@dataclass(eq=False)
class LoadedBlend:
    """An adapter or a blend that vLLM has loaded as ``name``. ``key``: its adapters and weights
    (``key_of``). ``stale``: new requests do not use it."""

    name: str
    key: BlendKey
    folder: Path  # that vLLM reads
    nbytes: int
    is_composed: bool = False  # whether ``folder`` was composed for a blend
    users: int = 0  # requests that use it now
    used_at: float = field(default_factory=time.monotonic)
    stale: bool = False


class Lease:
    """The use of an adapter in vLLM by one request. ``name``: the adapter's name in vLLM, or None
    for the base."""

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
        folder: where copies are written.
        rank: the largest rank that vLLM accepts.
        budget: the most bytes of adapter files that vLLM may have loaded; None: no limit.
        verify_base: whether the base is compared with the record of each adapter.
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
        self._post, self._base, self._folder, self._rank = post, base, folder, rank
        self._budget, self._proofs = budget, BaseProofs() if verify_base else None
        self.on_event: Callable[[str, str, float], None] = lambda kind, name, seconds: None
        self._lock = threading.Lock()  # guards ``_names`` and ``_loaded``; held for moments only
        self._loading = threading.RLock()  # held while adapters are copied and loaded
        self._names: dict[str, RegisteredAdapter] = {}
        self._loaded: dict[BlendKey, LoadedBlend] = {}
        self._numbers = itertools.count(1)
        self._secret = secrets.token_hex(8)

    def register(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Register an adapter folder under a name; it always replaces an earlier one (``replace``
        has no effect). ``AdapterError``: vLLM cannot load it."""
        reasons = reasons_against(Path(path), self._rank)
        problem = f"Adapter {name!r} in {path}"
        raise_all(AdapterError, problem, [sentence(reason, *ADVICE) for reason in reasons])
        with self._lock:
            old_entry = self._names.get(name)
            self._names[name] = RegisteredAdapter(
                Path(path), pinned=old_entry is not None and old_entry.pinned
            )
        self._retire(name, old_entry)

    def add(self, path: str | Path, *, name: str, replace: bool = False) -> None:
        """Load an adapter under a name. If this fails, an old adapter of the name stays."""
        with self._loading:
            old_entry = self._names.get(name)
            pinned = old_entry is not None and old_entry.pinned
            copy = self._copy(name, Path(path))
            entry = RegisteredAdapter(Path(path), copy, pinned)
            try:
                loaded = self._load({name: 1.0}, {name: entry})
            except BaseException:
                shutil.rmtree(copy, ignore_errors=True)
                raise
            with self._lock:
                self._names[name] = entry
            self._retire(name, old_entry)
            with self._lock:
                self._loaded[loaded.key] = loaded

    def remove(self, name: str) -> None:
        with self._lock:
            old_entry = self._names.pop(name, None)
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
        """Does nothing, because loads do not slow down vLLM, which is another process."""

    def status(self) -> list[Status]:
        with self._lock:
            return [self._status(name, entry) for name, entry in self._names.items()]

    def _status(self, name: str, entry: RegisteredAdapter) -> Status:
        loaded = self._loaded.get(((name, 1.0),))
        size = 0 if loaded is None else loaded.nbytes
        users = 0 if loaded is None else loaded.users
        return Status(name, entry.path, loaded is not None, size, entry.pinned, users, None, None)

    def close(self) -> None:
        """Does nothing: vLLM's process and the folder of copies are closed by their owners."""

    def find(self, blend: Mapping[str, float]) -> Lease | None:
        """A lease on the base, or on a loaded blend; None if the blend must be loaded first."""
        key = key_of({name: weight for name, weight in blend.items() if weight})
        if not key:
            return Lease(None)
        with self._lock:
            loaded = self._loaded.get(key)
            return None if loaded is None else self._lease(loaded)

    def acquire(self, blend: Mapping[str, float]) -> Lease:
        """A lease on a blend. Loads the blend first if necessary, which takes seconds.

        Raises:
            SelectionError: an adapter of the blend is not registered.
            AdapterError: an adapter is damaged, made for another base, or vLLM refuses it.
            BankFullError: the adapters in use leave no room for the blend.
        """
        lease = self.find(blend)
        if lease is not None:
            return lease
        with self._loading:
            lease = self.find(blend)
            if lease is not None:
                return lease
            weights = {name: weight for name, weight in blend.items() if weight}
            entries = {name: self._entry_of(name) for name in weights}
            loaded = self._load(weights, entries)
            with self._lock:
                # if a name was registered anew meanwhile, later requests must not use this blend
                loaded.stale = any(self._names.get(name) is not entries[name] for name in entries)
                if not loaded.stale:
                    self._loaded[loaded.key] = loaded
                return self._lease(loaded)

    def _entry_of(self, name: str) -> RegisteredAdapter:
        with self._lock:
            if name not in self._names:
                raise SelectionError(f"no adapter {name!r}", "one that is registered", "add it")
            return self._names[name]

    def _lease(self, loaded: LoadedBlend) -> Lease:
        loaded.users += 1
        loaded.used_at = time.monotonic()

        def release() -> None:
            with self._lock:
                loaded.users -= 1
                unload = loaded.stale and not loaded.users
            if unload:  # vLLM may take a while, and an event loop may call this
                threading.Thread(target=self._unload, args=(loaded,), daemon=True).start()

        return Lease(loaded.name, release)

    def _load(
        self, weights: Mapping[str, float], entries: Mapping[str, RegisteredAdapter]
    ) -> LoadedBlend:
        """Load a blend into vLLM. ``weights``, ``entries``: by adapter name."""
        start, key = time.monotonic(), key_of(weights)
        label = next(iter(weights)) if len(weights) == 1 else "blend"
        is_single, folder = list(weights.values()) == [1.0], None
        try:
            for name, entry in entries.items():
                if entry.copy is None:
                    entry.copy = self._copy(name, entry.path)
            copies = {name: entry.copy for name, entry in entries.items() if entry.copy}
            folder = next(iter(copies.values())) if is_single else self._compose(weights, copies)
            size = (folder / peft.TENSORS).stat().st_size
            vllm_name = f"veneer-{self._secret}-{next(self._numbers)}"
            loaded = LoadedBlend(vllm_name, key, folder, size, is_composed=not is_single)
            self._make_room(size)
            body = {"lora_name": loaded.name, "lora_path": str(folder)}
            status, text = self._post("/v1/load_lora_adapter", body)
            if status != 200:
                problem = f"an adapter that vLLM refuses ({text[:500]})"
                raise AdapterError(problem, *ADVICE)
        except BaseException as error:
            if folder is not None and not is_single:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, AdapterError | OSError):
                self.on_event("fail", label, 0.0)
            raise
        self.on_event("load", label, time.monotonic() - start)
        log.info("Loaded %s into vLLM", dict(weights))
        return loaded

    def _copy(self, name: str, path: Path) -> Path:
        """Copy an adapter folder, and verify the copy and its base."""
        folder = self._folder / f"copy-{next(self._numbers)}"
        folder.mkdir()
        try:
            copy_files(path, folder)
            read(folder)
            reasons = reasons_against(folder, self._rank)
            raise_all(
                AdapterError, f"Adapter {name!r}", [sentence(reason, *ADVICE) for reason in reasons]
            )
            proof = (
                "not compared" if self._proofs is None else self._proofs.check(self._base, folder)
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        log.info("Adapter %r: base %s", name, proof)
        return folder

    def _compose(self, weights: Mapping[str, float], copies: Mapping[str, Path]) -> Path:
        """Write the weighted sum of adapters to an adapter folder."""
        folder = self._folder / f"blend-{next(self._numbers)}"
        compose([copies[name] for name in weights], folder, weights=list(weights.values()))
        reasons = reasons_against(folder, self._rank)
        if reasons:
            shutil.rmtree(folder, ignore_errors=True)
            do = "blend fewer adapters, or write the blend with `veneer compose --rank`"
            problems = [sentence(reason, "a blend that vLLM can load", do) for reason in reasons]
            raise_all(AdapterError, "The blend cannot be served", problems)
        return folder

    def _make_room(self, nbytes: int) -> None:
        """Unload the adapters that were used least recently, until one of ``nbytes`` fits.
        ``BankFullError``: all adapters that are still loaded are in use or pinned."""
        while True:
            with self._lock:
                total = sum(loaded.nbytes for loaded in self._loaded.values()) + nbytes
                has_free_slot = len(self._loaded) < MAX_CPU_ADAPTERS
                if has_free_slot and (self._budget is None or total <= self._budget):
                    return
                pinned = {((name, 1.0),) for name, entry in self._names.items() if entry.pinned}
                idle = [
                    loaded
                    for key, loaded in self._loaded.items()
                    if not loaded.users and key not in pinned
                ]
                if not idle:
                    limit = f"{self._budget:,}" if has_free_slot else f"{MAX_CPU_ADAPTERS} adapters"
                    raise BankFullError(
                        f"{total:,} bytes of adapters in use",
                        f"at most {limit}",
                        "try again later, or raise --memory",
                    )
                oldest = min(idle, key=lambda loaded: loaded.used_at)
                del self._loaded[oldest.key]
            self._unload(oldest)
            self.on_event("evict", oldest.key[0][0] if len(oldest.key) == 1 else "blend", 0.0)

    def _retire(self, name: str, old_entry: RegisteredAdapter | None) -> None:
        """Mark the loaded adapter of a name, and the loaded blends that contain it, as stale. Each
        is unloaded when its last request has ended. ``old_entry``: the name's previous entry, whose
        copy is deleted."""
        with self._lock:
            keys = [key for key in self._loaded if name in dict(key)]
            retired = [self._loaded.pop(key) for key in keys]
            for loaded in retired:
                loaded.stale = True
            idle = [loaded for loaded in retired if not loaded.users]
        for loaded in idle:
            self._unload(loaded)
        copy = None if old_entry is None else old_entry.copy
        if copy is not None and all(loaded.folder != copy for loaded in retired):
            shutil.rmtree(copy, ignore_errors=True)

    def _unload(self, loaded: LoadedBlend) -> None:
        try:
            status, text = self._post("/v1/unload_lora_adapter", {"lora_name": loaded.name})
        except OSError as error:
            status, text = 0, str(error)
        if status != 200:
            log.warning("vLLM did not unload an adapter: %s", text[:500])
        # keep the copy of an adapter that is still registered: vLLM may load it again
        if loaded.stale or loaded.is_composed:
            shutil.rmtree(loaded.folder, ignore_errors=True)
