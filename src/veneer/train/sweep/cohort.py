"""Candidates that share a base: each step is one forward and one backward for all whose rows have
one shape.

A candidate is the run that `veneer train` makes of its configuration alone: the same start, order
of rows, optimiser, schedule, clipping and random numbers. Candidates of one data seed have the same
rows in each step, so they share it; others take forwards of their own (`many/runs.py`).

What a run draws besides dropout is drawn here too: torch's loaders take a number from the default
generator whenever they begin, for an epoch or an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from veneer.attach.check import check
from veneer.errors import ConfigError, TargetError, VeneerError, raise_all
from veneer.train import checkpoint
from veneer.train.arguments import arguments_of
from veneer.train.evaluate import to
from veneer.train.loss import causal_loss
from veneer.train.many import Runs
from veneer.train.order import EpochSampler
from veneer.train.prepare import Prepared, steps_an_epoch
from veneer.train.run import lora_of
from veneer.train.start_data import start_data
from veneer.train.sweep.held_out import Answered, evaluate_runs
from veneer.train.tasks import Task

#: of a candidate's own state in a checkpoint: optimiser, schedule, random numbers
STATE = "state.pt"


class _Member:
    """One candidate: all that is its own but the adapter."""

    def __init__(
        self, task: Task, handle: Any, prepared: Prepared, folder: Path, decays: Mapping[int, bool]
    ) -> None:
        self.task, self.handle, self.prepared = task, handle, prepared
        arguments = arguments_of(task.config, folder, prepared)
        self.parameters = handle.parameters()
        self.optimizer = _optimizer(arguments, handle.model, self.parameters, decays)
        self.scheduler = get_scheduler(
            arguments.lr_scheduler_type, optimizer=self.optimizer,
            num_warmup_steps=arguments.get_warmup_steps(prepared.steps), num_training_steps=prepared.steps,
        )  # fmt: skip

    @property
    def order(self) -> int:
        """The seed of the order of its rows."""
        config = self.task.config
        return config.seed if config.data_seed is None else config.data_seed

    def step(self, finite: bool) -> bool:
        """The optimiser's step on the gradients that are there. Nothing is done, and False, if the
        loss was not ``finite``, or they are not."""
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, self.task.config.max_grad_norm or math.inf
        )
        finite = finite and bool(norm.isfinite())
        if finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return finite


class Cohort:
    """``model``: the base; ``tasks``: of each candidate, by name, with its own configuration;
    ``found``: the folder of a checkpoint to go on from. ``failed``: why some could not begin, or
    went on no longer. Raises for all that cannot begin, unless it is to keep going without them."""

    def __init__(
        self, model: nn.Module, tasks: Mapping[str, Task], prepared: Prepared, output: Path, found: Path | None,
        keep_going: bool,
    ) -> None:  # fmt: skip
        self.model, self.prepared = model, prepared
        self.runs, self.failed = Runs(model), dict[str, str]()
        self.members: dict[str, _Member] = {}
        self._rows: dict[int, Iterator[list[list[int]]]] = {}
        self._checked: list[Any] = []
        try:
            self._each(tasks, lambda name: self._attach(name, tasks[name], found))
            decays = _decays(model)
            self._each(
                self.runs, lambda name: self._start(name, tasks[name], output, found, decays)
            )
            if not keep_going:
                problems = [f"candidate {name}: {problem}" for name, problem in self.failed.items()]
                raise_all(TargetError, "The sweep cannot begin", problems)
        except BaseException:
            self.close()
            raise

    def _each(self, names: Iterable[str], do: Callable[[str], None]) -> None:
        """`do` for each candidate; who raises has failed, and is no run any longer."""
        for name in [*names]:
            try:
                do(name)
            except VeneerError as error:
                self.failed[name] = str(error)
                if name in self.runs:
                    self.runs.remove(name)

    def _attach(self, name: str, task: Task, found: Path | None) -> None:
        config = task.config
        if found is not None:
            self.runs.add(name, found / name / checkpoint.ADAPTER, seed=config.seed)
            return
        more, lora = (
            start_data(task, self.prepared.train, self.model),
            lora_of(config, self.model, {}),
        )
        self.runs.add(name, lora, seed=config.seed, **more)
        if (
            config.check and lora not in self._checked
        ):  # of those that are attached alike, one proves it for all
            check(self.model, task.example(self.prepared, self.model.device), name)
            self._checked.append(lora)

    def _start(
        self, name: str, task: Task, output: Path, found: Path | None, decays: Mapping[int, bool]
    ) -> None:
        member = _Member(task, self.runs[name], self.prepared, output, decays)
        if found is not None:
            state = torch.load(found / name / STATE, weights_only=True)
            member.optimizer.load_state_dict(state["optimizer"])
            member.scheduler.load_state_dict(state["scheduler"])
            self.runs.stream(name).own = state["random"]
        else:
            self.runs.restart(
                name, task.config.seed
            )  # as a trainer does once the adapter is attached
        self.members[name] = member

    def begin(self, step: int) -> None:
        """Stand before the rows of the step after `step`."""
        self.model.train()
        self._step = step
        for order in {member.order for member in self.members.values()}:
            self._rows[order] = islice(self._groups(order), step, None)

    def _groups(self, order: int) -> Iterator[list[list[int]]]:
        """The rows of each step: of each of its passes. The same of all candidates that have this
        order."""
        config = next(iter(self.members.values())).task.config
        lengths = self.prepared.train.lengths
        sampler = EpochSampler(
            [*lengths], config.batch_size * config.grad_accum, order, config.group_by_length
        )
        for epoch in range(self.prepared.steps):
            sampler.set_epoch(epoch)
            rows = [*sampler]
            passes = [
                rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)
            ]
            for i in range(0, len(passes), config.grad_accum):
                yield passes[i : i + config.grad_accum]

    @property
    def steps_an_epoch(self) -> int:
        return steps_an_epoch(
            next(iter(self.members.values())).task.config, len(self.prepared.train)
        )

    def step(self) -> dict[str, float]:
        """One step of all; the loss of each. Who has none that is finite is in `failed`, and no
        member any longer."""
        if self._step % self.steps_an_epoch == 0:
            self.draw()
        passes = {order: self._collated(next(rows)) for order, rows in self._rows.items()}
        losses = dict.fromkeys(self.members, 0.0)
        totals = {order: max(sum(items for _, items in own), 1) for order, own in passes.items()}
        for number in range(max(map(len, passes.values()))):
            batches, weights = {}, {}
            for name, member in self.members.items():
                batches[name], items = passes[member.order][number]
                weights[name] = items / totals[member.order]
            found = self.runs.backward(batches, self._losses(), weights=weights)
            losses = {name: losses[name] + float(found[name]) * weights[name] for name in losses}
        self._step += 1
        for name, loss in losses.items():
            if not self.members[name].step(math.isfinite(loss)):
                what = (
                    f"the loss is {loss}"
                    if not math.isfinite(loss)
                    else "the gradient is not finite"
                )
                self.failed[name] = f"{what} at step {self._step}"
                self.remove(name)
        return {name: losses[name] for name in losses if name in self.members}

    def _collated(self, passes: Sequence[Sequence[int]]) -> list[tuple[Any, int]]:
        """The batches of a step as `Runs` takes them, and how many items the loss of each is a mean
        over."""
        task, rows = next(iter(self.members.values())).task, self.prepared.train
        found = []
        for own in passes:
            batch = to(self.model.device, task.collate([rows[i] for i in own]))
            items = task.items(batch)
            found.append((batch if task.name == "sft" else (task.inputs(batch), batch), items))
        return found

    def _losses(self) -> Any:
        if next(iter(self.members.values())).task.name == "sft":
            return causal_loss
        return {name: partial(_mean_loss, member.task) for name, member in self.members.items()}

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The loss and the measures of each on the rows held out."""
        tasks = {name: member.task for name, member in self.members.items()}
        return evaluate_runs(self.runs, tasks, self.prepared.evaluation)

    def draw(self) -> None:
        """What torch's loaders draw of each run's numbers when an epoch or an evaluation of a run
        alone begins."""
        for name in self.members:
            with self.runs.stream(name):
                torch.empty((), dtype=torch.int64).random_()

    def remove(self, name: str) -> None:
        """Let a candidate end; what it held is free."""
        self.runs.remove(name)
        del self.members[name]
        orders = {member.order for member in self.members.values()}
        self._rows = {order: rows for order, rows in self._rows.items() if order in orders}

    def save(self, folder: Path, about: Callable[[str], Mapping[str, Any]]) -> None:
        """Each candidate's adapter and state, in a folder of its name. `about`: what its adapter
        says of its run."""
        for name, member in self.members.items():
            (folder / name).mkdir()
            config = member.task.config
            self.runs[name].save(
                folder / name / checkpoint.ADAPTER, base_name=config.base, provenance=about(name)
            )
            state = {
                "optimizer": member.optimizer.state_dict(), "scheduler": member.scheduler.state_dict(),
                "random": self.runs.stream(name).own,
            }  # fmt: skip
            torch.save(state, folder / name / STATE)

    def close(self) -> None:
        for name in [*self.runs]:
            self.runs.remove(name)
        self.members.clear()


def _mean_loss(task: Task, output: Any, batch: Mapping[str, Any]) -> Tensor:
    found = task.loss(Answered(output, training=True), batch)
    return found.total / max(found.items, 1)


def _decays(model: Any) -> dict[int, bool]:
    """By the id of each parameter that trains, in the order of their names, whether its weights
    decay."""
    decayed = {*Trainer.get_decay_parameter_names(None, model)}  # pyright: ignore
    return {id(one): name in decayed for name, one in model.named_parameters() if one.requires_grad}


def _optimizer(
    arguments: Any, model: Any, parameters: list[nn.Parameter], decays: Mapping[int, bool]
) -> torch.optim.Optimizer:
    """What transformers' trainer makes of these arguments, over one candidate's parameters."""
    own = {id(one): one for one in parameters}
    groups = [
        {
            "params": [own[key] for key, decay in decays.items() if key in own and decay is which],
            "weight_decay": rate,
        }
        for which, rate in ((True, arguments.weight_decay), (False, 0.0))
    ]
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except ImportError as error:
        raise ConfigError(
            f"Found: {error}. Do: install the package, or choose another setting."
        ) from error
    if not (
        isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    ) or options.keys() & {"params", "model"}:
        found = f"optimiser {arguments.optim}, which looks at the whole model"
        raise ConfigError(found, "one that takes parameters", "choose for example adamw")
    return kind(groups, **options)
