"""Locks between processes: a lock file that exists while a process holds the lock.

The operating system releases the lock when its holder dies. For a lock that is held for a long
time, the file ``NAME.holder`` names the holder. The lock file itself cannot: some versions of
filelock truncate it when another process tries to acquire the lock.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

#: the ending of the file that names the holder of a lock
HOLDER_SUFFIX = ".holder"
#: seconds to wait for another process that replaces files
PATIENCE = 600.0


@contextmanager
def hold_lock(path: Path, refusal: Callable[[str], Exception] | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` inside of the block, and remove it afterwards.

    If another process holds the lock, raise ``refusal(description of that process)``. If
    ``refusal`` is None, wait for up to PATIENCE seconds instead, then raise TimeoutError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = acquire(path, 0 if refusal else PATIENCE)
    holder_file = path.with_name(path.name + HOLDER_SUFFIX)
    if lock is None:
        raise (
            TimeoutError(f"{path} is locked by another process")
            if refusal is None
            else refusal(_describe_holder(holder_file))
        )
    try:
        if refusal is not None:
            holder_file.unlink(missing_ok=True)  # it may be a link in a stranger's folder
            process_text = f"{os.getpid()} on {socket.gethostname()}: {_program_name()}"
            holder_file.write_text(f"another process ({process_text})", encoding="utf-8")
        yield
    finally:
        if refusal is not None:
            holder_file.unlink(missing_ok=True)
        # on systems that cannot delete open files, the empty lock file stays
        with suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


def acquire(path: Path, patience: float = 0) -> Any:
    """Acquire the lock file ``path``, which is created if needed. Returns the lock, or None if
    another process holds it for more than ``patience`` seconds.

    A process removes the file before it releases the lock. A lock on a removed file is worthless,
    because another process can create and lock a new file of the same name, so this function then
    tries again."""
    from filelock import FileLock, Timeout  # imported here, because the import takes 10 ms

    while True:
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=patience, poll_interval=0.01)
        except Timeout:
            return None
        if path.exists():
            return lock
        lock.release()  # the previous holder has just removed the file


def _describe_holder(holder_file: Path) -> str:
    try:
        return holder_file.read_text(encoding="utf-8") or "another process"
    except FileNotFoundError:
        return "another process"


def _program_name() -> str:
    return (
        " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]) if sys.argv and sys.argv[0] else "python"
    )
