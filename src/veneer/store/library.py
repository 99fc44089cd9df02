"""A library: a folder of adapters by name, which several processes may read and write at once.

    index.json              {"format": 1, "names": {name: {object, tags, added, size, base, variant,
                            rank}}}
    index.copy.json         a copy, in case the index is damaged
    objects/<hash>/         an adapter folder, named by the hash of its files; never changed
    lock                    held by a process while it changes the library (filelock)

Each entry of the index gives a name to an object: an adapter folder under the hash of its files. A
change takes the lock, reads the index, moves a complete object into place, and replaces the index
by a rename. So after a crash, the index is the old one or the new one, and all its objects are
complete. Readers take no lock.

A writer holds the lock during its whole change. So a process that holds the lock knows that any
temporary folder in objects/ was left by a writer that died. (A temporary folder beside objects/ may
belong to a running server, which writes its served.json there without this lock.) ``gc`` deletes an
object after a grace period without a name, which begins when its last name is removed (``remove``
sets the folder's modification time). A path from ``get`` stays valid for at least this period.
Windows is not supported, because renames of folders must be atomic.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer.adapter_files.file_names import (
    FILES,
    adapter_file_names,
    content_hash,
    copy_files,
    has_content,
)
from veneer.adapter_files.folder import read
from veneer.errors import (
    AdapterError,
    LibraryError,
    OutputExistsError,
    listing,
    nearest,
    raise_all,
    sentence,
)
from veneer.fileio.atomic import EVERYTHING, new_folder, write_whole
from veneer.fileio.temporary import recover_all, remove
from veneer.models.gguf_conversion import cache_dir
from veneer.store.remote import ensure_cached, is_remote, pull

__all__ = ["Collected", "Entry", "Library", "Rebuilt", "default_folder", "resolve"]

#: names of the files and folders of a library (see the top of this file)
INDEX, COPY, LOCK, OBJECTS = "index.json", "index.copy.json", "lock", "objects"
FORMAT = 1
#: seconds for which an object without a name is kept, the grace period
GRACE_SECONDS = 3600.0
#: the beginning of the address of an adapter in the default library
SCHEME = "library:"
#: the pattern of adapter names, in a library and on a server
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")
#: errors of ``_parse`` for a missing or damaged index
_READ_ERRORS = (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Entry:
    """One name of a library, and the adapter that it stands for.

    Fields:
        object: the hash of the adapter's files.
        added: when the adapter was added, as text in UTC.
        size: bytes of its files.
        base: the name of its base, as the adapter records it, or None.
    """

    name: str
    object: str
    tags: tuple[str, ...]
    added: str
    size: int
    base: str | None
    variant: str
    rank: int


@dataclass(frozen=True)
class Collected:
    """The result of ``gc``. ``objects``: hashes of the deleted objects; ``leftovers``: how many
    temporary folders of writers that died were deleted; ``freed``: bytes of all deleted files."""

    objects: tuple[str, ...]
    leftovers: int
    freed: int


@dataclass(frozen=True)
class Rebuilt:
    """The result of ``rebuild``. ``kept``: names that are still in the index; ``recovered``: new
    names, of objects that had none; ``lost``: removed names, and hashes of unreadable objects."""

    kept: tuple[str, ...]
    recovered: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, init=False)
class Library:
    """The adapters in a folder, which the first ``add`` creates. Readers take no lock; one writer
    at a time changes the library."""

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        object.__setattr__(self, "folder", Path(folder).expanduser())

    def entry(self, name: str) -> Entry:
        """The entry of a name. ``LibraryError``: there is no such name."""
        return self._entry_of(self._read_entries(), name)

    def get(self, name: str) -> Path:
        """The adapter folder of a name. Do not change its files, which belong to the library. They
        stay for at least the grace period after the name is removed."""
        path = self._object_folder(self.entry(name).object)
        if not path.is_dir():
            raise LibraryError(
                f"no folder {path}, which {name!r} stands for",
                "it there",
                f"run {self._rebuild_command()}, or add it again",
            )
        return path

    def pull(self, name: str, *, cache: Path | None = None) -> Path:
        """Copy an adapter to the cache and verify it by its hash, for readers that need it after
        the library may have deleted it. Do not change the copy: later calls return it again.

        Args:
            cache: the folder of the cache, as in ``store.remote.pull``.

        Raises:
            AdapterError: the files differ from those that were added. The cache is unchanged.
            LibraryError: no such name.
        """
        source = self.get(name)
        target = (cache or cache_dir() / "adapters") / "library" / source.name
        return ensure_cached(
            target, str(source), lambda folder: copy_files(source, folder), source.name
        )

    def list(self, *, tag: str | None = None, base: str | None = None) -> tuple[Entry, ...]:
        """The entries, sorted by name. ``tag``: list only entries with this tag; ``base``: list
        only entries with this ``Entry.base``."""
        return tuple(
            entry
            for _, entry in sorted(self._read_entries().items())
            if (tag is None or tag in entry.tags) and (base is None or base == entry.base)
        )

    def add(
        self, path: str | Path, name: str, *, tags: Iterable[str] = (), overwrite: bool = False
    ) -> Entry:
        """Verify an adapter folder, and copy it into the library under a name.

        Only files that belong to an adapter are copied. ``overwrite`` replaces the adapter of the
        name, and its tags too, because they need not apply to the new adapter.

        Raises:
            AdapterError: the folder is no intact adapter.
            OutputExistsError: the name is taken and ``overwrite`` is False.
            LibraryError: an invalid name or tag, or a damaged index.
        """
        path, tags = Path(path), tuple(dict.fromkeys(tags))
        _check_names(name, tags)
        object_hash = content_hash(path)
        entry = _read_entry(path, name, object_hash, tags)  # reads and verifies the folder
        with self._edit_entries(create=True) as entries:
            if name in entries and not overwrite:
                raise OutputExistsError(
                    f"an adapter {name!r} in {self.folder}",
                    "a new name",
                    "choose another, or allow overwriting",
                )
            self._store_object(path, object_hash)
            if name in entries:
                self._restart_grace_period(entries[name].object)
            entries[name] = entry
        return entry

    def remove(self, name: str) -> Entry:
        """Remove a name from the library, and return its entry. ``gc`` deletes the adapter's files
        later, unless another name stands for them."""
        with self._edit_entries() as entries:
            entry = self._entry_of(entries, name)
            self._restart_grace_period(entry.object)
            del entries[name]
        return entry

    def tag(self, name: str, *tags: str, remove: Iterable[str] = ()) -> Entry:
        """Add the given tags to a name, remove the tags ``remove``, and return the new entry.

        Raises:
            LibraryError: no such name, an invalid tag, or a tag to remove that the name does not
                have.
        """
        remove = tuple(remove)
        if not tags and not remove:
            raise LibraryError("no tag to add or remove", "at least one", "name it")
        _check_names(name, (*tags, *remove))
        with self._edit_entries() as entries:
            entry = self._entry_of(entries, name)
            if absent := [tag for tag in remove if tag not in entry.tags]:
                absent_tags = listing(map(repr, absent))
                raise LibraryError(
                    f"no tag {absent_tags} at {name!r}, which has {listing(entry.tags)}",
                    "tags that it has",
                    "check the spelling",
                )
            remaining = tuple(
                tag for tag in dict.fromkeys((*entry.tags, *tags)) if tag not in remove
            )
            entries[name] = replace(entry, tags=remaining)
        return entries[name]

    def gc(self, *, grace: float = GRACE_SECONDS) -> Collected:
        """Delete the objects that have had no name for ``grace`` seconds, and the temporary folders
        of killed writers."""
        with self._hold_lock():
            # this raises for a damaged index, so that nothing is deleted
            used_hashes = {entry.object for entry in self._read_entries().values()}
            objects = self.folder / OBJECTS
            leftovers = [
                *self.folder.glob(".*.tmp"),
                *objects.glob(".*.tmp"),
                *objects.glob(".*.replaced"),
            ]
            sizes = {path: _size(path) for path in leftovers}
            # leftovers first, because they may hold files of a partly deleted object; ``sweep``
            # keeps the temporary folders of running processes
            recover_all(self.folder)
            recover_all(objects)
            for path in leftovers:
                if path.parent == objects or not path.is_dir():
                    remove(path)
            deleted = [path for path in leftovers if not os.path.lexists(path)]
            freed = sum(sizes[path] for path in deleted)
            unused = [
                path for path in sorted(self._object_folders()) if path.name not in used_hashes
            ]
            expired = [path for path in unused if time.time() - path.stat().st_mtime >= grace]
            for path in expired:
                renamed = path.with_name(f".{path.name}.tmp")
                # rename first: an incomplete object must never have the name of its hash
                path.rename(renamed)
                freed += _size(renamed)
                remove(renamed)
        return Collected(tuple(path.name for path in expired), len(deleted), freed)

    def rebuild(self) -> Rebuilt:
        """Rebuild a damaged index from its copy and from the objects, which are verified.

        If the index can be read, names whose object is missing or altered are removed from it.
        Otherwise the copy is used, which lacks at most one change. Objects that the copy does not
        list get the name "recovered-…" and the tag "recovered". Files of removed names stay for the
        grace period.
        """
        with self._hold_lock():
            entries, index_is_readable = self._read_index_or_copy()
            intact_hashes = {
                path.name for path in self._object_folders() if has_content(path, path.name)
            }
            intact_entries = {
                name: entry for name, entry in entries.items() if entry.object in intact_hashes
            }
            lost, recovered = sorted(entries.keys() - intact_entries.keys()), {}
            unlisted_hashes = intact_hashes - {entry.object for entry in intact_entries.values()}
            for object_hash in () if index_is_readable else sorted(unlisted_hashes):
                name = (
                    f"recovered-{object_hash[:12]}"
                    if f"recovered-{object_hash[:12]}" not in intact_entries
                    else f"recovered-{object_hash}"
                )
                try:
                    recovered[name] = _read_entry(
                        self._object_folder(object_hash), name, object_hash, ("recovered",)
                    )
                # this installation may lack the adapter's variant, so keep the files for a while
                except AdapterError:
                    lost.append(object_hash)
            rebuilt_entries = {**intact_entries, **recovered}
            unnamed_hashes = (
                {path.name for path in self._object_folders()}
                if not index_is_readable
                else {entries[name].object for name in lost}
            )
            for object_hash in unnamed_hashes - {
                entry.object for entry in rebuilt_entries.values()
            }:
                self._restart_grace_period(object_hash)  # the user may need the files
            self._write_entries(rebuilt_entries)
        return Rebuilt(tuple(sorted(intact_entries)), tuple(recovered), tuple(lost))

    def _object_folder(self, object_hash: str) -> Path:
        return self.folder / OBJECTS / object_hash

    def _object_folders(self) -> list[Path]:
        folder = self.folder / OBJECTS
        return (
            [path for path in folder.iterdir() if _HASH.fullmatch(path.name)]
            if folder.is_dir()
            else []
        )

    def _store_object(self, path: Path, object_hash: str) -> None:
        """Copy an adapter's files into its object's folder, unless they are there and intact."""
        target = self._object_folder(object_hash)
        if target.is_dir() and has_content(target, object_hash):
            return
        with new_folder(target, overwrite=True, replaces=[*FILES, EVERYTHING]) as folder:
            copy_files(path, folder)
            if not has_content(folder, object_hash):
                raise AdapterError(
                    f"files in {path} that changed while they were copied",
                    "files at rest",
                    "add it again when they are written",
                )

    def _restart_grace_period(self, object_hash: str) -> None:
        """Restart the grace period of an object, before one of its names is removed."""
        if self._object_folder(object_hash).is_dir():
            os.utime(self._object_folder(object_hash))

    @contextmanager
    def _hold_lock(self, *, create: bool = False) -> Iterator[None]:
        """Hold the writer's lock. The library's folder is created only with ``create``, so that a
        mistyped path creates no library."""
        if not create and not (self.folder / OBJECTS).is_dir():
            raise LibraryError(
                f"no library in {self.folder}",
                "a folder with adapters",
                "check the path, or add one",
            )
        import filelock  # imported here because it takes a tenth of a second

        lock = filelock.FileLock(self.folder / LOCK)
        # type checkers would otherwise take every lock for a ``SoftFileLock``
        soft: type = filelock.SoftFileLock
        if isinstance(lock, soft):  # a killed writer would leave this kind of lock behind
            raise LibraryError(
                "a system without flock", "Linux, macOS or a BSD", "keep adapters in plain folders"
            )
        (self.folder / OBJECTS).mkdir(parents=True, exist_ok=True)
        with lock:
            yield

    @contextmanager
    def _edit_entries(self, *, create: bool = False) -> Iterator[dict[str, Entry]]:
        """The entries of the index by name, which the block may change. They are written if the
        block ends without an error."""
        with self._hold_lock(create=create):
            entries = self._read_entries()
            if not (self.folder / INDEX).exists():
                # write the index before the first object, so that objects without an index mean
                # that the index was lost
                self._write_entries(entries)
            yield entries
            self._write_entries(entries)

    def _write_entries(self, entries: dict[str, Entry]) -> None:
        content = {
            "format": FORMAT,
            "names": {name: asdict(entry) for name, entry in sorted(entries.items())},
        }
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self.folder / INDEX, text)  # this completes the change
        write_whole(self.folder / COPY, text)

    def _read_entries(self) -> dict[str, Entry]:
        index = self.folder / INDEX
        # test in this order, because another process may meanwhile write to an empty library, the
        # index before the first object
        if not index.exists() and not (self.folder / COPY).exists() and not self._object_folders():
            return {}
        try:
            return _parse(index)
        except _READ_ERRORS as error:
            state = (
                "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            )
            problem, do = f"an index {index} that {state}", f"run {self._rebuild_command()}"
            raise LibraryError(problem, "the index of a library", do) from error

    def _read_index_or_copy(self) -> tuple[dict[str, Entry], bool]:
        """(the entries of the index, True), or (the entries of its copy, False), or ({}, False)."""
        for file in (INDEX, COPY):
            with suppress(*_READ_ERRORS):
                return _parse(self.folder / file), file == INDEX
        return {}, False

    def _entry_of(self, entries: dict[str, Entry], name: str) -> Entry:
        if name not in entries:
            raise LibraryError(
                f"no adapter {name!r} in {self.folder}{nearest(name, entries)}",
                f"one of {listing(sorted(entries))}" if entries else "one that was added",
                "check the name, or add it",
            )
        return entries[name]

    def _rebuild_command(self) -> str:
        return f"`veneer gc --rebuild --library {self.folder}`"


def _parse(file: Path) -> dict[str, Entry]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise LibraryError(
            f"format {content['format']!r} in {file}", str(FORMAT), "install a newer Veneer"
        )
    names = {}
    for name, fields in content["names"].items():
        entry = Entry(**{**fields, "tags": tuple(fields["tags"])})
        texts = entry.added, entry.variant, entry.base or "", *entry.tags
        has_valid_types = (
            all(isinstance(text, str) for text in texts)
            and type(entry.size) is type(entry.rank) is int
        )
        # paths in an untrusted index must not lead out of the folder
        if (
            not has_valid_types
            or entry.name != name
            or not NAME.fullmatch(name)
            or not _HASH.fullmatch(entry.object)
        ):
            raise ValueError(f"the entry of {name!r} is none")
        names[name] = entry
    return names


def _read_entry(path: Path, name: str, object_hash: str, tags: tuple[str, ...]) -> Entry:
    saved = read(path)
    base: Any = saved.metadata.get("base", {}).get("name") or saved.peft_config.get(
        "base_model_name_or_path"
    )
    size = sum((path / file).stat().st_size for file in adapter_file_names(path))
    added = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(
        name, object_hash, tags, added, size, base, saved.config.variant, saved.config.rank
    )


def _check_names(name: str, tags: Iterable[str]) -> None:
    expected = "1 to 128 letters, digits, '_', '-' and '.', the first a letter, a digit or '_'"
    wrong = [f"name {name!r}"] if not NAME.fullmatch(name) else []
    wrong += [f"tag {tag!r}" for tag in tags if not NAME.fullmatch(tag)]
    problems = [sentence(problem, expected, "choose another") for problem in wrong]
    raise_all(LibraryError, f"The library cannot take {name!r}", problems)


def _size(path: Path) -> int:
    """Size in bytes of a file, or of all files of a folder. Files that another process removes
    meanwhile do not count."""
    files = (
        [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        if path.is_dir()
        else [path]
    )
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def default_folder() -> Path:
    """The folder of the default library: ``$VENEER_LIBRARY``, or ``veneer/adapters`` in
    ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    setting = os.environ.get("VENEER_LIBRARY")
    if setting and is_remote(setting):
        raise LibraryError(
            f"VENEER_LIBRARY is {setting}, a remote library, which only vLLM's plug-in reads",
            "a folder",
            "unset it here, or name a folder with --library",
        )
    return Path(setting or Path(data_home) / "veneer" / "adapters").expanduser()


def resolve(adapter: str | Path, library: Library | None = None) -> Path:
    """The adapter folder for the ADAPTER argument of a command: the name ``library:NAME`` in the
    ``library`` (None: the default one), a remote place, from which it is pulled, or a path."""
    text = str(adapter)
    if text.startswith(SCHEME):
        return (library or Library(default_folder())).get(text.removeprefix(SCHEME))
    return pull(text) if is_remote(text) else Path(adapter)
