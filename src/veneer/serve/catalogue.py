"""The adapters that a server serves: those of a source (a folder, a library or a remote address)
with the changes made through the API. The catalogue registers them with the bank, which loads an
adapter when it is first used.

    DIR/french/adapter_config.json     an adapter "french", served as long as the folder exists
    DIR/index.json                     or DIR is a library, whose entries are the adapters
    DIR/served.json                    changes made through the API (``served_state.py``)
    s3://bucket/adapters               or a remote address, which the API cannot change

Nothing that a client sends reaches a file outside DIR. A name has no path separators. A path is
relative, has no "..", and must lie in DIR after all links are followed. ``adapter_files``
verifies the content of an adapter folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.errors import (
    AdapterError,
    BankFullError,
    ConfigError,
    LibraryError,
    VeneerError,
    listing,
    nearest,
)
from veneer.serve.refusal import Refusal, disk_reason
from veneer.serve.served_state import ServedState, lock_state, read_state, write_state
from veneer.store import catalogue as store_catalogue
from veneer.store.catalogue import FolderSource, LibrarySource, Location, RemoteSource, open_source
from veneer.store.library import NAME

log = logging.getLogger("veneer.serve")

#: The source is listed again after MIN_INTERVAL seconds, or after INTERVAL_RATIO times the duration
#: of the last listing if that is longer, but at the latest after MAX_INTERVAL seconds.
MIN_INTERVAL, INTERVAL_RATIO, MAX_INTERVAL = 1.0, 10, 10.0


class ServedNames:
    """The names of the served adapters: those of the source at ``address`` (a folder, a library or
    a remote address), with the changes that its ``served.json`` records. None for ``address``: no
    names."""

    def __init__(self, address: str | Path | None, base: str = "") -> None:
        """``base``: the model name of the base, which no adapter may have. ``ConfigError``: the
        folder ``address`` does not exist."""
        self.source = None if address is None else open_source(address)
        self.base, self.state = base, ServedState()
        self.folder = (
            None
            if self.source is None or isinstance(self.source, RemoteSource)
            else Path(self.source.address)
        )

    def list(self) -> dict[str, Location]:
        """The location of each adapter that is served now, by name. ``ConfigError``,
        ``LibraryError``, ``RemoteError`` or ``OSError``: the source or ``served.json`` cannot be
        read."""
        locations = self.list_source()
        if self.folder is None:
            return locations
        state = self.state = read_state(self.folder)
        locations = {
            name: location for name, location in locations.items() if name not in state.hidden
        }
        for name, path in state.names.items():
            if name == self.base:  # recorded when the base had another name; now it means the base
                continue
            try:
                locations[name] = self.resolve_path(path)
            except (Refusal, AdapterError, LibraryError):
                # do not serve the name until its folder is back
                locations.pop(name, None)
        return locations

    def list_source(self) -> dict[str, Location]:
        """The location of each adapter of the source, without the changes in ``served.json``."""
        if self.source is None:
            return {}
        return {
            name: location for name, location in self.source.list().items() if name != self.base
        }

    def changeable_folder(self) -> Path:
        """The folder of adapters, in whose ``served.json`` the API may record changes. ``Refusal``:
        the source is remote, or there is none."""
        if isinstance(self.source, RemoteSource):
            raise Refusal(
                400,
                f"adapters that are those of {self.source.address}",
                "a change at that place, which is seen in seconds",
                "`veneer push` it there, or delete it there",
                code="remote_adapters",
            )
        if self.folder is None:
            raise Refusal(
                400,
                "a server without an adapter folder",
                "one",
                "start it with --adapters DIR",
                code="no_adapter_folder",
            )
        return self.folder

    def resolve_path(self, path: str) -> Location:
        """The adapter that a client's path names: a name of the library, or a relative path that
        lies in the folder after links are followed. ``Refusal``: the path is invalid or has no
        adapter. ``LibraryError``: the library has no such name."""
        source: Any = self.source
        if isinstance(source, LibrarySource):
            return source.resolve(path)
        path_segments = path.split("/")
        if not path.isprintable() or "\\" in path or not {"", ".", ".."}.isdisjoint(path_segments):
            raise Refusal(
                400,
                f"lora_path {path[:200]!r}",
                "a path relative to the adapter folder, without '.', '..' or control characters",
                "name a folder in the adapter folder",
                param="lora_path",
                code="bad_path",
            )
        try:
            return source.resolve(path)
        except LibraryError as error:
            raise Refusal(
                404,
                str(error),
                param="lora_path",
                code="not_found",
                error_type="NotFoundError",
            ) from error

    def relocate(self, location: Location) -> Location:
        """``location`` with the version that its files have now, since the files of a folder may be
        overwritten. A location in a library or the cache of a remote address is returned unchanged:
        its files never change."""
        if isinstance(self.source, FolderSource):
            return self.source.locate(location.path)
        return location

    def describe_path(self, name: str, location: Location | None) -> str:
        """The ``lora_path`` with which a client can load the adapter: its path in the folder, its
        name in the library, or its remote address."""
        if isinstance(self.source, RemoteSource):
            return f"{self.source.address}/{name}"
        path = name
        if location is not None and isinstance(self.source, FolderSource):
            path = str(location.path.relative_to(self.source.folder))
        return self.state.names.get(name, path)

    def remember(self, name: str, location: Location, path: str | None, pin: bool | None) -> None:
        """Record in ``served.json`` that a name is served. ``path``: the client's ``lora_path``, or
        None if it sent none; ``pin``: whether the adapter stays in memory (is pinned) from now on,
        None for no change."""
        with lock_state(self.changeable_folder()) as state:
            paths_by_name, pinned_names = dict(state.names), state.pinned
            if self.list_source().get(name, Location(Path())).path == location.path:
                paths_by_name.pop(name, None)
            elif path is not None:
                paths_by_name[name] = path
            if pin is not None:
                pinned_names = pinned_names | {name} if pin else pinned_names - {name}
            self._write(ServedState(paths_by_name, pinned_names, state.hidden - {name}), state)

    def forget(self, name: str) -> None:
        """Record in ``served.json`` that a name is not served."""
        with lock_state(self.changeable_folder()) as state:
            paths_by_name = {key: path for key, path in state.names.items() if key != name}
            hidden_names = state.hidden | ({name} if name in self.list_source() else frozenset())
            pinned_names = state.pinned - {name}
            self._write(
                replace(state, names=paths_by_name, pinned=pinned_names, hidden=hidden_names), state
            )

    def _write(self, state: ServedState, old_state: ServedState) -> None:
        """Write ``state`` to ``served.json``, unless it equals ``old_state``, the present content
        of the file."""
        if state != old_state:
            write_state(self.changeable_folder(), state)
        self.state = state


class Catalogue:
    """The served adapters. The catalogue registers them with the bank, and removes or replaces them
    there. All methods but ``known``, ``folder_of`` and ``root`` may read the disk, so call them
    outside of the event loop."""

    def __init__(
        self, address: str | Path | None, bank: Any, base: str = "", pin: Iterable[str] = ()
    ) -> None:
        """Register every adapter of ``address`` with the bank. Without an ``address`` there are no
        adapters, and none can be loaded. ``base``: the model name of the base, which no adapter may
        have. ``pin``: names of adapters to keep in memory, besides those that the API pins.
        ``ConfigError``: there is no such folder, or ``served.json`` is damaged. ``LibraryError``:
        the index of the library is damaged."""
        self.base, self._bank, self._always_pinned = base, bank, frozenset(pin)
        self._served_names = ServedNames(address, base)
        self._adapters = store_catalogue.Catalogue(self._served_names.list)
        self._lock = threading.Lock()
        self._stop_event = threading.Event()
        self._warnings: dict[str, str] = {}  # the last logged warning, by adapter name
        self._listed_at, self._applied_pins = -1e9, frozenset[str]()
        with self._lock:
            self._sync()

    def follow_pins(self) -> None:
        """Pin the adapters that were recorded as pinned since the last call, by this server or by
        another one that serves the folder: load them, and keep them in memory. Unpin adapters that
        are no longer recorded. If an adapter cannot be loaded, a warning is logged."""
        pinned_names = self._served_names.state.pinned | self._always_pinned
        pinned_names, previous_names = (
            frozenset(filter(self.known, pinned_names)),
            self._applied_pins,
        )
        # set first, so that a failure is not retried every second
        self._applied_pins = pinned_names
        for name in sorted(pinned_names ^ previous_names):
            try:
                if name in pinned_names:
                    self._bank.pin(name)
                elif self.known(name):
                    self._bank.unpin(name)
            except (VeneerError, OSError) as error:
                log.warning("Adapter %r was pinned and cannot be loaded: %s", name, error)

    def watch(self) -> None:
        """Start a thread that lists the source every second, or less often if listing takes long.
        ``close`` stops it."""
        if self._served_names.source is not None:
            threading.Thread(target=self._watch_source, name="veneer-adapters", daemon=True).start()

    def close(self) -> None:
        self._stop_event.set()

    def _watch_source(self) -> None:
        self._bank.throttle_loads()
        listing_seconds = 0.0
        while not self._stop_event.wait(
            min(max(MIN_INTERVAL, INTERVAL_RATIO * listing_seconds), MAX_INTERVAL)
        ):
            start_time = time.monotonic()
            try:
                self.refresh(force=True)
                self.follow_pins()
            except Exception:  # if the thread ended, the server would go on with old adapters
                log.exception("The adapter folder cannot be followed")
            listing_seconds = time.monotonic() - start_time

    def known(self, name: str) -> bool:
        """Whether a name is registered. Does not read the disk."""
        return name in self._adapters

    def folder_of(self, name: str) -> Path | None:
        """The folder of a registered adapter; None if the name is unknown. Does not read the
        disk."""
        location = self._adapters.resolve(name)
        return None if location is None else location.path

    def root(self, name: str) -> str:
        """The ``lora_path`` with which a client can load this adapter."""
        return self._served_names.describe_path(name, self._adapters.resolve(name))

    def refresh(self, *, force: bool = False) -> tuple[str, ...]:
        """List the source, apply its changes, and return the names of all registered adapters. The
        source is listed at most once a second, unless ``force``. If it cannot be read, the adapters
        stay as they were."""
        is_due = force or time.monotonic() - self._listed_at >= MIN_INTERVAL
        # ``load`` may hold the lock for a long time: then skip the listing instead of waiting
        if self._served_names.source is not None and is_due and self._lock.acquire(blocking=False):
            try:
                self._sync()
            except (OSError, VeneerError) as error:  # registered adapters stay served
                log.warning("The adapter folder cannot be read: %s", error)
                # so that the next attempt waits as long as after a success
                self._listed_at = time.monotonic()
            finally:
                self._lock.release()
        return self._adapters.names

    def load(
        self, name: str, path: str | None, *, inplace: bool = False, pin: bool | None = None
    ) -> None:
        """Verify and load an adapter now, and record it in ``served.json``.

        Args:
            path: the adapter's path in the folder, or its name in the library. None: the source
                has an adapter with this name.
            inplace: replace the adapter that has this name. It stays if the new one cannot be
                loaded.
            pin: whether to keep it in memory from now on; None for no change.

        Raises:
            Refusal: the name or the path is invalid, or the adapter is loaded already.
            AdapterError: the adapter is damaged, altered, or made for another base.
            LibraryError: the library has no adapter with this name.
            BankFullError: there is no memory for the adapter.
        """
        with self._lock, _refuse_disk_errors():
            self._served_names.changeable_folder()
            self._check_name(name)
            self._sync()
            old_location = self._adapters.resolve(name)
            location = self._locate(name, path, old_location)
            status_by_name = {entry.name: entry for entry in self._bank.status()}
            is_resident = name in status_by_name and status_by_name[name].resident
            has_new_path = old_location is None or location.path != old_location.path
            if (
                old_location is not None
                and not inplace
                and (has_new_path or (is_resident and pin is None))
            ):
                raise Refusal(
                    400,
                    f"The lora adapter {name!r} has already been loaded. If you want to load the"
                    " adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                    code="already_loaded",
                    error_type="InvalidUserInput",
                )
            if has_new_path or inplace or not (is_resident or pin is False):
                self._bank.add(location.path, name=name, replace=old_location is not None)
                self._adapters.accept(name, location)
            else:
                location = old_location or location
            try:
                self._served_names.remember(name, location, path, pin)
            except OSError:  # a restart would forget an unrecorded adapter, so do not serve it
                self._unregister(name)
                if old_location is not None:
                    self._register(name, self._served_names.relocate(old_location))
                    if status_by_name[name].pinned:
                        self._bank.pin(name)
                raise
            if pin is not None:
                (self._bank.pin if pin else self._bank.unpin)(name)
        log.info("Loaded adapter %r from %s", name, self.root(name))

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Its files stay, and running calls finish. ``Refusal``: there is
        no such name."""
        with self._lock, _refuse_disk_errors():
            self._served_names.changeable_folder()
            self._sync()
            if name not in self._adapters:
                suggestion = nearest(name, self._adapters.names)
                raise Refusal(
                    404,
                    f"The lora adapter {name[:128]!r} cannot be found{suggestion}.",
                    param="lora_name",
                    code="model_not_found",
                    error_type="NotFoundError",
                )
            self._served_names.forget(name)
            self._unregister(name)
        log.info("Unloaded adapter %r", name)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name) or name == self.base:
            raise Refusal(
                400,
                f"lora_name {name[:128]!r}",
                "1 to 128 letters, digits, '_', '-' and '.', the first no '-' or '.', and not the"
                f" base's {self.base!r}",
                "choose another",
                param="lora_name",
                code="bad_name",
            )

    def _locate(self, name: str, path: str | None, old_location: Location | None) -> Location:
        """The location of the adapter that ``load`` loads: of ``path``, or if that is None, of
        ``name`` as it is served (``old_location``) or as the source has it. ``Refusal``: there is
        none."""
        if path is not None:
            return self._served_names.resolve_path(path)
        location = old_location or self._served_names.list_source().get(name)
        if location is None:
            raise Refusal(
                400,
                "Both 'lora_name' and 'lora_path' must be provided for a name that is new.",
                param="lora_path",
                error_type="InvalidUserInput",
            )
        # the files may have changed since the last listing
        return self._served_names.relocate(location)

    def _unregister(self, name: str) -> None:
        # first, because ``bank.remove`` notifies an observer that asks whether the name is
        # ``known``
        self._adapters.remove(name)
        self._bank.remove(name)
        self._applied_pins -= {name}

    def _sync(self) -> None:
        """List the source, and register, replace or remove the adapters that have changed since the
        last time."""
        changes = self._adapters.refresh()
        for name in changes.removed:
            self._unregister(name)
        for name, location in changes.added.items():
            self._register(name, location)
        for name, location in changes.changed.items():
            self._replace(name, location)
        self._listed_at = time.monotonic()

    def _replace(self, name: str, location: Location) -> None:
        """Replace the adapter of a name by the one at ``location``. The old adapter answers until
        the new one is in memory, and requests that use the old one finish with it. If the new one
        cannot be loaded, the old one stays. After an ``OSError``, whose cause may pass, the next
        listing tries again."""
        try:
            try:
                status = self._bank.status()
                is_resident = any(entry.resident for entry in status if entry.name == name)
                add_to_bank = self._bank.add if is_resident else self._bank.register
                add_to_bank(path=location.path, name=name, replace=True)
            except BankFullError:  # no room for both: drop the old one, load the new one on demand
                self._bank.register(path=location.path, name=name, replace=True)
                self._applied_pins -= {name}
        except (VeneerError, OSError) as error:
            if isinstance(error, VeneerError):
                self._adapters.reject(name, location)
            elif self._warnings.get(name) == str(error):
                return
            self._warnings[name] = str(error)
            log.warning("Adapter %r was changed, and the new one cannot be loaded: %s", name, error)
        else:
            self._warnings.pop(name, None)
            self._adapters.accept(name, location)
            log.info("Adapter %r was replaced by a new version", name)

    def _register(self, name: str, location: Location) -> None:
        """Register an adapter with the bank. If the bank refuses it, for instance because a file is
        missing, skip it and log a warning, once for each adapter and reason."""
        try:
            self._bank.register(name, location.path)
        except (AdapterError, OSError) as error:
            if self._warnings.get(name) != str(error):
                self._warnings[name] = str(error)
                log.warning("Not served: %s", error)
        else:
            self._warnings.pop(name, None)
            self._adapters.accept(name, location)


def served_folders(address: str | Path) -> Mapping[str, Path]:
    """The adapter folders that a server of ``address`` would serve, by adapter name. Raises the
    same errors as ``Catalogue``."""
    return {name: location.path for name, location in ServedNames(address).list().items()}


def check_pinned_names(pinned_names: Sequence[str], adapters: Collection[str]) -> None:
    """Check the names in ``--pin`` before the base is loaded, which takes long. ``adapters``: the
    names of the adapters that will be served. ``ConfigError``: there is no adapter of a name."""
    if unknown_names := [name for name in pinned_names if name not in adapters]:
        raise ConfigError(
            f"--pin, and no adapter named {unknown_names[0]!r}"
            f"{nearest(unknown_names[0], adapters)}",
            f"one of {listing(adapters, 8)}" if adapters else "an adapter",
            "check --pin and --adapters",
        )


@contextmanager
def _refuse_disk_errors() -> Iterator[None]:
    """Turn an ``OSError`` in the block into a ``Refusal`` with status 503."""
    try:
        yield
    except OSError as error:
        raise Refusal(
            503,
            f"an adapter folder that cannot be read or written ({disk_reason(error)})",
            "one that can",
            "see to it; nothing was changed",
            code="disk",
        ) from error
