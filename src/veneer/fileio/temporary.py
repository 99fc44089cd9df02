"""Temporary folders, in which files are written before they get their name, and recovery of those
that a killed writer left.

    .NAME.abcd1234.tmp/       beside NAME, or .veneer-abcd1234.tmp/ within the folder NAME
      lock                    held by the process that writes
      new/                    what is to become NAME, or the file that is
      plan.json               {"entry", "writes", "removes"}: new/ is whole, and its files move
                              into NAME one by one

A folder that holds files of others is not exchanged for another one: its files are replaced in
place. The first step takes away ``entry``, the file without which nobody reads the folder, and the
last one puts the new one there. So a reader meets the old files, or the new ones, or none; and a
writer that is killed in between leaves the plan and the rest of the files, with which ``recover``
goes on. Rejected: hard links to the others' files in a new folder, which takes their folders from
processes that work in them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.fileio.locks import acquire, locked

NEW, LOCK, PLAN = "new", "lock", "plan.json"
#: held while files of a folder are replaced one by one
FOLDER_LOCK = ".veneer.lock"
_SIBLING, WITHIN = re.compile(r"\.(.+)\.[^.]+\.tmp"), re.compile(r"\.veneer-[^.]+\.tmp")
#: what earlier versions of Veneer moved aside for a moment
_ASIDE = re.compile(r"\.(.+)\.replaced")


@contextmanager
def temporary(path: Path, *, within: bool = False) -> Iterator[Path]:
    """A temporary folder for what is to become ``path``: beside it, or within it. It is gone when
    the block ends, unless files were being moved out of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix, parent = (".veneer-", path) if within else (f".{path.name}.", path.parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
        lock = acquire(folder / LOCK)
        if lock is not None:
            break  # else another process took the folder for a dead one's, before it was locked
    try:
        yield folder
    finally:
        if not (folder / PLAN).exists():
            remove(folder)
        lock.release()


def recover(path: Path) -> None:
    """Settle the temporary folders that killed writers of ``path`` left: finish replacing files,
    and remove the rest. A folder in which a living process writes stays."""
    for sibling in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if (match := _SIBLING.fullmatch(sibling.name)) and match[1] == path.name:
            _finish_or_remove(sibling, path)
        elif (match := _ASIDE.fullmatch(sibling.name)) and match[1] == path.name:
            _put_back(sibling, path)
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        if WITHIN.fullmatch(inner.name):
            _finish_or_remove(inner, path)


def sweep(folder: Path) -> None:
    """``recover`` for all that killed writers were writing in ``folder``."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _SIBLING.fullmatch(path.name) or _ASIDE.fullmatch(path.name)
        if match is not None:
            recover(folder / match[1])


def _finish_or_remove(temporary_folder: Path, path: Path) -> None:
    if not temporary_folder.is_dir():
        return
    try:
        lock = acquire(temporary_folder / LOCK)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return  # of another user, or on a disk that nobody writes to
    if lock is None:
        return
    try:
        if (temporary_folder / PLAN).is_file():
            if path.is_dir() and not os.path.lexists(path / _plan(temporary_folder)["entry"]):
                move_files(temporary_folder, path)
            (temporary_folder / PLAN).unlink(missing_ok=True)
        remove(temporary_folder)
    finally:
        lock.release()


def _put_back(aside: Path, path: Path) -> None:
    """A folder that an earlier version moved aside: it is the only one where ``path`` did not take
    its place."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if os.path.lexists(path):
        remove(aside)
    else:
        aside.rename(path)


def _plan(temporary_folder: Path) -> dict[str, Any]:
    return json.loads((temporary_folder / PLAN).read_text(encoding="utf-8"))


def write_plan(temporary_folder: Path, entry: str, writes: list[str], removes: list[str]) -> None:
    """Say that the files in ``new`` are whole and on the disk: from here on they become those of
    the folder."""
    written = temporary_folder / f"{PLAN}.new"
    written.write_text(
        json.dumps({"entry": entry, "writes": writes, "removes": removes}), encoding="utf-8"
    )
    with written.open("rb") as stream:
        os.fsync(stream.fileno())
    written.replace(temporary_folder / PLAN)
    flush_folder(temporary_folder)


def move_files(temporary_folder: Path, path: Path) -> None:
    """Replace the files of the folder ``path`` as the plan says, or go on with that."""
    plan, new = _plan(temporary_folder), temporary_folder / NEW
    entry, writes, removes = plan["entry"], plan["writes"], plan["removes"]
    with locked(path / FOLDER_LOCK):
        if (new / entry).exists():
            (path / entry).unlink(missing_ok=True)
            flush_folder(path)
            for name in removes:
                (path / name).unlink(missing_ok=True)
            for name in writes:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                if name != entry and (new / name).exists():
                    (new / name).replace(path / name)
            for folder in {(path / name).parent for name in writes}:
                flush_folder(folder)
            (new / entry).replace(path / entry)
            _remove_empty({(path / name).parent for name in removes} - {path})
        flush_folder(path)
        (temporary_folder / PLAN).unlink()


def _remove_empty(folders: set[Path]) -> None:
    for folder in sorted(folders, reverse=True):  # from below
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def files_in(folder: Path) -> list[str]:
    """The files below a folder, and links, by their relative paths; temporary folders and locks
    left out."""
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if not WITHIN.fullmatch(name)]
        names += [
            Path(root, name).relative_to(folder).as_posix()
            for name in (*files, *links)
            if name != FOLDER_LOCK
        ]
    return sorted(names)


def remove(path: Path) -> None:
    """Remove a folder or a file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
