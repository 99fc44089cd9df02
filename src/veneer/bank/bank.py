"""The adapters of one model: named, loaded when they are used, evicted when memory is needed, used
row by row.

What is in use or pinned stays in memory; of the rest, what was used longest ago makes room. Nothing
is registered with the model: its ``state_dict`` and its parameters are those of the base. Threads
may use one bank at once: each call has a batch state to itself.
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
    CHANGING,
    ActiveAdapter,
    Names,
    OutsideGenerator,
    adapters_of,
    ensure_adapters,
    foreign_layers_problem,
    layer_states,
    release_layers,
    require_finite_weights,
    time_first,
    unwrap,
    walk,
)
from veneer.bank.batch_state import BatchState, Frame, Uses
from veneer.bank.lease import Entry, Lease, Status, live_lease, row_weights_of, sequences_per_row
from veneer.bank.resident import (
    Recipes,
    ResidentAdapter,
    expected_bytes,
    load_resident,
    resident_of,
)
from veneer.config import torch_dtype
from veneer.distributed import spread_problem
from veneer.errors import AdapterError, BankFullError, SelectionError, nearest, raise_all
from veneer.fileio import throttle

#: seconds for which a load waits for memory that others use
PATIENCE = 60.0
#: seconds after a call in which the next one is expected
QUIET = 0.05


class Bank:
    """The adapters of one model.

    Args:
        model: the base; it stays as it is, but that the class of its layers becomes an adapted one
            and its parameters are frozen. ``close`` gives both back.
        capacity_bytes: of the adapters in memory; None for no limit. What the running calls
            have laid out comes on top: the factors of the adapters that they use, once more for
            each of two sets of them.
        dtype: of the adapters' parameters in memory, as ``LoraConfig`` takes it; None takes that
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
        if problem := foreign_layers_problem(model):
            raise SelectionError(problem)
        modules = (module for _, module in walk(model))
        if problem := spread_problem(modules, "a bank", "give it a model that one process holds"):
            raise SelectionError(problem)
        self.model, self.capacity = model, capacity_bytes
        self.dtype, self.verify_base = dtype, verify_base
        self.on_event: Callable[[str, str, float], None] | None = None
        with CHANGING:
            self._attached = ensure_adapters(model)
            self._attached.banks += 1
        self._frame = Frame(self._attached.uid, time_first(model))
        self._entries: dict[str, Entry] = {}
        self._cache = MatchCache(Names(model))
        self._recipes: Recipes = {}
        self._changed = threading.Condition(threading.RLock())
        self._loading = threading.Lock()
        self._loader: ThreadPoolExecutor | None = None
        self._batch_states: list[BatchState] = []  # that no call uses
        self._calls, self._ended = 0, -QUIET
        self._clock = self._bytes = 0
        self._alive: set[int] = set()  # who takes these bytes, by ``ResidentAdapter.uid``
        self._crowded = 0
        self._closed = False

    def register(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Let ``name`` mean the adapter folder ``path``, which is read and verified when it is
        first used. ``replace`` lets it take the place of what has the name already, at once; calls
        that run end with that one.

        Raises:
            SelectionError: the name is taken, or no name.
            AdapterError: there is no adapter at the path.
        """
        path = Path(path)
        if not isinstance(name, str) or not name:
            raise SelectionError(f"the name {name!r}", "a text", "choose one")
        raise_all(AdapterError, f"{name!r} cannot be registered", folder_problems(path))
        with self._changed:
            self._open()
            old = self._entries.get(name)
            if old is not None and not replace:
                problem = f"adapter name {name!r}, which is taken"
                do = "choose another, or remove that one first"
                raise SelectionError(problem, "a new name", do)
            self._entries[name] = Entry(name, path)
            if old is not None and not old.users:
                self._drop(old)

    def add(
        self, path: str | Path, name: str | None = None, *, pin: bool = False, replace: bool = False
    ) -> str:
        """Register an adapter (by the name of its folder, unless ``name`` is given) and load it
        now. ``replace`` lets it take the place of what has the name already, at the moment when it
        is loaded; both are in memory until then.

        Raises:
            AdapterError, BaseMismatchError, BankFullError, SelectionError: the bank is as it was.
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
                    if not entry.users:  # a call of another thread may have had more luck with it
                        self._drop(entry)
            raise
        if pin:
            self.pin(name)
        return name

    def put(self, name: str, path: str | Path, adapter: str) -> None:
        """Let ``name`` mean the adapter folder ``path`` (in place of what has the name already),
        whose numbers are now those of the model's own adapter ``adapter``: they are copied from it.
        The folder is read when they have been evicted, where leases hold the memory now (this waits
        for nobody), and where the adapter is not low rank everywhere.

        Raises:
            SelectionError, AdapterError: the bank is as it was.
        """
        resident = resident_of(self.model, Path(path), adapter, dtype=self.dtype)
        with self._changed:
            self.register(name, path, replace=True)
            if resident is not None and self._evict(resident.nbytes):
                entry = self._entries[name]
                self._clock += 1
                entry.used = self._clock
                self._keep(entry, resident)

    def _replace(self, name: str, path: Path, pin: bool) -> None:
        """Load an adapter beside the one of its name, and then let the name mean the new one."""
        raise_all(AdapterError, f"{name!r} cannot be replaced", folder_problems(path))
        with self._loading:
            with self._changed:
                self._open()
                new = Entry(name, path, users=1)
                self._clock += 1
                new.used = self._clock
            lease = self._load_entries({name: 1.0}, [new])
            with self._changed:
                old = self._entries.get(name)
                self._entries[name] = new
                new.pinned = pin or (old is not None and old.pinned)
                if old is not None and not old.users:
                    self._drop(old)
            lease.release()

    def remove(self, name: str) -> None:
        """Forget a name. Calls that use the adapter end as they began; its memory is free once the
        last one has."""
        with self._changed:
            entry = self._need(name)
            del self._entries[name]
            if not entry.users:
                self._drop(entry)
        self._notify("remove", name)

    def pin(self, name: str) -> None:
        """Keep an adapter in memory; a cold one is loaded.

        Raises:
            SelectionError, AdapterError, BaseMismatchError, BankFullError: nothing has changed.
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
        """Whether a load waits for memory that is in use: the longer, the more leases are taken
        meanwhile."""
        return self._crowded > 0

    def status(self) -> list[Status]:
        with self._changed:
            return [
                Status(
                    entry.name, entry.path, entry.resident is not None, entry.resident.nbytes if entry.resident else 0,
                    entry.pinned, entry.users, *(entry.rank_and_variant or (None, None)),
                )
                for entry in self._entries.values()
            ]  # fmt: skip

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def acquire(self, adapter_weights: Mapping[str, float]) -> Future[Lease]:
        """A lease on the adapters of a blend ({name: weight}; nothing is the base alone), when they
        are in memory: at once, or once a thread has loaded those that are not.

        Raises:
            SelectionError: an unknown name or a weight that is no finite number, at once. What
                loading raises comes through the future.
        """
        done: Future[Lease] = Future()
        with self._changed:
            require_finite_weights(adapter_weights)
            if (lease := self._warm(adapter_weights)) is not None:
                done.set_result(lease)
                return done
            if self._loader is None:
                self._loader = ThreadPoolExecutor(
                    1, thread_name_prefix="veneer-bank", initializer=self.throttle_loads
                )
            return self._loader.submit(self._acquire, dict(adapter_weights))

    def prefetch(self, name: str) -> Future[Lease]:
        """Load an adapter in the background, and keep it no more than any other."""
        future = self.acquire({name: 1.0})
        future.add_done_callback(lambda done: None if done.exception() else done.result().release())
        return future

    @contextmanager
    def rows(self, choices: Sequence[Any]) -> Iterator[None]:
        """A block in which row i of every input uses ``choices[i]``: None for the base, a name, a
        blend {name: weight}, or a ``Lease``. Adapters that are not in memory are loaded first. It
        holds for the calls of this thread or task.

        Raises:
            SelectionError: an unknown name, no rows.
            AdapterError, BaseMismatchError, BankFullError: an adapter cannot be loaded.
        """
        row_weights = row_weights_of(choices)
        names = {name: 1.0 for weights in row_weights if weights for name in weights}
        with self._acquire(names) as lease:
            adapters = (adapter for adapter, _ in lease.uses)
            resident = dict(zip(lease.adapter_weights, adapters, strict=True))
            blends = (
                live_lease(self, choice).uses
                if weights is None
                else [(resident[name], w) for name, w in weights.items()]
                for choice, weights in zip(choices, row_weights, strict=True)
            )
            uses = tuple(tuple((adapter, w) for adapter, w in blend if w) for blend in blends)
            with self._using(uses):
                yield

    def generate(
        self, inputs: Tensor | None = None, *, adapters: Sequence[Any], **kwargs: Any
    ) -> Any:
        """``model.generate(inputs, **kwargs)`` with an adapter for each row of the inputs. Beams
        and returned sequences of a row use what the row uses.

        Raises:
            SelectionError: as ``rows``; also where an encoder runs before the rows are multiplied.
        """
        model: Any = self.model
        times = sequences_per_row(model, kwargs)
        with self.rows([choice for choice in adapters for _ in range(times)]):
            return model.generate(inputs, **kwargs)

    def throttle_loads(self) -> None:
        """From now on, let this thread's loads, of a second each, pause while calls run or one has
        just ended."""
        throttle.throttle_loads(lambda: self._calls > 0 or time.monotonic() - self._ended < QUIET)

    def close(self) -> None:
        """Forget all adapters and give the model its classes and ``requires_grad`` back.

        Raises:
            SelectionError: an adapter is in use or being loaded. Nothing has changed.
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
            with CHANGING:
                self._attached.banks -= 1
                if adapters_of(self.model) is self._attached:
                    release_layers(self.model, self._attached)
        finally:
            self._loading.release()

    def _open(self) -> None:
        if self._closed:
            raise SelectionError("a bank that was closed", "an open one", "make another")

    def _need(self, name: str) -> Entry:
        self._open()
        entry = self._entries.get(name)
        if entry is None:
            problem = f"no adapter named {name!r}{nearest(str(name), self._entries)}"
            do = "register it, or check the spelling"
            raise SelectionError(problem, "a name that is registered", do)
        return entry

    def _take_entries(self, adapter_weights: Mapping[str, float]) -> list[Entry]:
        """The entries of a blend, each with one user more: from now on none of them is evicted."""
        entries = [self._need(name) for name in adapter_weights]
        self._clock += 1
        for entry in entries:
            entry.users += 1
            entry.used = self._clock
        return entries

    def _warm(self, adapter_weights: Mapping[str, float]) -> Lease | None:
        """A lease, if all is in memory."""
        with self._changed:
            if any(self._need(name).resident is None for name in adapter_weights):
                return None
            return Lease(self, adapter_weights, self._take_entries(adapter_weights))

    def _acquire(self, adapter_weights: Mapping[str, float]) -> Lease:
        """A lease, now; this thread loads what is cold. It holds nothing while it waits: others may
        need the room."""
        if (lease := self._warm(adapter_weights)) is not None:
            return lease
        with self._loading:  # one at a time: it is work for all cores
            with self._changed:
                entries = self._take_entries(adapter_weights)
            return self._load_entries(adapter_weights, entries)

    def _load_entries(
        self, adapter_weights: Mapping[str, float], entries: Sequence[Entry]
    ) -> Lease:
        """A lease on taken entries; who calls has the turn to load."""
        try:
            for entry in entries:
                if entry.resident is None:
                    self._load(entry, entries)
        except BaseException:
            self._release(entries)
            raise
        with self._changed:
            return Lease(self, adapter_weights, entries)

    def _load(self, entry: Entry, wanted: Sequence[Entry]) -> None:
        start = time.monotonic()
        try:
            self._room(expected_bytes(entry.path), wanted)
            resident = load_resident(
                self.model, entry.path, dtype=self.dtype, verify_base=self.verify_base,
                cache=self._cache, recipes=self._recipes,
            )  # fmt: skip
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
        """Evict what is not used until ``count`` bytes fit; whether they do."""
        while self.capacity is not None and self._bytes + count > self.capacity:
            loaded = [entry for entry in self._entries.values() if entry.resident is not None]
            idle = [entry for entry in loaded if not entry.users and not entry.pinned]
            if not idle:
                return False
            oldest = min(idle, key=lambda entry: entry.used)
            self._drop(oldest)
            self._notify("evict", oldest.name)
        return True

    def _room(self, count: int, wanted: Sequence[Entry]) -> None:
        """Evict until ``count`` bytes fit, and wait for those that have leases."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while self.capacity is not None and not self._evict(count):
                wanted_ids = set(map(id, wanted))
                entries = {id(e): e for e in (*self._entries.values(), *wanted) if e.resident}
                unevictable = sum(
                    e.resident.nbytes
                    for key, e in entries.items()
                    if e.resident is not None and (e.pinned or key in wanted_ids)
                )
                waits = unevictable + count <= self.capacity
                if waits:
                    self._crowded += 1
                    try:
                        freed = self._changed.wait(max(0.0, deadline - time.monotonic()))
                    finally:
                        self._crowded -= 1
                    if freed or self._bytes + count <= self.capacity:
                        continue
                problem = f"{count:,} bytes to load beside {unevictable:,} that are pinned or "
                problem += "asked for with it"
                problem += f", and others in use for {PATIENCE:g} s" if waits else ""
                do = "give the bank more, unpin adapters, or use fewer at once"
                raise BankFullError(problem, f"at most {self.capacity:,}", do)

    def _drop(self, entry: Entry) -> None:
        resident, entry.resident, entry.pinned = entry.resident, None, False
        if resident is not None:
            self._bytes -= resident.nbytes
            self._alive.discard(resident.uid)
            for batch_state in self._batch_states:  # those that are in use do so as they come back
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
    def _using(self, uses: tuple[Uses, ...]) -> Iterator[None]:
        """A block of calls whose rows use these."""
        with self._changed:
            self._open()
            states = self._batch_states
            batch_state = states.pop() if states else BatchState(self._frame)
            self._calls += 1
        selected = None
        try:
            if any(uses):
                selected = ActiveAdapter("a bank's rows", batch_state.use(uses).table)
            chosen = BASE if selected is None else selected
            outside = partial(OutsideGenerator, "bank.rows(…)")
            with context.override({self._attached.uid: chosen}, outside=outside):
                yield
        finally:
            if selected is not None:  # a context that outlives the block must not use later rows
                selected.name = "the rows of a bank's block that has ended"
                selected.layer_adapters = None
            batch_state.assignment = None
            with self._changed:
                batch_state.keep(self._alive)
                self._batch_states.append(batch_state)
                self._calls, self._ended = self._calls - 1, time.monotonic()

    def _notify(self, kind: str, name: str, seconds: float = 0.0) -> None:
        if self.on_event is not None:
            self.on_event(kind, name, seconds)
