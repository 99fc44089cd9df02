"""Many adapters of one model, by name. An adapter is loaded when it is first used, and evicted when
memory is needed. Each row of a batch selects the adapter that it uses.

Adapters that are in use or pinned stay in memory. Of all other adapters, the least recently used
is evicted first. The model's ``state_dict`` and parameters remain those of the base. Several
threads may use a bank at once, because each running call has its own ``BatchState``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.adapter_files.folder import folder_problems
from veneer.adapter_files.match_model import MatchCache, match
from veneer.attach import (
    BASE,
    ActiveAdapter,
    ModelIndex,
    OutsideGenerator,
    close_bank,
    layer_states,
    open_bank,
    require_finite_coefficients,
    time_first,
    unwrap,
    walk,
)
from veneer.bank.batch_state import BatchState, ModelLayout, WeightedAdapters
from veneer.bank.lease import (
    Entry,
    Lease,
    Status,
    adapters_of_rows,
    full_error,
    row_weights_of,
    sequences_per_row,
)
from veneer.bank.resident import (
    ResidentAdapter,
    ResolvePlans,
    expected_bytes,
    load_resident,
    resident_of,
)
from veneer.config import torch_dtype
from veneer.distributed import spread_problem
from veneer.errors import AdapterError, SelectionError, nearest, raise_all
from veneer.fileio import throttle

#: the longest time in seconds that a load waits for memory that adapters in use occupy
MAX_WAIT_SECONDS = 60.0
#: for so many seconds after a call, throttled loads still pause, because the next call may follow
CALL_GAP = 0.05


class Bank:
    """Many adapters of one model, by name.

    Args:
        model: the base. Its layers get an adapted class and its parameters are frozen; ``close``
            undoes both.
        capacity_bytes: memory for adapters; None for no limit. Calls need memory beyond this: each
            of the calls that run at one time may cache copies of the factors A and B of the
            adapters of two batches.
        dtype: dtype of the adapters' factors in memory, as in ``LoraConfig``; None takes the dtype
            of each base weight.
        verify_base: False accepts adapters that were trained on other weights of the same shapes.

    Attributes:
        on_event: if not None, called as (kind, adapter name, seconds of a load or 0) after a
            "load", a failed load ("fail"), an "evict" or a "remove", by the thread that did it.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity_bytes: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        verify_base: bool = True,
    ) -> None:
        model, dtype = unwrap(model), None if dtype is None else torch_dtype(dtype)
        modules = (module for _, module in walk(model))
        if problem := spread_problem(modules, "a bank", "give it a model that one process holds"):
            raise SelectionError(problem)
        self.model, self.capacity = model, capacity_bytes
        self.dtype, self.verify_base = dtype, verify_base
        self.on_event: Callable[[str, str, float], None] | None = None
        self._attached = open_bank(model)
        self._model_layout = ModelLayout(self._attached.uid, time_first(model))
        self._entries: dict[str, Entry] = {}
        self._match_cache = MatchCache(ModelIndex(model))
        self._resolve_plans: ResolvePlans = {}
        self._changed = threading.Condition(threading.RLock())  # notified of freed or idle memory
        self._loading = threading.Lock()  # held during a load
        self._loader: ThreadPoolExecutor | None = None
        self._batch_states: list[BatchState] = []  # of ended calls; the next calls reuse them
        self._running_calls, self._last_call_end = 0, -CALL_GAP
        self._use_counter = self._used_bytes = 0
        self._resident_uids: set[int] = set()  # of the adapters in memory
        self._waiting_loads, self._closed = 0, False

    def register(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Register the adapter folder ``path`` as ``name``. The folder is read and verified when
        the adapter is first used. ``replace`` allows a name that is registered already: new calls
        use the new adapter, and running calls finish with the previous one.

        Raises:
            SelectionError: the name is taken, or is not a non-empty string.
            AdapterError: there is no adapter at the path.
        """
        path = Path(path)
        if not isinstance(name, str) or not name:
            raise SelectionError(f"the name {name!r}", "a text", "choose one")
        raise_all(AdapterError, f"{name!r} cannot be registered", folder_problems(path))
        with self._changed:
            self._require_open()
            previous_entry = self._entries.get(name)
            if previous_entry is not None and not replace:
                problem = f"adapter name {name!r}, which is taken"
                raise SelectionError(problem, "a new name", "choose another, or remove that one")
            self._entries[name] = Entry(name, path)
            if previous_entry is not None and not previous_entry.users:
                self._unload(previous_entry)

    def add(
        self, path: str | Path, name: str | None = None, *, pin: bool = False, replace: bool = False
    ) -> str:
        """Load an adapter now and register it as ``name``, by default the name of its folder.
        Returns the name. ``replace``: the name may belong to another adapter, which keeps it until
        the new one is verified and loaded; both are in memory until then. ``pin``: see ``pin``.

        Raises:
            AdapterError, BaseMismatchError, BankFullError, SelectionError: nothing is registered.
        """
        name = Path(path).name if name is None else name
        if replace and name in self:
            self._replace(name, Path(path), pin)
            return name
        self.register(name, path)
        entry = self._entries.get(name)
        try:
            self._acquire({name: 1.0}).release()
        except BaseException:
            with self._changed:
                if entry is not None and self._entries.get(name) is entry:
                    del self._entries[name]
                    if not entry.users:  # another thread may have loaded it meanwhile
                        self._unload(entry)
            raise
        if pin:
            self.pin(name)
        return name

    def put(self, name: str, path: str | Path, adapter: str) -> None:
        """Register the adapter folder ``path`` as ``name``, replacing an adapter of that name, and
        copy the parameters from the attached adapter ``adapter``, whose values must equal the
        folder's. No copy is kept if adapters in use or pinned occupy the memory now, or if not
        every change is low rank; the folder is then read at the first use.

        Raises:
            SelectionError, AdapterError: the bank is unchanged.
        """
        resident = resident_of(self.model, Path(path), adapter, dtype=self.dtype)
        with self._changed:
            self.register(name, path, replace=True)
            if resident is not None and self._evict(resident.nbytes, evict_anyway=False):
                entry = self._entries[name]
                entry.last_use = self._use_counter = self._use_counter + 1
                self._store_resident(entry, resident)

    def _replace(self, name: str, path: Path, pin: bool) -> None:
        """Load an adapter while ``name`` still belongs to another one, then give it the name."""
        raise_all(AdapterError, f"{name!r} cannot be replaced", folder_problems(path))
        with self._loading:
            if self.capacity is not None:  # verify the files before other adapters are evicted
                match(self.model, path, [], verify_base=self.verify_base, cache=self._match_cache)
            with self._changed:
                self._require_open()
                new_entry = Entry(name, path, users=1)
                new_entry.last_use = self._use_counter = self._use_counter + 1
            lease = self._load_entries({name: 1.0}, [new_entry])
            with self._changed:
                previous_entry = self._entries.get(name)
                self._entries[name] = new_entry
                new_entry.pinned = pin or (previous_entry is not None and previous_entry.pinned)
                if previous_entry is not None and not previous_entry.users:
                    self._unload(previous_entry)
            lease.release()

    def remove(self, name: str) -> None:
        """Remove a name. Running calls and leases keep its adapter in memory until they end."""
        with self._changed:
            entry = self._entry(name)
            del self._entries[name]
            if not entry.users:
                self._unload(entry)
        self._notify("remove", name)

    def pin(self, name: str) -> None:
        """Load an adapter if it is not in memory, and never evict it until ``unpin``.

        Raises:
            SelectionError, AdapterError, BaseMismatchError, BankFullError: nothing is pinned.
        """
        with self._acquire({name: 1.0}), self._changed:
            self._entry(name).pinned = True

    def unpin(self, name: str) -> None:
        with self._changed:
            self._entry(name).pinned = False

    @property
    def names(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the loaded adapters occupy."""
        return self._used_bytes

    @property
    def crowded(self) -> bool:
        """Whether a load waits for memory of leased adapters. New leases would prolong the wait."""
        return self._waiting_loads > 0

    def status(self) -> list[Status]:
        with self._changed:
            return [entry.status() for entry in self._entries.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def acquire(self, adapter_weights: Mapping[str, float]) -> Future[Lease]:
        """A future of a lease, which keeps the adapters of a blend ({name: weight}; {} for the
        base) in memory. It is done at once if they are there, else when a thread has loaded them.

        Raises:
            SelectionError: an unknown name, or a weight that is not finite. Errors of loading are
                raised by ``future.result()``.
        """
        future: Future[Lease] = Future()
        with self._changed:
            require_finite_coefficients(adapter_weights)
            if (lease := self._lease_if_resident(adapter_weights)) is not None:
                future.set_result(lease)
                return future
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, "veneer-bank", self.throttle_loads)
            return self._loader.submit(self._acquire, dict(adapter_weights))

    def prefetch(self, name: str) -> Future[Lease]:
        """Load an adapter in the background. When the future is done, its lease is released."""
        future = self.acquire({name: 1.0})
        future.add_done_callback(lambda done: None if done.exception() else done.result().release())
        return future

    @contextmanager
    def rows(self, choices: Sequence[Any], *, invoked: bool = False) -> Iterator[None]:
        """A block in which row i of every input uses ``choices[i]``: None for the base, a name, a
        blend {name: weight}, or a ``Lease``. Adapters that are not in memory are loaded first. The
        choices apply to calls of this thread or asyncio task. ``invoked``: the caller asserts that
        every token comes after the ``LoraConfig.invocation_tokens``, from which on an adapter acts.

        Raises:
            SelectionError: an unknown name, no rows, or invocation tokens without ``invoked``.
            AdapterError, BaseMismatchError, BankFullError: an adapter cannot be loaded.
        """
        row_weights = row_weights_of(choices)
        requested_names = {name: 1.0 for weights in row_weights if weights for name in weights}
        with self._acquire(requested_names) as lease:
            row_adapters = adapters_of_rows(self, choices, row_weights, lease, invoked)
            with self._use_rows(row_adapters):
                yield

    def generate(
        self, inputs: Tensor | None = None, *, adapters: Sequence[Any], **kwargs: Any
    ) -> Any:
        """``model.generate(inputs, **kwargs)`` with ``adapters[i]``, a choice as for ``rows``, for
        row i of the inputs. All beams and returned sequences of a row use the row's adapter.

        Raises:
            SelectionError: several sequences a row from an encoder-decoder. Others as ``rows``.
        """
        model: Any = self.model
        sequence_count = sequences_per_row(model, kwargs)
        with self.rows([choice for choice in adapters for _ in range(sequence_count)]):
            return model.generate(inputs, **kwargs)

    def throttle_loads(self) -> None:
        """From now on, pause this thread's loads again and again while a call runs or has just
        ended, so that they delay calls little. A load then takes about a second."""
        throttle.throttle_loads(
            lambda: self._running_calls > 0 or time.monotonic() - self._last_call_end < CALL_GAP
        )

    def close(self) -> None:
        """Remove all adapters; restore the modules' classes and the parameters' ``requires_grad``.
        ``SelectionError``: an adapter is in use or being loaded. The bank is unchanged."""
        if not self._loading.acquire(blocking=False):
            problem = "a bank that loads an adapter"
            raise SelectionError(problem, "no running load", "let it end first")
        try:
            with self._changed:
                if self._closed:
                    return
                used = [entry.name for entry in self._entries.values() if entry.users]
                if used or self._running_calls:
                    problem = f"a bank whose adapters are in use ({', '.join(used) or 'the base'})"
                    raise SelectionError(problem, "no running call", "let the calls end first")
                self._closed = True
                for entry in self._entries.values():
                    self._unload(entry)
                self._entries.clear()
                self._batch_states.clear()
                if self._loader is not None:
                    self._loader.shutdown(wait=False)
            close_bank(self.model, self._attached)
        finally:
            self._loading.release()

    def _require_open(self) -> None:
        if self._closed:
            raise SelectionError("a bank that was closed", "an open one", "make another")

    def _entry(self, name: str) -> Entry:
        self._require_open()
        entry = self._entries.get(name)
        if entry is None:
            problem = f"no adapter named {name!r}{nearest(str(name), self._entries)}"
            do = "register it, or check the spelling"
            raise SelectionError(problem, "a name that is registered", do)
        return entry

    def _take_entries(self, adapter_weights: Mapping[str, float]) -> list[Entry]:
        """The entries of a blend. Their ``users`` are incremented, so that they are not evicted."""
        entries = [self._entry(name) for name in adapter_weights]
        self._use_counter += 1
        for entry in entries:
            entry.users += 1
            entry.last_use = self._use_counter
        return entries

    def _lease_if_resident(self, adapter_weights: Mapping[str, float]) -> Lease | None:
        """A lease if all adapters of the blend are in memory, else None (and no user is added)."""
        with self._changed:
            if any(self._entry(name).resident is None for name in adapter_weights):
                return None
            return Lease(self, adapter_weights, self._take_entries(adapter_weights))

    def _acquire(self, adapter_weights: Mapping[str, float]) -> Lease:
        """A lease on the adapters of a blend. This thread loads those that are not in memory. While
        it waits for another load, it holds no adapter, so that the other load can evict them."""
        if (lease := self._lease_if_resident(adapter_weights)) is not None:
            return lease
        with self._loading:  # one load at a time, because a load uses all cores
            with self._changed:
                entries = self._take_entries(adapter_weights)
            return self._load_entries(adapter_weights, entries)

    def _load_entries(self, weights: Mapping[str, float], entries: Sequence[Entry]) -> Lease:
        """Load entries from ``_take_entries`` and lease them. The caller must hold ``_loading``."""
        try:
            for entry in entries:
                if entry.resident is None:
                    self._load(entry, entries)
        except BaseException:
            self._release(entries)
            raise
        with self._changed:
            return Lease(self, weights, entries)

    def _load(self, entry: Entry, requested: Sequence[Entry]) -> None:
        """Load ``entry``, one of the ``requested`` entries of a lease, which are not evicted."""
        start = time.monotonic()
        try:
            self._make_room(expected_bytes(entry.path), requested)
            resident = load_resident(
                self.model,
                entry.path,
                dtype=self.dtype,
                verify_base=self.verify_base,
                cache=self._match_cache,
                resolve_plans=self._resolve_plans,
            )
            with self._changed:
                self._make_room(resident.nbytes, requested)
                self._store_resident(entry, resident)
        except BaseException:
            self._notify("fail", entry.name, time.monotonic() - start)
            raise
        self._notify("load", entry.name, time.monotonic() - start)

    def _store_resident(self, entry: Entry, resident: ResidentAdapter) -> None:
        # loading may have adapted modules that no earlier adapter changed; index them too
        if any(key not in self._model_layout.modules for key in resident.layer_changes):
            self._model_layout.modules = {
                layer_state.key: module for _, module, layer_state in layer_states(self.model)
            }
        entry.resident, entry.rank_and_variant = resident, (resident.rank, resident.variant)
        self._used_bytes += resident.nbytes
        self._resident_uids.add(resident.uid)

    def _evict(self, byte_count: int, evict_anyway: bool) -> bool:
        """Evict idle adapters (not in use, not pinned) until ``byte_count`` more bytes fit; return
        whether they fit. If they cannot fit, evict all if ``evict_anyway``, else none."""
        if self.capacity is None:
            return True
        idle = [e for e in self._entries.values() if e.resident and not e.users and not e.pinned]
        idle_bytes = sum(entry.resident.nbytes for entry in idle if entry.resident is not None)
        fits = self._used_bytes - idle_bytes + byte_count <= self.capacity
        for entry in sorted(idle, key=lambda entry: entry.last_use) if fits or evict_anyway else ():
            if self._used_bytes + byte_count > self.capacity:
                self._unload(entry)
                self._notify("evict", entry.name)
        return fits

    def _make_room(self, byte_count: int, requested: Sequence[Entry]) -> None:
        """Evict adapters, and wait for leases to end, until ``byte_count`` bytes fit beside pinned
        and ``requested`` adapters. BankFullError: they cannot fit, or the wait was too long."""
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        with self._changed:
            while self.capacity is not None:
                requested_ids = set(map(id, requested))
                loaded = {id(e): e for e in (*self._entries.values(), *requested) if e.resident}
                kept = (e for key, e in loaded.items() if e.pinned or key in requested_ids)
                kept_bytes = sum(e.resident.nbytes for e in kept if e.resident is not None)
                if kept_bytes + byte_count > self.capacity:
                    raise full_error(byte_count, kept_bytes, self.capacity, None)
                if self._evict(byte_count, evict_anyway=True):
                    return
                self._waiting_loads += 1
                try:
                    was_notified = self._changed.wait(max(0.0, deadline - time.monotonic()))
                finally:
                    self._waiting_loads -= 1
                if not was_notified and self._used_bytes + byte_count > self.capacity:
                    raise full_error(byte_count, kept_bytes, self.capacity, MAX_WAIT_SECONDS)

    def _unload(self, entry: Entry) -> None:
        resident, entry.resident, entry.pinned = entry.resident, None, False
        if resident is not None:
            self._used_bytes -= resident.nbytes
            self._resident_uids.discard(resident.uid)
            for batch_state in self._batch_states:  # _use_rows does this for running calls
                batch_state.drop_removed(self._resident_uids)
            self._changed.notify_all()

    def _release(self, entries: Sequence[Entry]) -> None:
        with self._changed:
            for entry in entries:
                entry.users -= 1
                if not entry.users and self._entries.get(entry.name) is not entry:
                    self._unload(entry)
            if entries:
                self._changed.notify_all()

    @contextmanager
    def _use_rows(self, row_adapters: tuple[WeightedAdapters, ...]) -> Iterator[None]:
        """A block in which calls of the model use ``row_adapters[i]`` for row i."""
        with self._changed:
            self._require_open()
            states = self._batch_states
            batch_state = states.pop() if states else BatchState(self._model_layout)
            self._running_calls += 1
        active = None
        try:
            if any(row_adapters):
                active = ActiveAdapter("a bank's rows", batch_state.use(row_adapters).layer_table)
            make_suspended = partial(OutsideGenerator, "bank.rows(…)")
            selection = {self._attached.uid: BASE if active is None else active}
            with context.override(selection, make_suspended=make_suspended):
                yield
        finally:
            # calls of a task that copied this context must fail, not use the rows of a later block
            if active is not None:
                active.name = "the rows of a bank's block that has ended"
                active.layer_adapters = None
            batch_state.assignment = None
            with self._changed:
                batch_state.drop_removed(self._resident_uids)
                self._batch_states.append(batch_state)
                self._running_calls, self._last_call_end = self._running_calls - 1, time.monotonic()

    def _notify(self, event: str, name: str, seconds: float = 0.0) -> None:
        if self.on_event is not None:
            self.on_event(event, name, seconds)
