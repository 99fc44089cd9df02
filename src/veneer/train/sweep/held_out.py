"""What candidates come to on the rows held out, in passes of the base that they share.

A pass has the same rows for each of several candidates. No candidate's loss depends on who else is
there, but for rounding. Memory is that of `TOKENS` tokens without gradients, however many
candidates there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from veneer.train.evaluate import to
from veneer.train.many import Runs
from veneer.train.tasks import Task

#: of a pass, with padding: as many as a processor needs to be busy
TOKENS = 2048


def evaluate_runs(runs: Runs, tasks: Mapping[str, Task], rows: Any) -> dict[str, dict[str, float]]:
    """The loss and the measures of each run of `tasks`: means over the items of all rows."""
    task, model = next(iter(tasks.values())), runs.model
    sums: dict[str, dict[str, float]] = {name: {} for name in tasks}
    items, training = dict.fromkeys(tasks, 0), model.training
    model.eval()
    try:
        for names, places in passes(list(tasks), rows.lengths, task.config.batch_size):
            batch = to(model.device, task.collate([rows[i] for i in places]))
            for name, (count, told) in _told(
                runs, {name: tasks[name] for name in names}, batch
            ).items():
                items[name] += count
                sums[name] = {
                    word: sums[name].get(word, 0.0) + float(value) for word, value in told.items()
                }
    finally:
        model.train(training)
    return {
        name: {word: value / max(items[name], 1) for word, value in own.items()}
        for name, own in sums.items()
    }


def passes(
    names: Sequence[str], lengths: Sequence[int], rows: int
) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    """Who is in each pass, and the places of its rows, longest first. `rows`: of each, where rows
    have no tokens to speak of."""
    order, start = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), 0
    while start < len(order):
        width = lengths[order[start]]
        own = order[start : start + (max(1, TOKENS // (width * len(names))) if width else rows)]
        together = max(1, TOKENS // (width * len(own))) if width else len(names)
        for first in range(0, len(names), together):
            yield names[first : first + together], own
        start += len(own)


def _told(
    runs: Runs, tasks: Mapping[str, Task], batch: Any
) -> dict[str, tuple[int, dict[str, Any]]]:
    """By run, how many items the batch has and the sums over them."""
    if next(iter(tasks.values())).name == "sft":
        told = runs.label_losses(dict.fromkeys(tasks, batch), accuracy=True)
        found: dict[str, Any] = {}
        for name, (losses, _, right) in told.items():
            found[name] = len(losses), {"loss": losses.sum(), "accuracy": cast(Tensor, right).sum()}
        return found
    outputs = runs.outputs({name: (task.inputs(batch), None) for name, task in tasks.items()})
    found = {
        name: task.loss(Answered(outputs[name], training=False), batch)
        for name, task in tasks.items()
    }
    return {name: (own.items, {"loss": own.total, **own.sums}) for name, own in found.items()}


class Answered:
    """Stands for the model in a task's loss, whose only pass has been made."""

    def __init__(self, output: Any, training: bool) -> None:
        self.output, self.training = output, training

    def __call__(self, **_: Any) -> Any:
        return self.output
