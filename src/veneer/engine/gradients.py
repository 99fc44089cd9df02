"""Gradients of one adapter: set aside, put back, added, measured and clipped.

A pass that fails leaves the gradients of earlier passes as they were, so these are set aside
before it (``take_gradients``) and added once it has succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer import precision

#: by parameter, in order; None where there is none
Gradients = list[Tensor | None]


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """The parameters' gradients, which are removed from them."""
    gradients = [parameter.grad for parameter in parameters]
    restore_gradients(parameters, [None] * len(gradients))
    return gradients


def restore_gradients(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add_to_earlier(parameters: Sequence[nn.Parameter], earlier: Gradients) -> None:
    """Add the parameters' gradients to those that were taken, in place, and put the sums back: a
    gradient tensor stays the same object, as with ``loss.backward()``."""
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def add_earlier(parameters: Sequence[nn.Parameter], earlier: Gradients) -> None:
    """Add gradients that were taken to those of the parameters. ``earlier`` stays as it is, so that
    it can still be restored."""
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad += gradient


def present_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float, *, wide: bool = False
) -> float:
    """Scale gradients down to the joint norm ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``
    does; 0 leaves them as they are.

    Args:
        wide: compute the norm in float64, for gradients whose squares float32 cannot hold. Without,
            it has the bits that a loop of transformers' ``Trainer`` gets.

    Returns:
        the norm before.
    """
    gradients = present_gradients(parameters)
    if wide:
        norm = math.hypot(*wide_norms(gradients))
        total_norm = torch.tensor(norm)
    else:
        total_norm = torch.nn.utils.get_total_norm(gradients)
        norm = float(total_norm)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
    return norm


def wide_norms(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor, in float64 where the device has that: float32 cannot hold the
    squares of large values."""
    if not tensors:
        return []
    device = tensors[0].device  # a base may be spread over several
    wide = torch.float64 if precision.has_float64(device) else torch.float32
    with torch.no_grad():
        norms = torch._foreach_norm(list(tensors), 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack([norm.to(device) for norm in norms]).tolist()


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN where there is one."""
    if not tensors:
        return 0.0
    with torch.no_grad():
        return float(torch.nn.utils.get_total_norm(tensors, torch.inf))
