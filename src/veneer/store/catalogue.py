"""A catalogue of adapters by name, and the sources that it lists: a folder, a library or a remote
place.

    FolderSource(DIR)        the adapter in the folder DIR/french has the name "french"
    LibrarySource(library)   each adapter has its name in the library
    RemoteSource(PLACE)      the adapter at PLACE/french has the name "french"; it is pulled into
                             the cache

    source.list()            {name: Location} at this moment; ``OSError`` or ``VeneerError`` if the
                             source cannot be read
    source.resolve(name)     the Location of one name; ``VeneerError`` if there is no such adapter
    source.address           identifies the source in messages
    Catalogue.refresh()      how the source differs from the adapters that the caller has accepted

The server, the resolver for vLLM and `veneer chat` find adapters here. A catalogue only knows the
folder of each adapter; the server's ``Bank`` loads adapters and knows which are in memory.
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

from veneer.adapter_files.file_names import CORE_FILES
from veneer.errors import ConfigError, LibraryError, RemoteError, VeneerError
from veneer.formats import peft
from veneer.store.library import INDEX, NAME, OBJECTS, Library
from veneer.store.remote import (
    LATEST_FILE,
    file_system,
    is_remote,
    parse_address,
    pull,
    store_errors,
)


class Location(NamedTuple):
    """The folder of an adapter. ``version`` differs if the files in the folder have changed; it is
    () for a folder whose files never change."""

    path: Path
    version: Hashable = ()


class FolderSource:
    """The adapters in the subfolders of ``folder``, an absolute path without symbolic links.
    ``list`` finds only direct subfolders; ``resolve`` takes any relative path below ``folder``."""

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
        # report a path outside of the folder like one that does not exist, so that a client cannot
        # find out which paths exist
        if path is None or not is_adapter(path):
            raise LibraryError(
                f"no adapter at {name[:200]!r} in the adapter folder",
                f"a folder with {peft.CONFIG}",
                "check the path",
            )
        return self.locate(path)

    def locate(self, path: Path) -> Location:
        """The location of an adapter folder whose files may be overwritten. Its version consists of
        the inode, modification time and size of each file; it is () if a file cannot be read."""
        with suppress(OSError):
            file_paths = [path / file_name for file_name in CORE_FILES]
            file_stats = [file_path.stat() for file_path in file_paths if file_path.exists()]
            return Location(
                path, tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in file_stats)
            )
        return Location(path)


class LibrarySource:
    """The adapters of a library. A library never changes the files in an adapter's folder: if a
    name is given to another adapter, its folder changes. So a location needs no version."""

    def __init__(self, library: Library) -> None:
        self.library, self.address = library, str(library.folder)

    def list(self) -> dict[str, Location]:
        objects_folder = self.library.folder / OBJECTS
        return {
            entry.name: Location(objects_folder / entry.object) for entry in self.library.list()
        }

    def resolve(self, name: str) -> Location:
        return Location(self.library.get(name))

    def pull(self, name: str, version: str = "", *, cache: Path | None = None) -> Path:
        """Copy an adapter to the cache, where changes of the library do not affect it, and return
        its folder there. ``version``: the hash that the adapter's files must have; "" accepts any.
        Raises ``LibraryError`` if the library has no such name, or its adapter has another hash."""
        path = self.library.pull(name, cache=cache)
        if version not in ("", path.name):
            raise LibraryError(
                f"{name!r} of {self.address}, which is now {path.name}",
                version,
                "ask for what it is now, or give each of them a name of its own",
            )
        return path


class RemoteSource:
    """The adapters at a remote place, which are fetched into the cache. ``list`` raises
    ``RemoteError`` for a place on the Hugging Face hub: each adapter there is a repository of its
    own, so there is no folder to list."""

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
        """Fetch an adapter and return its folder in the cache. ``version``: the revision, which is
        the part behind the "@" in the address that ``push`` returned; "" takes the newest."""
        return pull(f"{self.address}/{name}", revision=version or None, cache=cache)


def open_source(address: str | Path) -> FolderSource | LibrarySource | RemoteSource:
    """The source for an address, which is a remote place, the folder of a library, or a folder of
    adapter folders. Raises ``ConfigError`` if it is a local path at which there is no folder."""
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
    """How a source differs from the locations that a ``Catalogue`` has accepted. ``removed``: names
    that the source no longer has; ``added``: names without an accepted location; ``changed``: names
    with another location than the accepted one."""

    removed: Sequence[str]
    added: Mapping[str, Location]
    changed: Mapping[str, Location]


class Catalogue:
    """The adapters that the caller has accepted from a source, by name. One thread at a time may
    change the catalogue; any thread may look up a name.

    ``refresh`` reports how the source differs and changes no accepted adapter. The caller then
    tries to load a new or changed adapter, and calls ``accept`` or ``reject``; for a removed one,
    it calls ``remove``.

    Args:
        list_locations: returns the locations that the source has now, by name.
    """

    def __init__(self, list_locations: Callable[[], Mapping[str, Location]]) -> None:
        self._list_locations = list_locations
        self._locations: dict[str, Location] = {}
        # by name, the locations in the last ``refresh`` that differed from the accepted ones
        self._previous_candidates: dict[str, Location] = {}
        self._rejected: dict[str, Location] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._locations))

    def resolve(self, name: str) -> Location | None:
        """The accepted location of a name; None if there is none."""
        return self._locations.get(name)

    def refresh(self) -> Changes:
        """Compare the source with the accepted locations. If the files in an accepted folder have
        changed, they may be half written, so the adapter is reported as changed only when two calls
        in a row find the same version. A changed location that was rejected is not reported again.
        Raises what ``list_locations`` raises."""
        locations = self._list_locations()
        removed = sorted(self._locations.keys() - locations.keys())
        added, changed, candidates = {}, {}, {}
        for name, location in locations.items():
            accepted = self._locations.get(name)
            if accepted is None:
                added[name] = location
            elif location not in (accepted, self._rejected.get(name)):
                candidates[name] = location
                if (
                    location.path != accepted.path
                    or self._previous_candidates.get(name) == location
                ):
                    changed[name] = location
        self._previous_candidates = candidates
        return Changes(removed, added, changed)

    def accept(self, name: str, location: Location) -> None:
        """Let ``location`` be the location of the name from now on."""
        self._locations[name] = location

    def reject(self, name: str, location: Location) -> None:
        """Record that the files at ``location`` cannot be loaded. The name keeps the location that
        was accepted before, if any."""
        self._rejected[name] = location

    def remove(self, name: str) -> None:
        """Forget the accepted location of a name. Raises ``KeyError`` if there is none."""
        del self._locations[name]


def name_adapters(arguments: Sequence[str]) -> dict[str, str]:
    """Parse arguments of the form NAME=ADAPTER or ADAPTER into {name: adapter}, where ADAPTER is a
    path or an address. Without NAME, the name is the last part of the path, in which each character
    other than a letter, a digit, "_" or "-" is replaced by "-". An existing path, or a text with
    "/" before its "=", is an ADAPTER. Raises ``ConfigError`` if two adapters have the same name."""
    adapter_by_name: dict[str, str] = {}
    for argument in arguments:
        name, equals_sign, adapter = argument.partition("=")
        if not equals_sign or "/" in name or Path(argument).exists():
            adapter, last_part = argument, Path(argument.rpartition(":")[2]).name
            name = "".join(c if c.isalnum() or c in "_-" else "-" for c in last_part) or "adapter"
        if name in adapter_by_name:
            raise ConfigError(
                f"two adapters called {name!r} ({adapter_by_name[name]}, {adapter})",
                "a name of its own for each",
                "name them, as in --adapter french=runs/french/adapter",
            )
        adapter_by_name[name] = adapter
    return adapter_by_name


def resolve_within(folder: Path, relative_path: str) -> Path | None:
    """``folder / relative_path`` with all symbolic links resolved; None if it does not exist or is
    not below ``folder``, which must be an absolute path without symbolic links."""
    try:
        path = (folder / relative_path).resolve(strict=True)
    # the path does not exist, a name in it is invalid or too long, or links form a loop
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

#: the most adapters that a ``Mirror`` fetches at the same time
MAX_PARALLEL_FETCHES = 8


class Mirror:
    """A local copy of the adapters at a remote place such as s3://bucket/adapters. ``sync`` lists
    the place, fetches new and changed adapters and returns {name: folder}. Only one thread at a
    time may call it.

        PLACE/french/latest        written by ``veneer push ADAPTER PLACE/french``: the newest hash
        PLACE/french/<hash>/…      the files of that hash
        PLACE/german/…             or the files of an adapter alone, copied there without push

    The folders belong to the cache of ``pull``. They are verified, named by the hash of their files
    and never changed, so a changed adapter gets another folder. Changes are detected in a listing
    of the place (``list_stamps``), so the files of unchanged adapters are not read again.

    Args:
        address: the address of a place in a file system of fsspec.
        cache: the folder of the cache; None takes the default of ``pull``.

    Raises:
        RemoteError: the address is a local path, or on the Hugging Face hub.
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
        #: for each adapter's name, the stamp that it had when it was fetched. (A stamp is a text
        #: that changes whenever the files at the place change.)
        self._fetched_stamps: dict[str, str] = {}
        #: for each adapter's name, its stamp in the previous listing; None before the first listing
        self._previous_stamps: dict[str, str] | None = None
        self._logged_warnings: dict[str, str] = {}  # the last warning, by adapter name

    @property
    def address(self) -> str:
        return self._address.url

    def sync(self) -> Mapping[str, Path]:
        """Fetch the adapters that are new or changed at the place. Return the folders of all
        adapters, by name. If an adapter cannot be fetched, a warning is logged, and its previous
        folder, if any, stays.

        Raises:
            RemoteError: the place cannot be read.
        """
        with store_errors(self._address, "read"):
            listing = self._list_place()
        for name in self._folders.keys() - listing.keys():
            del self._folders[name]
        # an adapter that was copied without push may still be incomplete, so fetch it only when two
        # listings in a row show the same stamp; but in the first listing, fetch it at once, so that
        # a server starts with all adapters
        stamps = {name: stamp for name, (stamp, _) in listing.items()}
        previous_stamps = stamps if self._previous_stamps is None else self._previous_stamps
        names_to_fetch = [
            name
            for name, (stamp, is_pushed) in listing.items()
            if stamp != self._fetched_stamps.get(name)
            and (is_pushed or stamp == previous_stamps.get(name))
        ]
        self._previous_stamps = stamps
        with ThreadPoolExecutor(MAX_PARALLEL_FETCHES, thread_name_prefix="veneer-mirror") as pool:
            for name, folder_or_error in zip(
                names_to_fetch, pool.map(self._fetch, names_to_fetch), strict=True
            ):
                if isinstance(folder_or_error, Path):
                    self._folders[name], self._fetched_stamps[name] = folder_or_error, stamps[name]
                    self._logged_warnings.pop(name, None)
                # log an error only if it is a new one; the next call tries again
                elif self._logged_warnings.get(name) != str(folder_or_error):
                    self._logged_warnings[name] = str(folder_or_error)
                    log.warning("Not served: %s: %s", name, folder_or_error)
        self._fetched_stamps = {
            name: stamp for name, stamp in self._fetched_stamps.items() if name in listing
        }
        return dict(self._folders)

    def _list_place(self) -> dict[str, tuple[str, bool]]:
        """{name: (stamp, whether it was pushed)} of the adapters at the place (``list_stamps``).
        ``find`` of fsspec leaves out folders that it cannot read. So that these do not count as
        removed, folders of known adapters that it does not list are listed once more by ``ls``,
        which raises the error."""
        filesystem, root_path = file_system(self._address)
        details_by_path = filesystem.find(root_path, detail=True)
        stamps = list_stamps(root_path, details_by_path)
        missing_names = self._folders.keys() - stamps.keys()
        folders_to_list = [
            *(() if details_by_path else (root_path,)),
            *(f"{root_path}/{name}" for name in missing_names),
        ]
        for folder in folders_to_list:
            try:
                entries = filesystem.ls(folder, detail=True)
            except FileNotFoundError:
                # a local place without its folder may be an unmounted disk, so keep its adapters;
                # an object store has no empty folders, so there the adapters are gone
                if (
                    folder == root_path
                    and self._folders
                    and getattr(filesystem, "local_file", False)
                ):
                    raise
                continue
            details_by_path |= {
                entry["name"]: entry for entry in entries if entry["type"] != "directory"
            }
        return list_stamps(root_path, details_by_path) if folders_to_list else stamps

    def _fetch(self, name: str) -> Path | Exception:
        """The folder of an adapter in the cache, or the error that prevents fetching it."""
        try:
            return pull(f"{self.address}/{name}", cache=self._cache)
        except (VeneerError, OSError) as error:
            return error


def list_stamps(
    root_path: str, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, bool]]:
    """Find the adapters in a listing of the files below a folder. Return {name: (stamp,
    is_pushed)}: a text that changes whenever the adapter's files change, and whether the adapter
    was written by ``push`` rather than copied there as files.

    Args:
        root_path: the path of the folder.
        files: fsspec's details (size, modification time, …) of each file, by path.
    """
    files_by_adapter: dict[str, dict[str, str]] = {}
    for path, file_details in files.items():
        components = PurePosixPath(path).relative_to(root_path).parts
        if len(components) == 2 and NAME.fullmatch(components[0]):
            files_by_adapter.setdefault(components[0], {})[components[1]] = repr(
                sorted((key, repr(file_details[key])) for key in file_details)
            )
    stamps = {}
    for name, file_stamps in sorted(files_by_adapter.items()):
        if LATEST_FILE in file_stamps:
            stamps[name] = file_stamps[LATEST_FILE], True
        elif peft.CONFIG in file_stamps and peft.TENSORS in file_stamps:
            stamps[name] = repr(sorted(file_stamps.items())), False
    return stamps
