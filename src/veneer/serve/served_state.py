"""Read and write ``served.json`` in a folder of adapters. It records the changes made through the
API, so that they outlast a restart of the server.

    {"format": 1, "names": {"fr": {"path": "runs/7/adapter"}}, "pinned": [], "hidden": []}

``names``: adapters that the API added, with their paths. ``pinned``: adapters that stay in memory.
``hidden``: adapters of the folder that the API removed.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from veneer.errors import ConfigError
from veneer.fileio.atomic import write_whole
from veneer.fileio.untrusted import parse
from veneer.store.library import NAME

log = logging.getLogger("veneer.serve")

FORMAT, STATE_FILE = 1, "served.json"
MAX_STATE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ServedState:
    """The content of ``served.json``: ``names`` has adapter paths by name."""

    names: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()


def read_state(folder: Path) -> ServedState:
    """Read ``served.json``; without such a file the state is empty. ``ConfigError``: the file is
    damaged."""
    file = folder / STATE_FILE
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise ValueError("no regular file")
        if status.st_size > MAX_STATE_BYTES:
            raise ValueError(f"more than {MAX_STATE_BYTES:,} bytes")
        content = parse(file.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        names = {name: entry["path"] for name, entry in content["names"].items()}
        pinned, hidden = content["pinned"], content["hidden"]
        are_lists = isinstance(pinned, list) and isinstance(hidden, list)
        texts = [*names, *names.values(), *pinned, *hidden]
        are_texts = all(isinstance(text, str) for text in texts)
        if not (are_lists and are_texts) or not all(map(NAME.fullmatch, names)):
            raise ValueError("no lists of names")
        return ServedState(names, frozenset(pinned), frozenset(hidden))
    except FileNotFoundError:
        return ServedState()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file}, which is damaged ({error})", "what the server wrote", "mend or delete it"
        ) from error


def write_state(folder: Path, state: ServedState) -> None:
    names = {name: {"path": path} for name, path in sorted(state.names.items())}
    lists = {"pinned": sorted(state.pinned), "hidden": sorted(state.hidden)}
    text = json.dumps({"format": FORMAT, "names": names, **lists}, indent=1) + "\n"
    write_whole(folder / STATE_FILE, text)


@contextmanager
def lock_state(folder: Path) -> Iterator[ServedState]:
    """Yield the content of ``served.json`` in the folder, which no other server changes within this
    block. The folder itself is locked, because a read-only mount cannot have a lock file."""
    import fcntl  # here, so that a system without fcntl can serve, though not change adapters

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            log.warning(
                "The adapter folder cannot be locked (%s): let no other server change it",
                error.strerror,
            )
        yield read_state(folder)
    finally:
        # closing is not enough: a process forked meanwhile also has the descriptor, and so the lock
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
