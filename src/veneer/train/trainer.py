"""The base class of Veneer's trainers (order of the data, atomic checkpoints, several processes),
and the trainer of all tasks except sft.

`TaskTrainer` is transformers' `Trainer` with the loss of a task; the task sft uses
`sft_trainer.AdapterTrainer`, based on trl's.

The loop, accumulation, precision, devices, schedules, optimisers, packing, collation and trackers
are trl's and transformers'. The following are replaced:

- the loss: `loss.token_loss`, because trl's fused head multiplies by `lm_head.weight` and so
  bypasses an adapter of the head;
- the order of the examples: it is a function of (seed, epoch), because an order drawn from the
  global generator differs after a resume; with `group_by_length`, examples of similar length share
  a batch, which saves the computation of padding;
- the evaluation loss: it is a mean over tokens (or the items of another task), because a mean over
  batches depends on the batch size;
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
    """A context in which the model has the attribute by which PEFT marks a model with adapters.
    Without the mark, transformers' trainer refuses a quantised model. After the context it is
    removed, because it would make methods of the model call PEFT."""
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del model.__dict__["_hf_peft_config_loaded"]


class AdapterTrainerBase(Trainer):
    """Base class of the trainers of an adapter. It defines the order of the rows, the evaluation,
    the checkpoints, and sums over several processes; subclasses define the loss. `run.fit` sets
    `processes`, `stop` and `group_by_length` after construction.

    Attributes:
        adapter: the `Handle` of the adapter.
        base_name: the name of the base in the metadata of saved adapters.
        measures: the names of the values that an evaluation reports beside the loss.
        provenance: metadata of the adapter in a checkpoint, in addition to the step.
    """

    adapter: Any
    base_name: str
    processes = Processes()
    stop: StopOnSignal | None = None
    group_by_length = False
    #: Sums over the batches of an evaluation so far: [loss, number of items, one per measure]. The
    #: loss and the measures are later divided by the number of items.
    _eval_sums: torch.Tensor | None = None
    measures: tuple[str, ...] = ("accuracy",)

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
        """transformers' estimate of the floating-point operations for one element of the main
        input, such as a token id. It is cached, because it is the same for all elements and its
        computation visits every parameter of the model."""
        name = getattr(self.model, "main_input_name", "input_ids")
        return super().floating_point_ops({name: torch.empty(1)})

    def floating_point_ops(self, inputs: Any) -> int:
        main_input = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main_input is None else main_input.numel() * self._flops_per_entry

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """A loader of this process's share of the rows. Over all processes, every row is counted
        once per epoch, whereas accelerate would repeat rows to fill the last batches."""
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
        """Change a weightless batch, which this process computes only to keep step with the others,
        so that its loss is 0. The base class changes nothing, because `TaskTrainer.compute_loss`
        multiplies the loss of such a batch by 0."""
        return batch

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the training, but do not wrap the model in torch's DDP. DDP would broadcast all
        base weights when it is created, and need to know which parameters a pass may skip. It would
        also hide the model from the loss, which would then compute full logits. Instead,
        `average_gradients` communicates the adapter's gradients, once per step."""
        # this flag says that the model is distributed already, so transformers does not wrap it
        self.is_distributed_loading_by_transformers = self.processes.count > 1
        return super()._prepare_for_training(*args, **kwargs)

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Broadcast the trained parameters and the adapter's buffers of the first process to the
        others, where initial values may be rounded differently."""
        buffers = [b for layer in self.adapter.layers.values() for b in layer.buffers()]
        with torch.no_grad():
            for tensor in (*self._trained_parameters, *buffers):
                dist.broadcast(tensor.data, src=0)

    @functools.cached_property
    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [
            parameter for parameter in self.adapter.model.parameters() if parameter.requires_grad
        ]

    @functools.cached_property
    def _running_statistics(self) -> list[torch.Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        full_modules = [layer_adapter.full for layer_adapter in self.adapter.layers.values()]
        return [m._buffers[name] for m in full_modules for name in names if name in m._buffers]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.processes.count > 1 and self.accelerator.sync_gradients:
            self.processes.must_have_parent()
            average_gradients(self._trained_parameters)
            for buffer in self._running_statistics:  # each process has counted its own rows
                dist.broadcast(buffer, src=0)
        return loss

    def get_tp_size(self) -> int:
        """The number of processes that compute the same rows: all with tensor parallelism, else 1.
        transformers divides its counts over all processes by this number."""
        return self.processes.count // self.processes.share_count

    def _sum_over_shares(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor, element by element and in place, over the processes that compute different
        rows. With tensor parallelism, where all compute the same rows, it stays as it is."""
        if self.processes.share_count > 1:
            dist.all_reduce(value)
        return value

    def _sum_counts_and_stop_requests(self, *counts: torch.Tensor) -> torch.Tensor:
        """Sum scalar counts of this step over the processes that compute different rows. Returns
        the sums [number of counts]. With several processes, one more element is the number of
        processes that were asked to stop, so that one all-reduce serves both purposes."""
        if self.processes.count == 1:
            return torch.stack(counts)
        is_stop_requested = self.stop is not None and self.stop.requested
        sums = torch.stack([*counts, torch.full_like(counts[0], int(is_stop_requested))])
        dist.all_reduce(sums)
        sums[:-1] //= self.get_tp_size()
        return sums

    def _stop_if_requested(self, stop_requests: list[int]) -> None:
        """End the run in this process after this step if any process was asked to stop. All
        processes get the same `stop_requests`, so that all end after the same step.

        Args:
            stop_requests: [number of processes that were asked to stop]; [] in a single process.
        """
        if self.stop is not None and any(stop_requests):
            self.stop.stopped = True

    def _add_evaluation(self, *batch_sums: torch.Tensor) -> None:
        """Add the scalars of a batch to `_eval_sums`: the summed loss, the number of items, and the
        sum of each measure, in the order of `measures`."""
        device = self.accelerator.device
        stacked_sums = torch.stack([double(value.detach().to(device)) for value in batch_sums])
        self._eval_sums = (
            stacked_sums if self._eval_sums is None else self._eval_sums + stacked_sums
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the evaluation loop of transformers, and put the loss and the measures, as means over
        all items of all processes, into the metrics of its output."""
        self._eval_sums = None
        output = super().evaluation_loop(*args, **kwargs)
        reshard(self.adapter.model)  # FSDP keeps weights gathered if no backward follows
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._eval_sums is not None and output.metrics is not None:
            loss_sum, item_count, *measure_sums = self._sum_over_shares(self._eval_sums).tolist()
            output.metrics[f"{prefix}_loss"] = loss_sum / max(item_count, 1)
            for name, measure_sum in zip(self.measures, measure_sums, strict=True):
                if not math.isnan(measure_sum):  # nan: the task does not compute the measure here
                    output.metrics[f"{prefix}_{name}"] = measure_sum / max(item_count, 1)
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the evaluation is the best so far. If the best adapter is loaded at the end of
        the run, a new best one requests a checkpoint, whatever `save_steps` is."""
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Create or load the state of the run. A resumed run saves as often as its configuration
        says now, and finds its best checkpoint in its output folder, which may have moved."""
        epochs_and_steps = super()._init_training_state(*args, **kwargs)
        self.state.save_steps = int(self.args.save_steps)
        if best_step := self.state.best_global_step:
            best_folder = checkpoint.path_of(str(self.args.output_dir), best_step)
            self.state.best_model_checkpoint = str(best_folder) if best_folder.is_dir() else None
        return epochs_and_steps

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the folder of the checkpoint of this step, atomically: the adapter, the states of
        the optimiser and of the schedule, the random states and the trainer's state. Older
        checkpoints beyond `save_total_limit` are deleted."""
        from transformers.trainer_callback import ExportableState
        from transformers.trainer_utils import rotate_checkpoints

        self.store_flos()
        step, is_main_process = self.state.global_step, self.args.should_save
        callback_states: Any = self.state.stateful_callbacks
        run_dir = self._get_output_dir(trial=trial)

        def write_files(folder: Path) -> None:
            # every rank calls `save`, which compares the ranks' parameters; only the first writes
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
                best_folder = checkpoint.path_of(run_dir, best_step)
                if best_step == step or best_folder.is_dir():
                    self.state.best_model_checkpoint = str(best_folder)
            if is_main_process:
                for stateful_object in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(stateful_object, ExportableState):
                        callback_states[type(stateful_object).__name__] = stateful_object.state()
                self.state.save_to_json(str(folder / checkpoint.STATE))

        checkpoint.write(run_dir, step, write_files, self.processes)
        if is_main_process:
            rotate_checkpoints(
                run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `run.fit` has already loaded the checkpoint's adapter."""

    def _load_best_model(self) -> None:
        """Load the adapter's parameters from the checkpoint with the best evaluation, if any."""
        if best_step := self.state.best_global_step:
            folder = checkpoint.path_of(str(self.args.output_dir), best_step)
            load_into_attached(self.adapter.model, folder / checkpoint.ADAPTER)


class TaskTrainer(AdapterTrainerBase):
    """A `Trainer` with the loss of a task.

    Args:
        adapter: the handle that `veneer.attach` returned.
        base_name: the name of the base in the adapter's metadata.
        kwargs: `Trainer`'s arguments, with `Rows` as data sets.
    """

    def __init__(
        self, model: Any, *, task: Task, adapter: Any, base_name: str, **kwargs: Any
    ) -> None:
        with mark_as_adapted(model):
            super().__init__(model, data_collator=task.collate, **kwargs)
        self.task, self.measures = task, task.measures
        self.adapter, self.base_name = adapter, base_name
        self.provenance = {"task": task.record()}
        if task.initial_adapter is not None:  # by which `veneer eval` finds the reference
            self.provenance |= {
                "config": {"adapter": task.config.adapter},
                "data": {"adapter": task.initial_adapter.hash},
            }
        # `compute_loss` divides by the number of items of all accumulated batches; these flags keep
        # transformers from dividing the loss by the number of batches as well
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
        token_count: Any = sum(token_counts, torch.zeros_like(item_count))
        global_counts = self._sum_counts_and_stop_requests(
            item_count, token_count.to(item_count.device)
        )
        _, global_token_count, *stop_requests = global_counts.tolist()
        self._stop_if_requested(stop_requests)
        self._total_train_tokens += global_token_count
        return batches, global_counts[0]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The summed loss of a batch, divided by `num_items_in_batch` (the number of items of the
        step in all processes), or if that is None or in an evaluation by the batch's own number.
        Also adds the sums of the task's measures to those of the log or of the evaluation."""
        is_weightless = WEIGHTLESS in inputs
        batch_loss = self.task.loss(
            model, {name: value for name, value in inputs.items() if name != WEIGHTLESS}
        )
        if is_weightless:
            batch_loss = TaskLoss(
                batch_loss.total * 0.0,
                0,
                {name: value * 0 for name, value in batch_loss.sums.items()},
            )
        measure_sums = [
            torch.as_tensor(batch_loss.sums.get(name, math.nan)) for name in self.measures
        ]
        item_count = torch.tensor(float(batch_loss.items))
        if not model.training:
            self._add_evaluation(batch_loss.total, item_count, *measure_sums)
            return batch_loss.total.detach() / max(batch_loss.items, 1)
        token_count = torch.as_tensor(batch_loss.sums.get("tokens", 0))
        for name, value in zip(
            ("items", "tokens", *self.measures),
            (item_count, token_count, *measure_sums),
            strict=True,
        ):
            self._train_sums[name] = self._train_sums.get(name, 0.0) + float(value)
        loss = batch_loss.total / (
            batch_loss.items if num_items_in_batch is None else num_items_in_batch
        )
        return loss * (self.processes.share_count if num_items_in_batch is not None else 1)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """(loss, None, None) for a batch of an evaluation: no logits and labels are returned,
        because `compute_loss` adds loss and measures to the sums of the evaluation."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log an entry. To one with a training loss, add the number of tokens so far and the mean
        of each of the task's measures since the last such entry."""
        if "loss" in logs:
            local_sums = torch.tensor([*self._train_sums.values()], dtype=torch.float32)
            global_sums = self._sum_over_shares(local_sums.to(self.accelerator.device)).tolist()
            global_sum_by_name = dict(zip(self._train_sums, global_sums, strict=True))
            item_count = global_sum_by_name.pop("items", 0.0)
            self._total_train_tokens += int(global_sum_by_name.pop("tokens", 0.0))
            logs |= {
                name: value / max(item_count, 1.0)
                for name, value in global_sum_by_name.items()
                if not math.isnan(value)
            }
            logs["num_tokens"] = self._total_train_tokens
            self._train_sums = {}
        super().log(logs, start_time)
