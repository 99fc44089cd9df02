"""trl's `SFTTrainer` for Veneer's adapters, for the task sft: packing, offloading, and a loss
without full logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.loss import token_loss
from veneer.train.order import SPARE
from veneer.train.tokens import IGNORED
from veneer.train.trainer import TrainsAdapter, marked_as_adapted

#: key of a batch's number of labels
LABELS = "veneer_labels"


class AdapterTrainer(TrainsAdapter, SFTTrainer):
    """An `SFTTrainer` for a model with a Veneer adapter attached.

    Takes `SFTTrainer`'s arguments, with tokenised data sets (columns input_ids, labels), and
        adapter: the handle that `veneer.attach` returned;
        base_name: the name of the base in the adapter's metadata;
        hidden_state_cache: cache of the frozen blocks below the lowest adapted one, or None.
    """

    #: forward passes of this step in all processes, without those that carry no weight
    _passes = 1

    def __init__(
        self,
        model: Any,
        *,
        adapter: Any,
        base_name: str,
        hidden_state_cache: HiddenStateCache | None,
        **kwargs: Any,
    ) -> None:
        forward = {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {}
        with marked_as_adapted(model):
            super().__init__(model, **kwargs)
        model.__dict__.pop("forward", None)  # SFTTrainer's fused head
        model.__dict__.update(forward)
        self.adapter, self.base_name = adapter, base_name
        self.hidden_state_cache = hidden_state_cache
        # The loss divides by the labels of all accumulated batches, even if the model's forward
        # takes no number of labels.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def _send_telemetry(self) -> None:
        """Send nothing: a training run is private."""

    def _spare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def get_batch_samples(self, *args: Any) -> Any:
        """The batches of a step, each with the number of its labels. All counts of the step, in all
        processes, are read from the device here at once, so that nothing else waits for it."""
        samples, items = super().get_batch_samples(*args)
        if samples and all("labels" in inputs for inputs in samples):
            # packed rows have neither a mask nor padding
            real = [inputs for inputs in samples if SPARE not in inputs]
            masks = [inputs.get("attention_mask") for inputs in real]
            packed_tokens = sum(
                inputs["input_ids"].numel()
                for inputs, mask in zip(real, masks, strict=True)
                if mask is None
            )
            counts = [(inputs["labels"][:, 1:] != IGNORED).sum() for inputs in samples]
            tokens: Any = sum(
                (mask.sum() for mask in masks if mask is not None),
                torch.full_like(counts[0], packed_tokens),
            )
            passes = torch.full_like(tokens, len(real))
            numbers = torch.stack([*counts, *self._sum_counts(tokens, passes)]).tolist()
            counts, (total, self._passes, *signals) = numbers[: len(counts)], numbers[len(counts) :]
            self._stop_on_signals(signals)
            samples = [
                {**inputs, LABELS: count} for inputs, count in zip(samples, counts, strict=True)
            ]
            self._total_train_tokens += total
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return samples, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `token_loss`. In evaluation also adds to the sums of the loss and the
        accuracy."""
        if return_outputs:
            raise NotImplementedError(
                "AdapterTrainer computes no full logits; set prediction_loss_only=True"
            )
        training, count, spare = model.training, inputs.get(LABELS), SPARE in inputs
        inputs = {name: value for name, value in inputs.items() if name not in (LABELS, SPARE)}
        with (
            nullcontext()
            if self.hidden_state_cache is None
            else self.hidden_state_cache.use_for(model, inputs)
        ):
            result = token_loss(model, inputs, accuracy=not training, count=count)
        if not training:
            self._add_evaluation(result.total, result.items, result.correct)
        items = result.items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = result.total / items.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the number of labels covers all processes, which later average their gradients
            loss = loss * self.processes.shares
        # the balancing loss is a mean over the passes of all processes; their gradients are
        # averaged
        if result.extra is not None and not spare:
            loss = loss + result.extra * (self.processes.shares / self._passes if training else 1)
        return loss
