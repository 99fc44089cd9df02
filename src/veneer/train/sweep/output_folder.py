"""The files in the output folder of a sweep.

output/
  run.json               the record of a run (``train/run_record.py``), with the section `sweep:`
  checkpoint-120/        state.json, and of each running candidate c03/adapter and c03/state.pt
  best/                  the winner: adapter/, train.yaml, log.jsonl, metrics.json, run.json
  sweep.json  report.html

Checkpoints are written atomically.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from veneer.train import checkpoint
from veneer.train.processes import Processes

BEST, REPORT, RESULT, STATE, TRAIN = "best", "report.html", "sweep.json", "state.json", "train.yaml"


def write_checkpoint(output: Path, number: int, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint, then remove older ones. `fill` writes its files into a folder."""
    checkpoint.write(output, number, fill, Processes())
    remove_checkpoints(output, except_for=checkpoint.path_of(output, number))


def remove_checkpoints(output: Path, except_for: Path | None = None) -> None:
    for path in output.glob("checkpoint-*"):
        if path != except_for:
            shutil.rmtree(path)
