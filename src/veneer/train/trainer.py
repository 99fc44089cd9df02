"""transformers' trainers with Veneer's adapters in them: lean loss, exact order of the data, atomic
checkpoints.

`TaskTrainer` is the plain `Trainer` with the loss of a task; for the task sft,
`sft_trainer.AdapterTrainer` is trl's.

What is taken from trl and transformers: the loop, accumulation, precision, devices, schedules,
optimisers, packing, collation, trackers. What is replaced, and why:

- the loss: `loss.token_loss`, because trl's fused head multiplies by `lm_head.weight` and so
  bypasses an adapter there;
- the order of the examples: a function of (seed, epoch), because one drawn from the global
  generator differs after a resume; examples of similar length share a batch, because padding is
  computed too;
- the evaluation loss: a mean over tokens, because a mean over batches depends on the batch size;
- checkpoints: the adapter instead of the model, under a temporary name that is renamed when
  complete.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import Sampler
from transformers import Trainer

from veneer.adapter_files.save_pretrained import refill
from veneer.distributed import average_gradients, reshard
from veneer.precision import double
from veneer.train import checkpoint
from veneer.train.callbacks import StopOnSignal
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.order import SPARE, EpochSampler, shared
from veneer.train.processes import Processes
from veneer.train.tasks import Rows, Task, TaskLoss


@contextmanager
def seen_as_adapted(model: Any) -> Iterator[None]:
    """A block in which transformers' trainer sees that a quantised model has adapters, as it asks
    by PEFT's mark. Only there: elsewhere the mark makes methods of the model call PEFT."""
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del model.__dict__["_hf_peft_config_loaded"]


class TrainsAdapter(Trainer):
    """What a `Trainer` of an adapter does whatever its loss is: the order of the rows, evaluation,
    checkpoints, and the sums over several processes. `processes`, `stop` and `group_by_length` are
    set by who runs it."""

    adapter: Any
    base_name: str
    processes = Processes()
    stop: StopOnSignal | None = None
    group_by_length = True
    _eval_total: torch.Tensor | None = (
        None  # sums over the evaluation so far: loss, items, measures
    )
    measures: tuple[str, ...] = ("accuracy",)
    provenance: dict[str, Any] = {}  # what a checkpoint's adapter says of its run beside the step

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = (
            dataset.lengths
            if isinstance(dataset, Rows)
            else [len(ids) for ids in dataset["input_ids"]]
        )
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.processes.shares
        )
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochSampler(lengths, batch, seed, self.group_by_length)

    @functools.cached_property
    def _flops_per_entry(self) -> int:
        """What transformers says of one entry of a batch, which is the same for all, and walks the
        whole model."""
        name = getattr(self.model, "main_input_name", "input_ids")
        return super().floating_point_ops({name: torch.empty(1)})

    def floating_point_ops(self, inputs: Any) -> int:
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main is None else main.numel() * self._flops_per_entry

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """With every row once, whatever the number of processes."""
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if self.processes.count == 1:
            return loader
        own = shared(loader, self.processes.share, self.processes.shares, self._spare)
        return prepare_data_loader(
            own, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _spare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of rows that another process has, as one that counts for nothing."""
        return batch

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Without a wrapper around the model. torch's DDP sends all weights of the base when it is
        made, hides the model from the loss, which then needs whole logits, and must be told which
        parameters a pass may leave out. `average_gradients` sends those of the adapter once a step,
        and asks for nothing else."""
        # transformers' word for a model that sees to its own processes: it is not wrapped
        self.is_distributed_loading_by_transformers = self.processes.count > 1
        return super()._prepare_for_training(*args, **kwargs)

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """All begin with the first one's values: another device may have rounded another way."""
        with torch.no_grad():
            for parameter in self._trained:
                dist.broadcast(parameter.data, src=0)

    @functools.cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [
            parameter for parameter in self.adapter.model.parameters() if parameter.requires_grad
        ]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.processes.count > 1 and self.accelerator.sync_gradients:
            self.processes.must_have_parent()
            average_gradients(self._trained)
        return loss

    def get_tp_size(self) -> int:
        """How many processes compute on the same rows: transformers' word for it."""
        return self.processes.count // self.processes.shares

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all shares of the rows, of the same shape."""
        if self.processes.shares > 1:
            dist.all_reduce(value)
        return value

    def _over_all(self, *seen: torch.Tensor) -> torch.Tensor:
        """Counts of this step, summed over all shares of the rows; of several processes, then how
        many of them got a signal to stop."""
        if self.processes.count == 1:
            return torch.stack(seen)
        asked = self.stop is not None and self.stop.asked
        sums = torch.stack([*seen, torch.full_like(seen[0], int(asked))])
        dist.all_reduce(sums)
        sums[:-1] //= self.get_tp_size()
        return sums

    def _heed(self, signals: list[int]) -> None:
        """All processes stop after this step, if one of them was to."""
        if self.stop is not None and any(signals):
            self.stop.stopped = True

    def _count(self, *sums: torch.Tensor) -> None:
        """Add to the sums of an evaluation: loss, items, then each measure."""
        device = self.accelerator.device
        counts = torch.stack([double(value.detach().to(device)) for value in sums])
        self._eval_total = counts if self._eval_total is None else self._eval_total + counts

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As before, with the loss and the measures as means over all items."""
        self._eval_total = None
        output = super().evaluation_loop(*args, **kwargs)
        reshard(self.adapter.model)  # what no backward follows stays gathered
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._eval_total is not None and output.metrics is not None:
            loss, items, *sums = self._sum(self._eval_total).tolist()
            output.metrics[f"{prefix}_loss"] = loss / max(items, 1)
            for name, value in zip(self.measures, sums, strict=True):
                if not math.isnan(value):  # one that these rows do not have
                    output.metrics[f"{prefix}_{name}"] = value / max(items, 1)
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """checkpoint-N: adapter, optimiser, schedule, random states, trainer state. Complete, or
        not there at all."""
        from transformers.trainer_callback import ExportableState
        from transformers.trainer_utils import rotate_checkpoints

        self.store_flos()
        step, main = self.state.global_step, self.args.should_save
        callbacks: Any = self.state.stateful_callbacks
        run_dir = self._get_output_dir(trial=trial)

        def fill(
            folder: Path,
        ) -> None:  # on every rank: they compare what they hold, and the main one writes
            about = {"step": step, **self.provenance}
            self.adapter.save(
                folder / checkpoint.ADAPTER, base_name=self.base_name, provenance=about
            )
            if main and self.adapter.config.trainable_tokens:
                tokenizer: Any = self.processing_class
                tokenizer.save_pretrained(str(folder / checkpoint.ADAPTER))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(
                    checkpoint.path_of(run_dir, self.state.best_global_step)
                )
            if main:
                for item in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(item, ExportableState):
                        callbacks[type(item).__name__] = item.state()
                self.state.save_to_json(str(folder / checkpoint.STATE))

        checkpoint.write(run_dir, step, fill, self.processes)
        if main:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(
                run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=False
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `run.fit` has loaded the checkpoint's adapter instead of attaching a new one."""

    def _load_best_model(self) -> None:
        """Give the adapter the numbers of the best checkpoint."""
        if self.state.best_model_checkpoint is not None:
            refill(self.adapter.model, Path(self.state.best_model_checkpoint) / checkpoint.ADAPTER)


class TaskTrainer(TrainsAdapter):
    """A `Trainer` whose loss is a task's. Takes `Trainer`'s arguments, with `Rows` as data sets;
    `adapter` and `base_name` as `AdapterTrainer`."""

    def __init__(
        self, model: Any, *, task: Task, adapter: Any, base_name: str, **kwargs: Any
    ) -> None:
        with seen_as_adapted(model):
            super().__init__(model, data_collator=task.collate, **kwargs)
        self.task, self.adapter, self.base_name, self.measures = (
            task,
            adapter,
            base_name,
            task.measures,
        )
        self.provenance = {"task": task.record()}
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = (
            True  # by the items of the accumulated batch
        )
        self._total_train_tokens, self._train_sums = 0, {}
        if self.args.activation_checkpointing:  # pyright: ignore[reportAttributeAccessIssue] (SFTConfig's)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )

    def get_batch_samples(self, *args: Any) -> Any:
        samples, _ = super().get_batch_samples(*args)
        real = [inputs for inputs in samples if SPARE not in inputs]
        masks = [inputs["attention_mask"].sum() for inputs in real if "attention_mask" in inputs]
        items = torch.tensor(sum(map(self.task.items, real)), device=self.accelerator.device)
        seen: Any = sum(masks, torch.zeros_like(items))
        counts = self._over_all(items, seen.to(items.device))
        _, seen, *signals = counts.tolist()
        self._heed(signals)
        self._total_train_tokens += seen
        return samples, counts[0]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss, and its measures."""
        spare = SPARE in inputs
        found = self.task.loss(
            model, {name: value for name, value in inputs.items() if name != SPARE}
        )
        if spare:
            found = TaskLoss(
                found.total * 0.0, 0, {name: value * 0 for name, value in found.sums.items()}
            )
        sums = [torch.as_tensor(found.sums.get(name, math.nan)) for name in self.measures]
        items = torch.tensor(float(found.items))
        if not model.training:
            self._count(found.total, items, *sums)
            return found.total.detach() / max(found.items, 1)
        for name, value in zip(("items", *self.measures), (items, *sums), strict=True):
            self._train_sums[name] = self._train_sums.get(name, 0.0) + float(value)
        loss = found.total / (found.items if num_items_in_batch is None else num_items_in_batch)
        return loss * (self.processes.shares if num_items_in_batch is not None else 1)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss alone, which counts itself."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the tokens seen so far, and the measures of the step where the task takes them in
        training."""
        if "loss" in logs:
            names, own = (
                [*self._train_sums],
                torch.tensor([*self._train_sums.values()], dtype=torch.float32),
            )
            sums = dict(
                zip(names, self._sum(own.to(self.accelerator.device)).tolist(), strict=True)
            )
            items = sums.pop("items", 0.0)
            logs |= {
                name: value / max(items, 1.0)
                for name, value in sums.items()
                if not math.isnan(value)
            }
            logs["num_tokens"] = self._total_train_tokens
            self._train_sums = {}
        super().log(logs, start_time)


def trainer_of(task: Task, model: Any, cached: HiddenStateCache | None, **options: Any) -> Any:
    """The trainer of a task: trl's for sft, which packs and offloads; else the plain one with the
    task's loss."""
    if task.name == "sft":  # only then: trl takes half a second to import
        from veneer.train.sft_trainer import AdapterTrainer

        return AdapterTrainer(model, hidden_state_cache=cached, **options)
    return TaskTrainer(model, task=task, **options)
