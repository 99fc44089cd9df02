"""Temporary folders for atomic writes, and recovery of the folders that killed writers left.

    .NAME.abcd1234.tmp/       beside NAME, or .veneer-abcd1234.tmp/ within the folder NAME
      lock                    a lock file, held by the process that writes
      new/                    the future folder NAME, or the future file NAME
      plan.json               {"entry", "writes", "removes"}, once new/ is complete: which files to
                              move into NAME one by one, and which files of NAME to remove

In a folder that also contains other programs' files, the files are replaced one by one. The first
step removes ``entry``, the file without which readers refuse the folder, and the last step writes
the new ``entry``. So a reader sees the old files, the new files, or a folder that it refuses. If
the writer is killed meanwhile, ``recover`` continues from the plan and the files that are left in
new/. Rejected: a new folder with hard links to the files to keep, because processes whose working
directory is the old folder would lose it.

A folder that a stranger wrote may hold a temporary folder too. ``recover`` leaves a temporary
folder alone that no writer of Veneer can have left: one with links, or with a plan whose names lead
out of the target folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from veneer.errors import AdapterError, first_line, sentence
from veneer.fileio.locks import acquire, hold_lock
from veneer.fileio.untrusted import read_json

#: names of the entries of a temporary folder (see the top of this file)
NEW, LOCK, PLAN = "new", "lock", "plan.json"
#: lock file that is held while files of a folder are replaced one by one
FOLDER_LOCK = ".veneer.lock"
#: match the names of temporary folders beside the path that is written, and within it
_SIBLING_PATTERN, INNER_PATTERN = (
    re.compile(r"\.(.+)\.[^.]+\.tmp"),
    re.compile(r"\.veneer-[^.]+\.tmp"),
)

#: attempts to remove a folder that another process changes at the same time
MAX_REMOVAL_ATTEMPTS = 20


@contextmanager
def temporary(path: Path, *, within: bool = False) -> Iterator[Path]:
    """Create a locked temporary folder beside ``path``, or in the folder ``path`` if ``within``.
    When the block ends, it is removed, unless it holds a plan: then the block failed while files
    were moved out of it, and ``recover`` moves the others later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix, parent = (".veneer-", path) if within else (f".{path.name}.", path.parent)
    while True:
        temporary_folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
        lock = acquire(temporary_folder / LOCK)
        if lock is not None:
            break  # otherwise another process took the folder for a killed writer's: try again
    try:
        yield temporary_folder
    finally:
        if not (temporary_folder / PLAN).exists():
            remove(temporary_folder)
        lock.release()


def recover(path: Path) -> None:
    """Clean up the temporary folders of killed writers of ``path``: if there is a plan, finish
    replacing files, then remove the folder. Folders of running processes stay, and so do folders
    that no writer can have left (``_may_be_ours``)."""
    for sibling in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if (match := _SIBLING_PATTERN.fullmatch(sibling.name)) and match[1] == path.name:
            _finish_or_remove(sibling, path)
    for inner_folder in sorted(path.iterdir()) if path.is_dir() else ():
        if INNER_PATTERN.fullmatch(inner_folder.name):
            _finish_or_remove(inner_folder, path)


def recovery_problems(path: Path) -> list[str]:
    """Call ``recover``. Return an error text if the operating system refuses to move or remove the
    files that a killed writer left; else an empty list."""
    try:
        recover(path)
    except OSError as error:
        problem = (
            f"{path}, in which a killed process left a replacement of files that cannot be finished"
            f" ({first_line(error)})"
        )
        return [sentence(problem, "a folder as it was saved", "get it again, or save it again")]
    return []


def recover_all(folder: Path) -> None:
    """Call ``recover`` for every path in ``folder`` that a killed writer was writing."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _SIBLING_PATTERN.fullmatch(path.name)
        # a name such as "....x.tmp" would stand for the parent, a link for any folder
        if match and match[1] not in (".", "..") and not (folder / match[1]).is_symlink():
            recover(folder / match[1])


def _finish_or_remove(temporary_folder: Path, path: Path) -> None:
    if not _may_be_ours(temporary_folder, path):
        return
    try:
        lock = acquire(temporary_folder / LOCK)
    except OSError as error:
        # the folder is another user's or on a read-only disk; or another process removed it before
        # the lock file was created (ENOENT) or while filelock created missing parents (EEXIST)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST):
            return
        raise
    if lock is None:
        return
    try:
        if (temporary_folder / PLAN).is_file():
            # the first step removes ``entry`` from ``path``, and the last one writes it
            if path.is_dir() and not os.path.lexists(path / _read_plan(temporary_folder)["entry"]):
                move_files(temporary_folder, path)
            (temporary_folder / PLAN).unlink(missing_ok=True)
        remove(temporary_folder)
    finally:
        lock.release()


def _may_be_ours(temporary_folder: Path, path: Path) -> bool:
    """Return whether a writer of ``path`` can have left ``temporary_folder``: it is a folder, its
    locks and its plan are regular files if they exist, and the plan is valid. None is a link."""
    plan_file = temporary_folder / PLAN
    files = (temporary_folder / LOCK, path / FOLDER_LOCK, plan_file)
    return (
        stat.S_ISDIR(_mode_of(temporary_folder))
        and all(map(_is_regular_or_absent, files))
        and (not os.path.lexists(plan_file) or _has_valid_plan(temporary_folder, path))
    )


def _has_valid_plan(temporary_folder: Path, path: Path) -> bool:
    """Return whether the plan in ``temporary_folder`` has the fields that ``write_plan`` writes,
    and moves regular files only, from ``new/`` to places within ``path``, through no link."""
    try:
        plan = read_json(temporary_folder / PLAN)
    except (AdapterError, OSError):
        return False
    entry_name, written_names, removed_names = (
        plan.get(field) for field in ("entry", "writes", "removes")
    )
    return (
        isinstance(written_names, list)
        and isinstance(removed_names, list)
        and entry_name in written_names
        and all(_is_inner_name(name, path) for name in (*written_names, *removed_names))
        and all(
            _is_inner_name(f"{NEW}/{name}", temporary_folder)
            and _is_regular_or_absent(temporary_folder / NEW / name)
            for name in written_names
        )
    )


def _is_inner_name(name: Any, folder: Path) -> bool:
    """Return whether ``name`` is the relative path of a file within ``folder``, of which no parent
    below ``folder`` is a link."""
    if not isinstance(name, str) or "\0" in name:
        return False
    relative_path = PurePath(name)
    return (
        bool(relative_path.parts)
        and not relative_path.anchor
        and ".." not in relative_path.parts
        and not any(
            stat.S_ISLNK(_mode_of(folder / parent)) for parent in relative_path.parents[:-1]
        )
    )


def _is_regular_or_absent(path: Path) -> bool:
    """Return whether ``path`` is a regular file and no link, or does not exist."""
    mode = _mode_of(path)
    return not mode or stat.S_ISREG(mode)


def _mode_of(path: Path) -> int:
    """Return the type and permissions of ``path`` itself, as a link if it is one; 0 if it does not
    exist, or is in a folder that cannot be read."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _read_plan(temporary_folder: Path) -> dict[str, Any]:
    return json.loads((temporary_folder / PLAN).read_text(encoding="utf-8"))


def write_plan(temporary_folder: Path, entry: str, writes: list[str], removes: list[str]) -> None:
    """Write a plan, which states that the files in ``new/`` are complete and on disk. If the writer
    is killed after this, ``recover`` moves them to their target folder.

    Args:
        entry: the file without which readers refuse the folder.
        writes: the paths of the files in ``new/``, relative to ``new/`` and the target folder.
        removes: the paths of the files to remove from the target folder, relative to it.
    """
    unfinished_plan = temporary_folder / f"{PLAN}.new"
    unfinished_plan.write_text(
        json.dumps({"entry": entry, "writes": writes, "removes": removes}), encoding="utf-8"
    )
    with unfinished_plan.open("rb") as stream:
        os.fsync(stream.fileno())
    unfinished_plan.replace(temporary_folder / PLAN)
    flush_folder(temporary_folder)


def move_files(temporary_folder: Path, path: Path) -> None:
    """Replace files of the folder ``path`` as the plan says, or continue to do so after a crash."""
    plan, filled_folder = _read_plan(temporary_folder), temporary_folder / NEW
    entry_name, written_names, removed_names = plan["entry"], plan["writes"], plan["removes"]
    with hold_lock(path / FOLDER_LOCK):
        if (filled_folder / entry_name).exists():
            (path / entry_name).unlink(missing_ok=True)
            flush_folder(path)
            for name in removed_names:
                # keep a folder of this name: it was created before a crash, for a written file
                if (path / name).is_symlink() or not (path / name).is_dir():
                    (path / name).unlink(missing_ok=True)
            for name in written_names:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                if name != entry_name and (filled_folder / name).exists():
                    (filled_folder / name).replace(path / name)
            for folder in {(path / name).parent for name in written_names}:
                flush_folder(folder)
            (filled_folder / entry_name).replace(path / entry_name)
            _remove_empty_folders({(path / name).parent for name in removed_names} - {path})
        flush_folder(path)
        (temporary_folder / PLAN).unlink()


def _remove_empty_folders(folders: set[Path]) -> None:
    for folder in sorted(folders, reverse=True):  # subfolders first
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def files_in(folder: Path) -> list[str]:
    """Return the relative paths of all files and symbolic links below a folder, except for lock
    files and the contents of temporary folders."""
    names = []
    for root, folders, files in os.walk(folder):
        linked_folders = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if not INNER_PATTERN.fullmatch(name)]
        names += [
            Path(root, name).relative_to(folder).as_posix()
            for name in (*files, *linked_folders)
            if name != FOLDER_LOCK
        ]
    return sorted(names)


def remove(path: Path) -> None:
    """Remove a folder or a file, if it exists. Another process may remove the folder at the same
    time, or create a lock file in it to find out whether its writer was killed, so the function
    tries several times."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for attempt in range(MAX_REMOVAL_ATTEMPTS):
        try:
            shutil.rmtree(path)
            return
        except OSError as error:
            if (
                error.errno not in (errno.ENOENT, errno.ENOTEMPTY)
                or attempt == MAX_REMOVAL_ATTEMPTS - 1
            ):
                raise
            if not path.exists():
                return


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
