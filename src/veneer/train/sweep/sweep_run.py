"""Run a sweep, from its settings to its report. The candidates (the configurations to compare) are
divided into cohorts: these train one after another, the candidates of a cohort at the same time.

    result = sweep(*load_sweep(Path("sweep.yaml")))
    result.best           the folder of the best candidate, with the files of `veneer train`

`sweep_record.py` lists the files of the output. A sweep that was stopped or killed resumes from its
newest checkpoint. Its losses and adapters then equal those of an uninterrupted sweep bit for bit.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from transformers import set_seed

from veneer.attach import ModelIndex, plan
from veneer.errors import ConfigError, TargetError, TrainingError, VeneerError, raise_all
from veneer.fileio.atomic import write_whole
from veneer.models.remote_code import with_trust_of_config
from veneer.train import checkpoint
from veneer.train.adapter_setup import lora_config
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import StopOnSignal, format_duration, say
from veneer.train.config import TrainConfig, make_config, task_names
from veneer.train.prepare import steps_an_epoch
from veneer.train.processes import Processes
from veneer.train.run_record import can_resume, find_resume_point, write_status
from veneer.train.sweep.cohort import Cohort
from veneer.train.sweep.conclusions import (
    describe_edge,
    describe_repetition,
    find_edges,
    repeat_winner,
)
from veneer.train.sweep.search import Search
from veneer.train.sweep.sweep_page import page
from veneer.train.sweep.sweep_record import (
    BEST,
    ENDED,
    FAILED,
    FINISHED,
    REPORT,
    RESULT,
    RUNNING,
    STATE_FILE,
    TRAIN_CONFIG,
    WAITING,
    Candidate,
    State,
    format_changes,
    remove_checkpoints,
)
from veneer.train.sweep.sweep_settings import Sweep, check_sweep_support
from veneer.train.sweep.table import print_overview
from veneer.train.sweep.winner import changed_settings, single_run_config, write_winner
from veneer.train.tasks import TASKS, Task

#: callback(state of the sweep, number of training steps of a candidate that does not end early)
StepCallback = Callable[[State, int], None]


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Fields:
        output: the output folder of the sweep.
        best: the folder of the best candidate; None if no candidate has trained to its end yet.
        interrupted: whether the sweep was stopped before its end, with a checkpoint.
        facts: the contents of `sweep.json`.
    """

    output: Path
    best: Path | None
    interrupted: bool
    facts: dict[str, Any]


@with_trust_of_config
def sweep(
    config: TrainConfig,
    settings: Sweep,
    *,
    keep_going: bool = False,
    console: Console | None = None,
    quiet: bool = False,
    on_step: StepCallback = lambda state, steps: None,
    stop_order: Callable[[], bool] | None = None,
) -> SweepResult:
    """Train candidates, each `config` with some values replaced as `settings` says, and save the
    adapter with the lowest loss on the held-out rows.

    Args:
        keep_going: leave out candidates that cannot begin, instead of raising an error for them.
        console, quiet: where to print progress. By default stderr, or nothing if `quiet` is set.
        on_step: called after each step, with the arguments of a `StepCallback`.
        stop_order: called after each step but the last of a cohort. If it returns True, the sweep
            writes a checkpoint and ends, as after Ctrl-C.

    Raises:
        ConfigError, TargetError, OutputExistsError: for the same reasons as `fit`. The error names
            every candidate whose configuration is invalid or whose adapter cannot be attached.
        TrainingError: no candidate trained to its end with finite losses.
    """
    console = console or Console(stderr=True, quiet=quiet)
    with (
        checkpoint.only_writer(config.output.expanduser(), Processes()),
        StopOnSignal(console) as stop,
    ):
        sweep_run = _SweepRun(config, settings, keep_going, console, on_step)
        return sweep_run.run(lambda: stop.requested or (stop_order is not None and stop_order()))


class _SweepRun:
    """A sweep in progress. `start_times`: (seconds of the wall clock, CPU seconds of the process)
    when the object was created. `earlier_times`: (seconds, CPU seconds) that earlier processes of a
    resumed sweep took up to the checkpoint. `tasks`: by candidate's name, its task."""

    def __init__(
        self,
        config: TrainConfig,
        settings: Sweep,
        keep_going: bool,
        console: Console,
        on_step: StepCallback,
    ) -> None:
        self.start_times = time.perf_counter(), time.process_time()
        self.config, self.settings, self.keep_going = _shared_config(config), settings, keep_going
        self.console, self.on_step, self.output = console, on_step, config.output.expanduser()
        resumes = can_resume(self.config, self.output, settings.content())
        self.task: Task = TASKS[config.task](self.config)
        self.task.read_data()
        self.task.open_base()
        self.prepared = self.task.prepare()
        arguments = arguments_of(self.config, self.output, self.prepared)
        self.search, self.steps = Search(settings, self.prepared.steps), self.prepared.steps
        self._check_rungs_in_first_epoch()
        self.eval_steps, self.save_steps = int(arguments.eval_steps or 1), int(arguments.save_steps)
        resume_point = (
            find_resume_point(self.config, self.output, self.prepared, console) if resumes else None
        )
        self.resume_from = None if resume_point is None else Path(resume_point[0])
        self.state = (
            State() if self.resume_from is None else State.read(self.resume_from / STATE_FILE)
        )
        self.earlier_times = self.state.seconds, self.state.cpu_seconds
        self.tasks: dict[str, Task] = {}
        self.model: Any = None
        self.winner_facts: dict[str, Any] = {}

    def _check_rungs_in_first_epoch(self) -> None:
        """Raise `ConfigError` if training losses are compared at a rung (a step after which weaker
        candidates end) after the first epoch. In later epochs, candidates have already trained on
        the same rows, so a low training loss may only show that a candidate memorises them."""
        epoch_steps = steps_an_epoch(self.config, len(self.prepared.train))
        last_rung = max(self.search.rungs, default=0)
        if self.settings.judged_by == "training" and last_rung > epoch_steps:
            raise ConfigError(
                f"judged_by training, a rung at step {last_rung} and an epoch of {epoch_steps},"
                " after which rows come again",
                "rungs within the first epoch",
                "name earlier ones, or set judged_by: held_out",
            )

    # ---- candidates

    def _next_candidates(self, existing_count: int) -> list[Candidate]:
        """Ask the search for new candidates: for one cohort if the sampler needs the results of
        earlier candidates, else for all. `existing_count`: number of candidates that exist."""
        new_count = self.settings.at_once if self.search.adaptive else self.search.count
        changes_by_name = self.search.ask(new_count)
        return [
            Candidate(name, (existing_count + index) // self.settings.at_once, changes)
            for index, (name, changes) in enumerate(changes_by_name.items())
        ]

    def _add_candidates(self, candidates: list[Candidate]) -> None:
        """Create the tasks of new candidates, and add them to the state. Raises `TargetError` if
        one cannot begin; with `keep_going`, only if all of the sweep's first candidates fail."""
        problems = [problem for candidate in candidates if (problem := self._make_task(candidate))]
        if not self.keep_going or (not self.state.candidates and len(problems) == len(candidates)):
            raise_all(TargetError, "The sweep cannot begin", problems)
        self.state.candidates += candidates

    def _make_task(self, candidate: Candidate) -> str | None:
        """Create the task of a candidate and add it to `tasks`. If its configuration is invalid or
        its adapter cannot be attached, mark it as failed and return the problem as text."""
        try:
            config = make_config({**self.config.content(), **candidate.changes})
            task = copy.copy(self.task)  # shallow: candidates share the processor and labels
            task.config = config
            arguments_of(config, self.output, self.prepared)
            plan(self.model, lora_config(config, self.model, {}), candidate.name)
        except VeneerError as error:
            candidate.status, candidate.note = FAILED, str(error)
            return f"candidate {candidate.name} ({format_changes(candidate.changes)}): {error}"
        self.tasks[candidate.name] = task
        return None

    def _replay(self) -> None:
        """Bring the search to its state at the checkpoint: repeat its calls with the recorded
        losses. Raises `ConfigError` if the search then proposes candidates that differ from the
        recorded ones, or if a recorded candidate cannot continue."""
        replayed_changes: dict[str, dict[str, Any]] = {}
        for cohort_index in range(self.state.cohort + 1):
            if not replayed_changes or self.search.adaptive:
                candidates = self._next_candidates(len(replayed_changes))
                replayed_changes |= {candidate.name: candidate.changes for candidate in candidates}
            for step, losses in self.state.losses_by_step(cohort_index):
                if step < self.steps:
                    self.search.choose_ended(step, losses)
            if cohort_index < self.state.cohort:
                self._report_ends(cohort_index)
        recorded_changes = {
            candidate.name: candidate.changes for candidate in self.state.candidates
        }
        if json.loads(json.dumps(replayed_changes)) != recorded_changes:
            raise ConfigError(
                "candidates that this sampler does not draw again",
                f"those of the checkpoint in {self.output}",
                "resume with the versions of before, or pass --overwrite",
            )
        for candidate in self.state.candidates:
            can_continue = candidate.status in (WAITING, RUNNING, FINISHED)
            if can_continue and (problem := self._make_task(candidate)):
                raise ConfigError(f"Found: {problem}")

    def _report_ends(self, cohort_index: int) -> None:
        """Tell the search the last loss of a cohort's candidates, and which of them ended early."""
        for candidate in self.state.in_cohort(cohort_index):
            loss = candidate.loss if candidate.status in (FINISHED, ENDED) else None
            self.search.report_end(candidate.name, loss, candidate.status == ENDED)

    # ---- training

    def run(self, should_stop: Callable[[], bool]) -> SweepResult:
        set_seed(self.config.seed)
        self.model = self.task.load().model
        if "seed" in self.settings.axes and ModelIndex(self.model).fresh_parameters():
            raise ConfigError(
                "axis 'seed', and a head that no checkpoint of the base held, whose start hangs on"
                " the seed",
                "one base for all candidates",
                "take the axis data_seed",
            )
        resume_from, folder_exists = self.resume_from, False
        if resume_from is not None:
            self._replay()
        else:
            self._add_candidates(self._next_candidates(0))
        while self.state.in_cohort(self.state.cohort):
            cohort = self._attach_cohort(resume_from)
            if not folder_exists:
                self._open_output(cohort)
            resume_from, folder_exists = None, True
            try:
                if not self._train(cohort, should_stop):
                    self._write_status("interrupted")
                    return self._build_result(interrupted=True)
                self._finish_cohort(cohort)
            finally:
                cohort.close()
            self._report_ends(self.state.cohort)
            self.state.cohort, self.state.step = self.state.cohort + 1, 0
            if not self.state.in_cohort(self.state.cohort):
                self._add_candidates(self._next_candidates(len(self.state.candidates)))
        return self._finish_sweep()

    def _open_output(self, cohort: Cohort) -> None:
        """Print the overview, create the output folder, and remove an earlier sweep's files unless
        this one resumes. Comes after a cohort is attached: if none can be, no file changes."""
        print_overview(
            self.console,
            self.task,
            self.prepared,
            self.search,
            cohort,
            sum(candidate.parameters for candidate in self.state.in_cohort(self.state.cohort)),
        )
        if self.resume_from is None:
            checkpoint.clear(self.output, BEST, REPORT, RESULT)
        self.output.mkdir(parents=True, exist_ok=True)
        self._write_status("running")

    def _write_status(self, status: str) -> None:
        write_status(self.output, status, self.config, self.prepared, self.settings.content())

    def _attach_cohort(self, resume_from: Path | None) -> Cohort:
        """Attach the adapters of the current cohort's candidates that neither failed nor ended
        early. Raises the errors of `Cohort`, and `TargetError` if all candidates have failed."""
        candidates = self.state.in_cohort(self.state.cohort)
        active_candidates = [
            candidate
            for candidate in candidates
            if candidate.status in (WAITING, RUNNING, FINISHED)
        ]
        tasks = {candidate.name: self.tasks[candidate.name] for candidate in active_candidates}
        cohort = Cohort(self.model, tasks, self.prepared, self.output, resume_from, self.keep_going)
        for candidate in active_candidates:
            if candidate.name in cohort.failed:
                candidate.status, candidate.note = FAILED, cohort.failed[candidate.name]
            else:
                candidate.status = RUNNING
                candidate.parameters = cohort.runs[candidate.name].summary().trainable
        if all(candidate.status == FAILED for candidate in self.state.candidates):
            problems = [f"candidate {candidate.name}: {candidate.note}" for candidate in candidates]
            verb = "begin" if resume_from is None else "go on"
            raise_all(TargetError, f"The sweep cannot {verb}", problems)
        cohort.begin(self.state.step)
        return cohort

    def _train(self, cohort: Cohort, should_stop: Callable[[], bool]) -> bool:
        """Train a cohort for the remaining steps, or until it has no candidate left. Returns False
        if `should_stop` ended the training earlier; a checkpoint then holds the state."""
        state = self.state
        while state.step < self.steps and cohort.members:
            losses = cohort.step()
            state.step += 1
            for name, loss in losses.items():
                state[name].losses.append(loss)
            self._evaluate(cohort)
            for name, note in cohort.failed.items():
                if state[name].status == RUNNING:
                    state[name].status, state[name].note = FAILED, note
            self.on_step(state, self.steps)
            is_last_step = state.step == self.steps or not cohort.members
            must_stop = not is_last_step and should_stop()
            if must_stop or is_last_step or state.step % self.save_steps == 0:
                self._write_checkpoint(cohort)
            if must_stop:
                return False
        return True

    def _evaluate(self, cohort: Cohort) -> None:
        """Evaluate the candidates if the present step is a rung (a step after which weaker ones
        end) or a step at which a single run evaluates. With rungs and without `eval_every`, they
        are evaluated only at rungs and at the end. Then end those that the search rejects."""
        state, step = self.state, self.state.step
        evaluates_here = step % self.eval_steps == 0 or step == self.steps
        is_rung = step in self.search.rungs
        if evaluates_here:  # a single run draws a number here, so draw it even without evaluation
            cohort.draw_loader_seed()
        if self.config.eval_every is None and self.search.rungs and step < self.steps:
            evaluates_here = False  # evaluations at rungs replace the regular ones
        if not cohort.members or not (evaluates_here or is_rung):
            return
        judges_training_loss = is_rung and self.settings.judged_by == "training"
        losses = self._held_out_losses(cohort) if evaluates_here or not judges_training_loss else {}
        if judges_training_loss:
            losses = {name: mean(state[name].losses[step // 2 :]) for name in cohort.members}
            for name, loss in losses.items():
                state[name].judged.append((step, loss))
        if step < self.steps:
            for name in self.search.choose_ended(step, losses):
                state[name].status = ENDED
                cohort.remove(name)

    def _held_out_losses(self, cohort: Cohort) -> dict[str, float]:
        """Evaluate the cohort on the held-out rows, record the measures, and remove the candidates
        whose loss is not finite. Returns the loss of each remaining candidate, by name."""
        losses, step = {}, self.state.step
        for name, measures in cohort.evaluate().items():
            loss = measures["loss"]
            if not math.isfinite(loss):
                cohort.failed[name] = f"the loss on the rows held out is {loss} at step {step}"
                cohort.remove(name)
                continue
            self.state[name].evaluations.append((step, measures))
            losses[name] = loss
        return losses

    def _update_times(self) -> None:
        self.state.seconds = self.earlier_times[0] + time.perf_counter() - self.start_times[0]
        self.state.cpu_seconds = self.earlier_times[1] + time.process_time() - self.start_times[1]

    def _write_checkpoint(self, cohort: Cohort) -> None:
        state = self.state
        self._update_times()

        def fill(folder: Path) -> None:
            cohort.save(
                folder, lambda name: {"step": state.step, "task": self.tasks[name].record()}
            )
            state.write(folder / STATE_FILE)

        total_steps = state.cohort * self.steps + state.step
        checkpoint.write(self.output, total_steps, fill, Processes())
        remove_checkpoints(self.output, except_for=checkpoint.path_of(self.output, total_steps))

    def _finish_cohort(self, cohort: Cohort) -> None:
        """Mark the remaining candidates of a cohort as finished. If one of them has the lowest loss
        of the sweep so far, write its adapter to the folder of the winner."""
        for name in cohort.members:
            self.state[name].status = FINISHED
        ranking = self.state.finished_candidates()
        if ranking and ranking[0].name in cohort.members:
            best = ranking[0]
            self.state.best = best.name
            write_winner(
                self.output, self._single_run_config(best), best, self.tasks[best.name], cohort
            )

    # ---- result

    def _single_run_config(self, candidate: Candidate) -> TrainConfig:
        return single_run_config(self.tasks[candidate.name].config, self.output, self.eval_steps)

    def _build_result(self, interrupted: bool) -> SweepResult:
        config, state_facts = self.config, self.state.facts()
        facts: dict[str, Any] = {
            "base": config.base,
            "data": config.data,
            "task": config.task,
            "item": self.task.loss_unit,
            "output": str(self.output),
            "steps": self.steps,
            "sweep": self.settings.content(),
            "sampler": self.settings.sampler_name,
            "rungs": self.search.rungs,
            "folder": None,
            "command": None,
            "config": None,
        }
        best_folder = None
        if self.state.best is not None:
            best_folder = self.output / BEST
            winner_config = self._single_run_config(self.state[self.state.best])
            facts |= {
                "folder": str(best_folder),
                "command": ["veneer", "train", str(best_folder / TRAIN_CONFIG)],
                "config": changed_settings(winner_config),
            }
        facts |= {**self.winner_facts, **state_facts}
        return SweepResult(self.output, best_folder, interrupted, facts)

    def _finish_sweep(self) -> SweepResult:
        if self.state.best is None:
            notes = "; ".join(
                f"{candidate.name}: {candidate.note}"
                for candidate in self.state.candidates
                if candidate.note
            )
            raise TrainingError(
                f"no candidate that ran to its end ({notes})",
                "one at least",
                "lower the learning rates, or train in fp32 (--precision fp32)",
            )
        winner = self.state[self.state.best]
        self.model = None  # frees memory, since `repeat_winner` loads the base again
        self.winner_facts = {
            "edges": find_edges(self.settings.axes, winner.changes),
            "alone": repeat_winner(self._single_run_config(winner), winner.losses),
        }
        self._update_times()
        result = self._build_result(interrupted=False)
        write_whole(self.output / RESULT, json.dumps(result.facts, indent=2) + "\n")
        write_whole(self.output / REPORT, page(result.facts))
        self._write_status("finished")
        remove_checkpoints(self.output)
        self._print_result(winner)
        return result

    def _print_result(self, winner: Candidate) -> None:
        elapsed, changes_text = format_duration(self.state.seconds), format_changes(winner.changes)
        lines = [
            f"Done     in {elapsed}: {winner.name} ({changes_text})",
            f"         evaluation {winner.loss:.4f}, {winner.parameters:,} numbers",
            *(f"Edge     {describe_edge(edge)}" for edge in self.winner_facts["edges"]),
            f"Alone    {describe_repetition(self.winner_facts['alone'])}",
            f"Adapter  {self.output / BEST / checkpoint.ADAPTER}",
            f"Report   {self.output / REPORT}",
        ]
        for line in lines:
            say(self.console, line)


def _shared_config(config: TrainConfig) -> TrainConfig:
    """`config`, with `eval_seed` set if held-out rows are drawn from the training data, so that
    candidates with different seeds have the same held-out rows. Raises `ConfigError` if a sweep
    does not support the task or a setting."""
    check_sweep_support(config)
    if not TASKS[config.task].uses_single_forward:
        problem = f"task {config.task}, whose loss takes more than one pass of its rows"
        names = ", ".join(name for name in task_names() if TASKS[name].uses_single_forward)
        raise ConfigError(
            problem, f"one of {names}", "train its candidates one after another with `veneer train`"
        )
    if config.eval_fraction and config.eval_seed is None:
        return config.model_copy(update={"eval_seed": config.seed})
    return config
