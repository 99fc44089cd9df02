"""Losses and measures of candidates on the held-out rows, in shared forwards of the base.

A forward has the same rows for each of several candidates. A candidate's loss does not depend on
the others, except for rounding. Memory is that of `TOKENS` tokens without gradients, for any number
of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from veneer.train.evaluate import to
from veneer.train.many import Runs
from veneer.train.tasks import Task

#: tokens of a forward, with padding: enough to use a processor fully
TOKENS = 2048


def evaluate_runs(runs: Runs, tasks: Mapping[str, Task], rows: Any) -> dict[str, dict[str, float]]:
    """The loss and measures of each run of `tasks`, as means over the items of all rows."""
    task, model = next(iter(tasks.values())), runs.model
    sums: dict[str, dict[str, float]] = {name: {} for name in tasks}
    items, training = dict.fromkeys(tasks, 0), model.training
    model.eval()
    try:
        for names, indices in plan_passes(list(tasks), rows.lengths, task.config.batch_size):
            batch = to(model.device, task.collate([rows[i] for i in indices]))
            batch_sums = _batch_sums(runs, {name: tasks[name] for name in names}, batch)
            for name, (count, measures) in batch_sums.items():
                items[name] += count
                sums[name] = {
                    measure: sums[name].get(measure, 0.0) + float(value)
                    for measure, value in measures.items()
                }
    finally:
        model.train(training)
    return {
        name: {measure: value / max(items[name], 1) for measure, value in measures.items()}
        for name, measures in sums.items()
    }


def plan_passes(
    names: Sequence[str], lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    """(candidates, row indices) of each forward, the longest rows first. `batch_size`: rows of each
    candidate, if rows have no lengths in tokens."""
    order, start = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), 0
    while start < len(order):
        width = lengths[order[start]]
        row_count = max(1, TOKENS // (width * len(names))) if width else batch_size
        indices = order[start : start + row_count]
        together = max(1, TOKENS // (width * len(indices))) if width else len(names)
        for first in range(0, len(names), together):
            yield names[first : first + together], indices
        start += len(indices)


def _batch_sums(
    runs: Runs, tasks: Mapping[str, Task], batch: Any
) -> dict[str, tuple[int, dict[str, Any]]]:
    """(number of items of the batch, sums over them) by run."""
    sums: dict[str, tuple[int, dict[str, Any]]] = {}
    if next(iter(tasks.values())).name == "sft":
        by_run = runs.label_losses(dict.fromkeys(tasks, batch), accuracy=True)
        for name, (losses, _, correct) in by_run.items():
            measures = {"loss": losses.sum(), "accuracy": cast(Tensor, correct).sum()}
            sums[name] = len(losses), measures
        return sums
    outputs = runs.outputs({name: (task.inputs(batch), None) for name, task in tasks.items()})
    for name, task in tasks.items():
        loss = task.loss(OutputAsModel(outputs[name], training=False), batch)
        sums[name] = loss.items, {"loss": loss.total, **loss.sums}
    return sums


class OutputAsModel:
    """Takes the place of the model in a task's loss and returns an output that has been computed
    already."""

    def __init__(self, output: Any, training: bool) -> None:
        self.output, self.training = output, training

    def __call__(self, **_: Any) -> Any:
        return self.output
