"""The adapters that a server serves: those of a source (``store/catalogue.py``) and changes through
the API, kept in sync with the bank.

    DIR/french/adapter_config.json     an adapter "french"; served while it is there
    DIR/index.json                     or DIR is a library: its names are the adapters
    DIR/served.json                    changes made through the API (``served_state.py``)
    s3://bucket/adapters               or a remote place, which the API does not change

Nothing that a client sends reaches a file outside DIR: a name is a word without separators, a path
is relative, has no "..", and must lie in DIR when all links are followed. ``adapter_files``
verifies the content of an adapter folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.errors import (
    AdapterError,
    BankFullError,
    LibraryError,
    VeneerError,
    nearest,
    sentence,
)
from veneer.serve.refusal import Refusal
from veneer.serve.served_state import ServedState, lock_state, read_state, write_state
from veneer.store import catalogue as store_catalogue
from veneer.store.catalogue import FolderSource, LibrarySource, Location, RemoteSource, open_source
from veneer.store.library import NAME

log = logging.getLogger("veneer.serve")

#: seconds between two listings of the source: FRESH, or IDLE times the duration of a listing, at
#: most LATEST_LOOK
FRESH, IDLE, LATEST_LOOK = 1.0, 10, 10.0


class ServedNames:
    """The names that a source and its ``served.json`` define; none if ``address`` is None."""

    def __init__(self, address: str | Path | None, base: str = "") -> None:
        """``ConfigError``: no such folder. ``base``: a name that no adapter may have."""
        self.source = None if address is None else open_source(address)
        self.base, self.state = base, ServedState()
        self.folder = (
            None
            if self.source is None or isinstance(self.source, RemoteSource)
            else Path(self.source.address)
        )

    def list(self) -> dict[str, Location]:
        """All names that are served now. ``ConfigError``, ``LibraryError``, ``RemoteError``,
        ``OSError``: the source or ``served.json`` cannot be read."""
        if self.source is None:
            return {}
        locations = self.list_source()
        if self.folder is None:
            return locations
        state = self.state = read_state(self.folder)
        locations = {
            name: location for name, location in locations.items() if name not in state.hidden
        }
        for name, path in state.names.items():
            if name == self.base:  # the base had another name when this adapter was loaded
                continue
            try:
                locations[name] = self.resolve_path(path)
            except (Refusal, AdapterError, LibraryError):
                locations.pop(
                    name, None
                )  # without its folder the name is not served, until the folder is back
        return locations

    def list_source(self) -> dict[str, Location]:
        """The source's own names."""
        if self.source is None:
            return {}
        return {
            name: location for name, location in self.source.list().items() if name != self.base
        }

    def changeable_folder(self) -> Path:
        """The folder whose names the API may change. ``Refusal``: the source is no such folder."""
        if isinstance(self.source, RemoteSource):
            problem = f"adapters that are those of {self.source.address}"
            expected = "a change at that place, which is seen in seconds"
            do = "`veneer push` it there, or delete it there"
            raise Refusal(400, problem, expected, do, code="remote_adapters")
        if self.folder is None:
            problem = "a server without an adapter folder"
            message = sentence(problem, "one", "start it with --adapters DIR")
            raise Refusal(400, message, code="no_adapter_folder")
        return self.folder

    def resolve_path(self, path: str) -> Location:
        """The adapter of a client's path: a name of the library, or a relative path that lies in
        the folder after links are followed. ``Refusal``: the path is invalid or has no adapter.
        ``LibraryError``: the library has no such name."""
        self.changeable_folder()
        source: Any = self.source
        if isinstance(source, LibrarySource):
            return source.resolve(path)
        steps = path.split("/")
        if not path.isprintable() or "\\" in path or not {"", ".", ".."}.isdisjoint(steps):
            problem = f"lora_path {path[:200]!r}"
            expected = (
                "a path relative to the adapter folder, without '.', '..' or control characters"
            )
            message = sentence(problem, expected, "name a folder in the adapter folder")
            raise Refusal(400, message, param="lora_path", code="bad_path")
        try:
            return source.resolve(path)
        except LibraryError as error:
            kind = "NotFoundError"
            raise Refusal(
                404, str(error), param="lora_path", code="not_found", kind=kind
            ) from error

    def relocate(self, location: Location) -> Location:
        """The same folder with the current version of its files."""
        if isinstance(self.source, FolderSource):
            return self.source.locate(location.path)
        return location

    def describe_path(self, name: str, location: Location | None) -> str:
        """What to send as ``lora_path`` for a name: the path in the folder, the name in the
        library, or the remote place."""
        if isinstance(self.source, RemoteSource):
            return f"{self.source.address}/{name}"
        path = name
        if location is not None and isinstance(self.source, FolderSource):
            path = str(location.path.relative_to(self.source.folder))
        return self.state.names.get(name, path)

    def remember(self, name: str, location: Location, path: str | None, pin: bool | None) -> None:
        """Write to ``served.json`` that a name is served."""
        with self._change_state() as state:
            names, pinned = dict(state.names), state.pinned
            if self.list_source().get(name, Location(Path())).path == location.path:
                names.pop(name, None)
            elif path is not None:
                names[name] = path
            if pin is not None:
                pinned = pinned | {name} if pin else pinned - {name}
            self.state = ServedState(names, pinned, state.hidden - {name})

    def forget(self, name: str) -> None:
        """Write to ``served.json`` that a name is not served."""
        with self._change_state() as state:
            names = {key: path for key, path in state.names.items() if key != name}
            hidden = state.hidden | ({name} if name in self.list_source() else frozenset())
            self.state = replace(state, names=names, pinned=state.pinned - {name}, hidden=hidden)

    @contextmanager
    def _change_state(self) -> Iterator[ServedState]:
        """The state on the disk, replaced by ``self.state`` at the end of the block."""
        folder, before = self.changeable_folder(), self.state
        with lock_state(folder):
            current = read_state(folder)
            yield current
            if self.state != current:
                try:
                    write_state(folder, self.state)
                except OSError:
                    self.state = before
                    raise


class Catalogue:
    """The served adapters, kept in sync with the bank. All methods but ``known``, ``folder_of`` and
    ``root`` read the disk: call them in a thread."""

    def __init__(
        self, address: str | Path | None, bank: Any, base: str = "", pin: Iterable[str] = ()
    ) -> None:
        """Register every adapter of ``address`` with the bank (None: there are none, and none can
        be loaded). ``pin``: names to pin besides those that the API pins. ``ConfigError``: no such
        folder, a damaged ``served.json``. ``LibraryError``: a damaged index."""
        self.base, self._bank, self._always = base, bank, frozenset(pin)
        self._served = ServedNames(address, base)
        self._adapters = store_catalogue.Catalogue(self._served.list)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._warnings: dict[str, str] = {}  # by the name of an adapter that cannot be registered
        self._looked, self._pins = -1e9, frozenset[str]()
        with self._lock:
            self._sync()

    @property
    def pinned(self) -> tuple[str, ...]:
        pinned = self._served.state.pinned | self._always
        return tuple(sorted(filter(self.known, pinned)))

    def follow_pins(self) -> None:
        """Load the adapters that this server's API, or that of another server, has pinned, and
        unpin the others. A pinned adapter that cannot be loaded is logged; it does not stop the
        server."""
        pinned, before = frozenset(self.pinned), self._pins
        self._pins = pinned  # set first, so that a failure is not retried every second
        for name in sorted(pinned ^ before):
            try:
                if name in pinned:
                    self._bank.pin(name)
                elif self.known(name):
                    self._bank.unpin(name)
            except (VeneerError, OSError) as error:
                log.warning("Adapter %r was pinned and cannot be loaded: %s", name, error)

    def watch(self) -> None:
        """Start a thread that lists the source every second, or less often if listing takes long.
        ``close`` stops it."""
        if self._served.source is not None:
            threading.Thread(target=self._follow, name="veneer-adapters", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _follow(self) -> None:
        self._bank.throttle_loads()
        duration = 0.0
        while not self._stop.wait(min(max(FRESH, IDLE * duration), LATEST_LOOK)):
            start = time.monotonic()
            try:
                self.refresh(force=True)
                self.follow_pins()
            except Exception:  # without this thread the server would go on with old adapters
                log.exception("The adapter folder cannot be followed")
            duration = time.monotonic() - start

    def known(self, name: str) -> bool:
        """Whether a name is registered. Does not read the disk."""
        return name in self._adapters

    def folder_of(self, name: str) -> Path | None:
        """The folder of a registered adapter. Does not read the disk."""
        location = self._adapters.resolve(name)
        return None if location is None else location.path

    def root(self, name: str) -> str:
        """What to send as ``lora_path`` for this adapter."""
        return self._served.describe_path(name, self._adapters.resolve(name))

    def refresh(self, *, force: bool = False) -> tuple[str, ...]:
        """Apply changes of the source; returns all names. Lists the source at most once a
        second."""
        is_due = force or time.monotonic() - self._looked >= FRESH
        # while an adapter is being loaded, do not wait for the lock
        if self._served.source is not None and is_due and self._lock.acquire(blocking=False):
            try:
                self._sync()
            except (OSError, VeneerError) as error:  # registered adapters stay served
                log.warning("The adapter folder cannot be read: %s", error)
                self._looked = time.monotonic()  # retry no sooner after a failure
            finally:
                self._lock.release()
        return self._adapters.names

    def load(
        self, name: str, path: str | None, *, inplace: bool = False, pin: bool | None = None
    ) -> None:
        """Verify and load an adapter now, and record it in ``served.json``.

        Args:
            path: in the folder, or its name in the library; None for a name that is there.
            inplace: replace the adapter of this name, which stays if the new one cannot be loaded.
            pin: keep it in memory, or no longer; None leaves that as it is.

        Raises:
            Refusal: a name or a path that cannot be one, an adapter that is loaded already.
            AdapterError: it is damaged, altered, or made for another base.
        """
        with self._lock, _refuse_disk_errors():
            self._served.changeable_folder()
            self._check_name(name)
            self._sync()
            old = self._adapters.resolve(name)
            location = self._locate(name, path, old)
            status = {entry.name: entry for entry in self._bank.status()}
            resident = name in status and status[name].resident
            moved = old is None or location.path != old.path
            if old is not None and not inplace and (moved or (resident and pin is None)):
                do = "If you want to load the adapter in place, set 'load_inplace' to True."
                message = f"The lora adapter {name!r} has already been loaded. {do}"
                kind = "InvalidUserInput"
                raise Refusal(400, message, param="lora_name", code="already_loaded", kind=kind)
            if moved or inplace or not (resident or pin is False):
                self._bank.add(location.path, name=name, replace=old is not None)
                self._adapters.accept(name, location)
            else:
                location = old or location
            try:
                self._served.remember(name, location, path, pin)
            except OSError:  # do not load an adapter that a restart would forget
                self._drop(name)
                if old is not None:
                    self._enter(name, self._served.relocate(old))
                    if status[name].pinned:
                        self._bank.pin(name)
                raise
            if pin is not None:
                (self._bank.pin if pin else self._bank.unpin)(name)
        log.info("Loaded adapter %r from %s", name, self.root(name))

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Its files stay, and running calls finish. ``Refusal``: there is
        no such name."""
        with self._lock, _refuse_disk_errors():
            self._served.changeable_folder()
            self._sync()
            if name not in self._adapters:
                near = nearest(name, self._adapters.names)
                message = f"The lora adapter {name[:128]!r} cannot be found{near}."
                code, kind = "model_not_found", "NotFoundError"
                raise Refusal(404, message, param="lora_name", code=code, kind=kind)
            self._served.forget(name)
            self._drop(name)
        log.info("Unloaded adapter %r", name)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name) or name == self.base:
            letters = "1 to 128 letters, digits, '_', '-' and '.', the first no '-' or '.'"
            expected = f"{letters}, and not the base's {self.base!r}"
            message = sentence(f"lora_name {name[:128]!r}", expected, "choose another")
            raise Refusal(400, message, param="lora_name", code="bad_name")

    def _locate(self, name: str, path: str | None, old: Location | None) -> Location:
        """The adapter to load: the one at ``path``, or else the one of the name."""
        if path is not None:
            return self._served.resolve_path(path)
        location = old or self._served.list_source().get(name)
        if location is None:
            message = "Both 'lora_name' and 'lora_path' must be provided for a name that is new."
            raise Refusal(400, message, param="lora_path", kind="InvalidUserInput")
        return self._served.relocate(location)  # its files may have changed since the last listing

    def _drop(self, name: str) -> None:
        self._adapters.remove(name)  # first, because an observer of the removal calls `known`
        self._bank.remove(name)
        self._pins -= {name}

    def _sync(self) -> None:
        changes = self._adapters.refresh()
        for name in changes.removed:
            self._drop(name)
        for name, location in changes.added.items():
            self._enter(name, location)
        for name, location in changes.changed.items():
            self._renew(name, location)
        self._looked = time.monotonic()

    def _renew(self, name: str, location: Location) -> None:
        """Replace the files of a name. The old adapter is used until the new one is in memory;
        running calls finish with it. It stays if the new one cannot be loaded."""
        try:
            try:
                status = self._bank.status()
                resident = any(entry.resident for entry in status if entry.name == name)
                change = self._bank.add if resident else self._bank.register
                change(path=location.path, name=name, replace=True)
            except BankFullError:  # memory does not hold both
                self._bank.register(path=location.path, name=name, replace=True)
                self._pins -= {name}
        except (VeneerError, OSError) as error:
            self._adapters.reject(name, location)
            log.warning("Adapter %r was changed, and the new one cannot be loaded: %s", name, error)
        else:
            self._adapters.accept(name, location)
            log.info("Adapter %r is another one from now on", name)

    def _enter(self, name: str, location: Location) -> None:
        """Register a folder with the bank. An incomplete adapter folder is skipped with a
        warning."""
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
    """The adapter folders that would be served from an address, by name. Raises as
    ``Catalogue``."""
    return {name: location.path for name, location in ServedNames(address).list().items()}


@contextmanager
def _refuse_disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        problem = f"an adapter folder that cannot be read or written ({reason})"
        do = "see to it; nothing was changed"
        raise Refusal(503, problem, "one that can", do, code="disk") from error
