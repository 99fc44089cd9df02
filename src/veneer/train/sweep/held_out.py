"""Losses and measures of candidates on the held-out rows, in shared forwards of the base.

One forward computes the same rows for several candidates. A candidate's loss does not depend on the
other candidates of the forward, except for rounding. A forward has at most about
`MAX_PASS_TOKENS` tokens and keeps no gradients, so its memory does not grow with the number of
candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from veneer.context import evaluation_mode
from veneer.train.many import Runs
from veneer.train.tasks import Task
from veneer.train.tasks._base import move_batch

#: maximal number of tokens of a forward over its rows and candidates, padding included; enough to
#: use a processor fully
MAX_PASS_TOKENS = 2048


def evaluate_runs(runs: Runs, tasks: Mapping[str, Task], rows: Any) -> dict[str, dict[str, float]]:
    """The loss and measures of each run of `tasks` on `rows`, as means over the items that the
    task's loss counts, such as tokens."""
    task, model = next(iter(tasks.values())), runs.model
    sums: dict[str, dict[str, float]] = {name: {} for name in tasks}
    item_counts = dict.fromkeys(tasks, 0)
    with evaluation_mode(model):
        for names, indices in plan_passes(list(tasks), rows.lengths, task.config.batch_size):
            batch = move_batch(model.device, task.collate([rows[i] for i in indices]))
            batch_sums = _batch_sums(runs, {name: tasks[name] for name in names}, batch)
            for name, (count, measures) in batch_sums.items():
                item_counts[name] += count
                sums[name] = {
                    measure: sums[name].get(measure, 0.0) + float(value)
                    for measure, value in measures.items()
                }
    return {
        name: {measure: value / max(item_counts[name], 1) for measure, value in measures.items()}
        for name, measures in sums.items()
    }


def plan_passes(
    names: Sequence[str], lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    """Yield (names of candidates, row indices) for each forward, the longest rows first.
    `lengths`: the number of tokens of each row. If it is 0, as for images, a forward has
    `batch_size` rows."""
    row_order, start = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), 0
    while start < len(row_order):
        row_tokens = lengths[row_order[start]]
        row_count = (
            max(1, MAX_PASS_TOKENS // (row_tokens * len(names))) if row_tokens else batch_size
        )
        indices = row_order[start : start + row_count]
        candidates_per_pass = (
            max(1, MAX_PASS_TOKENS // (row_tokens * len(indices))) if row_tokens else len(names)
        )
        for first in range(0, len(names), candidates_per_pass):
            yield names[first : first + candidates_per_pass], indices
        start += len(indices)


def _batch_sums(
    runs: Runs, tasks: Mapping[str, Task], batch: Any
) -> dict[str, tuple[int, dict[str, Any]]]:
    """By run, (number of items of the batch, {measure: its sum over the items}), with the measure
    "loss"."""
    sums: dict[str, tuple[int, dict[str, Any]]] = {}
    if next(iter(tasks.values())).name == "sft":
        losses_by_run = runs.label_losses(dict.fromkeys(tasks, batch), accuracy=True)
        for name, (losses, _, is_correct) in losses_by_run.items():
            measures = {"loss": losses.sum(), "accuracy": cast(Tensor, is_correct).sum()}
            sums[name] = len(losses), measures
        return sums
    outputs = runs.outputs({name: (task.inputs(batch), None) for name, task in tasks.items()})
    for name, task in tasks.items():
        loss = task.loss(OutputAsModel(outputs[name], training=False), batch)
        sums[name] = loss.items, {"loss": loss.total, **loss.sums}
    return sums


class OutputAsModel:
    """A stand-in for the model in a task's loss: a call returns an output that was computed
    before."""

    def __init__(self, output: Any, training: bool) -> None:
        self.output, self.training = output, training

    def __call__(self, **_: Any) -> Any:
        return self.output
