"""Training data of a run, and losses of the log-probabilities of its target tokens.

    token ids [n] ─ model ─> log-probabilities of the target tokens, [n] or [n, k]
                  ─ loss ─> terms of the same shape ─> Σ over all tokens of all data

n: tokens of a datum; k: targets of a token. The loss is a sum over data, so the data of a request
can be divided into batches in any way. The names of losses, inputs and settings, and the formulas,
are from the documentation of the `tinker` SDK
(https://tinker-docs.thinkingmachines.ai/tinker/losses). Default settings: "ppo" and "cispo" clip
the ratio to 0.8 … 1.2, "gspo" clips it to 0.9997 … 1.0004 as in its paper (Zheng et al. 2025,
arXiv:2507.18071), and "dro" has beta 0.05. The ratio is the probability of a target, divided by its
probability when it was sampled.
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
    """One sequence of training data. ``tokens`` [n], int64: the token ids that the model reads.
    ``targets`` [n] or [n, k], int64: for each token, the id (or the k ids) to predict after it.
    ``inputs``: the other inputs of the loss, such as "weights" or "advantages", by name, each of
    the shape of ``targets``."""

    tokens: Tensor
    targets: Tensor
    inputs: Inputs = field(default_factory=dict)


class Loss(NamedTuple):
    """A loss function. ``inputs``: names of its inputs besides the log-probabilities of the
    targets; ``settings``: its settings with their defaults, by name; ``terms``: a function of
    (log-probabilities, inputs, settings) whose result, of the shape of the targets, is summed to
    get the loss."""

    inputs: tuple[str, ...]
    settings: Mapping[str, float]
    terms: Callable[[Tensor, Inputs, Mapping[str, float]], Tensor]


def _cross_entropy(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """−weight · log p of each target."""
    return -_masked_product(inputs["weights"], logprobs)


def _importance_sampling(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """−advantage · ratio of each target (``_probability_ratio``)."""
    return -_masked_product(inputs["advantages"], _probability_ratio(logprobs, inputs))


def _ppo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """The clipped objective of PPO (Schulman et al. 2017, arXiv:1707.06347), negated."""
    ratio, advantages = _probability_ratio(logprobs, inputs), inputs["advantages"]
    clipped_ratio = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(
        _masked_product(advantages, ratio), _masked_product(advantages, clipped_ratio)
    )


def _gspo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """GSPO-token, a variant of GSPO (arXiv:2507.18071): the clipped objective of PPO, negated, with
    one ratio for all tokens of a sequence. This ratio is the geometric mean of the probability
    ratios of the tokens in ``sequence_ratio_mask``. Its gradient for a token is the ratio times the
    gradient of the token's log-probability."""
    # ``logprobs - detached_logprobs`` is 0, but gives each token the gradient of its own logprob
    detached_logprobs, advantages = logprobs.detach(), inputs["advantages"]
    log_row_ratio = (detached_logprobs - inputs["logprobs"])[
        inputs["sequence_ratio_mask"] != 0
    ].mean()
    ratio = (log_row_ratio + logprobs - detached_logprobs).exp()
    clipped_ratio = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(
        _masked_product(advantages, ratio), _masked_product(advantages, clipped_ratio)
    )


def _cispo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """−advantage · (clipped ratio) · log p of each target, without a gradient of the ratio (CISPO,
    arXiv:2506.13585)."""
    clipped_ratio = (
        _probability_ratio(logprobs, inputs)
        .clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
        .detach()
    )
    return -_masked_product(inputs["advantages"], clipped_ratio * logprobs)


def _dro(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """−advantage · log p of each target, plus beta/2 times the squared difference between log p and
    its value when the target was sampled."""
    penalty = (logprobs - inputs["logprobs"]).square()
    return -(_masked_product(inputs["advantages"], logprobs) - 0.5 * settings["beta"] * penalty)


def _probability_ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """The probability of each target, divided by its probability when it was sampled, which is
    exp(``inputs["logprobs"]``). It is 1, without a gradient, for a target whose advantage is 0, so
    that its gradient is not 0 · ∞."""
    log_ratio = logprobs - inputs["logprobs"]
    return log_ratio.masked_fill(inputs["advantages"] == 0, 0.0).exp()


def _masked_product(factor: Tensor, values: Tensor) -> Tensor:
    """``factor`` · ``values``, but 0 where the factor is 0, even if ``values`` is infinite or NaN
    there. A masked target therefore cannot make the loss NaN."""
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


def complete_settings(loss_name: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """Check the settings that a client sends for the loss named ``loss_name``; return them with the
    defaults of the others. ``DataError``: the loss or a setting is unknown, a value is not a finite
    number, or the lower threshold for clipping is above the upper one."""
    if loss_name not in LOSSES:
        raise DataError(
            f"the loss {loss_name[:80]!r}",
            f"one of {listing(LOSSES)}",
            "use one of these, or a custom loss",
        )
    default_settings = LOSSES[loss_name].settings
    for setting_name, value in settings.items():
        if setting_name not in default_settings:
            raise DataError(
                f"the setting {setting_name[:80]!r} of {loss_name}",
                listing(default_settings) if default_settings else "no settings",
                "leave it out",
            )
        if isinstance(value, str) or not math.isfinite(value):
            raise DataError(
                f"{setting_name} {str(value)[:40]} of {loss_name}", "a finite number", "change it"
            )
    complete = {**default_settings, **settings}
    if complete.get("clip_low_threshold", 0.0) > complete.get("clip_high_threshold", math.inf):
        raise DataError(
            f"clip_low_threshold {complete['clip_low_threshold']:g} of {loss_name}",
            f"at most clip_high_threshold, {complete['clip_high_threshold']:g}",
            "change one of them",
        )
    return complete


def check_datum(
    datum: Datum, loss_name: str, index: int, vocabulary_size: int, context_length: int
) -> Datum:
    """Check a datum for the loss named ``loss_name``; return the datum with int64 ids and all
    inputs of the loss in float32. Missing "weights" are 1.

    Raises:
        DataError: the datum has no token or at least ``context_length`` tokens, a token is not in
            the vocabulary, or an input of the loss is missing, unknown, of another shape or not
            finite. The error's text names the datum by its ``index`` in the request.
    """
    label = f"datum {index}"
    token_count = len(datum.tokens)
    if not 0 < token_count < context_length:
        raise DataError(
            f"{label} of {token_count} tokens",
            f"1 to {context_length - 1}",
            "shorten it, or serve a longer --length",
        )
    if (
        datum.targets.dim() not in (1, 2)
        or len(datum.targets) != token_count
        or not datum.targets.numel()
    ):
        raise DataError(
            f"target_tokens {list(datum.targets.shape)} in {label}",
            f"[{token_count}] or [{token_count}, k], a target for each token",
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
    if unknown_names := sorted(datum.inputs.keys() - set(LOSSES[loss_name].inputs)):
        raise DataError(
            f"the input {unknown_names[0][:80]!r} in {label}",
            f"target_tokens and {listing(LOSSES[loss_name].inputs)}, for {loss_name}",
            "leave it out",
        )
    return Datum(datum.tokens.long(), datum.targets.long(), _loss_inputs(datum, loss_name, label))


def _loss_inputs(datum: Datum, loss_name: str, label: str) -> dict[str, Tensor]:
    """The inputs of the loss named ``loss_name``, checked and in float32. Missing "weights" are 1.
    ``label``: the name of the datum in error texts. ``DataError``: an input is invalid."""
    inputs = {}
    for input_name in LOSSES[loss_name].inputs:
        values = datum.inputs.get(input_name)
        if values is None and input_name == "weights":
            values = torch.ones_like(datum.targets, dtype=torch.float32)
        if values is None:
            raise DataError(
                f"no {input_name} in {label}",
                f"one for each target of {loss_name}",
                "add them to loss_fn_inputs",
            )
        if values.shape != datum.targets.shape:
            raise DataError(
                f"{input_name} {list(values.shape)} in {label}",
                f"{list(datum.targets.shape)}, as target_tokens",
                "give one for each target",
            )
        inputs[input_name] = values.float()
        if not inputs[input_name].isfinite().all():
            raise DataError(
                f"{input_name} that are no finite numbers in {label}",
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
