"""One catalogue of adapters by name, for any storage.

    FolderSource(DIR)        DIR/french/adapter_config.json is the adapter "french"
    LibrarySource(library)   the names of a library
    RemoteSource(PLACE)      PLACE/french, pulled into the cache
    any other ``Source``     such as the checkpoints of a training service

    source.list()            {name: Location} at this moment
    source.resolve(name)     the Location of one name
    Catalogue.refresh()      names that were added, removed or changed since the last call

The server, vLLM's resolver, the training service and `veneer chat` find adapters here. A ``Bank``
gets folders from it; the bank itself records which of them are in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from veneer.errors import ConfigError, LibraryError, RemoteError, VeneerError
from veneer.formats import peft
from veneer.store.library import INDEX, NAME, OBJECTS, Library
from veneer.store.remote import LATEST, file_system, is_remote, parse_place, pull, store_errors


class Location(NamedTuple):
    """The folder of an adapter. ``version`` changes with the files in the folder; it is () for a
    folder that is never written to again."""

    path: Path
    version: Hashable = ()


class Source(Protocol):
    """Adapters by name. ``address`` names the source in messages."""

    address: str

    def list(self) -> Mapping[str, Location]:
        """All adapters. ``OSError`` or ``VeneerError``: the source cannot be read."""
        ...

    def resolve(self, name: str) -> Location:
        """One adapter. ``VeneerError``: there is none of that name."""
        ...


class FolderSource:
    """The adapter folders in a folder. ``resolve`` takes any relative path below it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)

    def list(self) -> dict[str, Location]:
        with os.scandir(self.folder) as entries:
            names = [entry for entry in entries if NAME.fullmatch(entry.name)]
            paths = {
                entry.name: resolve_within(self.folder, entry.name)
                if entry.is_symlink()
                else self.folder / entry.name
                for entry in names
            }
        return {
            name: self.locate(path)
            for name, path in paths.items()
            if path is not None and is_adapter(path)
        }

    def resolve(self, name: str) -> Location:
        path = resolve_within(self.folder, name)
        # a path outside of the folder is treated as absent
        if path is None or not is_adapter(path):
            problem = f"no adapter at {name[:200]!r} in the adapter folder"
            raise LibraryError(problem, f"a folder with {peft.CONFIG}", "check the path")
        return self.locate(path)

    def locate(self, path: Path) -> Location:
        """The location of a folder that may be overwritten: its version is the state of its
        files."""
        with suppress(OSError):
            states = [(path / file).stat() for file in (peft.CONFIG, peft.TENSORS)]
            return Location(path, tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in states))
        return Location(path)


class LibrarySource:
    """The names of a library. Its objects are never changed, so a changed adapter has another
    path."""

    def __init__(self, library: Library) -> None:
        self.library, self.address = library, str(library.folder)

    def list(self) -> dict[str, Location]:
        objects = self.library.folder / OBJECTS
        return {entry.name: Location(objects / entry.object) for entry in self.library.list()}

    def resolve(self, name: str) -> Location:
        return Location(self.library.get(name))

    def pull(self, name: str, version: str = "", *, cache: Path | None = None) -> Path:
        """Copy an adapter to the cache, where changes of the library do not affect it.
        ``LibraryError``: there is no such name, or it no longer has the hash ``version``."""
        path = self.library.pull(name, cache=cache)
        if version not in ("", path.name):
            problem = f"{name!r} of {self.address}, which is now {path.name}"
            do = "ask for what it is now, or give each of them a name of its own"
            raise LibraryError(problem, version, do)
        return path


class RemoteSource:
    """The adapters at a remote place, as folders of the cache. A place on the Hugging Face hub
    cannot be listed: each name there is a repository of its own."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._mirror: Mirror | None = None

    def list(self) -> dict[str, Location]:
        if self._mirror is None:
            self._mirror = Mirror(self.address)
        return {name: Location(path) for name, path in self._mirror.look().items()}

    def resolve(self, name: str) -> Location:
        return Location(self.pull(name))

    def pull(self, name: str, version: str = "", *, cache: Path | None = None) -> Path:
        """The folder in the cache. ``version``: the part after the "@" in the address that ``push``
        returned."""
        return pull(f"{self.address}/{name}", revision=version or None, cache=cache)


def open_source(address: str | Path) -> FolderSource | LibrarySource | RemoteSource:
    """The source at an address: a remote place, a library, or a folder of adapter folders.
    ``ConfigError``: there is no such folder."""
    if is_remote(str(address)):
        return RemoteSource(str(address))
    folder = Path(address).expanduser().resolve()
    if not folder.is_dir():
        problem = f"no adapter folder {folder}"
        raise ConfigError(problem, "a folder of adapters", "make it, or check")
    if (folder / INDEX).exists():
        return LibrarySource(Library(folder))
    return FolderSource(folder)


@dataclass(frozen=True)
class Changes:
    """The difference between two states of a source."""

    removed: Sequence[str]
    added: Mapping[str, Location]
    changed: Mapping[str, Location]


class Catalogue:
    """The adapters of a source that are in use, by name. One thread at a time may change it; any
    thread may ask for a name.

    ``refresh`` reports changes and applies none: its caller loads an adapter first, then calls
    ``accept``, ``reject`` or ``remove``.
    """

    def __init__(self, list_locations: Callable[[], Mapping[str, Location]]) -> None:
        self._list_locations = list_locations
        self._locations: dict[str, Location] = {}
        self._unsettled: dict[str, Location] = {}  # changed files, as of the last refresh
        self._rejected: dict[str, Location] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._locations))

    def resolve(self, name: str) -> Location | None:
        """The accepted location of a name."""
        return self._locations.get(name)

    def refresh(self) -> Changes:
        """Compare the source with the accepted locations. A folder that is overwritten in place
        counts as changed once two calls find the same files, because one call may find it half
        written. A rejected location is not reported again."""
        listing = self._list_locations()
        removed = sorted(self._locations.keys() - listing.keys())
        added, changed, unsettled = {}, {}, {}
        for name, location in listing.items():
            current = self._locations.get(name)
            if current is None:
                added[name] = location
            elif location not in (current, self._rejected.get(name)):
                unsettled[name] = location
                if location.path != current.path or self._unsettled.get(name) == location:
                    changed[name] = location
        self._unsettled = unsettled
        return Changes(removed, added, changed)

    def accept(self, name: str, location: Location) -> None:
        """Let the name mean this location from now on."""
        self._locations[name] = location

    def reject(self, name: str, location: Location) -> None:
        """Keep the current meaning of the name, because the files at ``location`` cannot be
        loaded."""
        self._rejected[name] = location

    def remove(self, name: str) -> None:
        del self._locations[name]


def name_adapters(adapters: Sequence[str]) -> dict[str, str]:
    """Parse texts NAME=ADAPTER into {name: adapter}. Without NAME, the last part of the path is the
    name. ``ConfigError``: two of them have the same name."""
    adapter_by_name: dict[str, str] = {}
    for text in adapters:
        name, equals, adapter = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            adapter, stem = text, Path(text.rpartition(":")[2]).name
            name = "".join(c if c.isalnum() or c in "_-" else "-" for c in stem) or "adapter"
        if name in adapter_by_name:
            problem = f"two adapters called {name!r} ({adapter_by_name[name]}, {adapter})"
            do = "name them, as in --adapter french=runs/french/adapter"
            raise ConfigError(problem, "a name of its own for each", do)
        adapter_by_name[name] = adapter
    return adapter_by_name


def resolve_within(folder: Path, relative_path: str) -> Path | None:
    """The path below ``folder`` with all links resolved; None if it does not exist or leads out of
    the folder."""
    try:
        path = (folder / relative_path).resolve(strict=True)
    # it does not exist, the name is too long, or links form a loop
    except (OSError, ValueError, RuntimeError):
        return None
    return path if path.is_relative_to(folder) and path != folder else None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter's configuration. A folder without read permission counts as
    holding none."""
    with suppress(OSError):
        return (path / peft.CONFIG).is_file()
    return False


log = logging.getLogger("veneer.store")

#: how many adapters to fetch at the same time
AT_ONCE = 8


class Mirror:
    """The adapters at a place such as s3://bucket/adapters, as folders of this machine. One thread
    at a time calls ``look``, which lists the place, fetches new adapters and returns
    {name: folder}.

        PLACE/french/latest        written by ``veneer push ADAPTER PLACE/french``: the newest hash
        PLACE/french/<hash>/…      its files
        PLACE/german/…             or only the files of an adapter, copied there by other means

    The folders are those of ``pull``'s cache: verified, named by their content and never changed,
    so that a changed adapter has another folder. Changes are detected by one listing; unchanged
    adapters are not read again.
    """

    def __init__(self, address: str, cache: Path | None = None) -> None:
        self._address, self._cache = parse_place(address, None), cache
        if self._address.kind != "store":
            expected = "a folder, or a place of fsspec such as s3://bucket/adapters"
            raise RemoteError(
                f"adapters at {address}", expected, "pull what you need into a folder"
            )
        self._folders: dict[str, Path] = {}
        self._stamps: dict[str, str] = {}  # stamps of the fetched adapters
        self._before: dict[str, str] | None = None  # stamps of the previous listing
        self._warnings: dict[str, str] = {}

    @property
    def address(self) -> str:
        return self._address.address

    def look(self) -> Mapping[str, Path]:
        """The adapters at the place now, fetched. If one cannot be fetched, a warning is logged and
        the previous version of its name stays.

        Raises:
            RemoteError: the place cannot be read.
        """
        with store_errors(self._address, "read"):
            system, root = file_system(self._address)
            files = system.find(root, detail=True)
        listing = list_stamps(root, files)
        for name in self._folders.keys() - listing.keys():
            del self._folders[name]
        # plain files count as complete once two listings show the same state
        stamps = {name: stamp for name, (stamp, _) in listing.items()}
        before = (
            stamps if self._before is None else self._before
        )  # the first listing has nothing to compare with
        new = [
            name
            for name, (stamp, pushed) in listing.items()
            if stamp != self._stamps.get(name) and (pushed or stamp == before.get(name))
        ]
        self._before = stamps
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="veneer-mirror") as pool:
            for name, done in zip(new, pool.map(self._fetch, new), strict=True):
                if isinstance(done, Path):
                    self._folders[name], self._stamps[name] = done, stamps[name]
                    self._warnings.pop(name, None)
                elif self._warnings.get(name) != str(done):  # the next call tries it again
                    self._warnings[name] = str(done)
                    log.warning("Not served: %s: %s", name, done)
        self._stamps = {name: stamp for name, stamp in self._stamps.items() if name in listing}
        return dict(self._folders)

    def _fetch(self, name: str) -> Path | Exception:
        try:
            return pull(f"{self.address}/{name}", cache=self._cache)
        except (VeneerError, OSError) as error:
            return error


def list_stamps(root: str, files: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, bool]]:
    """For each adapter of a listing, (a stamp that changes when the adapter does, whether it was
    pushed rather than copied as plain files). ``files``: fsspec's details of each file below
    ``root``, by path."""
    direct: dict[str, dict[str, str]] = {}
    for path, details in files.items():
        steps = PurePosixPath(path).relative_to(root).parts
        if len(steps) == 2 and NAME.fullmatch(steps[0]):
            direct.setdefault(steps[0], {})[steps[1]] = repr(
                sorted((key, repr(details[key])) for key in details)
            )
    adapters = {}
    for name, files_of_name in sorted(direct.items()):
        if LATEST in files_of_name:
            adapters[name] = files_of_name[LATEST], True
        elif peft.CONFIG in files_of_name and peft.TENSORS in files_of_name:
            adapters[name] = repr(sorted(files_of_name.items())), False
    return adapters
