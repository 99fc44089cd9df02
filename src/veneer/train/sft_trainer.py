"""The trainer of the task sft, based on trl's `SFTTrainer`: packing, offloading, a loss that needs
no full logits, and the mean over the labelled tokens of accumulated batches."""

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

#: key under which a batch holds its number of labels
LABEL_COUNT = "veneer_labels"


class AdapterTrainer(AdapterTrainerBase, SFTTrainer):
    """An `SFTTrainer` for a model with a Veneer adapter attached.

    Args:
        adapter: the handle that `veneer.attach` returned.
        base_name: the name of the base in the adapter's metadata.
        hidden_state_cache: cache of the frozen blocks below the lowest adapted one, or None.
        kwargs: `SFTTrainer`'s arguments. The data sets are tokenised, with the columns input_ids
            and labels.
    """

    #: number of forward passes of this step in all processes, without those that have no weight
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
        forward_attribute = (
            {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {}
        )
        with mark_as_adapted(model):
            super().__init__(model, **kwargs)
        model.__dict__.pop("forward", None)  # removes SFTTrainer's fused head
        model.__dict__.update(forward_attribute)
        self.adapter, self.base_name = adapter, base_name
        self.hidden_state_cache = hidden_state_cache
        # The loss divides by the number of labels of all accumulated batches, even if the model's
        # forward has no parameter for this number.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def _send_telemetry(self) -> None:
        """Send nothing: a training run is private."""

    def _remove_weight(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def get_batch_samples(self, *args: Any) -> Any:
        """The batches of a step, each with the number of its labels. Here, the host reads these
        numbers together with all other counts of the step, so that it waits for the device only
        once."""
        batches, item_count = super().get_batch_samples(*args)
        if batches and all("labels" in inputs for inputs in batches):
            # packed rows have neither a mask nor padding
            weighted_inputs = [inputs for inputs in batches if WEIGHTLESS not in inputs]
            masks = [inputs.get("attention_mask") for inputs in weighted_inputs]
            packed_tokens = sum(
                inputs["input_ids"].numel()
                for inputs, mask in zip(weighted_inputs, masks, strict=True)
                if mask is None
            )
            counts = [(inputs["labels"][:, 1:] != IGNORED).sum() for inputs in batches]
            tokens: Any = sum(
                (mask.sum() for mask in masks if mask is not None),
                torch.full_like(counts[0], packed_tokens),
            )
            passes = torch.full_like(tokens, len(weighted_inputs))
            step_counts = self._sum_counts_and_stop_requests(tokens, passes)
            all_counts = torch.stack([*counts, *step_counts]).tolist()
            token_total, self._weighted_pass_count, *stop_requests = all_counts[len(counts) :]
            counts = all_counts[: len(counts)]
            self._stop_if_requested(stop_requests)
            batches = [
                {**inputs, LABEL_COUNT: count}
                for inputs, count in zip(batches, counts, strict=True)
            ]
            self._total_train_tokens += token_total
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return batches, item_count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss per label, by `token_loss`. In an evaluation, also add the summed loss, the
        number of labels and of correct predictions to the sums of the evaluation."""
        if return_outputs:
            raise NotImplementedError(
                "AdapterTrainer computes no full logits; set prediction_loss_only=True"
            )
        training, is_weightless = model.training, WEIGHTLESS in inputs
        count = inputs.get(LABEL_COUNT)
        inputs = {
            name: value for name, value in inputs.items() if name not in (LABEL_COUNT, WEIGHTLESS)
        }
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
            # The loss was divided by the number of labels of all processes. This factor undoes the
            # average of the processes' gradients.
            loss = loss * self.processes.share_count
        # The balancing loss is a mean over the passes of all processes. The factor share_count
        # undoes the average of the processes' gradients.
        if result.extra is not None and not is_weightless:
            loss = loss + result.extra * (
                self.processes.share_count / self._weighted_pass_count if training else 1
            )
        return loss
