"""A library: a folder of adapters by name, which several processes may read and write at once.

    index.json              {"format": 1, "names": {name: {object, tags, added, size, base, variant,
                            rank}}}
    index.copy.json         a copy, in case the index is damaged
    objects/<hash>/         an adapter folder, named by the hash of its files; never changed
    lock                    held by a process while it changes the library (filelock)

An adapter folder in objects/ is called an object. Each entry of the index gives a name to an
object. A change takes the lock, reads the index, moves a complete object into place, and replaces
the index by a rename. So after a crash, the index is the old one or the new one, and all its
objects are complete. Therefore readers need no lock.

A writer holds the lock during its whole change, so a process that gets the lock knows that any
temporary folder in objects/ was left by a writer that died. (A temporary folder beside objects/ may
belong to a running server, which writes its served.json there without this lock.) ``gc`` deletes an
object that has had no name for a grace period. The period begins when the last name is removed: its
beginning is the folder's modification time. A path from ``get`` stays valid at least for the
period. Windows is not supported, because renames of folders must be atomic.
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

#: names of the index, of its copy, of the lock file, and of the folder of adapter folders (objects)
INDEX, COPY, LOCK, OBJECTS = "index.json", "index.copy.json", "lock", "objects"
INDEX_FORMAT = 1
#: the grace period, in seconds: ``gc`` keeps an object without a name for this time
GRACE_SECONDS = 3600.0
#: the beginning of a text that names an adapter in the default library, "library:NAME"
LIBRARY_SCHEME = "library:"
#: the pattern of adapter names, in a library and on a server
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")
#: the errors that ``_parse_index`` raises for a missing or damaged index
_READ_ERRORS = (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Entry:
    """One name of a library, and the adapter that it stands for.

    Fields:
        object: the hash of the adapter's files.
        added: when the adapter was added: UTC, in ISO 8601.
        size: bytes of the adapter's files.
        base: the name of the adapter's base, as the adapter records it; None if it records none.
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
    """What ``gc`` has deleted. ``objects``: hashes of the deleted adapter folders; ``leftovers``:
    the number of deleted temporary folders; ``freed``: bytes of all deleted files."""

    objects: tuple[str, ...]
    leftovers: int
    freed: int


@dataclass(frozen=True)
class Rebuilt:
    """The result of ``rebuild``. ``kept``: names that are still in the index; ``recovered``: new
    names, of adapters that had none; ``lost``: removed names, and hashes of unreadable adapters."""

    kept: tuple[str, ...]
    recovered: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, init=False)
class Library:
    """The adapters in a folder, which the first ``add`` creates. Readers take no lock. A writer
    waits until it is the only writer."""

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        object.__setattr__(self, "folder", Path(folder).expanduser())

    def entry(self, name: str) -> Entry:
        """The entry of a name. Raises ``LibraryError`` if there is no such name."""
        return self._entry_of(self._read_entries(), name)

    def get(self, name: str) -> Path:
        """The adapter folder of a name. Its files belong to the library, so do not change them.
        They stay for at least the grace period of ``gc`` after the name is removed. Raises
        ``LibraryError`` if there is no such name or folder."""
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
            cache: the folder of the cache; None takes the default of ``store.remote.pull``.

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
        """The entries, sorted by name. ``tag``: only entries with this tag; ``base``: only entries
        whose adapter records this name of its base."""
        return tuple(
            entry
            for _, entry in sorted(self._read_entries().items())
            if (tag is None or tag in entry.tags) and (base is None or base == entry.base)
        )

    def add(
        self, path: str | Path, name: str, *, tags: Iterable[str] = (), overwrite: bool = False
    ) -> Entry:
        """Verify the adapter folder ``path``, and copy it into the library under a name.

        Only files that belong to an adapter are copied. ``overwrite`` replaces the adapter of the
        name. It replaces its tags too, because they need not apply to the new adapter.

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
        """Remove a name, and return its entry. ``gc`` deletes the adapter's files after the grace
        period, unless they have another name. Raises ``LibraryError`` if there is no such name."""
        with self._edit_entries() as entries:
            entry = self._entry_of(entries, name)
            self._restart_grace_period(entry.object)
            del entries[name]
        return entry

    def tag(self, name: str, *tags: str, remove: Iterable[str] = ()) -> Entry:
        """Add ``tags`` to a name, remove the tags in ``remove`` from it, and return the new entry.

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
            if missing_tags := [tag for tag in remove if tag not in entry.tags]:
                missing_text = listing(map(repr, missing_tags))
                raise LibraryError(
                    f"no tag {missing_text} at {name!r}, which has {listing(entry.tags)}",
                    "tags that it has",
                    "check the spelling",
                )
            remaining_tags = tuple(
                tag for tag in dict.fromkeys((*entry.tags, *tags)) if tag not in remove
            )
            entries[name] = replace(entry, tags=remaining_tags)
        return entries[name]

    def gc(self, *, grace: float = GRACE_SECONDS) -> Collected:
        """Delete the adapter folders that have had no name for ``grace`` seconds, and the temporary
        folders that killed writers left."""
        with self._hold_lock():
            # this raises if the index is damaged, so that no object is deleted by mistake
            named_hashes = {entry.object for entry in self._read_entries().values()}
            objects_folder = self.folder / OBJECTS
            leftovers = [*self.folder.glob(".*.tmp"), *objects_folder.glob(".*.tmp")]
            leftover_sizes = {path: _byte_count(path) for path in leftovers}
            # leftovers first: one may have a name that the rename below needs, left by a killed
            # ``gc``. ``recover_all`` keeps the temporary folders of running processes.
            recover_all(self.folder)
            recover_all(objects_folder)
            for path in leftovers:
                if path.parent == objects_folder or not path.is_dir():
                    remove(path)
            deleted_paths = [path for path in leftovers if not os.path.lexists(path)]
            freed_bytes = sum(leftover_sizes[path] for path in deleted_paths)
            unnamed = [
                path for path in sorted(self._object_folders()) if path.name not in named_hashes
            ]
            expired = [path for path in unnamed if time.time() - path.stat().st_mtime >= grace]
            for path in expired:
                renamed_folder = path.with_name(f".{path.name}.tmp")
                # rename first, so that an incomplete folder never has the name of its hash
                path.rename(renamed_folder)
                freed_bytes += _byte_count(renamed_folder)
                remove(renamed_folder)
        return Collected(tuple(path.name for path in expired), len(deleted_paths), freed_bytes)

    def rebuild(self) -> Rebuilt:
        """Rebuild a damaged index from its copy and from the adapter folders, which are verified.

        If the index can be read, only names whose adapter folder is missing or altered are removed.
        Otherwise the copy is used, which may lack the last change. An adapter folder that the copy
        does not list gets the name "recovered-…" and the tag "recovered". Folders that are altered
        or unreadable here lose their names; the grace period of ``gc`` starts anew for them."""
        with self._hold_lock():
            entries, index_is_readable = self._read_index_or_copy()
            intact_hashes = {
                path.name for path in self._object_folders() if has_content(path, path.name)
            }
            intact_entries = {
                name: entry for name, entry in entries.items() if entry.object in intact_hashes
            }
            lost, recovered_entries = sorted(entries.keys() - intact_entries.keys()), {}
            unlisted_hashes = intact_hashes - {entry.object for entry in intact_entries.values()}
            for object_hash in () if index_is_readable else sorted(unlisted_hashes):
                name = (
                    f"recovered-{object_hash[:12]}"
                    if f"recovered-{object_hash[:12]}" not in intact_entries
                    else f"recovered-{object_hash}"
                )
                try:
                    recovered_entries[name] = _read_entry(
                        self._object_folder(object_hash), name, object_hash, ("recovered",)
                    )
                # this installation may not know the adapter's variant, so keep its files for now
                except AdapterError:
                    lost.append(object_hash)
            rebuilt_entries = {**intact_entries, **recovered_entries}
            unnamed_hashes = (
                {path.name for path in self._object_folders()}
                if not index_is_readable
                else {entries[name].object for name in lost}
            )
            for object_hash in unnamed_hashes - {
                entry.object for entry in rebuilt_entries.values()
            }:
                self._restart_grace_period(object_hash)  # the user may still need the files
            self._write_entries(rebuilt_entries)
        return Rebuilt(tuple(sorted(intact_entries)), tuple(recovered_entries), tuple(lost))

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
        """Copy an adapter's files into the folder for their hash, unless that folder is intact."""
        object_folder = self._object_folder(object_hash)
        if object_folder.is_dir() and has_content(object_folder, object_hash):
            return
        with new_folder(object_folder, overwrite=True, replaces=[*FILES, EVERYTHING]) as folder:
            copy_files(path, folder)
            if not has_content(folder, object_hash):
                raise AdapterError(
                    f"files in {path} that changed while they were copied",
                    "files at rest",
                    "add it again when they are written",
                )

    def _restart_grace_period(self, object_hash: str) -> None:
        """Restart the time for which ``gc`` keeps an adapter folder without a name."""
        if self._object_folder(object_hash).is_dir():
            os.utime(self._object_folder(object_hash))

    @contextmanager
    def _hold_lock(self, *, create: bool = False) -> Iterator[None]:
        """Hold the writer's lock. Without ``create``, a missing library raises ``LibraryError``, so
        that a mistyped path creates no library."""
        if not create and not (self.folder / OBJECTS).is_dir():
            raise LibraryError(
                f"no library in {self.folder}",
                "a folder with adapters",
                "check the path, or add one",
            )
        import filelock  # imported here, because the import takes a tenth of a second

        lock = filelock.FileLock(self.folder / LOCK)
        # annotated as ``type``, because type checkers would take every lock for a ``SoftFileLock``
        soft_lock: type = filelock.SoftFileLock
        if isinstance(lock, soft_lock):  # a killed writer would leave such a lock behind
            raise LibraryError(
                "a system without flock", "Linux, macOS or a BSD", "keep adapters in plain folders"
            )
        (self.folder / OBJECTS).mkdir(parents=True, exist_ok=True)
        with lock:
            yield

    @contextmanager
    def _edit_entries(self, *, create: bool = False) -> Iterator[dict[str, Entry]]:
        """Hold the lock and yield {name: entry} of the index, which the block may change. If the
        block ends without an error, the entries are written to the index."""
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
            "format": INDEX_FORMAT,
            "names": {name: asdict(entry) for name, entry in sorted(entries.items())},
        }
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self.folder / INDEX, text)  # from here on, readers see the change
        write_whole(self.folder / COPY, text)

    def _read_entries(self) -> dict[str, Entry]:
        index = self.folder / INDEX
        # in an empty library, a writer writes the index before the first object, so if an object is
        # found here, the index can be read below
        if not index.exists() and not (self.folder / COPY).exists() and not self._object_folders():
            return {}
        try:
            return _parse_index(index)
        except _READ_ERRORS as error:
            flaw = (
                "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            )
            problem, remedy = f"an index {index} that {flaw}", f"run {self._rebuild_command()}"
            raise LibraryError(problem, "the index of a library", remedy) from error

    def _read_index_or_copy(self) -> tuple[dict[str, Entry], bool]:
        """(the index's entries, True); if it is damaged, (its copy's entries or {}, False)."""
        for file_name in (INDEX, COPY):
            with suppress(*_READ_ERRORS):
                return _parse_index(self.folder / file_name), file_name == INDEX
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


def _parse_index(file: Path) -> dict[str, Entry]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["format"] != INDEX_FORMAT:
        raise LibraryError(
            f"format {content['format']!r} in {file}", str(INDEX_FORMAT), "install a newer Veneer"
        )
    entries = {}
    for name, entry_fields in content["names"].items():
        entry = Entry(**{**entry_fields, "tags": tuple(entry_fields["tags"])})
        texts = entry.added, entry.variant, entry.base or "", *entry.tags
        has_valid_types = (
            all(isinstance(text, str) for text in texts)
            and type(entry.size) is type(entry.rank) is int
        )
        # an untrusted index must not contain names or hashes that are paths out of the folder
        if (
            not has_valid_types
            or entry.name != name
            or not NAME.fullmatch(name)
            or not _HASH.fullmatch(entry.object)
        ):
            raise ValueError(f"the entry of {name!r} is none")
        entries[name] = entry
    return entries


def _read_entry(path: Path, name: str, object_hash: str, tags: tuple[str, ...]) -> Entry:
    adapter = read(path)
    base: Any = adapter.metadata.get("base", {}).get("name") or adapter.peft_config.get(
        "base_model_name_or_path"
    )
    size = sum((path / file).stat().st_size for file in adapter_file_names(path))
    added = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(
        name, object_hash, tags, added, size, base, adapter.config.variant, adapter.config.rank
    )


def _check_names(name: str, tags: Iterable[str]) -> None:
    expected = "1 to 128 letters, digits, '_', '-' and '.', the first a letter, a digit or '_'"
    invalid_names = [f"name {name!r}"] if not NAME.fullmatch(name) else []
    invalid_names += [f"tag {tag!r}" for tag in tags if not NAME.fullmatch(tag)]
    problems = [sentence(problem, expected, "choose another") for problem in invalid_names]
    raise_all(LibraryError, f"The library cannot take {name!r}", problems)


def _byte_count(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. A file that another process removes
    meanwhile does not count."""
    files = (
        [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        if path.is_dir()
        else [path]
    )
    byte_count = 0
    for file in files:
        with suppress(FileNotFoundError):
            byte_count += file.stat().st_size
    return byte_count


def default_folder() -> Path:
    """The folder of the default library: ``$VENEER_LIBRARY``, or ``veneer/adapters`` in
    ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    location = os.environ.get("VENEER_LIBRARY")
    if location and is_remote(location):
        raise LibraryError(
            f"VENEER_LIBRARY is {location}, a remote library, which only vLLM's plug-in reads",
            "a folder",
            "unset it here, or name a folder with --library",
        )
    return Path(location or Path(data_home) / "veneer" / "adapters").expanduser()


def resolve(adapter: str | Path, library: Library | None = None) -> Path:
    """The adapter folder for the argument ADAPTER of a command: "library:NAME" in ``library``
    (None: the default library), a remote address, from which it is pulled, or a path."""
    address = str(adapter)
    if address.startswith(LIBRARY_SCHEME):
        return (library or Library(default_folder())).get(address.removeprefix(LIBRARY_SCHEME))
    return pull(address) if is_remote(address) else Path(adapter)
