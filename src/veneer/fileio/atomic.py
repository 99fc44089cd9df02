"""Atomic writes: after a crash, a folder or file is the old one or the new one, never a mixture.

A new folder gets its name by a rename. An existing folder is exchanged with the new one in one step
if all of its files are to be replaced and the operating system supports the exchange. Otherwise its
files are replaced one by one, and files that Veneer did not write stay (``temporary.py``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from veneer.errors import OutputExistsError, listing
from veneer.fileio.temporary import (
    INNER_PATTERN,
    NEW,
    files_in,
    flush_folder,
    move_files,
    recover,
    temporary,
    write_plan,
)

#: arguments of Linux's system call renameat2
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
#: a pattern in ``replaces`` (see ``new_folder``) for folders to which only Veneer writes: every
#: file in them is replaced
EVERYTHING = "*"
#: error numbers of a rename whose target exists or is a mount point
_TARGET_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EBUSY)


def must_not_exist(path: Path, overwrite: bool, *, is_folder: bool = True) -> None:
    """Raise OutputExistsError if ``path`` exists and must not be replaced.

    An empty folder may be replaced by a folder without ``overwrite``. A file is never replaced by a
    folder, nor a folder by a file. ``is_folder``: whether a folder will be written to ``path``."""
    if overwrite and is_folder and path.exists() and not path.is_dir():
        raise OutputExistsError(
            f"{path}, which is a file", "a path for a folder", "choose another, or remove the file"
        )
    if not is_folder and path.is_dir():
        raise OutputExistsError(f"the folder {path}", "a path for a file", "name a file in it")
    if overwrite or not path.exists() or _is_empty(path):
        return
    raise OutputExistsError(
        f"{path}, which exists", "a new path", "choose another, or allow overwriting"
    )


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, replaces: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder to fill. When the block ends, the folder is flushed to disk and
    becomes ``path``. If the block raises, it is removed and ``path`` stays unchanged.

    Args:
        overwrite: whether ``path`` may be a folder that is not empty. The new files then replace
            files of the same names, files that match ``replaces`` are removed, all others stay.
        replaces: patterns of file names that an earlier folder of the same kind may contain; "*"
            replaces the complete folder. The first pattern matches the file without which readers
            refuse the folder.

    Raises:
        OutputExistsError: ``path`` exists, is not an empty folder, and ``overwrite`` is False; or
            it is a file. (Both are checked before the block and again before the rename.) Or a file
            to keep has the path of a new folder, or a folder has the path of a new file.
    """
    path = Path(path).resolve()  # a symbolic link stays; its target is replaced
    recover(path)
    must_not_exist(path, overwrite)
    # a mount point, or a folder with files to keep, is not exchanged: its files are replaced one by
    # one by renames, for which the new files must be on the same disk
    create_within = path.is_dir() and (
        os.path.ismount(path) or bool(_files_to_keep(path, (), replaces))
    )
    with disk_errors(path), temporary(path, within=create_within) as temporary_folder:
        (temporary_folder / NEW).mkdir()
        yield temporary_folder / NEW
        _flush_and_move(temporary_folder, path, overwrite, replaces)


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file to write. When the block ends, the file is flushed to disk
    and becomes ``path``. If the block raises, it is removed and ``path`` stays unchanged.

    Raises OutputExistsError if ``path`` exists and ``overwrite`` is False, or if it is a folder."""
    path = Path(path).resolve()
    must_not_exist(path, overwrite, is_folder=False)
    with disk_errors(path), temporary(path) as temporary_folder:
        (temporary_folder / NEW).mkdir()
        temporary_file = temporary_folder / NEW / path.name
        yield temporary_file
        _flush(temporary_folder / NEW, _folder_mode(temporary_folder) & 0o666)
        if overwrite:
            temporary_file.replace(path)
        elif not _rename(temporary_file, path, _RENAME_NOREPLACE):
            must_not_exist(path, overwrite, is_folder=False)
            temporary_file.replace(path)
        flush_folder(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write ``text``, encoded as UTF-8, to ``path`` atomically; an existing file is replaced."""
    with new_file(path, overwrite=True) as file:
        file.write_text(text, encoding="utf-8")


def _flush_and_move(
    temporary_folder: Path, path: Path, overwrite: bool, replaces: Sequence[str]
) -> None:
    """Flush the filled folder (``NEW`` in the temporary folder) to disk, then move it to ``path``.
    The other arguments are those of ``new_folder``."""
    filled_folder, mode = temporary_folder / NEW, _folder_mode(temporary_folder)
    filled_folder.chmod(mode)
    _flush(filled_folder, mode & 0o666)
    _move_into_place(temporary_folder, path, overwrite, replaces)
    flush_folder(path.parent)


def _move_into_place(
    temporary_folder: Path, path: Path, overwrite: bool, replaces: Sequence[str]
) -> None:
    """Rename the filled folder to ``path`` if no folder with files is there. Otherwise exchange the
    two if no file has to stay, and if that is not possible, replace the files one by one."""
    filled_folder = temporary_folder / NEW
    if temporary_folder.parent != path and (not path.exists() or _is_empty(path)):
        try:
            filled_folder.rename(path)  # this also replaces an empty folder
            return
        except OSError as error:
            # another process created the path, or the empty folder is a mount point: go on below
            if error.errno not in _TARGET_TAKEN:
                raise
    must_not_exist(path, overwrite)
    new_names = [file.name for file in filled_folder.iterdir() if not _is_folder(file)]
    keeps_nothing = not _files_to_keep(path, new_names, replaces)
    if keeps_nothing and not _contains_working_directory(path) and _exchange(filled_folder, path):
        # move back files that another process wrote to the old folder just before the exchange
        for name in _files_to_keep(filled_folder, new_names, replaces):
            (filled_folder / name).rename(path / name)
        return
    written_names = sorted(
        files_in(filled_folder), key=lambda name: (_pattern_index(name, replaces), name)
    )
    old_names = (
        files_in(path)
        if EVERYTHING in replaces
        else [file.name for file in path.iterdir() if not _is_folder(file)]
    )
    removed_names = [
        name
        for name in old_names
        if name not in written_names and _pattern_index(name, replaces) < len(replaces)
    ]
    _refuse_conflicts(path, written_names, removed_names)
    write_plan(temporary_folder, written_names[0], written_names, removed_names)
    move_files(temporary_folder, path)


def _refuse_conflicts(
    path: Path, written_names: Sequence[str], removed_names: Sequence[str]
) -> None:
    """Raise OutputExistsError if a folder has the path of a file to write, or a file that is not to
    be removed has the path of a folder to create. All names are relative to ``path``."""
    parents = {parent.as_posix() for name in written_names for parent in Path(name).parents}
    folder_conflicts = [name for name in written_names if _is_folder(path / name)]
    file_conflicts = [
        name
        for name in sorted(parents.difference(removed_names))
        if os.path.lexists(path / name) and not (path / name).is_dir()
    ]
    for names, old_kind, new_kind in (
        (folder_conflicts, "folder", "file"),
        (file_conflicts, "file", "folder"),
    ):
        if names:
            raise OutputExistsError(
                f"{path}, in which {listing(names, 3)} is a {old_kind}",
                f"a {new_kind}, or nothing, in its place",
                "choose another path",
            )


def _pattern_index(name: str, patterns: Sequence[str]) -> int:
    """Return the index of the first pattern that matches a name; ``len(patterns)`` if none does."""
    return next(
        (index for index, pattern in enumerate(patterns) if fnmatchcase(name, pattern)),
        len(patterns),
    )


def _files_to_keep(folder: Path, new_names: Sequence[str], replaces: Sequence[str]) -> list[str]:
    """Return the names in a folder that are not to be replaced: all folders, and files that are not
    in ``new_names`` and match no pattern of ``replaces``."""
    if EVERYTHING in replaces:
        return []
    return [
        file.name
        for file in folder.iterdir()
        if _is_folder(file)
        or (_pattern_index(file.name, replaces) == len(replaces) and file.name not in new_names)
    ]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and all(INNER_PATTERN.fullmatch(file.name) for file in path.iterdir())


def _contains_working_directory(path: Path) -> bool:
    """Return whether the working directory of this process is in the folder ``path``. It would be
    removed with the old folder after an exchange."""
    try:
        return Path.cwd().is_relative_to(path)
    except FileNotFoundError:  # the working directory was removed
        return False


def _exchange(first_path: Path, second_path: Path) -> bool:
    """Swap two paths in one step; return False if the operating system cannot."""
    return _rename(first_path, second_path, _RENAME_EXCHANGE)


def _rename(source: Path, target: Path, renameat2_flag: int) -> bool:
    """Rename with a flag of Linux's renameat2; return False if the system or disk does not support
    the flag."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return (
        rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), renameat2_flag) == 0
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A context manager that converts the exceptions of torch and safetensors for failed writes to
    an OSError that names ``path``. Other exceptions stay unchanged."""
    try:
        yield
    except Exception as error:
        error_text = str(error)
        os_error_match = re.search(r"os error (\d+)", error_text)
        if isinstance(error, OSError) or not (
            os_error_match
            or "PytorchStreamWriter" in error_text
            or "inline_container" in error_text
        ):
            raise
        # torch's writer does not say why it failed; the usual reason is a full disk
        free_bytes = shutil.disk_usage(path.parent).free
        likely_errno = errno.ENOSPC if free_bytes < 64 * 2**20 else errno.EIO
        error_number = int(os_error_match.group(1)) if os_error_match else likely_errno
        raise OSError(error_number, os.strerror(error_number), str(path)) from error


def _flush(folder: Path, mode: int) -> None:
    """Flush all files in a folder to disk, and give them ``mode``, the permissions of a new file
    (safetensors creates files with 0600)."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            flush_folder(file)
    flush_folder(folder)


def _folder_mode(folder: Path) -> int:
    """Return the permissions that new folders in ``folder`` get.

    They are read from a probe folder. The umask itself can only be read by changing it for a moment
    for all threads, so files that other threads create meanwhile would get wrong permissions."""
    probe_folder = folder / ".mode"
    probe_folder.mkdir(exist_ok=True)  # a killed process may have left one behind
    try:
        return probe_folder.stat().st_mode & 0o777
    finally:
        probe_folder.rmdir()
