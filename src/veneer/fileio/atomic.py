"""Writing a folder or a file so that a crash leaves the old one or the new one, never a half."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import OutputExistsError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def must_not_exist(path: Path, overwrite: bool) -> None:
    """Raise OutputExistsError if ``path`` is there and may not be replaced; an empty folder counts as nothing."""
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise OutputExistsError(f"{path}, which exists", "a new path", "choose another, or allow overwriting")


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` when the block ends: flushed to disk first, then renamed in
    one step. When the block raises, nothing of it stays and ``path`` is as it was. ``OutputExistsError``: ``path``
    exists, is not an empty folder, and ``overwrite`` is False."""
    path = Path(path).resolve()  # a link stays, and what it leads to is replaced
    must_not_exist(path, overwrite)
    with _temporary(path) as folder:
        yield folder
        publish(folder, path)


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path of a temporary file to write, which becomes ``path`` when the block ends, as with ``new_folder``.
    ``OutputExistsError``: ``path`` exists and ``overwrite`` is False, or is a folder."""
    path = Path(path).resolve()
    must_not_exist(path, overwrite)
    if path.is_dir():
        raise OutputExistsError(f"the folder {path}", "a path for a file", "name a file in it")
    with _temporary(path) as folder:
        yield folder / path.name
        _flush(folder, _mode(folder) & 0o666)
        (folder / path.name).replace(path)
        _flush_folder(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` (in UTF-8) to ``path`` in one step, over what is there."""
    with new_file(path, overwrite=True) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, which is gone when the block ends."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield folder
        finally:
            _remove(folder)


def publish(temporary: Path, path: Path) -> None:
    """Let a folder that is whole take the place of ``path``, beside which it stands: flushed to disk first, then
    renamed in one step. What was there before then has the name of ``temporary``, or is gone."""
    mode = _mode(temporary)
    temporary.chmod(mode)
    _flush(temporary, mode & 0o666)
    _put(temporary, path)
    _flush_folder(path.parent)


def _put(temporary: Path, path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        temporary.rename(path)  # an empty folder gives way
    elif not _exchange(temporary, path):
        aside = path.with_name(f".{path.name}.replaced")
        _remove(aside)
        path.rename(aside)
        temporary.rename(path)
        _remove(aside)


def _remove(path: Path) -> None:
    """Remove a folder or, where a folder took the place of one, a file."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, where the system can (Linux's renameat2); False if it cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise when a write fails into the OSError that it was."""
    try:
        yield
    except Exception as error:
        text = str(error)
        found = re.search(r"os error (\d+)", text)
        if isinstance(error, OSError) or not (found or "PytorchStreamWriter" in text or "inline_container" in text):
            raise
        # torch's writer says only that it failed; a disk without room is by far the usual reason
        room = shutil.disk_usage(path.parent).free
        code = int(found.group(1)) if found else errno.ENOSPC if room < 64 * 2**20 else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def _flush(folder: Path, mode: int) -> None:
    """Everything on disk, with the mode of a new file (safetensors writes for the owner alone)."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            _flush_folder(file)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode(folder: Path) -> int:
    """The mode that a new folder gets in ``folder``. Asking the umask itself means setting it, for all threads: files
    that others make meanwhile would be anybody's, and of two that ask at once one would leave it so."""
    probe = folder / ".mode"
    probe.mkdir(exist_ok=True)  # a run that was killed may have left one
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.rmdir()
