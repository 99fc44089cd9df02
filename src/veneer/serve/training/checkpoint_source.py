"""Checkpoints of runs as adapters by name: a source of the catalogue.

tinker://RUN/KIND/NAME     a checkpoint
tinker://RUN/now           the run's weights when samples of it were last requested
"""

from __future__ import annotations

from veneer.errors import SelectionError
from veneer.serve.training.run_trainer import ADAPTER
from veneer.serve.training.store import Checkpoint, Store, parse_checkpoint_path
from veneer.store.catalogue import Location

SCHEME = "tinker://"
#: last part of the name of a run's current weights
NOW = "now"


def current_run(name: str) -> str | None:
    """The run of a name tinker://RUN/now; None for any other name, also for that of a checkpoint
    called "now"."""
    run, _, last = name.removeprefix(SCHEME).rpartition("/")
    return run if last == NOW and run and "/" not in run else None


class CheckpointSource:
    """The checkpoints in the folder of a training service. Their files are never changed."""

    address = SCHEME

    def __init__(self, store: Store) -> None:
        self.store = store

    def list(self) -> dict[str, Location]:
        checkpoints = [
            Checkpoint(row["run"], row["kind"], row["name"]) for row in self.store.checkpoints()
        ]
        return {checkpoint.path: self._locate(checkpoint) for checkpoint in checkpoints}

    def resolve(self, name: str) -> Location:
        """The folder of a name. ``DataError``: the name has another form. ``SelectionError``: there
        is no such checkpoint."""
        run = current_run(name)
        if run is not None:
            return Location(self.store.folder_of(run) / NOW / ADAPTER)
        checkpoint = parse_checkpoint_path(name)
        if self.store.checkpoint(checkpoint) is None:
            raise SelectionError(name, "a checkpoint that is there", "list the run's checkpoints")
        return self._locate(checkpoint)

    def _locate(self, checkpoint: Checkpoint) -> Location:
        return Location(self.store.files_of(checkpoint) / ADAPTER)
