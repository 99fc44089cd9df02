"""A source of the catalogue (``store/catalogue.py``): checkpoints of runs, as adapters with names.

tinker://RUN/KIND/NAME     a checkpoint
tinker://RUN/now           the weights of a run at the time when samples were last requested
"""

from __future__ import annotations

from veneer.errors import SelectionError
from veneer.serve.training.run_trainer import ADAPTER
from veneer.serve.training.store import Checkpoint, Store, parse_checkpoint_path
from veneer.store.catalogue import Location

SCHEME = "tinker://"
#: the last path component in the name of a run's current weights
CURRENT = "now"


def parse_current_run(name: str) -> str | None:
    """The run id in a name tinker://RUN/now; None for any other name, even for the name of a
    checkpoint called "now"."""
    run, _, last_component = name.removeprefix(SCHEME).rpartition("/")
    return run if last_component == CURRENT and run and "/" not in run else None


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
        """The folder of the adapter with this name. ``DataError``: the name has another form.
        ``SelectionError``: there is no such checkpoint."""
        run = parse_current_run(name)
        if run is not None:
            return Location(self.store.folder_of(run) / CURRENT / ADAPTER)
        checkpoint = parse_checkpoint_path(name)
        if self.store.checkpoint(checkpoint) is None:
            raise SelectionError(name, "a checkpoint that is there", "list the run's checkpoints")
        return self._locate(checkpoint)

    def _locate(self, checkpoint: Checkpoint) -> Location:
        return Location(self.store.files_of(checkpoint) / ADAPTER)
