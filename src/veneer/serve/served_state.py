"""Read and write ``served.json`` in the folder of adapters that a server serves. This file records
the changes that clients made through the API, so that they outlast a restart of the server.

    {"format": 1, "names": {"fr": {"path": "runs/7/adapter"}}, "pinned": [], "hidden": []}

``names``: the adapters that clients added, with their paths. ``pinned``: the names of adapters that
stay in memory. ``hidden``: the names of adapters in the folder that clients removed; their files
remain, but they are not served.
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
    """The content of ``served.json``. ``names``: the paths, by name, of adapters that clients
    added. ``pinned``: the names of adapters that stay in memory. ``hidden``: the names of adapters
    in the folder that clients removed."""

    names: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()


def read_state(folder: Path) -> ServedState:
    """Read ``served.json`` in ``folder``. Without this file, the result is empty. ``ConfigError``:
    the file is damaged, too large or no regular file."""
    state_path = folder / STATE_FILE
    try:
        file_status = state_path.stat()
        if not stat.S_ISREG(file_status.st_mode):  # reading a pipe or device may never end
            raise ValueError("no regular file")
        if file_status.st_size > MAX_STATE_BYTES:
            raise ValueError(f"more than {MAX_STATE_BYTES:,} bytes")
        content = parse(state_path.read_bytes())
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
            f"{state_path}, which is damaged ({error})",
            "what the server wrote",
            "mend or delete it",
        ) from error


def write_state(folder: Path, state: ServedState) -> None:
    entries = {name: {"path": path} for name, path in sorted(state.names.items())}
    name_lists = {"pinned": sorted(state.pinned), "hidden": sorted(state.hidden)}
    text = json.dumps({"format": FORMAT, "names": entries, **name_lists}, indent=1) + "\n"
    write_whole(folder / STATE_FILE, text)


@contextmanager
def lock_state(folder: Path) -> Iterator[ServedState]:
    """Lock ``folder`` and yield the content of its ``served.json``. Other servers that change the
    file wait until the ``with`` block ends. If the file system has no locks, this logs a warning
    and goes on. The lock is on the folder itself, because a read-only mount cannot have a lock
    file."""
    # imported here, so that a system without fcntl, such as Windows, can still serve adapters; only
    # changes through the API fail there
    import fcntl

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
        # unlock explicitly: if a process was forked meanwhile, it has a copy of the descriptor, and
        # closing the descriptor here would leave the folder locked
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
