"""Which adapters there are: what lies in the adapter folder, and what was said of it through the
API.

    DIR/french/adapter_config.json     an adapter "french"; found when it appears, gone when it is deleted
    DIR/index.json                     or DIR is a library: its names are the adapters
    DIR/served.json                    {"format": 1, "names": {"fr": {"path": "runs/7/adapter"}}, "pinned": [],
                                        "hidden": []}
    s3://bucket/adapters               or a remote place (store/mirror.py), which the API does not change

``served.json`` is what ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter`` leave: names that
are not the folder's own, what is pinned, and folders that are not served although they are there.

Nothing that a client says reaches a file outside DIR: a name is a word without separators, a path
is relative, has no "..", and must lie in DIR when all links are followed. What is inside an adapter
folder is ``saved.read``'s to judge.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from veneer.errors import (
    AdapterError,
    BankFullError,
    ConfigError,
    LibraryError,
    VeneerError,
    nearest,
    sentence,
)
from veneer.fileio.atomic import write_whole
from veneer.fileio.untrusted import parse
from veneer.formats import peft
from veneer.serve.refusal import Refusal
from veneer.store.library import INDEX, NAME, OBJECTS, Library
from veneer.store.mirror import Mirror
from veneer.store.remote import is_remote

log = logging.getLogger("veneer.serve")

FORMAT, STATE_FILE = 1, "served.json"
MAX_STATE_FILE = 16 * 2**20
# : seconds between two looks at the folder: so many, or so many times what a look takes, at most so
# many
FRESH, IDLE, LATEST_LOOK = 1.0, 10, 10.0


Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class SavedState:
    """What ``served.json`` holds: paths by name, what is pinned, what is not served."""

    names: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()


class Catalogue:
    """The adapters of a folder, kept in step with the bank. Its methods block on the disk: call
    them in a thread, but for ``known`` and ``root``."""

    def __init__(
        self, folder: str | Path | None, bank: Any, base: str = "", pin: Iterable[str] = ()
    ) -> None:
        """Register every adapter of ``folder`` (None: there are none, and none can be loaded) with
        the bank. ``pin``: what is to be pinned besides what the API pins. ``ConfigError``: no such
        folder, a damaged ``served.json``. ``LibraryError``: a damaged index."""
        self._mirror = (
            Mirror(str(folder)) if folder is not None and is_remote(str(folder)) else None
        )
        self.folder = (
            None if folder is None or self._mirror else Path(folder).expanduser().resolve()
        )
        self.base, self._bank, self._always = base, bank, frozenset(pin)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._paths: dict[str, Path] = {}
        self._stamps: dict[str, Stamp] = {}  # of the files that are served
        self._changing: dict[
            str, tuple[Path, Stamp]
        ] = {}  # what stands in place of them, at the last look
        self._failed: dict[
            str, tuple[Path, Stamp]
        ] = {}  # what could not be loaded in place of them
        self._broken: dict[str, str] = {}
        self._looked, self._state, self._pins = -1e9, SavedState(), frozenset[str]()
        self._library = None
        if self.folder is not None:
            if not self.folder.is_dir():
                raise ConfigError(
                    f"no adapter folder {self.folder}", "a folder of adapters", "make it, or check"
                )
            self._library = Library(self.folder) if (self.folder / INDEX).exists() else None
        if folder is not None:
            with self._lock:
                self._sync()

    @property
    def pinned(self) -> tuple[str, ...]:
        return tuple(sorted((self._state.pinned | self._always) & self._paths.keys()))

    def follow_pins(self) -> None:
        """Load what is to be pinned, by the API of this server or of another, and let go of what no
        longer is. What is damaged by now, or has no room, is named in the log: a server that would
        not start for it would serve nobody."""
        pinned, before = frozenset(self.pinned), self._pins
        self._pins = pinned  # first: what fails is not tried again every second
        for name in sorted(pinned ^ before):
            try:
                if name in pinned:
                    self._bank.pin(name)
                elif self.known(name):
                    self._bank.unpin(name)
            except (VeneerError, OSError) as error:
                log.warning("Adapter %r was pinned and cannot be loaded: %s", name, error)

    def watch(self) -> None:
        """From now on, keep in step with the folder: a thread looks every second, less often where
        a look takes long. ``close`` ends it."""
        if self.folder is not None or self._mirror is not None:
            threading.Thread(target=self._follow, name="veneer-adapters", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _follow(self) -> None:
        self._bank.throttle_loads()
        took = 0.0
        while not self._stop.wait(min(max(FRESH, IDLE * took), LATEST_LOOK)):
            start = time.monotonic()
            try:
                self.refresh(force=True)
                self.follow_pins()
            except (
                Exception
            ):  # a thread that ended would leave the server with what it has, and nobody would know
                log.exception("The adapter folder cannot be followed")
            took = time.monotonic() - start

    def known(self, name: str) -> bool:
        """Whether a name is registered; looks at no disk."""
        return name in self._paths

    def folder_of(self, name: str) -> Path | None:
        """Where a registered adapter is; looks at no disk."""
        return self._paths.get(name)

    def root(self, name: str) -> str:
        """What to send as ``lora_path`` for this adapter: its path in the folder, or its name in
        the library."""
        if self._mirror is not None:
            return f"{self._mirror.place}/{name}"
        path = self._paths.get(name)
        own = (
            name
            if path is None or self._library is not None
            else str(path.relative_to(self._root()))
        )
        return self._state.names.get(name, own)

    def refresh(self, *, force: bool = False) -> tuple[str, ...]:
        """Find what has appeared and drop what has gone; all names. Looks at the disk once a second
        at most."""
        served = self.folder is not None or self._mirror is not None
        stale = served and (force or time.monotonic() - self._looked >= FRESH)
        if stale and self._lock.acquire(
            blocking=False
        ):  # an adapter that loads meanwhile holds nobody up
            try:
                self._sync()
            except (OSError, VeneerError) as error:  # what is registered goes on being served
                log.warning("The adapter folder cannot be read: %s", error)
                self._looked = (
                    time.monotonic()
                )  # what fails is not tried more often than what succeeds
            finally:
                self._lock.release()
        return tuple(sorted(self._paths))

    def load(
        self, name: str, where: str | None, *, inplace: bool = False, pin: bool | None = None
    ) -> None:
        """Load an adapter now, verified, and remember it. ``where``: its path in the folder (its
        name in a library); None: where the name leads already. ``inplace``: replace what the name
        stands for. If the new one cannot be loaded, the old one stays. ``pin``: keep it in memory,
        or no longer; None leaves that as it is. ``Refusal``: a name or a path that cannot be one,
        an adapter that is loaded already. ``AdapterError``: it is damaged, altered, or made for
        another base."""
        with self._lock, _disk():
            self._root()
            if not NAME.fullmatch(name) or name == self.base:
                letters = "1 to 128 letters, digits, '_', '-' and '.', the first no '-' or '.'"
                expected = f"{letters}, and not the base's {self.base!r}"
                message = sentence(f"lora_name {name[:128]!r}", expected, "choose another")
                raise Refusal(400, message, param="lora_name", code="bad_name")
            self._sync()
            old = self._paths.get(name)
            path = (old or self._scan().get(name)) if where is None else self.inside(where)
            if path is None:
                message = (
                    "Both 'lora_name' and 'lora_path' must be provided for a name that is new."
                )
                raise Refusal(400, message, param="lora_path", kind="InvalidUserInput")
            status = {entry.name: entry for entry in self._bank.status()}
            resident = name in status and status[name].resident
            if old is not None and not inplace and (path != old or (resident and pin is None)):
                do = "If you want to load the adapter in place, set 'load_inplace' to True."
                message = f"The lora adapter {name!r} has already been loaded. {do}"
                raise Refusal(
                    400, message, param="lora_name", code="already_loaded", kind="InvalidUserInput"
                )
            if path != old or inplace or not (resident or pin is False):
                stamp = self._stamp(path)
                self._bank.add(
                    path, name=name, replace=old is not None
                )  # if that fails, what stood there stays
                self._paths[name], self._stamps[name] = path, stamp
            try:
                self._record(name, where, pin)
            except OSError:  # what would be forgotten at a restart is not loaded
                self._drop(name)
                if old is not None:
                    self._enter(name, old, self._stamp(old))
                    if status[name].pinned:
                        self._bank.pin(name)
                raise
            if pin is not None:
                (self._bank.pin if pin else self._bank.unpin)(name)
        log.info("Loaded adapter %r from %s", name, self.root(name))

    def unload(self, name: str) -> None:
        """Serve an adapter no more. Its files stay, and calls that use it go on. ``Refusal``: there
        is no such name."""
        with self._lock, _disk():
            self._root()
            self._sync()
            if name not in self._paths:
                message = (
                    f"The lora adapter {name[:128]!r} cannot be found{nearest(name, self._paths)}."
                )
                raise Refusal(
                    404, message, param="lora_name", code="model_not_found", kind="NotFoundError"
                )
            with _locked(self._root()):
                state = self._read_state()
                names = {other: path for other, path in state.names.items() if other != name}
                hidden = state.hidden | ({name} if name in self._scan() else frozenset())
                self._write_state(SavedState(names, state.pinned - {name}, hidden), state)
            self._drop(name)
        log.info("Unloaded adapter %r", name)

    def _drop(self, name: str) -> None:
        del self._paths[name], self._stamps[name]  # first: what hears of the removal asks `known`
        self._bank.remove(name)
        self._pins -= {name}

    def _record(self, name: str, where: str | None, pin: bool | None) -> None:
        with _locked(self._root()):
            state = self._read_state()
            own, names = self._scan().get(name), dict(state.names)
            if own == self._paths[name]:
                names.pop(name, None)
            elif where is not None:
                names[name] = where
            pinned = (
                state.pinned
                if pin is None
                else state.pinned | {name}
                if pin
                else state.pinned - {name}
            )
            self._write_state(SavedState(names, pinned, state.hidden - {name}), state)

    def _root(self) -> Path:
        if self._mirror is not None:
            found, do = (
                f"adapters that are those of {self._mirror.place}",
                "`veneer push` it there, or delete it there",
            )
            raise Refusal(
                400,
                found,
                "a change at that place, which is seen in seconds",
                do,
                code="remote_adapters",
            )
        if self.folder is None:
            message = sentence(
                "a server without an adapter folder", "one", "start it with --adapters DIR"
            )
            raise Refusal(400, message, code="no_adapter_folder")
        return self.folder

    def _sync(self) -> None:
        wanted = self._wanted()
        for name in self._paths.keys() - wanted.keys():
            self._drop(name)
        changing = {}
        for name, path in wanted.items():
            stamp = self._stamp(path)
            if name not in self._paths:
                self._enter(name, path, stamp)
            elif (path, stamp) not in (
                (self._paths[name], self._stamps[name]),
                self._failed.get(name),
            ):
                changing[name] = path, stamp
                # files that are written in place are whole when they are the same at two looks
                if self._paths[name] != path or self._changing.get(name) == changing[name]:
                    self._renew(name, path, stamp)
        self._changing, self._looked = changing, time.monotonic()

    def _wanted(self) -> dict[str, Path]:
        """What is to be served, by name."""
        if self._mirror is not None:
            return {name: path for name, path in self._mirror.look().items() if name != self.base}
        found = self._scan()
        state = self._state = self._read_state()
        wanted = {name: path for name, path in found.items() if name not in state.hidden}
        for name, where in state.names.items():
            if name == self.base:  # the base was called otherwise when this was loaded
                continue
            try:
                wanted[name] = self.inside(where)
            except (Refusal, AdapterError, LibraryError):
                wanted.pop(name, None)  # its folder is gone: so is the name, until it comes back
        return wanted

    def _stamp(self, path: Path) -> Stamp:
        """What changes when other files lie at ``path``. What is named by its content does not
        change."""
        if self._library is not None or self._mirror is not None:
            return ()
        with suppress(OSError):
            states = [(path / file).stat() for file in (peft.CONFIG, peft.TENSORS)]
            return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)
        return ()

    def _renew(self, name: str, path: Path, stamp: Stamp) -> None:
        """Let a name mean other files. What is in memory is used until the new one is there, and
        calls that run end with what they began with; if the new one cannot be loaded, the old one
        stays."""
        try:
            try:
                resident = any(
                    entry.resident for entry in self._bank.status() if entry.name == name
                )
                change = self._bank.add if resident else self._bank.register
                change(path=path, name=name, replace=True)
            except BankFullError:  # there is no room for both
                self._bank.register(path=path, name=name, replace=True)
                self._pins -= {name}
        except (VeneerError, OSError) as error:
            self._failed[name] = path, stamp  # it is not tried again before it is another one
            log.warning("Adapter %r was changed, and the new one cannot be loaded: %s", name, error)
        else:
            self._paths[name], self._stamps[name] = path, stamp
            log.info("Adapter %r is another one from now on", name)

    def _enter(self, name: str, path: Path, stamp: Stamp) -> None:
        """Register what lies at ``path``; a folder that is no whole adapter (yet) is left out."""
        try:
            self._bank.register(name, path)
        except (AdapterError, OSError) as error:
            if self._broken.get(name) != str(error):
                self._broken[name] = str(error)
                log.warning("Not served: %s", error)
        else:
            self._broken.pop(name, None)
            self._paths[name], self._stamps[name] = path, stamp

    def _scan(self) -> dict[str, Path]:
        """The folder's own adapters by name: its subfolders, or a library's names."""
        top = self._root()
        if self._library is not None:
            found = {entry.name: top / OBJECTS / entry.object for entry in self._library.list()}
        else:
            with os.scandir(top) as entries:
                named = [entry for entry in entries if NAME.fullmatch(entry.name)]
                paths = {
                    one.name: _within(top, one.name) if one.is_symlink() else top / one.name
                    for one in named
                }
            found = {
                name: path for name, path in paths.items() if path is not None and _is_adapter(path)
            }
        found.pop(self.base, None)
        return found

    def inside(self, where: str) -> Path:
        """The folder that a client's path means, which lies in the adapter folder whatever links
        do. ``Refusal``: it is not a relative path in the folder, or there is no adapter.
        ``LibraryError``: the library has no such name."""
        top = self._root()
        if self._library is not None:
            return self._library.get(where)
        if (
            not where.isprintable()
            or "\\" in where
            or not {"", ".", ".."}.isdisjoint(where.split("/"))
        ):
            expected = (
                "a path relative to the adapter folder, without '.', '..' or control characters"
            )
            message = sentence(
                f"lora_path {where[:200]!r}", expected, "name a folder in the adapter folder"
            )
            raise Refusal(400, message, param="lora_path", code="bad_path")
        path = _within(top, where)
        if path is None or not _is_adapter(path):  # what lies outside looks like what is not there
            found = f"no adapter at {where[:200]!r} in the adapter folder"
            message = sentence(found, f"a folder with {peft.CONFIG}", "check the path")
            raise Refusal(404, message, param="lora_path", code="not_found", kind="NotFoundError")
        return path

    def _read_state(self) -> SavedState:
        file = self._root() / STATE_FILE
        try:
            status = file.stat()
            if not stat.S_ISREG(
                status.st_mode
            ):  # a pipe would be waited for, and a device never ends
                raise ValueError("no regular file")
            if status.st_size > MAX_STATE_FILE:
                raise ValueError(f"more than {MAX_STATE_FILE:,} bytes")
            content = parse(file.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            names = {name: entry["path"] for name, entry in content["names"].items()}
            pinned, hidden = content["pinned"], content["hidden"]
            words = [*names, *names.values(), *pinned, *hidden]
            sound = (
                isinstance(pinned, list)
                and isinstance(hidden, list)
                and all(isinstance(w, str) for w in words)
            )
            if not sound or not all(map(NAME.fullmatch, names)):
                raise ValueError("no lists of names")
            return SavedState(names, frozenset(pinned), frozenset(hidden))
        except FileNotFoundError:
            return SavedState()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found = f"{file}, which is damaged ({error})"
            raise ConfigError(found, "what the server wrote", "mend or delete it") from error

    def _write_state(self, state: SavedState, before: SavedState) -> None:
        if state != before:
            names = {name: {"path": path} for name, path in sorted(state.names.items())}
            lists = {"pinned": sorted(state.pinned), "hidden": sorted(state.hidden)}
            text = json.dumps({"format": FORMAT, "names": names, **lists}, indent=1) + "\n"
            write_whole(self._root() / STATE_FILE, text)
        self._state = state


def folders(folder: str | Path) -> dict[str, Path]:
    """The adapters that would be served from a folder, by name, without a bank. Raises what
    ``Catalogue`` does."""
    return Catalogue(folder, SimpleNamespace(register=lambda name, path: None))._paths


@contextmanager
def _locked(top: Path) -> Iterator[None]:
    """No other server of this folder changes ``served.json`` meanwhile. The folder itself is
    locked, since one that is mounted to be read only can hold no file for it."""
    import fcntl  # here: a system without it can serve, but change nothing

    folder = os.open(top, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            log.warning(
                "The adapter folder cannot be locked (%s): let no other server change it",
                error.strerror,
            )
        yield
    finally:
        with suppress(
            OSError
        ):  # closing is not enough: a process that was forked meanwhile holds the folder open too
            fcntl.flock(folder, fcntl.LOCK_UN)
        os.close(folder)


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"an adapter folder that cannot be read or written ({error.strerror or type(error).__name__})"
        raise Refusal(
            503, found, "one that can", "see to it; nothing was changed", code="disk"
        ) from error


def _within(top: Path, where: str) -> Path | None:
    """The path that ``where`` means when all links are followed; None unless it is there and below
    ``top``."""
    try:
        path = (top / where).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there, a name too long, a loop of links
        return None
    return path if path.is_relative_to(top) and path != top else None


def _is_adapter(path: Path) -> bool:
    """Whether an adapter's configuration lies there; a folder that may not be read is none, and
    hides no other."""
    with suppress(OSError):
        return (path / peft.CONFIG).is_file()
    return False
