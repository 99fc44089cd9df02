"""Locks between processes: a lock file that is there for as long as a process holds it.

The system lets go of a lock when its holder dies. Beside a lock that is held for long stands
``NAME.holder``, which says who holds it: the lock file itself is emptied by some versions of
filelock when another process tries it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HOLDER = ".holder"
#: seconds that a process waits for another one that replaces files
PATIENCE = 600.0


@contextmanager
def locked(path: Path, refusal: Callable[[str], Exception] | None = None) -> Iterator[None]:
    """Hold the lock file ``path``, and remove it afterwards. While another process holds it: raise
    ``refusal`` of a text that names that process; where it is None, wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = acquire(path, 0 if refusal else PATIENCE), path.with_name(path.name + HOLDER)
    if lock is None:
        raise (
            TimeoutError(f"{path} is locked by another process")
            if refusal is None
            else refusal(_read(holder))
        )
    try:
        if refusal is not None:
            description = f"{os.getpid()} on {socket.gethostname()}: {_program()}"
            holder.write_text(f"another process ({description})", encoding="utf-8")
        yield
    finally:
        if refusal is not None:
            holder.unlink(missing_ok=True)
        # a system that keeps open files keeps this one, which is empty
        with suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


def acquire(path: Path, patience: float = 0) -> Any:
    """The lock of the file ``path``, which is made if it is not there; None if another holder has
    it for so many seconds. A holder that ends removes the file, so that a lock counts only while
    its file is there."""
    from filelock import FileLock, Timeout  # a hundredth of a second

    while True:
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=patience, poll_interval=0.01)
        except Timeout:
            return None
        if path.exists():
            return lock
        lock.release()  # its holder removed it in between


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except FileNotFoundError:
        return "another process"


def _program() -> str:
    return (
        " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]) if sys.argv and sys.argv[0] else "python"
    )
