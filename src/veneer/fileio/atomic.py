"""Writing a folder or a file so that a crash leaves the old one or the new one, never a half.

A new folder gets its name by a rename. Where a folder of that name may be replaced, the two are
exchanged in one step, if all that the old one holds is to be replaced and the system can. Otherwise
the files are replaced in place, one by one, and those of others stay where they are
(``temporary.py``).
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
    NEW,
    WITHIN,
    files_in,
    flush_folder,
    move_files,
    recover,
    temporary,
    write_plan,
)

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
#: as a pattern: whatever the folder holds is replaced, as nobody but Veneer writes to it
EVERYTHING = "*"
#: what a rename says of a path at which there is something, or where something is mounted
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EBUSY)


def must_not_exist(path: Path, overwrite: bool, *, folder: bool = True) -> None:
    """Raise OutputExistsError if ``path`` is there and may not be replaced; an empty folder counts
    as nothing. A file is never replaced by a folder, nor a folder by a file (``folder``: which of
    them is to be written)."""
    if overwrite and folder and path.exists() and not path.is_dir():
        raise OutputExistsError(
            f"{path}, which is a file", "a path for a folder", "choose another, or remove the file"
        )
    if not folder and path.is_dir():
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
    """A temporary folder to fill, which becomes ``path`` when the block ends: flushed to disk
    first. When the block raises, nothing of it stays and ``path`` is as it was.

    Args:
        overwrite: replace files of a folder that exists: those that are written anew, and those of
            ``replaces``. All others stay.
        replaces: patterns of names that an earlier one of the same kind may hold; "*" for a folder
            that is replaced whole. The file without which nobody reads such a folder matches the
            first one.

    Raises:
        OutputExistsError: ``path`` exists, is not an empty folder, and ``overwrite`` is False; or
            it is a file. That is looked at before the block, and as the folder gets its name.
    """
    path = Path(path).resolve()  # a link stays, and what it leads to is replaced
    recover(path)
    must_not_exist(path, overwrite)
    within = path.is_dir() and (os.path.ismount(path) or bool(_files_to_keep(path, (), replaces)))
    with disk_errors(path), temporary(path, within=within) as folder:
        (folder / NEW).mkdir()
        yield folder / NEW
        _finish(folder, path, overwrite, replaces)


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path of a temporary file to write, which becomes ``path`` when the block ends, as with
    ``new_folder``. ``OutputExistsError``: ``path`` exists and ``overwrite`` is False, or is a
    folder."""
    path = Path(path).resolve()
    must_not_exist(path, overwrite, folder=False)
    with disk_errors(path), temporary(path) as folder:
        (folder / NEW).mkdir()
        file = folder / NEW / path.name
        yield file
        _flush(folder / NEW, _mode(folder) & 0o666)
        if overwrite:
            file.replace(path)
        elif not _rename(file, path, _RENAME_NOREPLACE):
            must_not_exist(path, overwrite, folder=False)
            file.replace(path)
        flush_folder(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` (in UTF-8) to ``path`` in one step, over what is there."""
    with new_file(path, overwrite=True) as file:
        file.write_text(text, encoding="utf-8")


def _finish(container: Path, path: Path, overwrite: bool, replaces: Sequence[str]) -> None:
    """Let ``new`` in a temporary folder become ``path``: flushed to disk first."""
    new, mode = container / NEW, _mode(container)
    new.chmod(mode)
    _flush(new, mode & 0o666)
    _put(container, path, overwrite, replaces)
    flush_folder(path.parent)


def _put(container: Path, path: Path, overwrite: bool, replaces: Sequence[str]) -> None:
    new = container / NEW
    if container.parent != path and (not path.exists() or _is_empty(path)):
        try:
            new.rename(path)  # an empty folder gives way
            return
        except (
            OSError
        ) as error:  # something is there by now, or the empty folder is one that is mounted
            if error.errno not in _TAKEN:
                raise
    must_not_exist(path, overwrite)
    written = [file.name for file in new.iterdir()]
    if not _files_to_keep(path, written, replaces) and not _holds_us(path) and _exchange(new, path):
        for name in _files_to_keep(new, written, replaces):  # that came in between
            (new / name).rename(path / name)
        return
    writes = sorted(files_in(new), key=lambda name: (_rank(name, replaces), name))
    if blocked := [
        name for name in writes if (path / name).is_dir() and not (path / name).is_symlink()
    ]:
        conflict = f"{path}, in which {listing(blocked, 3)} is a folder"
        raise OutputExistsError(conflict, "a file, or nothing, in its place", "choose another path")
    old = (
        files_in(path)
        if EVERYTHING in replaces
        else [file.name for file in path.iterdir() if not _is_folder(file)]
    )
    removes = [name for name in old if name not in writes and _rank(name, replaces) < len(replaces)]
    write_plan(container, writes[0], writes, removes)
    move_files(container, path)


def _rank(name: str, patterns: Sequence[str]) -> int:
    """The number of the first pattern that a name matches, or how many there are."""
    return next(
        (rank for rank, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), len(patterns)
    )


def _files_to_keep(folder: Path, written: Sequence[str], replaces: Sequence[str]) -> list[str]:
    """The names in a folder that are not replaced: files that are not ``written`` and match no
    pattern, and all folders."""
    if EVERYTHING in replaces:
        return []
    return [
        file.name
        for file in folder.iterdir()
        if _is_folder(file)
        or (_rank(file.name, replaces) == len(replaces) and file.name not in written)
    ]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and all(WITHIN.fullmatch(file.name) for file in path.iterdir())


def _holds_us(path: Path) -> bool:
    """Whether this process works in the folder, which an exchange would take from it."""
    try:
        return Path.cwd().is_relative_to(path)
    except FileNotFoundError:  # it was removed
        return False


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step, where the system can; False if it cannot."""
    return _rename(first, second, _RENAME_EXCHANGE)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Rename in one step, as a flag of Linux's renameat2 says; False if the system or the disk
    cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise when a write fails into the OSError that it was."""
    try:
        yield
    except Exception as error:
        text = str(error)
        os_error = re.search(r"os error (\d+)", text)
        if isinstance(error, OSError) or not (
            os_error or "PytorchStreamWriter" in text or "inline_container" in text
        ):
            raise
        # torch's writer says only that it failed; a disk without room is by far the usual reason
        room = shutil.disk_usage(path.parent).free
        code = (
            int(os_error.group(1)) if os_error else errno.ENOSPC if room < 64 * 2**20 else errno.EIO
        )
        raise OSError(code, os.strerror(code), str(path)) from error


def _flush(folder: Path, mode: int) -> None:
    """Everything on disk, with the mode of a new file (safetensors writes for the owner alone)."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            flush_folder(file)
    flush_folder(folder)


def _mode(folder: Path) -> int:
    """The mode that a new folder gets in ``folder``. Asking the umask itself means setting it, for
    all threads: files that others make meanwhile would be anybody's, and of two that ask at once
    one would leave it so."""
    probe = folder / ".mode"
    probe.mkdir(exist_ok=True)  # a run that was killed may have left one
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.rmdir()
