"""Terminal output of a sweep: an overview before it starts; then a live table, or a line for each
evaluation if the output is no terminal."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from veneer.errors import format_bytes
from veneer.train.callbacks import say
from veneer.train.plan import memory
from veneer.train.prepare import Prepared
from veneer.train.sweep.cohort import Cohort
from veneer.train.sweep.search import Search
from veneer.train.sweep.sweep_record import (
    FINISHED,
    RUNNING,
    WAITING,
    Candidate,
    State,
    format_changes,
)
from veneer.train.tasks import Task

#: maximal number of candidates in the table; if there are more, it shows the best ones
MAX_ROWS = 30


class Progress:
    """Shows the progress of a sweep. Pass it to `sweep` as `on_step`, inside a `with` block of it
    that closes the table. `live`: the table; None if the console is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()  # no effect if no step started the table

    def __call__(self, state: State, steps: int) -> None:
        if self.live is not None:
            self.live.start()  # opens the table at the first step; later without effect
            self.live.update(candidate_table(state, steps), refresh=True)
            return
        cohort = state.in_cohort(state.cohort)
        evaluated_candidates = [
            candidate
            for candidate in cohort
            if candidate.loss_history and candidate.loss_history[-1][0] == state.step
        ]
        if evaluated_candidates:
            best_candidate = min(evaluated_candidates, key=_sortable_loss)
            remaining_count = sum(candidate.status in (RUNNING, FINISHED) for candidate in cohort)
            is_training_loss = best_candidate.judged and best_candidate.judged[-1][0] == state.step
            loss_name = "mean loss in training" if is_training_loss else "evaluation"
            say(
                self.console,
                f"step {state.step:>5}/{steps}  {remaining_count} of {len(cohort)} go on; best"
                f" {best_candidate.name} ({format_changes(best_candidate.changes)}), {loss_name}"
                f" {_sortable_loss(best_candidate):.4f}",
            )


def _sortable_loss(candidate: Candidate) -> float:
    """The last loss of a candidate; infinity if it has none."""
    return float("inf") if candidate.loss is None else candidate.loss


def candidate_table(state: State, steps: int) -> Table:
    """A table of at most `MAX_ROWS` candidates: first those that train or are finished, then those
    that ended early or failed, then those that wait. Each group begins with its best candidate.
    `steps`: number of steps of a candidate that does not end early."""
    status_order = {RUNNING: 0, FINISHED: 0, WAITING: 2}
    ranking = sorted(
        state.candidates,
        key=lambda candidate: (status_order.get(candidate.status, 1), _sortable_loss(candidate)),
    )
    table = Table(box=None, header_style="bold", caption_justify="left")
    for heading in ("", "settings", "step", "loss", "held out", ""):
        table.add_column(
            heading,
            justify="right" if heading in ("step", "loss", "held out") else "left",
            overflow="fold",
        )
    for candidate in ranking[:MAX_ROWS]:
        evaluations = candidate.evaluations
        table.add_row(
            candidate.name,
            format_changes(candidate.changes),
            f"{len(candidate.losses)}/{steps}",
            f"{candidate.losses[-1]:.4f}" if candidate.losses else "",
            f"{evaluations[-1][1]['loss']:.4f}" if evaluations else "",
            candidate.status,
            style="" if candidate.status in (RUNNING, FINISHED) else "dim",
        )
    if len(ranking) > MAX_ROWS:
        table.caption = f"and {len(ranking) - MAX_ROWS} more"
    return table


def print_overview(
    console: Console,
    task: Task,
    prepared: Prepared,
    search: Search,
    cohort: Cohort,
    trainable_parameters: int,
) -> None:
    """Print the base, the data, the steps, the number of candidates and the estimated memory. The
    estimate is left out if no candidate of the cohort trains.

    Args:
        task: the task of the sweep, with the configuration that the candidates change.
        cohort: the attached candidates; only they count for the memory.
        trainable_parameters: number of trainable parameters of all candidates of the cohort.
    """
    config, settings, model = task.config, search.settings, cohort.model
    base_bytes = sum(
        parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad
    )
    dtype = str(model.dtype).removeprefix("torch.")
    cohort_size = min(settings.at_once, search.count)
    rungs = ", ".join(map(str, search.rungs))
    rung_note = f"; the weaker end after steps {rungs}" if rungs else ""
    lines = [
        f"Base     {config.base} ({dtype}, {format_bytes(base_bytes)})",
        f"Data     {config.data}: {task.describe_size(prepared.train)}",
        f"         {len(prepared.evaluation or ()):,} examples to evaluate on",
        f"Steps    {prepared.steps:,} of {config.batch_size * config.grad_accum} examples",
        f"Sweep    {search.count} candidates ({settings.sampler_name}),"
        f" {cohort_size} at once{rung_note}",
        f"         {trainable_parameters:,} numbers train at once",
    ]
    for line in lines:
        say(console, line)
    if cohort.members and not console.quiet:  # computing the estimate takes time
        runs = {
            name: memory.ConcurrentRun(
                member.task.config, member.adapter.parameters, member.order_seed
            )
            for name, member in cohort.members.items()
        }
        memory_text = memory.estimate_at_once(model, runs, *task.largest_batch(prepared))
        say(console, f"Memory   {memory_text}")
