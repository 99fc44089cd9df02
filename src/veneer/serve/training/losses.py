"""What a run learns from: data, and losses of the log-probabilities of their target tokens.

    tokens [n] ─ model ─> logprobs of target_tokens [n] or [n, k] ─ loss ─> Σ over all tokens of all
    data

A loss is a sum of terms of single rows, so that data may be computed in any batches. Names, inputs,
settings and definitions are those of the `tinker` SDK's documentation
(https://tinker-docs.thinkingmachines.ai/tinker/losses); "cispo" is clipped as "ppo" is, 0.8 to 1.2,
"gspo" as in its paper (Zheng et al. 2025, arXiv:2507.18071), and "dro" has beta 0.05, unless a
request says otherwise.
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
    """One row: ``tokens`` [n], what the model reads; ``targets`` [n] or [n, k], what it should say
    behind each of them; ``inputs``, the further numbers of the loss, of the targets' shape."""

    tokens: Tensor
    targets: Tensor
    inputs: Inputs = field(default_factory=dict)


class Loss(NamedTuple):
    """A loss: the names of its inputs, its settings with their defaults, and the terms that it
    sums, of the targets' shape: (logprobs, inputs, settings) -> terms."""

    inputs: tuple[str, ...]
    settings: Mapping[str, float]
    terms: Callable[[Tensor, Inputs, Mapping[str, float]], Tensor]


def _cross_entropy(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    return -_where(inputs["weights"], logprobs)


def _importance_sampling(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    return -_where(inputs["advantages"], _ratio(logprobs, inputs))


def _ppo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(_where(advantages, ratio), _where(advantages, clipped))


def _gspo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    """GSPO-token: a token has the value of its row's ratio, the geometric mean of the tokens', and
    its own gradient."""
    now, advantages = logprobs.detach(), inputs["advantages"]
    of_row = (now - inputs["logprobs"])[inputs["sequence_ratio_mask"] != 0].mean()
    ratio = (of_row + logprobs - now).exp()
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    return -torch.minimum(_where(advantages, ratio), _where(advantages, clipped))


def _cispo(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    clipped = (
        _ratio(logprobs, inputs)
        .clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
        .detach()
    )
    return -_where(inputs["advantages"], clipped * logprobs)


def _dro(logprobs: Tensor, inputs: Inputs, settings: Mapping[str, float]) -> Tensor:
    penalty = (logprobs - inputs["logprobs"]).square()
    return -(_where(inputs["advantages"], logprobs) - 0.5 * settings["beta"] * penalty)


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return (logprobs - inputs["logprobs"]).exp()


def _where(factor: Tensor, values: Tensor) -> Tensor:
    """Their product, 0 where the factor is, whatever the value."""
    return torch.where(factor == 0, torch.zeros_like(values), values) * factor


_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_POLICY = ("logprobs", "advantages")
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(("weights",), {}, _cross_entropy),
    "importance_sampling": Loss(_POLICY, {}, _importance_sampling),
    "ppo": Loss(_POLICY, _CLIP, _ppo),
    "gspo": Loss(
        (*_POLICY, "sequence_ratio_mask"),
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        _gspo,
    ),
    "cispo": Loss(_POLICY, _CLIP, _cispo),
    "dro": Loss(_POLICY, {"beta": 0.05}, _dro),
}


def checked_settings(loss: str, given: Mapping[str, Any]) -> dict[str, float]:
    """The settings of a loss, with defaults. ``DataError``: an unknown loss or setting, a value
    that is no number."""
    if loss not in LOSSES:
        raise DataError(
            f"the loss {loss[:80]!r}",
            f"one of {listing(LOSSES)}",
            "use one of these, or a custom loss",
        )
    known = LOSSES[loss].settings
    for name, value in given.items():
        if name not in known:
            expected = listing(known) if known else "no settings"
            raise DataError(f"the setting {name[:80]!r} of {loss}", expected, "leave it out")
        if isinstance(value, str) or not math.isfinite(value):
            raise DataError(f"{name} {str(value)[:40]} of {loss}", "a finite number", "change it")
    settings = {**known, **given}
    if settings.get("clip_low_threshold", 0.0) > settings.get("clip_high_threshold", math.inf):
        found = f"clip_low_threshold {settings['clip_low_threshold']:g} of {loss}"
        raise DataError(
            found,
            f"at most clip_high_threshold, {settings['clip_high_threshold']:g}",
            "change one of them",
        )
    return settings


def checked(datum: Datum, loss: str, number: int, vocabulary: int, length: int) -> Datum:
    """A datum with all inputs of its loss, as float32. ``DataError`` names it by its ``number``: it
    is empty or longer than the context, a token is none of the vocabulary, an input is missing,
    unknown, of another shape or no number."""
    where = f"datum {number}"
    size = len(datum.tokens)
    if not 0 < size < length:
        raise DataError(
            f"{where} of {size} tokens",
            f"1 to {length - 1}",
            "shorten it, or serve a longer --length",
        )
    if datum.targets.dim() not in (1, 2) or len(datum.targets) != size or not datum.targets.numel():
        found = f"target_tokens {list(datum.targets.shape)} in {where}"
        raise DataError(
            found, f"[{size}] or [{size}, k], a target for each token", "shift the targets by one"
        )
    for name, ids in (("model_input", datum.tokens), ("target_tokens", datum.targets)):
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            found = f"token {int(ids.min() if ids.min() < 0 else ids.max())} in {name} of {where}"
            raise DataError(found, f"ids from 0 to {vocabulary - 1}", "use the base's tokenizer")
    if unknown := sorted(datum.inputs.keys() - set(LOSSES[loss].inputs)):
        found = f"the input {unknown[0][:80]!r} in {where}"
        raise DataError(
            found, f"target_tokens and {listing(LOSSES[loss].inputs)}, for {loss}", "leave it out"
        )
    inputs = {}
    for name in LOSSES[loss].inputs:
        values = datum.inputs.get(name)
        if values is None and name == "weights":
            values = torch.ones_like(datum.targets, dtype=torch.float32)
        if values is None:
            raise DataError(
                f"no {name} in {where}",
                f"one for each target of {loss}",
                "add them to loss_fn_inputs",
            )
        if values.shape != datum.targets.shape:
            found = f"{name} {list(values.shape)} in {where}"
            raise DataError(
                found, f"{list(datum.targets.shape)}, as target_tokens", "give one for each target"
            )
        inputs[name] = values.float()
        if not inputs[name].isfinite().all():
            raise DataError(
                f"{name} that are no finite numbers in {where}",
                "finite ones",
                "look where they come from",
            )
    if "sequence_ratio_mask" in inputs and not inputs["sequence_ratio_mask"].any():
        raise DataError(
            f"a sequence_ratio_mask of zeros in {where}",
            "a token of the answer, at least",
            "mark these",
        )
    return Datum(datum.tokens.long(), datum.targets.long(), inputs)
