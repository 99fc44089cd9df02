"""Evaluate several candidates of a sweep (the configurations to compare) together on the held-out
rows.

One forward pass of the base computes the same rows for several candidates. A candidate's loss does
not depend on the other candidates of the pass, except for rounding. A pass has at most about
`MAX_PASS_TOKENS` tokens and keeps no activations for gradients, so its memory does not grow with
the number of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from veneer.context import evaluation_mode
from veneer.train.many import Runs
from veneer.train.tasks import Task
from veneer.train.tasks._base import move_batch

#: maximal number of tokens of a forward pass, with padding, summed over its rows and candidates;
#: enough tokens to use the processor fully. A longer row has a pass of its own.
MAX_PASS_TOKENS = 2048


def evaluate_runs(runs: Runs, tasks: Mapping[str, Task], rows: Any) -> dict[str, dict[str, float]]:
    """Evaluate some of the runs that are attached to one base.

    Args:
        tasks: by name of each run to evaluate, its task.
        rows: the held-out `Rows`.

    Returns:
        by run, {measure: its mean over the items that the task's loss counts, such as tokens}. One
        measure is "loss".
    """
    task, model = next(iter(tasks.values())), runs.model
    measure_sums: dict[str, dict[str, float]] = {name: {} for name in tasks}
    item_counts = dict.fromkeys(tasks, 0)
    with evaluation_mode(model):
        for names, row_indices in plan_passes(list(tasks), rows.lengths, task.config.batch_size):
            batch = move_batch(model.device, task.collate([rows[i] for i in row_indices]))
            batch_sums = _batch_sums(runs, {name: tasks[name] for name in names}, batch)
            for name, (batch_items, measures) in batch_sums.items():
                item_counts[name] += batch_items
                measure_sums[name] = {
                    measure: measure_sums[name].get(measure, 0.0) + float(value)
                    for measure, value in measures.items()
                }
    return {
        name: {measure: value / max(item_counts[name], 1) for measure, value in measures.items()}
        for name, measures in measure_sums.items()
    }


def plan_passes(
    names: Sequence[str], lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    """Divide an evaluation into forward passes of at most `MAX_PASS_TOKENS` tokens. The first pass
    has the longest rows.

    Args:
        names: the names of the candidates.
        lengths: by row, its number of tokens; 0 if rows have none, as for images.
        batch_size: the number of rows of a pass if rows have no tokens.

    Yields:
        (names of the candidates, indices of the rows) of each pass.
    """
    row_order, rows_start = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), 0
    while rows_start < len(row_order):
        row_tokens = lengths[row_order[rows_start]]
        row_count = (
            max(1, MAX_PASS_TOKENS // (row_tokens * len(names))) if row_tokens else batch_size
        )
        row_indices = row_order[rows_start : rows_start + row_count]
        candidates_per_pass = (
            max(1, MAX_PASS_TOKENS // (row_tokens * len(row_indices))) if row_tokens else len(names)
        )
        for names_start in range(0, len(names), candidates_per_pass):
            yield names[names_start : names_start + candidates_per_pass], row_indices
        rows_start += len(row_indices)


def _batch_sums(
    runs: Runs, tasks: Mapping[str, Task], batch: Any
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Compute one batch for each run of `tasks`: by run, (number of items of the batch, such as
    tokens; {measure: its sum over the items}). One measure is "loss"."""
    sums_by_run: dict[str, tuple[int, dict[str, Any]]] = {}
    if next(iter(tasks.values())).name == "sft":
        losses_by_run = runs.label_losses(dict.fromkeys(tasks, batch), accuracy=True)
        for name, (losses, _, is_correct) in losses_by_run.items():
            measures = {"loss": losses.sum(), "accuracy": cast(Tensor, is_correct).sum()}
            sums_by_run[name] = len(losses), measures
        return sums_by_run
    outputs = runs.outputs({name: (task.inputs(batch), None) for name, task in tasks.items()})
    for name, task in tasks.items():
        task_loss = task.loss(OutputAsModel(outputs[name], training=False), batch)
        sums_by_run[name] = task_loss.items, {"loss": task_loss.total, **task_loss.sums}
    return sums_by_run


class OutputAsModel:
    """A stand-in for the model in a call of `Task.loss`: it returns an output that was computed
    before, in a forward pass that several runs shared. `training`: the mode that `Task.loss`
    reads."""

    def __init__(self, output: Any, training: bool) -> None:
        self.output, self.training = output, training

    def __call__(self, **_: Any) -> Any:
        return self.output
