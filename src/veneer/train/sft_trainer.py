"""trl's `SFTTrainer` with Veneer's adapters in it, for the task sft: packing, offloading, and a
lean loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.loss import token_loss
from veneer.train.order import SPARE
from veneer.train.tokens import IGNORED
from veneer.train.trainer import TrainsAdapter, seen_as_adapted

#: the key under which a batch says how many labels it has
LABELS = "veneer_labels"


class AdapterTrainer(TrainsAdapter, SFTTrainer):
    """An `SFTTrainer` for a model with a Veneer adapter attached.

    Takes `SFTTrainer`'s arguments, with tokenised data sets (columns input_ids, labels), and
        adapter: the handle that `veneer.attach` gave;
        base_name: what the adapter's metadata calls the base;
        hidden_state_cache: of the frozen blocks below the lowest adapted one, or None.
    """

    _passes = 1  # forward passes of this step that count, in all processes

    def __init__(
        self,
        model: Any,
        *,
        adapter: Any,
        base_name: str,
        hidden_state_cache: HiddenStateCache | None,
        **kwargs: Any,
    ) -> None:
        own = {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {}
        with seen_as_adapted(model):
            super().__init__(model, **kwargs)
        model.__dict__.pop("forward", None)  # SFTTrainer's fused head
        model.__dict__.update(own)
        self.adapter, self.base_name, self.hidden_state_cache = (
            adapter,
            base_name,
            hidden_state_cache,
        )
        # The loss divides by the labels of the whole accumulated batch, whatever the model's
        # forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def _send_telemetry(self) -> None:
        """A training run is nobody else's business."""

    def _spare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def get_batch_samples(self, *args: Any) -> Any:
        """The batches of a step, each with the number of its labels, so that nothing in the step
        waits for the device: numbers of all of them, and the tokens of all processes, are read here
        at once."""
        samples, items = super().get_batch_samples(*args)
        if samples and all("labels" in inputs for inputs in samples):
            # packed rows have no mask, and no padding
            real = [inputs for inputs in samples if SPARE not in inputs]
            masks = [inputs.get("attention_mask") for inputs in real]
            whole = sum(
                inputs["input_ids"].numel()
                for inputs, mask in zip(real, masks, strict=True)
                if mask is None
            )
            counts = [(inputs["labels"][:, 1:] != IGNORED).sum() for inputs in samples]
            seen: Any = sum(
                (mask.sum() for mask in masks if mask is not None),
                torch.full_like(counts[0], whole),
            )
            passes = torch.full_like(seen, len(real))
            numbers = torch.stack([*counts, *self._over_all(seen, passes)]).tolist()
            counts, (total, self._passes, *signals) = numbers[: len(counts)], numbers[len(counts) :]
            self._heed(signals)
            samples = [
                {**inputs, LABELS: count} for inputs, count in zip(samples, counts, strict=True)
            ]
            self._total_train_tokens += total
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return samples, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `token_loss`; counts tokens, and in evaluation the right answers."""
        if return_outputs:
            raise NotImplementedError(
                "AdapterTrainer computes no full logits; set prediction_loss_only=True"
            )
        training, count, spare = model.training, inputs.get(LABELS), SPARE in inputs
        inputs = {name: value for name, value in inputs.items() if name not in (LABELS, SPARE)}
        with (
            nullcontext()
            if self.hidden_state_cache is None
            else self.hidden_state_cache.given(model, inputs)
        ):
            result = token_loss(model, inputs, accuracy=not training, count=count)
        if not training:
            self._count(result.total, result.items, result.correct)
        items = result.items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = result.total / items.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the count is of all processes, and gradients are averaged
            loss = loss * self.processes.shares
        # a mean over the passes of all processes, which are averaged
        if result.extra is not None and not spare:
            loss = loss + result.extra * (self.processes.shares / self._passes if training else 1)
        return loss
