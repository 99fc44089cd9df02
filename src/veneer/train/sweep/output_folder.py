"""The output folder of a sweep: whether it can be resumed, its status and its checkpoints.

output/
  run.json               status, configuration, section `sweep:`, hashes of the data
  checkpoint-120/        state.json, and of each running candidate c03/adapter and c03/state.pt
  best/                  the winner: adapter/, train.yaml, log.jsonl, metrics.json, run.json
  sweep.json  report.html

Checkpoints are written atomically.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, OutputExistsError
from veneer.train import checkpoint
from veneer.train.config import FREE_ON_RESUME, TrainConfig
from veneer.train.prepare import Prepared
from veneer.train.processes import Processes
from veneer.train.run_record import versions
from veneer.train.sweep.sweep_settings import Sweep

BEST, REPORT, RESULT, STATE, TRAIN = "best", "report.html", "sweep.json", "state.json", "train.yaml"


@dataclass(frozen=True)
class SweepFolder:
    """The output folder of the sweep of `settings` over `config`."""

    path: Path
    config: TrainConfig
    settings: Sweep

    def read_run(self) -> dict[str, Any]:
        """The contents of `run.json`."""
        return checkpoint.read_json(self.path / checkpoint.RUN)

    def can_resume(self) -> bool:
        """Whether the folder holds an unfinished sweep of the same configuration.

        Raises:
            OutputExistsError: the folder holds something that must not be replaced.
            ConfigError: `resume` is set, and there is no sweep.
        """
        path, config = self.path, self.config
        run = None if path.is_file() else self.read_run()
        occupied = path.is_file() or checkpoint.is_taken(path)
        if occupied and (run is None or "sweep" not in run):
            raise OutputExistsError(
                f"{path}, which holds no sweep", "a new folder", "choose another output"
            )
        if run is None or run["status"] == checkpoint.CLEARED:
            if config.resume:
                do = "leave out --resume, or check the path"
                raise ConfigError(f"no sweep in {path}", "one to resume", do)
            return False
        if run["status"] == "finished" and not config.overwrite:
            do = "choose another output, or pass --overwrite to replace it"
            raise OutputExistsError(f"{path} holds a finished sweep", "a new folder", do)
        changed = self._changed_settings(run)
        if run["status"] != "finished" and not changed and config.resume is not False:
            return True
        if config.overwrite or checkpoint.newest(path) is None:  # no progress would be lost
            return False
        difference = f" with another {', '.join(changed)}" if changed else ""
        do = "undo the change, choose another output, or pass --overwrite to start over"
        raise OutputExistsError(
            f"{path} holds an unfinished sweep{difference}",
            "the same configuration, to resume it exactly, or a new folder",
            do,
        )

    def _changed_settings(self, run: dict[str, Any]) -> list[str]:
        """The names of settings that differ from those of the sweep in the folder."""
        old, new = {**TrainConfig.defaults(), **run["config"]}, self.config.content()
        changed = [
            name for name in new if name not in FREE_ON_RESUME and old.get(name) != new[name]
        ]
        return [*changed, "sweep"] if run["sweep"] != self.settings.content() else changed

    def find_checkpoint(self, prepared: Prepared) -> Path | None:
        """The newest checkpoint to resume from. Raises `ConfigError` if the data have changed."""
        newest = checkpoint.newest(self.path)
        if newest is None:
            return None
        if self.read_run()["data"] == prepared.hashes:
            return newest[0]
        if self.config.overwrite:
            return None
        problem = f"the data have changed since the unfinished sweep in {self.path} began"
        do = "restore them, choose another output, or pass --overwrite to start over"
        raise ConfigError(problem, "the same bytes, to resume it exactly", do)

    def write_status(self, status: str, prepared: Prepared) -> None:
        run = {
            "status": status,
            "config": self.config.content(),
            "data": prepared.hashes,
            "steps": prepared.steps,
            "versions": versions(),
            "sweep": self.settings.content(),
        }
        checkpoint.write_json(self.path / checkpoint.RUN, run)

    def clear(self) -> None:
        """Remove an earlier run or sweep."""
        checkpoint.clear(self.path, BEST, REPORT, RESULT)

    def write_checkpoint(self, number: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint, then remove older ones. `fill` writes its files into a folder."""
        checkpoint.write(self.path, number, fill, Processes())
        self.remove_checkpoints(except_for=checkpoint.path_of(self.path, number))

    def remove_checkpoints(self, except_for: Path | None = None) -> None:
        for path in self.path.glob("checkpoint-*"):
            if path != except_for:
                shutil.rmtree(path)
