"""trl's `SFTTrainer` with Veneer's adapters in it: lean loss, exact order of the data, atomic checkpoints.

What is taken from trl and transformers: the loop, accumulation, precision, devices, schedules, optimisers, packing,
collation, trackers. What is replaced, and why:

- the loss: `loss.token_loss`, because trl's fused head multiplies by `lm_head.weight` and so bypasses an adapter there;
- the order of the examples: a function of (seed, epoch), because one drawn from the global generator differs after a
  resume; examples of similar length share a batch, because padding is computed too;
- the evaluation loss: a mean over tokens, because a mean over batches depends on the batch size;
- checkpoints: the adapter instead of the model, under a temporary name that is renamed when complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.trainer.sft_trainer import SFTTrainer

from veneer.adapter_files.save_pretrained import refill
from veneer.precision import double
from veneer.train import checkpoint
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.loss import token_loss
from veneer.train.tokens import IGNORED

#: the key under which a batch says how many labels it has
LABELS = "veneer_labels"


@contextmanager
def _adapted(model: Any) -> Iterator[None]:
    """A block in which transformers' trainer sees that a quantised model has adapters, as it asks by PEFT's mark. Only
    there: elsewhere the mark makes methods of the model call PEFT."""
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del model.__dict__["_hf_peft_config_loaded"]


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends on (seed, epoch) alone; neighbours are of similar length. transformers
    sorts each stretch of fifty batches by length, longest first, so the batches of a stretch come in falling order of
    length; here the batches are shuffled after that, all but the first, which holds the longest example and so shows at
    once whether memory suffices."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        indices = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        first, *batches = (indices[i : i + self.batch] for i in range(0, len(indices), self.batch))
        last = batches.pop() if batches and len(indices) % self.batch else []  # short: it would shift all the others
        order = torch.randperm(len(batches), generator=generator).tolist()
        return chain(first, *(batches[number] for number in order), last)


class AdapterTrainer(SFTTrainer):
    """An `SFTTrainer` for a model with a Veneer adapter attached.

    Takes `SFTTrainer`'s arguments, with tokenised data sets (columns input_ids, labels), and
        adapter: the handle that `veneer.attach` gave;
        base_name: what the adapter's metadata calls the base;
        hidden_state_cache: of the frozen blocks below the lowest adapted one, or None.
    """

    def __init__(
        self, model: Any, *, adapter: Any, base_name: str, hidden_state_cache: HiddenStateCache | None, **kwargs: Any
    ) -> None:
        own = {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {}
        with _adapted(model):
            super().__init__(model, **kwargs)
        model.__dict__.pop("forward", None)  # SFTTrainer's fused head
        model.__dict__.update(own)
        self.adapter, self.base_name, self.hidden_state_cache = adapter, base_name, hidden_state_cache
        # The loss divides by the labels of the whole accumulated batch, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._eval_total: torch.Tensor | None = None

    def _send_telemetry(self) -> None:
        """A training run is nobody else's business."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in dataset["input_ids"]]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochSampler(lengths, batch, seed)

    def get_batch_samples(self, *args: Any) -> Any:
        """The batches of a step, each with the number of its labels, so that nothing in the step waits for the device:
        numbers of all of them, and the tokens of all processes, are read here at once."""
        samples, items = super().get_batch_samples(*args)
        if samples and all("labels" in inputs for inputs in samples):
            # packed rows have no mask, and no padding
            masks = [inputs.get("attention_mask") for inputs in samples]
            whole = sum(
                inputs["input_ids"].numel() for inputs, mask in zip(samples, masks, strict=True) if mask is None
            )
            counts = [(inputs["labels"][:, 1:] != IGNORED).sum() for inputs in samples]
            seen: Any = sum((mask.sum() for mask in masks if mask is not None), torch.full_like(counts[0], whole))
            *counts, total = torch.stack([*counts, self._sum(seen)]).tolist()
            samples = [{**inputs, LABELS: count} for inputs, count in zip(samples, counts, strict=True)]
            self._total_train_tokens += total
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return samples, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `token_loss`; counts tokens, and in evaluation the right answers."""
        if return_outputs:
            raise NotImplementedError("AdapterTrainer computes no full logits; set prediction_loss_only=True")
        training, count = model.training, inputs.get(LABELS)
        inputs = {name: value for name, value in inputs.items() if name != LABELS}
        with nullcontext() if self.hidden_state_cache is None else self.hidden_state_cache.given(model, inputs):
            result = token_loss(model, inputs, accuracy=not training, count=count)
        if not training:
            counts = self._sum(torch.stack([double(result.total.detach()), result.items, result.correct]))  # [3]
            self._eval_total = counts if self._eval_total is None else self._eval_total + counts
        items = result.items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = result.total / items.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and gradients are averaged
        if result.extra is not None:
            loss = loss + result.extra / (self.current_gradient_accumulation_steps if training else 1)
        return loss

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, of the same shape."""
        gathered: Any = self.accelerator.gather(value[None])  # [processes, ...]
        return gathered.sum(dim=0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As before, with the loss as a mean over tokens and the share of tokens that are right."""
        self._eval_total = None
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        counts: Any = self._eval_total
        if counts is not None and output.metrics is not None:
            loss, items, correct = counts.tolist()
            output.metrics[f"{prefix}_loss"] = loss / max(items, 1)
            output.metrics[f"{prefix}_accuracy"] = correct / max(items, 1)
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """checkpoint-N: adapter, optimiser, schedule, random states, trainer state. Complete, or not there at all."""
        from transformers.trainer_callback import ExportableState
        from transformers.trainer_utils import rotate_checkpoints

        self.store_flos()
        step, main = self.state.global_step, self.args.should_save
        callbacks: Any = self.state.stateful_callbacks
        run_dir = self._get_output_dir(trial=trial)
        with checkpoint.writing(run_dir, step, main, lambda value: broadcast_object_list([value])[0]) as folder:
            # on every rank: they compare what they hold, and the main one writes
            self.adapter.save(folder / checkpoint.ADAPTER, base_name=self.base_name, provenance={"step": step})
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(checkpoint.path_of(run_dir, self.state.best_global_step))
            if main:
                for item in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(item, ExportableState):
                        callbacks[type(item).__name__] = item.state()
                self.state.save_to_json(str(folder / checkpoint.STATE))
        if main:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `run.fit` has loaded the checkpoint's adapter instead of attaching a new one."""

    def _load_best_model(self) -> None:
        """Give the adapter the numbers of the best checkpoint."""
        if self.state.best_model_checkpoint is not None:
            refill(self.adapter.model, checkpoint.Path(self.state.best_model_checkpoint) / checkpoint.ADAPTER)
