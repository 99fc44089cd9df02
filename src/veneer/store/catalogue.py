"""A catalogue of adapters by name, and the sources that it lists: a folder, a library or a remote
place.

    FolderSource(DIR)        DIR/french/adapter_config.json is the adapter "french"
    LibrarySource(library)   the names of a library
    RemoteSource(PLACE)      PLACE/french, pulled into the cache

    source.list()            {name: Location} at this moment; ``OSError`` or ``VeneerError`` if the
                             source cannot be read
    source.resolve(name)     the Location of one name; ``VeneerError`` if there is no such adapter
    source.address           identifies the source in messages
    Catalogue.refresh()      names that were added, removed or changed since the last call

The server, the resolver for vLLM and `veneer chat` find adapters here. A catalogue knows the folder
of each name. The ``Bank`` knows which adapters are in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from veneer.errors import ConfigError, LibraryError, RemoteError, VeneerError
from veneer.formats import peft
from veneer.store.library import INDEX, NAME, OBJECTS, Library
from veneer.store.remote import LATEST, file_system, is_remote, parse_address, pull, store_errors


class Location(NamedTuple):
    """The folder of an adapter. ``version`` changes when the files in the folder change; it is ()
    for a folder whose files never change."""

    path: Path
    version: Hashable = ()


class FolderSource:
    """The adapters in the subfolders of a folder. ``resolve`` takes any relative path below the
    folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)

    def list(self) -> dict[str, Location]:
        with os.scandir(self.folder) as entries:
            paths = {
                entry.name: resolve_within(self.folder, entry.name)
                if entry.is_symlink()
                else self.folder / entry.name
                for entry in entries
                if NAME.fullmatch(entry.name)
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
            raise LibraryError(
                f"no adapter at {name[:200]!r} in the adapter folder",
                f"a folder with {peft.CONFIG}",
                "check the path",
            )
        return self.locate(path)

    def locate(self, path: Path) -> Location:
        """The location of a folder that may be overwritten. Its version is made of the inodes,
        modification times and sizes of its files."""
        with suppress(OSError):
            stats = [(path / file).stat() for file in (peft.CONFIG, peft.TENSORS)]
            return Location(path, tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in stats))
        return Location(path)


class LibrarySource:
    """The adapters of a library. A library never changes the files of an adapter, so if a name gets
    another adapter, its path changes."""

    def __init__(self, library: Library) -> None:
        self.library, self.address = library, str(library.folder)

    def list(self) -> dict[str, Location]:
        objects = self.library.folder / OBJECTS
        return {entry.name: Location(objects / entry.object) for entry in self.library.list()}

    def resolve(self, name: str) -> Location:
        return Location(self.library.get(name))

    def pull(self, name: str, version: str = "", *, cache: Path | None = None) -> Path:
        """Copy an adapter to the cache, where changes of the library do not affect it.
        ``LibraryError``: there is no such name, or its adapter's hash is no longer ``version``."""
        path = self.library.pull(name, cache=cache)
        if version not in ("", path.name):
            raise LibraryError(
                f"{name!r} of {self.address}, which is now {path.name}",
                version,
                "ask for what it is now, or give each of them a name of its own",
            )
        return path


class RemoteSource:
    """The adapters at a remote place, fetched into the cache. A place on the Hugging Face hub
    cannot be listed, because each adapter there is a repository."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._mirror: Mirror | None = None

    def list(self) -> dict[str, Location]:
        if self._mirror is None:
            self._mirror = Mirror(self.address)
        return {name: Location(path) for name, path in self._mirror.sync().items()}

    def resolve(self, name: str) -> Location:
        return Location(self.pull(name))

    def pull(self, name: str, version: str = "", *, cache: Path | None = None) -> Path:
        """The adapter's folder in the cache. ``version``: the part behind the "@" in the address
        that ``push`` returned."""
        return pull(f"{self.address}/{name}", revision=version or None, cache=cache)


def open_source(address: str | Path) -> FolderSource | LibrarySource | RemoteSource:
    """The source at an address: a remote place, a library, or a folder of adapter folders.
    ``ConfigError``: the address is a local path without a folder."""
    if is_remote(str(address)):
        return RemoteSource(str(address))
    folder = Path(address).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"no adapter folder {folder}", "a folder of adapters", "make it, or check"
        )
    if (folder / INDEX).exists():
        return LibrarySource(Library(folder))
    return FolderSource(folder)


@dataclass(frozen=True)
class Changes:
    """The differences between a source and the accepted locations, by the name of the adapter."""

    removed: Sequence[str]
    added: Mapping[str, Location]
    changed: Mapping[str, Location]


class Catalogue:
    """The accepted adapters of a source, by name. One thread at a time may change the catalogue;
    any thread may ask for a name.

    ``refresh`` reports changes of the source and applies none. Its caller tries to load a new or
    changed adapter, then calls ``accept`` or ``reject``; for a removed one, it calls ``remove``.
    """

    def __init__(self, list_locations: Callable[[], Mapping[str, Location]]) -> None:
        self._list_locations = list_locations
        self._locations: dict[str, Location] = {}
        self._unconfirmed: dict[str, Location] = {}  # changed since the previous ``refresh``
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
        """Compare the source with the accepted locations. If the files in a folder change, the
        adapter is reported as changed only when two calls in a row find the same files, because one
        call may find files that are half written. A rejected location is not reported as changed
        again."""
        locations = self._list_locations()
        removed = sorted(self._locations.keys() - locations.keys())
        added, changed, unconfirmed = {}, {}, {}
        for name, location in locations.items():
            current = self._locations.get(name)
            if current is None:
                added[name] = location
            elif location not in (current, self._rejected.get(name)):
                unconfirmed[name] = location
                if location.path != current.path or self._unconfirmed.get(name) == location:
                    changed[name] = location
        self._unconfirmed = unconfirmed
        return Changes(removed, added, changed)

    def accept(self, name: str, location: Location) -> None:
        """Let the name stand for this location from now on."""
        self._locations[name] = location

    def reject(self, name: str, location: Location) -> None:
        """Keep the accepted location of the name, because the files at ``location`` cannot be
        loaded."""
        self._rejected[name] = location

    def remove(self, name: str) -> None:
        del self._locations[name]


def name_adapters(adapters: Sequence[str]) -> dict[str, str]:
    """Parse texts NAME=ADAPTER or ADAPTER into {name: adapter}. Without NAME, the name is the last
    part of the path, in which characters other than letters, digits, "_" and "-" become "-".
    ``ConfigError``: two adapters have the same name."""
    adapter_by_name: dict[str, str] = {}
    for text in adapters:
        name, separator, adapter = text.partition("=")
        if not separator or "/" in name or Path(text).exists():
            adapter, stem = text, Path(text.rpartition(":")[2]).name
            name = "".join(c if c.isalnum() or c in "_-" else "-" for c in stem) or "adapter"
        if name in adapter_by_name:
            raise ConfigError(
                f"two adapters called {name!r} ({adapter_by_name[name]}, {adapter})",
                "a name of its own for each",
                "name them, as in --adapter french=runs/french/adapter",
            )
        adapter_by_name[name] = adapter
    return adapter_by_name


def resolve_within(folder: Path, relative_path: str) -> Path | None:
    """The path below ``folder`` with all symbolic links resolved; None if it does not exist or
    leads out of ``folder``."""
    try:
        path = (folder / relative_path).resolve(strict=True)
    # the path does not exist, the name is too long, or links form a loop
    except (OSError, ValueError, RuntimeError):
        return None
    return path if path.is_relative_to(folder) and path != folder else None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds the configuration of an adapter. False for a folder that this process
    may not read."""
    with suppress(OSError):
        return (path / peft.CONFIG).is_file()
    return False


log = logging.getLogger("veneer.store")

#: the most adapters to fetch at the same time
MAX_FETCHES = 8


class Mirror:
    """The adapters at a remote place such as s3://bucket/adapters, fetched into local folders. One
    thread at a time calls ``sync``, which lists the place, fetches new adapters and returns
    {name: folder}.

        PLACE/french/latest        written by ``veneer push ADAPTER PLACE/french``: the newest hash
        PLACE/french/<hash>/…      the files of that hash
        PLACE/german/…             or the files of an adapter alone, copied there without push

    The folders belong to the cache of ``pull``. They are verified, named by the hash of their files
    and never changed, so a changed adapter gets another folder. Changes are detected by listing the
    place; unchanged adapters are not read again.
    """

    def __init__(self, address: str, cache: Path | None = None) -> None:
        self._address, self._cache = parse_address(address, None), cache
        if self._address.kind != "store":
            raise RemoteError(
                f"adapters at {address}",
                "a folder, or a place of fsspec such as s3://bucket/adapters",
                "pull what you need into a folder",
            )
        self._folders: dict[str, Path] = {}
        #: by name, the stamp (``list_stamps``) that an adapter had when it was fetched
        self._fetched_stamps: dict[str, str] = {}
        self._previous_stamps: dict[str, str] | None = None  # stamps in the previous listing
        self._warnings: dict[str, str] = {}

    @property
    def address(self) -> str:
        return self._address.url

    def sync(self) -> Mapping[str, Path]:
        """Fetch the adapters that are new or changed at the place, and return the folders of all by
        name. If one cannot be fetched, a warning is logged, and its previous folder stays.

        Raises:
            RemoteError: the place cannot be read.
        """
        with store_errors(self._address, "read"):
            listing = self._list_place()
        for name in self._folders.keys() - listing.keys():
            del self._folders[name]
        # files that were copied without push count as complete if two listings in a row show the
        # same stamp; in the first listing, all files count as complete
        stamps = {name: stamp for name, (stamp, _) in listing.items()}
        previous = stamps if self._previous_stamps is None else self._previous_stamps
        new_names = [
            name
            for name, (stamp, is_pushed) in listing.items()
            if stamp != self._fetched_stamps.get(name)
            and (is_pushed or stamp == previous.get(name))
        ]
        self._previous_stamps = stamps
        with ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="veneer-mirror") as pool:
            for name, folder_or_error in zip(
                new_names, pool.map(self._fetch, new_names), strict=True
            ):
                if isinstance(folder_or_error, Path):
                    self._folders[name], self._fetched_stamps[name] = folder_or_error, stamps[name]
                    self._warnings.pop(name, None)
                # log each error once; the next call tries again
                elif self._warnings.get(name) != str(folder_or_error):
                    self._warnings[name] = str(folder_or_error)
                    log.warning("Not served: %s: %s", name, folder_or_error)
        self._fetched_stamps = {
            name: stamp for name, stamp in self._fetched_stamps.items() if name in listing
        }
        return dict(self._folders)

    def _list_place(self) -> dict[str, tuple[str, bool]]:
        """``list_stamps`` of the place. Because ``find`` of fsspec leaves out folders that it
        cannot read, folders that seem to be gone are listed once more by ``ls``, which raises the
        error."""
        system, root = file_system(self._address)
        files = system.find(root, detail=True)
        stamps = list_stamps(root, files)
        missing_names = self._folders.keys() - stamps.keys()
        folders = [*(() if files else (root,)), *(f"{root}/{name}" for name in missing_names)]
        for folder in folders:
            try:
                entries = system.ls(folder, detail=True)
            except FileNotFoundError:
                # the disk of a local place may be unmounted; an object store has no empty folders
                if folder == root and self._folders and getattr(system, "local_file", False):
                    raise
                continue
            files |= {entry["name"]: entry for entry in entries if entry["type"] != "directory"}
        return list_stamps(root, files) if folders else stamps

    def _fetch(self, name: str) -> Path | Exception:
        try:
            return pull(f"{self.address}/{name}", cache=self._cache)
        except (VeneerError, OSError) as error:
            return error


def list_stamps(root: str, files: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, bool]]:
    """For each adapter of a listing: (a stamp, which changes when the adapter changes; whether the
    adapter was pushed, rather than copied as files). ``files``: fsspec's details of each file below
    ``root``, by path."""
    files_by_adapter: dict[str, dict[str, str]] = {}
    for path, details in files.items():
        components = PurePosixPath(path).relative_to(root).parts
        if len(components) == 2 and NAME.fullmatch(components[0]):
            files_by_adapter.setdefault(components[0], {})[components[1]] = repr(
                sorted((key, repr(details[key])) for key in details)
            )
    adapters = {}
    for name, files_of_name in sorted(files_by_adapter.items()):
        if LATEST in files_of_name:
            adapters[name] = files_of_name[LATEST], True
        elif peft.CONFIG in files_of_name and peft.TENSORS in files_of_name:
            adapters[name] = repr(sorted(files_of_name.items())), False
    return adapters
