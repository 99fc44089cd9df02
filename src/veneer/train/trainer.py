"""The base class of Veneer's trainers (order of the data, atomic checkpoints, several processes),
and the trainer of all tasks but sft, with its sums over accumulated batches.

`TaskTrainer` is transformers' `Trainer` with the loss of a task; the task sft uses
`sft_trainer.AdapterTrainer`, based on trl's.

The loop, accumulation, precision, devices, schedules, optimisers, packing, collation and trackers
are trl's and transformers'. The following are replaced:

- the loss: `loss.token_loss`, because trl's fused head multiplies by `lm_head.weight` and so
  bypasses an adapter of the head;
- the order of the examples: it is a function of (seed, epoch), because an order drawn from the
  global generator differs after a resume; with `group_by_length`, examples of similar length share
  a batch, which saves the computation of padding;
- the evaluation loss: it is a mean over tokens, because a mean over batches depends on the batch
  size;
- checkpoints: they hold the adapter instead of the model, and are written under a temporary name
  that is changed once they are complete.
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

from veneer.adapter_files.save_pretrained import load_into_attached
from veneer.distributed import average_gradients, reshard
from veneer.precision import double
from veneer.train import checkpoint
from veneer.train.callbacks import StopOnSignal
from veneer.train.order import WEIGHTLESS, EpochSampler, share_loader
from veneer.train.processes import Processes
from veneer.train.tasks import Rows, Task, TaskLoss


@contextmanager
def mark_as_adapted(model: Any) -> Iterator[None]:
    """A block in which the model carries PEFT's mark, by which transformers' trainer recognises
    that a quantised model has adapters. Outside of the block, the mark would make methods of the
    model call PEFT."""
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del model.__dict__["_hf_peft_config_loaded"]


class AdapterTrainerBase(Trainer):
    """Base class of the trainers of an adapter, for all but the loss: the order of the rows, the
    evaluation, the checkpoints, and sums over several processes. `run.fit` sets `processes`, `stop`
    and `group_by_length`."""

    adapter: Any
    base_name: str
    processes = Processes()
    stop: StopOnSignal | None = None
    group_by_length = False
    #: sums over the batches of an evaluation so far: [loss, items, measures …]
    _eval_sums: torch.Tensor | None = None
    measures: tuple[str, ...] = ("accuracy",)
    #: metadata of the adapter in a checkpoint, in addition to the step
    provenance: dict[str, Any] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = (
            dataset.lengths
            if isinstance(dataset, Rows)
            else [len(ids) for ids in dataset["input_ids"]]
        )
        step_rows = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.processes.share_count
        )
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochSampler(lengths, step_rows, seed, self.group_by_length)

    @functools.cached_property
    def _flops_per_entry(self) -> int:
        """transformers' count of operations for one entry of an input tensor. It is cached, because
        it is the same for all entries and its computation visits the full model."""
        name = getattr(self.model, "main_input_name", "input_ids")
        return super().floating_point_ops({name: torch.empty(1)})

    def floating_point_ops(self, inputs: Any) -> int:
        main_input = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main_input is None else main_input.numel() * self._flops_per_entry

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """A loader that yields every row once, for any number of processes."""
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if self.processes.count == 1:
            return loader
        process_loader = share_loader(
            loader, self.processes.share_index, self.processes.share_count, self._remove_weight
        )
        return prepare_data_loader(
            process_loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _remove_weight(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Change a batch of rows that another process computes, so that it has no weight in the
        loss. Here nothing is changed: `TaskTrainer.compute_loss` multiplies the loss by 0."""
        return batch

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the training, but do not wrap the model in torch's DDP. DDP would broadcast all
        base weights when it is created, and need to know which parameters a pass may skip. It would
        also hide the model from the loss, which would then compute full logits. Instead,
        `average_gradients` communicates the adapter's gradients, once per step."""
        # with this flag, transformers does not wrap the model
        self.is_distributed_loading_by_transformers = self.processes.count > 1
        return super()._prepare_for_training(*args, **kwargs)

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Broadcast the trained parameters of the first process to the others, where initial values
        may be rounded differently."""
        with torch.no_grad():
            for parameter in self._trained_parameters:
                dist.broadcast(parameter.data, src=0)

    @functools.cached_property
    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [
            parameter for parameter in self.adapter.model.parameters() if parameter.requires_grad
        ]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.processes.count > 1 and self.accelerator.sync_gradients:
            self.processes.must_have_parent()
            average_gradients(self._trained_parameters)
        return loss

    def get_tp_size(self) -> int:
        """The number of processes that compute the same rows."""
        return self.processes.count // self.processes.share_count

    def _sum_over_shares(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all shares of the rows, element by element."""
        if self.processes.share_count > 1:
            dist.all_reduce(value)
        return value

    def _sum_counts_and_stop_requests(self, *counts: torch.Tensor) -> torch.Tensor:
        """Sum scalar counts of this step over all shares of the rows. With several processes, the
        number of processes with a request to stop is appended, so that one all-reduce suffices."""
        if self.processes.count == 1:
            return torch.stack(counts)
        is_stop_requested = self.stop is not None and self.stop.requested
        sums = torch.stack([*counts, torch.full_like(counts[0], int(is_stop_requested))])
        dist.all_reduce(sums)
        sums[:-1] //= self.get_tp_size()
        return sums

    def _stop_if_requested(self, stop_requests: list[int]) -> None:
        """Stop all processes after this step if one of them has a request to stop."""
        if self.stop is not None and any(stop_requests):
            self.stop.stopped = True

    def _add_evaluation(self, *sums: torch.Tensor) -> None:
        """Add a batch's loss, number of items and measures to the sums of an evaluation."""
        device = self.accelerator.device
        counts = torch.stack([double(value.detach().to(device)) for value in sums])
        self._eval_sums = counts if self._eval_sums is None else self._eval_sums + counts

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The evaluation loop of transformers, with the loss and the measures as means over all
        items."""
        self._eval_sums = None
        output = super().evaluation_loop(*args, **kwargs)
        reshard(self.adapter.model)  # FSDP keeps weights gathered if no backward follows
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._eval_sums is not None and output.metrics is not None:
            loss, items, *sums = self._sum_over_shares(self._eval_sums).tolist()
            output.metrics[f"{prefix}_loss"] = loss / max(items, 1)
            for name, value in zip(self.measures, sums, strict=True):
                if not math.isnan(value):  # nan: the task does not compute the measure here
                    output.metrics[f"{prefix}_{name}"] = value / max(items, 1)
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the evaluation is the best so far. The checkpoint of the best one is loaded at
        the end, so it is written even if the step is no multiple of `save_steps`."""
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoint-N atomically, with the adapter, the states of the optimiser and of the
        schedule, the random states and the trainer's state."""
        from transformers.trainer_callback import ExportableState
        from transformers.trainer_utils import rotate_checkpoints

        self.store_flos()
        step, is_main_process = self.state.global_step, self.args.should_save
        callbacks: Any = self.state.stateful_callbacks
        run_dir = self._get_output_dir(trial=trial)

        def fill(folder: Path) -> None:
            # on every rank: `save` compares the ranks' parameters, and the first rank writes
            provenance = {"step": step, **self.provenance}
            self.adapter.save(
                folder / checkpoint.ADAPTER, base_name=self.base_name, provenance=provenance
            )
            if is_main_process and self.adapter.config.trainable_tokens:
                tokenizer: Any = self.processing_class
                tokenizer.save_pretrained(str(folder / checkpoint.ADAPTER))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if best_step := self.state.best_global_step:
                best = checkpoint.path_of(run_dir, best_step)
                if best_step == step or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            if is_main_process:
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(folder / checkpoint.STATE))

        checkpoint.write(run_dir, step, fill, self.processes)
        if is_main_process:
            limit, best_checkpoint = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(
                run_dir,
                save_total_limit=limit,
                best_model_checkpoint=best_checkpoint,
                use_mtime=False,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `run.fit` has already loaded the checkpoint's adapter."""

    def _load_best_model(self) -> None:
        """Load the adapter's parameters from the best checkpoint."""
        if best_step := self.state.best_global_step:
            folder = checkpoint.path_of(str(self.args.output_dir), best_step)
            load_into_attached(self.adapter.model, folder / checkpoint.ADAPTER)


class TaskTrainer(AdapterTrainerBase):
    """A `Trainer` with the loss of a task. Takes `Trainer`'s arguments, with `Rows` as data sets,
    and the arguments `adapter` and `base_name` of `AdapterTrainer`."""

    def __init__(
        self, model: Any, *, task: Task, adapter: Any, base_name: str, **kwargs: Any
    ) -> None:
        with mark_as_adapted(model):
            super().__init__(model, data_collator=task.collate, **kwargs)
        self.task, self.measures = task, task.measures
        self.adapter, self.base_name = adapter, base_name
        self.provenance = {"task": task.record()}
        # `compute_loss` divides by the items of all accumulated batches itself
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._total_train_tokens, self._train_sums = 0, {}
        if self.args.activation_checkpointing:  # pyright: ignore[reportAttributeAccessIssue] (SFTConfig's)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )

    def get_batch_samples(self, *args: Any) -> Any:
        batches, _ = super().get_batch_samples(*args)
        weighted_inputs = [inputs for inputs in batches if WEIGHTLESS not in inputs]
        token_counts = [
            inputs["attention_mask"].sum()
            for inputs in weighted_inputs
            if "attention_mask" in inputs
        ]
        item_count = torch.tensor(
            sum(map(self.task.count_items, weighted_inputs)), device=self.accelerator.device
        )
        tokens: Any = sum(token_counts, torch.zeros_like(item_count))
        counts = self._sum_counts_and_stop_requests(item_count, tokens.to(item_count.device))
        _, global_tokens, *stop_requests = counts.tolist()
        self._stop_if_requested(stop_requests)
        self._total_train_tokens += global_tokens
        return batches, counts[0]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss per item. Also adds the values of its measures to the sums of the log or
        of the evaluation."""
        is_weightless = WEIGHTLESS in inputs
        result = self.task.loss(
            model, {name: value for name, value in inputs.items() if name != WEIGHTLESS}
        )
        if is_weightless:
            result = TaskLoss(
                result.total * 0.0, 0, {name: value * 0 for name, value in result.sums.items()}
            )
        sums = [torch.as_tensor(result.sums.get(name, math.nan)) for name in self.measures]
        items = torch.tensor(float(result.items))
        if not model.training:
            self._add_evaluation(result.total, items, *sums)
            return result.total.detach() / max(result.items, 1)
        for name, value in zip(("items", *self.measures), (items, *sums), strict=True):
            self._train_sums[name] = self._train_sums.get(name, 0.0) + float(value)
        loss = result.total / (result.items if num_items_in_batch is None else num_items_in_batch)
        return loss * (self.processes.share_count if num_items_in_batch is not None else 1)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute only the loss; `compute_loss` adds it to the sums of the evaluation."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the log entry the number of tokens so far, and the means of the task's measures
        since the last entry."""
        if "loss" in logs:
            local_sums = torch.tensor([*self._train_sums.values()], dtype=torch.float32)
            global_sums = self._sum_over_shares(local_sums.to(self.accelerator.device)).tolist()
            sums = dict(zip(self._train_sums, global_sums, strict=True))
            items = sums.pop("items", 0.0)
            logs |= {
                name: value / max(items, 1.0)
                for name, value in sums.items()
                if not math.isnan(value)
            }
            logs["num_tokens"] = self._total_train_tokens
            self._train_sums = {}
        super().log(logs, start_time)
