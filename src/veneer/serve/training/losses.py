"""Training data of a run, and losses of the log-probabilities of its target tokens.

    token ids [n] ─ model ─> log-probabilities of the target tokens, [n] or [n, k]
                  ─ loss ─> terms of the same shape ─> Σ over all tokens of all data

n: tokens of a datum; k: targets of a token. The loss is a sum over data, so data can be computed in
any batches. The names of losses, inputs and settings, and the formulas, are from the documentation
of the `tinker` SDK (https://tinker-docs.thinkingmachines.ai/tinker/losses). Default settings:
"ppo" and "cispo" clip the ratio to 0.8 … 1.2, "gspo" clips it as in its paper (Zheng et al. 2025,
arXiv:2507.18071), and "dro" has beta 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import DataError, listing

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Datum:
    """One row of training data. ``tokens`` [n], int64: the token ids that the model reads.
    ``targets`` [n] or [n, k], int64: the token, or the k tokens, to predict after each token that
    was read. ``inputs``: other inputs of the loss by name, of the shape of ``targets``."""

    tokens: Tensor
    targets: Tensor
    inputs: Inputs = field(default_factory=dict)


class Loss(NamedTuple):
    """A loss function. ``inputs``: names of its inputs besides the log-probabilities; ``settings``:
    names of its settings, with their defaults; ``terms``: function of (log-probabilities, inputs,
    settings) that returns the terms of the sum, of the shape of the targets."""

    inputs: tuple[str, ...]
    settings: Mapping[str, float]
    terms: Callable[[Tensor, Inputs, Mapping[str, float]], Tensor]


def _cross_entropy(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    return -_masked_product(inputs["weights"], logprobs)


def _importance_sampling(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    return -_masked_product(inputs["advantages"], _probability_ratio(logprobs, inputs))


def _ppo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    ratio, advantages = _probability_ratio(logprobs, inputs), inputs["advantages"]
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(_masked_product(advantages, ratio), _masked_product(advantages, clipped))


def _gspo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """The variant GSPO-token of GSPO (arXiv:2507.18071). All tokens of a row have the same ratio:
    the geometric mean of the probability ratios of the tokens in ``sequence_ratio_mask``. The
    gradient of a token's ratio is this mean times the gradient of the token's log-probability."""
    detached, advantages = logprobs.detach(), inputs["advantages"]
    log_row_ratio = (detached - inputs["logprobs"])[inputs["sequence_ratio_mask"] != 0].mean()
    ratio = (log_row_ratio + logprobs - detached).exp()
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(_masked_product(advantages, ratio), _masked_product(advantages, clipped))


def _cispo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    clipped = (
        _probability_ratio(logprobs, inputs)
        .clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
        .detach()
    )
    return -_masked_product(inputs["advantages"], clipped * logprobs)


def _dro(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    penalty = (logprobs - inputs["logprobs"]).square()
    return -(_masked_product(inputs["advantages"], logprobs) - 0.5 * settings["beta"] * penalty)


def _probability_ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """The probability of each target, divided by its probability when it was sampled."""
    return (logprobs - inputs["logprobs"]).exp()


def _masked_product(factor: Tensor, values: Tensor) -> Tensor:
    """``factor`` · ``values``, but 0 where the factor is 0, even if ``values`` is not finite
    there."""
    return torch.where(factor == 0, torch.zeros_like(values), values) * factor


_CLIP_SETTINGS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_POLICY_INPUTS = ("logprobs", "advantages")
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(("weights",), {}, _cross_entropy),
    "importance_sampling": Loss(_POLICY_INPUTS, {}, _importance_sampling),
    "ppo": Loss(_POLICY_INPUTS, _CLIP_SETTINGS, _ppo),
    "gspo": Loss(
        (*_POLICY_INPUTS, "sequence_ratio_mask"),
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        _gspo,
    ),
    "cispo": Loss(_POLICY_INPUTS, _CLIP_SETTINGS, _cispo),
    "dro": Loss(_POLICY_INPUTS, {"beta": 0.05}, _dro),
}


def complete_settings(loss: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """Check the settings of a loss and add the defaults. ``DataError``: an unknown loss or setting,
    or a value that is no finite number."""
    if loss not in LOSSES:
        raise DataError(
            f"the loss {loss[:80]!r}",
            f"one of {listing(LOSSES)}",
            "use one of these, or a custom loss",
        )
    defaults = LOSSES[loss].settings
    for name, value in settings.items():
        if name not in defaults:
            raise DataError(
                f"the setting {name[:80]!r} of {loss}",
                listing(defaults) if defaults else "no settings",
                "leave it out",
            )
        if isinstance(value, str) or not math.isfinite(value):
            raise DataError(f"{name} {str(value)[:40]} of {loss}", "a finite number", "change it")
    complete = {**defaults, **settings}
    if complete.get("clip_low_threshold", 0.0) > complete.get("clip_high_threshold", math.inf):
        raise DataError(
            f"clip_low_threshold {complete['clip_low_threshold']:g} of {loss}",
            f"at most clip_high_threshold, {complete['clip_high_threshold']:g}",
            "change one of them",
        )
    return complete


def check_datum(
    datum: Datum, loss: str, index: int, vocabulary_size: int, context_length: int
) -> Datum:
    """Check a datum; return the datum with all inputs of its loss in float32.

    Raises:
        DataError: the datum is empty or longer than the context, a token is not in the vocabulary,
            or an input is missing, unknown, of another shape or not finite. The message names the
            datum by its ``index``.
    """
    label = f"datum {index}"
    size = len(datum.tokens)
    if not 0 < size < context_length:
        raise DataError(
            f"{label} of {size} tokens",
            f"1 to {context_length - 1}",
            "shorten it, or serve a longer --length",
        )
    if datum.targets.dim() not in (1, 2) or len(datum.targets) != size or not datum.targets.numel():
        raise DataError(
            f"target_tokens {list(datum.targets.shape)} in {label}",
            f"[{size}] or [{size}, k], a target for each token",
            "shift the targets by one",
        )
    for name, ids in (("model_input", datum.tokens), ("target_tokens", datum.targets)):
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary_size:
            token = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(
                f"token {token} in {name} of {label}",
                f"ids from 0 to {vocabulary_size - 1}",
                "use the base's tokenizer",
            )
    if unknown_names := sorted(datum.inputs.keys() - set(LOSSES[loss].inputs)):
        raise DataError(
            f"the input {unknown_names[0][:80]!r} in {label}",
            f"target_tokens and {listing(LOSSES[loss].inputs)}, for {loss}",
            "leave it out",
        )
    return Datum(datum.tokens.long(), datum.targets.long(), _loss_inputs(datum, loss, label))


def _loss_inputs(datum: Datum, loss: str, label: str) -> dict[str, Tensor]:
    inputs = {}
    for name in LOSSES[loss].inputs:
        values = datum.inputs.get(name)
        if values is None and name == "weights":
            values = torch.ones_like(datum.targets, dtype=torch.float32)
        if values is None:
            raise DataError(
                f"no {name} in {label}",
                f"one for each target of {loss}",
                "add them to loss_fn_inputs",
            )
        if values.shape != datum.targets.shape:
            raise DataError(
                f"{name} {list(values.shape)} in {label}",
                f"{list(datum.targets.shape)}, as target_tokens",
                "give one for each target",
            )
        inputs[name] = values.float()
        if not inputs[name].isfinite().all():
            raise DataError(
                f"{name} that are no finite numbers in {label}",
                "finite ones",
                "look where they come from",
            )
    if "sequence_ratio_mask" in inputs and not inputs["sequence_ratio_mask"].any():
        raise DataError(
            f"a sequence_ratio_mask of zeros in {label}",
            "a token of the answer, at least",
            "mark these",
        )
    return inputs
