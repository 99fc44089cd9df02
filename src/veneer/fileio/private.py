"""Folders and files that hold users' data are made for their owner alone, whatever the umask."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path


def private_folder(path: Path) -> Path:
    """The folder, which is made if it is not there. One that was open to others is closed to
    them."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        with suppress(PermissionError):  # another user's, who decides
            path.chmod(0o700)
    return path


def private_file(path: Path) -> Path:
    """The file, which is made empty if it is not there. One that is there stays as its owner has
    it."""
    path.touch(mode=0o600, exist_ok=True)
    return path
