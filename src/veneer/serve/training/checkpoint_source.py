"""Checkpoints of runs as adapters by name, one more source of the catalogue.

tinker://RUN/KIND/NAME     a checkpoint
tinker://RUN/now           a run as it was when its samples were last asked for
"""

from __future__ import annotations

from veneer.errors import SelectionError
from veneer.serve.training.store import Place, Store, place_of
from veneer.serve.training.trainer import ADAPTER
from veneer.store.catalogue import Location

SCHEME = "tinker://"
#: how the name of a run as it is at that moment ends
NOW = "now"


def current_run(name: str) -> str | None:
    """The run of a name tinker://RUN/now; None for any other name. A checkpoint may be called "now"
    too."""
    run, _, last = name.removeprefix(SCHEME).rpartition("/")
    return run if last == NOW and run and "/" not in run else None


class CheckpointSource:
    """The checkpoints in the folder of a training service. No file of one is ever changed."""

    address = SCHEME

    def __init__(self, store: Store) -> None:
        self.store = store

    def list(self) -> dict[str, Location]:
        checkpoints = [
            Place(row["run"], row["kind"], row["name"]) for row in self.store.checkpoints()
        ]
        return {checkpoint.path: self._locate(checkpoint) for checkpoint in checkpoints}

    def resolve(self, name: str) -> Location:
        """``DataError``: it is no such name. ``SelectionError``: there is no such checkpoint."""
        run = current_run(name)
        if run is not None:
            return Location(self.store.folder_of(run) / NOW / ADAPTER)
        checkpoint = place_of(name)
        if self.store.checkpoint(checkpoint) is None:
            raise SelectionError(name, "a checkpoint that is there", "list the run's checkpoints")
        return self._locate(checkpoint)

    def _locate(self, checkpoint: Place) -> Location:
        return Location(self.store.files_of(checkpoint) / ADAPTER)
