"""Mirror the adapters at a remote place to folders of this machine.

    PLACE/french/latest        written by ``veneer push ADAPTER PLACE/french``: the newest hash
    PLACE/french/<hash>/…      its files
    PLACE/german/…             or only the files of an adapter, copied there by other means

``Mirror.look`` lists the place, fetches new adapters and returns {name: folder}. The folders are
those of ``pull``'s cache: verified, named by their content and never changed, so that a changed
adapter has another folder. Changes are detected by one listing; unchanged adapters are not read
again.
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

#: how many adapters to fetch at the same time
AT_ONCE = 8


class Mirror:
    """The adapters at a place such as s3://bucket/adapters. One thread at a time calls ``look``."""

    def __init__(self, address: str, cache: Path | None = None) -> None:
        self._address, self._cache = parse_place(address, None), cache
        if self._address.kind != "store":
            expected = "a folder, or a place of fsspec such as s3://bucket/adapters"
            raise RemoteError(
                f"adapters at {address}", expected, "pull what you need into a folder"
            )
        self._folders: dict[str, Path] = {}
        self._stamps: dict[str, str] = {}  # stamps of the fetched adapters
        self._before: dict[str, str] | None = None  # stamps of the previous listing
        self._warnings: dict[str, str] = {}

    @property
    def address(self) -> str:
        return self._address.address

    def look(self) -> Mapping[str, Path]:
        """The adapters at the place now, fetched. If one cannot be fetched, a warning is logged and
        the previous version of its name stays.

        Raises:
            RemoteError: the place cannot be read.
        """
        with store_errors(self._address, "read"):
            system, root = file_system(self._address)
            files = system.find(root, detail=True)
        listing = list_stamps(root, files)
        for name in self._folders.keys() - listing.keys():
            del self._folders[name]
        # plain files count as complete once two listings show the same state
        stamps = {name: stamp for name, (stamp, _) in listing.items()}
        before = (
            stamps if self._before is None else self._before
        )  # the first listing has nothing to compare with
        new = [
            name
            for name, (stamp, pushed) in listing.items()
            if stamp != self._stamps.get(name) and (pushed or stamp == before.get(name))
        ]
        self._before = stamps
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="veneer-mirror") as pool:
            for name, done in zip(new, pool.map(self._fetch, new), strict=True):
                if isinstance(done, Path):
                    self._folders[name], self._stamps[name] = done, stamps[name]
                    self._warnings.pop(name, None)
                elif self._warnings.get(name) != str(done):  # the next call tries it again
                    self._warnings[name] = str(done)
                    log.warning("Not served: %s: %s", name, done)
        self._stamps = {name: stamp for name, stamp in self._stamps.items() if name in listing}
        return dict(self._folders)

    def _fetch(self, name: str) -> Path | Exception:
        try:
            return pull(f"{self.address}/{name}", cache=self._cache)
        except (VeneerError, OSError) as error:
            return error


def list_stamps(root: str, files: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, bool]]:
    """For each adapter of a listing, (a stamp that changes when the adapter does, whether it was
    pushed rather than copied as plain files). ``files``: fsspec's details of each file below
    ``root``, by path."""
    direct: dict[str, dict[str, str]] = {}
    for path, details in files.items():
        steps = PurePosixPath(path).relative_to(root).parts
        if len(steps) == 2 and NAME.fullmatch(steps[0]):
            direct.setdefault(steps[0], {})[steps[1]] = repr(
                sorted((key, repr(details[key])) for key in details)
            )
    adapters = {}
    for name, files_of_name in sorted(direct.items()):
        if LATEST in files_of_name:
            adapters[name] = files_of_name[LATEST], True
        elif peft.CONFIG in files_of_name and peft.TENSORS in files_of_name:
            adapters[name] = repr(sorted(files_of_name.items())), False
    return adapters
