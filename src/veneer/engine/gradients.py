"""Gradients of one adapter: taken, restored, added, measured and clipped.

A pass that fails must leave the gradients of earlier passes unchanged. So these are taken from the
parameters before the pass (``take_gradients``) and added after it has succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer import precision

#: the gradient of each parameter, or None
Gradients = list[Tensor | None]


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Remove the parameters' gradients and return them."""
    gradients = [parameter.grad for parameter in parameters]
    restore_gradients(parameters, [None] * len(gradients))
    return gradients


def restore_gradients(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add_to_earlier(parameters: Sequence[nn.Parameter], earlier: Gradients) -> None:
    """Add the parameters' gradients in place to the ones that were taken, and restore the sums. As
    with ``loss.backward()``, the gradient of a parameter stays the same tensor object."""
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def add_earlier(parameters: Sequence[nn.Parameter], earlier: Gradients) -> None:
    """Add gradients that were taken to those of the parameters. ``earlier`` is not modified, so it
    can still be restored."""
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
    """Scale gradients down to a joint norm of ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``
    does; 0 leaves them unchanged.

    Args:
        wide: compute the norm in float64, for gradients whose squares overflow float32. Without it,
            the result is bit for bit that of transformers' ``Trainer``.

    Returns:
        the norm before scaling.
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
    """The norm of each tensor, in float64 if the device supports it: squares of large values
    overflow float32."""
    if not tensors:
        return []
    device = tensors[0].device  # a base may use several devices
    wide = torch.float64 if precision.has_float64(device) else torch.float32
    with torch.no_grad():
        norms = torch._foreach_norm(list(tensors), 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack([norm.to(device) for norm in norms]).tolist()


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN if there is a NaN."""
    if not tensors:
        return 0.0
    with torch.no_grad():
        return float(torch.nn.utils.get_total_norm(tensors, torch.inf))
