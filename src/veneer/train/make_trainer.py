"""The function that makes the trainer of a task."""

from __future__ import annotations

from typing import Any

from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.tasks import Task
from veneer.train.trainer import TaskTrainer


def make_trainer(
    task: Task, model: Any, hidden_state_cache: HiddenStateCache | None, **options: Any
) -> Any:
    """The trainer of a task: `AdapterTrainer` for sft, which supports packing and offloading; else
    `TaskTrainer`."""
    if task.name == "sft":  # imported only here, because trl takes half a second to import
        from veneer.train.sft_trainer import AdapterTrainer

        return AdapterTrainer(model, hidden_state_cache=hidden_state_cache, **options)
    return TaskTrainer(model, task=task, **options)
