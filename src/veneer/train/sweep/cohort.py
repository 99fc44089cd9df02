"""Train a cohort of a sweep: candidates (configurations to compare) that share one base. Candidates
whose batches have equal shapes share each forward and backward pass (``veneer/engine``).

A candidate trains exactly as in a separate run of `veneer train`: with the same initial adapter,
order of rows, optimiser, schedule, clipping and random numbers. Candidates with equal data seeds
have the same rows in each step, so they always share passes. Candidates with different rows share a
pass only if their batches are padded to the same length. A candidate whose loss or gradient is not
finite is dropped.

In a separate run, torch's data loaders draw a number from the default generator at the start of
each epoch and of each evaluation. `draw_loader_seed` draws it here too, so that the random numbers
of dropout after it equal those of a separate run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from veneer.attach import check
from veneer.engine import TrainedAdapter
from veneer.errors import ConfigError, TargetError, VeneerError, raise_all
from veneer.train import checkpoint
from veneer.train.adapter_setup import calibration_arguments, lora_config
from veneer.train.arguments import arguments_of
from veneer.train.loss import causal_loss
from veneer.train.many import Runs
from veneer.train.order import EpochSampler
from veneer.train.prepare import Prepared, steps_an_epoch
from veneer.train.sweep.held_out import OutputAsModel, evaluate_runs
from veneer.train.tasks import Task
from veneer.train.tasks._base import move_batch

#: the file of a candidate's optimiser, schedule and random numbers in a checkpoint
STATE_FILE = "state.pt"


@dataclass(eq=False)
class CohortMember:
    """A candidate in training. ``adapter``: the parameters of its adapter, with their optimiser,
    schedule and random numbers. The ``StepEngine``, which runs the shared passes, uses the same
    object."""

    task: Task
    adapter: TrainedAdapter

    @property
    def order_seed(self) -> int:
        """The seed of the order of the candidate's rows."""
        config = self.task.config
        return config.seed if config.data_seed is None else config.data_seed

    def step(self, loss: float) -> str | None:
        """Clip the gradients and take a step of the optimiser. If the loss of the step (``loss``)
        or the gradient norm is not finite, take no step and return the problem as text."""
        gradient_norm = self.adapter.clip(self.task.config.max_grad_norm or 0.0)
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return "the gradient is not finite"
        self.adapter.step()
        return None


class Cohort:
    """The candidates of a sweep that train at the same time, each with an adapter on one base.

    Args:
        model: the base.
        tasks: by candidate's name, a task with the candidate's configuration.
        prepared: the tokenised rows and the number of steps, which all candidates share.
        output: the output folder of the sweep.
        resumed_from: the folder of a checkpoint; None for new adapters.
        keep_going: leave out candidates that cannot begin; otherwise raise a ``TargetError`` that
            names all of them.

    Attributes:
        members: by name, the candidates that still train.
        failed: by name, the reason why a candidate could not begin or was dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task],
        prepared: Prepared,
        output: Path,
        resumed_from: Path | None,
        keep_going: bool,
    ) -> None:
        self.model, self.prepared = model, prepared
        self.runs, self.failed = Runs(model), dict[str, str]()
        self.members: dict[str, CohortMember] = {}
        self._step_iterators: dict[int, Iterator[list[list[int]]]] = {}
        self._checked_configs: list[Any] = []
        try:
            self._try_for_candidates(
                tasks, lambda name: self._attach_candidate(name, tasks[name], resumed_from)
            )
            decay_flags = _find_decay_flags(model)
            self._try_for_candidates(
                self.runs,
                lambda name: self._start_candidate(
                    name, tasks[name], output, resumed_from, decay_flags
                ),
            )
            if not keep_going:
                problems = [f"candidate {name}: {problem}" for name, problem in self.failed.items()]
                raise_all(TargetError, "The sweep cannot begin", problems)
        except BaseException:
            self.close()
            raise

    def _try_for_candidates(self, names: Iterable[str], action: Callable[[str], None]) -> None:
        """Call ``action`` with the name of each candidate. If it raises a ``VeneerError``, record
        the error in ``failed``, detach the candidate's adapter, and go on with the next name."""
        for name in [*names]:
            try:
                action(name)
            except VeneerError as error:
                self.failed[name] = str(error)
                if name in self.runs:
                    self.runs.remove(name)

    def _attach_candidate(self, name: str, task: Task, resumed_from: Path | None) -> None:
        config = task.config
        if resumed_from is not None:
            self.runs.add(name, resumed_from / name / checkpoint.ADAPTER, seed=config.seed)
            return
        calibration_options = calibration_arguments(task, self.prepared.train, self.model)
        adapter_config = lora_config(config, self.model, {})
        self.runs.add(name, adapter_config, seed=config.seed, **calibration_options)
        # one check for all candidates with equal adapter configs, since its result is the same
        if config.check and adapter_config not in self._checked_configs:
            check(self.model, task.example(self.prepared, self.model.device), name)
            self._checked_configs.append(adapter_config)

    def _start_candidate(
        self,
        name: str,
        task: Task,
        output: Path,
        resumed_from: Path | None,
        decay_flags: Mapping[int, bool],
    ) -> None:
        """Create a candidate's optimiser and schedule, and add it to ``members``. If the sweep
        resumes, restore their state from the checkpoint. ``decay_flags``: the result of
        ``_find_decay_flags``."""
        adapter = self.runs.engine.adapters[name]
        arguments, steps = arguments_of(task.config, output, self.prepared), self.prepared.steps
        adapter.optimizer = _create_optimizer(
            arguments, self.model, adapter.parameters, decay_flags
        )
        adapter.scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=adapter.optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
        )
        if resumed_from is not None:
            adapter.load_state_dict(torch.load(resumed_from / name / STATE_FILE, weights_only=True))
        else:  # as in a single run: the Trainer seeds once more after attaching
            adapter.stream.restart(task.config.seed)
        self.members[name] = CohortMember(task, adapter)

    def begin(self, completed_steps: int) -> None:
        """Prepare for training after `completed_steps` steps: put the base in training mode, and
        skip the rows of these steps."""
        self.model.train()
        self._completed_steps = completed_steps
        for order_seed in {member.order_seed for member in self.members.values()}:
            self._step_iterators[order_seed] = islice(
                self._iterate_steps(order_seed), completed_steps, None
            )

    @property
    def _first_task(self) -> Task:
        """The task of the first candidate, to read settings that are equal for all candidates, such
        as the batch size."""
        return next(iter(self.members.values())).task

    def _iterate_steps(self, order_seed: int) -> Iterator[list[list[int]]]:
        """For each step of the run, yield the list of its forward passes. A pass is a list of row
        indices. `order_seed` determines the order of the rows in each epoch."""
        config = self._first_task.config
        sampler = EpochSampler(
            [*self.prepared.train.lengths],
            config.batch_size * config.grad_accum,
            order_seed,
            config.group_by_length,
        )
        for epoch in range(self.prepared.steps):
            sampler.set_epoch(epoch)
            row_order = [*sampler]
            passes = [
                row_order[i : i + config.batch_size]
                for i in range(0, len(row_order), config.batch_size)
            ]
            for i in range(0, len(passes), config.grad_accum):
                yield passes[i : i + config.grad_accum]

    def step(self) -> dict[str, float]:
        """Train one step of all candidates. Returns by name the loss of each one that still trains;
        those whose loss or gradient is not finite are dropped and recorded in `failed`."""
        if (
            self._completed_steps
            % steps_an_epoch(self._first_task.config, len(self.prepared.train))
            == 0
        ):
            self.draw_loader_seed()
        batches_by_seed = {
            order_seed: self._collate(next(step_iterator))
            for order_seed, step_iterator in self._step_iterators.items()
        }
        losses = dict.fromkeys(self.members, 0.0)
        item_totals = {
            order_seed: max(sum(item_count for _, item_count in batches), 1)
            for order_seed, batches in batches_by_seed.items()
        }
        for pass_index in range(max(map(len, batches_by_seed.values()))):
            batches, weights = {}, {}
            for name, member in self.members.items():
                batches[name], item_count = batches_by_seed[member.order_seed][pass_index]
                weights[name] = item_count / item_totals[member.order_seed]
            pass_losses = self.runs.backward(batches, self._loss_functions(), weights=weights)
            for name, loss in pass_losses.items():
                losses[name] += float(loss) * weights[name]
        self._completed_steps += 1
        for name, loss in losses.items():
            problem = self.members[name].step(loss)
            if problem is not None:
                self.failed[name] = f"{problem} at step {self._completed_steps}"
                self.remove(name)
        return {name: losses[name] for name in losses if name in self.members}

    def _collate(self, passes: Sequence[Sequence[int]]) -> list[tuple[Any, int]]:
        """Collate the rows of each forward pass: (the batch as `Runs.backward` takes it, the number
        of items, such as tokens, over which the loss of the batch is a mean). `passes`: by pass,
        the indices of its rows."""
        task, train_rows = self._first_task, self.prepared.train
        counted_batches = []
        for indices in passes:
            batch = move_batch(self.model.device, task.collate([train_rows[i] for i in indices]))
            item_count = task.count_items(batch)
            counted_batches.append(
                (batch if task.name == "sft" else (task.inputs(batch), batch), item_count)
            )
        return counted_batches

    def _loss_functions(self) -> Any:
        if self._first_task.name == "sft":
            return causal_loss
        return {name: partial(_mean_loss, member.task) for name, member in self.members.items()}

    def evaluate(self) -> dict[str, dict[str, float]]:
        """By candidate's name, its measures on the held-out rows, one of which is "loss"."""
        tasks = {name: member.task for name, member in self.members.items()}
        return evaluate_runs(self.runs, tasks, self.prepared.evaluation)

    def draw_loader_seed(self) -> None:
        """Draw a number from each candidate's random stream, as torch's data loader does at the
        start of an epoch or evaluation of a separate run. Later random numbers, such as those of
        dropout, then equal those of a separate run."""
        for member in self.members.values():
            with member.adapter.stream:
                torch.empty((), dtype=torch.int64).random_()

    def remove(self, name: str) -> None:
        """Detach a candidate's adapter and drop the candidate, which frees its memory."""
        self.runs.remove(name)
        del self.members[name]
        order_seeds = {member.order_seed for member in self.members.values()}
        self._step_iterators = {
            order_seed: step_iterator
            for order_seed, step_iterator in self._step_iterators.items()
            if order_seed in order_seeds
        }

    def save(self, folder: Path, make_provenance: Callable[[str], Mapping[str, Any]]) -> None:
        """Save each candidate's adapter, and the state of its optimiser, schedule and random
        numbers, to a new folder of its name in `folder`. `make_provenance`: returns, for a
        candidate's name, the provenance that its adapter's files shall record."""
        for name, member in self.members.items():
            (folder / name).mkdir()
            self.runs[name].save(
                folder / name / checkpoint.ADAPTER,
                base_name=member.task.config.base,
                provenance=make_provenance(name),
            )
            torch.save(member.adapter.state_dict(), folder / name / STATE_FILE)

    def close(self) -> None:
        for name in [*self.runs]:
            self.runs.remove(name)
        self.members.clear()


def _mean_loss(task: Task, output: Any, batch: Mapping[str, Any]) -> Tensor:
    """The mean loss of a batch, with gradient, as ``task`` computes it. ``output``: the model's
    output for the batch, from a forward that several candidates shared."""
    task_loss = task.loss(OutputAsModel(output, training=True), batch)
    return task_loss.total / max(task_loss.items, 1)


def _find_decay_flags(model: Any) -> dict[int, bool]:
    """By the ``id`` of each trainable parameter, in the order of the model's parameters, whether
    weight decay applies to it."""
    decayed_names = {*Trainer.get_decay_parameter_names(None, model)}  # pyright: ignore
    return {
        id(parameter): name in decayed_names
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _create_optimizer(
    arguments: Any, model: Any, parameters: list[nn.Parameter], decay_flags: Mapping[int, bool]
) -> torch.optim.Optimizer:
    """Create the optimiser that transformers' Trainer would create, for the parameters of one
    candidate. Raises ``ConfigError`` for an optimiser that is not installed, or that needs the
    whole model instead of a list of parameters.

    Args:
        arguments: the candidate's ``TrainingArguments``.
        decay_flags: the result of ``_find_decay_flags``. Its order determines the order of the
            parameters in the optimiser's groups, as in the Trainer.
    """
    parameters_by_id = {id(parameter): parameter for parameter in parameters}
    parameter_groups = [
        {
            "params": [
                parameters_by_id[parameter_id]
                for parameter_id, is_decayed in decay_flags.items()
                if parameter_id in parameters_by_id and is_decayed is group_decayed
            ],
            "weight_decay": weight_decay,
        }
        for group_decayed, weight_decay in ((True, arguments.weight_decay), (False, 0.0))
    ]
    try:
        optimizer_class, optimizer_options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except ImportError as error:
        raise ConfigError(
            f"Found: {error}. Do: install the package, or choose another setting."
        ) from error
    if not (
        isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    ) or optimizer_options.keys() & {"params", "model"}:
        raise ConfigError(
            f"optimiser {arguments.optim}, which looks at the whole model",
            "one that takes parameters",
            "choose for example adamw",
        )
    return optimizer_class(parameter_groups, **optimizer_options)
