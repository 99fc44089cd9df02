"""The trainer of the task sft, based on trl's `SFTTrainer`. It takes packed rows and can offload
activations; its loss needs no full logits and is the mean over the labelled tokens of all
accumulated batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.loss import token_loss
from veneer.train.order import WEIGHTLESS
from veneer.train.tokens import IGNORED
from veneer.train.trainer import AdapterTrainerBase, mark_as_adapted

#: key of a batch under which `get_batch_samples` passes its number of labels to `compute_loss`
LABEL_COUNT = "veneer_labels"


class AdapterTrainer(AdapterTrainerBase, SFTTrainer):
    """An `SFTTrainer` for a model with a Veneer adapter attached.

    Args:
        adapter: the handle that `veneer.attach` returned.
        base_name: the name of the base in the adapter's metadata.
        hidden_state_cache: a cache of the hidden states after the frozen blocks below the lowest
            adapted block, so that these blocks run once for each row; None runs them in each pass.
        kwargs: `SFTTrainer`'s arguments. The data sets are tokenised, with the columns input_ids
            and labels.
    """

    #: number of forward passes of this step in all processes, without weightless ones (batches that
    #: a process computes only to keep step with the others)
    _weighted_pass_count = 1

    def __init__(
        self,
        model: Any,
        *,
        adapter: Any,
        base_name: str,
        hidden_state_cache: HiddenStateCache | None,
        **kwargs: Any,
    ) -> None:
        own_forward = {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {}
        with mark_as_adapted(model):
            super().__init__(model, **kwargs)
        model.__dict__.pop("forward", None)  # SFTTrainer's forward with a fused head
        model.__dict__.update(own_forward)
        self.adapter, self.base_name = adapter, base_name
        self.hidden_state_cache = hidden_state_cache
        # These flags make transformers count the labels of all accumulated batches (without those
        # of first tokens, which are not predicted) even if the model's forward takes no such count:
        # `compute_loss` divides by it.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def _send_telemetry(self) -> None:
        """Send nothing: a training run is private."""

    def _remove_weight(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def get_batch_samples(self, *args: Any) -> Any:
        """(the batches of a step, number of labels in all of them), as transformers asks for them
        before each step. Adds its number of labels to each batch, and updates the counts of tokens
        and of weighted passes. The host reads all counts of the step at once, so that it waits for
        the device only once."""
        batches, item_count = super().get_batch_samples(*args)
        if batches and all("labels" in inputs for inputs in batches):
            # packed rows have no attention mask and no padding, so all their tokens count
            weighted_inputs = [inputs for inputs in batches if WEIGHTLESS not in inputs]
            attention_masks = [inputs.get("attention_mask") for inputs in weighted_inputs]
            packed_token_count = sum(
                inputs["input_ids"].numel()
                for inputs, attention_mask in zip(weighted_inputs, attention_masks, strict=True)
                if attention_mask is None
            )
            label_counts = [(inputs["labels"][:, 1:] != IGNORED).sum() for inputs in batches]
            token_count: Any = sum(
                (
                    attention_mask.sum()
                    for attention_mask in attention_masks
                    if attention_mask is not None
                ),
                torch.full_like(label_counts[0], packed_token_count),
            )
            pass_count = torch.full_like(token_count, len(weighted_inputs))
            step_counts = self._sum_counts_and_stop_requests(token_count, pass_count)
            host_counts = torch.stack([*label_counts, *step_counts]).tolist()
            token_total, self._weighted_pass_count, *stop_requests = host_counts[
                len(label_counts) :
            ]
            label_counts = host_counts[: len(label_counts)]
            self._stop_if_requested(stop_requests)
            batches = [
                {**inputs, LABEL_COUNT: label_count}
                for inputs, label_count in zip(batches, label_counts, strict=True)
            ]
            self._total_train_tokens += token_total
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return batches, item_count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch: the summed loss of its labels, by `token_loss`, divided by
        `num_items_in_batch` (the number of labels of the step), or if that is None by the batch's
        own number. In an evaluation, also add the summed loss, the number of labels and the number
        of correct predictions to the sums of the evaluation."""
        if return_outputs:
            raise NotImplementedError(
                "AdapterTrainer computes no full logits; set prediction_loss_only=True"
            )
        is_training, is_weightless = model.training, WEIGHTLESS in inputs
        label_count = inputs.get(LABEL_COUNT)
        inputs = {
            name: value for name, value in inputs.items() if name not in (LABEL_COUNT, WEIGHTLESS)
        }
        with (
            nullcontext()
            if self.hidden_state_cache is None
            else self.hidden_state_cache.use_for(model, inputs)
        ):
            batch_loss = token_loss(model, inputs, accuracy=not is_training, count=label_count)
        if not is_training:
            self._add_evaluation(batch_loss.total, batch_loss.items, batch_loss.correct)
        label_total = (
            batch_loss.items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        )
        loss = batch_loss.total / label_total.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The loss was divided by the number of labels of all processes, so the gradients of the
            # processes must be summed. They will be averaged; this factor makes up for that.
            loss = loss * self.processes.share_count
        # `extra` is the load-balancing loss of a mixture of experts. A step takes its mean over the
        # passes of all processes. The factor share_count is there because the processes' gradients
        # will be averaged, but this mean needs their sum.
        if batch_loss.extra is not None and not is_weightless:
            loss = loss + batch_loss.extra * (
                self.processes.share_count / self._weighted_pass_count if is_training else 1
            )
        return loss
