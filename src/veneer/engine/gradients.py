"""Take, restore, add, measure and clip the gradients of one adapter.

If a pass (a forward and a backward) fails, the gradients of earlier passes must be unchanged. So
the earlier gradients are taken from the parameters before a pass (``take_gradients``), and added to
the new ones after the pass has succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer import precision

#: the gradient of each parameter, or None for a parameter without one
Gradients = list[Tensor | None]


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Remove the parameters' gradients and return them."""
    gradients = [parameter.grad for parameter in parameters]
    restore_gradients(parameters, [None] * len(gradients))
    return gradients


def restore_gradients(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Replace the gradients of the parameters by ``gradients``, which ``take_gradients`` returned
    for the same parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add_to_earlier_gradients(
    parameters: Sequence[nn.Parameter], earlier_gradients: Gradients
) -> None:
    """Add the parameters' gradients to ``earlier_gradients`` in place, and give the sums to the
    parameters. As with ``loss.backward()``, a parameter's gradient stays the same tensor object, so
    references that the caller holds to it stay valid."""
    for parameter, gradient in zip(parameters, earlier_gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def add_earlier_gradients(parameters: Sequence[nn.Parameter], earlier_gradients: Gradients) -> None:
    """Add ``earlier_gradients`` to the gradients of the parameters. The tensors in
    ``earlier_gradients`` are not modified, so ``restore_gradients`` can still restore them."""
    for parameter, gradient in zip(parameters, earlier_gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad += gradient


def present_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float, *, in_float64: bool = False
) -> float:
    """Scale the gradients down so that their joint norm is at most ``max_norm``, as
    ``torch.nn.utils.clip_grad_norm_`` does. A ``max_norm`` of 0 leaves them unchanged.

    Args:
        in_float64: compute the norm in float64, for gradients whose squares overflow float32. By
            default torch computes it in the gradients' dtype, as in transformers' ``Trainer``, bit
            for bit.

    Returns:
        the norm before scaling.
    """
    gradients = present_gradients(parameters)
    if in_float64:
        norm = math.hypot(*norms_in_float64(gradients))
        norm_tensor = torch.tensor(norm)
    else:
        norm_tensor = torch.nn.utils.get_total_norm(gradients)
        norm = float(norm_tensor)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm_tensor)
    return norm


def norms_in_float64(tensors: Sequence[Tensor]) -> list[float]:
    """The 2-norm of each tensor. It is computed in float64, because squares of large values
    overflow float32; on a device without float64, in float32."""
    if not tensors:
        return []
    device = tensors[0].device  # all norms go there; tensors may be on several devices
    norm_dtype = torch.float64 if precision.has_float64(device) else torch.float32
    with torch.no_grad():
        norms = torch._foreach_norm(  # pyright: ignore[reportPrivateImportUsage]
            list(tensors), 2, dtype=norm_dtype
        )
        return torch.stack([norm.to(device) for norm in norms]).tolist()


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value in any of the tensors; NaN if one holds a NaN, 0 without
    tensors."""
    if not tensors:
        return 0.0
    with torch.no_grad():
        return float(torch.nn.utils.get_total_norm(tensors, torch.inf))
