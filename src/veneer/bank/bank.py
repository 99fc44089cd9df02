"""Many adapters of one model, by name: each is loaded when it is first used and evicted when memory
is needed, and each row of a batch selects its own.

Adapters that are in use or pinned stay in memory; of the others, the least recently used one is
evicted first. Nothing is registered with the model: its ``state_dict`` and parameters remain those
of the base. Several threads may use a bank at once, because each call has its own batch state.
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
from veneer.adapter_files.match_model import MatchCache
from veneer.attach import (
    BASE,
    ActiveAdapter,
    Names,
    OutsideGenerator,
    close_bank,
    layer_states,
    open_bank,
    require_finite_weights,
    time_first,
    unwrap,
    walk,
)
from veneer.bank.batch_state import BatchState, Frame, Uses
from veneer.bank.lease import (
    Entry,
    Lease,
    Status,
    full_error,
    row_weights_of,
    sequences_per_row,
    uses_of_rows,
)
from veneer.bank.resident import (
    Recipes,
    ResidentAdapter,
    expected_bytes,
    load_resident,
    resident_of,
)
from veneer.config import torch_dtype
from veneer.distributed import spread_problem
from veneer.errors import AdapterError, SelectionError, nearest, raise_all
from veneer.fileio import throttle

#: seconds for which a load waits for memory that leased adapters use
PATIENCE = 60.0
#: seconds after a call within which the next call is expected
QUIET = 0.05


class Bank:
    """Many adapters of one model, by name.

    Args:
        model: the base. Its layers get an adapted class and its parameters are frozen; ``close``
            undoes both.
        capacity_bytes: memory for adapters; None for no limit. The batched factors of running
            calls come on top: copies of the factors in use, for at most two sets of adapters.
        dtype: dtype of the adapters' parameters in memory, as in ``LoraConfig``; None takes that
            of each base weight.
        verify_base: False accepts other base weights of the same shapes.

    Attributes:
        on_event: called as (kind, name, seconds) after a "load", an "evict", a "remove" or a "fail"
            of a load, from the thread where it happened.
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
        self._frame = Frame(self._attached.uid, time_first(model))
        self._entries: dict[str, Entry] = {}
        self._cache = MatchCache(Names(model))
        self._recipes: Recipes = {}
        self._changed = threading.Condition(threading.RLock())
        self._loading = threading.Lock()
        self._loader: ThreadPoolExecutor | None = None
        self._batch_states: list[BatchState] = []  # not used by a running call
        self._calls, self._ended = 0, -QUIET
        self._clock = self._bytes = 0
        self._alive: set[int] = set()  # ``ResidentAdapter.uid`` of the adapters in memory
        self._crowded, self._closed = 0, False

    def register(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Register the adapter folder ``path`` as ``name``. It is read and verified when it is
        first used. With ``replace``, it takes the name of another adapter at once; running calls
        finish with the previous one.

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
            previous = self._entries.get(name)
            if previous is not None and not replace:
                problem = f"adapter name {name!r}, which is taken"
                raise SelectionError(problem, "a new name", "choose another, or remove that one")
            self._entries[name] = Entry(name, path)
            if previous is not None and not previous.users:
                self._drop(previous)

    def add(
        self, path: str | Path, name: str | None = None, *, pin: bool = False, replace: bool = False
    ) -> str:
        """Register an adapter (by the name of its folder, unless ``name`` is given) and load it
        now. With ``replace``, it takes the name of another adapter as soon as it is loaded; both
        are in memory until then.

        Raises:
            AdapterError, BaseMismatchError, BankFullError, SelectionError: the bank is unchanged.
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
                    if not entry.users:  # another thread may have loaded it successfully
                        self._drop(entry)
            raise
        if pin:
            self.pin(name)
        return name

    def put(self, name: str, path: str | Path, adapter: str) -> None:
        """Register the adapter folder ``path`` as ``name``, replacing an adapter of that name, and
        copy its parameters from the attached adapter ``adapter``, whose values equal the folder's.
        The folder is read later if the copy is evicted, if leases occupy the memory now (this
        method does not wait), or if the adapter is not low rank everywhere.

        Raises:
            SelectionError, AdapterError: the bank is unchanged.
        """
        resident = resident_of(self.model, Path(path), adapter, dtype=self.dtype)
        with self._changed:
            self.register(name, path, replace=True)
            if resident is not None and self._evict(resident.nbytes):
                entry = self._entries[name]
                entry.used = self._clock = self._clock + 1
                self._keep(entry, resident)

    def _replace(self, name: str, path: Path, pin: bool) -> None:
        """Load an adapter while the previous one of its name stays, then give it the name."""
        raise_all(AdapterError, f"{name!r} cannot be replaced", folder_problems(path))
        with self._loading:
            with self._changed:
                self._require_open()
                new = Entry(name, path, users=1)
                new.used = self._clock = self._clock + 1
            lease = self._load_entries({name: 1.0}, [new])
            with self._changed:
                previous = self._entries.get(name)
                self._entries[name] = new
                new.pinned = pin or (previous is not None and previous.pinned)
                if previous is not None and not previous.users:
                    self._drop(previous)
            lease.release()

    def remove(self, name: str) -> None:
        """Remove a name. Running calls keep the adapter; its memory is freed after the last one."""
        with self._changed:
            entry = self._need(name)
            del self._entries[name]
            if not entry.users:
                self._drop(entry)
        self._notify("remove", name)

    def pin(self, name: str) -> None:
        """Load an adapter if it is not in memory, and never evict it.

        Raises:
            SelectionError, AdapterError, BaseMismatchError, BankFullError: the bank is unchanged.
        """
        with self._acquire({name: 1.0}), self._changed:
            self._need(name).pinned = True

    def unpin(self, name: str) -> None:
        with self._changed:
            self._need(name).pinned = False

    @property
    def names(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory."""
        return self._bytes

    @property
    def crowded(self) -> bool:
        """Whether a load is waiting for memory that is in use. New leases make it wait longer."""
        return self._crowded > 0

    def status(self) -> list[Status]:
        with self._changed:
            return [entry.status() for entry in self._entries.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def acquire(self, adapter_weights: Mapping[str, float]) -> Future[Lease]:
        """A future of a lease on the adapters of a blend ({name: weight}; an empty one is the base
        alone). It is done at once if all are in memory, else when a thread has loaded the others.

        Raises:
            SelectionError: an unknown name, or a weight that is not finite. The future raises
                others.
        """
        done: Future[Lease] = Future()
        with self._changed:
            require_finite_weights(adapter_weights)
            if (lease := self._warm(adapter_weights)) is not None:
                done.set_result(lease)
                return done
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, "veneer-bank", self.throttle_loads)
            return self._loader.submit(self._acquire, dict(adapter_weights))

    def prefetch(self, name: str) -> Future[Lease]:
        """Load an adapter in the background, without a lease: it may be evicted again."""
        future = self.acquire({name: 1.0})
        future.add_done_callback(lambda done: None if done.exception() else done.result().release())
        return future

    @contextmanager
    def rows(self, choices: Sequence[Any], *, invoked: bool = False) -> Iterator[None]:
        """A block in which row i of every input uses ``choices[i]``: None for the base, a name, a
        blend {name: weight}, or a ``Lease``. Adapters that are not in memory are loaded first. The
        selection applies to calls of this thread or asyncio task. ``invoked``: the tokens of each
        call are all behind the invocation of their row's adapter, if that has one.

        Raises:
            SelectionError: an unknown name, no rows, or invocation tokens that are not ``invoked``.
            AdapterError, BaseMismatchError, BankFullError: an adapter cannot be loaded.
        """
        row_weights = row_weights_of(choices)
        names = {name: 1.0 for weights in row_weights if weights for name in weights}
        with self._acquire(names) as lease:
            uses = uses_of_rows(self, choices, row_weights, lease, invoked)
            with self._use_rows(uses):
                yield

    def generate(
        self, inputs: Tensor | None = None, *, adapters: Sequence[Any], **kwargs: Any
    ) -> Any:
        """``model.generate(inputs, **kwargs)`` with an adapter for each row of the inputs. All
        beams and returned sequences of a row use the row's adapter.

        Raises:
            SelectionError: as ``rows``; also if an encoder runs before the rows are repeated.
        """
        model: Any = self.model
        times = sequences_per_row(model, kwargs)
        with self.rows([choice for choice in adapters for _ in range(times)]):
            return model.generate(inputs, **kwargs)

    def throttle_loads(self) -> None:
        """From now on, pause this thread's loads (about a second each) while a call runs or has
        just ended."""
        throttle.throttle_loads(lambda: self._calls > 0 or time.monotonic() - self._ended < QUIET)

    def close(self) -> None:
        """Remove all adapters and restore the model's classes and ``requires_grad``.

        Raises:
            SelectionError: an adapter is in use or being loaded. The bank is unchanged.
        """
        if not self._loading.acquire(blocking=False):
            problem = "a bank that loads an adapter"
            raise SelectionError(problem, "no running load", "let it end first")
        try:
            with self._changed:
                if self._closed:
                    return
                used = [entry.name for entry in self._entries.values() if entry.users]
                if used or self._calls:
                    problem = f"a bank whose adapters are in use ({', '.join(used) or 'the base'})"
                    raise SelectionError(problem, "no running call", "let the calls end first")
                self._closed = True
                for entry in self._entries.values():
                    self._drop(entry)
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

    def _need(self, name: str) -> Entry:
        self._require_open()
        entry = self._entries.get(name)
        if entry is None:
            problem = f"no adapter named {name!r}{nearest(str(name), self._entries)}"
            do = "register it, or check the spelling"
            raise SelectionError(problem, "a name that is registered", do)
        return entry

    def _take_entries(self, adapter_weights: Mapping[str, float]) -> list[Entry]:
        """The entries of a blend, with one user added to each so that none is evicted."""
        entries = [self._need(name) for name in adapter_weights]
        self._clock += 1
        for entry in entries:
            entry.users += 1
            entry.used = self._clock
        return entries

    def _warm(self, adapter_weights: Mapping[str, float]) -> Lease | None:
        """A lease if all adapters of the blend are in memory, else None."""
        with self._changed:
            if any(self._need(name).resident is None for name in adapter_weights):
                return None
            return Lease(self, adapter_weights, self._take_entries(adapter_weights))

    def _acquire(self, adapter_weights: Mapping[str, float]) -> Lease:
        """A lease; this thread loads adapters that are not in memory. It holds no adapter while it
        waits for its turn to load, so that others can use the memory."""
        if (lease := self._warm(adapter_weights)) is not None:
            return lease
        with self._loading:  # one load at a time, because it uses all cores
            with self._changed:
                entries = self._take_entries(adapter_weights)
            return self._load_entries(adapter_weights, entries)

    def _load_entries(self, weights: Mapping[str, float], entries: Sequence[Entry]) -> Lease:
        """A lease on entries from ``_take_entries``. The caller holds ``_loading``."""
        try:
            for entry in entries:
                if entry.resident is None:
                    self._load(entry, entries)
        except BaseException:
            self._release(entries)
            raise
        with self._changed:
            return Lease(self, weights, entries)

    def _load(self, entry: Entry, wanted: Sequence[Entry]) -> None:
        start = time.monotonic()
        try:
            self._room(expected_bytes(entry.path), wanted)
            resident = load_resident(
                self.model,
                entry.path,
                dtype=self.dtype,
                verify_base=self.verify_base,
                cache=self._cache,
                recipes=self._recipes,
            )
            with self._changed:
                self._room(resident.nbytes, wanted)
                self._keep(entry, resident)
        except BaseException:
            self._notify("fail", entry.name, time.monotonic() - start)
            raise
        self._notify("load", entry.name, time.monotonic() - start)

    def _keep(self, entry: Entry, resident: ResidentAdapter) -> None:
        # modules that no adapter changed before
        if any(key not in self._frame.modules for key in resident.parts):
            self._frame.modules = {
                layer_state.key: module for _, module, layer_state in layer_states(self.model)
            }
        entry.resident, entry.rank_and_variant = resident, (resident.rank, resident.variant)
        self._bytes += resident.nbytes
        self._alive.add(resident.uid)

    def _evict(self, count: int) -> bool:
        """Evict unused adapters until ``count`` bytes fit; return whether they do."""
        while self.capacity is not None and self._bytes + count > self.capacity:
            entries = self._entries.values()
            idle = [e for e in entries if e.resident and not e.users and not e.pinned]
            if not idle:
                return False
            oldest = min(idle, key=lambda entry: entry.used)
            self._drop(oldest)
            self._notify("evict", oldest.name)
        return True

    def _room(self, count: int, wanted: Sequence[Entry]) -> None:
        """Evict until ``count`` bytes fit; wait for leases to be released if necessary."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while self.capacity is not None and not self._evict(count):
                wanted_ids = set(map(id, wanted))
                entries = {id(e): e for e in (*self._entries.values(), *wanted) if e.resident}
                fixed = (e for key, e in entries.items() if e.pinned or key in wanted_ids)
                unevictable = sum(e.resident.nbytes for e in fixed if e.resident is not None)
                waits = unevictable + count <= self.capacity
                if waits:
                    self._crowded += 1
                    try:
                        freed = self._changed.wait(max(0.0, deadline - time.monotonic()))
                    finally:
                        self._crowded -= 1
                    if freed or self._bytes + count <= self.capacity:
                        continue
                raise full_error(count, unevictable, self.capacity, PATIENCE if waits else None)

    def _drop(self, entry: Entry) -> None:
        resident, entry.resident, entry.pinned = entry.resident, None, False
        if resident is not None:
            self._bytes -= resident.nbytes
            self._alive.discard(resident.uid)
            for batch_state in self._batch_states:  # those in use follow when their call ends
                batch_state.keep(self._alive)
            self._changed.notify_all()

    def _release(self, entries: Sequence[Entry]) -> None:
        with self._changed:
            for entry in entries:
                entry.users -= 1
                if not entry.users and self._entries.get(entry.name) is not entry:
                    self._drop(entry)
            if entries:
                self._changed.notify_all()

    @contextmanager
    def _use_rows(self, uses: tuple[Uses, ...]) -> Iterator[None]:
        """A block of calls in which row i uses the adapters ``uses[i]``."""
        with self._changed:
            self._require_open()
            states = self._batch_states
            batch_state = states.pop() if states else BatchState(self._frame)
            self._calls += 1
        active = None
        try:
            if any(uses):
                active = ActiveAdapter("a bank's rows", batch_state.use(uses).table)
            outside = partial(OutsideGenerator, "bank.rows(…)")
            selection = {self._attached.uid: BASE if active is None else active}
            with context.override(selection, outside=outside):
                yield
        finally:
            # code that copied this context must not use the rows of the next call
            if active is not None:
                active.name = "the rows of a bank's block that has ended"
                active.layer_adapters = None
            batch_state.assignment = None
            with self._changed:
                batch_state.keep(self._alive)
                self._batch_states.append(batch_state)
                self._calls, self._ended = self._calls - 1, time.monotonic()

    def _notify(self, kind: str, name: str, seconds: float = 0.0) -> None:
        if self.on_event is not None:
            self.on_event(kind, name, seconds)
