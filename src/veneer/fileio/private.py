"""Create folders and files for users' data that only their owner can read, whatever the umask."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path


def private_folder(path: Path) -> Path:
    """Create the folder if needed, and remove the permissions of other users. Returns the path."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        with suppress(PermissionError):  # only the folder's owner may change its permissions
            path.chmod(0o700)
    return path


def private_file(path: Path) -> Path:
    """Create an empty file if there is none; an existing file keeps its permissions. Returns the
    path."""
    path.touch(mode=0o600, exist_ok=True)
    return path
