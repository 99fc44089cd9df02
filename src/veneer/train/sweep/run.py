"""One sweep: cohorts of candidates, one after another, each trained at once on one base.

    found = sweep(*load_sweep(Path("sweep.yaml")))
    found.best            the folder of the winner, as `veneer train` would have left it

output/
  run.json               status, configuration, section `sweep:`, hashes of the data
  checkpoint-120/        state.json, and of each candidate that goes on c03/adapter, c03/state.pt: whole, or not there
  best/                  the winner: adapter/, train.yaml, log.jsonl, metrics.json, run.json
  sweep.json  report.html

A sweep that was stopped or killed goes on from its newest checkpoint, and ends with the same
numbers, bit for bit.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console
from transformers import set_seed

from veneer.attach.fresh_weights import fresh_parameters
from veneer.attach.plan import plan
from veneer.attach.summary import size
from veneer.attach.targets import Names
from veneer.errors import (
    ConfigError,
    OutputExistsError,
    TargetError,
    TrainingError,
    VeneerError,
    raise_all,
)
from veneer.fileio.atomic import EVERYTHING, new_folder, write_whole
from veneer.models.remote_code import with_trust_of_config
from veneer.train import checkpoint
from veneer.train.adapter_setup import lora_config
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import StopOnSignal, duration, say
from veneer.train.config import FREE_ON_RESUME, TrainConfig, make_config, task_names
from veneer.train.plan import memory
from veneer.train.prepare import steps_an_epoch
from veneer.train.processes import Processes
from veneer.train.run_record import print_changed_versions, provenance_of, versions, write_status
from veneer.train.sweep.cohort import Cohort
from veneer.train.sweep.conclusions import alone_words, edge_words, edges, measure_alone
from veneer.train.sweep.page import page
from veneer.train.sweep.record import (
    ENDED,
    FAILED,
    FINISHED,
    RUNNING,
    WAITING,
    Candidate,
    State,
    words,
)
from veneer.train.sweep.search import Search
from veneer.train.sweep.settings import Sweep, must_fit
from veneer.train.tasks import TASKS, Task

BEST, REPORT, RESULT, STATE, TRAIN = "best", "report.html", "sweep.json", "state.json", "train.yaml"

Shown = Callable[[State, int], None]


@dataclass(frozen=True)
class SweepResult:
    """`best`: the winner's folder, None if there is none yet; `facts`: what `sweep.json` holds."""

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
    shown: Shown = lambda state, steps: None,
    stop_order: Callable[[], bool] | None = None,
) -> SweepResult:
    """Train the candidates of `settings`, each `config` with changes, and keep the best.

    Args:
        keep_going: leave candidates out that cannot begin, instead of raising.
        shown: called after each step, with the state and the steps of a whole run.
        stop_order: asked after each step; once it says true, the sweep ends with a checkpoint, as
            after Ctrl-C.

    Raises: as `fit`; with every candidate whose configuration is wrong, or cannot be attached.
    `TrainingError`: none ended with a loss that is a number.
    """
    console = console or Console(stderr=True, quiet=quiet)
    with (
        checkpoint.only_writer(config.output.expanduser(), Processes()),
        StopOnSignal(console) as stop,
    ):
        work = _Work(config, settings, keep_going, console, shown)
        return work.run(lambda: stop.requested or (stop_order is not None and stop_order()))


class _Work:
    def __init__(
        self, config: TrainConfig, settings: Sweep, keep_going: bool, console: Console, shown: Shown
    ) -> None:
        self.clocks = time.perf_counter(), time.process_time()
        self.config, self.settings, self.keep_going = _comparable(config), settings, keep_going
        self.console, self.shown, self.output = console, shown, config.output.expanduser()
        resume = self._unfinished()
        self.task: Task = TASKS[config.task](self.config)
        self.task.read_data()
        self.task.open()
        self.prepared = self.task.prepare()
        arguments = arguments_of(self.config, self.output, self.prepared)
        self.search, self.steps = Search(settings, self.prepared.steps), self.prepared.steps
        self._must_see_new_rows()
        self.evaluated, self.saved = int(arguments.eval_steps or 1), int(arguments.save_steps)
        self.found = self._checkpoint() if resume else None
        self.state = State() if self.found is None else State.read(self.found / STATE)
        self.before = self.state.seconds, self.state.cpu_seconds
        self.tasks: dict[str, Task] = {}
        self.model: Any = None
        self.about_best: dict[str, Any] = {}

    def _must_see_new_rows(self) -> None:
        """Raise `ConfigError` where a loss in training would tell of rows that were learnt
        before."""
        epoch = steps_an_epoch(self.config, len(self.prepared.train))
        last = max(self.search.rungs, default=0)
        if self.settings.judged_by == "training" and last > epoch:
            problem = (
                f"judged_by training, a rung at step {last} and an epoch of {epoch}, after which"
                " rows come again"
            )
            raise ConfigError(
                problem,
                "rungs within the first epoch",
                "name earlier ones, or set judged_by: held_out",
            )

    # ------------------------------------------------------------------------------------------ the
    # output folder

    def _about(self) -> dict[str, Any]:
        return {"sweep": self.settings.content()}

    def _unfinished(self) -> bool:
        """Whether the output holds a sweep to go on with. Raises where it holds what is not to be
        replaced."""
        output, config = self.output, self.config
        run = None if output.is_file() else checkpoint.read_json(output / checkpoint.RUN)
        taken = output.is_file() or checkpoint.is_taken(output)
        if taken and (run is None or "sweep" not in run):
            raise OutputExistsError(
                f"{output}, which holds no sweep", "a new folder", "choose another output"
            )
        if run is None or run["status"] == checkpoint.CLEARED:
            if config.resume:
                raise ConfigError(
                    f"no sweep in {output}",
                    "one to resume",
                    "leave out --resume, or check the path",
                )
            return False
        if run["status"] == "finished" and not config.overwrite:
            do = "choose another output, or pass --overwrite to replace it"
            raise OutputExistsError(f"{output} holds a finished sweep", "a new folder", do)
        old, new = {**TrainConfig.defaults(), **run["config"]}, config.content()
        changed = [
            name for name in new if name not in FREE_ON_RESUME and old.get(name) != new[name]
        ]
        changed += [name for name, value in self._about().items() if run[name] != value]
        if run["status"] != "finished" and not changed and config.resume is not False:
            return True
        if config.overwrite or checkpoint.newest(output) is None:  # nothing would be lost
            return False
        problem = (
            f"{output} holds an unfinished"
            f" sweep{' with another ' * bool(changed)}{', '.join(changed)}"
        )
        do = "undo the change, choose another output, or pass --overwrite to start over"
        raise OutputExistsError(
            problem, "the same configuration, to resume it exactly, or a new folder", do
        )

    def _checkpoint(self) -> Path | None:
        newest = checkpoint.newest(self.output)
        if (
            checkpoint.read_json(self.output / checkpoint.RUN)["data"] == self.prepared.hashes
            or newest is None
        ):
            return None if newest is None else newest[0]
        if self.config.overwrite:
            return None
        problem = f"the data have changed since the unfinished sweep in {self.output} began"
        do = "restore them, choose another output, or pass --overwrite to start over"
        raise ConfigError(problem, "the same bytes, to resume it exactly", do)

    def _status(self, status: str) -> None:
        about = {
            "status": status,
            "config": self.config.content(),
            "data": self.prepared.hashes,
            "steps": self.steps,
        }
        checkpoint.write_json(
            self.output / checkpoint.RUN, {**about, "versions": versions(), **self._about()}
        )

    def _open(self) -> None:
        """Make the output folder ready: only now, so that a sweep that cannot begin leaves nothing
        behind."""
        if self.found is None:
            checkpoint.clear(self.output, BEST, REPORT, RESULT)
        self.output.mkdir(parents=True, exist_ok=True)
        self._status("running")

    # ------------------------------------------------------------------------------------------ the
    # candidates

    def _ask(self) -> list[Candidate]:
        """The next candidates: those of a cohort if each depends on how others did, else all at
        once."""
        asked = self.search.ask(self.settings.at_once if self.search.sampled else self.search.count)
        before = len(self.state.candidates)
        return [
            Candidate(name, (before + number) // self.settings.at_once, changes)
            for number, (name, changes) in enumerate(asked.items())
        ]

    def _add(self, candidates: list[Candidate]) -> None:
        """Candidates that are new. Raises for all that cannot begin, unless it is to keep going
        with others."""
        problems = [problem for one in candidates if (problem := self._prepare(one))]
        if not self.keep_going or (not self.state.candidates and len(problems) == len(candidates)):
            raise_all(TargetError, "The sweep cannot begin", problems)
        self.state.candidates += candidates

    def _prepare(self, one: Candidate) -> str | None:
        """Give a candidate its task; why it cannot begin, if it cannot."""
        try:
            config = make_config({**self.config.content(), **one.changes})
            task = copy.copy(self.task)  # with what it has learnt of the data
            task.config = config
            arguments_of(config, self.output, self.prepared)
            plan(self.model, lora_config(config, self.model, {}), one.name)
        except VeneerError as error:
            one.status, one.note = FAILED, str(error)
            return f"candidate {one.name} ({words(one.changes)}): {error}"
        self.tasks[one.name] = task
        return None

    def _replay(self) -> None:
        """Ask, judge and tell again what the record says."""
        asked: dict[str, dict[str, Any]] = {}
        for cohort in range(self.state.cohort + 1):
            if not asked or self.search.sampled:
                asked |= {one.name: one.changes for one in self._ask_again(len(asked))}
            for step, losses in self.state.judged(cohort):
                if step < self.steps:
                    self.search.judge(step, losses)
            if cohort < self.state.cohort:
                self._tell(cohort)
        recorded = {one.name: one.changes for one in self.state.candidates}
        if json.loads(json.dumps(asked)) != recorded:
            found, do = (
                "candidates that this sampler does not draw again",
                "resume with the versions of before",
            )
            raise ConfigError(
                found, f"those of the checkpoint in {self.output}", f"{do}, or pass --overwrite"
            )
        for one in self.state.candidates:
            if one.status in (WAITING, RUNNING, FINISHED) and (problem := self._prepare(one)):
                raise ConfigError(f"Found: {problem}")

    def _ask_again(self, before: int) -> list[Candidate]:
        kept, self.state.candidates = self.state.candidates, self.state.candidates[:before]
        try:
            return self._ask()
        finally:
            self.state.candidates = kept

    def _tell(self, cohort: int) -> None:
        for one in self.state.of(cohort):
            self.search.tell(
                one.name, one.loss if one.status in (FINISHED, ENDED) else None, one.status == ENDED
            )

    # ------------------------------------------------------------------------------------------
    # running

    def run(self, stopped: Callable[[], bool]) -> SweepResult:
        set_seed(self.config.seed)
        self.model = self.task.load().model
        if "seed" in self.settings.axes and fresh_parameters(Names(self.model)):
            found = (
                "axis 'seed', and a head that no checkpoint of the base held, whose start hangs on"
                " the seed"
            )
            raise ConfigError(found, "one base for all candidates", "take the axis data_seed")
        if self.found is not None:
            self._replay()
            say(self.console, f"Resuming from {self.found}.")
            print_changed_versions(checkpoint.read_json(self.output / checkpoint.RUN), self.console)
        else:
            self._add(self._ask())
        found, ready = self.found, False
        while self.state.of(self.state.cohort):
            cohort = self._begin(found)
            if not ready:
                self._say(cohort)
                self._open()
            found, ready = None, True
            try:
                if not self._train(cohort, stopped):
                    self._status("interrupted")
                    return self._result(interrupted=True)
                self._close(cohort)
            finally:
                cohort.close()
            self._tell(self.state.cohort)
            self.state.cohort, self.state.step = self.state.cohort + 1, 0
            if not self.state.of(self.state.cohort) and (more := self._ask()):
                self._add(more)
        return self._finish()

    def _begin(self, found: Path | None) -> Cohort:
        """The candidates of this cohort that run, attached."""
        own = {one.name: one for one in self.state.of(self.state.cohort)}
        names = [name for name, one in own.items() if one.status in (WAITING, RUNNING, FINISHED)]
        tasks = {name: self.tasks[name] for name in names}
        cohort = Cohort(self.model, tasks, self.prepared, self.output, found, self.keep_going)
        for name in names:
            if name in cohort.failed:
                own[name].status, own[name].note = FAILED, cohort.failed[name]
            else:
                own[name].status, own[name].parameters = (
                    RUNNING,
                    cohort.runs[name].summary().trainable,
                )
        if all(one.status == FAILED for one in self.state.candidates):
            raise_all(
                TargetError,
                "The sweep cannot begin",
                [f"candidate {n}: {one.note}" for n, one in own.items()],
            )
        cohort.begin(self.state.step)
        return cohort

    def _train(self, cohort: Cohort, stopped: Callable[[], bool]) -> bool:
        """To the end of a cohort. False: it was stopped, with a checkpoint."""
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
            self.shown(state, self.steps)
            end = state.step == self.steps or not cohort.members
            stop = not end and stopped()
            if stop or end or state.step % self.saved == 0:
                self._save(cohort)
            if stop:
                return False
        return True

    def _evaluate(self, cohort: Cohort) -> None:
        """At rungs, and as a run alone does: with rungs and without `eval_every`, at the end. Who
        is judged too weak ends."""
        state, step = self.state, self.state.step
        own, rung = step % self.evaluated == 0 or step == self.steps, step in self.search.rungs
        if own:
            cohort.draw()
        if self.config.eval_every is None and self.search.rungs and step < self.steps:
            own = False  # the rungs are evaluations enough
        free = rung and self.settings.judged_by == "training"
        if not cohort.members or not (own or rung):
            return
        losses = {}
        for name, measured in cohort.evaluate().items() if own or not free else ():
            if not math.isfinite(measured["loss"]):
                cohort.failed[name] = (
                    f"the loss on the rows held out is {measured['loss']} at step {step}"
                )
                cohort.remove(name)
                continue
            state[name].evaluations.append((step, measured))
            losses[name] = measured["loss"]
        if free:
            losses = {name: mean(state[name].losses[step // 2 :]) for name in cohort.members}
            for name, loss in losses.items():
                state[name].judged.append((step, loss))
        if step < self.steps:
            for name in self.search.judge(step, losses):
                state[name].status = ENDED
                cohort.remove(name)

    def _clock(self) -> None:
        """Note what the sweep has taken."""
        self.state.seconds = self.before[0] + time.perf_counter() - self.clocks[0]
        self.state.cpu_seconds = self.before[1] + time.process_time() - self.clocks[1]

    def _save(self, cohort: Cohort) -> None:
        state = self.state
        self._clock()
        number = state.cohort * self.steps + state.step

        def fill(folder: Path) -> None:
            cohort.save(
                folder, lambda name: {"step": state.step, "task": self.tasks[name].record()}
            )
            state.write(folder / STATE)

        checkpoint.write(self.output, number, fill, Processes())
        for path in self.output.glob("checkpoint-*"):
            if path != checkpoint.path_of(self.output, number):
                shutil.rmtree(path)

    def _close(self, cohort: Cohort) -> None:
        """The end of a cohort: who is left has finished; the best one is kept if it is the best so
        far."""
        for name in cohort.members:
            self.state[name].status = FINISHED
        ordered = self.state.finished()
        if ordered and ordered[0].name in cohort.members:
            self.state.best = ordered[0].name
            self._keep(cohort, ordered[0])

    # ------------------------------------------------------------------------------------------ the
    # end

    def alone(self, one: Candidate) -> TrainConfig:
        """The configuration that trains a candidate again, alone."""
        return self.tasks[one.name].config.model_copy(
            update={
                "output": self.output / "again",
                "eval_every": self.evaluated,
                "overwrite": False,
                "resume": None,
            }
        )

    def _keep(self, cohort: Cohort, one: Candidate) -> None:
        """Write the winner's folder."""
        config, last = self.alone(one), one.evaluations[-1][1]
        summary = cohort.runs[one.name].summary()
        metrics: dict[str, Any] = {
            "steps": self.steps,
            "first_loss": one.losses[0],
            "last_loss": one.losses[-1],
        }
        metrics |= {"trainable_parameters": summary.trainable, "total_parameters": summary.total}
        metrics |= {f"eval_{name}": value for name, value in last.items()}
        about = provenance_of(config, self.tasks[one.name], self.prepared, self.model, metrics)
        lines = [{"step": step, "loss": loss} for step, loss in enumerate(one.losses, 1)]
        lines += [
            {"step": step, **{f"eval_{name}": value for name, value in measured.items()}}
            for step, measured in one.evaluations
        ]
        lines.sort(key=lambda line: (line["step"], "loss" not in line))
        with new_folder(
            self.output / BEST, overwrite=True, replaces=[checkpoint.RUN, EVERYTHING]
        ) as folder:
            cohort.runs[one.name].save(
                folder / checkpoint.ADAPTER, base_name=config.base, provenance=about
            )
            (folder / checkpoint.LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / TRAIN).write_text(
                yaml.safe_dump(_given(config), sort_keys=False, allow_unicode=True)
            )
            checkpoint.write_json(folder / checkpoint.METRICS, metrics)
            write_status(folder, "finished", config, self.prepared)

    def facts(self) -> dict[str, Any]:
        config, found = self.config, self.state.facts()
        best = None if found["best"] is None else self.state[found["best"]]
        return {
            "base": config.base, "data": config.data, "task": config.task, "item": self.task.item,
            "output": str(self.output), "steps": self.steps, "sweep": self.settings.content(),
            "sampler": self.settings.chosen, "rungs": self.search.rungs,
            "folder": None if best is None else str(self.output / BEST),
            "command": None if best is None else ["veneer", "train", str(self.output / BEST / TRAIN)],
            "config": None if best is None else _given(self.alone(best)), **self.about_best, **found,
        }  # fmt: skip

    def _result(self, interrupted: bool) -> SweepResult:
        facts = self.facts()
        return SweepResult(
            self.output, facts["folder"] and Path(facts["folder"]), interrupted, facts
        )

    def _finish(self) -> SweepResult:
        if self.state.best is None:
            notes = "; ".join(
                f"{one.name}: {one.note}" for one in self.state.candidates if one.note
            )
            do = "lower the learning rates, or train in fp32 (--precision fp32)"
            raise TrainingError(f"no candidate that ran to its end ({notes})", "one at least", do)
        best = self.state[self.state.best]
        self.model = None  # which the run alone loads again
        self.about_best = {
            "edges": edges(self.settings.axes, best.changes),
            "alone": measure_alone(self.alone(best), best.losses),
        }
        self._clock()
        result = self._result(interrupted=False)
        write_whole(self.output / RESULT, json.dumps(result.facts, indent=2) + "\n")
        write_whole(self.output / REPORT, page(result.facts))
        self._status("finished")
        for path in self.output.glob("checkpoint-*"):
            shutil.rmtree(path)
        say(
            self.console,
            f"Done     in {duration(self.state.seconds)}: {best.name} ({words(best.changes)})",
        )
        say(self.console, f"         evaluation {best.loss:.4f}, {best.parameters:,} numbers")
        for edge in self.about_best["edges"]:
            say(self.console, f"Edge     {edge_words(edge)}")
        say(self.console, f"Alone    {alone_words(self.about_best['alone'])}")
        say(self.console, f"Adapter  {self.output / BEST / checkpoint.ADAPTER}")
        say(self.console, f"Report   {self.output / REPORT}")
        return result

    def _say(self, cohort: Cohort) -> None:
        config, rows = self.config, self.prepared
        total = sum(
            parameter.nbytes for parameter in self.model.parameters() if not parameter.requires_grad
        )
        trained = sum(one.parameters for one in self.state.of(self.state.cohort))
        say(
            self.console,
            f"Base     {config.base} ({str(self.model.dtype).removeprefix('torch.')},"
            f" {size(total)})",
        )
        say(self.console, f"Data     {config.data}: {self.task.amount(rows.train)}")
        say(self.console, f"         {len(rows.evaluation):,} examples to evaluate on")
        say(
            self.console,
            f"Steps    {self.steps:,} of {config.batch_size * config.grad_accum} examples",
        )
        count, at_once = self.search.count, min(self.settings.at_once, self.search.count)
        ends = (
            f"; the weaker end after steps {', '.join(map(str, self.search.rungs))}"
            if self.search.rungs
            else ""
        )
        say(
            self.console,
            f"Sweep    {count} candidates ({self.settings.chosen}), {at_once} at once{ends}",
        )
        say(self.console, f"         {trained:,} numbers train at once")
        if not self.console.quiet:  # a step is counted for it
            runs = {
                name: memory.Run(one.task.config, one.parameters, one.order)
                for name, one in cohort.members.items()
            }
            told = memory.estimate_at_once(self.model, runs, *self.task.largest(rows))
            say(self.console, f"Memory   {told}")


def _comparable(config: TrainConfig) -> TrainConfig:
    """`config` with all that candidates must have in common. Raises `ConfigError`."""
    must_fit(config)
    if not TASKS[config.task].one_pass:
        problem = f"task {config.task}, whose loss takes more than one pass of its rows"
        names = ", ".join(name for name in task_names() if TASKS[name].one_pass)
        raise ConfigError(
            problem, f"one of {names}", "train its candidates one after another with `veneer train`"
        )
    if config.eval_fraction and config.eval_seed is None:  # the same rows judge all
        return config.model_copy(update={"eval_seed": config.seed})
    return config


def _given(config: TrainConfig) -> dict[str, Any]:
    """What a YAML file must say for this configuration."""
    default: Mapping[str, Any] = TrainConfig.defaults()
    return {
        name: value
        for name, value in config.content().items()
        if name not in default or value != default[name]
    }
