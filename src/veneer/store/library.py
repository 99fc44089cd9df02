"""A library: a folder of adapters by name, which several processes may read and write at once.

    index.json              {"format": 1, "names": {name: {object, tags, added, size, base, variant,
                            rank}}}
    index.copy.json         a copy, in case the index is damaged
    objects/<hash>/         an adapter folder, named by the hash of its files; never changed
    lock                    held while anything is changed (filelock)

A name is an entry of the index, an object is content. A change takes the lock, reads the index,
moves a complete object into place, and replaces the index by a rename. A crash therefore leaves the
old index or the new one, and all objects of an index are complete. Readers take no lock.

The lock is held during the whole change, including the copying, so a folder with a temporary name
is always the leftover of a writer that died. ``gc`` deletes objects without a name after a grace
period, which begins when the last name is removed (``remove`` sets the folder's modification time);
a path from ``get`` is valid for at least that long. Atomic renames of folders are required: Windows
is not supported.
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
from veneer.fileio.temporary import remove, sweep
from veneer.models.gguf_conversion import cache_dir
from veneer.store.remote import is_remote, keep_folder, pull

__all__ = ["Collected", "Entry", "Library", "Rebuilt", "default_folder", "resolve"]

INDEX, COPY, LOCK, OBJECTS = "index.json", "index.copy.json", "lock", "objects"
FORMAT = 1
#: seconds for which an object without a name is kept
GRACE = 3600.0
SCHEME = "library:"
#: the form of adapter names, in a library and for a server
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")
#: the errors of ``_parse`` for a missing or damaged index
_DAMAGED = (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Entry:
    """One name of a library. ``object``: the hash of its files; ``added``: in UTC; ``size``: in
    bytes; ``base``: the adapter's name for its base."""

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
    """The result of ``gc``: hashes of the deleted objects, the number of deleted leftovers of
    writers that died, and the bytes of both."""

    objects: tuple[str, ...]
    leftovers: int
    freed: int


@dataclass(frozen=True)
class Rebuilt:
    """The result of ``rebuild``: names that were kept, names that were given to objects without
    one, and names that were removed because their object is missing or altered."""

    kept: tuple[str, ...]
    recovered: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, init=False)
class Library:
    """The adapters in a folder, which is created when it is needed. Reading takes no lock; one
    writer at a time."""

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        object.__setattr__(self, "folder", Path(folder).expanduser())

    def entry(self, name: str) -> Entry:
        """The entry of a name. Raises ``LibraryError`` if there is none."""
        return self._need(self._names(), name)

    def get(self, name: str) -> Path:
        """The adapter folder of a name. It must not be changed, and is valid for at least the grace
        period."""
        path = self._object(self.entry(name).object)
        if not path.is_dir():
            problem = f"no folder {path}, which {name!r} stands for"
            raise LibraryError(problem, "it there", f"run {self._mend()}, or add it again")
        return path

    def pull(self, name: str, *, cache: Path | None = None) -> Path:
        """Copy an adapter to the cache and verify it by its hash, for readers that need it longer
        than the library guarantees. The copy must not be changed.

        Args:
            cache: the folder of the cache, as in ``store.remote.pull``.

        Raises:
            AdapterError: the files differ from those that were added. The cache is unchanged.
            LibraryError: no such name.
        """
        source = self.get(name)
        target = (cache or cache_dir() / "adapters") / "library" / source.name
        return keep_folder(
            target, str(source), lambda folder: copy_files(source, folder), source.name
        )

    def list(self, *, tag: str | None = None, base: str | None = None) -> tuple[Entry, ...]:
        """All entries by name, or those with a tag, or those for a base (by ``Entry.base``)."""
        entries = (
            entry for _, entry in sorted(self._names().items()) if tag is None or tag in entry.tags
        )
        return tuple(entry for entry in entries if base is None or base == entry.base)

    def add(
        self, path: str | Path, name: str, *, tags: Iterable[str] = (), overwrite: bool = False
    ) -> Entry:
        """Verify an adapter folder, and copy it into the library under a name.

        Only an adapter's own files are copied. ``overwrite`` replaces the adapter of the name and
        its tags, because the tags of the old adapter need not apply to the new one.

        Raises:
            AdapterError: the folder is no intact adapter.
            OutputExistsError: the name is taken and ``overwrite`` is False.
            LibraryError: an invalid name or tag, or a damaged index.
        """
        path, tags = Path(path), tuple(dict.fromkeys(tags))
        _check_words(name, tags)
        key = content_hash(path)
        entry = _entry(path, name, key, tags)  # reads and verifies the folder
        with self._change(create=True) as names:
            if name in names and not overwrite:
                problem = f"an adapter {name!r} in {self.folder}"
                raise OutputExistsError(
                    problem, "a new name", "choose another, or allow overwriting"
                )
            self._store(path, key)
            if name in names:
                self._retire(names[name].object)
            names[name] = entry
        return entry

    def remove(self, name: str) -> Entry:
        """Remove a name from the library; return its entry. ``gc`` deletes the files later, unless
        another name has them."""
        with self._change() as names:
            entry = self._need(names, name)
            self._retire(entry.object)
            del names[name]
        return entry

    def tag(self, name: str, *tags: str, remove: Iterable[str] = ()) -> Entry:
        """Add and remove tags of a name; return its new entry.

        Raises:
            LibraryError: no such name, an invalid tag, or a tag to remove that the name does not
                have.
        """
        remove = tuple(remove)
        if not tags and not remove:
            raise LibraryError("no tag to add or remove", "at least one", "name it")
        _check_words(name, (*tags, *remove))
        with self._change() as names:
            entry = self._need(names, name)
            if absent := [tag for tag in remove if tag not in entry.tags]:
                absent_tags = listing(map(repr, absent))
                problem = f"no tag {absent_tags} at {name!r}, which has {listing(entry.tags)}"
                raise LibraryError(problem, "tags that it has", "check the spelling")
            remaining = tuple(
                tag for tag in dict.fromkeys((*entry.tags, *tags)) if tag not in remove
            )
            names[name] = replace(entry, tags=remaining)
        return names[name]

    def gc(self, *, grace: float = GRACE) -> Collected:
        """Delete the objects that have had no name for ``grace`` seconds, and the leftovers of
        killed writers."""
        with self._lock():
            used = {
                entry.object for entry in self._names().values()
            }  # raises for a damaged index, so nothing is deleted
            objects = self.folder / OBJECTS
            leftovers = [
                *self.folder.glob(".*.tmp"),
                *objects.glob(".*.tmp"),
                *objects.glob(".*.replaced"),
            ]
            freed = sum(map(_size, leftovers))
            sweep(objects)  # first, because they may contain the rest of a partly deleted object
            for path in leftovers:
                remove(path)
            unused = [path for path in sorted(self._objects()) if path.name not in used]
            old = [path for path in unused if time.time() - path.stat().st_mtime >= grace]
            for path in old:
                doomed = path.with_name(f".{path.name}.tmp")
                # rename first: half an object must never have the name of its hash
                path.rename(doomed)
                freed += _size(doomed)
                remove(doomed)
        return Collected(tuple(path.name for path in old), len(leftovers), freed)

    def rebuild(self) -> Rebuilt:
        """Rebuild a damaged index from its copy and from the objects, which are verified.

        If the index can be read, names whose object is missing or altered are removed. Otherwise
        the copy is used, which is at most one change behind; objects that it does not list get the
        name "recovered-…" and the tag "recovered". Files of removed names stay for the grace
        period.
        """
        with self._lock():
            names, complete = self._readable()
            intact = {path.name for path in self._objects() if has_content(path, path.name)}
            intact_entries = {
                name: entry for name, entry in names.items() if entry.object in intact
            }
            lost, recovered = sorted(names.keys() - intact_entries.keys()), {}
            unknown = intact - {entry.object for entry in intact_entries.values()}
            for key in () if complete else sorted(unknown):
                name = (
                    f"recovered-{key[:12]}"
                    if f"recovered-{key[:12]}" not in intact_entries
                    else f"recovered-{key}"
                )
                try:
                    recovered[name] = _entry(self._object(key), name, key, ("recovered",))
                except (
                    AdapterError
                    # for example of a variant that this installation lacks: keep its files for the
                    # grace period
                ):
                    lost.append(key)
            after = {**intact_entries, **recovered}
            unnamed = (
                {path.name for path in self._objects()}
                if not complete
                else {names[name].object for name in lost}
            )
            for key in unnamed - {entry.object for entry in after.values()}:
                self._retire(key)  # keep the files for the grace period: the user may need them
            self._write(after)
        return Rebuilt(tuple(sorted(intact_entries)), tuple(recovered), tuple(lost))

    def _object(self, key: str) -> Path:
        return self.folder / OBJECTS / key

    def _objects(self) -> list[Path]:
        folder = self.folder / OBJECTS
        return (
            [path for path in folder.iterdir() if _HASH.fullmatch(path.name)]
            if folder.is_dir()
            else []
        )

    def _store(self, path: Path, key: str) -> None:
        """Copy the files into the object's folder, unless they are there and intact."""
        target = self._object(key)
        if target.is_dir() and has_content(target, key):
            return
        with new_folder(target, overwrite=True, replaces=[*FILES, EVERYTHING]) as folder:
            copy_files(path, folder)
            if not has_content(folder, key):
                problem = f"files in {path} that changed while they were copied"
                raise AdapterError(problem, "files at rest", "add it again when they are written")

    def _retire(self, key: str) -> None:
        """Restart the grace period of an object, before one of its names is removed."""
        if self._object(key).is_dir():
            os.utime(self._object(key))

    @contextmanager
    def _lock(self, *, create: bool = False) -> Iterator[None]:
        """Hold the lock of the writer. The folder is created only with ``create``, so that a
        mistyped path creates none."""
        if not create and not (self.folder / OBJECTS).is_dir():
            raise LibraryError(
                f"no library in {self.folder}",
                "a folder with adapters",
                "check the path, or add one",
            )
        import filelock  # imported here because it takes a tenth of a second

        lock = filelock.FileLock(self.folder / LOCK)
        # widens the type for type checkers, which would otherwise narrow every lock to it
        soft: type = filelock.SoftFileLock
        if isinstance(lock, soft):  # a killed writer would leave this kind of lock behind
            raise LibraryError(
                "a system without flock", "Linux, macOS or a BSD", "keep adapters in plain folders"
            )
        (self.folder / OBJECTS).mkdir(parents=True, exist_ok=True)
        with lock:
            yield

    @contextmanager
    def _change(self, *, create: bool = False) -> Iterator[dict[str, Entry]]:
        """The names of the index, which the block may change; written if the block ends without an
        error."""
        with self._lock(create=create):
            names = self._names()
            if not (self.folder / INDEX).exists():
                # before the first object, so that objects without an index mean that the index was
                # lost
                self._write(names)
            yield names
            self._write(names)

    def _write(self, names: dict[str, Entry]) -> None:
        content = {
            "format": FORMAT,
            "names": {name: asdict(entry) for name, entry in sorted(names.items())},
        }
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self.folder / INDEX, text)  # from here on the change is complete
        write_whole(self.folder / COPY, text)

    def _names(self) -> dict[str, Entry]:
        index = self.folder / INDEX
        # check in this order: another process's first write may come in between, and it writes the
        # index before the first object
        if not index.exists() and not (self.folder / COPY).exists() and not self._objects():
            return {}
        try:
            return _parse(index)
        except _DAMAGED as error:
            state = (
                "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            )
            problem, do = f"an index {index} that {state}", f"run {self._mend()}"
            raise LibraryError(problem, "the index of a library", do) from error

    def _readable(self) -> tuple[dict[str, Entry], bool]:
        """The names of the index (and True); else those of its copy; else none."""
        for file in (INDEX, COPY):
            with suppress(*_DAMAGED):
                return _parse(self.folder / file), file == INDEX
        return {}, False

    def _need(self, names: dict[str, Entry], name: str) -> Entry:
        if name not in names:
            problem = f"no adapter {name!r} in {self.folder}{nearest(name, names)}"
            expected = f"one of {listing(sorted(names))}" if names else "one that was added"
            raise LibraryError(problem, expected, "check the name, or add it")
        return names[name]

    def _mend(self) -> str:
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
        sound = (
            all(isinstance(text, str) for text in texts)
            and type(entry.size) is type(entry.rank) is int
        )
        # paths in a foreign index must not lead out of the folder
        if (
            not sound
            or entry.name != name
            or not NAME.fullmatch(name)
            or not _HASH.fullmatch(entry.object)
        ):
            raise ValueError(f"the entry of {name!r} is none")
        names[name] = entry
    return names


def _entry(path: Path, name: str, key: str, tags: tuple[str, ...]) -> Entry:
    saved = read(path)
    base: Any = saved.metadata.get("base", {}).get("name") or saved.peft_config.get(
        "base_model_name_or_path"
    )
    size = sum((path / file).stat().st_size for file in adapter_file_names(path))
    added = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(name, key, tags, added, size, base, saved.config.variant, saved.config.rank)


def _check_words(name: str, tags: Iterable[str]) -> None:
    expected = "1 to 128 letters, digits, '_', '-' and '.', the first a letter, a digit or '_'"
    wrong = [f"name {name!r}"] if not NAME.fullmatch(name) else []
    wrong += [f"tag {tag!r}" for tag in tags if not NAME.fullmatch(tag)]
    problems = [sentence(problem, expected, "choose another") for problem in wrong]
    raise_all(LibraryError, f"The library cannot take {name!r}", problems)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(
        file.stat().st_size
        for file in (path.rglob("*") if path.is_dir() else (path,))
        if file.is_file()
    )


def default_folder() -> Path:
    """``$VENEER_LIBRARY``, or ``veneer/adapters`` in ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    data, setting = (
        os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share",
        os.environ.get("VENEER_LIBRARY"),
    )
    if setting and is_remote(setting):
        problem = f"VENEER_LIBRARY is {setting}, a remote library, which only vLLM's plug-in reads"
        raise LibraryError(problem, "a folder", "unset it here, or name a folder with --library")
    return Path(setting or Path(data) / "veneer" / "adapters").expanduser()


def resolve(adapter: str | Path, library: Library | None = None) -> Path:
    """The folder of a command's ADAPTER: ``library:NAME`` in a library (None: the default one), a
    remote place, which is pulled, or a path."""
    text = str(adapter)
    if text.startswith(SCHEME):
        return (library or Library(default_folder())).get(text.removeprefix(SCHEME))
    return pull(text) if is_remote(text) else Path(adapter)
