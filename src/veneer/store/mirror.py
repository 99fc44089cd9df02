"""Adapters at a remote place, by name, as folders of this machine.

    PLACE/french/latest        ``veneer push ADAPTER PLACE/french`` wrote it: the hash of the newest
    PLACE/french/<hash>/…      its files
    PLACE/german/…             or the files of an adapter alone, copied there by other means

``Mirror.look`` lists the place, fetches what is new and returns {name: folder}. A folder is one of
the cache of ``pull``: verified, named by its content and never written to again, so that a changed
adapter has another folder. One listing tells what has changed; what has not is not read again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from veneer.errors import RemoteError, VeneerError
from veneer.formats import peft
from veneer.store.library import NAME
from veneer.store.remote import LATEST, file_system, parse_place, pull, store_errors

log = logging.getLogger("veneer.store")

#: adapters that are fetched at one time
AT_ONCE = 8


class Mirror:
    """The adapters at a place such as s3://bucket/adapters. One thread at a time calls ``look``."""

    def __init__(self, place: str, cache: Path | None = None) -> None:
        self._place, self._cache = parse_place(place, None), cache
        if self._place.kind != "store":
            expected = "a folder, or a place of fsspec such as s3://bucket/adapters"
            raise RemoteError(f"adapters at {place}", expected, "pull what you need into a folder")
        self._folders: dict[str, Path] = {}
        self._stamps: dict[str, str] = {}  # of what was fetched
        self._before: dict[str, str] | None = None  # of what the last look saw
        self._said: dict[str, str] = {}

    @property
    def place(self) -> str:
        return self._place.where

    def look(self) -> Mapping[str, Path]:
        """The adapters that are there now. What cannot be fetched is named in the log; an older one
        of its name stays.

        Raises:
            RemoteError: the place cannot be read.
        """
        with store_errors(self._place, "read"):
            system, root = file_system(self._place)
            files = system.find(root, detail=True)
        there = stamps(root, files)
        for name in self._folders.keys() - there.keys():
            del self._folders[name]
        # files that were copied there by other means are whole when they are the same at two looks
        now = {name: stamp for name, (stamp, _) in there.items()}
        before = (
            now if self._before is None else self._before
        )  # at the start there is nothing to compare with
        new = [
            name
            for name, (stamp, pushed) in there.items()
            if stamp != self._stamps.get(name) and (pushed or stamp == before.get(name))
        ]
        self._before = now
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="veneer-mirror") as pool:
            for name, done in zip(new, pool.map(self._fetch, new), strict=True):
                if isinstance(done, Path):
                    self._folders[name], self._stamps[name] = done, now[name]
                    self._said.pop(name, None)
                elif self._said.get(name) != str(done):  # it is tried again at the next look
                    self._said[name] = str(done)
                    log.warning("Not served: %s: %s", name, done)
        self._stamps = {name: stamp for name, stamp in self._stamps.items() if name in there}
        return dict(self._folders)

    def _fetch(self, name: str) -> Path | Exception:
        try:
            return pull(f"{self.place}/{name}", cache=self._cache)
        except (VeneerError, OSError) as error:
            return error


def stamps(root: str, files: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, bool]]:
    """What a listing says of each adapter: a text that changes when the adapter does, and whether
    it was pushed (else it is plain files). ``files``: what fsspec knows of each file below
    ``root``, by path."""
    direct: dict[str, dict[str, str]] = {}
    for path, known in files.items():
        parts = PurePosixPath(path).relative_to(root).parts
        if len(parts) == 2 and NAME.fullmatch(parts[0]):
            direct.setdefault(parts[0], {})[parts[1]] = repr(
                sorted((key, repr(known[key])) for key in known)
            )
    found = {}
    for name, own in sorted(direct.items()):
        if LATEST in own:
            found[name] = own[LATEST], True
        elif peft.CONFIG in own and peft.TENSORS in own:
            found[name] = repr(sorted(own.items())), False
    return found
